//! Requests under way on one ring: who waits for which answer, who looks for answers, and who sleeps.
//!
//! ```text
//! ask ── a turn ──► submit ──► look for a while (`spin`), for everybody's answers ──► sleep until somebody hands the answer over
//!                     └─ the daemon sleeps: its doorbell        └──────── take ────────┘
//!                                                       the connection's thread, woken by the bell, looks in the same way
//! ```
//! **No answer is slept over.** `Table::looking` counts who looks. Whoever stops looking, and finds nobody else who does, takes what has
//! come and sets the ring's flag (`rest`), all under the lock; from then on the daemon rings, and the thread looks. Case by case:
//!
//! - An answer that comes before the flag is set is found by `prepare_to_sleep`, which looks again after setting it; one that comes after
//!   is rung for. Both are the ring's promise, and `rest` keeps to it by asking in a loop.
//! - A call whose own time for looking is over sleeps although the flag is down, if another one still looks: that one takes its answer
//!   too, or sets the flag at its own end.
//! - Whoever starts to look takes the flag down, so that the daemon need not ring. A ring that was on its way then wakes the thread for
//!   nothing; it sees that somebody looks, and leaves the flag alone.
//! - The thread empties the bell *before* it looks: a ring that comes after its look is still there when it polls again.
//! - A call that gave up, or was dropped, leaves its place in the table: what its answer grants is given back by whoever takes it
//!   ([`Answer`]), also when the answer was handed over but never picked up.
//! - What is to be given back has a frame of its own, so it never waits for the calls that fill the others.

use std::collections::HashMap;
use std::hint;
use std::mem;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tender_proto::descriptors::EventFd;
use tender_proto::door::{Asked, Reply, Request};
use tender_proto::ring::{ClientRing, FRAMES, RingMemory, Submission};
use tokio::sync::oneshot::error::TryRecvError;
use tokio::sync::{Notify, Semaphore, oneshot};
use tokio::time::timeout_at;

use super::answer::Answer;
use super::debts::{Debts, Due, Origin};
use super::spin::Spin;
use crate::deadline;
use crate::failure::Failure;

/// Looks at the ring are so many hints apart: the line that is looked at is the daemon's to write.
const HINTS_PER_LOOK: usize = 16;

/// What the daemon had too much to do for is given back a moment later.
const PAUSE: Duration = Duration::from_millis(10);

/// All requests under way on one ring.
pub(super) struct Calls {
    attachment: u64,
    table: Mutex<Table>,
    /// A frame for each call, but for the one that gives back.
    turns: Semaphore,
    doorbell: EventFd,
    debts: Arc<Debts>,
    origin: Origin,
    /// Wakes the thread, which then asks how long it may sleep.
    wake: Arc<EventFd>,
    /// Told whenever something was given back.
    given_back: Notify,
    spin: Spin,
}

struct Table {
    ring: ClientRing<RingMemory>,
    waiting: HashMap<u64, Waiting>,
    next: u64,
    looking: usize,
    is_giving_back: bool,
    not_before: Option<Instant>,
    closing_since: Option<Instant>,
    is_over: bool,
    /// Submitted since the doorbell was last thought of.
    is_news: bool,
    bytes: Vec<u8>,
}

struct Waiting {
    asked: Asked,
    who: Who,
}

enum Who {
    Call(oneshot::Sender<Result<Answer, Failure>>),
    Debt(Due),
}

impl Calls {
    pub(super) fn new(
        attachment: u64,
        ring: ClientRing<RingMemory>,
        doorbell: EventFd,
        wake: Arc<EventFd>,
        debts: Arc<Debts>,
    ) -> Self {
        let table = Table {
            ring,
            waiting: HashMap::new(),
            next: 0,
            looking: 0,
            is_giving_back: false,
            not_before: None,
            closing_since: None,
            is_over: false,
            is_news: false,
            bytes: Vec::new(),
        };
        let (given_back, spin) = (Notify::new(), Spin::new());
        let turns = Semaphore::new(FRAMES - 1);
        let origin = debts.origin();
        Self { attachment, table: Mutex::new(table), turns, doorbell, wake, debts, origin, given_back, spin }
    }

    /// Where this ring's names come from.
    pub(super) fn origin(&self) -> Origin {
        self.origin
    }

