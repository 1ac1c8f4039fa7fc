//! Real processes at the local door of a real daemon: those that keep to its rules, those that are killed or stopped, and those that
//! keep to no rule at all.

#[path = "local_door/actor.rs"]
mod actor;
#[path = "local_door/bringing.rs"]
mod bringing;
#[path = "local_door/crowd.rs"]
mod crowd;
#[path = "local_door/deaths.rs"]
mod deaths;
#[path = "local_door/greetings.rs"]
mod greetings;
#[path = "local_door/late_io.rs"]
mod late_io;
#[path = "local_door/leases.rs"]
mod leases;
#[path = "local_door/memory.rs"]
mod memory;
#[path = "local_door/overwriting.rs"]
mod overwriting;
#[path = "local_door/raw.rs"]
mod raw;
#[path = "local_door/restarts.rs"]
mod restarts;
#[path = "local_door/rings.rs"]
mod rings;
#[path = "local_door/slots.rs"]
mod slots;
#[expect(dead_code, reason = "each test file uses what it needs")]
mod support;
#[path = "local_door/tenants.rs"]
mod tenants;

use support::blocks::{Run, attach_to};
use support::site::{Site, TOKEN};
use tender_client::proto::BlockLayout;
use tender_client::{Attach, Doors, PutOutcome, Remote};

/// Two size classes.
const LARGE: u64 = 64 << 10;
const SMALL: u64 = 16 << 10;

/// All of host memory.
const HOST_BYTES: u64 = 64 << 20;

/// A site of two tenants whose daemons have that much host memory, in four segments.
fn site(disk: &str) -> Site {
    Site::of_two_tenants(&["--host", "64MiB", "--disk", disk])
}

/// The namespace of a model, in a group of that name.
fn attach_as(group: &str, model: &str, block_bytes: u64) -> Attach {
    Attach { group: group.to_owned(), ..attach_to(model, BlockLayout::opaque(block_bytes)) }
}

/// A client of the tenant `default`, or of `other`, that asks through a ring.
async fn client(site: &Site, is_other: bool, attach: Attach) -> Remote {
    let token = is_other.then(|| TOKEN.to_owned());
    let remote = Remote::attach(site.target(), token, attach).await.unwrap();
    assert_eq!(remote.door(), Doors::Ring);
    remote
}

/// Puts runs until that many bytes were stored: seeds from `seed` on.
async fn store_bytes(store: &Remote, seed: u32, bytes: u64) {
    let block_bytes = tender_client::BlockStore::terms(store).shard_bytes(1) as u64;
    let mut stored = 0;
    for seed in seed.. {
        let outcomes = Run::new(store, seed, 128).put_in(store, 1).await;
        let known = [PutOutcome::Stored, PutOutcome::NoRoom, PutOutcome::Shed, PutOutcome::AlreadyPresent];
        assert!(outcomes.iter().all(|outcome| known.contains(outcome)), "{outcomes:?}");
        stored += outcomes.iter().filter(|outcome| **outcome == PutOutcome::Stored).count() as u64 * block_bytes;
        if stored >= bytes {
            return;
        }
    }
}

/// No test: a process that the tests start.
#[test]
#[ignore = "a process that the other tests start"]
fn an_actor() {
    actor::live();
}
