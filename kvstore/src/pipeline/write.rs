//! Host to disk: write-back in the background, the directory, and durability.

use tender_proto::BlockKey;

use super::record::Shape;
use super::{Action, Actions, Core, Job};
use crate::completion::{DrainWait, DurableWait, Waiting, WriteBack};
use crate::limits;
use crate::names::{AttachmentId, CycleId, GroupId, NodeId, PageName, Place, RequestId, SlotId, TenantId};
use crate::tier::disk::Note;
use crate::tier::disk::directory::{Directory, Step};
use crate::tier::disk::format::{self, DirectoryPage, ENTRIES_PER_PAGE, Entry};
use crate::tier::slab::{Owner, SlotState};
use crate::transfer::lanes::Lane;
use crate::transfer::{Outcome, Transfer, TransferId};
use crate::verb::Reply;

/// Copies on disk that a drain has read at once.
const DRAIN_CHECKS: usize = 32;

impl Core {
    pub(super) fn disk_usable(&self) -> bool {
        self.disk.as_ref().is_some_and(|disk| disk.is_usable(self.now_ms))
    }

    /// Queues a block for write-back; `true` if it is (or was) queued. `wanted` means that somebody waits for it: then it is written
    /// whatever it is worth.
    pub(super) fn write_back(&mut self, node: NodeId, wanted: bool) -> bool {
        if self.index.node(node).writing {
            return true;
        }
        let record = *self.index.node(node);
        let (Some(first), None) = (record.copy(Place::Host), record.copy(Place::Disk)) else { return false };
        if !self.disk_usable() || self.is_ingest(node) {
            return false;
        }
        let host_slots: Vec<SlotId> = self.host.tier.slab.chain(first).collect();
        let bytes: u64 = host_slots.iter().map(|&slot| u64::from(self.host.tier.slab.slot_bytes(slot))).sum();
        let full = self.is_write_back_full(bytes);
        if !wanted && (full || !self.worth.admit(bytes, record.reused, self.now_ms)) {
            self.counters.write_backs_refused += 1;
            return false;
        }
        if wanted {
            self.worth.charge(bytes, self.now_ms);
        }
        // Being read protects the copy from eviction until it is written.
        for &slot in &host_slots {
            self.read(Place::Host, slot);
        }
        let Some(disk_slots) = self.write_back_slots(node, &host_slots) else {
            for slot in host_slots {
                self.unread(Place::Host, slot);
            }
            self.counters.write_backs_refused += 1;
            return false;
        };
        self.last_write_back += 1;
        let id = self.last_write_back;
        let parts = host_slots.iter().copied().zip(disk_slots.iter().copied());
        for (host_slot, disk_slot) in parts {
            let place = self.disk().slot_place(disk_slot);
            let transfer = Transfer::WriteBack { offset: place.offset, from: self.host.extent(host_slot) };
            let job = Job::WriteBack { write_back: id, host: host_slot, disk: disk_slot };
            self.queue(place.file, Lane::WriteBack, transfer, job);
        }
        let write_back = WriteBack {
            node: Some(node),
            parts_left: disk_slots.len(),
            failed: false,
            flush_failures: self.counters.flush_failures,
            disk: disk_slots[0],
            bytes,
            waiters: Vec::new(),
        };
        self.write_backs.insert(id, write_back);
        self.writing.insert(node, id);
        self.writing_bytes += bytes;
        self.index.node_mut(node).writing = true;
        true
    }

    /// What is queued cannot be evicted, so a quarter of host memory is the most of what nobody waits for and nothing hangs on.
    fn is_write_back_full(&self, more_bytes: u64) -> bool {
        let host_bytes = self.host.tier.slab.capacity_bytes();
        self.write_backs.len() >= limits::WRITE_BACKS_MAX || self.writing_bytes + more_bytes > host_bytes / 4
    }

