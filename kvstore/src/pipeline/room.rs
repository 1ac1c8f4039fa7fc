//! Room: where a slot comes from. First what is free, then a dead block, then the coldest block of the same tenant and size; and when
//! another shelf's coldest is much colder than that, one of its segments changes owner.

use super::{Action, Actions, Core, Draining};
use crate::completion::{Patience, Waiting};
use crate::limits;
use crate::names::{AttachmentId, Door, GroupId, NodeId, Place, RequestId, SlotId, TenantId};
use crate::tier::disk::DiskTier;
use crate::tier::slab::{Owner, ShelfId, Slab, SlotState};
use crate::tier::{self, Tier};
use crate::verb::{Reply, Request, Verb};

/// Why there is no slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum NoSlot {
    /// The tenant may not have more, and has nothing that can go.
    Quota,
    /// Nothing can go just now.
    Room,
}

/// A shelf gives up a segment when its coldest block is unused for twice as long as the asking shelf's, and this much longer.
const DRAIN_MARGIN_MS: u64 = 10_000;
/// A segment that does not get emptier for so long (of those that clients write: does not come to be empty) is given up: somebody fills, reads or writes back what is left in it.
pub(super) const STUCK_MS: u64 = 1_000;
/// And left alone for so long.
pub(super) const STUCK_PAUSE_MS: u64 = 10_000;
/// Dead blocks dropped for one slot.
const DEAD_PER_SLOT: usize = 8;
/// Blocks written to disk for one slot before one is dropped without.
const WRITTEN_PER_SLOT: usize = 32;
/// Requests tried again at once.
const RETRIES: usize = 64;
/// Longest wait of a put for room. What is not there by then is taken from the coldest, or refused.
const WAIT_MS: u64 = 200;
/// Inner blocks of a shelf without a leaf whose descendants are looked at for one slot.
const INNER_PER_SLOT: usize = 8;
/// Evictions for one slot: a small slot may have to go for each page of a big one's quota.
const EVICTIONS_PER_SLOT: usize = 64;

/// What a request waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct WantedRoom {
    tenant: TenantId,
    /// Of each slot; none where none is needed any more.
    slot_bytes: Option<u32>,
    /// Whose ingest memory.
    writer: Option<AttachmentId>,
    is_get: bool,
}

impl Core {
    pub(super) fn tier(&self, place: Place) -> &Tier {
        match place {
            Place::Host => &self.host.tier,
            Place::Disk => &self.disk().tier,
        }
    }

    pub(super) fn tier_mut(&mut self, place: Place) -> &mut Tier {
        match place {
            Place::Host => &mut self.host.tier,
            Place::Disk => &mut self.disk_mut().tier,
        }
    }

    pub(super) fn slab(&self, place: Place) -> &Slab {
        &self.tier(place).slab
    }

    pub(super) fn disk(&self) -> &DiskTier {
        self.disk.as_ref().expect("only a daemon with a disk has copies there")
    }

    pub(super) fn disk_mut(&mut self) -> &mut DiskTier {
        self.disk.as_mut().expect("only a daemon with a disk has copies there")
    }

    /// Takes a slot for one shard of a node's copy.
    pub(super) fn allocate(
        &mut self,
        place: Place,
        owner: Owner,
        node: NodeId,
        holder: GroupId,
        shard: (u8, u8),
    ) -> Result<SlotId, NoSlot> {
        let shelf = self.tier_mut(place).slab.shelf(owner).ok_or(NoSlot::Room)?;
        // Making room may drop the block's last child, and with it the node; or the block itself, if it is dead.
        self.index.node_mut(node).pinned = true;
        let slot = self.allocate_on(place, shelf, owner, node, holder, shard);
        self.index.node_mut(node).pinned = false;
        slot
    }

