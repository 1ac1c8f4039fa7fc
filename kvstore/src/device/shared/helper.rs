//! The process that makes a file in two mounts and hands back a descriptor through each.
//!
//! Mounting takes a user namespace, and a process that enters one loses the capabilities it had outside (locking memory beyond the limit
//! among them). So a child does it and ends: the mounts live on in the two descriptors, belong to no namespace any more, and nobody can
//! find them to mount them otherwise.
//!
//! A fork of a process with threads, without `exec`, since this is no program that could be executed again (a test is not). The child
//! has one thread and whatever state the others' locks were in: it makes system calls only, takes no lock, allocates nothing, and ends
//! without running what this process has registered for its exit. What it needs is put together before the fork. It closes what it
//! inherited first, since a lock on a tier file falls only with the last holder of its descriptor.

#![expect(unsafe_code, reason = "forks, enters namespaces, and makes a system call that no crate wraps")]

use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, OpenTreeFlags};
use rustix::net::{AddressFamily, SocketFlags, SocketType};
use rustix::process::{Pid, Signal, WaitOptions};
use rustix::thread::UnshareFlags;

use super::Refusal;
use tender_proto::descriptors;

/// Pause between two looks whether the child has ended.
const REAP_POLL: Duration = Duration::from_millis(1);

/// How long a killed child is waited for. One that the system does not let go then stays a zombie until this process ends.
const REAP_WAIT: Duration = Duration::from_secs(1);

/// Names of the child's steps, by number; it can send no text.
const STEPS: [&str; 10] = [
    "unshare (user and mount namespace)",
    "writing the maps of a user namespace",
    "fsopen of a tmpfs",
    "a tmpfs of this size",
    "fsmount",
    "move_mount",
    "a second mount by open_tree",
    "mount_setattr (read-only)",
    "a file on the tmpfs",
    "opening the file through the read-only mount",
];

/// What the child says: the number of the step that was refused (or `DONE`) and the error's number, little-endian.
type Report = [u8; 5];

/// Report of a child that sends two descriptors, for writing and for reading.
const DONE: u8 = u8::MAX;

/// Name of the file; it is seen in `/proc/*/maps`.
const FILE: &CStr = c"tender-shared";

/// A step that was refused, by its number.
struct Refused(u8, Errno);

/// What the child needs, put together before it exists.
struct Recipe {
    size: CString,
    bytes: u64,
    user_map: String,
    group_map: String,
}

/// Makes a file of `bytes`; the descriptor for writing and the one for reading. Gives up, and kills the child, after `patience`.
pub(super) fn run(bytes: u64, patience: Duration) -> Result<(OwnedFd, OwnedFd), Refusal> {
    let recipe = Recipe {
        size: CString::new(bytes.to_string()).expect("digits"),
        bytes,
        // One line each, the only map that may be written without privilege: what is made in the namespace belongs to this user outside.
        user_map: format!("0 {} 1", rustix::process::geteuid().as_raw()),
        group_map: format!("0 {} 1", rustix::process::getegid().as_raw()),
    };
    let deadline = Instant::now() + patience;
    let refusal = |step| move |error: io::Error| Refusal { step, error };
    let pair = rustix::net::socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None);
    let (ours, childs) = pair.map_err(|errno| refusal("a pair of sockets")(errno.into()))?;
    // SAFETY: the child runs `child` alone, which keeps to what may be done between fork and exit in a process that had threads (see the
    // module's head) and never returns.
    let pid = match unsafe { libc::fork() } {
        0 => child(childs.as_fd(), &recipe),
        pid => Pid::from_raw(pid).filter(|_| pid > 0),
    };
    let pid = pid.ok_or_else(io::Error::last_os_error).map_err(refusal("fork"))?;
    drop(childs);
    let mut report: Report = [0; 5];
    let received = descriptors::receive(ours.as_fd(), &mut report, 2, deadline);
    reap(pid, if received.is_ok() { deadline } else { Instant::now() });
    let received = received.map_err(refusal("a process that mounts"))?;
    let [step, errno @ ..] = report;
    match (step, <[OwnedFd; 2]>::try_from(received)) {
        (DONE, Ok([writable, read_only])) => Ok((writable, read_only)),
        (step, _) => {
            let step = STEPS.get(usize::from(step)).copied().unwrap_or("a process that mounts");
            Err(refusal(step)(io::Error::from_raw_os_error(i32::from_le_bytes(errno))))
        }
    }
}

/// Waits for the child's end until `deadline`, then kills it.
fn reap(pid: Pid, deadline: Instant) {
    let mut kill = Some(deadline);
    let give_up = deadline + REAP_WAIT;
    loop {
        match rustix::process::waitpid(Some(pid), WaitOptions::NOHANG) {
            Ok(None) | Err(Errno::INTR) => {}
            // It has ended, or somebody else has waited for it.
            Ok(Some(_)) | Err(_) => return,
        }
        let now = Instant::now();
        if kill.take_if(|deadline| *deadline <= now).is_some() {
            // Fails only when it has just ended.
            let _ = rustix::process::kill_process(pid, Signal::KILL);
        }
        if now >= give_up {
            return tracing::warn!(
                pid = pid.as_raw_nonzero(),
                "a killed child does not end: it stays until this process ends"
            );
        }
        thread::sleep(REAP_POLL);
    }
}

