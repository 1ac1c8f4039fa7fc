//! Memory that other processes have mapped too, read and written without asking anybody.

#![expect(unsafe_code, reason = "copies between slices and memory that other processes use too")]

use std::io;
use std::os::fd::{AsFd, AsRawFd};

use memmap2::{MmapOptions, MmapRaw};
use tender_client::Slot;

/// Writes to a reserved slot by its address, as a copy engine does.
pub fn write_by_address(slot: &mut Slot, offset: usize, bytes: &[u8]) {
    assert!(offset + bytes.len() <= slot.bytes(), "{} bytes at {offset} leave the slot", bytes.len());
    // SAFETY: the place was just checked to lie in the slot, which is writable as long as it lives; nobody in this process has a
    // reference into it.
    unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), slot.start().add(offset), bytes.len()) }
}

/// One mapping. No reference into it exists: bytes are copied in and out.
pub struct Memory(MmapRaw);

impl Memory {
    pub fn to_write(file: &impl AsFd, bytes: u64) -> io::Result<Self> {
        MmapOptions::new().len(bytes as usize).map_raw(file.as_fd().as_raw_fd()).map(Self)
    }

    pub fn to_read(file: &impl AsFd, bytes: u64) -> io::Result<Self> {
        MmapOptions::new().len(bytes as usize).map_raw_read_only(file.as_fd().as_raw_fd()).map(Self)
    }

    pub fn bytes(&self) -> u64 {
        self.0.len() as u64
    }

    pub fn write(&self, offset: u64, bytes: &[u8]) {
        self.check(offset, bytes.len());
        // SAFETY: the place was just checked to lie in the mapping, which lives as long as `self` and is writable (a read-only one ends
        // the test); nobody in this process has a reference into it.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.0.as_mut_ptr().add(offset as usize), bytes.len()) }
    }

    pub fn read(&self, offset: u64, bytes: usize) -> Vec<u8> {
        self.check(offset, bytes);
        let mut copy = vec![0; bytes];
        // SAFETY: as above; others may write meanwhile, and then the copy is whatever it is.
        unsafe { std::ptr::copy_nonoverlapping(self.0.as_ptr().add(offset as usize), copy.as_mut_ptr(), bytes) }
        copy
    }

    /// Whether `needle` stands at the start of any page.
    pub fn has_page_with(&self, needle: &[u8]) -> bool {
        (0..self.bytes()).step_by(4096).any(|page| self.read(page, needle.len()) == needle)
    }

    fn check(&self, offset: u64, bytes: usize) {
        let end = offset.checked_add(bytes as u64);
        assert!(end.is_some_and(|end| end <= self.bytes()), "{bytes} bytes at {offset} leave the mapping");
    }
}
