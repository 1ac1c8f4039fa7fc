//! An attachment over a connection, and how it is had again when one of them is lost.
//!
//! ```text
//!            a call finds the daemon gone, or itself detached
//!   attached ────────────────────────────────────────────────► lost ── a task attaches: at once, then after 100 ms, 200 ms … 5 s
//!       ▲                                                        │     calls fail at once when the first attempt has failed
//!       └──────────── attached again, under the same root ───────┘
//! ```
//! Calls wait a moment for the first attempt, so that a daemon that was merely restarted costs no miss. An attempt that
//! found somebody at the socket who then went away has met a worker at its end: for as long as calls wait it does not count as one, and
//! the next one follows soon.
//!
//! A link over gRPC that wished for a ring is changed for one that has it: the door is tried again, after pauses as long as those above.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};

use tender_proto::key::KEY_BYTES;
use tender_proto::wire::blocks_client::BlocksClient;
use tender_proto::wire::{self, AttachReply};
use tender_proto::{BlockKey, PROTOCOL_VERSION, TenantSalt};
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout};
use tonic::Request;
use tonic::transport::Channel;

use super::Doors;
use super::connection::Door;
use crate::failure::Failure;
use crate::local::{Estate, Local};
use crate::{Attach, AttachError, Terms, deadline};

/// What a daemon that names no limit is taken to hold.
const MESSAGE_BYTES_DEFAULT: usize = 4 << 20;

/// Messages are larger than what they carry.
const MESSAGE_OVERHEAD_BYTES: usize = 4096;

/// Most bytes of one put: a longer one gains nothing, and is sent again as a whole when the daemon goes away in the middle of it.
const PUT_BYTES_MAX: usize = 32 << 20;

/// The daemon's slots are whole pages.
const PAGE_BYTES: usize = 4096;

/// One attachment over one connection, and the ring of the local door where there is one.
#[derive(Debug)]
pub(super) struct Link {
    door: Door,
    channel: Channel,
    local: Option<Local>,
    pub(super) attachment: u64,
    pub(super) keys_max: usize,
    pub(super) chunk_bytes_max: usize,
    request_bytes_max: usize,
    put_bytes_max: usize,
}

impl Link {
    /// Connects and attaches. `expected` is the root that earlier keys were derived from.
    pub(super) async fn attach(
        door: &Door,
        doors: Doors,
        attach: &Attach,
        expected: Option<&BlockKey>,
        estate: &Arc<Estate>,
    ) -> Result<(Self, Terms), NotAttached> {
        // Where nobody listens, nobody went away.
        let channel = door.connect().await.map_err(NotAttached::For)?;
        let request = wire::AttachRequest {
            protocol_version: PROTOCOL_VERSION,
            group: attach.group.clone(),
            member: attach.member.clone(),
            namespace: Some((&attach.namespace).into()),
            layout: Some((&attach.layout).into()),
            expected_root: expected.map(|root| root.as_bytes().to_vec().into()).unwrap_or_default(),
        };
        let mut client = BlocksClient::new(channel.clone());
        let reply = door.first_answer(client.attach(door.request(request))).await?;
        let terms = terms(attach, &reply)?;
        let or = |value: u64, default: usize| if value == 0 { default } else { value as usize };
        let request_bytes_max = or(reply.request_bytes_max, MESSAGE_BYTES_DEFAULT).max(2 * MESSAGE_OVERHEAD_BYTES);
        let local = match (doors, door.socket()) {
            (Doors::Ring, Some(socket)) => open(socket, reply.attachment, estate).await,
            _ => None,
        };
        let keys_max = if local.is_some() { terms.keys_max.min(Local::KEYS_MAX) } else { terms.keys_max };
        let link = Self {
            door: door.clone(),
            channel,
            local,
            attachment: reply.attachment,
            keys_max,
            chunk_bytes_max: or(reply.chunk_bytes_max, 1 << 20).min(request_bytes_max - MESSAGE_OVERHEAD_BYTES),
            request_bytes_max,
            put_bytes_max: or(reply.put_bytes_max, PUT_BYTES_MAX).min(PUT_BYTES_MAX),
        };
        Ok((link, terms))
    }

    /// The ring, for requests of so many keys.
    pub(super) fn local(&self, keys: usize) -> Option<&Local> {
        // A piece may have been cut for a link without a ring, and be asked for again over one that has it.
        self.local.as_ref().filter(|_| keys <= Local::KEYS_MAX)
    }

