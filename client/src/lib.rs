//! How to ask a store of KV blocks.
//!
//! [`BlockStore`] is the question; [`Remote`] asks a daemon, [`InMemory`] is a small store in this process (for tests, and to try an
//! engine without a daemon), [`Null`] has nothing and keeps nothing. Whatever happens to a daemon, an attached store answers: what it
//! cannot reach is a miss, what it cannot keep is an outcome. Only attaching can fail, since keys cannot be derived without it.
//!
//! ```text
//! tokens ── Terms::chain ──► keys ── lookup ──► how many blocks there are ── get ──► their bytes, in order, or a miss
//!                              └──── put ────► what became of each
//! ```
//! Through a ring in shared memory a get leaves blocks where they lie, and [`Remote::reserve`] and [`Remote::commit`] are a put without
//! a copy: the caller fills the slots.

mod block;
mod deadline;
mod failure;
mod in_memory;
mod local;
mod null;
mod operator;
mod remote;
mod watch;

use std::future::Future;

pub use block::{
    BlockPiece, BlockView, GetEnd, Got, Lookup, Prefetched, Purge, Purged, Put, PutOutcome, ReserveError, Reserved,
    Tier,
};
pub use in_memory::InMemory;
pub use local::{BringError, MemoryState, OwnMemory, Slot};
pub use null::Null;
pub use operator::Operator;
pub use remote::{Doors, Remote, Target};
pub use tender_proto as proto;
pub use tender_proto::door::CommitOutcome;
use tender_proto::{BlockKey, BlockLayout, Namespace, Shard, TenantSalt};
pub use watch::{Position, Residency, Watch, WatchItem};

/// What a process says of itself when it attaches.
#[derive(Clone, Debug)]
pub struct Attach {
    /// Name of the engine instance; the same for its scheduler and its ranks. 1 to 128 bytes.
    pub group: String,
    /// Name of this process, for people. At most 128 bytes.
    pub member: String,
    /// The root of all keys.
    pub namespace: Namespace,
    /// The exact bytes of a block.
    pub layout: BlockLayout,
}

/// What both sides agreed on at attach.
#[derive(Clone, Debug)]
pub struct Terms {
    /// As attached.
    pub attach: Attach,
    /// Who this client is to the store.
    pub tenant: String,
    /// The tenant's salt.
    pub salt: TenantSalt,
    /// Parent of every first block.
    pub root: BlockKey,
    /// Most keys in one request; longer chains go in several.
    pub keys_max: usize,
}

impl Terms {
    /// Keys of all whole blocks of a prompt.
    pub fn chain(&self, tokens: &[u32]) -> Vec<BlockKey> {
        self.root.chain(tokens, self.attach.namespace.block_tokens)
    }

    /// Bytes of one shard of a block, of `count`.
    pub fn shard_bytes(&self, count: u16) -> usize {
        self.attach.layout.shard_bytes(count) as usize
    }
}

/// Why attaching failed.
#[derive(Clone, Debug, thiserror::Error)]
pub enum AttachError {
    /// Nobody there. The cure is part of the message.
    #[error(
        "no daemon answers at {target} ({reason}); start one with `tender serve`, or name another with --socket or --address"
    )]
    Unavailable {
        /// Where it was looked for.
        target: String,
        /// What the system said.
        reason: String,
    },
    /// The daemon is there and says no.
    #[error("the daemon refuses: {0}")]
    Refused(String),
    /// The daemon is there and knows no tenant by what was shown to it. The reason names the field of the wire; how a token is given
    /// is for whoever asked for it to say.
    #[error("the daemon refuses: {reason}")]
    Unauthenticated {
        /// In the daemon's words.
        reason: String,
        /// Whether a token was shown at all.
        token_shown: bool,
    },
    /// Both sides derive different roots from the same namespace: keys would never match.
    #[error(
        "client and daemon derive different keys from the same namespace (root {ours} here, {theirs} there): their versions do not fit together"
    )]
    RootsDiffer {
        /// As derived here.
        ours: BlockKey,
        /// As the daemon derives it.
        theirs: BlockKey,
    },
}

/// A store, attached under one namespace and layout. Keys in one call are a run of one chain, in order.
///
/// No method fails and none waits longer than its deadline. Implementations pass the suite in `tests/conformance/`.
pub trait BlockStore: Send + Sync + 'static {
    /// What was agreed at attach.
    fn terms(&self) -> &Terms;

    /// Which of the blocks are where. A block found may be gone a moment later.
    fn lookup(&self, keys: &[BlockKey]) -> impl Future<Output = Lookup> + Send;

    /// Stores a run of blocks; one outcome per key. `Stored` and `AlreadyPresent` promise that a get returns these bytes or a miss.
    fn put(&self, put: Put<'_>) -> impl Future<Output = Vec<PutOutcome>> + Send;

    /// The longest run of blocks from the first on: exactly the bytes that were put, verified. All of it is held in memory.
    fn get(&self, keys: &[BlockKey], shard: Shard) -> impl Future<Output = Got> + Send;

    /// Brings blocks up to host memory; returns when that is done or was given up. `progress` is told now and then.
    fn prefetch(
        &self,
        keys: &[BlockKey],
        progress: impl FnMut(&Prefetched) + Send,
    ) -> impl Future<Output = Prefetched> + Send;

    /// Which of the blocks would survive a power cut, after trying to make all of them do so.
    fn durable(&self, keys: &[BlockKey]) -> impl Future<Output = Vec<bool>> + Send;

    /// Forgets blocks for good.
    fn purge(&self, what: Purge<'_>) -> impl Future<Output = Purged> + Send;

    /// Blocks that come and go, from `from` on if the store remembers that far, else after a snapshot.
    fn watch(&self, from: Option<Position>) -> impl Future<Output = Watch> + Send;
}
