use std::fs::File;
use std::os::unix::fs::FileExt;
use std::os::unix::process::CommandExt;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::time::{Duration, Instant};

use proptest::prelude::*;
use rustix::process::{Resource, Rlimit};
use tender_proto::sum::fragment_sums;

use super::*;
use crate::device::tests::{again, copy, is_inherited, role, users};

const MIB: u64 = 1 << 20;

fn extent(segment: u32, offset: u64, bytes: u64) -> Extent {
    Extent { segment, offset: offset as u32, bytes: bytes as u32 }
}

fn contents(arena: &Arena, extent: Extent) -> Vec<u8> {
    let mut bytes = vec![0xff; extent.bytes as usize];
    arena.read(extent, 0, &mut bytes);
    bytes
}

#[test]
fn an_arena_larger_than_memory_takes_no_memory() {
    let arena = Arena::new(SEGMENT_BYTES_MAX, 1024).expect("addresses for 1 TiB");
    assert_eq!((arena.segment_bytes(), arena.segment_count()), (SEGMENT_BYTES_MAX, 1024));
}

#[test]
fn segments_of_odd_or_excessive_size_are_refused_with_the_cure() {
    for bytes in [0, 1, PAGE_BYTES + 1, SEGMENT_BYTES_MAX + PAGE_BYTES] {
        let error = Arena::new(bytes, 1).expect_err("no such segment").to_string();
        assert!(error.contains("choose a multiple of 4096"), "{error}");
    }
}

#[test]
fn a_prepared_segment_is_populated_and_zero() {
    let arena = Arena::new(20 * MIB, 2).expect("addresses");
    prepare(&arena, 1, TENANT, false);
    assert!(contents(&arena, extent(1, 0, 20 * MIB)).iter().all(|&byte| byte == 0));
}

#[test]
fn touching_leaves_everything_as_it_was() {
    let arena = Arena::new(4 * PAGE_BYTES, 1).expect("addresses");
    let whole = extent(0, 0, 4 * PAGE_BYTES);
    arena.write(extent(0, PAGE_BYTES, PAGE_BYTES), 0, &[7]);
    arena.write(extent(0, 3 * PAGE_BYTES, PAGE_BYTES), 0, &[8]);
    let before = contents(&arena, whole);
    for for_writing in [false, true] {
        touch(&arena.segment(0), 0, 3 * PAGE_BYTES as usize, for_writing);
        assert_eq!(contents(&arena, whole), before);
    }
}

#[test]
fn a_change_of_owner_leaves_nothing_of_the_old_one() {
    let arena = Arena::new(MIB, 2).expect("addresses");
    let whole = |segment| extent(segment, 0, MIB);
    arena.write(whole(0), 0, &vec![0xaa; MIB as usize]);
    arena.write(whole(1), 0, &vec![0xbb; MIB as usize]);
    prepare(&arena, 0, TENANT, true);
    assert!(contents(&arena, whole(0)).iter().all(|&byte| byte == 0));
    assert!(contents(&arena, whole(1)).iter().all(|&byte| byte == 0xbb), "another segment was touched");
}

#[test]
fn threads_use_different_extents_at_once() {
    let arena = Arena::new(MIB, 4).expect("addresses");
    std::thread::scope(|scope| {
        for segment in 0..4u32 {
            let arena = &arena;
            scope.spawn(move || {
                for page in 0..MIB / PAGE_BYTES {
                    let page = extent(segment, page * PAGE_BYTES, PAGE_BYTES);
                    arena.write(page, 0, &[segment as u8 + 1; PAGE_BYTES as usize]);
                }
            });
        }
    });
    for segment in 0..4 {
        assert!(contents(&arena, extent(segment, 0, MIB)).iter().all(|&byte| byte == segment as u8 + 1));
    }
}

