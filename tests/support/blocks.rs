//! Runs of blocks whose bytes follow from their keys, so that whatever is served can be told right from wrong.

use bytes::Bytes;
use tender_client::proto::sum::{GOLDEN, mix};
use tender_client::proto::{BlockKey, BlockLayout, Namespace, Shard};
use tender_client::{Attach, BlockStore, BlockView, GetEnd, Put, PutOutcome, Tier};

pub const BLOCK_TOKENS: u32 = 4;

/// An attach under the namespace of a model, in a group of the same name.
pub fn attach_to(model: &str, layout: BlockLayout) -> Attach {
    Attach {
        group: model.to_owned(),
        member: "test".to_owned(),
        namespace: Namespace::text(model, "bf16", BLOCK_TOKENS),
        layout,
    }
}

/// The bytes of a block.
pub fn payload(key: &BlockKey, bytes: usize) -> Bytes {
    let seed = key.as_bytes().iter().fold(7u64, |seed, byte| mix(seed ^ u64::from(*byte)));
    let words =
        (0..bytes.div_ceil(8) as u64).flat_map(|i| mix(seed.wrapping_add(i.wrapping_mul(GOLDEN))).to_le_bytes());
    words.take(bytes).collect::<Vec<u8>>().into()
}

/// A run of blocks from the root on.
#[derive(Clone, Debug)]
pub struct Run {
    pub parent: BlockKey,
    pub tokens: Vec<u32>,
    pub keys: Vec<BlockKey>,
    block_bytes: usize,
}

impl Run {
    /// Runs of different `seed` share no block.
    pub fn new(store: &impl BlockStore, seed: u32, blocks: usize) -> Self {
        let terms = store.terms();
        Self::under(terms.root, seed, blocks, terms.shard_bytes(1))
    }

    /// The same run, by the root of a namespace.
    pub fn under(root: BlockKey, seed: u32, blocks: usize, block_bytes: usize) -> Self {
        let count = blocks as u32 * BLOCK_TOKENS;
        let tokens: Vec<u32> = (0..count).map(|token| seed.wrapping_mul(0x9e37_79b9).wrapping_add(token)).collect();
        Self { parent: root, keys: root.chain(&tokens, BLOCK_TOKENS), tokens, block_bytes }
    }

    pub fn payload(&self, block: usize) -> Bytes {
        payload(&self.keys[block], self.block_bytes)
    }

    /// Whether these are its blocks, from the first on, byte for byte.
    pub fn equals(&self, views: &[BlockView]) -> bool {
        views.iter().enumerate().all(|(block, view)| view.equals(&self.payload(block)))
    }

    /// Puts all shards of all blocks, of `count` each; what became of the last shard.
    pub async fn put_in(&self, store: &impl BlockStore, count: u16) -> Vec<PutOutcome> {
        let whole: Vec<Bytes> = (0..self.keys.len()).map(|block| self.payload(block)).collect();
        let shard_bytes = self.block_bytes / usize::from(count);
        let mut outcomes = Vec::new();
        for index in 0..count {
            let start = shard_bytes * usize::from(index);
            let payloads: Vec<Bytes> = whole.iter().map(|whole| whole.slice(start..start + shard_bytes)).collect();
            let (parent, keys, shard) = (self.parent, &self.keys[..], Shard { index, count });
            outcomes = store.put(Put { parent, keys, shard, payloads: &payloads, tokens: &self.tokens }).await;
        }
        outcomes
    }

    /// Puts, and insists that all of it is stored.
    pub async fn put(&self, store: &impl BlockStore) {
        let outcomes = self.put_in(store, 1).await;
        assert!(outcomes.iter().all(|outcome| *outcome == PutOutcome::Stored), "{outcomes:?}");
    }

    /// Puts, and insists that all of it is stored and would survive a crash.
    pub async fn put_durably(&self, store: &impl BlockStore) {
        self.put(store).await;
        let durable = store.durable(&self.keys).await;
        assert!(durable.iter().all(|durable| *durable), "{durable:?}");
    }

    /// Gets, and insists that all of it comes right, and from `tier` if one is named.
    pub async fn expect(&self, store: &impl BlockStore, tier: Option<Tier>) {
        let got = store.get(&self.keys, Shard::WHOLE).await;
        assert_eq!((got.end, got.blocks.len()), (GetEnd::Complete, self.keys.len()));
        for (index, block) in got.blocks.iter().enumerate() {
            assert!(block.equals(&self.payload(index)), "block {index} came with other bytes than were put");
            assert!(tier.is_none_or(|tier| tier == block.tier()), "block {index} came from {:?}", block.tier());
        }
    }

    /// Gets each block by itself: which of them are there. None may be wrong.
    pub async fn present(&self, store: &impl BlockStore) -> Vec<bool> {
        let mut present = Vec::new();
        for (index, key) in self.keys.iter().enumerate() {
            let got = store.get(std::slice::from_ref(key), Shard::WHOLE).await;
            assert!(matches!(got.end, GetEnd::Complete | GetEnd::Miss), "block {index}: {:?}", got.end);
            if let Some(block) = got.blocks.first() {
                assert!(block.equals(&self.payload(index)), "block {index} came with other bytes than were put");
            }
            present.push(got.end == GetEnd::Complete);
        }
        present
    }

    /// Insists that no block is there.
    pub async fn expect_nothing(&self, store: &impl BlockStore) {
        let found = store.lookup(&self.keys).await;
        assert!(!found.host.contains(&true) && !found.disk.contains(&true), "{found:?}");
        assert!(!self.present(store).await.contains(&true));
    }
}
