//! The fallback device: a small pool of threads that read and write, where the kernel refuses io_uring.
//!
//! The queue to the threads is as long as there are threads, and never full, since no more requests than that are in flight.
//! Dropping the device waits for the threads, so that no read arrives in memory that has gone to somebody else.

#![expect(unsafe_code, reason = "threads read into and write from the arena in place")]

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::slice;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use super::file::TierFile;
use super::transfer::{Next, Transfer};
use super::{BlockDevice, IoDone, IoFault, IoRequest, Operation, PageFile};
use crate::device::memory::{Arena, Extent};

/// A pool of threads over one file.
#[derive(Debug)]
pub struct Synchronous {
    requests: Option<mpsc::SyncSender<IoRequest>>,
    events: mpsc::Receiver<Event>,
    wake: mpsc::Sender<Event>,
    wake_pending: Arc<AtomicBool>,
    workers: Vec<JoinHandle<()>>,
    arena: Arc<Arena>,
    file_bytes: u64,
    in_flight: usize,
    direct: bool,
}

#[derive(Debug)]
enum Event {
    Done(IoDone),
    Wake,
}

impl Synchronous {
    /// Starts the threads.
    pub fn new(file: &TierFile, arena: Arc<Arena>, threads: usize) -> io::Result<Self> {
        assert!(threads > 0, "a device of no threads");
        let (requests, queue) = mpsc::sync_channel::<IoRequest>(threads);
        let (wake, events) = mpsc::channel();
        let queue = Arc::new(Mutex::new(queue));
        let workers = (0..threads)
            .map(|index| {
                let worker = Worker { file: file.shared(), arena: Arc::clone(&arena) };
                let (queue, done) = (Arc::clone(&queue), wake.clone());
                thread::Builder::new().name(format!("tender-disk-{index}")).spawn(move || worker.run(&queue, &done))
            })
            .collect::<io::Result<Vec<_>>>()?;
        Ok(Self {
            requests: Some(requests),
            events,
            wake,
            wake_pending: Arc::default(),
            workers,
            arena,
            file_bytes: file.bytes(),
            in_flight: 0,
            direct: file.is_direct(),
        })
    }

    /// Notes an event.
    fn take(&mut self, event: Event, done: &mut Vec<IoDone>) {
        match event {
            Event::Done(completion) => {
                self.in_flight -= 1;
                done.push(completion);
            }
            Event::Wake => self.wake_pending.store(false, Ordering::Release),
        }
    }
}

impl BlockDevice for Synchronous {
    fn depth(&self) -> usize {
        self.workers.len()
    }

    fn submit(&mut self, request: IoRequest) {
        assert!(self.in_flight < self.depth(), "more than {} requests in flight", self.depth());
        self.in_flight += 1;
        if !request.operation.fits(self.file_bytes, &self.arena) {
            let refused = Event::Done(request.done(Err(IoFault::Short)));
            return self.wake.send(refused).expect("the receiver is in this very struct");
        }
        let requests = self.requests.as_ref().expect("taken by drop alone");
        requests.send(request).expect("threads end only when this sender is dropped");
    }

    fn wait(&mut self, timeout: Duration, done: &mut Vec<IoDone>) {
        if let Ok(event) = self.events.recv_timeout(timeout) {
            self.take(event, done);
        }
        while let Ok(event) = self.events.try_recv() {
            self.take(event, done);
        }
    }

    fn waker(&self) -> Arc<dyn Fn() + Send + Sync> {
        let (wake, pending) = (self.wake.clone(), Arc::clone(&self.wake_pending));
        Arc::new(move || {
            // One wake-up waits in the channel at most, however often it is called.
            if !pending.swap(true, Ordering::AcqRel) {
                // Fails when the device is gone, and then nobody waits.
                let _ = wake.send(Event::Wake);
            }
        })
    }

    fn segment_ready(&mut self, _segment: u32) {}

    fn describe(&self) -> String {
        let direct = if self.direct { "O_DIRECT" } else { "page cache (no O_DIRECT)" };
        format!("{} threads, {direct}", self.workers.len())
    }
}

impl Drop for Synchronous {
    fn drop(&mut self) {
        drop(self.requests.take());
        for worker in self.workers.drain(..) {
            // A thread that panicked has already said so.
            let _ = worker.join();
        }
    }
}

/// What one thread needs.
struct Worker {
    file: Arc<File>,
    arena: Arc<Arena>,
}

impl Worker {
    fn run(&self, queue: &Mutex<mpsc::Receiver<IoRequest>>, done: &mpsc::Sender<Event>) {
        loop {
            let received = queue.lock().unwrap_or_else(PoisonError::into_inner).recv();
            let Ok(mut request) = received else { return };
            let result = self.perform(&mut request.operation);
            if done.send(Event::Done(request.done(result))).is_err() {
                return;
            }
        }
    }

    fn perform(&self, operation: &mut Operation) -> Result<(), IoFault> {
        match operation {
            Operation::Read { offset, into } => {
                // SAFETY: the submitter holds the extent exclusively until completion, which is sent after this borrow has ended.
                let bytes = unsafe { slice::from_raw_parts_mut(self.arena.pointer(*into), into.bytes as usize) };
                transfer(bytes.len(), |skip| self.file.read_at(&mut bytes[skip..], *offset + skip as u64))
            }
            Operation::ReadPrivate { offset, into } => {
                transfer(into.len(), |skip| self.file.read_at(&mut into[skip..], *offset + skip as u64))
            }
            Operation::Write { offset, from } => {
                let bytes = self.written_from(*from);
                transfer(bytes.len(), |skip| self.file.write_at(&bytes[skip..], *offset + skip as u64))
            }
            Operation::WritePage { offset, page } => {
                transfer(page.0.len(), |skip| self.file.write_at(&page.0[skip..], *offset + skip as u64))
            }
            Operation::Flush => transfer(0, |_| self.file.sync_data().map(|()| 0)),
        }
    }

    /// What a write takes, in place.
    fn written_from(&self, extent: Extent) -> &[u8] {
        // SAFETY: nobody changes the extent until the write's completion, which is sent after this borrow has ended.
        unsafe { slice::from_raw_parts(self.arena.pointer(extent), extent.bytes as usize) }
    }
}

/// Calls `step` with the bytes to skip until the transfer is over.
fn transfer(bytes: usize, mut step: impl FnMut(usize) -> io::Result<usize>) -> Result<(), IoFault> {
    let mut transfer = Transfer::new(bytes as u64);
    loop {
        let (skip, _) = transfer.rest();
        let result = step(skip as usize).map(|bytes| bytes as u64);
        let result = result.map_err(|error| error.raw_os_error().expect("what a system call returns has a number"));
        if let Next::End(result) = transfer.advance(result) {
            return result;
        }
    }
}
