//! Memory that the caller brings: made, placed and registered by it, and used by the daemon as memory that this process writes.
//!
//! ```text
//!           bring             the daemon offers memory, and takes this instead
//!   Own ─────────────► Offered ────────────────────────────────────────────────► Used
//!    ▲                    │ there is something wrong with it                       │ its last block has left
//!    │                    └──► Refused: the daemon's own is written instead        │
//!    └─────────────────────────────────────────────────────────────────────────────┘
//! ```
//! What is brought outlives a connection: a daemon whose worker was started again still has it, and is asked so. Views into it, and puts
//! that are filling slots there, may outlive the daemon: it is `Own` only when these are gone too.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::fs::SealFlags;

use super::mapping::Mapping;

/// Files of one client that wait to be offered: with segments of the smallest size 16 GiB, of the largest 1 TiB.
const WAITING_MAX: usize = 1024;

/// Memory of the caller's own, to be brought to a daemon by [`crate::Remote::bring`]: one file, mapped here as a whole. Clones are the
/// same memory.
///
/// What is in it is the caller's business until it is brought, and again when its [state](Self::state) is `Own` or `Refused`. Meanwhile
/// the client that it was brought to decides what is written where, and nobody else writes there: other bytes than were put are a miss
/// for other groups, and are not noticed by the group's own. All of it, not only its blocks, can be read by processes of the tenant.
#[derive(Clone, Debug)]
pub struct OwnMemory(Arc<Own>);

#[derive(Debug)]
struct Own {
    file: OwnedFd,
    bytes: u64,
    mapping: Arc<Mapping>,
    state: Mutex<MemoryState>,
}

/// How far memory is that can be brought.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MemoryState {
    /// The caller's alone: not brought, or its last block has left, and nobody here reads or fills one there any more.
    Own,
    /// Brought: it is used when the daemon next has memory made for this client, if there is nothing wrong with it.
    Offered,
    /// The daemon has taken it: it reads blocks there. After the client has left it does so until it has copied the last of them, and
    /// can tell nobody when. Or the daemon has it no more, but there are views into it still.
    Used,
    /// The daemon does not take it: why, and the cure. The caller's alone.
    Refused(String),
}

/// Why memory is not brought.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BringError {
    /// It was brought before, to this client or to another, and has not come back; or there are views into it still.
    #[error("this memory was brought already: bring it again when its state is `Own` or `Refused`")]
    Brought,
    /// So much of it waits already.
    #[error("{WAITING_MAX} files wait already to be offered to the daemon: bring more when some of them are used")]
    TooMany,
}

impl OwnMemory {
    /// Takes a memfd (`memfd_create` with `MFD_ALLOW_SEALING`, without `MFD_HUGETLB`) of [`crate::Remote::segment_bytes`], maps it for
    /// writing, makes those of its pages that are not there yet (seconds per GiB: not on a thread that others wait for), and seals it:
    /// its size stays, and nobody can map it for writing any more. Mappings that are there stay as they are, and go on writing; so
    /// whoever needs one besides [`start`](Self::start) (other processes of the engine) makes it before.
    ///
    /// Errors: `InvalidInput`, with the cure, for a file that is no such memfd; what the system says when it has no memory.
    pub fn new(file: OwnedFd) -> io::Result<Self> {
        let refuse = |why: &str| Err(io::Error::new(io::ErrorKind::InvalidInput, format!("not to be brought: {why}")));
        let Ok(seals) = rustix::fs::fcntl_get_seals(&file) else {
            return refuse("it is not a memfd; make it with memfd_create and MFD_ALLOW_SEALING");
        };
        if seals.intersects(SealFlags::FUTURE_WRITE | SealFlags::WRITE) {
            return refuse("it is sealed against writing and cannot be mapped any more; bring it before you seal it");
        }
        let bytes = u64::try_from(rustix::fs::fstat(&file)?.st_size).unwrap_or(0);
        if bytes == 0 {
            return refuse("it has no bytes; give it the daemon's segment_bytes with ftruncate");
        }
        let mapping = Arc::new(Mapping::to_write(&file, bytes)?);
        let wanted = SealFlags::SHRINK | SealFlags::GROW | SealFlags::FUTURE_WRITE;
        if rustix::fs::fcntl_add_seals(&file, wanted).is_err() {
            return refuse(
                "it cannot be sealed; make it with MFD_ALLOW_SEALING, without F_SEAL_SEAL, on Linux 5.1 or newer",
            );
        }
        Ok(Self(Arc::new(Own { file, bytes, mapping, state: Mutex::new(MemoryState::Own) })))
    }

    /// Length in bytes.
    pub fn bytes(&self) -> u64 {
        self.0.bytes
    }

