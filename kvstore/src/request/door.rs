//! The local door: the socket on which processes of this node get their rings and the memory behind them, and the watch over these
//! processes. One thread; what it cannot do at once it leaves to the next turn, and it never waits for a client. What is said is drawn in
//! `proto/src/greeting.rs`.
//!
//! ```text
//! connection   Greeting ──Open, pidfd──► Joining ──core: Joined──► Open        at its end nothing is lost but the way to tell things
//! member       made when the core lets it in; ends when its pidfd says dead, or it says Leave: the core is told, once. Who comes again
//!              is watched, and kept by the keeper, under the new name before the core gives that name what it holds
//! file         Make ──► offered to its writer (Map) ──Mapped──► sealed and mapped here (a thread of its own) ──► the core grants in it
//!                            │    ▲    └──Bring──► another file, the client's own, is looked at ──Taken──┘
//!                            │    └─────NotTaken───┘ and takes its place
//!                            └─ Unmappable, no answer in time, gone ──► given up
//! ```

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, TryRecvError, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tender_proto::descriptors::{Bell, EventFd, Process};
use tender_proto::greeting::{ToClient, ToDaemon};
use tender_proto::ring::{DaemonRing, RingMemory};

use super::closing::{Closing, Foreign};
use super::connection::{Connection, Heard};
use crate::device::ingest::IngestFile;
use crate::device::memory::Arena;
use crate::device::shared::SharedFile;
use crate::driver::{DoorCommand, Input, Local, Member, Queue, Sleeper};
use crate::keeper::{Keeper, KeptIngest};
use crate::limits;
use crate::names::{AttachmentId, GroupId, TenantId};

/// A connection that has not said who it is after so long is closed.
const GREETING: Duration = Duration::from_secs(5);

/// A client that has not mapped its memory after so long gets none.
const MAPPING: Duration = Duration::from_secs(10);

/// How often deadlines are looked at.
const TURN: Duration = Duration::from_millis(500);

/// The way to the door's thread.
pub struct Door {
    commands: Queue<DoorCommand>,
    thread: JoinHandle<()>,
}

impl Door {
    /// Opens the door: a thread serves `listener`.
    pub fn open(
        listener: UnixListener,
        files: Arc<[SharedFile]>,
        arena: Arc<Arena>,
        core: Queue<Input>,
        keeper: Arc<Keeper>,
        before: Before,
    ) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        let sleeper = Sleeper::new()?;
        sleeper.listen(listener.as_fd(), LISTENER)?;
        let queue = limits::LOCALS_MAX + 4 * arena.ingest_count() as usize;
        let (sender, commands) = sync_channel(queue);
        let sender = Queue::new(sender, &sleeper);
        let mapper = mapping_thread(&arena, core.clone(), sender.clone())?;
        let mut doorman = Doorman {
            listener,
            sleeper,
            closing: Closing::start()?,
            commands,
            core,
            mapper,
            files,
            segment_bytes: arena.segment_bytes(),
            has_ingest: arena.ingest_count() > 0,
            connections: HashMap::new(),
            joining: HashMap::new(),
            members: HashMap::new(),
            memory: HashMap::new(),
            last_name: LISTENER,
            next_mapping: before.next_mapping,
            keeper,
        };
        doorman.take_over(before)?;
        let thread = std::thread::Builder::new().name("tender-door".to_owned()).spawn(move || doorman.run())?;
        Ok(Self { commands: sender, thread })
    }

    /// How the core tells it what to do.
    pub fn queue(&self) -> Queue<DoorCommand> {
        self.commands.clone()
    }

    /// Closes it.
    pub fn stop(self) {
        let Self { commands, thread } = self;
        if commands.send(DoorCommand::Stop).is_ok() {
            let _ = thread.join();
        }
    }
}

/// The name under which the listening socket is heard. Connections have even names behind it, processes the odd one after their
/// connection's.
const LISTENER: u64 = 2;

/// What the worker before has left.
#[derive(Debug)]
pub struct Before {
    /// Processes that it had let in.
    pub members: Vec<FormerMember>,
    /// Their memory, which the arena has mapped again.
    pub ingest: Vec<KeptIngest>,
    /// The first name of memory that was never used.
    pub next_mapping: u32,
}

