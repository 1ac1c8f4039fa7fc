//! One function per rpc: decode, ask the core, encode.

use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tender_proto::{BlockKey, Namespace, PROTOCOL_VERSION, convert, wire};
use tokio::sync::mpsc;
use tokio::sync::mpsc::error::SendTimeoutError;
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use super::identity::Identities;
use super::session::{Session, Sessions};
use super::window::Windows;
use crate::driver::CoreHandle;
use crate::names::{AttachmentId, TenantId};
use crate::verb::{AttachVerb, PurgeWhat, Refusal, RefusalKind, Reply, Verb};
use crate::{limits, telemetry};

/// Serves `tender.v1.Blocks`.
#[derive(Clone)]
pub struct BlocksServer {
    pub(super) core: CoreHandle,
    pub(super) identities: Arc<Identities>,
    pub(super) sessions: Arc<Sessions>,
    pub(super) windows: Arc<Windows>,
    pub(super) epoch: u64,
}

pub(super) type ReplyStream<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// The gRPC status of a refusal.
pub(super) fn status(refusal: Refusal) -> Status {
    match refusal.kind {
        RefusalKind::Invalid => Status::invalid_argument(refusal.message),
        RefusalKind::Contradiction => Status::failed_precondition(refusal.message),
        RefusalKind::Forbidden => Status::permission_denied(refusal.message),
        RefusalKind::Unattached => Status::not_found(refusal.message),
        RefusalKind::Busy => Status::resource_exhausted(refusal.message),
        RefusalKind::Stopping => Status::unavailable(refusal.message),
    }
}

pub(super) fn invalid(error: impl std::fmt::Display) -> Status {
    Status::invalid_argument(error.to_string())
}

/// The deadline of a request in milliseconds; 0 is the default.
pub(super) fn deadline(deadline_ms: u32) -> Result<Duration, Status> {
    match Duration::from_millis(deadline_ms.into()) {
        Duration::ZERO => Ok(limits::DEADLINE_DEFAULT),
        deadline if deadline <= limits::DEADLINE_MAX => Ok(deadline),
        _ => Err(invalid(format!(
            "deadline_ms is {deadline_ms}, but must be at most {}",
            limits::DEADLINE_MAX.as_millis()
        ))),
    }
}

fn unexpected(reply: &Reply) -> Status {
    Status::internal(format!("the core answered another question: {reply:?}"))
}

/// Sends a message of a stream. A client that takes nothing for long is treated as gone: what it holds is others' memory.
pub(super) async fn send<T>(replies: &mpsc::Sender<Result<T, Status>>, reply: T) -> Result<(), Status> {
    match replies.send_timeout(Ok(reply), limits::CLIENT_STALL).await {
        Ok(()) => Ok(()),
        Err(SendTimeoutError::Closed(_)) => Err(Status::cancelled("the client is gone")),
        Err(SendTimeoutError::Timeout(_)) => Err(Status::deadline_exceeded(format!(
            "the client took nothing for {} s; ask again and read on",
            limits::CLIENT_STALL.as_secs()
        ))),
    }
}

/// The keys of a request.
pub(super) fn keys(bytes: &[u8]) -> Result<Vec<BlockKey>, Status> {
    convert::keys("keys", bytes, 0, limits::KEYS_MAX).map_err(invalid)
}

impl BlocksServer {
    /// A server in front of a core.
    pub fn new(core: CoreHandle, identities: Arc<Identities>, epoch: u64) -> Self {
        let windows = Arc::new(Windows::new(core.arena(), core.tenant_count()));
        Self { core, identities, sessions: Arc::default(), windows, epoch }
    }

    pub(super) fn session(&self, attachment: u64, tenant: TenantId) -> Result<Arc<Session>, Status> {
        let session = self.sessions.get(attachment, tenant);
        session.ok_or_else(|| status(Refusal::unattached(AttachmentId(attachment))))
    }

    /// Asks the core; a session that the core has forgotten is forgotten here too.
    pub(super) async fn ask(&self, session: &Session, deadline: Duration, verb: Verb) -> Result<Reply, Status> {
        let answer = self.core.ask(session.tenant, deadline, verb).await;
        let answer = answer.map_err(|refusal| self.refused(session, refusal))?;
        debug_assert!(answer.undo.is_none(), "what grants something is asked for where its undo is kept");
        Ok(answer.reply)
    }

    pub(super) fn refused(&self, session: &Session, refusal: Refusal) -> Status {
        if refusal.kind == RefusalKind::Unattached {
            self.sessions.remove(session.attachment);
        }
        status(refusal)
    }

