//! The store that has nothing: what an engine runs with when it is told to run without one, and the proof that it can.

use tender_proto::{BlockKey, Shard, TenantSalt};

use crate::{
    Attach, BlockStore, GetEnd, Got, Lookup, Position, Prefetched, Purge, Purged, Put, PutOutcome, Terms, Watch,
    WatchItem,
};

/// Has nothing and keeps nothing.
#[derive(Clone, Debug)]
pub struct Null {
    terms: Terms,
}

impl Null {
    /// No store, under these terms: keys are derived as with any other.
    pub fn new(attach: Attach) -> Self {
        let salt = TenantSalt::of_tenant(b"", "null");
        let root = attach.namespace.root(&salt);
        Self { terms: Terms { attach, tenant: "null".to_owned(), salt, root, keys_max: usize::MAX } }
    }
}

impl BlockStore for Null {
    fn terms(&self) -> &Terms {
        &self.terms
    }

    async fn lookup(&self, keys: &[BlockKey]) -> Lookup {
        Lookup { prefix_blocks: 0, host: vec![false; keys.len()], disk: vec![false; keys.len()] }
    }

    async fn put(&self, put: Put<'_>) -> Vec<PutOutcome> {
        match put.check(&self.terms) {
            Ok(_) => vec![PutOutcome::NoRoom; put.keys.len()],
            Err(fault) => put.refused(&fault),
        }
    }

    async fn get(&self, keys: &[BlockKey], _: Shard) -> Got {
        let end = if keys.is_empty() { GetEnd::Complete } else { GetEnd::Miss };
        Got { blocks: Vec::new(), end }
    }

    async fn prefetch(&self, keys: &[BlockKey], mut progress: impl FnMut(&Prefetched) + Send) -> Prefetched {
        let nothing = Prefetched { missing_blocks: keys.len(), ..Prefetched::default() };
        progress(&nothing);
        nothing
    }

    async fn durable(&self, keys: &[BlockKey]) -> Vec<bool> {
        vec![false; keys.len()]
    }

    async fn purge(&self, _: Purge<'_>) -> Purged {
        Purged { complete: true, ..Purged::default() }
    }

    async fn watch(&self, _: Option<Position>) -> Watch {
        Watch::silent_after([WatchItem::Reset, WatchItem::Synced(Position { epoch: 0, sequence: 0 })])
    }
}
