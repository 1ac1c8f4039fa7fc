use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::time::Instant;

use memmap2::MmapOptions;
use rustix::fs::FallocateFlags;
use rustix::mm::MprotectFlags;

use super::*;
use crate::device::block::PAGE_BYTES;
use crate::device::tests::{NOBODY, again, copy, role, shell, users};
use tender_proto::descriptors;

const BYTES: u64 = 256 * PAGE_BYTES;
const PATIENCE: Duration = Duration::from_secs(60);

fn file_of(fd: BorrowedFd<'_>) -> fs::File {
    copy(fd).into()
}

/// A file behind a read-only mount, or none, said aloud, where the system makes none. Any other failure is one of the code.
fn mounted() -> Option<SharedFile> {
    let file = SharedFile::create(BYTES).expect("a file");
    let Some(Refusal { step, error }) = &file.refusal else { return Some(file) };
    let errno = Errno::from_io_error(error).unwrap_or(Errno::IO);
    assert!([Errno::PERM, Errno::ACCESS, Errno::NOSYS, Errno::NOSPC].contains(&errno), "{step} is refused: {error}");
    println!("skipped: {}; {}", file.describe(), file.cure());
    None
}

fn in_memfd() -> SharedFile {
    let refusal = Refusal { step: "unshare", error: Errno::PERM.into() };
    SharedFile::in_memfd(BYTES, refusal).expect("a memory file")
}

/// What holds for either kind, without reopening.
fn assert_cannot_be_changed_by(fd: BorrowedFd<'_>) {
    assert_eq!(rustix::io::write(fd, &[1]).expect_err("opened for reading"), Errno::BADF);
    assert!(rustix::fs::ftruncate(fd, 0).is_err());
    assert!(rustix::fs::fallocate(fd, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, 0, PAGE_BYTES).is_err());
    assert!(MmapOptions::new().len(BYTES as usize).map_raw(fd.as_raw_fd()).is_err(), "mapped for writing");
    let memory = MmapOptions::new().len(BYTES as usize).map_raw_read_only(fd.as_raw_fd()).expect("mapped for reading");
    assert_eq!(try_to_write(&memory).expect_err("mapped for reading"), Errno::ACCESS);
}

/// Makes a mapping writable and takes its first page away from the file.
#[expect(unsafe_code, reason = "changes how memory is mapped that no reference points to")]
fn try_to_write(memory: &memmap2::MmapRaw) -> Result<(), Errno> {
    let start = memory.as_mut_ptr().cast();
    // SAFETY: both are asked for pages of this very mapping, to which there is no reference.
    unsafe {
        rustix::mm::madvise(start, PAGE_BYTES as usize, rustix::mm::Advice::LinuxRemove)?;
        rustix::mm::mprotect(start, memory.len(), MprotectFlags::READ | MprotectFlags::WRITE)
    }
}

#[test]
fn the_descriptor_for_clients_lets_nobody_write() {
    let Some(file) = mounted() else { return };
    let twin = file.read_only();
    for flags in [OFlags::RDWR, OFlags::WRONLY, OFlags::RDWR | OFlags::TRUNC, OFlags::WRONLY | OFlags::APPEND] {
        assert_eq!(reopen(twin, flags).expect_err("a read-only mount"), Errno::ROFS, "{flags:?}");
    }
    assert_eq!(rustix::fs::fchmod(twin, Mode::from_raw_mode(0o666)).expect_err("a read-only mount"), Errno::ROFS);
    assert_cannot_be_changed_by(twin);
    assert!(file.protection().keeps_out(0, 0) && file.protection().keeps_out(NOBODY, NOBODY));
    assert_eq!(file.cure(), "");
}

#[test]
fn other_processes_cannot_write_whoever_they_are() {
    let Some(file) = mounted() else { return };
    file_of(file.writable()).write_all_at(b"kept", 0).expect("the daemon writes");
    for uid in users() {
        for line in [
            ": >> /proc/self/fd/0",
            ": > /proc/self/fd/0",
            "truncate -s 0 /proc/self/fd/0",
            "chmod 666 /proc/self/fd/0",
        ] {
            let output = shell(line, file.read_only(), uid);
            assert!(!output.status.success(), "user {uid} can `{line}`");
        }
        rustix::fs::seek(file.read_only(), rustix::fs::SeekFrom::Start(0)).expect("its start, for all who have it");
        let output = shell("head -c 4", file.read_only(), uid);
        assert_eq!(output.stdout, b"kept", "user {uid} cannot read: {output:?}");
    }
}

