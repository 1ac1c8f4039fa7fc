//! What clients write in place: slots of ingest segments, which the daemon does not trust, and the way from there to shared memory.
//!
//! ```text
//!  reserve ──► slot of an ingest segment, which one client may write ──commit──► readable there: for its own group as it is, for others
//!                                                                                after they have checked its sum
//!              promotion: copied and checked on a thread of its own ──► slot of a shared segment ──► written back
//! ```
//! An ingest segment serves one client and is never used again for another: whoever could write to it may go on to, also after its
//! death, through a child that it forked. It is dropped when its last block has left, and a fresh one is made for who comes next.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use tender_proto::sum;

use super::put::shard_of;
use super::room::{NoSlot, STUCK_MS, STUCK_PAUSE_MS};
use super::{Action, Actions, Core, Job};
use crate::admission::grants::{Grant, Right};
use crate::limits;
use crate::names::{AttachmentId, By, Door, GroupId, Hold, NodeId, Place, RequestId, SlotId, TenantId};
use crate::tier::host::records::SlotUse;
use crate::tier::slab::{Owner, ShelfId, SlotState};
use crate::transfer::lanes::Lane;
use crate::transfer::{Expected, Outcome};
use crate::verb::AcquireEnd;

/// The daemon itself, as holder of slots that it copies to.
const DAEMON: GroupId = GroupId(0);

/// A client that could not map memory to write to is not offered any for so long: it puts over gRPC meanwhile.
const UNABLE_MS: u64 = 10_000;

/// Promotions looked at in one go when those before them find no room.
const PROMOTION_STEPS: usize = 16;

/// A block on its way from ingest to shared memory.
#[derive(Debug, Default)]
pub(super) struct Promotion {
    /// Acquires, with the block's place in them.
    waiters: Vec<(RequestId, usize)>,
    /// Durables, which want it written back afterwards.
    durables: Vec<RequestId>,
    /// Where from and where to, while it is copied.
    slots: Vec<(SlotId, SlotId)>,
    parts_left: usize,
    /// What was committed is not what is there.
    is_bad: bool,
    /// The copy left host memory meanwhile.
    cancelled: bool,
}

/// What is under way between ingest and shared memory.
#[derive(Debug, Default)]
pub(super) struct Ingest {
    promotions: BTreeMap<NodeId, Promotion>,
    /// Those that are not being copied yet.
    queue: VecDeque<NodeId>,
    in_flight: usize,
    /// Copies that left host memory before their turn came.
    lost: Vec<Promotion>,
    /// Some of the queue were looked at and found no room; nothing has changed since.
    is_blocked: bool,
    /// Ingest segments that are being made, and for whom.
    coming: BTreeMap<u32, AttachmentId>,
    /// Of these, those that nobody was told to make yet.
    to_make: Vec<(u32, AttachmentId)>,
    /// Clients that could not map one, and until when they are not asked again.
    unable: BTreeMap<AttachmentId, u64>,
    /// Ingest segments that nobody uses any more.
    dropped: Vec<u32>,
    /// One that is drained for another client, and since when.
    draining: Option<(u32, u64)>,
    /// Those that did not come to be empty, and until when others are drained rather.
    stuck: BTreeMap<u32, u64>,
    /// Segments that a start found and does not understand: somebody may still use them.
    unusable: BTreeSet<u32>,
}

impl Ingest {
    /// Whether nothing is under way.
    pub(super) fn is_idle(&self) -> bool {
        self.promotions.is_empty() && self.lost.is_empty()
    }

    /// Whether a block is being copied, into the slots of its filling.
    pub(super) fn is_copying(&self, node: NodeId) -> bool {
        self.promotions.get(&node).is_some_and(|promotion| !promotion.slots.is_empty())
    }

    /// Whether a slot that this client may write to is about to be free.
    pub(super) fn is_coming(&self, writer: AttachmentId) -> bool {
        !self.unable.contains_key(&writer)
            && (!self.promotions.is_empty() || !self.coming.is_empty() || !self.dropped.is_empty())
    }
}