    /// Address of the first byte of its mapping, which stays until the last clone and the last view into it are dropped. To be registered
    /// (with a GPU, say): views of blocks that lie in this memory have their [pieces](crate::BlockView::pieces) there.
    pub fn start(&self) -> *mut u8 {
        self.0.mapping.start(0, 0).cast_mut()
    }

    /// How far it is.
    pub fn state(&self) -> MemoryState {
        match self.lock().clone() {
            MemoryState::Own if self.is_mapped_elsewhere() => MemoryState::Used,
            state => state,
        }
    }

    pub(super) fn file(&self) -> BorrowedFd<'_> {
        self.0.file.as_fd()
    }

    pub(super) fn mapping(&self) -> Arc<Mapping> {
        Arc::clone(&self.0.mapping)
    }

    /// Whether somebody else holds the mapping. Once no table of mappings does, these are views and slots, which come from there only.
    fn is_mapped_elsewhere(&self) -> bool {
        Arc::strong_count(&self.0.mapping) > 1
    }

    fn set(&self, state: MemoryState) {
        *self.lock() = state;
    }

    fn lock(&self) -> MutexGuard<'_, MemoryState> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What was brought to one client.
#[derive(Debug, Default)]
pub(crate) struct Brought(Mutex<Table>);

#[derive(Debug, Default)]
struct Table {
    waiting: VecDeque<OwnMemory>,
    /// By mapping.
    lent: HashMap<u32, Lent>,
}

/// Memory under the name of an offer.
#[derive(Debug)]
struct Lent {
    memory: OwnMemory,
    /// What was offered, until the daemon has answered: it is used if this memory is not.
    offered: Option<(OwnedFd, u64)>,
}

impl Drop for Brought {
    fn drop(&mut self) {
        let table = self.0.get_mut().unwrap_or_else(PoisonError::into_inner);
        table.waiting.drain(..).for_each(|memory| memory.set(MemoryState::Own));
        // Nobody will hear what the daemon says of these.
        table.lent.values().for_each(|lent| lent.memory.set(MemoryState::Used));
    }
}

impl Brought {
    /// To be offered, after what was brought before.
    pub(crate) fn add(&self, memory: &OwnMemory) -> Result<(), BringError> {
        let mut table = self.lock();
        if table.waiting.len() >= WAITING_MAX {
            return Err(BringError::TooMany);
        }
        let mut state = memory.lock();
        if matches!(*state, MemoryState::Offered | MemoryState::Used) || memory.is_mapped_elsewhere() {
            return Err(BringError::Brought);
        }
        *state = MemoryState::Offered;
        drop(state);
        table.waiting.push_back(memory.clone());
        Ok(())
    }

    /// What goes in the place of an offer, of `bytes`; the offered file comes back when there is nothing.
    pub(super) fn lend(&self, mapping: u32, file: OwnedFd, bytes: u64) -> Result<OwnMemory, OwnedFd> {
        let mut table = self.lock();
        let Some(memory) = table.waiting.pop_front() else { return Err(file) };
        table.lent.insert(mapping, Lent { memory: memory.clone(), offered: Some((file, bytes)) });
        Ok(memory)
    }

    /// The daemon has that memory; `None` if it was not brought.
    pub(super) fn taken(&self, mapping: u32) -> Option<OwnMemory> {
        let mut table = self.lock();
        let lent = table.lent.get_mut(&mapping)?;
        lent.offered = None;
        lent.memory.set(MemoryState::Used);
        Some(lent.memory.clone())
    }

    /// The daemon does not take it; what was offered instead.
    pub(super) fn not_taken(&self, mapping: u32, why: String) -> Option<(OwnedFd, u64)> {
        let Lent { memory, offered } = self.lock().lent.remove(&mapping)?;
        memory.set(MemoryState::Refused(why));
        offered
    }

    /// The daemon does not use it any more.
    pub(super) fn forget(&self, mapping: u32) {
        if let Some(Lent { memory, .. }) = self.lock().lent.remove(&mapping) {
            memory.set(MemoryState::Own);
        }
    }

    /// Another connection to the same host memory: what the daemon may have, of which it is to be asked.
    pub(super) fn begin(&self) -> Vec<u32> {
        let mut table = self.lock();
        // An offer ends with its connection.
        table.lent.values_mut().for_each(|lent| lent.offered = None);
        table.lent.keys().copied().collect()
    }

    /// Another daemon's memory: what the former one had is nobody's any more but the caller's own. It is in no table of mappings any more.
    pub(super) fn begin_anew(&self) {
        self.lock().lent.drain().for_each(|(_, lent)| lent.memory.set(MemoryState::Own));
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
