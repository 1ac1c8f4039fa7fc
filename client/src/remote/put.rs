//! Putting a run: header, `reserved`, the bytes of what was accepted, half-close, `committed`.

use std::sync::Arc;

use bytes::Bytes;
use tender_proto::sum::{payload_root, seed};
use tender_proto::wire::put_reply::Part as Reply;
use tender_proto::wire::put_request::Part;
use tender_proto::wire::{self, PutOutcome as Wire, PutReply, PutRequest};
use tender_proto::{BlockKey, Shard};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;

use super::failure::Failure;
use super::link::Link;
use super::{Remote, deadline, joined, outcome_of};
use crate::{Put, PutOutcome};

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
        let block_tokens = if put.tokens.is_empty() { 0 } else { self.terms.attach.namespace.block_tokens as usize };
        let mut outcomes = Vec::with_capacity(put.keys.len());
        let Ok(link) = self.links.current() else { return vec![PutOutcome::Unavailable; put.keys.len()] };
        for keys in put.keys.chunks(link.put_keys_max(block_tokens, self.terms.shard_bytes(put.shard.count))) {
            let (start, end) = (outcomes.len(), outcomes.len() + keys.len());
            let payloads = &put.payloads[start..end];
            let bytes = payloads.iter().map(|payload| payload.len() as u64).sum();
            let deadline = deadline::with_bytes(self.deadline, bytes);
            let piece = Piece {
                parent: start.checked_sub(1).map_or(put.parent, |last| put.keys[last]),
                keys,
                shard: put.shard,
                payloads,
                tokens: &put.tokens[start * block_tokens..end * block_tokens],
                roots: self.roots(keys, put.shard, payloads).await,
                deadline_ms: deadline::wire_ms(deadline),
            };
            let piece = &piece;
            match self.ask(deadline, |link| async move { piece.send(&link).await }).await {
                Ok(came) => {
                    outcomes.extend(came);
                    // Nobody gets what follows a block that is not there.
                    if let Some(why) = outcomes[start..].iter().copied().find(|outcome| outcome.is_turned_away()) {
                        outcomes.resize(put.keys.len(), why);
                        break;
                    }
                }
                Err(failure) => {
                    outcomes.resize(put.keys.len(), outcome_of(failure));
                    break;
                }
            }
        }
        outcomes
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
