//! A daemon that ends, by a signal or by kill -9, and one that starts on what it left.

#[expect(dead_code, reason = "each test file uses what it needs")]
mod support;

use std::collections::HashSet;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use support::blocks::{Run, attach_to};
use support::site::{Running, Site};
use tender_client::proto::{BlockKey, BlockLayout, sum};
use tender_client::{BlockStore, GetEnd, Purge, Remote, Tier, WatchItem};
use tokio::time::{sleep, timeout};

/// Rounds of the test that kills while puts are going on.
const KILLS: u32 = 10;

/// The kill comes at a moment up to this long after the puts began.
const KILL_MS_MAX: u64 = 400;

/// Runs that one writer puts in one round at most, so that ten rounds of all writers fit on disk and nothing is evicted.
const RUNS_MAX: u32 = 12;

/// Bytes of a block, blocks of a run, shards it is put in: several size classes.
const SHAPES: [(u64, usize, u16); 4] = [(4096, 16, 1), (20_000, 12, 4), (300_000, 3, 2), (2_000_000, 1, 8)];

const PATIENCE: Duration = Duration::from_secs(60);

/// A run that was put, and which of its blocks must be on disk.
#[derive(Clone)]
struct Entry {
    writer: usize,
    run: Run,
    durable: Vec<bool>,
}

/// What the clients of one daemon were told before it was killed.
#[derive(Default)]
struct Ledger {
    runs: Vec<Entry>,
    evicted: HashSet<BlockKey>,
}

/// Both tenants' clients, one for each shape.
async fn writers(site: &Site) -> Vec<Remote> {
    let mut writers = Vec::new();
    for (block_bytes, ..) in SHAPES {
        let attach = attach_to(&format!("restart-{block_bytes}"), BlockLayout::opaque(block_bytes));
        writers.push(site.attach(attach.clone()).await);
        writers.push(site.attach_other(attach).await);
    }
    writers
}

/// Puts runs until the daemon is gone, and asks for durability of every other one.
async fn write(round: u32, writer: usize, store: Remote, ledger: Arc<Mutex<Ledger>>) {
    let (_, blocks, shards) = SHAPES[writer / 2];
    for i in 0..RUNS_MAX {
        let run = Run::new(&store, 1000 * round + i, blocks);
        // Noted before it is put: whatever happens, what it names may only be right or absent.
        let at = {
            let mut ledger = ledger.lock().unwrap();
            ledger.runs.push(Entry { writer, run: run.clone(), durable: vec![false; blocks] });
            ledger.runs.len() - 1
        };
        let outcomes = run.put_in(&store, shards).await;
        if i % 2 == 0 {
            let durable = store.durable(&run.keys).await;
            ledger.lock().unwrap().runs[at].durable = durable;
        }
        if outcomes.iter().any(|outcome| !outcome.is_there()) {
            sleep(Duration::from_millis(5)).await;
        }
    }
}

/// Notes what the daemon says to have evicted from disk.
async fn note_evictions(store: Remote, ledger: Arc<Mutex<Ledger>>) {
    let mut watch = store.watch(None).await;
    while let Some(item) = watch.next().await {
        if let WatchItem::Change(_, change) = item
            && (change.tier, change.present) == (Tier::Disk, false)
        {
            ledger.lock().unwrap().evicted.insert(change.key);
        }
    }
}

