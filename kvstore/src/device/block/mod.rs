//! Disks: files (or devices) that are read and written in whole pages, asynchronously, in no promised order.
//!
//! One [`BlockDevice`] belongs to one thread. It holds no queue of its own beyond what is in flight; who submits keeps at most
//! [`BlockDevice::depth`] requests in flight and decides what goes first.

pub mod file;
pub mod probe;
pub mod simulated;
pub mod sync;
mod transfer;
pub mod uring;

use std::io;
use std::sync::Arc;
use std::time::Duration;

use self::file::TierFile;
use self::sync::Synchronous;
use self::uring::Uring;
use super::memory::{Arena, Extent, Page, PageBuffer};

/// Unit of every offset, length and buffer address: what O_DIRECT wants on every disk in use.
pub const PAGE_BYTES: u64 = 4096;

/// Something to do, with the name that its completion will carry.
#[derive(Debug)]
pub struct IoRequest {
    /// Chosen by the submitter, unique among what is in flight.
    pub id: u64,
    /// What to do.
    pub operation: Operation,
}

/// What a disk can do. Offsets are bytes from the start of the file, whole pages.
#[derive(Debug)]
pub enum Operation {
    /// Fills the extent (whole pages) from the file.
    Read {
        /// Where in the file.
        offset: u64,
        /// Where to: exclusively the submitter's until completion.
        into: Extent,
    },
    /// Fills memory that the request owns, and that nobody else sees, from the file.
    ReadPrivate {
        /// Where in the file.
        offset: u64,
        /// Where to; comes back with the completion.
        into: PageBuffer,
    },
    /// Writes the extent (whole pages) to the file.
    Write {
        /// Where in the file.
        offset: u64,
        /// Where from: not changed by anybody until completion.
        from: Extent,
    },
    /// Writes one page of metadata.
    WritePage {
        /// Where in the file.
        offset: u64,
        /// The page.
        page: Box<Page>,
    },
    /// Makes every write that had completed before this was submitted survive a power cut.
    Flush,
}

/// The end of a request. A short transfer is an error: whoever waits gets all bytes or none.
#[derive(Debug)]
pub struct IoDone {
    /// Name of the request.
    pub id: u64,
    /// Whether it was done whole.
    pub result: Result<(), IoFault>,
    /// The memory of an [`Operation::ReadPrivate`]; of a request that was not done whole it holds anything.
    pub private: Option<PageBuffer>,
}

/// Why a request failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IoFault {
    /// The system's error number.
    Os(i32),
    /// Fewer bytes than asked for, twice in a row.
    Short,
}

/// Asynchronous reads and writes of one file.
pub trait BlockDevice: Send {
    /// Most requests that may be in flight.
    fn depth(&self) -> usize;

    /// Takes a request. Its completion comes from [`BlockDevice::wait`], exactly once. May be kept back until then, so that
    /// several requests go to the kernel in one call.
    fn submit(&mut self, request: IoRequest);

    /// Appends completions; returns when there is one at least, when the waker was called, or after `timeout`.
    fn wait(&mut self, timeout: Duration, done: &mut Vec<IoDone>);

    /// Ends a [`BlockDevice::wait`] from any thread, now or the next one.
    fn waker(&self) -> Arc<dyn Fn() + Send + Sync>;

    /// Tells that a segment of the arena was prepared, so that it can be registered as a fixed buffer. Optional, never fails:
    /// requests to other memory work too.
    fn segment_ready(&mut self, segment: u32);

    /// What this device is, for people: `io_uring, O_DIRECT, fixed buffers`.
    fn describe(&self) -> String;
}

/// Threads of the fallback: enough to keep a disk busy, few enough to leave the processors to others.
const SYNCHRONOUS_THREADS_MAX: usize = 8;

/// The best device that this system gives for a file, and why it is not io_uring if it is not.
pub fn open_device(
    file: &TierFile,
    arena: Arc<Arena>,
    depth: usize,
) -> io::Result<(Box<dyn BlockDevice>, Option<String>)> {
    match Uring::new(file, Arc::clone(&arena), depth) {
        Ok(ring) => Ok((Box::new(ring), None)),
        Err(error) => {
            let device = Synchronous::new(file, arena, depth.clamp(1, SYNCHRONOUS_THREADS_MAX))?;
            let why = format!(
                "io_uring cannot be used ({error}), so a pool of threads reads and writes, more slowly; allow it in \
                 /proc/sys/kernel/io_uring_disabled and in the container's seccomp profile"
            );
            Ok((Box::new(device), Some(why)))
        }
    }
}

/// The start-up side of a file: whole pages, one call after the other, before a [`BlockDevice`] takes over.
pub trait PageFile {
    /// Reads whole pages; fewer than asked for is an error.
    fn read_pages(&self, offset: u64, pages: usize) -> io::Result<PageBuffer>;

    /// Writes whole pages.
    fn write_pages(&mut self, offset: u64, pages: &PageBuffer) -> io::Result<()>;

    /// Makes all that was written survive a power cut.
    fn flush(&mut self) -> io::Result<()>;

    /// Size of the file; never changes.
    fn bytes(&self) -> u64;
}

impl Operation {
    /// Where in the file and how many bytes; nothing for a flush.
    ///
    /// # Panics
    /// When offset or length are not whole pages: the caller's geometry is broken.
    fn span(&self) -> Option<(u64, u64)> {
        let (offset, bytes, start) = match self {
            Self::Read { offset, into: extent } | Self::Write { offset, from: extent } => {
                (*offset, u64::from(extent.bytes), extent.offset)
            }
            Self::ReadPrivate { offset, into } => (*offset, into.len() as u64, 0),
            Self::WritePage { offset, .. } => (*offset, PAGE_BYTES, 0),
            Self::Flush => return None,
        };
        assert!(
            [offset, bytes, u64::from(start)].iter().all(|number| number.is_multiple_of(PAGE_BYTES)),
            "not in whole pages: {self:?}"
        );
        Some((offset, bytes))
    }

    /// Whether all of it lies within a file of `file_bytes`. A request that does not is completed as [`IoFault::Short`] and touches
    /// nothing: a write must not make the file grow.
    ///
    /// # Panics
    /// When the extent leaves its segment, or something is not in whole pages.
    fn fits(&self, file_bytes: u64, arena: &Arena) -> bool {
        if let Self::Read { into: extent, .. } | Self::Write { from: extent, .. } = self {
            arena.pointer(*extent);
        }
        self.span().is_none_or(|(offset, bytes)| offset.checked_add(bytes).is_some_and(|end| end <= file_bytes))
    }
}

impl IoRequest {
    /// It has ended.
    fn done(self, result: Result<(), IoFault>) -> IoDone {
        let private = match self.operation {
            Operation::ReadPrivate { into, .. } => Some(into),
            _ => None,
        };
        IoDone { id: self.id, result, private }
    }
}

#[cfg(test)]
mod tests;
