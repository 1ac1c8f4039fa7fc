//! Memory files of the fake local door, and what its ring answers.

use std::collections::{HashMap, HashSet};
use std::os::fd::OwnedFd;

use bytes::Bytes;
use rustix::fs::MemfdFlags;
use tender_client::proto::door::{
    AcquireEnd, Acquired, Bitmap, CommitOutcome, Extent, Filled, HoldId, LeasedBlock, LeasedPart, Prefetched, Reply,
    Request, ReserveOutcome, Residency,
};
use tender_client::proto::greeting::SHARED_MAPPING;
use tender_client::proto::sum::{self, fragment_sums, seed};
use tender_client::proto::wire::Tier;
use tender_client::proto::{BlockKey, Shard};
use tender_client::{BlockStore, InMemory, Purge, Put, PutOutcome};

use super::local::{Client, FILE_BYTES, Held, Misplaced, OWN_BYTES, THEIR_MAPPING};

const PAGE_BYTES: u64 = 4096;

/// Files that leases lie in: a place is used again when it was given back, after those that were never used.
pub struct Slots {
    pub shared: OwnedFd,
    pub theirs: OwnedFd,
    /// Of attachments whose rings have ended: memory, holds, and the memory's name.
    pub left: HashMap<u64, (OwnedFd, HashSet<u64>, u32)>,
    next: u64,
    free: HashMap<u64, Vec<u64>>,
}

impl Slots {
    pub fn new() -> Self {
        // Nothing at 0, so that a forgotten offset is noticed.
        let (shared, theirs) = (Self::file(FILE_BYTES), Self::file(FILE_BYTES));
        Self { shared, theirs, left: HashMap::new(), next: PAGE_BYTES, free: HashMap::new() }
    }

    pub fn file(bytes: u64) -> OwnedFd {
        let file = rustix::fs::memfd_create(c"fake", MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&file, bytes).unwrap();
        file
    }

    fn take(&mut self, bytes: u64) -> u64 {
        let slot_bytes = bytes.next_multiple_of(PAGE_BYTES);
        if self.next + slot_bytes <= FILE_BYTES {
            self.next += slot_bytes;
            return self.next - slot_bytes;
        }
        self.free.get_mut(&slot_bytes).and_then(Vec::pop).expect("the fake daemon has room")
    }

    /// What was leased is spoilt at once: who still reads it is noticed.
    pub fn free(&mut self, mapping: u32, offset: u64, bytes: u64) {
        write(if mapping == SHARED_MAPPING { &self.shared } else { &self.theirs }, offset, &vec![0xdd; bytes as usize]);
        self.free.entry(bytes.next_multiple_of(PAGE_BYTES)).or_default().push(offset);
    }
}

fn write(file: &OwnedFd, offset: u64, bytes: &[u8]) {
    assert_eq!(rustix::io::pwrite(file, bytes, offset).unwrap(), bytes.len());
}

fn read(file: &OwnedFd, offset: u64, bytes: usize) -> Vec<u8> {
    let mut buffer = vec![0; bytes];
    assert_eq!(rustix::io::pread(file, &mut buffer[..], offset).unwrap(), bytes);
    buffer
}