    /// Whether one slot more is within the tenant's quota, after evicting what must go for it.
    pub(super) fn make_quota(&mut self, place: Place, owner: Owner, node: NodeId) -> bool {
        self.index.node_mut(node).pinned = true;
        let within = (0..EVICTIONS_PER_SLOT)
            .any(|_| self.tier(place).within_quota(owner) || !self.evict_of_tenant(place, owner.tenant));
        self.index.node_mut(node).pinned = false;
        within && self.tier(place).within_quota(owner)
    }

    fn allocate_on(
        &mut self,
        place: Place,
        shelf: ShelfId,
        owner: Owner,
        node: NodeId,
        holder: GroupId,
        shard: (u8, u8),
    ) -> Result<SlotId, NoSlot> {
        for _ in 0..EVICTIONS_PER_SLOT {
            if !self.tier(place).within_quota(owner) {
                if !self.evict_of_tenant(place, owner.tenant) {
                    return Err(NoSlot::Quota);
                }
                continue;
            }
            if let Some(slot) = self.tier_mut(place).reserve(shelf, node, holder, shard) {
                if place == Place::Disk && !self.disk().directory.has(slot.segment()) {
                    let slots = self.disk().tier.slab.slot_count(slot.segment());
                    self.disk_mut().set_owner(slot.segment(), owner);
                    self.disk_mut().directory.begin(slot.segment(), slots);
                }
                if place == Place::Host && self.slab(place).used_count(slot.segment()) == 1 {
                    self.want_spare_segment(owner.tenant);
                }
                return Ok(slot);
            }
            if !self.make_room(place, shelf) {
                return Err(NoSlot::Room);
            }
        }
        Err(NoSlot::Room)
    }

    /// Whether a slot of host memory may become free for the tenant without anybody's doing.
    pub(super) fn room_is_coming(&self, tenant: TenantId) -> bool {
        let draining = self.draining[Place::Host.at()].is_some();
        self.memory_is_coming(tenant) || draining || !self.writing.is_empty() || !self.ingest.is_idle()
    }

    /// Whether a request that has waited for room so far may go on to.
    pub(super) fn is_patient(&self, patience: Option<Patience>) -> bool {
        patience.is_none_or(|Patience { until_ms }| until_ms > self.now_ms)
    }

    /// Whether a request that holds nothing may wait for room.
    pub(super) fn may_wait_for_room(&self, tenant: TenantId, deadline_ms: u64, patience: Option<Patience>) -> bool {
        let in_time = deadline_ms > self.now_ms && self.is_patient(patience);
        in_time && self.room_is_coming(tenant) && self.pending.has_room()
    }

    /// A request waits for room until then, at the latest until its deadline.
    pub(super) fn wait_for_room(&mut self, request: Request, until_ms: u64) {
        let until_ms = until_ms.min(request.deadline_ms);
        self.pending.park(request.id, until_ms, Waiting::Room(request, Patience { until_ms }));
    }

    /// How long a put waits for room: a while; for memory that is being prepared until its deadline, unless it could evict instead.
    pub(super) fn put_waits_until_ms(&self, tenant: TenantId, could_evict: bool) -> u64 {
        let wait_ms = if self.memory_is_coming(tenant) && !could_evict { u64::MAX } else { WAIT_MS };
        self.now_ms.saturating_add(wait_ms)
    }

    /// Tries requests that wait for room, oldest first. One that still finds none holds up nobody but those that want the same.
    pub(super) fn retry_for_room(&mut self, actions: &mut Actions) {
        if !std::mem::take(&mut self.room_made) {
            return;
        }
        let (mut tries, mut in_vain) = (0, Vec::new());
        for id in self.pending.which(|waiting| matches!(waiting, Waiting::Room(..))) {
            let Some(wanted) = self.wanted_room(id).filter(|wanted| !in_vain.contains(wanted)) else { continue };
            let Some(Waiting::Room(request, patience)) = self.pending.take(id) else { continue };
            if let Some(reply) = self.again(request, patience) {
                actions.push(Action::Reply(id, reply));
            } else if matches!(self.pending.get_mut(id), Some(Waiting::Room(..))) && wanted.slot_bytes.is_some() {
                in_vain.push(wanted);
            }
            tries += 1;
            if tries == RETRIES {
                return;
            }
        }
    }

