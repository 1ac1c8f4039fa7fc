//! Where may bytes live? A tier is slots, and quotas on them per tenant. Which block goes is the index's to say; how bytes get here is
//! the transfer's.

pub mod disk;
pub mod host;
pub mod slab;

use tender_proto::BlockLayout;

use self::slab::{Owner, ShelfId, Slab, Slot};
use crate::device::block::PAGE_BYTES;
use crate::names::{GroupId, NodeId, SlotId, TenantId};

/// Bytes of the slot that holds `payload_bytes`: whole pages and nothing else, since a model has one or two sizes and rounding
/// further up wastes a tenth of memory.
pub fn slot_bytes(payload_bytes: u64) -> u32 {
    payload_bytes.next_multiple_of(PAGE_BYTES) as u32
}

/// Bytes of the slot for one of `count` shards.
pub fn shard_slot_bytes(layout: &BlockLayout, count: u8) -> u32 {
    slot_bytes(layout.shard_bytes(count.into()))
}

/// Slots of one tier with what each tenant uses of them.
#[derive(Debug)]
pub struct Tier {
    /// The slots.
    pub slab: Slab,
    used_bytes: Vec<u64>,
    quota_bytes: Vec<Option<u64>>,
    /// Of a block that is about to be copied within the tier: for a while it is there twice, and charged twice.
    copied: Option<(TenantId, u64)>,
}

impl Tier {
    /// A tier with one quota per tenant.
    pub fn new(slab: Slab, quota_bytes: Vec<Option<u64>>) -> Self {
        Self { slab, used_bytes: vec![0; quota_bytes.len()], quota_bytes, copied: None }
    }

    /// Bytes of slots that a tenant uses, and may use.
    pub fn tenant(&self, tenant: TenantId) -> (u64, Option<u64>) {
        (self.used_bytes[tenant.0 as usize], self.quota_bytes[tenant.0 as usize])
    }

    /// Whether one more slot of this size is within the tenant's quota.
    pub fn within_quota(&self, owner: Owner) -> bool {
        let (used, quota) = self.tenant(owner.tenant);
        let copied = self.copied.filter(|(tenant, _)| *tenant == owner.tenant).map_or(0, |(_, bytes)| bytes);
        quota.is_none_or(|quota| used + u64::from(owner.slot_bytes) <= quota + copied)
    }

    /// A block of so many bytes is copied within the tier: its second copy is within the quota if the first is. `None` when it has its
    /// slots.
    pub fn copy_within(&mut self, copied: Option<(TenantId, u64)>) {
        self.copied = copied;
    }

    /// Whether a slot of this size can be had without taking one from somebody.
    pub fn has_room(&mut self, owner: Owner) -> bool {
        self.slab.shelf(owner).is_some_and(|shelf| self.slab.has_room(shelf))
    }

    /// Whether the owner has any segment, and so blocks of this size that can go.
    pub fn has_segments(&self, owner: Owner) -> bool {
        self.slab.shelves().any(|(shelf, other)| other == owner && self.slab.shelf_size(shelf).0 > 0)
    }

    /// Takes a free slot of the shelf, and charges its tenant.
    pub fn reserve(&mut self, shelf: ShelfId, node: NodeId, holder: GroupId, shard: (u8, u8)) -> Option<SlotId> {
        let slot = self.slab.reserve(shelf, node, holder, shard)?;
        let Owner { tenant, slot_bytes, .. } = self.slab.owner(shelf);
        self.used_bytes[tenant.0 as usize] += u64::from(slot_bytes);
        Some(slot)
    }

    /// Takes one particular slot, during recovery.
    pub fn reserve_at(&mut self, slot: SlotId, node: NodeId, shard: (u8, u8)) -> Option<()> {
        self.slab.reserve_at(slot, node, shard)?;
        let Owner { tenant, slot_bytes, .. } = self.slab.owner(self.slab.shelf_of(slot));
        self.used_bytes[tenant.0 as usize] += u64::from(slot_bytes);
        Some(())
    }

    /// Takes one particular slot as it was before a restart, and charges its tenant, whatever its quota.
    pub fn restore(&mut self, slot: SlotId, record: Slot) {
        self.slab.restore(slot, record);
        let Owner { tenant, slot_bytes, .. } = self.slab.owner(self.slab.shelf_of(slot));
        self.used_bytes[tenant.0 as usize] += u64::from(slot_bytes);
    }

    /// Frees a slot; returns the segment that is retired by it, if any.
    #[must_use = "a retired segment must be zeroed and made ready again"]
    pub fn release(&mut self, slot: SlotId) -> Option<u32> {
        self.discharge(slot);
        self.slab.release(slot)
    }

    /// Takes a slot out of use; returns the segment that is retired by it, if any.
    #[must_use = "a retired segment must be zeroed and made ready again"]
    pub fn quarantine(&mut self, slot: SlotId) -> Option<u32> {
        self.discharge(slot);
        self.slab.quarantine(slot)
    }

    fn discharge(&mut self, slot: SlotId) {
        let Owner { tenant, slot_bytes, .. } = self.slab.owner(self.slab.shelf_of(slot));
        self.used_bytes[tenant.0 as usize] -= u64::from(slot_bytes);
    }
}
