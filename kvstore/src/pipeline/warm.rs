//! Host memory as a former worker left it: what its records say becomes slots, copies and holds, and what its clients still hold stays
//! theirs until they confirm it or are dead.
//!
//! ```text
//!  recorded ──start──► limbo ──Join, by a new attachment that names the former one──► theirs ──Confirm──► as any other
//!                        │                                                              │
//!                        │ Gone: the process is dead                                    │ an empty Confirm: not named
//!                        ▼                                                              ▼
//!                      ended as that of any dead process                            released
//! ```
//! A hold in limbo is a hold like any other, of an attachment under which nobody asks: it is charged to tenant and group, its slot is
//! not used again, and a reservation in limbo is published by nobody but its own commit. What ended with the worker (streams, copies of
//! its own threads) is free at once; what a disk may still write to when the tier file's lock is had.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use tender_proto::BlockKey;

use super::Core;
use crate::admission::grants::{Grant, Right};
use crate::names::{AttachmentId, By, Door, GroupId, Hold, Holder, NamespaceId, NodeId, Place, SlotId, TenantId};
use crate::tier::disk::{DiskTier, format};
use crate::tier::host::records::{AttachmentRecord, GrantRecord, Records, SegmentRecord, SlotRecord, SlotUse};
use crate::tier::slab::{Owner, Slot, SlotState};
use crate::transfer::lanes::Lanes;
use crate::verb::{Held, Reply};

/// What is held from before a restart.
#[derive(Debug, Default)]
pub(super) struct Limbo {
    /// Holds that nobody has confirmed yet, by the attachment that has them: of each that has not said all yet, and of dead ones whose
    /// group lives on.
    unconfirmed: BTreeMap<AttachmentId, BTreeSet<Hold>>,
    /// Slots that the disk may still write to.
    loading: Vec<SlotId>,
}

/// The slots of one copy, as recorded. Copies come in the order in which they were made.
type Copies = BTreeMap<(u64, NamespaceId, BlockKey), Vec<(SlotId, SlotRecord)>>;

/// Holds in place, by slot.
type Holds = HashMap<SlotId, Vec<(Hold, GrantRecord)>>;

impl Core {
    /// Keeps records of host memory from now on, after taking over what a former worker's say. Must come before the first step, before or
    /// after [`Core::recover`]; the arena is that which the records are of. Returns what a person should know.
    pub fn recover_host(&mut self, records: Records) -> Vec<String> {
        let mut warnings = Vec::new();
        let is_new = records.is_new();
        self.host.records = Some(records);
        if is_new {
            return warnings;
        }
        self.recover_members(&mut warnings);
        let owned = self.recover_segments(&mut warnings);
        let holds = self.recover_holds();
        let copies = self.recover_slots(&owned, &holds, &mut warnings);
        self.recover_copies(copies, &holds);
        self.grants.reopen();
        for segment in owned {
            self.host.tier.slab.reopen(segment);
            self.give_up_if_dead(segment);
        }
        self.end_lost_holds();
        warnings
    }

    /// The disk is not there yet: [`super::Event::DiskJoined`] tells of it. Until then it holds nothing and is asked nothing.
    pub fn await_disk(&mut self) {
        if let Some(disk) = &mut self.disk {
            disk.awaited();
        }
    }

    /// Whether it is still awaited.
    pub fn awaits_disk(&self) -> bool {
        self.disk.as_ref().is_some_and(DiskTier::is_awaited)
    }

    /// What is known of the disk that is awaited once it is there: before [`super::Event::DiskJoined`].
    ///
    /// # Panics
    /// When it is not awaited.
    pub fn found_disk(&mut self, page_key: [u8; 32], depth: usize) {
        assert!(self.awaits_disk(), "what is known of a disk changes only while nothing is asked of it");
        self.disk_mut().page_key = page_key;
        self.lanes.fill_with(|| Lanes::new(depth));
    }

