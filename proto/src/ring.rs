//! The ring: how a process on the daemon's own node asks, without a system call while both sides are awake.
//!
//! One file of memory (memfd) per connection, mapped for reading and writing by both sides. Numbers have the byte order of the
//! host, which both sides share; what is reserved is written as 0 and not read, so that a newer side may give it a meaning.
//! ```text
//! offset  bytes     what                                        written by
//! 0       4096      header:                                     daemon, before it hands the file over
//!                     0  u64 magic "TNDRRING"
//!                     8  u32 ABI version                        RING_ABI
//!                    12  u32 frames, and entries per queue      FRAMES
//!                    16  u32 bytes of a submission entry        ENTRY_BYTES
//!                    20  u32 bytes of a completion entry        ENTRY_BYTES
//!                    24  u32 bytes of a frame                   FRAME_BYTES
//!                    28  u32 bytes of the whole ring            RING_BYTES
//!                    32  4064 reserved
//! 4096    7 x 128   counters and flags, u32 each, on lines of their own:
//!         4096        submission tail                           client
//!         4224        submission head                           daemon; read by neither side, for whoever looks at a stuck ring
//!         4352        completion tail                           daemon
//!         4480        completion head                           client
//!         4608        daemon sleeps                             daemon
//!         4736        client sleeps                             client
//!         4864        closing                                   daemon
//! 4992    3200      reserved
//! 8192    32 x 64   submission entries                          client
//!                     0  u64 user_data     comes back with the completion
//!                     8  u16 verb          door::Verb
//!                    10  u16 frame         that holds the request and will hold the reply
//!                    12  u32 request_bytes
//!                    16  u32 deadline_ms   0: the daemon's default
//!                    20  u32 reserved
//!                    24  u64 attachment
//!                    32  32 reserved
//! 10240   32 x 64   completion entries                          daemon
//!                     0  u64 user_data
//!                     8  u16 status        door::Status
//!                    10  u16 frame         65535: there is no reply, since the entry named no frame that could hold one
//!                    12  u32 reply_bytes
//!                    16  48 reserved
//! 12288   32 x 65536  frames                                    the client, from submission to completion the daemon
//! ```
//! Heads and tails run freely through all u32 and are taken modulo `FRAMES` where an entry is meant; a tail is published after what it
//! counts. At most `FRAMES` requests are in flight, one for each frame, so a client that keeps to the rules always finds room for
//! an entry when it has a frame, and always leaves room for the completion.
//!
//! **Nobody trusts the other side.** Each keeps its own counters, and which frames are in flight, in private memory, and only writes
//! them here. What comes from the other side (its counters, an entry, the bytes of a frame) is copied once, then checked, never read
//! again; only offsets computed here are followed. The header is read once, by the client, which must trust the daemon at that
//! moment anyhow. Shared bytes are touched as atomic words only: a peer that writes meanwhile makes other values, never undefined
//! behaviour, and no `&[u8]` of them exists. What breaks a rule is a [`Hostile`], and costs only whoever broke it: a wrong entry is
//! answered and the next one is served, a wrong counter ends the ring, and a client that leaves no room for completions is parked
//! until it does.
//!
//! **No wake-up is lost.** Who wants to sleep sets its flag, then a fence, looks again, and sleeps if nothing is there
//! (`prepare_to_sleep`). Who published sets a fence, then looks at the other's flag, and rings the other's doorbell if it is set
//! (`client_sleeps`, `daemon_sleeps`). The two fences are sequentially consistent, so one is before the other. If the publisher's is
//! first, the sleeper looks after it and finds what was published. If the sleeper's is first, the publisher looks after it, finds the
//! flag and rings. A doorbell (an eventfd) remembers that it was rung, so a ring between looking and sleeping wakes as well.
//! Refused: a futex word in the shared file, which any tenant on it could use to keep others asleep.

#![expect(unsafe_code, reason = "lays its structure over memory that another process maps too")]

use std::cell::Cell;
use std::io;
use std::marker::PhantomData;
use std::mem::{align_of, offset_of, size_of};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release, SeqCst};
use std::sync::atomic::{AtomicU32, AtomicU64, fence};

use memmap2::{Advice, MmapOptions, MmapRaw};
use rustix::fs::{MemfdFlags, SealFlags};

