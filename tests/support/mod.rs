//! The `tender` binary, run as a person would, and a daemon to run it against.

pub mod blocks;
pub mod site;
pub mod wire;

use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;

/// Longer than anything here takes, even where other tests run beside it.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// The binary, with nothing of the caller's environment that it would listen to.
pub fn tender() -> Command {
    tender_at(Path::new(env!("CARGO_BIN_EXE_tender")))
}

/// The same of a binary at another place.
pub fn tender_at(binary: &Path) -> Command {
    let mut command = Command::new(binary);
    for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("TENDER_")) {
        command.env_remove(name);
    }
    command.stdin(Stdio::null());
    command
}

/// What a command printed and how it ended.
pub fn run(command: &mut Command) -> Output {
    command.output().unwrap()
}

pub fn stdout(output: &Output) -> &str {
    std::str::from_utf8(&output.stdout).unwrap()
}

pub fn stderr(output: &Output) -> &str {
    std::str::from_utf8(&output.stderr).unwrap()
}

/// The last line of standard output, as JSON, of a command that succeeded.
pub fn last_object(output: &Output) -> serde_json::Value {
    assert!(output.status.success(), "{}: {}{}", output.status, stdout(output), stderr(output));
    serde_json::from_str(stdout(output).lines().last().unwrap()).unwrap()
}

/// Waits until something is so.
pub fn wait_until(what: &str, mut is_so: impl FnMut() -> bool) {
    let began = Instant::now();
    while !is_so() {
        assert!(began.elapsed() < PATIENCE, "{what} did not come about");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// The same of what has to be asked for.
pub async fn until(what: &str, mut is_so: impl AsyncFnMut() -> bool) {
    let began = Instant::now();
    while !is_so().await {
        assert!(began.elapsed() < PATIENCE, "{what} did not come about");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// Waits for a child, with its output.
pub fn wait(mut child: Child) -> Output {
    let mut status = None;
    wait_until("the end of a command", || {
        status = child.try_wait().unwrap();
        status.is_some()
    });
    let mut output = Output { status: status.unwrap(), stdout: Vec::new(), stderr: Vec::new() };
    if let Some(mut pipe) = child.stdout {
        pipe.read_to_end(&mut output.stdout).unwrap();
    }
    if let Some(mut pipe) = child.stderr {
        pipe.read_to_end(&mut output.stderr).unwrap();
    }
    output
}

/// Processes whose command line names a path, from /proc.
pub fn processes_naming(path: &Path) -> Vec<u32> {
    let needle = path.to_str().unwrap().as_bytes();
    let is_named = |process: &PathBuf| {
        let line = std::fs::read(process.join("cmdline")).unwrap_or_default();
        line.windows(needle.len()).any(|window| window == needle)
    };
    all_processes().into_iter().filter(|(_, process)| is_named(process)).map(|(id, _)| id).collect()
}

/// Children of a process, from /proc.
pub fn children_of(parent: u32) -> Vec<u32> {
    let parent_of = |process: &PathBuf| -> Option<u32> {
        let stat = std::fs::read_to_string(process.join("stat")).ok()?;
        stat.rsplit_once(") ")?.1.split(' ').nth(1)?.parse().ok()
    };
    all_processes().into_iter().filter(|(_, process)| parent_of(process) == Some(parent)).map(|(id, _)| id).collect()
}

/// Whether a process runs; one that ended and waits for its parent to notice does not.
pub fn runs(process: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{process}/stat")).unwrap_or_default();
    stat.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with('Z'))
}

fn all_processes() -> Vec<(u32, PathBuf)> {
    let entries = std::fs::read_dir("/proc").unwrap().flatten().map(|entry| entry.path());
    entries.filter_map(|path| Some((path.file_name()?.to_str()?.parse().ok()?, path))).collect()
}

pub fn signal(process: u32, signal: &str) {
    assert!(Command::new("kill").args([&format!("-{signal}"), &process.to_string()]).status().unwrap().success());
}

/// A running daemon; killed when dropped.
pub struct Daemon {
    child: Child,
    pub socket: PathBuf,
    _folder: TempDir,
}

impl Daemon {
    pub fn start() -> Self {
        let folder = TempDir::new().unwrap();
        let socket = folder.path().join("tender.sock");
        let mut command = tender();
        command.arg("serve").arg("--socket").arg(&socket).arg("--dir").arg(folder.path().join("data"));
        command.args(["--host", "64MiB", "--disk", "256MiB"]).stdout(Stdio::null()).stderr(Stdio::null());
        let child = command.spawn().unwrap();
        let daemon = Self { child, socket, _folder: folder };
        wait_until("a daemon", || std::os::unix::net::UnixStream::connect(&daemon.socket).is_ok());
        daemon
    }

    /// A client command that asks this daemon.
    pub fn client(&self, subcommand: &str) -> Command {
        let mut command = tender();
        command.arg(subcommand).arg("--socket").arg(&self.socket);
        command
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ended_already = self.child.kill();
        let _status = self.child.wait();
    }
}
