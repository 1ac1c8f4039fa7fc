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
            if !self.descriptors.is_empty() {
                // It would keep its place for as long as the rest does not come.
                let why = "send a message that brings a descriptor in one piece";
                return Err(io::Error::new(io::ErrorKind::InvalidData, why));
            }
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

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;
    use std::time::Duration;

    use super::*;
    use crate::limits;

    fn connection() -> (UnixStream, Connection) {
        let (client, socket) = UnixStream::pair().unwrap();
        let until = Instant::now() + Duration::from_secs(60);
        (client, Connection::new(socket.into(), until, Closing::start().unwrap()))
    }

    /// Sends these bytes and a descriptor.
    fn bring(client: &UnixStream, bytes: &[u8]) {
        let descriptor = OwnedFd::from(UnixStream::pair().unwrap().0);
        assert_eq!(try_send(client.as_fd(), bytes, &[descriptor.as_fd()]).unwrap(), bytes.len());
    }

    #[test]
    fn a_message_that_brings_a_descriptor_comes_in_one_piece() {
        let (client, mut connection) = connection();
        let said = ToDaemon::Mapped(7).encode();
        bring(&client, &said);
        assert!(matches!(connection.hear(), Ok(Heard::Said(ToDaemon::Mapped(7), brought)) if brought.len() == 1));
        for (piece, is_last) in [(&said[..1], false), (&said[1..], true)] {
            try_send(client.as_fd(), piece, &[]).unwrap();
            let heard = connection.hear().unwrap();
            assert_eq!(
                matches!(heard, Heard::Said(ToDaemon::Mapped(7), _)),
                is_last,
                "one that brings none may be cut"
            );
        }
        bring(&client, &said[..1]);
        let error = connection.hear().unwrap_err();
        assert!(error.kind() == io::ErrorKind::InvalidData && error.to_string().contains("in one piece"), "{error}");
    }

    #[test]
    fn without_places_for_descriptors_messages_that_bring_none_are_heard() {
        let (client, mut connection) = connection();
        let taken: Vec<Foreign> =
            (0..limits::FOREIGN_MAX).map(|_| connection.closing.take(UnixStream::pair().unwrap().0.into())).collect();
        let said = ToDaemon::Mapped(7).encode();
        try_send(client.as_fd(), &said, &[]).unwrap();
        assert!(matches!(connection.hear(), Ok(Heard::Said(ToDaemon::Mapped(7), brought)) if brought.is_empty()));
        bring(&client, &said);
        let error = connection.hear().unwrap_err();
        assert!(error.kind() == io::ErrorKind::InvalidData && error.to_string().contains("use gRPC"), "{error}");
        drop(taken);
    }
}