#[test]
fn whatever_leaves_its_extent_or_segment_panics_with_both_named() {
    let arena = Arena::new(MIB, 1).expect("addresses");
    let cases: [(&str, &dyn Fn()); 6] = [
        ("leaves its segment", &|| arena.write(extent(0, MIB, PAGE_BYTES), 0, &[1])),
        ("segment 1 of an arena of 1", &|| arena.zero(1)),
        ("leave Extent", &|| arena.write(extent(0, 0, PAGE_BYTES), 1, &[0; PAGE_BYTES as usize])),
        ("leave Extent", &|| arena.read(extent(0, 0, PAGE_BYTES), usize::MAX, &mut [0; 2])),
        ("behind the end", &|| arena.zero_from(extent(0, 0, PAGE_BYTES), PAGE_BYTES as usize + 1)),
        ("leave Extent", &|| drop(arena.fragment_sums(extent(0, 0, PAGE_BYTES), PAGE_BYTES as usize + 1))),
    ];
    for (telling, case) in cases {
        let panic = std::panic::catch_unwind(std::panic::AssertUnwindSafe(case)).expect_err(telling);
        let message = panic.downcast_ref::<String>().expect("a formatted message");
        assert!(message.contains(telling), "{message:?} does not tell {telling:?}");
    }
}

const TENANT: TenantId = TenantId(0);

/// The file of an only tenant.
fn shared(bytes: u64) -> Arc<[SharedFile]> {
    shared_by(1, bytes)
}

fn shared_by(tenant_count: usize, bytes: u64) -> Arc<[SharedFile]> {
    (0..tenant_count).map(|_| SharedFile::create(bytes).expect("a file")).collect()
}

fn prepare(arena: &Arena, segment: u32, tenant: TenantId, used: bool) -> Prepared {
    let prepared = arena.prepare(segment, tenant, used).expect("memory");
    assert!(prepared.populated, "{prepared:?}");
    prepared
}

/// A file that a client has mapped, and its mapping.
fn ingest(bytes: u64) -> (IngestFile, MmapRaw) {
    let file = IngestFile::create(bytes).expect("a file");
    let clients =
        MmapOptions::new().len(bytes as usize).map_raw(file.descriptor().as_raw_fd()).expect("mapped for writing");
    file.close_for_writers().expect("closed");
    (file, clients)
}

/// A client's memory as words, which it writes while others read.
fn words(clients: &MmapRaw) -> &[AtomicU64] {
    // SAFETY: a live mapping of whole pages; all that use it meanwhile do so by atomic operations or through another mapping.
    unsafe { slice::from_raw_parts(clients.as_ptr().cast(), clients.len() / 8) }
}

/// An arena of two segments and two ingest places, the first of which holds a file of random words.
fn arena_with_ingest() -> (Arena, MmapRaw) {
    let arena = Arena::on(&shared(2 * MIB), MIB, 2, 2).expect("addresses");
    for segment in 0..2 {
        prepare(&arena, segment, TENANT, false);
    }
    let (file, clients) = ingest(MIB);
    for (word, number) in words(&clients).iter().zip(0u64..) {
        word.store(tender_proto::sum::mix(number), Ordering::Relaxed);
    }
    arena.install(2, &file, 0, MIB).expect("installed");
    (arena, clients)
}

#[test]
fn segments_are_pieces_of_the_shared_file_in_their_order() {
    let file = shared(3 * MIB);
    let arena = Arena::on(&file, MIB, 3, 0).expect("addresses");
    for segment in 0..3 {
        prepare(&arena, segment, TENANT, false);
        arena.write(extent(segment, PAGE_BYTES, PAGE_BYTES), 0, &[segment as u8 + 1]);
    }
    let twin = File::from(copy(file[0].read_only()));
    for segment in 0..3u64 {
        let mut bytes = [0; 2];
        twin.read_exact_at(&mut bytes, segment * MIB + PAGE_BYTES).expect("what clients see");
        assert_eq!(bytes, [segment as u8 + 1, 0]);
    }
    for (count, ingest_count, telling) in [(4, 0, "make one of 4194304"), (1, u32::MAX, "do not fit")] {
        let error = Arena::on(&file, MIB, count, ingest_count).expect_err("it does not fit").to_string();
        assert!(error.contains(telling), "{error}");
    }
    let error = Arena::on(&file, MIB + 1, 1, 0).expect_err("no such segment").to_string();
    assert!(error.contains("choose a multiple of 4096"), "{error}");
}

/// A client of a tenant: the whole file, mapped for reading for as long as it likes.
fn client(files: &[SharedFile], tenant: TenantId) -> MmapRaw {
    let file = &files[usize::from(tenant.0)];
    let options = MmapOptions::new().len(file.bytes() as usize).clone();
    options.map_raw_read_only(file.read_only().as_raw_fd()).expect("mapped for reading")
}

