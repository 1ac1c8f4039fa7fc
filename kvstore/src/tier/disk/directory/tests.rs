//! Cycles: what is acknowledged as durable is on the copy that nobody writes over.

use crate::names::{CycleId, PageName};
use proptest::prelude::*;

use super::*;

const FILES: usize = 2;

fn directory(slots: u32) -> Directory {
    let mut directory = Directory::new(2, FILES, 0);
    directory.begin(0, slots);
    directory
}

fn bit(slot: SlotId) -> u32 {
    1 << Directory::place(slot).1
}

/// Writes all that the cycle wants written; the copies that were.
fn write_all(directory: &mut Directory, entries: u32, ok: bool) -> (Vec<(PageName, u32)>, bool) {
    let mut written = Vec::new();
    loop {
        match directory.step() {
            Step::Write(name, copy) => {
                directory.written(name, entries);
                directory.page_done(name, ok);
                written.push((name, copy));
            }
            Step::FlushAll => return (written, true),
            Step::Nothing => return (written, false),
        }
    }
}

fn flush(directory: &mut Directory, ok: bool) -> Option<(CycleId, bool)> {
    (0..FILES).for_each(|_| directory.flush_done(ok));
    directory.finished()
}

/// A cycle with a flush in which everything goes well; the copies that were written.
fn whole_cycle(directory: &mut Directory, entries: u32) -> Vec<(PageName, u32)> {
    let wanted = directory.want();
    directory.start(false);
    let (written, flushes) = write_all(directory, entries, true);
    assert!(flushes, "a wanted cycle flushes");
    assert_eq!(flush(directory, true), Some((wanted, true)));
    written
}

#[test]
fn an_entry_is_durable_after_the_flush_and_not_before() {
    let mut directory = directory(8);
    let slot = SlotId::new(0, 3);
    directory.mark(slot);
    let wanted = directory.want();
    directory.start(false);
    let (_, flushes) = write_all(&mut directory, bit(slot), true);
    assert!(flushes && !directory.is_durable(slot), "written is not durable");
    assert_eq!(flush(&mut directory, true), Some((wanted, true)));
    assert!(directory.is_durable(slot) && directory.is_settled());
    directory.mark(slot);
    assert!(!directory.is_durable(slot), "what changes is not durable any more");
}

#[test]
fn the_copy_that_was_flushed_is_never_written_over() {
    let mut directory = directory(8);
    let slot = SlotId::new(0, 0);
    let mut flushed = None;
    for round in 0..20 {
        directory.mark(slot);
        if round % 3 == 0 {
            directory.want();
        }
        directory.start(true);
        let (written, flushes) = write_all(&mut directory, bit(slot), round % 5 != 4);
        assert!(written.iter().all(|(_, copy)| Some(*copy) != flushed), "round {round} writes over copy {flushed:?}");
        let ended = if flushes { flush(&mut directory, round % 2 == 0) } else { directory.finished() };
        if flushes && ended.is_some_and(|(_, ok)| ok) {
            flushed = Some(written[0].1);
        }
    }
    assert!(flushed.is_some(), "some rounds were flushed");
}

#[test]
fn after_a_failed_flush_pages_are_written_again() {
    let mut directory = directory(8);
    let slot = SlotId::new(0, 1);
    directory.mark(slot);
    let wanted = directory.want();
    directory.start(false);
    write_all(&mut directory, bit(slot), true);
    assert_eq!(flush(&mut directory, false), Some((wanted, false)));
    assert!(!directory.is_durable(slot) && directory.is_dirty(), "nobody knows what the disk holds");
    assert_eq!(whole_cycle(&mut directory, bit(slot)).len(), 1);
    assert!(directory.is_durable(slot));
}

#[test]
fn a_page_that_cannot_be_written_fails_its_cycle_without_a_flush() {
    let mut directory = directory(8);
    let wanted = directory.want();
    directory.start(false);
    let (_, flushes) = write_all(&mut directory, 0, false);
    assert!(!flushes);
    assert_eq!(directory.finished(), Some((wanted, false)));
    assert!(directory.is_dirty(), "it is tried again");
}

