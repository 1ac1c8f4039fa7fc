use std::collections::HashMap;

use bytes::Bytes;
use tender_proto::{BlockLayout, Namespace};

use super::*;
use crate::WatchItem;

const BLOCK_BYTES: usize = 64;

fn store(blocks: usize) -> InMemory {
    let attach = Attach {
        group: "tests".into(),
        member: String::new(),
        namespace: Namespace::text("in-memory", "bf16", 1),
        layout: BlockLayout::opaque(BLOCK_BYTES as u64),
    };
    InMemory::with_capacity(attach, (blocks * BLOCK_BYTES) as u64)
}

/// Chain `number`, of which any two share no block.
fn chain(store: &InMemory, number: u32, blocks: u32) -> Vec<BlockKey> {
    store.terms().chain(&(0..blocks).map(|block| number << 16 | block).collect::<Vec<u32>>())
}

fn payload(key: &BlockKey) -> Bytes {
    Bytes::copy_from_slice(&[*key.as_bytes(), *key.as_bytes()].concat())
}

async fn put(store: &InMemory, keys: &[BlockKey]) -> Vec<PutOutcome> {
    let payloads: Vec<Bytes> = keys.iter().map(payload).collect();
    store.put(Put { parent: store.terms().root, keys, shard: Shard::WHOLE, payloads: &payloads, tokens: &[] }).await
}

async fn prefix(store: &InMemory, keys: &[BlockKey]) -> usize {
    store.lookup(keys).await.prefix_blocks
}

#[tokio::test]
async fn the_least_recently_used_leaf_goes_first() {
    let store = store(6);
    let (old, used, new) = (chain(&store, 1, 3), chain(&store, 2, 3), chain(&store, 3, 2));
    put(&store, &old).await;
    put(&store, &used).await;
    store.get(&old, Shard::WHOLE).await;
    assert_eq!(put(&store, &new).await, [PutOutcome::Stored; 2]);
    // The unused chain lost its end, not its beginning.
    assert_eq!((prefix(&store, &old).await, prefix(&store, &used).await, prefix(&store, &new).await), (3, 1, 2));
    assert_eq!(store.lookup(&used).await.host, [true, false, false]);
}

#[tokio::test]
async fn a_run_does_not_push_out_what_it_stands_on() {
    let store = store(4);
    let keys = chain(&store, 1, 6);
    let outcomes = put(&store, &keys).await;
    assert_eq!(outcomes[..4], [PutOutcome::Stored; 4]);
    assert_eq!(outcomes[4..], [PutOutcome::NoRoom; 2]);
    assert_eq!(prefix(&store, &keys).await, 4);
    // Another root pushes out the whole of it, from its end on.
    let other = chain(&store, 2, 4);
    assert_eq!(put(&store, &other).await, [PutOutcome::Stored; 4]);
    assert_eq!((prefix(&store, &keys).await, prefix(&store, &other).await), (0, 4));
}

#[tokio::test]
async fn shards_that_wait_for_others_take_room_and_go_too() {
    let store = store(2);
    let (half, whole) = (chain(&store, 1, 2), chain(&store, 2, 2));
    let payloads = vec![Bytes::from(vec![1; BLOCK_BYTES / 2]); 2];
    let shard = Shard { index: 1, count: 2 };
    let parent = store.terms().root;
    let outcomes = store.put(Put { parent, keys: &half, shard, payloads: &payloads, tokens: &[] }).await;
    assert_eq!(outcomes, [PutOutcome::ShardStored; 2]);
    assert_eq!(put(&store, &whole).await, [PutOutcome::Stored; 2]);
    assert_eq!(store.blocks().used_bytes(), 2 * BLOCK_BYTES as u64);
    // The first half came to nothing: the second is the first again.
    let shard = Shard { index: 0, count: 2 };
    let outcomes = store.put(Put { parent, keys: &half[..1], shard, payloads: &payloads[..1], tokens: &[] }).await;
    assert_eq!(outcomes, [PutOutcome::ShardStored]);
}

#[tokio::test]
async fn a_block_larger_than_the_store_has_no_room() {
    let store = store(0);
    assert_eq!(put(&store, &chain(&store, 1, 2)).await, [PutOutcome::NoRoom; 2]);
}

