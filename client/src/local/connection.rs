//! One connection to the local door: a socket, a ring, mapped memory, and the thread that attends to them.
//!
//! The thread `tender-door` sleeps until the bell rings (answers came), the socket has a message (memory to map or to forget; its end
//! is the daemon's), or somebody here wakes it (there is something to give back, or everybody has gone). It maps memory to be read by
//! itself; memory to be written is made page by page on a thread of its own, since answers are not to wait for that.
//!
//! Views and slots outlive the client that got them: they hold the connection, and the daemon hears `Leave` when the last of them is
//! dropped.

use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use tender_proto::descriptors::{self, EventFd};
use tender_proto::greeting::{self, MESSAGE_BYTES, Message, ToClient, ToDaemon};
use tokio::sync::watch;
use tokio::time::timeout;

use super::calls::Calls;
use super::debts::Debts;
use super::mapping::Mapping;
use super::mappings::{Found, Mappings};
use super::memory::Brought;
use crate::deadline;

/// Dropped, it leaves once everything is given back.
pub(crate) struct Connection(Arc<Inner>);

/// What the thread holds too.
pub(super) struct Inner {
    pub(super) calls: Calls,
    pub(super) debts: Arc<Debts>,
    pub(super) mappings: Mappings,
    pub(super) brought: Arc<Brought>,
    /// Length of what may be brought; 0: nothing may.
    pub(super) brought_bytes: u64,
    /// Every lease is to be verified: shared memory could be changed by clients here.
    pub(super) verify: bool,
    pub(super) socket: UnixStream,
    pub(super) bell: OwnedFd,
    pub(super) wake: Arc<EventFd>,
    /// One message at a time.
    pub(super) sending: Mutex<()>,
    pub(super) is_leaving: AtomicBool,
    /// `Leave` was said.
    pub(super) has_left: AtomicBool,
    pub(super) over: watch::Sender<bool>,
}

/// A message as far as it came.
struct Arriving {
    bytes: Message,
    filled: usize,
    descriptors: Vec<OwnedFd>,
}

impl Connection {
    /// Starts the thread.
    pub(super) fn start(inner: Inner) -> io::Result<Self> {
        let inner = Arc::new(inner);
        let attending = Arc::clone(&inner);
        thread::Builder::new().name("tender-door".to_owned()).spawn(move || attending.attend())?;
        Ok(Self(inner))
    }

    pub(super) fn calls(&self) -> &Calls {
        &self.0.calls
    }

    pub(super) fn debts(&self) -> &Arc<Debts> {
        &self.0.debts
    }

    pub(super) fn mappings(&self) -> &Mappings {
        &self.0.mappings
    }

    pub(super) fn verifies_all(&self) -> bool {
        self.0.verify
    }

    pub(super) fn brought_bytes(&self) -> u64 {
        self.0.brought_bytes
    }

    /// Asks whether the daemon still uses what this process writes: what it said when nobody listened is not said again.
    pub(super) fn ask_after(&self, mut own: Vec<u32>) {
        own.sort_unstable();
        own.dedup();
        for mapping in own {
            if let Err(error) = self.0.say(ToDaemon::Fetch(mapping)) {
                tracing::debug!(mapping, "memory that is written here is not asked after: {error}");
            }
        }
    }

    /// A file that is mapped already.
    pub(super) fn known(&self, mapping: u32) -> Option<Arc<Mapping>> {
        self.0.mappings.known(mapping)
    }

    /// A file, asked for if it is not mapped; `None` when the daemon does not give it in time.
    pub(super) async fn mapping(&self, mapping: u32, deadline: Duration) -> Option<Arc<Mapping>> {
        let (came, is_first) = match self.0.mappings.find(mapping) {
            Found::Here(memory) => return Some(memory),
            Found::Awaited { came, is_first } => (came, is_first),
        };
        if is_first && let Err(error) = self.0.say(ToDaemon::Fetch(mapping)) {
            tracing::debug!(mapping, "memory is not asked for: {error}");
            self.0.mappings.forget(mapping);
            return None;
        }
        timeout(deadline, came).await.ok()?.ok()
    }