/// The words that a client sees in a segment, each once.
fn seen(client: &MmapRaw, segment: u64) -> Vec<u64> {
    let segment = &words(client)[(segment * MIB / 8) as usize..][..(MIB / 8) as usize];
    let mut seen: Vec<u64> = segment.iter().map(|word| word.load(Ordering::Relaxed)).collect();
    seen.sort_unstable();
    seen.dedup();
    seen
}

fn held_bytes(file: &SharedFile) -> u64 {
    rustix::fs::fstat(file.writable()).expect("a file").st_blocks as u64 * 512
}

#[test]
fn a_tenants_clients_never_see_what_is_anothers_also_when_a_segment_goes_there_and_back() {
    let (one, other) = (TenantId(0), TenantId(1));
    let files = shared_by(2, 2 * MIB);
    let arena = Arena::on(&files, MIB, 2, 0).expect("addresses");
    let (clients_of_one, clients_of_other) = (client(&files, one), client(&files, other));
    let fill = |segment, byte: u8| arena.write(extent(segment, 0, MIB), 0, &vec![byte; MIB as usize]);
    let sees = || [seen(&clients_of_one, 0), seen(&clients_of_other, 0)];
    fill(0, 0x99);
    assert_eq!(sees(), [[0], [0]], "what is not prepared is in nobody's file");
    for (segment, tenant) in [(0, one), (1, other)] {
        prepare(&arena, segment, tenant, false);
    }
    assert!(contents(&arena, extent(0, 0, MIB)).iter().all(|&byte| byte == 0), "and does not come into one");
    fill(0, 0x11);
    fill(1, 0x22);
    let (ones, others) = (u64::from_le_bytes([0x11; 8]), u64::from_le_bytes([0x22; 8]));
    assert_eq!(sees(), [[ones], [0]]);
    assert_eq!([seen(&clients_of_one, 1), seen(&clients_of_other, 1)], [[0], [others]]);
    let start = arena.segment(0);

    // There; the client that read the hole made pages there, which tell nothing.
    for used in [true, false] {
        prepare(&arena, 0, other, used);
        assert!(contents(&arena, extent(0, 0, MIB)).iter().all(|&byte| byte == 0));
        assert_eq!((sees(), seen(&clients_of_other, 1)), ([vec![0], vec![0]], vec![others]));
        fill(0, 0x33);
        assert_eq!(sees(), [[0], [u64::from_le_bytes([0x33; 8])]]);
        // And back.
        prepare(&arena, 0, one, used);
        assert!(contents(&arena, extent(0, 0, MIB)).iter().all(|&byte| byte == 0));
        assert_eq!(held_bytes(&files[1]), MIB, "its memory is free");
        assert_eq!(sees(), [[0], [0]]);
        fill(0, 0x11);
        assert_eq!(sees(), [[ones], [0]]);
    }

    // Staying whose it is it loses what it held if that was used, and its place never.
    let address = arena.segment_pointer(0);
    prepare(&arena, 0, one, false);
    assert_eq!(sees(), [[ones], [0]]);
    prepare(&arena, 0, one, true);
    assert_eq!((sees(), arena.segment_pointer(0)), ([vec![0], vec![0]], address));
    assert_eq!(Arc::strong_count(&start), 1, "a mapping that was left is gone with its last user");
}

#[test]
fn a_client_that_reads_holes_costs_others_nothing() {
    let (one, other) = (TenantId(0), TenantId(1));
    let files = shared_by(2, 2 * MIB);
    let arena = Arena::on(&files, MIB, 2, 0).expect("addresses");
    for segment in 0..2 {
        prepare(&arena, segment, one, false);
        arena.write(extent(segment, 0, PAGE_BYTES), 0, &[7]);
    }
    let holes = client(&files, other);
    assert_eq!([seen(&holes, 0), seen(&holes, 1)], [[0], [0]]);
    for segment in 0..2 {
        prepare(&arena, segment, other, true);
        prepare(&arena, segment, one, true);
        arena.write(extent(segment, 0, MIB), 0, &vec![7; MIB as usize]);
    }
    assert_eq!((held_bytes(&files[0]), held_bytes(&files[1])), (2 * MIB, 0));
}

