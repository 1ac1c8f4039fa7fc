//! A daemon of one's own, in a folder of its own: configured, started, stopped, and quoted when it dies.

use std::fs::File;
use std::io::{Read as _, Seek as _, SeekFrom, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use tokio::net::UnixStream;
use tokio::process::Child;
use tokio::time::{Instant, sleep};

use super::process::{child, random_bytes};
use crate::failure::Failure;

/// A daemon that listens no later than this, or never will.
const START_TIMEOUT: Duration = Duration::from_secs(60);
/// A killed process is gone as soon as its memory is freed and its I/O is done.
const KILL_TIMEOUT: Duration = Duration::from_secs(10);
/// What is shown of a daemon's last words.
const LAST_WORDS_BYTES: i64 = 2_000;
/// Longest path that a Unix socket can have.
const SOCKET_PATH_BYTES_MAX: usize = 107;

/// What a daemon of one's own is given.
#[derive(Clone, Debug)]
pub struct DaemonPlan {
    /// For its configuration, socket, log and data.
    pub folder: PathBuf,
    /// Host memory.
    pub host_bytes: u64,
    /// Disk.
    pub disk_bytes: u64,
    /// With more than one, each has a token.
    pub tenants: usize,
}

impl DaemonPlan {
    /// The socket, unless its path would be too long.
    fn socket(&self) -> Result<PathBuf, Failure> {
        let socket = self.folder.join("tender.sock");
        if socket.as_os_str().len() > SOCKET_PATH_BYTES_MAX {
            let (length, path) = (socket.as_os_str().len(), socket.display());
            return Err(Failure::message(format_args!(
                "a socket's path may have {SOCKET_PATH_BYTES_MAX} bytes, but {path} has {length}; choose a shorter --dir"
            )));
        }
        Ok(socket)
    }

    /// Writes the configuration, and tokens where they are needed; tells the token files.
    fn write(&self, config_file: &Path, socket: &Path) -> Result<Vec<Option<PathBuf>>, Failure> {
        let quoted = |path: &Path| serde_json::Value::from(path.to_string_lossy()).to_string();
        let data = self.folder.join("data");
        std::fs::create_dir_all(&data)
            .map_err(Failure::of(format_args!("cannot make the folder {}", data.display())))?;
        let (host, disk) = (self.host_bytes, self.disk_bytes);
        let mut toml =
            format!("socket = {}\ndir = {}\nhost = \"{host}\"\ndisk = \"{disk}\"\n", quoted(socket), quoted(&data));
        let mut token_files = vec![None];
        if self.tenants > 1 {
            token_files = (0..self.tenants).map(|i| Some(self.folder.join(format!("tenant-{i}.token")))).collect();
        }
        for (i, file) in token_files.iter().enumerate() {
            let Some(file) = file else { continue };
            let token: String = random_bytes::<32>()?.iter().map(|byte| format!("{byte:02x}")).collect();
            write_private(file, &format!("{token}\n"))?;
            toml += &format!("[[tenants]]\nname = \"tenant-{i}\"\ntoken_file = {}\n", quoted(file));
        }
        write_private(config_file, &toml)?;
        Ok(token_files)
    }
}

fn write_private(file: &Path, text: &str) -> Result<(), Failure> {
    let opened = File::options().write(true).create(true).truncate(true).mode(0o600).open(file);
    opened
        .and_then(|mut opened| opened.write_all(text.as_bytes()))
        .map_err(Failure::of(format_args!("cannot write {}", file.display())))
}

/// A daemon of one's own.
#[derive(Debug)]
pub struct Daemon {
    child: Child,
    log_file: PathBuf,
    /// Where it listens.
    pub socket: PathBuf,
    /// Per tenant, what opens it.
    pub token_files: Vec<Option<PathBuf>>,
}

impl Daemon {
    /// Starts a daemon and waits until it listens.
    pub async fn start(plan: &DaemonPlan) -> Result<Self, Failure> {
        let socket = plan.socket()?;
        let config_file = plan.folder.join("tender.toml");
        let log_file = plan.folder.join("daemon.log");
        let token_files = plan.write(&config_file, &socket)?;
        let child = spawn_daemon(&config_file, &log_file)?;
        let mut daemon = Self { child, log_file, socket, token_files };
        daemon.wait_until_it_listens().await?;
        Ok(daemon)
    }

    /// Ends the daemon without regard for its data.
    pub async fn kill(&mut self) {
        drop(self.child.kill().await);
    }

    /// Waits until the daemon ends, which it should not.
    pub async fn died(&mut self) -> Failure {
        match self.child.wait().await {
            Ok(status) => self.ended(&format!("the daemon died ({status})")),
            Err(error) => Failure::of("cannot wait for the daemon")(error),
        }
    }

    async fn wait_until_it_listens(&mut self) -> Result<(), Failure> {
        let began = Instant::now();
        while UnixStream::connect(&self.socket).await.is_err() {
            if let Ok(Some(status)) = self.child.try_wait() {
                return Err(self.ended(&format!("the daemon ended at its start ({status})")));
            }
            if began.elapsed() > START_TIMEOUT {
                self.kill().await;
                return Err(self.ended(&format!("the daemon did not listen within {} s", START_TIMEOUT.as_secs())));
            }
            sleep(Duration::from_millis(5)).await;
        }
        Ok(())
    }

    fn ended(&self, what: &str) -> Failure {
        let mut words = Vec::new();
        let read = File::open(&self.log_file).and_then(|mut log| {
            let length = i64::try_from(log.metadata()?.len()).unwrap_or(i64::MAX);
            log.seek(SeekFrom::End(-length.min(LAST_WORDS_BYTES)))?;
            log.read_to_end(&mut words)
        });
        let words = String::from_utf8_lossy(&words);
        match (read, words.trim()) {
            (Ok(_), "") | (Err(_), _) => Failure::message(format_args!("{what} and left no word why")),
            (Ok(_), words) => Failure::message(format_args!("{what}; its last words:\n{words}")),
        }
    }
}

/// However the replay ends, its daemon is gone before its folder is removed.
impl Drop for Daemon {
    fn drop(&mut self) {
        let Ok(()) = self.child.start_kill() else { return };
        let began = Instant::now();
        while matches!(self.child.try_wait(), Ok(None)) && began.elapsed() < KILL_TIMEOUT {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

fn spawn_daemon(config_file: &Path, log_file: &Path) -> Result<Child, Failure> {
    let log = File::options().create(true).append(true).open(log_file);
    let log = log.map_err(Failure::of(format_args!("cannot write {}", log_file.display())))?;
    let mut command = child("serve")?;
    command.arg("--config").arg(config_file).stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
    command.spawn().map_err(Failure::of("cannot start a daemon"))
}
