use super::super::PageFile;
use super::*;
use crate::device::memory::{Extent, Page, PageBuffer};

const PAGES: u64 = 64;
const SOUND: Faults = Faults {
    read_error_per_mille: 0,
    write_error_per_mille: 0,
    flush_error_per_mille: 0,
    short_per_mille: 0,
    bit_flip_per_mille: 0,
    lost_write_per_mille: 0,
    misplaced_write_per_mille: 0,
    stall_per_mille: 0,
    stall_us: 0,
    latency_us_min: 10,
    latency_us_max: 1_000,
};

fn disk_with(seed: u64, image: DiskImage, faults: Faults) -> SimulatedDisk {
    SimulatedDisk::new(seed, image, Arc::new(Arena::new(PAGES * PAGE_BYTES, 1).expect("addresses")), faults)
}

fn disk(seed: u64) -> SimulatedDisk {
    disk_with(seed, DiskImage::new(PAGES * PAGE_BYTES), SOUND)
}

fn extent(page: u64, pages: u64) -> Extent {
    Extent { segment: 0, offset: (page * PAGE_BYTES) as u32, bytes: (pages * PAGE_BYTES) as u32 }
}

fn submit(disk: &mut SimulatedDisk, id: u64, operation: Operation) {
    disk.submit(IoRequest { id, operation });
}

/// Submits with a time of its own.
fn submit_within(disk: &mut SimulatedDisk, latency_us: u64, operation: Operation) {
    disk.set_faults(Faults { latency_us_min: latency_us, latency_us_max: latency_us, ..disk.faults });
    submit(disk, latency_us, operation);
}

/// A page filled with one byte.
fn write(page: u64, byte: u8) -> Operation {
    Operation::WritePage { offset: page * PAGE_BYTES, page: Box::new(Page([byte; PAGE_BYTES as usize])) }
}

/// Lets time pass until nothing is in flight.
fn finish(disk: &mut SimulatedDisk) -> Vec<(u64, Result<(), IoFault>)> {
    let mut done = Vec::new();
    while let Some(due_us) = disk.next_due_us() {
        disk.advance(due_us);
        disk.wait(Duration::ZERO, &mut done);
    }
    done.into_iter().map(|done| (done.id, done.result)).collect()
}

fn finish_until(disk: &mut SimulatedDisk, now_us: u64) {
    disk.advance(now_us);
    disk.wait(Duration::ZERO, &mut Vec::new());
}

fn page(image: &DiskImage, page: u64) -> Vec<u8> {
    image.read_pages(page * PAGE_BYTES, 1).expect("within the disk").to_vec()
}

/// What a page of the disk reads as now, through memory.
fn read_page(disk: &mut SimulatedDisk, page: u64) -> (Result<(), IoFault>, Vec<u8>) {
    disk.arena.zero(0);
    submit(disk, 0, Operation::Read { offset: page * PAGE_BYTES, into: extent(0, 1) });
    let result = finish(disk)[0].1;
    let mut bytes = vec![0; PAGE_BYTES as usize];
    disk.arena.read(extent(0, 1), 0, &mut bytes);
    (result, bytes)
}

/// A life with all kinds of requests and faults: its completions with their times, and the crash.
fn life(seed: u64) -> (Vec<String>, DiskImage) {
    let faults = Faults {
        read_error_per_mille: 50,
        write_error_per_mille: 50,
        flush_error_per_mille: 100,
        short_per_mille: 50,
        bit_flip_per_mille: 50,
        lost_write_per_mille: 50,
        misplaced_write_per_mille: 50,
        stall_per_mille: 100,
        stall_us: 10_000,
        ..SOUND
    };
    let mut disk = disk_with(seed, DiskImage::new(PAGES * PAGE_BYTES), faults);
    let (mut random, mut trace, mut done) = (Random(seed ^ 1), Vec::new(), Vec::new());
    for id in 0..2_000u64 {
        while disk.in_flight.len() == DEPTH {
            disk.advance(disk.next_due_us().expect("some are in flight"));
            disk.wait(Duration::ZERO, &mut done);
        }
        let (at, pages) = (random.below(PAGES - 4), 1 + random.below(4));
        let operation = match random.below(8) {
            0 => Operation::Flush,
            1 | 2 => Operation::Read { offset: at * PAGE_BYTES, into: extent(at, pages) },
            3 => write(at, id as u8),
            _ => {
                disk.arena.write(extent(at, pages), 0, &id.to_le_bytes());
                Operation::Write { offset: at * PAGE_BYTES, from: extent(at, pages) }
            }
        };
        submit(&mut disk, id, operation);
        trace.extend(done.drain(..).map(|done| format!("{} {done:?}", disk.now_us)));
    }
    (trace, disk.crash())
}

