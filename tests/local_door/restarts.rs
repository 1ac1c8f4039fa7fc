//! The worker is killed while a client writes slowly into what it has reserved.

use tender_client::BlockStore;
use tender_client::proto::door::{Reply, Request};
use tender_client::proto::wire::Tier;

use crate::actor::Actor;
use crate::deaths::stopped_with_leases;
use crate::raw::Raw;
use crate::support::until;
use crate::{HOST_BYTES, LARGE, SMALL, attach_as, client, site, store_bytes};

/// Two tenants, two sizes, two groups: one writes, the others fill memory.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_being_written_when_the_worker_was_killed_is_published_by_its_own_commit_alone() {
    let site = site("0");
    let daemon = site.start_ready().await;
    let witness = client(&site, false, attach_as("witness", "model", SMALL)).await;
    let other = client(&site, true, attach_as("other", "model", LARGE)).await;
    let attach = attach_as("writer", "model", SMALL);
    let mut writer = Raw::open(&site.socket(), None, &attach).await;
    let run = writer.run(7, 24);
    let slots = writer.reserve(&run);
    for (block, slot) in slots.iter().enumerate() {
        writer.fill(slot, &run.payload(block)[..SMALL as usize / 2]);
    }
    daemon.kill_worker();
    store_bytes(&witness, 1_000, 2 * HOST_BYTES).await;
    store_bytes(&other, 2_000, 2 * HOST_BYTES).await;
    assert_eq!(witness.lookup(&run.keys).await.prefix_blocks, 0, "half of a block was published");
    // Nobody else may end or commit what is not theirs.
    let mut stranger = Raw::open(&site.socket(), None, &attach_as("stranger", "model", SMALL)).await;
    assert_eq!(stranger.confirm(&slots), 0, "a stranger took over what it does not hold");
    let holds: Vec<_> = slots.iter().map(|slot| slot.hold).collect();
    assert_eq!(stranger.ask(&Request::Abort(holds.into())), Reply::Done);

    let mut writer = writer.come_again(&site.socket(), None, &attach).await;
    assert_eq!(writer.confirm(&slots), slots.len(), "a reservation was lost");
    store_bytes(&witness, 3_000, HOST_BYTES).await;
    assert_eq!(witness.lookup(&run.keys).await.prefix_blocks, 0, "half of a block was published");
    writer.fill_and_commit(&run, &slots);
    run.expect(&witness, None).await;
    writer.leave();
    daemon.stop();
}

/// A process that stands still says nothing to the next worker, and holds what it held.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_is_stopped_while_the_worker_is_killed_keeps_its_leases_and_one_that_dies_does_not() {
    let site = site("0");
    let daemon = site.start_ready().await;
    let (writers, actors) = stopped_with_leases(&site).await;
    daemon.kill_worker();
    for writer in &writers {
        store_bytes(writer, 1000, 2 * HOST_BYTES / writers.len() as u64).await;
    }
    assert_eq!(daemon.tier(Tier::Host).await.leased_slots, 60, "leases in limbo are held");
    let [mut first, second] = <[Actor; 2]>::try_from(actors).unwrap_or_else(|_| panic!("two actors"));
    second.kill();
    first.signal("CONT");
    first.expect("check", "right");
    first.expect("put 2 8", "stored 8");
    store_bytes(&writers[0], 9000, HOST_BYTES).await;
    first.expect("check", "right");
    until("the end of a dead process's leases", async || daemon.tier(Tier::Host).await.leased_slots <= 30).await;
    first.kill();
    daemon.at_rest().await;
    daemon.stop();
}
