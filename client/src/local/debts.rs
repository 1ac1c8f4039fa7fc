//! What is held, and what is to be given back: leases that nobody reads any more, reservations that nobody will fill.
//!
//! These books outlive a connection. A daemon that was started again keeps what its clients held until they say so (`Confirm`): what is
//! held here is named, and what was still to be given back is not, which gives it back. What it does not confirm is held no more.
//! Nor is what a former connection was granted, and nobody had noted when it was asked what is held: it was not named.
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
    origin: Origin,
    /// Of the connection: signalled when there is something to give back.
    wake: Option<Arc<EventFd>>,
    /// Requests follow each other: the thread looks at this moment again.
    warm_until: Option<Instant>,
    /// Somebody waits until nothing is held.
    is_awaited: bool,
}

/// Where names of holds come from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Origin {
    /// Counts the daemons' host memories: a name of one means nothing, or something else, in the next.
    life: u64,
    /// Counts the connections.
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
    origin: Origin,
    debts: Arc<Debts>,
}

impl Debts {
    /// A connection begins; `wake` is signalled when there is something to give back. What is held from before, to be confirmed.
    pub(super) fn begin(&self, wake: &Arc<EventFd>) -> Vec<door::Held> {
        let mut owed = self.lock();
        owed.wake = Some(Arc::clone(wake));
        owed.origin.connection += 1;
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
        let Origin { life, connection } = owed.origin;
        let origin = Origin { life: life + 1, connection: connection + 1 };
        *owed = Owed { wake: Some(Arc::clone(wake)), origin, ..Owed::default() };
    }

    /// Where names come from now.
    pub(super) fn origin(&self) -> Origin {
        self.lock().origin
    }

    /// Notes what is to be given back, and was never noted as held. Never waits.
    pub(super) fn owe(&self, origin: Origin, kind: HoldKind, holds: impl IntoIterator<Item = HoldId>) {
        let mut owed = self.lock();
        if owed.origin.life == origin.life && owed.owe(kind, holds) {
            wake(owed);
        }
    }

    /// A request is made: whether the thread is to be woken, to look by itself from now on. Not that of a connection that another follows.
    pub(super) fn warm_up(&self, origin: Origin) -> bool {
        let mut owed = self.lock();
        owed.origin == origin && owed.warm_until.replace(Instant::now() + WARM).is_none()
    }

