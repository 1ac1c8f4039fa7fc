//! The file of a tenant's shared segments: written by the daemon only, mapped for reading by the tenant's clients, and still there when
//! the worker is not.
//!
//! A descriptor opened for reading protects nothing by itself: whoever holds it reopens it for writing through `/proc/self/fd`. So the
//! file lies on a tmpfs that is mounted twice, writable and read-only, in a namespace that ends with the process that made it (see
//! `shared/helper.rs`). Clients get a descriptor that came through the read-only mount; there, writing is refused to root too. Refused: a memfd
//! with `F_SEAL_FUTURE_WRITE`, which would lock out the daemon's next worker as well.

mod helper;

use std::fmt;
use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::fs::{FallocateFlags, Mode, OFlags, SealFlags};
use rustix::io::{Errno, retry_on_intr};

use super::memfd::{self, file_bytes, whole_pages};

/// How long making the file may take before it is made in the other way: it takes milliseconds.
const HELPER_WAIT: Duration = Duration::from_secs(10);

/// What `st_blksize` of a file says at least that gets huge pages.
const HUGE_PAGE_BYTES: u64 = 2 << 20;

/// Who cannot change a shared file by the descriptor for reading.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protection {
    /// Nobody can, root included: it came through a mount that is read-only.
    ReadOnlyMount,
    /// A process of another user than the daemon's cannot, unless it is root. Readers of whom that is not true verify what they read.
    OtherUserOnly,
}

impl Protection {
    /// Whether a client of user `client_uid`, as the kernel names it on its socket, cannot change the file of a daemon of `daemon_uid`.
    pub fn keeps_out(self, client_uid: u32, daemon_uid: u32) -> bool {
        match self {
            Self::ReadOnlyMount => true,
            Self::OtherUserOnly => client_uid != 0 && client_uid != daemon_uid,
        }
    }
}

/// A file of shared segments, by its two descriptors.
#[derive(Debug)]
pub struct SharedFile {
    writable: OwnedFd,
    read_only: OwnedFd,
    bytes: u64,
    protection: Protection,
    /// Why it is not better protected, where this process made it.
    refusal: Option<Refusal>,
}

/// Why there is no read-only mount.
#[derive(Debug)]
struct Refusal {
    step: &'static str,
    error: io::Error,
}

impl SharedFile {
    /// Makes a file of `bytes` (whole pages), all zeros, that takes memory where it is written; protected as well as the system allows.
    /// Starts a process that ends before this returns: call it early, while this one is small and has no tier file open.
    ///
    /// Fails only where a plain memory file fails: no more descriptors, `bytes` that are not whole pages.
    pub fn create(bytes: u64) -> io::Result<Self> {
        whole_pages(bytes)?;
        let mounted = helper::run(bytes, HELPER_WAIT).and_then(|(writable, read_only)| {
            let file = Self { writable, read_only, bytes, protection: Protection::ReadOnlyMount, refusal: None };
            file.check().map(|()| file).map_err(|error| Refusal { step: "the look at what was made", error })
        });
        mounted.or_else(|refusal| {
            tracing::debug!(%refusal, "no read-only mount for the shared segments");
            Self::in_memfd(bytes, refusal)
        })
    }

    /// The way without namespaces.
    fn in_memfd(bytes: u64, refusal: Refusal) -> io::Result<Self> {
        let writable = memfd::create(c"tender-shared", bytes, SealFlags::SEAL)?;
        rustix::fs::fchmod(&writable, Mode::RUSR)?;
        let read_only = reopen(writable.as_fd(), OFlags::RDONLY)?;
        let (protection, refusal) = (Protection::OtherUserOnly, Some(refusal));
        Ok(Self { writable, read_only, bytes, protection, refusal })
    }

    /// Takes the descriptors of a file that a former process of the daemon's made. Its contents are as that one left them.
    ///
    /// `InvalidData`, with what differs, unless they are the two descriptors of one file that is protected as stated.
    pub fn adopt(writable: OwnedFd, read_only: OwnedFd, protection: Protection) -> io::Result<Self> {
        let bytes = file_bytes(&rustix::fs::fstat(&writable)?);
        let file = Self { writable, read_only, bytes, protection, refusal: None };
        file.check()?;
        Ok(file)
    }

    /// Size; never changes.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Who cannot change it.
    pub fn protection(&self) -> Protection {
        self.protection
    }

