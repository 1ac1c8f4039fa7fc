//! Segments of host memory: each is prepared for one tenant, whose clients map it, and prepared anew for another that needs it more than
//! whoever has it free.
//!
//! ```text
//! at the start   dealt out to the tenants in turn, prepared one at a time; what somebody waits for comes first
//! a tenant has none free   one of its own that is not prepared yet, or of another's, or one that another has free; else see `room.rs`
//! ```
//! So a tenant that is alone in using the daemon comes to all of its memory. Whoever waits holds nothing, and what was prepared for it
//! stays its own for as long as it waits: two tenants do not take a segment from each other in turns.

use std::collections::{BTreeMap, VecDeque};

use super::{Action, Actions, Core};
use crate::names::TenantId;
use crate::tier::slab::Owner;

/// A segment that somebody waited for is not taken from its tenant for so long, used or not: a request that still waits is tried again
/// by then.
const KEPT_MS: u64 = 200;

/// A segment that is to be prepared.
#[derive(Clone, Copy, Debug)]
struct ToPrepare {
    segment: u32,
    tenant: TenantId,
    /// It was used before.
    used: bool,
    /// Somebody waits for it.
    is_wanted: bool,
}

/// What is to be prepared; one segment at a time is.
#[derive(Debug)]
pub(super) struct Preparation {
    /// What somebody waits for, in the order in which it was asked for.
    wanted: VecDeque<ToPrepare>,
    /// The rest of the arena.
    rest: VecDeque<ToPrepare>,
    current: Option<ToPrepare>,
    /// Segments that are not taken from their tenants until then.
    kept: BTreeMap<u32, u64>,
}

impl Preparation {
    /// All segments, dealt out to the tenants in turn.
    pub(super) fn new(segment_count: u32, tenant_count: usize) -> Self {
        let tenant_of = |segment: u32| TenantId((segment as usize % tenant_count.max(1)) as u16);
        let dealt_out = |segment| ToPrepare { segment, tenant: tenant_of(segment), used: false, is_wanted: false };
        Self {
            wanted: VecDeque::new(),
            rest: (0..segment_count).map(dealt_out).collect(),
            current: None,
            kept: BTreeMap::new(),
        }
    }

    /// Nothing is to be prepared, before what a former worker left is looked at.
    pub(super) fn clear(&mut self) {
        self.rest.clear();
    }

    /// A segment that has no owner is to be prepared for the tenant whose turn it is.
    pub(super) fn deal_out(&mut self, segment: u32, tenant_count: usize, used: bool) {
        let tenant = TenantId((self.rest.len() % tenant_count.max(1)) as u16);
        self.rest.push_back(ToPrepare { segment, tenant, used, is_wanted: false });
    }

    /// A segment that is retired is to be prepared for a tenant before the rest of the arena.
    pub(super) fn want(&mut self, segment: u32, tenant: TenantId, used: bool) {
        self.wanted.push_back(ToPrepare { segment, tenant, used, is_wanted: true });
    }

    fn want_of_rest(&mut self, at: usize, tenant: TenantId) {
        if let Some(ToPrepare { segment, used, .. }) = self.rest.remove(at) {
            self.want(segment, tenant, used);
        }
    }
}

impl Core {
    /// Whether a segment is about to be ready for the tenant: worth a short wait rather than an eviction.
    pub(super) fn memory_is_coming(&self, tenant: TenantId) -> bool {
        let Preparation { wanted, rest, current, .. } = &self.preparation;
        current.iter().chain(wanted).chain(rest).any(|next| next.tenant == tenant)
    }

    /// Whether the owner has no room, may have more, and a segment comes for it: then a put that may wait evicts nothing.
    pub(super) fn comes_rather_than_evict(&mut self, owner: Owner) -> bool {
        !self.host.tier.has_room(owner) && self.host.tier.within_quota(owner) && self.want_segment(owner.tenant)
    }

    /// Sees to it that a segment comes for a tenant without a free one, if there is any that is nobody's or only lies ready for somebody.
    /// Whether one does.
    pub(super) fn want_segment(&mut self, tenant: TenantId) -> bool {
        self.want_segment_of(tenant, 0)
    }

    /// Has the next segment made ready for a tenant that took its last free one, so that it does not wait for each: one that others can
    /// spare, and as far as its quota goes.
    pub(super) fn want_spare_segment(&mut self, tenant: TenantId) {
        let (used_bytes, quota_bytes) = self.host.tier.tenant(tenant);
        let slab = &self.host.tier.slab;
        let may_have = quota_bytes.is_none_or(|quota_bytes| used_bytes + slab.segment_bytes() <= quota_bytes);
        if slab.free_count(tenant) == 0 && may_have && !self.memory_is_coming(tenant) {
            self.want_segment_of(tenant, 1);
        }
    }

    /// As `want_segment`, from tenants with more free segments than `left_count`.
    fn want_segment_of(&mut self, tenant: TenantId, left_count: usize) -> bool {
        let Preparation { wanted, rest, current, .. } = &self.preparation;
        if current.iter().chain(wanted).any(|next| next.tenant == tenant) {
            return true;
        }
        let own = rest.iter().position(|next| next.tenant == tenant);
        // The last one comes last: the others' next ones are what they will have first.
        if let Some(at) = own.or(rest.len().checked_sub(1)) {
            self.preparation.want_of_rest(at, tenant);
            return true;
        }
        let now_ms = self.now_ms;
        self.preparation.kept.retain(|_, until_ms| *until_ms > now_ms);
        let others = (0..self.config.tenants.len() as u16).map(TenantId).filter(|&other| other != tenant);
        let slab = &mut self.host.tier.slab;
        let mut donors: Vec<(usize, TenantId)> =
            others.map(|other| (slab.free_count(other), other)).filter(|&(count, _)| count > left_count).collect();
        donors.sort_unstable_by_key(|&(count, _)| std::cmp::Reverse(count));
        let kept = &self.preparation.kept;
        let taken =
            donors.into_iter().find_map(|(_, donor)| slab.take_free(donor, |segment| !kept.contains_key(&segment)));
        if let Some(segment) = taken {
            // Nobody has used it since it was prepared.
            self.preparation.want(segment, tenant, false);
        }
        taken.is_some()
    }

    /// The next segment's turn.
    pub(super) fn pump_preparation(&mut self, actions: &mut Actions) {
        let Preparation { wanted, rest, current, .. } = &mut self.preparation;
        if current.is_none() {
            *current = wanted.pop_front().or_else(|| rest.pop_front());
            actions.extend(current.map(|ToPrepare { segment, tenant, used, .. }| Action::PrepareSegment {
                segment,
                tenant,
                used,
            }));
        }
    }

    /// A segment was prepared.
    pub(super) fn segment_ready(&mut self, segment: u32) {
        let next = self.preparation.current.take().filter(|next| next.segment == segment);
        let next = next.unwrap_or_else(|| panic!("segment {segment} is ready, and nobody had asked for it"));
        if next.is_wanted {
            self.preparation.kept.insert(segment, self.now_ms + KEPT_MS);
        }
        self.host.tier.slab.segment_ready(segment, Some(next.tenant));
    }
}

#[cfg(test)]
mod tests;
