//! What is said through a ring, in the words of [`verb`](crate::verb) and back. The bytes are decoded by `proto`; here each field is given its
//! meaning, and each reply its form. Everything else is the core's to judge, as for gRPC.

use tender_proto::door::{self, Asked, Bitmap, HoldId};
use tender_proto::greeting::SHARED_MAPPING;
use tender_proto::ring::Submission;
use tender_proto::wire::Tier;

use crate::device::memory;
use crate::limits;
use crate::names::{AttachmentId, By, Door, GroupId, Hold, Place, TenantId};
use crate::verb::{self, AcquireEnd, CommitOutcome, PurgeWhat, RefusalKind, Reply, ReserveOutcome, Verb};

/// Names of the memory files that segments lie in, as clients know them.
#[derive(Debug)]
pub struct Mappings {
    segment_bytes: u64,
    shared_count: u32,
    /// Of ingest segments, by their place behind the shared ones.
    ingest: Vec<u32>,
}

impl Mappings {
    /// Names for an arena; its ingest places have none yet.
    pub fn new(arena: &memory::Arena) -> Self {
        Self {
            segment_bytes: arena.segment_bytes(),
            shared_count: arena.segment_count(),
            ingest: vec![SHARED_MAPPING; arena.ingest_count() as usize],
        }
    }

    /// An ingest place holds that file.
    pub fn name(&mut self, segment: u32, mapping: u32) {
        self.ingest[(segment - self.shared_count) as usize] = mapping;
    }

    /// The segment that a place in a file belongs to, and where in it; a segment that does not exist for a file that is not known.
    fn find(&self, mapping: u32, offset_bytes: u64) -> (u32, u32) {
        if mapping == SHARED_MAPPING {
            let segment = u32::try_from(offset_bytes / self.segment_bytes).unwrap_or(u32::MAX);
            return (segment, (offset_bytes % self.segment_bytes) as u32);
        }
        let at = self.ingest.iter().position(|other| *other == mapping);
        let segment = at.map_or(u32::MAX, |at| self.shared_count + at as u32);
        (segment, u32::try_from(offset_bytes).unwrap_or(u32::MAX))
    }

    /// The file that an extent lies in, and where.
    fn place(&self, extent: memory::Extent) -> (u32, u64) {
        let offset = u64::from(extent.offset);
        match extent.segment.checked_sub(self.shared_count) {
            None => (SHARED_MAPPING, u64::from(extent.segment) * self.segment_bytes + offset),
            Some(ingest) => (self.ingest[ingest as usize], offset),
        }
    }
}

/// Who asks through a ring.
#[derive(Clone, Copy, Debug)]
pub struct Member {
    /// The process.
    pub attachment: AttachmentId,
    /// Whose it is.
    pub tenant: TenantId,
    /// To whom belongs what it is granted.
    pub group: GroupId,
    /// It could change shared memory, as could others like it: each of its leases is to be verified.
    pub verify: bool,
}

/// A request, and what its reply must fit; or the reply, where it means nothing.
pub fn request(
    member: Member,
    submission: &Submission,
    bytes: &[u8],
    mappings: &Mappings,
) -> Result<(Verb, Asked), door::Reply> {
    let request = door::Request::decode(submission.verb, bytes);
    let request = request.map_err(|error| door::Reply::Malformed(error.to_string()))?;
    if submission.attachment != member.attachment.0 {
        return Err(door::Reply::Unattached);
    }
    let longest_ms = limits::DEADLINE_MAX.as_millis();
    if u128::from(submission.deadline_ms) > longest_ms {
        let message = format!("deadline_ms is {}, but must be at most {longest_ms}", submission.deadline_ms);
        return Err(door::Reply::Malformed(message));
    }
    let asked = request.asked();
    let (attachment, door) = (member.attachment, Door::Ring);
    let verb = match request {
        door::Request::Reserve { parent, shard, bytes_max, keys } => {
            Verb::Reserve { attachment, parent, keys: keys.into_owned(), shard, bytes_max, door }
        }
        door::Request::Commit(filled) => {
            let filled = filled.into_owned().into_iter();
            let filled = filled.map(|door::Filled { hold, sums }| verb::Filled { hold: name(hold), sums }).collect();
            Verb::Commit { attachment, filled, door }
        }
        door::Request::Abort(holds) => Verb::Abort(By::Group(member.group, door), names(&holds)),
        door::Request::Acquire { bytes_max, keys } => {
            Verb::Acquire { attachment, keys: keys.into_owned(), bytes_max, door }
        }
        door::Request::Release(holds) => Verb::Release(By::Group(member.group, door), names(&holds)),
        door::Request::Lookup(keys) => Verb::Lookup(attachment, keys.into_owned()),
        door::Request::Prefetch(keys) => Verb::Prefetch(attachment, keys.into_owned()),
        door::Request::Durable(keys) => Verb::Durable(attachment, keys.into_owned()),
        door::Request::Purge(keys) => Verb::Purge(attachment, PurgeWhat::Keys(keys.into_owned())),
        door::Request::PurgeNamespace => Verb::Purge(attachment, PurgeWhat::Namespace),
        door::Request::Confirm(held) => {
            let held = held.iter().map(|held| {
                let (segment, offset) = mappings.find(held.segment, held.offset_bytes);
                let is_reservation = held.kind == door::HoldKind::Reservation;
                verb::Held { hold: name(held.hold), segment, offset, is_reservation }
            });
            Verb::Confirm(attachment, held.collect())
        }
    };
    Ok((verb, asked))
}

