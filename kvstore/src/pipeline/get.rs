//! Get: lookups, leases on the longest run of blocks, and prefetch.

use tender_proto::BlockKey;

use super::put::shard_of;
use super::{Action, Actions, Core};
use crate::admission::grants::{Grant, Right};
use crate::completion::{AcquireBlock, AcquireWait, Patience, PrefetchWait, Waiting};
use crate::names::{AttachmentId, By, Door, Hold, Holder, NamespaceId, NodeId, Place, RequestId, SlotId, TenantId};
use crate::transfer::lanes::Lane;
use crate::verb::{AcquireEnd, Acquired, Leased, LeasedPart, LookupReply, PrefetchReply, Reply, Request, Verb};

/// Loads that one prefetch keeps in flight: enough to fill a disk, few enough that several share it.
const PREFETCH_LOADS: usize = 32;
/// How often a prefetch says how far it is.
const PREFETCH_TELL_MS: u64 = 100;

impl Core {
    /// Looks and touches nothing: a probe does not keep a block alive.
    pub(super) fn lookup(&mut self, tenant: TenantId, attachment: AttachmentId, keys: &[BlockKey]) -> Reply {
        let Some(under) = self.under(tenant, attachment) else { return Self::unattached(attachment) };
        self.counters.lookups += 1;
        self.counters.lookup_keys += keys.len() as u64;
        let bytes = keys.len().div_ceil(8);
        let mut reply = LookupReply { prefix_blocks: 0, host: vec![0; bytes], disk: vec![0; bytes] };
        let disk_usable = self.disk_usable();
        for (i, key) in keys.iter().enumerate() {
            let Some(node) = self.index.find(under.namespace, key) else { continue };
            let node = self.index.node(node);
            let on_host = node.copy(Place::Host).is_some();
            let on_disk = node.copy(Place::Disk).is_some() && disk_usable;
            reply.host[i / 8] |= u8::from(on_host) << (i % 8);
            reply.disk[i / 8] |= u8::from(on_disk) << (i % 8);
            if (on_host || on_disk) && reply.prefix_blocks as usize == i {
                reply.prefix_blocks += 1;
            }
        }
        Reply::Lookup(reply)
    }

    /// Leases in order of the chain until a block is missing or the bytes are used up, starting loads for what is on disk. Waits for
    /// a slot only while it holds nothing: the first block may wait a while for room, a later one that cannot be loaded ends the run.
    pub(super) fn acquire(&mut self, request: Request, patience: Option<Patience>) -> Option<Reply> {
        let Request { id, tenant, deadline_ms, verb } = request;
        let Verb::Acquire { attachment, keys, bytes_max, door } = verb else {
            unreachable!("only leases are acquired")
        };
        let Some(under) = self.under(tenant, attachment) else { return Some(Self::unattached(attachment)) };
        if !self.pending.has_room() {
            return Some(self.busy());
        }
        let holder = Holder { door, ..under.holder };
        let mut wait = AcquireWait { holder, blocks: Vec::new(), end: None, loading: 0 };
        let mut used = Vec::new();
        let mut bytes_left = bytes_max;
        let block_bytes = under.layout.block_bytes();
        for key in &keys {
            let first = wait.blocks.is_empty() && !self.leased_bytes.contains_key(&holder.group);
            // What is loading is charged to the group when it arrives, and to the window already.
            let loading_bytes = block_bytes * wait.loading as u64;
            let has_budget = bytes_left >= block_bytes
                && self.lease_budget(holder, tenant) >= block_bytes.saturating_add(loading_bytes);
            if !has_budget && !first {
                break;
            }
            let Some(node) = self.index.find(under.namespace, key).filter(|&node| self.index.node(node).is_present())
            else {
                wait.end = Some(AcquireEnd::Miss);
                break;
            };
            if door == Door::Ring && !self.is_of_tenant(node, tenant) {
                self.counters.shed += 1;
                wait.end = Some(AcquireEnd::Shed);
                break;
            }
            match self.acquire_block(node, id, wait.blocks.len(), holder) {
                Ok(block) => {
                    wait.loading += usize::from(matches!(block, AcquireBlock::Loading));
                    wait.blocks.push(block);
                }
                Err(AcquireEnd::Shed)
                    if wait.blocks.is_empty() && self.may_wait_for_room(tenant, deadline_ms, patience) =>
                {
                    let verb = Verb::Acquire { attachment, keys, bytes_max, door };
                    // The disk may take seconds to write what holds the room; the caller says how long that is worth.
                    self.wait_for_room(Request { id, tenant, deadline_ms, verb }, deadline_ms);
                    return None;
                }
                Err(end) => {
                    self.counters.shed += u64::from(end == AcquireEnd::Shed);
                    wait.end = Some(end);
                    break;
                }
            }
            used.push(node);
            bytes_left = bytes_left.saturating_sub(block_bytes);
        }
        for &node in used.iter().rev() {
            self.index.touch(node, self.now_ms);
            self.index.node_mut(node).reused = true;
        }
        if wait.loading == 0 {
            return Some(self.acquired(wait));
        }
        self.pending.park(id, deadline_ms, Waiting::Acquire(wait));
        None
    }

