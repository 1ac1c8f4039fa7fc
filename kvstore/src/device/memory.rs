//! Payload memory: an arena of segments, reserved at start, prepared one by one in the background. A segment moves only when another
//! tenant gets it, and nobody uses it then.
//!
//! Who may touch which bytes is decided by the core alone: an extent is written only by the holder of its reservation (a put, or a load
//! from disk) and read only while leased or in write-back. This file moves bytes and knows nothing of that; it hands out no reference
//! into the arena that outlives a call.
//!
//! ```text
//! segment  0 … segment_count - 1      the daemon's: anonymous memory, or, once prepared, a piece of a `SharedFile`
//!          … + ingest_count - 1       ingest places, empty until a piece of a client's `IngestFile` is installed
//! ```
//! Each tenant has a `SharedFile`, which its clients map whole for reading. Segment i lies i * segment_bytes from the start of the file of
//! the tenant for whom it was prepared last, and is a hole in all others: nobody can see what is another's, whatever it maps and however
//! long it keeps that.
//!
//! A client may write to its ingest memory at any moment, so nothing is decided by bytes that are still there: they are copied, each read
//! once, and what is summed is the copy. No device gets their address, and the daemon maps them for reading only.

#![expect(unsafe_code, reason = "moves bytes between slices and memory that other threads and the kernel use too")]

use std::io;
use std::ops::{Deref, DerefMut};
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::{ptr, slice};

use memmap2::{Advice, MmapMut, MmapOptions, MmapRaw};
use rustix::io::Errno;
use tender_proto::sum::{FRAGMENT_BYTES, copy_changing, copy_with_sums, fragment_sum, fragment_sums};

use super::block::PAGE_BYTES;
use super::ingest::IngestFile;
use super::shared::SharedFile;
use crate::names::TenantId;

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

/// Where a segment's bytes are.
#[derive(Debug)]
struct Segment {
    memory: Arc<MmapRaw>,
    /// In whose file. None: nobody maps them.
    tenant: Option<TenantId>,
}

/// The segments. Shared by threads; exclusive use of an extent is the core's promise, see the module's head.
#[derive(Debug)]
pub struct Arena {
    segment_bytes: u64,
    /// One per tenant; none if all memory is anonymous.
    files: Arc<[SharedFile]>,
    segments: Vec<RwLock<Segment>>,
    ingest: Vec<RwLock<Option<Arc<MmapRaw>>>>,
}

impl Arena {
    /// Reserves addresses and nothing else: however large, it takes no memory and no time until segments are prepared. No client can map
    /// it, and it ends with this process.
    pub fn new(segment_bytes: u64, segment_count: u32) -> io::Result<Self> {
        segment_bytes_check(segment_bytes)?;
        let segments = (0..segment_count)
            .map(|_| MmapOptions::new().len(segment_bytes as usize).no_reserve_swap().map_anon().map(MmapRaw::from))
            .map(not_for_children)
            .map(|memory| Ok(RwLock::new(Segment { memory: Arc::new(memory?), tenant: None })))
            .collect::<io::Result<Vec<_>>>()?;
        Ok(Self { segment_bytes, files: Arc::default(), segments, ingest: Vec::new() })
    }