impl Core {
    /// A slot that the client of `owner` writes in place. Never evicts: what is there is on its way to shared memory.
    pub(super) fn allocate_ingest(
        &mut self,
        owner: Owner,
        node: NodeId,
        holder: GroupId,
        shard: (u8, u8),
    ) -> Result<SlotId, NoSlot> {
        if !self.make_quota(Place::Host, owner, node) {
            return Err(NoSlot::Quota);
        }
        let slab = &mut self.host.tier.slab;
        let shelf = slab.shelf(owner).ok_or(NoSlot::Room)?;
        let has = slab.segment_count_of(|other| other.writer == owner.writer);
        let may_grow = has < self.ingest_share(owner.tenant);
        if may_grow || self.host.tier.slab.has_open(shelf) {
            if let Some(slot) = self.host.tier.reserve(shelf, node, holder, shard) {
                return Ok(slot);
            }
            if let Some(writer) = owner.writer {
                self.want_ingest_segment(owner.tenant, writer);
            }
        }
        self.host.tier.slab.give_up(shelf);
        Err(NoSlot::Room)
    }

    /// Ingest segments that the clients of one tenant may have together when all want some.
    fn ingest_part(&self) -> usize {
        let all = self.host.tier.slab.ingest_segments().len();
        (all / self.attachments.local_tenants().max(1)).max(1)
    }

    /// Of these, what one client may have: an equal part, and one at least.
    fn ingest_share(&self, tenant: TenantId) -> usize {
        (self.ingest_part() / self.attachments.local_processes(tenant).max(1)).max(1)
    }

    /// Has an ingest segment made for a client, or, when there are as many as may be, takes one that is not used, or from a client that
    /// has more than its part, or from a tenant that has more than its part when this one has less.
    fn want_ingest_segment(&mut self, tenant: TenantId, writer: AttachmentId) {
        let part = self.ingest_part();
        let slab = &self.host.tier.slab;
        let ingest = &mut self.ingest;
        ingest.unable.retain(|_, until_ms| *until_ms > self.now_ms);
        if ingest.unable.contains_key(&writer) || ingest.coming.values().any(|coming| *coming == writer) {
            return;
        }
        let absent = |segment: &u32| slab.is_retired(*segment) && !ingest.coming.contains_key(segment);
        let may_be_made = |segment: &u32| !ingest.dropped.contains(segment) && !ingest.unusable.contains(segment);
        if let Some(segment) = slab.ingest_segments().find(|segment| absent(segment) && may_be_made(segment)) {
            ingest.coming.insert(segment, writer);
            return ingest.to_make.push((segment, writer));
        }
        self.give_up_stuck_ingest_drain();
        if self.ingest.draining.is_some() {
            return;
        }
        if let Some(segment) = self.host.tier.slab.retire_free_of_another(writer) {
            return self.segment_retired(Place::Host, segment);
        }
        let slab = &self.host.tier.slab;
        let (mut of_writer, mut of_tenant) = (BTreeMap::new(), BTreeMap::new());
        for (shelf, owner) in slab.shelves() {
            let Some(writer) = owner.writer else { continue };
            let (segments, _) = slab.shelf_size(shelf);
            *of_writer.entry(writer).or_insert(0) += segments;
            *of_tenant.entry(owner.tenant).or_insert(0) += segments;
        }
        let is_poor = of_tenant.get(&tenant).is_none_or(|segments| *segments < part);
        let rank = |(shelf, owner): (ShelfId, Owner)| {
            let other = owner.writer.filter(|other| *other != writer)?;
            let rank = match slab.shelf_size(shelf) {
                (0, _) => return None,
                (_, 0) => 0,
                _ if of_writer[&other] > self.ingest_share(owner.tenant) => 1,
                _ if is_poor && of_tenant[&owner.tenant] > part => 2,
                _ => return None,
            };
            Some((rank, shelf))
        };
        let mut donors: Vec<(u8, ShelfId)> = slab.shelves().filter_map(rank).collect();
        donors.sort_by_key(|(rank, _)| *rank);
        let now_ms = self.now_ms;
        self.ingest.stuck.retain(|_, until_ms| *until_ms > now_ms);
        for (_, donor) in donors {
            let stuck = &self.ingest.stuck;
            // One whose segments all drain already cannot give.
            let drained = self.host.tier.slab.drain_emptiest(donor, |segment| !stuck.contains_key(&segment));
            let Some((segment, is_empty)) = drained else { continue };
            if is_empty {
                self.segment_retired(Place::Host, segment);
            } else {
                self.ingest.draining = Some((segment, self.now_ms));
            }
            return;
        }
    }

