//! Getting a run: leases, as many as there are to be had at once; what is leased is read where it lies.
//!
//! ```text
//! acquire ──► leases ──► every part lies where it should? ──► its memory is mapped, or fetched ──► nobody else may write it: a view
//!    ▲           │                  └─ no: a mismatch               └─ not to be had: gRPC         └─ somebody may: copied out, summed,
//!    │           │                                                                                    compared, given back
//!    └── more ───┴─ what the group may lease is used up: what is leased becomes owned bytes and is given back
//! ```
//! A mismatch ends the run. Where this process holds none of what is leased, and still gets nothing, other members of its group do: the
//! rest goes over gRPC, which has memory of its own for what is on its way.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tender_proto::door::{AcquireEnd, Acquired, HoldKind, KEYS_PER_ENTRY_MAX, LeasedBlock, LeasedPart, Reply, Request};
use tender_proto::ring::FRAME_BYTES;
use tender_proto::sum::{root, seed};
use tender_proto::{BlockKey, BlockLayout, Shard, wire};
use tokio::task::yield_now;

use super::Local;
use super::debts::Held;
use super::mapping::Mapping;
use super::view::{LeasedBytes, Piece};
use crate::failure::Failure;
use crate::{BlockView, GetEnd, Tier};

/// The longest leased block in a reply; the frame of one that had room for it was not what ended the run.
const LEASED_BLOCK_BYTES_MAX: usize = leased_block_bytes(64);

/// What is wanted of a run.
pub(crate) struct Wanted<'a> {
    pub(crate) keys: &'a [BlockKey],
    pub(crate) shard: Shard,
    pub(crate) layout: &'a BlockLayout,
    pub(crate) deadline: Duration,
}

/// How far a run came.
pub(crate) enum Came {
    /// As far as it goes.
    To(GetEnd),
    /// Ask over gRPC for the rest.
    NotHere,
}

/// A leased block, which is given back when this is dropped.
struct Leased {
    block: LeasedBlock,
    lease: Held,
}

/// A stored part, and which of its bytes are wanted.
struct Wish<'a> {
    part: &'a LeasedPart,
    mapping: Arc<Mapping>,
    from: usize,
    to: usize,
}

/// Why a leased block brought nothing.
enum Unusable {
    Mismatch,
    NotMapped,
}

impl Local {
    /// Appends to `blocks` what comes.
    pub(crate) async fn get(&self, wanted: &Wanted<'_>, blocks: &mut Vec<BlockView>) -> Result<Came, Failure> {
        let before = blocks.len();
        let mut copied = before;
        loop {
            let missing = &wanted.keys[blocks.len() - before..];
            let piece = &missing[..missing.len().min(KEYS_PER_ENTRY_MAX)];
            if piece.is_empty() {
                return Ok(Came::To(GetEnd::Complete));
            }
            let (end, leased) = self.acquire(piece, wanted.deadline).await?;
            let (count, is_full) = (leased.len(), is_frame_full(&leased));
            for (key, leased) in piece.iter().zip(leased) {
                match self.view(wanted, key, leased).await {
                    Ok(view) => blocks.push(view),
                    Err(Unusable::NotMapped) => return Ok(Came::NotHere),
                    Err(Unusable::Mismatch) => {
                        tracing::warn!(?key, "a block is not what was stored; taken for a miss");
                        return Ok(Came::To(GetEnd::SumMismatch));
                    }
                }
            }
            match end {
                AcquireEnd::Complete if count == piece.len() => {}
                AcquireEnd::Complete | AcquireEnd::Miss => return Ok(Came::To(GetEnd::Miss)),
                AcquireEnd::Deadline => return Ok(Came::To(GetEnd::Deadline)),
                AcquireEnd::Budget if is_full => {}
                AcquireEnd::Budget | AcquireEnd::Shed if copied < blocks.len() => {
                    self.copy_out(&mut blocks[copied..]).await;
                    copied = blocks.len();
                    self.connection.calls().settle(wanted.deadline).await;
                }
                AcquireEnd::Budget => return Ok(Came::NotHere),
                AcquireEnd::Shed => return Ok(Came::To(GetEnd::Shed)),
            }
        }
    }

    async fn acquire(&self, keys: &[BlockKey], deadline: Duration) -> Result<(AcquireEnd, Vec<Leased>), Failure> {
        let request = Request::Acquire { bytes_max: u64::MAX, keys: keys.into() };
        let Reply::Acquired(Acquired { end, blocks }) = self.ask(&request, deadline).await? else {
            return Err(Failure::Gone);
        };
        let origin = self.connection.calls().origin();
        let leased = blocks.into_iter().map(|block| {
            let holds = block.parts.iter().map(|part| (part.hold, part.segment, part.offset_bytes));
            let lease = Held::new(origin, HoldKind::Lease, holds, self.connection.debts())?;
            Some(Leased { block, lease })
        });
        Ok((end, leased.collect::<Option<_>>().ok_or(Failure::Gone)?))
    }

