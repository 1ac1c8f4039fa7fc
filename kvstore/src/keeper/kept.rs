//! What the keeper holds.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Instant;

use super::messages::Said;
use crate::config::Config;
use crate::device::shared::{Protection, SharedFile};
use crate::device::table::TableFile;
use crate::limits;
use crate::request::listen::Bound;
use crate::serve::StartError;
use crate::size::Size;
use crate::tier::disk::format::tenant_tag;
use crate::tier::host::records::Geometry;

/// Processes at the local door that are kept: one that comes again is kept under its new name before it is forgotten under the old one.
const MEMBERS_MAX: usize = 2 * limits::LOCALS_MAX;

const _: () =
    assert!(limits::LOCALS_MAX + limits::GREETINGS_MAX <= MEMBERS_MAX, "those that are let in, and those that may be");

/// By tenant, with the tags of their names.
type TenantMemory = Vec<(SharedFile, [u8; 16])>;

/// Sockets, memory, and what workers have deposited.
pub(super) struct Kept {
    sockets: Bound,
    memory: TenantMemory,
    table: TableFile,
    /// By attachment: tenant and pidfd.
    members: BTreeMap<u64, (u32, OwnedFd)>,
    /// By segment: writer, mapping, tenant and file.
    ingest: BTreeMap<u32, (u64, u32, u32, OwnedFd)>,
    next_mapping: u32,
    /// The disk of the last worker that served from this memory; 0 while there was none.
    disk: [u8; 16],
}

impl Kept {
    /// Binds the sockets and makes the memory.
    pub(super) fn new(config: &Config) -> Result<Self, StartError> {
        // The sockets first: they tell a second daemon apart from one whose files are merely still locked.
        let sockets = Bound::bind(config)?;
        let (memory, table) = make_memory(config)?;
        Ok(Self {
            sockets,
            memory,
            table,
            members: BTreeMap::new(),
            ingest: BTreeMap::new(),
            next_mapping: tender_proto::greeting::SHARED_MAPPING + 1,
            disk: [0; 16],
        })
    }

    /// Lets go of all memory, and of whom used it.
    pub(super) fn renew_memory(&mut self, config: &Config) -> Result<(), StartError> {
        self.members.clear();
        self.ingest.clear();
        self.disk = [0; 16];
        (self.memory, self.table) = make_memory(config)?;
        Ok(())
    }

    /// Hands all of it to a worker that just started.
    pub(super) fn hand_over(&self, socket: BorrowedFd<'_>, deadline: Instant) -> io::Result<()> {
        let say = |said: Said, with: &[BorrowedFd<'_>]| said.send(socket, with, deadline);
        let sockets = self.sockets.descriptors();
        say(Said::Sockets { has_tcp: sockets.len() == 3 }, &sockets)?;
        for ((file, tag), tenant) in self.memory.iter().zip(0..) {
            let is_read_only_mount = file.protection() == Protection::ReadOnlyMount;
            say(Said::Memory { tenant, is_read_only_mount, tag: *tag }, &[file.writable(), file.read_only()])?;
        }
        say(Said::Table { bytes: self.table.bytes() }, &[self.table.descriptor()])?;
        for (&attachment, (tenant, pidfd)) in &self.members {
            say(Said::Member { attachment, tenant: *tenant }, &[pidfd.as_fd()])?;
        }
        for (&segment, (writer, mapping, tenant, file)) in &self.ingest {
            let said = Said::Ingest { writer: *writer, segment, mapping: *mapping, tenant: *tenant };
            say(said, &[file.as_fd()])?;
        }
        say(Said::Begin { next_mapping: self.next_mapping, disk: self.disk }, &[])
    }

    /// What a worker says.
    pub(super) fn take(&mut self, said: Said, with: Vec<OwnedFd>) {
        let first = with.into_iter().next();
        match (said, first) {
            (Said::Member { attachment, tenant }, Some(pidfd)) => {
                if self.members.len() < MEMBERS_MAX || self.members.contains_key(&attachment) {
                    self.members.insert(attachment, (tenant, pidfd));
                } else {
                    eprintln!(
                        "tender: {MEMBERS_MAX} processes at the local door are kept, and no more fit: should the daemon crash, one more \
                         loses what it holds; report this, for the daemon lets in {} at most",
                        limits::LOCALS_MAX
                    );
                }
            }
            (Said::Ingest { writer, segment, mapping, tenant }, Some(file)) => {
                self.next_mapping = self.next_mapping.max(mapping.saturating_add(1));
                self.ingest.insert(segment, (writer, mapping, tenant, file));
            }
            (Said::Serving { disk }, _) => self.disk = disk,
            (Said::Gone { attachment }, _) => drop(self.members.remove(&attachment)),
            (Said::Dropped { segment }, _) => drop(self.ingest.remove(&segment)),
            _ => {}
        }
    }
}

/// Of what memory there are records.
pub(crate) fn records_of(config: &Config) -> Geometry {
    Geometry {
        segment_bytes: config.host.segment_bytes,
        shared_count: config.host.segment_count,
        ingest_count: config.ingest_segment_count,
    }
}

fn make_memory(config: &Config) -> Result<(TenantMemory, TableFile), StartError> {
    let error = |source| StartError::Memory { size: Size(config.host.bytes()), source };
    let make = |tag| Ok((SharedFile::create(config.host.bytes())?, tag));
    let files = config.tenants.iter().map(|tenant| make(tenant_tag(&tenant.name)));
    let memory = files.collect::<io::Result<Vec<_>>>().map_err(error)?;
    let table = TableFile::create(records_of(config).table_bytes()).map_err(error)?;
    Ok((memory, table))
}