    /// A segment that is emptied for another client, and does not come to be empty, stays where it is after a while: somebody fills it, or
    /// reads there.
    pub(super) fn give_up_stuck_ingest_drain(&mut self) {
        let Some((segment, since_ms)) = self.ingest.draining else { return };
        let slab = &mut self.host.tier.slab;
        if slab.is_draining(segment) && self.now_ms < since_ms + STUCK_MS {
            return;
        }
        self.ingest.draining = None;
        if slab.is_draining(segment) {
            let owner = slab.owner(slab.shelf_of(SlotId::new(segment, 0)));
            // Of a client that is gone it drains for good.
            if owner.writer.is_some_and(|writer| self.attachments.is_local(writer)) {
                self.host.tier.slab.undrain(segment);
                self.ingest.stuck.insert(segment, self.now_ms + STUCK_PAUSE_MS);
                self.room_made = true;
            }
        }
    }

    /// What a start found of an ingest segment cannot be understood: it is not used until host memory is made anew.
    pub(super) fn leave_out_of_use(&mut self, segment: u32) {
        self.ingest.unusable.insert(segment);
    }

    /// An ingest segment was made and its client has mapped it, or that failed.
    pub(super) fn ingest_made(&mut self, segment: u32, made: bool) {
        let Some(writer) = self.ingest.coming.remove(&segment) else { return };
        self.room_made = true;
        let tenant = self.attachments.peek(writer).map(|attachment| attachment.tenant);
        match (made, tenant.filter(|_| self.attachments.is_local(writer))) {
            (true, Some(tenant)) => {
                self.host.tier.slab.ingest_ready(segment, tenant, writer);
                self.record_ready(segment);
            }
            (true, None) => self.ingest.dropped.push(segment),
            (false, _) => {
                self.ingest.unable.insert(writer, self.now_ms + UNABLE_MS);
            }
        }
    }

    /// An ingest segment lost its last slot: its memory goes, for its client may write there for ever.
    pub(super) fn ingest_segment_retired(&mut self, segment: u32) {
        self.ingest.dropped.push(segment);
    }

    /// Whether a block in host memory lies where a client may write.
    pub(super) fn is_ingest(&self, node: NodeId) -> bool {
        let slab = &self.host.tier.slab;
        self.index.node(node).copy(Place::Host).is_some_and(|first| slab.chain(first).any(|slot| slab.is_ingest(slot)))
    }

    /// A block that was committed in place is to be copied to shared memory.
    pub(super) fn promote(&mut self, node: NodeId) {
        self.promotion(node);
    }

    /// An acquire waits until the block is in shared memory.
    pub(super) fn promote_for(&mut self, node: NodeId, request: RequestId, at: usize) {
        self.promotion(node).waiters.push((request, at));
    }

    /// A durable waits until the block is in shared memory, and then written back. A key given twice waits once.
    pub(super) fn promote_durably(&mut self, node: NodeId, request: RequestId) -> bool {
        let durables = &mut self.promotion(node).durables;
        let is_new = durables.last() != Some(&request);
        if is_new {
            durables.push(request);
        }
        is_new
    }

    fn promotion(&mut self, node: NodeId) -> &mut Promotion {
        let Ingest { promotions, queue, is_blocked, .. } = &mut self.ingest;
        promotions.entry(node).or_insert_with(|| {
            queue.push_back(node);
            *is_blocked = false;
            Promotion::default()
        })
    }