    /// Asks, and waits for the answer until the deadline and a moment more. Only answers to what was asked are returned. Dropped in
    /// between, it leaves nothing behind.
    pub(super) async fn ask(&self, request: &Request<'_>, deadline: Duration) -> Result<Reply, Failure> {
        let start = tokio::time::Instant::now();
        let until = start + deadline + deadline::GRACE;
        let turn = timeout_at(until, self.turns.acquire()).await.map_err(|_| Failure::Deadline)?;
        // Closed when the connection is over.
        let turn = turn.map_err(|_| Failure::Gone)?;
        let budget = self.spin.budget();
        let mut answer = self.submit(request, deadline, !budget.is_zero())?;
        // It comes back with the answer.
        turn.forget();
        let looked = if budget.is_zero() { None } else { self.look(&mut answer, budget) };
        let answered = match looked {
            Some(answered) => Ok(answered),
            None => timeout_at(until, answer).await.map(|answered| answered.unwrap_or(Err(Failure::Gone))),
        };
        self.spin.learn(answered.is_ok().then(|| start.elapsed()));
        answered.unwrap_or(Err(Failure::Deadline)).and_then(Answer::take)
    }

    /// Waits until all that was to be given back has been, or the deadline is over.
    pub(super) async fn settle(&self, deadline: Duration) {
        let until = tokio::time::Instant::now() + deadline;
        loop {
            let mut given_back = std::pin::pin!(self.given_back.notified());
            given_back.as_mut().enable();
            self.attend();
            let is_settled = {
                let mut table = self.lock();
                // Who closes takes nothing more.
                table.is_over || table.ring.is_closing() || (!table.is_giving_back && self.debts.is_empty(self.origin))
            };
            if is_settled || timeout_at(until, given_back).await.is_err() {
                return;
            }
        }
    }

    /// Takes all answers that came and gives back what is owed. For the thread, after whatever woke it.
    pub(super) fn attend(&self) {
        self.with(|table| table.rest(self));
    }

    /// When to attend again at the latest, whatever happens.
    pub(super) fn attend_in(&self) -> Option<Duration> {
        let table = self.lock();
        let pause = table.not_before.map(|at| at.saturating_duration_since(Instant::now()));
        let patience = table.closing_since.filter(|_| !table.waiting.is_empty()).map(closing_left);
        drop(table);
        pause.into_iter().chain(patience).chain(self.debts.warm_for(self.origin)).min()
    }

    /// Whether nothing is under way, and nothing to be given back.
    pub(super) fn is_idle(&self) -> bool {
        let table = self.lock();
        table.is_over || (table.waiting.is_empty() && self.debts.is_empty(self.origin))
    }

    /// The connection is over: who waits is told, after what has come already.
    pub(super) fn end(&self) {
        self.with(|table| {
            table.take(self);
            table.end(self);
        });
    }

    fn submit(
        &self,
        request: &Request<'_>,
        deadline: Duration,
        will_look: bool,
    ) -> Result<oneshot::Receiver<Result<Answer, Failure>>, Failure> {
        let (sender, receiver) = oneshot::channel();
        if self.debts.warm_up(self.origin) {
            self.wake_thread();
        }
        self.with(|table| {
            table.give_back(self);
            table.submit(self.attachment, request, deadline, Who::Call(sender))?;
            if will_look {
                table.looking += 1;
                table.ring.woke();
            } else {
                table.rest(self);
            }
            Ok(receiver)
        })
    }

    /// Looks for an answer, and takes those of others meanwhile.
    fn look(
        &self,
        answer: &mut oneshot::Receiver<Result<Answer, Failure>>,
        budget: Duration,
    ) -> Option<Result<Answer, Failure>> {
        let start = Instant::now();
        let mut found = come(answer);
        while found.is_none() && start.elapsed() < budget {
            // Who has the lock looks as well.
            if let Ok(mut table) = self.table.try_lock() {
                table.take(self);
                self.unlock(table);
            }
            found = come(answer);
            (0..HINTS_PER_LOOK).for_each(|_| hint::spin_loop());
        }
        self.with(|table| {
            table.looking -= 1;
            table.rest(self);
        });
        found.or_else(|| come(answer))
    }

    fn wake_thread(&self) {
        if let Err(error) = self.wake.signal() {
            tracing::debug!("the thread of a local door cannot be woken: {error}");
        }
    }

    fn with<T>(&self, work: impl FnOnce(&mut Table) -> T) -> T {
        let mut table = self.lock();
        let result = work(&mut table);
        self.unlock(table);
        result
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets go of the table, and wakes the daemon if it sleeps over something new.
    fn unlock(&self, mut table: MutexGuard<'_, Table>) {
        let must_ring = mem::take(&mut table.is_news) && table.ring.daemon_sleeps();
        drop(table);
        if must_ring && let Err(error) = self.doorbell.signal() {
            tracing::debug!("the daemon cannot be woken: {error}");
        }
    }
}

impl Table {
    fn submit(&mut self, attachment: u64, request: &Request<'_>, deadline: Duration, who: Who) -> Result<(), Failure> {
        if self.is_over {
            return Err(Failure::Gone);
        }
        let user_data = self.next;
        let (verb, deadline_ms) = (request.verb().number(), deadline::wire_ms(deadline));
        request.encode(&mut self.bytes);
        self.ring.submit(Submission { user_data, verb, deadline_ms, attachment }, &self.bytes).map_err(|error| {
            tracing::debug!("not asked: {error}");
            Failure::Gone
        })?;
        self.next = self.next.wrapping_add(1);
        self.is_news = true;
        self.waiting.insert(user_data, Waiting { asked: request.asked(), who });
        Ok(())
    }

