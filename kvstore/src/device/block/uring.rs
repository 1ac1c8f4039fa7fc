//! The usual device: one io_uring over one registered file, with the arena's segments as fixed buffers.
//!
//! Requests are kept in the submission queue until [`BlockDevice::wait`], which hands them over and waits in one system call. The
//! kernel holds addresses into the arena, into boxed pages and into buffers from then until it completes a request: each request
//! therefore keeps its page or buffer in its slot, and the device keeps the arena, until then. Dropping the device waits for what is in flight, and if that takes too
//! long leaks memory rather than free what the kernel still writes to.
//!
//! A poll of an eventfd is kept armed on the ring as waker. Refused: `SINGLE_ISSUER` with `DEFER_TASKRUN`, which binds a ring to the
//! thread that first uses it, whereas a device is made on one thread and then used on another; at 4 KiB and more per request
//! `COOP_TASKRUN` saves as much.

#![expect(unsafe_code, reason = "hands the kernel addresses that it reads and writes while this code goes on")]

use std::io;
use std::mem;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use io_uring::types::{Fd, Fixed, FsyncFlags, SubmitArgs, Timespec};
use io_uring::{IoUring, cqueue, opcode, squeue};
use rustix::event::{EventfdFlags, PollFlags, eventfd};
use rustix::io::Errno;

use super::file::TierFile;
use super::transfer::{Next, Transfer};
use super::{BlockDevice, IoDone, IoFault, IoRequest, Operation, PageFile};
use crate::device::memory::{Arena, Extent};

/// The only registered file.
const FILE: Fixed = Fixed(0);

/// Name of the waker's poll among completions; slots count from zero.
const WAKER: u64 = u64::MAX;

/// The kernel's own limit of registered buffers.
const FIXED_BUFFERS_MAX: u32 = 16_384;

/// How long dropping waits for requests in flight. Disks answer or fail within this; their error recovery takes seconds.
const DROP_WAIT: Duration = Duration::from_secs(30);

/// Pause when the kernel has no memory for a submission.
const RETRY_PAUSE: Duration = Duration::from_millis(1);

/// A ring over one file.
pub struct Uring {
    ring: IoUring,
    arena: Arc<Arena>,
    slots: Vec<Option<Slot>>,
    free_slots: Vec<usize>,
    /// Completed without the kernel: requests that leave the file.
    refused: Vec<IoDone>,
    eventfd: Arc<OwnedFd>,
    waker_armed: bool,
    fixed: FixedBuffers,
    file_bytes: u64,
    direct: bool,
}

/// A request in flight. Holds what the kernel has the address of.
struct Slot {
    request: IoRequest,
    transfer: Transfer,
}

/// Which segments are registered. Buffer index and segment are the same number.
struct FixedBuffers {
    registered: Vec<bool>,
    refusal: Option<io::Error>,
}

/// `struct iovec`, as the kernel defines it.
#[repr(C)]
struct IoVec {
    start: *mut u8,
    bytes: usize,
}