/// A process that the worker before had let in.
#[derive(Debug)]
pub struct FormerMember {
    /// Its name.
    pub attachment: AttachmentId,
    /// Whose it is.
    pub tenant: TenantId,
    /// The one whose place it took. It may not have heard so.
    pub former: Option<AttachmentId>,
    /// To learn of its death.
    pub process: Process,
}

/// A process that was let in.
struct Watched {
    process: Process,
    tenant: TenantId,
    /// From before a restart: whose place it took. It may come under that name still, as it does at the core.
    former: Option<AttachmentId>,
    /// Its connection, while there is one.
    connection: u64,
}

/// Memory that a client writes.
struct Memory {
    mapping: u32,
    tenant: TenantId,
    writer: AttachmentId,
    file: Arc<IngestFile>,
    /// Until when the writer must have mapped it; `None` when it has.
    until: Option<Instant>,
    /// Its writer may bring a file of its own instead; once, so that it cannot keep this thread busy.
    may_bring: bool,
    /// Connections that were given it to read.
    readers: Vec<u64>,
}

/// A process that the core has not let in yet.
struct Joining {
    attachment: AttachmentId,
    former: Option<AttachmentId>,
    process: Process,
    /// What it is to get: ring, doorbell, bell.
    descriptors: [OwnedFd; 3],
    verify: bool,
}

struct Doorman {
    listener: UnixListener,
    sleeper: Sleeper,
    /// Where what clients sent is closed.
    closing: Closing,
    commands: Receiver<DoorCommand>,
    core: Queue<Input>,
    mapper: SyncSender<(u32, u32, Arc<IngestFile>)>,
    /// Shared memory, by tenant.
    files: Arc<[SharedFile]>,
    segment_bytes: u64,
    /// Whether there are places for memory that clients write.
    has_ingest: bool,
    connections: HashMap<u64, Connection>,
    joining: HashMap<u64, Joining>,
    members: HashMap<AttachmentId, Watched>,
    /// By segment.
    memory: HashMap<u32, Memory>,
    last_name: u64,
    next_mapping: u32,
    keeper: Arc<Keeper>,
}

impl Doorman {
    /// Watches over the processes from before. They have no connection, until they come again.
    fn take_over(&mut self, before: Before) -> io::Result<()> {
        for FormerMember { attachment, tenant, former, process } in before.members {
            self.last_name += 2;
            self.sleeper.listen(process.as_fd(), self.last_name + 1)?;
            self.members.insert(attachment, Watched { process, tenant, former, connection: self.last_name });
        }
        for KeptIngest { writer, segment, mapping, tenant, file } in before.ingest {
            let file = Arc::new(file);
            // Its place was taken, and the keeper has not heard so of its memory.
            let is_known = self.members.contains_key(&writer);
            let renamed = self.members.iter().find(|(_, member)| !is_known && member.former == Some(writer));
            let writer = renamed.map_or(writer, |(attachment, _)| *attachment);
            let memory = Memory { mapping, tenant, writer, file, until: None, may_bring: false, readers: Vec::new() };
            self.memory.insert(segment, memory);
        }
        Ok(())
    }

    fn run(mut self) {
        let mut heard = Vec::new();
        let mut looked = Instant::now();
        loop {
            self.sleeper.prepare();
            loop {
                match self.commands.try_recv() {
                    Ok(DoorCommand::Stop) | Err(TryRecvError::Disconnected) => return,
                    Ok(command) => self.obey(command),
                    Err(TryRecvError::Empty) => break,
                }
            }
            self.sleeper.sleep(TURN, &mut heard);
            for &name in &heard {
                match name {
                    LISTENER => self.accept(),
                    name if name % 2 == 0 => self.hear(name),
                    name => self.look_at_process(name - 1),
                }
            }
            if looked.elapsed() >= TURN {
                looked = Instant::now();
                self.give_up_late(looked);
            }
        }
    }

