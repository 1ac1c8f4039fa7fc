//! The thread of the core, and the way to it. Requests over gRPC come through one bounded queue and are answered through a channel each;
//! a permit per request keeps room in the queue for completions, which may not be lost. Requests of local processes lie in their rings,
//! which this thread polls itself.
//!
//! ```text
//! gRPC, disks, helpers ──► queue ──┐                        ┌──► channel of the request
//!                                  ├─► events ─► core ─► actions ─► rings, bells
//! clients ──► rings (locals.rs) ───┘                        └──► disks, helpers, the door
//!                    nothing there: spin for a while, then sleep (waiting.rs) until the queue or a doorbell wakes
//! ```
//!
//! What a reply grants (leases, reservations) travels with an [`Undo`]: whoever drops the reply, at whatever moment (a client that went
//! away, a task that was cancelled), gives it back.

mod locals;
mod ring;
mod waiting;

use std::collections::{BTreeSet, HashMap};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TryRecvError, TrySendError, sync_channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot, watch};

use crate::clock::Clock;
use crate::device::block::BlockDevice;
use crate::device::memory::Arena;
use crate::limits;
use crate::names::{AttachmentId, By, Hold, RequestId, TenantId};
use crate::pipeline::{Action, Core, Event, RecoveredFile};
use crate::telemetry;
use crate::transfer::disk::Command;
use crate::transfer::promote::{self, Promotion};
use crate::transfer::{Outcome, TransferId};
use crate::verb::{Refusal, RefusalKind, Reply, Request, ReserveOutcome, Verb};

pub use self::locals::Local;
use self::locals::{Locals, Open, Replied, Taken};
pub use self::ring::Member;
pub use self::waiting::{Queue, Sleeper};

/// A reply, and what undoes it.
#[derive(Debug)]
pub struct Answer {
    /// The reply.
    pub reply: Reply,
    /// Gives back what the reply grants, unless disarmed.
    pub undo: Option<Undo>,
}

/// Gives back leases or reservations when it is dropped.
#[derive(Debug)]
#[must_use = "dropping it gives back what was granted"]
pub struct Undo {
    verb: Option<Verb>,
    sender: Queue<Input>,
}

impl Undo {
    fn of(reply: &Reply, sender: &Queue<Input>) -> Option<Self> {
        undo_of(reply).map(|verb| Self { verb: Some(verb), sender: sender.clone() })
    }

    /// Somebody else answers for these from now on.
    pub fn forget(&mut self, ended: &[Hold]) {
        if let Some(Verb::Release(_, holds) | Verb::Abort(_, holds)) = &mut self.verb {
            holds.retain(|hold| !ended.contains(hold));
        }
    }

    /// Nothing is to be given back any more.
    pub fn disarm(mut self) {
        self.verb = None;
    }
}

impl Drop for Undo {
    fn drop(&mut self) {
        if let Some(verb) = self.verb.take() {
            // The queue is emptied by a thread that never waits for whoever drops this, so this wait is short; when the core is gone
            // there is nothing to give back.
            let _ = self.sender.send(Input::Undo(verb));
        }
    }
}

/// What gives back what a reply grants.
fn undo_of(reply: &Reply) -> Option<Verb> {
    let verb = match reply {
        Reply::Acquired(acquired) => {
            let parts = acquired.blocks.iter().flat_map(|block| &block.parts);
            Verb::Release(By::Daemon, parts.map(|part| part.hold).collect())
        }
        Reply::Reserved(outcomes) => {
            let granted = |outcome: &ReserveOutcome| match outcome {
                ReserveOutcome::Granted { hold, .. } => Some(*hold),
                _ => None,
            };
            Verb::Abort(By::Daemon, outcomes.iter().filter_map(granted).collect())
        }
        _ => return None,
    };
    let (Verb::Release(_, holds) | Verb::Abort(_, holds)) = &verb else { return None };
    (!holds.is_empty()).then_some(verb)
}

/// Where a reply goes.
#[derive(Debug)]
pub enum Responder {
    /// A request over gRPC that is answered once.
    Once(oneshot::Sender<Answer>),
    /// One that is answered several times. Its permit is given back with the last answer.
    Many(mpsc::Sender<Reply>, OwnedSemaphorePermit),
    /// A ring.
    Ring(Open),
    /// The door, on behalf of that process, by the number of its connection.
    Join(u64, Box<Local>),
}

