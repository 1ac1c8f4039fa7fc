//! When directory pages are written, and what is durable. Pages change all the time; a *cycle* writes those that have, and, if somebody
//! waits for durability, then flushes every file. One cycle runs at a time; who comes later shares the next one.
//!
//! A page has two copies on disk. The one that was flushed last is never written over: a cycle writes the other one, again and again
//! if need be, and only a flush that followed makes it the one to keep. So whatever a crash does to pages that were not flushed, the
//! entries acknowledged as durable are there.
//!
//! The first page of a segment goes on alternating when the segment changes owner, and a segment that lost its owner gets an empty one
//! under a new epoch: entries of the past are void on disk once that is flushed.

use std::collections::VecDeque;

use super::format;
use crate::limits;
use crate::names::{CycleId, PageName, SlotId};

#[derive(Clone, Debug, Default)]
struct PageState {
    /// Waits to be written.
    dirty: bool,
    /// The copy that was flushed last.
    flushed_copy: Option<u32>,
    /// Entries of the other copy, as written last; 0 when it was not written since the flush.
    written: u32,
    /// The other copy was written since the last flush, and the page is among `unflushed`.
    is_written: bool,
    /// Entries that would survive a power cut.
    durable: u32,
}

impl PageState {
    /// The copy that may be written.
    fn next_copy(&self) -> u32 {
        self.flushed_copy.map_or(0, |flushed| 1 - flushed)
    }
}

#[derive(Clone, Debug, Default)]
struct SegmentState {
    epoch: u64,
    owned: bool,
    pages: Vec<PageState>,
}

#[derive(Debug)]
enum Cycle {
    Idle,
    Writing { todo: VecDeque<PageName>, in_flight: usize, failed: bool },
    Flushing { files_left: usize, failed: bool },
}

/// What a cycle wants next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Write this copy of this page.
    Write(PageName, u32),
    /// All pages are written: flush every file.
    FlushAll,
    /// Nothing, until something completes.
    Nothing,
}

/// The directory of all segments.
#[derive(Debug)]
pub struct Directory {
    segments: Vec<SegmentState>,
    dirty: VecDeque<PageName>,
    /// Pages written since the last flush, each with the copy.
    unflushed: Vec<(PageName, u32)>,
    cycle: Cycle,
    /// Number of the cycle that starts next.
    next: CycleId,
    /// Somebody waits for the cycle that starts next.
    wanted: bool,
    /// Whether the running cycle flushes.
    flushes: bool,
    file_count: usize,
    /// Counts ownerships, copies and pages: each number is used once.
    counter: u64,
    /// Copies up to this number were there when the last flush that succeeded began, or when the running one did.
    flushed: u64,
    flushing: u64,
    /// Copies with these numbers (above the first, up to the second) were written before a flush that failed. Nobody knows what became
    /// of them: a file system may report the failure once and call them clean. A later flush proves nothing for them.
    suspect: VecDeque<(u64, u64)>,
}

/// Ranges of suspect copies that are kept apart; beyond it the two oldest become one, with what lies between them.
const SUSPECTS_MAX: usize = 8;

impl Directory {
    /// A directory without pages. `counter` is above every number found on disk.
    pub fn new(segment_count: u32, file_count: usize, counter: u64) -> Self {
        Self {
            segments: vec![SegmentState::default(); segment_count as usize],
            dirty: VecDeque::new(),
            unflushed: Vec::new(),
            cycle: Cycle::Idle,
            next: CycleId(1),
            wanted: false,
            flushes: false,
            file_count,
            counter,
            flushed: counter,
            flushing: counter,
            suspect: VecDeque::new(),
        }
    }

    /// A number above all before it: of a copy, a page, an ownership.
    pub fn count(&mut self) -> u64 {
        self.counter += 1;
        self.counter
    }

    /// Numbers up to this one are in use already.
    pub fn count_from(&mut self, counter: u64) {
        self.counter = self.counter.max(counter);
        self.flushed = self.counter;
    }

    /// Whether a segment has a directory.
    pub fn has(&self, segment: u32) -> bool {
        self.segments[segment as usize].owned
    }

    /// A segment got an owner: its directory begins empty. Page 0 is written with the first cycle, for it tells the slot size.
    pub fn begin(&mut self, segment: u32, slots: u32) {
        self.change_owner(segment, true, format::directory_pages(slots));
    }