    /// A copy leaves host memory: it is not promoted any more.
    pub(super) fn cancel_promotion(&mut self, node: NodeId) {
        match self.ingest.promotions.get_mut(&node) {
            Some(promotion) if !promotion.slots.is_empty() => promotion.cancelled = true,
            Some(_) => {
                self.ingest.queue.retain(|&queued| queued != node);
                self.ingest.lost.extend(self.ingest.promotions.remove(&node));
            }
            None => {}
        }
    }

    /// Makes and drops segments; tells who waited for what was lost.
    pub(super) fn pump_ingest(&mut self, actions: &mut Actions) {
        for promotion in std::mem::take(&mut self.ingest.lost) {
            self.promotion_failed(promotion, actions);
        }
        for (segment, writer) in std::mem::take(&mut self.ingest.to_make) {
            actions.push(Action::MakeIngest { segment, writer });
        }
        for segment in std::mem::take(&mut self.ingest.dropped) {
            actions.push(Action::DropSegment(segment));
            // Whoever waits for a segment asks again.
            self.room_made = true;
        }
        self.ingest.is_blocked &= !self.room_made;
    }

    /// Begins to copy what finds room; what finds none comes behind the others.
    pub(super) fn pump_promotions(&mut self, actions: &mut Actions) {
        let mut skipped = VecDeque::new();
        while !self.ingest.is_blocked
            && self.ingest.in_flight < limits::PROMOTIONS_MAX
            && skipped.len() < PROMOTION_STEPS
        {
            let Some(node) = self.ingest.queue.pop_front() else { break };
            if !self.begin_promotion(node, actions) {
                skipped.push_back(node);
            }
        }
        self.ingest.is_blocked |= !skipped.is_empty();
        for node in skipped {
            // Making room for one may have cost another, or the block itself. Behind the others: those may find room.
            if self.ingest.promotions.contains_key(&node) {
                self.ingest.queue.push_back(node);
            }
        }
    }

    /// Promotions that found no room try again: a segment that was left alone for a while may be drained now.
    pub(super) fn retry_promotions(&mut self) {
        self.ingest.is_blocked = false;
    }

    fn begin_promotion(&mut self, node: NodeId, actions: &mut Actions) -> bool {
        let Some(first) = self.index.node(node).copy(Place::Host) else { return false };
        // Its copy on disk is being looked at: one of the two at a time fills slots for it.
        if self.loads.contains_key(&node) {
            return false;
        }
        // All of them: shards that came over gRPC lie in shared memory already, but a copy is made as one.
        let from: Vec<SlotId> = self.host.tier.slab.chain(first).collect();
        // Being read protects the copy from the search for victims that follows, and until it has been copied.
        for &slot in &from {
            self.read(Place::Host, slot);
        }
        let slab = &self.host.tier.slab;
        let tenant = slab.owner(slab.shelf_of(first)).tenant;
        let bytes = from.iter().map(|&slot| u64::from(slab.slot_bytes(slot))).sum();
        // One block at a time may be there twice beyond the quota: a quota of less than two blocks would keep it where it is for ever.
        self.host.tier.copy_within((self.ingest.in_flight == 0).then_some((tenant, bytes)));
        let mut to: Vec<SlotId> = Vec::new();
        for &slot in &from {
            let slab = &self.host.tier.slab;
            let Owner { tenant, slot_bytes, .. } = slab.owner(slab.shelf_of(slot));
            let shard = (slab.slot(slot).shard_index, slab.slot(slot).shard_count);
            match self.allocate(Place::Host, Owner::shared(tenant, slot_bytes), node, DAEMON, shard) {
                Ok(slot) => to.push(slot),
                Err(_) => break,
            }
        }
        self.host.tier.copy_within(None);
        // Making room may have cost the block itself, if it was dead.
        let is_lost = !self.ingest.promotions.contains_key(&node);
        if to.len() < from.len() || is_lost {
            for slot in to {
                self.give_back(Place::Host, slot);
            }
            for slot in from {
                self.unread(Place::Host, slot);
            }
            if is_lost {
                self.index.forget_if_unused(node);
            }
            return false;
        }
        for (&slot, next) in to.iter().zip(to.iter().skip(1).chain([&SlotId::NONE])) {
            self.host.tier.slab.slot_mut(slot).next = *next;
        }
        self.record_use(&to, SlotUse::Copying);
        self.index.set_filling(node, to[0]);
        for (&from, &to) in from.iter().zip(&to) {
            let expected = self.expected(node, from);
            let id = self.name_transfer(0, Lane::WriteBack, Job::Promote { node, from, to });
            let (from, to) = (self.host.extent(from), self.host.extent(to));
            actions.push(Action::Promote { id, from, to, expected });
        }
        self.ingest.in_flight += from.len();
        let promotion = self.ingest.promotions.get_mut(&node).expect("what is in the queue is to be promoted");
        promotion.parts_left = from.len();
        promotion.slots = from.into_iter().zip(to).collect();
        true
    }