    fn write_back_slots(&mut self, node: NodeId, host_slots: &[SlotId]) -> Option<Vec<SlotId>> {
        let mut disk_slots: Vec<SlotId> = Vec::new();
        for &slot in host_slots {
            let slab = &self.host.tier.slab;
            let Owner { tenant, slot_bytes, .. } = slab.owner(slab.shelf_of(slot));
            let shard = (slab.slot(slot).shard_index, slab.slot(slot).shard_count);
            match self.allocate(Place::Disk, Owner::shared(tenant, slot_bytes), node, GroupId(0), shard) {
                Ok(slot) => disk_slots.push(slot),
                Err(_) => {
                    for slot in disk_slots {
                        self.give_back(Place::Disk, slot);
                    }
                    return None;
                }
            }
        }
        for (&slot, next) in disk_slots.iter().zip(disk_slots.iter().skip(1).chain([&SlotId::NONE])) {
            self.disk_mut().tier.slab.slot_mut(slot).next = *next;
        }
        Some(disk_slots)
    }

    pub(super) fn write_back_done(
        &mut self,
        (id, host_slot, disk_slot): (u64, SlotId, SlotId),
        outcome: Outcome,
        actions: &mut Actions,
    ) {
        let bytes = u64::from(self.host.tier.slab.slot_bytes(host_slot));
        let failed = match outcome {
            Outcome::Done(_) => {
                self.counters.write_back_bytes += bytes;
                self.disk_mut().succeeded();
                let root = self.host.tier.slab.slot(host_slot).root;
                self.disk_mut().tier.slab.slot_mut(disk_slot).root = root;
                false
            }
            Outcome::Failed(_) | Outcome::Mismatch => {
                self.counters.write_back_failures += 1;
                self.disk_failed(&format!("a write failed ({outcome:?})"), actions);
                true
            }
        };
        self.unread(Place::Host, host_slot);
        let flush_failures = self.counters.flush_failures;
        let write_back = self.write_backs.get_mut(&id).expect("a write-back's transfers end before it does");
        write_back.parts_left -= 1;
        // A flush that failed meanwhile may have been one of a part that was written already.
        write_back.failed |= failed || write_back.flush_failures != flush_failures;
        if write_back.parts_left == 0 {
            self.write_back_ended(id);
        }
    }

    fn write_back_ended(&mut self, id: u64) {
        let write_back = self.write_backs.remove(&id).expect("it just ended");
        self.writing_bytes -= write_back.bytes;
        let slots: Vec<SlotId> = self.disk().tier.slab.chain(write_back.disk).collect();
        match write_back.node {
            Some(node) if !write_back.failed => self.publish_on_disk(node, &slots),
            _ => {
                for slot in slots {
                    self.give_back(Place::Disk, slot);
                }
            }
        }
        if let Some(node) = write_back.node {
            self.writing.remove(&node);
            self.index.node_mut(node).writing = false;
        }
        for request in write_back.waiters {
            self.durable_part_ended(request);
        }
    }

    /// Something that a durable waits for has ended; a flush makes it durable.
    pub(super) fn durable_part_ended(&mut self, request: RequestId) {
        if let Some(Waiting::Drain(wait)) = self.pending.get_mut(request) {
            wait.checks -= 1;
            wait.is_stuck = false;
            return;
        }
        let Some(Waiting::Durable(wait)) = self.pending.get_mut(request) else { return };
        wait.parts_left -= 1;
        if wait.parts_left == 0 && std::mem::take(&mut wait.rewrites) {
            let keys = std::mem::take(&mut wait.keys);
            let mut wait = DurableWait { namespace: wait.namespace, keys, parts_left: 0, rewrites: false, cycle: None };
            self.begin_durable(request, &mut wait);
            // What could not be loaded the first time is not tried again and again.
            wait.rewrites = false;
            if let Some(parked) = self.pending.get_mut(request) {
                *parked = Waiting::Durable(wait);
            }
        }
        let Some(Waiting::Durable(wait)) = self.pending.get_mut(request) else { return };
        if wait.parts_left == 0 {
            wait.cycle = self.disk.as_mut().map(|disk| disk.directory.want());
        }
    }

