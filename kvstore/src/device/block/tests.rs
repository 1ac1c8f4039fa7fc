//! One suite that every device has to pass, and what only real files show.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::mpsc;
use std::time::Instant;

use rustix::fs::OFlags;
use rustix::io::Errno;

use super::probe::probe_depth;
use super::simulated::{DiskImage, Faults, SimulatedDisk};
use super::*;
use crate::device::ingest::IngestFile;
use crate::device::shared::SharedFile;
use crate::names::TenantId;

/// The file of the suite: so many places, of so many bytes each.
const PLACES: u64 = 48;
const PLACE_BYTES: u64 = 16 * PAGE_BYTES;
const FILE_BYTES: u64 = PLACES * PLACE_BYTES;
const DEPTH: usize = 8;
const PATIENCE: Duration = Duration::from_secs(30);
const TENANT: TenantId = TenantId(0);

/// Two segments, one of which is told to devices as ready.
fn arena() -> Arc<Arena> {
    let arena = Arena::new(FILE_BYTES, 2).expect("addresses");
    arena.prepare(0, TENANT, false).expect("memory");
    Arc::new(arena)
}

/// The same on a file that clients map, with an ingest place behind.
fn arena_of_clients() -> (Arc<[SharedFile]>, Arc<Arena>) {
    let files: Arc<[SharedFile]> = (0..2).map(|_| SharedFile::create(2 * FILE_BYTES).expect("a file")).collect();
    let arena = Arena::on(&files, FILE_BYTES, 2, 1).expect("addresses");
    for segment in 0..2 {
        arena.prepare(segment, TENANT, false).expect("memory");
    }
    (files, Arc::new(arena))
}

/// A piece of one to sixteen pages at each place.
fn extent(segment: u32, place: u64) -> Extent {
    Extent { segment, offset: (place * PLACE_BYTES) as u32, bytes: ((1 + place * 7 % 16) * PAGE_BYTES) as u32 }
}

/// Bytes that tell place, generation and position.
fn payload(place: u64, generation: u64) -> Vec<u8> {
    let words = u64::from(extent(0, place).bytes) / 8;
    let word = |position| tender_proto::sum::mix(place << 40 | generation << 32 | position).to_le_bytes();
    (0..words).flat_map(word).collect()
}

/// Runs operations, as many at a time as the device takes. Their results by their position.
fn perform<D: BlockDevice + ?Sized>(
    device: &mut D,
    tick: &mut dyn FnMut(&mut D),
    operations: Vec<Operation>,
) -> Vec<Result<(), IoFault>> {
    complete(device, tick, operations).into_iter().map(|completion| completion.result).collect()
}

/// The same, with whole completions, of which each comes exactly once.
fn complete<D: BlockDevice + ?Sized>(
    device: &mut D,
    tick: &mut dyn FnMut(&mut D),
    operations: Vec<Operation>,
) -> Vec<IoDone> {
    let (count, deadline) = (operations.len(), Instant::now() + PATIENCE);
    let mut results = BTreeMap::new();
    let mut operations = (0u64..).zip(operations);
    let (mut in_flight, mut done) = (0, Vec::new());
    while results.len() < count {
        assert!(Instant::now() < deadline, "{} of {count} completed within {PATIENCE:?}", results.len());
        for (id, operation) in operations.by_ref().take(device.depth() - in_flight) {
            device.submit(IoRequest { id, operation });
            in_flight += 1;
        }
        tick(device);
        device.wait(Duration::from_millis(100), &mut done);
        for completion in done.drain(..) {
            in_flight -= 1;
            let id = completion.id;
            assert!(results.insert(id, completion).is_none(), "{id} completed twice");
        }
    }
    results.into_values().collect()
}

fn write(arena: &Arena, segment: u32, place: u64, generation: u64) -> Operation {
    arena.write(extent(segment, place), 0, &payload(place, generation));
    Operation::Write { offset: place * PLACE_BYTES, from: extent(segment, place) }
}

fn read(arena: &Arena, segment: u32, place: u64) -> Operation {
    arena.write(extent(segment, place), 0, &vec![0xee; extent(segment, place).bytes as usize]);
    Operation::Read { offset: place * PLACE_BYTES, into: extent(segment, place) }
}

