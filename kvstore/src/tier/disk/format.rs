//! The bytes of a tier file, version 1. All numbers little-endian, all offsets in bytes.
//!
//! ```text
//! file       0        superblock, copy A          4096
//!            4096     superblock, copy B          4096
//!            1 MiB    segment 0, segment 1 …      segment_bytes each
//!
//! segment    0        page 0 copy A, page 0 copy B, page 1 copy A, page 1 copy B …          the directory, 2 x 4096 for 31 slots
//!            then     slot 0, slot 1 …            slot_bytes each (whole pages): the payload of one shard, then zeros
//!
//! superblock 0    8   "TENDERKV"                  page     0    8   "TDRPAGE1"
//!            8    4   version, 1                           8   16   tenant: BLAKE3(name), first half
//!           12    4   index of this file                  24    8   sequence: the copy with the higher one counts
//!           16    4   files of the store                  32    8   epoch of the segment's owner: lower ones are of the past
//!           20    4   segments in this file               40    4   segment, from 0 in this file
//!           24    8   segment_bytes                       44    4   page, from 0 in the segment
//!           32   16   identity of the store               48    4   slot_bytes
//!           48   32   key of all directory pages          52    4   which entries hold something, bit by bit
//!           80        zeros                               56   40   zeros
//!         4064   32   BLAKE3 of the rest                  96   32   BLAKE3, keyed, of the page with zeros here
//!                                                        128 3968   31 entries of 128
//!
//! entry      0   32   key of the block            96    4   payload bytes of the shard
//!           32   32   key of its parent          100    2   shard index
//!           64   16   namespace: root, first half 102   2   shard count
//!           80    8   root of the sum            104    1   kind, 0 attention
//!           88    8   written: number of the copy, 105  1   reuse rule, 0 prefix
//!                     the same for all its shards 106   1   1: public namespace
//!                                                107    8   fingerprint of the layout
//!                                                115   13   zeros: retention, later
//! ```
//! What the format rests on: a page that was written but not flushed may be old, new or garbage after a power cut, and a flush covers
//! all writes that had completed before it. So a page is never written over its last flushed copy; the payload needs no order at all,
//! since a slot that does not hold what its entry says fails its sum and is a miss. The key of the pages is secret: no payload can be
//! made to look like a directory.

use tender_proto::BlockKey;

use crate::device::block::PAGE_BYTES;
use crate::device::memory::Page;

/// Entries of one directory page.
pub const ENTRIES_PER_PAGE: u32 = 31;

/// Where segment 0 begins.
pub const SEGMENTS_OFFSET: u64 = 1 << 20;

const SUPERBLOCK_MAGIC: &[u8; 8] = b"TENDERKV";
const PAGE_MAGIC: &[u8; 8] = b"TDRPAGE1";
const VERSION: u32 = 1;
const ENTRY_BYTES: usize = 128;
const ENTRIES_OFFSET: usize = 128;
const PAGE_SUM: std::ops::Range<usize> = 96..128;
const SUPERBLOCK_SUM: std::ops::Range<usize> = 4064..4096;

/// The first page of a tier file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Superblock {
    /// Which file of the store.
    pub file_index: u32,
    /// Of how many.
    pub file_count: u32,
    /// Segments in this file.
    pub segment_count: u32,
    /// Bytes of each.
    pub segment_bytes: u64,
    /// Drawn at random when the store was made; the same in all its files.
    pub identity: [u8; 16],
    /// Key of all directory pages; secret.
    pub page_key: [u8; 32],
}

/// One directory page.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DirectoryPage {
    /// Whose segment.
    pub tenant: [u8; 16],
    /// Rises with every page written.
    pub sequence: u64,
    /// Rises whenever the segment changes owner.
    pub epoch: u64,
    /// Which segment of the file.
    pub segment: u32,
    /// Which page of the segment.
    pub page: u32,
    /// Bytes of the segment's slots.
    pub slot_bytes: u32,
    /// What the slots hold; 31, in order.
    pub entries: Vec<Option<Entry>>,
}

/// What a slot holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The block.
    pub key: BlockKey,
    /// The block before it, or the root.
    pub parent: BlockKey,
    /// First half of the namespace's root.
    pub namespace: [u8; 16],
    /// Sum of the shard.
    pub root: u64,
    /// Number of the copy.
    pub written: u64,
    /// Payload bytes of the shard.
    pub payload_bytes: u32,
    /// Which shard.
    pub shard_index: u16,
    /// Of how many.
    pub shard_count: u16,
    /// What the block is.
    pub kind: u8,
    /// How it is used again.
    pub reuse_rule: u8,
    /// Under a public namespace.
    pub public: bool,
    /// `BlockLayout::fingerprint` of the block's layout: sums are of no use under another.
    pub layout: u64,
}

