//! Processes that can be stopped and killed: this test program once more, told line by line what to do.
//!
//! An actor finds the path of a Unix socket in its environment, connects to it, and answers each line with one line. It ends when the
//! other side hangs up, so none outlives its test.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use rustix::process::Pid;
use tender_client::proto::BlockLayout;
use tender_client::{Attach, BlockView, Doors, PutOutcome, Remote, Target};

use crate::leases::lease;
use crate::memory::Memory;
use crate::raw::{Offer, Raw};
use crate::support::blocks::{Run, attach_to};
use crate::support::{PATIENCE, signal, wait_until};

/// Where to connect to.
const SOCKET: &str = "LOCAL_DOOR_ACTOR";

/// The test's end of an actor.
pub struct Actor {
    child: Option<Child>,
    lines: BufReader<UnixStream>,
}

/// A place where an actor will call.
pub struct Stage {
    listener: UnixListener,
    pub socket: PathBuf,
}

impl Stage {
    pub fn new(socket: PathBuf) -> Self {
        Self { listener: UnixListener::bind(&socket).unwrap(), socket }
    }

    /// Waits for the actor; its process is somebody else's child.
    pub fn enter(self) -> Actor {
        self.listener.set_nonblocking(true).unwrap();
        let mut called = None;
        wait_until("an actor", || {
            called = self.listener.accept().ok();
            called.is_some()
        });
        let stream = called.unwrap().0;
        stream.set_nonblocking(false).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        Actor { child: None, lines: BufReader::new(stream) }
    }
}

impl Actor {
    /// Starts one, which is a child of this process.
    pub fn start(socket: PathBuf) -> Self {
        let stage = Stage::new(socket);
        let child = spawn(&stage.socket);
        let mut actor = stage.enter();
        actor.child = Some(child);
        actor
    }

    /// Has it do something; what it says to that.
    pub fn ask(&mut self, line: &str) -> String {
        writeln!(self.lines.get_mut(), "{line}").unwrap();
        let mut said = String::new();
        self.lines.read_line(&mut said).unwrap();
        assert!(said.ends_with('\n'), "an actor that was told `{line}` ended with `{said}`");
        said.trim_end().to_owned()
    }

    pub fn expect(&mut self, line: &str, answer: &str) {
        assert_eq!(self.ask(line), answer, "to `{line}`");
    }

    pub fn pid(&self) -> Pid {
        Pid::from_child(self.child.as_ref().expect("a child of this process"))
    }

    pub fn signal(&self, name: &str) {
        signal(self.pid().as_raw_nonzero().get() as u32, name);
    }

    /// kill -9: it is dead when this returns.
    pub fn kill(mut self) {
        self.end();
    }

    fn end(&mut self) {
        if let Some(child) = &mut self.child {
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }
}

impl Drop for Actor {
    fn drop(&mut self) {
        self.end();
    }
}

/// What an actor attaches with, as a line: `attach SOCKET TOKEN|- GROUP MODEL BLOCK_BYTES`.
pub fn attach_line(socket: &Path, token: Option<&str>, group: &str, model: &str, block_bytes: u64) -> String {
    format!("attach {} {} {group} {model} {block_bytes}", socket.display(), token.unwrap_or("-"))
}

fn spawn(socket: &Path) -> Child {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["an_actor", "--exact", "--ignored", "--nocapture"]).env(SOCKET, socket);
    command.stdin(Stdio::null()).stdout(Stdio::null()).spawn().unwrap()
}

/// An actor's life. Does nothing in a process that is none.
pub fn live() {
    let Some(socket) = std::env::var_os(SOCKET) else { return };
    let stream = UnixStream::connect(socket).unwrap();
    // The process behind the ring must answer while this thread waits for its next line.
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let mut part = Part::default();
    for line in BufReader::new(stream.try_clone().unwrap()).lines() {
        // Who is killed in the middle of a line hears no more.
        let Ok(line) = line else { return };
        let words: Vec<&str> = line.split(' ').collect();
        let answer = runtime.block_on(part.play(&words));
        if writeln!(&stream, "{answer}").is_err() {
            return;
        }
    }
}

/// What an actor has.
#[derive(Default)]
struct Part {
    remote: Option<Remote>,
    raw: Option<Raw>,
    views: Vec<(Run, Vec<BlockView>)>,
    offer: Option<(Run, Offer)>,
    inherited: Option<(File, Memory)>,
    children: Vec<Child>,
}

