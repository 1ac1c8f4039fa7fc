//! Records whose worker may die between any two stores: what it stores from then on it alone sees.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::tier::host::records::Words;

/// Words taken at once, where something is stored.
const PAGE_WORDS: usize = 512;

#[derive(Debug, Default)]
struct State {
    count: usize,
    pages: HashMap<usize, Box<[u64]>>,
    /// Stores until the worker is dead.
    left: Option<u64>,
    /// What it stored when it was.
    unseen: HashMap<usize, u64>,
    is_cut: bool,
}

/// Records of the simulation.
#[derive(Clone, Debug, Default)]
pub(super) struct CutWords(Arc<Mutex<State>>);

impl CutWords {
    /// Zeros, of so many bytes.
    pub(super) fn new(bytes: u64) -> Self {
        let words = Self::default();
        words.state().count = (bytes / 8) as usize;
        words
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The worker dies after so many stores more.
    pub(super) fn arm(&self, stores: u64) {
        self.state().left = Some(stores);
    }

    /// Whether it has.
    pub(super) fn is_cut(&self) -> bool {
        self.state().is_cut
    }

    /// Another worker has the words, and lives.
    pub(super) fn restart(&self) {
        let mut state = self.state();
        (state.left, state.is_cut) = (None, false);
        state.unseen.clear();
    }
}

impl State {
    fn page(&mut self, place: usize) -> &mut u64 {
        let page = self.pages.entry(place / PAGE_WORDS).or_insert_with(|| vec![0; PAGE_WORDS].into());
        &mut page[place % PAGE_WORDS]
    }
}

impl Words for CutWords {
    fn count(&self) -> usize {
        self.state().count
    }

    fn load(&self, place: usize) -> u64 {
        let state = self.state();
        let stored = || state.pages.get(&(place / PAGE_WORDS)).map_or(0, |page| page[place % PAGE_WORDS]);
        state.unseen.get(&place).copied().unwrap_or_else(stored)
    }

    fn store(&self, place: usize, word: u64) {
        let mut state = self.state();
        match state.left {
            Some(0) => {
                state.is_cut = true;
                state.unseen.insert(place, word);
            }
            left => {
                state.left = left.map(|left| left - 1);
                *state.page(place) = word;
            }
        }
    }
}
