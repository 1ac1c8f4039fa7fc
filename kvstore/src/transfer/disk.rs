//! The thread of one tier file: hands transfers to the device, checks the sums of what was loaded, and tells the core. Sums are
//! computed here, not in the core, since a megabyte takes 100 us.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, TryRecvError};
use std::time::Duration;

use tender_proto::sum;

use super::{Expected, Outcome, Transfer, TransferId};
use crate::device::block::{BlockDevice, IoDone, IoRequest, Operation};
use crate::device::memory::{Arena, Extent};

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
    /// Requests that the device has no room for yet: the lanes fill its depth, and pages of the directory come beside them.
    waiting: VecDeque<IoRequest>,
    /// Requests submitted and not back yet.
    count: usize,
}

impl InFlight {
    /// Nothing yet.
    pub fn new(arena: Arc<Arena>) -> Self {
        Self { arena, checks: HashMap::new(), waiting: VecDeque::new(), count: 0 }
    }

    /// Takes a transfer on; [`InFlight::submit`] hands it to the device.
    pub fn start(&mut self, id: TransferId, transfer: Transfer) {
        let operation = match transfer {
            Transfer::Load { offset, into, expected } => {
                self.checks.insert(id.0, Check { into, expected });
                Operation::Read { offset, into }
            }
            Transfer::WriteBack { offset, from } => Operation::Write { offset, from },
            Transfer::WritePage { offset, page } => Operation::WritePage { offset, page },
            Transfer::Flush => Operation::Flush,
        };
        self.waiting.push_back(IoRequest { id: id.0, operation });
    }

    /// Hands to the device what it has room for, in the order of `start`.
    pub fn submit(&mut self, device: &mut dyn BlockDevice) {
        while self.count < device.depth()
            && let Some(request) = self.waiting.pop_front()
        {
            self.count += 1;
            device.submit(request);
        }
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
                let sums = self.arena.fragment_sums(into, expected.payload_bytes as usize);
                if sum::root(expected.seed, &sums) == expected.root { Outcome::Done(sums) } else { Outcome::Mismatch }
            }
        };
        (TransferId(done.id), outcome)
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
        device.wait(if open { IDLE } else { Duration::from_millis(10) }, &mut done);
        for completion in done.drain(..) {
            let (id, outcome) = in_flight.outcome(completion);
            tell(id, outcome);
        }
    }
}
