//! The core: one state machine that owns the truth. `step(event, now, &mut actions)` takes one event to its end; it does no I/O, reads
//! no clock, takes no lock. This folder is the only place that sees all six stages:
//!
//! ```text
//! mod.rs      what comes in, what goes out, and which file deals with it      attach.rs   who may ask
//! put.rs      reserve, commit, abort                                          get.rs      lookup, acquire, release, prefetch
//! ingest.rs   what clients write in place, and the way from there to shared memory
//! room.rs     slots: quota, victims, segments that change owner               load.rs     disk to host
//! prepare.rs  segments of host memory: for whom each is prepared
//! write.rs    host to disk: write-back, directory, durability                 purge.rs    forgetting
//! recover.rs  what a directory said at start                                  report.rs   status, residency, invariants
//! warm.rs     what the records of host memory said at start, and who still holds what from then
//! record.rs   keeping those records
//! ```
//! Long work (draining a segment, purging a namespace, a drain before the end) is done a thousand blocks at a time: the core asks for
//! [`Event::Continue`] until it is through, and takes other events in between.

mod attach;
mod get;
mod ingest;
mod load;
mod prepare;
mod purge;
mod put;
mod record;
mod recover;
mod report;
mod room;
mod warm;
mod write;

use std::collections::{BTreeMap, HashMap};

use tender_proto::TenantSalt;

use self::ingest::Ingest;
use self::prepare::Preparation;
use self::put::Partials;
use self::warm::Limbo;
use crate::admission::attachments::Attachments;
use crate::admission::grants::Grants;
use crate::admission::worth::Worth;
use crate::completion::{Load, Pending, WriteBack};
use crate::device::memory::Extent;
use crate::index::Index;
use crate::names::{AttachmentId, GroupId, NodeId, PageName, RequestId, SlotId, TenantId};
use crate::status::Counters;
use crate::tier::disk::DiskTier;
use crate::tier::host::HostTier;
use crate::transfer::lanes::{Lane, Lanes};
use crate::transfer::{Expected, Outcome, Transfer, TransferId};
use crate::verb::{Refusal, RefusalKind, Reply, Request, Verb};

pub use self::recover::RecoveredFile;

/// What comes in.
#[derive(Debug)]
pub enum Event {
    /// A question.
    Request(Request),
    /// A transfer has ended.
    TransferDone(TransferId, Outcome),
    /// A segment of the arena is prepared (or zeroed) and may be used.
    SegmentReady(u32),
    /// An ingest segment is there, mapped by its client and by the daemon, and closed for other writers; or the client could not.
    IngestMade {
        /// Which.
        segment: u32,
        /// Whether it is there.
        made: bool,
    },
    /// The lock of the tier files is had: no request of a former worker is on its way any more.
    DiskLocked,
    /// The same, and the disk that the core waits for ([`Core::await_disk`]) is there, with what its files held.
    DiskJoined(Vec<RecoveredFile>),
    /// The core asked to go on.
    Continue,
    /// Time has passed: deadlines, the directory, attachments.
    Tick,
}

/// What goes out, to be done in this order.
#[derive(Debug)]
pub enum Action {
    /// Answer a question.
    Reply(RequestId, Reply),
    /// Do this on the thread of that file; `TransferDone` follows.
    Start(u32, TransferId, Transfer),
    /// Prepare a segment of the arena for a tenant: take it out of another's file if it lies there, touch it, or overwrite what it held.
    /// `SegmentReady` follows.
    PrepareSegment {
        /// Which.
        segment: u32,
        /// Whose it will be.
        tenant: TenantId,
        /// It was used before.
        used: bool,
    },
    /// Make memory that this client writes to. `IngestMade` follows, also when the client does not answer.
    MakeIngest {
        /// Its place in the arena.
        segment: u32,
        /// The client.
        writer: AttachmentId,
    },
    /// An ingest segment is not needed any more: its memory goes.
    DropSegment(u32),
    /// Copy from ingest to shared memory, and check what was copied. `TransferDone` follows.
    Promote {
        /// Its name.
        id: TransferId,
        /// Where a client may be writing.
        from: Extent,
        /// Where only the daemon writes.
        to: Extent,
        /// What it must be.
        expected: Expected,
    },
    /// The tenant has events up to this number.
    Residency(TenantId, u64),
    /// More of the same work is to be done: `Continue` follows.
    Again,
    /// Something a person should know.
    Warn(String),
}

/// What a core is made with.
#[derive(Clone, Debug)]
pub struct CoreConfig {
    /// Names, salts and quotas of the tenants.
    pub tenants: Vec<TenantConfig>,
    /// Segments of the arena.
    pub host_segment_bytes: u64,
    /// How many.
    pub host_segment_count: u32,
    /// Segments of the same size that clients may write to.
    pub ingest_segment_count: u32,
    /// Disk, if there is one.
    pub disk: Option<DiskConfig>,
    /// Bytes that may be written to disk in a day.
    pub write_bytes_per_day: Option<u64>,
    /// Whether public namespaces may be attached to.
    pub allow_public: bool,
    /// Makes the index's hash unknown to clients.
    pub seed: u64,
}

