//! What keeper and worker say to each other: messages of 64 bytes over a pair of stream sockets, most with descriptors.
//!
//! ```text
//! offset bytes
//! 0      4    kind                          a worker of another version may be started by a keeper that runs for long, so kinds and
//! 4      4    version of this drawing       fields are only ever added
//! 8      …    fields, little-endian, as listed; what is left is 0
//!
//! keeper to worker, at its start                                                            descriptors
//!  1 Sockets   u8 has_tcp                                                                   gRPC, local door, (TCP)
//!  2 Memory    u32 tenant, u8 is_read_only_mount, 16 bytes tag of the tenant's name         for writing, for reading
//!              (a tag of 0: the keeper is older and does not say)
//!  3 Table     u64 bytes                                                                    the table
//!  4 Member    u64 attachment, u32 tenant                                                   its pidfd
//!  5 Ingest    u64 writer, u32 segment, u32 mapping, u32 tenant                             the file
//!  6 Begin     u32 next_mapping, 16 bytes tag of the last worker's disk                     (nothing more comes for the start)
//!              (a tag of 0: nobody has said)
//! at any time
//!  7 Retire    end what is under way, and exit
//! worker to keeper
//!  4 Member, 5 Ingest  as above: keep this                                                  as above
//! 20 Gone      u64 attachment
//! 21 Dropped   u32 segment
//! 22 Serving   16 bytes tag of its disk
//! 23 Replace
//! ```

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::time::Instant;

use tender_proto::descriptors;

/// Bytes of a message.
const BYTES: usize = 64;

/// Version of the drawing.
const VERSION: u32 = 1;

const FIELDS: usize = 8;

/// A message; descriptors go beside it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Said {
    /// Where to listen.
    Sockets {
        /// The third descriptor is there.
        has_tcp: bool,
    },
    /// Shared memory of a tenant.
    Memory {
        /// Whose.
        tenant: u32,
        /// How it is protected.
        is_read_only_mount: bool,
        /// Whose it is, by the tag of its name: the place is one in a file that may have been changed since. 0 of a keeper that does
        /// not say.
        tag: [u8; 16],
    },
    /// Records of host memory.
    Table {
        /// Its length.
        bytes: u64,
    },
    /// A process at the local door.
    Member {
        /// Its name.
        attachment: u64,
        /// Whose it is.
        tenant: u32,
    },
    /// Memory that a client writes.
    Ingest {
        /// The client.
        writer: u64,
        /// Its place in the arena.
        segment: u32,
        /// Its name for clients.
        mapping: u32,
        /// Whose it is.
        tenant: u32,
    },
    /// All was handed over.
    Begin {
        /// The first name of memory that was never used.
        next_mapping: u32,
        /// The disk of the last worker that served from this memory; 0 where nobody has said.
        disk: [u8; 16],
    },
    /// End in good order: another worker comes.
    Retire,
    /// That process is dead, or has left.
    Gone {
        /// Its name.
        attachment: u64,
    },
    /// That memory is used no more.
    Dropped {
        /// Its place in the arena.
        segment: u32,
    },
    /// The worker serves: what it does from now on is in the records.
    Serving {
        /// The tag of its disk.
        disk: [u8; 16],
    },
    /// An operator wants another worker.
    Replace,
}

impl Said {
    fn encode(self) -> [u8; BYTES] {
        let mut bytes = [0; BYTES];
        let mut at = FIELDS;
        let mut put = |field: &[u8]| {
            bytes[at..at + field.len()].copy_from_slice(field);
            at += field.len();
        };
        let kind: u32 = match self {
            Self::Sockets { has_tcp } => {
                put(&[u8::from(has_tcp)]);
                1
            }
            Self::Memory { tenant, is_read_only_mount, tag } => {
                put(&tenant.to_le_bytes());
                put(&[u8::from(is_read_only_mount)]);
                put(&tag);
                2
            }
            Self::Table { bytes } => {
                put(&bytes.to_le_bytes());
                3
            }
            Self::Member { attachment, tenant } => {
                put(&attachment.to_le_bytes());
                put(&tenant.to_le_bytes());
                4
            }
            Self::Ingest { writer, segment, mapping, tenant } => {
                put(&writer.to_le_bytes());
                [segment, mapping, tenant].iter().for_each(|field| put(&field.to_le_bytes()));
                5
            }
            Self::Begin { next_mapping, disk } => {
                put(&next_mapping.to_le_bytes());
                put(&disk);
                6
            }
            Self::Retire => 7,
            Self::Gone { attachment } => {
                put(&attachment.to_le_bytes());
                20
            }
            Self::Dropped { segment } => {
                put(&segment.to_le_bytes());
                21
            }
            Self::Serving { disk } => {
                put(&disk);
                22
            }
            Self::Replace => 23,
        };
        bytes[..4].copy_from_slice(&kind.to_le_bytes());
        bytes[4..8].copy_from_slice(&VERSION.to_le_bytes());
        bytes
    }

