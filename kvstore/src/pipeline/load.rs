//! Disk to host: one load per block, shared by all who wait for it.

use tender_proto::sum;

use super::{Action, Actions, Core, Job};
use crate::completion::Load;
use crate::limits;
use crate::names::{GroupId, NodeId, Place, RequestId, SlotId};
use crate::tier::host::records::SlotUse;
use crate::tier::slab::{Owner, SlotState};
use crate::transfer::lanes::Lane;
use crate::transfer::{Expected, Outcome, Transfer};
use crate::verb::AcquireEnd;

use super::put::shard_of;

/// The daemon itself, as holder of slots that it loads.
const DAEMON: GroupId = GroupId(0);

impl Core {
    /// Whether the layout of the copy on disk is known: somebody has attached, or the copy in host memory has the same shards.
    pub(super) fn is_loadable(&self, node: NodeId) -> bool {
        let first = self.index.node(node).copy(Place::Disk);
        first.is_some_and(|first| self.shape(node, self.disk().tier.slab.slot(first).shard_count).is_some())
    }

    /// Begins to load a block that is on disk, or joins a load under way.
    pub(super) fn load(&mut self, node: NodeId, lane: Lane, waiter: (RequestId, Option<usize>)) -> Result<(), ()> {
        if let Some(load) = self.loads.get_mut(&node) {
            load.waiters.push(waiter);
            if lane == Lane::Demand {
                for (file, transfer) in load.transfers.clone() {
                    if self.lanes[file as usize].promote(transfer)
                        && let Some((_, lane, _)) = self.jobs.get_mut(&transfer)
                    {
                        *lane = Lane::Demand;
                    }
                }
            }
            return Ok(());
        }
        // A copy that was given up meanwhile ends first: its slots are the block's filling.
        if self.loads.len() >= limits::LOADS_MAX || self.ingest.is_copying(node) {
            return Err(());
        }
        let parts = self.load_slots(node)?;
        let mut load =
            Load { parts_left: parts.len(), failed: false, cancelled: false, waiters: vec![waiter], transfers: vec![] };
        for (disk_slot, host_slot) in parts {
            let transfer = self.load_part(node, disk_slot, host_slot);
            let job = Job::Load { node, host: host_slot, disk: disk_slot };
            let file = self.disk().slot_place(disk_slot).file;
            load.transfers.push((file, self.queue(file, lane, transfer, job)));
        }
        self.loads.insert(node, load);
        Ok(())
    }

    /// A slot of host memory for each shard of the copy on disk, linked as the block's filling; none if one cannot be had.
    fn load_slots(&mut self, node: NodeId) -> Result<Vec<(SlotId, SlotId)>, ()> {
        let first = self.index.node(node).copy(Place::Disk).ok_or(())?;
        let disk_slots: Vec<SlotId> = self.disk().tier.slab.chain(first).collect();
        // Reading protects them from the search for victims that follows.
        for &slot in &disk_slots {
            self.read(Place::Disk, slot);
        }
        let mut host_slots: Vec<SlotId> = Vec::new();
        for &slot in &disk_slots {
            let slab = &self.disk().tier.slab;
            let (record, Owner { tenant, slot_bytes, .. }) = (slab.slot(slot), slab.owner(slab.shelf_of(slot)));
            let shard = (record.shard_index, record.shard_count);
            match self.allocate(Place::Host, Owner::shared(tenant, slot_bytes), node, DAEMON, shard) {
                Ok(slot) => host_slots.push(slot),
                Err(_) => break,
            }
        }
        if host_slots.len() < disk_slots.len() {
            for slot in host_slots {
                self.give_back(Place::Host, slot);
            }
            for slot in disk_slots {
                self.unread(Place::Disk, slot);
            }
            return Err(());
        }
        for (&slot, next) in host_slots.iter().zip(host_slots.iter().skip(1).chain([&SlotId::NONE])) {
            self.host.tier.slab.slot_mut(slot).next = *next;
        }
        self.record_use(&host_slots, SlotUse::Loading);
        self.index.set_filling(node, host_slots[0]);
        Ok(disk_slots.into_iter().zip(host_slots).collect())
    }

