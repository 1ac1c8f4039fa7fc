//! The local door: what is said through the ring, request by request and reply by reply. The same verbs as over gRPC.
//!
//! ```text
//! Numbers are little-endian, fields follow each other without gaps, nothing follows the last one.
//! list of x    u32 count, then so many x
//! key          32 bytes
//! keys         list of key                                           0 to 960
//! shard        u16 index, u16 count                                  count 1 to 64, index below it
//! hold         u64                                                   one reservation or lease
//! extent       u32 segment, u64 offset_bytes in it, u32 bytes
//! bitmap       bit i is bit i % 8 of byte i / 8; as many bytes as its bits need, those left over 0
//! text         UTF-8 to the end, at most 1024 bytes
//!
//! verb          request                                              reply, status 1 (Done)
//!  1 Reserve    key parent, shard, u64 bytes_max, keys               list of {u8 outcome; after 1 Granted: hold, extent}
//!  2 Commit     list of {hold, list of u64 fragment sum}             list of u8 outcome
//!  3 Abort      list of hold                                         nothing
//!  4 Acquire    u64 bytes_max, keys                                  u8 end, list of leased block
//!  5 Release    list of hold                                         nothing
//!  6 Lookup     keys                                                 u32 keys, u32 prefix_blocks, bitmap host, bitmap disk
//!  7 Prefetch   keys                                                 u32 resident, u32 loaded, u32 missing, u32 shed
//!  8 Durable    keys                                                 u32 keys, bitmap
//!  9 Purge      u8 what: 0 and keys, or 1 for the whole namespace    u64 purged_blocks, u64 busy_blocks
//! 10 Confirm    list of {hold, u32 segment, u64 offset_bytes,        u32 entries, bitmap
//!                        u8 kind}
//! leased block  u8 tier (its number in kvstore.proto), u8 flags (bit 0: verify), u16 parts (1 to 64), then each:
//!               hold, u32 segment, u32 payload_bytes, u64 offset_bytes, shard, u64 root        36 bytes
//! outcome       of Reserve: 1 Granted, 2 AlreadyPresent, 3 BeingWritten, 4 NoRoom, 5 OverQuota
//!               of Commit:  1 Stored, 2 ShardStored, 3 Gone
//! end           1 Complete, 2 Miss, 3 Deadline, 4 Shed, 5 Budget
//! kind          of Confirm: 1 Lease, 2 Reservation; of Refused: 1 Invalid, 2 Contradiction, 3 Forbidden
//!
//! status        reply
//!  1 Done       as above
//!  2 Refused    u16 kind, text
//!  3 Unattached, 4 Busy, 5 Stopping                                  nothing
//!  6 Malformed  text
//! ```
//! Lists have the same length and order as what was asked, but for leased blocks, which are the first so many. Every request and
//! reply within these limits fits into a frame; only of leased blocks with many shards the last ones may not, and stay out.
//!
//! Decoding checks every number against its limits before it makes room for it, and names the field that is wrong. What
//! decodes encodes to the same bytes. Whether an attachment, hold or segment exists is for whoever is asked to say.

use std::borrow::Cow;

use crate::convert::FieldError;
use crate::key::{BlockKey, KEY_BYTES};
use crate::layout::{BLOCK_BYTES_MAX, SHARDS_MAX, Shard};
use crate::ring::{FRAME_BYTES, STATUS_MALFORMED};
use crate::sum::FRAGMENT_BYTES;
use crate::wire::Tier;

/// Keys of one request: 30 KiB of them, and 960 replies of 40 bytes each (a leased block of one part) are 37.5 KiB.
pub const KEYS_PER_ENTRY_MAX: usize = 960;

/// Holds of one abort or release: 64,000 bytes.
pub const HOLDS_PER_ENTRY_MAX: usize = 8_000;

/// Reservations of one commit, even of one fragment each: 60,000 bytes.
pub const COMMITS_PER_ENTRY_MAX: usize = 3_000;

/// Entries of one confirm: 63,000 bytes.
pub const CONFIRMS_PER_ENTRY_MAX: usize = 3_000;

/// Fragments of one shard of the largest block: 8 KiB of sums.
pub const SUMS_MAX: usize = BLOCK_BYTES_MAX as usize / FRAGMENT_BYTES;

/// Bytes of a refusal's text; what is longer is cut.
pub const MESSAGE_BYTES_MAX: usize = 1_024;

const COUNT_BYTES: usize = 4;
const HOLD_BYTES: usize = 8;
const SUM_BYTES: usize = 8;
const GRANT_BYTES: usize = 1 + HOLD_BYTES + 16;
const CONFIRM_BYTES: usize = HOLD_BYTES + 4 + 8 + 1;
const PART_BYTES: usize = 36;
const BLOCK_HEAD_BYTES: usize = 4;
const FLAG_VERIFY: u8 = 1;

