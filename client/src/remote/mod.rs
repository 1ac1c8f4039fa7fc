//! A daemon, asked over gRPC.
//!
//! ```text
//! Remote ── verb ──► Links::current ──► Link (one attachment over one connection) ──► daemon
//!             │          └─ none: a miss, at once; a task of `link` attaches meanwhile
//!             └─ the call failed because the daemon is gone or forgot us: Links::another, once, then again
//! ```
//! `connection` is the way there, `link` the attachment, `failure` why there was no answer, `deadline` how long to wait for one;
//! `put`, `get` and `watch` are the verbs that stream. The others are short and stand here.

mod connection;
mod deadline;
mod failure;
mod get;
mod link;
mod put;
mod watch;

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tender_proto::wire;
use tender_proto::{BlockKey, Shard};
use tokio::time::timeout;

pub(crate) use self::connection::Door;
pub use self::connection::Target;
use self::failure::Failure;
use self::link::{Link, Links};
use crate::{
    Attach, AttachError, BlockStore, GetEnd, Got, Lookup, Position, Prefetched, Purge, Purged, Put, PutOutcome, Terms,
    Watch,
};

/// A daemon. Clones share one attachment; the last one dropped leaves.
#[derive(Clone, Debug)]
pub struct Remote {
    terms: Arc<Terms>,
    links: Arc<Links>,
    deadline: Duration,
}

impl Remote {
    /// Attaches to the daemon at `target`. With a `token` the tenant is the token's, else the socket decides.
    pub async fn attach(target: Target, token: Option<String>, attach: Attach) -> Result<Self, AttachError> {
        let door = Door::new(target, token)?;
        let (link, terms) = Link::attach(&door, &attach, None).await?;
        let links = Links::new(door, link, &terms);
        Ok(Self { terms: Arc::new(terms), links, deadline: deadline::REQUEST })
    }

    /// The same client with another deadline for each call (default 5 s), to which the time for its bytes is added.
    pub fn with_deadline(self, deadline: Duration) -> Self {
        Self { deadline, ..self }
    }

    /// Leaves, and waits a moment (at most a second) until the daemon has heard of it, which a drop does not: what a drop starts ends
    /// with the runtime. While there are other clones nothing happens, as with a drop.
    pub async fn close(self) {
        if let Some(links) = Arc::into_inner(self.links) {
            links.close().await;
        }
    }

    /// One call: over another link once more, if the first is gone.
    async fn ask<T, F>(&self, deadline: Duration, call: impl Fn(Arc<Link>) -> F) -> Result<T, Failure>
    where
        F: Future<Output = Result<T, Failure>>,
    {
        let calls = async {
            let link = self.links.current()?;
            let answer = call(Arc::clone(&link)).await;
            let Err(failure) = answer else { return answer };
            if !failure.wants_attach() {
                return Err(failure);
            }
            let link = self.links.another(&link).await?;
            let answer = call(Arc::clone(&link)).await;
            if answer.as_ref().is_err_and(|failure| failure.wants_attach()) {
                self.links.lose(&link);
            }
            answer
        };
        timeout(deadline + deadline::GRACE, calls).await.unwrap_or(Err(Failure::Deadline))
    }

    /// Cuts a chain to what one request may hold. The first piece that fails ends the call, so that a daemon that hangs is waited for
    /// once and not for each piece.
    fn pieces<'a>(&self, keys: &'a [BlockKey]) -> impl Iterator<Item = &'a [BlockKey]> + Send + use<'a> {
        keys.chunks(self.links.current().map_or(self.terms.keys_max, |link| link.keys_max))
    }

    fn block_bytes(&self, keys: &[BlockKey]) -> u64 {
        self.terms.attach.layout.block_bytes().saturating_mul(keys.len() as u64)
    }

    async fn lookup_piece(&self, keys: &[BlockKey]) -> Result<wire::LookupReply, Failure> {
        let call = |link: Arc<Link>| async move {
            let (attachment, deadline_ms) = (link.attachment, deadline::wire_ms(self.deadline));
            let request = wire::LookupRequest { attachment, keys: joined(keys), deadline_ms };
            Ok(link.client().lookup(link.request(request)).await?.into_inner())
        };
        self.ask(self.deadline, call).await
    }

    async fn durable_piece(&self, keys: &[BlockKey]) -> Result<wire::DurableReply, Failure> {
        // What is not on disk yet has to be written first.
        let deadline = deadline::with_bytes(self.deadline, self.block_bytes(keys));
        let call = |link: Arc<Link>| async move {
            let (attachment, deadline_ms) = (link.attachment, deadline::wire_ms(deadline));
            let request = wire::DurableRequest { attachment, keys: joined(keys), deadline_ms };
            Ok(link.client().durable(link.request(request)).await?.into_inner())
        };
        self.ask(deadline, call).await
    }

    async fn purge_piece(&self, what: wire::purge_request::What) -> Result<wire::PurgeReply, Failure> {
        let what = &what;
        let call = |link: Arc<Link>| async move {
            let (attachment, deadline_ms) = (link.attachment, deadline::wire_ms(self.deadline));
            let request = wire::PurgeRequest { attachment, what: Some(what.clone()), deadline_ms };
            Ok(link.client().purge(link.request(request)).await?.into_inner())
        };
        self.ask(self.deadline, call).await
    }

    /// `report` is given what the daemon said last.
    async fn prefetch_piece(
        &self,
        keys: &[BlockKey],
        report: &mut (dyn FnMut(Prefetched) + Send),
    ) -> Result<(), Failure> {
        let deadline = deadline::with_bytes(self.deadline, self.block_bytes(keys));
        let call = |link: Arc<Link>| async move {
            let (attachment, deadline_ms) = (link.attachment, deadline::wire_ms(deadline));
            let request = wire::PrefetchRequest { attachment, keys: joined(keys), deadline_ms };
            Ok(link.client().prefetch(link.request(request)).await?.into_inner())
        };
        let mut stream = self.ask(deadline, call).await?;
        let reports = async {
            while let Some(progress) = stream.message().await? {
                let blocks = |count: u32| (count as usize).min(keys.len());
                report(Prefetched {
                    resident_blocks: blocks(progress.resident_blocks),
                    loaded_blocks: blocks(progress.loaded_blocks),
                    missing_blocks: blocks(progress.missing_blocks),
                    shed_blocks: blocks(progress.shed_blocks),
                });
                if progress.done {
                    return Ok(());
                }
            }
            Err(Failure::Gone)
        };
        timeout(deadline + deadline::GRACE, reports).await.unwrap_or(Err(Failure::Deadline))
    }
}