    fn change_owner(&mut self, segment: u32, owned: bool, page_count: u32) {
        let epoch = self.count();
        let mut pages = vec![PageState::default(); page_count as usize];
        let before = self.segments[segment as usize].pages.first();
        pages[0].flushed_copy = before.and_then(|first| first.flushed_copy);
        self.segments[segment as usize] = SegmentState { epoch, owned, pages };
        self.mark_page(segment, 0);
    }

    /// A segment's directory as it was found at start: for each page, which copy counted and what it held.
    pub fn recover(&mut self, segment: u32, epoch: u64, pages: impl Iterator<Item = Option<(u32, u32)>>) {
        let page = |found: Option<(u32, u32)>| PageState {
            flushed_copy: found.map(|(copy, _)| copy),
            durable: found.map_or(0, |(_, entries)| entries),
            ..PageState::default()
        };
        self.segments[segment as usize] = SegmentState { epoch, owned: true, pages: pages.map(page).collect() };
    }

    /// A segment lost its owner: what its pages on disk say is void with the next cycle.
    pub fn end(&mut self, segment: u32) {
        self.change_owner(segment, false, 1);
    }

    /// Epoch of a segment's owner.
    pub fn epoch(&self, segment: u32) -> u64 {
        self.segments[segment as usize].epoch
    }

    fn state(&mut self, name: PageName) -> Option<&mut PageState> {
        let segment = &mut self.segments[name.segment as usize];
        if segment.epoch == name.epoch { segment.pages.get_mut(name.page as usize) } else { None }
    }

    /// Page and entry of a slot.
    pub fn place(slot: SlotId) -> (u32, u32) {
        (slot.place() / format::ENTRIES_PER_PAGE, slot.place() % format::ENTRIES_PER_PAGE)
    }

    /// The page that tells of a slot.
    pub fn name(&self, slot: SlotId) -> PageName {
        PageName { segment: slot.segment(), page: Self::place(slot).0, epoch: self.epoch(slot.segment()) }
    }

    /// A page is to be written once more with the next cycle; if its segment changed owner, the page that makes it void.
    pub fn mark_again(&mut self, name: PageName) {
        let page = if self.state(name).is_some() { name.page } else { 0 };
        self.mark_page(name.segment, page);
    }

    /// A page is to be written with the next cycle.
    pub fn mark_page(&mut self, segment: u32, page: u32) {
        let name = PageName { segment, page, epoch: self.epoch(segment) };
        if let Some(state) = self.state(name)
            && !state.dirty
        {
            state.dirty = true;
            self.dirty.push_back(name);
        }
    }

    /// A slot's entry changed: what was there is not durable any more.
    pub fn mark(&mut self, slot: SlotId) {
        let (page, entry) = Self::place(slot);
        self.mark_page(slot.segment(), page);
        let name = self.name(slot);
        if let Some(state) = self.state(name) {
            state.durable &= !(1 << entry);
            state.written &= !(1 << entry);
        }
    }

    /// Whether a slot's entry would survive a power cut.
    pub fn is_durable(&self, slot: SlotId) -> bool {
        let (page, entry) = Self::place(slot);
        let pages = &self.segments[slot.segment() as usize].pages;
        pages.get(page as usize).is_some_and(|state| state.durable >> entry & 1 == 1)
    }

    /// Asks for a cycle with a flush that starts after now; returns its number, for [`Directory::next`]'s caller to wait for.
    pub fn want(&mut self) -> CycleId {
        self.wanted = true;
        self.next
    }

    /// Whether there is anything to write.
    pub fn is_dirty(&self) -> bool {
        !self.dirty.is_empty()
    }

    /// Whether a power cut would leave exactly what is known now.
    pub fn is_settled(&self) -> bool {
        !self.is_dirty() && !self.is_busy() && self.unflushed.is_empty()
    }

    /// Whether pages are on their way to the disk.
    pub fn is_writing(&self) -> bool {
        matches!(self.cycle, Cycle::Writing { in_flight, .. } if in_flight > 0)
    }

    /// Whether a cycle runs.
    pub fn is_busy(&self) -> bool {
        !matches!(self.cycle, Cycle::Idle)
    }

    /// Starts a cycle if none runs and one is wanted, or `lazily` if any page changed.
    pub fn start(&mut self, lazily: bool) {
        if self.is_busy() || !(self.wanted || lazily && self.is_dirty()) {
            return;
        }
        let todo = std::mem::take(&mut self.dirty);
        for name in &todo {
            if let Some(state) = self.state(*name) {
                state.dirty = false;
            }
        }
        self.flushes = std::mem::take(&mut self.wanted);
        self.next.0 += 1;
        self.cycle = Cycle::Writing { todo, in_flight: 0, failed: false };
    }

