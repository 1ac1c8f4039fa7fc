//! Two tenants of one daemon: what one does costs the other nothing that is its part.

#[expect(dead_code, reason = "each test file uses what it needs")]
mod support;

use support::blocks::{Run, attach_to};
use support::site::Site;
use tender_client::proto::{BlockLayout, Shard};
use tender_client::{BlockStore, Put, PutOutcome};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_tenant_beyond_its_part_takes_room_from_itself() {
    let site = Site::of_two_tenants(&["--host", "128MiB", "--disk", "128MiB"]);
    let daemon = site.start_ready().await;
    let theirs = site.attach(attach_to("whole", BlockLayout::opaque(256 << 10))).await;
    let run = Run::new(&theirs, 1, 200);
    run.put_durably(&theirs).await;
    for pages in 1..40 {
        let store = site.attach_other(attach_to(&format!("size-{pages}"), BlockLayout::opaque(4096 * pages))).await;
        Run::new(&store, 1, 1).put_in(&store, 1).await;
    }
    let present = run.present(&theirs).await;
    assert!(present.iter().all(|present| *present), "{} of 200 are left", present.iter().filter(|p| **p).count());
    daemon.stop();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_block_that_is_never_finished_keeps_nobody_out() {
    let site = Site::of_two_tenants(&["--host", "64MiB", "--disk", "256MiB"]);
    let daemon = site.start_ready().await;
    let half = site.attach_other(attach_to("half", BlockLayout::opaque(128 << 10))).await;
    let run = Run::new(&half, 1, 1);
    let payloads = [run.payload(0).slice(..64 << 10)];
    let shard = Shard { index: 0, count: 2 };
    let put = Put { parent: run.parent, keys: &run.keys, shard, payloads: &payloads, tokens: &run.tokens };
    assert_eq!(half.put(put).await, [PutOutcome::ShardStored]);
    let filler = site.attach(attach_to("filler", BlockLayout::opaque(64 << 10))).await;
    Run::new(&filler, 1, 1200).put(&filler).await;
    let other = site.attach(attach_to("another-size", BlockLayout::opaque(1 << 20))).await;
    Run::new(&other, 1, 1).put(&other).await;
    daemon.stop();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_layout_is_forgotten_with_its_last_attachment() {
    let site = Site::small();
    let daemon = site.start();
    let looker = site.attach(attach_to("model", BlockLayout::opaque(64 << 10))).await;
    assert_eq!(looker.lookup(&Run::new(&looker, 1, 1).keys).await.prefix_blocks, 0);
    looker.close().await;
    let engine = site.attach(attach_to("model", BlockLayout::opaque(1 << 20))).await;
    Run::new(&engine, 1, 2).put(&engine).await;
    daemon.stop();
}
