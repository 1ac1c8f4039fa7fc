//! The records of host memory that outlive the worker, version 1: what lies in which slot, who may write to which segment, who holds
//! what. A table of 64-bit words, numbers as the machine has them (which it never leaves), bytes of keys and tags little-endian;
//! offsets in bytes.
//!
//! ```text
//! table      0        header                    4096
//!            4096     attachments                128 each, 8,192 places: 1 MiB
//!            then     grants                      32 each, 1 Mi places: 32 MiB
//!            then     segments                    64 each, then zeros up to a whole page
//!            then     slots of segment 0, 1 …    128 each, as many places as a segment has pages: 1/32 of the segment
//!
//! header     0    8   "TENDERT1", written last   attachment  0    8   seal: state 1 when there is one
//!            8    8   segment_bytes                          8    8   its name
//!           16    4   segments of shared memory             16    8   the one whose place it took, or 0
//!           20    4   segments of ingest memory             24   16   tenant: BLAKE3(name), first half
//!           24    4   places of grants                      40   16   group: BLAKE3(name), first half
//!           28    4   places of attachments                 56   16   namespace: root, first half
//!           32    8   grants: places ever used              72    8   fingerprint of the layout
//!           40    8   attachments: places ever used         80    4   number of the group
//!           48        zeros                                 84    1   1: public namespace
//!                                                           85        zeros
//!
//! grant      0    1   state: 0 ended, 1 lease,   segment     0    8   seal: state 0 never used, 1 to be overwritten, 2 ready,
//!                     2 reservation                                   3 owned
//!            1    3   check                                  8   16   tenant: BLAKE3(name), first half
//!            4    4   generation of the hold                24    8   bytes of a slot
//!            8    8   attachment that holds it              32    8   of ingest segments: the attachment that writes
//!           16    4   slot                                  40        zeros
//!           20    4   number of the group
//!           24    8   copy that lies in the slot
//!
//! slot       0    8   seal: state 0 free, 1 filling (a client), 2 loading (a disk), 3 copying (the daemon), 4 resident;
//!                     + 128: given up, kept for who still uses it
//!            8   32   key of the block          104    8   copy: rises with every copy, the same for all its shards
//!           40   32   key of its parent         112    4   number of the group that filled it
//!           72   16   namespace: root, first    116    1   shard index
//!                     half                      117    1   shard count
//!           88    8   fingerprint of the layout 118    1   kind, 0 attention
//!           96    8   root of the sum           119    1   reuse rule, 0 prefix; + 128: public namespace
//!                                               120    4   payload bytes of the shard
//!                                               124    4   zeros
//!
//! seal       0    1   state
//!            1    7   check over state, place and the other words, without those that change while it stands: the root of a slot
//!                     that is not resident, the attachment of a grant, the writer of a segment
//! ```
//! **Half-written.** A worker may die between any two stores. Each is a release store, so that what is found later is a prefix of
//! them. The other words of a record change only while its seal says that there is none; a seal is one word and is stored last; a
//! state that follows another (filling, resident, given up, free) is one store of the seal. The three words outside of the check are
//! stored whole, and each of their values is a true one.
//!
//! **Size.** 128 bytes for a slot, 32 for each hold in place, 128 for a local process, 64 for a segment. The file is sparse: address
//! space for slots of 4 KiB is 1/32 of memory, but what slots of 64 KiB take is 1/512.

use std::ops::Deref;
use std::sync::atomic::{AtomicU64, Ordering};

use tender_proto::BlockKey;
use tender_proto::sum::{GOLDEN, mix};

use crate::device::block::PAGE_BYTES;
use crate::limits;
use crate::names::{AttachmentId, GroupId, Hold, SlotId};

const MAGIC: u64 = u64::from_le_bytes(*b"TENDERT1");
const WORD_BYTES: u64 = 8;
const HEADER_WORDS: usize = PAGE_BYTES as usize / 8;
const ATTACHMENT_WORDS: usize = 16;
const GRANT_WORDS: usize = 4;
const SEGMENT_WORDS: usize = 8;
const SLOT_WORDS: usize = 16;
/// Words of the header.
const GRANTS_USED: usize = 4;
const ATTACHMENTS_USED: usize = 5;
/// Words of a slot.
const ROOT: usize = 12;
/// Words of a segment.
const WRITER: usize = 4;
/// In the state of a slot.
const DOOMED: u8 = 0x80;
/// In the reuse rule of a slot.
const PUBLIC: u8 = 0x80;