    /// The descriptor for writing: for the daemon, and for whoever keeps it over the worker's restart. No client's.
    pub fn writable(&self) -> BorrowedFd<'_> {
        self.writable.as_fd()
    }

    /// The descriptor for clients, to map for reading.
    pub fn read_only(&self) -> BorrowedFd<'_> {
        self.read_only.as_fd()
    }

    /// Takes a piece (whole pages) out of it: whoever has it mapped sees zeros there from now on, and its memory is free.
    pub(super) fn punch(&self, offset: u64, bytes: u64) -> io::Result<()> {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        Ok(retry_on_intr(|| rustix::fs::fallocate(&self.writable, flags, offset, bytes))?)
    }

    /// What was found, for people.
    pub fn describe(&self) -> String {
        match (self.protection, &self.refusal) {
            (Protection::ReadOnlyMount, _) => {
                "a tmpfs file behind a read-only mount: no client can change it".to_owned()
            }
            (Protection::OtherUserOnly, refusal) => {
                let uid = rustix::process::geteuid().as_raw();
                let why = refusal.as_ref().map_or_else(String::new, |refusal| format!(", since {refusal}"));
                format!(
                    "a memory file{why}: clients of uid {uid} and root could change it, so they verify what they read"
                )
            }
        }
    }

    /// What to do for better protection; empty when there is none.
    pub fn cure(&self) -> &'static str {
        match self.protection {
            Protection::ReadOnlyMount => "",
            Protection::OtherUserOnly => {
                "run clients as another user than the daemon, or allow it user namespaces: sysctl user.max_user_namespaces=1000, \
                 kernel.unprivileged_userns_clone=1 and kernel.apparmor_restrict_unprivileged_userns=0 where they exist, and a seccomp \
                 profile that allows unshare, fsopen and mount_setattr; Linux 5.12 or newer"
            }
        }
    }

    /// Whether huge pages are given to who asks for them. Contrary to those of private memory each file system decides for itself.
    pub(super) fn huge_pages_allowed(&self) -> bool {
        let in_large_blocks = rustix::fs::fstat(&self.writable)
            .is_ok_and(|stat| u64::try_from(stat.st_blksize).is_ok_and(|bytes| bytes >= HUGE_PAGE_BYTES));
        in_large_blocks || (self.protection == Protection::OtherUserOnly && memfds_are_advised())
    }

    /// That the two descriptors are those of one file and give each what its holder is to have, and no more.
    fn check(&self) -> io::Result<()> {
        let refuse = |why: &str| {
            let why = format!("a shared file cannot be used: {why}; make another one");
            Err(io::Error::new(io::ErrorKind::InvalidData, why))
        };
        let (writable, read_only) = (rustix::fs::fstat(&self.writable)?, rustix::fs::fstat(&self.read_only)?);
        if (writable.st_dev, writable.st_ino) != (read_only.st_dev, read_only.st_ino) {
            return refuse("its two descriptors are those of different files");
        }
        if file_bytes(&writable) != self.bytes || whole_pages(self.bytes).is_err() {
            return refuse("its size is not the one stated, or not whole pages");
        }
        let mode = |fd: &OwnedFd| rustix::fs::fcntl_getfl(fd).map(|flags| flags & OFlags::RWMODE);
        if mode(&self.writable)? != OFlags::RDWR || mode(&self.read_only)? != OFlags::RDONLY {
            return refuse("one descriptor is to be opened for reading and writing, the other for reading only");
        }
        let protected = match self.protection {
            Protection::ReadOnlyMount => reopen(self.read_only.as_fd(), OFlags::RDWR).err() == Some(Errno::ROFS),
            Protection::OtherUserOnly => {
                writable.st_uid == rustix::process::geteuid().as_raw()
                    && Mode::from_raw_mode(writable.st_mode) == Mode::RUSR
                    && rustix::fs::fcntl_get_seals(&self.writable)?.contains(memfd::SIZE_SEALS)
            }
        };
        if protected { Ok(()) } else { refuse("clients could change it by the descriptor that they get") }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{} is refused ({})", self.step, self.error)
    }
}

/// Opens what a descriptor refers to once more.
fn reopen(fd: BorrowedFd<'_>, flags: OFlags) -> Result<OwnedFd, Errno> {
    let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
    rustix::fs::open(path, flags | OFlags::CLOEXEC, Mode::empty())
}

/// Whether a memfd gets huge pages where it asks for them.
fn memfds_are_advised() -> bool {
    let setting = fs::read_to_string("/sys/kernel/mm/transparent_hugepage/shmem_enabled");
    setting.is_ok_and(|setting| {
        ["[advise]", "[within_size]", "[always]", "[force]"].iter().any(|&on| setting.contains(on))
    })
}

#[cfg(test)]
mod tests;
