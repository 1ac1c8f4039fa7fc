use std::fs::File;
use std::sync::atomic::{AtomicU8, Ordering};

use rustix::fs::{FallocateFlags, MemfdFlags, Mode, OFlags};
use rustix::io::Errno;

use super::*;
use crate::device::shared::{Protection, SharedFile};
use crate::device::tests::{copy, shell, users};

const BYTES: u64 = 64 * PAGE_BYTES;

/// The first byte of a mapping.
#[expect(unsafe_code, reason = "a byte that another mapping of the same file may change")]
fn first_byte(memory: &MmapRaw) -> &AtomicU8 {
    // SAFETY: a live mapping; whoever uses the byte does so by atomic operations.
    unsafe { &*memory.as_ptr().cast() }
}

fn map_for_writing(fd: BorrowedFd<'_>) -> io::Result<MmapRaw> {
    MmapOptions::new().len(BYTES as usize).map_raw(fd.as_raw_fd())
}

fn reopen(fd: BorrowedFd<'_>) -> File {
    let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
    File::options().read(true).write(true).open(path).expect("it is this user's")
}

fn raw_memfd(flags: MemfdFlags, bytes: u64) -> OwnedFd {
    let file = rustix::fs::memfd_create(c"client", flags | MemfdFlags::CLOEXEC).expect("a memory file");
    rustix::fs::ftruncate(&file, bytes).expect("a size");
    file
}

#[test]
fn a_client_cannot_change_the_size() {
    let file = IngestFile::create(BYTES).expect("a file");
    for bytes in [0, BYTES - PAGE_BYTES, BYTES + PAGE_BYTES] {
        assert_eq!(rustix::fs::ftruncate(file.descriptor(), bytes).expect_err("sealed"), Errno::PERM);
    }
    for uid in users() {
        let output = shell("truncate -s 0 /proc/self/fd/0", file.descriptor(), uid);
        assert!(!output.status.success(), "user {uid} cuts it");
    }
    assert_eq!(rustix::fs::fstat(file.descriptor()).expect("a file").st_size as u64, BYTES);
}

#[test]
fn once_closed_only_the_first_mapping_writes() {
    let file = IngestFile::create(BYTES).expect("a file");
    let clients = map_for_writing(file.descriptor()).expect("open for writers");
    let second = map_for_writing(reopen(file.descriptor()).as_fd()).expect("open for writers");
    drop(second);
    file.close_for_writers().expect("closed");
    file.close_for_writers().expect("closed already");
    let reopened = reopen(file.descriptor());
    for fd in [file.descriptor(), reopened.as_fd()] {
        map_for_writing(fd).expect_err("closed for writers");
        assert_eq!(rustix::io::pwrite(fd, &[1], 0).expect_err("closed for writers"), Errno::PERM);
    }
    let ours = file.map(0, BYTES as usize).expect("mapped for reading");
    first_byte(&clients).store(7, Ordering::Relaxed);
    assert_eq!(first_byte(&ours).load(Ordering::Relaxed), 7, "the first mapping is the file");
    drop(clients);
    map_for_writing(file.descriptor()).expect_err("closed for good");
}

/// A page that has gone would have to be made again by whoever reads it, and may then not be had.
#[test]
#[expect(unsafe_code, reason = "takes pages of a mapping away")]
fn once_closed_no_hole_can_be_punched() {
    let file = IngestFile::create(BYTES).expect("a file");
    let clients = map_for_writing(file.descriptor()).expect("open for writers");
    first_byte(&clients).store(7, Ordering::Relaxed);
    file.close_for_writers().expect("closed");
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    assert_eq!(rustix::fs::fallocate(file.descriptor(), flags, 0, PAGE_BYTES).expect_err("closed"), Errno::PERM);
    // SAFETY: pages of this very mapping, to which there is no reference.
    let removed = unsafe {
        rustix::mm::madvise(clients.as_mut_ptr().cast(), PAGE_BYTES as usize, rustix::mm::Advice::LinuxRemove)
    };
    assert_eq!(removed.expect_err("closed"), Errno::PERM);
    assert_eq!(first_byte(&clients).load(Ordering::Relaxed), 7);
}