/// Why bytes are not what they should be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FormatError {
    /// Something else.
    #[error("it does not begin as a tier file of Tender does")]
    Foreign,
    /// Another version.
    #[error("it has format version {0}, and this daemon reads version {VERSION} only")]
    Version(u32),
    /// Damaged.
    #[error("its checksum is wrong")]
    Sum,
}

/// Directory pages of a segment with that many slots (one copy of each).
pub const fn directory_pages(slots: u32) -> u32 {
    slots.div_ceil(ENTRIES_PER_PAGE)
}

/// Slots of a segment: with their directory they fit.
pub fn slots_per_segment(segment_bytes: u64, slot_bytes: u64) -> u32 {
    let directory = |slots: u64| 2 * PAGE_BYTES * slots.div_ceil(ENTRIES_PER_PAGE.into());
    let mut slots = segment_bytes / slot_bytes;
    while slots * slot_bytes + directory(slots) > segment_bytes {
        let over = slots * slot_bytes + directory(slots) - segment_bytes;
        slots -= over.div_ceil(slot_bytes + 2 * PAGE_BYTES).min(slots);
    }
    slots as u32
}

/// Where in its segment copy 0 or 1 of a page is.
pub const fn page_offset(page: u32, copy: u32) -> u64 {
    (2 * page as u64 + copy as u64) * PAGE_BYTES
}

/// Where in its segment a slot is.
pub const fn slot_offset(slots: u32, slot_bytes: u32, place: u32) -> u64 {
    page_offset(directory_pages(slots), 0) + place as u64 * slot_bytes as u64
}

struct Fields<'a> {
    bytes: &'a mut [u8],
    at: usize,
}

impl Fields<'_> {
    fn put(&mut self, field: &[u8]) {
        self.bytes[self.at..self.at + field.len()].copy_from_slice(field);
        self.at += field.len();
    }
}

fn take<const N: usize>(bytes: &[u8], at: &mut usize) -> [u8; N] {
    let mut field = [0; N];
    field.copy_from_slice(&bytes[*at..*at + N]);
    *at += N;
    field
}

impl Superblock {
    /// Where a segment of the file begins.
    pub fn segment_offset(&self, segment: u32) -> u64 {
        SEGMENTS_OFFSET + u64::from(segment) * self.segment_bytes
    }

    /// Its page.
    pub fn encode(&self) -> Box<Page> {
        let mut page = Page::zeroed();
        let mut fields = Fields { bytes: &mut page.0, at: 0 };
        fields.put(SUPERBLOCK_MAGIC);
        for number in [VERSION, self.file_index, self.file_count, self.segment_count] {
            fields.put(&number.to_le_bytes());
        }
        fields.put(&self.segment_bytes.to_le_bytes());
        fields.put(&self.identity);
        fields.put(&self.page_key);
        let sum = blake3::hash(&page.0[..SUPERBLOCK_SUM.start]);
        page.0[SUPERBLOCK_SUM].copy_from_slice(sum.as_bytes());
        page
    }

    /// The superblock of that page.
    pub fn decode(page: &[u8]) -> Result<Self, FormatError> {
        let mut at = 0;
        if take::<8>(page, &mut at) != *SUPERBLOCK_MAGIC {
            return Err(FormatError::Foreign);
        }
        let version = u32::from_le_bytes(take(page, &mut at));
        if version != VERSION {
            return Err(FormatError::Version(version));
        }
        if blake3::hash(&page[..SUPERBLOCK_SUM.start]).as_bytes()[..] != page[SUPERBLOCK_SUM] {
            return Err(FormatError::Sum);
        }
        Ok(Self {
            file_index: u32::from_le_bytes(take(page, &mut at)),
            file_count: u32::from_le_bytes(take(page, &mut at)),
            segment_count: u32::from_le_bytes(take(page, &mut at)),
            segment_bytes: u64::from_le_bytes(take(page, &mut at)),
            identity: take(page, &mut at),
            page_key: take(page, &mut at),
        })
    }
}

