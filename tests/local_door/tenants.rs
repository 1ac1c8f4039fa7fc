//! What a process can see of other tenants through the memory that it is given: nothing.

use std::fs::OpenOptions;
use std::os::fd::AsRawFd;

use bytes::Bytes;
use tender_client::proto::greeting::ToDaemon;
use tender_client::proto::{Shard, wire};
use tender_client::{BlockStore, Put, Remote};

use crate::memory::Memory;
use crate::raw::Raw;
use crate::support::blocks::Run;
use crate::support::site::TOKEN;
use crate::support::{wait_until, wire as grpc};
use crate::{HOST_BYTES, LARGE, SMALL, attach_as, client, site, store_bytes};

/// Blocks each page of which begins with the mark.
async fn put_marked(store: &Remote, seed: u32, blocks: usize, mark: &[u8; 32]) {
    let bytes = store.terms().shard_bytes(1);
    let payload = Bytes::from(mark.iter().copied().cycle().take(bytes).collect::<Vec<u8>>());
    let run = Run::new(store, seed, blocks);
    let payloads = vec![payload; blocks];
    let put =
        Put { parent: run.parent, keys: &run.keys, shard: Shard::WHOLE, payloads: &payloads, tokens: &run.tokens };
    store.put(put).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_tenants_file_never_holds_another_tenants_blocks() {
    let site = site("0");
    let daemon = site.start_ready().await;
    let (mine, theirs) = (attach_as("mine", "model", LARGE), attach_as("theirs", "model", SMALL));
    // Mapped before any segment changes its tenant.
    let mine_raw = Raw::open(&site.socket(), None, &mine).await;
    let theirs_raw = Raw::open(&site.socket(), Some(TOKEN), &theirs).await;
    let mine_file = Memory::to_read(&mine_raw.shared_file, mine_raw.shared_bytes).unwrap();
    let theirs_file = Memory::to_read(&theirs_raw.shared_file, theirs_raw.shared_bytes).unwrap();
    let (mine, theirs) = (client(&site, false, mine).await, client(&site, true, theirs).await);
    let (mine_mark, theirs_mark) = (b"what only the one tenant may see", b"what only the 2nd tenant may see");
    let large = HOST_BYTES as usize / LARGE as usize;
    let small = HOST_BYTES as usize / SMALL as usize;
    for round in 0..3 {
        put_marked(&mine, 2 * round, large, mine_mark).await;
        assert!(mine_file.has_page_with(mine_mark), "what is searched for is found where it is to be");
        assert!(!theirs_file.has_page_with(mine_mark));
        put_marked(&theirs, 2 * round + 1, small, theirs_mark).await;
        assert!(theirs_file.has_page_with(theirs_mark), "what is searched for is found where it is to be");
        assert!(!mine_file.has_page_with(theirs_mark) && !theirs_file.has_page_with(mine_mark));
    }
    daemon.stop();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_detach_by_another_tenant_ends_nothing() {
    let site = site("0");
    let daemon = site.start_ready().await;
    let mut mine = Raw::open(&site.socket(), None, &attach_as("mine", "model", LARGE)).await;
    mine.put(&mine.run(1, 4));
    let detach = wire::DetachRequest { attachment: mine.attachment };
    let detach = grpc::authorized(detach, &format!("Bearer {TOKEN}"));
    grpc::over_unix(&site.socket()).await.detach(detach).await.unwrap_err();
    mine.put(&mine.run(2, 4));
    mine.leave();
    daemon.stop();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn memory_that_a_client_writes_is_shown_to_its_own_tenant_alone() {
    let site = site("0");
    let daemon = site.start_ready().await;
    let mut writer = Raw::open(&site.socket(), None, &attach_as("writer", "model", LARGE)).await;
    let sibling = Raw::open(&site.socket(), None, &attach_as("sibling", "model", LARGE)).await;
    let stranger = Raw::open(&site.socket(), Some(TOKEN), &attach_as("stranger", "model", LARGE)).await;
    let run = writer.run(1, 4);
    let slots = writer.put(&run);
    let mapping = slots[0].extent.segment;
    assert!(stranger.fetch(mapping).is_none(), "another tenant's memory was given away");
    let offer = sibling.fetch(mapping).expect("a tenant's processes read each other's blocks");
    assert!(!offer.writable && Memory::to_write(&offer.file, offer.bytes).is_err());
    let memory = Memory::to_read(&offer.file, offer.bytes).unwrap();
    assert_eq!(memory.read(slots[0].extent.offset_bytes, LARGE as usize), run.payload(0));
    for unknown in [0, mapping + 1, mapping + 1000, u32::MAX] {
        assert!(sibling.fetch(unknown).is_none(), "mapping {unknown}");
    }
    daemon.stop();
}

/// Between `Mapped` and the seal nobody but its writer may have the file: whoever has could map it for writing, and the writer's group
/// trusts what lies there.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn memory_that_is_not_closed_for_writers_yet_is_given_to_nobody() {
    let site = site("0");
    let daemon = site.start_ready().await;
    let sibling = Raw::open(&site.socket(), None, &attach_as("sibling", "model", LARGE)).await;
    let mut offers = Vec::new();
    for group in ["first", "second"] {
        let mut writer = Raw::open(&site.socket(), None, &attach_as(group, "model", LARGE)).await;
        writer.submit(&Raw::reserve_request(&writer.run(1, 1)));
        offers.push((writer.offer(), writer));
    }
    // The pages of the first are made before the second is closed, which takes a while.
    for (offer, writer) in &offers {
        writer.socket.say(ToDaemon::Mapped(offer.mapping), &[]);
    }
    let mapping = offers[1].0.mapping;
    let mut found = None;
    wait_until("memory that is closed for writers", || {
        found = sibling.fetch(mapping);
        found.is_some()
    });
    let found = found.unwrap();
    assert!(Memory::to_write(&found.file, found.bytes).is_err(), "a sibling's memory, mapped for writing");
    daemon.stop();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn shared_memory_cannot_be_opened_for_writing_nor_be_cut() {
    let site = site("0");
    let daemon = site.start_ready().await;
    let writer = client(&site, false, attach_as("writer", "model", LARGE)).await;
    let run = Run::new(&writer, 1, 16);
    run.put(&writer).await;
    let hostile = Raw::open(&site.socket(), None, &attach_as("hostile", "model", LARGE)).await;
    let path = format!("/proc/self/fd/{}", hostile.shared_file.as_raw_fd());
    if hostile.verify {
        println!("SKIPPED: user namespaces are refused here, so a process of the daemon's own uid could write");
    } else {
        let error = OpenOptions::new().write(true).open(&path).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(rustix::io::Errno::ROFS.raw_os_error()), "{error}");
        let error = std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o777)).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(rustix::io::Errno::ROFS.raw_os_error()), "{error}");
    }
    assert!(Memory::to_write(&hostile.shared_file, hostile.shared_bytes).is_err());
    assert!(rustix::fs::ftruncate(&hostile.shared_file, 0).is_err());
    assert!(rustix::fs::ftruncate(&hostile.ring_file, 0).is_err());
    assert!(rustix::fs::ftruncate(&hostile.ring_file, 1 << 40).is_err());
    // More than there is may be mapped; whoever touches what lies behind the end harms nobody else.
    let beyond = Memory::to_read(&hostile.shared_file, 2 * hostile.shared_bytes);
    assert_eq!(beyond.map(|memory| memory.bytes()).unwrap_or(0) % hostile.shared_bytes, 0);
    store_bytes(&writer, 1000, HOST_BYTES / 8).await;
    run.expect(&writer, None).await;
    daemon.stop();
}
