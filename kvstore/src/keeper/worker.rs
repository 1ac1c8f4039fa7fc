//! The worker's end: what it is handed at its start, and how it has the keeper keep what must outlive it.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use tender_proto::descriptors::Process;

use super::messages::Said;
use crate::device::ingest::IngestFile;
use crate::device::shared::{Protection, SharedFile};
use crate::device::table::TableFile;
use crate::names::{AttachmentId, TenantId};

/// The keeper does little else than listen.
const PATIENCE: Duration = Duration::from_secs(5);

/// The way to the keeper.
#[derive(Debug)]
pub struct Keeper {
    socket: Mutex<OwnedFd>,
}

/// A process at the local door, from before.
#[derive(Debug)]
pub struct KeptMember {
    /// Its name.
    pub attachment: AttachmentId,
    /// Whose it is.
    pub tenant: TenantId,
    /// To learn of its death.
    pub process: Process,
}

/// Memory that a client writes, from before.
#[derive(Debug)]
pub struct KeptIngest {
    /// The client.
    pub writer: AttachmentId,
    /// Its place in the arena.
    pub segment: u32,
    /// Its name for clients.
    pub mapping: u32,
    /// Whose it is.
    pub tenant: TenantId,
    /// The memory.
    pub file: IngestFile,
}

/// Sockets, bound and listening.
#[derive(Debug)]
pub struct Sockets {
    /// gRPC on a Unix socket.
    pub unix: std::os::unix::net::UnixListener,
    /// The local door.
    pub door: std::os::unix::net::UnixListener,
    /// gRPC on a loopback address.
    pub tcp: Option<std::net::TcpListener>,
}

/// All that a worker is handed.
#[derive(Debug)]
pub struct Handed {
    /// Where to listen.
    pub sockets: Sockets,
    /// Shared memory, by tenant.
    pub memory: Vec<SharedFile>,
    /// Tags of the names of the tenants that it was made for; 0 where the keeper does not say.
    pub memory_tags: Vec<[u8; 16]>,
    /// Records of host memory.
    pub table: TableFile,
    /// Processes from before.
    pub members: Vec<KeptMember>,
    /// Memory of clients from before.
    pub ingest: Vec<KeptIngest>,
    /// The first name of memory that was never used.
    pub next_mapping: u32,
    /// The disk of the last worker that served from this memory; 0 where nobody has said.
    pub last_disk: [u8; 16],
}

impl Keeper {
    /// Takes what the keeper hands over through `socket`. `segment_bytes` is the length of clients' memory.
    pub fn meet(socket: OwnedFd, segment_bytes: u64) -> io::Result<(Self, Handed)> {
        let deadline = Instant::now() + PATIENCE;
        let (mut sockets, mut table) = (None, None);
        let (mut memory, mut memory_tags) = (Vec::new(), Vec::new());
        let (mut members, mut ingest) = (Vec::new(), Vec::new());
        loop {
            let (said, with) = Said::receive(socket.as_fd(), deadline)?;
            let mut with = with.into_iter();
            let mut next = || with.next().ok_or_else(|| missing(said));
            match said {
                Said::Sockets { has_tcp } => {
                    let (unix, door) = (next()?.into(), next()?.into());
                    let tcp = has_tcp.then(next).transpose()?.map(Into::into);
                    sockets = Some(Sockets { unix, door, tcp });
                }
                Said::Memory { is_read_only_mount, tag, .. } => {
                    memory_tags.push(tag);
                    let protection =
                        if is_read_only_mount { Protection::ReadOnlyMount } else { Protection::OtherUserOnly };
                    memory.push(SharedFile::adopt(next()?, next()?, protection)?);
                }
                Said::Table { bytes } => table = Some(TableFile::adopt(next()?, bytes)?),
                Said::Member { attachment, tenant } => members.push(KeptMember {
                    attachment: AttachmentId(attachment),
                    tenant: TenantId(tenant as u16),
                    process: Process::from_fd(next()?)?,
                }),
                Said::Ingest { writer, segment, mapping, tenant } => ingest.push(KeptIngest {
                    writer: AttachmentId(writer),
                    segment,
                    mapping,
                    tenant: TenantId(tenant as u16),
                    file: IngestFile::adopt(next()?, segment_bytes)?,
                }),
                Said::Begin { next_mapping, disk: last_disk } => {
                    let sockets = sockets.ok_or_else(|| missing(said))?;
                    let table = table.ok_or_else(|| missing(said))?;
                    let handed =
                        Handed { sockets, memory, memory_tags, table, members, ingest, next_mapping, last_disk };
                    return Ok((Self { socket: Mutex::new(socket) }, handed));
                }
                other => return Err(io::Error::new(io::ErrorKind::InvalidData, format!("{other:?} at the start"))),
            }
        }
    }

    /// Waits until the keeper wants this worker to retire; an error when the keeper is gone, and with it the reason to live.
    pub fn wait_for_retirement(&self) -> io::Result<()> {
        let socket = self.lock().try_clone()?;
        loop {
            match Said::receive(socket.as_fd(), Instant::now() + PATIENCE) {
                Ok((Said::Retire, _)) => return Ok(()),
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::TimedOut => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// The worker serves, and reads from no disk but this one into host memory; 0 where it cannot say so.
    pub fn serving(&self, disk: [u8; 16]) -> io::Result<()> {
        self.say(Said::Serving { disk }, &[])
    }

    /// An operator wants another worker.
    pub fn replace(&self) -> io::Result<()> {
        self.say(Said::Replace, &[])
    }

    /// Keeps a process: before anything is granted to it.
    pub fn keep_member(&self, attachment: AttachmentId, tenant: TenantId, process: &Process) -> io::Result<()> {
        self.say(Said::Member { attachment: attachment.0, tenant: tenant.0.into() }, &[process.as_fd()])
    }

    /// A process is gone.
    pub fn forget_member(&self, attachment: AttachmentId) -> io::Result<()> {
        self.say(Said::Gone { attachment: attachment.0 }, &[])
    }

    /// Keeps memory that a client writes: before anything in it is granted. Kept anew under another writer, it is that one's.
    pub fn keep_ingest(
        &self,
        writer: AttachmentId,
        segment: u32,
        mapping: u32,
        tenant: TenantId,
        file: &IngestFile,
    ) -> io::Result<()> {
        self.say(Said::Ingest { writer: writer.0, segment, mapping, tenant: tenant.0.into() }, &[file.descriptor()])
    }

    /// That memory is used no more.
    pub fn forget_ingest(&self, segment: u32) -> io::Result<()> {
        self.say(Said::Dropped { segment }, &[])
    }

    fn say(&self, said: Said, with: &[BorrowedFd<'_>]) -> io::Result<()> {
        // Held for the length of one message, so that two do not mix.
        said.send(self.lock().as_fd(), with, Instant::now() + PATIENCE)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, OwnedFd> {
        self.socket.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn missing(said: Said) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("the keeper's {said:?} came without what belongs to it"))
}