    fn wanted_room(&mut self, id: RequestId) -> Option<WantedRoom> {
        let Some(Waiting::Room(Request { tenant, verb, .. }, _)) = self.pending.get_mut(id) else { return None };
        let tenant = *tenant;
        let (attachment, first, shard, writer) = match verb {
            Verb::Acquire { attachment, keys, .. } => (*attachment, keys.first().copied(), None, None),
            Verb::Reserve { attachment, shard, door, .. } => {
                (*attachment, None, Some(*shard), (*door == Door::Ring).then_some(*attachment))
            }
            _ => unreachable!("only leases and reservations wait for room"),
        };
        let none = WantedRoom { tenant, slot_bytes: None, writer, is_get: shard.is_none() };
        // One whose attachment ended is told so.
        let Some(under) = self.under(tenant, attachment) else { return Some(none) };
        let slot_bytes = if let Some(shard) = shard {
            Some(tier::shard_slot_bytes(&under.layout, shard.count as u8))
        } else {
            let node = first.and_then(|key| self.index.find(under.namespace, &key)).map(|node| self.index.node(node));
            let on_disk = node.filter(|node| node.copy(Place::Host).is_none()).and_then(|node| node.copy(Place::Disk));
            on_disk.map(|first| self.disk().tier.slab.slot_bytes(first))
        };
        Some(WantedRoom { slot_bytes, ..none })
    }

    /// Tries a request that waited for room.
    pub(super) fn again(&mut self, request: Request, patience: Patience) -> Option<Reply> {
        match request.verb {
            Verb::Acquire { .. } => self.acquire(request, Some(patience)),
            _ => self.reserve(request, Some(patience)),
        }
    }

    fn make_room(&mut self, place: Place, shelf: ShelfId) -> bool {
        for _ in 0..DEAD_PER_SLOT {
            let Some(dead) = self.index.next_dead() else { break };
            self.remove_block(dead);
            if self.slab(place).has_room(shelf) {
                return true;
            }
        }
        // One segment at a time comes for a tenant.
        let may_drain = place == Place::Disk || !self.want_segment(self.slab(place).owner(shelf).tenant);
        if may_drain {
            let age_ms = self.age_ms(place, shelf);
            self.drain_if_worth_it(place, shelf, age_ms);
        }
        let has_room = self.slab(place).has_room(shelf)
            || self.evict(place, shelf)
            || self.evict_below(place, shelf)
            || place == Place::Host && self.drop_oldest_partial(shelf);
        if !has_room && may_drain {
            // What is in use is as good as used just now, however old: it may be by the block itself that wants more room.
            self.drain_if_worth_it(place, shelf, Some(0));
        }
        has_room
    }

    /// For how long the coldest copy of a shelf is unused.
    fn age_ms(&self, place: Place, shelf: ShelfId) -> Option<u64> {
        self.index.coldest_use_ms(place, shelf).map(|used_ms| self.now_ms - used_ms)
    }

    /// Evicts the coldest copy of a shelf that may go. In host memory, one that is not on disk yet is written there first if it is
    /// worth it; then the next one's turn comes. A disk that does not keep up loses the coldest blocks, not the newest.
    fn evict(&mut self, place: Place, shelf: ShelfId) -> bool {
        let mut written = 0;
        for _ in 0..limits::VICTIM_STEPS_MAX {
            let index = &mut self.index;
            // Borrowed from its parts: the index asks about slots while it walks its order.
            let slab = match (place, &self.disk) {
                (Place::Disk, Some(disk)) => &disk.tier.slab,
                _ => &self.host.tier.slab,
            };
            let unread = |_: NodeId, node: &crate::index::Node| {
                let first = node.copy(place).expect("a node in a tier's order has a copy there");
                slab.chain(first).all(|slot| slab.slot(slot).readers == 0)
            };
            let Some(victim) = index.victim(place, shelf, self.now_ms, unread) else { return false };
            if self.evict_block(place, victim, &mut written) {
                return true;
            }
        }
        false
    }

