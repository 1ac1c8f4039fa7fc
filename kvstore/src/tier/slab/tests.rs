//! The slab against a plain model: every slot has one owner, every name one life.

use crate::names::SlotId;
use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

const SEGMENT_BYTES: u64 = 32 << 10;
const SEGMENTS: u32 = 6;

fn slab() -> Slab {
    let mut slab = Slab::new(SEGMENT_BYTES, SEGMENTS, crate::tier::host::slots_per_segment);
    (0..SEGMENTS).for_each(|segment| slab.segment_ready(segment, None));
    slab
}

/// Segments in turn for two tenants.
fn slab_of_two() -> Slab {
    let mut slab = Slab::new(SEGMENT_BYTES, SEGMENTS, crate::tier::host::slots_per_segment);
    (0..SEGMENTS).for_each(|segment| slab.segment_ready(segment, Some(TenantId(segment as u16 % 2))));
    slab
}

fn owner(at: usize) -> Owner {
    Owner::shared(TenantId(at as u16 % 2), [4096, 8192, 12288][at / 2])
}

#[derive(Clone, Debug)]
enum Step {
    Reserve(usize),
    Release(usize),
    Quarantine(usize),
    Drain(usize),
    TakeFree(u16),
    Ready,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        6 => (0..6usize).prop_map(Step::Reserve),
        4 => any::<usize>().prop_map(Step::Release),
        1 => any::<usize>().prop_map(Step::Quarantine),
        1 => (0..6usize).prop_map(Step::Drain),
        1 => (0..2u16).prop_map(Step::TakeFree),
        1 => Just(Step::Ready),
    ];
    prop::collection::vec(step, 1..300)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_slot_has_one_life_at_a_time(steps in steps(), is_of_anybody in any::<bool>()) {
        let mut slab = if is_of_anybody { slab() } else { slab_of_two() };
        // Slots in use with their generation and owner, in a fixed order.
        let mut used: BTreeMap<SlotId, (u32, Owner)> = BTreeMap::new();
        let mut retired = Vec::new();
        let mut draining = Vec::new();
        for step in steps {
            match step {
                Step::Reserve(at) => {
                    let shelf = slab.shelf(owner(at)).expect("it fits");
                    let promised = slab.has_room(shelf);
                    let slot = slab.reserve(shelf, NodeId(3), GroupId(1), (0, 1));
                    prop_assert_eq!(slot.is_some(), promised, "room is there exactly when it is promised");
                    let Some(slot) = slot else { continue };
                    prop_assert!(!draining.contains(&slot.segment()), "a segment that drains takes nothing");
                    let before = used.insert(slot, (slab.slot(slot).generation, owner(at)));
                    prop_assert_eq!(before, None, "a slot in use is not given away");
                    let bytes = u64::from(slab.slot_bytes(slot));
                    prop_assert!((u64::from(slot.place()) + 1) * bytes <= SEGMENT_BYTES, "it lies in its segment");
                }
                Step::Release(at) | Step::Quarantine(at) if !used.is_empty() => {
                    let slot = *used.keys().nth(at % used.len()).expect("within the length");
                    let (generation, _) = used.remove(&slot).expect("it was just found");
                    prop_assert!(slab.standing(slot, generation).is_some());
                    prop_assert!(slab.standing(slot, generation + 1).is_none(), "a name of the future is none");
                    let emptied = match step {
                        Step::Release(_) => slab.release(slot),
                        _ => slab.quarantine(slot),
                    };
                    let last = draining.contains(&slot.segment())
                        && !used.keys().any(|other| other.segment() == slot.segment());
                    prop_assert_eq!(emptied, last.then(|| slot.segment()), "the last slot retires what drains");
                    draining.retain(|&segment| Some(segment) != emptied);
                    retired.extend(emptied);
                }
                Step::Drain(at) => {
                    let shelf = slab.shelf(owner(at)).expect("it fits");
                    let Some((segment, empty)) = slab.drain_emptiest(shelf, |_| true) else { continue };
                    prop_assert_eq!(empty, !used.keys().any(|slot| slot.segment() == segment));
                    draining.retain(|&other| other != segment);
                    if empty { retired.push(segment) } else { draining.push(segment) }
                }
                Step::TakeFree(tenant) => {
                    let free_count = slab.free_count(TenantId(tenant));
                    let taken = slab.take_free(TenantId(tenant), |_| true);
                    prop_assert_eq!(taken.is_some(), free_count > 0 && !is_of_anybody);
                    let is_used = |segment| used.keys().any(|slot| slot.segment() == segment);
                    prop_assert!(!taken.is_some_and(is_used), "a segment in use is not free");
                    retired.extend(taken);
                }
                // For the tenant that did not have it.
                Step::Ready => for segment in retired.drain(..) {
                    let tenant = slab.tenant(segment).map(|TenantId(tenant)| TenantId(1 - tenant));
                    slab.segment_ready(segment, tenant);
                },
                _ => {}
            }
            let usage = slab.usage();
            prop_assert_eq!(usage.used_slots, used.len() as u64);
            prop_assert_eq!(usage.used_bytes, used.values().map(|(_, owner)| u64::from(owner.slot_bytes)).sum::<u64>());
            prop_assert_eq!(usage.ready_bytes, (u64::from(SEGMENTS) - retired.len() as u64) * SEGMENT_BYTES);
            for (&slot, &(generation, owner)) in &used {
                prop_assert_eq!(slab.slot(slot).generation, generation, "nobody else took it");
                prop_assert_eq!(slab.owner(slab.shelf_of(slot)), owner, "a segment has one owner");
                let prepared_for = (!is_of_anybody).then_some(owner.tenant);
                prop_assert_eq!(slab.tenant(slot.segment()), prepared_for, "and it is the one for whom it was prepared");
            }
            let listed: Vec<SlotId> = (0..SEGMENTS).flat_map(|segment| slab.used_slots(segment, 0)).collect();
            prop_assert_eq!(listed, used.keys().copied().collect::<Vec<_>>());
        }
    }
}

