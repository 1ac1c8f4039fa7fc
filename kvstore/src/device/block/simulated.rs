//! The disk of the simulation: one seed decides when requests complete, which fail, and what a power cut leaves behind.
//!
//! ```text
//!  submit ──► in flight, due at a random time ──due──► volatile image ──flush──► durable
//!                    │                                     │
//!                    └──────────── power cut ──────────────┘ each sector of 512 bytes: old, new or torn
//! ```
//! Reads see the volatile image. A flush covers the writes that had completed when it was submitted and no others; what a failed one
//! covered is made durable by no later flush, as file systems do that report an error once. Memory is read and
//! written at completion, as late as the contract allows, so that a submitter who lets go of an extent too early is found out.
//! There is no other source of chance or time: the same seed and the same calls give the same completions and the same images.

mod image;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use rustix::io::Errno;
use tender_proto::sum::{GOLDEN, mix};

pub use self::image::DiskImage;
use self::image::{SECTOR_BYTES, Sector, Sectors};
use super::{BlockDevice, IoDone, IoFault, IoRequest, Operation, PAGE_BYTES};
use crate::device::memory::Arena;

/// Most requests in flight.
const DEPTH: usize = 32;

/// What goes wrong, in thousandths of the requests concerned, and how long requests take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Faults {
    /// Reads that fail and deliver nothing.
    pub read_error_per_mille: u32,
    /// Writes that fail; each of their sectors is written or not.
    pub write_error_per_mille: u32,
    /// Flushes that fail and make nothing durable.
    pub flush_error_per_mille: u32,
    /// Reads and writes that end early, with the first pages done.
    pub short_per_mille: u32,
    /// Reads that succeed and deliver one wrong bit.
    pub bit_flip_per_mille: u32,
    /// Writes that succeed and never reach the medium.
    pub lost_write_per_mille: u32,
    /// Writes that succeed and reach another page of the file.
    pub misplaced_write_per_mille: u32,
    /// Requests that take `stall_us` longer.
    pub stall_per_mille: u32,
    /// Length of a stall.
    pub stall_us: u64,
    /// Shortest time of a request.
    pub latency_us_min: u64,
    /// Longest time of a request that does not stall.
    pub latency_us_max: u64,
}

impl Default for Faults {
    /// A sound disk.
    fn default() -> Self {
        Self {
            read_error_per_mille: 0,
            write_error_per_mille: 0,
            flush_error_per_mille: 0,
            short_per_mille: 0,
            bit_flip_per_mille: 0,
            lost_write_per_mille: 0,
            misplaced_write_per_mille: 0,
            stall_per_mille: 0,
            stall_us: 50_000,
            latency_us_min: 50,
            latency_us_max: 2_000,
        }
    }
}

/// A disk without hardware, time or threads.
#[derive(Debug)]
pub struct SimulatedDisk {
    random: Random,
    arena: Arc<Arena>,
    faults: Faults,
    now_us: u64,
    sectors: Sectors,
    /// By the time when due, then by order of submission.
    in_flight: BTreeMap<(u64, u64), InFlight>,
    submitted_count: u64,
}

#[derive(Debug)]
struct InFlight {
    request: IoRequest,
    /// For a flush: the count of writes applied when it was submitted.
    covers: u64,
}

impl SimulatedDisk {
    /// A disk with the contents of `image`, at time zero.
    pub fn new(seed: u64, image: DiskImage, arena: Arc<Arena>, faults: Faults) -> Self {
        assert!(faults.latency_us_min <= faults.latency_us_max, "the shortest time is longer than the longest");
        Self {
            random: Random(mix(seed)),
            arena,
            faults,
            now_us: 0,
            sectors: Sectors::new(image),
            in_flight: BTreeMap::new(),
            submitted_count: 0,
        }
    }