/// Places of attachments: each that is there may just be taking the place of one from before a restart.
pub const ATTACHMENT_PLACES: usize = 2 * limits::ATTACHMENTS_MAX;

/// The words that records are kept in.
pub trait Words: Send {
    /// How many.
    fn count(&self) -> usize;

    /// The word at a place.
    fn load(&self, place: usize) -> u64;

    /// Stores a word whole. Whoever finds it, after whatever end of this process, finds all that were stored before it.
    fn store(&self, place: usize, word: u64);
}

impl<T: Deref<Target = [AtomicU64]> + Send> Words for T {
    fn count(&self) -> usize {
        self.len()
    }

    fn load(&self, place: usize) -> u64 {
        self[place].load(Ordering::Acquire)
    }

    fn store(&self, place: usize, word: u64) {
        self[place].store(word, Ordering::Release);
    }
}

/// Of what memory these are the records.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Bytes of a segment.
    pub segment_bytes: u64,
    /// Segments that only the daemon writes.
    pub shared_count: u32,
    /// Segments that clients write.
    pub ingest_count: u32,
}

impl Geometry {
    fn segment_count(self) -> usize {
        self.shared_count as usize + self.ingest_count as usize
    }

    fn slots_per_segment(self) -> usize {
        (self.segment_bytes / PAGE_BYTES) as usize
    }

    fn attachments(self) -> usize {
        HEADER_WORDS
    }

    fn grants(self) -> usize {
        self.attachments() + ATTACHMENT_PLACES * ATTACHMENT_WORDS
    }

    fn segments(self) -> usize {
        self.grants() + limits::GRANTS_MAX * GRANT_WORDS
    }

    fn slots(self) -> usize {
        self.segments() + (self.segment_count() * SEGMENT_WORDS).next_multiple_of(HEADER_WORDS)
    }

    /// Bytes of the table, whole pages.
    pub fn table_bytes(self) -> u64 {
        let words = self.slots() + self.segment_count() * self.slots_per_segment() * SLOT_WORDS;
        (words as u64 * WORD_BYTES).next_multiple_of(PAGE_BYTES)
    }
}

/// Why a table cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TableError {
    /// Too small.
    #[error("it has {words} words, and these records take {wanted}; make a table of {} bytes", wanted * 8)]
    Small {
        /// As found.
        words: usize,
        /// As needed.
        wanted: usize,
    },
    /// Of another version.
    #[error("it is of another version than this daemon's; start without host memory of the former one")]
    Version,
    /// Of other memory.
    #[error(
        "it was made for other memory (words {found:x?}, and the configuration asks for {wanted:x?}); restore the old sizes, or \
         start without host memory of the former daemon"
    )]
    Geometry {
        /// As found.
        found: [u64; 3],
        /// As configured.
        wanted: [u64; 3],
    },
}

/// A record that is not what was written: a fault of memory, or of the daemon.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Damaged;

/// What a slot is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SlotUse {
    /// A client fills it: in place if a grant names it, or through a stream of the worker.
    Filling = 1,
    /// A disk writes to it, maybe still when the worker is dead.
    Loading = 2,
    /// The worker itself copies to it.
    Copying = 3,
    /// It holds its shard.
    Resident = 4,
}

/// What is in a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SlotRecord {
    /// What it is in.
    pub used: SlotUse,
    /// Nobody finds it any more: it is kept for who fills or reads it.
    pub doomed: bool,
    /// The block.
    pub key: BlockKey,
    /// The block before it; zeros when not known.
    pub parent: BlockKey,
    /// First half of the namespace's root.
    pub namespace: [u8; 16],
    /// Fingerprint of the block's layout.
    pub layout: u64,
    /// Sum of the shard, once resident.
    pub root: u64,
    /// Number of the copy.
    pub copy: u64,
    /// Who fills or filled it.
    pub holder: GroupId,
    /// Which shard.
    pub shard_index: u8,
    /// Of how many.
    pub shard_count: u8,
    /// What the block is.
    pub kind: u8,
    /// How it is used again.
    pub reuse_rule: u8,
    /// Under a public namespace.
    pub public: bool,
    /// Bytes of the shard.
    pub payload_bytes: u32,
}

