use proptest::prelude::*;

use super::*;

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
    let prepared = arena.prepare(1);
    assert!(prepared.populated, "{prepared:?}");
    assert!(contents(&arena, extent(1, 0, 20 * MIB)).iter().all(|&byte| byte == 0));
}

#[test]
fn touching_leaves_zeros_and_spares_what_lies_beyond() {
    let arena = Arena::new(4 * PAGE_BYTES, 1).expect("addresses");
    let last = extent(0, 3 * PAGE_BYTES, PAGE_BYTES);
    arena.write(last, 0, &[7]);
    touch(arena.segment(0), 0, 3 * PAGE_BYTES as usize);
    assert!(contents(&arena, extent(0, 0, 3 * PAGE_BYTES)).iter().all(|&byte| byte == 0));
    assert_eq!(contents(&arena, last)[0], 7);
}

#[test]
fn a_change_of_owner_leaves_nothing_of_the_old_one() {
    let arena = Arena::new(MIB, 2).expect("addresses");
    let whole = |segment| extent(segment, 0, MIB);
    arena.write(whole(0), 0, &vec![0xaa; MIB as usize]);
    arena.write(whole(1), 0, &vec![0xbb; MIB as usize]);
    arena.zero(0);
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
