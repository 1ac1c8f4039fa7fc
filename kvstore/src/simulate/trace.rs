//! What happened, as a hash; and in words, when somebody wants to read it.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::fmt::{self, Write};
use std::rc::Rc;

use tender_proto::sum::mix;

/// Lines remembered.
const LINES_MAX: usize = 300_000;

/// The last lines of a trace.
pub(super) type Kept = Rc<RefCell<VecDeque<String>>>;

/// A trace under way.
#[derive(Debug, Default)]
pub(super) struct Trace {
    hash: u64,
    kept: Option<Kept>,
}

impl Trace {
    /// A trace whose last lines can be read, also after its world has panicked.
    pub(super) fn kept() -> (Self, Kept) {
        let kept = Kept::default();
        (Self { hash: 0, kept: Some(Rc::clone(&kept)) }, kept)
    }

    pub(super) fn note(&mut self, line: fmt::Arguments<'_>) {
        // Hashing cannot fail.
        let _ = self.write_fmt(line);
        self.hash = mix(self.hash.wrapping_add(1));
        if let Some(kept) = &self.kept {
            let mut kept = kept.borrow_mut();
            if kept.len() == LINES_MAX {
                kept.pop_front();
            }
            kept.push_back(line.to_string());
        }
    }

    pub(super) fn hash(&self) -> u64 {
        self.hash
    }
}

impl Write for Trace {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for piece in text.as_bytes().chunks(8) {
            let mut word = [0; 8];
            word[..piece.len()].copy_from_slice(piece);
            self.hash = mix(self.hash ^ u64::from_le_bytes(word));
        }
        Ok(())
    }
}
