//! How much of host memory the streams of gRPC may hold at once: a quarter for leases, a quarter for reservations, dealt out to the
//! tenants in equal parts, so that none can hold up another. What is held cannot be evicted; without this bound forty clients that each
//! get a long run would hold all of it, and none could load its next block.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::device::memory::Arena;
use crate::limits;
use crate::names::TenantId;

/// Permits are counted in KiB, so that a terabyte of memory can be counted.
const UNIT_BYTES: u64 = 1024;

/// What gRPC may hold of host memory.
pub(super) struct Windows {
    tenants: Vec<Share>,
    share_bytes: u64,
}

/// A tenant's part.
struct Share {
    leases: Arc<Semaphore>,
    reservations: Arc<Semaphore>,
}

/// Part of the share. Dropping it gives it back.
pub(super) struct Window {
    /// Most bytes to hold with it.
    pub bytes: u64,
    _permit: OwnedSemaphorePermit,
}

impl Windows {
    pub fn new(arena: &Arena, tenant_count: usize) -> Self {
        let share_bytes = arena.segment_bytes() * u64::from(arena.segment_count()) / 4 / tenant_count.max(1) as u64;
        let semaphore = || Arc::new(Semaphore::new((share_bytes / UNIT_BYTES) as usize));
        let share = || Share { leases: semaphore(), reservations: semaphore() };
        Self { tenants: std::iter::repeat_with(share).take(tenant_count).collect(), share_bytes }
    }

    fn share(&self, tenant: TenantId) -> &Share {
        &self.tenants[tenant.0 as usize]
    }

    /// Bytes of one window of leases: a block at least, and no more than the whole share of a tenant.
    pub fn lease_bytes(&self, block_bytes: u64) -> u64 {
        limits::ACQUIRE_BYTES_MAX.min(self.share_bytes / 4).max(block_bytes).min(self.share_bytes)
    }

    /// Waits for a window of leases.
    pub async fn lease(&self, tenant: TenantId, bytes: u64, wait: Duration) -> Option<Window> {
        take(&self.share(tenant).leases, bytes, wait).await
    }

    /// A window of leases if there is one to spare: for reading ahead.
    pub fn lease_ahead(&self, tenant: TenantId, bytes: u64) -> Option<Window> {
        let permit = Arc::clone(&self.share(tenant).leases).try_acquire_many_owned(units(bytes)).ok()?;
        Some(Window { bytes, _permit: permit })
    }

    /// Bytes of the largest window of reservations.
    pub fn reserve_bytes(&self) -> u64 {
        limits::RESERVE_BYTES_MAX.min(self.share_bytes)
    }

    /// Waits for a window of reservations.
    pub async fn reserve(&self, tenant: TenantId, bytes: u64, wait: Duration) -> Option<Window> {
        take(&self.share(tenant).reservations, bytes.min(self.reserve_bytes()), wait).await
    }
}

fn units(bytes: u64) -> u32 {
    bytes.div_ceil(UNIT_BYTES).min(u64::from(u32::MAX)) as u32
}

async fn take(share: &Arc<Semaphore>, bytes: u64, wait: Duration) -> Option<Window> {
    let permit = Arc::clone(share).acquire_many_owned(units(bytes));
    let permit = tokio::time::timeout(wait, permit).await.ok()?.ok()?;
    Some(Window { bytes, _permit: permit })
}
