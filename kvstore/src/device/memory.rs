//! Payload memory: an arena of segments, reserved at start, prepared one by one in the background, then never moved.
//!
//! Who may touch which bytes is decided by the core alone: an extent is written only by the holder of its reservation (a put, or a load
//! from disk) and read only while leased or in write-back. This file moves bytes and knows nothing of that; it hands out no reference
//! into the arena that outlives a call.

#![expect(unsafe_code, reason = "moves bytes between slices and memory that other threads and the kernel use too")]

use std::io;
use std::ops::{Deref, DerefMut};
use std::{ptr, slice};

use memmap2::{Advice, MmapMut, MmapOptions, MmapRaw};
use rustix::io::Errno;
use tender_proto::sum::{FRAGMENT_BYTES, fragment_sum};

use super::block::PAGE_BYTES;

/// Most bytes of one segment: the most that one io_uring buffer may have, and less than what an extent's `u32` can say.
pub const SEGMENT_BYTES_MAX: u64 = 1 << 30;

/// Populated in one call. The address space is locked for reading meanwhile, so that other threads' `mmap` wait for no more than this.
const POPULATE_BYTES: usize = 16 << 20;

/// Below this no huge page fits.
const HUGE_PAGE_BYTES: u64 = 2 << 20;

/// A piece of one segment: whole pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Extent {
    /// Which segment.
    pub segment: u32,
    /// Bytes from its start; a multiple of `PAGE_BYTES`.
    pub offset: u32,
    /// Length; a multiple of `PAGE_BYTES`.
    pub bytes: u32,
}

/// One page of metadata, aligned for O_DIRECT.
#[repr(C, align(4096))]
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Page(pub [u8; PAGE_BYTES as usize]);

impl Page {
    /// A page of zeros.
    pub fn zeroed() -> Box<Self> {
        Box::new(Self([0; PAGE_BYTES as usize]))
    }
}

/// What was had for a segment; for people, and for the choice of registering it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Prepared {
    /// Its pages exist; otherwise each is made at its first use, slowly.
    pub populated: bool,
    /// It cannot be swapped out.
    pub locked: bool,
    /// Huge pages were asked for and the system gives them where it has some.
    pub huge_pages: bool,
}

/// The segments. Shared by threads; exclusive use of an extent is the core's promise, see the module's head.
#[derive(Debug)]
pub struct Arena {
    segment_bytes: u64,
    segments: Vec<MmapRaw>,
    huge_pages_allowed: bool,
}

