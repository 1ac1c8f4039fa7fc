//! Every implementation of `BlockStore` keeps its promises.

mod conformance;
#[expect(dead_code, reason = "each test file uses what it needs")]
mod support;

use support::blocks::{Run, attach_to};
use support::site::{Site, TOKEN, free_address};
use tender_client::proto::{BlockLayout, Namespace};
use tender_client::{Attach, Doors, InMemory, Null, Remote, Target};

fn any() -> Attach {
    Attach {
        group: "clients".to_owned(),
        member: String::new(),
        namespace: Namespace::text("any", "bf16", 4),
        layout: BlockLayout::opaque(1),
    }
}

/// Memory for every size class of the suite: its namespaces all live in one daemon.
const TIERS: [&str; 4] = ["--host", "512MiB", "--disk", "512MiB"];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn in_memory_keeps_its_promises() {
    let store = InMemory::new(any());
    conformance::suite(async |attach| store.attach(attach), true).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn null_keeps_its_promises() {
    conformance::suite(async |attach| Null::new(attach), false).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_daemon_through_its_ring_keeps_its_promises() {
    over_the_socket(Doors::Ring).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_daemon_over_its_socket_keeps_its_promises() {
    over_the_socket(Doors::Grpc).await;
}

async fn over_the_socket(doors: Doors) {
    let site = Site::new(&TIERS);
    let daemon = site.start();
    let attach = async |attach| {
        let store = Remote::attach_by(site.target(), None, attach, doors).await.unwrap();
        assert_eq!(store.door(), doors);
        store
    };
    conformance::suite(attach, true).await;
    daemon.at_rest().await;
    daemon.stop();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_run_as_large_as_half_of_a_small_host_tier_is_stored_whole() {
    let site = Site::small();
    let daemon = site.start();
    let store = site.attach(attach_to("small-host", BlockLayout::opaque(64 << 10))).await;
    let run = Run::new(&store, 1, 512);
    run.put(&store).await;
    run.expect(&store, None).await;
    daemon.stop();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_daemon_over_loopback_with_a_token_keeps_its_promises() {
    let mut site = Site::new(&TIERS);
    let address = free_address();
    site.flag("--listen", address);
    site.flag("--token-file", site.secret("token", TOKEN, 0o600).display());
    let daemon = site.start();
    let attach =
        async |attach| Remote::attach(Target::Loopback(address), Some(TOKEN.to_owned()), attach).await.unwrap();
    conformance::suite(attach, true).await;
    daemon.at_rest().await;
    daemon.stop();
}
