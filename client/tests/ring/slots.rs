//! Slots that the caller fills.

use std::collections::HashMap;
use std::os::unix::fs::FileExt;

use tender_client::proto::sum::fragment_sums;
use tender_client::{CommitOutcome, ReserveError, Reserved, Slot};

use super::*;

/// What a copy engine does: it is given an address, and writes there.
fn write_by_address(slot: &mut Slot, bytes: &[u8]) {
    let memory = std::fs::OpenOptions::new().write(true).open("/proc/self/mem").unwrap();
    memory.write_all_at(bytes, slot.start() as u64).unwrap();
}

/// Bytes that differ everywhere.
fn payload(block: usize) -> Vec<u8> {
    (0..BLOCK_BYTES).map(|byte| (byte * 7 / 3 + 31 * block) as u8).collect()
}

async fn reserve(client: &Remote, keys: &[BlockKey]) -> Vec<Slot> {
    let reserved = client.reserve(client.terms().root, keys, Shard::WHOLE).await.unwrap();
    let count = reserved.len();
    let slots: Vec<Slot> = reserved.into_iter().filter_map(Reserved::granted).collect();
    assert_eq!((count, slots.len()), (keys.len(), keys.len()));
    slots
}

async fn are_there(client: &Remote, keys: &[BlockKey]) {
    let got = client.get(keys, Shard::WHOLE).await;
    assert_eq!((got.end, got.blocks.len()), (GetEnd::Complete, keys.len()));
    assert!(
        got.blocks.iter().zip(0..).all(|(view, block)| view.equals(&payload(block))),
        "other bytes than were written"
    );
}

impl Node {
    /// All rings end, what they held does not; the client has come again, and said what it holds, when this returns.
    async fn change_rings(&self, client: &Remote) {
        let opened = self.script(|script| {
            (script.keeps, script.swallows, script.holds) = (true, false, false);
            script.ends = 1;
            script.opened
        });
        self.door().until("the next ring", |script| script.opened > opened).await;
        client.lookup(&[client.terms().root]).await;
        assert_eq!(client.door(), Doors::Ring);
    }
}

#[tokio::test]
async fn slots_are_filled_where_they_lie_and_committed() {
    let node = Node::new(Script::default());
    let client = node.client().await;
    let keys = blocks(&client, 6).0;
    let mut slots = reserve(&client, &keys).await;
    assert_eq!(node.script(|script| script.held.len()), 6);
    for (slot, key) in slots.iter_mut().zip(&keys) {
        assert_eq!((slot.bytes(), slot.key()), (BLOCK_BYTES, *key));
        assert!(!slot.start().is_null() && (slot.start() as usize).is_multiple_of(4096));
    }
    slots[0].fill(&payload(0));
    write_by_address(&mut slots[1], &payload(1));
    let (first, second) = (payload(2)[..70_001].to_vec(), payload(2)[70_001..].to_vec());
    slots[2].write_at(70_001, &second);
    slots[2].write_at(0, &first);
    // Summed by who copies.
    write_by_address(&mut slots[3], &payload(3));
    slots[3].set_sums(fragment_sums(&payload(3)));
    // Filled, and then something else after all.
    slots[4].fill(&payload(0));
    slots[4].write_at(0, &payload(4)[..BLOCK_BYTES / 2]);
    slots[4].fill(&payload(0));
    write_by_address(&mut slots[4], &payload(4));
    slots[5].fill(&payload(0));
    slots[5].write_at(0, &payload(5));
    assert_eq!(client.lookup(&keys).await.prefix_blocks, 0, "before it is committed");
    assert_eq!(client.commit(slots).await, [CommitOutcome::Stored; 6]);
    are_there(&client, &keys).await;
    let again = client.reserve(client.terms().root, &keys, Shard::WHOLE).await.unwrap();
    assert!(again.iter().all(|reserved| matches!(reserved, Reserved::Not(PutOutcome::AlreadyPresent))), "{again:?}");
    assert_eq!(node.grpc_puts(), 0);
    assert!(client.commit(Vec::new()).await.is_empty());
    node.all_given_back().await;
}

