//! What may go wrong at a local door, and who leaves in the middle.

use std::sync::atomic::Ordering;
use std::time::Duration;

use tender_client::proto::Namespace;
use tender_client::proto::greeting::door_path;

use super::*;
use crate::fake::local::{Misplaced, OWN_MAPPING, THEIR_MAPPING};

#[tokio::test]
async fn other_bytes_than_were_stored_never_arrive() {
    let node = Node::new(Script::default());
    let (client, keys, payloads) = node.with_blocks(3).await;
    for (each, all) in [(true, false), (false, true)] {
        node.script(|script| (script.verifies_each, script.verifies_all, script.flips) = (each, all, false));
        // What is true of all is said at the opening.
        let client = if all { node.client().await } else { client.clone() };
        let got = client.get(&keys, Shard::WHOLE).await;
        assert_eq!((got.end, got.blocks.len()), (GetEnd::Complete, 3));
        assert!(got.blocks.iter().zip(&payloads).all(|(view, payload)| !view.is_leased() && view.equals(payload)));
        node.all_given_back().await;
        node.script(|script| script.flips = true);
        let got = client.get(&keys, Shard::WHOLE).await;
        assert_eq!((got.end, got.blocks.len()), (GetEnd::SumMismatch, 1));
        assert!(got.blocks[0].equals(&payloads[0]));
        node.all_given_back().await;
    }
}

#[tokio::test]
async fn what_lies_where_it_cannot_is_not_read() {
    let node = Node::new(Script::default());
    let (client, keys, payloads) = node.with_blocks(3).await;
    for misplaced in [Misplaced::BehindTheEnd, Misplaced::Length, Misplaced::Shard, Misplaced::FewParts] {
        node.script(|script| script.misplaces = misplaced);
        let got = client.get(&keys, Shard::WHOLE).await;
        assert_eq!((got.end, got.blocks.len()), (GetEnd::SumMismatch, 1), "{misplaced:?}");
        assert!(got.blocks[0].equals(&payloads[0]));
        drop(got);
        node.all_given_back().await;
    }
}

#[tokio::test]
async fn memory_that_is_not_mapped_yet_is_fetched_or_done_without() {
    let node = Node::new(Script::default());
    let (client, keys, payloads) = node.with_blocks(3).await;
    node.script(|script| (script.leases_elsewhere, script.gives_elsewhere) = (true, false));
    let start = std::time::Instant::now();
    let got = client.get(&keys, Shard::WHOLE).await;
    assert_eq!(got.end, GetEnd::Complete, "over gRPC");
    assert!(start.elapsed() < AT_ONCE, "{:?}", start.elapsed());
    assert!(got.blocks.iter().zip(&payloads).all(|(view, payload)| !view.is_leased() && view.equals(payload)));
    node.all_given_back().await;
    node.script(|script| script.gives_elsewhere = true);
    let got = client.get(&keys, Shard::WHOLE).await;
    assert_eq!(got.end, GetEnd::Complete);
    assert!(got.blocks.iter().zip(&payloads).all(|(view, payload)| view.is_leased() && view.equals(payload)));
}

#[tokio::test]
async fn a_new_ring_fetches_what_others_write_again_and_asks_after_what_is_written_here() {
    let node = Node::new(Script::default());
    let (client, keys, payloads) = node.with_blocks(3).await;
    node.script(|script| script.leases_elsewhere = true);
    let before = client.get(&keys, Shard::WHOLE).await;
    assert_eq!(node.script(|script| std::mem::take(&mut script.fetched)), [THEIR_MAPPING]);
    node.world.node.attached.lock().unwrap().clear();
    let after = client.get(&keys, Shard::WHOLE).await;
    assert_eq!(node.script(|script| script.fetched.clone()), [OWN_MAPPING, THEIR_MAPPING]);
    for got in [before, after] {
        assert!(got.blocks.iter().zip(&payloads).all(|(view, payload)| view.is_leased() && view.equals(payload)));
    }
    node.all_given_back().await;
}

