//! Clock, queue and disks around the core: gives it events in the order in which they are due, and does what it asks for.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use tender_proto::sum;

use super::Summary;
use super::clients::{Group, Lease, Put, Question, Scribble};
use super::cut::CutWords;
use super::oracle::{Block, Oracle};
use super::random::Random;
use super::scenario::Scenario;
use super::trace::Trace;
use crate::device::block::BlockDevice;
use crate::device::block::simulated::SimulatedDisk;
use crate::device::memory::{Arena, Extent};
use crate::limits;
use crate::names::{AttachmentId, Hold, RequestId, TenantId};
use crate::pipeline::{Action, Core, Event};
use crate::transfer::disk::InFlight;
use crate::transfer::{Expected, Outcome, Transfer, TransferId};
use crate::verb::{Reply, Request, Verb};

/// Something that will happen.
#[derive(Debug)]
pub(super) enum Due {
    Tick,
    Continue,
    SegmentReady {
        segment: u32,
        tenant: TenantId,
        used: bool,
    },
    IngestMade {
        segment: u32,
        made: bool,
    },
    Operation,
    FinishPut(Vec<Put>),
    Release(Vec<Lease>),
    /// A local process finds that the daemon is a new one.
    Rejoin {
        group: usize,
        former: AttachmentId,
    },
    /// The new worker tries to lock the tier files.
    Lock,
    /// Whoever could write to a slot in place writes there, although it is not its to write any more.
    Scribble(Scribble),
    Promote {
        id: TransferId,
        from: Extent,
        to: Extent,
        expected: Expected,
    },
}

/// A question that was not answered yet.
#[derive(Debug)]
pub(super) struct Asked {
    pub(super) tenant: TenantId,
    pub(super) deadline_ms: u64,
    /// The step in which it was asked.
    pub(super) step: u64,
    pub(super) question: Question,
}

/// One file and its thread.
pub(super) struct Disk {
    pub(super) device: SimulatedDisk,
    pub(super) in_flight: InFlight,
}

/// A part of the arena that a client may touch; nobody else may until it lets go.
pub(super) type Held = BTreeMap<(u32, u32), (u32, u32)>;

/// Everything there is.
pub(super) struct World {
    pub(super) scenario: Scenario,
    pub(super) random: Random,
    pub(super) trace: Trace,
    pub(super) oracle: Oracle,
    pub(super) summary: Summary,
    pub(super) core: Core,
    pub(super) arena: Arc<Arena>,
    pub(super) disks: Vec<Disk>,
    /// Since the daemon's start; so is everything that is counted in its milliseconds.
    pub(super) now_us: u64,
    queue: BTreeMap<(u64, u64), Due>,
    queued: u64,
    pub(super) asked: BTreeMap<RequestId, Asked>,
    /// Answers to what the world itself asked.
    pub(super) heard: BTreeMap<RequestId, Reply>,
    last_request: u64,
    last_attachment: u64,
    pub(super) groups: Vec<Group>,
    pub(super) last_version: u64,
    /// Per tenant: the attachment that watches, and the last event seen.
    pub(super) watchers: Vec<(AttachmentId, u64)>,
    /// Per tenant: the last event that the core has announced.
    pub(super) announced: BTreeMap<TenantId, u64>,
    watching: bool,
    /// What is leased (any number of readers) or reserved (one writer): where, then bytes and how many hold it.
    pub(super) held: Held,
    /// For whom each segment of the daemon's was prepared last: in whose file it lies.
    pub(super) prepared_for: BTreeMap<u32, TenantId>,
    /// How often the memory of an ingest segment was another.
    pub(super) incarnations: BTreeMap<u32, u64>,
    /// What was committed in place last, and by which process.
    pub(super) committed_in_place: VecDeque<(AttachmentId, Scribble)>,
    pub(super) clients_live: bool,
    /// What the worker records of host memory.
    pub(super) records: CutWords,
    /// The worker is dead; whatever it did in the step in which it died nobody was told.
    pub(super) is_dead: bool,
    /// Disks of a dead worker, whose last requests are on their way.
    pub(super) dying: Vec<Disk>,
    /// What is to be found when they have come to their end.
    pub(super) durable_before: BTreeSet<Block>,
    /// Blocks that came to disk since a disk last joined.
    pub(super) found_on_disk: BTreeSet<Block>,
    /// A name that a process joined under, after the one that it knows of.
    pub(super) aliases: Vec<(AttachmentId, AttachmentId)>,
}