/// Version of the layout drawn at the head of this module. A client tells at attach which one it speaks.
pub const RING_ABI: u32 = 1;

/// Requests in flight per connection; also the entries of each queue. 32 requests of 960 keys are 30,720 blocks: more than a prompt
/// of 1 M tokens in 64-token blocks has.
pub const FRAMES: usize = 32;

/// Bytes of a frame: the most that a request or a reply has. 960 keys are 30 KiB, 960 places 24,000 bytes.
pub const FRAME_BYTES: usize = 64 * 1024;

/// Bytes of a submission or completion entry: one cache line.
pub const ENTRY_BYTES: usize = 64;

/// Bytes of the file: 2 MiB of frames and three pages before them.
pub const RING_BYTES: usize = 12_288 + FRAMES * FRAME_BYTES;

/// The one status that the ring itself gives: to an entry that breaks a rule. The reply is the reason, as UTF-8.
pub const STATUS_MALFORMED: u16 = 6;

/// "TNDRRING", read as little-endian.
const MAGIC: u64 = u64::from_le_bytes(*b"TNDRRING");

/// In a completion: there is no frame.
const NO_FRAME: u16 = u16::MAX;

const WORD_BYTES: usize = size_of::<u64>();
const AWAKE: u32 = 0;
const ASLEEP: u32 = 1;
const CLOSING: u32 = 1;

/// A counter or flag, on a line that it shares with nobody: 128 bytes, since processors fetch lines of 64 in pairs.
#[repr(C, align(128))]
struct Line(AtomicU32);

#[repr(C, align(4096))]
struct Header {
    magic: AtomicU64,
    abi: AtomicU32,
    frames: AtomicU32,
    submission_entry_bytes: AtomicU32,
    completion_entry_bytes: AtomicU32,
    frame_bytes: AtomicU32,
    ring_bytes: AtomicU32,
}

#[repr(C, align(4096))]
struct Counters {
    submission_tail: Line,
    submission_head: Line,
    completion_tail: Line,
    completion_head: Line,
    daemon_sleeps: Line,
    client_sleeps: Line,
    closing: Line,
}

type Entry = [AtomicU64; ENTRY_BYTES / WORD_BYTES];
type Frame = [AtomicU64; FRAME_BYTES / WORD_BYTES];

/// The file, as drawn. Nothing but atomics, for which every bit pattern is a value.
#[repr(C)]
struct Shared {
    header: Header,
    counters: Counters,
    submissions: [Entry; FRAMES],
    completions: [Entry; FRAMES],
    frames: [Frame; FRAMES],
}

const _: () = {
    assert!(size_of::<Shared>() == RING_BYTES && offset_of!(Shared, counters) == 4096);
    assert!(offset_of!(Counters, submission_tail) == 0 && offset_of!(Counters, submission_head) == 128);
    assert!(offset_of!(Counters, completion_tail) == 256 && offset_of!(Counters, completion_head) == 384);
    assert!(offset_of!(Counters, daemon_sleeps) == 512 && offset_of!(Counters, client_sleeps) == 640);
    assert!(offset_of!(Counters, closing) == 768 && offset_of!(Shared, submissions) == 8192);
    assert!(offset_of!(Shared, completions) == 10_240 && offset_of!(Shared, frames) == 12_288);
    assert!(offset_of!(Header, abi) == 8 && offset_of!(Header, frames) == 12 && offset_of!(Header, ring_bytes) == 28);
    assert!(
        FRAMES == u32::BITS as usize,
        "frames in flight are the bits of one u32, and divide the range of the counters"
    );
};

/// Memory that holds a ring: mapped while the value lives, unmapped when it is dropped.
///
/// # Safety
/// While the value lives, wherever it is moved, `base` and `bytes` say the same, and that memory stays mapped for reading and
/// writing, so a file behind it is sealed against shrinking. Other mappings of it, here and in other processes, are fine. In this
/// process nobody touches it but through values of this module (which use atomics only).
pub unsafe trait Mapping {
    /// First byte.
    fn base(&self) -> NonNull<u8>;
    /// Length.
    fn bytes(&self) -> usize;
}

/// A mapped file of a ring: of its whole length, which nobody can change. A forked child does not inherit the mapping.
#[derive(Debug)]
pub struct RingMemory(MmapRaw);

