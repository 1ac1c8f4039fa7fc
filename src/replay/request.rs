//! One request as an engine would serve it: get what is there, compare every byte, compute the rest, put it.

use std::time::Instant;

use tender_client::proto::{BlockKey, Shard};
use tender_client::{BlockStore, BlockView, GetEnd, Put, PutOutcome, Tier};

use super::payload::{Buffers, Payload};
use super::tally::Tally;

/// Most bytes in one get or put: what a request holds in memory, once as it comes and once to compare.
const WINDOW_BYTES_MAX: usize = 32 << 20;

/// Wrong blocks described one by one, per request.
const WRONG_SHOWN_MAX: usize = 4;

/// What became of a request.
#[derive(Clone, Debug, Default)]
pub struct Served {
    /// Counts.
    pub tally: Tally,
    /// Time spent waiting for gets, in microseconds.
    pub get_us: u64,
    /// The first blocks that came with wrong bytes, in words.
    pub wrong: Vec<String>,
}

impl Served {
    fn add_wrong(&mut self, key: &BlockKey, view: &BlockView, expected: &[u8]) {
        let came = view.to_vec();
        let length = came.len().max(expected.len());
        let mut differing = (0..length).filter(|i| came.get(*i) != expected.get(*i));
        let first = differing.next().unwrap_or_default();
        self.tally.wrong_blocks += 1;
        self.tally.wrong_bytes += 1 + differing.count() as u64;
        if self.wrong.len() < WRONG_SHOWN_MAX {
            let (tier, came_bytes, expected_bytes) = (tier_name(view.tier()), came.len(), expected.len());
            self.wrong.push(format!(
                "block {key} from {tier}: {came_bytes} of {expected_bytes} bytes came, the first wrong one is byte {first}"
            ));
        }
    }
}

/// A store and what is needed to make and judge its blocks.
#[derive(Debug)]
pub struct Server<S> {
    store: S,
    payload: Payload,
    buffers: Buffers,
    window_blocks: usize,
}

impl<S: BlockStore> Server<S> {
    /// Serves requests from a store; blocks get the payload of `generation`.
    pub fn new(store: S, generation: u64) -> Self {
        let terms = store.terms();
        let block_bytes = terms.shard_bytes(1);
        let window_blocks = (WINDOW_BYTES_MAX / block_bytes.max(1)).clamp(1, terms.keys_max.max(1));
        Self { payload: Payload::new(generation), buffers: Buffers::new(block_bytes), window_blocks, store }
    }

    /// The store, for its end.
    pub fn into_store(self) -> S {
        self.store
    }

    /// The store.
    pub fn store(&self) -> &S {
        &self.store
    }

    /// Serves one request whose prompt has these blocks.
    pub async fn serve(&self, keys: &[BlockKey], input_tokens: u64) -> Served {
        let mut served = Served::default();
        served.tally.requests = 1;
        served.tally.blocks = keys.len() as u64;
        served.tally.input_tokens = input_tokens;
        let found = self.get(keys, &mut served).await;
        self.put(keys, found, &mut served.tally).await;
        let tally = &mut served.tally;
        tally.miss_blocks = tally.blocks - tally.hit_blocks();
        let block_tokens = u64::from(self.store.terms().attach.namespace.block_tokens);
        tally.tokens_saved = (tally.hit_blocks() * block_tokens).min(input_tokens);
        served
    }

    /// Gets blocks from the first on while there are some; tells how many came, and right.
    async fn get(&self, keys: &[BlockKey], served: &mut Served) -> usize {
        let mut found = 0;
        while found < keys.len() {
            let window = &keys[found..keys.len().min(found + self.window_blocks)];
            let asked = Instant::now();
            let got = self.store.get(window, Shard::WHOLE).await;
            served.get_us += asked.elapsed().as_micros() as u64;
            served.tally.ended(got.end);
            let right = self.compare(window, &got.blocks, served);
            found += right;
            if got.end != GetEnd::Complete || right < window.len() {
                break;
            }
        }
        found
    }

    /// Compares all that came. Counts, and tells, the blocks up to the first wrong one: what follows it is of no use to an engine.
    fn compare(&self, keys: &[BlockKey], views: &[BlockView], served: &mut Served) -> usize {
        let mut expected = self.buffers.take();
        let (mut right, wrong_before) = (0, served.tally.wrong_blocks);
        for (key, view) in keys.iter().zip(views) {
            served.tally.got_bytes += view.len() as u64;
            self.payload.fill(key, &mut expected);
            if !view.equals(&expected) {
                served.add_wrong(key, view, &expected);
            } else if served.tally.wrong_blocks == wrong_before {
                served.tally.hit(view.tier());
                right += 1;
            }
        }
        self.buffers.put_back(expected);
        right
    }

