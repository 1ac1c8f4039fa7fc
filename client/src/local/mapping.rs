//! Memory of the store, mapped into this process: a file that the daemon writes and this process reads, or one that this process
//! writes in place and the daemon copies from.
//!
//! Somebody else may write here at any moment: the daemon where nothing is leased, a rank of the same group where its own blocks lie.
//! So no reference into a mapping exists. Bytes are copied out, each read once, and what is summed is the copy. A child that this
//! process forks does not inherit a mapping: it would hold it, and could write it, for as long as it lives.

#![expect(unsafe_code, reason = "copies between slices and memory that other processes use too")]

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::ptr;

use memmap2::{Advice, MmapOptions, MmapRaw};
use rustix::io::Errno;
use tender_proto::sum::{FRAGMENT_BYTES, copy_changing, copy_with_sums, fragment_sum};

/// Populated in one call. The address space is locked for reading meanwhile, so that other threads' `mmap` wait for no more than this.
const POPULATE_BYTES: usize = 16 << 20;

/// One mapped file, unmapped when the last who uses it lets go.
#[derive(Debug)]
pub(crate) struct Mapping {
    memory: MmapRaw,
    is_writable: bool,
    /// Nobody but the daemon writes to the file, and it does not while a part is leased.
    is_steady: bool,
}

impl Mapping {
    /// Maps a whole file that only the daemon writes.
    pub(super) fn shared(file: &OwnedFd, bytes: u64) -> io::Result<Self> {
        Ok(Self { is_steady: true, ..Self::to_read(file, bytes)? })
    }

    /// Maps a whole file that another process writes.
    pub(super) fn to_read(file: &OwnedFd, bytes: u64) -> io::Result<Self> {
        let memory = options(file, bytes)?.map_raw_read_only(file.as_raw_fd())?;
        memory.advise(Advice::DontFork)?;
        Ok(Self { memory, is_writable: false, is_steady: false })
    }

    /// Maps a whole file that this process writes, and makes its pages, which takes seconds per GiB: where there is no memory for them
    /// that is an error here, and not the end of the process at the first write.
    pub(super) fn to_write(file: &OwnedFd, bytes: u64) -> io::Result<Self> {
        let memory = options(file, bytes)?.map_raw(file.as_raw_fd())?;
        memory.advise(Advice::DontFork)?;
        populate(&memory)?;
        Ok(Self { memory, is_writable: true, is_steady: false })
    }

    /// Whether `bytes` from `offset` on lie in it.
    pub(super) fn holds(&self, offset: u64, bytes: u64) -> bool {
        offset.checked_add(bytes).is_some_and(|end| end <= self.memory.len() as u64)
    }

    /// Whether this process may write here.
    pub(super) fn is_writable(&self) -> bool {
        self.is_writable
    }

    /// Where `bytes` from `offset` on start.
    ///
    /// # Panics
    /// If they do not lie in it.
    pub(super) fn start(&self, offset: u64, bytes: usize) -> *const u8 {
        let length = self.memory.len();
        assert!(self.holds(offset, bytes as u64), "{bytes} bytes at {offset} leave a mapping of {length}");
        // SAFETY: the sum is at most the mapping's length, as was just asserted.
        unsafe { self.memory.as_ptr().add(offset as usize) }
    }

    /// Copies from `offset` on until `into` is full.
    pub(super) fn copy_to(&self, offset: u64, into: &mut [u8]) {
        // SAFETY: `into` is this call's alone, writable for its length.
        unsafe { self.copy(offset, into.as_mut_ptr(), into.len()) }
    }

    /// Appends `bytes` from `offset` on.
    pub(super) fn append_to(&self, offset: u64, bytes: usize, into: &mut Vec<u8>) {
        into.reserve(bytes);
        // SAFETY: there is room for `bytes` behind what is in the vector, and all of it is written before it counts.
        unsafe {
            self.copy(offset, into.spare_capacity_mut().as_mut_ptr().cast(), bytes);
            into.set_len(into.len() + bytes);
        }
    }

    /// Appends `bytes` from `offset` on, and returns the sums of the fragments of what was appended, whatever others write meanwhile.
    pub(super) fn append_with_sums(&self, offset: u64, bytes: usize, into: &mut Vec<u8>) -> Vec<u64> {
        let from = self.start(offset, bytes);
        into.reserve(bytes);
        // SAFETY: `start` has checked that all of `from` lies in a mapping that is live as long as `self`, and that this process writes
        // to only where it holds a reservation, which is not leased; there is room behind what is in the vector, which is somewhere
        // else, and all of it is written before it counts.
        unsafe {
            let sums = copy_with_sums(from, into.spare_capacity_mut().as_mut_ptr().cast(), bytes);
            into.set_len(into.len() + bytes);
            sums
        }
    }

    /// Copies a payload to `offset` and returns the sums of its fragments, in one pass.
    ///
    /// # Panics
    /// If the mapping is to be read only, or the payload leaves it.
    pub(super) fn fill(&self, offset: u64, payload: &[u8]) -> Vec<u64> {
        let to = self.start_to_write(offset, payload.len());
        // SAFETY: `start_to_write` has checked that all of `to` lies in a mapping that is live as long as `self`, and that it is writable. The
        // caller holds the reservation, so nobody else in this process uses these bytes, but by an address that it was given, and then it
        // answers for it; no reference into a mapping exists, so the payload is somewhere else.
        unsafe { copy_with_sums(payload.as_ptr(), to, payload.len()) }
    }

