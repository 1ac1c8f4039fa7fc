//! Getting a run: through the ring where there is one, what that does not bring over gRPC. There heads and bytes come in turn; a block
//! counts when it came whole and sums to what was put.

use std::mem;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use tender_proto::sum::{payload_root, seed};
use tender_proto::wire::get_reply::Part as Reply;
use tender_proto::wire::{self, GetEndReason};
use tender_proto::{BlockKey, BlockLayout, Shard};
use tokio::time::timeout;

use super::link::{Link, Links};
use super::{LINKS_MAX, Remote, end_of, joined};
use crate::failure::Failure;
use crate::local::{Came, Local, Wanted};
use crate::{BlockView, GetEnd, Got, Tier, deadline};

/// A run as far as it came.
struct Run<'a> {
    keys: &'a [BlockKey],
    shard: Shard,
    layout: &'a BlockLayout,
    deadline: Duration,
    blocks: Vec<BlockView>,
    /// What is left is not to be had through the ring.
    is_streamed: bool,
}

/// A block whose head came.
struct Arriving {
    tier: Tier,
    parts: Vec<wire::Part>,
    bytes: usize,
    data: Data,
}

/// Bytes that came so far. Those of a block that fits in one message stay where they are.
enum Data {
    One(Bytes),
    Many(BytesMut),
}

/// What came is not what was put.
struct Mismatch;

impl Remote {
    pub(super) async fn get_run(&self, keys: &[BlockKey], shard: Shard) -> Got {
        let layout = &self.terms.attach.layout;
        let bytes = layout.shard_bytes(shard.count).saturating_mul(keys.len() as u64);
        let mut run = Run { keys, shard, layout, deadline: self.deadline, blocks: Vec::new(), is_streamed: false };
        let deadline = deadline::with_bytes(self.deadline, bytes) + deadline::GRACE;
        let end = timeout(deadline, run.fill(&self.links)).await.unwrap_or(GetEnd::Deadline);
        Got { blocks: run.blocks, end }
    }
}

impl Run<'_> {
    /// Asks until all is there or something ends the run; goes on over another link where one breaks.
    async fn fill(&mut self, links: &Arc<Links>) -> GetEnd {
        let Ok(mut link) = links.ready().await else { return GetEnd::Unavailable };
        let mut links_used = 1;
        while self.blocks.len() < self.keys.len() {
            match self.fill_some(&link).await {
                Ok(GetEnd::Complete) => {}
                Ok(end) => return end,
                Err(failure) if failure.wants_attach() && links_used < LINKS_MAX => {
                    links_used += 1;
                    link = match links.another(&link).await {
                        Ok(another) => another,
                        Err(failure) => return end_of(failure),
                    };
                }
                Err(failure) => {
                    if failure.wants_attach() {
                        links.lose(&link);
                    }
                    return end_of(failure);
                }
            }
        }
        GetEnd::Complete
    }

    /// All that is missing through the ring, or a piece of it over gRPC.
    async fn fill_some(&mut self, link: &Link) -> Result<GetEnd, Failure> {
        let missing = &self.keys[self.blocks.len()..];
        if let Some(local) = link.local(0).filter(|_| !self.is_streamed) {
            return self.fill_in_place(local, missing).await;
        }
        self.fill_piece(link, &missing[..missing.len().min(link.keys_max)]).await
    }

    async fn fill_in_place(&mut self, local: &Local, keys: &[BlockKey]) -> Result<GetEnd, Failure> {
        let wanted = Wanted { keys, shard: self.shard, layout: self.layout, deadline: self.deadline };
        match local.get(&wanted, &mut self.blocks).await? {
            Came::To(end) => Ok(end),
            Came::NotHere => {
                self.is_streamed = true;
                Ok(GetEnd::Complete)
            }
        }
    }

    async fn fill_piece(&mut self, link: &Link, keys: &[BlockKey]) -> Result<GetEnd, Failure> {
        let (attachment, deadline_ms) = (link.attachment, deadline::wire_ms(self.deadline));
        let request = wire::GetRequest { attachment, keys: joined(keys), shard: Some(self.shard.into()), deadline_ms };
        let mut replies = link.client().get(link.request(request)).await?.into_inner();
        let before = self.blocks.len();
        let mut arriving: Option<Arriving> = None;
        while let Some(reply) = replies.message().await? {
            let came = self.blocks.len() - before;
            let step = match reply.part.ok_or(Failure::Gone)? {
                Reply::Block(head) => self.head(&mut arriving, &head, came, keys.len()),
                Reply::Data(data) => arriving.as_mut().ok_or(Mismatch).and_then(|block| block.take(data)),
                Reply::End(end) => return Ok(ended(&end, came, keys.len(), arriving.is_some())),
            };
            let taken = step.and_then(|()| match arriving.take_if(|block| block.is_whole()) {
                Some(block) => self.verify(block, &keys[came]),
                None => Ok(()),
            });
            if let Err(Mismatch) = taken {
                tracing::warn!(key = ?keys.get(came), "a block arrived with other bytes than were stored; taken for a miss");
                return Ok(GetEnd::SumMismatch);
            }
        }
        // The stream ended without saying why: the daemon is going down.
        Err(Failure::Gone)
    }

    fn head(
        &self,
        arriving: &mut Option<Arriving>,
        head: &wire::GetBlock,
        came: usize,
        asked: usize,
    ) -> Result<(), Mismatch> {
        let bytes = self.layout.shard_bytes(self.shard.count);
        if arriving.is_some() || came >= asked || head.index as usize != came || head.bytes != bytes {
            return Err(Mismatch);
        }
        let tier = match head.tier() {
            wire::Tier::Disk => Tier::Disk,
            wire::Tier::Peer => Tier::Peer,
            wire::Tier::Object => Tier::Object,
            wire::Tier::Host | wire::Tier::Device | wire::Tier::Unspecified => Tier::Host,
        };
        let (parts, data) = (head.parts.clone(), Data::One(Bytes::new()));
        *arriving = Some(Arriving { tier, parts, bytes: bytes as usize, data });
        Ok(())
    }

    fn verify(&mut self, block: Arriving, key: &BlockKey) -> Result<(), Mismatch> {
        let data = match block.data {
            Data::One(data) => data,
            Data::Many(data) => data.freeze(),
        };
        if !block.parts.is_empty() {
            verify_parts(self.layout, self.shard, key, &block.parts, &data)?;
        }
        self.blocks.push(BlockView::new(block.tier, data));
        Ok(())
    }
}

