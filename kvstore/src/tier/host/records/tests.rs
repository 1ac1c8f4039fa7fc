//! What was recorded is found again, and what was half recorded is found as before, as after, or as nothing.

use std::sync::Arc;

use proptest::prelude::*;

use super::*;

const GEOMETRY: Geometry = Geometry { segment_bytes: 64 << 10, shared_count: 2, ingest_count: 1 };

type Table = Arc<[AtomicU64]>;

fn table() -> Table {
    (0..GEOMETRY.table_bytes() / WORD_BYTES).map(|_| AtomicU64::new(0)).collect()
}

fn records(table: &Table) -> Records {
    Records::open(Box::new(Arc::clone(table)), GEOMETRY).expect("these words are these records")
}

fn slot_record() -> impl Strategy<Value = SlotRecord> {
    let names = (any::<[u8; 32]>(), any::<[u8; 32]>(), any::<[u8; 16]>());
    let numbers = (any::<u64>(), any::<u64>(), any::<u32>(), any::<u32>());
    let bytes = (any::<u8>(), any::<u8>(), any::<u8>(), 0..PUBLIC);
    let used = prop::sample::select(vec![SlotUse::Filling, SlotUse::Loading, SlotUse::Copying]);
    (names, numbers, bytes, used, any::<bool>()).prop_map(|(names, numbers, bytes, used, public)| SlotRecord {
        used,
        doomed: false,
        key: BlockKey::from_bytes(names.0),
        parent: BlockKey::from_bytes(names.1),
        namespace: names.2,
        layout: numbers.0,
        root: 0,
        copy: numbers.1,
        holder: GroupId(numbers.2),
        shard_index: bytes.0,
        shard_count: bytes.1,
        kind: bytes.2,
        reuse_rule: bytes.3,
        public,
        payload_bytes: numbers.3,
    })
}

fn attachment() -> impl Strategy<Value = AttachmentRecord> {
    let tags = (any::<[u8; 16]>(), any::<[u8; 16]>(), any::<[u8; 16]>());
    (tags, any::<u64>(), any::<u64>(), any::<u32>(), any::<bool>(), any::<u64>()).prop_map(
        |(tags, id, former, group, public, layout)| AttachmentRecord {
            id: AttachmentId(id),
            former: (former != 0).then_some(AttachmentId(former)),
            tenant: tags.0,
            group_tag: tags.1,
            group: GroupId(group),
            namespace: tags.2,
            public,
            layout,
        },
    )
}

/// A table that keeps so many stores and no more.
struct Cut {
    table: Table,
    left: AtomicU64,
}

impl Words for Cut {
    fn count(&self) -> usize {
        self.table.len()
    }

    fn load(&self, place: usize) -> u64 {
        self.table.load(place)
    }

    fn store(&self, place: usize, word: u64) {
        let left = self.left.load(Ordering::Relaxed);
        if left > 0 {
            self.left.store(left - 1, Ordering::Relaxed);
            self.table.store(place, word);
        }
    }
}

