//! The rings of local processes, as the core's thread polls them: a ring is the queue, bounded by its frames.

use std::collections::HashMap;
use std::os::fd::AsFd;
use std::time::Instant;

use tender_proto::descriptors::{Bell, EventFd};
use tender_proto::door::{self, Asked};
use tender_proto::ring::{DaemonRing, RingMemory, Ticket};

use super::ring::{self, Mappings, Member};
use super::waiting::Sleeper;
use crate::device::memory::Arena;
use crate::names::AttachmentId;
use crate::telemetry;
use crate::verb::{Reply, Verb};

/// Requests taken from one ring before the next one's turn comes.
const TURN: usize = 8;

/// A process at the local door.
pub struct Local {
    /// Who.
    pub member: Member,
    /// Its ring.
    pub ring: DaemonRing<RingMemory>,
    /// It signals this when the daemon sleeps.
    pub doorbell: EventFd,
    /// It listens to this when it sleeps.
    pub bell: Bell,
}

impl std::fmt::Debug for Local {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Local").field("member", &self.member).finish_non_exhaustive()
    }
}

/// What a ring was asked and has not answered.
#[derive(Debug)]
pub struct Open {
    /// Whose ring.
    attachment: AttachmentId,
    ticket: Ticket,
    asked: Asked,
    since: Instant,
}

/// A request that came through a ring.
pub struct Taken {
    /// What.
    pub verb: Verb,
    /// How long it may wait, in milliseconds; 0: as long as is usual.
    pub deadline_ms: u32,
    /// Where its reply goes.
    pub open: Open,
}

/// All of them.
pub struct Locals {
    by_name: HashMap<AttachmentId, Local>,
    /// In the order of their turns.
    order: Vec<AttachmentId>,
    mappings: Mappings,
    /// Rings that something was put into since their clients were last looked at.
    told: Vec<AttachmentId>,
    bytes: Vec<u8>,
}

impl Locals {
    /// None yet.
    pub fn new(arena: &Arena) -> Self {
        let mappings = Mappings::new(arena);
        Self { by_name: HashMap::new(), order: Vec::new(), mappings, told: Vec::new(), bytes: Vec::new() }
    }

    /// Whether there are any.
    pub fn is_empty(&self) -> bool {
        self.order.is_empty()
    }

    /// An ingest place of the arena holds that file.
    pub fn name_mapping(&mut self, segment: u32, mapping: u32) {
        self.mappings.name(segment, mapping);
    }

    /// Listens to the doorbell of a process that may be let in: [`Self::open`] or [`Self::ignore`] is next.
    pub fn listen(local: &Local, sleeper: &Sleeper) -> std::io::Result<()> {
        sleeper.listen(local.doorbell.as_fd(), local.member.attachment.0)
    }

    /// Does not, since it is not let in.
    pub fn ignore(local: &Local, sleeper: &Sleeper) {
        sleeper.ignore(local.doorbell.as_fd());
    }

    /// One more process, whose doorbell is listened to.
    pub fn open(&mut self, local: Local) {
        self.order.push(local.member.attachment);
        self.by_name.insert(local.member.attachment, local);
    }

    /// A process is gone, or has left.
    pub fn close(&mut self, attachment: AttachmentId, sleeper: &Sleeper) {
        let Some(mut local) = self.by_name.remove(&attachment) else { return };
        self.order.retain(|other| *other != attachment);
        sleeper.ignore(local.doorbell.as_fd());
        local.ring.close();
        // Nobody may be listening any more.
        let _ = local.bell.ring();
    }

    /// Tells all processes to go elsewhere.
    pub fn close_all(&mut self, sleeper: &Sleeper) {
        for attachment in self.order.clone() {
            self.close(attachment, sleeper);
        }
    }