/// Memory that holds something else before.
fn read_private(place: u64) -> Operation {
    let mut into = PageBuffer::zeroed(extent(0, place).bytes as usize / PAGE_BYTES as usize).expect("memory");
    into.fill(0xee);
    Operation::ReadPrivate { offset: place * PLACE_BYTES, into }
}

fn assert_payload(arena: &Arena, segment: u32, place: u64, generation: u64) {
    let mut found = vec![0; extent(segment, place).bytes as usize];
    arena.read(extent(segment, place), 0, &mut found);
    assert!(found == payload(place, generation), "place {place} does not hold generation {generation}");
}

/// What the trait promises. `tick` lets simulated time pass.
fn conformance<D: BlockDevice + ?Sized>(device: &mut D, arena: &Arena, mut tick: impl FnMut(&mut D)) {
    let sound = |results: Vec<Result<(), IoFault>>| assert!(results.iter().all(Result::is_ok), "{results:?}");
    assert!(device.depth() > 0);
    assert!(!device.describe().is_empty());
    device.segment_ready(0);

    // Written from both segments, in an order that is not the file's; read into the other segment.
    let places = || (0..PLACES).map(|step| step * 29 % PLACES);
    let writes = places().map(|place| write(arena, place as u32 % 2, place, 1)).collect();
    sound(perform(device, &mut tick, writes));
    sound(perform(device, &mut tick, vec![Operation::Flush]));
    sound(perform(device, &mut tick, places().map(|place| read(arena, 1 - place as u32 % 2, place)).collect()));
    places().for_each(|place| assert_payload(arena, 1 - place as u32 % 2, place, 1));

    // Into memory of the request's own, which comes back with it, and the arena is left alone.
    let operations = places().map(|place| match place % 3 {
        0 => read(arena, 0, place),
        _ => read_private(place),
    });
    arena.zero(0);
    let done = complete(device, &mut tick, operations.collect());
    for (place, done) in places().zip(done) {
        assert!(done.result.is_ok(), "{done:?}");
        match done.private {
            None => assert_eq!(place % 3, 0, "a private read keeps its memory"),
            Some(found) => {
                assert!(found[..] == payload(place, 1), "place {place} was read as something else");
                let mut memory = vec![0; found.len()];
                arena.read(extent(0, place), 0, &mut memory);
                assert!(memory.iter().all(|&byte| byte == 0), "a private read of place {place} came to the arena");
            }
        }
    }

    // Reads, writes, pages and flushes in flight together.
    let mixed = places().map(|place| match place % 4 {
        0 => write(arena, 0, place, 2),
        1 => Operation::WritePage {
            offset: place * PLACE_BYTES,
            page: Box::new(Page([place as u8; PAGE_BYTES as usize])),
        },
        2 => read(arena, 1, place),
        _ => Operation::Flush,
    });
    sound(perform(device, &mut tick, mixed.collect()));
    places().filter(|place| place % 4 == 2).for_each(|place| assert_payload(arena, 1, place, 1));
    sound(perform(device, &mut tick, places().map(|place| read(arena, 0, place)).collect()));
    for place in places() {
        match place % 4 {
            1 => {
                let mut page = vec![0; PAGE_BYTES as usize];
                arena.read(extent(0, place), 0, &mut page);
                assert!(page.iter().all(|&byte| byte == place as u8), "the page of place {place}");
            }
            other => assert_payload(arena, 0, place, if other == 0 { 2 } else { 1 }),
        }
    }

    // Whatever leaves the file is a fault.
    let outside = |offset| Operation::Read { offset, into: extent(0, 1) };
    let grow = Operation::Write { offset: FILE_BYTES, from: extent(0, 1) };
    let faults = vec![outside(FILE_BYTES), outside(FILE_BYTES - PAGE_BYTES), outside(u64::MAX - PAGE_BYTES + 1), grow];
    assert_eq!(perform(device, &mut tick, faults), vec![Err(IoFault::Short); 4]);
    let refused = complete(device, &mut tick, vec![read_private(PLACES)]).remove(0);
    assert!(refused.result == Err(IoFault::Short) && refused.private.is_some(), "{refused:?}");

    // Wake-ups: while waiting, before waiting, and from a waker that outlives its use.
    let waker = device.waker();
    let start = Instant::now();
    let mut done = Vec::new();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(Duration::from_millis(20));
            waker();
        });
        device.wait(PATIENCE, &mut done);
    });
    (0..1000).for_each(|_| waker());
    device.wait(PATIENCE, &mut done);
    assert!(start.elapsed() < PATIENCE, "the waker did not end the wait");
    assert!(done.is_empty(), "completions of nothing: {done:?}");
}