#[test]
fn as_many_tenants_as_there_may_be_get_a_file_each() {
    let start = Instant::now();
    let files = shared_by(crate::limits::TENANTS_MAX, 64 * MIB);
    println!("{} files in {:?}", files.len(), start.elapsed());
    let arena = Arena::on(&files, MIB, 64, 0).expect("addresses");
    for (segment, tenant) in (0..64).zip(0..) {
        prepare(&arena, segment, TenantId(tenant), false);
    }
    assert!(files.iter().all(|file| held_bytes(file) == MIB));
}

#[test]
fn the_next_worker_finds_and_keeps_what_the_last_one_left() {
    let file = shared(4 * MIB);
    let first = Arena::on(&file, 2 * MIB, 2, 0).expect("addresses");
    prepare(&first, 1, TENANT, false);
    let page = extent(1, 5 * PAGE_BYTES, PAGE_BYTES);
    first.write(page, 0, b"kept");
    let adopt = |file: &SharedFile| {
        SharedFile::adopt(copy(file.writable()), copy(file.read_only()), file.protection()).expect("as it was")
    };
    let adopted: Arc<[SharedFile]> = file.iter().map(adopt).collect();
    drop((first, file));
    let second = Arena::on(&adopted, 2 * MIB, 2, 0).expect("addresses");
    prepare(&second, 1, TENANT, false);
    assert_eq!(&contents(&second, page)[..4], b"kept");
    let third = Arena::on(&adopted, 2 * MIB, 2, 0).expect("addresses");
    prepare(&third, 1, TENANT, true);
    assert!(contents(&third, page).iter().all(|&byte| byte == 0), "used by somebody before this arena");
    second.write(page, 0, b"kept");
    prepare(&second, 1, TENANT, true);
    assert!(contents(&second, extent(1, 0, 2 * MIB)).iter().all(|&byte| byte == 0));
}

#[test]
fn forked_children_have_nothing_of_the_arena() {
    let (arena, _clients) = arena_with_ingest();
    let private = Arena::new(MIB, 2).expect("addresses");
    for arena in [&arena, &private] {
        prepare(arena, 0, TENANT, false);
        assert_eq!([0, 1].map(|segment| is_inherited(arena.segment_pointer(segment).0)), [false, false]);
    }
    assert!(!is_inherited(arena.ingest_memory(2).as_ptr()));
    assert!(is_inherited([0].as_ptr()), "the child has the rest");
}

#[test]
fn ingest_memory_is_read_and_summed_as_the_client_wrote_it() {
    let (arena, clients) = arena_with_ingest();
    let expected: Vec<u8> =
        words(&clients).iter().flat_map(|word| word.load(Ordering::Relaxed).to_le_bytes()).collect();
    assert!(contents(&arena, extent(2, 0, MIB)) == expected);
    let piece = extent(2, 3 * PAGE_BYTES, 50 * PAGE_BYTES);
    let start = piece.offset as usize;
    for (offset, bytes) in [(0, 1), (1, 100), (4095, 4097), (8, 0), (13, 150_000)] {
        let mut read = vec![0; bytes];
        arena.read(piece, offset, &mut read);
        assert!(read == expected[start + offset..][..bytes], "{bytes} bytes at {offset}");
    }
    for bytes in [0, 1, FRAGMENT_BYTES, FRAGMENT_BYTES + 3, 200_000] {
        assert_eq!(arena.fragment_sums(piece, bytes), fragment_sums(&expected[start..][..bytes]), "{bytes} bytes");
    }
}

#[test]
fn a_promoted_block_is_the_clients_with_zeros_behind() {
    let (arena, clients) = arena_with_ingest();
    let expected: Vec<u8> =
        words(&clients).iter().flat_map(|word| word.load(Ordering::Relaxed).to_le_bytes()).collect();
    for payload_bytes in [1, 4096, 70_000, 200_000] {
        let slot_bytes = (payload_bytes as u64).next_multiple_of(PAGE_BYTES);
        let (from, to) = (extent(2, 7 * PAGE_BYTES, slot_bytes), extent(1, 9 * PAGE_BYTES, slot_bytes));
        arena.write(to, 0, &vec![0xee; slot_bytes as usize]);
        let payload = &expected[from.offset as usize..][..payload_bytes];
        assert_eq!(arena.promote(from, to, payload_bytes), fragment_sums(payload));
        let copied = contents(&arena, to);
        assert!(copied[..payload_bytes] == *payload, "{payload_bytes} bytes");
        assert!(copied[payload_bytes..].iter().all(|&byte| byte == 0), "{payload_bytes} bytes: something lies behind");
    }
}