    fn expected(&self, node: NodeId, slot: SlotId) -> Expected {
        let record = self.host.tier.slab.slot(slot);
        let shard = shard_of(record.shard_index, record.shard_count);
        let shape = self.shape(node, record.shard_count).expect("what was put has a layout");
        Expected {
            seed: sum::seed(&self.index.node(node).key, shard, shape.layout),
            root: record.root,
            payload_bytes: shape.payload_bytes,
        }
    }

    pub(super) fn promote_done(
        &mut self,
        (node, from, to): (NodeId, SlotId, SlotId),
        outcome: Outcome,
        actions: &mut Actions,
    ) {
        self.ingest.in_flight -= 1;
        let root = self.host.tier.slab.slot(from).root;
        let promotion = self.ingest.promotions.get_mut(&node).expect("a promotion's copies end before it does");
        promotion.parts_left -= 1;
        match outcome {
            Outcome::Done(sums) => {
                self.host.set_sums(to, &sums);
                self.host.tier.slab.slot_mut(to).root = root;
                self.counters.promoted_bytes += u64::from(self.host.tier.slab.slot_bytes(to));
            }
            Outcome::Mismatch | Outcome::Failed(_) => promotion.is_bad = true,
        }
        if promotion.parts_left == 0 {
            self.promotion_ended(node, actions);
        }
    }

    fn promotion_ended(&mut self, node: NodeId, actions: &mut Actions) {
        let promotion = self.ingest.promotions.remove(&node).expect("it just ended");
        if promotion.is_bad && !promotion.cancelled {
            self.counters.sum_mismatches += 1;
            let message = "a block committed in place is not what its client said: a miss";
            actions.push(Action::Warn(message.to_owned()));
            for slot in self.withdraw(node, Place::Host) {
                self.give_back(Place::Host, slot);
            }
        }
        for &(from, _) in &promotion.slots {
            self.unread(Place::Host, from);
        }
        if promotion.is_bad || promotion.cancelled {
            for &(_, to) in &promotion.slots {
                self.give_back(Place::Host, to);
            }
            self.index.set_filling(node, SlotId::NONE);
            return self.promotion_failed(promotion, actions);
        }
        for &(_, to) in &promotion.slots {
            self.host.tier.slab.slot_mut(to).state = SlotState::Resident;
            self.record_resident(to);
        }
        self.move_copy(node, &promotion.slots);
        for (request, at) in promotion.waiters {
            self.acquire_arrived(request, at, Ok((node, Place::Host)), actions);
        }
        // Who waits for its write-back is told by that; the others get it for nothing.
        let is_wanted = !promotion.durables.is_empty();
        let is_written = self.write_back(node, is_wanted);
        for request in promotion.durables {
            match self.writing.get(&node).filter(|_| is_written).and_then(|id| self.write_backs.get_mut(id)) {
                Some(write_back) => write_back.waiters.push(request),
                None => self.durable_part_ended(request),
            }
        }
    }

