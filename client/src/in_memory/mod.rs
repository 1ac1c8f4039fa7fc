//! A small store in this process: for tests, for an engine without a daemon, and as the oracle that others are compared with.
//!
//! What it does is in [`blocks`] (who is present, who goes first) and [`residency`] (who is told); this file is the
//! [`BlockStore`] over both. One lock around everything, no I/O, nothing survives the process.

mod blocks;
mod residency;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tender_proto::{BlockKey, Shard, TenantSalt};

use self::blocks::{Blocks, Scope};
use crate::{
    Attach, BlockStore, BlockView, GetEnd, Got, Lookup, Position, Prefetched, Purge, Purged, Put, PutOutcome, Terms,
    Tier, Watch,
};

/// A store in this process. Clones are further clients of the same store.
#[derive(Clone, Debug)]
pub struct InMemory {
    terms: Arc<Terms>,
    scope: Scope,
    blocks: Arc<Mutex<Blocks>>,
}

impl InMemory {
    /// An empty store without a limit.
    pub fn new(attach: Attach) -> Self {
        Self::with_capacity(attach, u64::MAX)
    }

    /// An empty store that holds at most `bytes` of payload, and lets the least recently used leaf go for a new block.
    pub fn with_capacity(attach: Attach, bytes: u64) -> Self {
        Self::over(attach, Arc::new(Mutex::new(Blocks::new(bytes))))
    }

    /// Another client of the same store, under another namespace or layout perhaps.
    pub fn attach(&self, attach: Attach) -> Self {
        Self::over(attach, Arc::clone(&self.blocks))
    }

    fn over(attach: Attach, blocks: Arc<Mutex<Blocks>>) -> Self {
        let salt = TenantSalt::of_tenant(b"", "in-memory");
        let root = attach.namespace.root(&salt);
        let scope = Scope { namespace: root.tag(), layout: attach.layout };
        let terms = Terms { attach, tenant: "in-memory".to_owned(), salt, root, keys_max: usize::MAX };
        Self { terms: Arc::new(terms), scope, blocks }
    }

    fn blocks(&self) -> MutexGuard<'_, Blocks> {
        // A caller that panicked in its progress callback held no lock; and every change below leaves the store whole.
        self.blocks.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl BlockStore for InMemory {
    fn terms(&self) -> &Terms {
        &self.terms
    }

    async fn lookup(&self, keys: &[BlockKey]) -> Lookup {
        let blocks = self.blocks();
        let host: Vec<bool> = keys.iter().map(|key| blocks.is_present(&self.scope, key)).collect();
        let prefix_blocks = host.iter().take_while(|present| **present).count();
        Lookup { prefix_blocks, host, disk: vec![false; keys.len()] }
    }

    async fn put(&self, put: Put<'_>) -> Vec<PutOutcome> {
        let shard = match put.check(&self.terms) {
            Ok(shard) => shard,
            Err(fault) => return put.refused(&fault),
        };
        let mut blocks = self.blocks();
        let parents = std::iter::once(&put.parent).chain(put.keys);
        let run = put.keys.iter().zip(parents).zip(put.payloads).enumerate();
        run.map(|(index, ((key, parent), payload))| {
            let ancestors = &put.keys[..index];
            blocks.put(&self.scope, key, parent, ancestors, shard, payload)
        })
        .collect()
    }

    async fn get(&self, keys: &[BlockKey], shard: Shard) -> Got {
        let layout = &self.scope.layout;
        let shard = match layout.shard(shard.index.into(), shard.count.into()) {
            Ok(shard) => shard,
            Err(fault) => return Got::refused(&fault),
        };
        let bytes = layout.shard_bytes(shard.count) as usize;
        let start = bytes * usize::from(shard.index);
        let found: Vec<BlockView> = {
            let mut blocks = self.blocks();
            let whole = blocks.get(&self.scope, keys);
            whole.into_iter().map(|block| BlockView::new(Tier::Host, block.slice(start..start + bytes))).collect()
        };
        let end = if found.len() == keys.len() { GetEnd::Complete } else { GetEnd::Miss };
        Got { blocks: found, end }
    }

    async fn prefetch(&self, keys: &[BlockKey], mut progress: impl FnMut(&Prefetched) + Send) -> Prefetched {
        let resident_blocks = {
            let blocks = self.blocks();
            keys.iter().filter(|key| blocks.is_present(&self.scope, key)).count()
        };
        let missing_blocks = keys.len() - resident_blocks;
        let prefetched = Prefetched { resident_blocks, missing_blocks, ..Prefetched::default() };
        progress(&prefetched);
        prefetched
    }

    async fn durable(&self, keys: &[BlockKey]) -> Vec<bool> {
        vec![false; keys.len()]
    }

    async fn purge(&self, what: Purge<'_>) -> Purged {
        let mut blocks = self.blocks();
        let purged_blocks = match what {
            Purge::Keys(keys) => blocks.purge_keys(&self.scope, keys),
            Purge::Namespace => blocks.purge_namespace(&self.scope),
        };
        Purged { purged_blocks, busy_blocks: 0, complete: true }
    }

    async fn watch(&self, from: Option<Position>) -> Watch {
        self.blocks().watch(from)
    }
}

#[cfg(test)]
mod tests;
