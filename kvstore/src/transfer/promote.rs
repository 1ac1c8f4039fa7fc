//! The thread that copies what clients wrote in place to memory that only the daemon writes. Whoever wrote may go on to: so what is
//! summed is what was copied, never what lies where it came from.

use std::sync::Arc;
use std::sync::mpsc::Receiver;

use tender_proto::sum;

use super::{Expected, Outcome, TransferId};
use crate::device::memory::{Arena, Extent};

/// A copy to be made.
#[derive(Debug)]
pub struct Promotion {
    /// Its name.
    pub id: TransferId,
    /// Where a client may be writing.
    pub from: Extent,
    /// Where only the daemon writes.
    pub to: Extent,
    /// What it must be.
    pub expected: Expected,
}

/// Copies until the channel closes, and tells of each copy.
pub fn run(arena: &Arc<Arena>, promotions: &Receiver<Promotion>, done: impl Fn(TransferId, Outcome)) {
    for Promotion { id, from, to, expected } in promotions {
        let sums = arena.promote(from, to, expected.payload_bytes as usize);
        let is_right = sum::root(expected.seed, &sums) == expected.root;
        done(id, if is_right { Outcome::Done(sums) } else { Outcome::Mismatch });
    }
}