#[tokio::test]
async fn what_does_not_fit_a_slot_is_refused() {
    let node = Node::new(Script::default());
    let client = node.client().await;
    let keys = blocks(&client, 1).0;
    let cases: [fn(&mut Slot); 5] = [
        |slot| slot.fill(&[0; BLOCK_BYTES - 1]),
        |slot| slot.fill(&[0; BLOCK_BYTES + 1]),
        |slot| slot.write_at(BLOCK_BYTES - 3, &[0; 4]),
        |slot| slot.write_at(usize::MAX, &[0; 4]),
        |slot| slot.set_sums(vec![0; BLOCK_BYTES.div_ceil(1 << 16) - 1]),
    ];
    for case in cases {
        let mut slot = reserve(&client, &keys).await.remove(0);
        let refused = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| case(&mut slot)));
        assert!(refused.is_err());
        drop(slot);
        node.all_given_back().await;
    }
}

#[tokio::test]
async fn a_slot_that_is_dropped_is_given_back() {
    let node = Node::new(Script::default());
    let client = node.client().await;
    let (keys, payloads) = blocks(&client, 3);
    let mut slots = reserve(&client, &keys).await;
    assert_eq!(put(&client, &keys, &payloads).await, [PutOutcome::BeingWritten; 3]);
    slots[0].fill(&payloads[0]);
    let last = slots.split_off(1);
    assert_eq!(client.commit(slots).await, [CommitOutcome::Stored]);
    drop(last);
    node.all_given_back().await;
    assert_eq!(client.lookup(&keys).await.prefix_blocks, 1);
    let outcomes = put(&client, &keys, &payloads).await;
    assert_eq!(outcomes, [PutOutcome::AlreadyPresent, PutOutcome::Stored, PutOutcome::Stored]);
    // Broken off, with an answer under way.
    client.purge(Purge::Namespace).await;
    node.script(|script| script.holds = true);
    let parent = client.terms().root;
    assert!(timeout(Duration::from_millis(30), client.reserve(parent, &keys, Shard::WHOLE)).await.is_err());
    node.script(|script| script.holds = false);
    client.lookup(&keys).await;
    node.all_given_back().await;
}

#[tokio::test]
async fn shards_are_committed_one_by_one() {
    let node = Node::new(Script::default());
    let client = node.client().await;
    let (keys, parent) = (blocks(&client, 1).0, client.terms().root);
    for (index, outcome) in [(1, CommitOutcome::ShardStored), (0, CommitOutcome::Stored)] {
        let reserved = client.reserve(parent, &keys, Shard { index, count: 2 }).await.unwrap();
        let mut slots: Vec<Slot> = reserved.into_iter().filter_map(Reserved::granted).collect();
        let start = BLOCK_BYTES / 2 * usize::from(index);
        slots[0].write_at(0, &payload(0)[start..start + BLOCK_BYTES / 2]);
        assert_eq!(client.commit(slots).await, [outcome]);
    }
    are_there(&client, &keys).await;
    let error = client.reserve(parent, &keys, Shard { index: 2, count: 2 }).await.unwrap_err();
    assert!(matches!(error, ReserveError::Shard(_)), "{error}");
}

#[tokio::test]
async fn where_there_is_no_ring_no_slots_are_given_and_the_cure_is_said() {
    let node = Node::new(Script::default());
    let target = Target::Unix(node.world.socket());
    let client = Remote::attach_by(target, None, attach(), Doors::Grpc).await.unwrap();
    let keys = blocks(&client, 1).0;
    let error = client.reserve(client.terms().root, &keys, Shard::WHOLE).await.unwrap_err();
    assert_eq!(error, ReserveError::NoRing);
    let text = error.to_string();
    assert!(["gRPC", "put the blocks", "Doors::Ring"].iter().all(|word| text.contains(word)), "{text}");
}

