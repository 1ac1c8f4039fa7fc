use std::fs::File;
use std::io::{Read, Seek, Write};
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::thread;

use rustix::io::{FdFlags, fcntl_getfd};

use super::*;

const PATIENCE: Duration = Duration::from_secs(60);

fn soon() -> Instant {
    Instant::now() + PATIENCE
}

fn pair() -> (UnixStream, UnixStream) {
    UnixStream::pair().expect("a pair of sockets")
}

/// What `call` returns, unless it waits for ever.
fn without_waiting<T: Send + 'static>(call: impl FnOnce() -> T + Send + 'static) -> T {
    let (done, result) = mpsc::channel();
    thread::spawn(move || done.send(call()));
    result.recv_timeout(PATIENCE).expect("a call that never waits")
}

/// Whether the other end of `socket` is closed everywhere, now or soon: a process that another test starts has a copy of it for a moment.
fn is_abandoned(mut socket: &UnixStream, soon: Instant) -> bool {
    socket.set_nonblocking(true).expect("a socket");
    wait_until(socket.as_fd(), PollFlags::IN, soon).is_ok() && matches!(socket.read(&mut [0]), Ok(0))
}

#[test]
fn a_message_arrives_with_its_descriptors_in_order() {
    let (ours, theirs) = pair();
    let files = ["first", "second"].map(|text| {
        let mut file = tempfile::tempfile().expect("a file");
        file.write_all(text.as_bytes()).expect("room");
        file
    });
    send(ours.as_fd(), b"two files", &[files[0].as_fd(), files[1].as_fd()], soon()).expect("sent");
    let mut text = [0; 9];
    let received = receive(theirs.as_fd(), &mut text, 2, soon()).expect("received");
    assert_eq!((&text, received.len()), (b"two files", 2));
    for (fd, expected) in received.into_iter().zip(["first", "second"]) {
        assert!(fcntl_getfd(&fd).expect("flags").contains(FdFlags::CLOEXEC), "a started program would inherit it");
        let (mut file, mut text) = (File::from(fd), String::new());
        file.rewind().expect("a file");
        file.read_to_string(&mut text).expect("text");
        assert_eq!(text, expected);
    }
}

#[test]
fn a_long_message_is_sent_and_received_in_pieces() {
    let (ours, theirs) = pair();
    let sent: Vec<u8> = (0..4u32 << 20).map(|i| (i * 31) as u8).collect();
    let mut received = vec![0; sent.len()];
    thread::scope(|scope| {
        let sender = scope.spawn(|| send(ours.as_fd(), &sent, &[ours.as_fd()], soon()));
        let descriptors = receive(theirs.as_fd(), &mut received, DESCRIPTORS_MAX, soon()).expect("received");
        assert_eq!(descriptors.len(), 1, "they go once, with the first byte");
        sender.join().expect("no panic").expect("sent");
    });
    assert!(received == sent);
}

#[test]
fn who_waits_in_vain_is_told_so() {
    let (ours, theirs) = pair();
    let (ours, nothing) = without_waiting(move || {
        let received = try_receive(ours.as_fd(), &mut [0], 0);
        (ours, received)
    });
    assert_eq!(nothing.expect_err("nothing there").kind(), io::ErrorKind::WouldBlock);
    let in_vain = receive(ours.as_fd(), &mut [0], 0, Instant::now()).expect_err("nothing there");
    assert_eq!(in_vain.kind(), io::ErrorKind::TimedOut);
    let error = loop {
        match try_send(ours.as_fd(), &[0; 4096], &[]) {
            Ok(_) => {}
            Err(error) => break error,
        }
    };
    assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
    assert_eq!(send(ours.as_fd(), &[0], &[], Instant::now()).expect_err("no room").kind(), io::ErrorKind::TimedOut);
    drop(theirs);
    assert_eq!(send(ours.as_fd(), &[0], &[], soon()).expect_err("nobody there").kind(), io::ErrorKind::BrokenPipe);
    let (ours, theirs) = pair();
    send(theirs.as_fd(), &[1], &[], soon()).expect("sent");
    drop(theirs);
    let cut = receive(ours.as_fd(), &mut [0; 2], 0, soon()).expect_err("one byte of two");
    assert_eq!(cut.kind(), io::ErrorKind::UnexpectedEof);
}