/// What the core has the local door do.
#[derive(Debug)]
pub enum DoorCommand {
    /// The core has let the process in that came through this connection, or says why not.
    Joined(u64, Result<TenantId, String>),
    /// Make an ingest segment for that process.
    Make(u32, AttachmentId),
    /// That ingest segment is used no more.
    Forget(u32),
    /// That process broke its ring: it is served no more through the door, and watched until it is dead.
    LetGo(AttachmentId),
    /// That process has left by another way, and holds nothing.
    Left(AttachmentId),
    /// Close.
    Stop,
}

/// What the thread of the core is told.
#[derive(Debug)]
pub enum Input {
    /// A request over gRPC.
    Ask(Request, Responder),
    /// Grants that nobody took.
    Undo(Verb),
    /// A transfer has ended.
    Done(TransferId, Outcome),
    /// A segment is prepared.
    Ready(u32),
    /// The tier files that the core awaits are there.
    DiskJoined(Box<Joined>),
    /// An ingest segment is there, under that name, or could not be made.
    IngestMade(u32, Option<u32>),
    /// A process comes to the local door, through the connection of that number; it may have been another attachment before.
    Join(u64, Option<AttachmentId>, Box<Local>),
    /// A process is dead.
    Gone(AttachmentId),
    /// A process has left the local door.
    Left(AttachmentId),
    /// End.
    Stop,
}

/// The way to the core. Clones are the same way.
#[derive(Clone)]
pub struct CoreHandle {
    sender: Queue<Input>,
    permits: Arc<Semaphore>,
    last_request: Arc<AtomicU64>,
    clock: Clock,
    arena: Arc<Arena>,
    residency: Arc<Vec<watch::Receiver<u64>>>,
}

/// The threads and channels around a core.
pub struct Driver {
    core: Core,
    clock: Clock,
    inputs: Receiver<Input>,
    sleeper: Sleeper,
    sender: Queue<Input>,
    last_request: Arc<AtomicU64>,
    locals: Locals,
    door: Option<Queue<DoorCommand>>,
    /// How long to spin after work of the rings, before sleeping.
    spin: Duration,
    worked: Instant,
    heard: Vec<u64>,
    taken: Vec<Taken>,
    responders: HashMap<RequestId, Responder>,
    disks: Vec<DiskThread>,
    /// Segments that no disk knows of yet, because none is there.
    unregistered: BTreeSet<u32>,
    arena: Arc<Arena>,
    prepare: SyncSender<(u32, TenantId, bool)>,
    promote: SyncSender<Promotion>,
    residency: Vec<watch::Sender<u64>>,
    published: Instant,
}

/// The way to the thread of one file.
pub struct DiskThread {
    commands: SyncSender<Command>,
    wake: Arc<dyn Fn() + Send + Sync>,
    thread: Mutex<Option<std::thread::JoinHandle<()>>>,
}

/// Tier files, opened and read.
#[derive(Default)]
pub struct Found {
    /// One per file.
    pub devices: Vec<Box<dyn BlockDevice>>,
    /// What each held.
    pub recovered: Vec<RecoveredFile>,
    /// Key of the directory pages.
    pub page_key: [u8; 32],
    /// Requests that each file takes at once.
    pub depth: usize,
}

/// Tier files whose threads run.
#[derive(Debug)]
pub struct Joined {
    threads: Vec<DiskThread>,
    recovered: Vec<RecoveredFile>,
    page_key: [u8; 32],
    depth: usize,
}

/// Brings tier files to a core that awaits them.
pub struct Joiner {
    arena: Arc<Arena>,
    sender: Queue<Input>,
}

/// Completions and grants given back that may be queued beside the requests: every transfer of 16 files, and every request once.
const QUEUE: usize = 3 * limits::REQUESTS_MAX;

/// Events taken in one go.
const EVENTS_AT_ONCE: usize = 256;

/// Pause before a segment is tried again that could not be prepared.
const PREPARE_PAUSE: Duration = Duration::from_secs(1);

