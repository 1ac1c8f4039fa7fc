//! How long a call looks for its answer before it sleeps.
//!
//! Looking costs a processor and finds an answer at once; sleeping costs nothing and tens of microseconds for being woken. So a call
//! looks longer while answers come soon, and not at all while they do not. With one processor nobody looks: the daemon could not
//! answer meanwhile.

use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::Duration;

/// At first: several times what the daemon takes for a lookup while it is awake.
const START_US: u32 = 20;

/// At most: longer than being woken takes, looking gains less than it costs.
const MAX_US: u32 = 100;

/// More per answer that came soon; less is half.
const STEP_US: u32 = 10;

/// An answer that came so soon to a sleeper would have come within `MAX_US` to who looked.
const SOON: Duration = Duration::from_micros(200);

/// Shared by all calls of a connection.
#[derive(Debug)]
pub(super) struct Spin {
    now_us: AtomicU32,
    max_us: u32,
}

impl Spin {
    pub(super) fn new() -> Self {
        let is_alone = thread::available_parallelism().is_ok_and(|processors| processors.get() == 1);
        Self::up_to(if is_alone { 0 } else { MAX_US })
    }

    fn up_to(max_us: u32) -> Self {
        Self { now_us: AtomicU32::new(START_US.min(max_us)), max_us }
    }

    /// How long to look now; zero is not at all.
    pub(super) fn budget(&self) -> Duration {
        Duration::from_micros(self.now_us.load(Ordering::Relaxed).into())
    }

    /// What was learned from a call: when its answer came, if it did. Of calls at the same time one may be forgotten, which does not matter.
    pub(super) fn learn(&self, answered_after: Option<Duration>) {
        let now_us = self.now_us.load(Ordering::Relaxed);
        let next_us = match answered_after {
            Some(after) if after <= SOON => (now_us + STEP_US).max(START_US),
            // From 1 to 0.
            _ => now_us / 2,
        };
        self.now_us.store(next_us.min(self.max_us), Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn looking_lasts_longer_while_answers_come_soon_and_ends_while_they_do_not() {
        let spin = Spin::up_to(MAX_US);
        for _ in 0..20 {
            spin.learn(Some(Duration::from_micros(50)));
        }
        assert_eq!(spin.budget(), Duration::from_micros(MAX_US.into()));
        for _ in 0..8 {
            spin.learn(Some(Duration::from_millis(5)));
        }
        assert_eq!(spin.budget(), Duration::ZERO);
        spin.learn(None);
        assert_eq!(spin.budget(), Duration::ZERO);
        spin.learn(Some(Duration::from_micros(150)));
        assert_eq!(spin.budget(), Duration::from_micros(START_US.into()), "soon again");
    }

    #[test]
    fn with_one_processor_nobody_looks() {
        let spin = Spin::up_to(0);
        spin.learn(Some(Duration::ZERO));
        assert_eq!(spin.budget(), Duration::ZERO);
    }
}