    /// Sets the time. What is due by then comes from the next [`BlockDevice::wait`].
    pub fn advance(&mut self, now_us: u64) {
        assert!(now_us >= self.now_us, "time goes back from {} to {now_us} us", self.now_us);
        self.now_us = now_us;
    }

    /// When the next completion is due; never before the present.
    pub fn next_due_us(&self) -> Option<u64> {
        self.in_flight.keys().next().map(|(due_us, _)| (*due_us).max(self.now_us))
    }

    /// Changes what goes wrong from now on.
    pub fn set_faults(&mut self, faults: Faults) {
        self.faults = faults;
    }

    /// A power cut: each sector that is not known to be durable is old, new or torn, by chance; so are those of writes in flight.
    pub fn crash(mut self) -> DiskImage {
        for InFlight { request, .. } in std::mem::take(&mut self.in_flight).into_values() {
            if let Some((offset, data)) = self.written(&request.operation) {
                self.write_some_sectors(offset, &data);
            }
        }
        let Self { mut random, sectors, .. } = self;
        sectors.crash(&mut random)
    }

    /// The daemon is killed and the machine goes on: whatever was in flight is still done, and the disk keeps what it holds.
    pub fn kill(mut self) -> DiskImage {
        for InFlight { request, .. } in std::mem::take(&mut self.in_flight).into_values() {
            if let Some((offset, data)) = self.written(&request.operation) {
                self.sectors.write(offset, &data);
            }
        }
        self.sectors.into_image()
    }

    /// Whether something that happens so often happens now. Draws no number for what never happens, so that adding a fault to a
    /// scenario does not change what the other faults do before its first use.
    fn happens(&mut self, per_mille: u32) -> bool {
        per_mille > 0 && self.random.below(1000) < u64::from(per_mille)
    }

    /// What a write carries and where to, as memory is now. Nothing for what leaves the file.
    fn written(&self, operation: &Operation) -> Option<(u64, Vec<u8>)> {
        match operation {
            outside if !outside.fits(self.sectors.bytes(), &self.arena) => None,
            Operation::Write { offset, from } => {
                let mut data = vec![0; from.bytes as usize];
                self.arena.read(*from, 0, &mut data);
                Some((*offset, data))
            }
            Operation::WritePage { offset, page } => Some((*offset, page.0.to_vec())),
            Operation::Read { .. } | Operation::ReadPrivate { .. } | Operation::Flush => None,
        }
    }

    fn write_some_sectors(&mut self, offset: u64, data: &[u8]) {
        for (sector, at) in data.chunks(SECTOR_BYTES).zip((offset..).step_by(SECTOR_BYTES)) {
            if self.random.below(2) == 0 {
                self.sectors.write(at, sector);
            }
        }
    }

    fn complete(&mut self, flight: &mut InFlight) -> Result<(), IoFault> {
        if !flight.request.operation.fits(self.sectors.bytes(), &self.arena) {
            return Err(IoFault::Short);
        }
        match &mut flight.request.operation {
            Operation::Read { offset, into } => {
                let (data, result) = self.complete_read(*offset, into.bytes as usize);
                self.arena.write(*into, 0, &data);
                return result;
            }
            Operation::ReadPrivate { offset, into } => {
                let (data, result) = self.complete_read(*offset, into.len());
                into[..data.len()].copy_from_slice(&data);
                return result;
            }
            Operation::Flush => {
                if self.happens(self.faults.flush_error_per_mille) {
                    self.sectors.flush_failed(flight.covers);
                    return Err(IoFault::Os(Errno::IO.raw_os_error()));
                }
                self.sectors.flush(flight.covers);
            }
            write => {
                let (offset, data) = self.written(write).expect("neither a read nor a flush, and within the file");
                return self.complete_write(offset, &data);
            }
        }
        Ok(())
    }

