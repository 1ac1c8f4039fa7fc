//! A daemon, asked through the ring of its local door or over gRPC.
//!
//! ```text
//! Remote ── verb ──► Links::ready ──► Link (one attachment over one connection) ──► ring, if there is one, else gRPC ──► daemon
//!             │          └─ none: a task of `link` attaches; its first attempt is waited for, and once that has failed it is a miss at once
//!             └─ the call failed because the daemon is gone or forgot us: Links::another, then again, twice at most
//! ```
//! `connection` is the way there, `link` the attachment, `crate::local` the ring, `crate::failure` why there was no answer,
//! `crate::deadline` how long to wait for one; `put`, `get` and `watch` are the verbs that stream over gRPC, `reserve` a put whose
//! slots the caller fills. The others are short and stand here.

mod connection;
mod get;
mod link;
mod put;
mod reserve;
mod watch;

use std::future::Future;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use tender_proto::door::{Bitmap, Residency};
use tender_proto::wire;
use tender_proto::{BlockKey, Shard};
use tokio::time::timeout;

pub(crate) use self::connection::Door;
pub use self::connection::Target;
use self::link::{Link, Links, NotAttached};
use crate::failure::Failure;
use crate::{
    Attach, AttachError, BlockStore, BringError, GetEnd, Got, Lookup, OwnMemory, Position, Prefetched, Purge, Purged,
    Put, PutOutcome, Terms, Watch, deadline,
};

/// Links that one call is tried over: the one in use, one that a worker gave which was about to end, and the next one's. More would
/// have a question that kills workers kill more of them.
const LINKS_MAX: usize = 3;

/// By which of a daemon's doors to ask.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Doors {
    /// Through a ring in shared memory where the daemon has one for this process, else over gRPC: what it answers is the same. Public
    /// namespaces have none.
    #[default]
    Ring,
    /// Over gRPC only.
    Grpc,
}

/// A daemon. Clones share one attachment; the last one dropped leaves.
#[derive(Clone, Debug)]
pub struct Remote {
    terms: Arc<Terms>,
    links: Arc<Links>,
    /// Counts clones; tasks hold the links too, for as long as they try to attach.
    clones: Arc<()>,
    deadline: Duration,
}

impl Remote {
    /// Attaches to the daemon at `target`. With a `token` the tenant is the token's, else the socket decides.
    pub async fn attach(target: Target, token: Option<String>, attach: Attach) -> Result<Self, AttachError> {
        Self::attach_by(target, token, attach, Doors::default()).await
    }

    /// The same with a choice of doors.
    pub async fn attach_by(
        target: Target,
        token: Option<String>,
        attach: Attach,
        doors: Doors,
    ) -> Result<Self, AttachError> {
        // The local door lets nobody in with one: its blocks may lie among another tenant's.
        let doors = if attach.namespace.public { Doors::Grpc } else { doors };
        let door = Door::new(target, token)?;
        let estate = Arc::default();
        let (link, terms) =
            Link::attach(&door, doors, &attach, None, &estate).await.map_err(NotAttached::into_error)?;
        let links = Links::new(door, doors, link, &terms, estate);
        Ok(Self { terms: Arc::new(terms), links, clones: Arc::default(), deadline: deadline::REQUEST })
    }

    /// The same client with another deadline for each call (default 5 s), to which the time for its bytes is added.
    pub fn with_deadline(self, deadline: Duration) -> Self {
        Self { deadline, ..self }
    }

    /// The door in use now: a ring is not always to be had, and may come or go with a daemon that is started again; while there is none,
    /// it is looked for every few seconds. While there is no daemon, the door that it will be looked for at.
    pub fn door(&self) -> Doors {
        self.links.door()
    }

    /// Brings memory of the caller's own: blocks are put in place there instead of in memory that the daemon makes, as soon as it has
    /// some made for this client, which is at a put that finds none. What is brought first is used first, a file for each segment.
    ///
    /// Nothing is lost by it: what the daemon does not take, it says why (in the [state](OwnMemory::state) of the memory, and in the
    /// log), and its own memory is used; where there is no ring, memory waits for one. When no block lies there any more and none will,
    /// the memory is the caller's own again, and may be brought again.
    ///
    /// Only where blocks lie changes: [`put`](BlockStore::put) copies its payloads there as it does otherwise, and the slots that
    /// [`reserve`](Self::reserve) gives lie there.
    pub fn bring(&self, memory: &OwnMemory) -> Result<(), BringError> {
        self.links.estate().brought.add(memory)
    }

    /// Length in bytes that memory must have to be brought; `None` while blocks go over gRPC, and where the daemon takes none.
    pub fn segment_bytes(&self) -> Option<u64> {
        self.links.brought_bytes()
    }

    /// Leaves, and waits until the daemon has heard of it (milliseconds; where it does not answer, at most three seconds), which a drop
    /// does not: what a drop starts ends with the runtime. While there are other clones nothing happens, as with a drop. What is leased or
    /// reserved stays so: the last view or slot leaves.
    pub async fn close(self) {
        if Arc::into_inner(self.clones).is_some() {
            self.links.close().await;
        }
    }