/// How long the core's thread spins after work of a ring: about what it costs to be woken. Where there is one processor, whoever would
/// give it work needs that one.
fn spin_time() -> Duration {
    match std::thread::available_parallelism() {
        Ok(count) if count.get() > 1 => Duration::from_micros(50),
        _ => Duration::ZERO,
    }
}

impl Driver {
    /// Puts threads around a core: one for each device, one to prepare segments. `run` is the core's own.
    pub fn new(
        core: Core,
        tenant_count: usize,
        arena: &Arc<Arena>,
        devices: Vec<Box<dyn BlockDevice>>,
        clock: Clock,
    ) -> std::io::Result<(Self, CoreHandle)> {
        let (sender, inputs) = sync_channel(QUEUE);
        let sleeper = Sleeper::new()?;
        let sender = Queue::new(sender, &sleeper);
        let (residency, watchers): (Vec<_>, Vec<_>) = (0..tenant_count).map(|_| watch::channel(0)).unzip();
        let disks = disk_threads(devices, arena, &sender)?;
        let prepare = prepare_thread(arena, &sender)?;
        let promote = promote_thread(arena, &sender)?;
        let handle = CoreHandle {
            sender: sender.clone(),
            permits: Arc::new(Semaphore::new(limits::REQUESTS_MAX)),
            last_request: Arc::default(),
            clock,
            arena: Arc::clone(arena),
            residency: Arc::new(watchers),
        };
        let responders = HashMap::new();
        let published = Instant::now();
        Ok((
            Self {
                core,
                clock,
                inputs,
                sleeper,
                sender,
                last_request: Arc::clone(&handle.last_request),
                locals: Locals::new(arena),
                door: None,
                spin: spin_time(),
                worked: Instant::now(),
                heard: Vec::new(),
                taken: Vec::new(),
                responders,
                disks,
                unregistered: BTreeSet::new(),
                arena: Arc::clone(arena),
                prepare,
                promote,
                residency,
                published,
            },
            handle,
        ))
    }

    /// How the local door tells the core of processes.
    pub fn queue(&self) -> Queue<Input> {
        self.sender.clone()
    }

    /// An ingest segment from before a restart is known to clients by this name.
    pub fn name_mapping(&mut self, segment: u32, mapping: u32) {
        self.locals.name_mapping(segment, mapping);
    }

    /// How a disk that the core awaits gets to it.
    pub fn joiner(&self) -> Joiner {
        Joiner { arena: Arc::clone(&self.arena), sender: self.sender.clone() }
    }

    /// The local door, which this core serves from now on.
    pub fn serve_door(&mut self, door: Queue<DoorCommand>) {
        self.door = Some(door);
    }

    /// Runs the core until [`CoreHandle::stop`]. Returns when all devices have come to rest.
    pub fn run(mut self) {
        let mut events = vec![Event::Tick];
        if !self.core.awaits_disk() {
            // The tier files were opened before: what a former worker had asked of them is done.
            events.insert(0, Event::DiskLocked);
            self.register_segments();
        }
        let mut actions = Vec::new();
        let mut ticked = Instant::now();
        loop {
            for event in events.drain(..) {
                self.core.step(event, self.clock.now_ms(), &mut actions);
            }
            let again = self.carry_out(&mut actions, &mut events);
            self.locals.wake_clients();
            // One look at the clock and one round of replies for all that has come.
            let mut is_running = self.gather(&mut events);
            if is_running && events.is_empty() && !again {
                is_running = self.wait(&mut events);
            }
            if !is_running {
                break;
            }
            if again {
                events.push(Event::Continue);
            }
            if ticked.elapsed() >= limits::TICK {
                ticked = Instant::now();
                events.push(Event::Tick);
                self.publish();
            }
        }
        self.locals.close_all(&self.sleeper);
        for disk in self.disks.drain(..) {
            disk.stop();
        }
    }

    /// Tells the disks of all segments that are prepared.
    fn register_segments(&mut self) {
        let in_use = self.core.segments_in_use().into_iter().map(|(segment, _)| segment);
        let mut segments = std::mem::take(&mut self.unregistered);
        segments.extend(in_use.filter(|segment| !self.arena.is_ingest(*segment)));
        for segment in segments {
            self.disks.iter().for_each(|disk| disk.tell(Command::SegmentReady(segment)));
        }
    }

