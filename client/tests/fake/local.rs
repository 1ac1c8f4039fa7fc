//! The local door of the fake daemon: a ring in front of the same `InMemory`, with memory of its own for leases and reservations.
//!
//! What is leased is copied to a slot of the shared file (or of a file that the client has to fetch), what is committed is read from
//! where the client wrote it. Files are read and written as files, never mapped here.

use std::collections::{HashMap, HashSet};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tender_client::proto::BlockKey;
use tender_client::proto::descriptors::{self, Bell, EventFd, Process};
use tender_client::proto::door::Reply;
use tender_client::proto::greeting::{MESSAGE_BYTES, SHARED_MAPPING, ToClient, ToDaemon, door_path};
use tender_client::proto::ring::{DaemonRing, RingMemory, Submission, Ticket};

use super::Node;
use super::slots::Slots;

/// Bytes of each file that leases lie in; only what is written takes memory.
pub const FILE_BYTES: u64 = 1 << 30;

/// Bytes of the client's own memory, whose pages are all made.
pub const OWN_BYTES: u64 = 24 << 20;

/// The first client's own memory; that of each further one has the next name.
pub const OWN_MAPPING: u32 = 100;

/// Memory of another member, which is fetched.
pub const THEIR_MAPPING: u32 = 9;

/// How the door behaves, and what it saw.
#[derive(Debug)]
pub struct Script {
    /// Refuse to open.
    pub refuses: bool,
    /// Say that every lease is to be verified.
    pub verifies_all: bool,
    /// Say so of each lease.
    pub verifies_each: bool,
    /// Change a byte of the second block of a lease.
    pub flips: bool,
    /// Lease in `THEIR_MAPPING`, which is given, or not.
    pub leases_elsewhere: bool,
    pub gives_elsewhere: bool,
    /// Say something wrong of where a leased block lies.
    pub misplaces: Misplaced,
    /// Most bytes leased at a time.
    pub budget_bytes: u64,
    /// Most bytes reserved at a time; no memory to write is given when it is 0.
    pub ingest_bytes: u64,
    /// Name another mapping in reservations than the one that was given.
    pub misnames: fn(usize) -> bool,
    /// Put off all answers.
    pub holds: bool,
    /// Answer `Busy` to so many requests that give something back.
    pub busy: usize,
    /// Answer everything with bytes that are no reply.
    pub babbles: bool,
    /// Carry out what is asked and answer nothing.
    pub swallows: bool,
    /// Close all rings; the sockets stay.
    pub closes: bool,
    /// End so many rings and their sockets, at once.
    pub ends: usize,
    /// What a ring held, and its memory, outlive it for who comes again: as when a worker is started again.
    pub keeps: bool,
    /// Say that nothing is confirmed, though it stands.
    pub denies: bool,
    /// Offer memory to write; not before this is so.
    pub offers: bool,
    /// What becomes of memory that is brought.
    pub bringing: Bringing,
    /// Give up the memory to write, once.
    pub forgets: bool,
    /// What was seen.
    pub opened: usize,
    pub mapped: usize,
    pub brought: usize,
    /// What was asked for, in order.
    pub fetched: Vec<u32>,
    pub left: usize,
    /// Of these, who held something.
    pub left_holding: usize,
    pub asked: usize,
    pub leased_bytes: u64,
    pub leased_bytes_max: u64,
    pub put_bytes: u64,
    /// Leases and reservations that nobody has given back.
    pub held: HashMap<u64, Held>,
    pub next_hold: u64,
}

/// What becomes of memory that is brought.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bringing {
    /// A daemon that does not know of it.
    Unknown,
    Taken,
    NotTaken,
}

/// What is wrong with a leased block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Misplaced {
    Nothing,
    BehindTheEnd,
    Length,
    Shard,
    FewParts,
}

#[derive(Clone, Debug)]
pub struct Held {
    pub mapping: u32,
    pub offset: u64,
    pub bytes: u64,
    /// What is being written there; else it is a lease.
    pub writing: Option<(BlockKey, tender_client::proto::Shard)>,
    pub parent: BlockKey,
}

