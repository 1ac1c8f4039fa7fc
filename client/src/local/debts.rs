//! What is to be given back: leases that nobody reads any more, reservations that nobody will fill.
//!
//! Whoever lets go only notes it here, which never waits: views are dropped wherever the caller happens to drop them. The next request
//! takes the list along, or the connection's thread, which is woken when the list begins. So what is dropped together goes together.

use std::mem;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tender_proto::descriptors::EventFd;
use tender_proto::door::{HOLDS_PER_ENTRY_MAX, HoldId, HoldKind, Request};

/// The list. It ends with the connection: then there is nobody to give anything back to.
#[derive(Debug)]
pub(super) struct Debts {
    owed: Mutex<Owed>,
    wake: Arc<EventFd>,
}

#[derive(Debug, Default)]
struct Owed {
    leases: Vec<HoldId>,
    reservations: Vec<HoldId>,
    is_over: bool,
}

/// What one request gives back.
#[derive(Debug)]
pub(super) struct Due {
    kind: HoldKind,
    holds: Vec<HoldId>,
}

/// Holds of one block, given back when this is dropped.
#[derive(Debug)]
pub(super) struct Held {
    kind: HoldKind,
    holds: Vec<HoldId>,
    debts: Arc<Debts>,
}

impl Debts {
    /// `wake` is signalled when there is something to give back.
    pub(super) fn new(wake: Arc<EventFd>) -> Arc<Self> {
        Arc::new(Self { owed: Mutex::default(), wake })
    }

    /// Notes what is to be given back. Never waits.
    pub(super) fn owe(&self, kind: HoldKind, holds: impl IntoIterator<Item = HoldId>) {
        let mut owed = self.lock();
        if owed.is_over {
            return;
        }
        let was_empty = owed.is_empty();
        match kind {
            HoldKind::Lease => owed.leases.extend(holds),
            HoldKind::Reservation => owed.reservations.extend(holds),
        }
        let begins = was_empty && !owed.is_empty();
        drop(owed);
        if begins && let Err(error) = self.wake.signal() {
            tracing::debug!("what is not read any more is given back with the next request: {error}");
        }
    }

    /// Takes what one request can give back.
    pub(super) fn due(&self) -> Option<Due> {
        let mut owed = self.lock();
        let Owed { leases, reservations, .. } = &mut *owed;
        let (kind, list) =
            if reservations.is_empty() { (HoldKind::Lease, leases) } else { (HoldKind::Reservation, reservations) };
        let rest = list.split_off(list.len().min(HOLDS_PER_ENTRY_MAX));
        let holds = mem::replace(list, rest);
        (!holds.is_empty()).then_some(Due { kind, holds })
    }

    /// Whether there is nothing to give back.
    pub(super) fn is_empty(&self) -> bool {
        self.lock().is_empty()
    }

    /// Nobody is there any more who could take anything.
    pub(super) fn end(&self) {
        *self.lock() = Owed { is_over: true, ..Owed::default() };
    }

    fn lock(&self) -> MutexGuard<'_, Owed> {
        self.owed.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Owed {
    fn is_empty(&self) -> bool {
        self.leases.is_empty() && self.reservations.is_empty()
    }
}

impl Due {
    /// The request that gives it back.
    pub(super) fn request(&self) -> Request<'_> {
        match self.kind {
            HoldKind::Lease => Request::Release((&self.holds[..]).into()),
            HoldKind::Reservation => Request::Abort((&self.holds[..]).into()),
        }
    }

    /// It was not taken: another time.
    pub(super) fn owe_again(self, debts: &Debts) {
        debts.owe(self.kind, self.holds);
    }
}

impl Held {
    pub(super) fn new(kind: HoldKind, holds: Vec<HoldId>, debts: &Arc<Debts>) -> Self {
        Self { kind, holds, debts: Arc::clone(debts) }
    }

    /// The daemon has ended them: nothing is left to give back.
    pub(super) fn ended(mut self) {
        self.holds.clear();
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        if !self.holds.is_empty() {
            self.debts.owe(self.kind, mem::take(&mut self.holds));
        }
    }
}