impl Arena {
    /// Reserves addresses and nothing else: however large, it takes no memory and no time until segments are prepared.
    pub fn new(segment_bytes: u64, segment_count: u32) -> io::Result<Self> {
        if segment_bytes == 0 || segment_bytes > SEGMENT_BYTES_MAX || !segment_bytes.is_multiple_of(PAGE_BYTES) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!(
                    "a segment of {segment_bytes} bytes cannot be had: choose a multiple of {PAGE_BYTES} up to {SEGMENT_BYTES_MAX}"
                ),
            ));
        }
        let segments = (0..segment_count)
            .map(|_| MmapOptions::new().len(segment_bytes as usize).no_reserve_swap().map_anon().map(MmapRaw::from))
            .collect::<io::Result<Vec<_>>>()?;
        Ok(Self { segment_bytes, segments, huge_pages_allowed: huge_pages_allowed() })
    }

    /// Bytes of each segment.
    pub fn segment_bytes(&self) -> u64 {
        self.segment_bytes
    }

    /// Number of segments.
    pub fn segment_count(&self) -> u32 {
        self.segments.len() as u32
    }

    /// Makes a fresh segment fit for use: huge pages and no inheritance by forked children where the system knows them, pages made now
    /// rather than at first use, locked where allowed. Takes seconds per GiB; contents are zero afterwards. Once per segment, before
    /// anybody uses it.
    pub fn prepare(&self, segment: u32) -> Prepared {
        let memory = self.segment(segment);
        let huge_pages =
            self.huge_pages_allowed && self.segment_bytes >= HUGE_PAGE_BYTES && memory.advise(Advice::HugePage).is_ok();
        if let Err(error) = memory.advise(Advice::DontFork) {
            tracing::warn!(segment, %error, "a forked child would inherit payload memory: the system refuses MADV_DONTFORK");
        }
        let populated = populate(memory);
        if let Err(error) = &populated {
            tracing::warn!(
                segment,
                %error,
                "pages of a segment could not be made ahead of their first use; give the daemon more memory or a smaller arena"
            );
        }
        // Locking makes the pages as well: where that just failed it would fail again, or have the process killed.
        let locked = populated.is_ok() && memory.lock().is_ok();
        Prepared { populated: populated.is_ok(), locked, huge_pages }
    }

    /// Overwrites a whole segment with zeros: it changes its owner, who must not see what it held.
    pub fn zero(&self, segment: u32) {
        let (start, bytes) = self.segment_pointer(segment);
        // SAFETY: start and length are those of a live, writable mapping; the core has evicted the segment, so nobody else uses it.
        unsafe { ptr::write_bytes(start, 0, bytes) }
    }

    /// Copies `bytes` to `offset` within the extent.
    pub fn write(&self, extent: Extent, offset: usize, bytes: &[u8]) {
        let to = self.within(extent, offset, bytes.len());
        // SAFETY: `within` has checked that all of it lies in a live, writable mapping; the caller holds the extent's reservation, so
        // nobody else reads or writes it; `bytes` cannot overlap it since no reference into the arena exists outside of this file.
        unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len()) }
    }

    /// Overwrites the extent from `offset` to its end with zeros.
    pub fn zero_from(&self, extent: Extent, offset: usize) {
        let bytes = (extent.bytes as usize).checked_sub(offset);
        let bytes = bytes.unwrap_or_else(|| panic!("{offset} lies behind the end of {extent:?}"));
        let to = self.within(extent, offset, bytes);
        // SAFETY: as in `write`.
        unsafe { ptr::write_bytes(to, 0, bytes) }
    }

    /// Copies from `offset` within the extent until `into` is full.
    pub fn read(&self, extent: Extent, offset: usize, into: &mut [u8]) {
        let from = self.within(extent, offset, into.len());
        // SAFETY: `within` has checked that all of it lies in a live mapping; the caller holds a lease on the extent, so nobody writes
        // it; `into` cannot overlap it since no reference into the arena exists outside of this file.
        unsafe { ptr::copy_nonoverlapping(from, into.as_mut_ptr(), into.len()) }
    }

    /// Sums of the fragments of the extent's first `payload_bytes`, taken in place.
    pub fn fragment_sums(&self, extent: Extent, payload_bytes: usize) -> Vec<u64> {
        let from = self.within(extent, 0, payload_bytes);
        // SAFETY: `within` has checked that all of it lies in a live mapping; the caller holds the extent's reservation or a lease on it,
        // so nobody writes it; the slice does not outlive this call.
        let payload = unsafe { slice::from_raw_parts(from, payload_bytes) };
        payload.chunks(FRAGMENT_BYTES).map(fragment_sum).collect()
    }

    /// Where an extent starts, for devices: they may use all of it, from the request that names it to that request's completion.
    pub(super) fn pointer(&self, extent: Extent) -> *mut u8 {
        self.within(extent, 0, extent.bytes as usize)
    }

    /// Where a segment starts and how long it is, for registering it with a device.
    pub(super) fn segment_pointer(&self, segment: u32) -> (*mut u8, usize) {
        let memory = self.segment(segment);
        (memory.as_mut_ptr(), memory.len())
    }

    fn segment(&self, segment: u32) -> &MmapRaw {
        let count = self.segments.len();
        self.segments.get(segment as usize).unwrap_or_else(|| panic!("segment {segment} of an arena of {count}"))
    }

    /// Start of `bytes` at `offset` in `extent`, all of which lies within the segment; else an invariant is broken.
    fn within(&self, extent: Extent, offset: usize, bytes: usize) -> *mut u8 {
        let (start, segment_bytes) = self.segment_pointer(extent.segment);
        assert!(
            extent.offset as usize + extent.bytes as usize <= segment_bytes,
            "{extent:?} leaves its segment of {segment_bytes} bytes"
        );
        assert!(
            offset.checked_add(bytes).is_some_and(|end| end <= extent.bytes as usize),
            "{bytes} bytes at {offset} leave {extent:?}"
        );
        // SAFETY: the sum is at most the mapping's length, as was just asserted.
        unsafe { start.add(extent.offset as usize + offset) }
    }
}

/// Makes all pages of a fresh mapping.
fn populate(memory: &MmapRaw) -> io::Result<()> {
    for start in (0..memory.len()).step_by(POPULATE_BYTES) {
        let bytes = POPULATE_BYTES.min(memory.len() - start);
        let refused = loop {
            match memory.advise_range(Advice::PopulateWrite, start, bytes) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                result => break result.err(),
            }
        };
        match refused {
            None => {}
            // Kernels before 5.14 do not know the advice.
            Some(error) if error.raw_os_error() == Some(Errno::INVAL.raw_os_error()) => touch(memory, start, bytes),
            Some(error) => return Err(error),
        }
    }
    Ok(())
}

/// Makes pages by writing to each. Only of a fresh mapping: the byte written is the zero that is there.
fn touch(memory: &MmapRaw, start: usize, bytes: usize) {
    for offset in (start..start + bytes).step_by(PAGE_BYTES as usize) {
        // SAFETY: within the mapping; nobody uses a segment that is being prepared.
        unsafe { memory.as_mut_ptr().add(offset).write_volatile(0) }
    }
}

/// Whether transparent huge pages are given to who asks. The advice itself succeeds even where they are switched off.
fn huge_pages_allowed() -> bool {
    std::fs::read_to_string("/sys/kernel/mm/transparent_hugepage/enabled").is_ok_and(|text| !text.contains("[never]"))
}

/// Pages of ordinary memory, aligned for O_DIRECT, for the synchronous reads and writes of start-up.
#[derive(Debug)]
pub struct PageBuffer(MmapMut);

impl PageBuffer {
    /// `pages` pages of zeros.
    pub fn zeroed(pages: usize) -> io::Result<Self> {
        MmapMut::map_anon(pages * PAGE_BYTES as usize).map(Self)
    }

    /// Number of pages.
    pub fn pages(&self) -> usize {
        self.0.len() / PAGE_BYTES as usize
    }
}

impl Deref for PageBuffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0
    }
}

impl DerefMut for PageBuffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.0
    }
}

#[cfg(test)]
mod tests;
