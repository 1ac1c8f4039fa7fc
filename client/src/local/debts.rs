//! What is held, and what is to be given back: leases that nobody reads any more, reservations that nobody will fill.
//!
//! These books outlive a connection. A daemon that was started again keeps what its clients held until they say so (`Confirm`): what is
//! held here is named, and what was still to be given back is not, which gives it back.
//!
//! Whoever lets go only notes it here, which never waits: views are dropped wherever the caller happens to drop them. The next request
//! takes the list along, or the connection's thread. While requests follow each other (the ring is *warm*) nobody wakes that thread, which
//! costs a system call: it looks by itself until the ring is cold. So what is dropped together goes together, and a get makes no call.

use std::collections::HashMap;
use std::mem;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tender_proto::descriptors::EventFd;
use tender_proto::door::{self, HOLDS_PER_ENTRY_MAX, HoldId, HoldKind, Request};

use crate::failure::Failure;

/// The books of one client. Without a connection there is nobody to give anything back to.
#[derive(Debug, Default)]
pub(crate) struct Debts {
    owed: Mutex<Owed>,
}

#[derive(Debug, Default)]
struct Owed {
    leases: Vec<HoldId>,
    reservations: Vec<HoldId>,
    held: HashMap<HoldId, Place>,
    life: Life,
    /// Of the connection: signalled when there is something to give back.
    wake: Option<Arc<EventFd>>,
    /// Requests follow each other: the thread looks at this moment again.
    warm_until: Option<Instant>,
    /// Somebody waits until nothing is held.
    is_awaited: bool,
}

/// Where a name comes from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Life {
    /// Counts the daemons' host memories: a name of one means nothing, or something else, in the next.
    memory: u64,
    /// Counts the connections: what one granted that was not in the books when the next began was not confirmed, and is nobody's.
    connection: u64,
}

/// How long after a request another one is taken to come.
const WARM: Duration = Duration::from_millis(20);

/// Where what is held lies.
#[derive(Clone, Copy, Debug)]
struct Place {
    kind: HoldKind,
    segment: u32,
    offset_bytes: u64,
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
    life: Life,
    debts: Arc<Debts>,
}

impl Debts {
    /// A connection begins; `wake` is signalled when there is something to give back. What is held from before, to be confirmed.
    pub(super) fn begin(&self, wake: &Arc<EventFd>) -> Vec<door::Held> {
        let mut owed = self.lock();
        owed.wake = Some(Arc::clone(wake));
        owed.life.connection += 1;
        (owed.leases, owed.reservations, owed.warm_until) = Default::default();
        let held = owed.held.iter().map(|(&hold, &Place { kind, segment, offset_bytes })| door::Held {
            hold,
            segment,
            offset_bytes,
            kind,
        });
        held.collect()
    }

    /// Another daemon's memory: what is held is nobody's any more but this process's own.
    pub(super) fn begin_anew(&self, wake: &Arc<EventFd>) {
        let mut owed = self.lock();
        let life = Life { memory: owed.life.memory + 1, connection: owed.life.connection + 1 };
        *owed = Owed { wake: Some(Arc::clone(wake)), life, ..Owed::default() };
    }

    /// Where names come from now.
    pub(super) fn life(&self) -> Life {
        self.lock().life
    }

    /// Notes what is to be given back, over whichever connection there is. Never waits.
    pub(super) fn owe(&self, life: Life, kind: HoldKind, holds: impl IntoIterator<Item = HoldId>) {
        let mut owed = self.lock();
        let Some(wake) = owed.wake.clone().filter(|_| owed.life.memory == life.memory) else { return };
        let was_empty = owed.is_empty();
        match kind {
            HoldKind::Lease => owed.leases.extend(holds),
            HoldKind::Reservation => owed.reservations.extend(holds),
        }
        let begins = was_empty && !owed.is_empty() && owed.warm_until.is_none();
        drop(owed);
        if begins && let Err(error) = wake.signal() {
            tracing::debug!("what is not read any more is given back with the next request: {error}");
        }
    }

    /// A request is made: whether the thread is to be woken, to look by itself from now on. Not that of a connection that another follows.
    pub(super) fn warm_up(&self, life: Life) -> bool {
        let mut owed = self.lock();
        owed.life == life && owed.warm_until.replace(Instant::now() + WARM).is_none()
    }