impl RingMemory {
    /// Makes the file of a ring, maps it here, and returns its descriptor for the other side.
    pub fn create() -> io::Result<(Self, OwnedFd)> {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file = match rustix::fs::memfd_create(c"tender-ring", flags | MemfdFlags::NOEXEC_SEAL) {
            // Kernels before 6.3 do not know it; newer ones may refuse a file without it.
            Err(rustix::io::Errno::INVAL) => rustix::fs::memfd_create(c"tender-ring", flags)?,
            result => result?,
        };
        rustix::fs::ftruncate(&file, RING_BYTES as u64)?;
        rustix::fs::fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        Ok((Self::map(file.as_fd())?, file))
    }

    /// Maps the file of a ring that the other side made. `InvalidInput` if it is of another size, or its size could be changed.
    pub fn map(file: BorrowedFd<'_>) -> io::Result<Self> {
        let is_sealed = rustix::fs::fcntl_get_seals(file).is_ok_and(|seals| seals.contains(SealFlags::SHRINK));
        if !is_sealed || rustix::fs::fstat(file)?.st_size != RING_BYTES as i64 {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!(
                    "a ring is a memory file of {RING_BYTES} bytes, sealed against shrinking: this descriptor is something else"
                ),
            ));
        }
        let memory = MmapOptions::new().len(RING_BYTES).map_raw(file.as_raw_fd())?;
        memory.advise(Advice::DontFork)?;
        Ok(Self(memory))
    }
}

// SAFETY: the file is mapped for reading and writing as long as the value lives, at an address that does not change with the value's
// place; it is sealed against shrinking; the field is private, so nobody reaches the memory but through this module.
unsafe impl Mapping for RingMemory {
    fn base(&self) -> NonNull<u8> {
        NonNull::new(self.0.as_mut_ptr()).expect("a mapping is not at address 0")
    }

    fn bytes(&self) -> usize {
        self.0.len()
    }
}

/// Why memory is no ring that can be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RingError {
    /// Too short.
    #[error("the mapping has {bytes} bytes, but a ring has {RING_BYTES}: map the whole file")]
    Bytes {
        /// Of the mapping.
        bytes: usize,
    },
    /// Not at the start of a page.
    #[error("the mapping starts {past} bytes past a multiple of 4096: map the file from its start")]
    Misaligned {
        /// Bytes.
        past: usize,
    },
    /// Something else, or not laid out yet.
    #[error(
        "magic is {found:#018x}, but that of a ring is {MAGIC:#018x}: map the descriptor that attach handed over as the ring"
    )]
    Magic {
        /// What stands there.
        found: u64,
    },
    /// Another version.
    #[error(
        "abi is {found}, but this client speaks {RING_ABI}: bring the older of client and daemon up to date, or use gRPC meanwhile"
    )]
    Abi {
        /// What stands there.
        found: u32,
    },
    /// The version known here, with numbers that it does not have.
    #[error(
        "{field} is {found}, but {expected} under ABI {RING_ABI}: install client and daemon of one release, or use gRPC meanwhile"
    )]
    Geometry {
        /// Field of the header.
        field: &'static str,
        /// What stands there.
        found: u32,
        /// What the version has.
        expected: u32,
    },
    /// Not fresh.
    #[error(
        "{field} is {found}, but 0 in a ring that nobody has used: each connection has a ring of its own, attach again for one"
    )]
    Used {
        /// The counter.
        field: &'static str,
        /// What stands there.
        found: u32,
    },
}

/// A rule that the other side broke: the field, its value, and what it must be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Hostile {
    /// A counter went back, or further than it can. The ring is not served any more.
    #[error("{field} is {value}, but must be at most {ahead_max} past {from}, modulo 2^32")]
    Counter {
        /// Which.
        field: &'static str,
        /// What it is.
        value: u32,
        /// Least.
        from: u32,
        /// How far it may be past that.
        ahead_max: u32,
    },
    /// A number outside its limits.
    #[error("{field} is {value}, but must be 0 to {max}")]
    Range {
        /// Which.
        field: &'static str,
        /// What it is.
        value: u64,
        /// Most.
        max: u64,
    },
    /// A request in a frame that another one is using.
    #[error("frame is {frame}, but that one's request is not answered yet")]
    InFlight {
        /// Which.
        frame: u16,
    },
    /// An answer to nothing.
    #[error("frame is {frame} and user_data {user_data}, but no such request is in flight")]
    NotInFlight {
        /// Which.
        frame: u16,
        /// What came with it.
        user_data: u64,
    },
}

