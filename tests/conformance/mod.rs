//! What `BlockStore` promises, checked on any implementation.
//!
//! `suite` is given how to make a client: each call of `make` joins the same store under the namespace and layout it is given. A store
//! that does not keep (`keeps` false) must be just as right: nothing it says may be wrong, and nothing may fail.
//! Each promise is a function whose name says it; all use namespaces of their own, so that they may share one daemon.

mod blocks;
mod concurrency;
mod refusals;
mod residency;
mod shards;

use std::future::Future;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use tender_client::proto::layout::Dtype;
use tender_client::proto::{BlockKey, BlockLayout, Namespace, Shard};
use tender_client::{Attach, BlockStore, GetEnd, Put, PutOutcome};

/// No promise takes a second; a call that never returns breaks one.
const PROMISE_DEADLINE: Duration = Duration::from_secs(60);

/// Checks every promise, one after the other.
pub async fn suite<S: BlockStore>(make: impl AsyncFn(Attach) -> S, keeps: bool) {
    macro_rules! promises {
        ($($file:ident::$promise:ident)*) => {$(
            // Boxed: all of them in one future are more than a test thread's stack holds.
            within(stringify!($promise), Box::pin($file::$promise(&make, keeps))).await;
        )*};
    }
    promises! {
        blocks::what_was_put_comes_back_byte_by_byte
        blocks::large_blocks_of_odd_sizes_come_back
        blocks::an_unknown_block_is_a_miss
        blocks::a_hole_ends_the_run_but_not_the_bitmap
        blocks::a_second_put_changes_nothing
        blocks::what_is_purged_is_gone
        blocks::a_namespace_is_purged_alone
        blocks::same_tokens_of_another_namespace_are_another_block
        blocks::no_keys_are_a_question_too
        blocks::long_chains_are_asked_in_pieces
        shards::a_block_is_present_when_all_its_shards_are
        shards::what_was_written_in_eight_is_read_in_four_two_and_one
        shards::sets_of_different_counts_never_mix
        shards::ranks_may_write_at_once
        refusals::payloads_of_the_wrong_size_are_refused
        refusals::impossible_shards_are_refused
        refusals::tokens_that_do_not_derive_the_keys_are_refused
        residency::a_watch_begins_with_what_is_there
        residency::a_watch_tells_what_comes_and_goes
        residency::a_watch_goes_on_from_its_position
        residency::an_unknown_position_brings_a_snapshot
        residency::prefetch_accounts_for_every_block
        residency::durable_answers_for_every_block
        concurrency::of_two_writers_one_wins_whole
        concurrency::a_put_broken_off_leaves_nothing_in_the_way
        concurrency::overlapping_chains_stay_right_under_load
    }
}

async fn within(promise: &str, check: impl Future<Output = ()>) {
    println!("{promise}");
    assert!(
        tokio::time::timeout(PROMISE_DEADLINE, check).await.is_ok(),
        "{promise}: no end after {PROMISE_DEADLINE:?}"
    );
}

/// Tokens per block of every namespace here.
const BLOCK_TOKENS: u32 = 4;

/// An attach under a namespace that nobody else has, in a group of its own: members of one group agree on their namespace.
fn attach(layout: BlockLayout) -> Attach {
    static SERIAL: AtomicU64 = AtomicU64::new(0);
    let serial = SERIAL.fetch_add(1, Ordering::Relaxed);
    let since = std::time::UNIX_EPOCH.elapsed().map_or(0, |elapsed| elapsed.as_nanos());
    let group = format!("conformance/{}-{since}-{serial}", std::process::id());
    let namespace = Namespace::text(&group, "bf16", BLOCK_TOKENS);
    Attach { group, member: "test".to_owned(), namespace, layout }
}

/// 8 heads, 4 KiB.
fn small() -> BlockLayout {
    BlockLayout::attention(2, 8, 16, Dtype::Bf16, BLOCK_TOKENS)
}

/// A run of one chain with what its blocks hold.
#[derive(Clone)]
struct Chain {
    parent: BlockKey,
    tokens: Vec<u32>,
    keys: Vec<BlockKey>,
    payloads: Vec<Bytes>,
}

impl Chain {
    /// `blocks` blocks from the root on; chains of different `seed` share none of them.
    fn new(store: &impl BlockStore, seed: u32, blocks: usize) -> Self {
        let root = store.terms().root;
        Self::after(store, root, seed, blocks)
    }

