//! Keeping the records of host memory ([`crate::tier::host::records`]): what changes in slots, segments, holds and processes is recorded
//! in the step in which it changes, and thus before anybody is told, or writes to a slot. Without records this costs nothing.
//!
//! What a cut between two of these leaves is put right at the start (`warm.rs`); their order here sees to it that it can be:
//! * a slot's record says free before its bytes are another block's, for they are written to after the step that took it;
//! * it says filling before a hold names it, and a hold has ended before its slot is free;
//! * a segment is recorded as owned before any of its slots, and as nobody's after the last of them.

use super::Core;
use crate::admission::grants::{Grant, Right};
use crate::limits;
use crate::names::{AttachmentId, By, Door, Hold, NodeId, Place, SlotId, TenantId};
use crate::tier::disk::format;
use crate::tier::host::records::{AttachmentRecord, GrantRecord, SegmentRecord, SlotRecord, SlotUse};
use crate::tier::slab::SlotState;

/// What the bytes of a shard are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Shape {
    /// Fingerprint of the layout.
    pub layout: u64,
    /// Bytes of the shard.
    pub payload_bytes: u32,
    /// What the block is.
    pub kind: u8,
    /// How it is used again.
    pub reuse_rule: u8,
    /// Under a public namespace.
    pub public: bool,
}

impl Core {
    /// The shape of a block's shards, when it has so many: as an attach said, or, before anybody attached, as is recorded of its copy in
    /// host memory.
    pub(super) fn shape(&self, node: NodeId, shard_count: u8) -> Option<Shape> {
        let node = self.index.node(node);
        if let Some(known) = &self.index.namespaces.get(node.namespace).known {
            return Some(Shape {
                layout: known.fingerprint,
                payload_bytes: known.layout.shard_bytes(shard_count.into()) as u32,
                kind: known.layout.kind as u8,
                reuse_rule: known.layout.reuse_rule.ordinal() as u8,
                public: known.namespace.public,
            });
        }
        let record = self.recorded(node.copy(Place::Host)?).filter(|record| record.shard_count == shard_count)?;
        let SlotRecord { layout, payload_bytes, kind, reuse_rule, public, .. } = record;
        Some(Shape { layout, payload_bytes, kind, reuse_rule, public })
    }

    fn recorded(&self, slot: SlotId) -> Option<SlotRecord> {
        self.host.records.as_ref()?.slot(slot).ok()?
    }

    /// Bytes of a block in host memory to whose namespace nobody has attached yet.
    pub(super) fn recorded_bytes(&self, node: NodeId) -> u32 {
        let Some(first) = self.index.node(node).copy(Place::Host) else { return 0 };
        self.recorded(first).map_or(0, |record| record.payload_bytes * u32::from(record.shard_count))
    }

    /// A client fills a slot, beside others of the same copy if there are any.
    pub(super) fn record_filling(&mut self, slot: SlotId, other: SlotId) {
        let Some(records) = &mut self.host.records else { return };
        let copy = match other {
            SlotId::NONE => records.next_copy(),
            other => records.slot(other).ok().flatten().expect("what is being filled is recorded").copy,
        };
        self.record_slot(slot, SlotUse::Filling, copy);
    }

    /// The daemon fills the slots of a copy.
    pub(super) fn record_use(&mut self, slots: &[SlotId], used: SlotUse) {
        let Some(copy) = self.host.records.as_mut().map(|records| records.next_copy()) else { return };
        for &slot in slots {
            self.record_slot(slot, used, copy);
        }
    }

    fn record_slot(&mut self, slot: SlotId, used: SlotUse, copy: u64) {
        let slab = &self.host.tier.slab;
        let taken = *slab.slot(slot);
        let owner = slab.owner(slab.shelf_of(slot));
        let shape = self.shape(taken.node, taken.shard_count).expect("what is filled has a layout");
        let node = self.index.node(taken.node);
        let record = SlotRecord {
            used,
            doomed: false,
            key: node.key,
            parent: self.index.parent_key(node.parent),
            namespace: self.index.namespaces.get(node.namespace).tag,
            layout: shape.layout,
            root: 0,
            copy,
            holder: taken.holder,
            shard_index: taken.shard_index,
            shard_count: taken.shard_count,
            kind: shape.kind,
            reuse_rule: shape.reuse_rule,
            public: shape.public,
            payload_bytes: shape.payload_bytes,
        };
        let Some(records) = &mut self.host.records else { return };
        if !records.is_owned(slot.segment()) {
            let tenant = format::tenant_tag(&self.config.tenants[owner.tenant.0 as usize].name);
            let writer = owner.writer.unwrap_or(AttachmentId(0));
            let owned = SegmentRecord::Owned { tenant, slot_bytes: owner.slot_bytes, writer };
            records.set_segment(slot.segment(), owned);
        }
        records.fill(slot, &record);
    }

    /// A slot holds its shard.
    pub(super) fn record_resident(&mut self, slot: SlotId) {
        let root = self.host.tier.slab.slot(slot).root;
        if let Some(records) = &mut self.host.records {
            records.resident(slot, root);
        }
    }

    /// A slot is given up, and still used.
    pub(super) fn record_doomed(&mut self, slot: SlotId) {
        if let Some(records) = &mut self.host.records {
            records.doom(slot);
        }
    }

