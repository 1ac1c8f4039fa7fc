//! How a process gets its ring: the greeting on the socket beside that of gRPC.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use tender_proto::descriptors::{self, EventFd, Process};
use tender_proto::door::{CONFIRMS_PER_ENTRY_MAX, Held, Reply, Request};
use tender_proto::greeting::{self, MESSAGE_BYTES, SHARED_MAPPING, ToClient, ToDaemon};
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
use super::memory::Brought;
use crate::deadline;

/// With `Opened`: ring, doorbell, bell, shared file.
const DESCRIPTORS: usize = 4;

/// What outlives a connection: books, and what was mapped, for when the daemon was started again.
#[derive(Debug, Default)]
pub(crate) struct Estate {
    pub(crate) debts: Arc<Debts>,
    pub(crate) brought: Arc<Brought>,
    former: Mutex<Option<Former>>,
}

/// The connection before.
#[derive(Debug)]
struct Former {
    attachment: u64,
    /// Which file shared memory was. It stays mapped here, so that no other file gets its number.
    file: (u64, u64),
    mappings: Mappings,
}

/// Opens the door beside `socket` for an attachment that was made over gRPC, and confirms what is held from before. An error says why
/// everything goes over gRPC instead.
pub(super) async fn open(socket: &Path, attachment: u64, estate: &Arc<Estate>) -> io::Result<Connection> {
    let until = Instant::now() + deadline::DOOR;
    let connecting = timeout(deadline::DOOR, UnixStream::connect(greeting::door_path(socket)));
    let socket = connecting.await.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??.into_std()?;
    let estate = Arc::clone(estate);
    let greeting = spawn_blocking(move || greet(socket, attachment, &estate, until));
    let (connection, held) = greeting.await.map_err(io::Error::other)??;
    if let Some(held) = held {
        confirm(&connection, &held).await?;
    }
    Ok(connection)
}

/// Whether somebody listens beside `socket`.
pub(super) async fn is_there(socket: &Path) -> bool {
    let connecting = timeout(deadline::DOOR, UnixStream::connect(greeting::door_path(socket)));
    connecting.await.is_ok_and(|connected| connected.is_ok())
}

/// Says what is held. What the daemon does not know any more is in the books no more. Who fills such a slot finds out at the commit; who
/// reads one can do so no longer than until somebody else gets the slot, and is told by the log alone.
async fn confirm(connection: &Connection, held: &[Held]) -> io::Result<()> {
    // What is not named is given back with the last, which names nothing.
    for piece in held.chunks(CONFIRMS_PER_ENTRY_MAX).chain([&[][..]]) {
        let reply = connection.calls().ask(&Request::Confirm(piece.into()), deadline::DOOR).await;
        let Ok(Reply::Confirmed(confirmed)) = reply else {
            return Err(io::Error::other("the daemon does not confirm what is held"));
        };
        let lost: Vec<_> =
            piece.iter().zip(confirmed.iter()).filter(|(_, is_held)| !is_held).map(|(held, _)| held.hold).collect();
        if !lost.is_empty() {
            let lost_count = lost.len();
            tracing::warn!(
                lost_count,
                "what was leased or reserved before the daemon was started again is not any more"
            );
            connection.debts().end_held(connection.calls().origin(), lost);
        }
    }
    Ok(())
}

/// The connection, and what is to be confirmed if there was one before.
fn greet(
    socket: std::os::unix::net::UnixStream,
    attachment: u64,
    estate: &Estate,
    until: Instant,
) -> io::Result<(Connection, Option<Vec<Held>>)> {
    let mut before = estate.former.lock().unwrap_or_else(PoisonError::into_inner);
    let former = before.as_ref().map_or(0, |former| former.attachment);
    let open = ToDaemon::Open { attachment, former }.encode();
    descriptors::send(socket.as_fd(), &open, &[Process::open_self()?.as_fd()], until)?;
    let mut message = [0; MESSAGE_BYTES];
    let came = descriptors::receive(socket.as_fd(), &mut message, DESCRIPTORS, until)?;
    let (shared_bytes, verify, brought_bytes) = match ToClient::decode(&message).map_err(greeting::invalid)? {
        ToClient::Opened { shared_bytes, verify, brought_bytes } => (shared_bytes, verify, brought_bytes),
        ToClient::Refused(why) => return Err(io::Error::new(io::ErrorKind::PermissionDenied, why)),
        _ => return Err(invalid("no greeting came first")),
    };
    let came = <[OwnedFd; DESCRIPTORS]>::try_from(came);
    let [ring, doorbell, bell, shared] = came.map_err(|_| invalid("descriptors of the greeting are missing"))?;
    let ring = ClientRing::open(RingMemory::map(ring.as_fd())?).map_err(invalid)?;
    let mappings = Mappings::default();
    mappings.came(SHARED_MAPPING, Arc::new(Mapping::shared(&shared, shared_bytes)?));
    let stat = rustix::fs::fstat(&shared)?;
    let file = (stat.st_dev, stat.st_ino);
    let wake = Arc::new(EventFd::new()?);
    let debts = Arc::clone(&estate.debts);
    let brought = Arc::clone(&estate.brought);
    let (held, own) = match &*before {
        Some(former) if former.file == file => {
            let mut own = mappings.inherit(&former.mappings);
            own.extend(brought.begin());
            (Some(debts.begin(&wake)), own)
        }
        // Its host memory is another: names of former memory mean nothing there.
        other => {
            if let Some(former) = other {
                former.mappings.end_writing();
            }
            debts.begin_anew(&wake);
            brought.begin_anew();
            (None, Vec::new())
        }
    };
    let calls = Calls::new(attachment, ring, EventFd::from_fd(doorbell)?, Arc::clone(&wake), Arc::clone(&debts));
    let connection = Connection::start(Inner {
        calls,
        debts,
        mappings,
        brought,
        brought_bytes,
        verify,
        socket,
        bell,
        wake,
        sending: Mutex::new(()),
        is_leaving: AtomicBool::new(false),
        has_left: AtomicBool::new(false),
        over: watch::Sender::new(false),
    })?;
    connection.ask_after(own);
    *before = Some(Former { attachment, file, mappings: connection.mappings().share() });
    Ok((connection, held))
}

fn invalid(why: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why)
}
