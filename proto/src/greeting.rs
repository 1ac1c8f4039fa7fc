//! The socket beside the gRPC one, through which a process on the daemon's own node gets its ring and the memory behind it.
//!
//! A stream socket, named like that of gRPC with `.door` behind it. Messages of 256 bytes go both ways, some with descriptors
//! ([`crate::descriptors`]); numbers are little-endian, what is not drawn is 0.
//! ```text
//! offset bytes
//! 0      8    magic "TNDRDOOR"
//! 8      4    kind
//! 12     4    version of this drawing and of the ring's (`RING_ABI`)
//! 16     …    by kind:
//!
//! from the client                                                                     descriptors with it
//!  1 Open        u64 attachment, u64 former (0: none)                                 its own pidfd
//!  2 Fetch       u32 mapping
//!  3 Mapped      u32 mapping
//!  4 Unmappable  u32 mapping
//!  5 Leave
//!  6 Bring       u32 mapping                                                          a file of its own, instead of the one offered
//! from the daemon
//! 17 Opened      u64 shared_bytes, u32 flags (bit 0: verify), u64 brought_bytes       ring, doorbell (eventfd), bell, shared file
//! 18 Refused     u32 length, text
//! 19 Map         u64 bytes, u32 mapping, u32 flags (bit 0: writable)                  the file
//! 20 Forget      u32 mapping
//! 21 Taken       u32 mapping
//! 22 NotTaken    u32 mapping, u32 length, text
//! ```
//! A message with a descriptor is sent in one piece.
//! ```text
//! client                                            daemon
//! attach, over gRPC                    ──►
//!                                      ◄──          attachment: a number that nobody else knows
//! Open, with its pidfd                 ──►          the attachment is that process from now on, and ends with it
//!                                      ◄──          Opened: the ring; where to ring; where to listen; shared memory, to read
//!   … requests through the ring …
//!                                      ◄──          Map, writable: memory of its own, since it wants to reserve slots
//! maps it, makes its pages; Mapped     ──►          seals it: nobody can map it for writing any more; slots in it are granted
//! a lease names a mapping that is not
//! there: Fetch                         ──►
//!                                      ◄──          Map, for reading only; or Forget: there is none
//!                                      ◄──          Forget: nothing will be granted in it again; unmap when no lease is left
//! Leave; closes the socket             ──►          holds nothing any more
//! ```
//! A client that has memory of its own (registered with its GPU, on its NUMA node) may *bring* it: it answers `Map` with a file
//! instead of with `Mapped`.
//! ```text
//!                                      ◄──          Map, writable: a fresh file, as above
//! Bring, with a file that it has
//! mapped and closed for writers        ──►          looks at it; nothing about it is believed
//!                                      ◄──          Taken: slots in it are granted under that name; the fresh file is nobody's
//!                                      ◄──          or NotTaken: why, and the cure; maps the fresh file, and goes on with Mapped
//!                                      ◄──          Forget, as above: it is the client's alone again
//! ```
//! Such a file is a memfd of exactly `brought_bytes`, with the seals `SHRINK`, `GROW` and `FUTURE_WRITE`, open for reading and writing,
//! and none that is in use here already. One may be brought for each offer. Where `brought_bytes` is 0 (a daemon that is older, or
//! that has no such memory) nothing is to be brought: an older daemon would hang up. Neither side says anything new to one that does
//! not know it, and so the version stays.
//!
//! A *mapping* is the name of a memory file: 0 is the shared file, the others are memory that a client writes. None is used twice,
//! also not after a restart. The `segment` of an extent or a lease on the ring is such a name.
//!
//! A socket that ends without `Leave` says nothing about the process: what it holds it holds until its pidfd proves it dead.

use std::io;
use std::path::{Path, PathBuf};

use crate::convert::FieldError;
use crate::ring::RING_ABI;

/// Bytes of a message.
pub const MESSAGE_BYTES: usize = 256;

/// Most bytes of a refusal's text.
pub const TEXT_BYTES_MAX: usize = MESSAGE_BYTES - BODY - 4;

/// Name of the file that only the daemon writes.
pub const SHARED_MAPPING: u32 = 0;

/// What is added to the name of the gRPC socket.
pub const SOCKET_SUFFIX: &str = ".door";

/// The local door's socket: beside the gRPC socket.
pub fn door_path(socket: &Path) -> PathBuf {
    let mut path = socket.as_os_str().to_owned();
    path.push(SOCKET_SUFFIX);
    path.into()
}

const MAGIC: u64 = u64::from_le_bytes(*b"TNDRDOOR");
const BODY: usize = 16;
const FLAG: u32 = 1;

/// What a client says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ToDaemon {
    /// This process is that attachment. Comes with its pidfd.
    Open {
        /// As the daemon named it over gRPC.
        attachment: u64,
        /// The attachment under which it holds slots from before a restart; 0: it holds none.
        former: u64,
    },
    /// Another member's memory, to read; or its own, which it has mapped, to hear whether it is used still.
    Fetch(u32),
    /// Its own memory is mapped for writing.
    Mapped(u32),
    /// It cannot be mapped.
    Unmappable(u32),
    /// It holds nothing any more.
    Leave,
    /// Instead of `Mapped`: memory of its own, mapped for writing. Comes with the file.
    Bring(u32),
}

