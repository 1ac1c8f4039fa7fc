//! What is said about blocks: requests, outcomes, and the view of a block's bytes.

use std::sync::Arc;

use bytes::Bytes;
use tender_proto::{BlockKey, LayoutError, Shard};

use crate::Terms;
use crate::local::{LeasedBytes, Slot};

/// Where a block was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Tier {
    /// Memory of the node.
    Host,
    /// The node's disks.
    Disk,
    /// Another node's memory.
    Peer,
    /// The shared object store.
    Object,
}

/// Answer to a lookup.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Lookup {
    /// Blocks usable from the first on, in any tier.
    pub prefix_blocks: usize,
    /// Per key: in host memory.
    pub host: Vec<bool>,
    /// Per key: on disk.
    pub disk: Vec<bool>,
}

/// A run of blocks to store.
#[derive(Clone, Copy, Debug)]
pub struct Put<'a> {
    /// Key of the block before the first, or the root.
    pub parent: BlockKey,
    /// The run: each is the parent of the next.
    pub keys: &'a [BlockKey],
    /// Which part of each block `payloads` holds.
    pub shard: Shard,
    /// One per key, each of exactly the shard's bytes.
    pub payloads: &'a [Bytes],
    /// The blocks' tokens, if the store shall derive the keys again and compare; else empty.
    pub tokens: &'a [u32],
}

impl<'a> Put<'a> {
    /// The `count` blocks from `start` on, as a put of their own.
    pub(crate) fn piece(&self, start: usize, count: usize, block_tokens: usize) -> Self {
        let end = self.keys.len().min(start + count);
        let tokens: &'a [u32] =
            if self.tokens.is_empty() { &[] } else { &self.tokens[start * block_tokens..end * block_tokens] };
        Self {
            parent: start.checked_sub(1).map_or(self.parent, |last| self.keys[last]),
            keys: &self.keys[start..end],
            shard: self.shard,
            payloads: &self.payloads[start..end],
            tokens,
        }
    }

    /// The shard as the layout knows it; or why this put cannot be meant: such a one is refused as a whole, before anything is sent
    /// or kept.
    pub(crate) fn check(&self, terms: &Terms) -> Result<Shard, String> {
        let Shard { index, count } = self.shard;
        let shard = terms.attach.layout.shard(index.into(), count.into()).map_err(|error| error.to_string())?;
        let (keys, payloads) = (self.keys.len(), self.payloads.len());
        if keys != payloads {
            return Err(format!("{payloads} payloads came for {keys} keys; give one for each"));
        }
        let bytes = terms.shard_bytes(shard.count);
        if let Some(wrong) = self.payloads.iter().position(|payload| payload.len() != bytes) {
            let found = self.payloads[wrong].len();
            return Err(format!("payload {wrong} has {found} bytes, but shard {shard} of this layout has {bytes}"));
        }
        let block_tokens = terms.attach.namespace.block_tokens;
        let tokens = keys * block_tokens as usize;
        if self.tokens.is_empty() {
            return Ok(shard);
        }
        if self.tokens.len() != tokens {
            let found = self.tokens.len();
            return Err(format!("{found} tokens came for {keys} keys, but they have {tokens}; give all or none"));
        }
        // The daemon derives them again for its own sake; here it costs 0.1 us per block and finds a mistake before any byte is sent.
        if self.parent.chain(self.tokens, block_tokens) != self.keys {
            return Err("tokens and parent do not derive the keys; give the run's own, in order".to_owned());
        }
        Ok(shard)
    }

    /// One refusal for each key, with the reason in the log: it is a mistake of the caller, who should find it.
    pub(crate) fn refused(&self, fault: &str) -> Vec<PutOutcome> {
        tracing::warn!(keys = self.keys.len(), "put refused: {fault}");
        vec![PutOutcome::Refused; self.keys.len()]
    }
}

/// What became of a block that was put.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PutOutcome {
    /// There, for everyone who may see it.
    Stored,
    /// There, but other shards of the block are still missing.
    ShardStored,
    /// Was there before.
    AlreadyPresent,
    /// Somebody else is writing it now.
    BeingWritten,
    /// No slot could be freed.
    NoRoom,
    /// The tenant's quota is too small for it.
    OverQuota,
    /// What arrived was not what was sent, or key and tokens do not fit; not stored.
    Refused,
    /// Too much to do; later perhaps.
    Shed,
    /// No store was there, or it went away meanwhile.
    Unavailable,
}

impl PutOutcome {
    /// Whether this shard of the block is in the store now.
    pub fn is_there(self) -> bool {
        matches!(self, Self::Stored | Self::ShardStored | Self::AlreadyPresent)
    }

    /// Whether there was no place or no turn for it: what follows it in its chain is then of no use, and is not put either.
    pub fn is_turned_away(self) -> bool {
        matches!(self, Self::NoRoom | Self::OverQuota | Self::Shed)
    }
}

/// What became of a block for which a slot was asked, to be filled in place.
#[derive(Debug)]
pub enum Reserved {
    /// A slot, to be filled and committed.
    Granted(Slot),
    /// None, and why: it is there already, somebody writes it, there is no room or no turn for it, or no store.
    Not(PutOutcome),
}

