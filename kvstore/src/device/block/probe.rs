//! How many requests a disk wants in flight: the smallest depth that gives nearly all the bandwidth there is. More would only make each
//! request wait longer.
//!
//! Reads of a file that was allocated and never written are answered without the disk, so a fresh file tells nothing: there use
//! [`DEPTH_UNPROBED`].

use std::time::{Duration, Instant};

use tender_proto::sum::{GOLDEN, mix};

use super::{BlockDevice, IoFault, IoRequest, Operation, PAGE_BYTES};
use crate::device::memory::Extent;

/// A depth that is right for most NVMe disks, where nothing can be measured.
pub const DEPTH_UNPROBED: usize = 32;

/// Deepest that is tried.
const DEPTH_MAX: usize = 64;

/// Time for all depths together.
const BUDGET: Duration = Duration::from_millis(250);

/// Time for one depth; seven are tried.
const WINDOW: Duration = Duration::from_millis(30);

/// What was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Probe {
    /// Requests to keep in flight.
    pub depth: usize,
    /// What they gave together.
    pub read_bytes_per_s: u64,
    /// A read failed, and the rest was not tried.
    pub fault: Option<IoFault>,
}

/// Reads pieces of `read_bytes` at places chosen by `seed`, at depths 1, 2, 4 … into `scratch`, which is the caller's alone: each
/// request has its own piece of it, so that its size bounds the depths tried. Nothing else may be in flight.
///
/// # Panics
/// When `read_bytes` is not whole pages, or one does not fit into the file and into `scratch`.
pub fn probe_depth(
    device: &mut dyn BlockDevice,
    file_bytes: u64,
    scratch: Extent,
    read_bytes: u32,
    seed: u64,
) -> Probe {
    assert!(
        read_bytes > 0 && u64::from(read_bytes) <= file_bytes && read_bytes <= scratch.bytes,
        "a read of {read_bytes} bytes fits neither a file of {file_bytes} nor {scratch:?}"
    );
    let depth_max = DEPTH_MAX.min(device.depth()).min((scratch.bytes / read_bytes) as usize);
    let start = Instant::now();
    let mut reads = Reads { device, file_bytes, scratch, read_bytes, state: seed, fault: None };
    let mut rates = Vec::new();
    for depth in (0..).map(|power| 1usize << power).take_while(|depth| *depth <= depth_max) {
        let best = rates.iter().map(|(_, rate)| *rate).max().unwrap_or(u64::MAX);
        let drain = Duration::from_secs_f64(depth as f64 * f64::from(read_bytes) / best.max(1) as f64);
        if start.elapsed() + WINDOW + drain > BUDGET {
            break;
        }
        rates.push((depth, reads.measure(depth)));
        if reads.fault.is_some() {
            break;
        }
    }
    let (depth, read_bytes_per_s) = choose(&rates);
    Probe { depth, read_bytes_per_s, fault: reads.fault }
}

/// The smallest depth within 95 % of the best. Depths ascend.
fn choose(rates: &[(usize, u64)]) -> (usize, u64) {
    let best = rates.iter().map(|(_, rate)| *rate).max().unwrap_or(0);
    let enough = |rate: u64| u128::from(rate) * 100 >= u128::from(best) * 95;
    rates.iter().copied().find(|(_, rate)| enough(*rate)).unwrap_or((1, 0))
}

struct Reads<'a> {
    device: &'a mut dyn BlockDevice,
    file_bytes: u64,
    scratch: Extent,
    read_bytes: u32,
    state: u64,
    fault: Option<IoFault>,
}

impl Reads<'_> {
    /// Bytes per second with `depth` reads in flight. Returns with none in flight.
    fn measure(&mut self, depth: usize) -> u64 {
        let start = Instant::now();
        let (mut finished, mut in_flight) = (0u64, depth);
        let mut done = Vec::new();
        for piece in 0..depth {
            self.submit(piece as u64);
        }
        while in_flight > 0 {
            self.device.wait(WINDOW, &mut done);
            for completion in done.drain(..) {
                in_flight -= 1;
                match completion.result {
                    Ok(()) => finished += 1,
                    Err(fault) => self.fault = Some(fault),
                }
                if self.fault.is_none() && start.elapsed() < WINDOW {
                    self.submit(completion.id);
                    in_flight += 1;
                }
            }
        }
        let nanoseconds = start.elapsed().as_nanos().max(1);
        let rate = u128::from(finished) * u128::from(self.read_bytes) * 1_000_000_000 / nanoseconds;
        u64::try_from(rate).unwrap_or(u64::MAX)
    }

    fn submit(&mut self, piece: u64) {
        self.state = self.state.wrapping_add(GOLDEN);
        let places = (self.file_bytes - u64::from(self.read_bytes)) / PAGE_BYTES + 1;
        let offset = mix(self.state) % places * PAGE_BYTES;
        let start = self.scratch.offset + piece as u32 * self.read_bytes;
        let into = Extent { segment: self.scratch.segment, offset: start, bytes: self.read_bytes };
        self.device.submit(IoRequest { id: piece, operation: Operation::Read { offset, into } });
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::super::simulated::{DiskImage, Faults, SimulatedDisk};
    use super::*;
    use crate::device::memory::Arena;

    #[test]
    fn the_smallest_depth_that_is_nearly_best_wins() {
        assert_eq!(choose(&[(1, 100), (2, 200), (4, 381), (8, 400), (16, 398)]), (4, 381));
        assert_eq!(choose(&[(1, 100), (2, 100)]), (1, 100));
        assert_eq!(choose(&[]), (1, 0));
    }

    #[test]
    fn a_disk_that_fails_ends_the_probe_and_is_named() {
        let arena = Arc::new(Arena::new(64 * PAGE_BYTES, 1).expect("addresses"));
        let faults = Faults { read_error_per_mille: 1000, latency_us_min: 0, latency_us_max: 0, ..Faults::default() };
        let mut disk = SimulatedDisk::new(1, DiskImage::new(64 * PAGE_BYTES), arena, faults);
        let scratch = Extent { segment: 0, offset: 0, bytes: 64 * PAGE_BYTES as u32 };
        let probe = probe_depth(&mut disk, 64 * PAGE_BYTES, scratch, PAGE_BYTES as u32, 1);
        assert_eq!(probe, Probe { depth: 1, read_bytes_per_s: 0, fault: Some(IoFault::Os(5)) });
    }
}
