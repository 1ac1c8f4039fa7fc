//! `Remote` in front of a daemon that is none: the promises of the trait, and every way in which a daemon may fail them. Over gRPC here,
//! through its local door in `ring`.

#[path = "../../tests/conformance/mod.rs"]
mod conformance;
mod fake;
mod ring;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use bytes::Bytes;
use fake::{Daemon, Node, Trouble};
use tempfile::TempDir;
use tender_client::proto::{BlockKey, BlockLayout, Namespace, Shard, TenantSalt, wire};
use tender_client::{
    Attach, AttachError, BlockStore, GetEnd, Lookup, Operator, Prefetched, Purge, Put, PutOutcome, Remote, Target,
    WatchItem,
};
use tokio::time::sleep;
use tonic::Code;

const BLOCK_BYTES: usize = 200_000;

/// Longer than anything here takes that must not wait.
const AT_ONCE: Duration = Duration::from_secs(2);

struct World {
    node: Arc<Node>,
    daemon: Option<Daemon>,
    directory: TempDir,
}

impl World {
    fn new() -> Self {
        Self::of(Node::new())
    }

    fn of(node: Node) -> Self {
        let mut world = Self { node: Arc::new(node), daemon: None, directory: tempfile::tempdir().unwrap() };
        world.start();
        world
    }

    fn socket(&self) -> PathBuf {
        self.directory.path().join("socket")
    }

    fn start(&mut self) {
        self.daemon = Some(Daemon::on_socket(&self.node, &self.socket()));
    }

    fn kill(&mut self) {
        self.daemon = None;
        self.node.attached.lock().unwrap().clear();
    }

    async fn client(&self) -> Remote {
        Remote::attach(Target::Unix(self.socket()), None, attach()).await.unwrap()
    }
}

fn attach() -> Attach {
    let namespace = Namespace::text("fake", "bf16", 4);
    Attach {
        group: "tests".into(),
        member: "remote".into(),
        namespace,
        layout: BlockLayout::opaque(BLOCK_BYTES as u64),
    }
}

fn blocks(client: &Remote, count: usize) -> (Vec<BlockKey>, Vec<Bytes>) {
    let tokens: Vec<u32> = (0..4 * count as u32).collect();
    let keys = client.terms().chain(&tokens);
    let payloads = (0..count).map(|block| Bytes::from(vec![block as u8 + 1; BLOCK_BYTES])).collect();
    (keys, payloads)
}

async fn put(client: &Remote, keys: &[BlockKey], payloads: &[Bytes]) -> Vec<PutOutcome> {
    let parent = client.terms().root;
    client.put(Put { parent, keys, shard: Shard::WHOLE, payloads, tokens: &[] }).await
}

/// A daemon with three blocks, a client, and their keys.
async fn with_three_blocks() -> (World, Remote, Vec<BlockKey>, Vec<Bytes>) {
    with_three_blocks_in(Node::new()).await
}