impl World {
    pub(super) fn new(scenario: Scenario, trace: Trace) -> Self {
        let core = &scenario.core;
        let segments = core.host_segment_count + core.ingest_segment_count;
        let arena = Arena::new(core.host_segment_bytes, segments).expect("memory for a small arena");
        let random = &mut Random::new(scenario.seed, 2);
        let groups = (0..scenario.group_count).map(|number| Group::new(number, &scenario.spaces, random)).collect();
        let images = Self::blank_images(&scenario);
        let mut world = Self {
            random: random.clone(),
            trace,
            oracle: Oracle::new(&scenario.spaces, scenario.lossy),
            summary: Summary::default(),
            core: Core::new(core.clone()),
            arena: Arc::new(arena),
            disks: Vec::new(),
            now_us: 0,
            queue: BTreeMap::new(),
            queued: 0,
            asked: BTreeMap::new(),
            heard: BTreeMap::new(),
            last_request: 0,
            last_attachment: 0,
            groups,
            last_version: 0,
            watchers: Vec::new(),
            announced: BTreeMap::new(),
            watching: false,
            held: Held::new(),
            prepared_for: BTreeMap::new(),
            incarnations: BTreeMap::new(),
            committed_in_place: VecDeque::new(),
            clients_live: false,
            records: CutWords::new(Self::geometry(core).table_bytes()),
            is_dead: false,
            dying: Vec::new(),
            durable_before: BTreeSet::new(),
            found_on_disk: BTreeSet::new(),
            aliases: Vec::new(),
            scenario,
        };
        world.boot(images);
        world
    }

    pub(super) fn run(mut self, operations: u64) -> Summary {
        let mut left = operations;
        self.clients_live = true;
        self.schedule(0, Due::Operation);
        while left > 0 {
            if self.random.below(1_000_000) < self.scenario.crashes / 4 {
                self.crash();
                self.clients_live = true;
                self.schedule(0, Due::Operation);
            }
            if self.random.below(1_000_000) < self.scenario.warm_restarts / 4 {
                match self.random.happens(400) {
                    true => self.restart_warm(),
                    false => self.records.arm(self.random.below(100)),
                }
            }
            left -= u64::from(self.advance());
            if self.is_dead {
                self.restart_warm();
            }
        }
        self.clients_live = false;
        self.end();
        self.summary.trace = self.trace.hash();
        self.summary
    }

    pub(super) fn now_ms(&self) -> u64 {
        self.now_us / 1000
    }

    pub(super) fn schedule(&mut self, after_us: u64, due: Due) {
        self.queued += 1;
        self.queue.insert((self.now_us + after_us, self.queued), due);
    }

    /// Everything that would have happened to this daemon will not.
    pub(super) fn forget_queue(&mut self) {
        self.queue.clear();
    }

    /// All puts that somebody will finish, by reply.
    pub(super) fn puts(&mut self) -> impl Iterator<Item = &mut Vec<Put>> {
        self.queue.values_mut().filter_map(|due| match due {
            Due::FinishPut(puts) => Some(puts),
            _ => None,
        })
    }

    /// All leases that somebody will give back.
    pub(super) fn leases(&mut self) -> impl Iterator<Item = &mut Lease> {
        let released = self.queue.values_mut().filter_map(|due| match due {
            Due::Release(leases) => Some(leases),
            _ => None,
        });
        released.flatten()
    }

    /// What was to happen and is not any more.
    pub(super) fn call_off(&mut self, is_off: impl Fn(&Due) -> bool) -> Vec<Due> {
        let (off, on): (Vec<_>, Vec<_>) = std::mem::take(&mut self.queue).into_iter().partition(|(_, due)| is_off(due));
        self.queue = on.into_iter().collect();
        off.into_iter().map(|(_, due)| due).collect()
    }

    pub(super) fn is_ingest(&self, segment: u32) -> bool {
        segment >= self.scenario.core.host_segment_count
    }

    /// Copies as the daemon does: what is checked is what was copied, whoever writes there meanwhile.
    fn promoted(&mut self, from: Extent, to: Extent, expected: Expected) -> Outcome {
        let mut bytes = vec![0; expected.payload_bytes as usize];
        self.arena.read(from, 0, &mut bytes);
        self.arena.write(to, 0, &bytes);
        self.arena.zero_from(to, bytes.len());
        let sums = self.arena.fragment_sums(to, bytes.len());
        if sum::root(expected.seed, &sums) == expected.root { Outcome::Done(sums) } else { Outcome::Mismatch }
    }