/// A request's head.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Submission {
    /// Comes back with the completion.
    pub user_data: u64,
    /// `door::Verb`, as its number: the other side may know more of them.
    pub verb: u16,
    /// Milliseconds that the client is willing to wait; 0 is the daemon's default.
    pub deadline_ms: u32,
    /// Under which attachment.
    pub attachment: u64,
}

/// A reply's head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Completion {
    /// Of the request.
    pub user_data: u64,
    /// `door::Status`, as its number: the other side may know more of them.
    pub status: u16,
}

/// Why a request was not taken. Nothing has happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SubmitError {
    /// No frame.
    #[error("all {FRAMES} frames are in flight: reap a completion first")]
    Full,
    /// Does not fit.
    #[error("the request has {bytes} bytes, but a frame has {FRAME_BYTES}: cut the batch")]
    Length {
        /// Of the request.
        bytes: usize,
    },
    /// The daemon takes no more.
    #[error("the daemon is closing this ring: attach again")]
    Closing,
    /// The daemon broke a rule before.
    #[error("the daemon broke a rule of this ring: drop it and attach again")]
    Broken,
}

/// A request as the daemon has it: checked, and copied out of the client's reach.
#[derive(Debug, PartialEq, Eq)]
pub struct Taken {
    /// Its head. Verb, deadline and attachment are what the client wrote.
    pub submission: Submission,
    /// Answers it.
    pub ticket: Ticket,
}

/// The right to answer one request, which has a frame and a completion entry set aside. Dropped, the request is never answered and
/// its client is short of a frame.
#[must_use = "a request that is not completed keeps its client waiting"]
#[derive(Debug, PartialEq, Eq)]
pub struct Ticket {
    user_data: u64,
    frame: u16,
}

/// The daemon's side. For one thread at a time.
pub struct DaemonRing<M> {
    mapping: M,
    submission_head: u32,
    completion_tail: u32,
    /// The client's completion head when last looked at: it goes forward only, so what it has freed stays free.
    completion_head_seen: u32,
    /// Bit f: frame f is between `take` and `complete`.
    in_flight: u32,
    closing: bool,
    broken: bool,
    not_sync: PhantomData<Cell<()>>,
}

/// The client's side. For one thread at a time.
pub struct ClientRing<M> {
    mapping: M,
    submission_tail: u32,
    completion_head: u32,
    /// Per frame: the `user_data` of its request. In private memory, so that no daemon can have a frame handed out twice.
    in_flight: [Option<u64>; FRAMES],
    closing_seen: bool,
    broken: bool,
    not_sync: PhantomData<Cell<()>>,
}

impl<M: Mapping> DaemonRing<M> {
    /// Lays out a ring that no client has yet.
    pub fn format(mapping: M) -> Result<Self, RingError> {
        check_place(&mapping)?;
        let Shared { header, counters, .. } = shared(&mapping);
        for counter in [
            &counters.submission_tail,
            &counters.submission_head,
            &counters.completion_tail,
            &counters.completion_head,
            &counters.daemon_sleeps,
            &counters.client_sleeps,
            &counters.closing,
        ] {
            counter.0.store(0, Relaxed);
        }
        for (_, field, value) in geometry(header) {
            field.store(value, Relaxed);
        }
        header.abi.store(RING_ABI, Relaxed);
        header.magic.store(MAGIC, Release);
        Ok(Self {
            mapping,
            submission_head: 0,
            completion_tail: 0,
            completion_head_seen: 0,
            in_flight: 0,
            closing: false,
            broken: false,
            not_sync: PhantomData,
        })
    }

