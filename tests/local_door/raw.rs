//! A client of the local door that says what it likes: greeting, ring and memory, through the protocol alone. One request at a time;
//! nothing is given back unless it is told to.

use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant};

use tender_client::Attach;
use tender_client::proto::descriptors::{self, DESCRIPTORS_MAX, EventFd, Process};
use tender_client::proto::door::{
    Asked, CommitOutcome, Extent, Filled, Held, HoldId, HoldKind, Reply, Request, ReserveOutcome, Status,
};
use tender_client::proto::greeting::{MESSAGE_BYTES, ToClient, ToDaemon, door_path};
use tender_client::proto::ring::{ClientRing, RING_BYTES, RingMemory, Submission};
use tender_client::proto::sum::fragment_sums;
use tender_client::proto::{BlockKey, Shard, wire};

use crate::memory::Memory;
use crate::support::PATIENCE;
use crate::support::blocks::Run;
use crate::support::wire as grpc;

/// Between two looks at a ring or a socket.
const PAUSE: Duration = Duration::from_micros(200);

/// A connection to the local door.
pub struct Socket(UnixStream);

impl Socket {
    /// Connects to the door beside that of gRPC.
    pub fn connect(socket: &Path) -> Self {
        Self(UnixStream::connect(door_path(socket)).unwrap())
    }

    pub fn say(&self, said: ToDaemon, descriptors: &[BorrowedFd<'_>]) {
        self.send(&said.encode(), descriptors);
    }

    /// Whatever bytes. A daemon that has hung up does not hear them.
    pub fn send(&self, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) {
        let _unheard = descriptors::send(self.0.as_fd(), bytes, descriptors, Instant::now() + PATIENCE);
    }

    /// The daemon's next message; `None` when it has hung up.
    pub fn hear(&self) -> Option<(ToClient, Vec<OwnedFd>)> {
        let mut message = [0; MESSAGE_BYTES];
        let deadline = Instant::now() + PATIENCE;
        match descriptors::receive(self.0.as_fd(), &mut message, DESCRIPTORS_MAX, deadline) {
            Ok(descriptors) => Some((ToClient::decode(&message).unwrap(), descriptors)),
            Err(error) => {
                assert_ne!(error.kind(), std::io::ErrorKind::TimedOut, "the daemon says nothing");
                None
            }
        }
    }

    /// The same, if something is there.
    fn hear_at_once(&self) -> Option<(ToClient, Vec<OwnedFd>)> {
        let mut nothing = [rustix::event::PollFd::new(&self.0, rustix::event::PollFlags::IN)];
        let timeout = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
        (rustix::event::poll(&mut nothing, Some(&timeout)).unwrap() > 0).then(|| self.hear())?
    }

    /// Insists that the daemon says why not, and hangs up.
    pub fn expect_refusal(&self, words: &str) {
        match self.hear() {
            Some((ToClient::Refused(why), _)) => assert!(why.contains(words), "`{words}` is not in `{why}`"),
            other => panic!("it was to be refused ({words}), but came {other:?}"),
        }
        self.expect_end();
    }

    /// Insists that the daemon hangs up, whatever it says before.
    pub fn expect_end(&self) {
        while self.hear().is_some() {}
    }
}

/// Attaches over gRPC alone: the number, and the root of all keys.
pub async fn attach(socket: &Path, token: Option<&str>, attach: &Attach) -> (u64, BlockKey) {
    let message = wire::AttachRequest {
        protocol_version: tender_client::proto::PROTOCOL_VERSION,
        group: attach.group.clone(),
        member: attach.member.clone(),
        namespace: Some((&attach.namespace).into()),
        layout: Some((&attach.layout).into()),
        ..Default::default()
    };
    let request = match token {
        Some(token) => grpc::authorized(message, &format!("Bearer {token}")),
        None => tonic::Request::new(message),
    };
    let reply = grpc::over_unix(socket).await.attach(request).await.unwrap().into_inner();
    (reply.attachment, BlockKey::from_bytes(reply.root[..].try_into().unwrap()))
}

/// Memory that the daemon offers.
pub struct Offer {
    pub mapping: u32,
    pub bytes: u64,
    pub writable: bool,
    pub file: OwnedFd,
}

/// A slot to be filled.
pub struct Slot {
    pub hold: HoldId,
    pub extent: Extent,
}

/// A process that was let in.
pub struct Raw {
    pub socket: Socket,
    pub attachment: u64,
    pub ring_file: OwnedFd,
    pub shared_file: OwnedFd,
    pub shared_bytes: u64,
    /// The daemon says that this process could change shared memory.
    pub verify: bool,
    /// Length of memory that it may bring.
    pub brought_bytes: u64,
    /// Memory of its own, by name.
    pub own: HashMap<u32, Memory>,
    root: BlockKey,
    block_bytes: usize,
    ring: ClientRing<RingMemory>,
    doorbell: EventFd,
    _bell: OwnedFd,
}

impl Raw {
    pub async fn open(socket: &Path, token: Option<&str>, attach: &Attach) -> Self {
        Self::open_as(socket, token, attach, 0).await
    }