impl Default for Script {
    fn default() -> Self {
        Self {
            refuses: false,
            verifies_all: false,
            verifies_each: false,
            flips: false,
            leases_elsewhere: false,
            gives_elsewhere: true,
            misplaces: Misplaced::Nothing,
            budget_bytes: FILE_BYTES,
            ingest_bytes: OWN_BYTES,
            misnames: |_| false,
            holds: false,
            busy: 0,
            babbles: false,
            swallows: false,
            closes: false,
            ends: 0,
            keeps: false,
            denies: false,
            offers: true,
            bringing: Bringing::Taken,
            forgets: false,
            opened: 0,
            mapped: 0,
            brought: 0,
            fetched: Vec::new(),
            left: 0,
            left_holding: 0,
            asked: 0,
            leased_bytes: 0,
            leased_bytes_max: 0,
            put_bytes: 0,
            held: HashMap::new(),
            next_hold: 1,
        }
    }
}

/// One life of the door.
pub struct LocalDoor {
    pub script: Arc<Mutex<Script>>,
    path: PathBuf,
    is_over: Arc<AtomicBool>,
    accepting: Option<JoinHandle<()>>,
}

impl LocalDoor {
    pub fn beside(node: &Arc<Node>, socket: &Path, script: Script) -> Self {
        let path = door_path(socket);
        let _left_behind = std::fs::remove_file(&path);
        let listener = UnixListener::bind(&path).unwrap();
        listener.set_nonblocking(true).unwrap();
        let (script, is_over) = (Arc::new(Mutex::new(script)), Arc::new(AtomicBool::new(false)));
        let (node, shared, over) = (Arc::clone(node), Arc::clone(&script), Arc::clone(&is_over));
        let accepting = thread::spawn(move || {
            let slots = Arc::new(Mutex::new(Slots::new()));
            let mut clients = Vec::new();
            while !over.load(Ordering::Relaxed) {
                match listener.accept() {
                    Ok((socket, _)) => {
                        let client = (Arc::clone(&node), Arc::clone(&shared), Arc::clone(&over), Arc::clone(&slots));
                        clients.push(thread::spawn(move || serve(socket, client)));
                    }
                    Err(_) => thread::sleep(Duration::from_millis(1)),
                }
            }
            clients.into_iter().for_each(|client| client.join().unwrap());
        });
        Self { script, path, is_over, accepting: Some(accepting) }
    }

    pub fn script<T>(&self, work: impl FnOnce(&mut Script) -> T) -> T {
        work(&mut self.script.lock().unwrap())
    }