impl Client {
    pub async fn answer_of(&mut self, store: &InMemory, verb: u16, request: &[u8]) -> Reply {
        match Request::decode(verb, request).unwrap() {
            Request::Reserve { parent, shard, bytes_max: _, keys } => self.reserve(store, parent, shard, &keys).await,
            Request::Commit(filled) => {
                let mut outcomes = Vec::new();
                for filled in filled.iter() {
                    outcomes.push(self.commit(store, filled).await);
                }
                Reply::Committed(outcomes)
            }
            Request::Abort(_) | Request::Release(_) if self.is_busy() => Reply::Busy,
            Request::Abort(holds) => {
                // An abort of what was committed is no fault: the answer to the commit may not have been heard.
                for hold in holds.iter() {
                    self.end(hold.0);
                }
                Reply::Done
            }
            Request::Release(holds) => {
                for hold in holds.iter() {
                    // What an earlier ring granted may have ended with it, or for want of a word.
                    let ended = self.end(hold.0).is_some() || hold.0 < self.first_hold;
                    assert!(ended, "{hold:?} is given back once");
                }
                Reply::Done
            }
            Request::Acquire { keys, .. } => self.acquire(store, &keys).await,
            Request::Lookup(keys) => {
                let found = store.lookup(&keys).await;
                let (host, disk) = (found.host.into_iter().collect(), found.disk.into_iter().collect());
                Reply::Lookup(Residency { prefix_blocks: found.prefix_blocks as u32, host, disk })
            }
            Request::Prefetch(keys) => {
                let done = store.prefetch(&keys, |_| {}).await;
                let (resident, missing) = (done.resident_blocks as u32, done.missing_blocks as u32);
                Reply::Prefetched(Prefetched { resident, loaded: 0, missing, shed: done.shed_blocks as u32 })
            }
            Request::Durable(keys) => Reply::Durable(store.lookup(&keys).await.host.into_iter().collect::<Bitmap>()),
            Request::Purge(keys) => purged(store, Purge::Keys(&keys)).await,
            Request::PurgeNamespace => purged(store, Purge::Namespace).await,
            Request::Confirm(held) if held.is_empty() => {
                let held: Vec<u64> = self.script.lock().unwrap().held.keys().copied().collect();
                let is_unnamed = |hold: &u64| *hold < self.first_hold && !self.confirmed.contains(hold);
                for hold in held.into_iter().filter(is_unnamed).collect::<Vec<_>>() {
                    self.end(hold);
                }
                Reply::Confirmed(Bitmap::default())
            }
            Request::Confirm(held) => {
                self.confirmed.extend(held.iter().map(|held| held.hold.0));
                let script = self.script.lock().unwrap();
                let is_held =
                    |held: &tender_client::proto::door::Held| !script.denies && script.held.contains_key(&held.hold.0);
                Reply::Confirmed(held.iter().map(is_held).collect())
            }
        }
    }

    fn is_busy(&self) -> bool {
        let mut script = self.script.lock().unwrap();
        let is_busy = script.busy > 0;
        script.busy -= usize::from(is_busy);
        is_busy
    }

    async fn reserve(&mut self, store: &InMemory, parent: BlockKey, shard: Shard, keys: &[BlockKey]) -> Reply {
        let bytes = store.terms().shard_bytes(shard.count) as u64;
        let node = std::sync::Arc::clone(&self.node);
        let _turn = node.turn.lock().await;
        let present = store.lookup(keys).await.host;
        let (mut outcomes, mut is_full, mut parent) = (Vec::new(), !self.is_mapped, parent);
        for (key, present) in keys.iter().zip(present) {
            let (budget, used, misnames) = {
                let script = self.script.lock().unwrap();
                (script.ingest_bytes, script.put_bytes, script.misnames)
            };
            let offset = self.own_offset(bytes);
            is_full |= used + bytes > budget || offset + bytes > OWN_BYTES;
            let is_being_written = self.node.writing.lock().unwrap().contains(&(*key, shard));
            outcomes.push(if is_full {
                ReserveOutcome::NoRoom
            } else if present {
                ReserveOutcome::AlreadyPresent
            } else if is_being_written {
                ReserveOutcome::BeingWritten
            } else {
                self.node.writing.lock().unwrap().insert((*key, shard));
                let held = Held { mapping: self.own_mapping, offset, bytes, writing: Some((*key, shard)), parent };
                let hold = HoldId(self.begin(held));
                let segment = if misnames(outcomes.len()) { 4711 } else { self.own_mapping };
                let bytes = bytes.next_multiple_of(PAGE_BYTES) as u32;
                ReserveOutcome::Granted { hold, extent: Extent { segment, offset_bytes: offset, bytes } }
            });
            parent = *key;
        }
        Reply::Reserved(outcomes)
    }

    /// A place of the client's own memory that is reserved by none of its holds.
    fn own_offset(&self, bytes: u64) -> u64 {
        let script = self.script.lock().unwrap();
        let mut taken: Vec<(u64, u64)> = self
            .holds
            .iter()
            .filter_map(|hold| script.held.get(hold))
            .filter(|held| held.mapping == self.own_mapping)
            .map(|held| (held.offset, held.bytes))
            .collect();
        taken.sort_unstable();
        let end = |offset: u64, (start, length): (u64, u64)| {
            if offset + bytes > start { offset.max((start + length).next_multiple_of(PAGE_BYTES)) } else { offset }
        };
        taken.into_iter().fold(PAGE_BYTES, end)
    }