    /// The same process after the daemon's worker was killed: under another number, with what it had mapped.
    pub async fn come_again(self, socket: &Path, token: Option<&str>, attach: &Attach) -> Self {
        let again = Self::open_as(socket, token, attach, self.attachment).await;
        Self { own: self.own, ..again }
    }

    async fn open_as(socket: &Path, token: Option<&str>, attach: &Attach, former: u64) -> Self {
        let (attachment, root) = self::attach(socket, token, attach).await;
        let socket = Socket::connect(socket);
        socket.say(ToDaemon::Open { attachment, former }, &[Process::open_self().unwrap().as_fd()]);
        let opened = socket.hear().expect("the daemon lets in who has attached");
        let (ToClient::Opened { shared_bytes, verify, brought_bytes }, descriptors) = opened else {
            panic!("{:?}", opened.0)
        };
        let [ring_file, doorbell, bell, shared_file] = <[OwnedFd; 4]>::try_from(descriptors).unwrap();
        Self {
            socket,
            attachment,
            ring: ClientRing::open(RingMemory::map(ring_file.as_fd()).unwrap()).unwrap(),
            ring_file,
            shared_file,
            shared_bytes,
            verify,
            brought_bytes,
            own: HashMap::new(),
            root,
            block_bytes: attach.layout.block_bytes() as usize,
            doorbell: EventFd::from_fd(doorbell).unwrap(),
            _bell: bell,
        }
    }

    pub fn run(&self, seed: u32, blocks: usize) -> Run {
        Run::under(self.root, seed, blocks, self.block_bytes)
    }

    /// The ring, to be written without manners.
    pub fn ring_memory(&self) -> Memory {
        Memory::to_write(&self.ring_file, RING_BYTES as u64).unwrap()
    }

    pub fn ring_doorbell(&self) {
        self.doorbell.signal().unwrap();
    }

    /// Puts a request into the ring.
    pub fn submit(&mut self, request: &Request<'_>) -> Asked {
        let mut bytes = Vec::new();
        request.encode(&mut bytes);
        let (verb, attachment) = (request.verb().number(), self.attachment);
        self.ring.submit(Submission { user_data: 1, verb, deadline_ms: 0, attachment }, &bytes).unwrap();
        if self.ring.daemon_sleeps() {
            self.ring_doorbell();
        }
        request.asked()
    }

    /// Waits for the answer; memory that is offered meanwhile is mapped.
    pub fn answer(&mut self, asked: Asked) -> Reply {
        let began = Instant::now();
        let mut bytes = Vec::new();
        loop {
            if let Some(completion) = self.ring.reap(&mut bytes) {
                return Reply::decode(asked, completion.unwrap().status, &bytes).unwrap();
            }
            if let Some((ToClient::Map { mapping, bytes, writable: true }, files)) = self.socket.hear_at_once() {
                let file = files.into_iter().next().unwrap();
                self.accept(&Offer { mapping, bytes, writable: true, file });
            }
            assert!(began.elapsed() < PATIENCE, "no answer to {asked:?}");
            sleep(PAUSE);
        }
    }

    pub fn ask(&mut self, request: &Request<'_>) -> Reply {
        let asked = self.submit(request);
        self.answer(asked)
    }

    /// The next offer of memory.
    pub fn offer(&self) -> Offer {
        match self.socket.hear().unwrap() {
            (ToClient::Map { mapping, bytes, writable }, files) => {
                Offer { mapping, bytes, writable, file: files.into_iter().next().unwrap() }
            }
            (other, _) => panic!("no memory was offered, but {other:?}"),
        }
    }

    /// Maps its own memory and says so. Nobody else's bytes are in it.
    pub fn accept(&mut self, offer: &Offer) {
        let memory = Memory::to_write(&offer.file, offer.bytes).unwrap();
        assert!((0..offer.bytes).step_by(4096).all(|page| memory.read(page, 64) == [0; 64]), "memory that was used");
        self.own.insert(offer.mapping, memory);
        self.socket.say(ToDaemon::Mapped(offer.mapping), &[]);
    }

