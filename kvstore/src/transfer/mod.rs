//! How do bytes move? Between arena and disk, in lanes: what somebody waits for before write-back before prefetch. [`lanes`] decides
//! what goes next and is part of the core; [`disk`] does it, on a thread of its own for each file.

pub mod disk;
pub mod lanes;
pub mod promote;

use crate::device::block::IoFault;
use crate::device::memory::{Extent, Page};

/// Name of a transfer, unique while the daemon runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TransferId(pub u64);

/// Something for the thread of one file to do. Offsets are bytes from the file's start.
#[derive(Debug)]
pub enum Transfer {
    /// Disk to arena; what arrives must have the sum that the index holds.
    Load {
        /// Where in the file.
        offset: u64,
        /// Where to.
        into: Extent,
        /// What it must be.
        expected: Expected,
        /// Whether what the slot holds may be another's: it is read where no client sees it, and comes to the arena if it is right.
        is_private: bool,
    },
    /// Arena to disk.
    WriteBack {
        /// Where in the file.
        offset: u64,
        /// Where from.
        from: Extent,
    },
    /// A page of the directory to disk.
    WritePage {
        /// Where in the file.
        offset: u64,
        /// The page.
        page: Box<Page>,
    },
    /// Everything that was written is to survive a power cut.
    Flush,
}

/// What bytes must be: never taken from the bytes themselves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Expected {
    /// `proto::sum::seed` of key, shard and layout.
    pub seed: u64,
    /// The root under that seed.
    pub root: u64,
    /// Bytes that count; what follows in the slot does not.
    pub payload_bytes: u32,
}

/// How a transfer ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Done. After a load: the sums of the fragments.
    Done(Vec<u64>),
    /// What was loaded is not what was written.
    Mismatch,
    /// The disk said no.
    Failed(IoFault),
}