#[test]
fn a_surplus_of_descriptors_is_closed() {
    let (ours, theirs) = pair();
    let (wanted, wanted_end) = pair();
    let (surplus, surplus_end) = pair();
    send(ours.as_fd(), &[1], &[wanted_end.as_fd(), surplus_end.as_fd()], soon()).expect("sent");
    drop((wanted_end, surplus_end));
    assert!(!is_abandoned(&surplus, Instant::now()), "it is on its way");
    let received = receive(theirs.as_fd(), &mut [0], 1, soon()).expect("received");
    assert_eq!(received.len(), 1);
    assert!(is_abandoned(&surplus, soon()));
    assert!(!is_abandoned(&wanted, Instant::now()));
}

/// As somebody would who does not use `try_send`.
fn send_many(socket: &UnixStream, fd: BorrowedFd<'_>, count: usize) {
    let fds = vec![fd; count];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(64))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
    rustix::net::sendmsg(socket, &[IoSlice::new(&[1])], &mut control, SendFlags::empty()).expect("sent");
}

#[test]
fn more_descriptors_than_a_message_may_have_are_an_error_and_are_closed() {
    for count in [DESCRIPTORS_MAX + 1, DESCRIPTORS_MAX + 2, 64] {
        let (ours, theirs) = pair();
        let (end, sent) = pair();
        send_many(&ours, sent.as_fd(), count);
        drop(sent);
        let error = try_receive(theirs.as_fd(), &mut [0], DESCRIPTORS_MAX).expect_err("some are lost");
        assert_eq!(error.kind(), io::ErrorKind::InvalidData, "{error}");
        assert!(error.to_string().contains("send at most 8"), "{error}");
        assert!(is_abandoned(&end, soon()), "{count} were sent and some are still open");
    }
    let (ours, theirs) = pair();
    send_many(&ours, theirs.as_fd(), DESCRIPTORS_MAX);
    let received = try_receive(theirs.as_fd(), &mut [0], DESCRIPTORS_MAX).expect("as many as may be");
    assert_eq!(received.descriptors.len(), DESCRIPTORS_MAX);
}

#[test]
fn descriptors_that_nobody_wants_are_never_opened() {
    let (ours, theirs) = pair();
    let (end, sent) = pair();
    send(ours.as_fd(), &[1], &[sent.as_fd()], soon()).expect("sent");
    drop(sent);
    let error = try_receive_open(theirs.as_fd(), &mut [0], None).expect_err("one is lost");
    assert_eq!(error.kind(), io::ErrorKind::InvalidData, "{error}");
    assert!(is_abandoned(&end, soon()));
    send(ours.as_fd(), &[1], &[], soon()).expect("sent");
    assert_eq!(try_receive_open(theirs.as_fd(), &mut [0], None).expect("nothing came beside it"), 1);
}

#[test]
fn a_cut_message_is_an_error() {
    let (ours, theirs) =
        rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
            .expect("a pair of sockets");
    send(ours.as_fd(), &[0; 100], &[], soon()).expect("sent");
    let error = receive(theirs.as_fd(), &mut [0; 99], 0, soon()).expect_err("one byte is lost");
    assert_eq!(error.kind(), io::ErrorKind::InvalidData, "{error}");
}

#[test]
fn what_cannot_be_sent_is_refused_with_the_cure() {
    let (ours, _theirs) = pair();
    for (bytes, count) in [(&[][..], 1), (&[1], DESCRIPTORS_MAX + 1)] {
        let error = try_send(ours.as_fd(), bytes, &vec![ours.as_fd(); count]).expect_err("no such message");
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
        assert!(error.to_string().contains("one byte at least and 8"), "{error}");
    }
}

#[tokio::test]
async fn an_asynchronous_socket_carries_descriptors_too() {
    use tokio::io::Interest;
    let (ours, theirs) = tokio::net::UnixStream::pair().expect("a pair of sockets");
    let sender = tokio::spawn(async move {
        ours.async_io(Interest::WRITABLE, || try_send(ours.as_fd(), &[7], &[ours.as_fd()])).await
    });
    let mut byte = [0];
    let received = theirs.async_io(Interest::READABLE, || try_receive(theirs.as_fd(), &mut byte, 1)).await;
    let received = received.expect("received");
    assert_eq!((byte, received.bytes, received.descriptors.len()), ([7], 1, 1));
    assert_eq!(sender.await.expect("no panic").expect("sent"), 1);
}

/// As another holder would.
fn make_blocking(fd: BorrowedFd<'_>) {
    let copy = fd.try_clone_to_owned().expect("a free descriptor");
    let flags = rustix::fs::fcntl_getfl(&copy).expect("flags");
    rustix::fs::fcntl_setfl(&copy, flags - OFlags::NONBLOCK).expect("flags");
}