/// Whatever happens, the store stays within its capacity, holds only right bytes, and a chain put from its beginning stays a prefix.
#[tokio::test]
async fn under_pressure_chains_stay_prefixes() {
    let store = store(40);
    let mut random = 1u64;
    let mut next = |below: u64| {
        random = tender_proto::sum::mix(random.wrapping_add(tender_proto::sum::GOLDEN));
        random % below
    };
    for _ in 0..3000 {
        let number = next(12) as u32;
        let keys = chain(&store, number, 1 + next(20) as u32);
        match next(10) {
            0 => {
                // Only ends are purged: a hole from within is the caller's own doing.
                let whole = chain(&store, number, 20);
                store.purge(Purge::Keys(&whole[prefix(&store, &keys).await..])).await;
            }
            1..5 => {
                put(&store, &keys).await;
            }
            _ => {
                let got = store.get(&keys, Shard::WHOLE).await;
                assert!(got.blocks.iter().zip(&keys).all(|(block, key)| block.equals(&payload(key))));
            }
        }
        assert!(store.blocks().used_bytes() <= 40 * BLOCK_BYTES as u64);
        let found = store.lookup(&keys).await;
        assert!(found.host[found.prefix_blocks..].iter().all(|present| !present), "a hole");
    }
    let present = (0..12).flat_map(|number| chain(&store, number, 20));
    let found = store.lookup(&present.collect::<Vec<_>>()).await.host;
    let bytes = found.iter().filter(|present| **present).count() * BLOCK_BYTES;
    assert_eq!(store.blocks().used_bytes(), bytes as u64, "every byte that is used belongs to a block");
}

#[tokio::test]
async fn a_watcher_that_does_not_keep_up_loses_its_stream() {
    let store = store(usize::MAX / BLOCK_BYTES);
    let (mut slow, mut mirror) = (store.watch(None).await, HashMap::new());
    for number in 0..5000 {
        put(&store, &chain(&store, number, 1)).await;
    }
    while let Some(item) = slow.next().await {
        if let WatchItem::Change(_, change) = item {
            mirror.insert(change.key, change.present);
        }
    }
    assert!(mirror.len() < 5000, "the stream was cut");
    // And goes on from where it was cut.
    let mut again = store.watch(slow.position()).await;
    while mirror.len() < 5000 {
        let Some(WatchItem::Change(_, change)) = again.next().await else { panic!("the rest is remembered") };
        mirror.insert(change.key, change.present);
    }
}

#[tokio::test]
async fn what_is_no_longer_remembered_comes_as_a_snapshot() {
    let store = store(1);
    let start = {
        let mut watch = store.watch(None).await;
        while !matches!(watch.next().await, Some(WatchItem::Synced(_))) {}
        watch.position()
    };
    for number in 0..10_000 {
        put(&store, &chain(&store, number, 1)).await;
    }
    let mut watch = store.watch(start).await;
    assert_eq!(watch.next().await, Some(WatchItem::Reset));
    let Some(WatchItem::Present(block)) = watch.next().await else { panic!("one block is there") };
    assert_eq!(block.key, chain(&store, 9999, 1)[0]);
    let Some(WatchItem::Synced(position)) = watch.next().await else { panic!("and no other") };
    assert_eq!(position.sequence, 2 * 10_000 - 1, "each came, all but the last went");
}

#[tokio::test]
async fn clients_of_one_store_may_differ_in_layout_but_share_no_bytes() {
    let store = store(100);
    let layout = BlockLayout::opaque(2 * BLOCK_BYTES as u64);
    let other = store.attach(Attach { layout, ..store.terms().attach.clone() });
    let keys = chain(&store, 1, 2);
    put(&store, &keys).await;
    assert_eq!(other.terms().root, store.terms().root);
    assert_eq!(prefix(&other, &keys).await, 0);
    assert_eq!(other.purge(Purge::Namespace).await.purged_blocks, 2);
    assert_eq!(prefix(&store, &keys).await, 0, "a namespace is purged whatever the layout");
}