/// The mount is in no namespace, so nobody has a handle on it.
#[test]
#[expect(unsafe_code, reason = "a system call that no crate wraps")]
fn root_cannot_make_the_mount_writable_again() {
    let Some(file) = mounted() else { return };
    let attributes = libc::mount_attr { attr_set: 0, attr_clr: libc::MOUNT_ATTR_RDONLY, propagation: 0, userns_fd: 0 };
    let (fd, size) = (file.read_only().as_raw_fd(), size_of_val(&attributes));
    // SAFETY: path and attributes are there during the call, and of the size stated.
    let result = unsafe {
        let (path, flags) = (c"".as_ptr(), libc::AT_EMPTY_PATH);
        libc::syscall(libc::SYS_mount_setattr, fd, path, flags, &raw const attributes, size)
    };
    assert_eq!(result, -1);
    let path = format!("/proc/self/fd/{fd}");
    assert!(rustix::mount::mount_remount(path.as_str(), rustix::mount::MountFlags::BIND, c"").is_err());
    let clone = rustix::mount::OpenTreeFlags::OPEN_TREE_CLONE | rustix::mount::OpenTreeFlags::AT_EMPTY_PATH;
    assert!(rustix::mount::open_tree(file.read_only(), c"", clone).is_err());
    assert_eq!(reopen(file.read_only(), OFlags::RDWR).expect_err("as before"), Errno::ROFS);
}

#[test]
fn what_the_daemon_writes_its_clients_read() {
    for file in mounted().into_iter().chain([in_memfd()]) {
        let map =
            MmapOptions::new().len(BYTES as usize).map_raw(file.writable().as_raw_fd()).expect("mapped for writing");
        let twin = file_of(file.read_only());
        write_all(&map);
        let mut bytes = vec![0; BYTES as usize];
        twin.read_exact_at(&mut bytes, 0).expect("the daemon's bytes");
        assert!(bytes.iter().all(|&byte| byte == 7));
        drop(map);
        file.check().expect("it stays as it is");
    }
}

/// Every page: the file system has room for all of them.
#[expect(unsafe_code, reason = "writes to a mapping")]
fn write_all(map: &memmap2::MmapRaw) {
    // SAFETY: a live, writable mapping of that length, to which there is no reference.
    unsafe { map.as_mut_ptr().write_bytes(7, map.len()) };
}

#[test]
fn a_file_of_any_size_takes_no_memory_and_has_room_for_all_of_it() {
    for bytes in [PAGE_BYTES, 513 * PAGE_BYTES, 1 << 40] {
        let file = SharedFile::create(bytes).expect("a sparse file");
        let stat = rustix::fs::fstat(file.writable()).expect("a file");
        assert_eq!((file.bytes(), file_bytes(&stat), stat.st_blocks), (bytes, bytes, 0));
        if bytes < 1 << 30 {
            file_of(file.writable()).write_all_at(&vec![1; bytes as usize], 0).expect("room for all of it");
        }
    }
    for bytes in [0, PAGE_BYTES + 1, 1 << 63] {
        let error = SharedFile::create(bytes).expect_err("no such file");
        assert!(error.to_string().contains("choose a multiple of 4096"), "{error}");
    }
}

#[test]
fn without_a_mount_other_users_cannot_write() {
    let file = in_memfd();
    assert_cannot_be_changed_by(file.read_only());
    assert!(rustix::fs::ftruncate(file.writable(), 0).is_err(), "its size is sealed");
    for uid in users().into_iter().skip(1) {
        for line in [": >> /proc/self/fd/0", "chmod 666 /proc/self/fd/0"] {
            let output = shell(line, file.read_only(), uid);
            assert!(!output.status.success(), "user {uid} can `{line}`");
        }
    }
    for (client_uid, daemon_uid, kept_out) in
        [(0, 0, false), (0, 1000, false), (1000, 1000, false), (1001, 1000, true), (1000, 0, true)]
    {
        assert_eq!(file.protection().keeps_out(client_uid, daemon_uid), kept_out, "{client_uid} and {daemon_uid}");
    }
    assert!(file.describe().contains("unshare is refused (Operation not permitted"), "{}", file.describe());
    assert!(file.cure().contains("user.max_user_namespaces"), "{}", file.cure());
}

#[test]
fn where_namespaces_are_refused_it_falls_back_and_says_so() {
    const TEST: &str = "device::shared::tests::where_namespaces_are_refused_it_falls_back_and_says_so";
    if role().is_some() {
        let file = SharedFile::create(BYTES).expect("a file");
        assert_eq!(file.protection(), Protection::OtherUserOnly);
        assert!(file.describe().contains("unshare (user and mount namespace) is refused"), "{}", file.describe());
        return println!("fell back");
    }
    let test = again(TEST, "refused");
    // A namespace may forbid others inside of it.
    let output = Command::new("unshare")
        .args(["--user", "--map-root-user", "sh", "-c"])
        .arg("echo 0 > /proc/sys/user/max_user_namespaces && exec \"$0\" \"$@\" || exit 99")
        .arg(test.get_program())
        .args(test.get_args())
        .envs(test.get_envs().filter_map(|(name, value)| Some((name, value?))))
        .output();
    match output {
        Ok(output) if output.status.success() => {
            assert!(String::from_utf8_lossy(&output.stdout).contains("fell back"), "{output:?}");
        }
        Ok(output)
            if String::from_utf8_lossy(&output.stdout).contains("panicked") || output.status.code() == Some(101) =>
        {
            panic!("{output:?}");
        }
        refused => println!("skipped: namespaces cannot be forbidden here ({refused:?})"),
    }
}