/// What a segment is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SegmentRecord {
    /// Nobody has had it.
    Unused,
    /// Holds what a former owner left.
    Dirty,
    /// Ready for anybody.
    Ready,
    /// Cut into slots for this tenant.
    Owned {
        /// Whose.
        tenant: [u8; 16],
        /// Bytes of a slot.
        slot_bytes: u32,
        /// Of ingest segments: who writes to it.
        writer: AttachmentId,
    },
}

/// A reservation or lease in place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GrantRecord {
    /// To fill the slot, or else to read it.
    pub is_reservation: bool,
    /// The member that asked for it.
    pub attachment: AttachmentId,
    /// Its group.
    pub group: GroupId,
    /// The slot.
    pub slot: SlotId,
    /// The copy in it.
    pub copy: u64,
}

/// A process that writes and reads in place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AttachmentRecord {
    /// Its name.
    pub id: AttachmentId,
    /// The one whose place it took.
    pub former: Option<AttachmentId>,
    /// Whose.
    pub tenant: [u8; 16],
    /// Its group.
    pub group_tag: [u8; 16],
    /// The group's number, as slots and grants name it.
    pub group: GroupId,
    /// First half of its namespace's root.
    pub namespace: [u8; 16],
    /// The namespace is public.
    pub public: bool,
    /// Fingerprint of the layout.
    pub layout: u64,
}

/// The records.
pub struct Records {
    words: Box<dyn Words>,
    geometry: Geometry,
    is_new: bool,
    /// The number of the last copy.
    last_copy: u64,
    /// Free places of attachments below the highest that was ever used.
    free_attachments: Vec<usize>,
}

impl std::fmt::Debug for Records {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Records").field("geometry", &self.geometry).finish_non_exhaustive()
    }
}

/// Seven bytes over a state, a place and words.
fn check(state: u8, place: usize, words: impl Iterator<Item = u64>) -> u64 {
    let seed = mix(place as u64 ^ u64::from(state) << 56);
    words.fold(seed, |sum, word| mix(sum ^ word).wrapping_add(GOLDEN)) >> 8
}

fn low(word: u64) -> u32 {
    word as u32
}

fn high(word: u64) -> u32 {
    (word >> 32) as u32
}

fn two(low: u32, high: u32) -> u64 {
    u64::from(low) | u64::from(high) << 32
}

fn words_of<const N: usize>(bytes: &[u8]) -> [u64; N] {
    let (words, _) = bytes.as_chunks::<8>();
    std::array::from_fn(|i| u64::from_le_bytes(words[i]))
}

fn tag_of(words: &[u64]) -> [u8; 16] {
    let mut tag = [0; 16];
    tag[..8].copy_from_slice(&words[0].to_le_bytes());
    tag[8..].copy_from_slice(&words[1].to_le_bytes());
    tag
}

fn key_of(words: &[u64]) -> BlockKey {
    let mut key = [0; 32];
    for (bytes, word) in key.as_chunks_mut::<8>().0.iter_mut().zip(words) {
        *bytes = word.to_le_bytes();
    }
    BlockKey::from_bytes(key)
}

impl SlotRecord {
    fn state(&self) -> u8 {
        self.used as u8 | if self.doomed { DOOMED } else { 0 }
    }

    fn encode(&self) -> [u64; SLOT_WORDS] {
        let mut words = [0; SLOT_WORDS];
        words[1..5].copy_from_slice(&words_of::<4>(self.key.as_bytes()));
        words[5..9].copy_from_slice(&words_of::<4>(self.parent.as_bytes()));
        words[9..11].copy_from_slice(&words_of::<2>(&self.namespace));
        words[11] = self.layout;
        words[ROOT] = self.root;
        words[13] = self.copy;
        let rule = self.reuse_rule | if self.public { PUBLIC } else { 0 };
        words[14] = two(self.holder.0, u32::from_le_bytes([self.shard_index, self.shard_count, self.kind, rule]));
        words[15] = self.payload_bytes.into();
        words
    }