    /// The next request, its bytes in `request` (at most `FRAME_BYTES`; what was there is overwritten). `None`: there is none, or no
    /// room for its completion, or the ring is closing or broken.
    ///
    /// An entry that breaks a rule has been answered with [`STATUS_MALFORMED`] when its error comes back: ask `client_sleeps` as after
    /// `complete`, and go on. After the error of a counter ([`Self::is_broken`]) nothing more comes: let go of the connection.
    pub fn take(&mut self, request: &mut Vec<u8>) -> Option<Result<Taken, Hostile>> {
        if self.closing || self.broken {
            return None;
        }
        match self.ready() {
            Ok(true) => {}
            Ok(false) => return None,
            Err(hostile) => {
                self.broken = true;
                return Some(Err(hostile));
            }
        }
        let entry = &shared(&self.mapping).submissions[slot(self.submission_head)];
        let [user_data, head, deadline, attachment] = read_entry(entry);
        self.submission_head = self.submission_head.wrapping_add(1);
        shared(&self.mapping).counters.submission_head.0.store(self.submission_head, Release);
        let (verb, frame, request_bytes) = split_head(head);
        let unusable = if usize::from(frame) >= FRAMES {
            Some(Hostile::Range { field: "frame", value: frame.into(), max: FRAMES as u64 - 1 })
        } else if self.in_flight & bit(frame) != 0 {
            Some(Hostile::InFlight { frame })
        } else {
            None
        };
        if let Some(hostile) = unusable {
            self.publish(user_data, STATUS_MALFORMED, NO_FRAME, 0);
            return Some(Err(hostile));
        }
        self.in_flight |= bit(frame);
        let ticket = Ticket { user_data, frame };
        if request_bytes as usize > FRAME_BYTES {
            let (value, max) = (request_bytes.into(), FRAME_BYTES as u64);
            let hostile = Hostile::Range { field: "request_bytes", value, max };
            self.complete(ticket, STATUS_MALFORMED, hostile.to_string().as_bytes());
            return Some(Err(hostile));
        }
        copy_out(&shared(&self.mapping).frames[usize::from(frame)], request_bytes as usize, request);
        let submission = Submission { user_data, verb, deadline_ms: deadline as u32, attachment };
        Some(Ok(Taken { submission, ticket }))
    }

    /// Whether one more request could be completed, besides those taken. A client for which this is false has submitted in a frame
    /// whose completion it did not reap: it is parked, and looked at again whenever its doorbell rings.
    pub fn has_room(&mut self) -> bool {
        self.room() == Ok(true)
    }

    /// Answers a request. Never fails for want of room: `take` has set it aside. Ask [`Self::client_sleeps`] afterwards, once for any
    /// number of completions.
    ///
    /// # Panics
    /// If `reply` has more than `FRAME_BYTES`, which no encoder of `door` makes, or the ticket is another ring's.
    pub fn complete(&mut self, ticket: Ticket, status: u16, reply: &[u8]) {
        let Ticket { user_data, frame } = ticket;
        assert!(reply.len() <= FRAME_BYTES, "a reply of {} bytes does not fit into a frame", reply.len());
        assert!(self.in_flight & bit(frame) != 0, "frame {frame} is not in flight: the ticket is another ring's");
        self.in_flight &= !bit(frame);
        copy_in(&shared(&self.mapping).frames[usize::from(frame)], reply);
        self.publish(user_data, status, frame, reply.len() as u32);
    }

    /// Requests taken and not completed yet, at most `FRAMES`.
    pub fn in_flight(&self) -> usize {
        self.in_flight.count_ones() as usize
    }

    /// Tells the client to attach elsewhere: nothing more is taken, what was taken can still be completed. Ask
    /// [`Self::client_sleeps`] afterwards.
    pub fn close(&mut self) {
        self.closing = true;
        shared(&self.mapping).counters.closing.0.store(CLOSING, Release);
    }

    /// The client broke the rules of a counter: nothing more comes from this ring.
    pub fn is_broken(&self) -> bool {
        self.broken
    }

    /// Whether to ring the client's doorbell. Ask after `complete`, an error of `take`, and `close`.
    pub fn client_sleeps(&self) -> bool {
        sleeps(&shared(&self.mapping).counters.client_sleeps)
    }

