//! Tables that outlive the worker: a memory file that the daemon alone maps, for records of slots.
//!
//! It is seen as words that are loaded and stored whole: a worker that is killed at any moment leaves each word as it was or as it was
//! to be, and what a record of several words means half-written is decided by who lays it out.

#![expect(unsafe_code, reason = "shows a mapping as a slice of atomic words")]

use std::io;
use std::ops::Deref;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::slice;
use std::sync::atomic::AtomicU64;

use memmap2::{Advice, MmapOptions, MmapRaw};
use rustix::fs::SealFlags;

use super::memfd;

/// The file of a table; no client gets its descriptor.
#[derive(Debug)]
pub struct TableFile {
    file: OwnedFd,
    bytes: u64,
}

impl TableFile {
    /// Makes a table of `bytes` (whole pages), all zeros, that takes memory where it is written. Its size and seals never change.
    pub fn create(bytes: u64) -> io::Result<Self> {
        Ok(Self { file: memfd::create(c"tender-table", bytes, SealFlags::SEAL)?, bytes })
    }

    /// Takes a table that a former process of the daemon's made, of `bytes`. `InvalidInput` if it is none, or of another size.
    pub fn adopt(file: OwnedFd, bytes: u64) -> io::Result<Self> {
        memfd::check(file.as_fd(), bytes)?;
        Ok(Self { file, bytes })
    }

    /// Size; never changes.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The descriptor, for whoever keeps it over the worker's restart.
    pub fn descriptor(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// Maps it for reading and writing. A forked child does not inherit it.
    pub fn map(&self) -> io::Result<Table> {
        let bytes = usize::try_from(self.bytes).map_err(|_| io::Error::from(io::ErrorKind::OutOfMemory))?;
        let memory = MmapOptions::new().len(bytes).map_raw(self.file.as_raw_fd())?;
        memory.advise(Advice::DontFork)?;
        Ok(Table(memory))
    }
}

/// A mapped table, as 64-bit words.
#[derive(Debug)]
pub struct Table(MmapRaw);

impl Deref for Table {
    type Target = [AtomicU64];

    fn deref(&self) -> &[AtomicU64] {
        // SAFETY: start and length are those of a live mapping of whole pages, which lives as long as this borrow; any bits are an
        // `AtomicU64`; whoever else maps the file, a former worker at its end, uses it in this way too.
        unsafe { slice::from_raw_parts(self.0.as_ptr().cast(), self.0.len() / size_of::<AtomicU64>()) }
    }
}

#[cfg(test)]
mod tests;
