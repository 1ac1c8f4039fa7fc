//! Which pages count after a crash that let some of them through.

use super::*;
use crate::device::block::simulated::DiskImage;
use crate::device::memory::Page;

const SLOT_BYTES: u32 = 4096;

fn superblock() -> Superblock {
    let segment_bytes = 256 << 10;
    Superblock { file_index: 0, file_count: 1, segment_count: 2, segment_bytes, identity: [1; 16], page_key: [2; 32] }
}

fn image() -> DiskImage {
    let mut image = DiskImage::new(format::SEGMENTS_OFFSET + 2 * superblock().segment_bytes);
    initialize(&mut image, &superblock(), false).expect("it fits");
    image
}

/// A page of segment 0 whose first entry has that number.
fn write(image: &mut DiskImage, page: u32, copy: u32, epoch: u64, sequence: u64) {
    let entry = Entry::of_whole_block(page as u8, sequence, SLOT_BYTES);
    let mut entries = vec![None; format::ENTRIES_PER_PAGE as usize];
    entries[0] = Some(entry);
    let page_of = DirectoryPage { tenant: [3; 16], sequence, epoch, segment: 0, page, slot_bytes: SLOT_BYTES, entries };
    let mut buffer = PageBuffer::zeroed(1).expect("a page");
    let encoded: Box<Page> = page_of.encode(&superblock().page_key);
    buffer.copy_from_slice(&encoded.0);
    image.write_pages(format::SEGMENTS_OFFSET + format::page_offset(page, copy), &buffer).expect("it fits");
}

/// Of each page of segment 0: which copy counts, and its number.
fn found(image: &DiskImage) -> Vec<Option<(u32, u64)>> {
    let mut segments = Vec::new();
    directories(image, &superblock(), |segment| segments.push(segment)).expect("it can be read");
    let pages = segments.into_iter().flat_map(|segment| segment.pages);
    pages.map(|page| page.map(|(copy, page)| (copy, page.sequence))).collect()
}

#[test]
fn of_two_copies_the_later_one_counts_and_a_torn_one_does_not() {
    let mut image = image();
    write(&mut image, 0, 0, 5, 10);
    write(&mut image, 0, 1, 5, 12);
    write(&mut image, 1, 0, 5, 11);
    assert_eq!(found(&image), [Some((1, 12)), Some((0, 11))]);
    image.flip_bit(8 * (format::SEGMENTS_OFFSET + format::page_offset(0, 1) + 200));
    assert_eq!(found(&image), [Some((0, 10)), Some((0, 11))]);
}

#[test]
fn pages_of_another_owner_than_the_first_page_tells_do_not_count() {
    let mut image = image();
    write(&mut image, 0, 0, 5, 10);
    write(&mut image, 1, 0, 4, 9);
    assert_eq!(found(&image), [Some((0, 10)), None], "entries of an owner of the past");
    write(&mut image, 1, 1, 9, 20);
    assert_eq!(found(&image), [Some((0, 10)), None], "entries of an owner whose first page was lost");
    write(&mut image, 1, 0, 5, 11);
    assert_eq!(found(&image), [Some((0, 10)), Some((0, 11))]);
}

#[test]
fn what_a_file_held_when_it_lost_its_superblocks_does_not_count_under_new_ones() {
    let mut image = image();
    write(&mut image, 0, 0, 5, 10);
    write(&mut image, 0, 1, 5, 12);
    write(&mut image, 1, 0, 5, 11);
    image.write_pages(0, &PageBuffer::zeroed(2).expect("pages")).expect("it fits");
    assert_eq!(superblock_of(&image), None);
    initialize(&mut image, &superblock(), true).expect("it fits");
    assert_eq!(superblock_of(&image), Some(superblock()));
    assert_eq!(found(&image), [], "neither copy of any page");
    write(&mut image, 0, 0, 6, 13);
    assert_eq!(found(&image), [Some((0, 13)), None], "nor beside those of a later owner");
}

#[test]
fn a_file_with_one_good_superblock_is_read_and_one_without_is_refused() {
    let mut image = image();
    image.flip_bit(8 * 20);
    assert_eq!(superblock_of(&image), Some(superblock()));
    image.flip_bit(8 * (PAGE_BYTES + 20));
    assert!(matches!(super::superblock(&image), Err(RecoverError::Format(FormatError::Sum))));
    assert_eq!(superblock_of(&DiskImage::new(format::SEGMENTS_OFFSET)), None, "a new file");
}

fn superblock_of(image: &DiskImage) -> Option<Superblock> {
    super::superblock(image).expect("it can be read")
}
