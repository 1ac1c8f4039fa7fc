//! What the simulated disk holds: the image that reads see, and for each sector that is not durable yet what a power cut may bring back.

use std::collections::BTreeMap;
use std::io;

use super::super::{PAGE_BYTES, PageFile};
use super::Random;
use crate::device::memory::PageBuffer;

/// What a disk writes whole or tears.
pub(super) const SECTOR_BYTES: usize = 512;

/// Contents of one sector.
pub(super) type Sector = [u8; SECTOR_BYTES];

/// Contents of a disk at rest. Untouched parts take no memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskImage {
    content: Vec<u8>,
}

impl DiskImage {
    /// A disk of zeros.
    ///
    /// # Panics
    /// When `bytes` is not whole pages.
    pub fn new(bytes: u64) -> Self {
        assert!(bytes.is_multiple_of(PAGE_BYTES), "a disk of {bytes} bytes: not whole pages");
        Self { content: vec![0; usize::try_from(bytes).expect("an image fits into memory")] }
    }

    /// Flips one bit: a disk that rots while nobody looks.
    pub fn flip_bit(&mut self, bit: u64) {
        self.content[(bit / 8) as usize] ^= 1 << (bit % 8);
    }

    fn range(&self, offset: u64, bytes: usize) -> io::Result<std::ops::Range<usize>> {
        let start = usize::try_from(offset).map_err(|_| io::ErrorKind::UnexpectedEof)?;
        let end = start.checked_add(bytes).filter(|end| *end <= self.content.len());
        Ok(start..end.ok_or(io::ErrorKind::UnexpectedEof)?)
    }
}

/// Everything written this way is durable at once: nothing of start-up is lost in the simulation but by a crash of the caller.
impl PageFile for DiskImage {
    fn read_pages(&self, offset: u64, pages: usize) -> io::Result<PageBuffer> {
        let range = self.range(offset, pages * PAGE_BYTES as usize)?;
        let mut buffer = PageBuffer::zeroed(pages)?;
        buffer.copy_from_slice(&self.content[range]);
        Ok(buffer)
    }

    fn write_pages(&mut self, offset: u64, pages: &PageBuffer) -> io::Result<()> {
        let range = self.range(offset, pages.len())?;
        self.content[range].copy_from_slice(pages);
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn bytes(&self) -> u64 {
        self.content.len() as u64
    }
}

/// A disk at work.
#[derive(Debug)]
pub(super) struct Sectors {
    content: Vec<u8>,
    /// Sectors whose content is not durable, by number.
    volatile: BTreeMap<usize, Volatile>,
    writes_applied: u64,
    flushes: Vec<Flush>,
}

#[derive(Debug)]
struct Volatile {
    /// What is durable.
    old: Sector,
    /// Number of the write that made `old`, or of a later one.
    old_write: u64,
    /// Number of the write that made the present content.
    write: u64,
    /// A flush of it failed, and the system calls it clean since: no later flush makes it durable, only another write does.
    is_forgotten: bool,
}

/// A flush in flight.
#[derive(Debug)]
struct Flush {
    /// It covers the writes up to this number.
    covers: u64,
    /// Covered sectors that were overwritten since it was submitted: as they were then, and the number of the write that had made them.
    overwritten: BTreeMap<usize, (Sector, u64)>,
}

impl Sectors {
    pub(super) fn new(image: DiskImage) -> Self {
        Self { content: image.content, volatile: BTreeMap::new(), writes_applied: 0, flushes: Vec::new() }
    }

    pub(super) fn bytes(&self) -> u64 {
        self.content.len() as u64
    }

    pub(super) fn read(&self, offset: u64, bytes: usize) -> &[u8] {
        &self.content[offset as usize..offset as usize + bytes]
    }

    /// Applies a write of whole sectors to what reads see.
    pub(super) fn write(&mut self, offset: u64, data: &[u8]) {
        let before = self.writes_applied;
        self.writes_applied += 1;
        let first = offset as usize / SECTOR_BYTES;
        for (new, number) in data.as_chunks::<SECTOR_BYTES>().0.iter().zip(first..) {
            let present = sector_mut(&mut self.content, number);
            let sector = self.volatile.entry(number).or_insert(Volatile {
                old: *present,
                old_write: before,
                write: before,
                is_forgotten: false,
            });
            for flush in self.flushes.iter_mut().filter(|flush| sector.write <= flush.covers && !sector.is_forgotten) {
                flush.overwritten.entry(number).or_insert((*present, sector.write));
            }
            sector.write = self.writes_applied;
            sector.is_forgotten = false;
            *present = *new;
        }
    }

    /// Notes a flush. The number that names it: it covers the writes applied until now.
    pub(super) fn flush_submitted(&mut self) -> u64 {
        self.flushes.push(Flush { covers: self.writes_applied, overwritten: BTreeMap::new() });
        self.writes_applied
    }

    /// Makes durable what a flush covers.
    pub(super) fn flush(&mut self, covers: u64) {
        let flush = self.end_flush(covers);
        self.volatile.retain(|_, sector| sector.write > flush.covers || sector.is_forgotten);
        for (number, (old, old_write)) in flush.overwritten {
            // A later flush may have overtaken this one, and made newer content durable.
            if let Some(sector) = self.volatile.get_mut(&number).filter(|sector| sector.old_write < old_write) {
                (sector.old, sector.old_write) = (old, old_write);
            }
        }
    }

    /// A flush that makes nothing durable, now or later.
    pub(super) fn flush_failed(&mut self, covers: u64) {
        let flush = self.end_flush(covers);
        for sector in self.volatile.values_mut().filter(|sector| sector.write <= flush.covers) {
            sector.is_forgotten = true;
        }
    }

    fn end_flush(&mut self, covers: u64) -> Flush {
        let index = self.flushes.iter().position(|flush| flush.covers == covers);
        self.flushes.swap_remove(index.expect("a flush ends once, after its submission"))
    }

    /// What a power cut leaves: each sector that is not durable is old, new or torn.
    pub(super) fn crash(mut self, random: &mut Random) -> DiskImage {
        for (number, Volatile { old, .. }) in &self.volatile {
            let content = sector_mut(&mut self.content, *number);
            let new = *content;
            // A third of the sectors each; most torn ones are halves in either order, some are rubbish.
            let middle = 8 * (1 + random.below(SECTOR_BYTES as u64 / 8 - 1) as usize);
            *content = match random.below(12) {
                0..4 => *old,
                4..8 => new,
                8 | 9 => join(&new[..middle], &old[middle..]),
                10 => join(&old[..middle], &new[middle..]),
                _ => random.sector(),
            };
        }
        self.into_image()
    }

    pub(super) fn into_image(self) -> DiskImage {
        DiskImage { content: self.content }
    }
}

fn sector_mut(content: &mut [u8], number: usize) -> &mut Sector {
    &mut content.as_chunks_mut::<SECTOR_BYTES>().0[number]
}

fn join(start: &[u8], end: &[u8]) -> Sector {
    let mut sector = [0; SECTOR_BYTES];
    sector[..start.len()].copy_from_slice(start);
    sector[start.len()..].copy_from_slice(end);
    sector
}
