//! A folder for the time of a command: on a file system with room and, if there is one, with O_DIRECT; removed at the end. Who is killed
//! leaves it behind: it is locked while it is used, so that [`left_behind`] can tell.

use std::fs::File;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, OFlags, flock, statfs, statvfs};
use tempfile::TempDir;

use crate::failure::Failure;
use crate::units;

/// The folder, and what lies under it.
#[derive(Debug)]
pub struct Scratch {
    folder: TempDir,
    /// The folder, locked. Not inherited by children.
    _lock: File,
    /// Name of the file system.
    pub file_system: String,
    /// Whether O_DIRECT works on it.
    pub direct: bool,
    /// Room when it was made.
    pub free_bytes: u64,
}

impl Scratch {
    /// Makes a folder that may grow to `needed_bytes`, under `under` or where it is best.
    pub fn new(prefix: &str, under: Option<&Path>, needed_bytes: u64) -> Result<Self, Failure> {
        match under {
            Some(place) => Self::as_asked(place, prefix, needed_bytes),
            None => Self::where_best(prefix, needed_bytes),
        }
    }

    /// In the folder that was asked for, whatever its file system is.
    fn as_asked(place: &Path, prefix: &str, needed_bytes: u64) -> Result<Self, Failure> {
        let shown = place.display();
        let scratch = Self::at(place, prefix).map_err(|error| {
            Failure::message(format_args!(
                "cannot make a temporary folder in `{shown}`: {error}; make it a folder that you may write to, or name another with --dir"
            ))
        })?;
        if scratch.free_bytes < needed_bytes {
            let (free, needed) = (units::bytes(scratch.free_bytes), units::bytes(needed_bytes));
            return Err(Failure::message(format_args!(
                "`{shown}` has {free} free, and temporary files need {needed}; free some, name another folder with --dir, or give a \
                 replay a smaller --disk"
            )));
        }
        Ok(scratch)
    }

    /// In the best of the usual places. Not on a file system in memory: there the disk tier would be a second copy in memory.
    fn where_best(prefix: &str, needed_bytes: u64) -> Result<Self, Failure> {
        let mut made = Vec::new();
        let mut refused = Vec::new();
        for place in usual_places() {
            match Self::at(&place, prefix) {
                Ok(scratch) if scratch.is_memory() => refused.push(format!("{} is memory", place.display())),
                Ok(scratch) if scratch.free_bytes >= needed_bytes => made.push(scratch),
                Ok(scratch) => {
                    refused.push(format!("{} has {} free", place.display(), units::bytes(scratch.free_bytes)))
                }
                Err(error) => refused.push(format!("{}: {error}", place.display())),
            }
        }
        if made.is_empty() {
            let (needed, found) = (units::bytes(needed_bytes), refused.join("; "));
            return Err(Failure::message(format_args!(
                "no folder has the {needed} needed for temporary files ({found}); free some, name another folder with --dir, or \
                 give a replay a smaller --disk"
            )));
        }
        let best = made.iter().position(|scratch| scratch.direct).unwrap_or(0);
        Ok(made.swap_remove(best))
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        self.folder.path()
    }

    /// Removes it now, and says when that fails.
    pub fn remove(self) -> Result<(), Failure> {
        let shown = self.folder.path().display().to_string();
        self.folder
            .close()
            .map_err(Failure::of(format_args!("cannot remove the temporary folder {shown}; remove it by hand")))
    }

    fn at(place: &Path, prefix: &str) -> std::io::Result<Self> {
        // What is no folder is told by its own name, and not by that of a file which would have been made in it.
        std::fs::metadata(place.join("."))?;
        let (folder, lock) = locked_folder(place, prefix)?;
        let room = statvfs(folder.path())?;
        let probe = folder.path().join("direct");
        let direct = i32::try_from(OFlags::DIRECT.bits())
            .is_ok_and(|flag| File::options().write(true).create(true).custom_flags(flag).open(&probe).is_ok());
        drop(std::fs::remove_file(&probe));
        let file_system = file_system_name(statfs(folder.path())?.f_type as u64);
        Ok(Self { folder, _lock: lock, file_system, direct, free_bytes: room.f_bavail.saturating_mul(room.f_frsize) })
    }

    fn is_memory(&self) -> bool {
        matches!(self.file_system.as_str(), "tmpfs" | "ramfs")
    }
}

/// What begins the names of all such folders.
const PREFIX: &str = "tender-";

/// An empty file in each of them: nobody else's folder has it, whatever its name.
const MARKER: &str = ".tender-scratch";

/// A folder, or a socket, of a process that is gone.
#[derive(Debug)]
pub struct LeftBehind {
    /// Where it is.
    pub path: PathBuf,
    /// What it is, for people.
    pub what: &'static str,
    /// Bytes on disk that it takes.
    pub bytes: u64,
    /// Nobody begins to use it meanwhile.
    _lock: Option<File>,
}