    fn decode(bytes: &[u8; BYTES]) -> io::Result<Self> {
        let u32_at = |at: usize| u32::from_le_bytes(std::array::from_fn(|i| bytes[at + i]));
        let tag_at = |at: usize| std::array::from_fn(|i| bytes[at + i]);
        let u64_at = |at: usize| u64::from_le_bytes(std::array::from_fn(|i| bytes[at + i]));
        let (kind, version) = (u32_at(0), u32_at(4));
        if version != VERSION {
            return Err(refused(format!("version {version} is spoken where {VERSION} was expected")));
        }
        Ok(match kind {
            1 => Self::Sockets { has_tcp: bytes[8] != 0 },
            2 => Self::Memory { tenant: u32_at(8), is_read_only_mount: bytes[12] != 0, tag: tag_at(13) },
            3 => Self::Table { bytes: u64_at(8) },
            4 => Self::Member { attachment: u64_at(8), tenant: u32_at(16) },
            5 => Self::Ingest { writer: u64_at(8), segment: u32_at(16), mapping: u32_at(20), tenant: u32_at(24) },
            6 => Self::Begin { next_mapping: u32_at(8), disk: tag_at(12) },
            7 => Self::Retire,
            20 => Self::Gone { attachment: u64_at(8) },
            21 => Self::Dropped { segment: u32_at(8) },
            22 => Self::Serving { disk: tag_at(8) },
            23 => Self::Replace,
            kind => return Err(refused(format!("message {kind} is not known"))),
        })
    }

    /// Sends it, waiting for room until `deadline`.
    pub fn send(self, socket: BorrowedFd<'_>, with: &[BorrowedFd<'_>], deadline: Instant) -> io::Result<()> {
        descriptors::send(socket, &self.encode(), with, deadline)
    }

    /// Receives one, with what came beside it, waiting until `deadline`. `UnexpectedEof` when the other side is gone.
    pub fn receive(socket: BorrowedFd<'_>, deadline: Instant) -> io::Result<(Self, Vec<OwnedFd>)> {
        let mut bytes = [0; BYTES];
        let with = descriptors::receive(socket, &mut bytes, descriptors::DESCRIPTORS_MAX, deadline)?;
        Ok((Self::decode(&bytes)?, with))
    }
}

fn refused(why: String) -> io::Error {
    let cure = "start the daemon anew, both of its processes from one binary";
    io::Error::new(io::ErrorKind::InvalidData, format!("keeper and worker do not understand each other: {why}; {cure}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_said_is_understood() {
        for said in [
            Said::Sockets { has_tcp: true },
            Said::Memory { tenant: 63, is_read_only_mount: true, tag: [0xf1; 16] },
            Said::Memory { tenant: 0, is_read_only_mount: false, tag: [0; 16] },
            Said::Table { bytes: u64::MAX },
            Said::Member { attachment: u64::MAX, tenant: 7 },
            Said::Ingest { writer: 1 << 60, segment: 3, mapping: u32::MAX, tenant: 5 },
            Said::Begin { next_mapping: 9, disk: [0xd1; 16] },
            Said::Retire,
            Said::Gone { attachment: 17 },
            Said::Dropped { segment: 40 },
            Said::Serving { disk: [0xd2; 16] },
            Said::Replace,
        ] {
            assert_eq!(Said::decode(&said.encode()).unwrap(), said);
        }
    }

    #[test]
    fn what_is_not_known_is_refused_with_the_cure() {
        let mut bytes = Said::Retire.encode();
        bytes[0] = 99;
        assert!(Said::decode(&bytes).unwrap_err().to_string().contains("start the daemon anew"));
        let mut bytes = Said::Retire.encode();
        bytes[4] = 2;
        assert!(Said::decode(&bytes).unwrap_err().to_string().contains("version 2"));
    }
}
