//! The get stream: leases a window of the run, sends its bytes from the arena while the next window is being leased (and loaded), gives
//! the leases back. A run of any length holds two windows at most; dropping the stream gives back what it holds.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use tender_proto::{BlockKey, Shard, convert, wire};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use super::server::{BlocksServer, ReplyStream, deadline, invalid, keys, send};
use super::session::Session;
use super::window::Window;
use crate::device::memory::Arena;
use crate::driver::Undo;
use crate::names::Door;
use crate::names::{Place, TenantId};
use crate::verb::{AcquireEnd, Acquired, Leased, LeasedPart, Reply, Verb};
use crate::{limits, telemetry, tier};

use wire::GetEndReason;
use wire::get_reply::Part;

/// Bytes of one message of data: several fit into the window of a stream, so that copying here and sending overlap.
const DATA_BYTES: usize = 512 << 10;

/// A checked request.
#[derive(Clone)]
struct Run {
    session: Arc<Session>,
    keys: Arc<Vec<BlockKey>>,
    shard: Shard,
    until: tokio::time::Instant,
}

/// Leased blocks, what gives them back, and then their share of memory.
struct Leases {
    acquired: Acquired,
    _undo: Option<Undo>,
    _window: Window,
}

impl Run {
    /// Bytes that a lease of one block holds: whole pages.
    fn held_bytes(&self) -> u64 {
        tier::slot_bytes(self.session.layout.block_bytes()).into()
    }

    /// What is left of its time.
    fn wait(&self) -> Duration {
        self.until.saturating_duration_since(tokio::time::Instant::now()).max(Duration::from_millis(1))
    }
}

type Replies = mpsc::Sender<Result<wire::GetReply, Status>>;

impl BlocksServer {
    pub(super) fn get_stream(
        &self,
        tenant: TenantId,
        request: wire::GetRequest,
    ) -> Result<ReplyStream<wire::GetReply>, Status> {
        let session = self.session(request.attachment, tenant)?;
        let keys = Arc::new(keys(&request.keys)?);
        let shard = convert::shard(&session.layout, request.shard).map_err(invalid)?;
        let until = tokio::time::Instant::now() + deadline(request.deadline_ms)?;
        let (sender, receiver) = mpsc::channel(8);
        let server = self.clone();
        tokio::spawn(async move {
            let start = Instant::now();
            let done = server.get_run(Run { session, keys, shard, until }, &sender).await;
            telemetry::request_done("get", start.elapsed());
            if let Err(status) = done {
                // A client that is gone needs no answer; for one that is stuck nothing is held any more.
                let _ = sender.send_timeout(Err(status), limits::CLIENT_STALL).await;
            }
        });
        Ok(Box::pin(ReceiverStream::new(receiver)))
    }

    async fn get_run(&self, run: Run, replies: &Replies) -> Result<(), Status> {
        let tenant = run.session.tenant;
        let window_bytes = self.windows.lease_bytes(run.held_bytes());
        let mut sent = 0;
        let mut ahead: Option<JoinHandle<Result<Leases, Status>>> = None;
        let reason = loop {
            let leases = match ahead.take() {
                Some(ahead) => {
                    ahead.await.map_err(|error| Status::internal(format!("a window was not leased: {error}")))??
                }
                None => match self.windows.lease(tenant, window_bytes, run.wait()).await {
                    Some(window) => self.acquire(run.clone(), sent, window).await?,
                    None => break GetEndReason::GetEndDeadline,
                },
            };
            let (count, end) = (leases.acquired.blocks.len(), leases.acquired.end);
            let taken = sent + count;
            if end.is_none() && taken < run.keys.len() {
                // A task of its own, not a future polled beside: copying must not keep it from being asked for.
                ahead = self.windows.lease_ahead(tenant, window_bytes).map(|window| {
                    let (server, run) = (self.clone(), run.clone());
                    tokio::spawn(async move { server.acquire(run, taken, window).await })
                });
            }
            for (i, block) in (sent..).zip(&leases.acquired.blocks) {
                self.send_block(&run, i, block, replies).await?;
            }
            sent = taken;
            match end {
                None if taken == run.keys.len() => break GetEndReason::GetEndComplete,
                // What was just sent is given back now; the next block may wait for its room.
                None | Some(AcquireEnd::Shed) if count > 0 => {}
                None | Some(AcquireEnd::Shed) => break GetEndReason::GetEndShed,
                Some(AcquireEnd::Miss) => break GetEndReason::GetEndMiss,
                Some(AcquireEnd::Deadline) => break GetEndReason::GetEndDeadline,
            }
        };
        let end = wire::GetEnd { blocks: sent as u32, reason: reason.into() };
        say(replies, Part::End(end)).await
    }