    /// Segments of host memory in use, and for which tenant: after [`Core::recover_host`] those that must be there as they were.
    pub fn segments_in_use(&self) -> Vec<(u32, TenantId)> {
        self.host.tier.slab.owned_segments().collect()
    }

    /// What a former worker was loading came from another disk than this core's, whose lock says nothing of that one: these slots are
    /// used by nobody until host memory is made anew. Returns how many; after [`Core::recover_host`].
    pub fn leave_loading_out_of_use(&mut self) -> usize {
        std::mem::take(&mut self.limbo.loading).len()
    }

    /// Processes that read and write in place, or did before a restart.
    pub fn local_processes(&self) -> Vec<AttachmentId> {
        self.attachments.local_processes_all()
    }

    /// Holds that are neither confirmed nor ended.
    pub fn limbo_holds(&self) -> usize {
        self.limbo.unconfirmed.values().map(BTreeSet::len).sum()
    }

    fn records(&self) -> &Records {
        self.host.records.as_ref().expect("only what has records is recovered")
    }

    fn tenant_tagged(&self, tag: [u8; 16]) -> Option<TenantId> {
        let mut tags = self.config.tenants.iter().map(|tenant| format::tenant_tag(&tenant.name));
        tags.position(|other| other == tag).map(|at| TenantId(at as u16))
    }

    fn recover_members(&mut self, warnings: &mut Vec<String>) {
        for record in self.records().attachments().collect::<Vec<_>>() {
            let Ok(AttachmentRecord { id, former, tenant, group_tag, group, namespace, public, layout }) = record
            else {
                warnings.push("the record of a local process is damaged; what it holds is given up".to_owned());
                continue;
            };
            let Some(tenant) = self.tenant_tagged(tenant) else {
                warnings.push(
                    "a local process belongs to a tenant that is not configured; what it holds is given up".to_owned(),
                );
                continue;
            };
            match self.index.namespaces.recovered(tenant, public, namespace, layout) {
                Ok(namespace) => {
                    self.attachments.recover(id, tenant, (group, group_tag), namespace, former);
                    self.limbo.unconfirmed.entry(id).or_default();
                }
                Err(error) => warnings.push(error.to_string()),
            }
            self.attachments.groups_from(group);
        }
    }

    /// Segments that have an owner; the others are prepared or dropped as they need it.
    fn recover_segments(&mut self, warnings: &mut Vec<String>) -> Vec<u32> {
        self.preparation.clear();
        let (shared, end) = (self.host.tier.slab.segment_count(), self.host.tier.slab.ingest_segments().end);
        let tenants = self.config.tenants.len();
        let (mut owned, mut left_out) = (Vec::new(), Vec::new());
        for segment in 0..end {
            let record = self.records().segment(segment);
            match record {
                Ok(SegmentRecord::Owned { tenant, slot_bytes, writer }) => {
                    let writer = (segment >= shared).then_some(writer);
                    match self.take_segment_back(segment, tenant, slot_bytes, writer) {
                        Ok(()) => owned.push(segment),
                        Err(warning) => {
                            left_out.push(segment);
                            warnings.push(warning);
                        }
                    }
                }
                Err(_) => {
                    left_out.push(segment);
                    warnings.push(format!(
                        "the record of segment {segment} of host memory is damaged; it is not used until host memory is made anew"
                    ));
                }
                // Its memory may still be there.
                Ok(SegmentRecord::Dirty | SegmentRecord::Ready) if segment >= shared => {
                    self.ingest_segment_retired(segment);
                }
                Ok(SegmentRecord::Unused) if segment >= shared => {}
                Ok(SegmentRecord::Unused | SegmentRecord::Ready) => self.preparation.deal_out(segment, tenants, false),
                Ok(SegmentRecord::Dirty) => self.preparation.deal_out(segment, tenants, true),
            }
        }
        // A shared one is used by nobody, since it is not dealt out.
        let ingest = left_out.into_iter().filter(|&segment| segment >= shared);
        ingest.for_each(|segment| self.leave_out_of_use(segment));
        owned
    }