    /// What has come through the queue and the rings; false when the end has come.
    fn gather(&mut self, events: &mut Vec<Event>) -> bool {
        while events.len() < EVENTS_AT_ONCE {
            match self.inputs.try_recv() {
                Ok(Input::Stop) | Err(TryRecvError::Disconnected) => return false,
                Ok(input) => events.extend(self.event(input)),
                Err(TryRecvError::Empty) => break,
            }
        }
        if !self.locals.is_empty() {
            let mut taken = std::mem::take(&mut self.taken);
            for broken in self.locals.take(&mut taken) {
                self.let_go(broken, DoorCommand::LetGo(broken));
            }
            if !taken.is_empty() {
                self.worked = Instant::now();
            }
            for Taken { verb, deadline_ms, open } in taken.drain(..) {
                events.extend(self.asked(verb, deadline_ms, open));
            }
            self.taken = taken;
        }
        true
    }

    /// Spins for a while after work of the rings, then sleeps until something comes, a tick at most. False when the end has come.
    fn wait(&mut self, events: &mut Vec<Event>) -> bool {
        self.locals.wake_clients();
        while !self.locals.is_empty() && self.worked.elapsed() < self.spin {
            std::hint::spin_loop();
            if !self.gather(events) {
                return false;
            }
            if !events.is_empty() {
                return true;
            }
        }
        self.sleeper.prepare();
        let is_running = self.gather(events);
        if !is_running || !events.is_empty() || !self.locals.prepare_to_sleep() {
            self.sleeper.woke();
            return is_running;
        }
        // What was malformed in that last look is answered too.
        self.locals.wake_clients();
        let mut heard = std::mem::take(&mut self.heard);
        self.sleeper.sleep(limits::TICK, &mut heard);
        self.locals.woke(&heard);
        self.heard = heard;
        self.gather(events)
    }

    /// A request that came through a ring.
    fn asked(&mut self, verb: Verb, deadline_ms: u32, open: Open) -> Option<Event> {
        let member = self.locals.member(&open)?;
        let deadline = match deadline_ms {
            0 => limits::DEADLINE_DEFAULT,
            deadline_ms => Duration::from_millis(deadline_ms.into()),
        };
        let id = RequestId(self.last_request.fetch_add(1, Ordering::Relaxed) + 1);
        let deadline_ms = self.clock.deadline_ms(deadline);
        self.responders.insert(id, Responder::Ring(open));
        Some(Event::Request(Request { id, tenant: member.tenant, deadline_ms, verb }))
    }

    /// A ring that is used no more.
    fn let_go(&mut self, attachment: AttachmentId, command: DoorCommand) {
        self.locals.close(attachment, &self.sleeper);
        self.tell_door(command);
    }

    /// Has the door do something; whether it will. Never waits: a queue that is full belongs to a door that is stuck, and what it was to
    /// make is not made then.
    fn tell_door(&self, command: DoorCommand) -> bool {
        self.door.as_ref().is_some_and(|door| door.try_send(command).is_ok())
    }