    fn publish_on_disk(&mut self, node: NodeId, slots: &[SlotId]) {
        let shard_count = self.disk().tier.slab.slot(slots[0]).shard_count;
        let Some(shape) = self.shape(node, shard_count) else {
            return slots.iter().for_each(|&slot| self.give_back(Place::Disk, slot));
        };
        let Shape { layout, payload_bytes, kind, reuse_rule, public } = shape;
        let disk = self.disk.as_mut().expect("it was just written there");
        let written = disk.directory.count();
        for &slot in slots {
            let record = disk.tier.slab.slot_mut(slot);
            record.state = SlotState::Resident;
            disk.set_note(slot, Note { written, payload_bytes, kind, reuse_rule, public, layout, verified: true });
            disk.directory.mark(slot);
        }
        let shelf = disk.tier.slab.shelf_of(slots[0]);
        let block_bytes = self.block_bytes(node);
        self.index.publish(node, Place::Disk, slots[0], shelf, block_bytes, self.now_ms);
    }

    /// The disk said no: it is used less, and left alone when it says so again and again.
    pub(super) fn disk_failed(&mut self, what: &str, actions: &mut Actions) {
        let now_ms = self.now_ms;
        if self.disk_mut().failed(now_ms) {
            let pause = limits::DISK_RETRY.as_secs();
            actions.push(Action::Warn(format!(
                "disk tier disabled: {what}; it is tried again in {pause} s. See the kernel's log, and replace the disk or its path"
            )));
        } else {
            actions.push(Action::Warn(format!("disk tier degraded: {what}")));
        }
    }

    /// Gives a transfer a name and a place in a lane.
    pub(super) fn queue(&mut self, file: u32, lane: Lane, transfer: Transfer, job: Job) -> TransferId {
        let id = self.name_transfer(file, lane, job);
        self.queued.insert(id, transfer);
        self.lanes[file as usize].push(lane, id);
        id
    }

    pub(super) fn name_transfer(&mut self, file: u32, lane: Lane, job: Job) -> TransferId {
        self.last_transfer += 1;
        let id = TransferId(self.last_transfer);
        self.jobs.insert(id, (file, lane, job));
        id
    }

    pub(super) fn pump_lanes(&mut self, actions: &mut Actions) {
        for (file, lanes) in (0u32..).zip(&mut self.lanes) {
            while let Some((_, id)) = lanes.take() {
                let transfer = self.queued.remove(&id).expect("what is in a lane is queued");
                actions.push(Action::Start(file, id, transfer));
            }
        }
    }

    pub(super) fn transfer_done(&mut self, id: TransferId, outcome: Outcome, actions: &mut Actions) {
        let (file, lane, job) = self.jobs.remove(&id).expect("a transfer ends once");
        match job {
            Job::Load { node, host, disk } => {
                self.lanes[file as usize].done(lane);
                self.load_done((node, host, disk), outcome, actions);
            }
            Job::WriteBack { write_back, host, disk } => {
                self.lanes[file as usize].done(lane);
                self.write_back_done((write_back, host, disk), outcome, actions);
            }
            Job::Promote { node, from, to } => self.promote_done((node, from, to), outcome, actions),
            Job::Page(name) => {
                let ok = matches!(outcome, Outcome::Done(_));
                if !ok {
                    self.disk_failed(&format!("a directory page could not be written ({outcome:?})"), actions);
                }
                self.disk_mut().directory.page_done(name, ok);
            }
            Job::Flush => {
                let ok = matches!(outcome, Outcome::Done(_));
                self.counters.flushes += 1;
                if !ok {
                    self.counters.flush_failures += 1;
                    self.disk_failed(&format!("a flush failed ({outcome:?})"), actions);
                }
                self.disk_mut().directory.flush_done(ok);
            }
        }
    }

