//! The simulated world: the real core over simulated disks, clock and clients, all from one seed. It lives, is killed, loses its power,
//! meets disks that lie, and is asked everything that a client can ask; every answer is compared with what a plain map says.
//!
//! ```text
//!  scenario   what the seed makes of configuration, namespaces, faults      clients   what is asked, and what is done with grants
//!  world      clock, queue, disks, steps                                    answers   every reply, against the oracle
//!  restart    kill, power cut, recovery, the end                            oracle    what may be read, what must survive
//!  warm       the worker alone dies, between steps or within one             cut       records that end in the middle of a step
//! ```
//! The same seed and number of operations give the same trace, byte for byte. When something is wrong the run is repeated with its
//! trace kept, so that a failure comes with the last things that happened.

mod answers;
mod clients;
mod cut;
mod oracle;
mod payload;
mod random;
mod restart;
mod scenario;
mod trace;
mod warm;
mod world;

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};

use self::scenario::Scenario;
use self::trace::Trace;
use self::world::World;

/// What a run that went well did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Summary {
    /// Hash of everything that went into the core and came out of it.
    pub trace: u64,
    /// Steps of the core.
    pub steps: u64,
    /// Blocks leased, and compared byte by byte.
    pub leased_blocks: u64,
    /// Of these, loaded from disk.
    pub loaded_blocks: u64,
    /// Shards committed.
    pub committed_shards: u64,
    /// Leases of what a client had written over, found out by their readers.
    pub refused_leases: u64,
    /// Copies evicted, of both tiers.
    pub evicted_copies: u64,
    /// Reads whose sum was wrong.
    pub sum_mismatches: u64,
    /// Purges answered.
    pub purges: u64,
    /// Blocks that were acknowledged as durable and found again after a crash.
    pub survived_blocks: u64,
    /// The daemon was killed.
    pub kills: u64,
    /// The power was cut.
    pub power_cuts: u64,
    /// The worker alone was killed: host memory, its records and local clients lived on.
    pub warm_restarts: u64,
    /// Of these, in the middle of a step.
    pub cut_steps: u64,
    /// Blocks found in host memory after that.
    pub warm_blocks: u64,
    /// Leases and reservations that their clients confirmed after that.
    pub confirmed_holds: u64,
    /// Simulated time.
    pub simulated_ms: u64,
}

/// What went wrong, and how to see it again.
#[derive(Debug)]
pub struct Failure {
    /// The seed.
    pub seed: u64,
    /// Operations asked for.
    pub operations: u64,
    /// What kind of world it is.
    pub world: String,
    /// The claim that did not hold.
    pub what: String,
    /// The last things that happened, oldest first.
    pub last: Vec<String>,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        /// Lines that are enough to see what went wrong, if not why.
        const LINES: usize = 60;
        self.last[self.last.len().saturating_sub(LINES)..].iter().try_for_each(|line| writeln!(f, "  {line}"))?;
        let Self { seed, operations, world, what, .. } = self;
        write!(f, "seed {seed} with {operations} operations: {what}\n  in a world of {world}")
    }
}

impl std::error::Error for Failure {}

/// Runs one world for that many operations of its clients.
pub fn run(seed: u64, operations: u64) -> Result<Summary, Box<Failure>> {
    attempt(seed, operations, Trace::default()).map_err(|_| {
        let (trace, kept) = Trace::kept();
        let what = attempt(seed, operations, trace).err();
        let what = what.unwrap_or_else(|| "failed once and not again: something besides the seed decides".to_owned());
        let last = kept.borrow_mut().drain(..).collect();
        Box::new(Failure { seed, operations, world: Scenario::new(seed).to_string(), what, last })
    })
}

/// Claims of the world and of the core are assertions, so that both stop at the first one that does not hold.
fn attempt(seed: u64, operations: u64, trace: Trace) -> Result<Summary, String> {
    catch_unwind(AssertUnwindSafe(|| World::new(Scenario::new(seed), trace).run(operations))).map_err(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        text.or_else(|| panic.downcast_ref::<&str>().map(|&text| text.to_owned())).unwrap_or_default()
    })
}
