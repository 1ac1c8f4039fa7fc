//! Memory that the caller brings.

use std::fs::File;
use std::os::fd::OwnedFd;

use rustix::fs::{MemfdFlags, SealFlags};
use tender_client::{BringError, MemoryState, OwnMemory};

use super::*;
use crate::fake::local::{Bringing, OWN_BYTES};

fn memfd(flags: MemfdFlags, bytes: u64) -> OwnedFd {
    let file = rustix::fs::memfd_create(c"engine", flags | MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&file, bytes).unwrap();
    file
}

fn memory() -> OwnMemory {
    OwnMemory::new(memfd(MemfdFlags::ALLOW_SEALING, OWN_BYTES)).unwrap()
}

/// A client that has brought memory before any was offered to it.
async fn bringing(bringing: Bringing, memory: &OwnMemory) -> (Node, Remote) {
    let node = Node::new(small(|script| (script.offers, script.bringing) = (false, bringing)));
    let client = node.world.client().await;
    client.bring(memory).unwrap();
    assert_eq!(memory.state(), MemoryState::Offered);
    node.script(|script| script.offers = true);
    (node, client)
}

async fn becomes(memory: &OwnMemory, state: MemoryState) {
    let start = std::time::Instant::now();
    while memory.state() != state {
        assert!(start.elapsed() < 5 * AT_ONCE, "{:?} does not become {state:?}", memory.state());
        sleep(Duration::from_millis(1)).await;
    }
}

async fn puts_and_gets(client: &Remote, count: usize) {
    let (keys, payloads) = blocks(client, count);
    assert_eq!(put(client, &keys, &payloads).await, vec![PutOutcome::Stored; count]);
    let got = client.get(&keys, Shard::WHOLE).await;
    assert!(got.end == GetEnd::Complete && got.blocks.iter().zip(&payloads).all(|(view, put)| view.equals(put)));
    client.purge(Purge::Namespace).await;
}

#[tokio::test]
async fn blocks_are_put_where_the_caller_has_brought_memory() {
    let file = memfd(MemfdFlags::ALLOW_SEALING, OWN_BYTES);
    let own = OwnMemory::new(file.try_clone().unwrap()).unwrap();
    assert!(own.bytes() == OWN_BYTES && !own.start().is_null());
    let (node, client) = bringing(Bringing::Taken, &own).await;
    becomes(&own, MemoryState::Used).await;
    assert_eq!(client.segment_bytes(), Some(OWN_BYTES));
    assert_eq!(client.bring(&own), Err(BringError::Brought));
    puts_and_gets(&client, 3).await;
    assert_eq!((node.grpc_puts(), node.script(|script| (script.mapped, script.brought))), (0, (0, 1)));
    let mut bytes = vec![0; OWN_BYTES as usize];
    rustix::io::pread(&file, &mut bytes[..], 0).unwrap();
    assert!((1..=3).all(|block| bytes.contains(&block)), "the payloads lie in the file that was brought");
    // What is there no more is the caller's, and may be brought again.
    node.script(|script| script.forgets = true);
    becomes(&own, MemoryState::Own).await;
    client.bring(&own).unwrap();
    client.close().await;
    becomes(&own, MemoryState::Own).await;
}

#[tokio::test]
async fn what_is_not_taken_is_told_with_the_reason_and_the_daemons_memory_is_used() {
    let own = memory();
    let (node, client) = bringing(Bringing::NotTaken, &own).await;
    becomes(&own, MemoryState::Refused("not today".into())).await;
    node.door().until("the daemon's memory", |script| script.mapped == 1).await;
    puts_and_gets(&client, 3).await;
    assert_eq!(node.grpc_puts(), 0);
    client.bring(&own).unwrap();
}

#[tokio::test]
async fn a_daemon_that_does_not_know_of_it_is_brought_nothing() {
    let own = memory();
    let (node, client) = bringing(Bringing::Unknown, &own).await;
    node.door().until("the daemon's memory", |script| script.mapped == 1).await;
    puts_and_gets(&client, 3).await;
    assert_eq!((client.door(), client.segment_bytes()), (Doors::Ring, None));
    assert_eq!((own.state(), node.script(|script| script.brought)), (MemoryState::Offered, 0));
}

#[tokio::test]
async fn memory_that_went_with_its_daemon_is_the_callers_again() {
    let own = memory();
    let (mut node, client) = bringing(Bringing::Taken, &own).await;
    becomes(&own, MemoryState::Used).await;
    node.kill();
    node.start();
    becomes(&own, MemoryState::Own).await;
    client.bring(&own).unwrap();
}

/// Who fills slots there has not heard of the daemon's end.
#[tokio::test]
async fn memory_that_a_put_still_fills_is_not_the_callers_yet() {
    let own = memory();
    let (mut node, client) = bringing(Bringing::Taken, &own).await;
    becomes(&own, MemoryState::Used).await;
    let (keys, payloads) = blocks(&client, 20);
    let mut putting = Box::pin(put(&client, &keys, &payloads));
    // It gives way to others behind each slot that it has filled.
    let mut polls_left = 3;
    while polls_left > 0 {
        assert!(!is_ready_at_once(&mut putting).await);
        sleep(Duration::from_millis(2)).await;
        polls_left -= usize::from(node.script(|script| script.put_bytes) > 0);
    }
    node.kill();
    node.start();
    let start = std::time::Instant::now();
    while node.script(|script| script.asked) == 0 {
        assert!(start.elapsed() < 5 * AT_ONCE, "not attached again");
        client.lookup(&keys).await;
        sleep(Duration::from_millis(1)).await;
    }
    assert_eq!((own.state(), client.bring(&own)), (MemoryState::Used, Err(BringError::Brought)));
    drop(putting);
    becomes(&own, MemoryState::Own).await;
    client.bring(&own).unwrap();
}

/// Its ring closes and its socket ends: what the daemon said meanwhile was heard by nobody.
#[tokio::test]
async fn memory_that_was_given_up_while_nobody_listened_is_asked_after() {
    let own = memory();
    let (node, client) = bringing(Bringing::Taken, &own).await;
    becomes(&own, MemoryState::Used).await;
    node.script(|script| script.closes = true);
    sleep(Duration::from_millis(50)).await;
    node.script(|script| script.closes = false);
    client.lookup(&blocks(&client, 1).0).await;
    becomes(&own, MemoryState::Own).await;
    assert_eq!(client.door(), Doors::Ring);
}

#[test]
fn what_cannot_be_brought_is_refused_with_the_cure() {
    let sealed = |seals| {
        let file = memfd(MemfdFlags::ALLOW_SEALING, 8192);
        rustix::fs::fcntl_add_seals(&file, seals).unwrap();
        file
    };
    let folder = tempfile::tempdir().unwrap();
    let on_disk = File::create_new(folder.path().join("file")).unwrap();
    on_disk.set_len(8192).unwrap();
    let cases = [
        (OwnedFd::from(on_disk), "not a memfd"),
        (memfd(MemfdFlags::empty(), 8192), "cannot be sealed"),
        (memfd(MemfdFlags::ALLOW_SEALING, 0), "ftruncate"),
        (sealed(SealFlags::FUTURE_WRITE), "before you seal it"),
        (sealed(SealFlags::SEAL), "without F_SEAL_SEAL"),
    ];
    for (file, telling) in cases {
        let error = OwnMemory::new(file).unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::InvalidInput);
        assert!(error.to_string().contains(telling), "{error} does not tell {telling:?}");
    }
}
