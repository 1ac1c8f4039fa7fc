//! Put: slots for a run of blocks, then commit or abort. A block is published when all its shards are committed, by one group.

use tender_proto::{BlockKey, Shard, sum};

use super::Core;
use std::collections::{BTreeMap, BTreeSet};

use super::attach::Under;
use super::room::NoSlot;
use crate::admission::grants::{Grant, Right};
use crate::completion::Patience;
use crate::limits;
use crate::names::{AttachmentId, By, Door, Hold, Holder, NodeId, Place, SlotId, TenantId};
use crate::tier;
use crate::tier::slab::{Owner, ShelfId, SlotState};
use crate::verb::{CommitOutcome, Filled, RefusalKind, Reply, Request, ReserveOutcome, Verb};

/// An incomplete block is given up when nothing was added to it for so long.
const PARTIAL_MS: u64 = 60_000;

/// Ranks of one engine put their shards within this time of each other.
const RANKS_MS: u64 = 1_000;

impl Core {
    /// Reserves, or waits for a while until it can, holding nothing meanwhile; `None` when the request waits.
    pub(super) fn reserve(&mut self, request: Request, patience: Option<Patience>) -> Option<Reply> {
        let Request { id, tenant, deadline_ms, verb } = request;
        let Verb::Reserve { attachment, parent, keys, shard, bytes_max, door } = verb else {
            unreachable!("only reservations are reserved")
        };
        let Some(under) = self.under(tenant, attachment) else { return Some(Self::unattached(attachment)) };
        if let Err(error) = under.layout.shard(shard.index.into(), shard.count.into()) {
            return Some(Reply::refused(RefusalKind::Invalid, error.to_string()));
        }
        let may_wait = deadline_ms > self.now_ms && self.is_patient(patience);
        let under = Under { holder: Holder { door, ..under.holder }, ..under };
        let slot_bytes = tier::shard_slot_bytes(&under.layout, shard.count as u8);
        let owner = Owner { tenant, slot_bytes, writer: (door == Door::Ring).then_some(under.holder.attachment) };
        let outcomes = self.reserve_run(owner, under, parent, &keys, shard, bytes_max, may_wait);
        // What holds the quota may be about to go, as what holds the room.
        let is_refusal =
            |outcome: &ReserveOutcome| matches!(outcome, ReserveOutcome::NoRoom | ReserveOutcome::OverQuota);
        let is_short = outcomes.contains(&ReserveOutcome::NoRoom);
        let got_nothing = outcomes.first().is_some_and(is_refusal);
        let wait = match door {
            Door::Stream => is_short && self.memory_is_coming(tenant) || got_nothing && self.room_is_coming(tenant),
            Door::Ring => got_nothing && self.ingest.is_coming(attachment),
        };
        if may_wait && wait {
            self.abort(By::Daemon, &granted(&outcomes));
            if !self.pending.has_room() {
                return Some(self.busy());
            }
            let verb = Verb::Reserve { attachment, parent, keys, shard, bytes_max, door };
            let could_evict = self.host.tier.has_segments(owner);
            let until_ms =
                patience.map_or_else(|| self.put_waits_until_ms(tenant, could_evict), |patience| patience.until_ms);
            self.wait_for_room(Request { id, tenant, deadline_ms, verb }, until_ms);
            return None;
        }
        for outcome in &outcomes {
            match outcome {
                ReserveOutcome::Granted { .. } => {}
                ReserveOutcome::AlreadyPresent => self.counters.put_present += 1,
                ReserveOutcome::BeingWritten => self.counters.put_contended += 1,
                ReserveOutcome::NoRoom => self.counters.put_no_room += 1,
                ReserveOutcome::OverQuota => self.counters.put_over_quota += 1,
            }
        }
        Some(Reply::Reserved(outcomes))
    }

