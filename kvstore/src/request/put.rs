//! The put stream: header, reservation, bytes into the arena as they come, sums, commit. Dropping it at any point gives back what was
//! reserved.

use std::sync::Arc;
use std::time::Instant;

use tender_proto::{BlockKey, Shard, convert, sum, wire};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};

use super::server::{BlocksServer, ReplyStream, deadline, invalid, keys, send};
use super::session::Session;
use super::window::Window;
use crate::device::memory::{Arena, Extent};
use crate::driver::Undo;
use crate::names::{Door, Hold, TenantId};
use crate::verb::{CommitOutcome, Filled, Reply, ReserveOutcome, Verb};
use crate::{limits, telemetry, tier};

use wire::PutOutcome;
use wire::put_reply::Part as ReplyPart;
use wire::put_request::Part;

/// A checked header.
struct Header {
    session: Arc<Session>,
    parent: BlockKey,
    keys: Vec<BlockKey>,
    shard: Shard,
    roots: Vec<u64>,
    until: tokio::time::Instant,
}

/// A block whose bytes are coming.
struct Filling {
    hold: Hold,
    extent: Extent,
    filled_bytes: usize,
    sums: Option<Vec<u64>>,
}

/// Reservations: they are given back before their share of memory is.
struct Held {
    undo: Undo,
    _window: Window,
}

impl BlocksServer {
    pub(super) fn put_stream(
        &self,
        tenant: TenantId,
        messages: Streaming<wire::PutRequest>,
    ) -> ReplyStream<wire::PutReply> {
        let (sender, receiver) = mpsc::channel(2);
        let server = self.clone();
        tokio::spawn(async move {
            let start = Instant::now();
            let done = server.put_run(tenant, messages, &sender).await;
            telemetry::request_done("put", start.elapsed());
            if let Err(status) = done {
                // A client that is gone needs no answer; for one that is stuck nothing is held any more.
                let _ = sender.send_timeout(Err(status), limits::CLIENT_STALL).await;
            }
        });
        Box::pin(ReceiverStream::new(receiver))
    }

    async fn put_run(
        &self,
        tenant: TenantId,
        mut messages: Streaming<wire::PutRequest>,
        replies: &mpsc::Sender<Result<wire::PutReply, Status>>,
    ) -> Result<(), Status> {
        let first = tokio::time::timeout(limits::DEADLINE_DEFAULT, messages.message());
        let first = first.await.map_err(|_| Status::deadline_exceeded("no header came; send it first"))??;
        let Some(Part::Header(header)) = first.and_then(|message| message.part) else {
            return Err(invalid("the first message of a put must be its header"));
        };
        let header = self.header(tenant, header)?;
        let (mut outcomes, mut filling, held) = self.reserve(&header).await?;
        say(replies, ReplyPart::Reserved(outcomes_of(&outcomes))).await?;
        let fill = fill(self.core.arena(), &header, &mut filling, &mut messages);
        let filled = tokio::time::timeout_at(header.until, fill).await;
        filled.map_err(|_| Status::deadline_exceeded("the put's bytes did not come in time; nothing was stored"))??;
        self.commit(&header, filling, held, &mut outcomes).await?;
        say(replies, ReplyPart::Committed(outcomes_of(&outcomes))).await
    }

    fn header(&self, tenant: TenantId, header: wire::PutHeader) -> Result<Header, Status> {
        let session = self.session(header.attachment, tenant)?;
        let parent = convert::key("parent", &header.parent).map_err(invalid)?;
        let keys = keys(&header.keys)?;
        let shard = convert::shard(&session.layout, header.shard).map_err(invalid)?;
        if !header.roots.is_empty() && header.roots.len() != keys.len() {
            let (roots, keys) = (header.roots.len(), keys.len());
            return Err(invalid(format!("roots has {roots} sums, but must have one per key ({keys}), or none")));
        }
        check_tokens(&session, parent, &keys, &header.tokens)?;
        let until = tokio::time::Instant::now() + deadline(header.deadline_ms)?;
        Ok(Header { session, parent, keys, shard, roots: header.roots, until })
    }