    /// Moves the directory's cycle on, and tells who waited for it.
    pub(super) fn pump_directory(&mut self, actions: &mut Actions) {
        // Before its files are there nothing is known of them, and nothing may be written.
        let Some(disk) = self.disk.as_mut().filter(|disk| !disk.is_awaited()) else { return };
        if let Some((cycle, ok)) = disk.directory.finished() {
            self.directory_ms = self.now_ms;
            self.cycle_ended(cycle, ok, actions);
        }
        self.disk_mut().reuse_retired();
        let lazily = self.directory_ms + limits::DIRECTORY_DELAY.as_millis() as u64 <= self.now_ms;
        self.disk_mut().directory.start(lazily);
        loop {
            match self.disk_mut().directory.step() {
                Step::Write(name, copy) => {
                    let (page, held) = self.directory_page(name);
                    self.disk_mut().directory.written(name, held);
                    let place = self.disk().page_place(name.segment, name.page, copy);
                    let id = self.name_transfer(place.file, Lane::WriteBack, Job::Page(name));
                    self.counters.directory_bytes += page.0.len() as u64;
                    self.worth.charge(page.0.len() as u64, self.now_ms);
                    actions.push(Action::Start(place.file, id, Transfer::WritePage { offset: place.offset, page }));
                }
                Step::FlushAll => {
                    for file in 0..self.disk().file_count {
                        let id = self.name_transfer(file, Lane::WriteBack, Job::Flush);
                        actions.push(Action::Start(file, id, Transfer::Flush));
                    }
                }
                Step::Nothing => break,
            }
        }
        // A cycle without anything in flight has nothing to wake the core by.
        if let Some((cycle, ok)) = self.disk_mut().directory.finished() {
            self.directory_ms = self.now_ms;
            self.cycle_ended(cycle, ok, actions);
        }
    }

    fn directory_page(&mut self, name: PageName) -> (Box<crate::device::memory::Page>, u32) {
        let sequence = self.disk_mut().directory.count();
        let disk = self.disk();
        let slab = &disk.tier.slab;
        let slots = slab.slot_count(name.segment);
        let first = name.page * ENTRIES_PER_PAGE;
        let entries: Vec<Option<Entry>> = (first..first + ENTRIES_PER_PAGE)
            .map(|place| (place < slots).then(|| self.directory_entry(SlotId::new(name.segment, place))).flatten())
            .collect();
        let held = crate::tier::disk::recover::entry_bits(&entries);
        let owner = disk.owner(name.segment);
        let page = DirectoryPage {
            tenant: format::tenant_tag(&self.config.tenants[owner.tenant.0 as usize].name),
            sequence,
            epoch: name.epoch,
            segment: name.segment / disk.file_count,
            page: name.page,
            slot_bytes: owner.slot_bytes,
            entries,
        };
        (page.encode(&disk.page_key), held)
    }

    fn directory_entry(&self, slot: SlotId) -> Option<Entry> {
        let disk = self.disk();
        let record = disk.tier.slab.slot(slot);
        if record.state != SlotState::Resident || record.doomed {
            return None;
        }
        let node = self.index.node(record.node);
        let note = disk.note(slot);
        Some(Entry {
            key: node.key,
            parent: self.index.parent_key(node.parent),
            namespace: self.index.namespaces.get(node.namespace).tag,
            root: record.root,
            written: note.written,
            payload_bytes: note.payload_bytes,
            shard_index: record.shard_index.into(),
            shard_count: record.shard_count.into(),
            kind: note.kind,
            reuse_rule: note.reuse_rule,
            public: note.public,
            layout: note.layout,
        })
    }

