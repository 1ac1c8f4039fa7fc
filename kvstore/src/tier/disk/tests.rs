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

#[test]
fn only_what_was_seen_and_not_lost_by_a_flush_since_is_sure() {
    let mut disk = DiskTier::new(64 << 10, 1, 1, [0; 32], 0, vec![None]);
    disk.tier.slab.segment_ready(0, None);
    let owner = Owner::shared(TenantId(0), 4096);
    let shelf = disk.tier.slab.shelf(owner).expect("it fits");
    disk.set_owner(0, owner);
    let [found, written] =
        [(); 2].map(|()| disk.tier.reserve(shelf, NodeId(0), GroupId(0), (0, 1)).expect("all is free"));
    disk.directory.begin(0, disk.tier.slab.slot_count(0));
    disk.set_note(found, Note { verified: false, ..Note::default() });
    let number = disk.directory.count();
    disk.set_note(written, Note { written: number, verified: true, ..Note::default() });
    assert!(!disk.is_sure(found), "an entry may survive a crash that its payload did not");
    assert!(disk.is_sure(written));
    disk.verified(found);
    assert!(disk.is_sure(found), "it was read");

    disk.directory.want();
    disk.directory.start(false);
    while let Step::Write(name, _) = disk.directory.step() {
        disk.directory.written(name, 0);
        disk.directory.page_done(name, true);
    }
    disk.directory.flush_done(false);
    assert!(disk.directory.finished().is_some_and(|(_, ok)| !ok));
    assert!(!disk.is_sure(written), "it may never have reached the disk");
    assert!(disk.is_sure(found), "it was there before");
}
