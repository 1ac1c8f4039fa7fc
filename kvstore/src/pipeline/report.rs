//! How the store is: status, residency, and every invariant at once.

use tender_proto::BlockLayout;

use super::Core;
use std::collections::HashMap;

use crate::admission::grants::{Grant, Right};
use crate::completion::{PurgeWait, Waiting};
use crate::limits;
use crate::names::{AttachmentId, By, Door, Hold, Holder, NodeId, Place, RequestId, TenantId};
use crate::status::{CoreStatus, TenantStatus, TierStatus};
use crate::tier::slab::{Owner, SlotState};
use crate::verb::{Reply, Residency};

use super::{Action, Actions};

impl Core {
    /// The bytes of a block, as its namespace's attach said; `None` before anybody attached.
    pub(super) fn layout(&self, node: NodeId) -> Option<BlockLayout> {
        let namespace = self.index.namespaces.get(self.index.node(node).namespace);
        namespace.known.as_ref().map(|known| known.layout)
    }

    /// Bytes of a block, all shards together.
    pub(super) fn block_bytes(&self, node: NodeId) -> u32 {
        if let Some(layout) = self.layout(node) {
            return layout.block_bytes() as u32;
        }
        let Some(first) = self.index.node(node).copy(Place::Disk) else { return self.recorded_bytes(node) };
        self.disk().tier.slab.chain(first).map(|slot| self.disk().note(slot).payload_bytes).sum()
    }

    pub(super) fn events(&mut self, tenant: TenantId, attachment: AttachmentId, after: u64) -> Reply {
        if self.under(tenant, attachment).is_none() {
            return Self::unattached(attachment);
        }
        Reply::Events(self.index.events.after(tenant, after, limits::EVENTS_PER_MESSAGE))
    }

    /// Blocks present from a place on. Events after the sequence of the first piece tell what changed while pieces were taken.
    pub(super) fn snapshot(&mut self, tenant: TenantId, attachment: AttachmentId, from: u32) -> Reply {
        if self.under(tenant, attachment).is_none() {
            return Self::unattached(attachment);
        }
        let sequence = self.index.events.sequence(tenant);
        let (nodes, next) = self.index.present(tenant, from, limits::EVENTS_PER_MESSAGE / 2);
        let mut present = Vec::with_capacity(nodes.len());
        for id in nodes {
            let node = self.index.node(id);
            let namespace = self.index.namespaces.get(node.namespace).tag;
            let (key, parent, block_bytes) = (node.key, self.index.parent_key(node.parent), self.block_bytes(id));
            let places = [Place::Host, Place::Disk].into_iter().filter(|&place| node.copy(place).is_some());
            present.extend(places.map(|place| Residency { key, parent, place, present: true, namespace, block_bytes }));
        }
        Reply::Snapshot { sequence, present, next }
    }

    /// How the store is.
    pub fn status(&self) -> CoreStatus {
        let tier = |place: Place| {
            let slab = self.slab(place);
            let classes = slab.shelves().map(|(shelf, owner)| {
                let (segments, used) = slab.shelf_size(shelf);
                (u64::from(owner.slot_bytes), segments as u32, slab.shelf_slots(shelf), used)
            });
            let (leased_slots, busy_slots) = match place {
                Place::Host => (self.leased_slots, self.reserved_slots + self.loads.len() as u64),
                Place::Disk => (0, (self.loads.len() + self.write_backs.len()) as u64),
            };
            TierStatus {
                capacity_bytes: slab.capacity_bytes(),
                usage: slab.usage(),
                blocks: self.index.blocks[place.at()],
                leased_slots,
                busy_slots,
                classes: classes.filter(|&(_, segments, ..)| segments > 0).collect(),
            }
        };
        let tenants = self.config.tenants.iter().zip(0u16..).map(|(config, id)| {
            let tenant = TenantId(id);
            let of_tenant = self.index.namespaces.all().filter(|record| record.tenant == tenant);
            TenantStatus {
                name: config.name.clone(),
                host: self.host.tier.tenant(tenant),
                disk: self.disk.as_ref().map_or((0, None), |disk| disk.tier.tenant(tenant)),
                blocks: of_tenant.map(|record| record.blocks).sum(),
            }
        });
        CoreStatus {
            host: tier(Place::Host),
            disk: self.disk.as_ref().map(|disk| (tier(Place::Disk), disk.health())),
            tenants: tenants.collect(),
            counters: self.counters,
            ingest: self.host.tier.slab.ingest_usage(),
            attachments: self.attachments.count() as u64,
        }
    }

    /// Whether that tenant may ask under that attachment; it counts as used.
    pub fn may_ask_as(&mut self, attachment: AttachmentId, tenant: TenantId) -> bool {
        self.attachments.get(attachment, tenant, self.now_ms).is_some()
    }

    /// Whose a process at the local door is, and which one from before a restart it was, if it took that one's place.
    pub fn local_process(&self, id: AttachmentId) -> Option<(TenantId, Option<AttachmentId>)> {
        let attachment = self.attachments.peek(id).filter(|_| self.attachments.is_local(id))?;
        Some((attachment.tenant, attachment.former))
    }