    fn cycle_ended(&mut self, cycle: CycleId, ok: bool, actions: &mut Actions) {
        let waits = |waiting: &Waiting| match waiting {
            Waiting::Durable(wait) => wait.cycle == Some(cycle),
            Waiting::Purge(wait) => wait.cycle == Some(cycle),
            Waiting::Drain(wait) => wait.cycle == Some(cycle),
            _ => false,
        };
        for id in self.pending.which(waits) {
            if matches!(self.pending.get_mut(id), Some(Waiting::Purge(_))) {
                self.purge_cycle_ended(id, ok, actions);
                continue;
            }
            let reply = match self.pending.take(id) {
                Some(Waiting::Durable(wait)) => self.durable_reply(&wait),
                _ => Reply::Done,
            };
            actions.push(Action::Reply(id, reply));
        }
    }

    /// Makes blocks survive a power cut: write-backs first, then the directory with a flush.
    pub(super) fn durable(
        &mut self,
        id: RequestId,
        tenant: TenantId,
        deadline_ms: u64,
        attachment: AttachmentId,
        keys: Vec<BlockKey>,
    ) -> Option<Reply> {
        let Some(under) = self.under(tenant, attachment) else { return Some(Self::unattached(attachment)) };
        if !self.pending.has_room() {
            return Some(self.busy());
        }
        let namespace = under.namespace;
        let mut wait = DurableWait { namespace, keys, parts_left: 0, rewrites: false, cycle: None };
        let unflushed = self.begin_durable(id, &mut wait);
        if wait.parts_left == 0 && !unflushed {
            return Some(self.durable_reply(&wait));
        }
        if wait.parts_left == 0 {
            wait.cycle = self.disk.as_mut().map(|disk| disk.directory.want());
        }
        self.pending.park(id, deadline_ms, Waiting::Durable(wait));
        None
    }

    /// Starts the write-backs and loads that blocks need before a flush makes them durable; returns whether some need only that.
    fn begin_durable(&mut self, id: RequestId, wait: &mut DurableWait) -> bool {
        let nodes: Vec<NodeId> = wait.keys.iter().filter_map(|key| self.index.find(wait.namespace, key)).collect();
        let mut unflushed = false;
        for node in nodes {
            let is_suspect = self.is_suspect(node);
            self.drop_suspect(node);
            if self.index.node(node).copy(Place::Disk).is_some() {
                let unread = is_suspect || !self.is_verified(node);
                unflushed |= !unread && !self.is_durable(node);
                if unread && self.load(node, Lane::Demand, (id, None)).is_ok() {
                    wait.parts_left += 1;
                    // If it is not what was written, there is another copy to write.
                    wait.rewrites |= is_suspect || self.index.node(node).copy(Place::Host).is_some();
                }
            } else if self.is_ingest(node) {
                wait.parts_left += usize::from(self.disk.is_some() && self.promote_durably(node, id));
            } else if self.write_back(node, true) {
                let write_back = self.writing[&node];
                let waiters = &mut self.write_backs.get_mut(&write_back).expect("it is being written").waiters;
                // A key given twice waits once.
                if waiters.last() != Some(&id) {
                    waiters.push(id);
                    wait.parts_left += 1;
                }
            }
        }
        unflushed
    }

    pub(super) fn durable_reply(&self, wait: &DurableWait) -> Reply {
        let durable = |key| self.index.find(wait.namespace, key).is_some_and(|node| self.is_durable(node));
        Reply::Durable(wait.keys.iter().map(durable).collect())
    }

    fn is_durable(&self, node: NodeId) -> bool {
        let Some(first) = self.index.node(node).copy(Place::Disk) else { return false };
        let directory: &Directory = &self.disk().directory;
        let is_durable = self.disk().tier.slab.chain(first).all(|slot| directory.is_durable(slot));
        is_durable && self.is_verified(node) && !self.is_suspect(node)
    }