#[test]
fn one_seed_gives_one_trace_and_one_crash() {
    for seed in 0..4 {
        assert!(life(seed) == life(seed), "seed {seed} does not repeat itself");
    }
    assert!(life(1).0 != life(2).0, "seeds do not matter");
    assert!(life(1).1 != life(2).1, "seeds do not matter for the crash");
}

#[test]
fn completions_come_out_of_order_and_not_before_they_are_due() {
    let mut disk = disk(7);
    (0..20).for_each(|id| submit(&mut disk, id, write(id, 1)));
    let mut done = Vec::new();
    disk.wait(Duration::from_secs(1), &mut done);
    assert!(done.is_empty(), "completed without time passing: {done:?}");
    let order: Vec<u64> = finish(&mut disk).into_iter().map(|(id, _)| id).collect();
    assert!(!order.is_sorted() && order.len() == 20, "{order:?}");
    assert_eq!(disk.next_due_us(), None);
}

#[test]
fn a_write_is_seen_from_its_completion_on_with_the_bytes_that_memory_has_then() {
    let mut disk = disk(1);
    disk.arena.write(extent(9, 1), 0, &[1; PAGE_BYTES as usize]);
    submit_within(&mut disk, 100, Operation::Write { offset: 0, from: extent(9, 1) });
    submit_within(&mut disk, 50, Operation::Read { offset: 0, into: extent(1, 1) });
    finish_until(&mut disk, 50);
    disk.arena.write(extent(9, 1), 0, &[2; PAGE_BYTES as usize]);
    finish_until(&mut disk, 100);
    let mut before = [9];
    disk.arena.read(extent(1, 1), 0, &mut before);
    assert_eq!(before, [0], "seen before its completion");
    let (result, bytes) = read_page(&mut disk, 0);
    assert_eq!((result, bytes), (Ok(()), vec![2; PAGE_BYTES as usize]));
}

#[test]
fn flushed_writes_survive_every_crash_and_others_become_old_new_or_torn() {
    let (mut old, mut new, mut torn) = (0, 0, 0);
    for seed in 0..100 {
        let mut disk = disk(seed);
        (0..8).for_each(|at| submit(&mut disk, at, write(at, 1)));
        finish(&mut disk);
        submit(&mut disk, 8, Operation::Flush);
        finish(&mut disk);
        // Pages 4 and 5 are overwritten and not flushed; 6 and 7 are being overwritten.
        (4..6).for_each(|at| submit(&mut disk, at, write(at, 2)));
        finish(&mut disk);
        (6..8).for_each(|at| submit(&mut disk, at, write(at, 2)));
        let image = disk.crash();
        for at in 0..4 {
            assert!(page(&image, at) == [1; PAGE_BYTES as usize], "seed {seed}: flushed page {at} is lost");
        }
        for sector in (4..8).flat_map(|at| page(&image, at).as_chunks::<SECTOR_BYTES>().0.to_vec()) {
            match sector {
                sector if sector == [1; SECTOR_BYTES] => old += 1,
                sector if sector == [2; SECTOR_BYTES] => new += 1,
                _ => torn += 1,
            }
        }
        assert!((8..PAGES).all(|at| page(&image, at) == [0; PAGE_BYTES as usize]), "seed {seed}: an untouched page");
    }
    assert!(old > 500 && new > 500 && torn > 500, "{old} old, {new} new, {torn} torn of 3200");
}

#[test]
fn a_flush_covers_what_had_completed_at_its_submission_and_nothing_later() {
    let mut zeros_of_the_later = 0;
    for seed in 0..100 {
        let mut disk = disk(seed);
        submit_within(&mut disk, 10, write(0, 1));
        finish_until(&mut disk, 10);
        submit_within(&mut disk, 100, Operation::Flush);
        // Both complete while the flush is in flight; one overwrites what it covers.
        submit_within(&mut disk, 20, write(0, 2));
        submit_within(&mut disk, 30, write(1, 2));
        finish(&mut disk);
        let image = disk.crash();
        let sectors = |at| page(&image, at).as_chunks::<SECTOR_BYTES>().0.to_vec();
        assert!(!sectors(0).contains(&[0; SECTOR_BYTES]), "seed {seed}: what the flush covered is lost");
        zeros_of_the_later += sectors(1).iter().filter(|sector| **sector == [0; SECTOR_BYTES]).count();
    }
    assert!(zeros_of_the_later > 100, "a write after the flush's submission became durable by it");
}

