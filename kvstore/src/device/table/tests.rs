use std::sync::atomic::Ordering;

use rustix::io::Errno;

use super::*;
use crate::device::block::PAGE_BYTES;
use crate::device::tests::{copy, is_inherited};

const BYTES: u64 = 4 * PAGE_BYTES;

#[test]
fn a_table_is_adopted_as_it_was_left() {
    let file = TableFile::create(BYTES).expect("a table");
    let table = file.map().expect("mapped");
    assert_eq!(table.len() as u64, BYTES / 8);
    assert!(table.iter().all(|word| word.load(Ordering::Relaxed) == 0));
    table[table.len() - 1].store(7, Ordering::Relaxed);
    let kept = copy(file.descriptor());
    drop((file, table));
    let adopted = TableFile::adopt(kept, BYTES).expect("the same table");
    let table = adopted.map().expect("mapped");
    assert_eq!((adopted.bytes(), table[table.len() - 1].load(Ordering::Relaxed)), (BYTES, 7));
}

#[test]
fn a_table_of_another_size_is_not_adopted() {
    let file = TableFile::create(BYTES).expect("a table");
    let error = TableFile::adopt(copy(file.descriptor()), 2 * BYTES).expect_err("another size");
    assert!(error.to_string().contains("state its size"), "{error}");
}

#[test]
fn size_and_seals_of_a_table_never_change() {
    let file = TableFile::create(BYTES).expect("a table");
    assert_eq!(rustix::fs::ftruncate(file.descriptor(), 0).expect_err("sealed"), Errno::PERM);
    let error = rustix::fs::fcntl_add_seals(file.descriptor(), SealFlags::FUTURE_WRITE).expect_err("sealed");
    assert_eq!(error, Errno::PERM, "the next worker could not map it");
}

#[test]
fn a_forked_child_does_not_have_the_table() {
    let table = TableFile::create(BYTES).expect("a table").map().expect("mapped");
    assert!(!is_inherited(table.as_ptr().cast()));
}