impl Uring {
    /// Makes a ring for `depth` requests at a time. Fails where the kernel refuses io_uring or lacks what this needs (5.11).
    pub fn new(file: &TierFile, arena: Arc<Arena>, depth: usize) -> io::Result<Self> {
        assert!(depth > 0, "a device of depth zero");
        // One more for the waker's poll.
        let entries = u32::try_from(depth + 1).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
        let ring = IoUring::builder()
            .dontfork()
            .setup_clamp()
            .setup_coop_taskrun()
            .build(entries)
            .or_else(|_| IoUring::builder().dontfork().setup_clamp().build(entries))?;
        if !ring.params().is_feature_ext_arg() || !ring.params().is_feature_nodrop() {
            return Err(io::Error::new(
                io::ErrorKind::Unsupported,
                "this kernel's io_uring cannot wait with a timeout",
            ));
        }
        ring.submitter().register_files(&[file.file().as_raw_fd()])?;
        let buffers = arena.segment_count().min(FIXED_BUFFERS_MAX);
        let fixed = match ring.submitter().register_buffers_sparse(buffers) {
            Ok(()) => FixedBuffers { registered: vec![false; buffers as usize], refusal: None },
            Err(error) => FixedBuffers { registered: Vec::new(), refusal: Some(error) },
        };
        // A clamped ring is smaller than asked for.
        let depth = depth.min(ring.params().sq_entries() as usize - 1).max(1);
        Ok(Self {
            ring,
            arena,
            slots: (0..depth).map(|_| None).collect(),
            free_slots: (0..depth).rev().collect(),
            refused: Vec::new(),
            eventfd: Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?),
            waker_armed: false,
            fixed,
            file_bytes: file.bytes(),
            direct: file.is_direct(),
        })
    }

    fn in_flight(&self) -> usize {
        self.slots.len() - self.free_slots.len()
    }

    /// Puts what is left of a slot's request into the submission queue.
    fn push(&mut self, index: usize) {
        let slot = self.slots[index].as_mut().expect("only occupied slots are pushed");
        let (skip, bytes) = slot.transfer.rest();
        let bytes = u32::try_from(bytes).expect("an extent's length is a u32");
        let entry = match &mut slot.request.operation {
            Operation::Read { offset, into } => {
                let start = self.arena.pointer(*into).wrapping_add(skip as usize);
                match self.fixed.buffer(*into) {
                    Some(buffer) => opcode::ReadFixed::new(FILE, start, bytes, buffer).offset(*offset + skip).build(),
                    None => opcode::Read::new(FILE, start, bytes).offset(*offset + skip).build(),
                }
            }
            Operation::ReadPrivate { offset, into } => {
                let start = into.as_mut_ptr().wrapping_add(skip as usize);
                opcode::Read::new(FILE, start, bytes).offset(*offset + skip).build()
            }
            Operation::Write { offset, from } => {
                let start = self.arena.pointer(*from).wrapping_add(skip as usize);
                match self.fixed.buffer(*from) {
                    Some(buffer) => opcode::WriteFixed::new(FILE, start, bytes, buffer).offset(*offset + skip).build(),
                    None => opcode::Write::new(FILE, start, bytes).offset(*offset + skip).build(),
                }
            }
            Operation::WritePage { offset, page } => {
                let start = page.0.as_ptr().wrapping_add(skip as usize);
                opcode::Write::new(FILE, start, bytes).offset(*offset + skip).build()
            }
            Operation::Flush => opcode::Fsync::new(FILE).flags(FsyncFlags::DATASYNC).build(),
        };
        self.push_entry(&entry.user_data(index as u64));
    }

    fn push_entry(&mut self, entry: &squeue::Entry) {
        // SAFETY: an entry is the waker's poll, which has no address, or made by `push`: its addresses lie in the arena, which this
        // device holds, or in the page or buffer that its slot holds, and all are kept until the completion. That nobody else uses the
        // extent meanwhile, and that its segment is not prepared anew, is the submitter's promise.
        let pushed = unsafe { self.ring.submission().push(entry) };
        pushed.expect("the queue has an entry for each slot and one for the waker");
    }

    fn arm_waker(&mut self) {
        if !self.waker_armed {
            let poll = opcode::PollAdd::new(Fd(self.eventfd.as_raw_fd()), u32::from(PollFlags::IN.bits()));
            self.push_entry(&poll.build().user_data(WAKER));
            self.waker_armed = true;
        }
    }

    /// Submits what is pending and waits for one completion (for none if `timeout` is zero) in one call.
    fn enter(&mut self, timeout: Duration) {
        let result = if timeout.is_zero() {
            self.ring.submit().map(drop)
        } else {
            let timespec = Timespec::from(timeout);
            self.ring.submitter().submit_with_args(1, &SubmitArgs::new().timespec(&timespec)).map(drop)
        };
        let Err(error) = result else { return };
        match error.raw_os_error().map(Errno::from_raw_os_error) {
            // Time is up, a signal came, or completions must be taken first: the caller's loop deals with each of them.
            Some(Errno::TIME | Errno::INTR | Errno::BUSY) => {}
            Some(Errno::AGAIN | Errno::NOMEM) => std::thread::sleep(RETRY_PAUSE.min(timeout)),
            _ => panic!("io_uring_enter refuses what it accepted before: {error}"),
        }
    }

    /// Takes all completions that are there; whether the waker was among them.
    fn reap(&mut self, done: &mut Vec<IoDone>) -> bool {
        done.append(&mut self.refused);
        let mut woken = false;
        while let Some(entry) = { self.ring.completion().next() } {
            if entry.user_data() == WAKER {
                self.waker_armed = false;
                woken = true;
                // Sets the counter to zero. Fails only when it is zero already.
                let _ = rustix::io::read(&self.eventfd, &mut [0u8; 8]);
            } else {
                self.complete(&entry, done);
            }
        }
        woken
    }

    fn complete(&mut self, entry: &cqueue::Entry, done: &mut Vec<IoDone>) {
        let index = entry.user_data() as usize;
        let slot = self.slots[index].as_mut().expect("the kernel completes what is in flight, once");
        let result = u64::try_from(entry.result()).map_err(|_| -entry.result());
        match slot.transfer.advance(result) {
            Next::Again => self.push(index),
            Next::End(result) => {
                done.extend(self.slots[index].take().map(|slot| slot.request.done(result)));
                self.free_slots.push(index);
            }
        }
    }
}