    /// Whether a block that is present lies in its tenant's memory, as all do but those of a public namespace: its clients map no other's,
    /// and read such blocks by stream.
    fn is_of_tenant(&self, node: NodeId, tenant: TenantId) -> bool {
        let is_theirs = |place: Place| {
            let slab = self.slab(place);
            self.index.node(node).copy(place).map(|first| slab.owner(slab.shelf_of(first)).tenant == tenant)
        };
        is_theirs(Place::Host).or_else(|| is_theirs(Place::Disk)).unwrap_or(true)
    }

    fn acquire_block(
        &mut self,
        node: NodeId,
        id: RequestId,
        at: usize,
        holder: Holder,
    ) -> Result<AcquireBlock, AcquireEnd> {
        if self.index.node(node).copy(Place::Host).is_some() {
            if holder.door == Door::Stream && self.is_ingest(node) {
                self.promote_for(node, id, at);
                return Ok(AcquireBlock::Loading);
            }
            return self.lease(node, Place::Host, holder).map(AcquireBlock::Leased).ok_or(AcquireEnd::Shed);
        }
        if !self.disk_usable() {
            return Err(AcquireEnd::Miss);
        }
        match self.load(node, Lane::Demand, (id, Some(at))) {
            Ok(()) => Ok(AcquireBlock::Loading),
            Err(()) => Err(AcquireEnd::Shed),
        }
    }

    /// Bytes that a group may lease: streams have windows of their own; in place, half of the tenant's part of host memory, dealt out to
    /// its groups. A group that holds nothing gets a block at least, so that each of them comes on.
    fn lease_budget(&self, holder: Holder, tenant: TenantId) -> u64 {
        if holder.door == Door::Stream {
            return u64::MAX;
        }
        let host_bytes = self.host.tier.slab.capacity_bytes();
        let share =
            host_bytes / 2 / self.config.tenants.len() as u64 / self.attachments.local_groups(tenant).max(1) as u64;
        share.saturating_sub(self.leased_bytes.get(&holder.group).copied().unwrap_or(0))
    }

    /// Whether a group may lease this block, which is in host memory, too.
    fn is_within_lease_budget(&self, node: NodeId, holder: Holder) -> bool {
        let Some(tenant) = self.attachments.peek(holder.attachment).map(|attachment| attachment.tenant) else {
            return true;
        };
        let is_first = !self.leased_bytes.contains_key(&holder.group);
        is_first || u64::from(self.block_bytes(node)) <= self.lease_budget(holder, tenant)
    }

    pub(super) fn charge_lease(&mut self, holder: Holder, slot: SlotId) {
        if holder.door == Door::Ring {
            *self.leased_bytes.entry(holder.group).or_default() += u64::from(self.host.tier.slab.slot_bytes(slot));
        }
    }

    fn discharge_lease(&mut self, holder: Holder, slot: SlotId) {
        if holder.door == Door::Ring
            && let Some(bytes) = self.leased_bytes.get_mut(&holder.group)
        {
            *bytes -= u64::from(self.host.tier.slab.slot_bytes(slot));
            if *bytes == 0 {
                self.leased_bytes.remove(&holder.group);
            }
        }
    }

    /// Leases a block that is in host memory; `None` when there are too many leases.
    pub(super) fn lease(&mut self, node: NodeId, found: Place, holder: Holder) -> Option<Leased> {
        let first = self.index.node(node).copy(Place::Host).expect("a block is leased where it is");
        let layout = self.layout(node).expect("a block is leased under an attachment, which has a layout");
        let slots: Vec<_> = self.host.tier.slab.chain(first).collect();
        let tenant = self.tenant_of(first);
        if !self.may_hold(tenant, slots.len()) {
            return None;
        }
        self.held[tenant.0 as usize] += slots.len();
        let parts = slots.into_iter().map(|slot| {
            self.leased_slots += 1;
            self.read(Place::Host, slot);
            self.charge_lease(holder, slot);
            let grant = Grant { slot, right: Right::Lease, holder };
            let hold = self.grants.grant(grant).expect("there is room for all");
            self.record_grant(hold, grant);
            let extent = self.host.extent(slot);
            let record = self.host.tier.slab.slot(slot);
            let shard = shard_of(record.shard_index, record.shard_count);
            let payload_bytes = layout.shard_bytes(shard.count) as u32;
            LeasedPart { hold, extent, payload_bytes, shard, root: record.root, verify: false }
        });
        Some(Leased { place: found, parts: parts.collect() })
    }