    fn decode(words: &[u64; SLOT_WORDS]) -> Result<Self, Damaged> {
        let state = words[0] as u8;
        let used = match state & !DOOMED {
            1 => SlotUse::Filling,
            2 => SlotUse::Loading,
            3 => SlotUse::Copying,
            4 => SlotUse::Resident,
            _ => return Err(Damaged),
        };
        let [shard_index, shard_count, kind, rule] = high(words[14]).to_le_bytes();
        Ok(Self {
            used,
            doomed: state & DOOMED != 0,
            key: key_of(&words[1..5]),
            parent: key_of(&words[5..9]),
            namespace: tag_of(&words[9..11]),
            layout: words[11],
            root: words[ROOT],
            copy: words[13],
            holder: GroupId(low(words[14])),
            shard_index,
            shard_count,
            kind,
            reuse_rule: rule & !PUBLIC,
            public: rule & PUBLIC != 0,
            payload_bytes: low(words[15]),
        })
    }
}

/// A slot's words without the seal, and without the root unless that is there to stay.
fn summed(state: u8, words: &[u64; SLOT_WORDS]) -> impl Iterator<Item = u64> {
    let is_resident = state & !DOOMED == SlotUse::Resident as u8;
    (1..SLOT_WORDS).filter(move |&at| is_resident || at != ROOT).map(|at| words[at])
}

impl Records {
    /// The records in these words: new ones if they are all zeros, or those that a former worker kept.
    pub fn open(words: Box<dyn Words>, geometry: Geometry) -> Result<Self, TableError> {
        let wanted = (geometry.table_bytes() / WORD_BYTES) as usize;
        if words.count() < wanted {
            return Err(TableError::Small { words: words.count(), wanted });
        }
        let places = two(limits::GRANTS_MAX as u32, ATTACHMENT_PLACES as u32);
        let described = [geometry.segment_bytes, two(geometry.shared_count, geometry.ingest_count), places];
        let is_new = match words.load(0) {
            0 => {
                (1..).zip(described).for_each(|(at, word)| words.store(at, word));
                words.store(0, MAGIC);
                true
            }
            MAGIC => {
                let found = std::array::from_fn(|at| words.load(1 + at));
                if found != described {
                    return Err(TableError::Geometry { found, wanted: described });
                }
                false
            }
            _ => return Err(TableError::Version),
        };
        let mut records = Self { words, geometry, is_new, last_copy: 0, free_attachments: Vec::new() };
        let used = records.words.load(ATTACHMENTS_USED) as usize;
        let free = (0..used.min(ATTACHMENT_PLACES))
            .rev()
            .filter(|&place| records.words.load(records.attachment_at(place)) == 0);
        records.free_attachments = free.collect();
        Ok(records)
    }

    /// Whether nothing was ever recorded.
    pub fn is_new(&self) -> bool {
        self.is_new
    }

    /// A number for a copy, above all before it.
    pub fn next_copy(&mut self) -> u64 {
        self.last_copy += 1;
        self.last_copy
    }

    /// Copies up to this number were found.
    pub fn copies_from(&mut self, copy: u64) {
        self.last_copy = self.last_copy.max(copy);
    }

    fn read<const N: usize>(&self, at: usize) -> [u64; N] {
        std::array::from_fn(|word| self.words.load(at + word))
    }

    /// Stores the words of a record, the first of them last.
    fn write(&self, at: usize, words: &[u64]) {
        for (word, &value) in words.iter().enumerate().skip(1) {
            self.words.store(at + word, value);
        }
        self.words.store(at, words[0]);
    }

    fn slot_at(&self, slot: SlotId) -> usize {
        let place = slot.segment() as usize * self.geometry.slots_per_segment() + slot.place() as usize;
        self.geometry.slots() + place * SLOT_WORDS
    }

    fn seal_slot(&self, at: usize, state: u8, words: &[u64; SLOT_WORDS]) {
        self.words.store(at, check(state, at, summed(state, words)) << 8 | u64::from(state));
    }

    /// A free slot is taken.
    pub fn fill(&mut self, slot: SlotId, record: &SlotRecord) {
        let at = self.slot_at(slot);
        assert_eq!(self.words.load(at), 0, "the record of slot {slot:?} changes while it says that there is none");
        let (state, mut words) = (record.state(), record.encode());
        words[0] = check(state, at, summed(state, &words)) << 8 | u64::from(state);
        self.write(at, &words);
    }

    /// A slot holds its shard, of which that is the sum.
    pub fn resident(&mut self, slot: SlotId, root: u64) {
        let at = self.slot_at(slot);
        self.words.store(at + ROOT, root);
        let words = self.read(at);
        self.seal_slot(at, SlotUse::Resident as u8 | words[0] as u8 & DOOMED, &words);
    }