#[tokio::test]
async fn what_finds_no_memory_here_is_put_over_grpc() {
    // None at all; some, and then none; memory that was never given.
    let cases = [
        (small(|script| script.ingest_bytes = 0), 1),
        (small(|script| script.ingest_bytes = 2 * BLOCK_BYTES as u64 + 1), 0),
        (
            small(|script| {
                script.misnames = |_| true;
                script.busy = 2;
            }),
            1,
        ),
    ];
    for (script, grpc_puts) in cases {
        let node = Node::new(script);
        let (client, keys, payloads) = node.with_blocks(5).await;
        assert_eq!(node.grpc_puts(), grpc_puts);
        let got = client.get(&keys, Shard::WHOLE).await;
        assert!(got.end == GetEnd::Complete && got.blocks.iter().zip(&payloads).all(|(view, put)| view.equals(put)));
        assert_eq!(put(&client, &keys, &payloads).await, [PutOutcome::AlreadyPresent; 5]);
        drop(got);
        node.all_given_back().await;
    }
}

#[tokio::test]
async fn without_a_local_door_all_goes_over_grpc() {
    let world = World::new();
    let client = world.client().await;
    assert_eq!(client.door(), Doors::Grpc);
    assert_eq!(client.lookup(&[]).await.prefix_blocks, 0);

    let node = Node::new(small(|script| script.refuses = true));
    let client = node.world.client().await;
    assert_eq!(client.door(), Doors::Grpc);
    node.script(|script| script.refuses = false);
    let target = Target::Unix(node.world.socket());
    let client = Remote::attach_by(target, None, attach(), Doors::Grpc).await.unwrap();
    let (keys, payloads) = blocks(&client, 2);
    assert_eq!(put(&client, &keys, &payloads).await, [PutOutcome::Stored; 2]);
    assert_eq!((client.door(), node.grpc_puts()), (Doors::Grpc, 1));
    assert_eq!(node.script(|script| (script.opened, script.asked)), (0, 0));
}

#[tokio::test]
async fn a_door_that_was_closed_once_is_tried_again() {
    let node = Node::new(Script::default());
    let (client, keys, payloads) = node.with_blocks(3).await;
    let before = client.get(&keys, Shard::WHOLE).await;
    node.script(|script| script.refuses = true);
    node.world.node.attached.lock().unwrap().clear();
    assert_eq!(client.lookup(&keys).await.prefix_blocks, 3);
    assert_eq!(client.door(), Doors::Grpc);
    node.script(|script| script.refuses = false);
    let start = std::time::Instant::now();
    while client.door() == Doors::Grpc {
        assert!(start.elapsed() < 5 * AT_ONCE);
        sleep(Duration::from_millis(10)).await;
    }
    // What is held from before was confirmed.
    assert_eq!(node.script(|script| script.held.len()), 3);
    let after = client.get(&keys, Shard::WHOLE).await;
    for got in [before, after] {
        assert!(got.blocks.iter().zip(&payloads).all(|(view, payload)| view.is_leased() && view.equals(payload)));
    }
    node.all_given_back().await;
}

#[tokio::test]
async fn the_door_is_not_tried_with_a_public_namespace() {
    let node = Node::new(small(|script| script.refuses = true));
    let namespace = Namespace { public: true, ..attach().namespace };
    let client =
        Remote::attach(Target::Unix(node.world.socket()), None, Attach { namespace, ..attach() }).await.unwrap();
    let (keys, payloads) = blocks(&client, 1);
    assert_eq!(put(&client, &keys, &payloads).await, [PutOutcome::Stored]);
    // Twice as long as a door that refuses is left alone at first.
    sleep(Duration::from_millis(300)).await;
    assert_eq!((client.door(), node.world.node.attaches()), (Doors::Grpc, 1));
}

