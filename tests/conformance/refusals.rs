//! Questions that cannot be meant: refused as a whole, with nothing kept, and never a panic.

use bytes::Bytes;
use tender_client::proto::Shard;
use tender_client::{Attach, BlockStore, Put, PutOutcome};

use super::{Chain, attach, small};

async fn refused(store: &impl BlockStore, put: Put<'_>, why: &str) {
    let outcomes = store.put(put).await;
    assert_eq!(outcomes, vec![PutOutcome::Refused; put.keys.len()], "{why}");
    let found = store.lookup(put.keys).await;
    assert!(!found.host.contains(&true) && !found.disk.contains(&true), "kept in spite of: {why}");
}

fn put<'a>(chain: &'a Chain, payloads: &'a [Bytes]) -> Put<'a> {
    Put { parent: chain.parent, keys: &chain.keys, shard: Shard::WHOLE, payloads, tokens: &chain.tokens }
}

pub async fn payloads_of_the_wrong_size_are_refused<S: BlockStore>(make: &impl AsyncFn(Attach) -> S, keeps: bool) {
    let store = make(attach(small())).await;
    let chain = Chain::new(&store, 30, 3);
    let resized = |bytes: usize| {
        let mut payloads = chain.payloads.clone();
        payloads[1] = Bytes::from(vec![7; bytes]);
        payloads
    };
    for bytes in [0, 1, 4095, 4097, 2 << 20] {
        refused(&store, put(&chain, &resized(bytes)), &format!("a payload of {bytes} bytes")).await;
    }
    refused(&store, put(&chain, &chain.payloads[..2]), "fewer payloads than keys").await;
    let more = [chain.payloads.clone(), chain.payloads.clone()].concat();
    refused(&store, put(&chain, &more), "more payloads than keys").await;
    // A whole block's bytes are no shard's.
    let shard = Shard { index: 0, count: 2 };
    refused(&store, Put { shard, ..put(&chain, &chain.payloads) }, "whole blocks as halves").await;
    chain.put_all(&store, keeps).await;
}

pub async fn impossible_shards_are_refused<S: BlockStore>(make: &impl AsyncFn(Attach) -> S, keeps: bool) {
    let store = make(attach(small())).await;
    let chain = Chain::new(&store, 31, 2);
    let impossible = [(0, 3), (8, 8), (1, 1), (0, 65), (u16::MAX, u16::MAX), (0, 16)];
    for (index, count) in impossible {
        let shard = Shard { index, count };
        let bytes = 4096 / usize::from(count);
        let payloads = [vec![1; bytes].into(), vec![2; bytes].into()];
        refused(&store, Put { shard, ..put(&chain, &payloads) }, &format!("shard {shard}")).await;
    }
    chain.put_all(&store, keeps).await;
    for (index, count) in impossible {
        let got = store.get(&chain.keys, Shard { index, count }).await;
        assert!(got.blocks.is_empty(), "no block has a shard {index} of {count}");
    }
    // A count of 0 is read as 1.
    chain.expect(&store, Shard::WHOLE, if keeps { 2 } else { 0 }).await;
    let got = store.get(&chain.keys, Shard { index: 0, count: 0 }).await;
    assert_eq!(got.blocks.len(), if keeps { 2 } else { 0 });
}

pub async fn tokens_that_do_not_derive_the_keys_are_refused<S: BlockStore>(
    make: &impl AsyncFn(Attach) -> S,
    keeps: bool,
) {
    let store = make(attach(small())).await;
    let chain = Chain::new(&store, 32, 4);
    refused(&store, Put { tokens: &chain.tokens[1..], ..put(&chain, &chain.payloads) }, "too few tokens").await;
    let mut tokens = chain.tokens.clone();
    tokens[9] ^= 1;
    refused(&store, Put { tokens: &tokens, ..put(&chain, &chain.payloads) }, "another token").await;
    let parent = chain.keys[2];
    refused(&store, Put { parent, ..put(&chain, &chain.payloads) }, "another parent").await;
    chain.put_all(&store, keeps).await;
    let untold = Chain { tokens: Vec::new(), ..Chain::new(&store, 33, 2) };
    untold.put_all(&store, keeps).await;
}