    /// Evicts a copy that may go, unless it is to be written to disk first.
    fn evict_block(&mut self, place: Place, victim: NodeId, written: &mut usize) -> bool {
        if place == Place::Host && self.index.node(victim).copy(Place::Disk).is_none() {
            let needed = self.index.is_needed(victim);
            if (needed || *written < WRITTEN_PER_SLOT) && self.write_back(victim, needed) {
                *written += 1;
                return false;
            }
            // Without it what hangs on it would be lost as well; only where no disk can take it is that so.
            if needed && self.disk_usable() {
                self.index.touch(victim, self.now_ms);
                return false;
            }
        }
        self.drop_copy(victim, place);
        true
    }

    /// A shelf without a leaf: all its blocks have others hanging on them that lie on another shelf (a chain may be written in shards
    /// of several sizes). One of those goes, so that the shelf's own turn comes.
    fn evict_below(&mut self, place: Place, shelf: ShelfId) -> bool {
        let slab = self.slab(place);
        let unread = |slot: &SlotId| {
            let record = slab.slot(*slot);
            record.state == SlotState::Resident && record.readers == 0 && record.node != NodeId::NONE
        };
        let nodes: Vec<NodeId> = slab
            .slots_of(shelf)
            .take(limits::VICTIM_STEPS_MAX)
            .filter(unread)
            .map(|slot| slab.slot(slot).node)
            .filter(|&node| self.index.node(node).copy(place).is_some())
            .take(INNER_PER_SLOT)
            .collect();
        let slab = self.slab(place);
        let is_unread = |&leaf: &NodeId| {
            let first = self.index.node(leaf).copy(place);
            first.is_some_and(|first| slab.chain(first).all(|slot| slab.slot(slot).readers == 0))
        };
        let leaf = nodes.into_iter().filter_map(|node| self.index.leaf_below(node, place)).find(is_unread);
        leaf.is_some_and(|leaf| self.evict_block(place, leaf, &mut 0))
    }

    /// Evicts the coldest copy of a tenant, of whatever size.
    pub(super) fn evict_of_tenant(&mut self, place: Place, tenant: TenantId) -> bool {
        let slab = self.slab(place);
        let shelves = slab.shelves().filter(|(_, owner)| owner.tenant == tenant).map(|(shelf, _)| shelf);
        let mut shelves: Vec<(u64, ShelfId)> =
            shelves.filter_map(|shelf| Some((self.index.coldest_use_ms(place, shelf)?, shelf))).collect();
        shelves.sort_unstable();
        shelves.into_iter().any(|(_, shelf)| self.evict(place, shelf))
    }