    /// Whether the copy on disk was written before a flush that failed.
    fn is_suspect(&self, node: NodeId) -> bool {
        let Some(first) = self.index.node(node).copy(Place::Disk) else { return false };
        let disk = self.disk();
        disk.tier.slab.chain(first).any(|slot| disk.directory.is_suspect(disk.note(slot).written))
    }

    /// Gives up a copy on disk of which nobody knows whether it is there, so that host memory's can be written anew.
    fn drop_suspect(&mut self, node: NodeId) {
        if self.is_suspect(node) && self.index.node(node).copy(Place::Host).is_some() {
            for slot in self.withdraw(node, Place::Disk) {
                self.give_back(Place::Disk, slot);
            }
        }
    }

    /// Whether the copy on disk is known to be what was put.
    fn is_verified(&self, node: NodeId) -> bool {
        let Some(first) = self.index.node(node).copy(Place::Disk) else { return false };
        self.disk().tier.slab.chain(first).all(|slot| self.disk().note(slot).verified)
    }

    /// Writes back what is only in memory and is worth it, then flushes; for a daemon or a worker that is about to stop.
    pub(super) fn drain(&mut self, id: RequestId, deadline_ms: u64) -> Option<Reply> {
        if self.disk.as_ref().is_none_or(|disk| disk.is_awaited()) {
            return Some(Reply::Done);
        }
        self.pending.park(id, deadline_ms, Waiting::Drain(DrainWait::default()));
        None
    }

    pub(super) fn go_on_stopping(&mut self) {
        for id in self.pending.which(|waiting| matches!(waiting, Waiting::Drain(wait) if wait.cycle.is_none())) {
            let Some(Waiting::Drain(wait)) = self.pending.get_mut(id) else { continue };
            let DrainWait { next: from, mut checks, mut is_second, mut last_write_back, .. } = *wait;
            let end = self.index.end();
            let mut to = from.saturating_add(limits::CONTINUATION_BLOCKS as u32).min(end);
            for node in self.index.in_host(from, to) {
                self.drop_suspect(node);
                if self.index.node(node).copy(Place::Disk).is_some() {
                    // Of one that was found at the start its writing may have been cut short; the next worker finds host memory's.
                    if is_second || !self.stopping || self.is_verified(node) || !self.is_loadable(node) {
                        continue;
                    }
                    if checks < DRAIN_CHECKS && self.load(node, Lane::Prefetch, (id, None)).is_ok() {
                        checks += 1;
                    } else if checks > 0 {
                        to = node.0;
                        break;
                    }
                    continue;
                }
                // It goes on with a later tick: asking again at once would only spin.
                if !self.writing.is_empty() && self.is_write_back_full(self.block_bytes(node).into()) {
                    to = node.0;
                    break;
                }
                if self.is_ingest(node) {
                    self.promote(node);
                    to = node.0;
                    break;
                }
                // A segment that is about to be free again, or what others that are being written hold, may be the room it needs.
                let is_in_the_way = is_second && self.stopping && !self.writing.is_empty();
                if !self.write_back(node, false) && (self.disk().has_retired() || is_in_the_way) {
                    to = node.0;
                    break;
                }
            }
            let is_stuck = to == from && to < end;
            // The second walk sees what the first one's writes have made room for.
            let is_written = !self.stopping || self.writing.is_empty();
            if to == end && checks == 0 && !is_second && is_written {
                (to, is_second) = (0, true);
            } else if to == end && is_second {
                last_write_back = last_write_back.or(Some(self.last_write_back));
            }
            let awaited = |&number: &u64| self.stopping || last_write_back.is_none_or(|last| number <= last);
            let done = last_write_back.is_some() && !self.writing.values().any(awaited);
            let cycle = if done { self.disk.as_mut().map(|disk| disk.directory.want()) } else { None };
            if let Some(Waiting::Drain(wait)) = self.pending.get_mut(id) {
                *wait = DrainWait { next: to, is_stuck, checks, is_second, last_write_back, cycle };
            }
        }
    }
}
