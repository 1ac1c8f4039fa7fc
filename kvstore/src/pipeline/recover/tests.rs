//! What directories may tell after a crash.

use tender_proto::TenantSalt;

use super::*;
use crate::pipeline::{CoreConfig, DiskConfig, TenantConfig};
use crate::tier::disk::format::DirectoryPage;

const SLOT_BYTES: u32 = 16 << 10;
const SLOTS: u32 = 64;

/// A core with a quota on disk of so many blocks, whose directory names more, the first written first.
fn core(quota_blocks: u64, found_blocks: u32) -> Core {
    let name = "one".to_owned();
    let (tenant, salt) = (format::tenant_tag(&name), TenantSalt::of_tenant(b"", &name));
    let quota = Some(quota_blocks * u64::from(SLOT_BYTES));
    let mut core = Core::new(CoreConfig {
        tenants: vec![TenantConfig { name, salt, host_quota_bytes: None, disk_quota_bytes: quota }],
        host_segment_bytes: 1 << 20,
        host_segment_count: 1,
        ingest_segment_count: 0,
        disk: Some(DiskConfig {
            segment_bytes: u64::from(SLOTS * SLOT_BYTES),
            segment_count: 2,
            file_count: 1,
            depth: 1,
            page_key: [0; 32],
        }),
        write_bytes_per_day: None,
        allow_public: false,
        seed: 1,
    });
    let entry = |number: u32| Entry::of_whole_block(number as u8 + 1, u64::from(number) + 1, SLOT_BYTES);
    let entries: Vec<Option<Entry>> = (0..ENTRIES_PER_PAGE).map(|i| (i < found_blocks).then(|| entry(i))).collect();
    let page = DirectoryPage { tenant, sequence: 1, epoch: 1, segment: 0, page: 0, slot_bytes: SLOT_BYTES, entries };
    let segment = FoundSegment { segment: 0, tenant, slot_bytes: SLOT_BYTES, epoch: 1, pages: vec![Some((0, page))] };
    let warnings = core.recover(vec![RecoveredFile { segments: vec![segment], counter: 1 }]);
    assert_eq!(warnings, Vec::<String>::new());
    core.check();
    core
}

#[test]
fn what_is_found_beyond_a_quota_goes() {
    for (found, kept) in [(3, 3), (4, 4), (7, 4)] {
        let core = core(4, found);
        assert_eq!(core.status().tenants[0].disk.0, u64::from(SLOT_BYTES) * kept, "{found} were found");
        assert_eq!(core.counters().evicted_disk, u64::from(found) - kept);
    }
}
