//! What one client leases stays what it is, whatever others put meanwhile.

use std::time::{Duration, Instant};

use tender_client::proto::Shard;
use tender_client::proto::wire::Tier;
use tender_client::{BlockStore, BlockView, GetEnd, Remote};
use tokio::time::sleep;

use crate::support::PATIENCE;
use crate::support::blocks::Run;
use crate::{HOST_BYTES, LARGE, SMALL, attach_as, client, site, store_bytes};

/// Leases a run in place, once all of it lies in memory that only the daemon writes.
pub async fn lease(store: &Remote, run: &Run) -> Vec<BlockView> {
    let began = Instant::now();
    loop {
        let got = store.get(&run.keys, Shard::WHOLE).await;
        if got.end == GetEnd::Complete && got.blocks.iter().all(BlockView::is_leased) {
            return got.blocks;
        }
        assert!(began.elapsed() < PATIENCE, "{:?} after {} blocks", got.end, got.blocks.len());
        sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_leased_stays_as_it_is_while_others_overwrite_all_memory_five_times() {
    let site = site("0");
    let daemon = site.start_ready().await;
    let (mut held, mut writers) = (Vec::new(), Vec::new());
    for is_other in [false, true] {
        for (model, block_bytes, blocks) in [("large", LARGE, 24), ("small", SMALL, 88)] {
            let writer = client(&site, is_other, attach_as(&format!("writers-{model}"), model, block_bytes)).await;
            let reader = client(&site, is_other, attach_as(&format!("readers-{model}"), model, block_bytes)).await;
            let run = Run::new(&writer, 1, blocks);
            run.put(&writer).await;
            let views = lease(&reader, &run).await;
            held.push((run, views, reader));
            writers.push(writer);
        }
    }
    let leased: usize = held.iter().map(|(_, views, _)| views.len()).sum();
    assert!(leased > 200);
    for round in 0..5 {
        for writer in &writers {
            store_bytes(writer, 1000 * (round + 1), HOST_BYTES / writers.len() as u64).await;
        }
        assert!(held.iter().all(|(run, views, _)| run.equals(views)), "other bytes than were leased");
    }
    assert_eq!(daemon.tier(Tier::Host).await.leased_slots, leased as u64);
    let readers: Vec<_> = held.into_iter().map(|(_, _, reader)| reader).collect();
    daemon.at_rest().await;
    for (writer, reader) in writers.iter().zip(&readers) {
        let run = Run::new(writer, 100_000, (12 << 20) / writer.terms().shard_bytes(1));
        run.put(writer).await;
        run.expect(reader, None).await;
    }
    daemon.at_rest().await;
    daemon.stop();
}