async fn with_three_blocks_in(node: Node) -> (World, Remote, Vec<BlockKey>, Vec<Bytes>) {
    let world = World::of(node);
    let client = world.client().await;
    let (keys, payloads) = blocks(&client, 3);
    assert_eq!(put(&client, &keys, &payloads).await, [PutOutcome::Stored; 3]);
    (world, client, keys, payloads)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn promises_are_kept_over_a_socket() {
    let world = World::new();
    let target = Target::Unix(world.socket());
    conformance::suite(async |attach| Remote::attach(target.clone(), None, attach).await.unwrap(), true).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn promises_are_kept_over_loopback_with_a_token_and_small_limits() {
    let node = Node { token: Some("s3cret".into()), keys_max: 3, chunk_bytes_max: 1001, ..Node::new() };
    let daemon = Daemon::on_loopback(&Arc::new(node));
    let make = async |attach| Remote::attach(daemon.target.clone(), Some("s3cret".into()), attach).await.unwrap();
    conformance::suite(make, true).await;
}

#[tokio::test]
async fn whom_nobody_answers_is_told_what_to_do() {
    let missing = Target::Unix("/nonexistent/tender.sock".into());
    let error = Remote::attach(missing, None, attach()).await.unwrap_err();
    let text = error.to_string();
    assert!(matches!(error, AttachError::Unavailable { .. }), "{error:?}");
    assert!(text.contains("/nonexistent/tender.sock") && text.contains("No such file"), "{text}");
    assert!(text.contains("tender serve"), "{text}");

    let far = Target::Loopback(SocketAddr::from(([192, 0, 2, 1], 7070)));
    let error = Remote::attach(far, Some("token".into()), attach()).await.unwrap_err();
    assert!(matches!(&error, AttachError::Refused(why) if why.contains("loopback")), "{error}");

    let node = Arc::new(Node { token: Some("right".into()), ..Node::new() });
    let daemon = Daemon::on_loopback(&node);
    for (token, shown) in [(None, false), (Some("wrong".to_owned()), true)] {
        let error = Remote::attach(daemon.target.clone(), token, attach()).await.unwrap_err();
        let is_unknown = matches!(error, AttachError::Unauthenticated { token_shown, .. } if token_shown == shown);
        assert!(is_unknown && error.to_string().contains("no such token"), "{error:?}");
    }
    let error = Remote::attach(daemon.target.clone(), Some("two\nlines".to_owned()), attach()).await.unwrap_err();
    assert!(matches!(error, AttachError::Refused(_)), "{error}");
    node.set(Trouble::OtherRoot);
    let error = Remote::attach(daemon.target.clone(), Some("right".into()), attach()).await.unwrap_err();
    assert!(matches!(error, AttachError::RootsDiffer { .. }), "{error}");
    node.set(Trouble::None);
    let mut impossible = attach();
    impossible.namespace.model.clear();
    let error = Remote::attach(daemon.target.clone(), Some("right".into()), impossible).await.unwrap_err();
    assert!(error.to_string().contains("namespace.model"), "{error}");
}

#[tokio::test]
async fn a_daemon_that_hangs_at_attach_is_not_waited_for_long() {
    let world = World::new();
    world.node.set(Trouble::Hang);
    let start = Instant::now();
    let error = Remote::attach(Target::Unix(world.socket()), None, attach()).await.unwrap_err();
    assert!(matches!(error, AttachError::Unavailable { .. }), "{error}");
    assert!(start.elapsed() < Duration::from_secs(7));
}

#[tokio::test]
async fn without_a_daemon_everything_is_a_miss_at_once() {
    let (mut world, client, keys, payloads) = with_three_blocks().await;
    world.kill();
    for _ in 0..3 {
        let start = Instant::now();
        assert_eq!(client.lookup(&keys).await, Lookup { prefix_blocks: 0, host: vec![false; 3], disk: vec![false; 3] });
        assert_eq!(put(&client, &keys, &payloads).await, [PutOutcome::Unavailable; 3]);
        let got = client.get(&keys, Shard::WHOLE).await;
        assert_eq!((got.blocks.len(), got.end), (0, GetEnd::Unavailable));
        let mut told = Vec::new();
        let prefetched = client.prefetch(&keys, |progress| told.push(*progress)).await;
        assert_eq!(prefetched, Prefetched { shed_blocks: 3, ..Prefetched::default() });
        assert_eq!(told, [prefetched]);
        assert_eq!(client.durable(&keys).await, [false; 3]);
        assert!(!client.purge(Purge::Keys(&keys)).await.complete);
        assert!(!client.purge(Purge::Namespace).await.complete);
        assert_eq!(client.watch(None).await.next().await, None);
        assert!(start.elapsed() < AT_ONCE, "{:?}", start.elapsed());
    }
}

#[tokio::test]
async fn a_daemon_that_was_restarted_costs_no_miss() {
    let (mut world, client, keys, payloads) = with_three_blocks().await;
    for _ in 0..3 {
        let attaches = world.node.attaches();
        world.kill();
        world.start();
        assert_eq!(client.lookup(&keys).await.prefix_blocks, 3);
        let got = client.get(&keys, Shard::WHOLE).await;
        assert_eq!(got.end, GetEnd::Complete);
        assert!(got.blocks.iter().zip(&payloads).all(|(block, payload)| block.equals(payload)));
        assert_eq!(put(&client, &keys, &payloads).await, [PutOutcome::AlreadyPresent; 3]);
        assert_eq!(world.node.attaches(), attaches + 1, "attached once, not at each call");
    }
}

#[tokio::test]
async fn a_daemon_that_comes_back_later_is_found_again() {
    let (mut world, client, keys, _) = with_three_blocks().await;
    world.kill();
    assert_eq!(client.lookup(&keys).await.prefix_blocks, 0);
    sleep(Duration::from_millis(700)).await;
    world.start();
    let start = Instant::now();
    while client.lookup(&keys).await.prefix_blocks != 3 {
        assert!(start.elapsed() < Duration::from_secs(6), "pauses are at most 5 s");
        sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test]
async fn a_daemon_that_forgot_us_is_attached_to_again() {
    let (world, client, keys, payloads) = with_three_blocks().await;
    let forget = || world.node.attached.lock().unwrap().clear();
    forget();
    assert_eq!(client.lookup(&keys).await.prefix_blocks, 3);
    forget();
    assert_eq!(client.get(&keys, Shard::WHOLE).await.end, GetEnd::Complete);
    forget();
    assert_eq!(put(&client, &keys, &payloads).await, [PutOutcome::AlreadyPresent; 3]);
    forget();
    assert_eq!(client.durable(&keys).await, [true; 3]);
    forget();
    assert_eq!(client.prefetch(&keys, |_| {}).await.resident_blocks, 3);
    forget();
    assert_eq!(client.watch(None).await.next().await, Some(WatchItem::Reset));
    forget();
    assert_eq!(client.purge(Purge::Namespace).await.purged_blocks, 3);
}

#[tokio::test]
async fn a_daemon_with_another_salt_is_none_of_ours() {
    let (mut world, client, keys, _) = with_three_blocks().await;
    world.kill();
    *world.node.salt.lock().unwrap() = TenantSalt::of_tenant(b"another secret", "fake");
    world.start();
    assert_eq!(client.lookup(&keys).await.prefix_blocks, 0);
    assert_eq!(client.get(&keys, Shard::WHOLE).await.end, GetEnd::Unavailable);
    sleep(Duration::from_millis(200)).await;
    assert_eq!(client.get(&keys, Shard::WHOLE).await.end, GetEnd::Unavailable);
}

#[tokio::test]
async fn a_wrong_byte_never_arrives() {
    let (world, client, keys, payloads) = with_three_blocks().await;
    let troubles = [
        Trouble::FlipBit,
        Trouble::OtherBlock,
        Trouble::MisplacedParts,
        Trouble::TooLong,
        Trouble::TooShort,
        Trouble::FalseEnd,
    ];
    for trouble in troubles {
        world.node.set(trouble);
        let got = client.get(&keys, Shard::WHOLE).await;
        assert_eq!(got.end, GetEnd::SumMismatch, "{trouble:?}");
        assert!(got.blocks.len() < 3 || trouble == Trouble::FalseEnd, "{trouble:?}");
        assert!(got.blocks.iter().zip(&payloads).all(|(block, payload)| block.equals(payload)), "{trouble:?}");
        world.node.set(Trouble::None);
        assert_eq!(client.get(&keys, Shard::WHOLE).await.end, GetEnd::Complete);
    }
}

#[tokio::test]
async fn a_stream_that_breaks_off_leaves_what_came_whole() {
    let world = World::new();
    let client = world.client().await;
    let (keys, payloads) = blocks(&client, 4);
    assert_eq!(put(&client, &keys, &payloads).await, [PutOutcome::Stored; 4]);
    world.node.set(Trouble::BreakOff);
    let got = client.get(&keys, Shard::WHOLE).await;
    assert_eq!(got.end, GetEnd::Unavailable);
    // One by each of the three tries.
    assert_eq!(got.blocks.len(), 3);
    assert!(got.blocks.iter().zip(&payloads).all(|(block, payload)| block.equals(payload)));
    sleep(Duration::from_millis(500)).await;
    let prefetched = client.prefetch(&keys, |_| {}).await;
    assert_eq!(prefetched.resident_blocks + prefetched.shed_blocks, 4);
    client.purge(Purge::Namespace).await;
    assert_eq!(put(&client, &keys, &payloads).await, [PutOutcome::Unavailable; 4]);
    world.node.set(Trouble::None);
    sleep(Duration::from_millis(500)).await;
    assert_eq!(client.lookup(&keys).await.prefix_blocks, 0, "nothing of it was kept");
    assert_eq!(put(&client, &keys, &payloads).await, [PutOutcome::Stored; 4]);
}

#[tokio::test]
async fn a_prefetch_is_tried_over_three_links_at_most() {
    let (world, client, keys, _) = with_three_blocks().await;
    // One is refused, one breaks off in the middle.
    for trouble in [Trouble::EndsAtPrefetch, Trouble::BreakOff] {
        world.node.set(trouble);
        let before = world.node.prefetches.load(Ordering::Relaxed);
        let prefetched = client.prefetch(&keys, |_| {}).await;
        assert_eq!(prefetched.resident_blocks + prefetched.shed_blocks, 3, "{trouble:?}");
        assert_eq!(world.node.prefetches.load(Ordering::Relaxed) - before, 3, "{trouble:?}");
        world.node.set(Trouble::None);
        assert_eq!(client.lookup(&keys).await.prefix_blocks, 3);
    }
}

#[tokio::test]
async fn a_daemon_that_hangs_is_waited_for_until_the_deadline() {
    let (world, client, keys, payloads) = with_three_blocks_in(Node { keys_max: 1, ..Node::new() }).await;
    let client = client.with_deadline(Duration::from_millis(200));
    world.node.set(Trouble::Hang);
    // Three requests each, of which only the first is waited for.
    let start = Instant::now();
    let (found, got, outcomes, durable) = tokio::join!(
        client.lookup(&keys),
        client.get(&keys, Shard::WHOLE),
        put(&client, &keys, &payloads),
        client.durable(&keys),
    );
    assert_eq!(found.prefix_blocks, 0);
    assert_eq!((got.blocks.len(), got.end), (0, GetEnd::Deadline));
    assert_eq!(outcomes, [PutOutcome::Unavailable; 3]);
    assert_eq!(durable, [false; 3]);
    assert!(start.elapsed() < AT_ONCE, "{:?}", start.elapsed());
    world.node.set(Trouble::None);
    assert_eq!(client.lookup(&keys).await.prefix_blocks, 3, "and is asked again when it goes on");
}

#[tokio::test]
async fn an_overloaded_daemon_sheds() {
    let (world, client, keys, payloads) = with_three_blocks().await;
    world.node.set(Trouble::Overloaded);
    assert_eq!(put(&client, &keys, &payloads).await, [PutOutcome::Shed; 3]);
    assert_eq!(client.get(&keys, Shard::WHOLE).await.end, GetEnd::Shed);
    assert_eq!(client.lookup(&keys).await.prefix_blocks, 0);
    world.node.set(Trouble::None);
    assert_eq!(client.lookup(&keys).await.prefix_blocks, 3);
    assert_eq!(world.node.attaches(), 1, "too much to do is no reason to attach anew");
}

#[tokio::test]
async fn a_refused_question_is_no_reason_to_attach_anew() {
    let (world, client, keys, payloads) = with_three_blocks().await;
    let codes = [
        Code::InvalidArgument,
        Code::FailedPrecondition,
        Code::PermissionDenied,
        Code::Unauthenticated,
        // What the transport answers to a message that is too large.
        Code::OutOfRange,
    ];
    for code in codes {
        world.node.set(Trouble::Refusing(code));
        assert_eq!(put(&client, &keys, &payloads).await, [PutOutcome::Refused; 3], "{code:?}");
        assert_eq!(client.get(&keys, Shard::WHOLE).await.end, GetEnd::Miss, "{code:?}");
        assert_eq!(client.durable(&keys).await, [false; 3], "{code:?}");
        world.node.set(Trouble::None);
        assert_eq!(client.lookup(&keys).await.prefix_blocks, 3, "{code:?}");
        assert_eq!(world.node.attaches(), 1, "{code:?}: the daemon is there, and knows us");
    }
}

#[tokio::test]
async fn nonsense_from_a_daemon_is_no_panic() {
    let (world, client, keys, payloads) = with_three_blocks().await;
    world.node.set(Trouble::FewOutcomes);
    assert_eq!(put(&client, &keys, &payloads).await, [PutOutcome::Unavailable; 3]);
}

#[tokio::test]
async fn a_header_is_kept_within_the_largest_message() {
    let node = Node { request_bytes_max: 16 << 10, chunk_bytes_max: 4 << 10, ..Node::new() };
    let world = World::of(node);
    let namespace = Namespace::text("many tokens", "bf16", 256);
    let attach = Attach { namespace, layout: BlockLayout::opaque(64), ..attach() };
    let client = Remote::attach(Target::Unix(world.socket()), None, attach).await.unwrap();
    let tokens: Vec<u32> = (0..256 * 40).map(|token| u32::MAX - token).collect();
    let (keys, parent) = (client.terms().chain(&tokens), client.terms().root);
    let payloads = vec![Bytes::from(vec![1; 64]); keys.len()];
    let shard = Shard::WHOLE;
    let outcomes = client.put(Put { parent, keys: &keys, shard, payloads: &payloads, tokens: &tokens }).await;
    assert_eq!(outcomes, vec![PutOutcome::Stored; 40]);
}

#[tokio::test]
async fn a_put_is_cut_to_what_the_daemon_holds_of_one() {
    let world = World::of(Node { put_bytes_max: 8192, ..Node::new() });
    let attach = Attach { layout: BlockLayout::opaque(100), ..attach() };
    let client = Remote::attach(Target::Unix(world.socket()), None, attach).await.unwrap();
    let keys = client.terms().chain(&(0..20).collect::<Vec<u32>>());
    let payloads = vec![Bytes::from(vec![3; 100]); 5];
    assert_eq!(put(&client, &keys, &payloads).await, [PutOutcome::Stored; 5]);
    assert_eq!(world.node.puts.load(Ordering::Relaxed), 3, "two slots of a page at once");
}

#[tokio::test]
async fn a_run_larger_than_the_daemon_holds_goes_in_pieces() {
    let world = World::new();
    let attach = Attach { layout: BlockLayout::opaque(10 << 20), ..attach() };
    let client = Remote::attach(Target::Unix(world.socket()), None, attach).await.unwrap();
    let keys = client.terms().chain(&(0..32).collect::<Vec<u32>>());
    let payloads = vec![Bytes::from(vec![3; 10 << 20]); 8];
    assert_eq!(put(&client, &keys, &payloads).await, [PutOutcome::Stored; 8]);
    assert_eq!(world.node.puts.load(Ordering::Relaxed), 3, "80 MiB, at most 32 MiB at once");
}

#[tokio::test]
async fn what_follows_a_block_that_was_turned_away_is_not_sent() {
    let cases = [
        (wire::PutOutcome::PutNoRoom, PutOutcome::NoRoom),
        (wire::PutOutcome::PutOverQuota, PutOutcome::OverQuota),
        (wire::PutOutcome::PutShed, PutOutcome::Shed),
    ];
    for (turned_away, outcome) in cases {
        let world = World::of(Node { keys_max: 2, ..Node::new() });
        let client = world.client().await;
        let (keys, payloads) = blocks(&client, 6);
        world.node.set(Trouble::TurnsAway(turned_away));
        let mut expected = [outcome; 6];
        expected[0] = PutOutcome::Stored;
        assert_eq!(put(&client, &keys, &payloads).await, expected);
        assert_eq!(world.node.puts.load(Ordering::Relaxed), 1, "{outcome:?}");
        world.node.set(Trouble::None);
        assert_eq!(put(&client, &keys, &payloads).await[1..], [PutOutcome::Stored; 5]);
    }
}

#[tokio::test]
async fn a_lost_event_ends_the_watch() {
    let (world, client, keys, _) = with_three_blocks().await;
    let mut watch = client.watch(None).await;
    while !matches!(watch.next().await, Some(WatchItem::Synced(_))) {}
    let position = watch.position();
    client.purge(Purge::Keys(&keys[2..])).await;
    assert!(matches!(watch.next().await, Some(WatchItem::Change(..))));
    assert_ne!(watch.position(), position);
    let position = watch.position();
    world.node.set(Trouble::LostEvent);
    client.purge(Purge::Keys(&keys[1..2])).await;
    assert_eq!(watch.next().await, None, "a hole is not guessed over");
    world.node.set(Trouble::None);
    let mut watch = client.watch(position).await;
    assert!(
        matches!(watch.next().await, Some(WatchItem::Change(_, change)) if change.key == keys[1] && !change.present)
    );
}

#[tokio::test]
async fn a_watch_ends_with_its_daemon() {
    let (mut world, client, ..) = with_three_blocks().await;
    let mut watch = client.watch(None).await;
    while !matches!(watch.next().await, Some(WatchItem::Synced(_))) {}
    world.kill();
    assert_eq!(tokio::time::timeout(AT_ONCE, watch.next()).await, Ok(None));
}

#[tokio::test]
async fn a_daemon_that_stands_still_is_found_out() {
    let (world, client, keys, _) = with_three_blocks().await;
    let mut watch = client.watch(None).await;
    while !matches!(watch.next().await, Some(WatchItem::Synced(_))) {}
    world.node.set(Trouble::Freeze);
    let start = Instant::now();
    let stuck = client.clone();
    let (_, ended) = tokio::join!(stuck.lookup(&keys), watch.next());
    assert_eq!(ended, None);
    assert!(start.elapsed() < Duration::from_secs(12), "{:?}", start.elapsed());
    // From now on nobody waits, though the socket still accepts.
    sleep(Duration::from_millis(600)).await;
    let start = Instant::now();
    assert_eq!(client.get(&keys, Shard::WHOLE).await.end, GetEnd::Unavailable);
    assert!(start.elapsed() < Duration::from_millis(3_500), "{:?}", start.elapsed());
}

#[tokio::test]
async fn blocks_that_are_there_are_not_sent_again() {
    let (_world, client, keys, payloads) = with_three_blocks().await;
    // The fake daemon fails on a chunk of a block that it did not accept.
    assert_eq!(put(&client, &keys, &payloads).await, [PutOutcome::AlreadyPresent; 3]);
}

#[tokio::test]
async fn the_last_client_to_go_detaches() {
    let (world, client, ..) = with_three_blocks().await;
    let other = client.clone();
    drop(client);
    sleep(Duration::from_millis(50)).await;
    assert_eq!(world.node.detaches.load(Ordering::Relaxed), 0);
    drop(other);
    let start = Instant::now();
    while world.node.detaches.load(Ordering::Relaxed) != 1 {
        assert!(start.elapsed() < AT_ONCE);
        sleep(Duration::from_millis(5)).await;
    }
}

#[test]
fn a_client_that_is_closed_has_left_before_its_runtime_ends() {
    let world = World::new();
    let runtime = || tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime().block_on(async {
        let client = world.client().await;
        client.clone().close().await;
        assert_eq!(world.node.detaches.load(Ordering::Relaxed), 0, "another clone is still there");
        client.close().await;
    });
    assert_eq!(world.node.detaches.load(Ordering::Relaxed), 1);
    assert!(world.node.attached.lock().unwrap().is_empty());
}

#[test]
fn a_client_outlives_the_runtime_it_was_made_on() {
    let runtime = || tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let first = runtime();
    let (mut world, client, keys, _) = first.block_on(with_three_blocks());
    world.kill();
    assert_eq!(first.block_on(client.lookup(&keys)).prefix_blocks, 0);
    drop(first);
    world.start();
    let found = runtime().block_on(async {
        for _ in 0..100 {
            if client.lookup(&keys).await.prefix_blocks == 3 {
                return true;
            }
            sleep(Duration::from_millis(20)).await;
        }
        false
    });
    assert!(found, "attached again on the second runtime");
}

#[tokio::test]
async fn an_operator_asks_without_attaching() {
    let mut world = World::new();
    let _client = world.client().await;
    let operator = Operator::connect(Target::Unix(world.socket()), None).await.unwrap();
    assert_eq!(operator.status().await.unwrap().attachments, 1);
    assert_eq!(operator.config().await.unwrap(), "[host]\n");
    world.kill();
    let error = operator.status().await.unwrap_err();
    assert!(error.to_string().contains("tender serve"), "{error}");
    world.start();
    assert_eq!(operator.status().await.unwrap().version, "fake");
}