impl DirectoryPage {
    /// Its page, summed with the store's key.
    pub fn encode(&self, page_key: &[u8; 32]) -> Box<Page> {
        assert_eq!(self.entries.len(), ENTRIES_PER_PAGE as usize, "a page has {ENTRIES_PER_PAGE} entries");
        let mut page = Page::zeroed();
        let held = self.entries.iter().zip(0u32..).fold(0, |held, (entry, i)| held | u32::from(entry.is_some()) << i);
        let mut fields = Fields { bytes: &mut page.0, at: 0 };
        fields.put(PAGE_MAGIC);
        fields.put(&self.tenant);
        fields.put(&self.sequence.to_le_bytes());
        fields.put(&self.epoch.to_le_bytes());
        for number in [self.segment, self.page, self.slot_bytes, held] {
            fields.put(&number.to_le_bytes());
        }
        let places = page.0[ENTRIES_OFFSET..].chunks_exact_mut(ENTRY_BYTES);
        for (place, entry) in places.zip(&self.entries) {
            if let Some(entry) = entry {
                entry.encode(place);
            }
        }
        let sum = blake3::keyed_hash(page_key, &page.0);
        page.0[PAGE_SUM].copy_from_slice(sum.as_bytes());
        page
    }

    /// The directory page of these bytes; anything that was not written whole with this key is an error.
    pub fn decode(page: &[u8], page_key: &[u8; 32]) -> Result<Self, FormatError> {
        if page[..8] != *PAGE_MAGIC {
            return Err(FormatError::Foreign);
        }
        let mut summed = Page::zeroed();
        summed.0.copy_from_slice(page);
        summed.0[PAGE_SUM].fill(0);
        if blake3::keyed_hash(page_key, &summed.0).as_bytes()[..] != page[PAGE_SUM] {
            return Err(FormatError::Sum);
        }
        let mut at = 8;
        let tenant = take(page, &mut at);
        let sequence = u64::from_le_bytes(take(page, &mut at));
        let epoch = u64::from_le_bytes(take(page, &mut at));
        let [segment, number, slot_bytes, held] = std::array::from_fn(|_| u32::from_le_bytes(take(page, &mut at)));
        let places = page[ENTRIES_OFFSET..].chunks_exact(ENTRY_BYTES).zip(0u32..);
        let entries = places.map(|(place, i)| (held >> i & 1 == 1).then(|| Entry::decode(place))).collect();
        Ok(Self { tenant, sequence, epoch, segment, page: number, slot_bytes, entries })
    }
}

impl Entry {
    fn encode(&self, place: &mut [u8]) {
        let mut fields = Fields { bytes: place, at: 0 };
        fields.put(self.key.as_bytes());
        fields.put(self.parent.as_bytes());
        fields.put(&self.namespace);
        fields.put(&self.root.to_le_bytes());
        fields.put(&self.written.to_le_bytes());
        fields.put(&self.payload_bytes.to_le_bytes());
        fields.put(&self.shard_index.to_le_bytes());
        fields.put(&self.shard_count.to_le_bytes());
        fields.put(&[self.kind, self.reuse_rule, u8::from(self.public)]);
        fields.put(&self.layout.to_le_bytes());
    }

    fn decode(place: &[u8]) -> Self {
        let at = &mut 0;
        Self {
            key: BlockKey::from_bytes(take(place, at)),
            parent: BlockKey::from_bytes(take(place, at)),
            namespace: take(place, at),
            root: u64::from_le_bytes(take(place, at)),
            written: u64::from_le_bytes(take(place, at)),
            payload_bytes: u32::from_le_bytes(take(place, at)),
            shard_index: u16::from_le_bytes(take(place, at)),
            shard_count: u16::from_le_bytes(take(place, at)),
            kind: take::<1>(place, at)[0],
            reuse_rule: take::<1>(place, at)[0],
            public: take::<1>(place, at)[0] == 1,
            layout: u64::from_le_bytes(take(place, at)),
        }
    }
}

/// How a tenant is named in a directory.
pub fn tenant_tag(name: &str) -> [u8; 16] {
    let mut tag = [0; 16];
    tag.copy_from_slice(&blake3::hash(name.as_bytes()).as_bytes()[..16]);
    tag
}

#[cfg(test)]
impl Entry {
    /// A whole block whose key is this byte again and again.
    pub fn of_whole_block(key: u8, written: u64, payload_bytes: u32) -> Self {
        Self {
            key: BlockKey::from_bytes([key; 32]),
            parent: BlockKey::from_bytes([0; 32]),
            namespace: [0; 16],
            root: 0,
            written,
            payload_bytes,
            shard_index: 0,
            shard_count: 1,
            kind: 0,
            reuse_rule: 0,
            public: false,
            layout: 0,
        }
    }
}

#[cfg(test)]
mod tests;
