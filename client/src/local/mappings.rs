//! The memory files that are mapped here, by their names; and who waits for one that a lease named before it was known.

use std::collections::hash_map::Entry;
use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::oneshot;

use super::mapping::Mapping;

/// Mappings of one connection.
#[derive(Debug, Default)]
pub(super) struct Mappings(Arc<Mutex<Table>>);

#[derive(Debug, Default)]
struct Table {
    known: HashMap<u32, Arc<Mapping>>,
    /// Asked for, with who waits.
    sought: HashMap<u32, Vec<oneshot::Sender<Arc<Mapping>>>>,
    /// This process's own, whose pages are being made.
    coming: HashSet<u32>,
    is_over: bool,
}

/// What there is under a name.
pub(super) enum Found {
    Here(Arc<Mapping>),
    /// It will come, or the sender is dropped. `is_first`: nobody has asked the daemon yet.
    Awaited {
        came: oneshot::Receiver<Arc<Mapping>>,
        is_first: bool,
    },
}

impl Mappings {
    /// A mapping that is here.
    pub(super) fn known(&self, mapping: u32) -> Option<Arc<Mapping>> {
        self.lock().known.get(&mapping).cloned()
    }

    /// A mapping, or the way to hear of it.
    pub(super) fn find(&self, mapping: u32) -> Found {
        let mut table = self.lock();
        if let Some(known) = table.known.get(&mapping) {
            return Found::Here(Arc::clone(known));
        }
        let (sender, came) = oneshot::channel();
        if table.is_over {
            return Found::Awaited { came, is_first: false };
        }
        let sought = table.sought.entry(mapping);
        let is_first = matches!(sought, Entry::Vacant(_));
        let seekers = sought.or_default();
        // Who gave up waiting makes room.
        seekers.retain(|seeker| !seeker.is_closed());
        seekers.push(sender);
        Found::Awaited { came, is_first }
    }

    /// The same table once more.
    pub(super) fn share(&self) -> Self {
        Self(Arc::clone(&self.0))
    }

    /// Takes over what this process writes of what a former connection to the same memory has mapped; the names. What others write is
    /// fetched again when a lease lies there: nobody has said meanwhile whether it is used still.
    pub(super) fn inherit(&self, former: &Self) -> Vec<u32> {
        let own = former.end_writing();
        let mut table = self.lock();
        let names = own.keys().copied().collect();
        for (mapping, memory) in own {
            table.known.entry(mapping).or_insert(memory);
        }
        names
    }

    /// Forgets what this process writes; what it was. Nobody has that mapped then but who uses it.
    pub(super) fn end_writing(&self) -> HashMap<u32, Arc<Mapping>> {
        self.lock().known.extract_if(|_, memory| memory.is_writable()).collect()
    }

    /// A file is mapped.
    pub(super) fn came(&self, mapping: u32, memory: Arc<Mapping>) {
        let mut table = self.lock();
        for seeker in table.sought.remove(&mapping).unwrap_or_default() {
            let _unheard = seeker.send(Arc::clone(&memory));
        }
        if !table.is_over {
            table.known.insert(mapping, memory);
        }
    }

    /// The pages of a file are about to be made.
    pub(super) fn begin(&self, mapping: u32) {
        self.lock().coming.insert(mapping);
    }

    /// They are made, or will not be; whether the daemon still means to use it.
    pub(super) fn made(&self, mapping: u32, memory: Option<Mapping>) -> bool {
        let is_wanted = self.lock().coming.remove(&mapping);
        if let (true, Some(memory)) = (is_wanted, memory) {
            self.came(mapping, Arc::new(memory));
        }
        is_wanted
    }

    /// Nothing will be granted there any more, or there is no such file. Who uses it keeps it until then.
    pub(super) fn forget(&self, mapping: u32) {
        let mut table = self.lock();
        table.sought.remove(&mapping);
        table.coming.remove(&mapping);
        let forgotten = table.known.remove(&mapping);
        drop(table);
        // Unmapping takes milliseconds per GiB: not under the lock.
        drop(forgotten);
    }

    /// Nothing will come any more.
    pub(super) fn end(&self) {
        let mut table = self.lock();
        table.is_over = true;
        table.sought.clear();
        table.coming.clear();
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