    /// Lets a segment change owner if it holds what was not used for much longer than what the asking shelf would have to give up.
    fn drain_if_worth_it(&mut self, place: Place, shelf: ShelfId, own_age_ms: Option<u64>) {
        if self.draining[place.at()].is_some() {
            return;
        }
        let slab = self.slab(place);
        let tenant = slab.owner(shelf).tenant;
        let size = |shelf: ShelfId| slab.shelf_size(shelf).0;
        let own_segments = slab.segment_count_of(|owner| owner.tenant == tenant && owner.writer.is_none());
        let share = (slab.segment_count() as usize / self.config.tenants.len().max(1)).max(1);
        // The first segment of a size costs others nothing that they need not give: beyond its part a tenant takes it from its own.
        let is_own_only = size(shelf) == 0 && own_segments >= share;
        let is_donor = |&(other, owner): &(ShelfId, Owner)| {
            other != shelf && size(other) > 0 && owner.writer.is_none() && (!is_own_only || owner.tenant == tenant)
        };
        let mut donors: Vec<ShelfId> = slab.shelves().filter(is_donor).map(|(donor, _)| donor).collect();
        donors.sort_by_key(|&donor| std::cmp::Reverse(self.age_ms(place, donor).unwrap_or(u64::MAX)));
        let worth_it = |&donor: &ShelfId| match (own_age_ms, self.age_ms(place, donor)) {
            // A shelf without any segment must get one; one whose blocks are merely all in use waits for them.
            (None, _) => size(shelf) == 0,
            (Some(_), None) => slab.shelf_size(donor).1 == 0,
            (Some(own), Some(other)) => other > 2 * own + DRAIN_MARGIN_MS,
        };
        donors.retain(worth_it);
        let now_ms = self.now_ms;
        self.stuck[place.at()].retain(|_, until_ms| *until_ms > now_ms);
        let stuck = self.stuck[place.at()].clone();
        for donor in donors {
            let slab = &mut self.tier_mut(place).slab;
            let Some((segment, empty)) = slab.drain_emptiest(donor, |segment| !stuck.contains_key(&segment)) else {
                continue;
            };
            let used = self.slab(place).used_count(segment);
            let draining = Draining { segment, tenant, next_place: 0, used, since_ms: now_ms, more: true };
            self.draining[place.at()] = Some(draining);
            if empty {
                self.segment_retired(place, segment);
            }
            return;
        }
    }

    /// A segment that does not get emptier is in somebody's use: it stays whose it is, and another's turn comes.
    fn give_up_stuck_drain(&mut self, place: Place) -> bool {
        let now_ms = self.now_ms;
        let Some(Draining { segment, used, since_ms, .. }) = self.draining[place.at()] else { return false };
        let now_used = self.slab(place).used_count(segment);
        if now_used < used {
            if let Some(draining) = &mut self.draining[place.at()] {
                (draining.used, draining.since_ms) = (now_used, now_ms);
            }
            return false;
        }
        if since_ms + STUCK_MS > now_ms {
            return false;
        }
        self.tier_mut(place).slab.undrain(segment);
        self.draining[place.at()] = None;
        self.stuck[place.at()].insert(segment, now_ms + STUCK_PAUSE_MS);
        self.room_made = true;
        true
    }

    /// Frees what can be freed of segments that are to change owner.
    pub(super) fn go_on_draining(&mut self) {
        for place in [Place::Host, Place::Disk] {
            if self.give_up_stuck_drain(place) {
                continue;
            }
            let Some(draining) = self.draining[place.at()] else { continue };
            let Draining { segment, next_place, .. } = draining;
            let slab = self.slab(place);
            let slots: Vec<SlotId> = slab.used_slots(segment, next_place).take(limits::CONTINUATION_BLOCKS).collect();
            let more = slots.len() == limits::CONTINUATION_BLOCKS;
            let next_place = if more { slots[slots.len() - 1].place() + 1 } else { 0 };
            self.draining[place.at()] = Some(Draining { next_place, more, ..draining });
            for slot in slots {
                self.drain_slot(place, slot);
            }
        }
    }

    fn drain_slot(&mut self, place: Place, slot: SlotId) {
        let slab = self.slab(place);
        // A slot may be freed with another shard of its block.
        if slab.slot_count(slot.segment()) == 0 {
            return;
        }
        let record = *slab.slot(slot);
        if record.state != SlotState::Resident || record.doomed || record.node == NodeId::NONE {
            return;
        }
        if place == Place::Host && self.partials.has(record.node) {
            return self.drop_filling(record.node);
        }
        let node = self.index.node(record.node);
        let published = node.copy(place).is_some_and(|first| slab.chain(first).any(|other| other == slot));
        let busy = node.writing || record.readers > 0;
        let only_here = node.copy(place.other()).is_none();
        if !published || busy {
            return;
        }
        if place == Place::Host && only_here && self.write_back(record.node, false) {
            return;
        }
        self.drop_copy(record.node, place);
    }