/// All that the child does. What it allocates or locks could hang it; then it is killed.
fn child(socket: BorrowedFd<'_>, recipe: &Recipe) -> ! {
    let end = End;
    close_others(socket.as_raw_fd());
    let (report, made) = match make(recipe) {
        Ok(made) => (report(DONE, 0), Some(made)),
        Err(Refused(step, errno)) => (report(step, errno.raw_os_error()), None),
    };
    // If it fails the other side sees the end of this process.
    let _ = match &made {
        Some((writable, read_only)) => descriptors::try_send(socket, &report, &[writable.as_fd(), read_only.as_fd()]),
        None => descriptors::try_send(socket, &report, &[]),
    };
    drop(end);
    unreachable!("the process has ended")
}

/// Ends this process when dropped, so that a panic in the child does not unwind into a second copy of its parent.
struct End;

impl Drop for End {
    fn drop(&mut self) {
        // SAFETY: ends the process at once, without a look at its state.
        unsafe { libc::_exit(0) }
    }
}

fn report(step: u8, errno: i32) -> Report {
    let [a, b, c, d] = errno.to_le_bytes();
    [step, a, b, c, d]
}

/// Closes all descriptors but the standard ones and `kept`. Kernels before 5.9 cannot; then they stay open while this process lives.
fn close_others(kept: RawFd) {
    for (first, last) in [(3, kept.saturating_sub(1)), (kept.saturating_add(1).max(3), RawFd::MAX)] {
        if first <= last {
            // SAFETY: descriptors of this process only, which has a table of its own; nothing of it uses those that it inherited.
            unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) };
        }
    }
}

/// Makes the file: the descriptor for writing and the one for reading. `STEPS` names what it does.
fn make(recipe: &Recipe) -> Result<(OwnedFd, OwnedFd), Refused> {
    let step = |number| move |errno| Refused(number, errno);
    // SAFETY: no table of descriptors is unshared.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWUSER | UnshareFlags::NEWNS) }.map_err(step(0))?;
    write_maps(recipe).map_err(step(1))?;
    let tmpfs = rustix::mount::fsopen(c"tmpfs", FsOpenFlags::FSOPEN_CLOEXEC).map_err(step(2))?;
    rustix::mount::fsconfig_set_string(tmpfs.as_fd(), c"size", &recipe.size).map_err(step(3))?;
    // Where the kernel knows no huge pages it refuses this, and the file has small ones. Not `advise`: this one can be seen by `stat`.
    let _ = rustix::mount::fsconfig_set_string(tmpfs.as_fd(), c"huge", c"within_size");
    rustix::mount::fsconfig_create(tmpfs.as_fd()).map_err(step(3))?;
    let attributes =
        MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NODEV | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    let mount = rustix::mount::fsmount(tmpfs.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, attributes).map_err(step(4))?;
    // Kernels before 6.15 clone only what is mounted somewhere. Over the root: it is there, and nobody else sees this namespace.
    rustix::mount::move_mount(mount.as_fd(), c"", rustix::fs::CWD, c"/", MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
        .map_err(step(5))?;
    let clone_flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_EMPTY_PATH;
    let read_only_mount = rustix::mount::open_tree(mount.as_fd(), c"", clone_flags).map_err(step(6))?;
    make_read_only(read_only_mount.as_fd()).map_err(step(7))?;
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
    // Its owner may write, so that it is the mount that refuses: then the parent sees that it does.
    let writable = rustix::fs::openat(&mount, FILE, flags, Mode::RUSR | Mode::WUSR).map_err(step(8))?;
    rustix::fs::ftruncate(&writable, recipe.bytes).map_err(step(8))?;
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    let read_only = rustix::fs::openat(&read_only_mount, FILE, flags, Mode::empty()).map_err(step(9))?;
    Ok((writable, read_only))
}

/// Makes this process root of its user namespace, and what it makes its user's outside.
fn write_maps(recipe: &Recipe) -> Result<(), Errno> {
    let write = |path: &CStr, text: &str| {
        let file = rustix::fs::open(path, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())?;
        rustix::io::write(&file, text.as_bytes()).map(drop)
    };
    // Without it no map of groups may be written; older kernels do not have it.
    match write(c"/proc/self/setgroups", "deny") {
        Err(Errno::NOENT) | Ok(()) => {}
        refused => return refused,
    }
    write(c"/proc/self/uid_map", &recipe.user_map)?;
    write(c"/proc/self/gid_map", &recipe.group_map)
}

fn make_read_only(mount: BorrowedFd<'_>) -> Result<(), Errno> {
    let attributes = libc::mount_attr { attr_set: libc::MOUNT_ATTR_RDONLY, attr_clr: 0, propagation: 0, userns_fd: 0 };
    // SAFETY: the path is a string that ends with a zero, the attributes are of the kernel's layout and of the size stated; both are
    // there during the call, which keeps neither.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            &raw const attributes,
            size_of_val(&attributes),
        )
    };
    if result == 0 { Ok(()) } else { Err(Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::INVAL)) }
}

#[cfg(test)]
mod tests;