    /// Segments that are to lie in the tenants' files, each in that of the tenant for whom it is prepared, with what the file holds there;
    /// and `ingest_count` empty places behind them. Takes no memory and no time until segments are prepared. Before it is prepared a
    /// segment is anonymous memory: nothing of that gets into a file.
    ///
    /// `InvalidInput` if a file is too small, or there is none.
    pub fn on(
        files: &Arc<[SharedFile]>,
        segment_bytes: u64,
        segment_count: u32,
        ingest_count: u32,
    ) -> io::Result<Self> {
        let arena = Self::new(segment_bytes, segment_count)?;
        let wanted_bytes = segment_bytes * u64::from(segment_count);
        let file_bytes = files.iter().map(SharedFile::bytes).min().unwrap_or(0);
        if wanted_bytes > file_bytes || files.is_empty() || segment_count.checked_add(ingest_count).is_none() {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!(
                    "{segment_count} segments of {segment_bytes} bytes do not fit into a shared file of {file_bytes} bytes: make one of \
                     {wanted_bytes} for each tenant"
                ),
            ));
        }
        let ingest = (0..ingest_count).map(|_| RwLock::default()).collect();
        Ok(Self { files: Arc::clone(files), ingest, ..arena })
    }

    /// Bytes of each segment.
    pub fn segment_bytes(&self) -> u64 {
        self.segment_bytes
    }

    /// Number of the daemon's segments, which have the lowest numbers.
    pub fn segment_count(&self) -> u32 {
        self.segments.len() as u32
    }

    /// Number of ingest places, which have the numbers behind.
    pub fn ingest_count(&self) -> u32 {
        self.ingest.len() as u32
    }

    /// Whether a segment's number is that of an ingest place.
    pub fn is_ingest(&self, segment: u32) -> bool {
        (self.segment_count()..self.segment_count() + self.ingest_count()).contains(&segment)
    }

    /// Makes a segment fit for a tenant's use: in its file and in no other, huge pages where the system has them, pages made now rather
    /// than at first use, locked where allowed. Takes seconds per GiB. Before anybody here uses it, and again when it changes its owner:
    /// no thread and no device may use it meanwhile, and those that have it registered must register it anew.
    ///
    /// What it holds afterwards is zeros if it is `used` or was another's. Otherwise it keeps what it holds, which for the first time in
    /// this arena is what the tenant's file holds there.
    ///
    /// Errors: what the system says when it has no memory for another mapping, or cannot take a segment out of a file. Then it is not fit
    /// for use and is to be prepared again.
    ///
    /// # Panics
    /// For an ingest place, as does whatever writes there or hands out its address; for a tenant without a file.
    pub fn prepare(&self, segment: u32, tenant: TenantId, used: bool) -> io::Result<Prepared> {
        let is_moved = !self.files.is_empty() && self.move_to_file_of(segment, tenant, used)?;
        if used && !is_moved {
            self.zero(segment);
        }
        let memory = self.segment(segment);
        let huge_pages = self.huge_pages_allowed(tenant)
            && self.segment_bytes >= HUGE_PAGE_BYTES
            && memory.advise(Advice::HugePage).is_ok();
        let populated = populate(&memory, Advice::PopulateWrite);
        if let Err(error) = &populated {
            tracing::warn!(
                segment,
                %error,
                "pages of a segment could not be made ahead of their first use; give the daemon more memory or a smaller arena"
            );
        }
        // Locking makes the pages as well: where that just failed it would fail again, or have the process killed.
        let locked = populated.is_ok() && memory.lock().is_ok();
        Ok(Prepared { populated: populated.is_ok(), locked, huge_pages })
    }

    /// Takes a segment out of all files but that of the tenant (and out of that too if it is `used`), and maps it there; whether it was
    /// not there already. Memory that others' clients made by reading holes goes too.
    fn move_to_file_of(&self, segment: u32, tenant: TenantId, used: bool) -> io::Result<bool> {
        let place = self.place(segment);
        if place.read().unwrap_or_else(PoisonError::into_inner).tenant == Some(tenant) {
            return Ok(false);
        }
        let offset = u64::from(segment) * self.segment_bytes;
        let bytes = self.segment_bytes as usize;
        let file = self.file_of(tenant).writable().as_raw_fd();
        let memory = not_for_children(MmapOptions::new().offset(offset).len(bytes).map_raw(file))?;
        // First, since it fails without harm. What fails behind it is tried again from the start, as nobody's.
        let old = {
            let mut place = place.write().unwrap_or_else(PoisonError::into_inner);
            std::mem::replace(&mut *place, Segment { memory: Arc::new(memory), tenant: None })
        };
        drop(old);
        for (other, file) in self.files.iter().enumerate() {
            if used || other != usize::from(tenant.0) {
                file.punch(offset, self.segment_bytes)?;
            }
        }
        place.write().unwrap_or_else(PoisonError::into_inner).tenant = Some(tenant);
        Ok(true)
    }

    fn file_of(&self, tenant: TenantId) -> &SharedFile {
        self.files.get(usize::from(tenant.0)).unwrap_or_else(|| panic!("{tenant:?} has no file"))
    }

    fn huge_pages_allowed(&self, tenant: TenantId) -> bool {
        if self.files.is_empty() { huge_pages_allowed() } else { self.file_of(tenant).huge_pages_allowed() }
    }

    /// Puts a piece of a client's file (whole pages, at most a segment) into an empty ingest place. The file must be closed for writers.
    /// Takes seconds per GiB: all its pages are made, so that a later read cannot fail, and cannot kill this process, for lack of memory.
    ///
    /// Errors: `InvalidInput` for a file that is still open for writers or a piece that leaves it or is larger than a segment; what the
    /// system says when it has no memory.
    ///
    /// # Panics
    /// When the place is not empty, or is none.
    pub fn install(&self, segment: u32, file: &IngestFile, offset: u64, bytes: u64) -> io::Result<Prepared> {
        let place = self.ingest_place(segment);
        let segment_bytes = self.segment_bytes;
        if bytes > segment_bytes {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("a piece of {bytes} bytes does not fit into a segment of {segment_bytes}: divide it"),
            ));
        }
        let memory = not_for_children(file.map(offset, bytes as usize))?;
        populate(&memory, Advice::PopulateRead)?;
        let locked = memory.lock().is_ok();
        let mut place = place.write().unwrap_or_else(PoisonError::into_inner);
        assert!(place.is_none(), "ingest place {segment} is not empty");
        *place = Some(Arc::new(memory));
        Ok(Prepared { populated: true, locked, huge_pages: false })
    }

    /// Empties an ingest place; whether there was something in it. A copy that has begun goes on to its end: the last to end unmaps, which
    /// takes milliseconds per GiB.
    ///
    /// # Panics
    /// When it is no ingest place.
    pub fn take_out(&self, segment: u32) -> bool {
        self.ingest_place(segment).write().unwrap_or_else(PoisonError::into_inner).take().is_some()
    }

    /// Overwrites a whole segment with zeros: it changes its owner, who must not see what it held.
    pub fn zero(&self, segment: u32) {
        let memory = self.segment(segment);
        // SAFETY: start and length are those of a writable mapping that is live as long as `memory`; the core has evicted the segment, so
        // nobody else uses it.
        unsafe { ptr::write_bytes(memory.as_mut_ptr(), 0, memory.len()) }
    }

    /// Copies `bytes` to `offset` within the extent.
    pub fn write(&self, extent: Extent, offset: usize, bytes: &[u8]) {
        let memory = self.segment(extent.segment);
        let to = within(&memory, extent, offset, bytes.len());
        // SAFETY: `within` has checked that all of it lies in a writable mapping that is live as long as `memory`; the caller holds the
        // extent's reservation, so nobody else reads or writes it; `bytes` cannot overlap it since no reference into the arena exists
        // outside of this file.
        unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len()) }
    }

    /// Overwrites the extent from `offset` to its end with zeros.
    pub fn zero_from(&self, extent: Extent, offset: usize) {
        let bytes = (extent.bytes as usize).checked_sub(offset);
        let bytes = bytes.unwrap_or_else(|| panic!("{offset} lies behind the end of {extent:?}"));
        let memory = self.segment(extent.segment);
        let to = within(&memory, extent, offset, bytes);
        // SAFETY: as in `write`.
        unsafe { ptr::write_bytes(to, 0, bytes) }
    }

    /// Copies from `offset` within the extent until `into` is full. Out of ingest memory the copy may be of no single moment.
    ///
    /// # Panics
    /// When the extent is of an empty ingest place.
    pub fn read(&self, extent: Extent, offset: usize, into: &mut [u8]) {
        if self.is_ingest(extent.segment) {
            let memory = self.ingest_memory(extent.segment);
            let from = within(&memory, extent, offset, into.len());
            // SAFETY: `within` has checked that all of it lies in a mapping that is live as long as `memory`; nobody in this process can
            // write there; `into` cannot overlap it since no reference into the arena exists outside of this file.
            return unsafe { copy_changing(from, into.as_mut_ptr(), into.len()) };
        }
        let memory = self.segment(extent.segment);
        let from = within(&memory, extent, offset, into.len());
        // SAFETY: `within` has checked that all of it lies in a mapping that is live as long as `memory`; the caller holds a lease on the
        // extent, so nobody writes it; `into` cannot overlap it since no reference into the arena exists outside of this file.
        unsafe { ptr::copy_nonoverlapping(from, into.as_mut_ptr(), into.len()) }
    }

    /// Sums of the fragments of the extent's first `payload_bytes`; taken in place, or over a copy of ingest memory, of which they say
    /// nothing a moment later.
    ///
    /// # Panics
    /// When the extent is of an empty ingest place.
    pub fn fragment_sums(&self, extent: Extent, payload_bytes: usize) -> Vec<u64> {
        if self.is_ingest(extent.segment) {
            let mut fragment = vec![0; FRAGMENT_BYTES.min(payload_bytes)];
            let sum_at = |offset: usize| {
                let fragment = &mut fragment[..FRAGMENT_BYTES.min(payload_bytes - offset)];
                self.read(extent, offset, fragment);
                fragment_sum(fragment)
            };
            return (0..payload_bytes).step_by(FRAGMENT_BYTES).map(sum_at).collect();
        }
        let memory = self.segment(extent.segment);
        let from = within(&memory, extent, 0, payload_bytes);
        // SAFETY: `within` has checked that all of it lies in a mapping that is live as long as `memory`; the caller holds the extent's
        // reservation or a lease on it, so nobody writes it; the slice does not outlive this call.
        let payload = unsafe { slice::from_raw_parts(from, payload_bytes) };
        fragment_sums(payload)
    }

    /// Copies the first `payload_bytes` of an extent, mostly of ingest memory, into another of the daemon's, whose rest becomes zeros.
    /// Returns the sums of the fragments of what was copied, whatever a client writes meanwhile: whether those are the sums expected
    /// decides whether the copy is right.
    ///
    /// # Panics
    /// When `from` is of an empty ingest place, or both are the same.
    pub fn promote(&self, from: Extent, to: Extent, payload_bytes: usize) -> Vec<u64> {
        let is_ingest = self.is_ingest(from.segment);
        let memory = if is_ingest { self.ingest_memory(from.segment) } else { self.segment(from.segment) };
        let source = within(&memory, from, 0, payload_bytes);
        let shared = self.segment(to.segment);
        let target = within(&shared, to, 0, payload_bytes);
        let (from_end, to_end) = (from.offset + from.bytes, to.offset + to.bytes);
        assert!(
            from.segment != to.segment || from_end <= to.offset || to_end <= from.offset,
            "{from:?} and {to:?} overlap: a block is copied to another slot"
        );
        // SAFETY: `within` has checked that all of both lies in mappings, which are live as long as `memory` and `shared`. Nobody in this
        // process writes to the first, of which the caller holds a lease; it holds the reservation of the other, so nobody else reads or
        // writes it. They are different segments, or were just found not to overlap.
        let sums = unsafe { copy_with_sums(source, target, payload_bytes) };
        self.zero_from(to, payload_bytes);
        sums
    }

    /// Where an extent starts, for devices: they may use all of it, from the request that names it to that request's completion. Never of
    /// ingest memory: what a client can change meanwhile is neither written to a disk nor read into.
    ///
    /// Good until the segment is prepared for another tenant, which the core asks for only when all requests that name it have completed.
    pub(super) fn pointer(&self, extent: Extent) -> *mut u8 {
        within(&self.segment(extent.segment), extent, 0, extent.bytes as usize)
    }

    /// Where a segment starts and how long it is, for registering it with a device. Good for as long as `pointer`.
    pub(super) fn segment_pointer(&self, segment: u32) -> (*mut u8, usize) {
        let memory = self.segment(segment);
        (memory.as_mut_ptr(), memory.len())
    }

    /// A segment of the daemon's, mapped at least as long as this is held.
    fn segment(&self, segment: u32) -> Arc<MmapRaw> {
        Arc::clone(&self.place(segment).read().unwrap_or_else(PoisonError::into_inner).memory)
    }

    fn place(&self, segment: u32) -> &RwLock<Segment> {
        assert!(
            !self.is_ingest(segment),
            "segment {segment} is ingest memory: it belongs to a client, and the daemon only copies from it"
        );
        let count = self.segments.len();
        self.segments.get(segment as usize).unwrap_or_else(|| panic!("segment {segment} of an arena of {count}"))
    }

    fn ingest_place(&self, segment: u32) -> &RwLock<Option<Arc<MmapRaw>>> {
        let place = segment.checked_sub(self.segment_count()).and_then(|index| self.ingest.get(index as usize));
        place.unwrap_or_else(|| panic!("segment {segment} is no ingest place"))
    }

    /// What lies in an ingest place, mapped at least as long as this is held.
    fn ingest_memory(&self, segment: u32) -> Arc<MmapRaw> {
        let place = self.ingest_place(segment).read().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(place.as_ref().unwrap_or_else(|| panic!("ingest place {segment} is empty")))
    }
}

