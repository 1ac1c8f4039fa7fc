//! What goes to a disk next. Three lanes per file; a lane is served only when those before it are empty, except that write-back always
//! has an eighth of the depth: a store that only reads would never be able to evict.

use std::collections::VecDeque;

use super::TransferId;

/// Who waits, from the most to the least urgent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Lane {
    /// A request waits for these bytes.
    Demand,
    /// Host memory waits to be freed, or a client for durability.
    WriteBack,
    /// Nobody waits yet.
    Prefetch,
}

const LANES: [Lane; 3] = [Lane::Demand, Lane::WriteBack, Lane::Prefetch];

/// The lanes of one file.
#[derive(Debug)]
pub struct Lanes {
    depth: usize,
    in_flight: [usize; 3],
    queues: [VecDeque<TransferId>; 3],
}

impl Lanes {
    /// Empty lanes over a device that takes `depth` requests.
    pub fn new(depth: usize) -> Self {
        assert!(depth > 0, "a device takes at least one request");
        Self { depth, in_flight: [0; 3], queues: Default::default() }
    }

    /// Queues a transfer.
    pub fn push(&mut self, lane: Lane, transfer: TransferId) {
        self.queues[lane as usize].push_back(transfer);
    }

    /// Moves a queued prefetch among what somebody waits for; `false` if it is on its way already.
    pub fn promote(&mut self, transfer: TransferId) -> bool {
        let prefetch = &mut self.queues[Lane::Prefetch as usize];
        let Some(at) = prefetch.iter().position(|&queued| queued == transfer) else { return false };
        prefetch.remove(at);
        self.push(Lane::Demand, transfer);
        true
    }

    /// What may be handed to the device now, and in which lane it is to be accounted.
    pub fn take(&mut self) -> Option<(Lane, TransferId)> {
        let in_flight: usize = self.in_flight.iter().sum();
        if in_flight >= self.depth {
            return None;
        }
        let write_back_share = (self.depth / 8).max(1);
        let owed = self.in_flight[Lane::WriteBack as usize] < write_back_share;
        let first = if owed && self.depth > 1 { Some(Lane::WriteBack) } else { None };
        for lane in first.into_iter().chain(LANES) {
            if let Some(transfer) = self.queues[lane as usize].pop_front() {
                self.in_flight[lane as usize] += 1;
                return Some((lane, transfer));
            }
        }
        None
    }

    /// A transfer of that lane has ended.
    pub fn done(&mut self, lane: Lane) {
        self.in_flight[lane as usize] -= 1;
    }

    /// Queued in a lane.
    pub fn queued(&self, lane: Lane) -> usize {
        self.queues[lane as usize].len()
    }

    /// Handed to the device and not back yet.
    pub fn in_flight(&self) -> usize {
        self.in_flight.iter().sum()
    }
}

#[cfg(test)]
mod tests;
