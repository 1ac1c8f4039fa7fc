//! The file of a disk tier: opened once, locked, given its whole size, and read and written synchronously until a device takes over.
//!
//! The lock belongs to the open file description, and so does all I/O: it falls only when the last request of a killed daemon has
//! ended, tens of milliseconds after its process is gone (seconds on a slow disk). Whoever has the lock therefore knows that nothing
//! of a former daemon will still be written. For the same reason the descriptor is never inherited, duplicated or handed on.
//!
//! A file gets its size last, after its blocks: a size of zero means that it was never finished, whatever killed its maker.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{AtFlags, FallocateFlags, FlockOperation, OFlags, StatxFlags};
use rustix::io::Errno;

use super::{PAGE_BYTES, PageFile};
use crate::device::memory::PageBuffer;

/// Pause between two tries of the lock.
const LOCK_POLL: Duration = Duration::from_millis(5);

/// A locked file of a fixed size.
#[derive(Debug)]
pub struct TierFile {
    file: Arc<File>,
    bytes: u64,
    direct: bool,
}

/// What opening gave.
#[derive(Debug)]
pub struct Opened {
    /// The file.
    pub file: TierFile,
    /// It was made just now: it holds nothing, and reads of what was never written do not reach the disk.
    pub fresh: bool,
}

/// Why a tier file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Somebody else has it.
    #[error(
        "{} is in use: another tender daemon uses it (or one that was killed still has requests in \
         flight); stop it or give this one another --dir",
        path.display()
    )]
    Locked {
        /// The file.
        path: PathBuf,
    },
    /// It is there, with another size.
    #[error(
        "{} has {found_bytes} bytes where {wanted_bytes} are asked for, and its contents would be lost by a change \
         of size; start with the size it has, or delete it to begin with an empty disk tier",
        path.display()
    )]
    WrongSize {
        /// The file.
        path: PathBuf,
        /// Its size.
        found_bytes: u64,
        /// The size asked for.
        wanted_bytes: u64,
    },
    /// The file system is too full.
    #[error(
        "{} cannot have {wanted_bytes} bytes because its file system has {free_bytes} free; free some, \
         ask for a smaller disk tier, or give another --dir",
        path.display()
    )]
    NoRoom {
        /// The file.
        path: PathBuf,
        /// The size asked for.
        wanted_bytes: u64,
        /// What the file system, or the user's quota, had left.
        free_bytes: u64,
    },
    /// A folder, a device, a socket.
    #[error("{} cannot hold a disk tier because it is not a regular file; move it away or give another --dir", path.display())]
    NotAFile {
        /// What was found.
        path: PathBuf,
    },
    /// Anything else that the system says.
    #[error(
        "{} cannot be {step}: {source}; see that its folder exists, that this user may write there and \
         that the file system is healthy",
        path.display()
    )]
    System {
        /// What was tried, as a participle.
        step: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
}

impl TierFile {
    /// Opens the file, or makes it, with exactly `bytes`, all allocated where the file system can. Its folder must exist. Waits up to
    /// `lock_wait` for the lock.
    ///
    /// # Panics
    /// When `bytes` is zero or not whole pages.
    pub fn open(path: &Path, bytes: u64, lock_wait: Duration) -> Result<Opened, OpenError> {
        assert!(bytes > 0 && bytes.is_multiple_of(PAGE_BYTES), "a tier file of {bytes} bytes: not whole pages");
        let system = |step| move |source: io::Error| OpenError::System { step, path: path.to_owned(), source };
        if path.metadata().is_ok_and(|found| !found.is_file()) {
            return Err(OpenError::NotAFile { path: path.to_owned() });
        }
        let (file, direct) = open_direct(path).map_err(system("opened"))?;
        lock(&file, lock_wait).map_err(|errno| match errno {
            Errno::WOULDBLOCK => OpenError::Locked { path: path.to_owned() },
            other => system("locked")(other.into()),
        })?;
        let found = file.metadata().map_err(system("looked at"))?;
        let fresh = found.len() == 0;
        if fresh {
            let allocated_bytes = found.blocks() * 512;
            allocate(&file, path, bytes, allocated_bytes)?;
            sync_folder(path).map_err(system("made durable"))?;
        } else if found.len() != bytes {
            return Err(OpenError::WrongSize { path: path.to_owned(), found_bytes: found.len(), wanted_bytes: bytes });
        }
        Ok(Opened { file: Self { file: Arc::new(file), bytes, direct }, fresh })
    }

    /// Whether reads and writes go past the page cache.
    pub fn is_direct(&self) -> bool {
        self.direct
    }