impl BlockDevice for Uring {
    fn depth(&self) -> usize {
        self.slots.len()
    }

    fn submit(&mut self, request: IoRequest) {
        if !request.operation.fits(self.file_bytes, &self.arena) {
            return self.refused.push(request.done(Err(IoFault::Short)));
        }
        let bytes = request.operation.span().map_or(0, |(_, bytes)| bytes);
        let index = self.free_slots.pop();
        let index = index.unwrap_or_else(|| panic!("more than {} requests in flight", self.slots.len()));
        self.slots[index] = Some(Slot { request, transfer: Transfer::new(bytes) });
        self.push(index);
    }

    fn wait(&mut self, timeout: Duration, done: &mut Vec<IoDone>) {
        let start = Instant::now();
        let done_before = done.len();
        loop {
            self.arm_waker();
            let ready = !self.refused.is_empty() || !self.ring.completion().is_empty();
            if !ready {
                self.enter(timeout.saturating_sub(start.elapsed()));
            } else if !self.ring.submission().is_empty() {
                self.enter(Duration::ZERO);
            }
            let woken = self.reap(done);
            if woken || done.len() > done_before || start.elapsed() >= timeout {
                // The rest of a short transfer would otherwise stay here until the next call.
                if !self.ring.submission().is_empty() {
                    self.enter(Duration::ZERO);
                }
                return;
            }
        }
    }

    fn waker(&self) -> Arc<dyn Fn() + Send + Sync> {
        let eventfd = Arc::clone(&self.eventfd);
        Arc::new(move || {
            // Any number but zero, in either byte order. Fails only when the counter is full, and then it wakes all the same.
            let _ = rustix::io::write(&eventfd, &[1u8; 8]);
        })
    }

    fn segment_ready(&mut self, segment: u32) {
        if segment as usize >= self.fixed.registered.len() {
            return;
        }
        let (start, bytes) = self.arena.segment_pointer(segment);
        let buffer = IoVec { start, bytes };
        // SAFETY: `IoVec` has the layout of `iovec`, and is alive during the call. The memory it names is a segment of the arena, which
        // stays mapped there until it is prepared anew; the kernel holds its pages and not the mapping, and uses them for requests alone
        // that name it, of which there are none then.
        let result = unsafe {
            let buffers = std::slice::from_raw_parts((&raw const buffer).cast(), 1);
            self.ring.submitter().register_buffers_update(segment, buffers, None)
        };
        match result {
            Ok(()) => self.fixed.registered[segment as usize] = true,
            Err(error) => {
                // What was registered before may be what the segment was in another tenant's file.
                self.fixed.registered[segment as usize] = false;
                tracing::debug!(segment, %error, "a segment is not registered with io_uring; its requests take the slower way");
                self.fixed.refusal = Some(error);
            }
        }
    }

    fn describe(&self) -> String {
        let direct = if self.direct { "O_DIRECT" } else { "page cache (no O_DIRECT)" };
        format!("io_uring, {direct}, {}", self.fixed.describe())
    }
}

impl FixedBuffers {
    fn buffer(&self, extent: Extent) -> Option<u16> {
        let registered = self.registered.get(extent.segment as usize).copied().unwrap_or(false);
        registered.then(|| u16::try_from(extent.segment).expect("at most 16384 are registered"))
    }

    fn describe(&self) -> String {
        let count = self.registered.iter().filter(|&&registered| registered).count();
        match &self.refusal {
            None => "fixed buffers".to_owned(),
            Some(error) => {
                format!("fixed buffers for {count} segments, others refused ({error}); raise the memlock limit")
            }
        }
    }
}

impl Drop for Uring {
    fn drop(&mut self) {
        let deadline = Instant::now() + DROP_WAIT;
        let mut done = Vec::new();
        while self.in_flight() > 0 && Instant::now() < deadline {
            self.wait(deadline.saturating_duration_since(Instant::now()), &mut done);
        }
        if self.in_flight() > 0 {
            tracing::error!(
                requests = self.in_flight(),
                "a disk does not answer; the memory of its requests is never reused"
            );
            mem::forget(Arc::clone(&self.arena));
            mem::forget(mem::take(&mut self.slots));
        }
        // The kernel takes a ring apart some time after its descriptor is closed; the file's lock is to fall now.
        if let Err(error) = self.ring.submitter().unregister_files() {
            tracing::debug!(%error, "the lock of a tier file falls a little later than its device");
        }
    }
}
