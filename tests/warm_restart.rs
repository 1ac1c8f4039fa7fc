//! The worker is killed; host memory and what clients hold in it are as they were.

#[expect(dead_code, reason = "each test file uses what it needs")]
mod support;

use support::blocks::{Run, attach_to};
use support::site::Site;
use support::until;
use tender_client::proto::wire::Tier as WireTier;
use tender_client::proto::{BlockLayout, Shard};
use tender_client::{BlockStore, BlockView, CommitOutcome, Doors, GetEnd, Remote, Reserved, Tier};

/// Of two tenants; no disk, so that what is hit was in host memory.
fn site() -> Site {
    Site::of_two_tenants(&["--host", "64MiB", "--disk", "0"])
}

async fn view(run: &Run, store: &Remote) -> Vec<BlockView> {
    let got = store.get(&run.keys, Shard::WHOLE).await;
    assert_eq!((got.end, got.blocks.len()), (GetEnd::Complete, run.keys.len()));
    got.blocks
}

fn answers(site: &Site) -> bool {
    support::run(support::tender().arg("status").arg("--socket").arg(site.socket())).status.success()
}

/// Writes so many arenas full of other blocks, over gRPC and in place.
async fn overwrite(store: &Remote, times: u32, seed: u32) {
    let bytes = store.terms().shard_bytes(1);
    let blocks = (64 << 20) / bytes / 8;
    for i in 0..times * 8 {
        let run = Run::new(store, seed + i, blocks);
        let _as_far_as_there_is_room = run.put_in(store, 1).await;
    }
}

/// Two tenants, two sizes of blocks, two groups.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn leased_bytes_do_not_change_when_the_worker_is_killed_and_memory_is_used_again() {
    let site = site();
    let daemon = site.start_ready().await;
    let small = site.attach(attach_to("small", BlockLayout::opaque(4 << 10))).await;
    let large = site.attach_other(attach_to("large", BlockLayout::opaque(100_000))).await;
    assert_eq!((small.door(), large.door()), (Doors::Ring, Doors::Ring));
    let (runs_small, run_large) = (Run::new(&small, 1, 1_000), Run::new(&large, 2, 40));
    runs_small.put(&small).await;
    run_large.put(&large).await;
    let (views_small, views_large) = (view(&runs_small, &small).await, view(&run_large, &large).await);
    let leased = |views: &[BlockView]| views.iter().filter(|view| view.is_leased()).count();
    assert!(leased(&views_small) == 1_000 && leased(&views_large) > 20, "nothing is leased in place");
    // And another writes slowly.
    let slow = Run::new(&large, 3, 8);
    let mut slots = Vec::new();
    for (block, reserved) in large.reserve(slow.parent, &slow.keys, Shard::WHOLE).await.unwrap().into_iter().enumerate()
    {
        let Reserved::Granted(mut slot) = reserved else { panic!("{reserved:?}") };
        slot.write_at(0, &slow.payload(block)[..50_000]);
        slots.push(slot);
    }
    daemon.kill_worker();
    assert!(runs_small.equals(&views_small), "leased blocks have changed");
    // Still held before anybody has come back: others fill memory meanwhile.
    let other = site.attach_other(attach_to("other", BlockLayout::opaque(16 << 10))).await;
    overwrite(&other, 3, 1_000).await;
    assert!(runs_small.equals(&views_small), "leased blocks have changed");
    assert!(run_large.equals(&views_large), "leased blocks have changed");
    // They come back, and say what they hold.
    assert!(small.lookup(&runs_small.keys).await.prefix_blocks > 0);
    assert!(large.lookup(&run_large.keys).await.prefix_blocks > 0);
    overwrite(&small, 3, 5_000).await;
    overwrite(&large, 3, 9_000).await;
    assert!(runs_small.equals(&views_small), "leased blocks have changed");
    assert!(run_large.equals(&views_large), "leased blocks have changed");
    // And once more.
    daemon.kill_worker();
    overwrite(&other, 2, 20_000).await;
    assert!(runs_small.equals(&views_small), "leased blocks have changed");
    assert!(run_large.equals(&views_large), "leased blocks have changed");
    assert_eq!(large.lookup(&slow.keys).await.prefix_blocks, 0, "half of a block was published");
    for (block, slot) in slots.iter_mut().enumerate() {
        slot.write_at(50_000, &slow.payload(block)[50_000..]);
    }
    assert_eq!(large.commit(slots).await, [CommitOutcome::Stored; 8]);
    slow.expect(&large, None).await;
    drop((views_small, views_large));
    until("the end of all leases", async || daemon.tier(WireTier::Host).await.leased_slots == 0).await;
    daemon.stop();
}

