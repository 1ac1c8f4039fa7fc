//! What passes between daemon, keeper and clients besides bytes: descriptors in messages, wake-ups, and processes by their pidfd.
//!
//! A descriptor that somebody else holds too is shared with all its settings. Its holder can switch off `O_NONBLOCK` at any time, so
//! nothing here relies on that: a call on what is shared either cannot wait by its own flags, or is named as one that can. Dropping a
//! descriptor that a client sent may wait as well (its last close asks the file system behind it): do so where waiting stops nobody else.

use std::fmt;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::fs::OFlags;
use rustix::io::{Errno, ReadWriteFlags};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType,
};
use rustix::process::{Pid, PidfdFlags};

/// Most descriptors of one message: an attachment needs at most a pidfd, two wake-ups, the shared file, the ring and an ingest file.
pub const DESCRIPTORS_MAX: usize = 8;

/// What one call received.
#[derive(Debug, Default)]
pub struct Received {
    /// How many bytes; zero only when the other side is gone.
    pub bytes: usize,
    /// The descriptors that came with them, in order; not inherited by programs that this process starts.
    pub descriptors: Vec<OwnedFd>,
}

/// Sends what there is room for and returns how many bytes that was: `WouldBlock` if there is none. The descriptors go with the first
/// byte; the rest, if any, is then to be sent without them. Never waits, and allocates nothing unless it refuses its arguments.
///
/// Refused with `InvalidInput`: more than [`DESCRIPTORS_MAX`] descriptors, or no bytes.
pub fn try_send(socket: BorrowedFd<'_>, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) -> io::Result<usize> {
    if bytes.is_empty() || descriptors.len() > DESCRIPTORS_MAX {
        let (length, count) = (bytes.len(), descriptors.len());
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!(
                "a message of {length} bytes and {count} descriptors cannot be sent: send one byte at least and {DESCRIPTORS_MAX} \
                 descriptors at most"
            ),
        ));
    }
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() {
        let pushed = control.push(SendAncillaryMessage::ScmRights(descriptors));
        assert!(pushed, "there is room for {DESCRIPTORS_MAX}");
    }
    let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
    Ok(rustix::net::sendmsg(socket, &[IoSlice::new(bytes)], &mut control, flags)?)
}

/// Receives what is there, up to the length of `into`, with at most `descriptors_max` descriptors; a surplus is closed. `WouldBlock` if
/// nothing is there; never waits.
///
/// `InvalidData` when something was lost: more than [`DESCRIPTORS_MAX`] descriptors, more than this process may have open, or (on
/// sockets that keep messages apart) a message longer than `into`. What did come is closed then.
pub fn try_receive(socket: BorrowedFd<'_>, into: &mut [u8], descriptors_max: usize) -> io::Result<Received> {
    let mut descriptors = Vec::new();
    let bytes = try_receive_open(socket, into, Some(&mut descriptors))?;
    descriptors.truncate(descriptors_max);
    Ok(Received { bytes, descriptors })
}

/// As [`try_receive`], but closes nothing: whatever came is in `descriptors`, [`DESCRIPTORS_MAX`] and one at most, also after an error.
/// Without `descriptors` they are discarded by the system, before they are open here, and that is an error as any other loss.
pub fn try_receive_open(
    socket: BorrowedFd<'_>,
    into: &mut [u8],
    descriptors: Option<&mut Vec<OwnedFd>>,
) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
    let room = if descriptors.is_some() { space.len() } else { 0 };
    let mut control = RecvAncillaryBuffer::new(&mut space[..room]);
    let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
    let message = rustix::net::recvmsg(socket, &mut [IoSliceMut::new(into)], &mut control, flags)?;
    let mut count = 0;
    if let Some(descriptors) = descriptors {
        for part in control.drain() {
            if let RecvAncillaryMessage::ScmRights(received) = part {
                let before = descriptors.len();
                descriptors.extend(received);
                count += descriptors.len() - before;
            }
        }
    }
    if message.flags.contains(ReturnFlags::CTRUNC) || count > DESCRIPTORS_MAX {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!(
                "descriptors of a message were lost: send at most {DESCRIPTORS_MAX} at a time, and raise the limit of open files (ulimit -n)"
            ),
        ));
    }
    if message.flags.contains(ReturnFlags::TRUNC) {
        let room = into.len();
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!("a message of more than {room} bytes was cut: send it in the length agreed upon"),
        ));
    }
    Ok(message.bytes)
}