const _: () = {
    assert!(KEY_BYTES + 12 + COUNT_BYTES + KEYS_PER_ENTRY_MAX * KEY_BYTES <= FRAME_BYTES, "a reserve request fits");
    assert!(COUNT_BYTES + KEYS_PER_ENTRY_MAX * GRANT_BYTES <= FRAME_BYTES, "a reserve reply fits");
    assert!(
        1 + COUNT_BYTES + KEYS_PER_ENTRY_MAX * (BLOCK_HEAD_BYTES + PART_BYTES) <= FRAME_BYTES,
        "unsharded leases fit"
    );
    assert!(COUNT_BYTES + HOLDS_PER_ENTRY_MAX * HOLD_BYTES <= FRAME_BYTES, "holds fit");
    assert!(COUNT_BYTES + COMMITS_PER_ENTRY_MAX * (HOLD_BYTES + COUNT_BYTES + SUM_BYTES) <= FRAME_BYTES, "commits fit");
    assert!(COUNT_BYTES + CONFIRMS_PER_ENTRY_MAX * CONFIRM_BYTES <= FRAME_BYTES, "confirms fit");
};

/// Defines an enumeration that travels as a number.
macro_rules! numbered {
    ($(#[$about:meta])* $name:ident: $number:ty, $field:literal { $($(#[$doc:meta])* $variant:ident = $value:expr,)+ }) => {
        $(#[$about])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[repr($number)]
        pub enum $name { $($(#[$doc])* $variant = $value,)+ }

        impl $name {
            /// Its number on the wire.
            pub const fn number(self) -> $number {
                self as $number
            }
        }

        impl TryFrom<$number> for $name {
            type Error = FieldError;

            fn try_from(number: $number) -> Result<Self, FieldError> {
                match number {
                    $(number if number == Self::$variant.number() => Ok(Self::$variant),)+
                    _ => Err(FieldError::Unknown { field: $field, value: number.into() }),
                }
            }
        }
    };
}

numbered! {
    /// What may be asked. 0 is none, so that an empty entry asks nothing.
    Verb: u16, "verb" {
        /// Slots for a run of blocks.
        Reserve = 1,
        /// Reserved slots are filled.
        Commit = 2,
        /// Reserved slots will not be filled.
        Abort = 3,
        /// Leases on the longest run of blocks.
        Acquire = 4,
        /// Leases are given back.
        Release = 5,
        /// Where blocks are.
        Lookup = 6,
        /// Bring blocks up to host memory.
        Prefetch = 7,
        /// Answer when blocks would survive a power cut.
        Durable = 8,
        /// Forget blocks.
        Purge = 9,
        /// After a restart of the daemon: these are held.
        Confirm = 10,
    }
}

numbered! {
    /// How a request ended. 0 is none, so that an empty entry answers nothing.
    Status: u16, "status" {
        /// Answered; the reply is the verb's.
        Done = 1,
        /// The question cannot be answered; the reply says why.
        Refused = 2,
        /// The attachment is gone: attach again.
        Unattached = 3,
        /// Too much to do: later.
        Busy = 4,
        /// The daemon is stopping.
        Stopping = 5,
        /// The request breaks a rule of this module or of the ring; the reply says which.
        Malformed = STATUS_MALFORMED,
    }
}

numbered! {
    /// Kinds of refusals that are not a status of their own.
    RefusalKind: u16, "kind" {
        /// The question is wrong.
        Invalid = 1,
        /// It contradicts what others agreed on.
        Contradiction = 2,
        /// Not allowed.
        Forbidden = 3,
    }
}

numbered! {
    /// What became of a filled slot.
    CommitOutcome: u8, "outcome" {
        /// The block is there.
        Stored = 1,
        /// The shard is; others are missing.
        ShardStored = 2,
        /// The reservation did not stand any more.
        Gone = 3,
    }
}

numbered! {
    /// Why a run of leases ends.
    AcquireEnd: u8, "end" {
        /// All keys are leased.
        Complete = 1,
        /// The next block is not there.
        Miss = 2,
        /// It was not there in time.
        Deadline = 3,
        /// No memory or no turn for it.
        Shed = 4,
        /// `bytes_max` or the frame is used up: ask again from the next key on.
        Budget = 5,
    }
}

numbered! {
    /// What a hold is.
    HoldKind: u8, "kind" {
        /// The right to read.
        Lease = 1,
        /// The right to fill.
        Reservation = 2,
    }
}

/// Names ONE reservation or lease, so that nothing can be given back twice: a place in the daemon's table of holds, and which holder of
/// that place is meant. To a client it is opaque.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HoldId(pub u64);

/// A piece of one segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Extent {
    /// Which segment.
    pub segment: u32,
    /// Bytes from its start.
    pub offset_bytes: u64,
    /// Length.
    pub bytes: u32,
}

/// A request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Request<'a> {
    /// Slots for a run of one chain.
    Reserve {
        /// Key before the first, or the root.
        parent: BlockKey,
        /// Which part of each block will be filled in.
        shard: Shard,
        /// Most bytes of slots to take.
        bytes_max: u64,
        /// The run, at most `KEYS_PER_ENTRY_MAX`.
        keys: Cow<'a, [BlockKey]>,
    },
    /// Reserved slots are filled; see [`commits_that_fit`].
    Commit(Cow<'a, [Filled]>),
    /// Reserved slots will not be filled; at most `HOLDS_PER_ENTRY_MAX`.
    Abort(Cow<'a, [HoldId]>),
    /// Leases on the longest run of a chain from the first key on.
    Acquire {
        /// Most bytes to lease.
        bytes_max: u64,
        /// The run, at most `KEYS_PER_ENTRY_MAX`.
        keys: Cow<'a, [BlockKey]>,
    },
    /// Leases are given back; at most `HOLDS_PER_ENTRY_MAX`.
    Release(Cow<'a, [HoldId]>),
    /// Where a chain is; at most `KEYS_PER_ENTRY_MAX`.
    Lookup(Cow<'a, [BlockKey]>),
    /// Bring these up to host memory; at most `KEYS_PER_ENTRY_MAX`.
    Prefetch(Cow<'a, [BlockKey]>),
    /// Make these survive a power cut; at most `KEYS_PER_ENTRY_MAX`.
    Durable(Cow<'a, [BlockKey]>),
    /// Forget these; at most `KEYS_PER_ENTRY_MAX`.
    Purge(Cow<'a, [BlockKey]>),
    /// Forget all under the attachment's namespace.
    PurgeNamespace,
    /// These were held before the daemon restarted; at most `CONFIRMS_PER_ENTRY_MAX`.
    Confirm(Cow<'a, [Held]>),
}

/// A reserved slot that was filled.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Filled {
    /// Its reservation.
    pub hold: HoldId,
    /// Sums of its fragments, 1 to `SUMS_MAX`.
    pub sums: Vec<u64>,
}

/// What a client says it holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Held {
    /// The hold.
    pub hold: HoldId,
    /// In which segment.
    pub segment: u32,
    /// At which byte of it.
    pub offset_bytes: u64,
    /// To read or to fill.
    pub kind: HoldKind,
}

/// What a reply must fit: kept by whoever asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Asked {
    /// The verb.
    pub verb: Verb,
    /// Number of keys, holds or entries.
    pub items: usize,
}

/// The answer to a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reply {
    /// To `Reserve`: one per key.
    Reserved(Vec<ReserveOutcome>),
    /// To `Commit`: one per hold.
    Committed(Vec<CommitOutcome>),
    /// To `Abort` and `Release`.
    Done,
    /// To `Acquire`.
    Acquired(Acquired),
    /// To `Lookup`.
    Lookup(Residency),
    /// To `Prefetch`.
    Prefetched(Prefetched),
    /// To `Durable`: bit i, key i is.
    Durable(Bitmap),
    /// To `Purge` and `PurgeNamespace`.
    Purged {
        /// Forgotten.
        purged_blocks: u64,
        /// Of these, in use: gone for lookups, freed when the last user is done.
        busy_blocks: u64,
    },
    /// To `Confirm`: bit i, entry i is still held.
    Confirmed(Bitmap),
    /// The question cannot be answered.
    Refused {
        /// Of which kind.
        kind: RefusalKind,
        /// What, why, and the cure.
        message: String,
    },
    /// The attachment is gone: attach again.
    Unattached,
    /// Too much to do: later.
    Busy,
    /// The daemon is stopping.
    Stopping,
    /// The request breaks a rule: which.
    Malformed(String),
}

/// What became of a block in a reservation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReserveOutcome {
    /// Fill this slot.
    Granted {
        /// The reservation.
        hold: HoldId,
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

/// Leases.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Acquired {
    /// Why there are no more.
    pub end: AcquireEnd,
    /// In order, from the first key on.
    pub blocks: Vec<LeasedBlock>,
}

/// A leased block.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LeasedBlock {
    /// Where it was found: host, disk, peer or object.
    pub tier: Tier,
    /// The reader must compare each root with the bytes that it copied.
    pub verify: bool,
    /// Its shards in order, 1 to `SHARDS_MAX`.
    pub parts: Vec<LeasedPart>,
}

/// A leased shard of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LeasedPart {
    /// The lease.
    pub hold: HoldId,
    /// In which segment.
    pub segment: u32,
    /// Bytes that count.
    pub payload_bytes: u32,
    /// At which byte of the segment.
    pub offset_bytes: u64,
    /// Which shard.
    pub shard: Shard,
    /// Its sum.
    pub root: u64,
}

/// Where the blocks of a chain are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Residency {
    /// Usable from the first on, in any tier.
    pub prefix_blocks: u32,
    /// Bit i: key i is in host memory.
    pub host: Bitmap,
    /// Bit i: key i is on disk. As long as `host`.
    pub disk: Bitmap,
}

/// What became of a prefetch, in blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Prefetched {
    /// In host memory now.
    pub resident: u32,
    /// Of these, brought up by this request.
    pub loaded: u32,
    /// In no tier, or lost on the way.
    pub missing: u32,
    /// Given up.
    pub shed: u32,
}

/// Yes or no, for each thing asked about.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Bitmap {
    bits: usize,
    /// Exactly as many as `bits` needs; what is left over of the last is 0.
    bytes: Vec<u8>,
}

/// How many of these, from the first on, one commit request holds. At least one, of what is within its limits.
pub fn commits_that_fit(filled: &[Filled]) -> usize {
    let sizes = filled.iter().map(|filled| HOLD_BYTES + COUNT_BYTES + filled.sums.len() * SUM_BYTES);
    that_fit(sizes, COUNT_BYTES).min(COMMITS_PER_ENTRY_MAX)
}

/// How many sizes fit into a frame behind `head_bytes`.
fn that_fit(sizes: impl Iterator<Item = usize>, head_bytes: usize) -> usize {
    let mut free_bytes = FRAME_BYTES - head_bytes;
    sizes
        .take_while(|bytes| {
            let fits = *bytes <= free_bytes;
            free_bytes = free_bytes.saturating_sub(*bytes);
            fits
        })
        .count()
}

impl HoldId {
    /// The hold that is number `generation` in `place` of the table.
    pub const fn new(place: u32, generation: u32) -> Self {
        Self((generation as u64) << 32 | place as u64)
    }

    /// Place in the table.
    pub const fn place(self) -> u32 {
        self.0 as u32
    }

    /// Which holder of that place.
    pub const fn generation(self) -> u32 {
        (self.0 >> 32) as u32
    }
}

impl Bitmap {
    /// From bytes as drawn: bytes that are missing are 0, what lies beyond `bits` is cut off.
    pub fn from_bytes(mut bytes: Vec<u8>, bits: usize) -> Self {
        bytes.resize(bits.div_ceil(8), 0);
        if let Some(last) = bytes.last_mut()
            && !bits.is_multiple_of(8)
        {
            *last &= (1 << (bits % 8)) - 1;
        }
        Self { bits, bytes }
    }

    /// As drawn.
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Number of bits.
    pub fn len(&self) -> usize {
        self.bits
    }

    /// Nothing was asked about.
    pub fn is_empty(&self) -> bool {
        self.bits == 0
    }

    /// Bit `index`; no beyond the end.
    pub fn get(&self, index: usize) -> bool {
        self.bytes.get(index / 8).is_some_and(|byte| byte & 1 << (index % 8) != 0)
    }

    /// All bits in order.
    pub fn iter(&self) -> impl Iterator<Item = bool> {
        (0..self.bits).map(|index| self.get(index))
    }

    /// Number of yes.
    pub fn count_ones(&self) -> usize {
        self.bytes.iter().map(|byte| byte.count_ones() as usize).sum()
    }
}

impl FromIterator<bool> for Bitmap {
    fn from_iter<T: IntoIterator<Item = bool>>(bits: T) -> Self {
        let mut bitmap = Self::default();
        for bit in bits {
            if bitmap.bits.is_multiple_of(8) {
                bitmap.bytes.push(0);
            }
            bitmap.bytes[bitmap.bits / 8] |= u8::from(bit) << (bitmap.bits % 8);
            bitmap.bits += 1;
        }
        bitmap
    }
}

impl Request<'_> {
    /// Its verb.
    pub const fn verb(&self) -> Verb {
        match self {
            Self::Reserve { .. } => Verb::Reserve,
            Self::Commit(_) => Verb::Commit,
            Self::Abort(_) => Verb::Abort,
            Self::Acquire { .. } => Verb::Acquire,
            Self::Release(_) => Verb::Release,
            Self::Lookup(_) => Verb::Lookup,
            Self::Prefetch(_) => Verb::Prefetch,
            Self::Durable(_) => Verb::Durable,
            Self::Purge(_) | Self::PurgeNamespace => Verb::Purge,
            Self::Confirm(_) => Verb::Confirm,
        }
    }

    /// What its reply must fit.
    pub fn asked(&self) -> Asked {
        let items = match self {
            Self::Reserve { keys, .. } | Self::Acquire { keys, .. } => keys.len(),
            Self::Lookup(keys) | Self::Prefetch(keys) | Self::Durable(keys) | Self::Purge(keys) => keys.len(),
            Self::Commit(filled) => filled.len(),
            Self::Abort(holds) | Self::Release(holds) => holds.len(),
            Self::PurgeNamespace => 0,
            Self::Confirm(held) => held.len(),
        };
        Asked { verb: self.verb(), items }
    }

    /// Its bytes, instead of what is in `into`. More items than the limits allow are written too, and refused by who decodes them.
    pub fn encode(&self, into: &mut Vec<u8>) {
        let mut writer = Writer::new(into);
        match self {
            Self::Reserve { parent, shard, bytes_max, keys } => {
                writer.bytes(parent.as_bytes());
                writer.shard(*shard);
                writer.u64(*bytes_max);
                writer.keys(keys);
            }
            Self::Commit(filled) => {
                writer.count(filled.len());
                for Filled { hold, sums } in filled.iter() {
                    writer.u64(hold.0);
                    writer.count(sums.len());
                    sums.iter().for_each(|sum| writer.u64(*sum));
                }
            }
            Self::Abort(holds) | Self::Release(holds) => {
                writer.count(holds.len());
                holds.iter().for_each(|hold| writer.u64(hold.0));
            }
            Self::Acquire { bytes_max, keys } => {
                writer.u64(*bytes_max);
                writer.keys(keys);
            }
            Self::Lookup(keys) | Self::Prefetch(keys) | Self::Durable(keys) => writer.keys(keys),
            Self::Purge(keys) => {
                writer.u8(0);
                writer.keys(keys);
            }
            Self::PurgeNamespace => writer.u8(1),
            Self::Confirm(held) => {
                writer.count(held.len());
                for Held { hold, segment, offset_bytes, kind } in held.iter() {
                    writer.u64(hold.0);
                    writer.u32(*segment);
                    writer.u64(*offset_bytes);
                    writer.u8(kind.number());
                }
            }
        }
    }

    /// The request of that verb.
    pub fn decode(verb: u16, bytes: &[u8]) -> Result<Request<'static>, FieldError> {
        let mut reader = Reader { rest: bytes };
        let request = match Verb::try_from(verb)? {
            Verb::Reserve => Request::Reserve {
                parent: BlockKey::from_bytes(reader.array("parent")?),
                shard: reader.shard()?,
                bytes_max: reader.u64("bytes_max")?,
                keys: reader.keys()?,
            },
            Verb::Commit => Request::Commit(reader.list("filled", COMMITS_PER_ENTRY_MAX, Reader::filled)?.into()),
            Verb::Abort => Request::Abort(reader.holds()?.into()),
            Verb::Acquire => Request::Acquire { bytes_max: reader.u64("bytes_max")?, keys: reader.keys()? },
            Verb::Release => Request::Release(reader.holds()?.into()),
            Verb::Lookup => Request::Lookup(reader.keys()?),
            Verb::Prefetch => Request::Prefetch(reader.keys()?),
            Verb::Durable => Request::Durable(reader.keys()?),
            Verb::Purge => match reader.u8("what")? {
                0 => Request::Purge(reader.keys()?),
                1 => Request::PurgeNamespace,
                what => return Err(FieldError::Unknown { field: "what", value: what.into() }),
            },
            Verb::Confirm => Request::Confirm(reader.list("held", CONFIRMS_PER_ENTRY_MAX, Reader::held)?.into()),
        };
        reader.finish()?;
        Ok(request)
    }
}

