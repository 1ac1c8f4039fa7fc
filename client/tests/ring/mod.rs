//! The same through the ring of a local door.

mod faults;
mod memory;
mod slots;

use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::task::Poll;
use std::time::Duration;

use bytes::Bytes;
use tender_client::proto::{BlockKey, BlockLayout, Shard};
use tender_client::{Attach, BlockStore, Doors, GetEnd, Prefetched, Purge, Put, PutOutcome, Remote, Target};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use super::conformance;
use super::fake::local::{LocalDoor, Script};
use super::{AT_ONCE, BLOCK_BYTES, World, attach, blocks, put};

/// A daemon with a local door.
struct Node {
    world: World,
    door: Option<LocalDoor>,
}

impl Node {
    fn new(script: Script) -> Self {
        let world = World::new();
        let door = Some(LocalDoor::beside(&world.node, &world.socket(), script));
        Self { world, door }
    }

    fn door(&self) -> &LocalDoor {
        self.door.as_ref().unwrap()
    }

    fn script<T>(&self, work: impl FnOnce(&mut Script) -> T) -> T {
        self.door().script(work)
    }

    fn kill(&mut self) {
        self.door = None;
        self.world.kill();
    }

    fn start(&mut self) {
        self.world.start();
        self.door = Some(LocalDoor::beside(&self.world.node, &self.world.socket(), Script::default()));
    }

    /// A client whose memory to write is there.
    async fn client(&self) -> Remote {
        let mapped = self.script(|script| script.mapped);
        let client = self.world.client().await;
        assert_eq!(client.door(), Doors::Ring);
        self.door().until("memory to write", |script| script.mapped > mapped || script.ingest_bytes == 0).await;
        client
    }

    /// A client, and so many blocks.
    async fn with_blocks(&self, count: usize) -> (Remote, Vec<BlockKey>, Vec<Bytes>) {
        let client = self.client().await;
        let (keys, payloads) = blocks(&client, count);
        assert_eq!(put(&client, &keys, &payloads).await, vec![PutOutcome::Stored; count]);
        (client, keys, payloads)
    }

    fn grpc_puts(&self) -> u64 {
        self.world.node.puts.load(std::sync::atomic::Ordering::Relaxed)
    }

    async fn all_given_back(&self) {
        self.door().until("all is given back", |script| script.held.is_empty()).await;
    }
}

/// Polls once.
async fn is_ready_at_once(future: &mut Pin<Box<impl Future>>) -> bool {
    poll_fn(|context| Poll::Ready(future.as_mut().poll(context).is_ready())).await
}