    fn obey(&mut self, command: DoorCommand) {
        match command {
            DoorCommand::Joined(connection, answer) => self.joined(connection, answer),
            DoorCommand::Make(segment, writer) => {
                if !self.make(segment, writer) {
                    self.tell_core(Input::IngestMade(segment, None));
                }
            }
            DoorCommand::Forget(segment) => self.forget(segment),
            DoorCommand::LetGo(attachment) => {
                if let Some(name) = self.members.get(&attachment).map(|member| member.connection) {
                    self.hang_up(name);
                }
            }
            DoorCommand::Left(attachment) => {
                if let Some(member) = self.members.remove(&attachment) {
                    self.end_member(attachment, &member);
                }
            }
            DoorCommand::Stop => {}
        }
    }

    fn accept(&mut self) {
        // A few at a time: others are to be heard as well.
        for _ in 0..16 {
            let Ok((socket, _)) = self.listener.accept() else { return };
            let waiting = self.connections.values().filter(|connection| connection.attachment().is_none()).count();
            if waiting >= limits::GREETINGS_MAX {
                continue;
            }
            self.last_name += 2;
            let connection = Connection::new(socket.into(), Instant::now() + GREETING, self.closing.clone());
            if self.sleeper.listen(connection.socket(), self.last_name).is_ok() {
                self.connections.insert(self.last_name, connection);
            }
        }
    }

    /// A connection has something to say, takes something again, or is at its end.
    fn hear(&mut self, name: u64) {
        for _ in 0..8 {
            let Some(connection) = self.connections.get_mut(&name) else { return };
            let (said, descriptors) = match connection.hear() {
                Ok(Heard::Nothing) => return,
                Ok(Heard::Said(said, descriptors)) => (said, descriptors),
                Ok(Heard::End) => return self.hang_up(name),
                Err(error) => {
                    tracing::debug!("a connection to the local door is closed: {error}");
                    let _last_words = connection.say(&ToClient::Refused(error.to_string()), &[]);
                    return self.hang_up(name);
                }
            };
            if let Err(why) = self.answer(name, said, descriptors) {
                tracing::debug!("a connection to the local door is refused: {why}");
                self.say(name, &ToClient::Refused(why), &[]);
                return self.hang_up(name);
            }
        }
    }

    fn answer(&mut self, name: u64, said: ToDaemon, descriptors: Vec<Foreign>) -> Result<(), String> {
        match said {
            ToDaemon::Open { attachment, former } => {
                let former = (former != 0).then_some(AttachmentId(former));
                self.greet(name, AttachmentId(attachment), former, descriptors)
            }
            ToDaemon::Fetch(mapping) => {
                self.fetch(name, mapping);
                Ok(())
            }
            ToDaemon::Mapped(mapping) => {
                self.mapped(name, mapping);
                Ok(())
            }
            ToDaemon::Bring(mapping) => {
                self.bring(name, mapping, descriptors);
                Ok(())
            }
            ToDaemon::Unmappable(mapping) => {
                let offered =
                    self.memory.iter().find(|(_, memory)| memory.mapping == mapping && memory.until.is_some());
                let own = offered.filter(|(_, memory)| self.member_of(name) == Some(memory.writer));
                if let Some((&segment, _)) = own {
                    self.give_up(segment);
                }
                Ok(())
            }
            ToDaemon::Leave => {
                if let Some(attachment) = self.member_of(name)
                    && let Some(member) = self.members.remove(&attachment)
                {
                    self.end_member(attachment, &member);
                    self.tell_core(Input::Left(attachment));
                }
                Ok(())
            }
        }
    }

