//! Many clients at once, each of which wants much.

use std::sync::Arc;
use std::time::Duration;

use tender_client::proto::Shard;
use tender_client::{BlockStore, Doors, GetEnd, Purge, PutOutcome, Remote};
use tokio::task::JoinSet;

use crate::support::blocks::Run;
use crate::support::site::{Site, TOKEN};
use crate::{LARGE, SMALL, attach_as, client, site};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn forty_clients_that_each_want_more_than_half_of_memory_all_come_to_their_end() {
    let site = Site::of_two_tenants(&["--host", "32MiB", "--disk", "256MiB"]);
    let daemon = site.start_ready().await;
    let mut runs = Vec::new();
    for (is_other, block_bytes) in [(false, LARGE), (true, SMALL)] {
        let writer = client(&site, is_other, attach_as("writer", "model", block_bytes)).await;
        let run = Arc::new(Run::new(&writer, 1, (17 << 20) / block_bytes as usize));
        run.put_durably(&writer).await;
        runs.push(run);
    }
    let mut tasks = JoinSet::new();
    for number in 0..40 {
        let is_other = number % 2 == 1;
        let (run, block_bytes) = (Arc::clone(&runs[usize::from(is_other)]), if is_other { SMALL } else { LARGE });
        let attach = attach_as(&format!("group-{}", number % 10), "model", block_bytes);
        let store = client(&site, is_other, attach).await.with_deadline(Duration::from_secs(30));
        tasks.spawn(async move {
            let mut came = 0;
            while came < run.keys.len() {
                let got = store.get(&run.keys[came..], Shard::WHOLE).await;
                for (block, view) in (came..).zip(&got.blocks) {
                    assert!(view.equals(&run.payload(block)), "block {block} is wrong");
                }
                came += got.blocks.len();
                assert!(matches!(got.end, GetEnd::Complete | GetEnd::Shed | GetEnd::Deadline), "{:?}", got.end);
            }
        });
    }
    while let Some(task) = tasks.join_next().await {
        task.expect("all come to their end");
    }
    daemon.at_rest().await;
    daemon.stop();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_of_both_doors_agree_on_the_same_blocks() {
    let site = site("128MiB");
    let daemon = site.start_ready().await;
    let mut tasks = JoinSet::new();
    for number in 0..12u32 {
        let (is_other, doors) = (number % 2 == 1, if number % 4 < 2 { Doors::Ring } else { Doors::Grpc });
        let attach = attach_as(&format!("group-{}", number % 3), "model", if is_other { SMALL } else { LARGE });
        let token = is_other.then(|| TOKEN.to_owned());
        let store = Remote::attach_by(site.target(), token, attach, doors).await.unwrap();
        assert_eq!(store.door(), doors);
        tasks.spawn(async move {
            for round in 0..60 {
                let seed = (number * 7 + round) % 6;
                let is_purged = seed >= 3;
                let run = Run::new(&store, seed, 8);
                for outcome in run.put_in(&store, 1).await {
                    let is_known = match outcome {
                        PutOutcome::Stored | PutOutcome::AlreadyPresent | PutOutcome::BeingWritten => true,
                        // A purge forgets what is being written as well.
                        PutOutcome::Unavailable => is_purged,
                        _ => false,
                    };
                    assert!(is_known, "{outcome:?}");
                }
                run.present(&store).await;
                if is_purged && round % 5 == number % 5 {
                    assert!(store.purge(Purge::Keys(&run.keys)).await.complete);
                }
            }
        });
    }
    while let Some(task) = tasks.join_next().await {
        task.expect("no client sees a wrong byte, and all end");
    }
    daemon.at_rest().await;
    daemon.stop();
}
