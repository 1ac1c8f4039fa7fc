//! A folder in which daemons live, one after the other, and what they do and say there.

use std::fs::{self, File, OpenOptions};
use std::net::{SocketAddr, TcpListener};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;
use tender_client::proto::wire::{StatusReply, Tier, TierStatus};
use tender_client::{Attach, Operator, Remote, Target};

use super::{run, signal, tender, tender_at, wait_until};

/// A token that is long enough.
pub const TOKEN: &str = "0123456789abcdef0123456789abcdef";

/// Longest wait for a daemon that refuses to start: it waits 5 s for the lock of a tier file.
const REFUSAL: Duration = Duration::from_secs(30);

/// Folder, socket and flags of daemons; outlives each of them.
pub struct Site {
    folder: TempDir,
    flags: Vec<String>,
    /// Another file than that of the tests.
    binary: Option<PathBuf>,
    /// Whether the configuration, and no flag, names the folders of the tier files.
    configures_folders: bool,
}

impl Site {
    /// Its daemons get these flags besides socket and folder.
    pub fn new(flags: &[&str]) -> Self {
        let flags = flags.iter().map(|&flag| flag.to_owned()).collect();
        Self { folder: TempDir::new().unwrap(), flags, binary: None, configures_folders: false }
    }

    /// Small tiers: 64 MiB of host memory, 128 MiB of disk.
    pub fn small() -> Self {
        Self::new(&["--host", "64MiB", "--disk", "128MiB"])
    }

    /// A tenant `default` without a token and a tenant `other` with `TOKEN`, and these flags.
    pub fn of_two_tenants(flags: &[&str]) -> Self {
        let mut site = Self::new(flags);
        let token_file = site.secret("other.token", TOKEN, 0o600);
        site.configure(&format!(
            "[[tenants]]\nname = \"default\"\n[[tenants]]\nname = \"other\"\ntoken_file = \"{}\"\n",
            token_file.display()
        ));
        site
    }

    /// Two folders, each with a tier file of 64 MiB.
    pub fn of_two_folders() -> Self {
        let mut site = Self::small();
        let folders = ["first", "second"].map(|name| format!("\"{}\"", site.path(name).display()));
        site.configure(&format!("dirs = [{}]\n", folders.join(", ")));
        site.configures_folders = true;
        site
    }

    /// Daemons started from now on are of a copy of the binary, which this is.
    pub fn copy_binary(&mut self) -> PathBuf {
        let copy = self.path("tender");
        fs::copy(env!("CARGO_BIN_EXE_tender"), &copy).unwrap();
        self.binary = Some(copy.clone());
        copy
    }

    /// A configuration file, for daemons started from now on.
    pub fn configure(&mut self, config: &str) {
        let file = self.path("tender.toml");
        fs::write(&file, config).unwrap();
        self.flag("--config", file.display());
    }

    /// One more flag with its value, for daemons started from now on.
    pub fn flag(&mut self, name: &str, value: impl ToString) {
        self.flags.extend([name.to_owned(), value.to_string()]);
    }