    async fn attach_inner(&self, request: Request<wire::AttachRequest>) -> Result<wire::AttachReply, Status> {
        let tenant = self.identities.tenant(&request)?;
        let message = request.into_inner();
        if message.protocol_version != PROTOCOL_VERSION {
            return Err(Status::failed_precondition(format!(
                "protocol_version is {}, but this daemon ({}) speaks {PROTOCOL_VERSION}; use a client of that version",
                message.protocol_version,
                env!("CARGO_PKG_VERSION")
            )));
        }
        convert::length("group", message.group.len(), 1, 128).map_err(invalid)?;
        convert::length("member", message.member.len(), 0, 128).map_err(invalid)?;
        let namespace = message.namespace.ok_or(convert::FieldError::Missing("namespace")).map_err(invalid)?;
        let namespace = Namespace::try_from(namespace).map_err(invalid)?;
        let layout = convert::layout(message.layout, &namespace).map_err(invalid)?;
        let expected_root = match message.expected_root.len() {
            0 => None,
            _ => Some(convert::key("expected_root", &message.expected_root).map_err(invalid)?),
        };
        let attachment = AttachmentId(random());
        let (block_tokens, fingerprint) = (namespace.block_tokens, layout.fingerprint());
        let (group, member) = (message.group, message.member);
        let verb = Verb::Attach(Box::new(AttachVerb { attachment, group, member, namespace, layout, expected_root }));
        let answer = self.core.ask(tenant, limits::DEADLINE_DEFAULT, verb).await.map_err(status)?;
        let Reply::Attached(attached) = answer.reply else { return Err(unexpected(&answer.reply)) };
        let root = attached.root;
        self.sessions.add(Session { attachment, tenant, root, block_tokens, layout, fingerprint });
        Ok(wire::AttachReply {
            attachment: attachment.0,
            salt: attached.salt.to_vec().into(),
            root: root.as_bytes().to_vec().into(),
            epoch: self.epoch,
            tenant: attached.tenant,
            block_bytes: attached.block_bytes,
            keys_max: limits::KEYS_MAX as u32,
            chunk_bytes_max: limits::CHUNK_BYTES_MAX as u64,
            request_bytes_max: limits::REQUEST_BYTES_MAX as u64,
            // Half of a quota, so that one put does not wait for what it holds itself.
            put_bytes_max: attached
                .host_quota_bytes
                .map_or(u64::MAX, |quota| quota / 2)
                .min(self.windows.reserve_bytes()),
        })
    }

    async fn lookup_inner(&self, request: Request<wire::LookupRequest>) -> Result<wire::LookupReply, Status> {
        let tenant = self.identities.tenant(&request)?;
        let message = request.into_inner();
        let session = self.session(message.attachment, tenant)?;
        let verb = Verb::Lookup(session.attachment, keys(&message.keys)?);
        match self.ask(&session, deadline(message.deadline_ms)?, verb).await? {
            Reply::Lookup(reply) => Ok(wire::LookupReply {
                prefix_blocks: reply.prefix_blocks,
                host: reply.host.into(),
                disk: reply.disk.into(),
            }),
            other => Err(unexpected(&other)),
        }
    }

    async fn durable_inner(&self, request: Request<wire::DurableRequest>) -> Result<wire::DurableReply, Status> {
        let tenant = self.identities.tenant(&request)?;
        let message = request.into_inner();
        let session = self.session(message.attachment, tenant)?;
        let verb = Verb::Durable(session.attachment, keys(&message.keys)?);
        match self.ask(&session, deadline(message.deadline_ms)?, verb).await? {
            Reply::Durable(durable) => {
                let mut bitmap = vec![0u8; durable.len().div_ceil(8)];
                for (i, durable) in durable.iter().enumerate() {
                    bitmap[i / 8] |= u8::from(*durable) << (i % 8);
                }
                let durable_blocks = durable.iter().filter(|durable| **durable).count() as u32;
                Ok(wire::DurableReply { durable: bitmap.into(), durable_blocks })
            }
            other => Err(unexpected(&other)),
        }
    }

    async fn purge_inner(&self, request: Request<wire::PurgeRequest>) -> Result<wire::PurgeReply, Status> {
        let tenant = self.identities.tenant(&request)?;
        let message = request.into_inner();
        let session = self.session(message.attachment, tenant)?;
        let what = match message.what {
            Some(wire::purge_request::What::Keys(bytes)) => PurgeWhat::Keys(keys(&bytes)?),
            Some(wire::purge_request::What::Namespace(true)) => PurgeWhat::Namespace,
            _ => return Err(invalid("purge wants keys, or namespace = true")),
        };
        let verb = Verb::Purge(session.attachment, what);
        match self.ask(&session, deadline(message.deadline_ms)?, verb).await? {
            Reply::Purged { purged_blocks, busy_blocks } => Ok(wire::PurgeReply { purged_blocks, busy_blocks }),
            other => Err(unexpected(&other)),
        }
    }