fn tier_file(folder: &Path) -> TierFile {
    TierFile::open(&folder.join("tier"), FILE_BYTES, PATIENCE).expect("a file of a few MiB").file
}

/// A ring, or none, said aloud, where the system has none to give. Any other failure is one of the code.
fn ring(file: &TierFile, arena: &Arc<Arena>) -> Option<Uring> {
    match Uring::new(file, Arc::clone(arena), DEPTH) {
        Ok(ring) => Some(ring),
        Err(error)
            if error.kind() == io::ErrorKind::Unsupported
                || [Errno::NOSYS, Errno::PERM, Errno::ACCESS, Errno::NOMEM]
                    .contains(&Errno::from_io_error(&error).unwrap_or(Errno::IO)) =>
        {
            println!("skipped: io_uring is not to be had here ({error})");
            None
        }
        Err(error) => panic!("a ring cannot be made: {error}"),
    }
}

/// A folder on the default file system, and one on tmpfs where there is one.
fn folders() -> Vec<tempfile::TempDir> {
    let mut folders = vec![tempfile::tempdir().expect("a folder")];
    folders.extend(tempfile::tempdir_in("/dev/shm"));
    folders
}

#[test]
fn a_ring_conforms_on_every_file_system_and_without_o_direct() {
    for folder in folders() {
        for direct in [true, false] {
            let (file, arena) = (tier_file(folder.path()), arena());
            if !direct {
                let flags = rustix::fs::fcntl_getfl(file.file()).expect("flags");
                rustix::fs::fcntl_setfl(file.file(), flags.difference(OFlags::DIRECT)).expect("page cache");
            }
            let Some(mut ring) = ring(&file, &arena) else { return };
            conformance(&mut ring, &arena, |_| ());
            println!("{}: {}", folder.path().display(), ring.describe());
        }
    }
}

#[test]
fn devices_use_the_memory_that_clients_map() {
    let folder = tempfile::tempdir().expect("a folder");
    let (file, (files, arena)) = (tier_file(folder.path()), arena_of_clients());
    conformance(&mut Synchronous::new(&file, Arc::clone(&arena), DEPTH).expect("threads"), &arena, |_| ());
    let Some(mut ring) = ring(&file, &arena) else { return };
    conformance(&mut ring, &arena, |_| ());
    println!("{}", ring.describe());
    assert_eq!(perform(&mut ring, &mut |_| (), vec![write(&arena, 1, 5, 3)]), [Ok(())]);
    assert_eq!(perform(&mut ring, &mut |_| (), vec![read(&arena, 0, 5)]), [Ok(())]);
    let mut seen = vec![0; extent(0, 5).bytes as usize];
    rustix::io::pread(files[0].read_only(), &mut seen[..], 5 * PLACE_BYTES).expect("what clients see");
    assert!(seen == payload(5, 3));
}

#[test]
fn a_segment_that_goes_to_another_tenant_is_registered_anew() {
    let folder = tempfile::tempdir().expect("a folder");
    let (file, (files, arena)) = (tier_file(folder.path()), arena_of_clients());
    let pool: Box<dyn BlockDevice> = Box::new(Synchronous::new(&file, Arc::clone(&arena), DEPTH).expect("threads"));
    let ring = ring(&file, &arena).map(|ring| Box::new(ring) as Box<dyn BlockDevice>);
    for mut device in std::iter::once(pool).chain(ring) {
        for (round, tenant) in [0, 1, 0, 1].map(TenantId).into_iter().enumerate() {
            arena.prepare(0, tenant, true).expect("memory");
            device.segment_ready(0);
            let round = round as u64 + 1;
            let mut sound = |operation| assert_eq!(perform(&mut *device, &mut |_| (), vec![operation]), [Ok(())]);
            // Out of its memory, and into it.
            sound(write(&arena, 0, 5, round));
            sound(read(&arena, 1, 5));
            assert_payload(&arena, 1, 5, round);
            sound(read(&arena, 0, 5));
            assert_payload(&arena, 0, 5, round);
            let seen = files.iter().map(|file| {
                let mut seen = vec![0xff; extent(0, 5).bytes as usize];
                rustix::io::pread(file.read_only(), &mut seen[..], 5 * PLACE_BYTES).expect("what clients see");
                seen
            });
            for (seen, other) in seen.zip([0, 1].map(TenantId)) {
                let expected = if other == tenant { payload(5, round) } else { vec![0; seen.len()] };
                assert!(seen == expected, "{}: {other:?} after {tenant:?} got it", device.describe());
            }
        }
    }
}