    /// A process says who it is: the core is asked whether it may come in.
    fn greet(
        &mut self,
        name: u64,
        attachment: AttachmentId,
        former: Option<AttachmentId>,
        descriptors: Vec<Foreign>,
    ) -> Result<(), String> {
        let Some(connection) = self.connections.get_mut(&name) else { return Ok(()) };
        if !connection.begin_joining() {
            return Err("this connection has said Open before; make one connection for each attachment".to_owned());
        }
        let [pidfd] = <[Foreign; 1]>::try_from(descriptors)
            .map_err(|descriptors| format!("{} descriptors came with Open; send your pidfd", descriptors.len()))?;
        let process = Process::from_fd(pidfd).map_err(|error| error.to_string())?;
        let peer = rustix::net::sockopt::socket_peercred(connection.socket())
            .map_err(|errno| format!("the kernel does not say whose socket this is ({errno})"))?;
        // In another namespace of processes its number is not known here; then it is taken at its word, at its own risk.
        if process.pid().is_ok_and(|pid| pid.is_some_and(|pid| pid != peer.pid)) {
            return Err("the pidfd is another process's than the socket's; send your own".to_owned());
        }
        // Whose pidfd the keeper has under a name is not to be changed by who comes under it once more.
        let is_joining = self.joining.values().any(|joining| joining.attachment == attachment);
        if is_joining || self.members.contains_key(&attachment) {
            return Err("this attachment has come to the local door already; attach once for each process".to_owned());
        }
        // A joining outlives its connection, so the bound on connections does not bound them.
        if self.joining.len() >= limits::GREETINGS_MAX {
            return Err("too many processes come to the local door at once; use gRPC meanwhile".to_owned());
        }
        // Whoever takes the place of another process would have what that one holds.
        let tenant = former.and_then(|former| {
            let (_, theirs) = self.places_of(former).find(|(_, member)| is_same(&member.process, &process))?;
            Some(theirs.tenant)
        });
        let former = former.filter(|_| tenant.is_some());
        let own_uid = rustix::process::geteuid().as_raw();
        let verify = !self.files.iter().all(|file| file.protection().keeps_out(peer.uid.as_raw(), own_uid));
        let make = || -> io::Result<(Local, [OwnedFd; 3])> {
            let (memory, ring_file) = RingMemory::create()?;
            let ring = DaemonRing::format(memory).map_err(io::Error::other)?;
            let doorbell = EventFd::new()?;
            let (bell, listener) = Bell::new()?;
            let descriptors = [ring_file, doorbell.as_fd().try_clone_to_owned()?, listener];
            // Tenant and group are the core's to say.
            let member = Member { attachment, tenant: TenantId(0), group: GroupId(0), verify };
            Ok((Local { member, ring, doorbell, bell }, descriptors))
        };
        let (local, descriptors) = make().map_err(|error| {
            format!("the daemon has no memory or descriptors for a ring ({error}); use gRPC, or raise its limits")
        })?;
        // Its death is heard of from here on, whatever else fails later.
        self.sleeper.listen(process.as_fd(), name + 1).map_err(|error| cannot_watch(&error))?;
        // The core gives it what its former attachment holds as soon as it lets it in, and a worker that dies right then can tell
        // nobody: the keeper has to know the new name before.
        let kept = tenant.map_or(Ok(()), |tenant| self.keeper.keep_member(attachment, tenant, &process));
        if let Err(error) = kept {
            self.sleeper.ignore(process.as_fd());
            return Err(cannot_watch(&error));
        }
        self.joining.insert(name, Joining { attachment, former, process, descriptors, verify });
        self.tell_core(Input::Join(name, former, Box::new(local)));
        Ok(())
    }

    /// Who may be meant by a former name: the attachment itself, and those that took its place before a restart.
    fn places_of(&self, former: AttachmentId) -> impl Iterator<Item = (&AttachmentId, &Watched)> {
        self.members.iter().filter(move |(name, member)| **name == former || member.former == Some(former))
    }