#[tokio::test]
async fn behind_the_first_block_without_room_none_is_reserved() {
    // Room for two; memory that was never given, for all or for the third alone.
    let cases = [
        (small(|script| script.ingest_bytes = 2 * BLOCK_BYTES as u64 + 1), 2, true),
        (small(|script| script.misnames = |_| true), 0, false),
        (small(|script| script.misnames = |block| block == 2), 2, false),
    ];
    for (script, granted, asks_once) in cases {
        let node = Node::new(script);
        let client = node.client().await;
        let (keys, parent) = (client.terms().chain(&[7; 4000]), client.terms().root);
        let asked = node.script(|script| script.asked);
        let reserved = client.reserve(parent, &keys, Shard::WHOLE).await.unwrap();
        // What is granted and of no use is given back.
        assert!(!asks_once || node.script(|script| script.asked) == asked + 1, "nobody asks on");
        let is_granted = |reserved: &&Reserved| matches!(reserved, Reserved::Granted(_));
        assert_eq!((reserved.len(), reserved.iter().take_while(is_granted).count()), (1000, granted));
        assert!(reserved[granted..].iter().all(|reserved| matches!(reserved, Reserved::Not(PutOutcome::NoRoom))));
        drop(reserved);
        node.all_given_back().await;
    }
}

#[tokio::test]
async fn long_runs_are_reserved_and_committed_in_pieces() {
    let node = Node::new(Script::default());
    let layout = BlockLayout::opaque(64);
    let client = Remote::attach(Target::Unix(node.world.socket()), None, Attach { layout, ..attach() }).await.unwrap();
    node.door().until("memory to write", |script| script.mapped == 1).await;
    let keys = client.terms().chain(&(0..4 * 2000).collect::<Vec<u32>>());
    let mut slots = reserve(&client, &keys).await;
    let parents: HashMap<BlockKey, BlockKey> = node.script(|script| {
        script.held.values().filter_map(|held| held.writing.map(|(key, _)| (key, held.parent))).collect()
    });
    assert!(keys.windows(2).all(|pair| parents[&pair[1]] == pair[0]) && parents[&keys[0]] == client.terms().root);
    slots.iter_mut().zip(0u32..).for_each(|(slot, block)| slot.write_at(60, &block.to_le_bytes()));
    assert_eq!(client.commit(slots).await, [CommitOutcome::Stored; 2000]);
    let got = client.get(&keys, Shard::WHOLE).await;
    assert_eq!(got.end, GetEnd::Complete);
    assert!(got.blocks.iter().zip(0u32..).all(|(view, block)| view.to_vec()[60..] == block.to_le_bytes()));
}

#[tokio::test]
async fn what_is_half_written_when_the_ring_changes_is_committed_through_the_next_one() {
    let node = Node::new(Script::default());
    let client = node.client().await;
    let keys = blocks(&client, 3).0;
    let mut slots = reserve(&client, &keys).await;
    for round in 0..2 {
        for (block, slot) in slots.iter_mut().enumerate() {
            let at = round * BLOCK_BYTES / 4;
            slot.write_at(at, &payload(block)[at..at + BLOCK_BYTES / 4]);
        }
        node.change_rings(&client).await;
        assert!(slots.iter().all(Slot::is_held));
        assert_eq!(client.lookup(&keys).await.prefix_blocks, 0);
    }
    for (block, slot) in slots.iter_mut().enumerate() {
        slot.write_at(BLOCK_BYTES / 2, &payload(block)[BLOCK_BYTES / 2..]);
    }
    let dropped = slots.pop();
    assert_eq!(client.commit(slots).await, [CommitOutcome::Stored; 2]);
    are_there(&client, &keys[..2]).await;
    drop(dropped);
    node.all_given_back().await;
    assert_eq!(client.lookup(&keys).await.prefix_blocks, 2);
}

