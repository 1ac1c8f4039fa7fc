//! The thread of one tier file: hands transfers to the device, checks the sums of what was loaded, and tells the core. Sums are
//! computed here, not in the core, since a megabyte takes 100 us.
//!
//! What a slot holds that was neither written nor read since the start may be another tenant's: a crash keeps entries whose payload it
//! did not. Such a load goes to memory of this thread, and to the arena, which clients map, only when its sum is right.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, TryRecvError};
use std::time::Duration;

use rustix::io::Errno;
use tender_proto::sum;

use super::{Expected, Outcome, Transfer, TransferId};
use crate::device::block::{BlockDevice, IoDone, IoFault, IoRequest, Operation, PAGE_BYTES};
use crate::device::memory::{Arena, Extent, PageBuffer};
use crate::limits;

/// What the core tells the thread.
#[derive(Debug)]
pub enum Command {
    /// Do this.
    Start(TransferId, Transfer),
    /// A segment of the arena was prepared.
    SegmentReady(u32),
}

/// What must be checked when a load arrives.
#[derive(Clone, Copy, Debug)]
struct Check {
    into: Extent,
    expected: Expected,
}

/// What is in flight on one device, and what to check when it arrives.
pub struct InFlight {
    arena: Arc<Arena>,
    checks: HashMap<u64, Check>,
    /// Transfers that the device has no room for yet: the lanes fill its depth, and pages of the directory come beside them.
    waiting: VecDeque<(TransferId, Transfer)>,
    /// Requests submitted and not back yet.
    count: usize,
    /// Ended without the device: there was no memory for them.
    refused: Vec<IoDone>,
    private: PrivateMemory,
}

impl InFlight {
    /// Nothing yet.
    pub fn new(arena: Arc<Arena>) -> Self {
        Self {
            arena,
            checks: HashMap::new(),
            waiting: VecDeque::new(),
            count: 0,
            refused: Vec::new(),
            private: PrivateMemory::default(),
        }
    }

    /// Takes a transfer on; [`InFlight::submit`] hands it to the device.
    pub fn start(&mut self, id: TransferId, transfer: Transfer) {
        self.waiting.push_back((id, transfer));
    }

    /// Hands to the device what it has room for, in the order of `start`.
    pub fn submit(&mut self, device: &mut dyn BlockDevice) {
        while self.count < device.depth()
            && self.waiting.front().is_some_and(|(_, next)| self.private.has_room(next))
            && let Some((TransferId(id), transfer)) = self.waiting.pop_front()
        {
            self.count += 1;
            match self.operation(id, transfer) {
                Ok(operation) => device.submit(IoRequest { id, operation }),
                Err(fault) => self.refused.push(IoDone { id, result: Err(fault), private: None }),
            }
        }
    }

    fn operation(&mut self, id: u64, transfer: Transfer) -> Result<Operation, IoFault> {
        Ok(match transfer {
            Transfer::Load { offset, into, expected, is_private } => {
                self.checks.insert(id, Check { into, expected });
                match is_private {
                    true => Operation::ReadPrivate { offset, into: self.private.take(into.bytes as usize)? },
                    false => Operation::Read { offset, into },
                }
            }
            Transfer::WriteBack { offset, from } => Operation::Write { offset, from },
            Transfer::WritePage { offset, page } => Operation::WritePage { offset, page },
            Transfer::Flush => Operation::Flush,
        })
    }

    /// What ended without the device since this was asked last.
    pub fn refused(&mut self) -> Vec<IoDone> {
        std::mem::take(&mut self.refused)
    }

    /// Whether everything has come back.
    pub fn is_empty(&self) -> bool {
        self.count == 0 && self.waiting.is_empty()
    }

    /// Judges a completion.
    pub fn outcome(&mut self, done: IoDone) -> (TransferId, Outcome) {
        self.count -= 1;
        let check = self.checks.remove(&done.id);
        let outcome = match (done.result, check) {
            (Err(fault), _) => Outcome::Failed(fault),
            (Ok(()), None) => Outcome::Done(Vec::new()),
            (Ok(()), Some(Check { into, expected })) => {
                let payload_bytes = expected.payload_bytes as usize;
                let private = done.private.as_ref().map(|private| &private[..payload_bytes]);
                let sums = match private {
                    Some(payload) => sum::fragment_sums(payload),
                    None => self.arena.fragment_sums(into, payload_bytes),
                };
                if sum::root(expected.seed, &sums) != expected.root {
                    Outcome::Mismatch
                } else {
                    if let Some(payload) = private {
                        self.arena.write(into, 0, payload);
                        self.arena.zero_from(into, payload_bytes);
                    }
                    Outcome::Done(sums)
                }
            }
        };
        if let Some(private) = done.private {
            self.private.give_back(private);
        }
        (TransferId(done.id), outcome)
    }
}

/// Memory for loads that are not read in place: kept for the next one while some are in flight, so that it is not made anew each time.
#[derive(Debug, Default)]
struct PrivateMemory {
    in_flight_bytes: usize,
    spare: Vec<PageBuffer>,
}

impl PrivateMemory {
    fn has_room(&self, transfer: &Transfer) -> bool {
        let Transfer::Load { into, is_private: true, .. } = transfer else { return true };
        self.in_flight_bytes + into.bytes as usize <= limits::PRIVATE_LOADS_BYTES_MAX
    }

    fn take(&mut self, bytes: usize) -> Result<PageBuffer, IoFault> {
        let buffer = match self.spare.pop_if(|spare| spare.len() == bytes) {
            Some(spare) => spare,
            None => {
                self.spare.clear();
                let made = PageBuffer::zeroed(bytes / PAGE_BYTES as usize);
                made.map_err(|error| IoFault::Os(error.raw_os_error().unwrap_or(Errno::NOMEM.raw_os_error())))?
            }
        };
        self.in_flight_bytes += bytes;
        Ok(buffer)
    }

    fn give_back(&mut self, buffer: PageBuffer) {
        self.in_flight_bytes -= buffer.len();
        self.spare.push(buffer);
        if self.in_flight_bytes == 0 {
            self.spare.clear();
        }
    }
}

/// Runs until the sender of commands is gone and everything has come back.
pub fn run(
    mut device: Box<dyn BlockDevice>,
    arena: Arc<Arena>,
    commands: &Receiver<Command>,
    tell: impl Fn(TransferId, Outcome),
) {
    /// Only a bound: the waker ends the wait as soon as there is something to do.
    const IDLE: Duration = Duration::from_millis(500);
    let mut in_flight = InFlight::new(arena);
    let mut done = Vec::new();
    let mut open = true;
    while open || !in_flight.is_empty() {
        loop {
            match commands.try_recv() {
                Ok(Command::Start(id, transfer)) => in_flight.start(id, transfer),
                Ok(Command::SegmentReady(segment)) => device.segment_ready(segment),
                Err(TryRecvError::Empty) => break,
                Err(TryRecvError::Disconnected) => {
                    open = false;
                    break;
                }
            }
        }
        in_flight.submit(&mut *device);
        done.append(&mut in_flight.refused());
        if done.is_empty() {
            device.wait(if open { IDLE } else { Duration::from_millis(10) }, &mut done);
        }
        for completion in done.drain(..) {
            let (id, outcome) = in_flight.outcome(completion);
            tell(id, outcome);
        }
    }
}

#[cfg(test)]
mod tests;