    /// Lets the next thing happen; returns whether it was an operation of a client.
    pub(super) fn advance(&mut self) -> bool {
        let queued_us = self.queue.keys().next().map_or(u64::MAX, |(due_us, _)| *due_us);
        let disks = self.disks.iter().chain(&self.dying);
        let disks_us = disks.filter_map(|disk| disk.device.next_due_us()).min().unwrap_or(u64::MAX);
        self.now_us = self.now_us.max(queued_us.min(disks_us));
        if disks_us <= queued_us {
            self.complete_transfers();
            return false;
        }
        let Some((_, due)) = self.queue.pop_first() else { return false };
        match due {
            Due::Tick => {
                self.schedule(limits::TICK.as_micros() as u64, Due::Tick);
                self.step(Event::Tick);
                self.nobody_is_forgotten();
            }
            Due::Continue => self.step(Event::Continue),
            Due::SegmentReady { segment, tenant, used } => {
                let is_moved = self.prepared_for.insert(segment, tenant) != Some(tenant);
                if used || is_moved {
                    self.arena.zero(segment);
                }
                self.step(Event::SegmentReady(segment));
            }
            Due::IngestMade { segment, made } => {
                if made {
                    self.arena.zero(segment);
                }
                self.step(Event::IngestMade { segment, made });
            }
            Due::Operation => {
                if self.clients_live {
                    let pause_us = self.random.below(self.scenario.pause_us);
                    self.schedule(pause_us, Due::Operation);
                    self.operate();
                }
                return self.clients_live;
            }
            Due::FinishPut(puts) => self.finish_puts(puts),
            Due::Release(leases) => self.release(leases),
            Due::Rejoin { group, former } => self.rejoin(group, former),
            Due::Lock => self.lock(),
            Due::Scribble(scribble) => self.scribble(&scribble),
            Due::Promote { id, from, to, expected } => {
                let outcome = self.promoted(from, to, expected);
                self.step(Event::TransferDone(id, outcome));
            }
        }
        false
    }

    fn complete_transfers(&mut self) {
        // What a dead worker asked for is done, and nobody hears of it.
        for Disk { device, .. } in &mut self.dying {
            device.advance(self.now_us);
            device.wait(Duration::ZERO, &mut Vec::new());
        }
        let mut outcomes = Vec::new();
        for Disk { device, in_flight } in &mut self.disks {
            device.advance(self.now_us);
            let mut done = Vec::new();
            device.wait(Duration::ZERO, &mut done);
            outcomes.extend(done.into_iter().map(|done| in_flight.outcome(done)));
        }
        for (transfer, outcome) in outcomes {
            self.step(Event::TransferDone(transfer, outcome));
        }
        self.submit();
    }

    fn submit(&mut self) {
        for Disk { device, in_flight } in &mut self.disks {
            device.advance(self.now_us);
            in_flight.submit(device);
        }
    }

    /// Deadlines are met to a tick.
    fn nobody_is_forgotten(&self) {
        let late = |asked: &Asked| asked.deadline_ms + 2 * limits::TICK.as_millis() as u64;
        if let Some((id, asked)) = self.asked.iter().find(|(_, asked)| late(asked) < self.now_ms()) {
            panic!("{id:?} is not answered at {} ms: {asked:?}", self.now_ms());
        }
    }

    /// One step of the core, and all it asks for.
    pub(super) fn step(&mut self, event: Event) {
        if self.is_dead {
            return;
        }
        match &event {
            Event::Request(request) => {
                let question = self.asked.get(&request.id).map(|asked| &asked.question);
                self.trace.note(format_args!("{} us: {:?} {question:?}", self.now_us, request.id));
            }
            event => self.trace.note(format_args!("{} us: {event:?}", self.now_us)),
        }
        let mut actions = Vec::new();
        self.summary.steps += 1;
        self.core.step(event, self.now_ms(), &mut actions);
        if self.records.is_cut() {
            self.is_dead = true;
            return self.trace.note(format_args!("  killed in this step"));
        }
        for action in actions {
            self.carry_out(action);
        }
        if self.summary.steps.is_multiple_of(64) {
            self.core.check();
        }
    }