    /// One call: again over another link, if one is gone. All of it within the deadline.
    async fn ask<T, F>(&self, deadline: Duration, call: impl Fn(Arc<Link>) -> F) -> Result<T, Failure>
    where
        F: Future<Output = Result<T, Failure>>,
    {
        let calls = async {
            let mut link = self.links.ready().await?;
            for _ in 1..LINKS_MAX {
                let answer = call(Arc::clone(&link)).await;
                if !answer.as_ref().is_err_and(|failure| failure.wants_attach()) {
                    return answer;
                }
                link = self.links.another(&link).await?;
            }
            let answer = call(Arc::clone(&link)).await;
            if answer.as_ref().is_err_and(|failure| failure.wants_attach()) {
                self.links.lose(&link);
            }
            answer
        };
        timeout(deadline + deadline::GRACE, calls).await.unwrap_or(Err(Failure::Deadline))
    }

    /// Cuts a chain to what one request may hold. The first piece that fails ends the call, so that a daemon that hangs is waited for
    /// once and not for each piece.
    fn pieces<'a>(&self, keys: &'a [BlockKey]) -> impl Iterator<Item = &'a [BlockKey]> + Send + use<'a> {
        keys.chunks(self.links.current().map_or(self.terms.keys_max, |link| link.keys_max))
    }

    fn block_bytes(&self, keys: &[BlockKey]) -> u64 {
        self.terms.attach.layout.block_bytes().saturating_mul(keys.len() as u64)
    }

    async fn lookup_piece(&self, keys: &[BlockKey]) -> Result<Residency, Failure> {
        let call = |link: Arc<Link>| async move {
            if let Some(local) = link.local(keys.len()) {
                return local.lookup(keys, self.deadline).await;
            }
            let (attachment, deadline_ms) = (link.attachment, deadline::wire_ms(self.deadline));
            let request = wire::LookupRequest { attachment, keys: joined(keys), deadline_ms };
            let reply = link.client().lookup(link.request(request)).await?.into_inner();
            let bitmap = |bytes: Bytes| Bitmap::from_bytes(bytes.into(), keys.len());
            let (host, disk) = (bitmap(reply.host), bitmap(reply.disk));
            Ok(Residency { prefix_blocks: reply.prefix_blocks, host, disk })
        };
        self.ask(self.deadline, call).await
    }

    async fn durable_piece(&self, keys: &[BlockKey]) -> Result<Bitmap, Failure> {
        // What is not on disk yet has to be written first.
        let deadline = deadline::with_bytes(self.deadline, self.block_bytes(keys));
        let call = |link: Arc<Link>| async move {
            if let Some(local) = link.local(keys.len()) {
                return local.durable(keys, deadline).await;
            }
            let (attachment, deadline_ms) = (link.attachment, deadline::wire_ms(deadline));
            let request = wire::DurableRequest { attachment, keys: joined(keys), deadline_ms };
            let reply = link.client().durable(link.request(request)).await?.into_inner();
            Ok(Bitmap::from_bytes(reply.durable.into(), keys.len()))
        };
        self.ask(deadline, call).await
    }

    /// These, or all under the namespace; how many blocks, and how many of them are in use.
    async fn purge_piece(&self, keys: Option<&[BlockKey]>) -> Result<(u64, u64), Failure> {
        let call = |link: Arc<Link>| async move {
            if let Some(local) = link.local(keys.map_or(0, <[BlockKey]>::len)) {
                return local.purge(keys, self.deadline).await;
            }
            let what = match keys {
                Some(keys) => wire::purge_request::What::Keys(joined(keys)),
                None => wire::purge_request::What::Namespace(true),
            };
            let (attachment, deadline_ms) = (link.attachment, deadline::wire_ms(self.deadline));
            let request = wire::PurgeRequest { attachment, what: Some(what), deadline_ms };
            let reply = link.client().purge(link.request(request)).await?.into_inner();
            Ok((reply.purged_blocks, reply.busy_blocks))
        };
        self.ask(self.deadline, call).await
    }

    /// `report` is given what the daemon said last. A stream that breaks is asked for anew.
    async fn prefetch_piece(
        &self,
        keys: &[BlockKey],
        report: &mut (dyn FnMut(Prefetched) + Send),
    ) -> Result<(), Failure> {
        let deadline = deadline::with_bytes(self.deadline, self.block_bytes(keys));
        // One call follows the other: nobody waits for it.
        let report = Mutex::new(report);
        let say = |resident: u32, loaded: u32, missing: u32, shed: u32| {
            let blocks = |count: u32| (count as usize).min(keys.len());
            report.lock().unwrap_or_else(PoisonError::into_inner)(Prefetched {
                resident_blocks: blocks(resident),
                loaded_blocks: blocks(loaded),
                missing_blocks: blocks(missing),
                shed_blocks: blocks(shed),
            });
        };
        let say = &say;
        let call = |link: Arc<Link>| async move {
            if let Some(local) = link.local(keys.len()) {
                let done = local.prefetch(keys, deadline).await?;
                say(done.resident, done.loaded, done.missing, done.shed);
                return Ok(());
            }
            let (attachment, deadline_ms) = (link.attachment, deadline::wire_ms(deadline));
            let request = wire::PrefetchRequest { attachment, keys: joined(keys), deadline_ms };
            let mut stream = link.client().prefetch(link.request(request)).await?.into_inner();
            while let Some(now) = stream.message().await? {
                say(now.resident_blocks, now.loaded_blocks, now.missing_blocks, now.shed_blocks);
                if now.done {
                    return Ok(());
                }
            }
            Err(Failure::Gone)
        };
        self.ask(deadline, call).await
    }
}

