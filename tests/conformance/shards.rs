//! Blocks that are written and read in slices.

use std::sync::Arc;

use tender_client::proto::Shard;
use tender_client::{Attach, BlockStore, GetEnd, PutOutcome};

use super::{Chain, attach, present, small};

pub async fn a_block_is_present_when_all_its_shards_are<S: BlockStore>(make: &impl AsyncFn(Attach) -> S, keeps: bool) {
    let store = make(attach(small())).await;
    let chain = Chain::new(&store, 20, 3);
    let order = [5, 0, 7, 2, 1, 6, 4, 3];
    for index in order {
        chain.expect(&store, Shard::WHOLE, 0).await;
        chain.expect(&store, Shard { index: 5, count: 8 }, 0).await;
        assert_eq!(present(&store, &chain.keys).await, [false; 3], "before shard {index}");
        let outcomes = chain.put_shard(&store, Shard { index, count: 8 }).await;
        let expected = if index == 3 { PutOutcome::Stored } else { PutOutcome::ShardStored };
        for outcome in outcomes {
            assert_eq!(outcome == expected, keeps, "shard {index}: {outcome:?}");
        }
    }
    chain.expect(&store, Shard::WHOLE, if keeps { 3 } else { 0 }).await;
}

pub async fn what_was_written_in_eight_is_read_in_four_two_and_one<S: BlockStore>(
    make: &impl AsyncFn(Attach) -> S,
    keeps: bool,
) {
    // In shards of 512 bytes, and in shards that are no multiple of the fragment of a sum.
    for layout in [small(), tender_client::proto::BlockLayout::opaque(8 * 100_003)] {
        for written in [8, 4, 1] {
            let store = make(attach(layout)).await;
            let chain = Chain::new(&store, 21, 2);
            for index in 0..written {
                chain.put_shard(&store, Shard { index, count: written }).await;
            }
            for count in [1, 2, 4, 8] {
                for index in 0..count {
                    chain.expect(&store, Shard { index, count }, if keeps { 2 } else { 0 }).await;
                }
            }
        }
    }
}

pub async fn sets_of_different_counts_never_mix<S: BlockStore>(make: &impl AsyncFn(Attach) -> S, keeps: bool) {
    let store = make(attach(small())).await;
    let (a, b) = (Chain::new(&store, 22, 2), Chain::new(&store, 22, 2).generation(1));
    let expect_a_or_b = async |stored: bool| {
        let got = store.get(&a.keys, Shard::WHOLE).await;
        for (block, (of_a, of_b)) in got.blocks.iter().zip(a.payloads.iter().zip(&b.payloads)) {
            assert!(block.equals(of_a) || block.equals(of_b), "a mixture of two sets of shards");
        }
        assert!(!stored || got.end == GetEnd::Complete, "stored, but {:?}", got.end);
    };
    let mut stored = false;
    let halves = [0, 1].map(|index| (&a, Shard { index, count: 2 }));
    let quarters = [0, 1, 2, 3].map(|index| (&b, Shard { index, count: 4 }));
    let steps = [halves[0], quarters[0], quarters[1], halves[1], quarters[2], quarters[3]];
    for (chain, shard) in steps {
        let outcomes = chain.put_shard(&store, shard).await;
        stored |= outcomes.iter().all(|outcome| *outcome == PutOutcome::Stored);
        assert!(keeps || !outcomes.iter().any(|outcome| outcome.is_there()), "{outcomes:?}");
        expect_a_or_b(stored).await;
    }
    assert_eq!(stored, keeps, "one of the two sets must have become the block");
}

pub async fn ranks_may_write_at_once<S: BlockStore>(make: &impl AsyncFn(Attach) -> S, keeps: bool) {
    let attach = attach(small());
    let store = make(attach.clone()).await;
    let chain = Arc::new(Chain::new(&store, 23, 6));
    let mut ranks = tokio::task::JoinSet::new();
    for index in 0..8 {
        let (rank, chain) = (make(attach.clone()).await, Arc::clone(&chain));
        ranks.spawn(async move { chain.put_shard(&rank, Shard { index, count: 8 }).await });
    }
    let outcomes: Vec<PutOutcome> = ranks.join_all().await.into_iter().flatten().collect();
    let count = |wanted| outcomes.iter().filter(|outcome| **outcome == wanted).count();
    let expected = if keeps { (6, 42) } else { (0, 0) };
    assert_eq!((count(PutOutcome::Stored), count(PutOutcome::ShardStored)), expected, "{outcomes:?}");
    chain.expect(&store, Shard::WHOLE, if keeps { 6 } else { 0 }).await;
}