    /// A segment whose owner cannot be told stays out of use: somebody may still read there.
    fn take_segment_back(
        &mut self,
        segment: u32,
        tenant: [u8; 16],
        slot_bytes: u32,
        writer: Option<AttachmentId>,
    ) -> Result<(), String> {
        let Some(tenant) = self.tenant_tagged(tenant) else {
            return Err(format!(
                "segment {segment} of host memory belongs to a tenant that is not configured; it is not used until host memory is \
                 made anew"
            ));
        };
        let slab = &mut self.host.tier.slab;
        let Some(shelf) = slab.shelf(Owner { tenant, slot_bytes, writer }) else {
            return Err(format!("segment {segment} of host memory has slots of {slot_bytes} bytes, which do not fit"));
        };
        match writer {
            None => slab.segment_ready(segment, Some(tenant)),
            Some(writer) => slab.ingest_ready(segment, tenant, writer),
        }
        slab.assign(segment, shelf);
        Ok(())
    }

    /// What groups hold of which a process was there; the names of all others do not come again.
    fn recover_holds(&mut self) -> Holds {
        let mut holds = Holds::new();
        for (hold, record) in self.records().grants().collect::<Vec<_>>() {
            self.grants.restore(hold, None);
            if let Some(record) = record {
                self.attachments.groups_from(record.group);
                if self.attachments.has_local(record.group) {
                    holds.entry(record.slot).or_default().push((hold, record));
                }
            }
        }
        holds
    }

    /// Takes slots back that are of no copy, and collects the others by copy.
    fn recover_slots(&mut self, owned: &[u32], holds: &Holds, warnings: &mut Vec<String>) -> Copies {
        let mut copies = Copies::new();
        for &segment in owned {
            let first = SlotId::new(segment, 0);
            let tenant = self.host.tier.slab.owner(self.host.tier.slab.shelf_of(first)).tenant;
            for slot in (0..self.host.tier.slab.slot_count(segment)).map(|place| SlotId::new(segment, place)) {
                let record = match self.records().slot(slot) {
                    Ok(None) => continue,
                    Ok(Some(record)) => record,
                    Err(_) => {
                        warnings.push(format!("the record of {slot:?} is damaged; the slot is not used any more"));
                        self.host.tier.restore(slot, blank(SlotState::Filling));
                        continue;
                    }
                };
                self.attachments.groups_from(record.holder);
                if let Some(records) = &mut self.host.records {
                    records.copies_from(record.copy);
                }
                let SlotRecord { used, doomed, public, namespace, layout, .. } = record;
                match used {
                    SlotUse::Copying => self.record_free(slot),
                    SlotUse::Loading => {
                        let loading = restored(&record, NodeId::NONE, SlotId::NONE, SlotState::Filling);
                        self.host.tier.restore(slot, loading);
                        self.limbo.loading.push(slot);
                    }
                    _ if doomed => self.keep_for_holders(slot, &record, holds),
                    SlotUse::Filling | SlotUse::Resident => {
                        match self.index.namespaces.recovered(tenant, public, namespace, layout) {
                            Ok(namespace) => {
                                let copy = copies.entry((record.copy, namespace, record.key)).or_default();
                                copy.push((slot, record));
                            }
                            Err(error) => {
                                warnings.push(error.to_string());
                                self.keep_for_holders(slot, &record, holds);
                            }
                        }
                    }
                }
            }
        }
        copies
    }