impl Part {
    async fn play(&mut self, words: &[&str]) -> String {
        match *words {
            ["attach", socket, token, group, model, block_bytes] => {
                let layout = BlockLayout::opaque(block_bytes.parse().unwrap());
                let attach = Attach { group: group.to_owned(), ..attach_to(model, layout) };
                let token = Some(token).filter(|token| *token != "-");
                let target = Target::Unix(socket.into());
                let remote = Remote::attach(target, token.map(str::to_owned), attach.clone()).await.unwrap();
                assert_eq!(remote.door(), Doors::Ring);
                self.raw = Some(Raw::open(Path::new(socket), token, &attach).await);
                self.remote = Some(remote);
                "attached".to_owned()
            }
            // Whole blocks; how many of them are there now.
            ["put", seed, blocks] => {
                let (remote, run) = (self.remote(), self.run(seed, blocks));
                let outcomes = run.put_in(remote, 1).await;
                format!("stored {}", outcomes.iter().filter(|outcome| **outcome == PutOutcome::Stored).count())
            }
            // Leases, kept until the process ends.
            ["lease", seed, blocks] => {
                let (remote, run) = (self.remote(), self.run(seed, blocks));
                let views = lease(remote, &run).await;
                let leased = views.len();
                self.views.push((run, views));
                format!("leased {leased}")
            }
            // Whether what is leased is still what was put.
            ["check"] => {
                if self.views.iter().all(|(run, views)| run.equals(views)) { "right" } else { "wrong" }.to_owned()
            }
            // Reservations of which the first half is written.
            ["half", seed, blocks] => {
                let raw = self.raw.as_mut().unwrap();
                let run = raw.run(seed.parse().unwrap(), blocks.parse().unwrap());
                let slots = raw.reserve(&run);
                for (block, slot) in slots.iter().enumerate() {
                    let payload = run.payload(block);
                    raw.fill(slot, &payload[..payload.len() / 2]);
                }
                format!("granted {}", slots.len())
            }
            // Asks for memory, and before it says that it has mapped it hands the descriptor on to a child of its own.
            ["fork", stage, seed, blocks] => {
                let raw = self.raw.as_mut().unwrap();
                let run = raw.run(seed.parse().unwrap(), blocks.parse().unwrap());
                raw.submit(&Raw::reserve_request(&run));
                let offer = raw.offer();
                rustix::io::fcntl_setfd(&offer.file, rustix::io::FdFlags::empty()).unwrap();
                // It is to outlive this process, and ends when its stage does.
                self.children.push(spawn(Path::new(stage)));
                let (descriptor, bytes) = (offer.file.as_raw_fd(), offer.bytes);
                let answer = format!("{} {descriptor} {bytes}", offer.mapping);
                self.offer = Some((run, offer));
                answer
            }
            // Maps the memory after all, and puts the run in it.
            ["accept"] => {
                let (raw, (run, offer)) = (self.raw.as_mut().unwrap(), self.offer.take().unwrap());
                raw.accept(&offer);
                let asked = Raw::reserve_request(&run).asked();
                let slots = Raw::granted(raw.answer(asked));
                raw.fill_and_commit(&run, &slots);
                format!("stored {}", slots.len())
            }
            // A descriptor that was inherited is mapped for writing.
            ["map", descriptor, bytes] => {
                let path = format!("/proc/self/fd/{descriptor}");
                let file = OpenOptions::new().read(true).write(true).open(path).unwrap();
                let memory = Memory::to_write(&file, bytes.parse().unwrap()).unwrap();
                self.inherited = Some((file, memory));
                "mapped".to_owned()
            }
            // All ways to come by memory to write that was closed for writers; those that are open.
            ["break-in"] => ways_in(self.inherited.as_ref().unwrap()).join(" "),
            // Overwrites all of it, again and again, for good.
            ["scribble"] => {
                let (_, memory) = self.inherited.take().unwrap();
                std::thread::spawn(move || {
                    for round in (0..=u8::MAX).cycle() {
                        overwrite(&memory, round);
                        std::thread::sleep(Duration::from_millis(5));
                    }
                });
                "scribbling".to_owned()
            }
            _ => panic!("no actor knows {words:?}"),
        }
    }

    fn remote(&self) -> &Remote {
        self.remote.as_ref().expect("attached")
    }

    fn run(&self, seed: &str, blocks: &str) -> Run {
        Run::new(self.remote(), seed.parse().unwrap(), blocks.parse().unwrap())
    }
}

/// Writes the same byte everywhere.
pub fn overwrite(memory: &Memory, byte: u8) {
    (0..memory.bytes()).step_by(4096).for_each(|offset| memory.write(offset, &[byte; 4096]));
}

/// Ways in which more can be written, or a file changed, through a descriptor.
pub fn ways_in((file, memory): &(File, Memory)) -> Vec<&'static str> {
    let bytes = memory.bytes();
    let again = OpenOptions::new().read(true).write(true).open(format!("/proc/self/fd/{}", file.as_fd().as_raw_fd()));
    let punch = rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE;
    let ways = [
        ("map", Memory::to_write(file, bytes).is_ok()),
        ("map-again", again.is_ok_and(|again| Memory::to_write(&again, bytes).is_ok())),
        ("write", file.write_at(&[1], 0).is_ok()),
        ("shrink", file.set_len(bytes / 2).is_ok()),
        ("grow", file.set_len(bytes * 2).is_ok()),
        ("punch", rustix::fs::fallocate(file, punch, 0, 4096).is_ok()),
    ];
    ways.into_iter().filter_map(|(way, is_open)| is_open.then_some(way)).collect()
}