    /// A client for one call.
    pub(super) fn client(&self) -> BlocksClient<Channel> {
        BlocksClient::new(self.channel.clone())
            .max_encoding_message_size(self.request_bytes_max)
            .max_decoding_message_size(self.request_bytes_max.max(MESSAGE_BYTES_DEFAULT))
    }

    /// Keys of one put, each with its sum, its tokens (as varints of at most 5 bytes) and `shard_bytes` of payload.
    pub(super) fn put_keys_max(&self, block_tokens: usize, shard_bytes: usize) -> usize {
        let header_bytes = KEY_BYTES + size_of::<u64>() + 5 * block_tokens;
        let in_header = (self.request_bytes_max - MESSAGE_OVERHEAD_BYTES) / header_bytes;
        let slot_bytes = shard_bytes.next_multiple_of(PAGE_BYTES).max(PAGE_BYTES);
        self.keys_max.min(in_header).min(self.put_bytes_max / slot_bytes).max(1)
    }

    pub(super) fn request<T>(&self, message: T) -> Request<T> {
        self.door.request(message)
    }
}

/// The local door, where there is one. A daemon without it is no fault: gRPC carries all of it.
async fn open(socket: &Path, attachment: u64, estate: &Arc<Estate>) -> Option<Local> {
    let opened = Local::open(socket, attachment, estate).await;
    opened.inspect_err(|error| tracing::debug!("no local door, everything goes over gRPC: {error}")).ok()
}

/// What was agreed on, with the root derived here from the daemon's salt.
fn terms(attach: &Attach, reply: &AttachReply) -> Result<Terms, AttachError> {
    let malformed = |what: &str| {
        AttachError::Refused(format!("its answer to attach holds {what}; their versions do not fit together"))
    };
    let salt = <[u8; 32]>::try_from(&reply.salt[..]).map_err(|_| malformed("a salt that has not 32 bytes"))?;
    let theirs = <[u8; 32]>::try_from(&reply.root[..]).map_err(|_| malformed("a root that has not 32 bytes"))?;
    let (salt, theirs) = (TenantSalt::from_bytes(salt), BlockKey::from_bytes(theirs));
    let ours = attach.namespace.root(&salt);
    if ours != theirs {
        return Err(AttachError::RootsDiffer { ours, theirs });
    }
    let (bytes, expected) = (reply.block_bytes, attach.layout.block_bytes());
    if bytes != expected {
        return Err(malformed(&format!("{bytes} bytes per block where this layout has {expected}")));
    }
    let keys_max = (reply.keys_max as usize).max(1);
    Ok(Terms { attach: attach.clone(), tenant: reply.tenant.clone(), salt, root: ours, keys_max })
}

/// The link in use, or the way back to one.
#[derive(Debug)]
pub(super) struct Links {
    door: Door,
    doors: Doors,
    attach: Attach,
    root: BlockKey,
    /// What is held in shared memory, over all links.
    estate: Arc<Estate>,
    state: watch::Sender<State>,
}

#[derive(Debug, Default)]
struct State {
    link: Option<Arc<Link>>,
    /// Attempts since the link was lost.
    failed_attempts: u32,
    /// Whether a task is at it.
    is_attaching: bool,
    /// Nobody wants a link any more.
    is_closed: bool,
}

impl Links {
    pub(super) fn new(door: Door, doors: Doors, link: Link, terms: &Terms, estate: Arc<Estate>) -> Arc<Self> {
        let state = State { link: Some(Arc::new(link)), ..State::default() };
        let (attach, state) = (terms.attach.clone(), watch::Sender::new(state));
        let links = Arc::new(Self { door, doors, attach, root: terms.root, estate, state });
        links.heed();
        links
    }

    /// Attaches anew as soon as the ring in use is over, also while nobody asks anything: what is held in shared memory is to be confirmed.
    /// For that, too, the door is tried again where there is no ring.
    fn heed(self: &Arc<Self>) {
        let Some(link) = self.state.borrow().link.clone() else { return };
        let Some(mut over) = link.local.as_ref().map(Local::over) else {
            if let (Doors::Ring, Some(socket)) = (self.doors, self.door.socket()) {
                tokio::spawn(knock(socket.to_owned(), Arc::downgrade(&link), Arc::downgrade(self)));
            }
            return;
        };
        let (link, links) = (Arc::downgrade(&link), Arc::downgrade(self));
        tokio::spawn(async move {
            // Its end without a word is an end as well.
            let _ = over.wait_for(|over| *over).await;
            if let (Some(link), Some(links)) = (link.upgrade(), links.upgrade()) {
                links.lose(&link);
            }
        });
    }