    /// Before sleeping: true if `take` would have nothing, and the client has been told to ring. Then sleep, or not, and in any case
    /// call [`Self::woke`]. False: do not sleep, `take` has something.
    #[must_use = "whoever sleeps after a false is not woken"]
    pub fn prepare_to_sleep(&mut self) -> bool {
        shared(&self.mapping).counters.daemon_sleeps.0.store(ASLEEP, Relaxed);
        fence(SeqCst);
        let ended = self.closing || self.broken;
        // A broken rule counts as something: `take` reports it.
        let something = !ended && self.ready() != Ok(false);
        if something {
            self.woke();
        }
        !something
    }

    /// After sleeping.
    pub fn woke(&mut self) {
        shared(&self.mapping).counters.daemon_sleeps.0.store(AWAKE, Relaxed);
    }

    /// Whether an entry waits and its completion would fit. The tail is read before the client's head: who submits in a frame has
    /// reaped what was in it before, and so an honest client is never found without room.
    fn ready(&mut self) -> Result<bool, Hostile> {
        let tail = &shared(&self.mapping).counters.submission_tail;
        let waiting = ahead("submission_tail", tail, self.submission_head, FRAMES as u32)?;
        Ok(waiting > 0 && self.room()?)
    }

    /// What the client has not reaped and what it will get must be less than a whole queue.
    fn room(&mut self) -> Result<bool, Hostile> {
        let unreaped_max = self.completion_tail.wrapping_sub(self.completion_head_seen);
        let head = &shared(&self.mapping).counters.completion_head;
        let reaped = ahead("completion_head", head, self.completion_head_seen, unreaped_max)?;
        self.completion_head_seen = self.completion_head_seen.wrapping_add(reaped);
        Ok(unreaped_max - reaped + self.in_flight.count_ones() < FRAMES as u32)
    }

    fn publish(&mut self, user_data: u64, status: u16, frame: u16, reply_bytes: u32) {
        let Shared { counters, completions, .. } = shared(&self.mapping);
        write_entry(&completions[slot(self.completion_tail)], &[user_data, join_head(status, frame, reply_bytes)]);
        self.completion_tail = self.completion_tail.wrapping_add(1);
        counters.completion_tail.0.store(self.completion_tail, Release);
    }
}

impl<M: Mapping> ClientRing<M> {
    /// Takes a fresh ring from the daemon: checks that it is one, of the version and geometry known here.
    pub fn open(mapping: M) -> Result<Self, RingError> {
        check_place(&mapping)?;
        let Shared { header, counters, .. } = shared(&mapping);
        let found = header.magic.load(Acquire);
        if found != MAGIC {
            return Err(RingError::Magic { found });
        }
        let found = header.abi.load(Relaxed);
        if found != RING_ABI {
            return Err(RingError::Abi { found });
        }
        for (field, value, expected) in geometry(header) {
            let found = value.load(Relaxed);
            if found != expected {
                return Err(RingError::Geometry { field, found, expected });
            }
        }
        for (field, counter) in [
            ("submission_tail", &counters.submission_tail),
            ("submission_head", &counters.submission_head),
            ("completion_tail", &counters.completion_tail),
            ("completion_head", &counters.completion_head),
        ] {
            let found = counter.0.load(Relaxed);
            if found != 0 {
                return Err(RingError::Used { field, found });
            }
        }
        Ok(Self {
            mapping,
            submission_tail: 0,
            completion_head: 0,
            in_flight: [None; FRAMES],
            closing_seen: false,
            broken: false,
            not_sync: PhantomData,
        })
    }

    /// Publishes a request. Ask [`Self::daemon_sleeps`] afterwards, once for any number of requests. `user_data` need not be unique.
    pub fn submit(&mut self, submission: Submission, request: &[u8]) -> Result<(), SubmitError> {
        if request.len() > FRAME_BYTES {
            return Err(SubmitError::Length { bytes: request.len() });
        }
        if self.broken {
            return Err(SubmitError::Broken);
        }
        if self.is_closing() {
            return Err(SubmitError::Closing);
        }
        // A free frame is a free entry: at most 31 requests are without an answer, so the one that was in this entry 32 requests ago
        // has been taken, since requests are taken in order.
        let frame = self.in_flight.iter().position(Option::is_none).ok_or(SubmitError::Full)?;
        let Submission { user_data, verb, deadline_ms, attachment } = submission;
        let Shared { counters, submissions, frames, .. } = shared(&self.mapping);
        copy_in(&frames[frame], request);
        let head = join_head(verb, frame as u16, request.len() as u32);
        write_entry(&submissions[slot(self.submission_tail)], &[user_data, head, u64::from(deadline_ms), attachment]);
        self.in_flight[frame] = Some(user_data);
        self.submission_tail = self.submission_tail.wrapping_add(1);
        counters.submission_tail.0.store(self.submission_tail, Release);
        Ok(())
    }

