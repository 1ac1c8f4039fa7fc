//! Slots that clients of the crate fill themselves.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tender_client::proto::{Shard, sum};
use tender_client::{BlockStore, CommitOutcome, Purge, PutOutcome, Remote, Reserved, Slot};
use tokio::time::sleep;

use crate::bringing::bring_to;
use crate::memory::write_by_address;
use crate::support::blocks::Run;
use crate::support::until;
use crate::{HOST_BYTES, SMALL, attach_as, client, site, store_bytes};

/// No whole number of pages, nor of fragments.
const ODD: u64 = 100_001;

async fn reserve(store: &Remote, run: &Run) -> Vec<Slot> {
    let reserved = store.reserve(run.parent, &run.keys, Shard::WHOLE).await.unwrap();
    let slots: Vec<Slot> = reserved.into_iter().filter_map(Reserved::granted).collect();
    assert_eq!(slots.len(), run.keys.len(), "there is room for all of them");
    slots
}

/// Writes the bytes of each block from `from` to `to`.
fn write(slots: &mut [Slot], run: &Run, from: usize, to: usize) {
    for (block, slot) in slots.iter_mut().enumerate() {
        write_by_address(slot, from, &run.payload(block)[from..to]);
    }
}

/// Two tenants, two sizes, two groups of each; one writes into memory of its own.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_filled_in_place_reaches_others_byte_for_byte_and_what_is_dropped_is_nobodys() {
    let site = site("0");
    let daemon = site.start_ready().await;
    for (is_other, model, block_bytes) in [(false, "odd", ODD), (true, "small", SMALL)] {
        let writer = client(&site, is_other, attach_as("writer", model, block_bytes)).await;
        let reader = client(&site, is_other, attach_as("reader", model, block_bytes)).await;
        let brought = is_other.then(|| bring_to(&writer).0);
        let (run, bytes) = (Run::new(&writer, 1, 40), block_bytes as usize);
        let mut slots = reserve(&writer, &run).await;
        if let Some(memory) = &brought {
            let place = memory.start() as usize..memory.start() as usize + memory.bytes() as usize;
            assert!(slots.iter_mut().all(|slot| place.contains(&(slot.start() as usize))), "not in the memory brought");
        }
        write(&mut slots, &run, 0, bytes);
        // Summed by who copied.
        for (block, slot) in slots.iter_mut().enumerate().filter(|(block, _)| block % 2 == 0) {
            slot.set_sums(sum::fragment_sums(&run.payload(block)));
        }
        run.expect_nothing(&reader).await;
        let dropped = slots.split_off(30);
        assert_eq!(writer.commit(slots).await, [CommitOutcome::Stored; 30]);
        drop(dropped);
        for store in [&reader, &writer] {
            assert_eq!(run.present(store).await.iter().filter(|is_there| **is_there).count(), 30);
        }
        daemon.at_rest().await;
        // What was dropped can be reserved again.
        let outcomes = run.put_in(&writer, 1).await;
        assert!(outcomes[30..].iter().all(|outcome| *outcome == PutOutcome::Stored), "{outcomes:?}");
        run.expect(&reader, None).await;
        run.expect(&writer, None).await;
    }
    daemon.at_rest().await;
    daemon.stop();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slot_whose_block_was_purged_is_gone() {
    let site = site("0");
    let daemon = site.start_ready().await;
    let store = client(&site, false, attach_as("writer", "model", SMALL)).await;
    let run = Run::new(&store, 1, 8);
    let mut slots = reserve(&store, &run).await;
    assert!(store.purge(Purge::Keys(&run.keys[..4])).await.complete);
    write(&mut slots, &run, 0, SMALL as usize);
    let outcomes = store.commit(slots).await;
    assert_eq!(outcomes, [[CommitOutcome::Gone; 4], [CommitOutcome::Stored; 4]].concat());
    assert_eq!(run.present(&store).await, [[false; 4], [true; 4]].concat());
    daemon.at_rest().await;
    daemon.stop();
}

/// Two tenants, two sizes; others fill memory meanwhile.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn slots_half_written_when_the_worker_is_killed_are_published_by_their_own_commit_alone() {
    let site = site("0");
    let daemon = site.start_ready().await;
    let mut parties = Vec::new();
    for (is_other, model, block_bytes) in [(false, "odd", ODD), (true, "small", SMALL)] {
        let writer = client(&site, is_other, attach_as("writer", model, block_bytes)).await;
        let reader = client(&site, is_other, attach_as("reader", model, block_bytes)).await;
        let run = Run::new(&writer, 1, 24);
        let slots = reserve(&writer, &run).await;
        parties.push((writer, reader, run, slots, block_bytes as usize));
    }
    for round in 0..2 {
        for (_, _, run, slots, bytes) in &mut parties {
            write(slots, run, *bytes / 3 * round, *bytes / 3 * (round + 1));
        }
        daemon.kill_worker();
        for (_, reader, run, slots, _) in &parties {
            store_bytes(reader, 1000 * (round as u32 + 1), HOST_BYTES).await;
            assert_eq!(reader.lookup(&run.keys).await.prefix_blocks, 0, "a part of a block was published");
            assert!(slots.iter().all(Slot::is_held));
        }
    }
    for (writer, reader, run, mut slots, bytes) in parties {
        write(&mut slots, &run, bytes / 3 * 2, bytes);
        let dropped = slots.split_off(20);
        assert_eq!(writer.commit(slots).await, [CommitOutcome::Stored; 20]);
        drop(dropped);
        for store in [&reader, &writer] {
            assert_eq!(run.present(store).await, [vec![true; 20], vec![false; 4]].concat());
        }
    }
    daemon.at_rest().await;
    daemon.stop();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_commit_under_way_when_the_worker_is_killed_says_what_became_of_it() {
    let site = site("0");
    let daemon = site.start_ready().await;
    let writer = client(&site, false, attach_as("writer", "model", SMALL)).await;
    let reader = client(&site, false, attach_as("reader", "model", SMALL)).await;
    for seed in 0..6 {
        let run = Run::new(&writer, seed, 100);
        let mut slots = reserve(&writer, &run).await;
        for (block, slot) in slots.iter_mut().enumerate() {
            slot.fill(&run.payload(block));
        }
        // Many small ones, so that some are answered and others are not.
        let answered = Arc::new(AtomicUsize::new(0));
        let committing = {
            let (writer, answered) = (writer.clone(), Arc::clone(&answered));
            tokio::spawn(async move {
                let mut outcomes = Vec::new();
                for slot in slots {
                    outcomes.extend(writer.commit(vec![slot]).await);
                    answered.fetch_add(1, Ordering::Relaxed);
                    // Else all may be answered before the signal is there.
                    sleep(Duration::from_millis(1)).await;
                }
                outcomes
            })
        };
        until("an answer", async || answered.load(Ordering::Relaxed) > 0).await;
        assert!(!committing.is_finished(), "all was committed before the worker was killed");
        daemon.kill_worker();
        assert_eq!(committing.await.unwrap(), [CommitOutcome::Stored; 100]);
        run.expect(&reader, None).await;
    }
    daemon.at_rest().await;
    daemon.stop();
}
