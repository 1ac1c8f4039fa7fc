//! What the tests of several files need: other processes.

use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Command, Output, Stdio};

/// Set for a test that runs once more, in a process of its own.
const ROLE: &str = "TENDER_TEST_ROLE";

/// A user who owns nothing.
pub const NOBODY: u32 = 65_534;

/// What this process is to be, if it is a test that another one started.
pub fn role() -> Option<String> {
    std::env::var(ROLE).ok()
}

/// The command that runs one test of this program once more; it asks for its `role`.
pub fn again(test: &str, role: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().expect("a path of this program"));
    command.args(["--exact", test, "--nocapture"]).env(ROLE, role);
    command
}

/// A copy of a descriptor, for another process's standard input.
pub fn copy(fd: BorrowedFd<'_>) -> OwnedFd {
    fd.try_clone_to_owned().expect("a free descriptor")
}

/// Runs a line of shell whose standard input is `fd`, as user `uid` if that is another one.
pub fn shell(line: &str, fd: BorrowedFd<'_>, uid: u32) -> Output {
    let mut command = Command::new("sh");
    command.args(["-c", line]).stdin(Stdio::from(copy(fd)));
    if uid != rustix::process::geteuid().as_raw() {
        command.uid(uid).gid(uid);
    }
    command.output().expect("a shell")
}

/// The users that a test can act as: its own, and where it may become another one, who owns nothing.
pub fn users() -> Vec<u32> {
    let own = rustix::process::geteuid().as_raw();
    match Command::new("true").uid(NOBODY).gid(NOBODY).status() {
        Ok(status) if status.success() && own != NOBODY => vec![own, NOBODY],
        _ => {
            println!("skipped for another user: this one (uid {own}) cannot become one");
            vec![own]
        }
    }
}

/// Whether a forked child has the byte at `address`, which this process has.
#[expect(unsafe_code, reason = "forks")]
pub fn is_inherited(address: *const u8) -> bool {
    let (reader, writer) = std::io::pipe().expect("a pipe");
    // SAFETY: the child makes two system calls and ends.
    let pid = match unsafe { libc::fork() } {
        0 => unsafe {
            // SAFETY: the kernel looks whether the byte is there and says no if it is not.
            let written = libc::write(writer.as_raw_fd(), address.cast(), 1);
            libc::_exit(i32::from(written == 1));
        },
        pid => rustix::process::Pid::from_raw(pid).expect("a child"),
    };
    let (_, status) =
        rustix::process::waitpid(Some(pid), rustix::process::WaitOptions::empty()).expect("its end").expect("its end");
    drop((reader, writer));
    status.exit_status().expect("it ended by itself") == 1
}