#[test]
fn nothing_is_read_before_it_is_closed_or_beyond_its_end() {
    let file = IngestFile::create(BYTES).expect("a file");
    let error = file.map(0, BYTES as usize).expect_err("still open for writers");
    assert!(error.to_string().contains("close it"), "{error}");
    file.close_for_writers().expect("closed");
    let page = PAGE_BYTES as usize;
    for (offset, bytes) in
        [(BYTES, page), (BYTES - PAGE_BYTES, 2 * page), (1, page), (0, page + 1), (0, 0), (!4095, page)]
    {
        let error = file.map(offset, bytes).expect_err("no whole pages within it");
        assert!(error.to_string().contains("choose whole pages"), "{error}");
    }
    assert_eq!(file.map(BYTES - PAGE_BYTES, page).expect("its last page").len(), page);
}

#[test]
fn a_file_is_taken_over_from_whoever_made_it() {
    let sealed = raw_memfd(MemfdFlags::ALLOW_SEALING, BYTES);
    rustix::fs::fcntl_add_seals(&sealed, memfd::SIZE_SEALS).expect("sealed");
    let unsealed = raw_memfd(MemfdFlags::ALLOW_SEALING, BYTES);
    for fd in [&sealed, &unsealed] {
        let file = IngestFile::adopt(copy(fd.as_fd()), BYTES).expect("what it should be");
        assert_eq!(file.bytes(), BYTES);
        assert_eq!(rustix::fs::ftruncate(fd, 0).expect_err("sealed, by whomever"), Errno::PERM);
        file.close_for_writers().expect("closed");
        file.map(0, BYTES as usize).expect("mapped for reading");
    }
}

#[test]
fn a_file_that_could_harm_its_reader_is_refused_with_the_cure() {
    let folder = tempfile::tempdir().expect("a folder");
    let on_disk = File::create_new(folder.path().join("file")).expect("a file");
    on_disk.set_len(BYTES).expect("a size");
    let shared = SharedFile::create(BYTES).expect("a file");
    let on_tmpfs = (shared.protection() == Protection::ReadOnlyMount)
        .then(|| (copy(shared.read_only()), BYTES, "size can be changed"));
    let read_only = raw_memfd(MemfdFlags::ALLOW_SEALING, BYTES);
    let path = format!("/proc/self/fd/{}", read_only.as_raw_fd());
    let read_only = rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).expect("a descriptor");
    let good = raw_memfd(MemfdFlags::ALLOW_SEALING, BYTES);
    let mut cases = vec![
        (OwnedFd::from(on_disk), BYTES, "not a memfd"),
        (File::open("/dev/null").expect("there is one").into(), BYTES, "not a memfd"),
        (raw_memfd(MemfdFlags::empty(), BYTES), BYTES, "MFD_ALLOW_SEALING"),
        (read_only, BYTES, "send a writable descriptor"),
        (copy(good.as_fd()), BYTES - PAGE_BYTES, "state its size"),
        (copy(good.as_fd()), BYTES + PAGE_BYTES, "state its size"),
        (raw_memfd(MemfdFlags::ALLOW_SEALING, 5000), 5000, "choose a multiple of 4096"),
        (copy(good.as_fd()), 0, "choose a multiple of 4096"),
    ];
    cases.extend(on_tmpfs);
    match rustix::fs::memfd_create(c"client", MemfdFlags::ALLOW_SEALING | MemfdFlags::HUGETLB) {
        Ok(file) => {
            rustix::fs::ftruncate(&file, 2 << 20).expect("a size");
            cases.push((file, 2 << 20, "without MFD_HUGETLB"));
        }
        Err(error) => println!("skipped: this system has no huge pages ({error})"),
    }
    for (fd, bytes, telling) in cases {
        let error = IngestFile::adopt(fd, bytes).expect_err(telling);
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
        assert!(error.to_string().contains(telling), "{error} does not tell {telling:?}");
    }
}