    /// Answers an offer with a file of its own, or with none; why the daemon does not take it.
    pub fn bring(&self, mapping: u32, file: Option<BorrowedFd<'_>>) -> Result<(), String> {
        self.socket.say(ToDaemon::Bring(mapping), file.as_slice());
        loop {
            match self.socket.hear().unwrap() {
                (ToClient::Taken(taken), _) if taken == mapping => return Ok(()),
                (ToClient::NotTaken { mapping: refused, why }, _) if refused == mapping => return Err(why),
                _ => {}
            }
        }
    }

    /// Asks for the file of a mapping.
    pub fn fetch(&self, mapping: u32) -> Option<Offer> {
        self.socket.say(ToDaemon::Fetch(mapping), &[]);
        loop {
            match self.socket.hear().unwrap() {
                (ToClient::Map { mapping: found, bytes, writable }, files) if found == mapping => {
                    return Some(Offer { mapping, bytes, writable, file: files.into_iter().next().unwrap() });
                }
                (ToClient::Forget(found), _) if found == mapping => return None,
                _ => {}
            }
        }
    }

    pub fn reserve_request(run: &Run) -> Request<'_> {
        Request::Reserve { parent: run.parent, shard: Shard::WHOLE, bytes_max: u64::MAX, keys: (&run.keys[..]).into() }
    }

    pub fn granted(reply: Reply) -> Vec<Slot> {
        let Reply::Reserved(outcomes) = reply else { panic!("{reply:?}") };
        let granted = outcomes.into_iter().map(|outcome| match outcome {
            ReserveOutcome::Granted { hold, extent } => Slot { hold, extent },
            other => panic!("nothing was granted: {other:?}"),
        });
        granted.collect()
    }

    /// A slot for each block. What was refused for want of memory is asked for again.
    pub fn reserve(&mut self, run: &Run) -> Vec<Slot> {
        let began = Instant::now();
        loop {
            let reply = self.ask(&Self::reserve_request(run));
            let Reply::Reserved(outcomes) = &reply else { panic!("{reply:?}") };
            let is_granted = |outcome: &ReserveOutcome| matches!(outcome, ReserveOutcome::Granted { .. });
            if outcomes.iter().all(is_granted) {
                return Self::granted(reply);
            }
            assert!(began.elapsed() < PATIENCE, "no memory to write: {outcomes:?}");
            self.ask(&Request::Abort(holds_of(outcomes).into()));
            sleep(Duration::from_millis(20));
        }
    }

    /// Writes a block's bytes, or the first of them, to its slot.
    pub fn fill(&self, slot: &Slot, bytes: &[u8]) {
        self.own[&slot.extent.segment].write(slot.extent.offset_bytes, bytes);
    }

    /// Says that these slots are still its own, and no others: which of them the daemon knows.
    pub fn confirm(&mut self, slots: &[Slot]) -> usize {
        let held = |slot: &Slot| Held {
            hold: slot.hold,
            segment: slot.extent.segment,
            offset_bytes: slot.extent.offset_bytes,
            kind: HoldKind::Reservation,
        };
        let held: Vec<Held> = slots.iter().map(held).collect();
        let Reply::Confirmed(confirmed) = self.ask(&Request::Confirm(held.into())) else { panic!("not confirmed") };
        assert_eq!(self.ask(&Request::Confirm(Vec::new().into())).status(), Status::Done);
        confirmed.count_ones()
    }

    /// Commits with the sums of what the blocks are to be.
    pub fn commit(&mut self, run: &Run, slots: &[Slot]) {
        let filled = slots.iter().enumerate();
        let filled: Vec<Filled> =
            filled.map(|(block, slot)| Filled { hold: slot.hold, sums: fragment_sums(&run.payload(block)) }).collect();
        let reply = self.ask(&Request::Commit(filled.into()));
        assert_eq!(reply, Reply::Committed(vec![CommitOutcome::Stored; slots.len()]));
    }

    /// Puts a run as it should be put.
    pub fn put(&mut self, run: &Run) -> Vec<Slot> {
        let slots = self.reserve(run);
        self.fill_and_commit(run, &slots);
        slots
    }

    /// Writes the blocks of a run to its slots, and commits them.
    pub fn fill_and_commit(&mut self, run: &Run, slots: &[Slot]) {
        for (block, slot) in slots.iter().enumerate() {
            self.fill(slot, &run.payload(block));
        }
        self.commit(run, slots);
    }

    pub fn leave(self) {
        self.socket.say(ToDaemon::Leave, &[]);
        self.socket.expect_end();
    }
}

/// What was granted.
pub fn holds_of(outcomes: &[ReserveOutcome]) -> Vec<HoldId> {
    let holds = outcomes.iter().filter_map(|outcome| match outcome {
        ReserveOutcome::Granted { hold, .. } => Some(*hold),
        _ => None,
    });
    holds.collect()
}
