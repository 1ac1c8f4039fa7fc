//! Memory that a client writes, after it was told not to: others get what was committed, or a miss.

use std::sync::atomic::{AtomicBool, Ordering};

use tender_client::proto::Shard;
use tender_client::{BlockStore, BlockView, Doors, GetEnd, Remote};

use crate::actor::{Actor, Stage, attach_line, overwrite};
use crate::raw::Raw;
use crate::support::blocks::Run;
use crate::support::site::TOKEN;
use crate::{LARGE, SMALL, attach_as, client, site};

/// Gets a run; what came must be right. How many blocks that were.
pub async fn get_right(store: &Remote, run: &Run) -> (Vec<BlockView>, GetEnd) {
    let got = store.get(&run.keys, Shard::WHOLE).await;
    for (block, view) in got.blocks.iter().enumerate() {
        assert!(view.equals(&run.payload(block)), "block {block} came with other bytes than were committed");
    }
    (got.blocks, got.end)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_overwritten_after_its_commit_is_what_was_committed_or_a_miss() {
    let site = site("256MiB");
    let daemon = site.start_ready().await;
    for (is_other, model, block_bytes) in [(false, "large", LARGE), (true, "small", SMALL)] {
        let token = is_other.then_some(TOKEN);
        let mut hostile = Raw::open(&site.socket(), token, &attach_as("hostile", model, block_bytes)).await;
        let reader = client(&site, is_other, attach_as("reader", model, block_bytes)).await;
        let attach = attach_as("streamed", model, block_bytes);
        let streamed = Remote::attach_by(site.target(), token.map(str::to_owned), attach, Doors::Grpc).await.unwrap();
        for seed in 0..20 {
            let run = hostile.run(seed, 16);
            let slots = hostile.put(&run);
            for slot in &slots {
                hostile.fill(slot, &vec![0xee; block_bytes as usize]);
            }
            let _leased = get_right(&reader, &run).await;
            get_right(&streamed, &run).await;
        }
        // Committed with the sums of something else: nobody gets any of it.
        let lie = hostile.run(100, 16);
        let slots = hostile.reserve(&lie);
        for slot in &slots {
            hostile.fill(slot, &vec![0xdd; block_bytes as usize]);
        }
        hostile.commit(&lie, &slots);
        for store in [&reader, &streamed] {
            let (views, end) = get_right(store, &lie).await;
            assert!(views.is_empty() && end != GetEnd::Complete, "{end:?}");
        }
        assert!(daemon.counter("tender_sum_mismatches_total").await > 0);
        hostile.leave();
    }
    daemon.stop();
}

/// The child of a client has its parent's memory mapped for writing, since before the daemon closed it for writers, and goes on after
/// its parent was killed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_child_that_writes_on_after_its_parents_death_changes_nothing_for_others() {
    let site = site("0");
    let daemon = site.start_ready().await;
    for (is_other, model, block_bytes) in [(false, "large", LARGE), (true, "small", SMALL)] {
        let token = is_other.then_some(TOKEN);
        let mut parent = Actor::start(site.path(&format!("{model}-parent")));
        parent.expect(&attach_line(&site.socket(), token, "family", model, block_bytes), "attached");
        let stage = Stage::new(site.path(&format!("{model}-child")));
        let offered = parent.ask(&format!("fork {} 1 40", stage.socket.display()));
        let [mapping, descriptor, bytes] = offered.split(' ').collect::<Vec<_>>()[..] else { panic!("{offered}") };
        let mut child = stage.enter();
        child.expect(&format!("map {descriptor} {bytes}"), "mapped");
        parent.expect("accept", "stored 40");
        assert_eq!(child.ask("break-in"), "", "ways to write that are open after `Mapped`");

        let reader = client(&site, is_other, attach_as("reader", model, block_bytes)).await;
        let run = Run::new(&reader, 1, 40);
        let (views, end) = get_right(&reader, &run).await;
        assert_eq!(end, GetEnd::Complete);
        parent.expect("put 2 40", "stored 40");
        parent.kill();
        child.expect("scribble", "scribbling");

        // Who comes now gets memory of its own: fresh, under another name, and nobody else's.
        let mut heir = Raw::open(&site.socket(), token, &attach_as("heir", model, block_bytes)).await;
        let sibling = client(&site, is_other, attach_as("family", model, block_bytes)).await;
        for seed in 10..14 {
            let theirs = heir.run(seed, 64);
            let slots = heir.put(&theirs);
            assert!(slots.iter().all(|slot| slot.extent.segment.to_string() != mapping), "memory of a dead client");
            let siblings = Run::new(&sibling, seed + 10, 64);
            siblings.put(&sibling).await;
            for store in [&reader, &sibling] {
                for run in [&theirs, &siblings] {
                    assert_eq!(get_right(store, run).await.1, GetEnd::Complete);
                }
            }
            get_right(&reader, &Run::new(&reader, 2, 40)).await;
            get_right(&sibling, &run).await;
            assert!(run.equals(&views), "a leased block");
        }
        heir.leave();
    }
    daemon.stop();
}

/// Says that it is over when it is dropped, whatever fails before.
struct Over<'a>(&'a AtomicBool);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn blocks_are_right_or_a_miss_while_their_writer_scribbles_over_them() {
    let site = site("0");
    let daemon = site.start_ready().await;
    let mut hostile = Raw::open(&site.socket(), None, &attach_as("hostile", "large", LARGE)).await;
    let reader = client(&site, false, attach_as("reader", "large", LARGE)).await;
    hostile.put(&hostile.run(0, 1));
    let is_over = AtomicBool::new(false);
    let own: Vec<_> = hostile.own.drain().collect();
    std::thread::scope(|threads| {
        threads.spawn(|| {
            while !is_over.load(Ordering::Relaxed) {
                own.iter().for_each(|(_, memory)| overwrite(memory, 0xee));
            }
        });
        let _ends_the_scribbling = Over(&is_over);
        let handle = tokio::runtime::Handle::current();
        tokio::task::block_in_place(|| {
            for seed in 1..30 {
                let run = hostile.run(seed, 8);
                let slots = hostile.reserve(&run);
                for (block, slot) in slots.iter().enumerate() {
                    let place = own.iter().find(|(mapping, _)| *mapping == slot.extent.segment);
                    let memory = place.map(|(_, memory)| memory).or_else(|| hostile.own.get(&slot.extent.segment));
                    memory.unwrap().write(slot.extent.offset_bytes, &run.payload(block));
                }
                hostile.commit(&run, &slots);
                handle.block_on(get_right(&reader, &run));
            }
        });
    });
    daemon.stop();
}