    fn event(&mut self, input: Input) -> Option<Event> {
        Some(match input {
            Input::Ask(request, responder) => {
                // Only what the core will detach: another tenant may not even end its ring, and a process from before a restart is
                // watched for as long as it holds something.
                if let Verb::Detach(attachment) = request.verb
                    && self.core.may_ask_as(attachment, request.tenant)
                {
                    self.let_go(attachment, DoorCommand::Left(attachment));
                }
                self.responders.insert(request.id, responder);
                Event::Request(request)
            }
            Input::Undo(verb) => self.undo(verb),
            Input::Done(id, outcome) => Event::TransferDone(id, outcome),
            Input::DiskJoined(joined) => {
                let Joined { threads, recovered, page_key, depth } = *joined;
                self.core.found_disk(page_key, depth);
                self.disks = threads;
                self.register_segments();
                Event::DiskJoined(recovered)
            }
            Input::Ready(segment) => {
                if self.disks.is_empty() {
                    self.unregistered.insert(segment);
                }
                for disk in &self.disks {
                    disk.tell(Command::SegmentReady(segment));
                }
                Event::SegmentReady(segment)
            }
            Input::IngestMade(segment, mapping) => {
                if let Some(mapping) = mapping {
                    self.locals.name_mapping(segment, mapping);
                }
                Event::IngestMade { segment, made: mapping.is_some() }
            }
            Input::Join(connection, former, local) => {
                // Before the core knows of it: afterwards it may hold what its former attachment held, and nothing may fail any more.
                if let Err(error) = Locals::listen(&local, &self.sleeper) {
                    let why = format!("the daemon cannot listen to one more client ({error}); use gRPC meanwhile");
                    self.tell_door(DoorCommand::Joined(connection, Err(why)));
                    return None;
                }
                // Its old ring, if it has one still, is used no more.
                if let Some(former) = former {
                    self.locals.close(former, &self.sleeper);
                }
                let id = RequestId(self.last_request.fetch_add(1, Ordering::Relaxed) + 1);
                let verb = Verb::Join { attachment: local.member.attachment, former };
                self.responders.insert(id, Responder::Join(connection, local));
                Event::Request(Request { id, tenant: TenantId(0), deadline_ms: 0, verb })
            }
            Input::Gone(attachment) => {
                self.locals.close(attachment, &self.sleeper);
                self.undo(Verb::Gone(attachment))
            }
            Input::Left(attachment) => {
                self.locals.close(attachment, &self.sleeper);
                self.undo(Verb::Left(attachment))
            }
            Input::Stop => return None,
        })
    }

    /// A request of the driver's own: nobody waits for its reply, and whose it is does not matter to what ends a hold.
    fn undo(&self, verb: Verb) -> Event {
        Event::Request(Request { id: RequestId(0), tenant: TenantId(0), deadline_ms: 0, verb })
    }

    /// Does what the core asked for; returns whether it wants to go on at once. Grants that nobody takes come back as events.
    fn carry_out(&mut self, actions: &mut Vec<Action>, events: &mut Vec<Event>) -> bool {
        let mut again = false;
        for action in actions.drain(..) {
            match action {
                Action::Reply(id, reply) => {
                    if let Some(verb) = self.reply(id, reply) {
                        events.push(self.undo(verb));
                    }
                }
                Action::Start(file, id, transfer) => self.disks[file as usize].tell(Command::Start(id, transfer)),
                Action::PrepareSegment { segment, tenant, used } => {
                    if self.prepare.send((segment, tenant, used)).is_err() {
                        tracing::error!("the thread that prepares memory is gone; segment {segment} stays unused");
                    }
                }
                Action::Residency(tenant, sequence) => {
                    self.residency[tenant.0 as usize].send_replace(sequence);
                }
                Action::Promote { id, from, to, expected } => {
                    if self.promote.send(Promotion { id, from, to, expected }).is_err() {
                        tracing::error!("the thread that copies to shared memory is gone");
                    }
                }
                Action::MakeIngest { segment, writer } => {
                    if !self.tell_door(DoorCommand::Make(segment, writer)) {
                        events.push(Event::IngestMade { segment, made: false });
                    }
                }
                Action::DropSegment(segment) => {
                    self.arena.take_out(segment);
                    self.tell_door(DoorCommand::Forget(segment));
                }
                Action::Again => again = true,
                Action::Warn(message) => tracing::warn!("{message}"),
            }
        }
        again
    }

    fn reply(&mut self, id: RequestId, reply: Reply) -> Option<Verb> {
        let more = matches!(&reply, Reply::Prefetch(prefetch) if !prefetch.done);
        match self.responders.remove(&id)? {
            Responder::Ring(open) => match self.locals.reply(open, reply) {
                Replied::Done(undo) => undo,
                Replied::Later(open) => {
                    self.responders.insert(id, Responder::Ring(open));
                    None
                }
                Replied::Unheard(reply) => undo_of(&reply),
            },
            Responder::Join(connection, local) => {
                self.joined(connection, *local, reply);
                None
            }
            Responder::Once(sender) => {
                let undo = Undo::of(&reply, &self.sender);
                let mut answer = sender.send(Answer { reply, undo }).err()?;
                answer.undo.as_mut().and_then(|undo| undo.verb.take())
            }
            Responder::Many(sender, permit) => {
                // Progress that nobody fetched yet is as good as this one; the last word always finds a place kept for it.
                if !more || sender.capacity() > 1 {
                    let _ = sender.try_send(reply);
                }
                if more && !sender.is_closed() {
                    self.responders.insert(id, Responder::Many(sender, permit));
                }
                None
            }
        }
    }