    pub(super) fn release(&mut self, by: By, holds: &[Hold]) {
        // From the end of the run, so that each block finds those after it idle again, and is no leaf in between.
        for &hold in holds.iter().rev() {
            if let Some(Grant { slot, holder, .. }) = self.end_grant(hold, Right::Lease, by) {
                self.discharge_lease(holder, slot);
                self.leased_slots -= 1;
                self.unread(Place::Host, slot);
            }
        }
    }

    /// What an acquire is answered: the run up to the first block that failed; later ones are given back.
    pub(super) fn acquired(&mut self, wait: AcquireWait) -> Reply {
        if wait.holder.door == Door::Ring && !self.attachments.has(wait.holder.attachment) {
            // Its process died meanwhile, and nobody would give these back.
            for block in wait.blocks {
                if let AcquireBlock::Leased(leased) = block {
                    self.release(By::Daemon, &leased.parts.iter().map(|part| part.hold).collect::<Vec<_>>());
                }
            }
            return Self::unattached(wait.holder.attachment);
        }
        let mut reply = Acquired { blocks: Vec::new(), end: wait.end };
        let mut open = true;
        for block in wait.blocks {
            match block {
                AcquireBlock::Leased(leased) if open => reply.blocks.push(leased),
                AcquireBlock::Leased(leased) => {
                    let holds: Vec<Hold> = leased.parts.iter().map(|part| part.hold).collect();
                    self.release(By::Daemon, &holds);
                }
                AcquireBlock::Loading if open => (open, reply.end) = (false, Some(AcquireEnd::Deadline)),
                AcquireBlock::Failed(end) if open => (open, reply.end) = (false, Some(end)),
                AcquireBlock::Loading | AcquireBlock::Failed(_) => {}
            }
        }
        for part in reply.blocks.iter_mut().flat_map(|block| &mut block.parts) {
            part.verify = self.must_verify(part.hold, wait.holder);
        }
        for block in &reply.blocks {
            match block.place {
                Place::Host => self.counters.hit_blocks_host += 1,
                Place::Disk => self.counters.hit_blocks_disk += 1,
            }
        }
        self.counters.miss_blocks += u64::from(reply.end == Some(AcquireEnd::Miss));
        Reply::Acquired(reply)
    }

    /// Whether somebody else than the reader's own group may write where a lease is. A segment that drains may be that of a process
    /// which is dead, and has left a child that writes on.
    fn must_verify(&self, hold: Hold, reader: Holder) -> bool {
        let slab = &self.host.tier.slab;
        let Some(Grant { slot, .. }) = self.grants.get(hold, By::Daemon) else { return true };
        let is_trusted = slab.slot(slot).holder == reader.group && !slab.is_draining(slot.segment());
        slab.is_ingest(slot) && !is_trusted
    }

    /// A block that an acquire waits for has arrived, or will not.
    pub(super) fn acquire_arrived(
        &mut self,
        id: RequestId,
        at: usize,
        arrived: Result<(NodeId, Place), AcquireEnd>,
        actions: &mut Actions,
    ) {
        let Some(Waiting::Acquire(AcquireWait { holder, .. })) = self.pending.get_mut(id) else { return };
        let holder = *holder;
        let leased = arrived.and_then(|(node, found)| {
            // Others of the group may have taken what was left meanwhile.
            let may_lease = self.is_within_lease_budget(node, holder);
            may_lease.then(|| self.lease(node, found, holder)).flatten().ok_or(AcquireEnd::Shed)
        });
        let block = leased.map_or_else(AcquireBlock::Failed, AcquireBlock::Leased);
        let Some(Waiting::Acquire(wait)) = self.pending.get_mut(id) else { return };
        wait.blocks[at] = block;
        wait.loading -= 1;
        if wait.loading == 0
            && let Some(Waiting::Acquire(wait)) = self.pending.take(id)
        {
            let reply = self.acquired(wait);
            actions.push(Action::Reply(id, reply));
        }
    }

