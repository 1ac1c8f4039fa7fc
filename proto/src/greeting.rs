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
//! from the daemon
//! 17 Opened      u64 shared_bytes, u32 flags (bit 0: verify)                          ring, doorbell (eventfd), bell, shared file
//! 18 Refused     u32 length, text
//! 19 Map         u64 bytes, u32 mapping, u32 flags (bit 0: writable)                  the file
//! 20 Forget      u32 mapping
//! ```
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
pub const TEXT_BYTES_MAX: usize = MESSAGE_BYTES - TEXT;

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
const TEXT: usize = BODY + 4;
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
    /// Another member's memory, to read.
    Fetch(u32),
    /// Its own memory is mapped for writing.
    Mapped(u32),
    /// It cannot be mapped.
    Unmappable(u32),
    /// It holds nothing any more.
    Leave,
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
            kind => return Err(unknown("kind", kind)),
        })
    }
}

impl ToClient {
    /// Its bytes; a text that is too long is cut.
    pub fn encode(&self) -> Message {
        match self {
            Self::Opened { shared_bytes, verify } => {
                message(17, &[&shared_bytes.to_le_bytes(), &u32::from(*verify).to_le_bytes()])
            }
            Self::Refused(text) => {
                let cut = (0..=text.len().min(TEXT_BYTES_MAX)).rev().find(|at| text.is_char_boundary(*at)).unwrap_or(0);
                message(18, &[&(cut as u32).to_le_bytes(), &text.as_bytes()[..cut]])
            }
            Self::Map { mapping, bytes, writable } => {
                message(19, &[&bytes.to_le_bytes(), &mapping.to_le_bytes(), &u32::from(*writable).to_le_bytes()])
            }
            Self::Forget(mapping) => message(20, &[&mapping.to_le_bytes()]),
        }
    }

    /// From its bytes; the reason, with the cure, if it is none.
    pub fn decode(bytes: &Message) -> Result<Self, FieldError> {
        Ok(match kind(bytes)? {
            17 => Self::Opened { shared_bytes: u64_at(bytes, BODY), verify: u32_at(bytes, BODY + 8) & FLAG != 0 },
            18 => {
                let length = u32_at(bytes, BODY) as usize;
                crate::convert::length("text", length, 0, TEXT_BYTES_MAX)?;
                let text = str::from_utf8(&bytes[TEXT..TEXT + length]);
                let text = text.map_err(|error| FieldError::Text { field: "text", at: error.valid_up_to() })?;
                Self::Refused(text.to_owned())
            }
            19 => Self::Map {
                bytes: u64_at(bytes, BODY),
                mapping: u32_at(bytes, BODY + 8),
                writable: u32_at(bytes, BODY + 12) & FLAG != 0,
            },
            20 => Self::Forget(u32_at(bytes, BODY)),
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
            ] {
                prop_assert_eq!(ToDaemon::decode(&said.encode()), Ok(said));
                prop_assert!(ToClient::decode(&said.encode()).is_err());
            }
        }

        #[test]
        fn what_the_daemon_says_is_heard(bytes: u64, mapping: u32, yes: bool, text in "\\PC{0,50}") {
            for said in [
                ToClient::Opened { shared_bytes: bytes, verify: yes },
                ToClient::Refused(text.clone()),
                ToClient::Map { mapping, bytes, writable: yes },
                ToClient::Forget(mapping),
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
    }
}