    /// The core has let a process in, or not: its connection is told.
    fn joined(&mut self, connection: u64, mut local: Local, reply: Reply) {
        let attachment = local.member.attachment;
        let answer = match reply {
            // It was let in and detached in one go, when it had no ring yet that could be closed.
            Reply::Joined { .. } if self.core.local_process(attachment).is_none() => {
                Locals::ignore(&local, &self.sleeper);
                Err("the attachment was detached meanwhile; attach again".to_owned())
            }
            Reply::Joined { tenant, group } => {
                (local.member.tenant, local.member.group) = (tenant, group);
                self.locals.open(local);
                Ok(tenant)
            }
            Reply::Refused(refusal) => {
                Locals::ignore(&local, &self.sleeper);
                Err(refusal.message)
            }
            _ => unreachable!("a join is answered with its own reply"),
        };
        self.tell_door(DoorCommand::Joined(connection, answer));
    }

    fn publish(&mut self) {
        if self.published.elapsed() < Duration::from_secs(1) {
            return;
        }
        self.published = Instant::now();
        telemetry::publish(&self.core.status());
    }
}

impl Joiner {
    /// Starts the files' threads and has the core take them over; not to be called again once it has done so.
    pub fn join(&self, found: Found) -> std::io::Result<()> {
        let Found { devices, recovered, page_key, depth } = found;
        let threads = disk_threads(devices, &self.arena, &self.sender)?;
        // The core is gone only when the daemon ends.
        let _ = self.sender.send(Input::DiskJoined(Box::new(Joined { threads, recovered, page_key, depth })));
        Ok(())
    }
}

impl std::fmt::Debug for DiskThread {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("DiskThread").finish_non_exhaustive()
    }
}

impl DiskThread {
    fn tell(&self, command: Command) {
        // The queue holds everything that the lanes and the directory may have in flight; only a dead thread refuses.
        if self.commands.send(command).is_err() {
            tracing::error!("the thread of a tier file is gone");
        }
        (self.wake)();
    }

    fn stop(self) {
        let Self { commands, wake, thread } = self;
        drop(commands);
        wake();
        if let Some(thread) = thread.into_inner().ok().flatten() {
            let _ = thread.join();
        }
    }
}

fn disk_threads(
    devices: Vec<Box<dyn BlockDevice>>,
    arena: &Arc<Arena>,
    sender: &Queue<Input>,
) -> std::io::Result<Vec<DiskThread>> {
    devices.into_iter().map(|device| disk_thread(device, arena, sender)).collect()
}

fn disk_thread(device: Box<dyn BlockDevice>, arena: &Arc<Arena>, sender: &Queue<Input>) -> std::io::Result<DiskThread> {
    let queue = device.depth() + limits::DIRECTORY_WRITES_MAX + 8 + arena.segment_count() as usize;
    let (commands, receiver) = sync_channel(queue);
    let wake = device.waker();
    let (arena, sender) = (Arc::clone(arena), sender.clone());
    let thread = std::thread::Builder::new().name("tender-disk".to_owned()).spawn(move || {
        crate::transfer::disk::run(device, arena, &receiver, |id, outcome| {
            // The core is gone only when the daemon ends.
            let _ = sender.send(Input::Done(id, outcome));
        });
    })?;
    Ok(DiskThread { commands, wake, thread: Mutex::new(Some(thread)) })
}

fn promote_thread(arena: &Arc<Arena>, sender: &Queue<Input>) -> std::io::Result<SyncSender<Promotion>> {
    let (requests, receiver) = sync_channel(limits::PROMOTIONS_MAX + usize::from(u8::MAX));
    let (arena, sender) = (Arc::clone(arena), sender.clone());
    std::thread::Builder::new().name("tender-promote".to_owned()).spawn(move || {
        promote::run(&arena, &receiver, |id, outcome| {
            // The core is gone only when the daemon ends.
            let _ = sender.send(Input::Done(id, outcome));
        });
    })?;
    Ok(requests)
}

