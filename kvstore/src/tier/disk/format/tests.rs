//! What was written is read, anything else is refused, and the geometry never overlaps.

use proptest::prelude::*;

use super::*;

const KEY: [u8; 32] = [9; 32];

fn entry() -> impl Strategy<Value = Entry> {
    let numbers = (any::<[u8; 32]>(), any::<[u8; 32]>(), any::<[u8; 16]>(), any::<u64>(), any::<u64>(), any::<u32>());
    (numbers, any::<(u16, u16, u8, u8, bool, u64)>()).prop_map(
        |((key, parent, namespace, root, written, payload), rest)| {
            let (shard_index, shard_count, kind, reuse_rule, public, layout) = rest;
            let (key, parent) = (BlockKey::from_bytes(key), BlockKey::from_bytes(parent));
            let payload_bytes = payload;
            Entry {
                key,
                parent,
                namespace,
                root,
                written,
                payload_bytes,
                shard_index,
                shard_count,
                kind,
                reuse_rule,
                public,
                layout,
            }
        },
    )
}

prop_compose! {
    fn directory_page()(
        tenant in any::<[u8; 16]>(),
        (sequence, epoch, segment, page, slot_bytes) in any::<(u64, u64, u32, u32, u32)>(),
        entries in prop::collection::vec(prop::option::of(entry()), ENTRIES_PER_PAGE as usize),
    ) -> DirectoryPage {
        DirectoryPage { tenant, sequence, epoch, segment, page, slot_bytes, entries }
    }
}

prop_compose! {
    fn superblock()(
        (file_index, file_count, segment_count, segment_bytes) in any::<(u32, u32, u32, u64)>(),
        identity in any::<[u8; 16]>(),
        page_key in any::<[u8; 32]>(),
    ) -> Superblock {
        Superblock { file_index, file_count, segment_count, segment_bytes, identity, page_key }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 128, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_page_is_read_as_it_was_written(page in directory_page()) {
        let read = DirectoryPage::decode(&page.encode(&KEY).0, &KEY);
        prop_assert_eq!(read.expect("it is whole"), page);
    }

    #[test]
    fn a_superblock_is_read_as_it_was_written(superblock in superblock()) {
        prop_assert_eq!(Superblock::decode(&superblock.encode().0).expect("it is whole"), superblock);
    }

    #[test]
    fn any_flipped_bit_is_noticed(page in directory_page(), superblock in superblock(), bit in 0..8 * PAGE_BYTES as usize) {
        let mut bytes = page.encode(&KEY);
        bytes.0[bit / 8] ^= 1 << (bit % 8);
        prop_assert!(DirectoryPage::decode(&bytes.0, &KEY).is_err(), "bit {} of a page", bit);
        let mut bytes = superblock.encode();
        bytes.0[bit / 8] ^= 1 << (bit % 8);
        prop_assert!(Superblock::decode(&bytes.0).is_err(), "bit {} of a superblock", bit);
    }

    #[test]
    fn a_page_under_another_key_is_foreign(page in directory_page(), key in any::<[u8; 32]>()) {
        prop_assume!(key != KEY);
        prop_assert!(DirectoryPage::decode(&page.encode(&key).0, &KEY).is_err());
    }

    #[test]
    fn slots_and_directory_fill_a_segment_and_fit(slot_pages in 1..2_000u64, segment_pages in 1..300_000u64) {
        let (slot_bytes, segment_bytes) = (slot_pages * PAGE_BYTES, segment_pages * PAGE_BYTES);
        let slots = slots_per_segment(segment_bytes, slot_bytes);
        let end = |slots: u32| u64::from(slots) * slot_bytes + page_offset(directory_pages(slots), 0);
        prop_assert!(end(slots) <= segment_bytes, "{} slots do not fit", slots);
        prop_assert!(end(slots + 1) > segment_bytes, "{} slots, but one more would fit", slots);
        if slots > 0 {
            let last = slot_offset(slots, slot_bytes as u32, slots - 1) + slot_bytes;
            prop_assert_eq!(last, end(slots), "the last slot ends where all end");
            let first = slot_offset(slots, slot_bytes as u32, 0);
            prop_assert!(page_offset(directory_pages(slots) - 1, 1) + PAGE_BYTES <= first, "no page lies in a slot");
        }
    }
}