    /// The door in use, or the one wished for.
    pub(super) fn door(&self) -> Doors {
        match &self.state.borrow().link {
            Some(link) if link.local.is_none() => Doors::Grpc,
            Some(_) => Doors::Ring,
            None => self.doors,
        }
    }

    /// What is held in shared memory, over all links.
    pub(super) fn estate(&self) -> &Estate {
        &self.estate
    }

    /// Length of memory that may be brought now.
    pub(super) fn brought_bytes(&self) -> Option<u64> {
        let state = self.state.borrow();
        let local = state.link.as_ref().and_then(|link| link.local.as_ref())?;
        Some(local.brought_bytes()).filter(|bytes| *bytes > 0)
    }

    /// The link, at once; or the news that there is none.
    pub(super) fn current(self: &Arc<Self>) -> Result<Arc<Link>, Failure> {
        let link = self.state.borrow().link.clone();
        link.ok_or_else(|| {
            // Only if the task ended with the runtime that it ran on.
            self.attach_anew();
            Failure::Gone
        })
    }

    /// The link, or the one that the first attempt to attach anew brings.
    pub(super) async fn ready(self: &Arc<Self>) -> Result<Arc<Link>, Failure> {
        match self.current() {
            Ok(link) => Ok(link),
            Err(_) => self.settled().await,
        }
    }

    /// After a call over `dead` failed: another link, if one is to be had soon.
    pub(super) async fn another(self: &Arc<Self>, dead: &Arc<Link>) -> Result<Arc<Link>, Failure> {
        self.lose(dead);
        self.settled().await
    }

    /// What the first attempt to attach anew brought, if it ends soon.
    async fn settled(&self) -> Result<Arc<Link>, Failure> {
        let mut state = self.state.subscribe();
        let settled = state.wait_for(|state| state.link.is_some() || state.failed_attempts > 0);
        match timeout(deadline::RECONNECT_WAIT, settled).await {
            Ok(Ok(state)) => state.link.clone().ok_or(Failure::Gone),
            _ => Err(Failure::Gone),
        }
    }

    /// Takes a link that failed out of use.
    pub(super) fn lose(self: &Arc<Self>, dead: &Arc<Link>) {
        let lost = self.state.send_if_modified(|state| {
            let is_current = state.link.as_ref().is_some_and(|link| Arc::ptr_eq(link, dead));
            if is_current {
                state.link = None;
                state.failed_attempts = 0;
            }
            is_current
        });
        if lost {
            tracing::warn!(door = ?self.door, "lost the daemon; blocks are misses until it is back");
        }
        self.attach_anew();
    }

    fn is_in_use(&self, link: &Arc<Link>) -> bool {
        self.state.borrow().link.as_ref().is_some_and(|current| Arc::ptr_eq(current, link))
    }

    /// Puts a link in the place of another one, if that is in use; else it is given back. The daemon forgets the other's attachment when
    /// nobody has used it for a while: who asks over it now is not disturbed.
    fn change(self: &Arc<Self>, link: &Arc<Link>, better: Link) -> Option<Link> {
        let mut better = Some(better);
        self.state.send_if_modified(|state| {
            let is_current = state.link.as_ref().is_some_and(|current| Arc::ptr_eq(current, link));
            if is_current {
                state.link = better.take().map(Arc::new);
            }
            is_current
        });
        if better.is_none() {
            self.heed();
        }
        better
    }

    /// Puts a link in the place of the one that was lost; gives it back where nobody wants one any more.
    fn attached(self: &Arc<Self>, link: Link) -> Option<Link> {
        let mut link = Some(link);
        self.state.send_modify(|state| {
            state.is_attaching = false;
            if !state.is_closed {
                state.link = link.take().map(Arc::new);
            }
        });
        if link.is_none() {
            self.heed();
        }
        link
    }

    /// Starts the task that attaches, unless there is one or no need.
    fn attach_anew(self: &Arc<Self>) {
        let start = self.state.send_if_modified(|state| {
            let start = state.link.is_none() && !state.is_attaching && !state.is_closed;
            state.is_attaching |= start;
            start
        });
        if start {
            let task = Attaching { links: Arc::downgrade(self), is_over: false };
            tokio::spawn(task.run());
        }
    }