    /// What a read delivers, and how it ends.
    fn complete_read(&mut self, offset: u64, bytes: usize) -> (Vec<u8>, Result<(), IoFault>) {
        if self.happens(self.faults.read_error_per_mille) {
            return (Vec::new(), Err(IoFault::Os(Errno::IO.raw_os_error())));
        }
        let mut data = self.sectors.read(offset, bytes).to_vec();
        if self.happens(self.faults.short_per_mille) {
            data.truncate(self.some_pages(bytes));
            return (data, Err(IoFault::Short));
        }
        if self.happens(self.faults.bit_flip_per_mille) && !data.is_empty() {
            let bit = self.random.below(data.len() as u64 * 8);
            data[(bit / 8) as usize] ^= 1 << (bit % 8);
        }
        (data, Ok(()))
    }

    fn complete_write(&mut self, offset: u64, data: &[u8]) -> Result<(), IoFault> {
        if self.happens(self.faults.write_error_per_mille) {
            self.write_some_sectors(offset, data);
            return Err(IoFault::Os(Errno::IO.raw_os_error()));
        }
        if self.happens(self.faults.short_per_mille) {
            let end = self.some_pages(data.len());
            self.sectors.write(offset, &data[..end]);
            return Err(IoFault::Short);
        }
        if self.happens(self.faults.lost_write_per_mille) {
            return Ok(());
        }
        let misplaced = self.happens(self.faults.misplaced_write_per_mille);
        let places = (self.sectors.bytes() - data.len() as u64) / PAGE_BYTES + 1;
        self.sectors.write(if misplaced { self.random.below(places) * PAGE_BYTES } else { offset }, data);
        Ok(())
    }

    /// A whole number of pages, fewer than `bytes` has.
    fn some_pages(&mut self, bytes: usize) -> usize {
        (self.random.below((bytes as u64 / PAGE_BYTES).max(1)) * PAGE_BYTES) as usize
    }
}

impl BlockDevice for SimulatedDisk {
    fn depth(&self) -> usize {
        DEPTH
    }

    fn submit(&mut self, request: IoRequest) {
        assert!(self.in_flight.len() < DEPTH, "more than {DEPTH} requests in flight");
        // Panics for broken geometry where it was made, not when it is due.
        request.operation.fits(self.sectors.bytes(), &self.arena);
        let span_us = self.faults.latency_us_max - self.faults.latency_us_min + 1;
        let mut due_us = self.now_us + self.faults.latency_us_min + self.random.below(span_us);
        if self.happens(self.faults.stall_per_mille) {
            due_us += self.faults.stall_us;
        }
        let covers = match request.operation {
            Operation::Flush => self.sectors.flush_submitted(),
            _ => 0,
        };
        self.in_flight.insert((due_us, self.submitted_count), InFlight { request, covers });
        self.submitted_count += 1;
    }

    /// Returns at once with what is due: time passes in [`SimulatedDisk::advance`] alone.
    fn wait(&mut self, _timeout: Duration, done: &mut Vec<IoDone>) {
        while let Some(entry) = self.in_flight.first_entry() {
            if entry.key().0 > self.now_us {
                return;
            }
            let mut flight = entry.remove();
            let result = self.complete(&mut flight);
            done.push(flight.request.done(result));
        }
    }

    fn waker(&self) -> Arc<dyn Fn() + Send + Sync> {
        Arc::new(|| ())
    }

    fn segment_ready(&mut self, _segment: u32) {}

    fn describe(&self) -> String {
        "simulated disk".to_owned()
    }
}

/// SplitMix64.
#[derive(Clone, Debug)]
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(GOLDEN);
        mix(self.0)
    }

    /// A number below `end`. Its bias is below one in 2^32 for every `end` used here.
    fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    fn sector(&mut self) -> Sector {
        let mut sector = [0; SECTOR_BYTES];
        for word in sector.chunks_exact_mut(8) {
            word.copy_from_slice(&self.next().to_le_bytes());
        }
        sector
    }
}

#[cfg(test)]
mod tests;