impl Reply {
    /// Its status.
    pub const fn status(&self) -> Status {
        match self {
            Self::Reserved(_)
            | Self::Committed(_)
            | Self::Done
            | Self::Acquired(_)
            | Self::Lookup(_)
            | Self::Prefetched(_)
            | Self::Durable(_)
            | Self::Purged { .. }
            | Self::Confirmed(_) => Status::Done,
            Self::Refused { .. } => Status::Refused,
            Self::Unattached => Status::Unattached,
            Self::Busy => Status::Busy,
            Self::Stopping => Status::Stopping,
            Self::Malformed(_) => Status::Malformed,
        }
    }

    /// Its bytes, instead of what is in `into`; at most `FRAME_BYTES` for what was asked within the limits. Returns the leased blocks
    /// that did not fit (from the first on, and with `Budget` for the end): nobody is told of them, so they are to be released.
    #[must_use = "leases that nobody is told of are held for ever"]
    pub fn encode(&self, into: &mut Vec<u8>) -> &[LeasedBlock] {
        let mut writer = Writer::new(into);
        match self {
            Self::Reserved(outcomes) => {
                writer.count(outcomes.len());
                outcomes.iter().for_each(|outcome| writer.reserve_outcome(outcome));
            }
            Self::Committed(outcomes) => {
                writer.count(outcomes.len());
                outcomes.iter().for_each(|outcome| writer.u8(outcome.number()));
            }
            Self::Acquired(acquired) => return writer.acquired(acquired),
            Self::Lookup(Residency { prefix_blocks, host, disk }) => {
                writer.count(host.len());
                writer.u32(*prefix_blocks);
                writer.bytes(host.as_bytes());
                writer.bytes(Bitmap::from_bytes(disk.bytes.clone(), host.len()).as_bytes());
            }
            Self::Prefetched(Prefetched { resident, loaded, missing, shed }) => {
                [resident, loaded, missing, shed].into_iter().for_each(|blocks| writer.u32(*blocks));
            }
            Self::Durable(bitmap) | Self::Confirmed(bitmap) => {
                writer.count(bitmap.len());
                writer.bytes(bitmap.as_bytes());
            }
            Self::Purged { purged_blocks, busy_blocks } => {
                writer.u64(*purged_blocks);
                writer.u64(*busy_blocks);
            }
            Self::Refused { kind, message } => {
                writer.u16(kind.number());
                writer.text(message);
            }
            Self::Malformed(message) => writer.text(message),
            Self::Done | Self::Unattached | Self::Busy | Self::Stopping => {}
        }
        &[]
    }

