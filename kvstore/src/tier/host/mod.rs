//! Host memory: slots of the arena, and the sums of their fragments, which go out with a lease so that a reader can check what it
//! got piece by piece. What is in them is also kept in [`records`], where they are to outlive the worker.

pub mod records;

use tender_proto::sum;

use self::records::Records;
use super::Tier;
use super::slab::Slab;
use crate::device::memory::Extent;
use crate::names::SlotId;

/// The host tier.
#[derive(Debug)]
pub struct HostTier {
    /// Slots and quotas.
    pub tier: Tier,
    /// What a worker that comes later finds; without them host memory ends with this one.
    pub records: Option<Records>,
    /// Per segment and slot: sums of the fragments. Not recorded: after a restart they are zeros.
    sums: Vec<Vec<u64>>,
}

/// A segment of the arena holds nothing but slots.
pub fn slots_per_segment(segment_bytes: u64, slot_bytes: u64) -> u32 {
    (segment_bytes / slot_bytes) as u32
}

impl HostTier {
    /// An arena of that many segments that only the daemon writes and that many for clients, none of them prepared.
    pub fn new(segment_bytes: u64, shared_count: u32, ingest_count: u32, quota_bytes: Vec<Option<u64>>) -> Self {
        let slab = Slab::with_ingest(segment_bytes, shared_count, ingest_count, slots_per_segment);
        let sums = vec![Vec::new(); (shared_count + ingest_count) as usize];
        Self { tier: Tier::new(slab, quota_bytes), records: None, sums }
    }

    /// Where a slot's bytes are.
    pub fn extent(&self, slot: SlotId) -> Extent {
        let bytes = self.tier.slab.slot_bytes(slot);
        Extent { segment: slot.segment(), offset: slot.place() * bytes, bytes }
    }

    /// Remembers the sums of a slot's fragments.
    pub fn set_sums(&mut self, slot: SlotId, fragment_sums: &[u64]) {
        let per_slot = self.fragments_per_slot(slot);
        assert!(fragment_sums.len() <= per_slot, "a slot has no more fragments than fit");
        let slots = self.tier.slab.slot_count(slot.segment()) as usize;
        let sums = &mut self.sums[slot.segment() as usize];
        sums.resize(slots * per_slot, 0);
        let first = slot.place() as usize * per_slot;
        sums[first..first + fragment_sums.len()].copy_from_slice(fragment_sums);
    }

    /// The sums of a slot's fragments; `None` when only their root is known, since the block was there before a restart: whoever wants
    /// them takes them from the bytes and holds them against the root.
    pub fn sums(&self, slot: SlotId, payload_bytes: usize) -> Option<&[u64]> {
        let first = slot.place() as usize * self.fragments_per_slot(slot);
        let sums = self.sums[slot.segment() as usize].get(first..first + sum::fragment_count(payload_bytes))?;
        sums.iter().any(|&sum| sum != 0).then_some(sums)
    }

    /// Forgets the sums of a segment that changes owner.
    pub fn clear_sums(&mut self, segment: u32) {
        self.sums[segment as usize] = Vec::new();
    }

    fn fragments_per_slot(&self, slot: SlotId) -> usize {
        sum::fragment_count(self.tier.slab.slot_bytes(slot) as usize)
    }
}