#[test]
fn no_device_touches_ingest_memory() {
    let folder = tempfile::tempdir().expect("a folder");
    let (file, (_shared, arena)) = (tier_file(folder.path()), arena_of_clients());
    let ingest = IngestFile::create(FILE_BYTES).expect("a file");
    ingest.close_for_writers().expect("closed");
    arena.install(2, &ingest, 0, FILE_BYTES).expect("installed");
    let pool: Box<dyn BlockDevice> = Box::new(Synchronous::new(&file, Arc::clone(&arena), DEPTH).expect("threads"));
    let ring = ring(&file, &arena).map(|ring| Box::new(ring) as Box<dyn BlockDevice>);
    for mut device in std::iter::once(pool).chain(ring) {
        device.segment_ready(2);
        for operation in
            [Operation::Read { offset: 0, into: extent(2, 0) }, Operation::Write { offset: 0, from: extent(2, 0) }]
        {
            let submit = std::panic::AssertUnwindSafe(|| device.submit(IoRequest { id: 1, operation }));
            let panic = std::panic::catch_unwind(submit).expect_err("no address");
            let message = panic.downcast_ref::<String>().expect("a formatted message");
            assert!(message.contains("segment 2 is ingest memory"), "{message}");
        }
    }
}

#[test]
fn a_pool_of_threads_conforms() {
    for threads in [1, DEPTH] {
        let folder = tempfile::tempdir().expect("a folder");
        let (file, arena) = (tier_file(folder.path()), arena());
        let mut pool = Synchronous::new(&file, Arc::clone(&arena), threads).expect("threads");
        assert_eq!(pool.depth(), threads);
        conformance(&mut pool, &arena, |_| ());
    }
}

#[test]
fn a_simulated_disk_conforms() {
    for seed in 0..20 {
        let arena = arena();
        let faults = Faults { stall_per_mille: 100, ..Faults::default() };
        let mut disk = SimulatedDisk::new(seed, DiskImage::new(FILE_BYTES), Arc::clone(&arena), faults);
        conformance(&mut disk, &arena, |disk| {
            if let Some(due_us) = disk.next_due_us() {
                disk.advance(due_us);
            }
        });
    }
}

/// Each real device over a new file.
fn on_real_devices(check: impl Fn(&TierFile, &Arc<Arena>, Box<dyn BlockDevice>)) {
    let folder = tempfile::tempdir().expect("a folder");
    let (file, arena) = (tier_file(folder.path()), arena());
    if let Some(ring) = ring(&file, &arena) {
        check(&file, &arena, Box::new(ring));
    }
    check(&file, &arena, Box::new(Synchronous::new(&file, Arc::clone(&arena), DEPTH).expect("threads")));
}

#[test]
fn a_file_cut_short_behind_our_back_is_a_fault() {
    on_real_devices(|file, arena, mut device| {
        file.file().set_len(FILE_BYTES).expect("whole");
        let places = |places: std::ops::Range<u64>| places.map(|place| read(arena, 0, place)).collect::<Vec<_>>();
        assert!(perform(&mut *device, &mut |_| (), places(0..PLACES)).iter().all(Result::is_ok));
        // In the middle of the first page of place 3, and of the second page of place 2.
        for bytes in [3 * PLACE_BYTES + 100, 2 * PLACE_BYTES + PAGE_BYTES + 512] {
            file.file().set_len(bytes).expect("cut");
            let results = perform(&mut *device, &mut |_| (), places(0..5));
            let whole = |place| place * PLACE_BYTES + u64::from(extent(0, place).bytes) <= bytes;
            let expected = (0..5).map(|place| if whole(place) { Ok(()) } else { Err(IoFault::Short) });
            assert_eq!(results, expected.collect::<Vec<_>>(), "cut at {bytes}");
        }
    });
}