    /// The reply of that status to what was asked.
    pub fn decode(asked: Asked, status: u16, bytes: &[u8]) -> Result<Self, FieldError> {
        let mut reader = Reader { rest: bytes };
        let reply = match Status::try_from(status)? {
            Status::Done => reader.done(asked)?,
            Status::Refused => {
                Self::Refused { kind: reader.u16("kind")?.try_into()?, message: reader.text("message")? }
            }
            Status::Unattached => Self::Unattached,
            Status::Busy => Self::Busy,
            Status::Stopping => Self::Stopping,
            Status::Malformed => Self::Malformed(reader.text("message")?),
        };
        reader.finish()?;
        Ok(reply)
    }
}

/// Appends fields.
struct Writer<'a> {
    into: &'a mut Vec<u8>,
}

impl<'a> Writer<'a> {
    fn new(into: &'a mut Vec<u8>) -> Self {
        into.clear();
        Self { into }
    }

    fn bytes(&mut self, bytes: &[u8]) {
        self.into.extend_from_slice(bytes);
    }

    fn u8(&mut self, value: u8) {
        self.into.push(value);
    }

    fn u16(&mut self, value: u16) {
        self.bytes(&value.to_le_bytes());
    }

    fn u32(&mut self, value: u32) {
        self.bytes(&value.to_le_bytes());
    }