fn prepare_thread(arena: &Arc<Arena>, sender: &Queue<Input>) -> std::io::Result<SyncSender<(u32, TenantId, bool)>> {
    let (requests, receiver) = sync_channel::<(u32, TenantId, bool)>(2);
    let (arena, sender) = (Arc::clone(arena), sender.clone());
    std::thread::Builder::new().name("tender-prepare".to_owned()).spawn(move || {
        for (segment, tenant, used) in receiver {
            let prepared = loop {
                match arena.prepare(segment, tenant, used) {
                    Ok(prepared) => break prepared,
                    Err(error) => {
                        tracing::warn!(segment, %error, "a segment cannot be prepared; give the system more memory. Trying again");
                        std::thread::sleep(PREPARE_PAUSE);
                    }
                }
            };
            tracing::debug!(segment, ?tenant, used, ?prepared, "segment prepared");
            if sender.send(Input::Ready(segment)).is_err() {
                return;
            }
        }
    })?;
    Ok(requests)
}

impl CoreHandle {
    /// Payload memory.
    pub fn arena(&self) -> &Arc<Arena> {
        &self.arena
    }

    /// Number of tenants.
    pub fn tenant_count(&self) -> usize {
        self.residency.len()
    }

    /// The daemon's clock.
    pub fn clock(&self) -> Clock {
        self.clock
    }

    /// Number of a tenant's last event, whenever it changes.
    pub fn residency(&self, tenant: TenantId) -> watch::Receiver<u64> {
        self.residency[tenant.0 as usize].clone()
    }

    fn request(&self, tenant: TenantId, deadline: Duration, verb: Verb) -> Request {
        let id = RequestId(self.last_request.fetch_add(1, Ordering::Relaxed) + 1);
        Request { id, tenant, deadline_ms: self.clock.deadline_ms(deadline), verb }
    }

    fn busy() -> Refusal {
        let message = format!("{} requests are under way already; try again later", limits::REQUESTS_MAX);
        Refusal { kind: RefusalKind::Busy, message }
    }

    fn gone() -> Refusal {
        Refusal { kind: RefusalKind::Stopping, message: "the daemon is stopping; try again when it is back".to_owned() }
    }

    /// Asks the core, and waits for its answer: never much longer than the deadline.
    pub async fn ask(&self, tenant: TenantId, deadline: Duration, verb: Verb) -> Result<Answer, Refusal> {
        /// The core answers at the deadline; this bounds the wait for a core that is busy with something long.
        const GRACE: Duration = Duration::from_secs(5);
        let permit = self.permits.try_acquire().map_err(|_| Self::busy())?;
        let (sender, receiver) = oneshot::channel();
        let request = self.request(tenant, deadline, verb);
        self.send(request, Responder::Once(sender))?;
        let answer = match tokio::time::timeout(deadline + GRACE, receiver).await {
            Ok(Ok(answer)) => answer,
            Ok(Err(_)) => return Err(Self::gone()),
            Err(_) => return Err(Self::busy()),
        };
        drop(permit);
        match answer.reply {
            Reply::Refused(refusal) => Err(refusal),
            _ => Ok(answer),
        }
    }

    /// Asks for something that is answered several times.
    pub fn ask_many(&self, tenant: TenantId, deadline: Duration, verb: Verb) -> Result<mpsc::Receiver<Reply>, Refusal> {
        let permit = Arc::clone(&self.permits).try_acquire_owned().map_err(|_| Self::busy())?;
        let (sender, receiver) = mpsc::channel(4);
        let request = self.request(tenant, deadline, verb);
        self.send(request, Responder::Many(sender, permit))?;
        Ok(receiver)
    }

    fn send(&self, request: Request, responder: Responder) -> Result<(), Refusal> {
        self.sender.try_send(Input::Ask(request, responder)).map_err(|error| match error {
            TrySendError::Full(_) => Self::busy(),
            TrySendError::Disconnected(_) => Self::gone(),
        })
    }

    /// Ends the core's thread, whatever it is doing.
    pub fn stop(&self) {
        let _ = self.sender.send(Input::Stop);
    }
}

#[cfg(test)]
mod tests;
