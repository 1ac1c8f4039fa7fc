//! Residency: per tenant a numbered list of what came and went, remembered for a while, so that a watcher that comes back misses
//! nothing, and one that stayed away too long knows that it did. Numbers are per tenant: nobody can count another's events.

use std::collections::VecDeque;

use crate::limits;
use crate::names::TenantId;
use crate::verb::Residency;

#[derive(Debug, Default)]
struct Log {
    /// Number of the last event.
    sequence: u64,
    remembered: VecDeque<Residency>,
}

/// The events of all tenants.
#[derive(Debug)]
pub struct Events {
    logs: Vec<Log>,
    /// Tenants with events since `take_changed` was last called.
    changed: Vec<TenantId>,
}

impl Events {
    /// No events yet. Each tenant's numbers begin at 1.
    pub fn new(tenant_count: usize) -> Self {
        Self { logs: std::iter::repeat_with(Log::default).take(tenant_count).collect(), changed: Vec::new() }
    }

    /// Numbers and remembers an event.
    pub fn push(&mut self, tenant: TenantId, event: Residency) {
        let log = &mut self.logs[tenant.0 as usize];
        log.sequence += 1;
        if log.remembered.len() == limits::EVENTS_MAX {
            log.remembered.pop_front();
        }
        log.remembered.push_back(event);
        if !self.changed.contains(&tenant) {
            self.changed.push(tenant);
        }
    }

    /// Number of the tenant's last event.
    pub fn sequence(&self, tenant: TenantId) -> u64 {
        self.logs[tenant.0 as usize].sequence
    }

    /// The events after number `after`, at most `count`; `None` when they are no longer (or not yet) known.
    pub fn after(&self, tenant: TenantId, after: u64, count: usize) -> Option<Vec<Residency>> {
        let log = &self.logs[tenant.0 as usize];
        let first = log.sequence - log.remembered.len() as u64;
        let skip = after.checked_sub(first)?;
        (after <= log.sequence).then(|| log.remembered.iter().skip(skip as usize).take(count).copied().collect())
    }

    /// Tenants with new events.
    pub fn take_changed(&mut self) -> Vec<TenantId> {
        std::mem::take(&mut self.changed)
    }
}
