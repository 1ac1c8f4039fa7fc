//! Slots of one tier: segments cut into slots of one size for one tenant, a free list per shelf, a record per slot. Moves no byte and
//! knows no key; the records lie apart from the payload, in memory that no client maps.
//!
//! A segment of host memory is prepared for one tenant and free for that one only, whose file it lies in; to change its tenant it is
//! retired, free or not, and prepared anew. One of the disk is free for anybody.
//!
//! ```text
//! segment   free ──assign──► owned by a shelf (tenant, slot bytes) ──drain──► draining ──last slot freed──► retired ──ready──► free
//!             └──take_free──► retired ──ready──► free for another tenant
//! slot      Free ──reserve──► Filling ──publish──► Resident ──release──► Free        a new generation at every reserve
//!                                  └──release──► Free      └─quarantine─► Quarantined (until its segment is retired)
//! ```

use std::collections::{BTreeMap, HashMap};

use crate::limits;
use crate::names::{AttachmentId, GroupId, NodeId, SEGMENTS_MAX, SlotId, TenantId};
use crate::status::Usage;

/// What a slot is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SlotState {
    /// Nobody's.
    Free,
    /// Written by its holder (a client's put, a load, a write-back); nobody reads.
    Filling,
    /// Its shard is complete; readable.
    Resident,
    /// Held bytes that were not what was written. Not used again before its segment is.
    Quarantined,
}

/// Record of one slot.
#[derive(Clone, Copy, Debug)]
pub struct Slot {
    /// Whose block.
    pub node: NodeId,
    /// The slot of the same copy's next shard.
    pub next: SlotId,
    /// Number of its reservation, unique in the tier: with it a name is good for one reservation only.
    pub generation: u32,
    /// Leases and transfers that read it now.
    pub readers: u32,
    /// Who fills it.
    pub holder: GroupId,
    /// Sum of the shard (`proto/src/sum.rs`).
    pub root: u64,
    /// Which shard.
    pub shard_index: u8,
    /// Of how many.
    pub shard_count: u8,
    /// What it is in.
    pub state: SlotState,
    /// Given up by the index while read or filled: freed by whoever finishes last.
    pub doomed: bool,
}

/// A shelf: all segments of one owner and slot size.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ShelfId(pub u16);

/// What a shelf holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Owner {
    /// Whose.
    pub tenant: TenantId,
    /// Bytes of a slot; whole pages.
    pub slot_bytes: u32,
    /// Of ingest segments: the client that writes to them. None: only the daemon writes.
    pub writer: Option<AttachmentId>,
}

