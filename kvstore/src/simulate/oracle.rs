//! What may be read, what must survive, what lookups should say: a plain map.

use std::collections::{BTreeMap, HashMap};

use tender_proto::{BlockKey, Shard};

use super::payload::{self, Version};
use super::scenario::Space;
use crate::names::Place;
use crate::verb::Residency;

/// A block as the world names it: space, then place in its keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Block {
    pub(super) space: usize,
    pub(super) at: usize,
}

#[derive(Clone, Debug, Default)]
struct Known {
    /// What was committed, each with the step of its last commit.
    versions: BTreeMap<Version, u64>,
    /// What was purged, each with the step of the answer: who asked before may still be given it.
    gone: BTreeMap<Version, u64>,
    /// In which tiers it is, as the events told.
    present: [bool; 2],
    /// Acknowledged as durable, and on disk ever since.
    durable: bool,
}

/// Everything that is known of all blocks.
#[derive(Debug)]
pub(super) struct Oracle {
    /// Disks may lose the writes that make a purge last.
    lossy: bool,
    blocks: Vec<Vec<Known>>,
    names: HashMap<([u8; 16], BlockKey), Block>,
}

impl Oracle {
    pub(super) fn new(spaces: &[Space], lossy: bool) -> Self {
        let blocks = spaces.iter().map(|space| vec![Known::default(); space.keys.len()]).collect();
        let names = spaces.iter().enumerate().flat_map(|(number, space)| {
            let keys = space.keys.iter().enumerate();
            keys.map(move |(at, key)| ((space.root.tag(), *key), Block { space: number, at }))
        });
        Self { lossy, blocks, names: names.collect() }
    }

    fn known(&mut self, block: Block) -> &mut Known {
        &mut self.blocks[block.space][block.at]
    }

    fn get(&self, block: Block) -> &Known {
        &self.blocks[block.space][block.at]
    }

    /// Which block of the world an event is about.
    pub(super) fn named(&self, event: &Residency) -> Block {
        let block = self.names.get(&(event.namespace, event.key));
        *block.unwrap_or_else(|| panic!("an event about a block that nobody ever put: {event:?}"))
    }

    /// A shard of it was committed.
    pub(super) fn committed(&mut self, block: Block, version: Version, step: u64) {
        self.known(block).versions.insert(version, step);
    }

    /// A purge that was asked for at that step was answered: whatever was committed before must never be seen again.
    pub(super) fn purged(&mut self, block: Block, asked_step: u64, step: u64) {
        let known = self.known(block);
        let (kept, gone) = std::mem::take(&mut known.versions)
            .into_iter()
            .partition::<BTreeMap<_, _>, _>(|(_, committed_step)| *committed_step > asked_step);
        known.versions = kept;
        known.gone.extend(gone.into_keys().map(|version| (version, step)));
        known.durable = false;
    }

    /// An event; events of one tier come and go in turn.
    pub(super) fn told(&mut self, event: &Residency) -> Block {
        let block = self.named(event);
        let known = self.known(block);
        let present = &mut known.present[event.place.at()];
        assert_ne!(*present, event.present, "{block:?} came twice, or left without having come: {event:?}");
        *present = event.present;
        if event.place == Place::Disk && !event.present {
            known.durable = false;
        }
        block
    }

    pub(super) fn is_present(&self, block: Block, place: Place) -> bool {
        self.get(block).present[place.at()]
    }

    /// Whether anything that was put of it could still be there.
    pub(super) fn may_be_present(&self, block: Block) -> bool {
        !self.get(block).versions.is_empty()
    }

    /// The daemon said that it would survive.
    pub(super) fn acknowledged(&mut self, block: Block) {
        let known = self.known(block);
        assert!(known.present[Place::Disk.at()], "{block:?} is called durable and is not on disk");
        known.durable = true;
    }

    /// The daemon is gone: nothing is present before recovery says so. Returns what must be found again.
    pub(super) fn restarted(&mut self) -> Vec<Block> {
        let mut durable = Vec::new();
        for (space, blocks) in self.blocks.iter_mut().enumerate() {
            for (at, known) in blocks.iter_mut().enumerate() {
                known.present = [false; 2];
                if std::mem::take(&mut known.durable) {
                    durable.push(Block { space, at });
                }
            }
        }
        durable
    }

    /// All that is present, of all tenants.
    pub(super) fn present(&self) -> Vec<(Block, Place)> {
        let mut present = Vec::new();
        for (space, blocks) in self.blocks.iter().enumerate() {
            for (at, known) in blocks.iter().enumerate() {
                let places = [Place::Host, Place::Disk].into_iter().filter(|place| known.present[place.at()]);
                present.extend(places.map(|place| (Block { space, at }, place)));
            }
        }
        present
    }

    /// The version that these bytes are, for somebody who asked for them at that step.
    ///
    /// # Panics
    /// When they are none that may be read.
    pub(super) fn recognise(
        &self,
        block: Block,
        key: &BlockKey,
        shard: Shard,
        bytes: &[u8],
        asked_step: u64,
    ) -> Version {
        let Known { versions, gone, .. } = self.get(block);
        let gone_since = gone.iter().filter(|(_, step)| self.lossy || **step > asked_step).map(|(version, _)| version);
        let mut allowed = versions.keys().chain(gone_since);
        let found = allowed.find(|version| payload::bytes(key, **version, shard, bytes.len()) == bytes);
        *found.unwrap_or_else(|| {
            let start = &bytes[..16.min(bytes.len())];
            panic!("shard {shard} of {block:?} holds {start:02x?}…, which is none of {versions:?}, nor purged since: {gone:?}")
        })
    }
}