    /// Copies bytes to `offset`.
    ///
    /// # Panics
    /// As [`fill`](Self::fill).
    pub(super) fn write(&self, offset: u64, bytes: &[u8]) {
        let to = self.start_to_write(offset, bytes.len());
        // SAFETY: as for `fill`.
        unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len()) }
    }

    fn start_to_write(&self, offset: u64, bytes: usize) -> *mut u8 {
        assert!(self.is_writable, "a reservation lies in memory that this process may write");
        self.start(offset, bytes).cast_mut()
    }

    /// The sums of the fragments of what lies at `offset`, each byte read once.
    pub(super) fn sums(&self, offset: u64, bytes: usize) -> Vec<u64> {
        let mut fragment = vec![0; FRAGMENT_BYTES.min(bytes)];
        let sums = (0..bytes).step_by(FRAGMENT_BYTES).map(|start| {
            let fragment = &mut fragment[..FRAGMENT_BYTES.min(bytes - start)];
            self.copy_to(offset + start as u64, fragment);
            fragment_sum(fragment)
        });
        sums.collect()
    }

    /// # Safety
    /// `to` is writable for `bytes`, and nobody else uses it.
    unsafe fn copy(&self, offset: u64, to: *mut u8, bytes: usize) {
        let from = self.start(offset, bytes);
        // SAFETY: `start` has checked that all of `from` lies in a mapping that is live as long as `self`; the caller vouches for `to`,
        // which is none of a mapping. What is steady is not written while it is leased, and whoever copies holds the lease.
        unsafe {
            if self.is_steady {
                ptr::copy_nonoverlapping(from, to, bytes);
            } else {
                copy_changing(from, to, bytes);
            }
        }
    }
}

/// The whole of a file, which must be as long as the daemon says: what lies behind a file's end kills who touches it.
fn options(file: &OwnedFd, bytes: u64) -> io::Result<MmapOptions> {
    let found = rustix::fs::fstat(file.as_fd())?.st_size;
    if bytes == 0 || u64::try_from(found).is_ok_and(|found| found < bytes) {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!("a file of {found} bytes came as one of {bytes}; install client and daemon of one release"),
        ));
    }
    let length = usize::try_from(bytes).map_err(|_| io::ErrorKind::OutOfMemory)?;
    let mut options = MmapOptions::new();
    options.len(length);
    Ok(options)
}

fn populate(memory: &MmapRaw) -> io::Result<()> {
    for start in (0..memory.len()).step_by(POPULATE_BYTES) {
        let bytes = POPULATE_BYTES.min(memory.len() - start);
        loop {
            match memory.advise_range(Advice::PopulateWrite, start, bytes) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // Kernels before 5.14 do not know the advice; the pages then come with the first write.
                Err(error) if error.raw_os_error() == Some(Errno::INVAL.raw_os_error()) => return Ok(()),
                result => break result?,
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use tender_proto::sum::fragment_sums;

    use super::*;

    fn file(bytes: u64) -> OwnedFd {
        let file = rustix::fs::memfd_create(c"mapping", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&file, bytes).unwrap();
        file
    }

    #[test]
    fn what_is_filled_is_what_the_others_see_and_sums_to_what_they_sum() {
        let file = file(1 << 20);
        let (own, theirs) = (Mapping::to_write(&file, 1 << 20).unwrap(), Mapping::to_read(&file, 1 << 20).unwrap());
        let shared = Mapping::shared(&file, 1 << 20).unwrap();
        let payload: Vec<u8> = (0..200_001).map(|byte: u32| byte.wrapping_mul(0x9e37_79b9).to_le_bytes()[3]).collect();
        let sums = own.fill(8192, &payload);
        assert_eq!(sums, fragment_sums(&payload));
        assert_eq!(own.sums(8192, payload.len()), sums);
        own.write(8192, &[0; 9]);
        assert_ne!(own.sums(8192, payload.len()), sums);
        own.write(8192, &payload[..9]);
        assert_eq!((own.sums(8192, payload.len()), own.sums(8192, 0)), (sums.clone(), vec![]));
        for mapping in [&own, &theirs, &shared] {
            let mut copy = vec![7];
            assert_eq!(mapping.append_with_sums(8192, payload.len(), &mut copy), sums);
            mapping.append_to(8192, payload.len(), &mut copy);
            assert_eq!(copy, [&[7], &payload[..], &payload[..]].concat());
            let mut piece = [0; 100];
            mapping.copy_to(8200, &mut piece);
            assert_eq!(piece, payload[8..108]);
        }
    }

    #[test]
    fn nothing_is_touched_behind_the_end() {
        let file = file(8192);
        let mapping = Mapping::to_write(&file, 8192).unwrap();
        assert!(mapping.holds(8192, 0) && mapping.holds(0, 8192));
        assert!(!mapping.holds(1, 8192) && !mapping.holds(u64::MAX, 2));
        for beyond in [8185, 8193, u64::MAX] {
            let filled = std::panic::catch_unwind(|| mapping.fill(beyond, &[1; 8]));
            assert!(filled.is_err(), "{beyond}");
            assert!(std::panic::catch_unwind(|| mapping.write(beyond, &[1; 8])).is_err(), "{beyond}");
            assert!(std::panic::catch_unwind(|| mapping.sums(beyond, 8)).is_err(), "{beyond}");
        }
        for write in [|mapping: Mapping| drop(mapping.fill(0, &[1])), |mapping: Mapping| mapping.write(0, &[1])] {
            let to_read = Mapping::to_read(&file, 8192).unwrap();
            assert!(std::panic::catch_unwind(|| write(to_read)).is_err());
        }
        let error = Mapping::to_read(&file, 8193).unwrap_err().to_string();
        assert!(error.contains("8192") && error.contains("8193"), "{error}");
    }
}