    /// Waits until that is so.
    pub async fn until(&self, what: &str, mut is_so: impl FnMut(&mut Script) -> bool) {
        let start = Instant::now();
        while !self.script(&mut is_so) {
            assert!(start.elapsed() < Duration::from_secs(10), "{what}: {:?}", self.script.lock().unwrap());
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
}

/// Killed: sockets end, nothing is said.
impl Drop for LocalDoor {
    fn drop(&mut self) {
        self.is_over.store(true, Ordering::Relaxed);
        let ended = self.accepting.take().unwrap().join();
        assert!(ended.is_ok() || thread::panicking(), "the fake door failed");
        let _gone = std::fs::remove_file(&self.path);
    }
}

type Shared = (Arc<Node>, Arc<Mutex<Script>>, Arc<AtomicBool>, Arc<Mutex<Slots>>);

fn serve(socket: UnixStream, (node, script, is_over, slots): Shared) {
    let soon = || Instant::now() + Duration::from_secs(5);
    let mut message = [0; MESSAGE_BYTES];
    // Who connects and goes again, at the end of a test, wants nothing.
    let Ok(came) = descriptors::receive(socket.as_fd(), &mut message, 1, soon()) else { return };
    let Ok(ToDaemon::Open { attachment, former }) = ToDaemon::decode(&message) else { panic!("{message:?}") };
    let process = Process::from_fd(came.into_iter().next().unwrap()).unwrap();
    assert!(process.same_process(rustix::process::getpid()));
    let say = |said: ToClient, fds: &[&OwnedFd]| {
        let fds: Vec<_> = fds.iter().map(|fd| fd.as_fd()).collect();
        // Who is gone hears nothing.
        let _gone = descriptors::send(socket.as_fd(), &said.encode(), &fds, soon());
    };
    let (refuses, verify, gives, bringing) = {
        let script = script.lock().unwrap();
        (script.refuses, script.verifies_all, script.ingest_bytes > 0, script.bringing)
    };
    if refuses {
        return say(ToClient::Refused("no ring for you; use gRPC".into()), &[]);
    }
    let (memory, file) = RingMemory::create().unwrap();
    let mut ring = DaemonRing::format(memory).unwrap();
    let (doorbell, (bell, listener)) = (EventFd::new().unwrap(), Bell::new().unwrap());
    let doorbell_copy = doorbell.as_fd().try_clone_to_owned().unwrap();
    // The end of its ring may not have been noticed yet.
    let until = soon();
    let left = loop {
        let left = slots.lock().unwrap().left.remove(&former);
        let is_awaited = left.is_none() && former != 0 && script.lock().unwrap().keeps && Instant::now() < until;
        if !is_awaited {
            break left;
        }
        thread::sleep(Duration::from_millis(1));
    };
    let is_kept = left.is_some();
    let (own, kept, kept_mapping) = left.unwrap_or_else(|| (Slots::file(OWN_BYTES), HashSet::new(), 0));
    let shared = slots.lock().unwrap().shared.try_clone().unwrap();
    let brought_bytes = if bringing == Bringing::Unknown { 0 } else { OWN_BYTES };
    let opened = ToClient::Opened { shared_bytes: FILE_BYTES, verify, brought_bytes };
    say(opened, &[&file, &doorbell_copy, &listener, &shared]);
    drop(listener);
    let (own_mapping, first_hold) = {
        let mut script = script.lock().unwrap();
        script.opened += 1;
        let fresh = OWN_MAPPING + script.opened as u32 - 1;
        (if is_kept { kept_mapping } else { fresh }, script.next_hold)
    };
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let (holds, confirmed) = (kept, HashSet::new());
    let mut client =
        Client { node, script, slots, own, own_mapping, attachment, first_hold, holds, confirmed, is_mapped: is_kept };
    let mut put_off: Vec<(Submission, Ticket, Vec<u8>)> = Vec::new();
    let (mut request, mut reply) = (Vec::new(), Vec::new());
    let (mut filled, mut is_awake, mut is_closed) = (0, true, false);
    let (mut is_offered, mut files) = (is_kept, Vec::new());
    while !is_over.load(Ordering::Relaxed) {
        {
            let mut script = client.script.lock().unwrap();
            if script.ends > 0 {
                script.ends -= 1;
                break;
            }
        }
        let (holds, babbles, swallows, closes, offers, forgets) = {
            let mut script = client.script.lock().unwrap();
            let forgets = std::mem::take(&mut script.forgets);
            (script.holds, script.babbles, script.swallows, script.closes, script.offers, forgets)
        };
        if forgets {
            client.is_mapped = false;
            say(ToClient::Forget(own_mapping), &[]);
        }
        if gives && offers && !is_offered {
            is_offered = true;
            say(ToClient::Map { mapping: own_mapping, bytes: OWN_BYTES, writable: true }, &[&client.own]);
        }
        // Who sleeps looks only when it was woken, or else a client that forgets to do so would not be noticed.
        while is_awake && let Some(taken) = ring.take(&mut request) {
            let taken = taken.unwrap();
            client.script.lock().unwrap().asked += 1;
            put_off.push((taken.submission, taken.ticket, request.clone()));
        }
        let mut is_news = false;
        if !holds {
            for (submission, ticket, request) in put_off.drain(..) {
                assert_eq!(submission.attachment, client.attachment);
                let answer = runtime.block_on(client.answer(submission.verb, &request));
                let left_out: Vec<_> = answer.encode(&mut reply).iter().flat_map(|block| block.parts.clone()).collect();
                for part in left_out {
                    client.end(part.hold.0);
                }
                if babbles {
                    reply = vec![255; 9];
                    client.end_all();
                }
                if swallows {
                    continue;
                }
                ring.complete(ticket, answer.status().number(), &reply);
                is_news = true;
            }
        }
        if closes && !is_closed {
            ring.close();
            (is_closed, is_news) = (true, true);
        }
        if is_news && ring.client_sleeps() {
            let _gone = bell.ring();
        }
        is_awake = !ring.prepare_to_sleep();
        if !is_awake {
            let mut fds = [doorbell.as_fd(), socket.as_fd()].map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN));
            poll(&mut fds, Timespec::try_from(Duration::from_millis(2)).ok().as_ref()).unwrap();
            is_awake = doorbell.clear().unwrap();
        }
        ring.woke();
        match descriptors::try_receive(socket.as_fd(), &mut message[filled..], 1) {
            Ok(received) if received.bytes == 0 => break,
            Ok(received) => {
                filled += received.bytes;
                files.extend(received.descriptors);
            }
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
            Err(_) => break,
        }
        if filled < MESSAGE_BYTES {
            continue;
        }
        filled = 0;
        let said = ToDaemon::decode(&message).unwrap();
        if let ToDaemon::Fetch(mapping) = said {
            client.script.lock().unwrap().fetched.push(mapping);
        }
        match said {
            ToDaemon::Mapped(mapping) if mapping == own_mapping => {
                client.is_mapped = true;
                client.script.lock().unwrap().mapped += 1;
            }
            ToDaemon::Bring(mapping) if mapping == own_mapping => {
                client.script.lock().unwrap().brought += 1;
                let file = files.pop().expect("memory that is brought comes with its file");
                if bringing == Bringing::Taken {
                    client.own = file;
                    client.is_mapped = true;
                    say(ToClient::Taken(mapping), &[]);
                } else {
                    say(ToClient::NotTaken { mapping, why: "not today".into() }, &[]);
                }
            }
            ToDaemon::Fetch(THEIR_MAPPING) if client.script.lock().unwrap().gives_elsewhere => {
                let theirs = client.slots.lock().unwrap().theirs.try_clone().unwrap();
                say(ToClient::Map { mapping: THEIR_MAPPING, bytes: FILE_BYTES, writable: false }, &[&theirs]);
            }
            ToDaemon::Fetch(mapping) if is_kept && mapping == own_mapping => {
                say(ToClient::Map { mapping, bytes: OWN_BYTES, writable: false }, &[&client.own]);
            }
            ToDaemon::Fetch(mapping) => say(ToClient::Forget(mapping), &[]),
            ToDaemon::Leave => {
                let mut script = client.script.lock().unwrap();
                script.left += 1;
                script.left_holding += usize::from(!client.holds.is_empty());
                break;
            }
            said => panic!("{said:?}"),
        }
    }
    if client.script.lock().unwrap().keeps {
        let left = (client.own, std::mem::take(&mut client.holds), own_mapping);
        client.slots.lock().unwrap().left.insert(attachment, left);
    } else {
        client.end_all();
    }
}