    /// Takes all answers that came, and hands each to who waits for it.
    fn take(&mut self, calls: &Calls) {
        let mut bytes = mem::take(&mut self.bytes);
        while let Some(reaped) = self.ring.reap(&mut bytes) {
            let answer = reaped.map_err(|error| error.to_string()).and_then(|completion| {
                let waiting = self.waiting.remove(&completion.user_data).ok_or("nobody waits for it")?;
                let reply = Reply::decode(waiting.asked, completion.status, &bytes);
                reply.map(|reply| (waiting.who, reply)).map_err(|error| error.to_string())
            });
            match answer {
                Ok((who, reply)) => self.hand_over(calls, who, reply),
                Err(why) => {
                    tracing::warn!("an answer that no daemon gives ({why}); attaching anew");
                    self.end(calls);
                    break;
                }
            }
        }
        self.bytes = bytes;
        self.give_back(calls);
    }

    fn hand_over(&mut self, calls: &Calls, who: Who, reply: Reply) {
        match who {
            Who::Call(sender) => {
                calls.turns.add_permits(1);
                // Nobody may be there any more: then it is dropped here.
                let _unheard = sender.send(Ok(Answer::new(reply, calls.origin, &calls.debts)));
            }
            Who::Debt(due) => {
                self.is_giving_back = false;
                if reply == Reply::Busy {
                    self.not_before = Some(Instant::now() + PAUSE);
                    due.owe_again(&calls.debts, calls.origin);
                    calls.wake_thread();
                }
                calls.given_back.notify_waiters();
            }
        }
    }

    /// One request at a time: what comes up meanwhile goes together with the next.
    fn give_back(&mut self, calls: &Calls) {
        if self.is_giving_back || self.is_over || self.not_before.is_some_and(|at| Instant::now() < at) {
            return;
        }
        self.not_before = None;
        let Some(due) = calls.debts.due(calls.origin) else { return };
        let (asked, mut bytes) = (due.request().asked(), Vec::new());
        due.request().encode(&mut bytes);
        let (user_data, verb) = (self.next, asked.verb.number());
        let submission = Submission { user_data, verb, deadline_ms: 0, attachment: calls.attachment };
        match self.ring.submit(submission, &bytes) {
            Ok(()) => {
                self.next = self.next.wrapping_add(1);
                self.is_news = true;
                self.is_giving_back = true;
                self.waiting.insert(user_data, Waiting { asked, who: Who::Debt(due) });
            }
            // A ring that takes nothing more: what is held ends when the client leaves.
            Err(error) => tracing::debug!("not given back: {error}"),
        }
    }

    /// Leaves nothing that came, and if nobody looks sees to it that the bell is rung for what comes.
    fn rest(&mut self, calls: &Calls) {
        self.take(calls);
        while self.looking == 0 && !self.is_over {
            if self.ring.is_closing() {
                let since = *self.closing_since.get_or_insert_with(|| {
                    calls.wake_thread();
                    Instant::now()
                });
                if closing_left(since).is_zero() {
                    return self.end(calls);
                }
            }
            if self.ring.prepare_to_sleep() {
                return;
            }
            self.take(calls);
        }
    }

    fn end(&mut self, calls: &Calls) {
        self.is_over = true;
        self.is_giving_back = false;
        self.waiting.clear();
        calls.turns.close();
        calls.debts.end(&calls.wake);
        calls.given_back.notify_waiters();
    }
}

/// An answer that was handed over, or the news that none will be.
fn come(answer: &mut oneshot::Receiver<Result<Answer, Failure>>) -> Option<Result<Answer, Failure>> {
    match answer.try_recv() {
        Ok(answered) => Some(answered),
        Err(TryRecvError::Empty) => None,
        Err(TryRecvError::Closed) => Some(Err(Failure::Gone)),
    }
}

/// How long the answers of a ring that takes nothing more are still waited for: it may never have taken the questions.
fn closing_left(since: Instant) -> Duration {
    deadline::GRACE.saturating_sub(since.elapsed())
}
