//! Forgetting, for good: what was purged is gone for lookups at once, and its directory entries are overwritten (in both copies of
//! their pages) and flushed before the answer, so that no crash brings it back. The bytes themselves are overwritten when their slots
//! are used again.

use super::{Action, Actions, Core};
use crate::completion::{PurgeWait, Waiting};
use crate::limits;
use crate::names::{AttachmentId, NodeId, Place, RequestId, SlotId, TenantId};
use crate::verb::{PurgeWhat, RefusalKind, Reply};

impl Core {
    pub(super) fn purge(
        &mut self,
        id: RequestId,
        tenant: TenantId,
        deadline_ms: u64,
        attachment: AttachmentId,
        what: PurgeWhat,
    ) -> Option<Reply> {
        let Some(under) = self.under(tenant, attachment) else { return Some(Self::unattached(attachment)) };
        if !self.pending.has_room() {
            return Some(self.busy());
        }
        if self.disk.as_ref().is_some_and(|disk| disk.is_awaited()) {
            let message =
                "the disk tier is still being opened, and what it holds could not be purged; purge again later";
            return Some(Reply::refused(RefusalKind::Busy, message));
        }
        let mut wait = PurgeWait::default();
        match what {
            PurgeWhat::Namespace => wait.walk = Some((under.namespace, 0)),
            PurgeWhat::Keys(keys) => {
                let nodes = keys.iter().filter_map(|key| self.index.find(under.namespace, key)).collect();
                self.purge_nodes(nodes, &mut wait);
            }
        }
        if wait.walk.is_none() && !self.wait_for_directory(&mut wait) {
            return Some(Self::purged(&wait));
        }
        self.pending.park(id, deadline_ms, Waiting::Purge(wait));
        None
    }

    /// Begins to wait for the directory; `false` if it knows nothing of what was purged. A page may still tell, on disk, of a copy that was
    /// evicted before: so everything that changed is to be flushed. Where the blocks were until now, both copies are written.
    fn wait_for_directory(&mut self, wait: &mut PurgeWait) -> bool {
        let Some(disk) = self.disk.as_mut().filter(|disk| !disk.directory.is_settled()) else { return false };
        wait.rounds = if wait.pages.is_empty() { 1 } else { 2 };
        wait.cycle = Some(disk.directory.want());
        true
    }

    fn purged(wait: &PurgeWait) -> Reply {
        Reply::Purged { purged_blocks: wait.purged_blocks, busy_blocks: wait.busy_blocks }
    }

    fn purge_nodes(&mut self, nodes: Vec<NodeId>, wait: &mut PurgeWait) {
        for node in nodes {
            // A key that was given twice, or went with another's last copy, is gone by now.
            if !self.index.is_in_use(node) {
                continue;
            }
            if let Some(first) = self.index.node(node).copy(Place::Disk) {
                let disk = self.disk();
                wait.pages.extend(disk.tier.slab.chain(first).map(|slot| disk.directory.name(slot)));
            }
            let present = self.index.node(node).is_present();
            let busy = self.remove_block(node);
            wait.purged_blocks += u64::from(present);
            wait.busy_blocks += u64::from(busy);
            self.counters.purged_blocks += u64::from(present);
        }
    }

    /// Takes a block out of every tier, and stops whatever is about to bring it there; returns whether somebody still used it. The node
    /// may be gone afterwards.
    pub(super) fn remove_block(&mut self, node: NodeId) -> bool {
        let record = *self.index.node(node);
        let mut busy = false;
        let loading = match self.loads.get_mut(&node) {
            Some(load) => {
                load.cancelled = true;
                true
            }
            None => false,
        };
        if let Some(write_back) = self.writing.remove(&node) {
            self.index.node_mut(node).writing = false;
            if let Some(write_back) = self.write_backs.get_mut(&write_back) {
                write_back.node = None;
            }
        }
        let copying = self.ingest.is_copying(node);
        let half_filled = record.filling != SlotId::NONE && !loading && !copying;
        for place in [Place::Host, Place::Disk].into_iter().filter(|&place| record.copy(place).is_some()) {
            for slot in self.withdraw(node, place) {
                busy |= self.slab(place).slot(slot).readers > 0;
                self.give_back(place, slot);
            }
        }
        if half_filled {
            busy = true;
            self.drop_filling(node);
        }
        busy || loading || copying
    }

    /// Walks on through the nodes for purges of a namespace.
    pub(super) fn go_on_purging(&mut self, actions: &mut Actions) {
        for id in self.pending.which(|waiting| matches!(waiting, Waiting::Purge(wait) if wait.walk.is_some())) {
            let Some(Waiting::Purge(wait)) = self.pending.get_mut(id) else { continue };
            let Some((namespace, from)) = wait.walk else { continue };
            let mut wait = std::mem::take(wait);
            let to = from.saturating_add(limits::CONTINUATION_BLOCKS as u32).min(self.index.end());
            let nodes = self.index.of_namespace(namespace, from, to);
            self.purge_nodes(nodes, &mut wait);
            wait.walk = (to < self.index.end()).then_some((namespace, to));
            if wait.walk.is_none() && !self.wait_for_directory(&mut wait) {
                self.pending.take(id);
                actions.push(Action::Reply(id, Self::purged(&wait)));
                continue;
            }
            if let Some(Waiting::Purge(place)) = self.pending.get_mut(id) {
                *place = wait;
            }
        }
    }

    /// After the first flush the other copy of each page is written too. A flush that failed is tried again until the deadline.
    pub(super) fn purge_cycle_ended(&mut self, id: RequestId, ok: bool, actions: &mut Actions) {
        let Some(Waiting::Purge(wait)) = self.pending.get_mut(id) else { return };
        wait.rounds -= u32::from(ok);
        if wait.rounds == 0 {
            let reply = Self::purged(wait);
            self.pending.take(id);
            return actions.push(Action::Reply(id, reply));
        }
        let Some(disk) = &mut self.disk else { return };
        for &name in &wait.pages {
            disk.directory.mark_again(name);
        }
        wait.cycle = Some(disk.directory.want());
    }
}