impl LeftBehind {
    /// Removes it; [`ResourceBusy`](std::io::ErrorKind::ResourceBusy) where somebody has begun to use it.
    pub fn remove(&self) -> std::io::Result<()> {
        if self.path.symlink_metadata()?.is_dir() {
            return std::fs::remove_dir_all(&self.path);
        }
        if !is_deserted(&self.path) {
            return Err(std::io::Error::new(std::io::ErrorKind::ResourceBusy, "somebody listens there now"));
        }
        std::fs::remove_file(&self.path)
    }
}

/// Folders of commands that were killed, in the usual places and in `places`; and of the sockets, those at which nobody listens.
pub fn left_behind(places: &[PathBuf], sockets: &[PathBuf]) -> Vec<LeftBehind> {
    let mut all = usual_places();
    all.extend_from_slice(places);
    let mut all: Vec<PathBuf> = all.into_iter().filter_map(|place| place.canonicalize().ok()).collect();
    all.sort_unstable();
    all.dedup();
    let folders = all.iter().filter_map(|place| std::fs::read_dir(place).ok()).flatten().flatten();
    let mut left: Vec<LeftBehind> = folders.filter_map(|entry| unused_folder(entry.path())).collect();
    left.extend(sockets.iter().filter(|socket| is_deserted(socket)).map(|socket| LeftBehind {
        path: socket.clone(),
        what: "a daemon's socket",
        bytes: 0,
        _lock: None,
    }));
    left
}

fn unused_folder(path: PathBuf) -> Option<LeftBehind> {
    let name = path.file_name()?.to_str()?;
    let what = [("replay-", "a replay's folder"), ("demo-", "a demo's folder")];
    let (_, what) =
        what.into_iter().find(|(of, _)| name.strip_prefix(PREFIX).is_some_and(|rest| rest.starts_with(of)))?;
    let found = path.symlink_metadata().ok()?;
    if !found.is_dir() || found.uid() != rustix::process::geteuid().as_raw() {
        return None;
    }
    path.join(MARKER).symlink_metadata().ok().filter(std::fs::Metadata::is_file)?;
    let lock = lock(&path).ok()?;
    let bytes = bytes_of(&path);
    Some(LeftBehind { path, what, bytes, _lock: Some(lock) })
}

fn bytes_of(folder: &Path) -> u64 {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let bytes = entries.map(|entry| match entry.metadata() {
        Ok(found) if found.is_dir() => bytes_of(&entry.path()),
        Ok(found) => found.blocks() * 512,
        Err(_) => 0,
    });
    bytes.sum()
}

/// Whether it is a socket at which nobody listens.
fn is_deserted(path: &Path) -> bool {
    let is_socket = path.symlink_metadata().is_ok_and(|found| found.file_type().is_socket());
    let refused = |error: std::io::Error| error.kind() == std::io::ErrorKind::ConnectionRefused;
    is_socket && UnixStream::connect(path).is_err_and(refused)
}

fn lock(folder: &Path) -> std::io::Result<File> {
    let lock = File::open(folder)?;
    flock(&lock, FlockOperation::NonBlockingLockExclusive)?;
    Ok(lock)
}

/// Nobody cleans it up before it is locked: until then it has no marker.
fn locked_folder(place: &Path, prefix: &str) -> std::io::Result<(TempDir, File)> {
    let folder = tempfile::Builder::new().prefix(&format!("{PREFIX}{prefix}")).tempdir_in(place)?;
    let lock = lock(folder.path())?;
    File::create(folder.path().join(MARKER))?;
    Ok((folder, lock))
}

fn usual_places() -> Vec<PathBuf> {
    let mut places: Vec<PathBuf> = std::env::var_os("TMPDIR").map(PathBuf::from).into_iter().collect();
    places.push("/var/tmp".into());
    places.extend(std::env::current_dir());
    places.push("/tmp".into());
    places
}

/// By the number in statfs(2).
fn file_system_name(number: u64) -> String {
    let name = match number {
        0xef53 => "ext4",
        0x5846_5342 => "xfs",
        0x9123_683e => "btrfs",
        0x0102_1994 => "tmpfs",
        0x8584_58f6 => "ramfs",
        0x794c_7630 => "overlayfs",
        0x2fc1_2fc1 => "zfs",
        0x6969 => "nfs",
        0xf2f5_2010 => "f2fs",
        0x6573_5546 => "fuse",
        0x0102_1997 => "9p",
        0x6a65_6a63 => "virtiofs",
        _ => return format!("unknown ({number:#x})"),
    };
    name.to_owned()
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn a_socket_at_which_somebody_listens_again_is_not_removed() {
        let folder = TempDir::new().unwrap();
        let path = folder.path().join("socket");
        drop(UnixListener::bind(&path).unwrap());
        let left = left_behind(&[], std::slice::from_ref(&path)).pop().unwrap();
        std::fs::remove_file(&path).unwrap();
        let listener = UnixListener::bind(&path).unwrap();
        assert_eq!(left.remove().unwrap_err().kind(), std::io::ErrorKind::ResourceBusy);
        assert!(path.exists());
        drop(listener);
        left.remove().unwrap();
        assert!(!path.exists());
    }
}