/// Views of the connection before are not known to the one that leaves.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn views_from_before_the_worker_was_killed_stay_as_they_are_when_their_client_closes() {
    let site = site();
    let daemon = site.start_ready().await;
    let store = site.attach(attach_to("one", BlockLayout::opaque(16 << 10))).await;
    let run = Run::new(&store, 1, 250);
    run.put(&store).await;
    let views = view(&run, &store).await;
    assert!(views.iter().filter(|view| view.is_leased()).count() > 100, "nothing is leased in place");
    daemon.kill_worker();
    assert!(store.lookup(&run.keys).await.prefix_blocks > 0);
    assert_eq!(store.door(), Doors::Ring);
    store.close().await;
    let other = site.attach_other(attach_to("other", BlockLayout::opaque(16 << 10))).await;
    overwrite(&other, 3, 1_000).await;
    assert!(run.equals(&views), "leased blocks have changed");
    drop(views);
    until("the end of all leases", async || daemon.tier(WireTier::Host).await.leased_slots == 0).await;
    daemon.stop();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn blocks_in_host_memory_are_hit_there_after_the_worker_was_killed() {
    let site = site();
    let daemon = site.start_ready().await;
    let store = site.attach(attach_to("one", BlockLayout::opaque(16 << 10))).await;
    let other = site.attach_other(attach_to("two", BlockLayout::opaque(70_000))).await;
    let (run, run_other) = (Run::new(&store, 1, 500), Run::new(&other, 2, 50));
    run.put(&store).await;
    run_other.put(&other).await;
    for _ in 0..3 {
        daemon.kill_worker();
        run.expect(&store, Some(Tier::Host)).await;
        run_other.expect(&other, Some(Tier::Host)).await;
    }
    daemon.stop();
}

