//! Putting a run in place: slots are reserved in memory that this process writes, each is filled and summed in one pass, and committed.
//!
//! What lies behind a payload in its slot is left as it is: the daemon reads payloads only, and zeroes the rest of the slot that it
//! copies one to. What is reserved and not committed is given back, whatever becomes of the put.

use std::sync::Arc;
use std::time::Duration;

use tender_proto::door::{
    CommitOutcome, Extent, Filled, HoldId, HoldKind, KEYS_PER_ENTRY_MAX, Reply, Request, ReserveOutcome,
    commits_that_fit,
};
use tokio::task::yield_now;

use super::Local;
use super::debts::Held;
use super::mapping::Mapping;
use crate::failure::Failure;
use crate::{Put, PutOutcome};

/// Reserved at once: enough that asking costs nothing beside copying, and little enough that slots are readable, and copied on by the
/// daemon, while the next ones are filled.
const PUT_BYTES_MAX: usize = 32 << 20;

/// Slots are whole pages.
const PAGE_BYTES: usize = 4096;

/// A slot to be filled.
struct Slot {
    /// Which block of the run.
    index: usize,
    hold: HoldId,
    mapping: Arc<Mapping>,
    offset: u64,
    reservation: Held,
}

impl Local {
    /// How many blocks to put at once.
    pub(crate) fn put_keys_max(shard_bytes: usize) -> usize {
        (PUT_BYTES_MAX / shard_bytes.next_multiple_of(PAGE_BYTES).max(1)).clamp(1, KEYS_PER_ENTRY_MAX)
    }

    /// Puts a run of at most `put_keys_max` blocks. Returns the outcomes of the first so many: there was no memory here for the next.
    pub(crate) async fn put(&self, put: &Put<'_>, deadline: Duration) -> Result<Vec<PutOutcome>, Failure> {
        let reserved = self.reserve(put, deadline).await?;
        let mut outcomes = Vec::with_capacity(put.keys.len());
        let mut slots = Vec::new();
        let mut is_unusable = false;
        for (index, (outcome, payload)) in reserved.into_iter().zip(put.payloads).enumerate() {
            match outcome {
                Reserved::Granted(extent, hold, reservation) => {
                    let bytes = payload.len() as u64;
                    let mapping = self.connection.known(extent.segment).filter(|mapping| {
                        mapping.is_writable()
                            && mapping.holds(extent.offset_bytes, bytes)
                            && bytes <= extent.bytes.into()
                    });
                    match mapping {
                        Some(mapping) if !is_unusable => {
                            let offset = extent.offset_bytes;
                            slots.push(Slot { index, hold, mapping, offset, reservation });
                            // Until it is committed.
                            outcomes.push(PutOutcome::Unavailable);
                        }
                        _ => is_unusable = true,
                    }
                }
                Reserved::Not(PutOutcome::NoRoom) => is_unusable = true,
                Reserved::Not(outcome) if !is_unusable => outcomes.push(outcome),
                Reserved::Not(_) => {}
            }
        }
        self.fill(put, slots, &mut outcomes, deadline).await?;
        if is_unusable {
            // Before somebody else asks for the same blocks: what is reserved here would be in the way.
            self.connection.calls().settle(deadline).await;
        }
        Ok(outcomes)
    }

    async fn reserve(&self, put: &Put<'_>, deadline: Duration) -> Result<Vec<Reserved>, Failure> {
        let (parent, shard, keys) = (put.parent, put.shard, put.keys.into());
        // What is asked for is bounded by the number of keys.
        let request = Request::Reserve { parent, shard, bytes_max: u64::MAX, keys };
        let Reply::Reserved(outcomes) = self.ask(&request, deadline).await? else { return Err(Failure::Gone) };
        let reserved = outcomes.into_iter().map(|outcome| match outcome {
            ReserveOutcome::Granted { hold, extent } => {
                let held = [(hold, extent.segment, extent.offset_bytes)];
                let reservation =
                    Held::new(self.connection.calls().life(), HoldKind::Reservation, held, self.connection.debts());
                reservation.map(|reservation| Reserved::Granted(extent, hold, reservation))
            }
            ReserveOutcome::AlreadyPresent => Ok(Reserved::Not(PutOutcome::AlreadyPresent)),
            ReserveOutcome::BeingWritten => Ok(Reserved::Not(PutOutcome::BeingWritten)),
            ReserveOutcome::NoRoom => Ok(Reserved::Not(PutOutcome::NoRoom)),
            ReserveOutcome::OverQuota => Ok(Reserved::Not(PutOutcome::OverQuota)),
        });
        // Each is looked at, also behind one that nobody holds: what is not held goes back.
        let reserved: Vec<Result<Reserved, Failure>> = reserved.collect();
        reserved.into_iter().collect()
    }

    /// Fills slots, gives way to other tasks after each, and commits all.
    async fn fill(
        &self,
        put: &Put<'_>,
        slots: Vec<Slot>,
        outcomes: &mut [PutOutcome],
        deadline: Duration,
    ) -> Result<(), Failure> {
        let mut filled = Vec::with_capacity(slots.len());
        for slot in &slots {
            let sums = slot.mapping.fill(slot.offset, &put.payloads[slot.index]);
            filled.push(Filled { hold: slot.hold, sums });
            yield_now().await;
        }
        let mut slots = slots.into_iter();
        let mut rest = &filled[..];
        while !rest.is_empty() {
            let (now, later) = rest.split_at(commits_that_fit(rest).max(1));
            rest = later;
            let Reply::Committed(committed) = self.ask(&Request::Commit(now.into()), deadline).await? else {
                return Err(Failure::Gone);
            };
            for (outcome, Slot { index, reservation, .. }) in committed.into_iter().zip(&mut slots) {
                reservation.ended();
                outcomes[index] = match outcome {
                    CommitOutcome::Stored => PutOutcome::Stored,
                    CommitOutcome::ShardStored => PutOutcome::ShardStored,
                    CommitOutcome::Gone => PutOutcome::Unavailable,
                };
            }
        }
        Ok(())
    }
}

/// What became of a block in a reservation; granted, it is given back when this is dropped.
enum Reserved {
    Granted(Extent, HoldId, Held),
    Not(PutOutcome),
}