    async fn attempt(&self) -> Result<Link, NotAttached> {
        let root = Some(&self.root);
        let (link, terms) = Link::attach(&self.door, self.doors, &self.attach, root, &self.estate).await?;
        if terms.root != self.root {
            // Keys given out were derived from the old root: under the new one they would name nothing.
            tracing::error!("the daemon came back with another salt for this tenant; attach anew to use it");
            return Err(NotAttached::For(AttachError::RootsDiffer { ours: self.root, theirs: terms.root }));
        }
        Ok(link)
    }

    /// Leaves, and waits until the daemon has heard of it. What an attempt under way brings is left when it comes.
    pub(super) async fn close(&self) {
        if let Some(link) = self.state.send_replace(State { is_closed: true, ..State::default() }).link {
            leave(&link).await;
        }
    }
}

/// Tries the door again, for as long as a link without a ring is in use; over a new attachment, since each comes to the door once.
async fn knock(socket: PathBuf, link: Weak<Link>, links: Weak<Links>) {
    let mut pause = deadline::RECONNECT_PAUSE_MIN;
    loop {
        sleep(pause).await;
        pause = (2 * pause).min(deadline::RECONNECT_PAUSE_MAX);
        let is_there = Local::is_there(&socket).await;
        let (Some(link), Some(links)) = (link.upgrade(), links.upgrade()) else { return };
        if !links.is_in_use(&link) {
            return;
        }
        if !is_there {
            continue;
        }
        match links.attempt().await {
            Ok(better) if better.local.is_some() => {
                if let Some(unwanted) = links.change(&link, better) {
                    leave(&unwanted).await;
                }
                return;
            }
            Ok(no_better) => leave(&no_better).await,
            Err(error) => tracing::debug!("not attached for the local door: {}", error.into_error()),
        }
    }
}

/// Leaving is a courtesy: the daemon forgets an attachment by itself, later. While views are held they need the attachment, and the
/// last of them leaves; so the daemon is told to forget it only once the ring was left.
async fn leave(link: &Link) {
    if let Some(local) = &link.local
        && !local.leave().await
    {
        return;
    }
    let request = link.request(wire::DetachRequest { attachment: link.attachment });
    let _courtesy = timeout(deadline::GRACE, link.client().detach(request)).await;
}

impl Drop for Links {
    fn drop(&mut self) {
        let Some(link) = self.state.borrow().link.clone() else { return };
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn(async move { leave(&link).await });
        }
    }
}

/// Why an attempt to attach failed.
pub(super) enum NotAttached {
    /// Somebody listened, and then went away: another one may follow.
    WentAway(AttachError),
    /// Anything else.
    For(AttachError),
}

impl NotAttached {
    pub(super) fn into_error(self) -> AttachError {
        let (Self::WentAway(error) | Self::For(error)) = self;
        error
    }
}

/// Once connected.
impl From<AttachError> for NotAttached {
    fn from(error: AttachError) -> Self {
        match error {
            AttachError::Unavailable { .. } => Self::WentAway(error),
            error => Self::For(error),
        }
    }
}

/// The task that attaches; ends when it did, or when nobody holds the links any more.
struct Attaching {
    links: Weak<Links>,
    is_over: bool,
}

impl Attaching {
    async fn run(mut self) {
        let mut pause = deadline::RECONNECT_PAUSE_MIN;
        let since = Instant::now();
        while let Some(links) = self.links.upgrade() {
            match links.attempt().await {
                Ok(link) => {
                    tracing::info!(door = ?links.door, "attached to the daemon again");
                    self.is_over = true;
                    if let Some(unwanted) = links.attached(link) {
                        leave(&unwanted).await;
                    }
                    return;
                }
                Err(NotAttached::WentAway(error)) if since.elapsed() < deadline::RECONNECT_WAIT => {
                    tracing::debug!("not attached yet: {error}");
                    drop(links);
                    sleep(deadline::NEXT_WORKER_PAUSE).await;
                    continue;
                }
                Err(error) => {
                    tracing::debug!("not attached: {}", error.into_error());
                    links.state.send_modify(|state| state.failed_attempts = state.failed_attempts.saturating_add(1));
                }
            }
            drop(links);
            sleep(pause).await;
            pause = (2 * pause).min(deadline::RECONNECT_PAUSE_MAX);
        }
    }
}

impl Drop for Attaching {
    fn drop(&mut self) {
        // Dropped with its runtime: whoever calls next, on another one, starts it again.
        if let (false, Some(links)) = (self.is_over, self.links.upgrade()) {
            links.state.send_modify(|state| state.is_attaching = false);
        }
    }
}