    /// A segment lost its last slot and its owner.
    pub(super) fn segment_retired(&mut self, place: Place, segment: u32) {
        let drained = self.draining[place.at()].take_if(|draining| draining.segment == segment);
        if place == Place::Host {
            self.record_retired(segment);
        }
        match place {
            Place::Host if segment >= self.host.tier.slab.segment_count() => {
                self.host.clear_sums(segment);
                self.ingest_segment_retired(segment);
            }
            Place::Host => {
                let Draining { tenant, .. } =
                    drained.expect("a segment that clients only read is drained for somebody");
                self.host.clear_sums(segment);
                self.preparation.want(segment, tenant, true);
            }
            Place::Disk => self.disk_mut().retire(segment),
        }
    }

    /// Takes a copy out of the index; its slots are the caller's to give back. The node may be gone afterwards.
    pub(super) fn withdraw(&mut self, node: NodeId, place: Place) -> Vec<SlotId> {
        let first = self.index.node(node).copy(place).expect("only a copy that is there is withdrawn");
        let slots: Vec<SlotId> = self.slab(place).chain(first).collect();
        if self.index.node(node).copy(place.other()).is_none() {
            self.counters.lost_blocks += 1;
            self.worth.remember_lost(&self.index.node(node).key);
        }
        if place == Place::Host {
            self.cancel_promotion(node);
            // Who still uses the slots uses no block any more.
            for &slot in &slots {
                let record = self.host.tier.slab.slot_mut(slot);
                record.node = NodeId::NONE;
                let users = record.readers;
                self.index.end_use(node, users);
            }
        }
        let block_bytes = self.block_bytes(node);
        self.index.withdraw(node, place, block_bytes);
        slots
    }

    /// Evicts a copy. The node may be gone afterwards.
    pub(super) fn drop_copy(&mut self, node: NodeId, place: Place) {
        match place {
            Place::Host => self.counters.evicted_host += 1,
            Place::Disk => self.counters.evicted_disk += 1,
        }
        for slot in self.withdraw(node, place) {
            self.give_back(place, slot);
        }
    }

    /// Frees a slot that the index does not know any more, or leaves that to its last reader.
    pub(super) fn give_back(&mut self, place: Place, slot: SlotId) {
        if place == Place::Disk {
            self.disk_mut().directory.mark(slot);
        }
        let record = self.tier_mut(place).slab.slot_mut(slot);
        if record.readers > 0 {
            record.doomed = true;
            if place == Place::Host {
                self.record_doomed(slot);
            }
            return;
        }
        self.room_made = true;
        if place == Place::Host {
            self.record_free(slot);
        }
        if let Some(segment) = self.tier_mut(place).release(slot) {
            self.segment_retired(place, segment);
        }
    }

    /// One reader more: the slot is not freed before it is done.
    pub(super) fn read(&mut self, place: Place, slot: SlotId) {
        let record = self.tier_mut(place).slab.slot_mut(slot);
        record.readers += 1;
        let node = record.node;
        if place == Place::Host {
            self.index.begin_use(node);
        }
    }

    /// One reader less; the last one of a doomed slot frees it.
    pub(super) fn unread(&mut self, place: Place, slot: SlotId) {
        let record = self.tier_mut(place).slab.slot_mut(slot);
        record.readers -= 1;
        let (node, last) = (record.node, record.readers == 0);
        let doomed = last && std::mem::take(&mut record.doomed);
        if place == Place::Host && node != NodeId::NONE {
            self.index.end_use(node, 1);
        }
        self.room_made |= last;
        if doomed {
            self.give_back(place, slot);
        }
    }
}
