//! What a dead worker left under way.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use tender_proto::{BlockKey, TenantSalt};

use super::*;
use crate::pipeline::{CoreConfig, Event, TenantConfig};
use crate::tier::host::records::Geometry;

const GEOMETRY: Geometry = Geometry { segment_bytes: 4 << 20, shared_count: 2, ingest_count: 1 };
const SLOT_BYTES: u32 = 16 << 10;

/// A core that finds one slot, which a dead worker was loading.
fn core() -> Core {
    let name = "one".to_owned();
    let words: Arc<[AtomicU64]> = (0..GEOMETRY.table_bytes() / 8).map(|_| AtomicU64::new(0)).collect();
    let open = || Records::open(Box::new(Arc::clone(&words)), GEOMETRY).expect("these words are these records");
    let mut records = open();
    let (tenant, writer) = (format::tenant_tag(&name), AttachmentId(0));
    records.set_segment(0, SegmentRecord::Owned { tenant, slot_bytes: SLOT_BYTES, writer });
    let record = SlotRecord {
        used: SlotUse::Loading,
        doomed: false,
        key: BlockKey::from_bytes([1; 32]),
        parent: BlockKey::from_bytes([2; 32]),
        namespace: [3; 16],
        layout: 4,
        root: 0,
        copy: 1,
        holder: GroupId(0),
        shard_index: 0,
        shard_count: 1,
        kind: 0,
        reuse_rule: 0,
        public: false,
        payload_bytes: SLOT_BYTES,
    };
    records.fill(SlotId::new(0, 0), &record);
    let salt = TenantSalt::of_tenant(b"", &name);
    let mut core = Core::new(CoreConfig {
        tenants: vec![TenantConfig { name, salt, host_quota_bytes: None, disk_quota_bytes: None }],
        host_segment_bytes: GEOMETRY.segment_bytes,
        host_segment_count: GEOMETRY.shared_count,
        ingest_segment_count: GEOMETRY.ingest_count,
        disk: None,
        write_bytes_per_day: None,
        allow_public: false,
        seed: 1,
    });
    assert_eq!(core.recover_host(open()), Vec::<String>::new());
    core
}

fn used_slots(core: &Core) -> u64 {
    core.status().host.classes.iter().map(|(.., used)| used).sum()
}

#[test]
fn what_a_dead_worker_was_loading_is_free_once_its_disk_is_locked() {
    let mut core = core();
    assert_eq!(used_slots(&core), 1);
    core.step(Event::DiskLocked, 0, &mut Vec::new());
    assert_eq!(used_slots(&core), 0);
}

#[test]
fn what_a_dead_worker_was_loading_from_another_disk_is_not_used_again() {
    let mut core = core();
    assert_eq!(core.leave_loading_out_of_use(), 1);
    core.step(Event::DiskLocked, 0, &mut Vec::new());
    assert_eq!(used_slots(&core), 1, "the lock is not that of the disk that writes there");
    core.check();
}