    /// The block is read from its shared slots from now on; who still reads the others gives them back.
    fn move_copy(&mut self, node: NodeId, slots: &[(SlotId, SlotId)]) {
        let first = slots[0].1;
        let shelf = self.host.tier.slab.shelf_of(first);
        for &(from, _) in slots {
            let record = self.host.tier.slab.slot_mut(from);
            record.node = NodeId::NONE;
            let users = record.readers;
            self.index.end_use(node, users);
        }
        self.index.move_copy(node, Place::Host, first, shelf, self.now_ms);
        self.index.set_filling(node, SlotId::NONE);
        for &(from, _) in slots {
            self.give_back(Place::Host, from);
        }
    }

    fn promotion_failed(&mut self, promotion: Promotion, actions: &mut Actions) {
        for (request, at) in promotion.waiters {
            self.acquire_arrived(request, at, Err(AcquireEnd::Miss), actions);
        }
        for request in promotion.durables {
            self.durable_part_ended(request);
        }
    }

    /// A client that writes in place is dead, for certain, or has left in good order. What it held there is ended, and what its group was
    /// reading there when it was the last; after a death the group's unfinished blocks are given up, but a slot that another member or a
    /// stream still fills is free only when that one is done. Its segments are given up once their blocks have been copied out.
    pub(super) fn member_gone(&mut self, attachment: AttachmentId, is_dead: bool) {
        let Some((group, is_last)) = self.attachments.local_gone(attachment) else { return };
        let of_group: Vec<(Hold, Grant)> = self.grants.all().filter(|(_, grant)| grant.holder.group == group).collect();
        for &(hold, Grant { right, holder, .. }) in of_group.iter().filter(|(_, grant)| grant.holder.door == Door::Ring)
        {
            match right {
                Right::Reservation if is_last || holder.attachment == attachment => self.abort(By::Daemon, &[hold]),
                Right::Lease if is_last => self.release(By::Daemon, &[hold]),
                _ => {}
            }
        }
        if is_dead {
            for (hold, _) in of_group {
                self.end_unfinished(hold);
            }
        }
        self.give_up_segments(attachment, is_dead);
        self.forget_member(attachment);
        self.end_unclaimed(group);
    }

    /// The block that a reservation is for, if it still stands, will not be whole.
    fn end_unfinished(&mut self, hold: Hold) {
        let grant = self.grants.get(hold, By::Daemon).filter(|grant| grant.right == Right::Reservation);
        let Some(Grant { slot, .. }) = grant else { return };
        let record = self.host.tier.slab.slot(slot);
        let (node, doomed) = (record.node, record.doomed);
        if !doomed {
            self.drop_filling(node);
        }
    }

    /// The segments of a client that is gone, or that has others now, are given up once their blocks have been copied out.
    pub(super) fn give_up_segments(&mut self, attachment: AttachmentId, is_dead: bool) {
        let slab = &self.host.tier.slab;
        let shelves: Vec<ShelfId> =
            slab.shelves().filter(|(_, owner)| owner.writer == Some(attachment)).map(|(shelf, _)| shelf).collect();
        for shelf in shelves {
            // Blocks of which a shard will never come; one that left in good order has put its own.
            let slab = &self.host.tier.slab;
            let filling = |slot: &SlotId| {
                let record = slab.slot(*slot);
                let stands = record.state == SlotState::Resident && !record.doomed && record.node != NodeId::NONE;
                stands && self.index.node(record.node).copy(Place::Host).is_none()
            };
            let half: BTreeSet<NodeId> =
                slab.slots_of(shelf).filter(filling).map(|slot| slab.slot(slot).node).collect();
            for node in half.into_iter().filter(|_| is_dead) {
                self.drop_filling(node);
            }
            for segment in self.host.tier.slab.segments_of(shelf) {
                if self.host.tier.slab.drain(segment) {
                    self.segment_retired(Place::Host, segment);
                }
            }
            self.host.tier.slab.give_up(shelf);
        }
        for segment in self.host.tier.slab.retire_free_of(attachment) {
            self.segment_retired(Place::Host, segment);
        }
        self.ingest.unable.remove(&attachment);
    }
}

#[cfg(test)]
mod tests;
