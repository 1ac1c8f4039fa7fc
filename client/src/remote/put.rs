//! Putting a run: in place through the ring where there is one, and where that has no memory over gRPC. There it goes as header,
//! `reserved`, the bytes of what was accepted, half-close, `committed`.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tender_proto::sum::{payload_root, seed};
use tender_proto::wire::put_reply::Part as Reply;
use tender_proto::wire::put_request::Part;
use tender_proto::wire::{self, PutOutcome as Wire, PutReply, PutRequest};
use tender_proto::{BlockKey, Shard};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;

use super::link::Link;
use super::{Doors, Remote, joined, outcome_of};
use crate::failure::Failure;
use crate::local::Local;
use crate::{Put, PutOutcome, deadline};

/// Chunks between us and the connection: enough that it never waits, while the bytes stay where the caller has them.
const CHUNKS_WAITING_MAX: usize = 4;

/// One request's share of a put.
struct Piece<'a> {
    parent: BlockKey,
    keys: &'a [BlockKey],
    shard: Shard,
    payloads: &'a [Bytes],
    tokens: &'a [u32],
    roots: Vec<u64>,
    deadline_ms: u32,
}

impl Remote {
    /// A checked put of any length.
    pub(super) async fn put_run(&self, put: &Put<'_>) -> Vec<PutOutcome> {
        let block_tokens = self.terms.attach.namespace.block_tokens as usize;
        let in_place = match self.door() {
            Doors::Ring => Local::put_keys_max(self.terms.shard_bytes(put.shard.count)),
            Doors::Grpc => put.keys.len(),
        };
        let mut outcomes = Vec::with_capacity(put.keys.len());
        while outcomes.len() < put.keys.len() {
            let start = outcomes.len();
            let came = match self.put_in_place(&put.piece(start, in_place, block_tokens)).await {
                Ok(came) if came.is_empty() => self.put_streamed(&put.piece(start, in_place, block_tokens)).await,
                answer => answer,
            };
            match came {
                Ok(came) => {
                    outcomes.extend(came);
                    // Nobody gets what follows a block that is not there.
                    if let Some(why) = outcomes[start..].iter().copied().find(|outcome| outcome.is_turned_away()) {
                        outcomes.resize(put.keys.len(), why);
                    }
                }
                Err(failure) => outcomes.resize(put.keys.len(), outcome_of(failure)),
            }
        }
        outcomes
    }

    /// What became of the first so many; of none where there is no ring, or no memory behind it for the first.
    async fn put_in_place(&self, put: &Put<'_>) -> Result<Vec<PutOutcome>, Failure> {
        let deadline = self.put_deadline(put);
        let call = |link: Arc<Link>| async move {
            match link.local(put.keys.len()) {
                Some(local) => local.put(put, deadline).await,
                None => Ok(Vec::new()),
            }
        };
        self.ask(deadline, call).await
    }

    /// What became of the first so many.
    async fn put_streamed(&self, put: &Put<'_>) -> Result<Vec<PutOutcome>, Failure> {
        let block_tokens = self.terms.attach.namespace.block_tokens as usize;
        let header_tokens = if put.tokens.is_empty() { 0 } else { block_tokens };
        let link = self.links.ready().await?;
        let keys_max = link.put_keys_max(header_tokens, self.terms.shard_bytes(put.shard.count));
        let put = put.piece(0, keys_max, block_tokens);
        let deadline = self.put_deadline(&put);
        let Put { parent, keys, shard, payloads, tokens } = put;
        let roots = self.roots(keys, shard, payloads).await;
        let piece = Piece { parent, keys, shard, payloads, tokens, roots, deadline_ms: deadline::wire_ms(deadline) };
        let piece = &piece;
        self.ask(deadline, |link| async move { piece.send(&link).await }).await
    }

    fn put_deadline(&self, put: &Put<'_>) -> Duration {
        deadline::with_bytes(self.deadline, put.payloads.iter().map(|payload| payload.len() as u64).sum())
    }

    /// What the payloads sum to. Gives way to other tasks after each block: a long run takes tens of milliseconds.
    async fn roots(&self, keys: &[BlockKey], shard: Shard, payloads: &[Bytes]) -> Vec<u64> {
        let fingerprint = self.terms.attach.layout.fingerprint();
        let mut roots = Vec::with_capacity(keys.len());
        for (key, payload) in keys.iter().zip(payloads) {
            roots.push(payload_root(seed(key, shard, fingerprint), payload));
            tokio::task::yield_now().await;
        }
        roots
    }
}