fn cut(table: &Table, stores: u64) -> Records {
    let cut = Cut { table: Arc::clone(table), left: AtomicU64::new(stores) };
    Records::open(Box::new(cut), GEOMETRY).expect("these words are these records")
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_slot_is_found_as_it_was_recorded(record in slot_record(), root: u64, place in 0u32..16, segment in 0u32..3) {
        let table = table();
        let slot = SlotId::new(segment, place);
        records(&table).fill(slot, &record);
        prop_assert_eq!(records(&table).slot(slot), Ok(Some(record)));
        records(&table).resident(slot, root);
        let resident = SlotRecord { used: SlotUse::Resident, root, ..record };
        prop_assert_eq!(records(&table).slot(slot), Ok(Some(resident)));
        records(&table).doom(slot);
        prop_assert_eq!(records(&table).slot(slot), Ok(Some(SlotRecord { doomed: true, ..resident })));
        let before = table[GEOMETRY.slots() + (segment * 16 + place) as usize * SLOT_WORDS + 3].fetch_xor(1, Ordering::Relaxed);
        prop_assert_eq!(records(&table).slot(slot), Err(Damaged), "one bit of {:x} is another", before);
        records(&table).free(slot);
        prop_assert_eq!(records(&table).slot(slot), Ok(None));
    }

    #[test]
    fn a_slot_recorded_by_half_is_free_or_as_before(record in slot_record(), root: u64, stores in 0u64..40) {
        let table = table();
        let slot = SlotId::new(1, 7);
        let resident = SlotRecord { used: SlotUse::Resident, root, ..record };
        records(&table);
        let mut cut = cut(&table, stores);
        // A worker that is dead asks nothing any more.
        for step in 0..3 {
            match step {
                0 => cut.fill(slot, &record),
                1 => cut.resident(slot, root),
                _ => cut.free(slot),
            }
            let found = records(&table).slot(slot).expect("never torn");
            let found = found.map(|found| if found.used == SlotUse::Resident { found } else { SlotRecord { root: 0, ..found } });
            let allowed = [None, Some(record), Some(resident)];
            prop_assert!(allowed.contains(&found), "{:?} after {} stores", found, stores);
            if found != allowed[[1, 2, 0][step]] {
                break;
            }
        }
    }

    #[test]
    fn holds_are_found_and_their_names_do_not_come_again(
        reservation: bool, attachment: u64, other: u64, group: u32, slot: u32, copy: u64, place in 0u32..64, generation in 1u32..,
    ) {
        let table = table();
        let (hold, attachment) = (Hold { place, generation }, AttachmentId(attachment));
        let record = GrantRecord {
            is_reservation: reservation,
            attachment,
            group: GroupId(group),
            slot: SlotId::from_number(slot),
            copy,
        };
        let before = Hold { generation: generation - 1, ..hold };
        records(&table).grant(before, &record);
        records(&table).end_grant(before);
        for stores in 0..GRANT_WORDS as u64 {
            cut(&table, stores).grant(hold, &record);
            prop_assert_eq!(records(&table).grants().last(), Some((before, None)), "after {} stores", stores);
        }
        records(&table).grant(hold, &record);
        prop_assert_eq!(records(&table).grants().last(), Some((hold, Some(record))));
        records(&table).set_grant_attachment(hold, AttachmentId(other));
        let found = records(&table).grants().last();
        prop_assert_eq!(found, Some((hold, Some(GrantRecord { attachment: AttachmentId(other), ..record }))));
        records(&table).end_grant(hold);
        prop_assert_eq!(records(&table).grants().last(), Some((hold, None)));
    }

    #[test]
    fn processes_are_found_until_they_are_gone(one in attachment(), other in attachment()) {
        prop_assume!(one.id != other.id);
        let table = table();
        records(&table).attach(&one).expect("there is room");
        for stores in 0..17 {
            cut(&table, stores).attach(&other);
            let found: Vec<_> = records(&table).attachments().collect();
            prop_assert_eq!(found, [Ok(one)], "half of it after {} stores", stores);
            table[ATTACHMENTS_USED].store(1, Ordering::Relaxed);
        }
        records(&table).attach(&other).expect("there is room");
        prop_assert_eq!(records(&table).attachments().collect::<Vec<_>>(), [Ok(one), Ok(other)]);
        records(&table).detach(one.id);
        prop_assert_eq!(records(&table).attachments().collect::<Vec<_>>(), [Ok(other)]);
        records(&table).attach(&one).expect("there is room");
        prop_assert_eq!(records(&table).attachments().count(), 2);
        prop_assert_eq!(table[ATTACHMENTS_USED].load(Ordering::Relaxed), 2, "places are used again");
    }

    #[test]
    fn segments_are_found_as_they_were_recorded(tenant: [u8; 16], slot_bytes: u32, writer: u64, other: u64) {
        let table = table();
        let owned = |writer| SegmentRecord::Owned { tenant, slot_bytes, writer: AttachmentId(writer) };
        prop_assert_eq!(records(&table).segment(2), Ok(SegmentRecord::Unused));
        for record in [SegmentRecord::Ready, owned(writer), SegmentRecord::Dirty, SegmentRecord::Ready] {
            records(&table).set_segment(2, record);
            prop_assert_eq!(records(&table).segment(2), Ok(record));
        }
        for stores in 0..8 {
            cut(&table, stores).set_segment(2, owned(writer));
            let found = records(&table).segment(2);
            prop_assert_eq!(found, Ok(SegmentRecord::Ready), "after {} stores", stores);
        }
        records(&table).set_segment(2, owned(writer));
        records(&table).set_writer(2, AttachmentId(other));
        prop_assert_eq!(records(&table).segment(2), Ok(owned(other)));
        prop_assert_eq!(records(&table).segment(1), Ok(SegmentRecord::Unused));
    }
}

#[test]
fn a_table_of_other_memory_is_refused() {
    let table = table();
    assert!(records(&table).is_new());
    assert!(!records(&table).is_new());
    let open = |geometry| Records::open(Box::new(Arc::clone(&table)), geometry);
    let other = Geometry { shared_count: 1, ingest_count: 2, ..GEOMETRY };
    assert!(matches!(open(other), Err(TableError::Geometry { .. })));
    let larger = Geometry { ingest_count: 9, ..GEOMETRY };
    assert!(matches!(open(larger), Err(TableError::Small { .. })));
    table[0].store(1, Ordering::Relaxed);
    assert!(matches!(open(GEOMETRY), Err(TableError::Version)));
}

#[test]
fn the_arithmetic_of_sizes_holds() {
    assert_eq!(SLOT_WORDS * 8, 128);
    assert_eq!(GRANT_WORDS * 8 * limits::GRANTS_MAX, 32 << 20);
    assert_eq!(ATTACHMENT_WORDS * 8 * ATTACHMENT_PLACES, 1 << 20);
    let geometry = Geometry { segment_bytes: 1 << 30, shared_count: 64, ingest_count: 0 };
    let beside = 4096 + (1 << 20) + (32 << 20) + 4096;
    assert_eq!(geometry.table_bytes(), (64 << 30) / 32 + beside);
}