    async fn acquire(&self, run: Run, from: usize, window: Window) -> Result<Leases, Status> {
        let session = &run.session;
        let blocks = (window.bytes / run.held_bytes()).max(1) as usize;
        let keys = run.keys[from..].iter().take(blocks).copied().collect();
        let verb = Verb::Acquire { attachment: session.attachment, keys, bytes_max: window.bytes, door: Door::Stream };
        let answer = self.core.ask(session.tenant, run.wait(), verb).await;
        let answer = answer.map_err(|refusal| self.refused(session, refusal))?;
        let Reply::Acquired(acquired) = answer.reply else {
            return Err(Status::internal("the core did not answer the acquire"));
        };
        Ok(Leases { acquired, _undo: answer.undo, _window: window })
    }

    async fn send_block(&self, run: &Run, index: usize, block: &Leased, replies: &Replies) -> Result<(), Status> {
        let shard_bytes = run.session.layout.shard_bytes(run.shard.count);
        let start = shard_bytes * u64::from(run.shard.index);
        let pieces = pieces(&block.parts, start, start + shard_bytes);
        let head = wire::GetBlock {
            index: index as u32,
            tier: match block.place {
                Place::Host => wire::Tier::Host.into(),
                Place::Disk => wire::Tier::Disk.into(),
            },
            bytes: shard_bytes,
            parts: whole_parts(&pieces),
        };
        say(replies, Part::Block(head)).await?;
        for Piece { part, from, to } in pieces {
            let mut at = from;
            while at < to {
                let length = (to - at).min(DATA_BYTES);
                say(replies, Part::Data(copy_out(self.core.arena(), part, at, length))).await?;
                at += length;
            }
        }
        Ok(())
    }
}

/// The bytes `from..to` of a stored shard.
#[derive(Clone, Copy)]
struct Piece<'a> {
    part: &'a LeasedPart,
    from: usize,
    to: usize,
}

/// The pieces of stored shards that make up the bytes `start..end` of a block: canonical bytes are the shards end to end.
fn pieces(parts: &[LeasedPart], start: u64, end: u64) -> Vec<Piece<'_>> {
    let mut pieces = Vec::new();
    let mut offset = 0;
    for part in parts {
        let bytes = u64::from(part.payload_bytes);
        let (from, to) = (start.max(offset), end.min(offset + bytes));
        if from < to {
            pieces.push(Piece { part, from: (from - offset) as usize, to: (to - offset) as usize });
        }
        offset += bytes;
    }
    pieces
}

/// What the client can check: sums are of whole shards.
fn whole_parts(pieces: &[Piece<'_>]) -> Vec<wire::Part> {
    let whole = |piece: &Piece<'_>| piece.to - piece.from == piece.part.payload_bytes as usize;
    if !pieces.iter().all(whole) {
        return Vec::new();
    }
    let part = |piece: &Piece<'_>| wire::Part {
        shard: Some(piece.part.shard.into()),
        bytes: piece.part.payload_bytes.into(),
        root: piece.part.root,
    };
    pieces.iter().map(part).collect()
}

fn copy_out(arena: &Arena, part: &LeasedPart, from: usize, length: usize) -> Bytes {
    let mut bytes = BytesMut::zeroed(length);
    arena.read(part.extent, from, &mut bytes);
    bytes.freeze()
}

async fn say(replies: &Replies, part: Part) -> Result<(), Status> {
    send(replies, wire::GetReply { part: Some(part) }).await
}
