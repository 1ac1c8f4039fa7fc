//! One session being replayed: its requests one after the other, at once or at their times.

use std::time::Duration;

use tender_client::BlockStore;
use tokio::sync::Semaphore;
use tokio::time::Instant;

use super::chain::Chains;
use super::request::{Served, Server};
use super::schedule::GAP_MS_MAX;
use crate::trace::session::Session;

/// A session, and how far it has come.
#[derive(Debug)]
pub struct RunningSession {
    session: Session,
    chains: Chains,
    next: usize,
    skipped_ms: u64,
}

impl RunningSession {
    /// A session from its first request on; `requests_max` of them.
    pub fn new<S: BlockStore>(mut session: Session, requests_max: usize, server: &Server<S>) -> Self {
        session.requests.truncate(requests_max);
        session.cap_gaps(GAP_MS_MAX);
        let root = server.store().terms().root;
        let chains = Chains::new(root, session.scope_name(), session.block_tokens, &session.requests);
        Self { session, chains, next: 0, skipped_ms: 0 }
    }

    /// Leaves out requests that somebody else has done. Times count from the first one that is left.
    pub fn skip(&mut self, requests: usize) {
        let done = self.session.requests.len().min(requests);
        for request in &self.session.requests[..done] {
            self.chains.next(request);
        }
        self.next = done;
        self.skipped_ms = self.session.requests.get(done).filter(|_| done > 0).map_or(0, |next| next.start_ms);
    }

    /// Serves the next request and tells what became of it; none when there is no more. With a pace the session began at `began` and
    /// the request waits for its time; `late` is how much later it started. `turns` bounds how many are served at once.
    pub async fn step<S: BlockStore>(
        &mut self,
        server: &Server<S>,
        turns: &Semaphore,
        began: Instant,
        pace: Option<f64>,
    ) -> Option<(Served, Duration)> {
        let request = self.session.requests.get(self.next)?;
        self.next += 1;
        let keys = self.chains.next(request);
        let start_ms = request.start_ms.saturating_sub(self.skipped_ms);
        let due = pace.map(|pace| began + Duration::from_secs_f64(start_ms as f64 / 1000.0 / pace));
        if let Some(due) = due {
            tokio::time::sleep_until(due).await;
        }
        let _turn = turns.acquire().await.ok()?;
        let late = due.map_or(Duration::ZERO, |due| due.elapsed());
        Some((server.serve(&keys, request.input_tokens).await, late))
    }
}
