//! A reserved slot: memory of this process's own that the store will read a block from, until it is committed or dropped.

use std::fmt;
use std::sync::Arc;

use tender_proto::BlockKey;
use tender_proto::door::{Filled, HoldId};
use tender_proto::sum::fragment_count;

use super::connection::Connection;
use super::debts::{Debts, Held, Origin};
use super::mapping::Mapping;

/// A slot for one shard of one block, to be filled where it lies and then [committed](crate::Remote::commit). Nobody else writes there
/// meanwhile, and nobody reads it: a block is there for others when it is committed. Dropped, the reservation ends and the block is
/// nobody's; so whatever writes there (a copy engine, a kernel, another thread) must have ended before a slot is committed or dropped,
/// since the place is then another block's.
///
/// The memory stays mapped for as long as the slot lives. A reservation outlives a restart of the daemon's worker: the client confirms
/// it, and what was written there, by whatever time, is committed to the next one. It ends before its time only with the host memory
/// that it lies in, or if that restart could not take it over: [`commit`](crate::Remote::commit) then says `Gone`.
///
/// Ranges are relative to the slot; all lengths are in bytes.
pub struct Slot {
    key: BlockKey,
    mapping: Arc<Mapping>,
    offset: u64,
    bytes: usize,
    /// Of what lies there, if that is known.
    sums: Option<Vec<u64>>,
    hold: HoldId,
    /// Given back before the connection is let go of.
    reservation: Held,
    /// The daemon is not left as long as something is reserved.
    _connection: Arc<Connection>,
}

impl Slot {
    /// # Panics
    /// If it does not lie in the mapping.
    pub(super) fn new(
        key: BlockKey,
        (mapping, offset, bytes): (Arc<Mapping>, u64, usize),
        hold: HoldId,
        reservation: Held,
        connection: &Arc<Connection>,
    ) -> Self {
        assert!(mapping.holds(offset, bytes as u64), "slots were checked");
        Self { key, mapping, offset, bytes, sums: None, hold, reservation, _connection: Arc::clone(connection) }
    }

    /// Which block it is for.
    pub fn key(&self) -> BlockKey {
        self.key
    }

    /// Length: exactly that of the shard. What else there is behind it up to the end of the page is nobody's business.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Address of the first byte, which begins a page; for whoever hands addresses on (a copy engine, a system call). The bytes may be
    /// written until the slot is committed or dropped, and not after. The daemon has them mapped too, so make no `&mut [u8]` and no
    /// `&[u8]` of them.
    ///
    /// Sums known so far are forgotten, for whoever asks is about to write. Who still writes by this address after [`fill`](Self::fill) or
    /// [`set_sums`](Self::set_sums) commits other bytes than sums: such a block is a miss for other groups, and not noticed by its own.
    pub fn start(&mut self) -> *mut u8 {
        self.sums = None;
        self.mapping.start(self.offset, self.bytes).cast_mut()
    }

    /// Copies the whole shard here and sums it, in one pass: as fast as a copy alone, and nothing is left to read at the commit.
    ///
    /// # Panics
    /// If the payload has not exactly the slot's length.
    pub fn fill(&mut self, payload: &[u8]) {
        let (bytes, found) = (self.bytes, payload.len());
        assert_eq!(bytes, found, "a slot of {bytes} bytes is filled by exactly as many");
        self.sums = Some(self.mapping.fill(self.offset, payload));
    }

    /// Copies some bytes to `offset_bytes` of the slot.
    ///
    /// # Panics
    /// If they leave the slot.
    pub fn write_at(&mut self, offset_bytes: usize, bytes: &[u8]) {
        let (slot_bytes, count) = (self.bytes, bytes.len());
        let end = offset_bytes.checked_add(count);
        assert!(
            end.is_some_and(|end| end <= slot_bytes),
            "{count} bytes at {offset_bytes} leave a slot of {slot_bytes}"
        );
        self.sums = None;
        self.mapping.write(self.offset + offset_bytes as u64, bytes);
    }

    /// Says what the bytes sum to, where that is known (a GPU sums while it copies): the [fragment sums](tender_proto::sum), one for each
    /// 64 KiB in order. They are taken as given; wrong ones make the block a miss for other groups. Without them the commit reads the
    /// slot once to sum it.
    ///
    /// # Panics
    /// If there are more or fewer of them than the shard has fragments.
    pub fn set_sums(&mut self, fragment_sums: Vec<u64>) {
        let (fragments, found) = (fragment_count(self.bytes), fragment_sums.len());
        assert_eq!(fragments, found, "a shard of {} bytes has {fragments} fragments", self.bytes);
        self.sums = Some(fragment_sums);
    }

    /// Whether it can still be committed as far as is known here: not if its host memory is another now, or if the next worker did not
    /// confirm it. Whoever writes slowly may save the rest of the work.
    pub fn is_held(&self) -> bool {
        self.reservation.stands()
    }

    /// Sums what lies there, unless that is known.
    pub(crate) fn sum(&mut self) {
        let (mapping, offset, bytes) = (&self.mapping, self.offset, self.bytes);
        self.sums.get_or_insert_with(|| mapping.sums(offset, bytes));
    }

    /// Whether it was reserved by the client of these books.
    pub(crate) fn is_of(&self, debts: &Debts) -> bool {
        self.reservation.are_in(debts)
    }

    /// Whether it is held under names from there.
    pub(super) fn stands_in(&self, origin: Origin) -> bool {
        self.reservation.stands_in(origin)
    }

    /// What a commit says of it.
    ///
    /// # Panics
    /// If it was not summed.
    pub(crate) fn filled(&self) -> Filled {
        Filled { hold: self.hold, sums: self.sums.clone().expect("a slot is summed before it is committed") }
    }

    /// The daemon has ended the reservation: nothing is left to give back.
    pub(crate) fn ended(self) {
        self.reservation.ended();
    }
}

impl fmt::Debug for Slot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Slot").field("key", &self.key).field("bytes", &self.bytes).finish_non_exhaustive()
    }
}