#[test]
fn sums_of_a_promoted_block_are_those_of_the_copy_whatever_the_client_does() {
    const CHANGES: usize = 200;
    let (arena, clients) = arena_with_ingest();
    let (from, to) = (extent(2, 0, MIB / 2), extent(0, MIB / 2, MIB / 2));
    let (stop, patience) = (AtomicBool::new(false), Instant::now() + Duration::from_secs(60));
    let (mut seen, mut changes) = (Vec::new(), 0);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                words(&clients).iter().for_each(|word| word.store(!word.load(Ordering::Relaxed), Ordering::Relaxed));
            }
        });
        while changes < CHANGES && Instant::now() < patience {
            let sums = arena.promote(from, to, to.bytes as usize);
            if arena.fragment_sums(to, to.bytes as usize) != sums {
                break;
            }
            changes += usize::from(seen != sums);
            seen = sums;
        }
        stop.store(true, Ordering::Relaxed);
    });
    assert_eq!(changes, CHANGES, "the sums are not those of the copy, or nobody wrote meanwhile");
}

#[test]
fn an_emptied_place_is_unmapped_by_its_last_reader_and_can_be_filled_again() {
    let (arena, _clients) = arena_with_ingest();
    let reading = arena.ingest_memory(2);
    let mapping = Arc::downgrade(&reading);
    assert!(arena.take_out(2));
    assert!(!arena.take_out(2), "it is empty");
    assert!(mapping.upgrade().is_some(), "a copy from it is under way");
    drop(reading);
    assert!(mapping.upgrade().is_none());
    let (file, _others) = ingest(2 * MIB);
    arena.install(2, &file, MIB, MIB).expect("installed");
    assert!(contents(&arena, extent(2, 0, MIB)).iter().all(|&byte| byte == 0), "the other file's");
}

#[test]
fn a_place_can_be_emptied_in_the_middle_of_a_copy() {
    const BYTES: u64 = 16 * MIB;
    let arena = Arena::on(&shared(BYTES), BYTES, 1, 1).expect("addresses");
    let (file, clients) = ingest(BYTES);
    words(&clients).iter().for_each(|word| word.store(u64::MAX, Ordering::Relaxed));
    let patience = Instant::now() + Duration::from_secs(60);
    let mut in_the_middle = false;
    while !in_the_middle {
        arena.install(1, &file, 0, BYTES).expect("installed");
        let copied = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                assert!(contents(&arena, extent(1, 0, BYTES)).iter().all(|&byte| byte == 0xff));
                copied.store(true, Ordering::Relaxed);
            });
            let readers = || arena.ingest[0].read().expect("no panic").as_ref().map_or(0, Arc::strong_count) - 1;
            while readers() == 0 && !copied.load(Ordering::Relaxed) {
                std::thread::yield_now();
            }
            // The reader that has not begun yet would find it empty.
            in_the_middle = readers() > 0;
            if in_the_middle {
                arena.take_out(1);
            }
        });
        arena.take_out(1);
        assert!(Instant::now() < patience, "nobody was ever seen reading");
    }
}

#[test]
fn only_what_is_closed_and_fits_is_installed() {
    let arena = Arena::on(&shared(MIB), MIB, 1, 1).expect("addresses");
    let open = IngestFile::create(MIB).expect("a file");
    let error = arena.install(1, &open, 0, MIB).expect_err("open for writers").to_string();
    assert!(error.contains("close it"), "{error}");
    let (large, _clients) = ingest(2 * MIB);
    let error = arena.install(1, &large, 0, 2 * MIB).expect_err("larger than a segment").to_string();
    assert!(error.contains("divide it"), "{error}");
    assert!(!arena.take_out(1), "nothing was installed");
    arena.install(1, &large, MIB, MIB).expect("one piece of it");
}