    /// A slot is given up while somebody uses it.
    pub fn doom(&mut self, slot: SlotId) {
        let at = self.slot_at(slot);
        let words: [u64; SLOT_WORDS] = self.read(at);
        self.seal_slot(at, words[0] as u8 | DOOMED, &words);
    }

    /// A slot is nobody's.
    pub fn free(&mut self, slot: SlotId) {
        let at = self.slot_at(slot);
        // What was taken and given back at once was never recorded.
        if self.words.load(at) != 0 {
            self.words.store(at, 0);
        }
    }

    /// What is in a slot; `None` when it is free.
    pub fn slot(&self, slot: SlotId) -> Result<Option<SlotRecord>, Damaged> {
        let at = self.slot_at(slot);
        let seal = self.words.load(at);
        if seal == 0 {
            return Ok(None);
        }
        let words = self.read(at);
        let state = seal as u8;
        if check(state, at, summed(state, &words)) != seal >> 8 {
            return Err(Damaged);
        }
        SlotRecord::decode(&words).map(Some)
    }

    fn segment_at(&self, segment: u32) -> usize {
        self.geometry.segments() + segment as usize * SEGMENT_WORDS
    }

    /// A segment changes its state. One that is owned gets no other owner before it had none.
    pub fn set_segment(&mut self, segment: u32, record: SegmentRecord) {
        let at = self.segment_at(segment);
        let mut words = [0; SEGMENT_WORDS];
        let state = match record {
            SegmentRecord::Unused => 0,
            SegmentRecord::Dirty => 1,
            SegmentRecord::Ready => 2,
            SegmentRecord::Owned { tenant, slot_bytes, writer } => {
                words[1..3].copy_from_slice(&words_of::<2>(&tenant));
                words[3] = slot_bytes.into();
                words[WRITER] = writer.0;
                3
            }
        };
        words[0] = check(state, at, words[1..WRITER].iter().copied()) << 8 | u64::from(state);
        if state == 3 {
            self.write(at, &words);
        } else {
            self.words.store(at, words[0]);
        }
    }

    /// Whether a segment is recorded as somebody's.
    pub fn is_owned(&self, segment: u32) -> bool {
        self.words.load(self.segment_at(segment)) as u8 == 3
    }

    /// Another attachment writes to an owned segment: that of the same process.
    pub fn set_writer(&mut self, segment: u32, writer: AttachmentId) {
        self.words.store(self.segment_at(segment) + WRITER, writer.0);
    }

    /// What a segment is in.
    pub fn segment(&self, segment: u32) -> Result<SegmentRecord, Damaged> {
        let at = self.segment_at(segment);
        let words: [u64; SEGMENT_WORDS] = self.read(at);
        let state = words[0] as u8;
        let covered = if state == 3 { &words[1..WRITER] } else { &[0; WRITER - 1][..] };
        if words[0] == 0 {
            return Ok(SegmentRecord::Unused);
        }
        if check(state, at, covered.iter().copied()) != words[0] >> 8 {
            return Err(Damaged);
        }
        match state {
            1 => Ok(SegmentRecord::Dirty),
            2 => Ok(SegmentRecord::Ready),
            3 => Ok(SegmentRecord::Owned {
                tenant: tag_of(&words[1..3]),
                slot_bytes: low(words[3]),
                writer: AttachmentId(words[WRITER]),
            }),
            _ => Err(Damaged),
        }
    }

    fn grant_at(&self, place: u32) -> usize {
        self.geometry.grants() + place as usize * GRANT_WORDS
    }

    fn grant_seal(&self, at: usize, generation: u32, record: &GrantRecord) -> u64 {
        let state = 1 + u8::from(record.is_reservation);
        let words = [u64::from(generation), two(record.slot.number(), record.group.0), record.copy];
        two((check(state, at, words.into_iter()) as u32) << 8 | u32::from(state), generation)
    }

    /// A hold stands for that.
    pub fn grant(&mut self, hold: Hold, record: &GrantRecord) {
        let used = u64::from(hold.place) + 1;
        if self.words.load(GRANTS_USED) < used {
            self.words.store(GRANTS_USED, used);
        }
        let at = self.grant_at(hold.place);
        let seal = self.grant_seal(at, hold.generation, record);
        self.write(at, &[seal, record.attachment.0, two(record.slot.number(), record.group.0), record.copy]);
    }