    fn after(store: &impl BlockStore, parent: BlockKey, seed: u32, blocks: usize) -> Self {
        let count = blocks as u32 * BLOCK_TOKENS;
        let tokens: Vec<u32> = (0..count).map(|token| seed.wrapping_mul(0x9e37_79b9).wrapping_add(token)).collect();
        let keys = parent.chain(&tokens, BLOCK_TOKENS);
        let payloads = keys.iter().map(|key| payload(key, 0, store.terms().shard_bytes(1))).collect();
        Self { parent, tokens, keys, payloads }
    }

    /// The same blocks with other bytes, as a faulty engine would write them.
    fn generation(&self, generation: u64) -> Self {
        let bytes = |(key, payload_before): (&BlockKey, &Bytes)| payload(key, generation, payload_before.len());
        Self { payloads: self.keys.iter().zip(&self.payloads).map(bytes).collect(), ..self.clone() }
    }

    /// One shard of each payload.
    fn shard_payloads(&self, shard: Shard) -> Vec<Bytes> {
        self.payloads.iter().map(|payload| slice(payload, shard)).collect()
    }

    async fn put(&self, store: &impl BlockStore) -> Vec<PutOutcome> {
        self.put_shard(store, Shard::WHOLE).await
    }

    async fn put_shard(&self, store: &impl BlockStore, shard: Shard) -> Vec<PutOutcome> {
        let payloads = self.shard_payloads(shard);
        let (parent, keys, tokens) = (self.parent, &self.keys[..], &self.tokens[..]);
        store.put(Put { parent, keys, shard, payloads: &payloads, tokens }).await
    }

    /// Puts and insists that all of it is kept, or none where the store keeps nothing.
    async fn put_all(&self, store: &impl BlockStore, keeps: bool) {
        let outcomes = self.put(store).await;
        assert_eq!(outcomes.len(), self.keys.len(), "one outcome for each key");
        for outcome in outcomes {
            assert_eq!(outcome == PutOutcome::Stored, keeps, "{outcome:?}");
            assert_eq!(outcome.is_there(), keeps, "{outcome:?}");
        }
    }

    /// Gets and insists that exactly the first `blocks` come, with the right bytes.
    async fn expect(&self, store: &impl BlockStore, shard: Shard, blocks: usize) {
        let got = store.get(&self.keys, shard).await;
        assert_eq!(got.blocks.len(), blocks, "blocks of {} (end: {:?})", self.keys.len(), got.end);
        let end = if blocks == self.keys.len() { GetEnd::Complete } else { GetEnd::Miss };
        assert_eq!(got.end, end);
        for (block, expected) in got.blocks.iter().zip(self.shard_payloads(shard)) {
            assert!(block.equals(&expected), "other bytes than were put");
            assert_eq!(block.len(), expected.len());
            assert_eq!(block.to_vec(), expected);
        }
        let found = store.lookup(&self.keys).await;
        assert_eq!(found.prefix_blocks, blocks, "lookup and get agree");
    }
}

/// Which of the keys are in any tier.
async fn present(store: &impl BlockStore, keys: &[BlockKey]) -> Vec<bool> {
    let found = store.lookup(keys).await;
    assert_eq!((found.host.len(), found.disk.len()), (keys.len(), keys.len()), "bitmaps are as long as the keys");
    let present: Vec<bool> = found.host.iter().zip(&found.disk).map(|(host, disk)| *host || *disk).collect();
    let prefix = present.iter().take_while(|present| **present).count();
    assert_eq!(found.prefix_blocks, prefix, "the prefix is what the bitmaps show");
    present
}

fn slice(payload: &Bytes, shard: Shard) -> Bytes {
    let bytes = payload.len() / usize::from(shard.count);
    let start = bytes * usize::from(shard.index);
    payload.slice(start..start + bytes)
}

/// Bytes that differ between keys, generations and places.
fn payload(key: &BlockKey, generation: u64, bytes: usize) -> Bytes {
    let seed =
        key.as_bytes().iter().fold(generation, |seed, byte| seed.wrapping_mul(257).wrapping_add(u64::from(*byte)));
    let words = (0..bytes.div_ceil(8) as u64).flat_map(|place| mixed(seed ^ mixed(place)).to_le_bytes());
    words.take(bytes).collect::<Vec<u8>>().into()
}

fn mixed(number: u64) -> u64 {
    tender_client::proto::sum::mix(number.wrapping_add(tender_client::proto::sum::GOLDEN))
}