    fn joined(&mut self, name: u64, answer: Result<TenantId, String>) {
        let Some(Joining { attachment, former, process, descriptors, verify }) = self.joining.remove(&name) else {
            return;
        };
        let tenant = match answer {
            Ok(tenant) => tenant,
            Err(why) => {
                self.sleeper.ignore(process.as_fd());
                if former.is_some() {
                    // It stays who it was.
                    let _ = self.keeper.forget_member(attachment);
                }
                self.say(name, &ToClient::Refused(why), &[]);
                return self.hang_up(name);
            }
        };
        // Who had no former attachment holds nothing before it hears that it is let in.
        let kept = self.keeper.keep_member(attachment, tenant, &process);
        if let Err(error) = kept {
            if former.is_none() {
                self.sleeper.ignore(process.as_fd());
                self.say(name, &ToClient::Refused(cannot_watch(&error)), &[]);
                self.hang_up(name);
                return self.tell_core(Input::Gone(attachment));
            }
            tracing::warn!("the keeper does not take the name of a process that came again: {error}");
        }
        self.members.insert(attachment, Watched { process, tenant, former: None, connection: name });
        if let Some(former) = former {
            self.take_place(former, attachment, tenant);
        }
        if let Some(connection) = self.connections.get_mut(&name) {
            connection.open(attachment);
        }
        let files = Arc::clone(&self.files);
        let file = &files[usize::from(tenant.0)];
        let [ring, doorbell, bell] = &descriptors;
        let brought_bytes = if self.has_ingest { self.segment_bytes } else { 0 };
        let opened = ToClient::Opened { shared_bytes: file.bytes(), verify, brought_bytes };
        self.say(name, &opened, &[ring.as_fd(), doorbell.as_fd(), bell.as_fd(), file.read_only()]);
    }

    /// A process has come again under another name: it is watched under that one, and has the memory that it had. The core has made sure
    /// that it is the one, by what it knows.
    fn take_place(&mut self, former: AttachmentId, attachment: AttachmentId, tenant: TenantId) {
        let is_theirs = |(name, member): &(&AttachmentId, &Watched)| **name != attachment && member.tenant == tenant;
        let places: Vec<AttachmentId> = self.places_of(former).filter(is_theirs).map(|(name, _)| *name).collect();
        for place in places {
            for (&segment, memory) in self.memory.iter_mut().filter(|(_, memory)| memory.writer == place) {
                memory.writer = attachment;
                if let Err(error) = self.keeper.keep_ingest(attachment, segment, memory.mapping, tenant, &memory.file) {
                    tracing::warn!("the keeper does not take a client's memory: {error}");
                }
            }
            if let Some(member) = self.members.remove(&place) {
                self.end_member(place, &member);
            }
        }
    }

    /// Makes memory and offers it to its writer; whether that was possible.
    fn make(&mut self, segment: u32, writer: AttachmentId) -> bool {
        let Some(&Watched { tenant, connection, .. }) = self.members.get(&writer) else { return false };
        if !self.connections.contains_key(&connection) || self.next_mapping == u32::MAX {
            return false;
        }
        let file = match IngestFile::create(self.segment_bytes) {
            Ok(file) => Arc::new(file),
            Err(error) => {
                tracing::warn!("no memory for a client to write to: {error}; its blocks come over gRPC");
                return false;
            }
        };
        let mapping = self.next_mapping;
        if let Err(error) = self.keeper.keep_ingest(writer, segment, mapping, tenant, &file) {
            tracing::warn!("the keeper does not take a client's memory: {error}");
            return false;
        }
        self.next_mapping += 1;
        let offer = ToClient::Map { mapping, bytes: self.segment_bytes, writable: true };
        let until = Some(Instant::now() + MAPPING);
        let (own, readers) = (Arc::clone(&file), Vec::new());
        self.memory.insert(segment, Memory { mapping, tenant, writer, file: own, until, may_bring: true, readers });
        self.say(connection, &offer, &[file.descriptor()]);
        true
    }

    /// A client has mapped its memory: it is closed for other writers, mapped here, and then granted.
    fn mapped(&mut self, name: u64, mapping: u32) {
        let Some(writer) = self.member_of(name) else { return };
        let offered = self.memory.iter_mut().find(|(_, memory)| memory.mapping == mapping && memory.writer == writer);
        let Some((&segment, memory)) = offered else { return };
        if memory.until.take().is_some() {
            self.map(segment);
        }
    }

    /// Has memory mapped here. The core hears of it then.
    fn map(&mut self, segment: u32) {
        let Some(Memory { mapping, file, .. }) = self.memory.get(&segment) else { return };
        if self.mapper.try_send((segment, *mapping, Arc::clone(file))).is_err() {
            self.give_up(segment);
        }
    }