/// Start of `bytes` at `offset` in `extent`, all of which lies within the segment; else an invariant is broken.
fn within(segment: &MmapRaw, extent: Extent, offset: usize, bytes: usize) -> *mut u8 {
    let segment_bytes = segment.len();
    assert!(
        extent.offset as usize + extent.bytes as usize <= segment_bytes,
        "{extent:?} leaves its segment of {segment_bytes} bytes"
    );
    assert!(
        offset.checked_add(bytes).is_some_and(|end| end <= extent.bytes as usize),
        "{bytes} bytes at {offset} leave {extent:?}"
    );
    // SAFETY: the sum is at most the mapping's length, as was just asserted.
    unsafe { segment.as_mut_ptr().add(extent.offset as usize + offset) }
}

fn segment_bytes_check(segment_bytes: u64) -> io::Result<()> {
    if segment_bytes > 0 && segment_bytes <= SEGMENT_BYTES_MAX && segment_bytes.is_multiple_of(PAGE_BYTES) {
        return Ok(());
    }
    Err(io::Error::new(
        io::ErrorKind::InvalidInput,
        format!(
            "a segment of {segment_bytes} bytes cannot be had: choose a multiple of {PAGE_BYTES} up to {SEGMENT_BYTES_MAX}"
        ),
    ))
}