/// A tenant.
#[derive(Clone, Debug)]
pub struct TenantConfig {
    /// Its name.
    pub name: String,
    /// Its salt.
    pub salt: TenantSalt,
    /// Most bytes of host memory.
    pub host_quota_bytes: Option<u64>,
    /// Most bytes of disk.
    pub disk_quota_bytes: Option<u64>,
}

/// The disk tier.
#[derive(Clone, Debug)]
pub struct DiskConfig {
    /// Bytes of a segment.
    pub segment_bytes: u64,
    /// Segments of all files together.
    pub segment_count: u32,
    /// Files; the segments are dealt out to them in turn.
    pub file_count: u32,
    /// Requests that a file takes at once.
    pub depth: usize,
    /// Key of the directory pages.
    pub page_key: [u8; 32],
}

/// What a transfer is for.
#[derive(Clone, Copy, Debug)]
enum Job {
    Load { node: NodeId, host: SlotId, disk: SlotId },
    WriteBack { write_back: u64, host: SlotId, disk: SlotId },
    Page(PageName),
    Flush,
    Promote { node: NodeId, from: SlotId, to: SlotId },
}

/// A segment that is to change owner.
#[derive(Clone, Copy, Debug)]
struct Draining {
    segment: u32,
    /// Whose it will be.
    tenant: TenantId,
    next_place: u32,
    /// Used slots, and since when it was so many.
    used: u64,
    since_ms: u64,
    /// The pass over its slots is not at its end; afterwards a tick begins the next one.
    more: bool,
}

/// The core.
pub struct Core {
    config: CoreConfig,
    now_ms: u64,
    attachments: Attachments,
    grants: Grants,
    /// How many of them are of slots of each tenant.
    held: Vec<usize>,
    worth: Worth,
    index: Index,
    host: HostTier,
    disk: Option<DiskTier>,
    lanes: Vec<Lanes>,
    jobs: HashMap<TransferId, (u32, Lane, Job)>,
    queued: HashMap<TransferId, Transfer>,
    last_transfer: u64,
    loads: HashMap<NodeId, Load>,
    write_backs: HashMap<u64, WriteBack>,
    writing: BTreeMap<NodeId, u64>,
    last_write_back: u64,
    /// Bytes of write-backs queued or under way.
    writing_bytes: u64,
    ingest: Ingest,
    /// Bytes that groups lease in place.
    leased_bytes: HashMap<GroupId, u64>,
    pending: Pending,
    /// Incomplete blocks.
    partials: Partials,
    /// What is held from before a restart.
    limbo: Limbo,
    /// Segments of the arena that are to be prepared.
    preparation: Preparation,
    draining: [Option<Draining>; 2],
    /// Segments that could not be drained, by tier and number: left alone until then.
    stuck: [BTreeMap<u32, u64>; 2],
    directory_ms: u64,
    /// Room was made since requests that wait for it were last tried.
    room_made: bool,
    stopping: bool,
    leased_slots: u64,
    reserved_slots: u64,
    counters: Counters,
}

type Actions = Vec<Action>;

impl Core {
    /// A core with empty tiers. Its first step should be given `Event::Tick`: it asks for segments to be prepared.
    pub fn new(config: CoreConfig) -> Self {
        let quotas = |quota: fn(&TenantConfig) -> Option<u64>| config.tenants.iter().map(quota).collect::<Vec<_>>();
        let host = HostTier::new(
            config.host_segment_bytes,
            config.host_segment_count,
            config.ingest_segment_count,
            quotas(|tenant| tenant.host_quota_bytes),
        );
        let disk = config.disk.as_ref().map(|disk| {
            let quotas = quotas(|tenant| tenant.disk_quota_bytes);
            let DiskConfig { segment_bytes, segment_count, file_count, page_key, .. } = *disk;
            DiskTier::new(segment_bytes, segment_count, file_count, page_key, 0, quotas)
        });
        let lanes = config.disk.iter().flat_map(|disk| (0..disk.file_count).map(|_| Lanes::new(disk.depth))).collect();
        Self {
            now_ms: 0,
            attachments: Attachments::new(config.tenants.len()),
            grants: Grants::default(),
            held: vec![0; config.tenants.len()],
            worth: Worth::new(config.write_bytes_per_day),
            index: Index::new(config.tenants.len(), config.seed),
            host,
            disk,
            lanes,
            jobs: HashMap::new(),
            queued: HashMap::new(),
            last_transfer: 0,
            loads: HashMap::new(),
            write_backs: HashMap::new(),
            writing: BTreeMap::new(),
            last_write_back: 0,
            writing_bytes: 0,
            ingest: Ingest::default(),
            leased_bytes: HashMap::new(),
            pending: Pending::default(),
            partials: Partials::default(),
            limbo: Limbo::default(),
            preparation: Preparation::new(config.host_segment_count, config.tenants.len()),
            draining: [None; 2],
            stuck: Default::default(),
            directory_ms: 0,
            room_made: false,
            stopping: false,
            leased_slots: 0,
            reserved_slots: 0,
            counters: Counters::default(),
            config,
        }
    }

