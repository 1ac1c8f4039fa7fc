//! The disk tier: slots of segments in tier files, a directory that tells after a restart what they hold, and whether the disk can be
//! trusted at the moment.

pub mod directory;
pub mod format;
pub mod recover;

use self::directory::Directory;
use super::Tier;
use super::slab::{Owner, Slab};
use crate::limits;
use crate::names::SlotId;
use crate::status::Health;

/// The disk tier.
#[derive(Debug)]
pub struct DiskTier {
    /// Slots and quotas.
    pub tier: Tier,
    /// What is durable.
    pub directory: Directory,
    /// Files; segment `s` of the tier is segment `s / files` of file `s % files`.
    pub file_count: u32,
    /// Key of the directory pages.
    pub page_key: [u8; 32],
    /// What a slot's directory entry says beyond its record, by segment: a page must be written again whole, also when nobody has
    /// attached to the namespaces of its blocks since the restart.
    notes: Vec<Vec<Note>>,
    /// The owner of each segment, or the last one: a segment without an owner still has a page that says so.
    owners: Vec<Option<Owner>>,
    /// Segments that lost their owner while pages of the directory were on their way: one of those may yet land where the next owner's
    /// slots will lie.
    retired: Vec<u32>,
    health: Health,
}

/// What only the directory needs to know of a slot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Note {
    /// Number of the copy.
    pub written: u64,
    /// Bytes of the shard.
    pub payload_bytes: u32,
    /// What the block is.
    pub kind: u8,
    /// How it is used again.
    pub reuse_rule: u8,
    /// Under a public namespace.
    pub public: bool,
    /// Fingerprint of the block's layout.
    pub layout: u64,
    /// The slot is known to hold what the entry says: written, or read, since the start. An entry may survive a crash that its payload
    /// did not.
    pub verified: bool,
}

/// Where on disk something is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DiskPlace {
    /// Which file.
    pub file: u32,
    /// Bytes from its start.
    pub offset: u64,
}

impl DiskTier {
    /// A tier of `segment_count` segments over `file_count` files, all in need of `segment_ready`.
    pub fn new(
        segment_bytes: u64,
        segment_count: u32,
        file_count: u32,
        page_key: [u8; 32],
        counter: u64,
        quota_bytes: Vec<Option<u64>>,
    ) -> Self {
        let slab = Slab::new(segment_bytes, segment_count, format::slots_per_segment);
        Self {
            tier: Tier::new(slab, quota_bytes),
            directory: Directory::new(segment_count, file_count as usize, counter),
            file_count,
            page_key,
            notes: vec![Vec::new(); segment_count as usize],
            owners: vec![None; segment_count as usize],
            retired: Vec::new(),
            health: Health::Good,
        }
    }

    fn segment_place(&self, segment: u32) -> DiskPlace {
        let index = u64::from(segment / self.file_count);
        let offset = format::SEGMENTS_OFFSET + index * self.tier.slab.segment_bytes();
        DiskPlace { file: segment % self.file_count, offset }
    }

    /// Where a slot is.
    pub fn slot_place(&self, slot: SlotId) -> DiskPlace {
        let DiskPlace { file, offset } = self.segment_place(slot.segment());
        let slots = self.tier.slab.slot_count(slot.segment());
        let within = format::slot_offset(slots, self.tier.slab.slot_bytes(slot), slot.place());
        DiskPlace { file, offset: offset + within }
    }

    /// Where a copy of a directory page is.
    pub fn page_place(&self, segment: u32, page: u32, copy: u32) -> DiskPlace {
        let DiskPlace { file, offset } = self.segment_place(segment);
        DiskPlace { file, offset: offset + format::page_offset(page, copy) }
    }

    /// Notes what the directory is to say of a slot.
    pub fn set_note(&mut self, slot: SlotId, note: Note) {
        let slots = self.tier.slab.slot_count(slot.segment()) as usize;
        let notes = &mut self.notes[slot.segment() as usize];
        notes.resize(slots, Note::default());
        notes[slot.place() as usize] = note;
    }

    /// A slot was read, and holds what its entry says.
    pub fn verified(&mut self, slot: SlotId) {
        self.notes[slot.segment() as usize][slot.place() as usize].verified = true;
    }

    /// Whether a slot holds what its entry says, and not what somebody else left there: unless the disk lies.
    pub fn is_sure(&self, slot: SlotId) -> bool {
        let Note { written, verified, .. } = self.note(slot);
        verified && !self.directory.is_suspect(written)
    }

    /// What the directory is to say of a slot.
    pub fn note(&self, slot: SlotId) -> Note {
        self.notes[slot.segment() as usize][slot.place() as usize]
    }

    /// A segment got its owner.
    pub fn set_owner(&mut self, segment: u32, owner: Owner) {
        self.owners[segment as usize] = Some(owner);
    }

    /// The owner of a segment with a directory, or its last one.
    pub fn owner(&self, segment: u32) -> Owner {
        self.owners[segment as usize].expect("a segment with a directory had an owner")
    }

    /// A segment lost its owner: its directory and notes are void.
    pub fn retire(&mut self, segment: u32) {
        self.directory.end(segment);
        self.notes[segment as usize] = Vec::new();
        self.retired.push(segment);
        self.reuse_retired();
    }

    /// Makes retired segments ready for another owner, unless pages are on their way.
    pub fn reuse_retired(&mut self) {
        if !self.directory.is_writing() {
            for segment in std::mem::take(&mut self.retired) {
                self.tier.slab.segment_ready(segment, None);
            }
        }
    }

    /// Whether segments wait for pages that are on their way.
    pub fn has_retired(&self) -> bool {
        !self.retired.is_empty()
    }

    /// Its files are not there yet: until [`DiskTier::joined`] it is not asked.
    pub fn awaited(&mut self) {
        self.health = Health::AWAITED;
    }

    /// Its files are there.
    pub fn joined(&mut self) {
        self.health = Health::Good;
    }

    /// Whether its files are not there yet.
    pub fn is_awaited(&self) -> bool {
        self.health == Health::AWAITED
    }

    /// Whether the disk may be asked now.
    pub fn is_usable(&self, now_ms: u64) -> bool {
        !matches!(self.health, Health::Disabled(until) if now_ms < until)
    }

    /// How the disk is.
    pub fn health(&self) -> Health {
        self.health
    }

    /// A request succeeded.
    pub fn succeeded(&mut self) {
        self.health = Health::Good;
    }

    /// A request failed; returns whether the disk is left alone from now on.
    pub fn failed(&mut self, now_ms: u64) -> bool {
        let failures = match self.health {
            Health::Good => 1,
            Health::Degraded(failures) => failures + 1,
            // One failure after a pause is enough for the next one.
            Health::Disabled(_) => limits::DISK_FAILURES_MAX,
        };
        self.health = if failures >= limits::DISK_FAILURES_MAX {
            Health::Disabled(now_ms + limits::DISK_RETRY.as_millis() as u64)
        } else {
            Health::Degraded(failures)
        };
        matches!(self.health, Health::Disabled(_))
    }
}

#[cfg(test)]
mod tests;