#[test]
fn a_name_is_good_for_one_reservation() {
    let mut slab = slab();
    let shelf = slab.shelf(owner(0)).expect("it fits");
    let slot = slab.reserve(shelf, NodeId(1), GroupId(1), (0, 1)).expect("all is free");
    let generation = slab.slot(slot).generation;
    assert_eq!(slab.release(slot), None);
    assert!(slab.standing(slot, generation).is_none(), "it ended");
    let again = slab.reserve(shelf, NodeId(2), GroupId(1), (0, 1)).expect("all is free");
    assert_eq!(again, slot, "what was freed last is taken first");
    assert!(slab.standing(slot, generation).is_none(), "the old name does not stand for the new reservation");
}

#[test]
fn a_free_segment_is_only_its_tenants_until_it_is_prepared_for_another() {
    let mut slab = slab_of_two();
    let shelf = slab.shelf(owner(0)).expect("it fits");
    let reserve = |slab: &mut Slab| slab.reserve(shelf, NodeId(1), GroupId(1), (0, 1)).map(SlotId::segment);
    let mut own: Vec<u32> = std::iter::from_fn(|| reserve(&mut slab)).collect();
    own.sort_unstable();
    own.dedup();
    assert_eq!(own, [0, 2, 4]);
    let count = |slab: &Slab| [0, 1].map(|tenant| slab.free_count(TenantId(tenant)));
    assert_eq!((slab.has_room(shelf), count(&slab)), (false, [0, 3]));
    assert_eq!(slab.take_free(TenantId(0), |_| true), None);
    assert_eq!(slab.take_free(TenantId(1), |segment| segment < 4), Some(3));
    assert!(slab.is_retired(3));
    assert_eq!((reserve(&mut slab), count(&slab)), (None, [0, 2]));
    slab.segment_ready(3, Some(TenantId(0)));
    assert_eq!((slab.tenant(3), slab.has_room(shelf)), (Some(TenantId(0)), true));
    assert_eq!(reserve(&mut slab), Some(3));
}

#[test]
fn a_segment_is_assigned_to_nobody_but_its_tenant() {
    let mut slab = slab_of_two();
    let shelf = slab.shelf(owner(0)).expect("it fits");
    let assign = std::panic::AssertUnwindSafe(|| slab.assign(1, shelf));
    let panic = std::panic::catch_unwind(assign).expect_err("it is the other's");
    let message = panic.downcast_ref::<String>().expect("a formatted message");
    assert!(message.contains("prepared for Some(TenantId(1)) and not for TenantId(0)"), "{message}");
}

#[test]
fn a_slot_larger_than_a_segment_has_no_shelf() {
    let slot_bytes = SEGMENT_BYTES as u32 + 4096;
    assert_eq!(slab().shelf(Owner::shared(TenantId(0), slot_bytes)), None);
}

#[test]
fn recovery_takes_each_slot_once() {
    let mut slab = slab();
    let shelf = slab.shelf(owner(0)).expect("it fits");
    slab.assign(2, shelf);
    let slot = SlotId::new(2, 5);
    assert_eq!(slab.reserve_at(slot, NodeId(1), (0, 1)), Some(()));
    assert_eq!(slab.reserve_at(slot, NodeId(2), (0, 1)), None);
    let rest: Vec<u32> = std::iter::from_fn(|| slab.reserve(shelf, NodeId(3), GroupId(1), (0, 1)))
        .take_while(|slot| slot.segment() == 2)
        .map(SlotId::place)
        .collect();
    assert_eq!(rest, [0, 1, 2, 3, 4, 6, 7], "all but the recovered one are free");
}