    fn carry_out(&mut self, action: Action) {
        match action {
            Action::Reply(id, reply) => self.answered(id, reply),
            Action::Start(file, id, transfer) => {
                match &transfer {
                    Transfer::WritePage { offset, page } => {
                        let sum = tender_proto::sum::fragment_sum(&page.0);
                        self.trace.note(format_args!("  {id:?} on {file}: page at {offset}, {sum:x}"));
                    }
                    transfer => self.trace.note(format_args!("  {id:?} on {file}: {transfer:?}")),
                }
                self.disks[file as usize].in_flight.start(id, transfer);
                self.submit();
            }
            Action::PrepareSegment { segment, tenant, used } => {
                self.trace.note(format_args!("  prepare segment {segment} for {tenant:?}"));
                let (start, end) = ((segment, 0), (segment + 1, 0));
                assert!(self.held.range(start..end).next().is_none(), "segment {segment} changes owner while in use");
                let after_us = self.random.between(10, 20_000);
                self.schedule(after_us, Due::SegmentReady { segment, tenant, used });
            }
            Action::MakeIngest { segment, writer } => {
                self.trace.note(format_args!("  make ingest segment {segment} for {writer:?}"));
                let after_us = self.random.between(10, 50_000);
                let made = !self.random.happens(100);
                self.schedule(after_us, Due::IngestMade { segment, made });
            }
            Action::DropSegment(segment) => {
                self.trace.note(format_args!("  drop segment {segment}"));
                let (start, end) = ((segment, 0), (segment + 1, 0));
                assert!(self.held.range(start..end).next().is_none(), "segment {segment} is dropped while in use");
                *self.incarnations.entry(segment).or_default() += 1;
            }
            Action::Promote { id, from, to, expected } => {
                self.trace.note(format_args!("  {id:?}: promote {from:?} to {to:?}"));
                let after_us = self.random.between(10, 5_000);
                self.schedule(after_us, Due::Promote { id, from, to, expected });
            }
            Action::Residency(tenant, sequence) => {
                let announced = self.announced.entry(tenant).or_insert(0);
                *announced = sequence.max(*announced);
                // Asking for events may cause events: those are asked for when the first have been read.
                if !std::mem::replace(&mut self.watching, true) {
                    while let Some(tenant) = self.tenant_with_news().filter(|_| !self.is_dead) {
                        self.watch(tenant);
                    }
                    self.watching = false;
                }
            }
            Action::Again => self.schedule(1, Due::Continue),
            Action::Warn(warning) => self.trace.note(format_args!("  {warning}")),
        }
    }

    pub(super) fn name_attachment(&mut self) -> AttachmentId {
        self.last_attachment += 1;
        AttachmentId(self.last_attachment)
    }

    /// Asks the core something; the answer comes to `answered`.
    pub(super) fn ask(&mut self, tenant: TenantId, deadline_ms: u64, verb: Verb, question: Question) -> RequestId {
        self.last_request += 1;
        let id = RequestId(self.last_request);
        let step = self.summary.steps;
        self.asked.insert(id, Asked { tenant, deadline_ms, step, question });
        self.step(Event::Request(Request { id, tenant, deadline_ms, verb }));
        id
    }

    /// Asks, and lets time pass until the answer is there.
    pub(super) fn ask_and_wait(&mut self, tenant: TenantId, deadline_ms: u64, verb: Verb) -> Reply {
        let id = self.ask(tenant, deadline_ms, verb, Question::Own);
        loop {
            if let Some(reply) = self.heard.remove(&id) {
                return reply;
            }
            self.advance();
        }
    }

    pub(super) fn pass(&mut self, time_us: u64) {
        let end_us = self.now_us + time_us;
        while self.now_us < end_us && !self.is_dead {
            self.advance();
        }
    }

    /// What only the daemon writes lies in the file that clients of that tenant map.
    pub(super) fn lies_in_file_of(&self, tenant: TenantId, extent: Extent) {
        let prepared_for = self.prepared_for.get(&extent.segment);
        let is_theirs = self.is_ingest(extent.segment) || prepared_for == Some(&tenant);
        assert!(is_theirs, "{extent:?} is granted to {tenant:?}, and its segment was prepared for {prepared_for:?}");
    }

    /// A client may touch these bytes from now on.
    pub(super) fn hold(&mut self, hold: Hold, extent: Extent, is_lease: bool) {
        let (start, end) = (extent.offset, extent.offset + extent.bytes);
        let before = self.held.range(..(extent.segment, end)).next_back();
        if let Some((&(segment, offset), &(bytes, readers))) = before
            && segment == extent.segment
            && offset + bytes > start
        {
            let shared = is_lease && readers > 0 && offset == start && bytes == extent.bytes;
            assert!(shared, "{hold:?} grants {extent:?}, in which somebody holds {bytes} bytes at {offset}");
        }
        let (_, readers) = self.held.entry((extent.segment, start)).or_insert((extent.bytes, 0));
        *readers += u32::from(is_lease);
    }

    /// A client touches these bytes no more.
    pub(super) fn let_go(&mut self, extent: Extent) {
        let key = (extent.segment, extent.offset);
        let (_, readers) = self.held.get_mut(&key).expect("only what is held is let go");
        *readers = readers.saturating_sub(1);
        if *readers == 0 {
            self.held.remove(&key);
        }
    }
}
