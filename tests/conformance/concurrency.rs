//! Many at once, and some who leave in the middle.

use std::sync::Arc;
use std::time::Duration;

use tender_client::proto::Shard;
use tender_client::{Attach, BlockStore, GetEnd, PutOutcome};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use super::{Chain, attach, small};

const TASKS: u32 = 16;
const ROUNDS: u32 = 8;

pub async fn of_two_writers_one_wins_whole<S: BlockStore>(make: &impl AsyncFn(Attach) -> S, keeps: bool) {
    let attach = attach(tender_client::proto::BlockLayout::opaque(300_000));
    let (one, other) = (make(attach.clone()).await, make(attach).await);
    for round in 0..4 {
        let chain = Chain::new(&one, 50 + round, 4);
        let rival = chain.generation(1);
        let (ours, theirs) = tokio::join!(chain.put(&one), rival.put(&other));
        let got = one.get(&chain.keys, Shard::WHOLE).await;
        assert_eq!(got.end, if keeps { GetEnd::Complete } else { GetEnd::Miss });
        for (index, block) in got.blocks.iter().enumerate() {
            let (winner, loser) = match (ours[index], theirs[index]) {
                (PutOutcome::Stored, loser) => (&chain, loser),
                (loser, PutOutcome::Stored) => (&rival, loser),
                neither => panic!("a block is there, but nobody was told so: {neither:?}"),
            };
            assert!(matches!(loser, PutOutcome::AlreadyPresent | PutOutcome::BeingWritten), "{loser:?}");
            assert!(block.equals(&winner.payloads[index]), "other bytes than the winner's");
        }
    }
}

pub async fn a_put_broken_off_leaves_nothing_in_the_way<S: BlockStore>(make: &impl AsyncFn(Attach) -> S, keeps: bool) {
    let store = make(attach(tender_client::proto::BlockLayout::opaque(2_000_000))).await;
    for (round, wait_us) in (0u32..).zip([0, 50, 500, 2000, 5000]) {
        let chain = Chain::new(&store, 60 + round, 4);
        let _cut_off = timeout(Duration::from_micros(wait_us), chain.put(&store)).await;
        let got = store.get(&chain.keys, Shard::WHOLE).await;
        assert!(got.blocks.iter().zip(&chain.payloads).all(|(block, payload)| block.equals(payload)));
        let mut outcomes = chain.put(&store).await;
        for _ in 0..100 {
            if !outcomes.contains(&PutOutcome::BeingWritten) {
                break;
            }
            // The store hears of the end of the first put a moment later.
            sleep(Duration::from_millis(50)).await;
            outcomes = chain.put(&store).await;
        }
        assert!(outcomes.iter().all(|outcome| outcome.is_there() == keeps), "{outcomes:?}");
        chain.expect(&store, Shard::WHOLE, if keeps { 4 } else { 0 }).await;
    }
}

pub async fn overlapping_chains_stay_right_under_load<S: BlockStore>(make: &impl AsyncFn(Attach) -> S, keeps: bool) {
    let attach = attach(small());
    let store = Arc::new(make(attach.clone()).await);
    let mut tasks = JoinSet::new();
    for task in 0..TASKS {
        // Every fourth task has a client of its own.
        let client = if task % 4 == 0 { Arc::new(make(attach.clone()).await) } else { Arc::clone(&store) };
        tasks.spawn(async move {
            for round in 0..ROUNDS {
                // Four trunks that all tasks share, and a branch that pairs of tasks share.
                let trunk = Chain::new(&*client, 70 + round % 4, 4);
                let branch = Chain::after(&*client, trunk.keys[3], 80 + task / 2 + round, 4);
                let chain = Chain {
                    parent: trunk.parent,
                    tokens: [trunk.tokens, branch.tokens].concat(),
                    keys: [trunk.keys, branch.keys].concat(),
                    payloads: [trunk.payloads, branch.payloads].concat(),
                };
                let outcomes = chain.put(&*client).await;
                let unheard_of = [PutOutcome::Refused, PutOutcome::Unavailable, PutOutcome::ShardStored];
                assert!(!outcomes.iter().any(|outcome| unheard_of.contains(outcome)), "{outcomes:?}");
                let got = client.get(&chain.keys, Shard { index: (task % 2) as u16, count: 2 }).await;
                let expected = chain.shard_payloads(Shard { index: (task % 2) as u16, count: 2 });
                assert!(got.blocks.iter().zip(expected).all(|(block, payload)| block.equals(&payload)), "wrong bytes");
                assert!(got.end != GetEnd::SumMismatch && got.end != GetEnd::Unavailable, "{:?}", got.end);
            }
        });
    }
    while let Some(task) = tasks.join_next().await {
        task.expect("no task may fail");
    }
    for trunk in 70..74 {
        let chain = Chain::new(&*store, trunk, 4);
        let outcomes = chain.put(&*store).await;
        assert!(outcomes.iter().all(|outcome| outcome.is_there() == keeps), "{outcomes:?}");
        chain.expect(&*store, Shard::WHOLE, if keeps { 4 } else { 0 }).await;
    }
}