fn is_readable(fd: BorrowedFd<'_>) -> bool {
    is_ready(fd, PollFlags::IN, Duration::ZERO).expect("poll")
}

#[test]
fn a_signal_wakes_until_it_is_cleared() {
    let event = EventFd::new().expect("an eventfd");
    assert!(!is_readable(event.as_fd()));
    assert!(!event.clear().expect("not signalled"));
    event.signal().expect("signalled");
    event.signal().expect("signalled");
    assert!(is_readable(event.as_fd()));
    assert!(event.clear().expect("signalled"));
    assert!(!is_readable(event.as_fd()));
}

#[test]
fn a_full_counter_is_a_signal() {
    let event = EventFd::new().expect("an eventfd");
    rustix::io::write(&event, &[0xfe, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff]).expect("room for it");
    event.signal().expect("it is there already");
    assert!(event.clear().expect("signalled"));
}

#[test]
fn clearing_never_waits_whatever_another_holder_sets() {
    let event = EventFd::new().expect("an eventfd");
    make_blocking(event.as_fd());
    assert!(!without_waiting(move || event.clear()).expect("not signalled"));
}

#[test]
fn only_an_eventfd_is_taken_for_one() {
    let event = EventFd::new().expect("an eventfd");
    let copy = EventFd::from_fd(event.as_fd().try_clone_to_owned().expect("a descriptor")).expect("an eventfd");
    copy.signal().expect("signalled");
    assert!(event.clear().expect("the same counter"));
    for fd in [OwnedFd::from(pair().0), File::open("/dev/null").expect("there is one").into()] {
        let error = EventFd::from_fd(fd).expect_err("no eventfd");
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
    }
}

#[test]
fn a_bell_wakes_and_never_waits() {
    let (bell, listener) = Bell::new().expect("a bell");
    assert!(!is_readable(listener.as_fd()));
    bell.ring().expect("rung");
    assert!(is_readable(listener.as_fd()));
    make_blocking(listener.as_fd());
    let bell = without_waiting(move || {
        // More often than any buffer of sockets has room for.
        (0..100_000).for_each(|_| bell.ring().expect("rung"));
        bell
    });
    assert!(is_readable(listener.as_fd()));
    drop(listener);
    assert_eq!(bell.ring().expect_err("nobody listens").kind(), io::ErrorKind::BrokenPipe);
}

/// A process that lives until it is killed.
fn idle_process() -> std::process::Child {
    Command::new("sleep")
        .arg("1000")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("a process")
}

fn process_of(child: &std::process::Child) -> Process {
    let fd = rustix::process::pidfd_open(Pid::from_child(child), PidfdFlags::empty()).expect("a pidfd");
    Process::from_fd(fd).expect("the pidfd of a process")
}

#[test]
fn a_process_is_itself_and_alive() {
    let process = Process::open_self().expect("a pidfd");
    let own = rustix::process::getpid();
    assert_eq!(process.pid().expect("a number"), Some(own));
    assert!(process.same_process(own));
    assert!(!process.same_process(Pid::INIT));
    assert!(!process.is_dead());
}

#[test]
fn a_killed_process_is_dead_and_its_number_means_nothing() {
    let mut child = idle_process();
    let (process, pid) = (process_of(&child), Pid::from_child(&child));
    assert!(!process.is_dead());
    assert!(process.same_process(pid));
    child.kill().expect("killed");
    wait_until(process.as_fd(), PollFlags::IN, soon()).expect("its end");
    assert!(process.is_dead(), "it is dead before anybody has waited for it");
    child.wait().expect("its end");
    assert!(process.is_dead());
    assert_eq!(process.pid().expect("a line"), None);
    assert!(!process.same_process(pid));
}

#[test]
fn only_the_pidfd_of_a_process_is_taken_for_one() {
    let event = EventFd::new().expect("an eventfd").0;
    for fd in [OwnedFd::from(pair().0), File::open("/proc/self/status").expect("there is one").into(), event] {
        let error = Process::from_fd(fd).expect_err("no pidfd");
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
        assert!(error.to_string().contains("pidfd_open(getpid(), 0)"), "{error}");
    }
    let thread = thread::spawn(|| {
        let of_thread = PidfdFlags::from_bits_retain(OFlags::EXCL.bits());
        rustix::process::pidfd_open(rustix::thread::gettid(), of_thread)
    });
    match thread.join().expect("no panic") {
        Ok(fd) => drop(Process::from_fd(fd).expect_err("it ends when its thread does")),
        Err(error) => println!("skipped: this kernel has no pidfds of threads ({error})"),
    }
}