#[tokio::test]
async fn what_the_next_worker_does_not_confirm_is_gone() {
    let node = Node::new(Script::default());
    let client = node.client().await;
    let keys = blocks(&client, 3).0;
    let mut slots = reserve(&client, &keys).await;
    node.script(|script| script.denies = true);
    node.change_rings(&client).await;
    assert!(!slots.iter().any(Slot::is_held));
    let asked = node.script(|script| script.asked);
    slots.iter_mut().enumerate().for_each(|(block, slot)| slot.fill(&payload(block)));
    assert_eq!(client.commit(slots).await, [CommitOutcome::Gone; 3]);
    assert_eq!(node.script(|script| script.asked), asked, "its name may be another's by now");
    assert_eq!(client.lookup(&keys).await.prefix_blocks, 0);
}

/// Names of holds come again in another host memory.
#[tokio::test]
async fn slots_of_a_host_memory_that_is_no_more_are_gone_and_harm_nobody() {
    let mut node = Node::new(Script::default());
    let client = node.client().await;
    let keys = blocks(&client, 2).0;
    let mut old = reserve(&client, &keys[..1]).await;
    let held = node.script(|script| script.held.keys().copied().collect::<Vec<_>>());
    node.kill();
    node.start();
    node.door().until("memory to write", |script| script.mapped == 1).await;
    client.lookup(&keys).await;
    let mut new = reserve(&client, &keys[..1]).await;
    assert_eq!(node.script(|script| script.held.keys().copied().collect::<Vec<_>>()), held);
    // The place is there still, for nobody.
    write_by_address(&mut old[0], &payload(1));
    assert!(!old[0].is_held() && new[0].is_held());
    assert_eq!(client.commit(old).await, [CommitOutcome::Gone]);
    assert_eq!((client.lookup(&keys).await.prefix_blocks, node.script(|script| script.held.len())), (0, 1));
    write_by_address(&mut new[0], &payload(0));
    assert_eq!(client.commit(new).await, [CommitOutcome::Stored]);
    are_there(&client, &keys[..1]).await;
}

/// Carried out, and answered to nobody; or not carried out.
#[tokio::test]
async fn a_commit_that_is_not_answered_is_asked_after() {
    for is_done in [true, false] {
        let node = Node::new(Script::default());
        let client = node.client().await;
        let keys = blocks(&client, 2).0;
        let mut slots = reserve(&client, &keys).await;
        slots.iter_mut().enumerate().for_each(|(block, slot)| slot.fill(&payload(block)));
        let asked = node.script(|script| {
            (script.swallows, script.holds) = (is_done, !is_done);
            script.asked
        });
        let committing = {
            let client = client.clone();
            tokio::spawn(async move { client.commit(slots).await })
        };
        node.door().until("asked", |script| script.asked > asked && (!is_done || script.held.is_empty())).await;
        node.change_rings(&client).await;
        assert_eq!(timeout(5 * AT_ONCE, committing).await.unwrap().unwrap(), [CommitOutcome::Stored; 2], "{is_done}");
        are_there(&client, &keys).await;
        node.all_given_back().await;
    }
}

#[tokio::test]
async fn a_slot_of_another_client_is_not_committed() {
    let node = Node::new(Script::default());
    let client = node.client().await;
    let keys = blocks(&client, 1).0;
    let mut slots = reserve(&client, &keys).await;
    slots[0].fill(&payload(0));
    let other = node.client().await;
    assert_eq!(other.commit(slots).await, [CommitOutcome::Gone]);
    assert_eq!(client.lookup(&keys).await.prefix_blocks, 0);
    node.all_given_back().await;
}

#[tokio::test]
async fn the_last_slot_leaves_also_after_the_ring_has_changed() {
    for changes in [false, true] {
        let node = Node::new(Script::default());
        let client = node.client().await;
        let mut slots = reserve(&client, &blocks(&client, 1).0).await;
        if changes {
            node.change_rings(&client).await;
        }
        let left = node.script(|script| script.left);
        client.close().await;
        sleep(Duration::from_millis(100)).await;
        let detaches = node.world.node.detaches.load(std::sync::atomic::Ordering::Relaxed);
        assert_eq!((node.script(|script| script.left), detaches), (left, 0));
        slots[0].fill(&payload(0));
        drop(slots);
        node.door().until("left", |script| script.left > left && script.held.is_empty()).await;
        assert_eq!(node.script(|script| script.left_holding), 0);
    }
}