    /// Takes one event to its end. `now_ms` never goes back.
    pub fn step(&mut self, event: Event, now_ms: u64, actions: &mut Actions) {
        self.now_ms = self.now_ms.max(now_ms);
        match event {
            Event::Request(request) => self.request(request, actions),
            Event::TransferDone(transfer, outcome) => self.transfer_done(transfer, outcome, actions),
            Event::SegmentReady(segment) => {
                self.segment_ready(segment);
                self.record_ready(segment);
                self.room_made = true;
            }
            Event::IngestMade { segment, made } => self.ingest_made(segment, made),
            Event::DiskLocked => self.disk_locked(),
            Event::DiskJoined(files) => {
                self.disk_locked();
                actions.extend(self.recover(files).into_iter().map(Action::Warn));
            }
            Event::Continue => self.go_on(actions),
            Event::Tick => self.tick(actions),
        }
        self.settle(actions);
    }

    fn request(&mut self, request: Request, actions: &mut Actions) {
        let Request { id, tenant, deadline_ms, verb } = request;
        if self.stopping && matches!(verb, Verb::Attach(_) | Verb::Reserve { .. } | Verb::Prefetch(..)) {
            let reply = Reply::refused(RefusalKind::Stopping, "the daemon is stopping; try again when it is back");
            return actions.push(Action::Reply(id, reply));
        }
        let reply = match verb {
            Verb::Attach(attach) => Some(self.attach(tenant, *attach, actions)),
            Verb::Detach(attachment) => {
                if self.attachments.get(attachment, tenant, self.now_ms).is_some() {
                    self.member_gone(attachment, false);
                    self.attachments.leave(attachment, tenant);
                }
                Some(Reply::Done)
            }
            Verb::Join { attachment, former } => Some(self.join(attachment, former)),
            Verb::Confirm(attachment, held) => Some(self.confirm(tenant, attachment, &held)),
            Verb::Gone(attachment) => {
                self.member_gone(attachment, true);
                Some(Reply::Done)
            }
            Verb::Left(attachment) => {
                self.member_gone(attachment, false);
                Some(Reply::Done)
            }
            Verb::Lookup(attachment, keys) => Some(self.lookup(tenant, attachment, &keys)),
            Verb::Reserve { .. } => self.reserve(Request { id, tenant, deadline_ms, verb }, None),
            Verb::Commit { attachment, filled, door } => Some(self.commit(tenant, attachment, &filled, door)),
            Verb::Abort(by, holds) => {
                self.abort(by, &holds);
                Some(Reply::Done)
            }
            Verb::Acquire { .. } => self.acquire(Request { id, tenant, deadline_ms, verb }, None),
            Verb::Release(by, holds) => {
                self.release(by, &holds);
                Some(Reply::Done)
            }
            Verb::Prefetch(attachment, keys) => self.prefetch(id, tenant, deadline_ms, attachment, keys, actions),
            Verb::Durable(attachment, keys) => self.durable(id, tenant, deadline_ms, attachment, keys),
            Verb::Purge(attachment, what) => self.purge(id, tenant, deadline_ms, attachment, what),
            Verb::Events { attachment, after } => Some(self.events(tenant, attachment, after)),
            Verb::Snapshot { attachment, from } => Some(self.snapshot(tenant, attachment, from)),
            Verb::Status => Some(Reply::Status(Box::new(self.status()))),
            Verb::Drain => {
                self.stopping = true;
                self.drain(id, deadline_ms)
            }
            Verb::WriteBack => self.drain(id, deadline_ms),
        };
        if let Some(reply) = reply {
            actions.push(Action::Reply(id, reply));
        }
    }

    /// Where a request ends whose attachment is not there.
    fn unattached(attachment: AttachmentId) -> Reply {
        Reply::Refused(Refusal::unattached(attachment))
    }

    fn busy(&mut self) -> Reply {
        self.counters.shed += 1;
        Reply::refused(RefusalKind::Busy, "too many requests are waiting; try again later")
    }

    fn tick(&mut self, actions: &mut Actions) {
        while let Some((request, waiting)) = self.pending.take_overdue(self.now_ms) {
            self.counters.deadlines_missed += 1;
            self.overdue(request, waiting, actions);
        }
        self.give_up_partial();
        self.attachments.expire(self.now_ms);
        self.tell_prefetches(actions);
        self.retry_promotions();
        self.give_up_stuck_ingest_drain();
        self.go_on(actions);
    }

    /// Goes on with long work.
    fn go_on(&mut self, actions: &mut Actions) {
        self.go_on_draining();
        self.go_on_purging(actions);
        self.go_on_stopping();
    }

    /// What every event may have made possible.
    fn settle(&mut self, actions: &mut Actions) {
        self.pump_ingest(actions);
        // Who asks for what is there comes before what is new.
        self.retry_for_room(actions);
        self.pump_promotions(actions);
        self.pump_directory(actions);
        self.pump_lanes(actions);
        self.pump_preparation(actions);
        for tenant in self.index.events.take_changed() {
            actions.push(Action::Residency(tenant, self.index.events.sequence(tenant)));
        }
        if self.has_more_work() {
            actions.push(Action::Again);
        }
    }
}
