//! Where the core's thread sleeps: one place for what comes through its queue and for the doorbells of all clients.
//!
//! No wake-up is lost, by the rule of the rings (`proto/src/ring.rs`): who wants to sleep says so, sets a fence, looks once more and then
//! sleeps; who has put something into the queue sets a fence, then looks whether the other sleeps.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering::{Relaxed, SeqCst};
use std::sync::atomic::{AtomicBool, fence};
use std::sync::mpsc::{SendError, SyncSender, TrySendError};
use std::time::Duration;

use rustix::event::{Timespec, epoll};
use rustix::io::Errno;
use tender_proto::descriptors::EventFd;

/// Doorbells heard in one go.
const HEARD_MAX: usize = 64;

/// The number under which the queue's own bell is heard; no attachment has it.
const OWN: u64 = 0;

/// Wakes a thread that sleeps in a [`Sleeper`].
#[derive(Debug)]
pub struct Waker {
    sleeps: AtomicBool,
    bell: EventFd,
}

impl Waker {
    /// After something was put where the sleeper looks.
    pub fn wake(&self) {
        fence(SeqCst);
        if self.sleeps.load(Relaxed) {
            // Fails for want of descriptors or memory never: the counter is there, and nobody else has it. The sleeper looks at
            // every tick anyhow.
            let _ = self.bell.signal();
        }
    }
}

/// A bounded queue whose reader sleeps in a [`Sleeper`].
#[derive(Debug)]
pub struct Queue<T> {
    sender: SyncSender<T>,
    waker: Arc<Waker>,
}

impl<T> Clone for Queue<T> {
    fn clone(&self) -> Self {
        Self { sender: self.sender.clone(), waker: Arc::clone(&self.waker) }
    }
}

impl<T> Queue<T> {
    /// Wakes the reader of `sender` after each message.
    pub fn new(sender: SyncSender<T>, sleeper: &Sleeper) -> Self {
        Self { sender, waker: Arc::clone(&sleeper.waker) }
    }

    /// As `SyncSender::send`.
    pub fn send(&self, message: T) -> Result<(), SendError<T>> {
        self.sender.send(message)?;
        self.waker.wake();
        Ok(())
    }

    /// As `SyncSender::try_send`.
    pub fn try_send(&self, message: T) -> Result<(), TrySendError<T>> {
        self.sender.try_send(message)?;
        self.waker.wake();
        Ok(())
    }
}

/// Where one thread sleeps.
#[derive(Debug)]
pub struct Sleeper {
    epoll: OwnedFd,
    waker: Arc<Waker>,
}

impl Sleeper {
    /// A place to sleep.
    pub fn new() -> io::Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let waker = Arc::new(Waker { sleeps: AtomicBool::new(false), bell: EventFd::new()? });
        let sleeper = Self { epoll, waker };
        sleeper.listen(sleeper.waker.bell_fd(), OWN)?;
        Ok(sleeper)
    }

    /// Wakes up when this descriptor becomes readable, and says so by `name`, which is not 0. Until the descriptor is closed everywhere,
    /// or [`Self::ignore`]d.
    pub fn listen(&self, descriptor: BorrowedFd<'_>, name: u64) -> io::Result<()> {
        Ok(epoll::add(&self.epoll, descriptor, epoll::EventData::new_u64(name), epoll::EventFlags::IN)?)
    }

    /// Not any more.
    pub fn ignore(&self, descriptor: BorrowedFd<'_>) {
        // Fails only where it was not listened to.
        let _ = epoll::delete(&self.epoll, descriptor);
    }

    /// Says that this thread is about to sleep: afterwards it looks once more whether there is something to do, and then sleeps or calls
    /// [`Self::woke`].
    pub fn prepare(&self) {
        self.waker.sleeps.store(true, Relaxed);
        fence(SeqCst);
    }

    /// Does not sleep after all.
    pub fn woke(&self) {
        self.waker.sleeps.store(false, Relaxed);
    }

    /// Sleeps until something is readable, at most `timeout`; the names of what is, into `heard`.
    pub fn sleep(&self, timeout: Duration, heard: &mut Vec<u64>) {
        heard.clear();
        let nothing = epoll::Event { flags: epoll::EventFlags::empty(), data: epoll::EventData::new_u64(OWN) };
        let mut events = [nothing; HEARD_MAX];
        let timeout = Timespec::try_from(timeout).ok();
        let count = match epoll::wait(&self.epoll, &mut events, timeout.as_ref()) {
            Ok(count) => count,
            Err(Errno::INTR) => 0,
            Err(errno) => panic!("a thread cannot wait for its events: {errno}"),
        };
        self.woke();
        for event in &events[..count] {
            match event.data.u64() {
                OWN => drop(self.waker.bell.clear()),
                name => heard.push(name),
            }
        }
    }
}

impl Waker {
    fn bell_fd(&self) -> BorrowedFd<'_> {
        use std::os::fd::AsFd;
        self.bell.as_fd()
    }
}