    /// Stops at the first block for which there is no slot: what follows would be of no use without it.
    #[expect(clippy::too_many_arguments, reason = "the fields of one verb")]
    fn reserve_run(
        &mut self,
        owner: Owner,
        under: Under,
        parent: BlockKey,
        keys: &[BlockKey],
        shard: Shard,
        bytes_max: u64,
        may_wait: bool,
    ) -> Vec<ReserveOutcome> {
        let Owner { slot_bytes, .. } = owner;
        let mut parent = parent;
        let mut outcomes = Vec::with_capacity(keys.len());
        let mut refused = None;
        let mut bytes_left = bytes_max;
        for &key in keys {
            let outcome = match refused {
                Some(refused) => refused,
                None if bytes_left < u64::from(slot_bytes) => ReserveOutcome::NoRoom,
                None => self.reserve_block(under, key, parent, shard, owner, may_wait),
            };
            match outcome {
                ReserveOutcome::Granted { .. } => bytes_left -= u64::from(slot_bytes),
                ReserveOutcome::NoRoom | ReserveOutcome::OverQuota => refused = Some(outcome),
                ReserveOutcome::AlreadyPresent | ReserveOutcome::BeingWritten => {}
            }
            parent = key;
            outcomes.push(outcome);
        }
        outcomes
    }

    fn reserve_block(
        &mut self,
        under: Under,
        key: BlockKey,
        parent: BlockKey,
        shard: Shard,
        owner: Owner,
        may_wait: bool,
    ) -> ReserveOutcome {
        let node = self.index.find_or_insert(under.namespace, key, parent);
        if self.index.node(node).is_present() || self.index.is_root(node) {
            self.index.touch(node, self.now_ms);
            self.index.forget_if_unused(node);
            return ReserveOutcome::AlreadyPresent;
        }
        let filling = self.index.node(node).filling;
        let slab = &self.host.tier.slab;
        if let Some(first) = (filling != SlotId::NONE).then(|| slab.slot(filling)) {
            if first.holder != under.holder.group || u16::from(first.shard_count) != shard.count {
                return ReserveOutcome::BeingWritten;
            }
            let mut chain = slab.chain(filling).map(|slot| slab.slot(slot));
            if let Some(same) = chain.find(|slot| u16::from(slot.shard_index) == shard.index) {
                let committed = same.state == SlotState::Resident;
                return if committed { ReserveOutcome::AlreadyPresent } else { ReserveOutcome::BeingWritten };
            }
        }
        if owner.writer.is_none() && may_wait && self.comes_rather_than_evict(owner) {
            self.index.forget_if_unused(node);
            return ReserveOutcome::NoRoom;
        }
        let place = (shard.index as u8, shard.count as u8);
        let granted = match self.may_hold(owner.tenant, 1) {
            true if owner.writer.is_some() => self.allocate_ingest(owner, node, under.holder.group, place),
            true => self.allocate(Place::Host, owner, node, under.holder.group, place),
            false => Err(NoSlot::Room),
        };
        match granted {
            Ok(slot) => {
                self.reserved_slots += 1;
                let first = self.index.node(node).filling;
                self.record_filling(slot, first);
                self.host.tier.slab.slot_mut(slot).next = first;
                self.index.set_filling(node, slot);
                let grant = Grant { slot, right: Right::Reservation, holder: under.holder };
                let hold = self.grants.grant(grant).expect("there is room for one");
                self.held[owner.tenant.0 as usize] += 1;
                self.record_grant(hold, grant);
                ReserveOutcome::Granted { hold, extent: self.host.extent(slot) }
            }
            Err(refused) => {
                self.index.forget_if_unused(node);
                match refused {
                    NoSlot::Quota => ReserveOutcome::OverQuota,
                    NoSlot::Room => ReserveOutcome::NoRoom,
                }
            }
        }
    }