    /// Another value of a flag that was given.
    pub fn change_flag(&mut self, name: &str, value: &str) {
        let at = self.flags.iter().position(|flag| flag == name).expect(name);
        value.clone_into(&mut self.flags[at + 1]);
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub fn socket(&self) -> PathBuf {
        self.path("tender.sock")
    }

    pub fn target(&self) -> Target {
        Target::Unix(self.socket())
    }

    pub fn tier_file(&self) -> PathBuf {
        self.path("data/tender-0.tier")
    }

    /// The tier files of a site of two folders.
    pub fn tier_files(&self) -> [PathBuf; 2] {
        ["first/tender-0.tier", "second/tender-1.tier"].map(|name| self.path(name))
    }

    /// A file with that content and mode.
    pub fn secret(&self, name: &str, content: &str, mode: u32) -> PathBuf {
        let path = self.path(name);
        fs::write(&path, content).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        path
    }

    /// `tender serve` with this site's flags.
    pub fn command(&self) -> Command {
        let mut command = self.binary.as_deref().map_or_else(tender, tender_at);
        command.arg("serve").arg("--socket").arg(self.socket()).args(&self.flags);
        if !self.configures_folders {
            command.arg("--dir").arg(self.path("data"));
        }
        command
    }

    /// Starts a daemon and waits until it answers.
    pub fn start(&self) -> Running {
        let log = self.path("daemon.log");
        let mut running = Running { child: spawn(&mut self.command(), &log), socket: self.socket(), log };
        wait_until("a daemon", || {
            if let Some(status) = running.child.try_wait().unwrap() {
                panic!("the daemon ended ({status}): {}", running.said());
            }
            // A command costs more than a look at the socket, which is there before it is served.
            UnixStream::connect(&running.socket).is_ok()
                && run(tender().arg("status").arg("--socket").arg(&running.socket)).status.success()
        });
        running
    }

    /// Starts a daemon and waits until its memory is prepared: before that a get may be shed, which tells nothing of the block.
    pub async fn start_ready(&self) -> Running {
        let running = self.start();
        let began = Instant::now();
        while running.tier(Tier::Host).await.state != "ready" {
            assert!(began.elapsed() < super::PATIENCE, "memory is never prepared: {}", running.said());
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        running
    }

    pub async fn attach(&self, attach: Attach) -> Remote {
        Remote::attach(self.target(), None, attach).await.unwrap()
    }

    pub async fn attach_other(&self, attach: Attach) -> Remote {
        Remote::attach(self.target(), Some(TOKEN.to_owned()), attach).await.unwrap()
    }
}

fn spawn(command: &mut Command, log: &Path) -> Child {
    let log = OpenOptions::new().create(true).append(true).mode(0o600).open(log).unwrap();
    command.stdout(Stdio::null()).stderr(log).spawn().unwrap()
}

/// What a daemon says that does not start: it must end by itself, with status 1 or 2, and without a panic.
pub fn refusal(command: &mut Command) -> String {
    let folder = TempDir::new().unwrap();
    let log = folder.path().join("log");
    File::create(&log).unwrap();
    let mut running = Running { child: spawn(command, &log), socket: PathBuf::new(), log };
    let status = running.ends_within(REFUSAL);
    let said = running.said();
    assert!(status.is_some(), "it was to refuse, but it started: {command:?}\n{said}");
    let code = status.unwrap().code();
    assert!(matches!(code, Some(1 | 2)), "{code:?}: {said}");
    assert!(!said.contains("panicked") && !said.is_empty(), "{said}");
    said
}

/// A daemon's process; killed when dropped.
pub struct Running {
    child: Child,
    socket: PathBuf,
    log: PathBuf,
}

impl Running {
    /// kill -9 of the worker; returns when the next one runs.
    pub fn kill_worker(&self) {
        let keeper = self.child.id();
        let worker = super::children_of(keeper)[0];
        signal(worker, "KILL");
        wait_until("the end of the worker", || !super::runs(worker));
        wait_until("the next worker", || super::children_of(keeper).iter().any(|child| *child != worker));
    }

    /// kill -9 of each worker as soon as it is there, until the keeper has said so much.
    pub fn kill_workers_until_it_says(&self, words: &str) {
        let began = Instant::now();
        let mut killed = None;
        loop {
            let worker = super::children_of(self.child.id()).into_iter().find(|worker| Some(*worker) != killed);
            // Looked for before: once it is said, the keeper may have other children for a moment.
            if self.said().contains(words) {
                return;
            }
            assert!(began.elapsed() < super::PATIENCE, "`{words}` is not in {}", self.said());
            if let Some(worker) = worker {
                signal(worker, "KILL");
                killed = Some(worker);
            }
        }
    }

    /// Sends a signal to the worker alone.
    pub fn signal_worker(&self, name: &str) {
        signal(super::children_of(self.child.id())[0], name);
    }

    /// kill -9 of the worker, where no other one can follow: all that was said when the daemon has ended, which must be badly.
    pub fn kill_worker_for_good(mut self) -> String {
        self.signal_worker("KILL");
        let status = self.ends_within(super::PATIENCE).expect("a daemon that cannot go on ends");
        assert!(!status.success() && !self.said().contains("panicked"), "{status}: {}", self.said());
        self.said()
    }

    fn ends_within(&mut self, patience: Duration) -> Option<ExitStatus> {
        let began = Instant::now();
        loop {
            let status = self.child.try_wait().unwrap();
            if status.is_some() || began.elapsed() > patience {
                return status;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// All that this site's daemons have said.
    pub fn said(&self) -> String {
        fs::read_to_string(&self.log).unwrap()
    }

    /// kill -9: nothing of it runs any more when this returns.
    pub fn kill(mut self) {
        assert!(self.child.try_wait().unwrap().is_none(), "it ended before it was killed: {}", self.said());
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        assert!(!self.said().contains("panicked"), "{}", self.said());
    }

    /// SIGTERM; it must end well.
    pub fn stop(mut self) {
        signal(self.child.id(), "TERM");
        let status = self.ends_within(super::PATIENCE).expect("a daemon that was asked to stop ends");
        assert!(status.success() && !self.said().contains("panicked"), "{status}: {}", self.said());
    }

    pub async fn status(&self) -> StatusReply {
        let operator = Operator::connect(Target::Unix(self.socket.clone()), None).await.unwrap();
        operator.status().await.unwrap()
    }

    pub async fn counter(&self, name: &str) -> u64 {
        let status = self.status().await;
        status.counters.iter().find(|counter| counter.name == name).expect(name).value
    }

    pub async fn tier(&self, tier: Tier) -> TierStatus {
        self.status().await.tiers.into_iter().find(|status| status.tier == i32::from(tier)).unwrap()
    }

    /// Waits until no slot is leased, being filled, loaded or written back.
    pub async fn at_rest(&self) {
        let began = Instant::now();
        loop {
            let status = self.status().await;
            if status.tiers.iter().all(|tier| tier.leased_slots == 0 && tier.busy_slots == 0) {
                return;
            }
            assert!(began.elapsed() < Duration::from_secs(20), "slots are in use for good: {:?}", status.tiers);
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ended_already = self.child.kill();
        let _status = self.child.wait();
    }
}

/// A loopback address that nobody listens on just now.
pub fn free_address() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
}