    fn u64(&mut self, value: u64) {
        self.bytes(&value.to_le_bytes());
    }

    fn count(&mut self, count: usize) {
        self.u32(u32::try_from(count).unwrap_or(u32::MAX));
    }

    fn keys(&mut self, keys: &[BlockKey]) {
        self.count(keys.len());
        keys.iter().for_each(|key| self.bytes(key.as_bytes()));
    }

    fn shard(&mut self, shard: Shard) {
        self.u16(shard.index);
        self.u16(shard.count);
    }

    fn text(&mut self, text: &str) {
        let cut = (0..=text.len().min(MESSAGE_BYTES_MAX)).rev().find(|at| text.is_char_boundary(*at));
        self.bytes(&text.as_bytes()[..cut.unwrap_or(0)]);
    }

    fn reserve_outcome(&mut self, outcome: &ReserveOutcome) {
        match outcome {
            ReserveOutcome::Granted { hold, extent: Extent { segment, offset_bytes, bytes } } => {
                self.u8(1);
                self.u64(hold.0);
                self.u32(*segment);
                self.u64(*offset_bytes);
                self.u32(*bytes);
            }
            ReserveOutcome::AlreadyPresent => self.u8(2),
            ReserveOutcome::BeingWritten => self.u8(3),
            ReserveOutcome::NoRoom => self.u8(4),
            ReserveOutcome::OverQuota => self.u8(5),
        }
    }