    /// A hold stands for nothing any more; its name does not come again.
    pub fn end_grant(&mut self, hold: Hold) {
        self.words.store(self.grant_at(hold.place), two(0, hold.generation));
    }

    /// Another attachment has a hold: that of the same process.
    pub fn set_grant_attachment(&mut self, hold: Hold, attachment: AttachmentId) {
        self.words.store(self.grant_at(hold.place) + 1, attachment.0);
    }

    /// Every hold that ever was, with what it stands for; `None` when it has ended, or cannot be read.
    pub fn grants(&self) -> impl Iterator<Item = (Hold, Option<GrantRecord>)> {
        let used = self.words.load(GRANTS_USED).min(limits::GRANTS_MAX as u64) as u32;
        (0..used).map(|place| {
            let at = self.grant_at(place);
            let words: [u64; GRANT_WORDS] = self.read(at);
            let hold = Hold { place, generation: high(words[0]) };
            let record = GrantRecord {
                is_reservation: words[0] as u8 == 2,
                attachment: AttachmentId(words[1]),
                group: GroupId(high(words[2])),
                slot: SlotId::from_number(low(words[2])),
                copy: words[3],
            };
            let stands = words[0] == self.grant_seal(at, hold.generation, &record);
            (hold, stands.then_some(record))
        })
    }

    fn attachment_at(&self, place: usize) -> usize {
        self.geometry.attachments() + place * ATTACHMENT_WORDS
    }

    /// A process reads and writes in place from now on; `None` when there are too many.
    pub fn attach(&mut self, record: &AttachmentRecord) -> Option<()> {
        let place = match self.free_attachments.pop() {
            Some(place) => place,
            None => {
                let used = self.words.load(ATTACHMENTS_USED) as usize;
                if used >= ATTACHMENT_PLACES {
                    return None;
                }
                self.words.store(ATTACHMENTS_USED, used as u64 + 1);
                used
            }
        };
        let at = self.attachment_at(place);
        let mut words = [0; ATTACHMENT_WORDS];
        words[1] = record.id.0;
        words[2] = record.former.map_or(0, |former| former.0);
        words[3..5].copy_from_slice(&words_of::<2>(&record.tenant));
        words[5..7].copy_from_slice(&words_of::<2>(&record.group_tag));
        words[7..9].copy_from_slice(&words_of::<2>(&record.namespace));
        words[9] = record.layout;
        words[10] = two(record.group.0, record.public.into());
        words[0] = check(1, at, words[1..].iter().copied()) << 8 | 1;
        self.write(at, &words);
        Some(())
    }

    /// A process reads and writes in place no more.
    pub fn detach(&mut self, id: AttachmentId) {
        let found = self.attachment_places().find(|(_, record)| record.is_ok_and(|record| record.id == id));
        if let Some((place, _)) = found {
            self.words.store(self.attachment_at(place), 0);
            self.free_attachments.push(place);
        }
    }

    fn attachment_places(&self) -> impl Iterator<Item = (usize, Result<AttachmentRecord, Damaged>)> {
        let used = (self.words.load(ATTACHMENTS_USED) as usize).min(ATTACHMENT_PLACES);
        (0..used).filter_map(|place| {
            let at = self.attachment_at(place);
            let words: [u64; ATTACHMENT_WORDS] = self.read(at);
            if words[0] == 0 {
                return None;
            }
            if words[0] != check(1, at, words[1..].iter().copied()) << 8 | 1 {
                return Some((place, Err(Damaged)));
            }
            let record = AttachmentRecord {
                id: AttachmentId(words[1]),
                former: (words[2] != 0).then_some(AttachmentId(words[2])),
                tenant: tag_of(&words[3..5]),
                group_tag: tag_of(&words[5..7]),
                group: GroupId(low(words[10])),
                namespace: tag_of(&words[7..9]),
                public: high(words[10]) == 1,
                layout: words[9],
            };
            Some((place, Ok(record)))
        })
    }

    /// All processes that read and write in place.
    pub fn attachments(&self) -> impl Iterator<Item = Result<AttachmentRecord, Damaged>> {
        self.attachment_places().map(|(_, record)| record)
    }
}

#[cfg(test)]
mod tests;