/// A reply as the ring has it; `None` for the progress of a prefetch, of which only the end is told.
pub fn reply(member: Member, asked: Asked, reply: Reply, mappings: &Mappings) -> Option<door::Reply> {
    Some(match reply {
        Reply::Reserved(outcomes) => {
            door::Reply::Reserved(outcomes.into_iter().map(|outcome| reserved(outcome, mappings)).collect())
        }
        Reply::Committed(outcomes) => door::Reply::Committed(outcomes.into_iter().map(committed).collect()),
        Reply::Acquired(acquired) => {
            let is_whole = acquired.blocks.len() == asked.items;
            let end = match acquired.end {
                None if is_whole => door::AcquireEnd::Complete,
                None => door::AcquireEnd::Budget,
                Some(AcquireEnd::Miss) => door::AcquireEnd::Miss,
                Some(AcquireEnd::Deadline) => door::AcquireEnd::Deadline,
                Some(AcquireEnd::Shed) => door::AcquireEnd::Shed,
            };
            let blocks = acquired.blocks.into_iter().map(|block| leased(member, block, mappings)).collect();
            door::Reply::Acquired(door::Acquired { end, blocks })
        }
        Reply::Lookup(found) => door::Reply::Lookup(door::Residency {
            prefix_blocks: found.prefix_blocks,
            host: Bitmap::from_bytes(found.host, asked.items),
            disk: Bitmap::from_bytes(found.disk, asked.items),
        }),
        Reply::Prefetch(prefetch) if !prefetch.done => return None,
        Reply::Prefetch(verb::PrefetchReply { resident, loaded, missing, shed, .. }) => {
            door::Reply::Prefetched(door::Prefetched { resident, loaded, missing, shed })
        }
        Reply::Durable(durable) => door::Reply::Durable(durable.into_iter().collect()),
        Reply::Purged { purged_blocks, busy_blocks } => door::Reply::Purged { purged_blocks, busy_blocks },
        Reply::Confirmed(confirmed) => door::Reply::Confirmed(confirmed.into_iter().collect()),
        Reply::Done => door::Reply::Done,
        Reply::Refused(verb::Refusal { kind, message }) => match kind {
            RefusalKind::Invalid => door::Reply::Refused { kind: door::RefusalKind::Invalid, message },
            RefusalKind::Contradiction => door::Reply::Refused { kind: door::RefusalKind::Contradiction, message },
            RefusalKind::Forbidden => door::Reply::Refused { kind: door::RefusalKind::Forbidden, message },
            RefusalKind::Unattached => door::Reply::Unattached,
            RefusalKind::Busy => door::Reply::Busy,
            RefusalKind::Stopping => door::Reply::Stopping,
        },
        Reply::Attached(_) | Reply::Joined { .. } | Reply::Events(_) | Reply::Snapshot { .. } | Reply::Status(_) => {
            unreachable!("nothing on a ring asks for it")
        }
    })
}

/// What gives back leased blocks that a reply had no room for.
pub fn release(blocks: &[door::LeasedBlock]) -> Verb {
    let parts = blocks.iter().flat_map(|block| &block.parts);
    Verb::Release(By::Daemon, parts.map(|part| name(part.hold)).collect())
}

fn reserved(outcome: ReserveOutcome, mappings: &Mappings) -> door::ReserveOutcome {
    match outcome {
        ReserveOutcome::Granted { hold, extent } => {
            let (segment, offset_bytes) = mappings.place(extent);
            let extent = door::Extent { segment, offset_bytes, bytes: extent.bytes };
            door::ReserveOutcome::Granted { hold: id(hold), extent }
        }
        ReserveOutcome::AlreadyPresent => door::ReserveOutcome::AlreadyPresent,
        ReserveOutcome::BeingWritten => door::ReserveOutcome::BeingWritten,
        ReserveOutcome::NoRoom => door::ReserveOutcome::NoRoom,
        ReserveOutcome::OverQuota => door::ReserveOutcome::OverQuota,
    }
}

fn committed(outcome: CommitOutcome) -> door::CommitOutcome {
    match outcome {
        CommitOutcome::Stored => door::CommitOutcome::Stored,
        CommitOutcome::ShardStored => door::CommitOutcome::ShardStored,
        CommitOutcome::Gone => door::CommitOutcome::Gone,
    }
}

fn leased(member: Member, block: verb::Leased, mappings: &Mappings) -> door::LeasedBlock {
    let tier = match block.place {
        Place::Host => Tier::Host,
        Place::Disk => Tier::Disk,
    };
    let verify = member.verify || block.parts.iter().any(|part| part.verify);
    let parts = block.parts.into_iter().map(|part| {
        let (segment, offset_bytes) = mappings.place(part.extent);
        let verb::LeasedPart { hold, payload_bytes, shard, root, .. } = part;
        door::LeasedPart { hold: id(hold), segment, payload_bytes, offset_bytes, shard, root }
    });
    door::LeasedBlock { tier, verify, parts: parts.collect() }
}

fn id(hold: Hold) -> HoldId {
    HoldId::new(hold.place, hold.generation)
}

fn name(id: HoldId) -> Hold {
    Hold { place: id.place(), generation: id.generation() }
}

fn names(ids: &[HoldId]) -> Vec<Hold> {
    ids.iter().copied().map(name).collect()
}