/// Memory goes by a tenant's place in the configuration, which each worker reads anew.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_worker_serves_one_tenants_memory_under_the_name_of_another() {
    let site = site();
    let daemon = site.start_ready().await;
    let store = site.attach(attach_to("one", BlockLayout::opaque(16 << 10))).await;
    Run::new(&store, 1, 100).put(&store).await;
    let file = site.path("tender.toml");
    let config = std::fs::read_to_string(&file).unwrap();
    let (first, second) = config.split_at(config.rfind("[[tenants]]").unwrap());
    std::fs::write(&file, format!("{second}{first}")).unwrap();
    let said = daemon.kill_worker_for_good();
    assert!(said.contains("tenant 1 is `other` now") && said.contains("start it anew"), "{said}");
    drop(store);
    // Another daemon makes memory of its own.
    site.start_ready().await.stop();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn host_memory_outlives_a_binary_that_is_missing_when_the_next_worker_is_to_be_started() {
    let mut site = site();
    let binary = site.copy_binary();
    let daemon = site.start_ready().await;
    let store = site.attach(attach_to("one", BlockLayout::opaque(16 << 10))).await;
    let run = Run::new(&store, 1, 200);
    run.put(&store).await;
    let away = site.path("away");
    std::fs::rename(&binary, &away).unwrap();
    daemon.signal_worker("KILL");
    let refused = || daemon.said().matches("does not start the next daemon").count();
    support::wait_until("two refusals of the system", || refused() >= 2);
    std::fs::rename(&away, &binary).unwrap();
    support::wait_until("the next worker", || answers(&site));
    // Who met nobody for so long does not try again at once.
    let again = site.attach(attach_to("one", BlockLayout::opaque(16 << 10))).await;
    run.expect(&again, Some(Tier::Host)).await;
    daemon.stop();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_starts_in_a_row_that_fail_have_host_memory_made_anew() {
    let site = site();
    let daemon = site.start_ready().await;
    let store = site.attach(attach_to("one", BlockLayout::opaque(16 << 10))).await;
    let run = Run::new(&store, 1, 200);
    run.put(&store).await;
    drop(store);
    daemon.kill_workers_until_it_says("host memory is made anew, since 2 starts from it failed");
    support::wait_until("a worker that serves", || answers(&site));
    let again = site.attach(attach_to("one", BlockLayout::opaque(16 << 10))).await;
    run.expect_nothing(&again).await;
    run.put(&again).await;
    run.expect(&again, Some(Tier::Host)).await;
    daemon.stop();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_daemon_whose_worker_crashes_nine_times_within_a_minute_ends() {
    let site = site();
    let daemon = site.start_ready().await;
    for _ in 0..8 {
        daemon.kill_worker();
        support::wait_until("the next worker", || answers(&site));
    }
    let said = daemon.kill_worker_for_good();
    assert!(said.contains("more than 8 times within 60 s"), "{said}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_that_stands_still_is_killed_when_it_should_have_ended() {
    let site = site();
    let daemon = site.start_ready().await;
    daemon.signal_worker("STOP");
    daemon.stop();
    site.start_ready().await.stop();
}

/// The lock of a tier file, as a dead worker's last requests hold it: had as soon as a worker has died, and for so long as the test likes.
async fn killed_worker_with_lock_held(daemon: &support::site::Running, file: &std::path::Path) -> std::fs::File {
    let file = std::fs::File::open(file).unwrap();
    let locker = tokio::task::spawn_blocking(move || file.lock().map(|()| file).unwrap());
    while !locker.is_finished() {
        // Should the next worker be faster, there is another chance.
        daemon.kill_worker();
        let began = std::time::Instant::now();
        while !locker.is_finished() && began.elapsed() < std::time::Duration::from_secs(2) {
            tokio::time::sleep(std::time::Duration::from_millis(2)).await;
        }
    }
    locker.await.unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn host_memory_is_served_while_the_lock_of_a_tier_file_is_awaited() {
    let site = Site::new(&["--host", "64MiB", "--disk", "256MiB"]);
    let daemon = site.start_ready().await;
    let store = site.attach(attach_to("one", BlockLayout::opaque(16 << 10))).await;
    let (on_disk, in_memory) = (Run::new(&store, 1, 100), Run::new(&store, 2, 100));
    on_disk.put_durably(&store).await;
    overwrite(&store, 2, 1_000).await;
    assert!(!store.lookup(&on_disk.keys).await.host.contains(&true), "it was to be on disk alone");
    in_memory.put(&store).await;
    daemon.at_rest().await;
    let lock = killed_worker_with_lock_held(&daemon, &site.tier_file()).await;
    in_memory.expect(&store, Some(Tier::Host)).await;
    assert_eq!(daemon.tier(WireTier::Disk).await.state, "awaited");
    on_disk.expect_nothing(&store).await;
    // Longer than a start waits for it.
    support::wait_until("a word about the lock", || daemon.said().contains("the disk tier is not there"));
    in_memory.expect(&store, Some(Tier::Host)).await;
    assert_eq!(daemon.tier(WireTier::Disk).await.state, "awaited");
    drop(lock);
    until("the disk's return", async || daemon.tier(WireTier::Disk).await.state == "ready").await;
    on_disk.expect(&store, Some(Tier::Disk)).await;
    in_memory.expect(&store, Some(Tier::Host)).await;
    let new = Run::new(&store, 3, 20);
    new.put_durably(&store).await;
    daemon.stop();
}

/// Whether a daemon that is told to use other folders, and whose worker is killed in the midst of loads, says so of the slots they were
/// to come to.
async fn leaves_what_was_being_loaded_out_of_use(changed: &str) -> bool {
    let site = Site::of_two_folders();
    let daemon = site.start_ready().await;
    let store = site.attach(attach_to("one", BlockLayout::opaque(256 << 10))).await;
    let runs = [1, 2].map(|seed| Run::new(&store, seed, 200));
    for run in &runs {
        run.put_durably(&store).await;
    }
    let (getting, keys) = (store.clone(), runs.map(|run| run.keys));
    let gets = tokio::spawn(async move {
        for keys in keys.iter().cycle() {
            getting.get(keys, Shard::WHOLE).await;
        }
    });
    let loaded = daemon.counter("tender_hit_blocks_disk_total").await;
    while daemon.counter("tender_hit_blocks_disk_total").await < loaded + 128 {
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
    let file = site.path("tender.toml");
    let config = std::fs::read_to_string(&file).unwrap();
    std::fs::write(&file, config.replace("second", changed)).unwrap();
    daemon.kill_worker();
    gets.abort();
    until("the disk", async || daemon.tier(WireTier::Disk).await.state == "ready").await;
    let is_left = daemon.said().contains("used by nobody until the daemon is stopped");
    daemon.stop();
    is_left
}

/// The lock of another file says nothing of what a dead worker's reads may still bring.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_dead_worker_was_loading_is_left_out_of_use_where_the_disk_has_changed() {
    let mut tries = 0;
    while !leaves_what_was_being_loaded_out_of_use("third").await {
        tries += 1;
        assert!(tries < 10, "nothing was being loaded, or nothing is left out of use");
    }
    for _ in 0..3 {
        assert!(!leaves_what_was_being_loaded_out_of_use("second").await, "the disk is the same");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_tier_file_that_was_cut_costs_the_disk_and_not_host_memory() {
    let site = Site::small();
    let daemon = site.start_ready().await;
    let store = site.attach(attach_to("one", BlockLayout::opaque(16 << 10))).await;
    let run = Run::new(&store, 1, 200);
    run.put_durably(&store).await;
    daemon.at_rest().await;
    let file = std::fs::File::options().write(true).open(site.tier_file()).unwrap();
    file.set_len(1 << 20).unwrap();
    daemon.kill_worker();
    run.expect(&store, Some(Tier::Host)).await;
    support::wait_until("a word about the file", || daemon.said().contains("the disk tier is not there"));
    run.expect(&store, Some(Tier::Host)).await;
    assert_eq!(daemon.tier(WireTier::Disk).await.state, "awaited");
    let new = Run::new(&store, 2, 20);
    new.put(&store).await;
    new.expect(&store, Some(Tier::Host)).await;
    daemon.stop();
}