    /// A client answers an offer with memory of its own.
    fn bring(&mut self, name: u64, mapping: u32, descriptors: Vec<Foreign>) {
        let Some(writer) = self.member_of(name) else { return };
        match self.take_brought(writer, mapping, descriptors) {
            Ok(segment) => {
                self.say(name, &ToClient::Taken(mapping), &[]);
                self.map(segment);
            }
            Err(why) => {
                tracing::debug!("memory that a client brings is not taken: {why}");
                self.say(name, &ToClient::NotTaken { mapping, why }, &[]);
            }
        }
    }

    /// The file that came takes the place of the one that was offered; in which segment. It is trusted no more than that one: its writer,
    /// and whoever else has mapped it, may write there for ever.
    fn take_brought(&mut self, writer: AttachmentId, mapping: u32, descriptors: Vec<Foreign>) -> Result<u32, String> {
        let offered = self.memory.iter_mut().find(|(_, memory)| {
            memory.mapping == mapping && memory.writer == writer && memory.until.is_some() && memory.may_bring
        });
        let Some((&segment, memory)) = offered else {
            return Err("no file is awaited under this name: bring one for each offer, as the answer to it".to_owned());
        };
        memory.may_bring = false;
        let tenant = memory.tenant;
        let [file] = <[Foreign; 1]>::try_from(descriptors)
            .map_err(|descriptors| format!("{} descriptors came with it; send that of the file", descriptors.len()))?;
        let file = IngestFile::bring(file, self.segment_bytes).map_err(|error| error.to_string())?;
        // One file in two segments would be one slot under two names, and another's memory is not the client's to bring.
        if self.is_in_use(&file).map_err(|error| error.to_string())? {
            return Err(
                "it is in use already, by this client or by another: bring a file of its own for each offer".to_owned()
            );
        }
        self.keeper
            .keep_ingest(writer, segment, mapping, tenant, &file)
            .map_err(|error| format!("the daemon's keeper does not take it ({error})"))?;
        if let Some(memory) = self.memory.get_mut(&segment) {
            memory.file = Arc::new(file);
            memory.until = None;
        }
        Ok(segment)
    }