    async fn reserve(&self, header: &Header) -> Result<(Vec<PutOutcome>, Vec<Option<Filling>>, Option<Held>), Status> {
        let session = &header.session;
        let wait = header.until.saturating_duration_since(tokio::time::Instant::now());
        let slot_bytes = u64::from(tier::shard_slot_bytes(&session.layout, header.shard.count as u8));
        let Some(window) = self.windows.reserve(session.tenant, slot_bytes * header.keys.len() as u64, wait).await
        else {
            return Ok((vec![PutOutcome::PutShed; header.keys.len()], Vec::new(), None));
        };
        let verb = Verb::Reserve {
            attachment: session.attachment,
            parent: header.parent,
            keys: header.keys.clone(),
            shard: header.shard,
            bytes_max: window.bytes.max(slot_bytes),
            door: Door::Stream,
        };
        let answer = self.core.ask(session.tenant, wait, verb).await;
        let answer = answer.map_err(|refusal| self.refused(session, refusal))?;
        let Reply::Reserved(reserved) = answer.reply else {
            return Err(Status::internal("the core did not answer the reservation"));
        };
        let outcomes = reserved.iter().map(|outcome| match outcome {
            ReserveOutcome::Granted { .. } => PutOutcome::PutAccepted,
            ReserveOutcome::AlreadyPresent => PutOutcome::PutAlreadyPresent,
            ReserveOutcome::BeingWritten => PutOutcome::PutBeingWritten,
            ReserveOutcome::NoRoom => PutOutcome::PutNoRoom,
            ReserveOutcome::OverQuota => PutOutcome::PutOverQuota,
        });
        let filling = reserved.iter().map(|outcome| match *outcome {
            ReserveOutcome::Granted { hold, extent } => Some(Filling { hold, extent, filled_bytes: 0, sums: None }),
            _ => None,
        });
        let held = answer.undo.map(|undo| Held { undo, _window: window });
        Ok((outcomes.collect(), filling.collect(), held))
    }

    /// Commits what is whole and right; everything else is given back.
    async fn commit(
        &self,
        header: &Header,
        filling: Vec<Option<Filling>>,
        mut held: Option<Held>,
        outcomes: &mut [PutOutcome],
    ) -> Result<(), Status> {
        let session = &header.session;
        let mut places = Vec::new();
        let mut filled = Vec::new();
        for (i, block) in filling.into_iter().enumerate() {
            let Some(block) = block else { continue };
            let Some(sums) = block.sums else {
                outcomes[i] = PutOutcome::PutIncomplete;
                continue;
            };
            let seed = sum::seed(&header.keys[i], header.shard, session.fingerprint);
            if header.roots.get(i).is_some_and(|root| *root != sum::root(seed, &sums)) {
                outcomes[i] = PutOutcome::PutSumMismatch;
                continue;
            }
            places.push(i);
            filled.push(Filled { hold: block.hold, sums });
        }
        if filled.is_empty() {
            return Ok(());
        }
        let holds: Vec<Hold> = filled.iter().map(|filled| filled.hold).collect();
        let verb = Verb::Commit { attachment: session.attachment, filled, door: Door::Stream };
        let committed = match self.ask(session, limits::DEADLINE_DEFAULT, verb).await? {
            Reply::Committed(committed) => committed,
            other => return Err(Status::internal(format!("the core did not answer the commit: {other:?}"))),
        };
        if let Some(held) = &mut held {
            // What did not become of the group's own is given back like what was not filled.
            let ended = holds.into_iter().zip(&committed).filter(|(_, outcome)| **outcome != CommitOutcome::Gone);
            held.undo.forget(&ended.map(|(hold, _)| hold).collect::<Vec<_>>());
        }
        for (place, outcome) in places.into_iter().zip(committed) {
            outcomes[place] = match outcome {
                CommitOutcome::Stored => PutOutcome::PutStored,
                CommitOutcome::ShardStored => PutOutcome::PutShardStored,
                CommitOutcome::Gone => PutOutcome::PutIncomplete,
            };
        }
        Ok(())
    }
}

