//! What the directories said at start becomes slots, nodes and copies. Nothing is believed of the payload: it is checked when read.

use std::collections::BTreeMap;

use tender_proto::BlockKey;

use super::Core;
use crate::names::{NamespaceId, Place, SlotId, TenantId};
use crate::tier::disk::Note;
use crate::tier::disk::format::{self, ENTRIES_PER_PAGE, Entry};
use crate::tier::disk::recover::{FoundSegment, entry_bits};
use crate::tier::slab::{Owner, SlotState};

/// What one tier file held.
#[derive(Clone, Debug, Default)]
pub struct RecoveredFile {
    /// Its segments with a directory.
    pub segments: Vec<FoundSegment>,
    /// The highest number in use.
    pub counter: u64,
}

/// Numbers left out at each start: pages that a crash cut off from their first page are not read, and their numbers must not come again.
const RESTART_GAP: u64 = 1 << 32;

/// A copy as its entries tell: all shards of one writing.
type Copies = BTreeMap<(u64, NamespaceId, BlockKey), Vec<(SlotId, Entry)>>;

impl Core {
    /// Takes over what the files held; must be the first thing that happens to a core with a disk, besides [`Core::recover_host`], unless
    /// it awaits it. Returns what a person should know.
    pub fn recover(&mut self, files: Vec<RecoveredFile>) -> Vec<String> {
        let mut warnings = Vec::new();
        let Some(disk) = &mut self.disk else { return warnings };
        disk.joined();
        let file_count = disk.file_count;
        for counter in files.iter().map(|file| file.counter) {
            disk.directory.count_from(counter.saturating_add(RESTART_GAP));
        }
        for segment in 0..disk.tier.slab.segment_count() {
            disk.tier.slab.segment_ready(segment, None);
        }
        let mut copies = Copies::new();
        for (file, found) in
            (0u32..).zip(files).flat_map(|(file, found)| found.segments.into_iter().map(move |s| (file, s)))
        {
            let segment = found.segment * file_count + file;
            if let Err(warning) = self.recover_segment(segment, found, &mut copies) {
                warnings.push(warning);
            }
        }
        for ((written, namespace, key), slots) in copies {
            self.recover_copy(written, namespace, key, slots);
        }
        for tenant in (0..self.config.tenants.len() as u16).map(TenantId) {
            self.recover_quota(tenant);
        }
        warnings
    }

    /// A page that was not written again since may name what was evicted before the crash: with that a tenant may have more than its quota.
    fn recover_quota(&mut self, tenant: TenantId) {
        let is_over = |core: &Self| {
            let (used, quota) = core.disk().tier.tenant(tenant);
            quota.is_some_and(|quota| used > quota)
        };
        while is_over(self) && self.evict_of_tenant(Place::Disk, tenant) {}
    }

    fn recover_segment(&mut self, segment: u32, found: FoundSegment, copies: &mut Copies) -> Result<(), String> {
        let tags = self.config.tenants.iter().map(|tenant| format::tenant_tag(&tenant.name));
        let Some(tenant) = (0u16..).zip(tags).find(|(_, tag)| *tag == found.tenant).map(|(id, _)| TenantId(id)) else {
            return Err(format!(
                "segment {segment} of the disk tier belongs to a tenant that is not configured; it is used for others now"
            ));
        };
        let disk = self.disk.as_mut().expect("its files were just read");
        let owner = Owner::shared(tenant, found.slot_bytes);
        let Some(shelf) = disk.tier.slab.shelf(owner) else {
            return Err(format!(
                "segment {segment} of the disk tier has slots of {} bytes, which do not fit",
                found.slot_bytes
            ));
        };
        disk.tier.slab.assign(segment, shelf);
        disk.set_owner(segment, owner);
        let pages = found.pages.iter().map(|page| page.as_ref().map(|(copy, page)| (*copy, entry_bits(&page.entries))));
        disk.directory.recover(segment, found.epoch, pages);
        let slots = disk.tier.slab.slot_count(segment);
        for (_, page) in found.pages.into_iter().flatten() {
            for (entry, i) in page.entries.into_iter().zip(0u32..) {
                let place = page.page * ENTRIES_PER_PAGE + i;
                let Some(entry) = entry.filter(|_| place < slots) else { continue };
                let namespace = self.index.namespaces.recovered(tenant, entry.public, entry.namespace, entry.layout);
                let namespace = namespace.map_err(|error| error.to_string())?;
                copies
                    .entry((entry.written, namespace, entry.key))
                    .or_default()
                    .push((SlotId::new(segment, place), entry));
            }
        }
        Ok(())
    }

    /// Copies come in the order in which they were written; of two of one block the later one counts.
    fn recover_copy(&mut self, written: u64, namespace: NamespaceId, key: BlockKey, mut slots: Vec<(SlotId, Entry)>) {
        slots.sort_by_key(|(_, entry)| entry.shard_index);
        let whole = slots.iter().zip(0u16..).all(|((_, entry), i)| entry.shard_index == i)
            && slots.iter().all(|(_, entry)| usize::from(entry.shard_count) == slots.len());
        let disk = self.disk.as_mut().expect("its files were just read");
        if !whole {
            // The page that holds the rest was not written in time: what is here is of no use, and its entries are to go.
            return slots.iter().for_each(|(slot, _)| disk.directory.mark(*slot));
        }
        let (_, first) = slots[0];
        let node = self.index.find_or_insert(namespace, key, first.parent);
        if self.index.node(node).copy(Place::Disk).is_some() {
            self.index.node_mut(node).pinned = true;
            self.drop_copy(node, Place::Disk);
            self.index.node_mut(node).pinned = false;
        }
        let disk = self.disk.as_mut().expect("its files were just read");
        for (at, (slot, entry)) in slots.iter().enumerate() {
            let shard = (entry.shard_index as u8, entry.shard_count as u8);
            disk.tier.reserve_at(*slot, node, shard).expect("a page has one entry for a slot");
            let record = disk.tier.slab.slot_mut(*slot);
            record.root = entry.root;
            record.state = SlotState::Resident;
            record.next = slots.get(at + 1).map_or(SlotId::NONE, |(next, _)| *next);
            let Entry { payload_bytes, kind, reuse_rule, public, layout, .. } = *entry;
            disk.set_note(*slot, Note { written, payload_bytes, kind, reuse_rule, public, layout, verified: false });
        }
        let shelf = disk.tier.slab.shelf_of(slots[0].0);
        let block_bytes = slots.iter().map(|(_, entry)| entry.payload_bytes).sum();
        self.index.publish(node, Place::Disk, slots[0].0, shelf, block_bytes, self.now_ms);
        self.counters.recovered_blocks += 1;
        let record = self.index.node(node);
        let is_put = record.filling != SlotId::NONE && record.copy(Place::Host).is_none();
        if is_put && !self.ingest.is_copying(node) {
            // Somebody puts it anew, who did not find it while the disk was awaited: this one may have been promised to last.
            self.drop_filling(node);
        }
    }
}

#[cfg(test)]
mod tests;