#[test]
fn a_daemon_without_privilege_has_the_mount_too() {
    const TEST: &str = "device::shared::tests::a_daemon_without_privilege_has_the_mount_too";
    if role().is_some() {
        println!("started");
        let Some(file) = mounted() else { return };
        assert_eq!(reopen(file.read_only(), OFlags::RDWR).expect_err("a read-only mount"), Errno::ROFS);
        assert!(reopen(file.writable(), OFlags::RDONLY).is_ok(), "its own file");
        return println!("protected");
    }
    if !rustix::process::geteuid().is_root() {
        return println!("skipped: not root, so every other test is this one");
    }
    match again(TEST, "nobody").uid(NOBODY).gid(NOBODY).current_dir("/").output() {
        Ok(output) if String::from_utf8_lossy(&output.stdout).contains("started") => {
            assert!(output.status.success(), "{output:?}");
            println!("{}", String::from_utf8_lossy(&output.stdout));
        }
        refused => println!("skipped: another user cannot run this program ({refused:?})"),
    }
}

#[test]
fn a_file_outlives_the_process_that_made_it() {
    const TEST: &str = "device::shared::tests::a_file_outlives_the_process_that_made_it";
    if role().is_some() {
        let file = SharedFile::create(BYTES).expect("a file");
        file_of(file.writable()).write_all_at(b"kept", BYTES - PAGE_BYTES).expect("room");
        let protection = u8::from(file.protection() == Protection::ReadOnlyMount);
        let descriptors = [file.writable(), file.read_only()];
        descriptors::send(io::stdin().as_fd(), &[protection], &descriptors, Instant::now() + PATIENCE).expect("sent");
        std::thread::sleep(PATIENCE * 10);
        return;
    }
    let (ours, theirs) = UnixStream::pair().expect("a pair of sockets");
    let mut maker = again(TEST, "maker").stdin(Stdio::from(OwnedFd::from(theirs))).spawn().expect("a process");
    let mut protection = [0];
    let received = descriptors::receive(ours.as_fd(), &mut protection, 2, Instant::now() + PATIENCE);
    maker.kill().expect("killed");
    maker.wait().expect("its end");
    let [writable, read_only] = <[OwnedFd; 2]>::try_from(received.expect("received")).expect("two");
    let protection = [Protection::OtherUserOnly, Protection::ReadOnlyMount][usize::from(protection[0])];
    let file = SharedFile::adopt(writable, read_only, protection).expect("as it was");
    assert_eq!((file.bytes(), file.protection()), (BYTES, protection));
    let mut bytes = [0; 4];
    file_of(file.read_only()).read_exact_at(&mut bytes, BYTES - PAGE_BYTES).expect("its contents");
    assert_eq!(&bytes, b"kept");
    file_of(file.writable()).write_all_at(b"more", 0).expect("the next worker writes");
}

#[test]
fn descriptors_that_are_not_what_they_should_be_are_not_adopted() {
    let adopt = |writable, read_only, protection| SharedFile::adopt(copy(writable), copy(read_only), protection);
    let (one, other) = (in_memfd(), in_memfd());
    let open =
        SharedFile::in_memfd(BYTES, Refusal { step: "unshare", error: Errno::PERM.into() }).expect("a memory file");
    rustix::fs::fchmod(open.writable(), Mode::from_raw_mode(0o644)).expect("its owner's right");
    let memfd = Protection::OtherUserOnly;
    adopt(one.writable(), one.read_only(), memfd).expect("nothing is wrong with it");
    let mut cases = vec![
        (one.writable(), other.read_only(), memfd, "different files"),
        (one.read_only(), one.writable(), memfd, "opened for reading and writing"),
        (one.writable(), one.writable(), memfd, "opened for reading and writing"),
        (open.writable(), open.read_only(), memfd, "clients could change it"),
        (one.writable(), one.read_only(), Protection::ReadOnlyMount, "clients could change it"),
    ];
    let mounted = mounted();
    let through_the_writable =
        mounted.as_ref().map(|file| reopen(file.writable(), OFlags::RDONLY).expect("a descriptor"));
    if let (Some(file), Some(twin)) = (&mounted, &through_the_writable) {
        adopt(file.writable(), file.read_only(), Protection::ReadOnlyMount).expect("nothing is wrong with it");
        cases.push((file.writable(), twin.as_fd(), Protection::ReadOnlyMount, "clients could change it"));
    }
    for (writable, read_only, protection, telling) in cases {
        let error = adopt(writable, read_only, protection).expect_err(telling);
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
        assert!(error.to_string().contains(telling), "{error} does not tell {telling:?}");
    }
}
