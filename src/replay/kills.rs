//! Processes killed on purpose while a replay runs, with kill -9, at moments that a seed decides.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tender_client::proto::sum::{GOLDEN, mix};
use tender_client::proto::wire::StatusReply;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep_until};

use crate::connect::Connection;
use crate::lifeline::kill;
use crate::trace::generate::share;

/// A keeper gives up after more than eight crashes within a minute, as it should: its workers are killed less often.
const WORKERS_MAX: usize = 7;
const WORKERS_WITHIN: Duration = Duration::from_secs(61);
/// How long to wait for a worker that answers; the one before may have been killed just now.
pub const ANSWER_TIME_MAX: Duration = Duration::from_secs(20);

/// Which processes are killed, and about how often.
#[derive(Clone, Copy, Debug, Default)]
pub struct Kills {
    /// The daemon's worker.
    pub worker_every: Option<Duration>,
    /// A client process.
    pub client_every: Option<Duration>,
    /// Decides the moments.
    pub seed: u64,
}

/// Moments around the multiples of a period: each pause is between half a period and one and a half.
#[derive(Clone, Copy, Debug)]
pub struct Moments {
    every: Duration,
    seed: u64,
    count: u64,
    next: Instant,
}

impl Moments {
    /// The first comes within one and a half periods from now.
    pub fn new(every: Duration, seed: u64) -> Self {
        let mut moments = Self { every, seed, count: 0, next: Instant::now() };
        moments.advance();
        moments
    }

    /// When the next one is.
    pub fn next(&self) -> Instant {
        self.next
    }

    /// On to the one after; a number that the seed decides comes with it.
    pub fn advance(&mut self) -> u64 {
        self.count += 1;
        let number = mix(self.seed.wrapping_add(GOLDEN.wrapping_mul(self.count)));
        self.next += self.every.mul_f64(0.5 + share(number));
        number
    }
}

/// Kills workers until it is dropped.
#[derive(Debug)]
pub struct WorkerKiller {
    task: JoinHandle<()>,
    killed: Arc<AtomicU64>,
}

impl WorkerKiller {
    /// Of the daemon that answers there.
    pub fn start(connection: Connection, every: Duration, seed: u64) -> Self {
        let killed = Arc::new(AtomicU64::new(0));
        let count = Arc::clone(&killed);
        let task = tokio::spawn(async move {
            let mut moments = Moments::new(every, seed);
            let mut lately: Vec<Instant> = Vec::new();
            loop {
                sleep_until(moments.next()).await;
                moments.advance();
                lately.retain(|killed| killed.elapsed() < WORKERS_WITHIN);
                if lately.len() >= WORKERS_MAX {
                    continue;
                }
                // One that never answers again is seen by the clients, and in the report.
                let Ok(StatusReply { process_id, .. }) = connection.worker(ANSWER_TIME_MAX, |_| true).await else {
                    return;
                };
                if kill(process_id) {
                    lately.push(Instant::now());
                    count.fetch_add(1, Ordering::Relaxed);
                }
            }
        });
        Self { task, killed }
    }

    /// How many it has killed.
    pub fn killed(&self) -> u64 {
        self.killed.load(Ordering::Relaxed)
    }
}

impl Drop for WorkerKiller {
    fn drop(&mut self) {
        self.task.abort();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_seed_kills_at_the_same_moments_around_the_period() {
        let every = Duration::from_secs(2);
        let moments = |seed| {
            let mut moments = Moments::new(every, seed);
            let mut before = moments.next();
            let pauses: Vec<Duration> = (0..100)
                .map(|_| {
                    moments.advance();
                    let pause = moments.next() - before;
                    before = moments.next();
                    pause
                })
                .collect();
            pauses
        };
        assert_eq!(moments(7), moments(7));
        assert_ne!(moments(7), moments(8));
        assert!(moments(7).iter().all(|pause| (every / 2..=every * 3 / 2).contains(pause)));
    }
}
