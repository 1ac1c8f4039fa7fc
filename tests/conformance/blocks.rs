//! Bytes, misses, prefixes and purges.

use tender_client::proto::layout::Dtype;
use tender_client::proto::{BlockLayout, Shard};
use tender_client::{Attach, BlockStore, GetEnd, Purge, PutOutcome};

use super::{BLOCK_TOKENS, Chain, attach, present, small};

/// Enough for any daemon's limit on one request, and no more than a test should take.
const LONG_CHAIN_BLOCKS_MAX: usize = 20_000;

pub async fn what_was_put_comes_back_byte_by_byte<S: BlockStore>(make: &impl AsyncFn(Attach) -> S, keeps: bool) {
    let attach = attach(small());
    let store = make(attach.clone()).await;
    let chain = Chain::new(&store, 1, 9);
    chain.put_all(&store, keeps).await;
    let there = if keeps { 9 } else { 0 };
    chain.expect(&store, Shard::WHOLE, there).await;
    // And another client of the same store sees the same.
    let other = make(attach).await;
    assert_eq!(other.terms().root, store.terms().root, "the same namespace has the same root");
    chain.expect(&other, Shard::WHOLE, there).await;
}

pub async fn large_blocks_of_odd_sizes_come_back<S: BlockStore>(make: &impl AsyncFn(Attach) -> S, keeps: bool) {
    let heads = BlockLayout::attention(61, 2, 577, Dtype::Bf16, BLOCK_TOKENS);
    for layout in [BlockLayout::opaque(1), BlockLayout::opaque(65_537), BlockLayout::opaque(3_000_001), heads] {
        let store = make(attach(layout)).await;
        let chain = Chain::new(&store, 2, 3);
        chain.put_all(&store, keeps).await;
        chain.expect(&store, Shard::WHOLE, if keeps { 3 } else { 0 }).await;
    }
}

pub async fn an_unknown_block_is_a_miss<S: BlockStore>(make: &impl AsyncFn(Attach) -> S, _: bool) {
    let store = make(attach(small())).await;
    let chain = Chain::new(&store, 3, 5);
    chain.expect(&store, Shard::WHOLE, 0).await;
    assert_eq!(present(&store, &chain.keys).await, [false; 5]);
}

pub async fn a_hole_ends_the_run_but_not_the_bitmap<S: BlockStore>(make: &impl AsyncFn(Attach) -> S, keeps: bool) {
    let store = make(attach(small())).await;
    let chain = Chain::new(&store, 4, 8);
    for (start, end) in [(0, 3), (4, 8)] {
        let tokens = BLOCK_TOKENS as usize;
        let part = Chain {
            parent: if start == 0 { chain.parent } else { chain.keys[start - 1] },
            tokens: chain.tokens[start * tokens..end * tokens].to_vec(),
            keys: chain.keys[start..end].to_vec(),
            payloads: chain.payloads[start..end].to_vec(),
        };
        part.put_all(&store, keeps).await;
    }
    chain.expect(&store, Shard::WHOLE, if keeps { 3 } else { 0 }).await;
    let expected: Vec<bool> = (0..8).map(|block| keeps && block != 3).collect();
    assert_eq!(present(&store, &chain.keys).await, expected);
    // The hole filled, the run is whole.
    let outcomes = chain.put(&store).await;
    let stored = outcomes.iter().filter(|outcome| **outcome == PutOutcome::Stored).count();
    assert_eq!(stored, usize::from(keeps));
    chain.expect(&store, Shard::WHOLE, if keeps { 8 } else { 0 }).await;
}

pub async fn a_second_put_changes_nothing<S: BlockStore>(make: &impl AsyncFn(Attach) -> S, keeps: bool) {
    let attach = attach(small());
    let (store, other) = (make(attach.clone()).await, make(attach).await);
    let chain = Chain::new(&store, 5, 4);
    chain.put_all(&store, keeps).await;
    for outcome in chain.generation(1).put(&other).await {
        assert_eq!(outcome == PutOutcome::AlreadyPresent, keeps, "{outcome:?}");
    }
    chain.expect(&store, Shard::WHOLE, if keeps { 4 } else { 0 }).await;
}

