//! Who is present, and who goes first.
//!
//! Shards are gathered per shard count: a rank of a group of 8 and one of a group of 4 may write the same block at the same time, and
//! their bytes never meet in one block; the first set that is whole becomes the block. A block in use as a parent is not let go before
//! its children, so what is present of a chain stays a prefix of it as far as it was one.

use std::collections::hash_map::Entry::Vacant;
use std::collections::{BTreeMap, HashMap, HashSet};

use bytes::{Bytes, BytesMut};
use tender_proto::{BlockKey, BlockLayout, Shard};

use super::residency::Stream;
use crate::{Position, PutOutcome, Residency, Tier, Watch};

/// Whose blocks: of which namespace, with which layout. Blocks of one key in two scopes are two blocks.
#[derive(Clone, Copy, Debug)]
pub(super) struct Scope {
    pub(super) namespace: [u8; 16],
    pub(super) layout: BlockLayout,
}

/// Everything the store holds.
#[derive(Debug)]
pub(super) struct Blocks {
    entries: HashMap<Identity, Entry>,
    /// How many blocks have this one as parent, present or not: a block without is a leaf.
    children: HashMap<Identity, usize>,
    /// From the least recently used on.
    by_use: BTreeMap<u64, Identity>,
    uses: u64,
    used_bytes: u64,
    capacity_bytes: u64,
    stream: Stream,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Identity {
    key: BlockKey,
    namespace: [u8; 16],
    layout: BlockLayout,
}

#[derive(Debug)]
struct Entry {
    parent: BlockKey,
    content: Content,
    last_use: u64,
}

#[derive(Debug)]
enum Content {
    /// Shards that came so far, by their count.
    Gathering(HashMap<u16, Vec<Option<Bytes>>>),
    /// The block in canonical order.
    Whole(Bytes),
}

impl Entry {
    fn bytes(&self) -> u64 {
        let bytes = match &self.content {
            Content::Gathering(sets) => sets.values().flatten().flatten().map(Bytes::len).sum(),
            Content::Whole(block) => block.len(),
        };
        bytes as u64
    }
}

impl Blocks {
    pub(super) fn new(capacity_bytes: u64) -> Self {
        Self {
            entries: HashMap::new(),
            children: HashMap::new(),
            by_use: BTreeMap::new(),
            uses: 0,
            used_bytes: 0,
            capacity_bytes,
            stream: Stream::new(),
        }
    }

    #[cfg(test)]
    pub(super) fn used_bytes(&self) -> u64 {
        self.used_bytes
    }

    pub(super) fn is_present(&self, scope: &Scope, key: &BlockKey) -> bool {
        self.whole(&scope.identity(key)).is_some()
    }

    /// The blocks from the first on.
    pub(super) fn get(&mut self, scope: &Scope, keys: &[BlockKey]) -> Vec<Bytes> {
        let found: Vec<Bytes> = keys.iter().map_while(|key| self.whole(&scope.identity(key)).cloned()).collect();
        // From the last to the first, so that the end of a chain is older than its beginning.
        for key in keys[..found.len()].iter().rev() {
            self.touch(&scope.identity(key));
        }
        found
    }

    /// Takes one shard. `ancestors` are blocks of the same run: making room for a block by dropping what it stands on would be no gain.
    pub(super) fn put(
        &mut self,
        scope: &Scope,
        key: &BlockKey,
        parent: &BlockKey,
        ancestors: &[BlockKey],
        shard: Shard,
        payload: &Bytes,
    ) -> PutOutcome {
        let identity = scope.identity(key);
        if self.has_shard(&identity, shard) {
            self.touch(&identity);
            return PutOutcome::AlreadyPresent;
        }
        let payload_bytes = payload.len() as u64;
        if !self
            .make_room(payload_bytes, || ancestors.iter().chain([key, parent]).map(|key| scope.identity(key)).collect())
        {
            return PutOutcome::NoRoom;
        }
        self.used_bytes += payload_bytes;
        if let Vacant(place) = self.entries.entry(identity) {
            let content = Content::Gathering(HashMap::new());
            place.insert(Entry { parent: *parent, content, last_use: 0 });
            *self.children.entry(scope.identity(parent)).or_default() += 1;
        }
        self.touch(&identity);
        if !self.gather(&identity, shard, payload) {
            return PutOutcome::ShardStored;
        }
        self.announce(&identity, true);
        PutOutcome::Stored
    }

    /// Forgets these blocks; how many of them there were.
    pub(super) fn purge_keys(&mut self, scope: &Scope, keys: &[BlockKey]) -> u64 {
        keys.iter().map(|key| u64::from(self.remove(&scope.identity(key)))).sum()
    }

