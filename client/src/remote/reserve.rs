//! A put whose slots the caller fills: reserve, fill in place, commit.
//!
//! ```text
//! reserve ──► slots ──► filled by the caller: a copy engine, a kernel, `Slot::fill` ──► commit ──► stored
//!               │ │          └─ the worker is started again meanwhile: the next one has it that they are held
//!               │ └─ dropped: given back                                                    └─ not held any more: gone
//!               └─ no ring: put
//! ```

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tender_proto::door::CommitOutcome;
use tender_proto::{BlockKey, Shard};
use tokio::task::yield_now;

use super::link::Link;
use super::{Remote, outcome_of};
use crate::failure::Failure;
use crate::local::{Local, Slot};
use crate::{PutOutcome, ReserveError, Reserved};

impl Remote {
    /// Slots for a run of blocks, each the parent of the next, that the caller fills where they lie: what [`put`](crate::BlockStore::put) does
    /// without its copy. `parent` is the key before the first, or the root. One outcome for each key. Behind the first block for which
    /// there is no room or no turn, all are turned away like it.
    ///
    /// Slots lie in memory of this client, its own if it [brought](Self::bring) some, and are charged to the tenant's quota from here on.
    /// There are a few segments of it, and what is reserved is of no use to anybody until it is committed: so reserve what is filled at
    /// once and not more. A first reservation waits until memory is made, within the deadline. Dropped in between, it reserves nothing.
    ///
    /// Errors: [`NoRing`](ReserveError::NoRing) where there is no memory that both sides map; [`Shard`](ReserveError::Shard). Neither
    /// reserves anything.
    pub async fn reserve(
        &self,
        parent: BlockKey,
        keys: &[BlockKey],
        shard: Shard,
    ) -> Result<Vec<Reserved>, ReserveError> {
        let shard = self.terms.attach.layout.shard(shard.index.into(), shard.count.into())?;
        let bytes = self.terms.shard_bytes(shard.count);
        let mut parent = parent;
        let mut reserved = Vec::with_capacity(keys.len());
        for piece in keys.chunks(Local::KEYS_MAX) {
            let call = |link: Arc<Link>| async move {
                match link.local(piece.len()) {
                    Some(local) => local.reserve(parent, piece, shard, bytes, self.deadline).await.map(Some),
                    None => Ok(None),
                }
            };
            match self.ask(self.deadline, call).await {
                Ok(outcomes) => reserved.extend(outcomes.ok_or(ReserveError::NoRing)?),
                Err(failure) => fill_up(&mut reserved, keys.len(), outcome_of(failure)),
            }
            match reserved.last() {
                Some(Reserved::Not(outcome)) if outcome.is_turned_away() => {
                    let outcome = *outcome;
                    fill_up(&mut reserved, keys.len(), outcome);
                }
                _ => {}
            }
            if reserved.len() == keys.len() {
                break;
            }
            parent = piece[piece.len() - 1];
        }
        Ok(reserved)
    }

    /// Says that slots are filled; what became of each, in order. Those whose sums are not known ([`fill`](Slot::fill),
    /// [`set_sums`](Slot::set_sums)) are read once here. Nothing may write there any more.
    ///
    /// - `Stored`: the block is there, for everyone who may see it.
    /// - `ShardStored`: the shard is; others of the block are missing.
    /// - `Gone`: the reservation did not stand any more, and the block is as it was before: somebody purged it, a process of the group
    ///   died, which gives up what the group had begun, the daemon's host memory is another, or the next worker did not confirm the
    ///   reservation. Or nobody could be asked: no daemon in time, none with a ring, or the slot is another client's.
    ///
    /// A worker that ends in the middle of it is followed by the next one, which is asked again, all within the deadline. What was
    /// committed to the first one is no reservation of the next one's: so the block is looked up, and is `Stored` if it is there. One
    /// shard of several cannot be looked up and is `Gone` then, although it may be there; nor can anything that was not answered in
    /// time. To [`reserve`](Self::reserve) again tells: what is there is `AlreadyPresent`.
    pub async fn commit(&self, slots: Vec<Slot>) -> Vec<CommitOutcome> {
        let mut outcomes = vec![CommitOutcome::Gone; slots.len()];
        let (mut places, mut own) = (Vec::with_capacity(slots.len()), Vec::with_capacity(slots.len()));
        for (place, mut slot) in slots.into_iter().enumerate() {
            if !slot.is_of(&self.links.estate().debts) {
                tracing::warn!(?slot, "not committed: another client has reserved it");
                continue;
            }
            slot.sum();
            places.push(place);
            own.push(slot);
            // Summing takes a tenth of a millisecond per MiB.
            yield_now().await;
        }
        let committed = self.commit_own(own).await;
        places.into_iter().zip(committed).for_each(|(place, outcome)| outcomes[place] = outcome);
        outcomes
    }

    async fn commit_own(&self, slots: Vec<Slot>) -> Vec<CommitOutcome> {
        let tries = AtomicUsize::new(0);
        let call = |link: Arc<Link>| {
            let (tries, slots) = (&tries, &slots);
            async move {
                let is_first = tries.fetch_add(1, Ordering::Relaxed) == 0;
                let Some(local) = link.local(0) else { return Ok(vec![CommitOutcome::Gone; slots.len()]) };
                let mut outcomes = local.commit(slots, self.deadline).await?;
                if !is_first {
                    find_gone(local, slots, &mut outcomes, self.deadline).await?;
                }
                Ok(outcomes)
            }
        };
        let outcomes = self.ask(self.deadline, call).await.unwrap_or_else(|_| vec![CommitOutcome::Gone; slots.len()]);
        for (slot, outcome) in slots.into_iter().zip(&outcomes) {
            // What is gone may only not have been answered: then it is given back.
            if *outcome != CommitOutcome::Gone {
                slot.ended();
            }
        }
        outcomes
    }
}

/// Finds out what became of slots whose reservations an unanswered commit may have ended: a block that is there is stored.
async fn find_gone(
    local: &Local,
    slots: &[Slot],
    outcomes: &mut [CommitOutcome],
    deadline: Duration,
) -> Result<(), Failure> {
    let gone: Vec<usize> = (0..slots.len()).filter(|&slot| outcomes[slot] == CommitOutcome::Gone).collect();
    for gone in gone.chunks(Local::KEYS_MAX) {
        let keys: Vec<BlockKey> = gone.iter().map(|&slot| slots[slot].key()).collect();
        let found = local.lookup(&keys, deadline).await?;
        for (&slot, (host, disk)) in gone.iter().zip(found.host.iter().zip(found.disk.iter())) {
            if host || disk {
                outcomes[slot] = CommitOutcome::Stored;
            }
        }
    }
    Ok(())
}

/// The same for all that is left.
fn fill_up(reserved: &mut Vec<Reserved>, length: usize, outcome: PutOutcome) {
    reserved.resize_with(length, || Reserved::Not(outcome));
}
