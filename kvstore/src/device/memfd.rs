//! Memory files without a name whose size nobody can change: who maps one is not killed by another who truncates it.

use std::ffi::CStr;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};

use rustix::fs::{MemfdFlags, SealFlags, Stat};
use rustix::io::Errno;

use super::block::PAGE_BYTES;

/// What keeps the size.
pub(super) const SIZE_SEALS: SealFlags = SealFlags::SHRINK.union(SealFlags::GROW);

/// `statfs` of a file whose huge pages come from a pool.
const HUGETLBFS_MAGIC: u64 = 0x9584_58f6;

/// A file of `bytes` zeros that takes memory where it is written, with `seals` and those of its size.
pub(super) fn create(name: &CStr, bytes: u64, seals: SealFlags) -> io::Result<OwnedFd> {
    whole_pages(bytes)?;
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let file = match rustix::fs::memfd_create(name, flags | MemfdFlags::NOEXEC_SEAL) {
        // Kernels before 6.3 do not know it; newer ones may refuse a file without it.
        Err(Errno::INVAL) => rustix::fs::memfd_create(name, flags)?,
        result => result?,
    };
    rustix::fs::ftruncate(&file, bytes)?;
    rustix::fs::fcntl_add_seals(&file, SIZE_SEALS | seals)?;
    Ok(file)
}

/// Looks at a file that somebody else made: a memfd of ordinary pages, of `bytes` and sealed so, if need be just now.
///
/// `InvalidInput` with the cure if it is anything else. Asks the memory file system only: of files that could make the call wait, those
/// of a server of its maker's, the first question already tells that they are none of these.
pub(super) fn check(file: BorrowedFd<'_>, bytes: u64) -> io::Result<()> {
    whole_pages(bytes)?;
    let seals = seals(file).or_else(refuse)?;
    if !seals.contains(SIZE_SEALS)
        && let Err(errno) = rustix::fs::fcntl_add_seals(file, SIZE_SEALS)
    {
        let error = io::Error::from(errno);
        return refuse(format!(
            "its size can be changed, and sealing it is refused ({error}): make it with memfd_create and MFD_ALLOW_SEALING, and send a \
             writable descriptor or add F_SEAL_SHRINK and F_SEAL_GROW before"
        ));
    }
    check_pages(file)?;
    match file_bytes(&rustix::fs::fstat(file)?) {
        found if found == bytes => Ok(()),
        found => refuse(format!("it has {found} bytes where {bytes} were stated: state its size")),
    }
}

/// The seals of a memfd; what else it is, with the cure.
pub(super) fn seals(file: BorrowedFd<'_>) -> Result<SealFlags, String> {
    let is_no_memfd = |_| "it is not a memfd: make it with memfd_create and MFD_ALLOW_SEALING".to_owned();
    rustix::fs::fcntl_get_seals(file).map_err(is_no_memfd)
}

/// That a memfd is of ordinary pages.
pub(super) fn check_pages(file: BorrowedFd<'_>) -> io::Result<()> {
    if rustix::fs::fstatfs(file)?.f_type as u64 == HUGETLBFS_MAGIC {
        return refuse(
            "its pages come from the pool of huge pages, and reading one that the pool does not have kills the reader: \
             make it without MFD_HUGETLB"
                .to_owned(),
        );
    }
    Ok(())
}

/// Which file it is: device and number. Of two that are there at the same time they differ.
pub(super) fn identity(file: BorrowedFd<'_>) -> io::Result<(u64, u64)> {
    let stat = rustix::fs::fstat(file)?;
    Ok((stat.st_dev, stat.st_ino))
}

/// Size of a file, in bytes.
pub(super) fn file_bytes(stat: &Stat) -> u64 {
    u64::try_from(stat.st_size).unwrap_or(0)
}

/// Memory is had in whole pages only, and a size is an `off_t`.
pub(super) fn whole_pages(bytes: u64) -> io::Result<()> {
    if bytes > 0 && bytes.is_multiple_of(PAGE_BYTES) && i64::try_from(bytes).is_ok() {
        return Ok(());
    }
    refuse(format!("it cannot have {bytes} bytes: choose a multiple of {PAGE_BYTES}"))
}

fn refuse<T>(why: String) -> io::Result<T> {
    Err(io::Error::new(io::ErrorKind::InvalidInput, format!("a memory file cannot be used: {why}")))
}
