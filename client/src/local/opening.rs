//! How a process gets its ring: the greeting on the socket beside that of gRPC.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use tender_proto::descriptors::{self, EventFd, Process};
use tender_proto::greeting::{self, MESSAGE_BYTES, SHARED_MAPPING, SOCKET_SUFFIX, ToClient, ToDaemon};
use tender_proto::ring::{ClientRing, RingMemory};
use tokio::net::UnixStream;
use tokio::sync::watch;
use tokio::task::spawn_blocking;
use tokio::time::timeout;

use super::calls::Calls;
use super::connection::{Connection, Inner};
use super::debts::Debts;
use super::mapping::Mapping;
use super::mappings::Mappings;
use crate::deadline;

/// With `Opened`: ring, doorbell, bell, shared file.
const DESCRIPTORS: usize = 4;

/// Opens the door beside `socket` for an attachment that was made over gRPC. An error says why everything goes over gRPC instead.
pub(super) async fn open(socket: &Path, attachment: u64) -> io::Result<Connection> {
    let until = Instant::now() + deadline::DOOR;
    let connecting = timeout(deadline::DOOR, UnixStream::connect(beside(socket)));
    let socket = connecting.await.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??.into_std()?;
    let greeting = spawn_blocking(move || greet(socket, attachment, until));
    greeting.await.map_err(io::Error::other)?
}

fn beside(socket: &Path) -> PathBuf {
    let mut path = socket.as_os_str().to_owned();
    path.push(SOCKET_SUFFIX);
    path.into()
}

fn greet(socket: std::os::unix::net::UnixStream, attachment: u64, until: Instant) -> io::Result<Connection> {
    let open = ToDaemon::Open { attachment, former: 0 }.encode();
    descriptors::send(socket.as_fd(), &open, &[Process::open_self()?.as_fd()], until)?;
    let mut message = [0; MESSAGE_BYTES];
    let came = descriptors::receive(socket.as_fd(), &mut message, DESCRIPTORS, until)?;
    let (shared_bytes, verify) = match ToClient::decode(&message).map_err(greeting::invalid)? {
        ToClient::Opened { shared_bytes, verify } => (shared_bytes, verify),
        ToClient::Refused(why) => return Err(io::Error::new(io::ErrorKind::PermissionDenied, why)),
        ToClient::Map { .. } | ToClient::Forget(_) => return Err(invalid("no greeting came first")),
    };
    let came = <[OwnedFd; DESCRIPTORS]>::try_from(came);
    let [ring, doorbell, bell, shared] = came.map_err(|_| invalid("descriptors of the greeting are missing"))?;
    let ring = ClientRing::open(RingMemory::map(ring.as_fd())?).map_err(invalid)?;
    let mappings = Mappings::default();
    mappings.came(SHARED_MAPPING, Arc::new(Mapping::shared(&shared, shared_bytes)?));
    let wake = Arc::new(EventFd::new()?);
    let debts = Debts::new(Arc::clone(&wake));
    let calls = Calls::new(attachment, ring, EventFd::from_fd(doorbell)?, Arc::clone(&wake), Arc::clone(&debts));
    Connection::start(Inner {
        calls,
        debts,
        mappings,
        verify,
        socket,
        bell,
        wake,
        sending: Mutex::new(()),
        is_leaving: AtomicBool::new(false),
        over: watch::Sender::new(false),
    })
}

fn invalid(why: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why)
}