#[test]
fn the_lock_falls_with_the_device_and_dropping_waits_for_what_is_in_flight() {
    on_real_devices(|_, _, device| drop(device));
    for pool in [false, true] {
        let folder = tempfile::tempdir().expect("a folder");
        let (file, arena) = (tier_file(folder.path()), arena());
        let mut device: Box<dyn BlockDevice> = match ring(&file, &arena) {
            Some(ring) if !pool => Box::new(ring),
            _ => Box::new(Synchronous::new(&file, Arc::clone(&arena), DEPTH).expect("threads")),
        };
        for place in 0..DEPTH as u64 {
            device.submit(IoRequest { id: place, operation: write(&arena, 0, place, 9) });
        }
        drop(file);
        device.wait(Duration::ZERO, &mut Vec::new());
        drop(device);
        drop(arena);
        let file = tier_file(folder.path());
        let found = file.read_pages(3 * PLACE_BYTES, extent(0, 3).bytes as usize / PAGE_BYTES as usize).expect("pages");
        assert!(found[..] == payload(3, 9), "a write in flight at the drop was not done");
    }
}

#[test]
fn a_device_may_move_to_another_thread() {
    on_real_devices(|_, arena, mut device| {
        for round in 1..4 {
            let waker = device.waker();
            let (sender, receiver) = mpsc::channel();
            std::thread::scope(|scope| {
                scope.spawn(move || {
                    perform(
                        &mut *device,
                        &mut |_| (),
                        (0..PLACES).map(|place| write(arena, 0, place, round)).collect(),
                    );
                    perform(&mut *device, &mut |_| (), (0..PLACES).map(|place| read(arena, 0, place)).collect());
                    sender.send(device).expect("somebody waits for it");
                });
            });
            device = receiver.recv().expect("the thread has ended well");
            (0..PLACES).for_each(|place| assert_payload(arena, 0, place, round));
            waker();
            let start = Instant::now();
            device.wait(PATIENCE, &mut Vec::new());
            assert!(start.elapsed() < PATIENCE, "the waker did not move along");
        }
    });
}

#[test]
fn a_wait_for_nothing_ends_in_time() {
    on_real_devices(|_, _, mut device| {
        let (start, mut done) = (Instant::now(), Vec::new());
        device.wait(Duration::from_millis(30), &mut done);
        device.wait(Duration::ZERO, &mut done);
        assert!(done.is_empty());
        assert!((Duration::from_millis(25)..PATIENCE).contains(&start.elapsed()), "{:?}", start.elapsed());
    });
}

#[test]
fn the_best_device_opens_and_says_what_it_is() {
    let folder = tempfile::tempdir().expect("a folder");
    let (file, arena) = (tier_file(folder.path()), arena());
    let (mut device, why_not) = open_device(&file, Arc::clone(&arena), DEPTH).expect("some device");
    assert_eq!(device.describe().starts_with("io_uring"), why_not.is_none(), "{why_not:?}");
    conformance(&mut *device, &arena, |_| ());
}

#[test]
fn requests_of_broken_geometry_panic_where_they_are_made() {
    on_real_devices(|_, _, mut device| {
        let odd = Extent { bytes: 100, ..extent(0, 0) };
        let submit = std::panic::AssertUnwindSafe(|| {
            device.submit(IoRequest { id: 0, operation: Operation::Read { offset: 0, into: odd } });
        });
        let panic = std::panic::catch_unwind(submit).expect_err("odd length");
        assert!(panic.downcast_ref::<String>().is_some_and(|message| message.contains("not in whole pages")));
    });
}

#[test]
fn a_probe_finds_a_depth_in_time() {
    on_real_devices(|file, arena, mut device| {
        file.file().set_len(FILE_BYTES).expect("whole");
        let writes = (0..PLACES).map(|place| write(arena, 0, place, 1)).collect();
        perform(&mut *device, &mut |_| (), writes);
        let scratch = Extent { segment: 0, offset: 0, bytes: FILE_BYTES as u32 };
        let start = Instant::now();
        let probe = probe_depth(&mut *device, FILE_BYTES, scratch, PLACE_BYTES as u32, 1);
        println!("{}: {probe:?} in {:?}", device.describe(), start.elapsed());
        assert!(probe.depth.is_power_of_two() && probe.depth <= DEPTH, "{probe:?}");
        assert!(probe.read_bytes_per_s > 0 && probe.fault.is_none(), "{probe:?}");
        assert!(start.elapsed() < PATIENCE);
    });
}