    pub(super) fn prefetch(
        &mut self,
        id: RequestId,
        tenant: TenantId,
        deadline_ms: u64,
        attachment: AttachmentId,
        keys: Vec<BlockKey>,
        actions: &mut Actions,
    ) -> Option<Reply> {
        let Some(under) = self.under(tenant, attachment) else { return Some(Self::unattached(attachment)) };
        if !self.pending.has_room() {
            return Some(self.busy());
        }
        let wait = PrefetchWait {
            namespace: under.namespace,
            keys: keys.into(),
            loading: 0,
            reply: PrefetchReply::default(),
            told_ms: self.now_ms,
        };
        self.pending.park(id, deadline_ms, Waiting::Prefetch(wait));
        self.go_on_prefetching(id, actions);
        None
    }

    /// Starts as many loads as a prefetch may have in flight; ends it when nothing is left.
    pub(super) fn go_on_prefetching(&mut self, id: RequestId, actions: &mut Actions) {
        loop {
            let Some(Waiting::Prefetch(wait)) = self.pending.get_mut(id) else { return };
            if wait.loading == PREFETCH_LOADS {
                return;
            }
            let namespace = wait.namespace;
            let Some(key) = wait.keys.pop_front() else { break };
            let outcome = self.prefetch_block(namespace, &key, id);
            let Some(Waiting::Prefetch(wait)) = self.pending.get_mut(id) else { return };
            match outcome {
                PrefetchOutcome::Resident => wait.reply.resident += 1,
                PrefetchOutcome::Missing => wait.reply.missing += 1,
                PrefetchOutcome::Loading => wait.loading += 1,
                PrefetchOutcome::Shed => {
                    wait.reply.shed += 1 + wait.keys.len() as u32;
                    wait.keys.clear();
                }
            }
        }
        if matches!(self.pending.get_mut(id), Some(Waiting::Prefetch(wait)) if wait.loading == 0) {
            self.finish_prefetch(id, actions);
        }
    }

    fn prefetch_block(&mut self, namespace: NamespaceId, key: &BlockKey, id: RequestId) -> PrefetchOutcome {
        let Some(node) = self.index.find(namespace, key).filter(|&node| self.index.node(node).is_present()) else {
            return PrefetchOutcome::Missing;
        };
        if self.index.node(node).copy(Place::Host).is_some() {
            self.index.touch(node, self.now_ms);
            return PrefetchOutcome::Resident;
        }
        if !self.disk_usable() {
            return PrefetchOutcome::Missing;
        }
        match self.load(node, Lane::Prefetch, (id, None)) {
            Ok(()) => PrefetchOutcome::Loading,
            Err(()) => PrefetchOutcome::Shed,
        }
    }

    /// A load that a prefetch waits for has ended.
    pub(super) fn prefetch_arrived(&mut self, id: RequestId, ok: bool, actions: &mut Actions) {
        let Some(Waiting::Prefetch(wait)) = self.pending.get_mut(id) else { return };
        wait.loading -= 1;
        if ok {
            wait.reply.resident += 1;
            wait.reply.loaded += 1;
        } else {
            wait.reply.missing += 1;
        }
        self.go_on_prefetching(id, actions);
    }

    /// The last word on a prefetch that was parked.
    pub(super) fn finish_prefetch(&mut self, id: RequestId, actions: &mut Actions) {
        let Some(Waiting::Prefetch(wait)) = self.pending.take(id) else { return };
        actions.push(Action::Reply(id, Self::last_word(wait)));
    }

    /// The last word on a prefetch: what was not done is given up.
    pub(super) fn last_word(wait: PrefetchWait) -> Reply {
        let shed = wait.reply.shed + (wait.keys.len() + wait.loading) as u32;
        Reply::Prefetch(PrefetchReply { shed, done: true, ..wait.reply })
    }

    /// Says now and then how far prefetches are.
    pub(super) fn tell_prefetches(&mut self, actions: &mut Actions) {
        let now_ms = self.now_ms;
        let due =
            |waiting: &Waiting| matches!(waiting, Waiting::Prefetch(wait) if wait.told_ms + PREFETCH_TELL_MS <= now_ms);
        for id in self.pending.which(due) {
            if let Some(Waiting::Prefetch(wait)) = self.pending.get_mut(id) {
                wait.told_ms = now_ms;
                actions.push(Action::Reply(id, Reply::Prefetch(wait.reply)));
            }
        }
    }
}

enum PrefetchOutcome {
    Resident,
    Missing,
    Loading,
    Shed,
}