    /// Whose a hold is; `None` once it has ended.
    pub fn holder(&self, hold: Hold) -> Option<Holder> {
        self.grants.get(hold, By::Daemon).map(|grant| grant.holder)
    }

    /// Everything counted so far.
    pub fn counters(&self) -> &crate::status::Counters {
        &self.counters
    }

    /// A request whose deadline has come is answered with what there is.
    pub(super) fn overdue(&mut self, request: RequestId, waiting: Waiting, actions: &mut Actions) {
        let reply = match waiting {
            // Its wait is over: what can be had now is had, without another wait.
            Waiting::Room(waited, patience) => match self.again(waited, patience) {
                Some(reply) => reply,
                // An acquire that had no room goes on to wait for what is being loaded, until its own deadline.
                None => return,
            },
            Waiting::Acquire(wait) => self.acquired(wait),
            Waiting::Prefetch(wait) => Self::last_word(wait),
            Waiting::Durable(wait) => self.durable_reply(&wait),
            Waiting::Purge(PurgeWait { walk: Some(_), purged_blocks, .. }) => Reply::refused(
                crate::verb::RefusalKind::Busy,
                format!(
                    "{purged_blocks} blocks were purged by the deadline, and more are left; purge again, with a longer deadline"
                ),
            ),
            Waiting::Purge(_) => Reply::refused(
                crate::verb::RefusalKind::Busy,
                "purged from memory and index, but not yet on disk at the deadline; purge again to be sure that no crash brings it back",
            ),
            Waiting::Drain(_) => Reply::Done,
        };
        actions.push(Action::Reply(request, reply));
    }

    /// Whether long work is to be gone on with at once.
    pub(super) fn has_more_work(&self) -> bool {
        let draining = self.draining.iter().flatten().any(|draining| draining.more);
        let end = self.index.end();
        let walking = |waiting: &Waiting| match waiting {
            Waiting::Purge(wait) => wait.walk.is_some(),
            Waiting::Drain(wait) => wait.next < end && !wait.is_stuck,
            _ => false,
        };
        draining || self.pending.any(walking)
    }

    /// Every invariant that can be checked from outside a step, for tests.
    pub fn check(&self) {
        let granted = |right| self.grants.all().filter(|(_, grant)| grant.right == right).count() as u64;
        let (leases, reservations) = (granted(Right::Lease), granted(Right::Reservation));
        assert_eq!((leases, reservations), (self.leased_slots, self.reserved_slots), "each hold is counted once");
        let mut leased = HashMap::<_, u64>::new();
        for (_, Grant { slot, right, holder }) in self.grants.all() {
            if right == Right::Lease && holder.door == Door::Ring {
                *leased.entry(holder.group).or_default() += u64::from(self.host.tier.slab.slot_bytes(slot));
            }
        }
        assert_eq!(leased, self.leased_bytes, "what is leased in place is charged to its group");
        let mut held = vec![0; self.config.tenants.len()];
        self.grants.all().for_each(|(_, grant)| held[self.tenant_of(grant.slot).0 as usize] += 1);
        assert_eq!(held, self.held, "what is held is counted per tenant");
        self.check_records();
        self.index.check(|place, slot| self.slab(place).shelf_of(slot));
        for place in [Place::Host, Place::Disk] {
            if place == Place::Disk && self.disk.is_none() {
                continue;
            }
            let slab = self.slab(place);
            let mut used = 0;
            for segment in 0..slab.ingest_segments().end {
                for slot in slab.used_slots(segment, 0) {
                    used += 1;
                    let record = slab.slot(slot);
                    let is_free_to_go = record.readers == 0 && record.state == SlotState::Resident;
                    assert!(!record.doomed || !is_free_to_go, "a doomed slot is freed by its last user");
                }
            }
            let (usage, ingest) = (slab.usage(), slab.ingest_usage());
            assert_eq!(used, usage.used_slots + ingest.used_slots, "used slots are counted");
            for shelf in slab.shelves().filter(|(_, owner)| place == Place::Host && owner.writer.is_none()) {
                let (shelf, Owner { tenant, .. }) = shelf;
                let is_strange = |&segment: &u32| slab.tenant(segment) != Some(tenant);
                let strange = slab.segments_of(shelf).into_iter().find(is_strange);
                assert_eq!(strange, None, "{tenant:?} has a segment that was prepared for another");
            }
            let charged: u64 =
                (0..self.config.tenants.len() as u16).map(|id| self.tier(place).tenant(TenantId(id)).0).sum();
            assert_eq!(charged, usage.used_bytes + ingest.used_bytes, "what is used is charged to somebody");
        }
    }

    /// Whether nothing is waited for and nothing is under way.
    pub fn is_idle(&self) -> bool {
        self.pending.count() == 0
            && self.loads.is_empty()
            && self.write_backs.is_empty()
            && self.jobs.is_empty()
            && self.ingest.is_idle()
    }
}
