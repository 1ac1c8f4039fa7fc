//! Another worker while clients ask: no request fails, by either door.

#[expect(dead_code, reason = "each test file uses what it needs")]
mod support;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use support::blocks::{Run, attach_to};
use support::site::Site;
use tender_client::proto::{BlockLayout, Shard};
use tender_client::{BlockStore, Doors, GetEnd, Put, PutOutcome, Remote};

/// Requests that did not do what they were to do, by what came of them, and how many did.
#[derive(Default)]
struct Tally {
    failed: BTreeMap<String, u64>,
    done: BTreeMap<String, u64>,
    longest: Duration,
}

impl Tally {
    fn count(&mut self, doors: Doors, failure: Option<String>, took: Duration) {
        match failure {
            Some(failure) => *self.failed.entry(format!("{doors:?}: {failure}")).or_default() += 1,
            None => *self.done.entry(format!("{doors:?}")).or_default() += 1,
        }
        self.longest = self.longest.max(took);
    }
}

/// Puts runs and gets them back, until `stop`: little enough that the store is never short of room, which is another answer.
async fn put_and_get(store: Remote, first: u32, stop: Arc<AtomicBool>, tally: Arc<Mutex<Tally>>) {
    const BLOCKS: usize = 60;
    const GETS: usize = 8;
    let doors = store.door();
    let count = |failure: Option<String>, began: Instant| {
        let took = began.elapsed();
        let failure = failure.map(|failure| format!("{failure} after {} ms", took.as_millis()));
        tally.lock().unwrap().count(doors, failure, took);
    };
    let mut seed = first;
    while !stop.load(Ordering::Relaxed) {
        seed += 1;
        let run = Run::new(&store, seed, BLOCKS);
        let payloads: Vec<_> = (0..BLOCKS).map(|block| run.payload(block)).collect();
        let put = Put { parent: run.parent, keys: &run.keys, shard: Shard::WHOLE, payloads: &payloads, tokens: &[] };
        let began = Instant::now();
        let outcomes = store.put(put).await;
        let is_there = |outcome: &PutOutcome| matches!(outcome, PutOutcome::Stored | PutOutcome::AlreadyPresent);
        count(outcomes.iter().find(|outcome| !is_there(outcome)).map(|outcome| format!("put {outcome:?}")), began);
        for _ in 0..GETS {
            let began = Instant::now();
            let got = store.get(&run.keys, Shard::WHOLE).await;
            let is_right = got.blocks.iter().zip(&payloads).all(|(view, payload)| view.equals(payload));
            let is_complete = got.end == GetEnd::Complete && got.blocks.len() == BLOCKS && is_right;
            count((!is_complete).then(|| format!("get {:?}, right: {is_right}", got.end)), began);
            drop(got);
            let began = Instant::now();
            let found = store.lookup(&run.keys).await.prefix_blocks;
            count((found != BLOCKS).then(|| format!("lookup of {found}")), began);
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_request_fails_while_workers_are_replaced() {
    const REPLACEMENTS: usize = 5;
    let site = Site::new(&["--host", "128MiB", "--disk", "256MiB"]);
    let daemon = site.start_ready().await;
    let (stop, tally) = (Arc::new(AtomicBool::new(false)), Arc::new(Mutex::new(Tally::default())));
    let mut clients = Vec::new();
    for (client, doors) in (0..).zip([Doors::Ring, Doors::Ring, Doors::Grpc, Doors::Grpc]) {
        let attach = attach_to(&format!("model {client}"), BlockLayout::opaque(16 << 10));
        let store = Remote::attach_by(site.target(), None, attach, doors).await.unwrap();
        assert_eq!(store.door(), doors);
        clients.push(tokio::spawn(put_and_get(store, client * 100_000, Arc::clone(&stop), Arc::clone(&tally))));
    }
    for _ in 0..REPLACEMENTS {
        tokio::time::sleep(Duration::from_millis(700)).await;
        let mut replace = support::tender();
        replace.arg("serve").arg("--replace").arg("--socket").arg(site.socket());
        let replaced = tokio::task::spawn_blocking(move || support::run(&mut replace)).await.unwrap();
        assert!(replaced.status.success(), "{}", support::stderr(&replaced));
    }
    tokio::time::sleep(Duration::from_millis(500)).await;
    stop.store(true, Ordering::Relaxed);
    for client in clients {
        client.await.unwrap();
    }
    let tally = tally.lock().unwrap();
    eprintln!("done {:?}, failed {:?}, the longest took {} ms", tally.done, tally.failed, tally.longest.as_millis());
    assert!(tally.failed.is_empty(), "{:?}, and done {:?}\n{}", tally.failed, tally.done, daemon.said());
    assert!(tally.done.len() == 2 && tally.done.values().all(|done| *done > 30), "{:?}", tally.done);
    daemon.stop();
}