    /// Forgets everything under the namespace, whatever its layout.
    pub(super) fn purge_namespace(&mut self, scope: &Scope) -> u64 {
        let under = |identity: &&Identity| identity.namespace == scope.namespace;
        let doomed: Vec<Identity> = self.entries.keys().filter(under).copied().collect();
        doomed.iter().map(|identity| u64::from(self.remove(identity))).sum()
    }

    /// A stream of what comes and goes.
    pub(super) fn watch(&mut self, from: Option<Position>) -> Watch {
        let whole = |(identity, entry): (&Identity, &Entry)| match &entry.content {
            Content::Whole(block) => Some(residency(identity, entry, block.len(), true)),
            Content::Gathering(_) => None,
        };
        let present = self.entries.iter().filter_map(whole);
        self.stream.watch(from, present)
    }

    fn whole(&self, identity: &Identity) -> Option<&Bytes> {
        match &self.entries.get(identity)?.content {
            Content::Whole(block) => Some(block),
            Content::Gathering(_) => None,
        }
    }

    fn has_shard(&self, identity: &Identity, shard: Shard) -> bool {
        let Some(entry) = self.entries.get(identity) else { return false };
        match &entry.content {
            Content::Whole(_) => true,
            Content::Gathering(sets) => {
                sets.get(&shard.count).is_some_and(|set| set[usize::from(shard.index)].is_some())
            }
        }
    }

    /// Puts a shard to its set; whether that made the block whole.
    fn gather(&mut self, identity: &Identity, shard: Shard, payload: &Bytes) -> bool {
        let Some(entry) = self.entries.get_mut(identity) else { return false };
        let Content::Gathering(sets) = &mut entry.content else { return false };
        let set = sets.entry(shard.count).or_insert_with(|| vec![None; shard.count.into()]);
        set[usize::from(shard.index)] = Some(payload.clone());
        let Some(shards) = set.iter().cloned().collect::<Option<Vec<Bytes>>>() else { return false };
        let block = match <[Bytes; 1]>::try_from(shards) {
            Ok([whole]) => whole,
            Err(shards) => {
                let mut block = BytesMut::with_capacity(shards.iter().map(Bytes::len).sum());
                shards.iter().for_each(|shard| block.extend_from_slice(shard));
                block.freeze()
            }
        };
        // Sets of other counts that are not whole are of no use any more.
        self.used_bytes -= entry.bytes() - block.len() as u64;
        entry.content = Content::Whole(block);
        true
    }

    fn touch(&mut self, identity: &Identity) {
        let Some(entry) = self.entries.get_mut(identity) else { return };
        self.uses += 1;
        self.by_use.remove(&entry.last_use);
        entry.last_use = self.uses;
        self.by_use.insert(self.uses, *identity);
    }

    /// Lets the least recently used leaves go until `bytes` fit, but none of `kept`.
    fn make_room(&mut self, bytes: u64, kept: impl FnOnce() -> HashSet<Identity>) -> bool {
        if bytes <= self.capacity_bytes - self.used_bytes {
            return true;
        }
        let kept = kept();
        while bytes > self.capacity_bytes - self.used_bytes {
            let is_victim = |identity: &&Identity| !kept.contains(*identity) && !self.children.contains_key(*identity);
            let Some(victim) = self.by_use.values().find(is_victim).copied() else { return false };
            self.remove(&victim);
        }
        true
    }

    fn remove(&mut self, identity: &Identity) -> bool {
        let Some(entry) = self.entries.get(identity) else { return false };
        let (parent, last_use, bytes) = (entry.parent, entry.last_use, entry.bytes());
        if self.whole(identity).is_some() {
            self.announce(identity, false);
        }
        self.entries.remove(identity);
        self.by_use.remove(&last_use);
        self.used_bytes -= bytes;
        let parent = Identity { key: parent, ..*identity };
        if let Some(children) = self.children.get_mut(&parent) {
            *children -= 1;
            if *children == 0 {
                self.children.remove(&parent);
            }
        }
        true
    }

    fn announce(&mut self, identity: &Identity, present: bool) {
        if let Some(entry) = self.entries.get(identity) {
            let change = residency(identity, entry, entry.bytes() as usize, present);
            self.stream.announce(change);
        }
    }
}

impl Scope {
    fn identity(&self, key: &BlockKey) -> Identity {
        Identity { key: *key, namespace: self.namespace, layout: self.layout }
    }
}

fn residency(identity: &Identity, entry: &Entry, bytes: usize, present: bool) -> Residency {
    Residency {
        key: identity.key,
        parent: entry.parent,
        tier: Tier::Host,
        present,
        namespace: identity.namespace,
        block_bytes: u32::try_from(bytes).unwrap_or(u32::MAX),
    }
}
