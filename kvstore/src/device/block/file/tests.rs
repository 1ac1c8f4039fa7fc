use std::os::unix::fs::PermissionsExt;

use rustix::io::FdFlags;

use super::*;

const BYTES: u64 = 256 * PAGE_BYTES;

/// A process that another test starts has a copy of every descriptor, and with it the lock, until it has closed them.
const PATIENCE: Duration = Duration::from_secs(30);

fn folder() -> tempfile::TempDir {
    tempfile::tempdir().expect("a folder")
}

fn open(path: &Path) -> Result<Opened, OpenError> {
    TierFile::open(path, BYTES, PATIENCE)
}

/// One sentence that names the file and the cure.
fn assert_tells(error: &OpenError, path: &Path, cure: &str) {
    let message = error.to_string();
    assert!(message.contains(&path.display().to_string()) && message.contains(cure), "{message}");
    assert!(!message.contains('\n') && !message.ends_with('.'), "{message}");
}

#[test]
fn a_new_file_is_private_whole_and_allocated() {
    let folder = folder();
    let path = folder.path().join("tier");
    let Opened { file, fresh } = open(&path).expect("a new file");
    let found = file.file().metadata().expect("metadata");
    assert!(fresh);
    assert_eq!((file.bytes(), found.len()), (BYTES, BYTES));
    assert_eq!(found.permissions().mode() & 0o777, 0o600);
    assert!(rustix::io::fcntl_getfd(file.file()).expect("flags").contains(FdFlags::CLOEXEC), "it would be inherited");
    let allocated_bytes = found.blocks() * 512;
    assert!(allocated_bytes >= BYTES || allocated_bytes == 0, "{allocated_bytes} of {BYTES} bytes are allocated");
    let direct = rustix::fs::fcntl_getfl(file.file()).expect("flags").contains(OFlags::DIRECT);
    assert_eq!(file.is_direct(), direct);
}

#[test]
fn pages_come_back_after_a_reopening() {
    let folder = folder();
    let path = folder.path().join("tier");
    let mut file = open(&path).expect("a new file").file;
    let mut pages = PageBuffer::zeroed(3).expect("pages");
    for (byte, number) in pages.iter_mut().zip(0u64..) {
        *byte = tender_proto::sum::mix(number) as u8;
    }
    file.write_pages(5 * PAGE_BYTES, &pages).expect("a write");
    file.flush().expect("a flush");
    drop(file);
    let Opened { file, fresh } = open(&path).expect("the same file");
    assert!(!fresh);
    assert!(file.read_pages(5 * PAGE_BYTES, 3).expect("a read")[..] == pages[..]);
    assert!(file.read_pages(0, 5).expect("a read").iter().all(|&byte| byte == 0));
}

#[test]
fn reads_and_writes_behind_the_end_are_errors() {
    let folder = folder();
    let mut file = open(&folder.path().join("tier")).expect("a new file").file;
    let error = file.read_pages(BYTES - PAGE_BYTES, 2).expect_err("one page is not there");
    assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    file.write_pages(BYTES - PAGE_BYTES, &PageBuffer::zeroed(2).expect("pages")).expect_err("it would grow");
    assert_eq!(file.file().metadata().expect("metadata").len(), BYTES);
}

#[test]
fn a_second_daemon_is_refused_and_told_the_cure() {
    let folder = folder();
    let path = folder.path().join("tier");
    let first = open(&path).expect("a new file");
    let error = TierFile::open(&path, BYTES, Duration::ZERO).expect_err("it is locked");
    assert!(matches!(error, OpenError::Locked { .. }), "{error:?}");
    assert_tells(&error, &path, "another tender daemon uses it");
    assert_tells(&error, &path, "--dir");
    drop(first);
    assert!(!open(&path).expect("the lock has fallen").fresh);
}

#[test]
fn a_lock_that_falls_soon_is_waited_for() {
    let folder = folder();
    let path = folder.path().join("tier");
    let first = open(&path).expect("a new file");
    thread::scope(|scope| {
        scope.spawn(move || {
            thread::sleep(Duration::from_millis(60));
            drop(first);
        });
        let start = Instant::now();
        TierFile::open(&path, BYTES, PATIENCE).expect("the lock falls within the wait");
        assert!(start.elapsed() >= Duration::from_millis(50), "{:?}", start.elapsed());
    });
}

#[test]
fn another_size_is_refused_and_changes_nothing() {
    let folder = folder();
    let path = folder.path().join("tier");
    drop(open(&path).expect("a new file"));
    for wanted_bytes in [BYTES - PAGE_BYTES, BYTES + PAGE_BYTES] {
        let error = TierFile::open(&path, wanted_bytes, PATIENCE).expect_err("another size");
        assert!(matches!(error, OpenError::WrongSize { found_bytes: BYTES, .. }), "{error:?}");
        assert_tells(&error, &path, "start with the size it has");
    }
    open(&path).expect("as it was");
}

#[test]
fn more_than_there_is_room_for_is_refused_without_filling_the_disk() {
    let folder = folder();
    let path = folder.path().join("tier");
    let found = rustix::fs::statvfs(folder.path()).expect("a file system");
    let wanted_bytes = (found.f_blocks * found.f_frsize + (1 << 30)).next_multiple_of(PAGE_BYTES);
    let error = TierFile::open(&path, wanted_bytes, Duration::ZERO).expect_err("no disk is larger than itself");
    assert!(matches!(error, OpenError::NoRoom { wanted_bytes: named, .. } if named == wanted_bytes), "{error:?}");
    assert_tells(&error, &path, "ask for a smaller disk tier");
    assert_eq!(path.metadata().expect("metadata").blocks(), 0, "something stays allocated");
    assert!(open(&path).expect("a size that fits").fresh, "an unfinished file is a new one");
}

#[test]
fn a_file_whose_maker_died_before_giving_it_its_size_is_new() {
    let folder = folder();
    let path = folder.path().join("tier");
    let file = File::create(&path).expect("a file");
    // Where there is no such thing, the file is empty, which is the same state one step earlier.
    let _ = rustix::fs::fallocate(&file, FallocateFlags::KEEP_SIZE, 0, BYTES / 2);
    drop(file);
    assert!(open(&path).expect("made anew").fresh);
}

#[test]
fn what_is_no_file_or_has_no_folder_is_said_so() {
    let folder = folder();
    let error = open(folder.path()).expect_err("a folder");
    assert!(matches!(error, OpenError::NotAFile { .. }), "{error:?}");
    assert_tells(&error, folder.path(), "not a regular file");
    let path = folder.path().join("missing").join("tier");
    let error = open(&path).expect_err("no folder");
    assert!(matches!(error, OpenError::System { step: "opened", .. }), "{error:?}");
    assert_tells(&error, &path, "see that its folder exists");
}