    async fn view(&self, wanted: &Wanted<'_>, key: &BlockKey, leased: Leased) -> Result<BlockView, Unusable> {
        let Leased { block: LeasedBlock { tier, verify, parts }, lease } = leased;
        check_parts(wanted.layout, &parts).ok_or(Unusable::Mismatch)?;
        let shard_bytes = wanted.layout.shard_bytes(wanted.shard.count);
        let start = shard_bytes * u64::from(wanted.shard.index);
        let mut wishes = Vec::new();
        for (part, from, to) in pieces(&parts, start, start + shard_bytes) {
            let mapping = self.connection.mapping(part.segment, wanted.deadline).await.ok_or(Unusable::NotMapped)?;
            if !mapping.holds(part.offset_bytes, part.payload_bytes.into()) {
                return Err(Unusable::Mismatch);
            }
            wishes.push(Wish { part, mapping, from, to });
        }
        let tier = tier_of(tier);
        if verify || self.connection.verifies_all() {
            let bytes = copy_verified(wanted.layout, key, &wishes).ok_or(Unusable::Mismatch)?;
            drop(lease);
            // Summing takes a tenth of a millisecond per MiB.
            yield_now().await;
            return Ok(BlockView::new(tier, Bytes::from(bytes)));
        }
        let pieces = wishes.into_iter().map(|Wish { part, mapping, from, to }| Piece {
            mapping,
            offset: part.offset_bytes + from as u64,
            bytes: to - from,
        });
        Ok(BlockView::leased(tier, LeasedBytes::new(pieces.collect(), lease, &self.connection)))
    }

    /// Makes views of owned bytes, and gives their leases back. Gives way to other tasks after each.
    async fn copy_out(&self, blocks: &mut [BlockView]) {
        for block in blocks {
            *block = BlockView::new(block.tier(), block.to_vec().into());
            yield_now().await;
        }
    }
}

/// Whether these are all shards of one block, in order.
fn check_parts(layout: &BlockLayout, parts: &[LeasedPart]) -> Option<()> {
    let count = u32::try_from(parts.len()).ok()?;
    let is_right = |(index, part): (u32, &LeasedPart)| {
        layout.shard(index, count) == Ok(part.shard)
            && u64::from(part.payload_bytes) == layout.shard_bytes(part.shard.count)
    };
    (0..).zip(parts).all(is_right).then_some(())
}

/// The pieces of stored shards that make up the bytes `start..end` of a block: canonical bytes are the shards end to end.
fn pieces(parts: &[LeasedPart], start: u64, end: u64) -> Vec<(&LeasedPart, usize, usize)> {
    let mut pieces = Vec::new();
    let mut offset = 0;
    for part in parts {
        let bytes = u64::from(part.payload_bytes);
        let (from, to) = (start.max(offset), end.min(offset + bytes));
        if from < to {
            pieces.push((part, (from - offset) as usize, (to - offset) as usize));
        }
        offset += bytes;
    }
    pieces
}

/// A copy of what is wanted, if the copies of the whole parts (sums are of whole parts) are what was stored.
fn copy_verified(layout: &BlockLayout, key: &BlockKey, wishes: &[Wish<'_>]) -> Option<Vec<u8>> {
    let fingerprint = layout.fingerprint();
    let mut copy = Vec::with_capacity(wishes.iter().map(|wish| wish.to - wish.from).sum());
    for Wish { part, mapping, from, to } in wishes {
        let (start, bytes) = (copy.len(), part.payload_bytes as usize);
        let sums = mapping.append_with_sums(part.offset_bytes, bytes, &mut copy);
        if root(seed(key, part.shard, fingerprint), &sums) != part.root {
            return None;
        }
        copy.truncate(start + to);
        copy.drain(start..start + from);
    }
    Some(copy)
}

fn tier_of(tier: wire::Tier) -> Tier {
    match tier {
        wire::Tier::Disk => Tier::Disk,
        wire::Tier::Peer => Tier::Peer,
        wire::Tier::Object => Tier::Object,
        wire::Tier::Host | wire::Tier::Device | wire::Tier::Unspecified => Tier::Host,
    }
}

/// Whether a reply had no room for one more block of many parts: then there are no more leases in it for that reason, and the next
/// request brings more.
fn is_frame_full(leased: &[Leased]) -> bool {
    let bytes: usize = leased.iter().map(|leased| leased_block_bytes(leased.block.parts.len())).sum();
    bytes + LEASED_BLOCK_BYTES_MAX > FRAME_BYTES
}

/// As drawn in `door`.
const fn leased_block_bytes(parts: usize) -> usize {
    4 + 36 * parts
}