    pub(super) fn commit(
        &mut self,
        tenant: TenantId,
        attachment: AttachmentId,
        filled: &[Filled],
        door: Door,
    ) -> Reply {
        // A group that has left vouches for nothing: whoever held the slots for it gives them back.
        let Some(under) = self.under(tenant, attachment) else { return Self::unattached(attachment) };
        let under = Under { holder: Holder { door, ..under.holder }, ..under };
        Reply::Committed(filled.iter().map(|filled| self.commit_slot(under, filled)).collect())
    }

    fn commit_slot(&mut self, under: Under, filled: &Filled) -> CommitOutcome {
        let by = By::Group(under.holder.group, under.holder.door);
        let Some(Grant { slot, .. }) =
            self.grants.get(filled.hold, by).filter(|grant| grant.right == Right::Reservation)
        else {
            return CommitOutcome::Gone;
        };
        let record = *self.host.tier.slab.slot(slot);
        let payload_bytes = under.layout.shard_bytes(record.shard_count.into()) as usize;
        // A group may have members under several namespaces, whose blocks have other sizes and seeds.
        let is_theirs = !record.doomed && self.index.node(record.node).namespace == under.namespace;
        if !is_theirs || filled.sums.len() != sum::fragment_count(payload_bytes) {
            self.abort(by, &[filled.hold]);
            return CommitOutcome::Gone;
        }
        self.end_grant(filled.hold, Right::Reservation, by);
        let (node, shard) = (record.node, shard_of(record.shard_index, record.shard_count));
        let seed = sum::seed(&self.index.node(node).key, shard, under.fingerprint);
        self.host.set_sums(slot, &filled.sums);
        let record = self.host.tier.slab.slot_mut(slot);
        record.root = sum::root(seed, &filled.sums);
        record.state = SlotState::Resident;
        self.record_resident(slot);
        self.reserved_slots -= 1;
        self.counters.put_blocks += 1;
        self.counters.put_bytes += u64::from(self.host.tier.slab.slot_bytes(slot));
        if !self.publish_if_whole(node) {
            self.keep_partial(node, slot);
            return CommitOutcome::ShardStored;
        }
        CommitOutcome::Stored
    }

    /// A shard of a block is there, and others are not: they may come for a while.
    pub(super) fn keep_partial(&mut self, node: NodeId, slot: SlotId) {
        self.partials.insert(node, self.now_ms + PARTIAL_MS, slot);
    }

    fn publish_if_whole(&mut self, node: NodeId) -> bool {
        let slab = &mut self.host.tier.slab;
        let mut slots: Vec<SlotId> = slab.chain(self.index.node(node).filling).collect();
        let whole = slots.len() == usize::from(slab.slot(slots[0]).shard_count)
            && slots.iter().all(|&slot| slab.slot(slot).state == SlotState::Resident);
        if !whole {
            return false;
        }
        slots.sort_by_key(|&slot| slab.slot(slot).shard_index);
        for (i, &slot) in slots.iter().enumerate() {
            slab.slot_mut(slot).next = slots.get(i + 1).copied().unwrap_or(SlotId::NONE);
        }
        let shelf = slab.shelf_of(slots[0]);
        let block_bytes = self.block_bytes(node);
        self.index.publish(node, Place::Host, slots[0], shelf, block_bytes, self.now_ms);
        self.index.set_filling(node, SlotId::NONE);
        self.partials.remove(node);
        if self.worth.was_lost(&self.index.node(node).key) {
            self.index.node_mut(node).reused = true;
        }
        if self.is_ingest(node) {
            self.promote(node);
        } else {
            self.write_back(node, false);
        }
        true
    }

    pub(super) fn abort(&mut self, by: By, holds: &[Hold]) {
        for &hold in holds {
            let Some(Grant { slot, .. }) = self.end_grant(hold, Right::Reservation, by) else { continue };
            let record = self.host.tier.slab.slot(slot);
            let (node, doomed) = (record.node, record.doomed);
            self.reserved_slots -= 1;
            if !doomed {
                self.unlink_filling(node, slot);
            }
            self.give_back(Place::Host, slot);
        }
    }

