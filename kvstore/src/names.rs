//! Names of the things that the core holds: small numbers, one type each, so that no two can be mixed up. On the floor, for every stage
//! speaks of them.

/// A tenant, in the order of the configuration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TenantId(pub u16);

/// A namespace, in the order of its first attach.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NamespaceId(pub u32);

/// A group: the processes of one engine instance.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GroupId(pub u32);

/// A node of the index.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodeId(pub u32);

impl NodeId {
    /// No node.
    pub const NONE: Self = Self(u32::MAX);

    /// Place in an array.
    pub fn place(self) -> usize {
        self.0 as usize
    }
}

/// Name of a request, unique while the daemon runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RequestId(pub u64);

/// Name of an attachment; hard to guess.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct AttachmentId(pub u64);

/// Name of a slot: segment (14 bits) and place (18 bits); 16,384 segments, and 1 GiB / 4 KiB = 262,144 slots in each.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SlotId(u32);

const PLACE_BITS: u32 = 18;

/// Most segments of one tier.
pub const SEGMENTS_MAX: u32 = (1 << (32 - PLACE_BITS)) - 1;

impl SlotId {
    /// No slot.
    pub const NONE: Self = Self(u32::MAX);

    /// The slot at `place` of `segment`.
    pub fn new(segment: u32, place: u32) -> Self {
        Self(segment << PLACE_BITS | place)
    }

    /// As a number, for records.
    pub fn number(self) -> u32 {
        self.0
    }

    /// The slot of that number.
    pub fn from_number(number: u32) -> Self {
        Self(number)
    }

    /// Its segment.
    pub fn segment(self) -> u32 {
        self.0 >> PLACE_BITS
    }

    /// Its place in the segment.
    pub fn place(self) -> u32 {
        self.0 & ((1 << PLACE_BITS) - 1)
    }
}

/// Name of one reservation or one lease; good until it ends, and never again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Hold {
    /// Its place among all of them.
    pub place: u32,
    /// How often that place was used.
    pub generation: u32,
}

/// Whose a hold is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Holder {
    /// The group that it belongs to: each of its members may end it, by the same door.
    pub group: GroupId,
    /// The member that asked for it.
    pub attachment: AttachmentId,
    /// How.
    pub door: Door,
}

/// The way to the daemon that a request came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Door {
    /// gRPC: the daemon copies bytes in and out, and holds slots meanwhile.
    Stream,
    /// Shared memory: the client writes and reads slots in place.
    Ring,
}

/// Who ends a hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum By {
    /// The daemon, for whoever dropped an answer.
    Daemon,
    /// A member of this group, by this door: what a stream holds only that stream ends.
    Group(GroupId, Door),
}

/// A tier as residency names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Place {
    /// Memory of this node.
    Host,
    /// Its disks.
    Disk,
}

impl Place {
    /// Place in arrays of two.
    pub const fn at(self) -> usize {
        self as usize
    }

    /// The other tier.
    pub const fn other(self) -> Self {
        match self {
            Self::Host => Self::Disk,
            Self::Disk => Self::Host,
        }
    }
}

/// A page of the directory of a segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PageName {
    /// Segment of the tier.
    pub segment: u32,
    /// Page of its directory.
    pub page: u32,
    /// Ownership of the segment that was meant.
    pub epoch: u64,
}

/// Number of a cycle.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct CycleId(pub u64);
