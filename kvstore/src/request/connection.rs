//! One connection to the local door: messages in and out, without ever waiting.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Instant;

use tender_proto::descriptors::{try_receive_open, try_send};
use tender_proto::greeting::{self, MESSAGE_BYTES, Message, ToClient, ToDaemon};

use super::closing::{Closing, Foreign};
use crate::names::AttachmentId;

/// Descriptors that one message of a client may bring.
const DESCRIPTORS_MAX: usize = 1;

/// How far a connection is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// It has to say who it is until then.
    Greeting(Instant),
    /// The core is asked.
    Joining,
    /// It is that process.
    Open(AttachmentId),
}

/// A connection.
#[derive(Debug)]
pub struct Connection {
    socket: OwnedFd,
    state: State,
    /// What came of a message so far, and with it.
    came: Message,
    came_bytes: usize,
    descriptors: Vec<Foreign>,
    closing: Closing,
}

/// What was heard.
#[derive(Debug)]
pub enum Heard {
    /// No whole message yet.
    Nothing,
    /// A message, and what came with it.
    Said(ToDaemon, Vec<Foreign>),
    /// The other side has hung up.
    End,
}

impl Connection {
    /// A connection that must say who it is until then.
    pub fn new(socket: OwnedFd, until: Instant, closing: Closing) -> Self {
        let state = State::Greeting(until);
        Self { socket, state, came: [0; MESSAGE_BYTES], came_bytes: 0, descriptors: Vec::new(), closing }
    }

    /// To be listened to.
    pub fn socket(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Who it is, once the core has let it in.
    pub fn attachment(&self) -> Option<AttachmentId> {
        match self.state {
            State::Open(attachment) => Some(attachment),
            State::Greeting(_) | State::Joining => None,
        }
    }

    /// It has said who it is; false if it had before.
    pub fn begin_joining(&mut self) -> bool {
        let is_first = matches!(self.state, State::Greeting(_));
        if is_first {
            self.state = State::Joining;
        }
        is_first
    }

    /// The core has let it in.
    pub fn open(&mut self, attachment: AttachmentId) {
        self.state = State::Open(attachment);
    }

    /// Whether it should have said who it is by now.
    pub fn is_late(&self, now: Instant) -> bool {
        matches!(self.state, State::Greeting(until) if until <= now)
    }

    /// The next message, if it is there. An error is the end of the connection.
    pub fn hear(&mut self) -> io::Result<Heard> {
        let mut came = Vec::new();
        let has_room = self.closing.has_room();
        let rest = &mut self.came[self.came_bytes..];
        let received = try_receive_open(self.socket.as_fd(), rest, has_room.then_some(&mut came));
        // Each has its place before anything is dropped.
        let came: Vec<Foreign> = came.into_iter().map(|descriptor| self.closing.take(descriptor)).collect();
        match received {
            Ok(0) => return Ok(Heard::End),
            Ok(bytes) => {
                self.came_bytes += bytes;
                self.descriptors.extend(came);
                self.descriptors.truncate(DESCRIPTORS_MAX);
            }
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {
                return Ok(Heard::Nothing);
            }
            Err(error) if error.kind() == io::ErrorKind::InvalidData && !has_room => {
                let why = "descriptors that clients sent wait to be closed, and no more are taken: use gRPC meanwhile";
                return Err(io::Error::new(error.kind(), why));
            }
            Err(error) => return Err(error),
        }
        if self.came_bytes < MESSAGE_BYTES {
            return Ok(Heard::Nothing);
        }
        self.came_bytes = 0;
        let said = ToDaemon::decode(&self.came).map_err(greeting::invalid)?;
        Ok(Heard::Said(said, std::mem::take(&mut self.descriptors)))
    }

    /// Says something. A socket holds hundreds of messages: who leaves no room for one more is an error.
    pub fn say(&mut self, said: &ToClient, descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
        let sent = try_send(self.socket.as_fd(), &said.encode(), descriptors)?;
        if sent < MESSAGE_BYTES {
            return Err(io::Error::new(
                io::ErrorKind::WouldBlock,
                "it took a part of a message: read what is sent to it",
            ));
        }
        Ok(())
    }
}