    /// The next completion, in the daemon's order, its reply in `reply` (at most `FRAME_BYTES`; what was there is overwritten). `None`:
    /// there is none, or the ring is broken.
    ///
    /// A daemon whose completion breaks a rule has forgotten who asked what: drop the ring and attach again. A frame that such a
    /// completion named stays out of use.
    pub fn reap(&mut self, reply: &mut Vec<u8>) -> Option<Result<Completion, Hostile>> {
        if self.broken {
            return None;
        }
        match self.waiting() {
            Ok(0) => return None,
            Ok(_) => {}
            Err(hostile) => {
                self.broken = true;
                return Some(Err(hostile));
            }
        }
        let Shared { counters, completions, frames, .. } = shared(&self.mapping);
        let [user_data, head] = read_entry(&completions[slot(self.completion_head)]);
        let (status, frame, reply_bytes) = split_head(head);
        let asked = self.in_flight.get_mut(usize::from(frame)).filter(|asked| **asked == Some(user_data));
        let outcome = match asked {
            None => Err(Hostile::NotInFlight { frame, user_data }),
            Some(_) if reply_bytes as usize > FRAME_BYTES => {
                Err(Hostile::Range { field: "reply_bytes", value: reply_bytes.into(), max: FRAME_BYTES as u64 })
            }
            Some(asked) => {
                *asked = None;
                copy_out(&frames[usize::from(frame)], reply_bytes as usize, reply);
                Ok(Completion { user_data, status })
            }
        };
        // After the copy: from here on the daemon may write this entry anew.
        self.completion_head = self.completion_head.wrapping_add(1);
        counters.completion_head.0.store(self.completion_head, Release);
        Some(outcome)
    }

    /// Requests submitted and not reaped yet, at most `FRAMES`.
    pub fn in_flight(&self) -> usize {
        self.in_flight.iter().flatten().count()
    }

    /// The daemon hands over or stops. What it took before it may still answer; when the socket ends, nothing more comes.
    pub fn is_closing(&mut self) -> bool {
        self.closing_seen |= closing(&self.mapping);
        self.closing_seen
    }

    /// The daemon broke the rules of a counter: nothing more comes from this ring.
    pub fn is_broken(&self) -> bool {
        self.broken
    }

    /// Whether to ring the daemon's doorbell. Ask after `submit`.
    pub fn daemon_sleeps(&self) -> bool {
        sleeps(&shared(&self.mapping).counters.daemon_sleeps)
    }

    /// Before sleeping: true if `reap` would have nothing, and the daemon has been told to ring. Then sleep, or not, and in any case
    /// call [`Self::woke`]. False: do not sleep, `reap` has something, or [`Self::is_closing`] has become true since it was asked, or
    /// the ring is broken.
    #[must_use = "whoever sleeps after a false is not woken"]
    pub fn prepare_to_sleep(&mut self) -> bool {
        shared(&self.mapping).counters.client_sleeps.0.store(ASLEEP, Relaxed);
        fence(SeqCst);
        let news = closing(&self.mapping) && !self.closing_seen;
        let nothing = !self.broken && !news && self.waiting() == Ok(0);
        if !nothing {
            self.woke();
        }
        nothing
    }

    /// After sleeping.
    pub fn woke(&mut self) {
        shared(&self.mapping).counters.client_sleeps.0.store(AWAKE, Relaxed);
    }

    /// Entries that the daemon has published and `reap` has not reaped.
    fn waiting(&self) -> Result<u32, Hostile> {
        let tail = &shared(&self.mapping).counters.completion_tail;
        ahead("completion_tail", tail, self.completion_head, FRAMES as u32)
    }
}