/// Sends all of it, waiting for room until `deadline`.
///
/// Errors: those of [`try_send`], `BrokenPipe` when the other side is gone, `TimedOut`, after which part of it may have been sent.
pub fn send(socket: BorrowedFd<'_>, bytes: &[u8], descriptors: &[BorrowedFd<'_>], deadline: Instant) -> io::Result<()> {
    let mut sent = 0;
    loop {
        match try_send(socket, &bytes[sent..], if sent == 0 { descriptors } else { &[] }) {
            Ok(count) => sent += count,
            Err(error) if may_succeed_later(&error) => wait_until(socket, PollFlags::OUT, deadline)?,
            Err(error) => return Err(error),
        }
        if sent == bytes.len() {
            return Ok(());
        }
    }
}

/// Receives until `into` is full, waiting until `deadline`; at most `descriptors_max` descriptors, a surplus is closed.
///
/// Errors: those of [`try_receive`], `UnexpectedEof` when the other side ends before, `TimedOut`. What did come is lost then.
pub fn receive(
    socket: BorrowedFd<'_>,
    into: &mut [u8],
    descriptors_max: usize,
    deadline: Instant,
) -> io::Result<Vec<OwnedFd>> {
    let (mut filled, mut descriptors) = (0, Vec::new());
    while filled < into.len() {
        match try_receive(socket, &mut into[filled..], descriptors_max - descriptors.len()) {
            Ok(Received { bytes: 0, .. }) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(received) => {
                filled += received.bytes;
                descriptors.extend(received.descriptors);
            }
            Err(error) if may_succeed_later(&error) => wait_until(socket, PollFlags::IN, deadline)?,
            Err(error) => return Err(error),
        }
    }
    Ok(descriptors)
}

fn may_succeed_later(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}

/// Waits until `fd` is ready, or nobody is at its other end any more.
fn wait_until(fd: BorrowedFd<'_>, flags: PollFlags, deadline: Instant) -> io::Result<()> {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let ready = match is_ready(fd, flags, left) {
            Err(Errno::INTR) => false,
            result => result?,
        };
        if ready {
            return Ok(());
        }
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
    }
}

fn is_ready(fd: BorrowedFd<'_>, flags: PollFlags, timeout: Duration) -> Result<bool, Errno> {
    // A duration that does not fit is for ever as good as another.
    let timeout = Timespec::try_from(timeout).ok();
    let mut fds = [PollFd::from_borrowed_fd(fd, flags)];
    Ok(poll(&mut fds, timeout.as_ref())? > 0)
}

/// A counter to wait on: whoever has the descriptor signals, the daemon clears.
///
/// Only for waking those who are trusted less: signalling can wait for ever, if another holder fills the counter and takes `O_NONBLOCK`
/// off. To wake a client ring a [`Bell`].
#[derive(Debug)]
pub struct EventFd(OwnedFd);

impl EventFd {
    /// A counter at zero.
    pub fn new() -> io::Result<Self> {
        Ok(Self(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?))
    }

    /// Takes a descriptor that was received; `InvalidInput` if it is anything else than an eventfd.
    pub fn from_fd(fd: OwnedFd) -> io::Result<Self> {
        fd_info(fd.as_fd(), "eventfd-count")?.ok_or_else(|| refused("an eventfd", "eventfd(2)"))?;
        Ok(Self(fd))
    }

    /// Wakes who waits, or who will wait next. May block if another holder wants it to.
    pub fn signal(&self) -> io::Result<()> {
        // Any number but zero, in either byte order.
        match rustix::io::write(&self.0, &[0, 0, 0, 1, 1, 0, 0, 0]) {
            // The counter is full: it wakes as it is.
            Err(Errno::AGAIN) => Ok(()),
            result => Ok(result.map(drop)?),
        }
    }