    /// For the thread: when it is to look again, while the ring is warm.
    pub(super) fn warm_for(&self, life: Life) -> Option<Duration> {
        let mut owed = self.lock();
        if owed.life != life {
            return None;
        }
        let left = owed.warm_until?.saturating_duration_since(Instant::now());
        if left.is_zero() {
            owed.warm_until = None;
        }
        // Once more when it has just become cold: what was let go of meanwhile woke nobody.
        Some(left)
    }

    /// Takes what one request can give back; nothing for a connection that another follows, which nobody may listen to any more.
    pub(super) fn due(&self, life: Life) -> Option<Due> {
        let mut owed = self.lock();
        if owed.life != life {
            return None;
        }
        let Owed { leases, reservations, .. } = &mut *owed;
        let (kind, list) =
            if reservations.is_empty() { (HoldKind::Lease, leases) } else { (HoldKind::Reservation, reservations) };
        let rest = list.split_off(list.len().min(HOLDS_PER_ENTRY_MAX));
        let holds = mem::replace(list, rest);
        (!holds.is_empty()).then_some(Due { kind, holds })
    }

    /// Whether there is nothing for that connection to give back.
    pub(super) fn is_empty(&self, life: Life) -> bool {
        let owed = self.lock();
        owed.life != life || owed.is_empty()
    }

    /// Whether nothing is held; if something is, the thread is woken when that is over.
    pub(super) fn holds_nothing(&self) -> bool {
        let mut owed = self.lock();
        owed.is_awaited = true;
        owed.held.is_empty()
    }

    /// The connection of `wake` is over: nobody is there any more who could take anything, unless another one has begun.
    pub(super) fn end(&self, wake: &Arc<EventFd>) {
        let mut owed = self.lock();
        if owed.wake.as_ref().is_some_and(|current| Arc::ptr_eq(current, wake)) {
            (owed.leases, owed.reservations, owed.wake) = Default::default();
        }
    }

    /// Whether they are in the books now: not if another connection has begun, which has not confirmed them.
    fn take(&self, life: Life, holds: impl IntoIterator<Item = (HoldId, Place)>) -> bool {
        let mut owed = self.lock();
        let is_current = owed.life == life;
        if is_current {
            owed.held.extend(holds);
        }
        is_current
    }

    fn let_go(&self, life: Life, holds: &[HoldId]) {
        let mut owed = self.lock();
        if owed.life.memory != life.memory {
            return;
        }
        for hold in holds {
            owed.held.remove(hold);
        }
        // Somebody may wait until nothing is held.
        let wake = owed.wake.clone().filter(|_| owed.is_awaited && owed.held.is_empty());
        drop(owed);
        if let Some(Err(error)) = wake.map(|wake| wake.signal()) {
            tracing::debug!("the thread of a local door cannot be woken: {error}");
        }
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
    pub(super) fn owe_again(self, debts: &Debts, life: Life) {
        debts.owe(life, self.kind, self.holds);
    }
}

impl Held {
    /// What a connection granted, each hold with its segment and offset. `Gone` if another connection has begun meanwhile: what is not
    /// in the books then is released, or given back here, and is to be asked for anew.
    pub(super) fn new(
        life: Life,
        kind: HoldKind,
        holds: impl IntoIterator<Item = (HoldId, u32, u64)>,
        debts: &Arc<Debts>,
    ) -> Result<Self, Failure> {
        let mut names = Vec::new();
        let places = holds.into_iter().map(|(hold, segment, offset_bytes)| {
            names.push(hold);
            (hold, Place { kind, segment, offset_bytes })
        });
        let is_taken = debts.take(life, places.collect::<Vec<_>>());
        let held = Self { kind, holds: names, life, debts: Arc::clone(debts) };
        is_taken.then_some(held).ok_or(Failure::Gone)
    }

    /// The daemon has ended them: nothing is left to give back.
    pub(super) fn ended(mut self) {
        self.debts.let_go(self.life, &mem::take(&mut self.holds));
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        if !self.holds.is_empty() {
            self.debts.let_go(self.life, &self.holds);
            self.debts.owe(self.life, self.kind, mem::take(&mut self.holds));
        }
    }
}