impl BlockStore for Remote {
    fn terms(&self) -> &Terms {
        &self.terms
    }

    async fn lookup(&self, keys: &[BlockKey]) -> Lookup {
        let mut found = Lookup::default();
        for piece in self.pieces(keys) {
            let Ok(reply) = self.lookup_piece(piece).await else { break };
            if found.prefix_blocks == found.host.len() {
                found.prefix_blocks += (reply.prefix_blocks as usize).min(piece.len());
            }
            found.host.extend(reply.host.iter());
            found.disk.extend(reply.disk.iter());
        }
        found.host.resize(keys.len(), false);
        found.disk.resize(keys.len(), false);
        found
    }

    async fn put(&self, put: Put<'_>) -> Vec<PutOutcome> {
        match put.check(&self.terms) {
            Ok(shard) => self.put_run(&Put { shard, ..put }).await,
            Err(fault) => put.refused(&fault),
        }
    }

    async fn get(&self, keys: &[BlockKey], shard: Shard) -> Got {
        match self.terms.attach.layout.shard(shard.index.into(), shard.count.into()) {
            Ok(shard) => self.get_run(keys, shard).await,
            Err(fault) => Got::refused(&fault),
        }
    }

    async fn prefetch(&self, keys: &[BlockKey], mut progress: impl FnMut(&Prefetched) + Send) -> Prefetched {
        let mut whole = Prefetched::default();
        for piece in self.pieces(keys) {
            let mut last = Prefetched::default();
            let mut report = |now: Prefetched| {
                last = now;
                progress(&plus(whole, now));
            };
            let answer = self.prefetch_piece(piece, &mut report).await;
            whole = plus(whole, last);
            if let Err(failure) = answer {
                tracing::debug!("prefetch given up: {failure:?}");
                break;
            }
        }
        // Whatever the daemon has not accounted for was given up.
        whole.shed_blocks = keys.len().saturating_sub(whole.resident_blocks + whole.missing_blocks);
        progress(&whole);
        whole
    }

    async fn durable(&self, keys: &[BlockKey]) -> Vec<bool> {
        let mut durable = Vec::with_capacity(keys.len());
        for piece in self.pieces(keys) {
            let Ok(reply) = self.durable_piece(piece).await else { break };
            durable.extend(reply.iter());
        }
        durable.resize(keys.len(), false);
        durable
    }

    async fn purge(&self, what: Purge<'_>) -> Purged {
        let pieces: Vec<Option<&[BlockKey]>> = match what {
            Purge::Keys(keys) => self.pieces(keys).map(Some).collect(),
            Purge::Namespace => vec![None],
        };
        let mut purged = Purged { complete: true, ..Purged::default() };
        for piece in pieces {
            match self.purge_piece(piece).await {
                Ok((purged_blocks, busy_blocks)) => {
                    purged.purged_blocks += purged_blocks;
                    purged.busy_blocks += busy_blocks;
                }
                Err(failure) => {
                    tracing::warn!("purge not finished: {failure:?}");
                    purged.complete = false;
                    break;
                }
            }
        }
        purged
    }

    async fn watch(&self, from: Option<Position>) -> Watch {
        self.watch_from(from).await
    }
}

/// Keys as the wire has them.
fn joined(keys: &[BlockKey]) -> Bytes {
    BlockKey::join(keys).into()
}

fn plus(a: Prefetched, b: Prefetched) -> Prefetched {
    Prefetched {
        resident_blocks: a.resident_blocks + b.resident_blocks,
        loaded_blocks: a.loaded_blocks + b.loaded_blocks,
        missing_blocks: a.missing_blocks + b.missing_blocks,
        shed_blocks: a.shed_blocks + b.shed_blocks,
    }
}

fn end_of(failure: Failure) -> GetEnd {
    match failure {
        Failure::Gone | Failure::Detached => GetEnd::Unavailable,
        Failure::Deadline => GetEnd::Deadline,
        Failure::Shed => GetEnd::Shed,
        Failure::Refused => GetEnd::Miss,
    }
}

fn outcome_of(failure: Failure) -> PutOutcome {
    match failure {
        Failure::Gone | Failure::Detached | Failure::Deadline => PutOutcome::Unavailable,
        Failure::Shed => PutOutcome::Shed,
        Failure::Refused => PutOutcome::Refused,
    }
}
