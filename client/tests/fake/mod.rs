//! A daemon that is none: the wire in front of an `InMemory`, with a switch for every way to misbehave.
//!
//! It runs on a runtime of its own, so that killing it closes every connection at once, as the end of a process does.

pub mod local;
mod slots;
mod verbs;

use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tender_client::proto::wire::PutOutcome;
use tender_client::proto::wire::blocks_server::BlocksServer;
use tender_client::proto::wire::operator_server::OperatorServer;
use tender_client::proto::{BlockKey, BlockLayout, Namespace, Shard, TenantSalt};
use tender_client::{Attach, BlockStore, InMemory, Target};
use tokio::net::{TcpListener, UnixListener};
use tokio::runtime::Runtime;
use tokio_stream::wrappers::{TcpListenerStream, UnixListenerStream};
use tonic::Code;
use tonic::transport::Server;
use tonic::transport::server::Router;

/// How to misbehave.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Trouble {
    /// Not at all.
    #[default]
    None,
    /// Accept every question and answer none.
    Hang,
    /// Break off every stream after one block.
    BreakOff,
    /// Answer every prefetch as a worker at its end does.
    EndsAtPrefetch,
    /// Flip a bit of the second block.
    FlipBit,
    /// Swap the roles of two blocks: right sums, wrong key.
    OtherBlock,
    /// Say that parts lie where they do not.
    MisplacedParts,
    /// Send one byte too many, or announce one too few.
    TooLong,
    TooShort,
    /// Claim more blocks than came.
    FalseEnd,
    /// Leave out the number of an event.
    LostEvent,
    /// Answer a put with fewer outcomes than keys.
    FewOutcomes,
    /// Turn away the last block of each put.
    TurnsAway(PutOutcome),
    /// Refuse everything: too much to do.
    Overloaded,
    /// Refuse everything with that code.
    Refusing(Code),
    /// Derive another root than everybody else.
    OtherRoot,
    /// Stand still as a stopped process does: connections stay open, nothing moves.
    Freeze,
}

/// What outlives a restart of the daemon, and what tests look at.
pub struct Node {
    pub store: InMemory,
    pub salt: Mutex<TenantSalt>,
    pub trouble: Mutex<Trouble>,
    pub token: Option<String>,
    pub keys_max: u32,
    pub chunk_bytes_max: u64,
    pub request_bytes_max: u64,
    pub put_bytes_max: u64,
    /// Who is attached. Cleared by a restart.
    pub attached: Mutex<HashMap<u64, InMemory>>,
    /// Attaches, detaches, puts' headers and prefetches that came.
    pub attaches: AtomicU64,
    pub detaches: AtomicU64,
    pub puts: AtomicU64,
    pub prefetches: AtomicU64,
    /// In how many shards a block was written.
    pub written: Mutex<HashMap<BlockKey, u16>>,
    pub writing: Mutex<HashSet<(BlockKey, Shard)>>,
    /// Held over a reservation and over a commit: what is there and what is being written are looked at as one.
    pub turn: tokio::sync::Mutex<()>,
}

impl Node {
    pub fn new() -> Self {
        let namespace = Namespace::text("any", "bf16", 4);
        let any = Attach { group: "fake".into(), member: String::new(), namespace, layout: BlockLayout::opaque(1) };
        let store = InMemory::new(any);
        let salt = Mutex::new(store.terms().salt);
        Self {
            store,
            salt,
            trouble: Mutex::default(),
            token: None,
            keys_max: 4096,
            chunk_bytes_max: 1 << 20,
            request_bytes_max: 4 << 20,
            put_bytes_max: 64 << 20,
            attached: Mutex::default(),
            attaches: AtomicU64::new(0),
            detaches: AtomicU64::new(0),
            puts: AtomicU64::new(0),
            prefetches: AtomicU64::new(0),
            written: Mutex::default(),
            writing: Mutex::default(),
            turn: tokio::sync::Mutex::default(),
        }
    }

    pub fn set(&self, trouble: Trouble) {
        *self.trouble.lock().unwrap() = trouble;
    }

    pub fn trouble(&self) -> Trouble {
        *self.trouble.lock().unwrap()
    }

    pub fn attaches(&self) -> u64 {
        self.attaches.load(Ordering::Relaxed)
    }
}

/// One life of a daemon.
pub struct Daemon {
    pub target: Target,
    runtime: Option<Runtime>,
}

impl Daemon {
    pub fn on_socket(node: &Arc<Node>, socket: &Path) -> Self {
        let _left_behind = std::fs::remove_file(socket);
        let runtime = runtime();
        let entered = runtime.enter();
        let listener = UnixListener::bind(socket).unwrap();
        runtime.spawn(serve(node).serve_with_incoming(UnixListenerStream::new(listener)));
        drop(entered);
        Self { target: Target::Unix(PathBuf::from(socket)), runtime: Some(runtime) }
    }

    pub fn on_loopback(node: &Arc<Node>) -> Self {
        let runtime = runtime();
        let entered = runtime.enter();
        let listener = std::net::TcpListener::bind(SocketAddr::from(([127, 0, 0, 1], 0))).unwrap();
        listener.set_nonblocking(true).unwrap();
        let target = Target::Loopback(listener.local_addr().unwrap());
        let listener = TcpListener::from_std(listener).unwrap();
        runtime.spawn(serve(node).serve_with_incoming(TcpListenerStream::new(listener)));
        drop(entered);
        Self { target, runtime: Some(runtime) }
    }
}

/// Killed, not stopped: nobody is told. When this returns its connections are closed.
impl Drop for Daemon {
    fn drop(&mut self) {
        let runtime = self.runtime.take().unwrap();
        // A thread that may block, which those of a test's own runtime must not.
        std::thread::spawn(move || runtime.shutdown_timeout(Duration::from_secs(5))).join().unwrap();
    }
}

fn serve(node: &Arc<Node>) -> Router {
    let services = verbs::Door(Arc::clone(node));
    Server::builder().add_service(BlocksServer::new(services.clone())).add_service(OperatorServer::new(services))
}

fn runtime() -> Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap()
}