fn small(script: impl FnOnce(&mut Script)) -> Script {
    let mut small = Script::default();
    script(&mut small);
    small
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn promises_are_kept_through_a_ring() {
    let node = Node::new(Script::default());
    let target = Target::Unix(node.world.socket());
    conformance::suite(async |attach| Remote::attach(target.clone(), None, attach).await.unwrap(), true).await;
    assert!(node.script(|script| script.asked) > 100);
    node.all_given_back().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn promises_are_kept_through_a_ring_with_little_memory_that_is_not_trusted() {
    let node = Node::new(small(|script| {
        script.verifies_all = true;
        script.budget_bytes = 3 << 20;
        script.ingest_bytes = 3 << 20;
    }));
    let target = Target::Unix(node.world.socket());
    conformance::suite(async |attach| Remote::attach(target.clone(), None, attach).await.unwrap(), true).await;
    node.all_given_back().await;
}

#[tokio::test]
async fn blocks_are_read_where_they_lie_and_given_back_with_their_last_view() {
    let node = Node::new(Script::default());
    let (client, keys, payloads) = node.with_blocks(3).await;
    assert_eq!((node.grpc_puts(), node.script(|script| script.held.len())), (0, 0));
    let got = client.get(&keys, Shard::WHOLE).await;
    assert_eq!(got.end, GetEnd::Complete);
    for (view, payload) in got.blocks.iter().zip(&payloads) {
        assert!(view.is_leased() && view.equals(payload) && view.to_vec() == *payload && view.len() == BLOCK_BYTES);
        assert!(!view.equals(&payload[1..]));
        let mut copy = vec![0; BLOCK_BYTES];
        view.copy_to(&mut copy);
        assert_eq!(copy, payload[..]);
        let pieces = view.pieces();
        assert_eq!(pieces.iter().map(|piece| piece.bytes).collect::<Vec<_>>(), [BLOCK_BYTES]);
    }
    assert_eq!(node.script(|script| script.held.len()), 3);
    let kept = got.blocks[1].clone();
    drop(got);
    node.door().until("two are given back", |script| script.held.len() == 1).await;
    assert!(kept.equals(&payloads[1]));
    drop(kept);
    node.all_given_back().await;
}

#[tokio::test]
async fn what_was_written_in_shards_is_read_where_it_lies() {
    let node = Node::new(Script::default());
    let layout = BlockLayout::opaque(BLOCK_BYTES as u64);
    let client = node.client().await;
    assert_eq!(client.terms().attach.layout, layout);
    let keys = client.terms().chain(&[1, 2, 3, 4]);
    let payload: Vec<u8> = (0..BLOCK_BYTES).map(|byte| (byte % 251) as u8).collect();
    let slice = |index: usize, count: usize| &payload[BLOCK_BYTES / count * index..BLOCK_BYTES / count * (index + 1)];
    for index in 0..4 {
        let payloads = [Bytes::copy_from_slice(slice(index, 4))];
        let shard = Shard { index: index as u16, count: 4 };
        let parent = client.terms().root;
        let outcome = client.put(Put { parent, keys: &keys, shard, payloads: &payloads, tokens: &[] }).await;
        assert_eq!(outcome, [if index == 3 { PutOutcome::Stored } else { PutOutcome::ShardStored }]);
    }
    for verifies in [false, true] {
        node.script(|script| script.verifies_each = verifies);
        for (count, index, pieces) in [(1, 0, 4), (2, 1, 2), (4, 2, 1), (8, 5, 1)] {
            let got = client.get(&keys, Shard { index: index as u16, count: count as u16 }).await;
            assert!(got.blocks[0].equals(slice(index, count)), "{index} of {count}");
            assert_eq!(got.blocks[0].is_leased(), !verifies);
            assert_eq!(got.blocks[0].pieces().len(), if verifies { 1 } else { pieces });
        }
    }
    assert_eq!(node.grpc_puts(), 0);
    node.all_given_back().await;
}

#[tokio::test]
async fn more_than_may_be_leased_comes_all_the_same() {
    let node = Node::new(Script::default());
    let (client, keys, payloads) = node.with_blocks(10).await;
    let budget_bytes = 3 * BLOCK_BYTES as u64;
    node.script(|script| (script.budget_bytes, script.busy) = (budget_bytes, 2));
    let got = client.get(&keys, Shard::WHOLE).await;
    assert_eq!((got.end, got.blocks.len()), (GetEnd::Complete, 10));
    assert!(got.blocks.iter().zip(&payloads).all(|(view, payload)| view.equals(payload)));
    assert_eq!(got.blocks.iter().filter(|view| view.is_leased()).count(), 1, "what came last");
    assert_eq!(node.script(|script| script.leased_bytes_max), budget_bytes);
    // Others hold all there is: over gRPC.
    let all = client.get(&keys[..2], Shard::WHOLE).await;
    assert_eq!(all.blocks.iter().filter(|view| view.is_leased()).count(), 2);
    let more = client.get(&keys, Shard::WHOLE).await;
    assert_eq!((more.end, more.blocks.len()), (GetEnd::Complete, 10));
    assert!(more.blocks.iter().zip(&payloads).all(|(view, payload)| !view.is_leased() && view.equals(payload)));
    drop((got, all, more));
    node.all_given_back().await;
}

#[tokio::test]
async fn long_runs_of_many_shards_stay_leased() {
    let node = Node::new(Script::default());
    let layout = BlockLayout::opaque(64);
    let client = Remote::attach(Target::Unix(node.world.socket()), None, Attach { layout, ..attach() }).await.unwrap();
    node.door().until("memory to write", |script| script.mapped == 1).await;
    let keys = client.terms().chain(&(0..4 * 2000).collect::<Vec<u32>>());
    for index in 0..4 {
        let payloads: Vec<Bytes> = (0..keys.len()).map(|block| Bytes::from(vec![(block + index) as u8; 16])).collect();
        let shard = Shard { index: index as u16, count: 4 };
        let put = Put { parent: client.terms().root, keys: &keys, shard, payloads: &payloads, tokens: &[] };
        assert!(client.put(put).await.iter().all(|outcome| outcome.is_there()));
    }
    let got = client.get(&keys, Shard::WHOLE).await;
    assert_eq!((got.end, got.blocks.len()), (GetEnd::Complete, 2000));
    assert!(got.blocks.iter().all(|view| view.is_leased()), "a full frame is no reason to copy");
    assert_eq!(got.blocks[1999].to_vec()[16..33], [[208; 16].as_slice(), &[209]].concat());
    drop(got);
    node.all_given_back().await;
}

#[tokio::test]
async fn every_verb_goes_through_the_ring() {
    let node = Node::new(Script::default());
    let (client, keys, payloads) = node.with_blocks(3).await;
    let mut unknown = keys.clone();
    unknown.extend(client.terms().chain(&[77; 4]));
    // Over gRPC all of these would be refused.
    node.world.node.set(super::Trouble::Overloaded);
    assert_eq!(client.lookup(&unknown).await.host, [true, true, true, false]);
    assert_eq!(client.lookup(&unknown).await.prefix_blocks, 3);
    let mut told = Vec::new();
    let done = client.prefetch(&unknown, |progress| told.push(*progress)).await;
    assert_eq!(done, Prefetched { resident_blocks: 3, missing_blocks: 1, ..Prefetched::default() });
    assert_eq!(told.last(), Some(&done));
    assert_eq!(client.durable(&unknown).await, [true, true, true, false]);
    assert_eq!(put(&client, &keys, &payloads).await, [PutOutcome::AlreadyPresent; 3]);
    assert_eq!(client.get(&unknown, Shard::WHOLE).await.end, GetEnd::Miss);
    let purged = client.purge(Purge::Keys(&keys[2..])).await;
    assert!(purged.complete && purged.purged_blocks == 1);
    assert_eq!(client.purge(Purge::Namespace).await.purged_blocks, 2);
    node.all_given_back().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn more_calls_than_frames_are_all_answered() {
    let node = Node::new(Script::default());
    let (client, keys, payloads) = node.with_blocks(3).await;
    node.script(|script| script.holds = true);
    let mut calls = JoinSet::new();
    for _ in 0..200 {
        let (client, keys, payloads) = (client.clone(), keys.clone(), payloads.clone());
        calls.spawn(async move {
            let got = client.get(&keys, Shard::WHOLE).await;
            got.end == GetEnd::Complete && got.blocks.iter().zip(&payloads).all(|(view, payload)| view.equals(payload))
        });
    }
    sleep(Duration::from_millis(50)).await;
    node.script(|script| script.holds = false);
    while let Some(call) = timeout(2 * AT_ONCE, calls.join_next()).await.expect("no answer is slept over") {
        assert!(call.unwrap());
    }
    node.all_given_back().await;
}

#[tokio::test]
async fn many_calls_one_after_the_other_are_answered_at_once() {
    let node = Node::new(Script::default());
    let (client, keys, _) = node.with_blocks(1).await;
    let calls = async {
        for _ in 0..20_000 {
            assert_eq!(client.lookup(&keys).await.prefix_blocks, 1);
        }
    };
    timeout(15 * AT_ONCE, calls).await.expect("none of them waits for a deadline");
}