impl BlockStore for Remote {
    fn terms(&self) -> &Terms {
        &self.terms
    }

    async fn lookup(&self, keys: &[BlockKey]) -> Lookup {
        let mut found = Lookup::default();
        for piece in self.pieces(keys) {
            let Ok(reply) = self.lookup_piece(piece).await else { break };
            if found.prefix_blocks == found.host.len() {
                found.prefix_blocks += (reply.prefix_blocks as usize).min(piece.len());
            }
            found.host.extend(bits(&reply.host, piece.len()));
            found.disk.extend(bits(&reply.disk, piece.len()));
        }
        found.host.resize(keys.len(), false);
        found.disk.resize(keys.len(), false);
        found
    }

    async fn put(&self, put: Put<'_>) -> Vec<PutOutcome> {
        match put.check(&self.terms) {
            Ok(shard) => self.put_run(&Put { shard, ..put }).await,
            Err(fault) => put.refused(&fault),
        }
    }

    async fn get(&self, keys: &[BlockKey], shard: Shard) -> Got {
        match self.terms.attach.layout.shard(shard.index.into(), shard.count.into()) {
            Ok(shard) => self.get_run(keys, shard).await,
            Err(fault) => Got::refused(&fault),
        }
    }

    async fn prefetch(&self, keys: &[BlockKey], mut progress: impl FnMut(&Prefetched) + Send) -> Prefetched {
        let mut whole = Prefetched::default();
        for piece in self.pieces(keys) {
            let mut last = Prefetched::default();
            let mut report = |now: Prefetched| {
                last = now;
                progress(&plus(whole, now));
            };
            let answer = self.prefetch_piece(piece, &mut report).await;
            whole = plus(whole, last);
            if let Err(failure) = answer {
                tracing::debug!("prefetch given up: {failure:?}");
                break;
            }
        }
        // Whatever the daemon has not accounted for was given up.
        whole.shed_blocks = keys.len().saturating_sub(whole.resident_blocks + whole.missing_blocks);
        progress(&whole);
        whole
    }

    async fn durable(&self, keys: &[BlockKey]) -> Vec<bool> {
        let mut durable = Vec::with_capacity(keys.len());
        for piece in self.pieces(keys) {
            let Ok(reply) = self.durable_piece(piece).await else { break };
            durable.extend(bits(&reply.durable, piece.len()));
        }
        durable.resize(keys.len(), false);
        durable
    }

    async fn purge(&self, what: Purge<'_>) -> Purged {
        let pieces: Vec<wire::purge_request::What> = match what {
            Purge::Keys(keys) => {
                self.pieces(keys).map(|piece| wire::purge_request::What::Keys(joined(piece))).collect()
            }
            Purge::Namespace => vec![wire::purge_request::What::Namespace(true)],
        };
        let mut purged = Purged { complete: true, ..Purged::default() };
        for piece in pieces {
            match self.purge_piece(piece).await {
                Ok(reply) => {
                    purged.purged_blocks += reply.purged_blocks;
                    purged.busy_blocks += reply.busy_blocks;
                }
                Err(failure) => {
                    tracing::warn!("purge not finished: {failure:?}");
                    purged.complete = false;
                    break;
                }
            }
        }
        purged
    }

    async fn watch(&self, from: Option<Position>) -> Watch {
        self.watch_from(from).await
    }
}

/// Keys as the wire has them.
fn joined(keys: &[BlockKey]) -> Bytes {
    BlockKey::join(keys).into()
}

/// The first `count` bits of a bitmap; what it is too short for is not set.
fn bits(bitmap: &[u8], count: usize) -> impl Iterator<Item = bool> {
    (0..count).map(|bit| bitmap.get(bit / 8).is_some_and(|byte| byte >> (bit % 8) & 1 == 1))
}

fn plus(a: Prefetched, b: Prefetched) -> Prefetched {
    Prefetched {
        resident_blocks: a.resident_blocks + b.resident_blocks,
        loaded_blocks: a.loaded_blocks + b.loaded_blocks,
        missing_blocks: a.missing_blocks + b.missing_blocks,
        shed_blocks: a.shed_blocks + b.shed_blocks,
    }
}

fn end_of(failure: Failure) -> GetEnd {
    match failure {
        Failure::Gone | Failure::Detached => GetEnd::Unavailable,
        Failure::Deadline => GetEnd::Deadline,
        Failure::Shed => GetEnd::Shed,
        Failure::Refused => GetEnd::Miss,
    }
}

fn outcome_of(failure: Failure) -> PutOutcome {
    match failure {
        Failure::Gone | Failure::Detached | Failure::Deadline => PutOutcome::Unavailable,
        Failure::Shed => PutOutcome::Shed,
        Failure::Refused => PutOutcome::Refused,
    }
}
