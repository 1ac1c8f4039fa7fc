//! What can be asked of the core, and what it answers. Both doors (gRPC now, the local ring later) speak these words.

use tender_proto::{BlockKey, BlockLayout, Namespace, Shard};

use crate::device::memory::Extent;
use crate::names::{AttachmentId, By, Door, GroupId, Hold, Place, RequestId, TenantId};

/// A request: who asks, by when, what.
#[derive(Clone, Debug)]
pub struct Request {
    /// Its name.
    pub id: RequestId,
    /// Who asks, by socket or token.
    pub tenant: TenantId,
    /// When waiting is over, in milliseconds of the core's clock.
    pub deadline_ms: u64,
    /// What.
    pub verb: Verb,
}

/// What may be asked. All but `Attach`, `Status` and the end of something begun need an attachment.
#[derive(Clone, Debug)]
pub enum Verb {
    /// Join a group under a namespace.
    Attach(Box<AttachVerb>),
    /// Leave.
    Detach(AttachmentId),
    /// The process of this attachment writes and reads in place from now on: what it does with it ends with [`Verb::Gone`]. Whose it
    /// is is the attachment's, not the asker's: it proves itself by knowing the number.
    Join {
        /// Under which.
        attachment: AttachmentId,
        /// The one that it had before the daemon was restarted, if it had one: it takes its place. The last one whose `Join` was answered.
        former: Option<AttachmentId>,
    },
    /// The process of this attachment still holds these, from before the daemon was restarted. An empty list ends what may come in
    /// several: what it did not name is released.
    Confirm(AttachmentId, Vec<Held>),
    /// The process of this attachment is dead, for certain.
    Gone(AttachmentId),
    /// It has left the local door, and says that it holds nothing.
    Left(AttachmentId),
    /// Where are these?
    Lookup(AttachmentId, Vec<BlockKey>),
    /// Slots for a run of blocks.
    Reserve {
        /// Under which.
        attachment: AttachmentId,
        /// Key before the first.
        parent: BlockKey,
        /// The run.
        keys: Vec<BlockKey>,
        /// Which part of each.
        shard: Shard,
        /// Most bytes of slots to take.
        bytes_max: u64,
        /// Who writes to them.
        door: Door,
    },
    /// Reserved slots are filled.
    Commit {
        /// Under which.
        attachment: AttachmentId,
        /// Which, and their sums.
        filled: Vec<Filled>,
        /// Who has written to them.
        door: Door,
    },
    /// Reserved slots will not be filled.
    Abort(By, Vec<Hold>),
    /// Leases on the longest run of blocks.
    Acquire {
        /// Under which.
        attachment: AttachmentId,
        /// The run.
        keys: Vec<BlockKey>,
        /// Most bytes to lease.
        bytes_max: u64,
        /// Who reads them.
        door: Door,
    },
    /// Leases are given back.
    Release(By, Vec<Hold>),
    /// Bring these up to host memory.
    Prefetch(AttachmentId, Vec<BlockKey>),
    /// Make these survive a power cut.
    Durable(AttachmentId, Vec<BlockKey>),
    /// Forget these.
    Purge(AttachmentId, PurgeWhat),
    /// Residency after that number.
    Events {
        /// Under which.
        attachment: AttachmentId,
        /// Number of the last event seen.
        after: u64,
    },
    /// What is present, from that place on.
    Snapshot {
        /// Under which.
        attachment: AttachmentId,
        /// Where to go on.
        from: u32,
    },
    /// How the store is.
    Status,
    /// Write back and flush all that can be, for a daemon that is about to stop: it takes nothing new from now on.
    Drain,
    /// Write back and flush what there is now, for a worker that the next one follows: it serves on meanwhile.
    WriteBack,
}

/// What a process says it holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Held {
    /// The hold.
    pub hold: Hold,
    /// In which segment.
    pub segment: u32,
    /// At which byte of it.
    pub offset: u32,
    /// To fill it, or else to read it.
    pub is_reservation: bool,
}

/// What to forget.
#[derive(Clone, Debug)]
pub enum PurgeWhat {
    /// These.
    Keys(Vec<BlockKey>),
    /// All under the namespace.
    Namespace,
}

/// The fields of an attach.
#[derive(Clone, Debug)]
pub struct AttachVerb {
    /// The name that the attachment will have.
    pub attachment: AttachmentId,
    /// Name of the group.
    pub group: String,
    /// Name of the process in it.
    pub member: String,
    /// The namespace.
    pub namespace: Namespace,
    /// The bytes of its blocks.
    pub layout: BlockLayout,
    /// The root that the client derives, if it does.
    pub expected_root: Option<BlockKey>,
}

/// A reserved slot that was filled.
#[derive(Clone, Debug)]
pub struct Filled {
    /// Which.
    pub hold: Hold,
    /// Sums of its fragments.
    pub sums: Vec<u64>,
}