    /// For the thread: when it is to look again, while the ring is warm.
    pub(super) fn warm_for(&self, origin: Origin) -> Option<Duration> {
        let mut owed = self.lock();
        if owed.origin != origin {
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
    pub(super) fn due(&self, origin: Origin) -> Option<Due> {
        let mut owed = self.lock();
        if owed.origin != origin {
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
    pub(super) fn is_empty(&self, origin: Origin) -> bool {
        let owed = self.lock();
        owed.origin != origin || owed.is_empty()
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

    /// Whether they are held now: not if another connection has begun since they were granted.
    fn take(&self, origin: Origin, holds: impl IntoIterator<Item = (HoldId, Place)>) -> bool {
        let mut owed = self.lock();
        let is_current = owed.origin == origin;
        if is_current {
            owed.held.extend(holds);
        }
        is_current
    }

    /// Notes what is held no more: it has ended, or the daemon does not confirm it.
    pub(super) fn end_held(&self, origin: Origin, holds: impl IntoIterator<Item = HoldId>) {
        let mut owed = self.lock();
        if owed.origin.life == origin.life {
            owed.let_go(holds);
            if owed.is_awaited_no_more() {
                wake(owed);
            }
        }
    }

    /// Notes what is held no more and is to be given back: both at once, for who waits until nothing is held leaves then.
    fn give_back(&self, origin: Origin, kind: HoldKind, holds: impl IntoIterator<Item = HoldId>) {
        let mut owed = self.lock();
        if owed.origin.life == origin.life {
            let held = owed.let_go(holds);
            if owed.owe(kind, held) || owed.is_awaited_no_more() {
                wake(owed);
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Owed> {
        self.owed.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Wakes the thread, if there is a connection.
fn wake(owed: MutexGuard<'_, Owed>) {
    let wake = owed.wake.clone();
    drop(owed);
    if let Some(Err(error)) = wake.map(|wake| wake.signal()) {
        tracing::debug!("what is held no more is given back with the next request: {error}");
    }
}

impl Owed {
    /// Whether the thread is to be woken for it. Without a connection there is nobody to give anything back to.
    fn owe(&mut self, kind: HoldKind, holds: impl IntoIterator<Item = HoldId>) -> bool {
        let was_empty = self.is_empty();
        if self.wake.is_some() {
            match kind {
                HoldKind::Lease => self.leases.extend(holds),
                HoldKind::Reservation => self.reservations.extend(holds),
            }
        }
        was_empty && !self.is_empty() && self.warm_until.is_none()
    }

    /// Which of them were held.
    fn let_go(&mut self, holds: impl IntoIterator<Item = HoldId>) -> Vec<HoldId> {
        holds.into_iter().filter(|hold| self.held.remove(hold).is_some()).collect()
    }

    /// Somebody waits until nothing is held, which is now.
    fn is_awaited_no_more(&self) -> bool {
        self.is_awaited && self.held.is_empty()
    }

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
    pub(super) fn owe_again(self, debts: &Debts, origin: Origin) {
        debts.owe(origin, self.kind, self.holds);
    }
}

impl Held {
    /// Holds that were granted there, each with its segment and offset; `None` if another connection has begun since: then they have
    /// ended.
    pub(super) fn new(
        origin: Origin,
        kind: HoldKind,
        holds: impl IntoIterator<Item = (HoldId, u32, u64)>,
        debts: &Arc<Debts>,
    ) -> Option<Self> {
        let mut names = Vec::new();
        let places = holds.into_iter().map(|(hold, segment, offset_bytes)| {
            names.push(hold);
            (hold, Place { kind, segment, offset_bytes })
        });
        let is_held = debts.take(origin, places.collect::<Vec<_>>());
        is_held.then(|| Self { kind, holds: names, origin, debts: Arc::clone(debts) })
    }

    /// Whether all of them are held still, as far as is known here.
    pub(super) fn stands(&self) -> bool {
        let owed = self.debts.lock();
        owed.origin.life == self.origin.life && self.holds.iter().all(|hold| owed.held.contains_key(hold))
    }

    /// Whether they are, in the host memory that names from `origin` are of.
    pub(super) fn stands_in(&self, origin: Origin) -> bool {
        self.origin.life == origin.life && self.stands()
    }

    /// Whether they are in these books.
    pub(super) fn are_in(&self, debts: &Debts) -> bool {
        std::ptr::eq(&*self.debts, debts)
    }

    /// The daemon has ended them: nothing is left to give back.
    pub(super) fn ended(mut self) {
        self.debts.end_held(self.origin, mem::take(&mut self.holds));
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        if !self.holds.is_empty() {
            self.debts.give_back(self.origin, self.kind, mem::take(&mut self.holds));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hold(debts: &Arc<Debts>, origin: Origin, name: u64) -> Option<Held> {
        Held::new(origin, HoldKind::Reservation, [(HoldId(name), 7, 4096)], debts)
    }

    #[test]
    fn what_a_former_connection_granted_and_nobody_had_noted_is_not_held() {
        let (debts, wake) = (Arc::new(Debts::default()), Arc::new(EventFd::new().unwrap()));
        debts.begin_anew(&wake);
        let first = debts.origin();
        let noted = hold(&debts, first, 1).unwrap();
        assert_eq!(debts.begin(&wake).len(), 1);
        assert!(hold(&debts, first, 2).is_none() && noted.stands_in(debts.origin()));
        drop(noted);
        assert!(debts.holds_nothing() && debts.due(debts.origin()).is_some());
        let second = debts.origin();
        debts.begin_anew(&wake);
        assert!(hold(&debts, second, 3).is_none() && debts.holds_nothing());
    }

    #[test]
    fn what_is_not_confirmed_is_neither_held_nor_given_back() {
        let (debts, wake) = (Arc::new(Debts::default()), Arc::new(EventFd::new().unwrap()));
        debts.begin_anew(&wake);
        let held = [1, 2].map(|name| hold(&debts, debts.origin(), name).unwrap());
        debts.begin(&wake);
        debts.end_held(debts.origin(), [HoldId(1)]);
        assert_eq!(held.each_ref().map(Held::stands), [false, true]);
        drop(held);
        let due = debts.due(debts.origin()).unwrap();
        assert_eq!((due.holds, debts.due(debts.origin()).is_none()), (vec![HoldId(2)], true));
    }
}