    /// Becomes true when the daemon, or the way to it, is gone.
    pub(super) fn over(&self) -> watch::Receiver<bool> {
        self.0.over.subscribe()
    }

    /// Leaves, and waits a moment; whether the daemon has heard of it.
    pub(super) async fn leave(&self) -> bool {
        let mut over = self.0.over.subscribe();
        self.0.leave();
        let _courtesy = timeout(2 * deadline::GRACE, over.wait_for(|over| *over)).await;
        self.0.has_left.load(Ordering::Acquire)
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.0.leave();
    }
}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connection").finish_non_exhaustive()
    }
}

impl Inner {
    fn leave(&self) {
        self.is_leaving.store(true, Ordering::Release);
        if let Err(error) = self.wake.signal() {
            tracing::debug!("the local door is not left: {error}");
        }
    }

    /// Until the daemon goes, or everybody here has gone.
    fn attend(self: Arc<Self>) {
        let mut arriving = Arriving::new();
        let mut leave_by = None;
        let ended = loop {
            if let Err(error) = self.sleep(leave_by) {
                break Err(error);
            }
            let heard = self.drain_bell().and_then(|()| {
                // Before anything is looked at, so that what happens afterwards wakes again.
                self.wake.clear()?;
                self.calls.attend();
                self.listen(&mut arriving)
            });
            if heard.is_err() {
                break heard;
            }
            if self.is_leaving.load(Ordering::Acquire) {
                // Views and slots of former connections hold what this one has confirmed: the daemon is not left before they are gone.
                if self.debts.holds_nothing() {
                    let by = *leave_by.get_or_insert_with(|| Instant::now() + deadline::GRACE);
                    if self.calls.is_idle() || Instant::now() >= by {
                        let said = self.say(ToDaemon::Leave);
                        self.has_left.store(said.is_ok(), Ordering::Release);
                        break said;
                    }
                }
            }
        };
        if let Err(error) = ended {
            tracing::debug!("a local door has closed: {error}");
        }
        self.calls.end();
        self.mappings.end();
        // The daemon sees the end now, also if views or pages being made still hold this.
        let _gone = self.socket.shutdown(std::net::Shutdown::Both);
        self.over.send_replace(true);
    }