#[tokio::test]
async fn a_door_that_hangs_is_done_without() {
    let world = World::new();
    let _never_accepted = std::os::unix::net::UnixListener::bind(door_path(&world.socket())).unwrap();
    let client = timeout(2 * AT_ONCE, world.client()).await.expect("it is not waited for long");
    assert_eq!(client.door(), Doors::Grpc);
}

#[tokio::test]
async fn who_closes_while_the_door_is_tried_has_left() {
    let world = World::new();
    let _never_accepted = std::os::unix::net::UnixListener::bind(door_path(&world.socket())).unwrap();
    let client = world.client().await;
    let start = std::time::Instant::now();
    while world.node.attaches() < 2 {
        assert!(start.elapsed() < AT_ONCE, "the door is not tried again");
        sleep(Duration::from_millis(5)).await;
    }
    client.close().await;
    assert_eq!(world.node.detaches.load(Ordering::Relaxed), 1);
    // What it was tried with is left too.
    while !world.node.attached.lock().unwrap().is_empty() {
        assert!(start.elapsed() < 3 * AT_ONCE);
        sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn views_outlive_the_daemon_and_calls_find_the_next_one() {
    let mut node = Node::new(Script::default());
    let (client, keys, payloads) = node.with_blocks(3).await;
    let before = client.get(&keys, Shard::WHOLE).await;
    node.kill();
    let start = std::time::Instant::now();
    assert_eq!(client.get(&keys, Shard::WHOLE).await.end, GetEnd::Unavailable);
    assert_eq!(client.lookup(&keys).await.prefix_blocks, 0);
    assert_eq!(put(&client, &keys, &payloads).await, [PutOutcome::Unavailable; 3]);
    assert!(start.elapsed() < AT_ONCE, "{:?}", start.elapsed());
    node.start();
    let start = std::time::Instant::now();
    while client.lookup(&keys).await.prefix_blocks != 3 {
        assert!(start.elapsed() < 3 * AT_ONCE);
        sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(client.door(), Doors::Ring);
    let after = client.get(&keys, Shard::WHOLE).await;
    assert_eq!(after.end, GetEnd::Complete);
    // The fake daemon spoils what is given back, and its end gives back all: so only those of the next one are as they were.
    assert!(before.blocks.iter().all(|view| view.is_leased() && view.to_vec().len() == BLOCK_BYTES));
    assert!(after.blocks.iter().zip(&payloads).all(|(view, payload)| view.is_leased() && view.equals(payload)));
    drop(before);
    drop(after);
    node.all_given_back().await;
}

#[tokio::test]
async fn whoever_waits_when_the_daemon_goes_is_answered_by_the_next_one() {
    let mut node = Node::new(Script::default());
    let (client, keys, _) = node.with_blocks(3).await;
    node.script(|script| script.holds = true);
    let asking = {
        let (client, keys) = (client.clone(), keys.clone());
        tokio::spawn(async move { client.lookup(&keys).await.prefix_blocks })
    };
    node.door().until("asked", |script| script.asked > 2).await;
    node.kill();
    node.start();
    assert_eq!(timeout(AT_ONCE, asking).await.unwrap().unwrap(), 3);
}

#[tokio::test]
async fn a_daemon_that_forgot_us_is_attached_to_again_through_its_ring() {
    let node = Node::new(Script::default());
    let (client, keys, payloads) = node.with_blocks(3).await;
    let forget = || node.world.node.attached.lock().unwrap().clear();
    forget();
    assert_eq!(client.lookup(&keys).await.prefix_blocks, 3);
    forget();
    assert_eq!(client.get(&keys, Shard::WHOLE).await.end, GetEnd::Complete);
    forget();
    assert_eq!(put(&client, &keys, &payloads).await, [PutOutcome::AlreadyPresent; 3]);
    assert_eq!(client.door(), Doors::Ring);
    // The rings that are not used any more are left.
    node.door().until("left", |script| script.opened == 4 && script.left == 3).await;
}

/// Its answer came and was not looked at when the next ring began: nobody confirmed what it grants.
#[tokio::test]
async fn what_was_granted_and_is_in_no_books_when_the_next_ring_begins_is_asked_for_again() {
    let node = Node::new(Script::default());
    let (client, keys, payloads) = node.with_blocks(3).await;
    node.script(|script| script.holds = true);
    let mut getting = Box::pin(client.get(&keys, Shard::WHOLE));
    assert!(!is_ready_at_once(&mut getting).await);
    node.script(|script| script.holds = false);
    node.door().until("leased", |script| script.held.len() == 3).await;
    node.world.node.attached.lock().unwrap().clear();
    assert_eq!(client.lookup(&keys).await.prefix_blocks, 3);
    node.all_given_back().await;
    let got = timeout(2 * AT_ONCE, getting).await.unwrap();
    assert_eq!(got.end, GetEnd::Complete);
    assert!(got.blocks.iter().zip(&payloads).all(|(view, payload)| view.is_leased() && view.equals(payload)));
    drop(got);
    node.all_given_back().await;
}

#[tokio::test]
async fn a_ring_that_closes_is_changed_for_a_new_one() {
    let node = Node::new(Script::default());
    let (client, keys, payloads) = node.with_blocks(3).await;
    node.script(|script| script.holds = true);
    let asking = {
        let (client, keys) = (client.clone(), keys.clone());
        tokio::spawn(async move { client.lookup(&keys).await.prefix_blocks })
    };
    node.door().until("asked", |script| script.asked > 2).await;
    node.script(|script| script.closes = true);
    sleep(Duration::from_millis(50)).await;
    node.script(|script| (script.closes, script.holds) = (false, false));
    assert_eq!(timeout(2 * AT_ONCE, asking).await.unwrap().unwrap(), 3);
    assert_eq!(client.get(&keys, Shard::WHOLE).await.end, GetEnd::Complete);
    assert_eq!(put(&client, &keys, &payloads).await, [PutOutcome::AlreadyPresent; 3]);
    assert_eq!((client.door(), node.world.node.attaches()), (Doors::Ring, 2));
}

#[tokio::test]
async fn a_question_that_a_closing_ring_never_answers_is_asked_again() {
    let node = Node::new(Script::default());
    let (client, keys, _) = node.with_blocks(3).await;
    node.script(|script| script.holds = true);
    let asking = {
        let (client, keys) = (client.clone(), keys.clone());
        tokio::spawn(async move { client.lookup(&keys).await.prefix_blocks })
    };
    node.door().until("asked", |script| script.asked > 2).await;
    node.script(|script| script.closes = true);
    sleep(Duration::from_millis(200)).await;
    node.script(|script| script.closes = false);
    // The first ring goes on holding its answer; the second one is asked after a second's patience.
    node.door().until("opened anew", |script| script.opened == 2).await;
    node.script(|script| script.holds = false);
    assert_eq!(timeout(2 * AT_ONCE, asking).await.unwrap().unwrap(), 3);
}

#[tokio::test]
async fn an_answer_that_is_none_ends_the_ring() {
    let node = Node::new(Script::default());
    let (client, keys, _) = node.with_blocks(3).await;
    node.script(|script| script.babbles = true);
    // The next ring babbles as well when it is told what is held: what is asked goes over gRPC then.
    assert_eq!(client.get(&keys, Shard::WHOLE).await.end, GetEnd::Complete);
    assert_eq!(client.door(), Doors::Grpc);
}

#[tokio::test]
async fn a_door_that_answers_nothing_is_waited_for_until_the_deadline() {
    let node = Node::new(Script::default());
    let (client, keys, payloads) = node.with_blocks(3).await;
    let client = client.with_deadline(Duration::from_millis(200));
    node.script(|script| script.holds = true);
    let start = std::time::Instant::now();
    let (found, got, outcomes) =
        tokio::join!(client.lookup(&keys), client.get(&keys, Shard::WHOLE), put(&client, &keys, &payloads));
    assert_eq!((found.prefix_blocks, got.end), (0, GetEnd::Deadline));
    assert_eq!(outcomes, [PutOutcome::Unavailable; 3]);
    assert!(start.elapsed() < AT_ONCE, "{:?}", start.elapsed());
    node.script(|script| script.holds = false);
    assert_eq!(client.lookup(&keys).await.prefix_blocks, 3, "and is asked again when it goes on");
    node.all_given_back().await;
}

#[tokio::test]
async fn a_get_that_is_broken_off_holds_nothing() {
    let node = Node::new(Script::default());
    let (client, keys, _) = node.with_blocks(3).await;
    node.script(|script| script.holds = true);
    for _ in 0..3 {
        assert!(timeout(Duration::from_millis(30), client.get(&keys, Shard::WHOLE)).await.is_err());
    }
    let before = node.script(|script| std::mem::take(&mut script.leased_bytes_max));
    node.script(|script| script.holds = false);
    node.door().until("leased to nobody", |script| script.leased_bytes_max > before).await;
    node.all_given_back().await;
    // Taken off the ring and never picked up: the first poll submits, and finds nothing; the next is never.
    for _ in 0..50 {
        let mut getting = Box::pin(client.get(&keys, Shard::WHOLE));
        let first = is_ready_at_once(&mut getting).await;
        sleep(Duration::from_millis(if first { 0 } else { 5 })).await;
    }
    node.all_given_back().await;
}

#[tokio::test]
async fn a_put_that_is_broken_off_reserves_nothing() {
    let node = Node::new(Script::default());
    let client = node.client().await;
    let (keys, payloads) = blocks(&client, 20);
    for polls in 1..20 {
        let mut putting = Box::pin(put(&client, &keys, &payloads));
        for _ in 0..polls {
            if is_ready_at_once(&mut putting).await {
                break;
            }
            tokio::task::yield_now().await;
            sleep(Duration::from_micros(200)).await;
        }
        drop(putting);
        node.all_given_back().await;
    }
    let outcomes = put(&client, &keys, &payloads).await;
    assert!(outcomes.iter().all(|outcome| outcome.is_there()), "{outcomes:?}");
    assert_eq!(node.grpc_puts(), 0);
}

#[tokio::test]
async fn what_the_daemon_is_too_busy_to_take_back_is_given_back_later() {
    let node = Node::new(Script::default());
    let (client, keys, _) = node.with_blocks(3).await;
    node.script(|script| script.busy = 5);
    drop(client.get(&keys, Shard::WHOLE).await);
    node.all_given_back().await;
}

#[tokio::test]
async fn the_last_view_leaves() {
    let node = Node::new(Script::default());
    let (client, keys, payloads) = node.with_blocks(3).await;
    let got = client.get(&keys, Shard::WHOLE).await;
    client.close().await;
    sleep(Duration::from_millis(100)).await;
    assert_eq!((node.script(|script| script.left), node.world.node.detaches.load(Ordering::Relaxed)), (0, 0));
    assert!(got.blocks.iter().zip(&payloads).all(|(view, payload)| view.equals(payload)));
    drop(got);
    node.door().until("left", |script| script.left == 1 && script.held.is_empty()).await;
    assert_eq!(node.script(|script| script.left_holding), 0);
}

#[tokio::test]
async fn who_closes_has_given_back_and_left() {
    let node = Node::new(Script::default());
    let (client, keys, _) = node.with_blocks(3).await;
    drop(client.get(&keys, Shard::WHOLE).await);
    client.close().await;
    assert_eq!(node.script(|script| script.held.len()), 0);
    node.door().until("left", |script| script.left == 1).await;
    assert_eq!(node.script(|script| script.left_holding), 0);
    assert_eq!(node.world.node.detaches.load(Ordering::Relaxed), 1);
}