/// The tokens, if given, must be those that the keys were derived from.
fn check_tokens(session: &Session, parent: BlockKey, keys: &[BlockKey], tokens: &[u32]) -> Result<(), Status> {
    if tokens.is_empty() {
        return Ok(());
    }
    let block_tokens = session.block_tokens as usize;
    if tokens.len() != keys.len() * block_tokens {
        return Err(invalid(format!(
            "tokens has {}, but must have {block_tokens} for each of {} keys, or none",
            tokens.len(),
            keys.len()
        )));
    }
    let derived = parent.chain(tokens, session.block_tokens);
    match derived.iter().zip(keys).position(|(derived, key)| derived != key) {
        None => Ok(()),
        Some(at) => Err(invalid(format!(
            "keys[{at}] is {}, but parent and tokens give {}; derive keys as proto/src/key.rs says, from root {}",
            keys[at], derived[at], session.root
        ))),
    }
}

/// Copies the bytes to their slots as they come. Sums are taken while a block's bytes are still in the cache.
async fn fill(
    arena: &Arena,
    header: &Header,
    filling: &mut [Option<Filling>],
    messages: &mut Streaming<wire::PutRequest>,
) -> Result<(), Status> {
    let shard_bytes = header.session.layout.shard_bytes(header.shard.count) as usize;
    while let Some(message) = next(messages).await? {
        let Some(Part::Chunk(chunk)) = message.part else {
            return Err(invalid("after its header a put has chunks only"));
        };
        let Some(block) = filling.get_mut(chunk.block as usize).and_then(Option::as_mut) else {
            return Err(invalid(format!("chunk.block is {}, which is no block that was accepted", chunk.block)));
        };
        let length = chunk.data.len();
        convert::length("chunk.data", length, 1, limits::CHUNK_BYTES_MAX).map_err(invalid)?;
        if chunk.offset_bytes != block.filled_bytes as u64 {
            return Err(invalid(format!(
                "chunk.offset_bytes is {}, but {} bytes of block {} came before it; send them in order and without gaps",
                chunk.offset_bytes, block.filled_bytes, chunk.block
            )));
        }
        if block.filled_bytes + length > shard_bytes {
            return Err(invalid(format!(
                "block {} gets {} bytes, but a shard of this layout has {shard_bytes}",
                chunk.block,
                block.filled_bytes + length
            )));
        }
        arena.write(block.extent, block.filled_bytes, &chunk.data);
        block.filled_bytes += length;
        if block.filled_bytes == shard_bytes {
            arena.zero_from(block.extent, shard_bytes);
            block.sums = Some(arena.fragment_sums(block.extent, shard_bytes));
        }
    }
    Ok(())
}

/// The next message. A client that sends nothing for long is treated as gone: what it holds is others' memory.
async fn next(messages: &mut Streaming<wire::PutRequest>) -> Result<Option<wire::PutRequest>, Status> {
    let stalled = || {
        let stall = limits::CLIENT_STALL.as_secs();
        Status::deadline_exceeded(format!("no chunk came for {stall} s; nothing was stored, put again"))
    };
    tokio::time::timeout(limits::CLIENT_STALL, messages.message()).await.map_err(|_| stalled())?
}

fn outcomes_of(outcomes: &[PutOutcome]) -> wire::PutOutcomes {
    wire::PutOutcomes { outcomes: outcomes.iter().map(|outcome| i32::from(*outcome)).collect() }
}

async fn say(replies: &mpsc::Sender<Result<wire::PutReply, Status>>, part: ReplyPart) -> Result<(), Status> {
    send(replies, wire::PutReply { part: Some(part) }).await
}
