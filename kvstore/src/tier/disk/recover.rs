//! What a tier file held when its daemon ended: read once at start, before anything is written.

use std::io;
use std::path::PathBuf;

use super::format::{self, DirectoryPage, Entry, FormatError, Superblock};
use crate::device::block::{PAGE_BYTES, PageFile};
use crate::device::memory::PageBuffer;

/// What a segment held.
#[derive(Clone, Debug)]
pub struct FoundSegment {
    /// Segment of the file.
    pub segment: u32,
    /// Whose.
    pub tenant: [u8; 16],
    /// Bytes of its slots.
    pub slot_bytes: u32,
    /// Its ownership.
    pub epoch: u64,
    /// For each page: which copy counts, and what it holds.
    pub pages: Vec<Option<(u32, DirectoryPage)>>,
}

/// Why a file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum RecoverError {
    /// The disk said no.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// Both superblocks are damaged or foreign.
    #[error("{0}; give this daemon another --dir, or remove the file if nothing in it is needed")]
    Format(FormatError),
    /// Another geometry.
    #[error(
        "it was made for {found} and the configuration asks for {wanted}; restore the old --disk size and folders, or remove the \
         file to start empty"
    )]
    Geometry {
        /// As found.
        found: String,
        /// As configured.
        wanted: String,
    },
    /// The right geometry, but not of the store that the files before it are of.
    #[error(
        "it belongs to another store than {}; give the folders of one store, or remove whichever of the two does not belong \
         there: an empty one takes its place",
        other.display()
    )]
    OtherStore {
        /// The first file of the configuration that is of any store.
        other: PathBuf,
    },
}

/// Makes a file without superblocks part of a store: nothing that it holds counts any more.
///
/// A `used` one may hold directories, and under the key of the store these would be found at the next start, with blocks that were
/// purged meanwhile. Without its first page a directory is none.
pub fn initialize(file: &mut dyn PageFile, superblock: &Superblock, used: bool) -> io::Result<()> {
    if used {
        let blank = PageBuffer::zeroed(2)?;
        for segment in 0..superblock.segment_count {
            file.write_pages(superblock.segment_offset(segment), &blank)?;
        }
        // A superblock that came before would let them count.
        file.flush()?;
    }
    let mut pages = PageBuffer::zeroed(2)?;
    for copy in pages.chunks_exact_mut(PAGE_BYTES as usize) {
        copy.copy_from_slice(&superblock.encode().0);
    }
    file.write_pages(0, &pages)?;
    file.flush()
}

/// The superblock of a file; `None` when there is none yet (a new file).
pub fn superblock(file: &dyn PageFile) -> Result<Option<Superblock>, RecoverError> {
    let pages = file.read_pages(0, 2)?;
    if pages.iter().all(|&byte| byte == 0) {
        return Ok(None);
    }
    let (first, second) = pages.split_at(PAGE_BYTES as usize);
    match Superblock::decode(first) {
        Ok(superblock) => Ok(Some(superblock)),
        Err(error) => Superblock::decode(second).map(Some).map_err(|_| RecoverError::Format(error)),
    }
}

/// Everything that the directories of a file say, segment by segment, and the highest number in use.
pub fn directories(
    file: &dyn PageFile,
    superblock: &Superblock,
    mut found: impl FnMut(FoundSegment),
) -> Result<u64, RecoverError> {
    let mut counter = 0;
    for segment in 0..superblock.segment_count {
        let Some(segment) = read_segment(file, superblock, segment)? else { continue };
        for (_, page) in segment.pages.iter().flatten() {
            let written = page.entries.iter().flatten().map(|entry| entry.written).max().unwrap_or(0);
            counter = counter.max(page.sequence).max(page.epoch).max(written);
        }
        found(segment);
    }
    Ok(counter)
}

fn read_segment(
    file: &dyn PageFile,
    superblock: &Superblock,
    segment: u32,
) -> Result<Option<FoundSegment>, RecoverError> {
    let offset = superblock.segment_offset(segment);
    let Some((_, first)) = newest(superblock, segment, 0, &file.read_pages(offset, 2)?, None) else { return Ok(None) };
    let slots = format::slots_per_segment(superblock.segment_bytes, first.slot_bytes.into());
    let count = format::directory_pages(slots);
    let bytes = file.read_pages(offset, 2 * count as usize)?;
    let pages = bytes.chunks_exact(2 * PAGE_BYTES as usize).zip(0..count);
    let pages = pages.map(|(copies, page)| newest(superblock, segment, page, copies, Some(first.epoch))).collect();
    let DirectoryPage { tenant, slot_bytes, epoch, .. } = first;
    Ok(Some(FoundSegment { segment, tenant, slot_bytes, epoch, pages }))
}

/// The newer of a page's two copies among those that are whole. Pages after the first must be of the first one's epoch: of another they
/// speak of another owner's slots.
fn newest(
    superblock: &Superblock,
    segment: u32,
    page: u32,
    copies: &[u8],
    epoch: Option<u64>,
) -> Option<(u32, DirectoryPage)> {
    copies
        .chunks_exact(PAGE_BYTES as usize)
        .zip(0u32..)
        .filter_map(|(bytes, copy)| Some((copy, DirectoryPage::decode(bytes, &superblock.page_key).ok()?)))
        .filter(|(_, found)| {
            found.segment == segment && found.page == page && epoch.is_none_or(|epoch| found.epoch == epoch)
        })
        .max_by_key(|(_, found)| (found.epoch, found.sequence))
}

/// Entries of a page as bits.
pub fn entry_bits(entries: &[Option<Entry>]) -> u32 {
    entries.iter().zip(0u32..).fold(0, |bits, (entry, i)| bits | u32::from(entry.is_some()) << i)
}

#[cfg(test)]
mod tests;