    fn unlink_filling(&mut self, node: NodeId, slot: SlotId) {
        let slab = &mut self.host.tier.slab;
        let next = slab.slot(slot).next;
        let first = self.index.node(node).filling;
        if first == slot {
            self.index.set_filling(node, next);
            return;
        }
        let before = slab.chain(first).find(|&before| slab.slot(before).next == slot);
        if let Some(before) = before {
            slab.slot_mut(before).next = next;
        }
    }

    /// Takes a half-filled block back: committed shards are freed, shards being written when their writer is done.
    pub(super) fn drop_filling(&mut self, node: NodeId) {
        self.partials.remove(node);
        let slots: Vec<SlotId> = self.host.tier.slab.chain(self.index.node(node).filling).collect();
        for slot in slots {
            let record = self.host.tier.slab.slot_mut(slot);
            match record.state {
                SlotState::Filling => {
                    record.doomed = true;
                    self.record_doomed(slot);
                }
                _ => self.give_back(Place::Host, slot),
            }
        }
        self.index.set_filling(node, SlotId::NONE);
    }

    /// Gives up blocks to which nothing was added for long.
    pub(super) fn give_up_partial(&mut self) {
        while let Some(node) = self.partials.overdue(self.now_ms) {
            self.drop_filling(node);
        }
    }

    /// Gives up the oldest half-filled block of a shelf, unless its ranks may still be at it.
    pub(super) fn drop_oldest_partial(&mut self, shelf: ShelfId) -> bool {
        let slab = &self.host.tier.slab;
        let old = self.partials.older_than(self.now_ms + PARTIAL_MS - RANKS_MS).take(limits::VICTIM_STEPS_MAX);
        let oldest = old.filter(|(_, slot)| slab.shelf_of(*slot) == shelf).map(|(node, _)| node).next();
        oldest.inspect(|&node| self.drop_filling(node)).is_some()
    }
}

/// Blocks of which some shards are there and others are not: each once, with the time when it is given up.
#[derive(Debug, Default)]
pub(super) struct Partials {
    /// With the slot of the shard that came last.
    by_node: BTreeMap<NodeId, (u64, SlotId)>,
    by_deadline: BTreeSet<(u64, NodeId)>,
}

impl Partials {
    /// A shard was added.
    fn insert(&mut self, node: NodeId, deadline_ms: u64, slot: SlotId) {
        self.remove(node);
        self.by_node.insert(node, (deadline_ms, slot));
        self.by_deadline.insert((deadline_ms, node));
    }

    /// The block is whole, or given up.
    fn remove(&mut self, node: NodeId) {
        if let Some((deadline_ms, _)) = self.by_node.remove(&node) {
            self.by_deadline.remove(&(deadline_ms, node));
        }
    }

    /// Whether a block is one of them.
    pub(super) fn has(&self, node: NodeId) -> bool {
        self.by_node.contains_key(&node)
    }

    fn overdue(&self, now_ms: u64) -> Option<NodeId> {
        self.by_deadline.first().filter(|(deadline_ms, _)| *deadline_ms <= now_ms).map(|(_, node)| *node)
    }

    /// Those that are given up before that time, oldest first.
    fn older_than(&self, deadline_ms: u64) -> impl Iterator<Item = (NodeId, SlotId)> {
        let old = self.by_deadline.range(..(deadline_ms, NodeId(0)));
        old.map(|&(_, node)| (node, self.by_node[&node].1))
    }
}

/// The reservations in an answer.
fn granted(outcomes: &[ReserveOutcome]) -> Vec<Hold> {
    let hold = |outcome: &ReserveOutcome| match outcome {
        ReserveOutcome::Granted { hold, .. } => Some(*hold),
        _ => None,
    };
    outcomes.iter().filter_map(hold).collect()
}

/// The shard of a slot record.
pub(super) fn shard_of(index: u8, count: u8) -> Shard {
    Shard { index: index.into(), count: count.into() }
}
