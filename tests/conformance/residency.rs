//! What a store tells about its blocks: watch, prefetch, durable.

use std::collections::HashMap;
use std::time::Duration;

use tender_client::proto::{BlockKey, Shard};
use tender_client::{Attach, BlockStore, Position, Prefetched, Purge, Residency, Tier, Watch, WatchItem};
use tokio::time::timeout;

use super::{Chain, attach, small};

/// Events may take their time, but not this long.
const EVENT_DEADLINE: Duration = Duration::from_secs(10);

/// What a router would hold of a store, by its watch alone.
struct Mirror {
    watch: Watch,
    present: HashMap<(BlockKey, Tier), Residency>,
    resets: usize,
    is_synced: bool,
    last: Option<Position>,
}

impl Mirror {
    fn new(watch: Watch) -> Self {
        let last = watch.position();
        Self { watch, present: HashMap::new(), resets: 0, is_synced: last.is_some(), last }
    }

    async fn step(&mut self) {
        let item = timeout(EVENT_DEADLINE, self.watch.next()).await.expect("an event that must come");
        match item.expect("the stream goes on while the store is there") {
            WatchItem::Reset => {
                self.present.clear();
                self.resets += 1;
                self.is_synced = false;
            }
            WatchItem::Present(residency) => {
                assert!(self.resets > 0 && !self.is_synced, "a snapshot stands between Reset and Synced");
                assert!(residency.present);
                self.present.insert((residency.key, residency.tier), residency);
            }
            WatchItem::Synced(position) => {
                self.is_synced = true;
                self.last = Some(position);
            }
            WatchItem::Change(position, residency) => {
                assert!(self.is_synced, "changes come after the snapshot");
                let last = self.last.expect("a position before the first change");
                assert_eq!(position.epoch, last.epoch);
                assert!(position.sequence > last.sequence, "numbers rise");
                self.last = Some(position);
                let place = (residency.key, residency.tier);
                if residency.present {
                    self.present.insert(place, residency);
                } else {
                    self.present.remove(&place);
                }
            }
        }
        assert!(!self.is_synced || self.watch.position() == self.last);
    }

    async fn sync(&mut self) {
        while !self.is_synced {
            self.step().await;
        }
    }

    fn holds(&self, key: &BlockKey) -> bool {
        self.present.keys().any(|(present, _)| present == key)
    }

    /// Follows until all of the keys are there, or none is.
    async fn until(&mut self, keys: &[BlockKey], there: bool) {
        while keys.iter().any(|key| self.holds(key) != there) {
            self.step().await;
        }
    }

    async fn expect_silence(&mut self) {
        assert!(timeout(Duration::from_millis(50), self.watch.next()).await.is_err(), "nothing has happened");
    }
}

pub async fn a_watch_begins_with_what_is_there<S: BlockStore>(make: &impl AsyncFn(Attach) -> S, keeps: bool) {
    let store = make(attach(small())).await;
    let chain = Chain::new(&store, 40, 5);
    chain.put_all(&store, keeps).await;
    let halves = Chain::new(&store, 41, 2);
    halves.put_shard(&store, Shard { index: 0, count: 2 }).await;
    let mut mirror = Mirror::new(store.watch(None).await);
    assert_eq!(mirror.watch.position(), None);
    mirror.step().await;
    assert_eq!(mirror.resets, 1, "a snapshot begins with Reset");
    mirror.sync().await;
    if !keeps {
        assert!(mirror.present.is_empty());
        return mirror.expect_silence().await;
    }
    // A store that tells of a block late may do so in an event after the snapshot.
    mirror.until(&chain.keys, true).await;
    assert!(halves.keys.iter().all(|key| !mirror.holds(key)), "half a block is not present");
    let parents = std::iter::once(&chain.parent).chain(&chain.keys);
    for (key, parent) in chain.keys.iter().zip(parents) {
        let told: Vec<&Residency> = mirror.present.values().filter(|told| told.key == *key).collect();
        for told in told {
            assert_eq!(told.parent, *parent);
            assert_eq!(told.namespace, store.terms().root.tag());
            assert_eq!(told.block_bytes as usize, store.terms().shard_bytes(1));
        }
    }
}

