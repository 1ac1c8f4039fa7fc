//! Time, as milliseconds since the daemon started. The core is told the time and reads no clock, so that a simulation can tell it any
//! other; this is what the driver tells it, and what deadlines of requests are computed with.

use std::time::{Duration, Instant};

/// The daemon's clock; copies agree.
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    start: Instant,
}

impl Clock {
    /// A clock that begins at zero.
    pub fn start() -> Self {
        Self { start: Instant::now() }
    }

    /// Milliseconds since the start.
    pub fn now_ms(&self) -> u64 {
        self.start.elapsed().as_millis() as u64
    }

    /// The moment `after` from now.
    pub fn deadline_ms(&self, after: Duration) -> u64 {
        self.now_ms() + after.as_millis() as u64
    }
}