/// Every block that was said to be durable is served from disk, and no block is wrong; how many were durable.
async fn verify(writers: &[Remote], ledger: &Ledger) -> usize {
    let mut durable_blocks = 0;
    for Entry { writer, run, durable } in &ledger.runs {
        let store = &writers[*writer];
        let found = store.lookup(&run.keys).await;
        let present = run.present(store).await;
        for (i, key) in run.keys.iter().enumerate() {
            if durable[i] && !ledger.evicted.contains(key) {
                assert!(found.disk[i] && present[i], "a durable block ({:?}) is gone", SHAPES[writer / 2]);
                durable_blocks += 1;
            }
        }
    }
    durable_blocks
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_get_right_after_a_start_waits_for_memory() {
    let site = Site::new(&["--host", "256MiB", "--disk", "128MiB"]);
    let daemon = site.start();
    let attach = attach_to("at-once", BlockLayout::opaque(1 << 20));
    let run = {
        let store = site.attach(attach.clone()).await;
        let run = Run::new(&store, 1, 64);
        run.put_durably(&store).await;
        run
    };
    daemon.kill();
    for _ in 0..3 {
        let daemon = site.start();
        run.expect(&site.attach(attach.clone()).await, Some(Tier::Disk)).await;
        daemon.kill();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_said_to_be_durable_survives_kills_at_any_moment() {
    let site = Site::of_two_tenants(&["--host", "256MiB", "--disk", "1GiB"]);
    let ledger = Arc::new(Mutex::new(Ledger::default()));
    let mut daemon = site.start_ready().await;
    let mut durable_before = 0;
    for round in 0..KILLS {
        let clients = writers(&site).await;
        let mut tasks = tokio::task::JoinSet::new();
        for of_each_tenant in &clients[..2] {
            tasks.spawn(note_evictions(of_each_tenant.clone(), Arc::clone(&ledger)));
        }
        for (writer, client) in clients.into_iter().enumerate() {
            tasks.spawn(write(round, writer, client, Arc::clone(&ledger)));
        }
        sleep(Duration::from_millis(sum::mix(u64::from(round) ^ 0x7e4d) % KILL_MS_MAX)).await;
        daemon.kill();
        // What was not answered by now never will be.
        tasks.shutdown().await;
        daemon = site.start_ready().await;
        let ledger = std::mem::take(&mut *ledger.lock().unwrap());
        let durable = verify(&writers(&site).await, &ledger).await;
        durable_before += durable;
    }
    assert!(durable_before > 100, "the kills came too early to prove anything: {durable_before} durable blocks");
    daemon.at_rest().await;
    daemon.stop();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_durable_once_survives_every_later_kill() {
    let site = Site::of_two_tenants(&["--host", "128MiB", "--disk", "512MiB"]);
    let mut daemon = site.start_ready().await;
    let mut runs = Vec::new();
    for (writer, store) in writers(&site).await.iter().enumerate() {
        let run = Run::new(store, 1, SHAPES[writer / 2].1);
        run.put_durably(store).await;
        runs.push(run);
    }
    for _ in 0..3 {
        daemon.kill();
        daemon = site.start_ready().await;
        for (run, store) in runs.iter().zip(&writers(&site).await) {
            run.expect(store, Some(Tier::Disk)).await;
        }
    }
    daemon.stop();
}

/// SIGTERM writes back what is only in memory: nothing is lost without a crash.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stopped_daemon_loses_nothing() {
    let site = Site::of_two_tenants(&["--host", "256MiB", "--disk", "1GiB"]);
    let daemon = site.start_ready().await;
    let mut runs: Vec<(usize, Run)> = Vec::new();
    for (writer, store) in writers(&site).await.iter().enumerate() {
        let (_, blocks, shards) = SHAPES[writer / 2];
        for seed in 0..4 {
            let run = Run::new(store, seed, blocks);
            let outcomes = run.put_in(store, shards).await;
            assert!(outcomes.iter().all(|outcome| outcome.is_there()), "{outcomes:?}");
            runs.push((writer, run));
        }
    }
    daemon.stop();
    let daemon = site.start_ready().await;
    let stores = writers(&site).await;
    for (writer, run) in &runs {
        run.expect(&stores[*writer], Some(Tier::Disk)).await;
    }
    daemon.stop();
}

async fn killed_after_a_purge(site: &Site, daemon: Running, seed: u32, namespace: bool) -> Running {
    let attach = || attach_to(&format!("purged-{namespace}"), BlockLayout::opaque(10_000));
    let store = site.attach(attach()).await;
    let (gone, kept) = (Run::new(&store, seed, 40), Run::new(&store, seed + 1, 40));
    gone.put_durably(&store).await;
    kept.put_durably(&store).await;
    let purged = store.purge(if namespace { Purge::Namespace } else { Purge::Keys(&gone.keys) }).await;
    daemon.kill();
    assert!(purged.complete, "{purged:?}");
    let daemon = site.start_ready().await;
    let store = site.attach(attach()).await;
    gone.expect_nothing(&store).await;
    match namespace {
        true => kept.expect_nothing(&store).await,
        false => kept.expect(&store, Some(Tier::Disk)).await,
    }
    daemon
}

/// The answer to a purge is a promise, even if the power goes a moment later.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_purged_does_not_come_back_after_a_kill() {
    let site = Site::small();
    let mut daemon = site.start_ready().await;
    for round in 0..4 {
        daemon = killed_after_a_purge(&site, daemon, 10 * round, false).await;
        daemon = killed_after_a_purge(&site, daemon, 10 * round, true).await;
    }
    daemon.stop();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_goes_on_by_itself_after_a_restart() {
    let site = Site::small();
    let daemon = site.start_ready().await;
    let store = site.attach(attach_to("goes-on", BlockLayout::opaque(50_000))).await;
    let before = Run::new(&store, 1, 20);
    before.put_durably(&store).await;
    daemon.kill();
    // Without a daemon everything is a miss, at once.
    let began = Instant::now();
    assert_eq!(store.lookup(&before.keys).await.prefix_blocks, 0);
    assert_eq!(store.get(&before.keys, tender_client::proto::Shard::WHOLE).await.end, GetEnd::Unavailable);
    assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
    let daemon = site.start_ready().await;
    let began = Instant::now();
    while store.lookup(&before.keys).await.prefix_blocks < 20 {
        assert!(began.elapsed() < PATIENCE, "the client did not find its daemon again");
        sleep(Duration::from_millis(20)).await;
    }
    before.expect(&store, Some(Tier::Disk)).await;
    let after = Run::new(&store, 2, 20);
    after.put(&store).await;
    after.expect(&store, Some(Tier::Host)).await;
    daemon.stop();
}

/// What a watcher knew of the daemon before is void: it hears what is left, under a new epoch.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_watch_over_a_restart_begins_with_a_snapshot() {
    let site = Site::small();
    let daemon = site.start_ready().await;
    let store = site.attach(attach_to("watched", BlockLayout::opaque(4096))).await;
    let (kept, new) = (Run::new(&store, 1, 5), Run::new(&store, 2, 5));
    let mut watch = store.watch(None).await;
    kept.put_durably(&store).await;
    let mut told: HashSet<BlockKey> = HashSet::new();
    while told.len() < 5 {
        let item = timeout(PATIENCE, watch.next()).await.unwrap().expect("the daemon is there");
        if let WatchItem::Change(_, change) = item
            && change.tier == Tier::Disk
        {
            told.insert(change.key);
        }
    }
    let position = watch.position().unwrap();
    daemon.kill();
    while timeout(PATIENCE, watch.next()).await.expect("the end of the stream").is_some() {}
    let daemon = site.start_ready().await;
    let began = Instant::now();
    let mut watch = store.watch(Some(position)).await;
    let first = loop {
        match timeout(PATIENCE, watch.next()).await.unwrap() {
            Some(item) => break item,
            None => {
                assert!(began.elapsed() < PATIENCE, "the client did not find its daemon again");
                sleep(Duration::from_millis(20)).await;
                watch = store.watch(Some(position)).await;
            }
        }
    };
    assert_eq!(first, WatchItem::Reset);
    let mut present = HashSet::new();
    let synced = loop {
        match timeout(PATIENCE, watch.next()).await.unwrap().unwrap() {
            WatchItem::Present(residency) => {
                assert_eq!((residency.tier, residency.present), (Tier::Disk, true));
                present.insert(residency.key);
            }
            WatchItem::Synced(position) => break position,
            other => panic!("{other:?} within a snapshot"),
        }
    };
    assert_ne!(synced.epoch, position.epoch);
    assert_eq!(present, kept.keys.iter().copied().collect());
    new.put(&store).await;
    let change = timeout(PATIENCE, watch.next()).await.unwrap().unwrap();
    assert!(matches!(change, WatchItem::Change(at, _) if at.epoch == synced.epoch), "{change:?}");
    daemon.stop();
}