pub async fn what_is_purged_is_gone<S: BlockStore>(make: &impl AsyncFn(Attach) -> S, keeps: bool) {
    let store = make(attach(small())).await;
    let chain = Chain::new(&store, 6, 6);
    chain.put_all(&store, keeps).await;
    let purged = store.purge(Purge::Keys(&chain.keys[4..])).await;
    assert!(purged.complete);
    assert_eq!(purged.purged_blocks, if keeps { 2 } else { 0 });
    chain.expect(&store, Shard::WHOLE, if keeps { 4 } else { 0 }).await;
    // From within: nothing is said of what stood on it, but it is gone itself.
    assert!(store.purge(Purge::Keys(&chain.keys[1..2])).await.complete);
    assert!(!present(&store, &chain.keys).await[1]);
    chain.expect(&store, Shard::WHOLE, if keeps { 1 } else { 0 }).await;
    // What was purged can be put again, with other bytes even.
    let again = chain.generation(1);
    let outcomes = again.put(&store).await;
    assert_eq!(outcomes[1] == PutOutcome::Stored, keeps, "{outcomes:?}");
    let got = store.get(&chain.keys[1..2], Shard::WHOLE).await;
    assert!(got.blocks.iter().all(|block| block.equals(&again.payloads[1])));
    assert_eq!(got.end, if keeps { GetEnd::Complete } else { GetEnd::Miss });
    let unknown = Chain::new(&store, 7, 3);
    let purged = store.purge(Purge::Keys(&unknown.keys)).await;
    assert!(purged.complete && purged.purged_blocks == 0, "what is not there is not purged: {purged:?}");
}

pub async fn a_namespace_is_purged_alone<S: BlockStore>(make: &impl AsyncFn(Attach) -> S, keeps: bool) {
    let (store, other) = (make(attach(small())).await, make(attach(small())).await);
    let (chain, others) = (Chain::new(&store, 8, 5), Chain::new(&other, 8, 5));
    chain.put_all(&store, keeps).await;
    others.put_all(&other, keeps).await;
    let purged = store.purge(Purge::Namespace).await;
    assert!(purged.complete);
    assert_eq!(purged.purged_blocks, if keeps { 5 } else { 0 });
    chain.expect(&store, Shard::WHOLE, 0).await;
    others.expect(&other, Shard::WHOLE, if keeps { 5 } else { 0 }).await;
}

pub async fn same_tokens_of_another_namespace_are_another_block<S: BlockStore>(
    make: &impl AsyncFn(Attach) -> S,
    keeps: bool,
) {
    let (store, other) = (make(attach(small())).await, make(attach(small())).await);
    let (chain, others) = (Chain::new(&store, 9, 3), Chain::new(&other, 9, 3));
    assert_eq!(chain.tokens, others.tokens);
    assert_ne!(chain.keys, others.keys);
    chain.put_all(&store, keeps).await;
    others.expect(&other, Shard::WHOLE, 0).await;
}

pub async fn no_keys_are_a_question_too<S: BlockStore>(make: &impl AsyncFn(Attach) -> S, _: bool) {
    let store = make(attach(small())).await;
    let nothing = Chain::new(&store, 10, 0);
    assert_eq!(nothing.put(&store).await, []);
    nothing.expect(&store, Shard::WHOLE, 0).await;
    assert_eq!(present(&store, &[]).await, [false; 0]);
    assert_eq!(store.durable(&[]).await, [false; 0]);
    assert_eq!(store.prefetch(&[], |_| {}).await, Default::default());
    let purged = store.purge(Purge::Keys(&[])).await;
    assert!(purged.complete && purged.purged_blocks == 0);
}

pub async fn long_chains_are_asked_in_pieces<S: BlockStore>(make: &impl AsyncFn(Attach) -> S, keeps: bool) {
    let store = make(attach(BlockLayout::opaque(16))).await;
    let blocks = store.terms().keys_max.saturating_add(5).min(LONG_CHAIN_BLOCKS_MAX);
    let whole = Chain::new(&store, 11, blocks);
    let tail = Chain {
        parent: whole.keys[blocks - 4],
        tokens: whole.tokens[(blocks - 3) * BLOCK_TOKENS as usize..].to_vec(),
        keys: whole.keys[blocks - 3..].to_vec(),
        payloads: whole.payloads[blocks - 3..].to_vec(),
    };
    tail.put_all(&store, keeps).await;
    let found = present(&store, &whole.keys).await;
    assert!(found[..blocks - 3].iter().all(|present| !present));
    assert_eq!(found[blocks - 3..], [keeps; 3]);
    assert_eq!(store.durable(&whole.keys).await.len(), blocks);
    let prefetched = store.prefetch(&whole.keys, |_| {}).await;
    assert_eq!(prefetched.resident_blocks + prefetched.missing_blocks + prefetched.shed_blocks, blocks);
    whole.expect(&store, Shard::WHOLE, 0).await;
    let purged = store.purge(Purge::Keys(&whole.keys)).await;
    assert_eq!(purged.purged_blocks, if keeps { 3 } else { 0 });
}