#[test]
fn an_entry_that_changes_while_its_page_is_written_waits_for_the_next_cycle() {
    let mut directory = directory(8);
    let slot = SlotId::new(0, 2);
    directory.want();
    directory.start(false);
    let Step::Write(name, _) = directory.step() else { panic!("page 0 of a new segment is written") };
    directory.written(name, bit(slot));
    directory.mark(slot);
    directory.page_done(name, true);
    assert_eq!(directory.step(), Step::FlushAll);
    flush(&mut directory, true);
    assert!(!directory.is_durable(slot), "the page on disk tells of what was there before");
    whole_cycle(&mut directory, bit(slot));
    assert!(directory.is_durable(slot));
}

#[test]
fn who_comes_during_a_cycle_gets_the_next_one() {
    let mut directory = directory(8);
    let first = directory.want();
    directory.start(false);
    let second = directory.want();
    assert!(second > first);
    write_all(&mut directory, 0, true);
    assert_eq!(flush(&mut directory, true), Some((first, true)));
    directory.start(false);
    assert!(write_all(&mut directory, 0, true).1, "it flushes although nothing changed");
    assert_eq!(flush(&mut directory, true), Some((second, true)));
}

#[test]
fn a_segment_without_an_owner_gets_a_page_that_says_so() {
    let mut directory = directory(40);
    let slot = SlotId::new(0, 35);
    directory.mark(slot);
    let name = directory.name(slot);
    let before = whole_cycle(&mut directory, bit(slot));
    assert_eq!(before.len(), 2, "both pages of the segment");
    let epoch = directory.epoch(0);
    directory.end(0);
    assert!(!directory.has(0) && !directory.is_settled() && directory.epoch(0) > epoch);
    let void = whole_cycle(&mut directory, 0);
    assert_eq!(void.len(), 1);
    assert_ne!(void[0].1, before[0].1, "the past's first page is not written over before the new one is safe");
    directory.mark_again(name);
    let again = whole_cycle(&mut directory, 0);
    assert_eq!(
        again.iter().map(|(name, copy)| (name.page, *copy)).collect::<Vec<_>>(),
        [(0, before[0].1)],
        "then it is"
    );
    directory.begin(0, 8);
    assert_ne!(whole_cycle(&mut directory, 0)[0].1, again[0].1, "a new owner goes on alternating");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, failure_persistence: None, ..ProptestConfig::default() })]

    /// Disk as it would be after a power cut at the worst moment: of each page only the copy that was flushed last is certain.
    #[test]
    fn what_is_durable_is_in_the_copy_that_is_certain(steps in prop::collection::vec((0..6u8, 0..31u32), 1..200)) {
        let mut directory = directory(31);
        let mut present = 0u32;
        let mut written: [Option<u32>; 2] = [None; 2];
        let mut certain: Option<(u32, u32)> = None;
        for (step, at) in steps {
            match step {
                0..3 => {
                    present ^= 1 << at;
                    directory.mark(SlotId::new(0, at));
                }
                3 => drop(directory.want()),
                _ => {
                    directory.start(step == 4);
                    let (copies, flushes) = write_all(&mut directory, present, true);
                    for (_, copy) in copies {
                        prop_assert_ne!(Some(copy), certain.map(|(copy, _)| copy));
                        written[copy as usize] = Some(present);
                    }
                    if !flushes {
                        directory.finished();
                        continue;
                    }
                    let ok = at % 4 != 0;
                    flush(&mut directory, ok);
                    let other = certain.map_or(0, |(copy, _)| 1 - copy);
                    if let Some(entries) = written[other as usize].take_if(|_| ok) {
                        certain = Some((other, entries));
                    }
                }
            }
            for at in (0..31).filter(|&at| directory.is_durable(SlotId::new(0, at))) {
                prop_assert!(certain.is_some_and(|(_, entries)| entries >> at & 1 == 1), "entry {} would be lost", at);
            }
        }
    }
}