    async fn commit(&mut self, store: &InMemory, filled: &Filled) -> CommitOutcome {
        let node = std::sync::Arc::clone(&self.node);
        let _turn = node.turn.lock().await;
        let Some(held) = self.end(filled.hold.0) else { return CommitOutcome::Gone };
        let (key, shard) = held.writing.expect("a lease is not committed");
        let payload = read(&self.own, held.offset, held.bytes as usize);
        assert_eq!(filled.sums, fragment_sums(&payload), "the sums of what lies there");
        let payloads = [Bytes::from(payload)];
        let put = Put { parent: held.parent, keys: &[key], shard, payloads: &payloads, tokens: &[] };
        match store.put(put).await[0] {
            PutOutcome::Stored => {
                self.node.written.lock().unwrap().insert(key, shard.count);
                CommitOutcome::Stored
            }
            PutOutcome::ShardStored => CommitOutcome::ShardStored,
            _ => CommitOutcome::Gone,
        }
    }

    async fn acquire(&mut self, store: &InMemory, keys: &[BlockKey]) -> Reply {
        let layout = store.terms().attach.layout;
        let block_bytes = layout.block_bytes();
        let got = store.get(keys, Shard::WHOLE).await;
        let mut blocks = Vec::new();
        let mut end = if got.blocks.len() == keys.len() { AcquireEnd::Complete } else { AcquireEnd::Miss };
        for (index, (key, block)) in keys.iter().zip(&got.blocks).enumerate() {
            let (leased, budget, verify, flips, elsewhere) = {
                let script = self.script.lock().unwrap();
                let verify = script.verifies_each;
                (script.leased_bytes, script.budget_bytes, verify, script.flips, script.leases_elsewhere)
            };
            if leased + block_bytes > budget {
                end = AcquireEnd::Budget;
                break;
            }
            let count = self.node.written.lock().unwrap().get(key).copied().unwrap_or(1);
            let bytes = layout.shard_bytes(count);
            let mapping = if elsewhere { THEIR_MAPPING } else { SHARED_MAPPING };
            let block = block.to_vec();
            let parts = block.chunks(bytes as usize).zip(0..).map(|(stored, shard_index)| {
                let shard = Shard { index: shard_index, count };
                let root = sum::payload_root(seed(key, shard, layout.fingerprint()), stored);
                let mut stored = stored.to_vec();
                if flips && index == 1 {
                    stored[bytes as usize / 2] ^= 1;
                }
                let offset = {
                    let mut slots = self.slots.lock().unwrap();
                    let offset = slots.take(bytes);
                    write(if elsewhere { &slots.theirs } else { &slots.shared }, offset, &stored);
                    offset
                };
                let hold = self.begin(Held { mapping, offset, bytes, writing: None, parent: *key });
                let (hold, payload_bytes) = (HoldId(hold), bytes as u32);
                LeasedPart { hold, segment: mapping, payload_bytes, offset_bytes: offset, shard, root }
            });
            let mut parts: Vec<LeasedPart> = parts.collect();
            let misplaces = self.script.lock().unwrap().misplaces;
            if index == 1 {
                match misplaces {
                    Misplaced::Nothing => {}
                    Misplaced::BehindTheEnd => parts[0].offset_bytes = FILE_BYTES - bytes + 1,
                    Misplaced::Length => parts[0].payload_bytes += 1,
                    Misplaced::Shard => parts[0].shard = Shard { index: 1, count: 2 },
                    Misplaced::FewParts => parts[0].shard = Shard { index: 0, count: 2 },
                }
            }
            blocks.push(LeasedBlock { tier: Tier::Disk, verify, parts });
        }
        Reply::Acquired(Acquired { end, blocks })
    }
}

async fn purged(store: &InMemory, what: Purge<'_>) -> Reply {
    let purged = store.purge(what).await;
    Reply::Purged { purged_blocks: purged.purged_blocks, busy_blocks: purged.busy_blocks }
}