impl Piece<'_> {
    async fn send(&self, link: &Arc<Link>) -> Result<Vec<PutOutcome>, Failure> {
        let (chunks, receiver) = mpsc::channel(CHUNKS_WAITING_MAX);
        let header = Part::Header(self.header(link.attachment));
        chunks.send(PutRequest { part: Some(header) }).await.map_err(|_| Failure::Gone)?;
        let replies = link.client().put(link.request(ReceiverStream::new(receiver))).await?;
        let mut replies = replies.into_inner();
        let reserved = match next(&mut replies).await? {
            Reply::Reserved(reserved) => self.outcomes(&reserved)?,
            Reply::Committed(committed) => return self.committed(&committed),
        };
        // An answer before all is sent says that the rest is not wanted; dropping `chunks` is the half-close.
        let sending = self.send_chunks(link, &reserved, chunks);
        let reply = tokio::select! {
            biased;
            reply = next(&mut replies) => reply?,
            () = sending => next(&mut replies).await?,
        };
        match reply {
            Reply::Committed(committed) => self.committed(&committed),
            Reply::Reserved(_) => Err(Failure::Gone),
        }
    }

    fn header(&self, attachment: u64) -> wire::PutHeader {
        wire::PutHeader {
            attachment,
            parent: Bytes::copy_from_slice(self.parent.as_bytes()),
            keys: joined(self.keys),
            shard: Some(self.shard.into()),
            roots: self.roots.clone(),
            tokens: self.tokens.to_vec(),
            deadline_ms: self.deadline_ms,
        }
    }

    /// Sends slices of the payloads of accepted blocks, then closes.
    async fn send_chunks(&self, link: &Link, reserved: &[Wire], chunks: mpsc::Sender<PutRequest>) {
        let accepted = (0u32..).zip(self.payloads).zip(reserved).filter(|(_, outcome)| **outcome == Wire::PutAccepted);
        for ((block, payload), _) in accepted {
            for start in (0..payload.len()).step_by(link.chunk_bytes_max) {
                let end = payload.len().min(start + link.chunk_bytes_max);
                let data = payload.slice(start..end);
                let chunk = Part::Chunk(wire::PutChunk { block, offset_bytes: start as u64, data });
                if chunks.send(PutRequest { part: Some(chunk) }).await.is_err() {
                    return;
                }
            }
        }
    }

    /// One outcome per key, or an answer that no daemon gives.
    fn outcomes(&self, outcomes: &wire::PutOutcomes) -> Result<Vec<Wire>, Failure> {
        let known: Option<Vec<Wire>> = outcomes.outcomes.iter().map(|number| Wire::try_from(*number).ok()).collect();
        known.filter(|known| known.len() == self.keys.len()).ok_or(Failure::Gone)
    }

    fn committed(&self, outcomes: &wire::PutOutcomes) -> Result<Vec<PutOutcome>, Failure> {
        self.outcomes(outcomes)?.into_iter().map(|outcome| final_outcome(outcome).ok_or(Failure::Gone)).collect()
    }
}

async fn next(replies: &mut Streaming<PutReply>) -> Result<Reply, Failure> {
    let reply = replies.message().await?.ok_or(Failure::Gone)?;
    reply.part.ok_or(Failure::Gone)
}

fn final_outcome(wire: Wire) -> Option<PutOutcome> {
    Some(match wire {
        Wire::PutUnspecified | Wire::PutAccepted => return None,
        Wire::PutStored => PutOutcome::Stored,
        Wire::PutShardStored => PutOutcome::ShardStored,
        Wire::PutAlreadyPresent => PutOutcome::AlreadyPresent,
        Wire::PutBeingWritten => PutOutcome::BeingWritten,
        Wire::PutNoRoom => PutOutcome::NoRoom,
        Wire::PutOverQuota => PutOutcome::OverQuota,
        Wire::PutSumMismatch => PutOutcome::Refused,
        Wire::PutShed => PutOutcome::Shed,
        Wire::PutIncomplete | Wire::PutUnavailable => PutOutcome::Unavailable,
    })
}