    /// What a slot's record and its holds agree on.
    fn holds_of<'a>(
        slot: SlotId,
        record: &SlotRecord,
        holds: &'a Holds,
    ) -> impl Iterator<Item = &'a (Hold, GrantRecord)> {
        let (copy, is_filling) = (record.copy, record.used == SlotUse::Filling);
        let all = holds.get(&slot).into_iter().flatten();
        all.filter(move |(_, grant)| grant.copy == copy && grant.is_reservation == is_filling)
    }

    /// A slot that nobody is to find: freed, unless somebody still uses it.
    fn keep_for_holders(&mut self, slot: SlotId, record: &SlotRecord, holds: &Holds) {
        let kept: Vec<_> = Self::holds_of(slot, record, holds).copied().collect();
        if kept.is_empty() {
            return self.record_free(slot);
        }
        let is_filling = record.used == SlotUse::Filling;
        let (state, readers) = match is_filling {
            true => (SlotState::Filling, 0),
            false => (SlotState::Resident, kept.len() as u32),
        };
        let restored = Slot { doomed: true, readers, ..restored(record, NodeId::NONE, SlotId::NONE, state) };
        self.host.tier.restore(slot, restored);
        self.record_doomed(slot);
        for (hold, grant) in kept {
            self.recover_hold(slot, hold, &grant);
        }
    }

    /// A hold stands, in limbo.
    fn recover_hold(&mut self, slot: SlotId, hold: Hold, record: &GrantRecord) {
        let GrantRecord { is_reservation, attachment, group, .. } = *record;
        let holder = Holder { group, attachment, door: Door::Ring };
        let right = if is_reservation { Right::Reservation } else { Right::Lease };
        self.grants.restore(hold, Some(Grant { slot, right, holder }));
        let tenant = self.tenant_of(slot);
        self.held[tenant.0 as usize] += 1;
        match right {
            Right::Reservation => self.reserved_slots += 1,
            Right::Lease => {
                self.leased_slots += 1;
                self.charge_lease(holder, slot);
            }
        }
        self.limbo.unconfirmed.entry(attachment).or_default().insert(hold);
    }

    /// Of two whole copies of a block the later one counts: the other was about to be given up for it.
    fn recover_copies(&mut self, mut copies: Copies, holds: &Holds) {
        for slots in copies.values_mut() {
            slots.sort_by_key(|(_, record)| record.shard_index);
        }
        let whole = copies.iter().filter(|(_, slots)| is_whole(slots));
        let last: HashMap<(NamespaceId, BlockKey), u64> =
            whole.map(|(&(copy, namespace, key), _)| ((namespace, key), copy)).collect();
        for ((copy, namespace, key), slots) in copies {
            match last.get(&(namespace, key)) {
                Some(&last) if last == copy => self.recover_whole(namespace, key, &slots, holds),
                None if self.recover_partial(namespace, key, &slots, holds) => {}
                _ => slots.iter().for_each(|(slot, record)| self.keep_for_holders(*slot, record, holds)),
            }
        }
    }

    fn recover_whole(&mut self, namespace: NamespaceId, key: BlockKey, slots: &[(SlotId, SlotRecord)], holds: &Holds) {
        let (first, record) = slots[0];
        let node = self.index.find_or_insert(namespace, key, record.parent);
        for (at, (slot, record)) in slots.iter().enumerate() {
            let next = slots.get(at + 1).map_or(SlotId::NONE, |(next, _)| *next);
            self.host.tier.restore(*slot, restored(record, node, next, SlotState::Resident));
        }
        let shelf = self.host.tier.slab.shelf_of(first);
        let block_bytes = slots.iter().map(|(_, record)| record.payload_bytes).sum();
        self.index.publish(node, Place::Host, first, shelf, block_bytes, self.now_ms);
        self.counters.recovered_blocks += 1;
        for (slot, record) in slots {
            for (hold, grant) in Self::holds_of(*slot, record, holds) {
                self.read(Place::Host, *slot);
                self.recover_hold(*slot, *hold, grant);
            }
        }
        if self.is_ingest(node) {
            self.promote(node);
        }
    }

    /// A block of which shards are missing goes on to be filled by the group that began it; `false` if there is none.
    fn recover_partial(
        &mut self,
        namespace: NamespaceId,
        key: BlockKey,
        slots: &[(SlotId, SlotRecord)],
        holds: &Holds,
    ) -> bool {
        let (first, record) = slots[0];
        let slab = &self.host.tier.slab;
        let tenant = slab.owner(slab.shelf_of(first)).tenant;
        if !self.attachments.is_local_group(tenant, record.holder) {
            return false;
        }
        // What is leased was whole: it was being given up.
        let is_leased = |(slot, record): &(SlotId, SlotRecord)| {
            record.used == SlotUse::Resident && Self::holds_of(*slot, record, holds).next().is_some()
        };
        if slots.iter().any(is_leased) {
            return false;
        }
        let node = self.index.find_or_insert(namespace, key, record.parent);
        // On disk, or begun by another group: this one's commit comes too late.
        if self.index.node(node).is_present() || self.index.node(node).filling != SlotId::NONE {
            return false;
        }
        for (slot, record) in slots {
            let hold = Self::holds_of(*slot, record, holds).next();
            let state = match (record.used, hold) {
                (SlotUse::Resident, _) => SlotState::Resident,
                (_, Some(_)) => SlotState::Filling,
                // Of a stream, or never told to anybody.
                (_, None) => {
                    self.record_free(*slot);
                    continue;
                }
            };
            let next = self.index.node(node).filling;
            self.host.tier.restore(*slot, restored(record, node, next, state));
            self.index.set_filling(node, *slot);
            match hold.filter(|_| state == SlotState::Filling) {
                Some((hold, grant)) => self.recover_hold(*slot, *hold, grant),
                None => self.keep_partial(node, *slot),
            }
        }
        self.index.forget_if_unused(node);
        true
    }

    /// A segment whose writer is not there any more is given up as that of any dead process.
    fn give_up_if_dead(&mut self, segment: u32) {
        let slab = &mut self.host.tier.slab;
        let owner = slab.owner(slab.shelf_of(SlotId::new(segment, 0)));
        if owner.writer.is_some_and(|writer| !self.attachments.has(writer)) && slab.drain(segment) {
            self.segment_retired(Place::Host, segment);
        }
    }

    /// Holds that are recorded and stand for nothing are recorded as ended.
    fn end_lost_holds(&mut self) {
        let recorded: Vec<Hold> = self.records().grants().filter_map(|(hold, record)| record.map(|_| hold)).collect();
        let lost: Vec<Hold> =
            recorded.into_iter().filter(|&hold| self.grants.get(hold, By::Daemon).is_none()).collect();
        if let Some(records) = &mut self.host.records {
            lost.into_iter().for_each(|hold| records.end_grant(hold));
        }
    }

    /// No disk writes any more to what a former worker was loading.
    pub(super) fn disk_locked(&mut self) {
        for slot in std::mem::take(&mut self.limbo.loading) {
            self.give_back(Place::Host, slot);
        }
    }

    /// A process has what it had in place under the attachment from before. What its streams hold ends with them: it cannot name that.
    pub(super) fn take_over(&mut self, former: AttachmentId, attachment: AttachmentId) {
        let of_former =
            |(_, grant): &(Hold, Grant)| (grant.holder.attachment, grant.holder.door) == (former, Door::Ring);
        let holds: Vec<Hold> = self.grants.all().filter(of_former).map(|(hold, _)| hold).collect();
        for &hold in &holds {
            self.grants.hand_over(hold, attachment);
            if let Some(records) = &mut self.host.records {
                records.set_grant_attachment(hold, attachment);
            }
        }
        let slab = &mut self.host.tier.slab;
        let is_left = !slab.change_writer(former, attachment).is_empty();
        let theirs = slab.shelves().filter(|(_, owner)| owner.writer == Some(attachment));
        let segments: Vec<u32> = theirs.flat_map(|(shelf, _)| slab.segments_of(shelf)).collect();
        if let Some(records) = &mut self.host.records {
            for segment in segments {
                if records.is_owned(segment) {
                    records.set_writer(segment, attachment);
                }
            }
        }
        if is_left {
            self.give_up_segments(former, false);
        }
        for segment in self.host.tier.slab.retire_free_of(former) {
            self.segment_retired(Place::Host, segment);
        }
        // Also what it had confirmed, or was granted since: it says anew what it holds.
        self.limbo.unconfirmed.remove(&former);
        self.limbo.unconfirmed.entry(attachment).or_default().extend(holds);
        self.attachments.local_gone(former);
        self.forget_member(former);
    }

    /// An attachment is not there any more.
    pub(super) fn forget_member(&mut self, attachment: AttachmentId) {
        if let Some(records) = &mut self.host.records {
            records.detach(attachment);
        }
    }

    /// What a process says that it holds is its own again; after the last of it the rest is released.
    pub(super) fn confirm(&mut self, tenant: TenantId, attachment: AttachmentId, held: &[Held]) -> Reply {
        let Some(under) = self.under(tenant, attachment) else { return Self::unattached(attachment) };
        let group = under.holder.group;
        if held.is_empty() {
            let holds = self.limbo.unconfirmed.remove(&attachment).unwrap_or_default();
            self.end_unconfirmed(holds);
            self.end_unclaimed(group);
        }
        Reply::Confirmed(held.iter().map(|held| self.confirm_one(group, held)).collect())
    }

    fn end_unconfirmed(&mut self, holds: BTreeSet<Hold>) {
        for hold in holds {
            match self.grants.get(hold, By::Daemon).map(|grant| grant.right) {
                Some(Right::Reservation) => self.abort(By::Daemon, &[hold]),
                Some(Right::Lease) => self.release(By::Daemon, &[hold]),
                None => {}
            }
        }
    }

    /// Leases of a group's dead members are released when all its members have said what they hold, and none named them.
    pub(super) fn end_unclaimed(&mut self, group: GroupId) {
        if self.limbo.unconfirmed.keys().any(|&id| self.attachments.group(id) == Some(group)) {
            return;
        }
        let (grants, attachments) = (&self.grants, &self.attachments);
        let of_group = |hold: &Hold| grants.get(*hold, By::Daemon).is_none_or(|grant| grant.holder.group == group);
        let mut unclaimed = BTreeSet::new();
        self.limbo.unconfirmed.retain(|&id, holds| {
            unclaimed.extend(holds.iter().filter(|&hold| of_group(hold)));
            holds.retain(|hold| !of_group(hold));
            attachments.has(id) || !holds.is_empty()
        });
        self.end_unconfirmed(unclaimed);
    }

    /// Any member of a group may confirm what the group holds in place.
    fn confirm_one(&mut self, group: GroupId, held: &Held) -> bool {
        let Held { hold, segment, offset, is_reservation } = *held;
        let right = if is_reservation { Right::Reservation } else { Right::Lease };
        let grant = self.grants.get(hold, By::Group(group, Door::Ring)).filter(|grant| grant.right == right);
        let Some(Grant { slot, holder, .. }) = grant else { return false };
        let extent = self.host.extent(slot);
        if (extent.segment, extent.offset) != (segment, offset) {
            return false;
        }
        if let Some(holds) = self.limbo.unconfirmed.get_mut(&holder.attachment) {
            holds.remove(&hold);
        }
        true
    }
}

fn is_whole(slots: &[(SlotId, SlotRecord)]) -> bool {
    let is_next = |((_, record), at): (&(SlotId, SlotRecord), u8)| {
        let is_there = record.used == SlotUse::Resident && record.shard_index == at;
        is_there && usize::from(record.shard_count) == slots.len()
    };
    slots.iter().zip(0u8..).all(is_next)
}

fn restored(record: &SlotRecord, node: NodeId, next: SlotId, state: SlotState) -> Slot {
    let SlotRecord { holder, shard_index, shard_count, .. } = *record;
    let root = if state == SlotState::Resident { record.root } else { 0 };
    Slot { node, next, generation: 0, readers: 0, holder, root, shard_index, shard_count, state, doomed: false }
}

/// A slot of no block.
fn blank(state: SlotState) -> Slot {
    Slot {
        node: NodeId::NONE,
        next: SlotId::NONE,
        generation: 0,
        readers: 0,
        holder: GroupId(0),
        root: 0,
        shard_index: 0,
        shard_count: 1,
        state,
        doomed: false,
    }
}

#[cfg(test)]
mod tests;