    fn sleep(&self, leave_by: Option<Instant>) -> io::Result<()> {
        let leave_in = leave_by.map(|by| by.saturating_duration_since(Instant::now()));
        let longest = self.calls.attend_in().into_iter().chain(leave_in).min();
        let longest = longest.and_then(|longest| Timespec::try_from(longest).ok());
        let fds = [self.bell.as_fd(), self.socket.as_fd(), self.wake.as_fd()];
        let mut fds = fds.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN));
        match poll(&mut fds, longest.as_ref()) {
            Err(Errno::INTR) => Ok(()),
            result => Ok(result.map(drop)?),
        }
    }

    fn drain_bell(&self) -> io::Result<()> {
        let mut rings = [0; 256];
        loop {
            match descriptors::try_receive(self.bell.as_fd(), &mut rings, 0) {
                Ok(received) if received.bytes == 0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    fn listen(self: &Arc<Self>, arriving: &mut Arriving) -> io::Result<()> {
        while let Some((message, descriptors)) = arriving.receive(&self.socket)? {
            match message {
                ToClient::Map { mapping, bytes, writable } => {
                    let file = descriptors.into_iter().next().ok_or_else(|| unexpected("memory without its file"))?;
                    if writable { self.accept(mapping, bytes, file)? } else { self.map(mapping, bytes, &file) }
                }
                ToClient::Forget(mapping) => {
                    self.mappings.forget(mapping);
                    self.brought.forget(mapping);
                }
                ToClient::Taken(mapping) => drop(self.brought.taken(mapping)),
                ToClient::NotTaken { mapping, why } => {
                    tracing::warn!(mapping, "memory that was brought is not used, but the daemon's: {why}");
                    self.mappings.forget(mapping);
                    if let Some((file, bytes)) = self.brought.not_taken(mapping, why) {
                        self.make(mapping, bytes, file)?;
                    }
                }
                ToClient::Opened { .. } | ToClient::Refused(_) => return Err(unexpected("a second greeting")),
            }
        }
        Ok(())
    }

    /// Maps what others write. What this process writes is mapped already.
    fn map(&self, mapping: u32, bytes: u64, file: &OwnedFd) {
        let brought = self.brought.taken(mapping).map(|memory| memory.mapping());
        let own = brought.or_else(|| self.mappings.known(mapping).filter(|memory| memory.is_writable()));
        if let Some(memory) = own {
            return self.mappings.came(mapping, memory);
        }
        match Mapping::to_read(file, bytes) {
            Ok(memory) => self.mappings.came(mapping, Arc::new(memory)),
            Err(error) => {
                tracing::warn!(mapping, "memory of the store cannot be mapped ({error}); its blocks come over gRPC");
                self.mappings.forget(mapping);
            }
        }
    }

    /// Memory to be written here is offered: what was brought goes in its place, one file for each offer.
    fn accept(self: &Arc<Self>, mapping: u32, bytes: u64, file: OwnedFd) -> io::Result<()> {
        if self.brought_bytes == 0 {
            return self.make(mapping, bytes, file);
        }
        match self.brought.lend(mapping, file, bytes) {
            Ok(memory) => {
                // Before the daemon hears of it: it may grant slots there before its answer is read.
                self.mappings.came(mapping, memory.mapping());
                self.say_with(ToDaemon::Bring(mapping), &[memory.file()])
            }
            Err(file) => self.make(mapping, bytes, file),
        }
    }

    /// Maps what is to be written here, and makes its pages.
    fn make(self: &Arc<Self>, mapping: u32, bytes: u64, file: OwnedFd) -> io::Result<()> {
        self.mappings.begin(mapping);
        let inner = Arc::clone(self);
        let making = thread::Builder::new().name("tender-pages".to_owned()).spawn(move || {
            let made = Mapping::to_write(&file, bytes);
            drop(file);
            let said = match made {
                Ok(memory) => {
                    let is_wanted = inner.mappings.made(mapping, Some(memory));
                    if is_wanted { inner.say(ToDaemon::Mapped(mapping)) } else { Ok(()) }
                }
                Err(error) => {
                    tracing::warn!(mapping, "no memory to put blocks in place ({error}); they go over gRPC");
                    inner.mappings.made(mapping, None);
                    inner.say(ToDaemon::Unmappable(mapping))
                }
            };
            if let Err(error) = said {
                tracing::debug!(mapping, "the daemon does not hear of its memory: {error}");
            }
        });
        making.map(drop).or_else(|_| {
            self.mappings.made(mapping, None);
            self.say(ToDaemon::Unmappable(mapping))
        })
    }

    /// Says it at once or never: a daemon that reads nothing any more is not waited for.
    fn say(&self, said: ToDaemon) -> io::Result<()> {
        self.say_with(said, &[])
    }

    fn say_with(&self, said: ToDaemon, files: &[BorrowedFd<'_>]) -> io::Result<()> {
        let _one_at_a_time = self.sending.lock().unwrap_or_else(PoisonError::into_inner);
        descriptors::send(self.socket.as_fd(), &said.encode(), files, Instant::now())
    }
}

impl Arriving {
    fn new() -> Self {
        Self { bytes: [0; MESSAGE_BYTES], filled: 0, descriptors: Vec::new() }
    }

    /// The next message that came whole, with its descriptors.
    fn receive(&mut self, socket: &UnixStream) -> io::Result<Option<(ToClient, Vec<OwnedFd>)>> {
        while self.filled < MESSAGE_BYTES {
            let rest = &mut self.bytes[self.filled..];
            match descriptors::try_receive(socket.as_fd(), rest, descriptors::DESCRIPTORS_MAX) {
                Ok(received) if received.bytes == 0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(received) => {
                    self.filled += received.bytes;
                    self.descriptors.extend(received.descriptors);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        self.filled = 0;
        let message = ToClient::decode(&self.bytes).map_err(greeting::invalid)?;
        Ok(Some((message, std::mem::take(&mut self.descriptors))))
    }
}

fn unexpected(what: &str) -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidData,
        format!("the daemon sent {what}; install client and daemon of one release"),
    )
}