    /// Puts the blocks after the first `present`, until the store takes no more.
    async fn put(&self, keys: &[BlockKey], present: usize, tally: &mut Tally) {
        let mut next = present;
        while next < keys.len() {
            let window = &keys[next..keys.len().min(next + self.window_blocks)];
            let parent = next.checked_sub(1).map_or(self.store.terms().root, |before| keys[before]);
            let mut payloads = Vec::with_capacity(window.len());
            for key in window {
                let mut payload = self.buffers.take();
                self.payload.fill(key, &mut payload);
                payloads.push(payload.freeze());
            }
            let put = Put { parent, keys: window, shard: Shard::WHOLE, payloads: &payloads, tokens: &[] };
            let outcomes = self.store.put(put).await;
            self.buffers.put_back_read(payloads);
            next += window.len();
            outcomes.iter().for_each(|outcome| tally.put(*outcome));
            let stored = outcomes.iter().filter(|outcome| **outcome == PutOutcome::Stored).count();
            tally.put_bytes += (stored * self.buffers.block_bytes()) as u64;
            // Somebody else's block will be there in a moment; after one that nobody stores the rest could not be found.
            if !outcomes.iter().all(|outcome| outcome.is_there() || *outcome == PutOutcome::BeingWritten) {
                break;
            }
        }
        tally.put_unsent_blocks += (keys.len() - next) as u64;
    }
}

/// A tier's name, for people and in JSON.
pub fn tier_name(tier: Tier) -> &'static str {
    match tier {
        Tier::Host => "host",
        Tier::Disk => "disk",
        Tier::Peer => "peer",
        Tier::Object => "object",
    }
}

#[cfg(test)]
mod tests {
    use tender_client::proto::{BlockLayout, Namespace};
    use tender_client::{Attach, InMemory};

    use super::*;

    const BLOCK_BYTES: u64 = 4096;

    fn store() -> InMemory {
        InMemory::new(Attach {
            group: "test".to_owned(),
            member: String::new(),
            namespace: Namespace::text("model", "u8", 16),
            layout: BlockLayout::opaque(BLOCK_BYTES),
        })
    }

    fn chain(store: &InMemory, blocks: u32) -> Vec<BlockKey> {
        store.terms().chain(&(0..blocks * 16).collect::<Vec<_>>())
    }

    #[tokio::test]
    async fn what_is_missing_is_put_and_found_by_the_next_request() {
        let server = Server::new(store(), 1);
        let keys = chain(server.store(), 10);
        let first = server.serve(&keys[..6], 6 * 16).await.tally;
        assert_eq!((first.blocks, first.hit_blocks(), first.miss_blocks, first.put_stored_blocks), (6, 0, 6, 6));
        let second = server.serve(&keys, 10 * 16 + 3).await.tally;
        assert_eq!((second.hit_blocks_host, second.miss_blocks, second.put_stored_blocks), (6, 4, 4));
        assert_eq!((second.tokens_saved, second.got_bytes), (96, 6 * BLOCK_BYTES));
        let third = server.serve(&keys, 150).await.tally;
        assert_eq!((third.hit_blocks(), third.tokens_saved, third.wrong_blocks), (10, 150, 0));
    }

    #[tokio::test]
    async fn a_prompt_larger_than_a_window_goes_in_several() {
        let server = Server { window_blocks: 4, ..Server::new(store(), 1) };
        let keys = chain(server.store(), 11);
        assert_eq!(server.serve(&keys, 176).await.tally.put_stored_blocks, 11);
        assert_eq!(server.serve(&keys, 176).await.tally.hit_blocks(), 11);
    }

    #[tokio::test]
    async fn wrong_bytes_are_found_counted_and_never_taken_for_hits() {
        let store = store();
        let keys = chain(&store, 5);
        let other = Server::new(store.clone(), 2);
        other.serve(&keys[..3], 48).await;
        let served = Server::new(store, 1).serve(&keys, 80).await;
        let tally = served.tally;
        assert_eq!((tally.hit_blocks(), tally.miss_blocks, tally.wrong_blocks, tally.tokens_saved), (0, 5, 3, 0));
        assert!((2 * BLOCK_BYTES..=3 * BLOCK_BYTES).contains(&tally.wrong_bytes), "{}", tally.wrong_bytes);
        assert_eq!(served.wrong.len(), 3);
        assert!(served.wrong[0].contains(&keys[0].to_string()), "{}", served.wrong[0]);
    }

    #[tokio::test]
    async fn nothing_is_offered_after_a_block_that_nobody_took() {
        let attach = store().terms().attach.clone();
        let server = Server { window_blocks: 2, ..Server::new(InMemory::with_capacity(attach, 0), 1) };
        let keys = chain(server.store(), 6);
        let tally = server.serve(&keys, 96).await.tally;
        assert_eq!((tally.put_stored_blocks, tally.put_no_room_blocks, tally.put_unsent_blocks), (0, 2, 4));
    }
}