/// Locking makes pages too, where it is allowed.
#[test]
fn pages_of_ingest_memory_are_there_before_it_is_read() {
    const TEST: &str = "device::memory::tests::pages_of_ingest_memory_are_there_before_it_is_read";
    if role().is_some() {
        let nothing = Rlimit { current: Some(0), maximum: Some(0) };
        rustix::process::setrlimit(Resource::Memlock, nothing).expect("a lower limit");
        let arena = Arena::on(&shared(MIB), MIB, 1, 1).expect("addresses");
        let (file, _clients) = ingest(2 * MIB);
        let prepared = arena.install(1, &file, MIB, MIB).expect("installed");
        assert_eq!((prepared.populated, prepared.locked), (true, false));
        let present_bytes = rustix::fs::fstat(file.descriptor()).expect("a file").st_blocks as u64 * 512;
        assert_eq!(present_bytes, MIB);
        return println!("all there");
    }
    let mut test = again(TEST, "may not lock");
    match users().get(1) {
        Some(&nobody) => _ = test.uid(nobody).gid(nobody).current_dir("/"),
        None if rustix::process::geteuid().is_root() => return println!("skipped: root may always lock"),
        None => {}
    }
    match test.output() {
        Ok(output) => assert!(String::from_utf8_lossy(&output.stdout).contains("all there"), "{output:?}"),
        Err(error) => println!("skipped: another user cannot run this program ({error})"),
    }
}

#[test]
fn ingest_memory_is_for_no_device_and_written_by_nobody_here() {
    let (arena, _clients) = arena_with_ingest();
    let (page, own) = (extent(2, 0, PAGE_BYTES), extent(1, 0, PAGE_BYTES));
    assert_eq!((arena.segment_count(), arena.ingest_count()), (2, 2));
    assert_eq!([0, 1, 2, 3, 4].map(|segment| arena.is_ingest(segment)), [false, false, true, true, false]);
    let (file, _others) = ingest(MIB);
    let cases: [(&str, &dyn Fn()); 14] = [
        ("TenantId(1) has no file", &|| drop(arena.prepare(1, TenantId(1), false))),
        ("is ingest memory", &|| _ = arena.pointer(page)),
        ("is ingest memory", &|| _ = arena.segment_pointer(2)),
        ("is ingest memory", &|| drop(arena.prepare(3, TENANT, false))),
        ("is ingest memory", &|| arena.zero(2)),
        ("is ingest memory", &|| arena.write(page, 0, &[1])),
        ("is ingest memory", &|| arena.zero_from(page, 0)),
        ("is ingest memory", &|| drop(arena.promote(page, page, 1))),
        ("ingest place 3 is empty", &|| arena.read(extent(3, 0, PAGE_BYTES), 0, &mut [0])),
        ("overlap", &|| drop(arena.promote(own, own, 1))),
        ("is no ingest place", &|| _ = arena.take_out(1)),
        ("leaves its segment", &|| arena.read(extent(2, MIB, PAGE_BYTES), 0, &mut [0])),
        ("leave Extent", &|| drop(arena.promote(page, own, PAGE_BYTES as usize + 1))),
        ("is not empty", &|| drop(arena.install(2, &file, 0, MIB))),
    ];
    for (telling, case) in cases {
        let panic = std::panic::catch_unwind(std::panic::AssertUnwindSafe(case)).expect_err(telling);
        let message = panic.downcast_ref::<String>().expect("a formatted message");
        assert!(message.contains(telling), "{message:?} does not tell {telling:?}");
    }
    contents(&arena, page);
}

#[test]
fn page_buffers_are_aligned_and_zero() {
    let buffer = PageBuffer::zeroed(3).expect("three pages");
    assert_eq!((buffer.pages(), buffer.len()), (3, 3 * PAGE_BYTES as usize));
    assert!(buffer.as_ptr().cast::<Page>().is_aligned());
    assert!(buffer.iter().all(|&byte| byte == 0));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn sums_in_place_are_the_sums_of_what_was_written(
        payload in proptest::collection::vec(any::<u8>(), 1..3 * FRAGMENT_BYTES),
        page in 0u64..8,
    ) {
        let arena = Arena::new(MIB, 1).expect("addresses");
        let extent = extent(0, page * PAGE_BYTES, (payload.len() as u64).next_multiple_of(PAGE_BYTES));
        arena.write(extent, 0, &vec![0xff; extent.bytes as usize]);
        arena.write(extent, 0, &payload);
        arena.zero_from(extent, payload.len());
        prop_assert_eq!(arena.fragment_sums(extent, payload.len()), tender_proto::sum::fragment_sums(&payload));
        let mut expected = payload;
        expected.resize(extent.bytes as usize, 0);
        prop_assert_eq!(contents(&arena, extent), expected);
    }
}
