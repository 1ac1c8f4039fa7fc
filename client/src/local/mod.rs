//! The local door: a daemon on this node, asked through a ring in shared memory, its blocks read and written where they lie.
//!
//! ```text
//!            opening: a socket beside that of gRPC; an attachment made over gRPC becomes this process
//!               │
//!   verb ──► calls ──► ring ─────────────────────────────► daemon          one batch, one answer; no system call while both look
//!   get  ──► leases ──► view ──► mapping (to read)            │            copied only where somebody else may write
//!   put  ──► reservations ──► mapping (to write) ──► commit   │            copied and summed in one pass
//!   slot ──────┘     written by the caller ────────────┘      │            summed where it lies, unless the caller did
//!               │                                             │
//!             debts: what is let go of goes back with the next request   connection: the thread that hears bell and socket
//! ```
//! Whatever this door does not carry goes over gRPC: watching, and all of it where there is no such door (an older daemon, another
//! node). `calls` says why no answer is slept over, `mapping` alone touches shared bytes.

mod answer;
mod calls;
mod connection;
mod debts;
mod get;
mod mapping;
mod mappings;
mod memory;
mod opening;
mod put;
mod slot;
mod spin;
mod view;

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tender_proto::BlockKey;
use tender_proto::door::{Bitmap, KEYS_PER_ENTRY_MAX, Prefetched, Reply, Request, Residency};
use tokio::sync::watch;

use self::connection::Connection;
pub(crate) use self::get::{Came, Wanted};
pub use self::memory::{BringError, MemoryState, OwnMemory};
pub(crate) use self::opening::Estate;
pub use self::slot::Slot;
pub(crate) use self::view::LeasedBytes;
use crate::failure::Failure;

/// An attachment's ring.
#[derive(Debug)]
pub(crate) struct Local {
    connection: Arc<Connection>,
}

impl Local {
    /// Keys of one request.
    pub(crate) const KEYS_MAX: usize = KEYS_PER_ENTRY_MAX;

    /// Opens the door beside the socket of gRPC. An error says why everything goes over gRPC instead.
    /// `estate` is the client's own, the same for all its attachments one after the other.
    pub(crate) async fn open(socket: &Path, attachment: u64, estate: &Arc<Estate>) -> io::Result<Self> {
        Ok(Self { connection: Arc::new(opening::open(socket, attachment, estate).await?) })
    }

    /// Whether somebody listens at that door.
    pub(crate) async fn is_there(socket: &Path) -> bool {
        opening::is_there(socket).await
    }

    pub(crate) async fn lookup(&self, keys: &[BlockKey], deadline: Duration) -> Result<Residency, Failure> {
        match self.ask(&Request::Lookup(keys.into()), deadline).await? {
            Reply::Lookup(residency) => Ok(residency),
            _ => Err(Failure::Gone),
        }
    }

    pub(crate) async fn prefetch(&self, keys: &[BlockKey], deadline: Duration) -> Result<Prefetched, Failure> {
        match self.ask(&Request::Prefetch(keys.into()), deadline).await? {
            Reply::Prefetched(prefetched) => Ok(prefetched),
            _ => Err(Failure::Gone),
        }
    }

    pub(crate) async fn durable(&self, keys: &[BlockKey], deadline: Duration) -> Result<Bitmap, Failure> {
        match self.ask(&Request::Durable(keys.into()), deadline).await? {
            Reply::Durable(durable) => Ok(durable),
            _ => Err(Failure::Gone),
        }
    }

    /// Forgets these keys, or all under the namespace; how many blocks, and how many of them are in use.
    pub(crate) async fn purge(&self, keys: Option<&[BlockKey]>, deadline: Duration) -> Result<(u64, u64), Failure> {
        let request = keys.map_or(Request::PurgeNamespace, |keys| Request::Purge(keys.into()));
        match self.ask(&request, deadline).await? {
            Reply::Purged { purged_blocks, busy_blocks } => Ok((purged_blocks, busy_blocks)),
            _ => Err(Failure::Gone),
        }
    }

    /// Length of memory that may be brought, in bytes; 0 where none may.
    pub(crate) fn brought_bytes(&self) -> u64 {
        self.connection.brought_bytes()
    }

    /// Becomes true when the daemon, or the way to it, is gone.
    pub(crate) fn over(&self) -> watch::Receiver<bool> {
        self.connection.over()
    }

    /// Leaves, and waits a moment; whether the daemon has heard of it. Not while views or slots are held, be they of a former connection:
    /// then the last of them leaves.
    pub(crate) async fn leave(&self) -> bool {
        let is_last = Arc::strong_count(&self.connection) == 1 && self.connection.debts().holds_nothing();
        is_last && self.connection.leave().await
    }

    async fn ask(&self, request: &Request<'_>, deadline: Duration) -> Result<Reply, Failure> {
        self.connection.calls().ask(request, deadline).await
    }
}