/// What the daemon says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ToClient {
    /// Comes with ring, doorbell (the client signals it), bell (the client listens) and the shared file.
    Opened {
        /// Length of the shared file.
        shared_bytes: u64,
        /// The shared file could be changed by this client: every lease is to be verified.
        verify: bool,
        /// Length of a file that this client may bring; 0: it may not.
        brought_bytes: u64,
    },
    /// Why not, and the cure.
    Refused(String),
    /// Comes with a file to be mapped as a whole.
    Map {
        /// Its name.
        mapping: u32,
        /// Its length.
        bytes: u64,
        /// For writing, and `Mapped` or `Unmappable` is to be said. Else for reading.
        writable: bool,
    },
    /// No slot of it will be granted any more.
    Forget(u32),
    /// The file that was brought is the mapping.
    Taken(u32),
    /// It is not: the one that was offered is.
    NotTaken {
        /// For which offer.
        mapping: u32,
        /// Why not, and the cure.
        why: String,
    },
}

/// A message, as bytes.
pub type Message = [u8; MESSAGE_BYTES];

impl ToDaemon {
    /// Its bytes.
    pub fn encode(self) -> Message {
        match self {
            Self::Open { attachment, former } => message(1, &[&attachment.to_le_bytes(), &former.to_le_bytes()]),
            Self::Fetch(mapping) => message(2, &[&mapping.to_le_bytes()]),
            Self::Mapped(mapping) => message(3, &[&mapping.to_le_bytes()]),
            Self::Unmappable(mapping) => message(4, &[&mapping.to_le_bytes()]),
            Self::Leave => message(5, &[]),
            Self::Bring(mapping) => message(6, &[&mapping.to_le_bytes()]),
        }
    }

    /// From its bytes; the reason, with the cure, if it is none.
    pub fn decode(bytes: &Message) -> Result<Self, FieldError> {
        let mapping = || u32_at(bytes, BODY);
        Ok(match kind(bytes)? {
            1 => Self::Open { attachment: u64_at(bytes, BODY), former: u64_at(bytes, BODY + 8) },
            2 => Self::Fetch(mapping()),
            3 => Self::Mapped(mapping()),
            4 => Self::Unmappable(mapping()),
            5 => Self::Leave,
            6 => Self::Bring(mapping()),
            kind => return Err(unknown("kind", kind)),
        })
    }
}

impl ToClient {
    /// Its bytes; a text that is too long is cut.
    pub fn encode(&self) -> Message {
        match self {
            Self::Opened { shared_bytes, verify, brought_bytes } => {
                let flags = u32::from(*verify).to_le_bytes();
                message(17, &[&shared_bytes.to_le_bytes(), &flags, &brought_bytes.to_le_bytes()])
            }
            Self::Refused(text) => with_text(18, &[], text),
            Self::Map { mapping, bytes, writable } => {
                message(19, &[&bytes.to_le_bytes(), &mapping.to_le_bytes(), &u32::from(*writable).to_le_bytes()])
            }
            Self::Forget(mapping) => message(20, &[&mapping.to_le_bytes()]),
            Self::Taken(mapping) => message(21, &[&mapping.to_le_bytes()]),
            Self::NotTaken { mapping, why } => with_text(22, &mapping.to_le_bytes(), why),
        }
    }

    /// From its bytes; the reason, with the cure, if it is none.
    pub fn decode(bytes: &Message) -> Result<Self, FieldError> {
        Ok(match kind(bytes)? {
            17 => Self::Opened {
                shared_bytes: u64_at(bytes, BODY),
                verify: u32_at(bytes, BODY + 8) & FLAG != 0,
                brought_bytes: u64_at(bytes, BODY + 12),
            },
            18 => Self::Refused(text_at(bytes, BODY)?),
            19 => Self::Map {
                bytes: u64_at(bytes, BODY),
                mapping: u32_at(bytes, BODY + 8),
                writable: u32_at(bytes, BODY + 12) & FLAG != 0,
            },
            20 => Self::Forget(u32_at(bytes, BODY)),
            21 => Self::Taken(u32_at(bytes, BODY)),
            22 => Self::NotTaken { mapping: u32_at(bytes, BODY), why: text_at(bytes, BODY + 4)? },
            kind => return Err(unknown("kind", kind)),
        })
    }
}

/// A field of a message as the error of a socket.
pub fn invalid(error: FieldError) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}

fn message(kind: u32, fields: &[&[u8]]) -> Message {
    let mut bytes = [0; MESSAGE_BYTES];
    bytes[..8].copy_from_slice(&MAGIC.to_le_bytes());
    bytes[8..12].copy_from_slice(&kind.to_le_bytes());
    bytes[12..16].copy_from_slice(&RING_ABI.to_le_bytes());
    let mut at = BODY;
    for field in fields {
        bytes[at..at + field.len()].copy_from_slice(field);
        at += field.len();
    }
    bytes
}