/// A client as the door knows it.
pub struct Client {
    pub node: Arc<Node>,
    pub script: Arc<Mutex<Script>>,
    pub slots: Arc<Mutex<Slots>>,
    /// Its own memory.
    pub own: OwnedFd,
    pub own_mapping: u32,
    pub attachment: u64,
    /// What was granted before it came has a smaller name.
    pub first_hold: u64,
    pub holds: HashSet<u64>,
    /// Of those from before.
    pub confirmed: HashSet<u64>,
    pub is_mapped: bool,
}

impl Client {
    async fn answer(&mut self, verb: u16, request: &[u8]) -> Reply {
        let store = self.node.attached.lock().unwrap().get(&self.attachment).cloned();
        match store {
            Some(store) => self.answer_of(&store, verb, request).await,
            None => Reply::Unattached,
        }
    }

    fn end_all(&mut self) {
        for hold in std::mem::take(&mut self.holds) {
            self.end(hold);
        }
    }

    /// A lease or reservation ends, if it stands.
    pub fn end(&mut self, hold: u64) -> Option<Held> {
        self.holds.remove(&hold);
        let mut script = self.script.lock().unwrap();
        let held = script.held.remove(&hold)?;
        match &held.writing {
            Some(place) => {
                script.put_bytes -= held.bytes;
                self.node.writing.lock().unwrap().remove(place);
            }
            None => script.leased_bytes -= held.bytes,
        }
        if held.mapping < OWN_MAPPING {
            self.slots.lock().unwrap().free(held.mapping, held.offset, held.bytes);
        }
        Some(held)
    }

    /// A lease or reservation begins.
    pub fn begin(&mut self, held: Held) -> u64 {
        let mut script = self.script.lock().unwrap();
        let hold = script.next_hold;
        script.next_hold += 1;
        match held.writing {
            Some(_) => script.put_bytes += held.bytes,
            None => {
                script.leased_bytes += held.bytes;
                script.leased_bytes_max = script.leased_bytes_max.max(script.leased_bytes);
            }
        }
        script.held.insert(hold, held);
        self.holds.insert(hold);
        hold
    }
}

const _: () = assert!(SHARED_MAPPING < OWN_MAPPING && THEIR_MAPPING < OWN_MAPPING && SHARED_MAPPING != THEIR_MAPPING);
