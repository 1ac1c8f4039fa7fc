//! Ingest memory: a file that one client writes and the daemon only reads.
//!
//! Its maker is never trusted, its size is sealed. Once the client has mapped it the file is closed for writers: no further writable
//! mapping of it can be made, by whatever way its descriptor is reopened or handed on, and no hole punched; the mapping that is there
//! goes on being written to. That is also what makes it safe to read: its pages, once made, stay.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use memmap2::{MmapOptions, MmapRaw};
use rustix::fs::SealFlags;

use super::block::PAGE_BYTES;
use super::memfd;

/// A memfd of one client.
#[derive(Debug)]
pub struct IngestFile {
    file: OwnedFd,
    bytes: u64,
}

impl IngestFile {
    /// Makes a file of `bytes` (whole pages), all zeros, that takes memory where it is written. Its descriptor is for the client, who maps
    /// it writable; then call [`IngestFile::close_for_writers`].
    pub fn create(bytes: u64) -> io::Result<Self> {
        Ok(Self { file: memfd::create(c"tender-ingest", bytes, SealFlags::empty())?, bytes })
    }

    /// Takes a file that the client made, or that a former process of the daemon's did, of `bytes` (whole pages).
    ///
    /// `InvalidInput`, with the cure, if it is anything else than a memfd of ordinary pages, of that size, sealed `SHRINK` and `GROW`.
    /// Seals that lack are added where its maker allows it.
    pub fn adopt(file: OwnedFd, bytes: u64) -> io::Result<Self> {
        memfd::check(file.as_fd(), bytes)?;
        Ok(Self { file, bytes })
    }

    /// Size; never changes.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The descriptor, for the client to map and for whoever keeps it over the daemon's restart.
    pub fn descriptor(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// Lets nobody make another writable mapping, write to the file or punch holes into it. Mappings that are there stay writable, so call
    /// it when the client says that it has mapped the file. Calling it twice is calling it once.
    ///
    /// `PermissionDenied` when the client has forbidden further seals: it wants to keep a way to write, and is not to be served.
    pub fn close_for_writers(&self) -> io::Result<()> {
        if self.is_closed_for_writers()? {
            return Ok(());
        }
        rustix::fs::fcntl_add_seals(&self.file, SealFlags::FUTURE_WRITE).map_err(|errno| {
            let error = io::Error::from(errno);
            io::Error::new(
                error.kind(),
                format!(
                    "an ingest file cannot be closed for writers ({error}): do not add F_SEAL_SEAL to it, send a writable descriptor, and \
                     run the daemon on Linux 5.1 or newer"
                ),
            )
        })
    }

    /// Whether nobody can make another writable mapping.
    pub fn is_closed_for_writers(&self) -> io::Result<bool> {
        let seals = rustix::fs::fcntl_get_seals(&self.file)?;
        Ok(seals.intersects(SealFlags::FUTURE_WRITE | SealFlags::WRITE))
    }

    /// Maps a piece of it for reading.
    ///
    /// `InvalidInput` if the file is still open for writers, or the piece leaves it or is not in whole pages.
    pub(super) fn map(&self, offset: u64, bytes: usize) -> io::Result<MmapRaw> {
        let refuse = |why: String| Err(io::Error::new(io::ErrorKind::InvalidInput, why));
        if !self.is_closed_for_writers()? {
            return refuse("an ingest file is still open for writers: close it before it is read".to_owned());
        }
        let whole = offset.is_multiple_of(PAGE_BYTES) && memfd::whole_pages(bytes as u64).is_ok();
        if !whole || offset.checked_add(bytes as u64).is_none_or(|end| end > self.bytes) {
            let file_bytes = self.bytes;
            return refuse(format!(
                "{bytes} bytes at {offset} of an ingest file of {file_bytes} cannot be mapped: choose whole pages within it"
            ));
        }
        MmapOptions::new().offset(offset).len(bytes).map_raw_read_only(self.file.as_raw_fd())
    }
}

#[cfg(test)]
mod tests;