/// A message that ends with a text, as long as there is room for it.
fn with_text(kind: u32, before: &[u8], text: &str) -> Message {
    let room = TEXT_BYTES_MAX - before.len();
    let cut = (0..=text.len().min(room)).rev().find(|at| text.is_char_boundary(*at)).unwrap_or(0);
    message(kind, &[before, &(cut as u32).to_le_bytes(), &text.as_bytes()[..cut]])
}

/// A text whose length stands there.
fn text_at(bytes: &Message, at: usize) -> Result<String, FieldError> {
    let (length, start) = (u32_at(bytes, at) as usize, at + 4);
    crate::convert::length("text", length, 0, MESSAGE_BYTES - start)?;
    let text = str::from_utf8(&bytes[start..start + length]);
    let text = text.map_err(|error| FieldError::Text { field: "text", at: error.valid_up_to() })?;
    Ok(text.to_owned())
}

/// The kind of a message of this version.
fn kind(bytes: &Message) -> Result<u32, FieldError> {
    let magic = u64_at(bytes, 0);
    if magic != MAGIC {
        return Err(unknown("magic", magic as u32));
    }
    match u32_at(bytes, 12) {
        RING_ABI => Ok(u32_at(bytes, 8)),
        version => Err(FieldError::Range {
            field: "version of the local door (bring the older of client and daemon up to date)",
            value: version.into(),
            min: RING_ABI.into(),
            max: RING_ABI.into(),
        }),
    }
}

fn unknown(field: &'static str, value: u32) -> FieldError {
    FieldError::Unknown { field, value: value as i32 }
}

fn u32_at(bytes: &Message, at: usize) -> u32 {
    u32::from_le_bytes(std::array::from_fn(|i| bytes[at + i]))
}

fn u64_at(bytes: &Message, at: usize) -> u64 {
    u64::from_le_bytes(std::array::from_fn(|i| bytes[at + i]))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn what_a_client_says_is_heard(attachment: u64, former: u64, mapping: u32) {
            for said in [
                ToDaemon::Open { attachment, former },
                ToDaemon::Fetch(mapping),
                ToDaemon::Mapped(mapping),
                ToDaemon::Unmappable(mapping),
                ToDaemon::Leave,
                ToDaemon::Bring(mapping),
            ] {
                prop_assert_eq!(ToDaemon::decode(&said.encode()), Ok(said));
                prop_assert!(ToClient::decode(&said.encode()).is_err());
            }
        }

        #[test]
        fn what_the_daemon_says_is_heard(bytes: u64, mapping: u32, yes: bool, text in "\\PC{0,50}") {
            for said in [
                ToClient::Opened { shared_bytes: bytes, verify: yes, brought_bytes: bytes / 3 },
                ToClient::Refused(text.clone()),
                ToClient::Map { mapping, bytes, writable: yes },
                ToClient::Forget(mapping),
                ToClient::Taken(mapping),
                ToClient::NotTaken { mapping, why: text.clone() },
            ] {
                prop_assert_eq!(ToClient::decode(&said.encode()), Ok(said.clone()));
                prop_assert!(ToDaemon::decode(&said.encode()).is_err());
            }
        }

        #[test]
        fn no_bytes_break_the_decoder(bytes in proptest::collection::vec(any::<u8>(), MESSAGE_BYTES), kind in 0u32..24) {
            let mut message: Message = bytes.try_into().unwrap();
            let _ = (ToDaemon::decode(&message), ToClient::decode(&message));
            message[..8].copy_from_slice(&MAGIC.to_le_bytes());
            message[8..12].copy_from_slice(&kind.to_le_bytes());
            message[12..16].copy_from_slice(&RING_ABI.to_le_bytes());
            let _ = (ToDaemon::decode(&message), ToClient::decode(&message));
        }
    }

    #[test]
    fn another_version_is_named() {
        let mut message = ToDaemon::Leave.encode();
        message[12] += 1;
        let error = ToDaemon::decode(&message).unwrap_err().to_string();
        assert!(error.contains("version of the local door") && error.contains('2'), "{error}");
    }

    #[test]
    fn a_long_text_is_cut_between_characters() {
        let said = ToClient::Refused("ä".repeat(MESSAGE_BYTES));
        let Ok(ToClient::Refused(text)) = ToClient::decode(&said.encode()) else { panic!("a refusal") };
        assert_eq!(text, "ä".repeat(TEXT_BYTES_MAX / 2));
        let said = ToClient::NotTaken { mapping: u32::MAX, why: "ä".repeat(MESSAGE_BYTES) };
        let why = "ä".repeat(TEXT_BYTES_MAX / 2 - 2);
        assert_eq!(ToClient::decode(&said.encode()), Ok(ToClient::NotTaken { mapping: u32::MAX, why }));
    }
}