impl Reserved {
    /// The slot, if there is one.
    pub fn granted(self) -> Option<Slot> {
        match self {
            Self::Granted(slot) => Some(slot),
            Self::Not(_) => None,
        }
    }
}

/// Why no slots are given at all.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReserveError {
    /// There is no ring.
    #[error(
        "no slots to fill in place: this client asks over gRPC, which shares no memory with the daemon; put the blocks instead, or \
         attach with `Doors::Ring` by the Unix socket of a daemon on this node"
    )]
    NoRing,
    /// The layout has no such shard.
    #[error(transparent)]
    Shard(#[from] LayoutError),
}

/// Answer to a get.
#[derive(Debug)]
pub struct Got {
    /// The run, in the order of the keys.
    pub blocks: Vec<BlockView>,
    /// Why it ends there.
    pub end: GetEnd,
}

impl Got {
    /// Nothing, for a question that cannot be meant, with the reason in the log: no block is like that.
    pub(crate) fn refused(fault: &LayoutError) -> Self {
        tracing::warn!("get refused: {fault}");
        Self { blocks: Vec::new(), end: GetEnd::Miss }
    }
}

/// Why a run of blocks ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum GetEnd {
    /// All that was asked for.
    Complete,
    /// The next block is not there.
    Miss,
    /// It was not there in time.
    Deadline,
    /// The store has no memory or no turn for it now.
    Shed,
    /// No store was there, or it went away meanwhile.
    Unavailable,
    /// The next block arrived with other bytes than were stored; it was thrown away.
    SumMismatch,
}

/// Read-only view of a block's bytes. Bytes may lie in memory shared with a store, so there is no `&[u8]` of them: they are copied out
/// or compared. Such bytes are leased, and stay what they are until the last clone of the view is dropped; a store leases so much to
/// one engine and no more, so whoever keeps blocks for long copies them.
#[derive(Clone, Debug)]
pub struct BlockView {
    tier: Tier,
    content: Content,
}

#[derive(Clone, Debug)]
enum Content {
    Owned(Bytes),
    Leased(Arc<LeasedBytes>),
}

/// Where a piece of a block lies, for whoever hands addresses on (a copy engine, a system call).
///
/// The bytes may be read until the last clone of the view is dropped, and never written. Nobody changes them meanwhile; but they may be
/// mapped in other processes, so make no `&[u8]` of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockPiece {
    /// Address of the first byte.
    pub start: *const u8,
    /// Length.
    pub bytes: usize,
}

impl BlockView {
    pub(crate) fn new(tier: Tier, bytes: Bytes) -> Self {
        Self { tier, content: Content::Owned(bytes) }
    }

    pub(crate) fn leased(tier: Tier, bytes: LeasedBytes) -> Self {
        Self { tier, content: Content::Leased(Arc::new(bytes)) }
    }

    /// Where it was found.
    pub fn tier(&self) -> Tier {
        self.tier
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        match &self.content {
            Content::Owned(bytes) => bytes.len(),
            Content::Leased(bytes) => bytes.len(),
        }
    }

    /// Whether it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether the bytes are leased from a store, and not this view's own.
    pub fn is_leased(&self) -> bool {
        matches!(self.content, Content::Leased(_))
    }

    /// Copies all bytes to `target`, which must have exactly their length.
    pub fn copy_to(&self, target: &mut [u8]) {
        match &self.content {
            Content::Owned(bytes) => target.copy_from_slice(bytes),
            Content::Leased(bytes) => bytes.copy_to(target),
        }
    }

    /// A copy of all bytes.
    pub fn to_vec(&self) -> Vec<u8> {
        match &self.content {
            Content::Owned(bytes) => bytes.to_vec(),
            Content::Leased(bytes) => bytes.to_vec(),
        }
    }

    /// Whether the bytes are these.
    pub fn equals(&self, bytes: &[u8]) -> bool {
        match &self.content {
            Content::Owned(own) => own == bytes,
            Content::Leased(own) => own.equals(bytes),
        }
    }

    /// Where the bytes lie, in order: one piece, or as many as the stored shards that the block is read from.
    pub fn pieces(&self) -> Vec<BlockPiece> {
        match &self.content {
            Content::Owned(bytes) => vec![BlockPiece { start: bytes.as_ptr(), bytes: bytes.len() }],
            Content::Leased(bytes) => bytes.pieces().map(|(start, bytes)| BlockPiece { start, bytes }).collect(),
        }
    }
}

/// How far a prefetch has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Prefetched {
    /// In host memory now.
    pub resident_blocks: usize,
    /// Of these, brought up by this request.
    pub loaded_blocks: usize,
    /// In no tier, or lost on the way.
    pub missing_blocks: usize,
    /// Given up: too much to do, no memory, deadline, no store.
    pub shed_blocks: usize,
}

/// What to forget.
#[derive(Clone, Copy, Debug)]
pub enum Purge<'a> {
    /// These blocks.
    Keys(&'a [BlockKey]),
    /// Everything under the namespace.
    Namespace,
}

/// Answer to a purge.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Purged {
    /// Forgotten.
    pub purged_blocks: u64,
    /// Of these, in use just now: gone for lookups, freed when the last user is done.
    pub busy_blocks: u64,
    /// Whether the store was there and finished in time.
    pub complete: bool,
}