    fn load_part(&self, node: NodeId, disk_slot: SlotId, host_slot: SlotId) -> Transfer {
        let record = *self.disk().tier.slab.slot(disk_slot);
        let shard = shard_of(record.shard_index, record.shard_count);
        let shape =
            self.shape(node, record.shard_count).expect("the daemon loads what is attached to, or in host memory");
        let expected = Expected {
            seed: sum::seed(&self.index.node(node).key, shard, shape.layout),
            root: record.root,
            payload_bytes: shape.payload_bytes,
        };
        let into = self.host.extent(host_slot);
        // Bytes written under a layout of another size can only fail their sum; they must not overrun the slot on the way there.
        let expected = Expected { payload_bytes: expected.payload_bytes.min(into.bytes), ..expected };
        let is_private = !self.disk().is_sure(disk_slot);
        Transfer::Load { offset: self.disk().slot_place(disk_slot).offset, into, expected, is_private }
    }

    pub(super) fn load_done(
        &mut self,
        (node, host_slot, disk_slot): (NodeId, SlotId, SlotId),
        outcome: Outcome,
        actions: &mut Actions,
    ) {
        let bytes = u64::from(self.host.tier.slab.slot_bytes(host_slot));
        let (failed, is_bad) = match outcome {
            Outcome::Done(sums) => {
                self.counters.load_bytes += bytes;
                self.disk_mut().succeeded();
                self.host.set_sums(host_slot, &sums);
                self.disk_mut().verified(disk_slot);
                self.host.tier.slab.slot_mut(host_slot).root = self.disk().tier.slab.slot(disk_slot).root;
                (false, false)
            }
            Outcome::Mismatch => {
                self.counters.sum_mismatches += 1;
                actions.push(Action::Warn(
                    "a block read from disk is not what was written: a miss, and its slot is retired".to_owned(),
                ));
                (true, true)
            }
            Outcome::Failed(fault) => {
                self.counters.load_failures += 1;
                // The copy stays: what the disk refuses now it may give later.
                self.disk_failed(&format!("a read failed ({fault:?})"), actions);
                (true, false)
            }
        };
        self.unread(Place::Disk, disk_slot);
        let load = self.loads.get_mut(&node).expect("a load's transfers end before it does");
        load.parts_left -= 1;
        load.failed |= failed;
        let (last, cancelled) = (load.parts_left == 0, load.cancelled);
        if is_bad && !cancelled && self.index.node(node).copy(Place::Disk).is_some() {
            self.drop_bad_copy(node, disk_slot);
        }
        if last {
            self.load_ended(node, actions);
        }
    }

    /// A copy on disk that is not what was written is of no use; its slot is not used again before its segment is.
    fn drop_bad_copy(&mut self, node: NodeId, bad: SlotId) {
        let slots = self.withdraw(node, Place::Disk);
        for slot in slots {
            let readers = self.disk().tier.slab.slot(slot).readers;
            if slot == bad && readers == 0 {
                self.disk_mut().directory.mark(slot);
                if let Some(segment) = self.disk_mut().tier.quarantine(slot) {
                    self.segment_retired(Place::Disk, segment);
                }
            } else {
                self.give_back(Place::Disk, slot);
            }
        }
    }

    fn load_ended(&mut self, node: NodeId, actions: &mut Actions) {
        let load = self.loads.remove(&node).expect("it just ended");
        let slots: Vec<SlotId> = self.host.tier.slab.chain(self.index.node(node).filling).collect();
        let ok = !load.failed && !load.cancelled;
        // Of a block that is in host memory, since before a restart, it was only asked whether the copy on disk is what was written.
        if ok && self.index.node(node).copy(Place::Host).is_none() {
            for &slot in &slots {
                self.host.tier.slab.slot_mut(slot).state = SlotState::Resident;
                self.record_resident(slot);
            }
            let shelf = self.host.tier.slab.shelf_of(slots[0]);
            let block_bytes = self.block_bytes(node);
            self.index.publish(node, Place::Host, slots[0], shelf, block_bytes, self.now_ms);
            self.index.set_filling(node, SlotId::NONE);
        } else {
            for slot in slots {
                self.give_back(Place::Host, slot);
            }
            self.index.set_filling(node, SlotId::NONE);
        }
        // Who wants to read comes first: a prefetch goes on to its next block and may evict this one.
        let (readers, prefetches): (Vec<_>, Vec<_>) = load.waiters.into_iter().partition(|(_, at)| at.is_some());
        for (request, at) in readers.into_iter().chain(prefetches) {
            match at {
                Some(at) => {
                    let arrived = if ok { Ok((node, Place::Disk)) } else { Err(AcquireEnd::Miss) };
                    self.acquire_arrived(request, at, arrived, actions);
                }
                None => {
                    self.durable_part_ended(request);
                    self.prefetch_arrived(request, ok, actions);
                }
            }
        }
    }
}