    /// Sets the counter to zero; whether it had been signalled. Never waits, whatever other holders do.
    pub fn clear(&self) -> io::Result<bool> {
        let mut count = [0; 8];
        // No offset, but the position: an eventfd has neither.
        let result = rustix::io::preadv2(&self.0, &mut [IoSliceMut::new(&mut count)], u64::MAX, ReadWriteFlags::NOWAIT);
        match result {
            Ok(_) => Ok(true),
            Err(Errno::AGAIN) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }
}

impl AsFd for EventFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Wakes a client. A pair of sockets, since each end has settings of its own: nothing that the client does to its end makes ringing wait.
#[derive(Debug)]
pub struct Bell(OwnedFd);

impl Bell {
    /// The bell, and the end to be sent to who is to hear it: it becomes readable when the bell is rung; reading takes the rings away.
    pub fn new() -> io::Result<(Self, OwnedFd)> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let (bell, listener) = rustix::net::socketpair(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        Ok((Self(bell), listener))
    }

    /// Wakes who listens, or who will listen next. Never waits. `BrokenPipe` when nobody has the other end any more.
    pub fn ring(&self) -> io::Result<()> {
        match rustix::net::send(&self.0, &[1], SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
            // Full of rings that were not heard yet: they wake as well as one more.
            Err(Errno::AGAIN) => Ok(()),
            result => Ok(result.map(drop)?),
        }
    }
}

/// A process, held by its pidfd: its number may go to another process, this never does.
///
/// Death is that of the process. A child that it forked may live on and have the same memory mapped.
pub struct Process(OwnedFd);

impl Process {
    /// This process, to be sent to the daemon.
    pub fn open_self() -> io::Result<Self> {
        Ok(Self(rustix::process::pidfd_open(rustix::process::getpid(), PidfdFlags::empty())?))
    }

    /// Takes a descriptor that was received; `InvalidInput` if it is anything else than the pidfd of a process. That of a thread is
    /// refused: its end proves nothing about the process. It is an [`OwnedFd`] once it is known to be a pidfd, whose closing never waits.
    pub fn from_fd<F: AsFd + Into<OwnedFd>>(fd: F) -> io::Result<Self> {
        let refusal = || refused("the pidfd of a process", "pidfd_open(getpid(), 0)");
        fd_info(fd.as_fd(), "Pid")?.ok_or_else(refusal)?;
        // The bit is that of PIDFD_THREAD.
        if rustix::fs::fcntl_getfl(&fd)?.contains(OFlags::EXCL) {
            return Err(refusal());
        }
        Ok(Self(fd.into()))
    }

    /// Whether all its threads have ended, and so no longer use any memory. Where the system cannot say it counts as alive.
    pub fn is_dead(&self) -> bool {
        loop {
            match is_ready(self.as_fd(), PollFlags::IN, Duration::ZERO) {
                Err(Errno::INTR) => {}
                result => return result.unwrap_or(false),
            }
        }
    }

    /// Its number here; nothing when it is dead and was waited for, or lives in a namespace of processes that cannot be seen from here.
    pub fn pid(&self) -> io::Result<Option<Pid>> {
        let number = fd_info(self.as_fd(), "Pid")?.and_then(|number| number.parse().ok());
        Ok(number.filter(|&number| number > 0).and_then(Pid::from_raw))
    }

    /// Whether it is the process that has the number `pid` now. No where its number is not known.
    pub fn same_process(&self, pid: Pid) -> bool {
        self.pid().is_ok_and(|own| own == Some(pid))
    }
}

impl AsFd for Process {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl fmt::Debug for Process {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let pid = self.pid().ok().flatten().map(Pid::as_raw_nonzero);
        formatter.debug_struct("Process").field("pid", &pid).field("fd", &self.0).finish()
    }
}

/// What the kernel says of a descriptor of this process in the line `name: value`. Asks nobody who could have made it.
fn fd_info(fd: BorrowedFd<'_>, name: &str) -> io::Result<Option<String>> {
    let path = format!("/proc/self/fdinfo/{}", fd.as_raw_fd());
    let text = std::fs::read_to_string(&path).map_err(|error| {
        io::Error::new(
            error.kind(),
            format!("{path} cannot be read ({error}): what a descriptor is stands there; mount /proc"),
        )
    })?;
    let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    Ok(value.map(|value| value.trim().to_owned()))
}

fn refused(wanted: &str, cure: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, format!("a descriptor is not {wanted}: send what {cure} returns"))
}

#[cfg(test)]
mod tests;
