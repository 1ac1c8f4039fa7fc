//! Clients that are killed, or stopped, with leases and half-written blocks.

use tender_client::proto::door::{CommitOutcome, Filled, Reply, Request};
use tender_client::proto::sum::fragment_sums;
use tender_client::proto::wire::Tier;
use tender_client::{BlockStore, Lookup, Remote};

use crate::actor::{Actor, attach_line};
use crate::raw::Raw;
use crate::support::blocks::Run;
use crate::support::site::{Site, TOKEN};
use crate::support::until;
use crate::{HOST_BYTES, LARGE, SMALL, attach_as, client, site, store_bytes};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_client_leaves_no_lease_and_nothing_half_written_and_what_it_committed_stays() {
    let site = site("0");
    let daemon = site.start_ready().await;
    for (is_other, model, block_bytes) in [(false, "large", LARGE), (true, "small", SMALL)] {
        let token = is_other.then_some(TOKEN);
        let witness = client(&site, is_other, attach_as("witness", model, block_bytes)).await;
        let (theirs, own, half) = (Run::new(&witness, 1, 20), Run::new(&witness, 2, 20), Run::new(&witness, 3, 8));
        theirs.put(&witness).await;
        let mut doomed = Actor::start(site.path(model));
        doomed.expect(&attach_line(&site.socket(), token, "doomed", model, block_bytes), "attached");
        doomed.expect("put 2 20", "stored 20");
        doomed.expect("lease 1 20", "leased 20");
        doomed.expect("half 3 8", "granted 8");
        let host = daemon.tier(Tier::Host).await;
        assert!(host.leased_slots >= 20 && host.busy_slots >= 8, "{host:?}");
        doomed.kill();
        daemon.at_rest().await;
        let Lookup { prefix_blocks, .. } = witness.lookup(&half.keys).await;
        assert_eq!(prefix_blocks, 0, "half of a block was published");
        half.expect_nothing(&witness).await;
        own.expect(&witness, None).await;
        theirs.expect(&witness, None).await;
        half.put(&witness).await;
        half.expect(&witness, None).await;
    }
    daemon.at_rest().await;
    daemon.stop();
}

/// It cannot know yet that another rank has died, and writes on: nothing else may come to lie there meanwhile.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_living_member_fills_is_nobody_elses_when_another_member_dies() {
    let site = site("0");
    let daemon = site.start_ready().await;
    for (is_other, model, block_bytes) in [(false, "large", LARGE), (true, "small", SMALL)] {
        let token = is_other.then_some(TOKEN);
        let witness = client(&site, is_other, attach_as("witness", model, block_bytes)).await;
        let mut living = Raw::open(&site.socket(), token, &attach_as("engine", model, block_bytes)).await;
        let mut doomed = Actor::start(site.path(model));
        doomed.expect(&attach_line(&site.socket(), token, "engine", model, block_bytes), "attached");
        doomed.expect("half 3 8", "granted 8");
        let (in_vain, afterwards) = (living.run(4, 8), living.run(5, 8));
        let slots = living.reserve(&in_vain);
        assert_eq!(daemon.tier(Tier::Host).await.busy_slots, 16);
        doomed.kill();
        until("word of the death", async || daemon.tier(Tier::Host).await.busy_slots <= 8).await;
        let others = living.put(&afterwards);
        for (block, slot) in slots.iter().enumerate() {
            assert!(others.iter().all(|other| other.extent != slot.extent), "{:?} is still being filled", slot.extent);
            living.fill(slot, &in_vain.payload(block));
        }
        let sums = |block| fragment_sums(&in_vain.payload(block));
        let filled: Vec<Filled> =
            slots.iter().enumerate().map(|(block, slot)| Filled { hold: slot.hold, sums: sums(block) }).collect();
        let reply = living.ask(&Request::Commit(filled.into()));
        assert_eq!(reply, Reply::Committed(vec![CommitOutcome::Gone; slots.len()]), "what its group began is over");
        in_vain.expect_nothing(&witness).await;
        afterwards.expect(&witness, None).await;
        let slots = living.put(&in_vain);
        assert_eq!(slots.len(), 8, "it may begin anew");
        in_vain.expect(&witness, None).await;
        living.leave();
    }
    daemon.at_rest().await;
    daemon.stop();
}

/// Two tenants and two sizes: of each a client that put a run of 30, and a process that leased it and was stopped.
pub async fn stopped_with_leases(site: &Site) -> (Vec<Remote>, Vec<Actor>) {
    let (mut writers, mut stopped) = (Vec::new(), Vec::new());
    for (is_other, model, block_bytes) in [(false, "large", LARGE), (true, "small", SMALL)] {
        let token = is_other.then_some(TOKEN);
        let writer = client(site, is_other, attach_as("writer", model, block_bytes)).await;
        Run::new(&writer, 1, 30).put(&writer).await;
        let mut actor = Actor::start(site.path(model));
        actor.expect(&attach_line(&site.socket(), token, "stopped", model, block_bytes), "attached");
        actor.expect("lease 1 30", "leased 30");
        actor.signal("STOP");
        stopped.push(actor);
        writers.push(writer);
    }
    (writers, stopped)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stopped_client_keeps_its_leases_and_goes_on() {
    let site = site("0");
    let daemon = site.start_ready().await;
    let (writers, mut stopped) = stopped_with_leases(&site).await;
    for writer in &writers {
        store_bytes(writer, 1000, 2 * HOST_BYTES / writers.len() as u64).await;
    }
    assert_eq!(daemon.tier(Tier::Host).await.leased_slots, 60);
    for actor in &mut stopped {
        actor.signal("CONT");
        actor.expect("check", "right");
        actor.expect("put 2 8", "stored 8");
        actor.expect("lease 2 8", "leased 8");
        actor.expect("check", "right");
    }
    for actor in stopped {
        actor.kill();
    }
    daemon.at_rest().await;
    daemon.stop();
}