/// What the core answers.
#[derive(Clone, Debug)]
pub enum Reply {
    /// To `Attach`.
    Attached(Box<Attached>),
    /// To `Join`.
    Joined {
        /// Whose process it is.
        tenant: TenantId,
        /// To which group what it holds belongs.
        group: GroupId,
    },
    /// To `Lookup`.
    Lookup(LookupReply),
    /// To `Reserve`: one per key.
    Reserved(Vec<ReserveOutcome>),
    /// To `Commit`: one per slot.
    Committed(Vec<CommitOutcome>),
    /// To `Acquire`.
    Acquired(Acquired),
    /// To `Prefetch`; repeated until `done`.
    Prefetch(PrefetchReply),
    /// To `Durable`: one per key.
    Durable(Vec<bool>),
    /// To `Purge`.
    Purged {
        /// Forgotten.
        purged_blocks: u64,
        /// Of these, in use.
        busy_blocks: u64,
    },
    /// To `Events`: `None` when the daemon does not remember that far.
    Events(Option<Vec<Residency>>),
    /// To `Snapshot`.
    Snapshot {
        /// Events after this number may not be in it.
        sequence: u64,
        /// What is present.
        present: Vec<Residency>,
        /// Where to go on.
        next: Option<u32>,
    },
    /// To `Status`.
    Status(Box<crate::status::CoreStatus>),
    /// To `Confirm`: one per hold, whether it still stands.
    Confirmed(Vec<bool>),
    /// To `Detach`, `Join`, `Gone`, `Abort`, `Release`, `Drain`, `WriteBack`.
    Done,
    /// The question cannot be answered.
    Refused(Refusal),
}

/// A block came to a tier or left it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Residency {
    /// The block.
    pub key: BlockKey,
    /// The block before it, or the root; zeros when not known.
    pub parent: BlockKey,
    /// The tier.
    pub place: Place,
    /// Came or left.
    pub present: bool,
    /// First half of the namespace's root.
    pub namespace: [u8; 16],
    /// All shards together.
    pub block_bytes: u32,
}

/// Why a question cannot be answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// Of which kind.
    pub kind: RefusalKind,
    /// What, why, and the cure.
    pub message: String,
}

impl Refusal {
    /// To a request whose attachment is not there.
    pub fn unattached(attachment: AttachmentId) -> Self {
        let message =
            format!("attachment {:#x} is not known (expired, or the daemon was restarted); attach again", attachment.0);
        Self { kind: RefusalKind::Unattached, message }
    }
}

/// Kinds of refusals; `request/server.rs` gives each its gRPC status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RefusalKind {
    /// The question is wrong.
    Invalid,
    /// It contradicts what others agreed on.
    Contradiction,
    /// Not allowed.
    Forbidden,
    /// The attachment is gone; attach again.
    Unattached,
    /// Too much to do; later.
    Busy,
    /// The daemon is stopping.
    Stopping,
}

/// To `Attach`.
#[derive(Clone, Debug)]
pub struct Attached {
    /// Name for later requests.
    pub attachment: AttachmentId,
    /// Parent of every first block.
    pub root: BlockKey,
    /// The tenant's salt.
    pub salt: [u8; 32],
    /// The tenant's name.
    pub tenant: String,
    /// Bytes of a whole block.
    pub block_bytes: u64,
    /// Most bytes of host memory that the tenant may have, if that is bounded.
    pub host_quota_bytes: Option<u64>,
}

/// To `Lookup`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LookupReply {
    /// Usable from the first on.
    pub prefix_blocks: u32,
    /// Bit i: key i is in host memory.
    pub host: Vec<u8>,
    /// Bit i: key i is on disk.
    pub disk: Vec<u8>,
}

/// What became of a block in a reservation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReserveOutcome {
    /// Fill this slot.
    Granted {
        /// The reservation.
        hold: Hold,
        /// Its bytes.
        extent: Extent,
    },
    /// Was there before.
    AlreadyPresent,
    /// Somebody else is at it.
    BeingWritten,
    /// No slot could be freed.
    NoRoom,
    /// The tenant's quota is too small.
    OverQuota,
}

/// What became of a filled slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CommitOutcome {
    /// The block is there.
    Stored,
    /// The shard is; others are missing.
    ShardStored,
    /// The reservation did not stand any more (purged meanwhile).
    Gone,
}

/// To `Acquire`.
#[derive(Clone, Debug, Default)]
pub struct Acquired {
    /// Leases, in order, from the first key on.
    pub blocks: Vec<Leased>,
    /// Why there are no more; `None` when all keys were leased, or the bytes were used up.
    pub end: Option<AcquireEnd>,
}

/// A leased block.
#[derive(Clone, Debug)]
pub struct Leased {
    /// Where it was found.
    pub place: Place,
    /// Its shards, in order.
    pub parts: Vec<LeasedPart>,
}

/// A leased shard of a block.
#[derive(Clone, Debug)]
pub struct LeasedPart {
    /// The lease.
    pub hold: Hold,
    /// Its bytes.
    pub extent: Extent,
    /// Bytes that count.
    pub payload_bytes: u32,
    /// Which shard.
    pub shard: Shard,
    /// Its sum.
    pub root: u64,
    /// Somebody else may write there: what was read is to be checked against the sum.
    pub verify: bool,
}

/// Why a run of leases ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AcquireEnd {
    /// The next block is not there.
    Miss,
    /// It was not there in time.
    Deadline,
    /// No memory or no turn for it.
    Shed,
}

/// To `Prefetch`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PrefetchReply {
    /// In host memory now.
    pub resident: u32,
    /// Of these, brought up by this request.
    pub loaded: u32,
    /// In no tier, or lost on the way.
    pub missing: u32,
    /// Given up.
    pub shed: u32,
    /// The last word.
    pub done: bool,
}

impl Reply {
    /// A refusal.
    pub fn refused(kind: RefusalKind, message: impl Into<String>) -> Self {
        Self::Refused(Refusal { kind, message: message.into() })
    }
}