/// The mapping, seen as a ring. Only for mappings that `check_place` has passed.
fn shared<M: Mapping>(mapping: &M) -> &Shared {
    // SAFETY: `check_place` has found the memory long enough and aligned, and `Mapping` promises that it stays where it is, readable
    // and writable, as long as the value that is borrowed here. `Shared` is all atomics: every bit pattern is valid, and whoever else
    // writes there, in this process through this module or in another by whatever means, changes values under interior mutability.
    unsafe { mapping.base().cast::<Shared>().as_ref() }
}

fn check_place<M: Mapping>(mapping: &M) -> Result<(), RingError> {
    let past = mapping.base().addr().get() % align_of::<Shared>();
    if mapping.bytes() < RING_BYTES {
        return Err(RingError::Bytes { bytes: mapping.bytes() });
    }
    if past != 0 { Err(RingError::Misaligned { past }) } else { Ok(()) }
}

/// What the header says besides magic and version, and what it must say.
fn geometry(header: &Header) -> [(&'static str, &AtomicU32, u32); 5] {
    [
        ("frames", &header.frames, FRAMES as u32),
        ("submission_entry_bytes", &header.submission_entry_bytes, ENTRY_BYTES as u32),
        ("completion_entry_bytes", &header.completion_entry_bytes, ENTRY_BYTES as u32),
        ("frame_bytes", &header.frame_bytes, FRAME_BYTES as u32),
        ("ring_bytes", &header.ring_bytes, RING_BYTES as u32),
    ]
}

/// How far the other side's counter is past `from`; read once.
fn ahead(field: &'static str, counter: &Line, from: u32, ahead_max: u32) -> Result<u32, Hostile> {
    let value = counter.0.load(Acquire);
    let ahead = value.wrapping_sub(from);
    if ahead > ahead_max { Err(Hostile::Counter { field, value, from, ahead_max }) } else { Ok(ahead) }
}

/// The other side's flag, after what this side published.
fn sleeps(flag: &Line) -> bool {
    fence(SeqCst);
    flag.0.load(Relaxed) != AWAKE
}

/// The daemon's word, which it does not take back.
fn closing<M: Mapping>(mapping: &M) -> bool {
    shared(mapping).counters.closing.0.load(Acquire) != 0
}

/// The entry that a counter means.
const fn slot(counter: u32) -> usize {
    counter as usize % FRAMES
}

/// The bit of a frame; `frame` is less than `FRAMES`.
const fn bit(frame: u16) -> u32 {
    1 << frame
}

/// Second word of an entry.
const fn join_head(code: u16, frame: u16, bytes: u32) -> u64 {
    code as u64 | (frame as u64) << 16 | (bytes as u64) << 32
}

const fn split_head(head: u64) -> (u16, u16, u32) {
    (head as u16, (head >> 16) as u16, (head >> 32) as u32)
}

/// The first words of an entry, each read once. Nothing else reads one.
fn read_entry<const WORDS: usize>(entry: &Entry) -> [u64; WORDS] {
    let mut words = [0; WORDS];
    for (word, shared) in words.iter_mut().zip(entry) {
        *word = shared.load(Relaxed);
    }
    words
}

/// The first words of an entry; the others are 0.
fn write_entry(entry: &Entry, words: &[u64]) {
    for (i, shared) in entry.iter().enumerate() {
        shared.store(words.get(i).copied().unwrap_or(0), Relaxed);
    }
}

/// The first `bytes` of a frame, at most all; each word is read once.
fn copy_out(frame: &Frame, bytes: usize, into: &mut Vec<u8>) {
    into.resize(bytes.next_multiple_of(WORD_BYTES), 0);
    let (words, _) = into.as_chunks_mut::<WORD_BYTES>();
    for (word, shared) in words.iter_mut().zip(frame) {
        *word = shared.load(Relaxed).to_le_bytes();
    }
    into.truncate(bytes);
}

/// To the start of a frame; `bytes` fit, the last word is filled up with zeros.
fn copy_in(frame: &Frame, bytes: &[u8]) {
    let (words, rest) = bytes.as_chunks::<WORD_BYTES>();
    for (shared, word) in frame.iter().zip(words) {
        shared.store(u64::from_le_bytes(*word), Relaxed);
    }
    if !rest.is_empty() {
        let mut last = [0; WORD_BYTES];
        last[..rest.len()].copy_from_slice(rest);
        frame[words.len()].store(u64::from_le_bytes(last), Relaxed);
    }
}

#[cfg(test)]
mod tests;
