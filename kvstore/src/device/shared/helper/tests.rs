use std::process::{Command, Stdio};

use super::*;

#[test]
fn a_child_that_does_not_end_is_killed_and_waited_for() {
    let mut child = Command::new("sleep")
        .arg("1000")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("a process");
    reap(Pid::from_child(&child), Instant::now());
    let error = child.try_wait().expect_err("it was waited for");
    assert_eq!(Errno::from_io_error(&error), Some(Errno::CHILD));
}

#[test]
fn a_child_keeps_only_the_descriptor_it_needs() {
    let (ours, childs) = rustix::net::socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)
        .expect("a pair of sockets");
    // SAFETY: the child makes system calls only, allocates nothing and ends at once.
    let pid = match unsafe { libc::fork() } {
        0 => {
            let end = End;
            close_others(childs.as_raw_fd());
            let open = (3..1024).filter(|&fd| {
                // SAFETY: asks for flags of a number, whatever it refers to.
                unsafe { libc::fcntl(fd, libc::F_GETFD) >= 0 }
            });
            let _ = descriptors::try_send(childs.as_fd(), &[open.count() as u8], &[]);
            drop(end);
            unreachable!("the process has ended")
        }
        pid => Pid::from_raw(pid).expect("a child"),
    };
    let mut count = [0];
    descriptors::receive(ours.as_fd(), &mut count, 0, Instant::now() + REAP_WAIT * 60).expect("an answer");
    reap(pid, Instant::now() + REAP_WAIT);
    assert_eq!(count, [1]);
}