    /// What the cycle wants now. Call until `Nothing`.
    pub fn step(&mut self) -> Step {
        loop {
            let Cycle::Writing { todo, in_flight, failed } = &mut self.cycle else { return Step::Nothing };
            if *in_flight == limits::DIRECTORY_WRITES_MAX {
                return Step::Nothing;
            }
            let (failed, in_flight_now) = (*failed, *in_flight);
            match todo.pop_front() {
                Some(name) => {
                    // A segment that changed owner meanwhile has no such page any more.
                    let Some(state) = self.state(name) else { continue };
                    let copy = state.next_copy();
                    if let Cycle::Writing { in_flight, .. } = &mut self.cycle {
                        *in_flight += 1;
                    }
                    return Step::Write(name, copy);
                }
                None if in_flight_now > 0 => return Step::Nothing,
                None if self.flushes && !failed => {
                    self.flushing = self.counter;
                    self.cycle = Cycle::Flushing { files_left: self.file_count, failed: false };
                    return Step::FlushAll;
                }
                None => return Step::Nothing,
            }
        }
    }

    /// What a page holds at the moment it is handed to the disk.
    pub fn written(&mut self, name: PageName, entries: u32) {
        let Some(state) = self.state(name) else { return };
        state.written = entries;
        let copy = state.next_copy();
        if !std::mem::replace(&mut state.is_written, true) {
            self.unflushed.push((name, copy));
        }
    }

    /// A page was written, or not.
    pub fn page_done(&mut self, name: PageName, ok: bool) {
        if let Cycle::Writing { in_flight, failed, .. } = &mut self.cycle {
            *in_flight -= 1;
            *failed |= !ok;
        }
        if !ok {
            self.mark_page(name.segment, name.page);
        }
    }

    /// A file was flushed, or not.
    pub fn flush_done(&mut self, ok: bool) {
        if let Cycle::Flushing { files_left, failed } = &mut self.cycle {
            *files_left -= 1;
            *failed |= !ok;
        }
    }

    /// The number of the cycle that just ended, and whether all it promised is true.
    pub fn finished(&mut self) -> Option<(CycleId, bool)> {
        let id = CycleId(self.next.0 - 1);
        let ok = match &self.cycle {
            Cycle::Writing { todo, in_flight: 0, failed } if todo.is_empty() && (*failed || !self.flushes) => !failed,
            Cycle::Flushing { files_left: 0, failed } => !failed,
            _ => return None,
        };
        let flushed = matches!(self.cycle, Cycle::Flushing { .. });
        self.cycle = Cycle::Idle;
        if flushed {
            if ok {
                self.flushed = self.flushing;
            } else {
                self.suspect();
            }
            for (name, copy) in std::mem::take(&mut self.unflushed) {
                self.settle(name, copy, ok);
            }
        }
        Some((id, ok))
    }

    /// What was written since the last flush that succeeded may be lost, whatever later ones say.
    fn suspect(&mut self) {
        self.suspect.push_back((self.flushed, self.counter));
        if self.suspect.len() > SUSPECTS_MAX
            && let (Some((from, _)), Some((_, to))) = (self.suspect.pop_front(), self.suspect.pop_front())
        {
            self.suspect.push_front((from, to));
        }
    }

    /// Whether the copy of that number was written before a flush that failed.
    pub fn is_suspect(&self, written: u64) -> bool {
        self.suspect.iter().any(|&(from, to)| from < written && written <= to)
    }

    /// After a flush: the written copy is the one to keep. After a failed one nobody knows what the disk holds: it is written again.
    fn settle(&mut self, name: PageName, copy: u32, ok: bool) {
        let Some(state) = self.state(name) else {
            // The segment changed owner since; which copy of its first page to keep holds for all owners.
            let first = self.segments[name.segment as usize].pages.first_mut();
            if let Some(first) = first.filter(|_| ok && name.page == 0) {
                first.flushed_copy = Some(copy);
            }
            return;
        };
        state.is_written = false;
        if ok {
            state.flushed_copy = Some(copy);
            state.durable = state.written;
        } else {
            self.mark_page(name.segment, name.page);
        }
    }
}

#[cfg(test)]
mod tests;