    /// Whether blocks may lie in that very file already.
    fn is_in_use(&self, file: &IngestFile) -> io::Result<bool> {
        let identity = file.identity()?;
        for memory in self.memory.values() {
            if memory.file.identity()? == identity {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// A client wants to read what another one writes. Only of its own tenant: other blocks than the leased one lie there too. Or its
    /// writer, who comes again, asks whether it is used still.
    fn fetch(&mut self, name: u64, mapping: u32) {
        let attachment = self.member_of(name);
        let tenant = attachment.and_then(|attachment| self.members.get(&attachment)).map(|member| member.tenant);
        let known = self.memory.values_mut().find(|memory| memory.mapping == mapping && Some(memory.tenant) == tenant);
        // Its writer has mapped it, but it is closed for others a moment later: until then its descriptor is one to write with.
        let closed = known.filter(|memory| {
            let is_own = Some(memory.writer) == attachment;
            memory.until.is_none() && (is_own || memory.file.is_closed_for_writers().unwrap_or(false))
        });
        let Some(memory) = closed else {
            return self.say(name, &ToClient::Forget(mapping), &[]);
        };
        if !memory.readers.contains(&name) {
            memory.readers.push(name);
        }
        let file = Arc::clone(&memory.file);
        self.say(name, &ToClient::Map { mapping, bytes: file.bytes(), writable: false }, &[file.descriptor()]);
    }

    fn forget(&mut self, segment: u32) {
        let Some(Memory { mapping, writer, readers, .. }) = self.memory.remove(&segment) else { return };
        // A keeper that is gone takes this process with it.
        let _ = self.keeper.forget_ingest(segment);
        let writer = self.members.get(&writer).map(|member| member.connection);
        for name in readers.into_iter().chain(writer) {
            self.say(name, &ToClient::Forget(mapping), &[]);
        }
    }

    /// Memory that its writer does not want, or that cannot be had.
    fn give_up(&mut self, segment: u32) {
        self.forget(segment);
        self.tell_core(Input::IngestMade(segment, None));
    }

    fn look_at_process(&mut self, name: u64) {
        let found = self.members.iter().find(|(_, member)| member.connection == name && member.process.is_dead());
        let Some(attachment) = found.map(|(attachment, _)| *attachment) else { return };
        if let Some(member) = self.members.remove(&attachment) {
            self.end_member(attachment, &member);
            self.tell_core(Input::Gone(attachment));
        }
    }

    /// Nothing is expected of a member any more.
    fn end_member(&mut self, attachment: AttachmentId, member: &Watched) {
        let _ = self.keeper.forget_member(attachment);
        self.sleeper.ignore(member.process.as_fd());
        self.hang_up(member.connection);
    }

    fn hang_up(&mut self, name: u64) {
        if let Some(connection) = self.connections.remove(&name) {
            self.sleeper.ignore(connection.socket());
            self.memory.values_mut().for_each(|memory| memory.readers.retain(|reader| *reader != name));
        }
    }

    /// Who does not do in time what it is to do.
    fn give_up_late(&mut self, now: Instant) {
        let silent = self.connections.iter().filter(|(_, connection)| connection.is_late(now));
        for name in silent.map(|(name, _)| *name).collect::<Vec<_>>() {
            self.say(name, &ToClient::Refused("nothing was said for too long; send Open at once".to_owned()), &[]);
            self.hang_up(name);
        }
        let late = self.memory.iter().filter(|(_, memory)| memory.until.is_some_and(|until| until <= now));
        for segment in late.map(|(segment, _)| *segment).collect::<Vec<_>>() {
            self.give_up(segment);
        }
    }

    fn member_of(&self, name: u64) -> Option<AttachmentId> {
        self.connections.get(&name)?.attachment()
    }

    /// Says something; a client that does not take it is hung up on. Its process is still watched.
    fn say(&mut self, name: u64, said: &ToClient, descriptors: &[std::os::fd::BorrowedFd<'_>]) {
        let Some(connection) = self.connections.get_mut(&name) else { return };
        if let Err(error) = connection.say(said, descriptors) {
            tracing::debug!("a connection to the local door takes nothing: {error}");
            self.hang_up(name);
        }
    }

    fn tell_core(&self, input: Input) {
        // The core is gone only when the daemon ends. It never waits for this thread, so this wait is short.
        let _ = self.core.send(input);
    }
}

fn cannot_watch(error: &io::Error) -> String {
    format!("the daemon cannot watch one more process ({error}); use gRPC, or raise its limits")
}

/// Whether two pidfds are of one process that lives. Of those in other namespaces of processes the numbers are not known here.
fn is_same(one: &Process, other: &Process) -> bool {
    match (one.pid(), other.pid()) {
        (Ok(Some(one)), Ok(Some(other))) => one == other,
        (Ok(None), Ok(None)) => !one.is_dead() && !other.is_dead(),
        _ => false,
    }
}

/// Closes memory for other writers and maps it: makes pages that the client left out, so it may take its time.
fn mapping_thread(
    arena: &Arc<Arena>,
    core: Queue<Input>,
    door: Queue<DoorCommand>,
) -> io::Result<SyncSender<(u32, u32, Arc<IngestFile>)>> {
    let (sender, files) = sync_channel::<(u32, u32, Arc<IngestFile>)>(arena.ingest_count() as usize + 1);
    let arena = Arc::clone(arena);
    std::thread::Builder::new().name("tender-mapper".to_owned()).spawn(move || {
        for (segment, mapping, file) in files {
            let installed = file.close_for_writers().and_then(|()| arena.install(segment, &file, 0, file.bytes()));
            if let Err(error) = &installed {
                tracing::warn!("memory that a client writes to cannot be used: {error}");
                let _ = door.try_send(DoorCommand::Forget(segment));
            }
            if core.send(Input::IngestMade(segment, installed.is_ok().then_some(mapping))).is_err() {
                return;
            }
        }
    })?;
    Ok(sender)
}
