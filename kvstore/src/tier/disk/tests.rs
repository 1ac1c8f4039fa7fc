//! Segments of a disk that change owner.

use super::directory::Step;
use super::*;
use crate::names::{GroupId, NodeId, TenantId};

#[test]
fn a_segment_is_not_used_again_while_pages_are_on_their_way() {
    let mut disk = DiskTier::new(64 << 10, 1, 1, [0; 32], 0, vec![None]);
    disk.tier.slab.segment_ready(0, None);
    let owner = Owner::shared(TenantId(0), 4096);
    let shelf = disk.tier.slab.shelf(owner).expect("it fits");
    let slot = disk.tier.reserve(shelf, NodeId(0), GroupId(0), (0, 1)).expect("all is free");
    disk.set_owner(0, owner);
    disk.directory.begin(0, disk.tier.slab.slot_count(0));
    disk.directory.start(true);
    let Step::Write(name, _) = disk.directory.step() else { panic!("the first page is written") };
    disk.directory.written(name, 0);

    assert_eq!(disk.tier.slab.drain_emptiest(shelf, |_| true), Some((0, false)));
    let segment = disk.tier.release(slot).expect("that was its last slot");
    disk.retire(segment);
    disk.reuse_retired();
    assert!(!disk.tier.slab.has_room(shelf), "the page may land where the next owner's slots will lie");

    disk.directory.page_done(name, true);
    disk.reuse_retired();
    assert!(disk.tier.slab.has_room(shelf), "it has landed");
}
