//! Putting a run in place: slots are reserved in memory that this process writes, filled there, and committed. `Local::put` fills them
//! itself, each copied and summed in one pass; `Local::reserve` and `Local::commit` are for callers who do.
//!
//! What lies behind a payload in its slot is left as it is: the daemon reads payloads only, and zeroes the rest of the slot that it
//! copies one to. What is reserved and not committed is given back, whatever becomes of the put.

use std::time::Duration;

use tender_proto::door::{
    CommitOutcome, Extent, Filled, HoldId, HoldKind, KEYS_PER_ENTRY_MAX, Reply, Request, ReserveOutcome,
    commits_that_fit,
};
use tender_proto::{BlockKey, Shard};
use tokio::task::yield_now;

use super::Local;
use super::debts::Held;
use super::slot::Slot;
use crate::failure::Failure;
use crate::{Put, PutOutcome, Reserved};

/// Reserved at once by a put: enough that asking costs nothing beside copying, and little enough that slots are readable, and copied on by
/// the daemon, while the next ones are filled.
const PUT_BYTES_MAX: usize = 32 << 20;

/// Slots are whole pages.
const PAGE_BYTES: usize = 4096;

impl Local {
    /// How many blocks to put at once.
    pub(crate) fn put_keys_max(shard_bytes: usize) -> usize {
        (PUT_BYTES_MAX / shard_bytes.next_multiple_of(PAGE_BYTES).max(1)).clamp(1, KEYS_PER_ENTRY_MAX)
    }

    /// Puts a run of at most `put_keys_max` blocks. Returns the outcomes of the first so many: there was no memory here for the next.
    pub(crate) async fn put(&self, put: &Put<'_>, deadline: Duration) -> Result<Vec<PutOutcome>, Failure> {
        let bytes = put.payloads.first().map_or(0, |payload| payload.len());
        let reserved = self.reserve(put.parent, put.keys, put.shard, bytes, deadline).await?;
        let mut outcomes = Vec::with_capacity(put.keys.len());
        let (mut places, mut slots) = (Vec::new(), Vec::new());
        let mut is_short = false;
        for (index, reserved) in reserved.into_iter().enumerate() {
            match reserved {
                // The last one, and no outcome: there may be room over gRPC.
                Reserved::Not(PutOutcome::NoRoom) => is_short = true,
                Reserved::Granted(slot) => {
                    places.push(index);
                    slots.push(slot);
                    // Until it is committed.
                    outcomes.push(PutOutcome::Unavailable);
                }
                Reserved::Not(outcome) => outcomes.push(outcome),
            }
        }
        for (slot, &index) in slots.iter_mut().zip(&places) {
            slot.fill(&put.payloads[index]);
            // Copying takes a tenth of a millisecond per MiB.
            yield_now().await;
        }
        let committed = self.commit(&slots, deadline).await?;
        for ((outcome, slot), index) in committed.into_iter().zip(slots).zip(places) {
            slot.ended();
            outcomes[index] = match outcome {
                CommitOutcome::Stored => PutOutcome::Stored,
                CommitOutcome::ShardStored => PutOutcome::ShardStored,
                CommitOutcome::Gone => PutOutcome::Unavailable,
            };
        }
        if is_short {
            // Before somebody else asks for the same blocks: what is reserved here would be in the way.
            self.connection.calls().settle(deadline).await;
        }
        Ok(outcomes)
    }

    /// Slots of `bytes` for a run of at most `KEYS_MAX` blocks, up to the first that is turned away. What is granted where nothing can be
    /// written is given back, for there is no room then; so is what is granted behind it.
    pub(crate) async fn reserve(
        &self,
        parent: BlockKey,
        keys: &[BlockKey],
        shard: Shard,
        bytes: usize,
        deadline: Duration,
    ) -> Result<Vec<Reserved>, Failure> {
        // What is asked for is bounded by the number of keys.
        let request = Request::Reserve { parent, shard, bytes_max: u64::MAX, keys: keys.into() };
        let Reply::Reserved(outcomes) = self.ask(&request, deadline).await? else { return Err(Failure::Gone) };
        let reserved = outcomes.into_iter().zip(keys).map(|(outcome, key)| match outcome {
            ReserveOutcome::Granted { hold, extent } => self.granted(key, hold, extent, bytes),
            ReserveOutcome::AlreadyPresent => Ok(Reserved::Not(PutOutcome::AlreadyPresent)),
            ReserveOutcome::BeingWritten => Ok(Reserved::Not(PutOutcome::BeingWritten)),
            ReserveOutcome::NoRoom => Ok(Reserved::Not(PutOutcome::NoRoom)),
            ReserveOutcome::OverQuota => Ok(Reserved::Not(PutOutcome::OverQuota)),
        });
        // All of them first: what was granted is given back if one has ended.
        let mut reserved = reserved.collect::<Vec<_>>().into_iter().collect::<Result<Vec<_>, _>>()?;
        let is_turned_away = |reserved: &Reserved| matches!(reserved, Reserved::Not(why) if why.is_turned_away());
        if let Some(first) = reserved.iter().position(is_turned_away) {
            reserved.truncate(first + 1);
        }
        Ok(reserved)
    }

    fn granted(&self, key: &BlockKey, hold: HoldId, extent: Extent, bytes: usize) -> Result<Reserved, Failure> {
        let Extent { segment, offset_bytes, bytes: slot_bytes } = extent;
        let (origin, debts) = (self.connection.calls().origin(), self.connection.debts());
        let reservation =
            Held::new(origin, HoldKind::Reservation, [(hold, segment, offset_bytes)], debts).ok_or(Failure::Gone)?;
        let mapping = self.connection.known(segment).filter(|mapping| {
            mapping.is_writable() && mapping.holds(offset_bytes, bytes as u64) && bytes as u64 <= slot_bytes.into()
        });
        Ok(match mapping {
            Some(mapping) => {
                let place = (mapping, offset_bytes, bytes);
                Reserved::Granted(Slot::new(*key, place, hold, reservation, &self.connection))
            }
            None => Reserved::Not(PutOutcome::NoRoom),
        })
    }

    /// Commits slots that were summed; what became of each. Those that are held no more are not asked about: their names could be
    /// another's by now.
    pub(crate) async fn commit(&self, slots: &[Slot], deadline: Duration) -> Result<Vec<CommitOutcome>, Failure> {
        let mut outcomes = vec![CommitOutcome::Gone; slots.len()];
        let origin = self.connection.calls().origin();
        let held: Vec<usize> = (0..slots.len()).filter(|&index| slots[index].stands_in(origin)).collect();
        let filled: Vec<Filled> = held.iter().map(|&index| slots[index].filled()).collect();
        let (mut held, mut rest) = (&held[..], &filled[..]);
        while !rest.is_empty() {
            let count = commits_that_fit(rest).max(1);
            let Reply::Committed(committed) = self.ask(&Request::Commit(rest[..count].into()), deadline).await? else {
                return Err(Failure::Gone);
            };
            for (&index, outcome) in held.iter().zip(committed) {
                outcomes[index] = outcome;
            }
            (held, rest) = (&held[count..], &rest[count..]);
        }
        Ok(outcomes)
    }
}