    async fn prefetch_inner(
        &self,
        request: Request<wire::PrefetchRequest>,
    ) -> Result<ReplyStream<wire::PrefetchProgress>, Status> {
        let tenant = self.identities.tenant(&request)?;
        let message = request.into_inner();
        let session = self.session(message.attachment, tenant)?;
        let verb = Verb::Prefetch(session.attachment, keys(&message.keys)?);
        let mut replies = self.core.ask_many(tenant, deadline(message.deadline_ms)?, verb).map_err(status)?;
        let (sender, receiver) = mpsc::channel(2);
        let server = self.clone();
        tokio::spawn(async move {
            while let Some(reply) = replies.recv().await {
                let item = match reply {
                    Reply::Prefetch(reply) => Ok(wire::PrefetchProgress {
                        resident_blocks: reply.resident,
                        loaded_blocks: reply.loaded,
                        missing_blocks: reply.missing,
                        shed_blocks: reply.shed,
                        done: reply.done,
                    }),
                    Reply::Refused(refusal) => Err(server.refused(&session, refusal)),
                    other => Err(unexpected(&other)),
                };
                let item = match item {
                    Ok(progress) => send(&sender, progress).await,
                    Err(status) => Err(status),
                };
                if let Err(status) = item {
                    // A client that is gone needs no answer; for one that is stuck nothing is held any more.
                    let _ = sender.send_timeout(Err(status), limits::CLIENT_STALL).await;
                    return;
                }
            }
        });
        Ok(Box::pin(ReceiverStream::new(receiver)))
    }
}

/// 64 bits that nobody can guess.
pub(crate) fn random() -> u64 {
    let mut bytes = [0; 8];
    // The system's generator fails only where the call does not exist; there the address layout and the clock must do.
    if rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty()).is_err() {
        use std::hash::{BuildHasher, RandomState};
        return RandomState::new().hash_one(Instant::now());
    }
    u64::from_le_bytes(bytes)
}

/// Times a request.
async fn timed<T>(verb: &'static str, work: impl Future<Output = Result<T, Status>>) -> Result<Response<T>, Status> {
    let start = Instant::now();
    let done = work.await;
    telemetry::request_done(verb, start.elapsed());
    if let Err(status) = &done {
        tracing::debug!(verb, code = ?status.code(), message = status.message(), "request refused");
    }
    done.map(Response::new)
}

#[tonic::async_trait]
impl wire::blocks_server::Blocks for BlocksServer {
    type PutStream = ReplyStream<wire::PutReply>;
    type GetStream = ReplyStream<wire::GetReply>;
    type PrefetchStream = ReplyStream<wire::PrefetchProgress>;
    type WatchStream = ReplyStream<wire::WatchReply>;

    async fn attach(&self, request: Request<wire::AttachRequest>) -> Result<Response<wire::AttachReply>, Status> {
        timed("attach", self.attach_inner(request)).await
    }

    async fn detach(&self, request: Request<wire::DetachRequest>) -> Result<Response<wire::DetachReply>, Status> {
        let work = async {
            let tenant = self.identities.tenant(&request)?;
            let session = self.session(request.into_inner().attachment, tenant)?;
            self.ask(&session, limits::DEADLINE_DEFAULT, Verb::Detach(session.attachment)).await?;
            self.sessions.remove(session.attachment);
            Ok(wire::DetachReply {})
        };
        timed("detach", work).await
    }

    async fn lookup(&self, request: Request<wire::LookupRequest>) -> Result<Response<wire::LookupReply>, Status> {
        timed("lookup", self.lookup_inner(request)).await
    }

    async fn put(&self, request: Request<Streaming<wire::PutRequest>>) -> Result<Response<Self::PutStream>, Status> {
        let tenant = self.identities.tenant(&request)?;
        Ok(Response::new(self.put_stream(tenant, request.into_inner())))
    }

    async fn get(&self, request: Request<wire::GetRequest>) -> Result<Response<Self::GetStream>, Status> {
        let tenant = self.identities.tenant(&request)?;
        self.get_stream(tenant, request.into_inner()).map(Response::new)
    }

    async fn prefetch(
        &self,
        request: Request<wire::PrefetchRequest>,
    ) -> Result<Response<Self::PrefetchStream>, Status> {
        timed("prefetch", self.prefetch_inner(request)).await
    }

    async fn durable(&self, request: Request<wire::DurableRequest>) -> Result<Response<wire::DurableReply>, Status> {
        timed("durable", self.durable_inner(request)).await
    }

    async fn purge(&self, request: Request<wire::PurgeRequest>) -> Result<Response<wire::PurgeReply>, Status> {
        timed("purge", self.purge_inner(request)).await
    }

    async fn watch(&self, request: Request<wire::WatchRequest>) -> Result<Response<Self::WatchStream>, Status> {
        let tenant = self.identities.tenant(&request)?;
        self.watch_stream(tenant, request.into_inner()).map(Response::new)
    }
}
