//! Descriptors that clients send. Closing one may wait for whoever is behind it (a file system in user space is asked at each close), so
//! a thread of its own closes what is not taken on: one that waits for ever stops that thread alone.
//!
//! Each has a place in that thread's queue from when it is received, and there are [`limits::FOREIGN_MAX`] places. While they are all
//! taken, messages are received without room for descriptors: the system then discards what a message brings, before it is open here, and
//! the connection is ended. So nothing leaks, nobody waits, and messages without descriptors are heard as ever; whoever comes to the door
//! meanwhile goes over gRPC. Refused: closing on the spot when the queue is full, which is what it is there to prevent, and leaving the
//! descriptor open, which a client could repeat until none is left.
//!
//! What nobody has received when a socket is closed is the system's to let go of as well. Only a file system that makes even that wait (a
//! release without an answer) could hold the door up then.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::mpsc::{SyncSender, sync_channel};

use tender_proto::descriptors;

use crate::limits;

/// The way to the thread that closes. It ends with the last of these and of what came with them.
#[derive(Clone, Debug)]
pub struct Closing {
    sender: SyncSender<OwnedFd>,
    /// Received, and neither closed nor taken on.
    count: Arc<AtomicUsize>,
}

impl Closing {
    /// Starts the thread.
    pub fn start() -> io::Result<Self> {
        let (sender, receiver) = sync_channel::<OwnedFd>(limits::FOREIGN_MAX);
        let count = Arc::new(AtomicUsize::new(0));
        let left = Arc::clone(&count);
        std::thread::Builder::new().name("tender-closer".to_owned()).spawn(move || {
            for descriptor in receiver {
                drop(descriptor);
                left.fetch_sub(1, Relaxed);
            }
        })?;
        Ok(Self { sender, count })
    }

    /// Whether there are places for all that one message may bring. One thread receives, so they are there still when it has.
    pub fn has_room(&self) -> bool {
        // The system may hand over one more than fit, for alignment.
        self.count.load(Relaxed) + descriptors::DESCRIPTORS_MAX < limits::FOREIGN_MAX
    }

    /// Takes a place for what was received.
    pub fn take(&self, descriptor: OwnedFd) -> Foreign {
        self.count.fetch_add(1, Relaxed);
        Foreign { descriptor: Some(descriptor), closing: self.clone() }
    }
}

/// A descriptor that a client sent. Dropped, it is closed elsewhere; made an [`OwnedFd`], whoever does so knows that closing it does not
/// wait.
#[derive(Debug)]
pub struct Foreign {
    /// None when it was taken on.
    descriptor: Option<OwnedFd>,
    closing: Closing,
}

impl AsFd for Foreign {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.descriptor.as_ref().expect("it is taken out by value alone").as_fd()
    }
}

impl From<Foreign> for OwnedFd {
    fn from(mut foreign: Foreign) -> Self {
        foreign.closing.count.fetch_sub(1, Relaxed);
        foreign.descriptor.take().expect("it is taken out by value alone")
    }
}

impl Drop for Foreign {
    fn drop(&mut self) {
        if let Some(descriptor) = self.descriptor.take() {
            // There is a place for each, and the thread outlives this.
            let _ = self.closing.sender.try_send(descriptor);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;
    use std::time::{Duration, Instant};

    use super::*;

    #[test]
    fn what_is_dropped_is_closed_and_what_is_taken_on_is_not() {
        let closing = Closing::start().unwrap();
        let (dropped, dropped_end) = UnixStream::pair().unwrap();
        let (taken, taken_end) = UnixStream::pair().unwrap();
        drop(closing.take(dropped_end.into()));
        let taken_end = OwnedFd::from(closing.take(taken_end.into()));
        dropped.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        assert_eq!(io::Read::read(&mut &dropped, &mut [0]).unwrap(), 0, "its other end is closed");
        taken.set_nonblocking(true).unwrap();
        assert_eq!(io::Read::read(&mut &taken, &mut [0]).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        drop(taken_end);
        let began = Instant::now();
        while closing.count.load(Relaxed) > 0 {
            assert!(began.elapsed() < Duration::from_secs(60), "a place was not given back");
            std::thread::yield_now();
        }
    }

    #[test]
    fn there_is_room_while_a_whole_message_has_places() {
        let closing = Closing::start().unwrap();
        let one = || closing.take(UnixStream::pair().unwrap().0.into());
        let held: Vec<Foreign> = (0..limits::FOREIGN_MAX).map(|_| one()).collect();
        assert!(!closing.has_room());
        drop(held);
        let began = Instant::now();
        while !closing.has_room() {
            assert!(began.elapsed() < Duration::from_secs(60), "places were not given back");
            std::thread::yield_now();
        }
    }
}