    /// The descriptor.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// The same descriptor, for a device that outlives this.
    pub(super) fn shared(&self) -> Arc<File> {
        Arc::clone(&self.file)
    }
}

impl PageFile for TierFile {
    fn read_pages(&self, offset: u64, pages: usize) -> io::Result<PageBuffer> {
        let mut buffer = PageBuffer::zeroed(pages)?;
        self.file.read_exact_at(&mut buffer, offset)?;
        Ok(buffer)
    }

    fn write_pages(&mut self, offset: u64, pages: &PageBuffer) -> io::Result<()> {
        if offset.checked_add(pages.len() as u64).is_none_or(|end| end > self.bytes) {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "a write behind the end of the tier file"));
        }
        self.file.write_all_at(pages, offset)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.sync_data()
    }

    fn bytes(&self) -> u64 {
        self.bytes
    }
}

/// Opens for O_DIRECT where the file system takes it in pages, and says whether it does.
fn open_direct(path: &Path) -> io::Result<(File, bool)> {
    let open = |flags: OFlags| {
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false).mode(0o600);
        options.custom_flags(flags.bits() as i32).open(path)
    };
    let file = match open(OFlags::DIRECT) {
        Err(error) if error.raw_os_error() == Some(Errno::INVAL.raw_os_error()) => {
            return Ok((open(OFlags::empty())?, false));
        }
        opened => opened?,
    };
    // Some file systems accept the flag and then ignore it, or want more than a page of alignment. Kernels before 6.1 cannot say.
    let takes_pages = match rustix::fs::statx(&file, c"", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN) {
        Ok(found) if StatxFlags::from_bits_retain(found.stx_mask).contains(StatxFlags::DIOALIGN) => {
            let fits = |align: u32| align != 0 && PAGE_BYTES.is_multiple_of(u64::from(align));
            fits(found.stx_dio_offset_align) && fits(found.stx_dio_mem_align)
        }
        _ => true,
    };
    if !takes_pages {
        let flags = rustix::fs::fcntl_getfl(&file)?;
        rustix::fs::fcntl_setfl(&file, flags.difference(OFlags::DIRECT))?;
    }
    Ok((file, takes_pages))
}

/// Tries for the exclusive lock until `wait` is over, once at least.
fn lock(file: &File, wait: Duration) -> Result<(), Errno> {
    let deadline = Instant::now() + wait;
    loop {
        match rustix::fs::flock(file, FlockOperation::NonBlockingLockExclusive) {
            Err(Errno::INTR) => {}
            Err(Errno::WOULDBLOCK) if Instant::now() < deadline => thread::sleep(LOCK_POLL),
            result => return result,
        }
    }
}

/// Gives an empty file its blocks, then its size.
fn allocate(file: &File, path: &Path, bytes: u64, allocated_bytes: u64) -> Result<(), OpenError> {
    let system = |source: Errno| OpenError::System { step: "allocated", path: path.to_owned(), source: source.into() };
    let free_bytes = || rustix::fs::fstatvfs(file).map(|found| found.f_bavail.saturating_mul(found.f_frsize));
    let no_room = |free_bytes| OpenError::NoRoom { path: path.to_owned(), wanted_bytes: bytes, free_bytes };

    // Asked first, because a failing allocation fills the file system before it fails.
    let free_before_bytes = free_bytes().map_err(system)?;
    if free_before_bytes.saturating_add(allocated_bytes) < bytes {
        return Err(no_room(free_before_bytes));
    }
    let allocated = loop {
        match rustix::fs::fallocate(file, FallocateFlags::KEEP_SIZE, 0, bytes) {
            Err(Errno::INTR) => {}
            // No such thing on this file system: blocks come with the first writes.
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => break Ok(()),
            result => break result,
        }
    };
    let result = match allocated {
        Ok(()) => file.set_len(bytes).and_then(|()| file.sync_all()).map_err(|source| OpenError::System {
            step: "given its size",
            path: path.to_owned(),
            source,
        }),
        Err(Errno::NOSPC | Errno::DQUOT) => Err(no_room(free_bytes().unwrap_or(0))),
        Err(errno) => Err(system(errno)),
    };
    if result.is_err() {
        // Gives back what a failed allocation has taken. Whether that works changes nothing for the caller, who gets the first error.
        let _ = file.set_len(0);
    }
    result
}

/// Makes the file's name survive a power cut.
fn sync_folder(path: &Path) -> io::Result<()> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(folder)?.sync_all()
}

#[cfg(test)]
mod tests;
