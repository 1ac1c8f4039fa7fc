//! Who is told, and when? Requests that wait in the core, each until what it waits for has happened or its deadline has come; each
//! is answered exactly once (a prefetch several times, the last time with `done`).

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use tender_proto::BlockKey;

use crate::limits;
use crate::names::{CycleId, Holder, NamespaceId, NodeId, PageName, RequestId};
use crate::verb::{AcquireEnd, Leased, PrefetchReply, Request};

/// What a request waits for.
#[derive(Debug)]
pub enum Waiting {
    /// A slot, to reserve or to load into: it is tried again whenever room was made.
    Room(Request, Patience),
    /// Loads.
    Acquire(AcquireWait),
    /// Loads, a few at a time.
    Prefetch(PrefetchWait),
    /// Write-backs, then a flush.
    Durable(DurableWait),
    /// Pages of the directory, twice, so that no copy of a page knows the blocks any more.
    Purge(PurgeWait),
    /// Everything to be written, then a flush.
    Drain(DrainWait),
}

/// How long a request waits for room, whatever its deadline.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Patience {
    /// Afterwards it takes what can be had.
    pub until_ms: u64,
}

/// A block of an acquire.
#[derive(Debug)]
pub enum AcquireBlock {
    /// Leased.
    Leased(Leased),
    /// On its way.
    Loading,
    /// Lost on the way.
    Failed(AcquireEnd),
}

/// An acquire that waits for loads.
#[derive(Debug)]
pub struct AcquireWait {
    /// Whose the leases are.
    pub holder: Holder,
    /// Its blocks, in order.
    pub blocks: Vec<AcquireBlock>,
    /// Why there are no more.
    pub end: Option<AcquireEnd>,
    /// Loads that it waits for.
    pub loading: usize,
}

/// A prefetch under way.
#[derive(Debug)]
pub struct PrefetchWait {
    /// Under which namespace.
    pub namespace: NamespaceId,
    /// What was not tried yet.
    pub keys: VecDeque<BlockKey>,
    /// Loads that it waits for.
    pub loading: usize,
    /// How far it is.
    pub reply: PrefetchReply,
    /// When it last said so.
    pub told_ms: u64,
}

/// A wish for durability.
#[derive(Debug)]
pub struct DurableWait {
    /// Under which namespace.
    pub namespace: NamespaceId,
    /// The blocks.
    pub keys: Vec<BlockKey>,
    /// Write-backs that it waits for, and loads that tell whether what was found at start is what was written.
    pub parts_left: usize,
    /// Some of the loads are of copies that no flush makes sure of: once in host memory they are written anew.
    pub rewrites: bool,
    /// The flush that it waits for, once these are done.
    pub cycle: Option<CycleId>,
}

/// A purge.
#[derive(Debug, Default)]
pub struct PurgeWait {
    /// With a namespace: the next node to look at.
    pub walk: Option<(NamespaceId, u32)>,
    /// Forgotten so far.
    pub purged_blocks: u64,
    /// Of these, in use.
    pub busy_blocks: u64,
    /// Pages that knew purged blocks.
    pub pages: BTreeSet<PageName>,
    /// The flush that it waits for.
    pub cycle: Option<CycleId>,
    /// Flushes to go.
    pub rounds: u32,
}

/// A drain.
#[derive(Debug, Default)]
pub struct DrainWait {
    /// The next node to look at.
    pub next: u32,
    /// It waits for writes before it looks at more.
    pub is_stuck: bool,
    /// Copies on disk that are being read: whether they are what was written.
    pub checks: usize,
    /// Whether all blocks were looked at once: what these checks found wanting is written now.
    pub is_second: bool,
    /// The last write-back that it waits for, once it has looked at all: others may come while a worker serves on.
    pub last_write_back: Option<u64>,
    /// The flush that it waits for.
    pub cycle: Option<CycleId>,
}

/// All requests that wait.
#[derive(Debug, Default)]
pub struct Pending {
    waiting: BTreeMap<RequestId, (u64, Waiting)>,
    deadlines: BTreeSet<(u64, RequestId)>,
}

impl Pending {
    /// Whether one more may wait.
    pub fn has_room(&self) -> bool {
        self.waiting.len() < limits::PENDING_MAX
    }

    /// A request begins to wait.
    pub fn park(&mut self, request: RequestId, deadline_ms: u64, waiting: Waiting) {
        self.deadlines.insert((deadline_ms, request));
        self.waiting.insert(request, (deadline_ms, waiting));
    }

    /// What a request waits for.
    pub fn get_mut(&mut self, request: RequestId) -> Option<&mut Waiting> {
        self.waiting.get_mut(&request).map(|(_, waiting)| waiting)
    }

    /// A request waits no more.
    pub fn take(&mut self, request: RequestId) -> Option<Waiting> {
        let (deadline_ms, waiting) = self.waiting.remove(&request)?;
        self.deadlines.remove(&(deadline_ms, request));
        Some(waiting)
    }

    /// A request whose deadline has come.
    pub fn take_overdue(&mut self, now_ms: u64) -> Option<(RequestId, Waiting)> {
        let &(deadline_ms, request) = self.deadlines.first()?;
        if deadline_ms > now_ms {
            return None;
        }
        self.take(request).map(|waiting| (request, waiting))
    }

    /// Requests for which `wanted` holds, oldest first.
    pub fn which(&self, wanted: impl Fn(&Waiting) -> bool) -> Vec<RequestId> {
        self.waiting.iter().filter(|(_, (_, waiting))| wanted(waiting)).map(|(&request, _)| request).collect()
    }

    /// Whether `wanted` holds for any of them.
    pub fn any(&self, wanted: impl Fn(&Waiting) -> bool) -> bool {
        self.waiting.values().any(|(_, waiting)| wanted(waiting))
    }

    /// How many wait.
    pub fn count(&self) -> usize {
        self.waiting.len()
    }
}

/// A load, and who waits for it.
#[derive(Debug)]
pub struct Load {
    /// Shards on their way.
    pub parts_left: usize,
    /// How it fails, if it does.
    pub failed: bool,
    /// The block was purged meanwhile.
    pub cancelled: bool,
    /// Acquires (with the block's place in them), prefetches, durables and drains (without).
    pub waiters: Vec<(RequestId, Option<usize>)>,
    /// Its transfers, to be moved to a faster lane.
    pub transfers: Vec<(u32, crate::transfer::TransferId)>,
}

/// A write-back, and who waits for it.
#[derive(Debug)]
pub struct WriteBack {
    /// The block; `None` when it was purged meanwhile.
    pub node: Option<NodeId>,
    /// Shards on their way.
    pub parts_left: usize,
    /// It failed.
    pub failed: bool,
    /// Flushes that had failed when it began.
    pub flush_failures: u64,
    /// First slot of the copy that is being written.
    pub disk: crate::names::SlotId,
    /// Bytes of its slots.
    pub bytes: u64,
    /// Durables that wait.
    pub waiters: Vec<RequestId>,
}