impl Owner {
    /// Of segments that only the daemon writes.
    pub fn shared(tenant: TenantId, slot_bytes: u32) -> Self {
        Self { tenant, slot_bytes, writer: None }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum SegmentState {
    /// Not prepared yet, or being zeroed.
    Retired,
    /// Ready for any shelf of its tenant.
    Free,
    /// In use.
    Owned(ShelfId),
    /// Takes no new block.
    Draining(ShelfId),
}

#[derive(Debug)]
struct Segment {
    state: SegmentState,
    /// For whom it was prepared last. None: for anybody.
    tenant: Option<TenantId>,
    slots: Vec<Slot>,
    used: u32,
    free: Vec<u32>,
}

#[derive(Debug)]
struct Shelf {
    owner: Owner,
    segments: Vec<u32>,
    /// Segments of this shelf with a free slot.
    open: Vec<u32>,
    used: u64,
}

/// How many slots of `slot_bytes` a segment takes: the tier knows (a disk segment also holds its directory).
pub type SlotsPerSegment = fn(segment_bytes: u64, slot_bytes: u64) -> u32;

/// The slots of one tier.
#[derive(Debug)]
pub struct Slab {
    segment_bytes: u64,
    slots_per_segment: SlotsPerSegment,
    segments: Vec<Segment>,
    /// Ingest segments have the numbers from here on.
    shared_count: u32,
    /// By the tenant for whom they were prepared.
    free: BTreeMap<Option<TenantId>, Vec<u32>>,
    /// Ingest segments that are ready, each for the client that has it mapped.
    free_ingest: Vec<(u32, AttachmentId)>,
    shelves: Vec<Shelf>,
    /// Names of shelves that were given up.
    free_shelves: Vec<ShelfId>,
    shelf_of: HashMap<Owner, ShelfId>,
    generation: u32,
}

impl Slab {
    /// A tier of `segment_count` segments, none of them prepared.
    pub fn new(segment_bytes: u64, segment_count: u32, slots_per_segment: SlotsPerSegment) -> Self {
        Self::with_ingest(segment_bytes, segment_count, 0, slots_per_segment)
    }

    /// A tier with `ingest_count` segments more that clients may write to, each for one of them.
    pub fn with_ingest(
        segment_bytes: u64,
        shared_count: u32,
        ingest_count: u32,
        slots_per_segment: SlotsPerSegment,
    ) -> Self {
        let segment_count = shared_count + ingest_count;
        assert!(segment_count <= SEGMENTS_MAX, "at most {SEGMENTS_MAX} segments have a name");
        let segment =
            || Segment { state: SegmentState::Retired, tenant: None, slots: Vec::new(), used: 0, free: Vec::new() };
        Self {
            segment_bytes,
            slots_per_segment,
            segments: std::iter::repeat_with(segment).take(segment_count as usize).collect(),
            shared_count,
            free: BTreeMap::new(),
            free_ingest: Vec::new(),
            shelves: Vec::new(),
            free_shelves: Vec::new(),
            shelf_of: HashMap::new(),
            generation: 0,
        }
    }

    /// Bytes of one segment.
    pub fn segment_bytes(&self) -> u64 {
        self.segment_bytes
    }

    /// Bytes of all segments that only the daemon writes.
    pub fn capacity_bytes(&self) -> u64 {
        self.segment_bytes * u64::from(self.segment_count())
    }

    /// Segments that only the daemon writes.
    pub fn segment_count(&self) -> u32 {
        self.shared_count
    }

    /// Ingest segments among all.
    pub fn ingest_segments(&self) -> std::ops::Range<u32> {
        self.shared_count..self.segments.len() as u32
    }

    /// Whether a client writes to the segment of this slot.
    pub fn is_ingest(&self, slot: SlotId) -> bool {
        slot.segment() >= self.shared_count
    }

    /// The shelf of this owner; `None` when there are too many shelves, or the slot does not fit.
    pub fn shelf(&mut self, owner: Owner) -> Option<ShelfId> {
        if let Some(&shelf) = self.shelf_of.get(&owner) {
            return Some(shelf);
        }
        let fits = (self.slots_per_segment)(self.segment_bytes, owner.slot_bytes.into()) > 0;
        if !fits {
            return None;
        }
        if self.free_shelves.is_empty() && self.shelves.len() == limits::SHELVES_MAX {
            // One that holds nothing any more.
            let unused = self.shelves().find(|(shelf, _)| self.shelves[shelf.0 as usize].segments.is_empty());
            self.give_up(unused.map(|(shelf, _)| shelf)?);
        }
        let empty = Shelf { owner, segments: Vec::new(), open: Vec::new(), used: 0 };
        let shelf = match self.free_shelves.pop() {
            Some(shelf) => {
                self.shelves[shelf.0 as usize] = empty;
                shelf
            }
            None if self.shelves.len() < limits::SHELVES_MAX => {
                self.shelves.push(empty);
                ShelfId(self.shelves.len() as u16 - 1)
            }
            None => return None,
        };
        self.shelf_of.insert(owner, shelf);
        Some(shelf)
    }

    /// All shelves with their owners.
    pub fn shelves(&self) -> impl Iterator<Item = (ShelfId, Owner)> {
        let all = self.shelves.iter().enumerate().map(|(i, shelf)| (ShelfId(i as u16), shelf.owner));
        all.filter(|(shelf, owner)| self.shelf_of.get(owner) == Some(shelf))
    }

    /// Gives up a shelf without segments.
    pub fn give_up(&mut self, shelf: ShelfId) {
        let Shelf { owner, segments, .. } = &self.shelves[shelf.0 as usize];
        if segments.is_empty() && self.shelf_of.get(owner) == Some(&shelf) {
            self.shelf_of.remove(owner);
            self.free_shelves.push(shelf);
        }
    }

    /// Whose a shelf is.
    pub fn owner(&self, shelf: ShelfId) -> Owner {
        self.shelves[shelf.0 as usize].owner
    }

    /// Segments and used slots of a shelf.
    pub fn shelf_size(&self, shelf: ShelfId) -> (usize, u64) {
        let shelf = &self.shelves[shelf.0 as usize];
        (shelf.segments.len(), shelf.used)
    }

    /// Segments of all shelves of such owners.
    pub fn segment_count_of(&self, is_one: impl Fn(&Owner) -> bool) -> usize {
        self.shelves().filter(|(_, owner)| is_one(owner)).map(|(shelf, _)| self.shelf_size(shelf).0).sum()
    }

    /// Slots of a shelf, used or not.
    pub fn shelf_slots(&self, shelf: ShelfId) -> u64 {
        let segments = &self.shelves[shelf.0 as usize].segments;
        segments.iter().map(|&segment| self.segments[segment as usize].slots.len() as u64).sum()
    }

    /// The shelf that a slot belongs to.
    pub fn shelf_of(&self, slot: SlotId) -> ShelfId {
        match self.segments[slot.segment() as usize].state {
            SegmentState::Owned(shelf) | SegmentState::Draining(shelf) => shelf,
            SegmentState::Free | SegmentState::Retired => panic!("slot {slot:?} belongs to no shelf"),
        }
    }

    /// Bytes of a slot.
    pub fn slot_bytes(&self, slot: SlotId) -> u32 {
        self.owner(self.shelf_of(slot)).slot_bytes
    }

    /// The record of a slot.
    pub fn slot(&self, slot: SlotId) -> &Slot {
        &self.segments[slot.segment() as usize].slots[slot.place() as usize]
    }

    /// The record of a slot, to be changed.
    pub fn slot_mut(&mut self, slot: SlotId) -> &mut Slot {
        &mut self.segments[slot.segment() as usize].slots[slot.place() as usize]
    }

    /// The record of a slot, if that reservation of it still stands.
    pub fn standing(&self, slot: SlotId, generation: u32) -> Option<&Slot> {
        let record = self.segments.get(slot.segment() as usize)?.slots.get(slot.place() as usize)?;
        (record.generation == generation && record.state != SlotState::Free).then_some(record)
    }

    /// The slots of one copy, shard after shard.
    pub fn chain(&self, first: SlotId) -> impl Iterator<Item = SlotId> {
        let mut next = first;
        std::iter::from_fn(move || {
            let slot = next;
            (slot != SlotId::NONE).then(|| {
                next = self.slot(slot).next;
                slot
            })
        })
    }

    /// A segment was prepared (or zeroed) and may be used: by that tenant, or by anybody.
    pub fn segment_ready(&mut self, segment: u32, tenant: Option<TenantId>) {
        assert!(segment < self.shared_count, "segment {segment} is made for one client");
        self.make_free(segment, tenant);
        self.free.entry(tenant).or_default().push(segment);
    }

    /// An ingest segment was made, and that client has it mapped.
    pub fn ingest_ready(&mut self, segment: u32, tenant: TenantId, writer: AttachmentId) {
        assert!(segment >= self.shared_count, "segment {segment} is the daemon's");
        self.make_free(segment, Some(tenant));
        self.free_ingest.push((segment, writer));
    }

    fn make_free(&mut self, segment: u32, tenant: Option<TenantId>) {
        let record = &mut self.segments[segment as usize];
        assert_eq!(record.state, SegmentState::Retired, "segment {segment} is prepared once");
        (record.state, record.tenant) = (SegmentState::Free, tenant);
    }

    /// Takes back the ingest segments that a client has mapped and does not use.
    pub fn retire_free_of(&mut self, writer: AttachmentId) -> Vec<u32> {
        let own = self.free_ingest.extract_if(.., |(_, owner)| *owner == writer);
        let own: Vec<u32> = own.map(|(segment, _)| segment).collect();
        for &segment in &own {
            self.segments[segment as usize].state = SegmentState::Retired;
        }
        own
    }

    /// Takes back one that another client than this one has mapped and does not use.
    pub fn retire_free_of_another(&mut self, writer: AttachmentId) -> Option<u32> {
        let at = self.free_ingest.iter().position(|(_, owner)| *owner != writer)?;
        let (segment, _) = self.free_ingest.remove(at);
        self.segments[segment as usize].state = SegmentState::Retired;
        Some(segment)
    }

    /// The tenant for whom a segment was prepared last.
    pub fn tenant(&self, segment: u32) -> Option<TenantId> {
        self.segments[segment as usize].tenant
    }

    /// Segments that are free for a tenant and for nobody else.
    pub fn free_count(&self, tenant: TenantId) -> usize {
        self.free.get(&Some(tenant)).map_or(0, Vec::len)
    }

    /// Takes a free segment from a tenant, to be prepared for another: it is retired now.
    #[must_use = "a retired segment must be prepared for somebody"]
    pub fn take_free(&mut self, tenant: TenantId, may: impl Fn(u32) -> bool) -> Option<u32> {
        let free = self.free.get_mut(&Some(tenant))?;
        let at = free.iter().rposition(|&segment| may(segment))?;
        let segment = free.remove(at);
        self.segments[segment as usize].state = SegmentState::Retired;
        Some(segment)
    }

    fn pop_free(&mut self, shelf: ShelfId) -> Option<u32> {
        let Owner { tenant, writer, .. } = self.owner(shelf);
        if let Some(writer) = writer {
            let at = self.free_ingest.iter().position(|(_, owner)| *owner == writer)?;
            return Some(self.free_ingest.remove(at).0);
        }
        [Some(tenant), None].into_iter().find_map(|tenant| self.free.get_mut(&tenant)?.pop())
    }

    /// Whether a slot of this shelf can be had without taking one from somebody.
    pub fn has_room(&self, shelf: ShelfId) -> bool {
        let Shelf { owner, open, .. } = &self.shelves[shelf.0 as usize];
        let is_any = |tenant| self.free.get(&tenant).is_some_and(|free| !free.is_empty());
        !open.is_empty()
            || match owner.writer {
                Some(writer) => self.free_ingest.iter().any(|(_, owner)| *owner == writer),
                None => is_any(Some(owner.tenant)) || is_any(None),
            }
    }

    /// Whether a segment of this shelf has a free slot.
    pub fn has_open(&self, shelf: ShelfId) -> bool {
        !self.shelves[shelf.0 as usize].open.is_empty()
    }

    /// Segments in use, and for which tenant.
    pub fn owned_segments(&self) -> impl Iterator<Item = (u32, TenantId)> {
        let owner = |segment: &Segment| match segment.state {
            SegmentState::Owned(shelf) | SegmentState::Draining(shelf) => Some(self.owner(shelf).tenant),
            SegmentState::Free | SegmentState::Retired => None,
        };
        self.segments.iter().zip(0u32..).filter_map(move |(segment, at)| Some((at, owner(segment)?)))
    }

    /// Whether a segment is not ready for anybody.
    pub fn is_retired(&self, segment: u32) -> bool {
        self.segments[segment as usize].state == SegmentState::Retired
    }

    /// Whether a segment takes no new block.
    pub fn is_draining(&self, segment: u32) -> bool {
        matches!(self.segments[segment as usize].state, SegmentState::Draining(_))
    }

    /// The segments of a shelf.
    pub fn segments_of(&self, shelf: ShelfId) -> Vec<u32> {
        self.shelves[shelf.0 as usize].segments.clone()
    }

    /// Segments that are not ready yet: room to come.
    pub fn retired_segments(&self) -> usize {
        let shared = &self.segments[..self.shared_count as usize];
        shared.iter().filter(|segment| segment.state == SegmentState::Retired).count()
    }

    /// Takes a free slot of the shelf for one shard of a node's copy, assigning a free segment if need be.
    pub fn reserve(&mut self, shelf: ShelfId, node: NodeId, holder: GroupId, shard: (u8, u8)) -> Option<SlotId> {
        if self.shelves[shelf.0 as usize].open.is_empty() {
            let segment = self.pop_free(shelf)?;
            self.assign(segment, shelf);
        }
        let segment = *self.shelves[shelf.0 as usize].open.last()?;
        let place = self.segments[segment as usize].free.pop().expect("an open segment has a free slot");
        Some(self.take(segment, place, shelf, node, holder, shard))
    }

    fn take(
        &mut self,
        segment: u32,
        place: u32,
        shelf: ShelfId,
        node: NodeId,
        holder: GroupId,
        (shard_index, shard_count): (u8, u8),
    ) -> SlotId {
        let record = &mut self.segments[segment as usize];
        record.used += 1;
        if record.free.is_empty() {
            self.shelves[shelf.0 as usize].open.retain(|&open| open != segment);
        }
        self.shelves[shelf.0 as usize].used += 1;
        self.generation = self.generation.wrapping_add(1);
        let slot = &mut record.slots[place as usize];
        assert_eq!(slot.state, SlotState::Free, "a free list holds free slots");
        *slot = Slot {
            node,
            next: SlotId::NONE,
            generation: self.generation,
            readers: 0,
            holder,
            root: 0,
            shard_index,
            shard_count,
            state: SlotState::Filling,
            doomed: false,
        };
        SlotId::new(segment, place)
    }

    /// Gives a segment that is free to a shelf. Used by `reserve`, and by recovery for the segment that a directory describes.
    pub fn assign(&mut self, segment: u32, shelf: ShelfId) {
        let owner = self.shelves[shelf.0 as usize].owner;
        let count = (self.slots_per_segment)(self.segment_bytes, owner.slot_bytes.into());
        let record = &mut self.segments[segment as usize];
        assert_eq!(record.state, SegmentState::Free, "segment {segment} has one owner");
        let is_theirs = record.tenant.is_none_or(|tenant| tenant == owner.tenant);
        assert!(is_theirs, "segment {segment} was prepared for {:?} and not for {:?}", record.tenant, owner.tenant);
        if let Some(free) = self.free.get_mut(&record.tenant) {
            free.retain(|&free| free != segment);
        }
        self.free_ingest.retain(|(free, _)| *free != segment);
        record.state = SegmentState::Owned(shelf);
        let free = Slot {
            node: NodeId::NONE,
            next: SlotId::NONE,
            generation: 0,
            readers: 0,
            holder: GroupId(0),
            root: 0,
            shard_index: 0,
            shard_count: 1,
            state: SlotState::Free,
            doomed: false,
        };
        record.slots = vec![free; count as usize];
        record.free = (0..count).rev().collect();
        record.used = 0;
        let shelf = &mut self.shelves[shelf.0 as usize];
        shelf.segments.push(segment);
        shelf.open.push(segment);
    }

    /// Takes one particular slot, during recovery. `None` if it is taken.
    pub fn reserve_at(&mut self, slot: SlotId, node: NodeId, shard: (u8, u8)) -> Option<()> {
        let shelf = self.shelf_of(slot);
        let record = &mut self.segments[slot.segment() as usize];
        let at = record.free.iter().rposition(|&place| place == slot.place())?;
        record.free.remove(at);
        self.take(slot.segment(), slot.place(), shelf, node, GroupId(0), shard);
        Some(())
    }

    /// Takes one particular slot as it was before a restart. Of its segment no other slot is taken until [`Slab::reopen`].
    pub fn restore(&mut self, slot: SlotId, record: Slot) {
        assert_eq!(self.slot(slot).state, SlotState::Free, "slot {slot:?} is restored once");
        self.generation = self.generation.wrapping_add(1);
        *self.slot_mut(slot) = Slot { generation: self.generation, ..record };
        let shelf = self.shelf_of(slot);
        self.segments[slot.segment() as usize].used += 1;
        self.shelves[shelf.0 as usize].used += 1;
    }

    /// The free slots of an owned segment may be taken, after those that were in use were restored.
    pub fn reopen(&mut self, segment: u32) {
        let SegmentState::Owned(shelf) = self.segments[segment as usize].state else { return };
        self.segments[segment as usize].free.clear();
        self.shelves[shelf.0 as usize].open.retain(|&open| open != segment);
        self.open(segment, shelf);
    }

    fn open(&mut self, segment: u32, shelf: ShelfId) {
        let record = &mut self.segments[segment as usize];
        let places = (0..record.slots.len() as u32).rev();
        record.free = places.filter(|&place| record.slots[place as usize].state == SlotState::Free).collect();
        if !record.free.is_empty() {
            self.shelves[shelf.0 as usize].open.push(segment);
        }
    }

    /// The shelves of one attachment are another's from now on: that of the same process. Returns those that are not, since the other
    /// has one of that size already.
    pub fn change_writer(&mut self, from: AttachmentId, to: AttachmentId) -> Vec<ShelfId> {
        let shelves = self.shelves().filter(|(_, owner)| owner.writer == Some(from)).map(|(shelf, _)| shelf);
        let mut left = Vec::new();
        for shelf in shelves.collect::<Vec<_>>() {
            let before = self.owner(shelf);
            let owner = Owner { writer: Some(to), ..before };
            if self.shelf_of.contains_key(&owner) {
                left.push(shelf);
                continue;
            }
            self.shelf_of.remove(&before);
            self.shelf_of.insert(owner, shelf);
            self.shelves[shelf.0 as usize].owner = owner;
        }
        left
    }

    /// Frees a slot; returns the segment if this was the last slot of one that drains: it is retired now.
    #[must_use = "a retired segment must be zeroed and made ready again"]
    pub fn release(&mut self, slot: SlotId) -> Option<u32> {
        let record = self.slot_mut(slot);
        assert_eq!(record.readers, 0, "slot {slot:?} is freed by its last reader");
        assert!(matches!(record.state, SlotState::Filling | SlotState::Resident), "slot {slot:?} is freed once");
        record.state = SlotState::Free;
        record.node = NodeId::NONE;
        let shelf = self.shelf_of(slot);
        self.shelves[shelf.0 as usize].used -= 1;
        let segment = &mut self.segments[slot.segment() as usize];
        segment.used -= 1;
        match segment.state {
            SegmentState::Draining(_) => self.retire_if_drained(slot.segment()),
            _ => {
                segment.free.push(slot.place());
                if segment.free.len() == 1 {
                    self.shelves[shelf.0 as usize].open.push(slot.segment());
                }
                None
            }
        }
    }

    /// Takes a slot out of use until its segment changes owner. The record's readers must be gone.
    #[must_use = "a retired segment must be zeroed and made ready again"]
    pub fn quarantine(&mut self, slot: SlotId) -> Option<u32> {
        let shelf = self.shelf_of(slot);
        let record = self.slot_mut(slot);
        assert_eq!(record.readers, 0, "slot {slot:?} is quarantined by its last reader");
        record.state = SlotState::Quarantined;
        record.node = NodeId::NONE;
        self.shelves[shelf.0 as usize].used -= 1;
        let segment = &mut self.segments[slot.segment() as usize];
        segment.used -= 1;
        if matches!(segment.state, SegmentState::Draining(_)) { self.retire_if_drained(slot.segment()) } else { None }
    }

    /// Stops new blocks from entering the shelf's emptiest segment, so that it can change owner. Returns it, and whether it is empty
    /// already (and thus retired).
    pub fn drain_emptiest(&mut self, shelf: ShelfId, may: impl Fn(u32) -> bool) -> Option<(u32, bool)> {
        let segments = &self.shelves[shelf.0 as usize].segments;
        let may_drain = |segment: &&u32| may(**segment) && !self.is_draining(**segment);
        let segment =
            *segments.iter().filter(may_drain).min_by_key(|&&segment| self.segments[segment as usize].used)?;
        Some((segment, self.drain(segment)))
    }

    /// Stops new blocks from entering an owned segment. Returns whether it is empty already (and thus retired).
    pub fn drain(&mut self, segment: u32) -> bool {
        let SegmentState::Owned(shelf) = self.segments[segment as usize].state else { return false };
        self.segments[segment as usize].state = SegmentState::Draining(shelf);
        self.segments[segment as usize].free.clear();
        self.shelves[shelf.0 as usize].open.retain(|&open| open != segment);
        self.retire_if_drained(segment).is_some()
    }

    /// New blocks may enter a segment again.
    pub fn undrain(&mut self, segment: u32) {
        let record = &mut self.segments[segment as usize];
        let SegmentState::Draining(shelf) = record.state else { return };
        record.state = SegmentState::Owned(shelf);
        self.open(segment, shelf);
    }

    /// Used slots of a segment.
    pub fn used_count(&self, segment: u32) -> u64 {
        self.segments[segment as usize].used.into()
    }

    fn retire_if_drained(&mut self, segment: u32) -> Option<u32> {
        let record = &mut self.segments[segment as usize];
        let SegmentState::Draining(shelf) = record.state else { return None };
        if record.used > 0 {
            return None;
        }
        record.state = SegmentState::Retired;
        self.shelves[shelf.0 as usize].segments.retain(|&owned| owned != segment);
        // A client's shelf goes with its last segment; the daemon's own sizes come again.
        if self.owner(shelf).writer.is_some() {
            self.give_up(shelf);
        }
        Some(segment)
    }

    /// Used slots of a segment, from `place` on.
    pub fn used_slots(&self, segment: u32, place: u32) -> impl Iterator<Item = SlotId> {
        let slots = &self.segments[segment as usize].slots;
        let used = |slot: &Slot| matches!(slot.state, SlotState::Filling | SlotState::Resident);
        let places = slots.iter().zip(0u32..).skip(place as usize);
        places.filter(move |(slot, _)| used(slot)).map(move |(_, place)| SlotId::new(segment, place))
    }

    /// Used slots of a shelf.
    pub fn slots_of(&self, shelf: ShelfId) -> impl Iterator<Item = SlotId> {
        self.shelves[shelf.0 as usize].segments.iter().flat_map(|&segment| self.used_slots(segment, 0))
    }

    /// Slots that a segment is cut into; 0 while nobody owns it.
    pub fn slot_count(&self, segment: u32) -> u32 {
        match self.segments[segment as usize].state {
            SegmentState::Owned(_) | SegmentState::Draining(_) => self.segments[segment as usize].slots.len() as u32,
            SegmentState::Free | SegmentState::Retired => 0,
        }
    }

    /// What is in use.
    pub fn usage(&self) -> Usage {
        let mut usage = self.usage_of(|owner| owner.writer.is_none());
        let ready = self.shared_count as usize - self.retired_segments();
        usage.ready_bytes = ready as u64 * self.segment_bytes;
        usage
    }

    /// What is in use of ingest segments, and how many of them there are.
    pub fn ingest_usage(&self) -> Usage {
        let mut usage = self.usage_of(|owner| owner.writer.is_some());
        let ingest = &self.segments[self.shared_count as usize..];
        let ready = ingest.iter().filter(|segment| segment.state != SegmentState::Retired).count();
        usage.ready_bytes = ready as u64 * self.segment_bytes;
        usage
    }

    fn usage_of(&self, wanted: impl Fn(&Owner) -> bool) -> Usage {
        let mut usage = Usage::default();
        for shelf in self.shelves.iter().filter(|shelf| wanted(&shelf.owner)) {
            usage.used_slots += shelf.used;
            usage.used_bytes += shelf.used * u64::from(shelf.owner.slot_bytes);
            usage.slots += shelf.segments.iter().map(|&s| self.segments[s as usize].slots.len() as u64).sum::<u64>();
        }
        usage
    }
}

#[cfg(test)]
mod tests;