    fn acquired<'b>(&mut self, acquired: &'b Acquired) -> &'b [LeasedBlock] {
        let sizes = acquired.blocks.iter().map(|block| BLOCK_HEAD_BYTES + block.parts.len() * PART_BYTES);
        let (blocks, left_out) = acquired.blocks.split_at(that_fit(sizes, 1 + COUNT_BYTES));
        let end = if left_out.is_empty() { acquired.end } else { AcquireEnd::Budget };
        self.u8(end.number());
        self.count(blocks.len());
        for LeasedBlock { tier, verify, parts } in blocks {
            self.u8(*tier as u8);
            self.u8(if *verify { FLAG_VERIFY } else { 0 });
            self.u16(u16::try_from(parts.len()).unwrap_or(u16::MAX));
            for LeasedPart { hold, segment, payload_bytes, offset_bytes, shard, root } in parts {
                self.u64(hold.0);
                self.u32(*segment);
                self.u32(*payload_bytes);
                self.u64(*offset_bytes);
                self.shard(*shard);
                self.u64(*root);
            }
        }
        left_out
    }
}

/// Takes fields off the front; each names itself when it is not there or cannot be.
struct Reader<'a> {
    rest: &'a [u8],
}

impl Reader<'_> {
    fn bytes(&mut self, field: &'static str, bytes: usize) -> Result<&[u8], FieldError> {
        let short = FieldError::Length { field, length: self.rest.len(), min: bytes, max: bytes };
        let (bytes, rest) = self.rest.split_at_checked(bytes).ok_or(short)?;
        self.rest = rest;
        Ok(bytes)
    }

    fn array<const BYTES: usize>(&mut self, field: &'static str) -> Result<[u8; BYTES], FieldError> {
        let mut array = [0; BYTES];
        array.copy_from_slice(self.bytes(field, BYTES)?);
        Ok(array)
    }

    fn u8(&mut self, field: &'static str) -> Result<u8, FieldError> {
        Ok(u8::from_le_bytes(self.array(field)?))
    }

    fn u16(&mut self, field: &'static str) -> Result<u16, FieldError> {
        Ok(u16::from_le_bytes(self.array(field)?))
    }

    fn u32(&mut self, field: &'static str) -> Result<u32, FieldError> {
        Ok(u32::from_le_bytes(self.array(field)?))
    }

    fn u64(&mut self, field: &'static str) -> Result<u64, FieldError> {
        Ok(u64::from_le_bytes(self.array(field)?))
    }

    fn hold(&mut self) -> Result<HoldId, FieldError> {
        Ok(HoldId(self.u64("hold")?))
    }

    fn count(&mut self, field: &'static str, min: usize, max: usize) -> Result<usize, FieldError> {
        let count = self.u32(field)?;
        within(field, count.into(), min, max)?;
        Ok(count as usize)
    }

    /// A list of at most `max`, for which there may be room made before it is read.
    fn list<T>(
        &mut self,
        field: &'static str,
        max: usize,
        item: impl FnMut(&mut Self) -> Result<T, FieldError>,
    ) -> Result<Vec<T>, FieldError> {
        let count = self.count(field, 0, max)?;
        self.items(count, item)
    }

    fn items<T>(
        &mut self,
        count: usize,
        mut item: impl FnMut(&mut Self) -> Result<T, FieldError>,
    ) -> Result<Vec<T>, FieldError> {
        // Nothing takes less than a byte.
        let mut items = Vec::with_capacity(count.min(self.rest.len()));
        for _ in 0..count {
            items.push(item(self)?);
        }
        Ok(items)
    }

    fn keys(&mut self) -> Result<Cow<'static, [BlockKey]>, FieldError> {
        let count = self.count("keys", 0, KEYS_PER_ENTRY_MAX)?;
        let bytes = self.bytes("keys", count * KEY_BYTES)?;
        BlockKey::split(bytes).map(Cow::Owned).map_err(|source| FieldError::Keys { field: "keys", source })
    }

    fn holds(&mut self) -> Result<Vec<HoldId>, FieldError> {
        self.list("holds", HOLDS_PER_ENTRY_MAX, Self::hold)
    }

    fn shard(&mut self) -> Result<Shard, FieldError> {
        let shard = Shard { index: self.u16("shard.index")?, count: self.u16("shard.count")? };
        within("shard.count", shard.count.into(), 1, SHARDS_MAX as usize)?;
        within("shard.index", shard.index.into(), 0, usize::from(shard.count) - 1)?;
        Ok(shard)
    }

    fn filled(&mut self) -> Result<Filled, FieldError> {
        let hold = self.hold()?;
        let count = self.count("sums", 1, SUMS_MAX)?;
        Ok(Filled { hold, sums: self.items(count, |reader| reader.u64("sums"))? })
    }

    fn held(&mut self) -> Result<Held, FieldError> {
        Ok(Held {
            hold: self.hold()?,
            segment: self.u32("segment")?,
            offset_bytes: self.u64("offset_bytes")?,
            kind: self.u8("kind")?.try_into()?,
        })
    }

    fn bitmap(&mut self, field: &'static str, bits: usize) -> Result<Bitmap, FieldError> {
        let bytes = self.bytes(field, bits.div_ceil(8))?;
        let bitmap = Bitmap::from_bytes(bytes.to_vec(), bits);
        match (bitmap.as_bytes().last(), bytes.last()) {
            (Some(kept), Some(came)) if kept != came => {
                Err(FieldError::Range { field, value: (*came).into(), min: 0, max: (*kept).into() })
            }
            _ => Ok(bitmap),
        }
    }

    /// To the end.
    fn text(&mut self, field: &'static str) -> Result<String, FieldError> {
        crate::convert::length(field, self.rest.len(), 0, MESSAGE_BYTES_MAX)?;
        let text = str::from_utf8(self.rest).map_err(|error| FieldError::Text { field, at: error.valid_up_to() })?;
        self.rest = &[];
        Ok(text.to_owned())
    }

    fn done(&mut self, asked: Asked) -> Result<Reply, FieldError> {
        let Asked { verb, items } = asked;
        Ok(match verb {
            Verb::Reserve => {
                let count = self.count("outcomes", items, items)?;
                Reply::Reserved(self.items(count, Self::reserve_outcome)?)
            }
            Verb::Commit => {
                let count = self.count("outcomes", items, items)?;
                Reply::Committed(self.items(count, |reader| reader.u8("outcome")?.try_into())?)
            }
            Verb::Abort | Verb::Release => Reply::Done,
            Verb::Acquire => {
                let end = self.u8("end")?.try_into()?;
                Reply::Acquired(Acquired { end, blocks: self.list("blocks", items, Self::leased_block)? })
            }
            Verb::Lookup => {
                let bits = self.count("keys", items, items)?;
                let prefix_blocks = self.count("prefix_blocks", 0, items)? as u32;
                let (host, disk) = (self.bitmap("host", bits)?, self.bitmap("disk", bits)?);
                Reply::Lookup(Residency { prefix_blocks, host, disk })
            }
            Verb::Prefetch => Reply::Prefetched(Prefetched {
                resident: self.u32("resident")?,
                loaded: self.u32("loaded")?,
                missing: self.u32("missing")?,
                shed: self.u32("shed")?,
            }),
            Verb::Durable => {
                let bits = self.count("keys", items, items)?;
                Reply::Durable(self.bitmap("durable", bits)?)
            }
            Verb::Purge => {
                Reply::Purged { purged_blocks: self.u64("purged_blocks")?, busy_blocks: self.u64("busy_blocks")? }
            }
            Verb::Confirm => {
                let bits = self.count("entries", items, items)?;
                Reply::Confirmed(self.bitmap("confirmed", bits)?)
            }
        })
    }

    fn reserve_outcome(&mut self) -> Result<ReserveOutcome, FieldError> {
        Ok(match self.u8("outcome")? {
            1 => ReserveOutcome::Granted {
                hold: self.hold()?,
                extent: Extent {
                    segment: self.u32("segment")?,
                    offset_bytes: self.u64("offset_bytes")?,
                    bytes: self.u32("bytes")?,
                },
            },
            2 => ReserveOutcome::AlreadyPresent,
            3 => ReserveOutcome::BeingWritten,
            4 => ReserveOutcome::NoRoom,
            5 => ReserveOutcome::OverQuota,
            outcome => return Err(FieldError::Unknown { field: "outcome", value: outcome.into() }),
        })
    }

    fn leased_block(&mut self) -> Result<LeasedBlock, FieldError> {
        let tier = i32::from(self.u8("tier")?);
        let tier = match Tier::try_from(tier) {
            Ok(tier @ (Tier::Host | Tier::Disk | Tier::Peer | Tier::Object)) => tier,
            _ => return Err(FieldError::Unknown { field: "tier", value: tier }),
        };
        let verify = match self.u8("flags")? {
            0 => false,
            FLAG_VERIFY => true,
            flags => return Err(FieldError::Unknown { field: "flags", value: flags.into() }),
        };
        let parts = self.u16("parts")?;
        within("parts", parts.into(), 1, SHARDS_MAX as usize)?;
        Ok(LeasedBlock { tier, verify, parts: self.items(parts.into(), Self::leased_part)? })
    }

    fn leased_part(&mut self) -> Result<LeasedPart, FieldError> {
        Ok(LeasedPart {
            hold: self.hold()?,
            segment: self.u32("segment")?,
            payload_bytes: self.u32("payload_bytes")?,
            offset_bytes: self.u64("offset_bytes")?,
            shard: self.shard()?,
            root: self.u64("root")?,
        })
    }

    fn finish(self) -> Result<(), FieldError> {
        crate::convert::length("what follows the message", self.rest.len(), 0, 0)
    }
}

fn within(field: &'static str, value: u64, min: usize, max: usize) -> Result<(), FieldError> {
    let [min, max] = [min, max].map(|n| n as u64);
    if (min..=max).contains(&value) { Ok(()) } else { Err(FieldError::Range { field, value, min, max }) }
}

#[cfg(test)]
mod tests;