    /// A slot is about to be free.
    pub(super) fn record_free(&mut self, slot: SlotId) {
        if let Some(records) = &mut self.host.records {
            records.free(slot);
        }
    }

    /// A segment lost its owner.
    pub(super) fn record_retired(&mut self, segment: u32) {
        if let Some(records) = &mut self.host.records {
            records.set_segment(segment, SegmentRecord::Dirty);
        }
    }

    /// A segment holds nothing of a former owner.
    pub(super) fn record_ready(&mut self, segment: u32) {
        if let Some(records) = &mut self.host.records {
            records.set_segment(segment, SegmentRecord::Ready);
        }
    }

    /// Whether a tenant may have so many holds more: each has its part of them.
    pub(super) fn may_hold(&self, tenant: TenantId, count: usize) -> bool {
        let part = limits::GRANTS_MAX / self.config.tenants.len().max(1);
        self.held[tenant.0 as usize] + count <= part && self.grants.has_room(count)
    }

    /// Whose block lies in a slot of host memory.
    pub(super) fn tenant_of(&self, slot: SlotId) -> TenantId {
        let slab = &self.host.tier.slab;
        slab.owner(slab.shelf_of(slot)).tenant
    }

    /// A hold was granted. Only those in place outlive the worker: of the others nobody outside of it knows the names.
    pub(super) fn record_grant(&mut self, hold: Hold, grant: Grant) {
        let Some(records) = self.host.records.as_mut().filter(|_| grant.holder.door == Door::Ring) else { return };
        let copy = records.slot(grant.slot).ok().flatten().map_or(0, |record| record.copy);
        let record = GrantRecord {
            is_reservation: grant.right == Right::Reservation,
            attachment: grant.holder.attachment,
            group: grant.holder.group,
            slot: grant.slot,
            copy,
        };
        records.grant(hold, &record);
    }

    /// Ends a hold. `None` if it was ended before, or is not theirs.
    pub(super) fn end_grant(&mut self, hold: Hold, right: Right, by: By) -> Option<Grant> {
        let grant = self.grants.end(hold, right, by)?;
        let tenant = self.tenant_of(grant.slot);
        self.held[tenant.0 as usize] -= 1;
        if let Some(records) = self.host.records.as_mut().filter(|_| grant.holder.door == Door::Ring) {
            records.end_grant(hold);
        }
        Some(grant)
    }

    /// A process reads and writes in place; `false` when no more can be recorded.
    pub(super) fn record_member(&mut self, id: AttachmentId) -> bool {
        let Some(records) = &mut self.host.records else { return true };
        let Some((attachment, group_tag)) = self.attachments.recorded(id) else { return false };
        let namespace = self.index.namespaces.get(attachment.namespace);
        let known = namespace.known.as_ref();
        let record = AttachmentRecord {
            id,
            former: attachment.former,
            tenant: format::tenant_tag(&self.config.tenants[attachment.tenant.0 as usize].name),
            group_tag,
            group: attachment.group,
            namespace: namespace.tag,
            public: known.is_some_and(|known| known.namespace.public),
            layout: known.map_or(0, |known| known.fingerprint),
        };
        // Joining twice is joining once.
        let is_there = records.attachments().any(|found| found.is_ok_and(|found| found.id == id));
        is_there || records.attach(&record).is_some()
    }

    /// Whether what is recorded is what is true, for tests.
    pub(super) fn check_records(&self) {
        let Some(records) = &self.host.records else { return };
        let slab = &self.host.tier.slab;
        for segment in 0..slab.ingest_segments().end {
            let mut used = 0;
            for slot in (0..slab.slot_count(segment)).map(|place| SlotId::new(segment, place)) {
                let (taken, record) = (slab.slot(slot), records.slot(slot).expect("records are whole"));
                let Some(record) = record else {
                    assert_eq!(taken.state, SlotState::Free, "slot {slot:?} is in use, and its record says free");
                    continue;
                };
                used += 1;
                let state = if record.used == SlotUse::Resident { SlotState::Resident } else { SlotState::Filling };
                let recorded = (state, record.doomed, record.shard_index, record.shard_count);
                assert_eq!(
                    recorded,
                    (taken.state, taken.doomed, taken.shard_index, taken.shard_count),
                    "what is recorded of slot {slot:?}"
                );
                if taken.node != NodeId::NONE && !taken.doomed {
                    assert_eq!(record.key, self.index.node(taken.node).key, "what is recorded of slot {slot:?}");
                }
                assert!(state == SlotState::Filling || record.root == taken.root, "what is recorded of slot {slot:?}");
            }
            assert!(used == 0 || records.is_owned(segment), "segment {segment} is in use, and recorded as nobody's");
        }
        let recorded: Vec<_> = records.grants().filter_map(|(hold, record)| Some((hold, record?))).collect();
        let held: Vec<_> = self.grants.all().filter(|(_, grant)| grant.holder.door == Door::Ring).collect();
        assert_eq!(recorded.len(), held.len(), "holds in place are recorded: {recorded:?}, {held:?}");
        for ((hold, record), (held, grant)) in recorded.into_iter().zip(held) {
            assert_eq!(hold, held, "holds in place are recorded");
            let granted = (record.slot, record.attachment, record.group, record.is_reservation);
            let Grant { slot, right, holder } = grant;
            assert_eq!(granted, (slot, holder.attachment, holder.group, right == Right::Reservation));
        }
    }
}