    /// Takes what the rings hold, a few of each. What breaks a rule is answered; a client that breaks its counters is returned: nothing
    /// more can be had from its ring.
    pub fn take(&mut self, requests: &mut Vec<Taken>) -> Vec<AttachmentId> {
        let mut broken = Vec::new();
        for &attachment in &self.order {
            let Some(Local { member, ring, .. }) = self.by_name.get_mut(&attachment) else { continue };
            for _ in 0..TURN {
                let taken = match ring.take(&mut self.bytes) {
                    None => break,
                    Some(Ok(taken)) => taken,
                    Some(Err(hostile)) => {
                        tracing::debug!(?attachment, "a ring breaks a rule: {hostile}");
                        self.told.push(attachment);
                        if ring.is_broken() {
                            broken.push(attachment);
                            break;
                        }
                        continue;
                    }
                };
                match ring::request(*member, &taken.submission, &self.bytes, &self.mappings) {
                    Ok((verb, asked)) => {
                        let open = Open { attachment, ticket: taken.ticket, asked, since: Instant::now() };
                        requests.push(Taken { verb, deadline_ms: taken.submission.deadline_ms, open });
                    }
                    Err(reply) => {
                        let _nothing_leased = reply.encode(&mut self.bytes);
                        ring.complete(taken.ticket, reply.status().number(), &self.bytes);
                        self.told.push(attachment);
                    }
                }
            }
        }
        broken
    }

    /// Whose request that is.
    pub fn member(&self, open: &Open) -> Option<Member> {
        self.by_name.get(&open.attachment).map(|local| local.member)
    }

    /// Answers a request. What the reply grants and nobody will hear of is to be undone: the whole of it comes back when its ring is
    /// gone. Progress that a ring does not tell leaves the request open.
    pub fn reply(&mut self, open: Open, reply: Reply) -> Replied {
        let Some(local) = self.by_name.get_mut(&open.attachment) else { return Replied::Unheard(reply) };
        let Some(reply) = ring::reply(local.member, open.asked, reply, &self.mappings) else {
            return Replied::Later(open);
        };
        let left_out = reply.encode(&mut self.bytes);
        let undo = (!left_out.is_empty()).then(|| ring::release(left_out));
        local.ring.complete(open.ticket, reply.status().number(), &self.bytes);
        self.told.push(open.attachment);
        telemetry::request_done(name_of(open.asked.verb), open.since.elapsed());
        Replied::Done(undo)
    }

    /// Wakes clients that sleep over what was put into their rings.
    pub fn wake_clients(&mut self) {
        for attachment in self.told.drain(..) {
            if let Some(local) = self.by_name.get_mut(&attachment)
                && local.ring.client_sleeps()
            {
                // Nobody listens any more where the client is dead; its pidfd tells.
                let _ = local.bell.ring();
            }
        }
    }

    /// Before sleeping: whether all rings are empty and their clients know that they are to ring.
    pub fn prepare_to_sleep(&mut self) -> bool {
        let mut may_sleep = true;
        for local in self.by_name.values_mut() {
            may_sleep &= local.ring.prepare_to_sleep();
        }
        if !may_sleep {
            self.woke(&[]);
        }
        may_sleep
    }

    /// After sleeping; `heard` are those who rang.
    pub fn woke(&mut self, heard: &[u64]) {
        for attachment in heard {
            if let Some(local) = self.by_name.get(&AttachmentId(*attachment)) {
                // Who sends something else than an eventfd has lost its own bell.
                let _ = local.doorbell.clear();
            }
        }
        for local in self.by_name.values_mut() {
            local.ring.woke();
        }
    }
}

/// What a verb is called on the metrics page.
const fn name_of(verb: door::Verb) -> &'static str {
    match verb {
        door::Verb::Reserve => "reserve",
        door::Verb::Commit => "commit",
        door::Verb::Abort => "abort",
        door::Verb::Acquire => "acquire",
        door::Verb::Release => "release",
        door::Verb::Lookup => "lookup",
        door::Verb::Prefetch => "prefetch",
        door::Verb::Durable => "durable",
        door::Verb::Purge => "purge",
        door::Verb::Confirm => "confirm",
    }
}

/// What became of a reply.
pub enum Replied {
    /// It is in the ring; this is to be undone.
    Done(Option<Verb>),
    /// Not the last word.
    Later(Open),
    /// Its ring is gone.
    Unheard(Reply),
}