/// Keeps a mapping from children that this process forks: they would hold it, and be able to write it, for as long as they live.
fn not_for_children(memory: io::Result<MmapRaw>) -> io::Result<MmapRaw> {
    let memory = memory?;
    memory.advise(Advice::DontFork)?;
    Ok(memory)
}

/// Makes all pages of a mapping, for reading or for writing.
fn populate(memory: &MmapRaw, advice: Advice) -> io::Result<()> {
    for start in (0..memory.len()).step_by(POPULATE_BYTES) {
        let bytes = POPULATE_BYTES.min(memory.len() - start);
        let refused = loop {
            match memory.advise_range(advice, start, bytes) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                result => break result.err(),
            }
        };
        match refused {
            None => {}
            // Kernels before 5.14 do not know the advice.
            Some(error) if error.raw_os_error() == Some(Errno::INVAL.raw_os_error()) => {
                touch(memory, start, bytes, matches!(advice, Advice::PopulateWrite));
            }
            Some(error) => return Err(error),
        }
    }
    Ok(())
}

/// Makes pages by reading each, or by writing to each the byte that is there: unless it changes at this very moment, since a request of
/// a former process may still be on its way into a segment that was that one's too.
fn touch(memory: &MmapRaw, start: usize, bytes: usize, for_writing: bool) {
    for offset in (start..start + bytes).step_by(PAGE_BYTES as usize) {
        // SAFETY: within the mapping, which is writable if it is to be written to; what others do there at the same time is atomic for bytes.
        let place = unsafe { &*memory.as_ptr().add(offset).cast::<AtomicU8>() };
        let byte = place.load(Ordering::Relaxed);
        if for_writing {
            let _ = place.compare_exchange(byte, byte, Ordering::Relaxed, Ordering::Relaxed);
        }
    }
}

/// Whether transparent huge pages of private memory are given to who asks. The advice itself succeeds even where they are switched off.
fn huge_pages_allowed() -> bool {
    std::fs::read_to_string("/sys/kernel/mm/transparent_hugepage/enabled").is_ok_and(|text| !text.contains("[never]"))
}

/// Pages of ordinary memory, aligned for O_DIRECT: for the synchronous reads and writes of start-up, and for what is read from a disk
/// and checked before anybody else may see it.
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