impl Arriving {
    fn is_whole(&self) -> bool {
        self.len() == self.bytes
    }

    fn len(&self) -> usize {
        match &self.data {
            Data::One(data) => data.len(),
            Data::Many(data) => data.len(),
        }
    }

    fn take(&mut self, more: Bytes) -> Result<(), Mismatch> {
        if self.len() + more.len() > self.bytes {
            return Err(Mismatch);
        }
        match &mut self.data {
            Data::One(data) if data.is_empty() => *data = more,
            Data::One(first) => {
                let mut all = BytesMut::with_capacity(self.bytes);
                all.extend_from_slice(&mem::take(first));
                all.extend_from_slice(&more);
                self.data = Data::Many(all);
            }
            Data::Many(data) => data.extend_from_slice(&more),
        }
        Ok(())
    }
}

/// The stored shards that a block is said to be made of must lie end to end where the block lies, and each must sum to its root.
fn verify_parts(
    layout: &BlockLayout,
    shard: Shard,
    key: &BlockKey,
    parts: &[wire::Part],
    data: &[u8],
) -> Result<(), Mismatch> {
    let fingerprint = layout.fingerprint();
    let place = |shard: Shard| layout.shard_bytes(shard.count) * u64::from(shard.index);
    let start = place(shard);
    let mut rest = data;
    for part in parts {
        let stored = tender_proto::convert::shard(layout, part.shard).map_err(|_| Mismatch)?;
        let taken = (data.len() - rest.len()) as u64;
        if part.bytes != layout.shard_bytes(stored.count) || place(stored) != start + taken {
            return Err(Mismatch);
        }
        let (bytes, after) = rest.split_at_checked(part.bytes as usize).ok_or(Mismatch)?;
        if payload_root(seed(key, stored, fingerprint), bytes) != part.root {
            return Err(Mismatch);
        }
        rest = after;
    }
    if rest.is_empty() { Ok(()) } else { Err(Mismatch) }
}

/// What the end of a stream means: a claim that does not fit what came is not believed.
fn ended(end: &wire::GetEnd, came: usize, asked: usize, is_torn: bool) -> GetEnd {
    if end.blocks as usize != came || is_torn {
        return GetEnd::SumMismatch;
    }
    match end.reason() {
        GetEndReason::GetEndComplete if came == asked => GetEnd::Complete,
        GetEndReason::GetEndDeadline => GetEnd::Deadline,
        GetEndReason::GetEndShed => GetEnd::Shed,
        GetEndReason::GetEndMiss | GetEndReason::GetEndComplete | GetEndReason::GetEndUnspecified => GetEnd::Miss,
    }
}