pub async fn a_watch_tells_what_comes_and_goes<S: BlockStore>(make: &impl AsyncFn(Attach) -> S, keeps: bool) {
    let store = make(attach(small())).await;
    let mut mirror = Mirror::new(store.watch(None).await);
    mirror.sync().await;
    let chain = Chain::new(&store, 42, 4);
    chain.put_all(&store, keeps).await;
    if !keeps {
        return mirror.expect_silence().await;
    }
    mirror.until(&chain.keys, true).await;
    store.purge(Purge::Keys(&chain.keys[3..])).await;
    mirror.until(&chain.keys[3..], false).await;
    assert!(chain.keys[..3].iter().all(|key| mirror.holds(key)));
    store.purge(Purge::Namespace).await;
    mirror.until(&chain.keys, false).await;
    assert_eq!(mirror.resets, 1, "no second snapshot in one stream");
}

pub async fn a_watch_goes_on_from_its_position<S: BlockStore>(make: &impl AsyncFn(Attach) -> S, keeps: bool) {
    let store = make(attach(small())).await;
    let mut before = Mirror::new(store.watch(None).await);
    before.sync().await;
    let first = Chain::new(&store, 43, 3);
    first.put_all(&store, keeps).await;
    if keeps {
        before.until(&first.keys, true).await;
    }
    let position = before.watch.position().expect("synced");
    drop(before.watch);
    let second = Chain::after(&store, first.keys[2], 44, 3);
    second.put_all(&store, keeps).await;
    let mut after = Mirror::new(store.watch(Some(position)).await);
    if keeps {
        after.present = before.present;
        after.until(&second.keys, true).await;
        assert!(first.keys.iter().all(|key| after.holds(key)), "what was there before still is");
        assert_eq!(after.resets, 0, "three events later no store has forgotten");
        assert!(after.watch.position().is_some_and(|now| now.sequence > position.sequence));
    }
}

pub async fn an_unknown_position_brings_a_snapshot<S: BlockStore>(make: &impl AsyncFn(Attach) -> S, keeps: bool) {
    let store = make(attach(small())).await;
    let chain = Chain::new(&store, 45, 3);
    chain.put_all(&store, keeps).await;
    let mut mirror = Mirror::new(store.watch(None).await);
    mirror.sync().await;
    let position = mirror.last.expect("synced");
    let other_epoch = Position { epoch: position.epoch ^ 0x5555, ..position };
    let future = Position { sequence: position.sequence + 1_000_000, ..position };
    for from in [other_epoch, future] {
        let mut mirror = Mirror::new(store.watch(Some(from)).await);
        mirror.is_synced = false;
        mirror.step().await;
        assert_eq!(mirror.resets, 1, "{from:?} is a position that the store cannot know");
        mirror.sync().await;
        if keeps {
            mirror.until(&chain.keys, true).await;
        }
    }
}

pub async fn prefetch_accounts_for_every_block<S: BlockStore>(make: &impl AsyncFn(Attach) -> S, keeps: bool) {
    let store = make(attach(small())).await;
    let chain = Chain::new(&store, 46, 7);
    let there =
        Chain { keys: chain.keys[..5].to_vec(), payloads: chain.payloads[..5].to_vec(), tokens: Vec::new(), ..chain };
    there.put_all(&store, keeps).await;
    let mut told: Vec<Prefetched> = Vec::new();
    let last = store.prefetch(&chain.keys, |progress| told.push(*progress)).await;
    let resident_blocks = if keeps { 5 } else { 0 };
    let expected =
        Prefetched { resident_blocks, loaded_blocks: 0, missing_blocks: 7 - resident_blocks, shed_blocks: 0 };
    assert_eq!(Prefetched { loaded_blocks: 0, ..last }, expected);
    assert_eq!(told.last(), Some(&last), "the last progress is the answer");
    for progress in told {
        let accounted = progress.resident_blocks + progress.missing_blocks + progress.shed_blocks;
        assert!(accounted <= 7 && progress.loaded_blocks <= progress.resident_blocks, "{progress:?}");
    }
    there.expect(&store, Shard::WHOLE, resident_blocks).await;
}

pub async fn durable_answers_for_every_block<S: BlockStore>(make: &impl AsyncFn(Attach) -> S, keeps: bool) {
    let store = make(attach(small())).await;
    let (chain, unknown) = (Chain::new(&store, 47, 3), Chain::new(&store, 48, 2));
    chain.put_all(&store, keeps).await;
    let durable = store.durable(&[&chain.keys[..], &unknown.keys[..]].concat()).await;
    assert_eq!(durable.len(), 5);
    assert_eq!(durable[3..], [false, false], "what is not there does not survive");
    assert!(keeps || !durable.contains(&true));
    chain.expect(&store, Shard::WHOLE, if keeps { 3 } else { 0 }).await;
}