#[test]
fn a_flush_that_is_overtaken_by_a_later_one_takes_nothing_back() {
    for seed in 0..100 {
        let mut disk = disk(seed);
        submit_within(&mut disk, 1, write(0, 1));
        finish_until(&mut disk, 1);
        submit_within(&mut disk, 300, Operation::Flush);
        submit_within(&mut disk, 1, write(0, 2));
        finish_until(&mut disk, 2);
        submit_within(&mut disk, 100, Operation::Flush);
        submit_within(&mut disk, 1, write(0, 3));
        finish(&mut disk);
        let image = disk.crash();
        let stale = [[0; SECTOR_BYTES], [1; SECTOR_BYTES]];
        assert!(
            page(&image, 0).as_chunks::<SECTOR_BYTES>().0.iter().all(|sector| !stale.contains(sector)),
            "seed {seed}"
        );
    }
}

#[test]
fn a_failed_flush_makes_nothing_durable() {
    let (mut zeros, mut disk_count) = (0, 0);
    for seed in 0..50 {
        let mut disk =
            disk_with(seed, DiskImage::new(PAGES * PAGE_BYTES), Faults { flush_error_per_mille: 1000, ..SOUND });
        submit(&mut disk, 0, write(0, 1));
        finish(&mut disk);
        submit(&mut disk, 1, Operation::Flush);
        assert_eq!(finish(&mut disk), [(1, Err(IoFault::Os(5)))]);
        zeros +=
            page(&disk.crash(), 0).as_chunks::<SECTOR_BYTES>().0.iter().filter(|sector| sector[..] == [0; 512]).count();
        disk_count += 1;
    }
    assert!(zeros > disk_count, "{zeros} sectors of {disk_count} disks became old");
}

#[test]
fn a_killed_daemon_loses_nothing_that_it_had_submitted() {
    let mut disk = disk(3);
    submit(&mut disk, 0, write(0, 1));
    finish(&mut disk);
    submit(&mut disk, 1, write(1, 1));
    submit(&mut disk, 2, write(PAGES, 1));
    let image = disk.kill();
    assert!((0..2).all(|at| page(&image, at) == [1; PAGE_BYTES as usize]));
}

#[test]
fn each_fault_shows_as_what_it_is() {
    let full = [7; PAGE_BYTES as usize];
    let holding = || {
        let mut image = DiskImage::new(PAGES * PAGE_BYTES);
        let mut pages = PageBuffer::zeroed(PAGES as usize).expect("pages");
        pages.fill(7);
        image.write_pages(0, &pages).expect("within the disk");
        image
    };
    let with = |faults| disk_with(11, holding(), faults);
    let error = Err(IoFault::Os(5));

    let (result, bytes) = read_page(&mut with(Faults { read_error_per_mille: 1000, ..SOUND }), 3);
    assert_eq!((result, bytes), (error, vec![0; PAGE_BYTES as usize]));

    let (result, bytes) = read_page(&mut with(Faults { bit_flip_per_mille: 1000, ..SOUND }), 3);
    let wrong_bits: u32 = bytes.iter().map(|byte| (byte ^ 7).count_ones()).sum();
    assert_eq!((result, wrong_bits), (Ok(()), 1));

    assert_eq!(read_page(&mut with(Faults { short_per_mille: 1000, ..SOUND }), 3).0, Err(IoFault::Short));

    // The image after one write of a page of ones to page 3.
    let written = |faults| {
        let mut disk = with(faults);
        submit(&mut disk, 0, write(3, 1));
        let result = finish(&mut disk)[0].1;
        (result, disk.kill())
    };
    let (result, image) = written(Faults { write_error_per_mille: 1000, ..SOUND });
    let sectors = page(&image, 3).as_chunks::<SECTOR_BYTES>().0.to_vec();
    assert_eq!(result, error);
    assert!(sectors.contains(&[1; SECTOR_BYTES]) && sectors.contains(&[7; SECTOR_BYTES]), "neither all nor nothing");

    assert_eq!(written(Faults { lost_write_per_mille: 1000, ..SOUND }), (Ok(()), holding()));

    let (result, image) = written(Faults { misplaced_write_per_mille: 1000, ..SOUND });
    let reached: Vec<u64> = (0..PAGES).filter(|at| page(&image, *at) != full).collect();
    assert_eq!(result, Ok(()));
    assert!(reached.len() == 1 && reached != [3], "{reached:?}");

    let mut disk = with(Faults { stall_per_mille: 1000, stall_us: 1_000_000, ..SOUND });
    submit(&mut disk, 0, Operation::Flush);
    assert!(disk.next_due_us() >= Some(1_000_000));
}

#[test]
fn an_image_refuses_what_leaves_it_and_can_rot() {
    let mut image = DiskImage::new(2 * PAGE_BYTES);
    assert_eq!(image.bytes(), 2 * PAGE_BYTES);
    image.read_pages(PAGE_BYTES, 2).expect_err("one page is not there");
    image.write_pages(u64::MAX, &PageBuffer::zeroed(1).expect("a page")).expect_err("far away");
    image.flip_bit(8 * PAGE_BYTES + 1);
    assert_eq!(page(&image, 1)[0], 2);
    image.flush().expect("always");
}
