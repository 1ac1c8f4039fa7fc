//! Ingest memory: a file that one client writes and the daemon only reads.
//!
//! Made here, or brought by the client. Its maker is never trusted, its size is sealed. Once the client has mapped it the file is closed for writers: no further writable
//! mapping of it can be made, by whatever way its descriptor is reopened or handed on, and no hole punched; the mapping that is there
//! goes on being written to. That is also what makes it safe to read: its pages, once made, stay.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use memmap2::{MmapOptions, MmapRaw};
use rustix::fs::{OFlags, SealFlags};

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

    /// Takes a file that a former process of the daemon's had, of `bytes` (whole pages).
    ///
    /// `InvalidInput`, with the cure, if it is anything else than a memfd of ordinary pages, of that size, sealed `SHRINK` and `GROW`.
    /// Seals that lack are added where its maker allows it.
    pub fn adopt(file: OwnedFd, bytes: u64) -> io::Result<Self> {
        memfd::check(file.as_fd(), bytes)?;
        Ok(Self { file, bytes })
    }

    /// Takes a file that a client brings: one that it made, has mapped for writing and has closed for writers, of `bytes` (whole pages).
    ///
    /// `InvalidInput`, with the cure, if it is anything else. Only looks, and asks the memory file system alone: whoever made the file
    /// could hold a lock on it for seconds, and where clients are listened to nobody may wait for one of them. So seals that lack are
    /// not added here.
    pub fn bring<F: AsFd + Into<OwnedFd>>(file: F, bytes: u64) -> io::Result<Self> {
        let refuse = |why: String| Err(io::Error::new(io::ErrorKind::InvalidInput, why));
        memfd::whole_pages(bytes)?;
        let seals = match memfd::seals(file.as_fd()) {
            Ok(seals) => seals,
            Err(why) => return refuse(why),
        };
        if seals.contains(SealFlags::WRITE) {
            return refuse(
                "F_SEAL_WRITE is on it, so no slot in it can be filled: map it for writing, and add F_SEAL_FUTURE_WRITE instead".to_owned(),
            );
        }
        let wanted = [
            (memfd::SIZE_SEALS, "its size can be changed", "F_SEAL_SHRINK and F_SEAL_GROW"),
            (SealFlags::FUTURE_WRITE, "others could map it for writing", "F_SEAL_FUTURE_WRITE once you have mapped it"),
        ];
        if let Some((_, fault, cure)) = wanted.into_iter().find(|(wanted, ..)| !seals.contains(*wanted)) {
            return refuse(format!("{fault}: make it with memfd_create and MFD_ALLOW_SEALING, and add {cure}"));
        }
        if rustix::fs::fcntl_getfl(&file)? & OFlags::ACCMODE != OFlags::RDWR {
            return refuse(
                "its descriptor is not for reading and writing, as that of your own memory is: send that one"
                    .to_owned(),
            );
        }
        let found = memfd::file_bytes(&rustix::fs::fstat(&file)?);
        if found != bytes {
            return refuse(format!(
                "it has {found} bytes, but segments here have {bytes}: bring one file of that size for each"
            ));
        }
        memfd::check_pages(file.as_fd())?;
        Ok(Self { file: file.into(), bytes })
    }

    /// What tells it from all other files that there are now, for whoever compares two of them.
    pub fn identity(&self) -> io::Result<(u64, u64)> {
        memfd::identity(self.file.as_fd())
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