#[test]
fn what_a_client_brings_is_closed_already_and_is_only_looked_at() {
    let brought = |flags, bytes, seals| {
        let file = raw_memfd(flags | MemfdFlags::ALLOW_SEALING, bytes);
        rustix::fs::fcntl_add_seals(&file, seals).expect("sealed");
        file
    };
    let (plain, closed) = (MemfdFlags::empty(), memfd::SIZE_SEALS | SealFlags::FUTURE_WRITE);
    let good = brought(plain, BYTES, closed | SealFlags::SEAL);
    let file = IngestFile::bring(copy(good.as_fd()), BYTES).expect("what it should be");
    file.map(0, BYTES as usize).expect("mapped for reading");
    let other = IngestFile::bring(brought(plain, BYTES, closed), BYTES).expect("another");
    assert_ne!(file.identity().expect("a file"), other.identity().expect("a file"));
    assert_eq!(
        file.identity().expect("a file"),
        IngestFile::bring(reopen(good.as_fd()), BYTES).expect("the same").identity().expect("a file")
    );
    let path = format!("/proc/self/fd/{}", good.as_raw_fd());
    let read_only = rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).expect("a descriptor");
    let mut cases = vec![
        (File::open("/dev/null").expect("there is one").into(), "not a memfd"),
        (brought(plain, BYTES, SealFlags::empty()), "its size can be changed"),
        (brought(plain, BYTES, closed.difference(SealFlags::SHRINK)), "F_SEAL_SHRINK"),
        (brought(plain, BYTES, closed.difference(SealFlags::GROW)), "F_SEAL_GROW"),
        (brought(plain, BYTES, memfd::SIZE_SEALS), "F_SEAL_FUTURE_WRITE once"),
        (brought(plain, BYTES, closed | SealFlags::WRITE), "F_SEAL_FUTURE_WRITE instead"),
        (read_only, "for reading and writing"),
        (brought(plain, BYTES - PAGE_BYTES, closed), "bring one file of that size"),
        (brought(plain, BYTES + PAGE_BYTES, closed), "bring one file of that size"),
    ];
    let unsealed = copy(cases[1].0.as_fd());
    if rustix::fs::memfd_create(c"client", MemfdFlags::HUGETLB).is_ok() {
        cases.push((brought(MemfdFlags::HUGETLB, 2 << 20, closed), "bring one file of that size"));
        let error = IngestFile::bring(brought(MemfdFlags::HUGETLB, 2 << 20, closed), 2 << 20).expect_err("huge pages");
        assert!(error.to_string().contains("without MFD_HUGETLB"), "{error}");
    }
    for (fd, telling) in cases {
        let error = IngestFile::bring(fd, BYTES).expect_err(telling);
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
        let told = error.to_string();
        assert!(told.contains(telling) && told.len() < 220, "{told} ({} bytes) does not tell {telling:?}", told.len());
    }
    assert_eq!(rustix::fs::fcntl_get_seals(&unsealed).expect("a memfd"), SealFlags::empty(), "nothing is added");
}

#[test]
fn a_client_that_keeps_a_way_to_write_is_found_out() {
    let file = raw_memfd(MemfdFlags::ALLOW_SEALING, BYTES);
    rustix::fs::fcntl_add_seals(&file, memfd::SIZE_SEALS | SealFlags::SEAL).expect("sealed");
    let file = IngestFile::adopt(file, BYTES).expect("its size is sealed");
    let error = file.close_for_writers().expect_err("no more seals");
    assert_eq!(error.kind(), io::ErrorKind::PermissionDenied);
    assert!(error.to_string().contains("do not add F_SEAL_SEAL"), "{error}");
    assert!(!file.is_closed_for_writers().expect("its seals"));
}
