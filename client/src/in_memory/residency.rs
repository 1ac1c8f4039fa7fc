//! Who is told: numbered events, the last of them remembered, and the streams that they go to.

use std::collections::VecDeque;
use std::hash::{BuildHasher, Hasher, RandomState};

use tokio::sync::mpsc;

use crate::{Position, Residency, Watch, WatchItem};

/// Events a stream may lie behind before it is cut: it then watches anew, which costs less than remembering without a bound.
const WATCH_BEHIND_EVENTS_MAX: usize = 4096;

/// Events remembered for those who come back: 130 bytes each, 2 MiB in all.
const REMEMBERED_EVENTS_MAX: usize = 16 * 1024;

/// The stream of one store.
#[derive(Debug)]
pub(super) struct Stream {
    epoch: u64,
    /// Number of the last event; the first event is number 1.
    sequence: u64,
    remembered: VecDeque<Residency>,
    watchers: Vec<mpsc::Sender<WatchItem>>,
}

impl Stream {
    pub(super) fn new() -> Self {
        // Any number that another store hardly has; 0 means "none" on the wire.
        let epoch = RandomState::new().build_hasher().finish().max(1);
        Self { epoch, sequence: 0, remembered: VecDeque::new(), watchers: Vec::new() }
    }

    /// Tells everyone, and forgets those who do not listen.
    pub(super) fn announce(&mut self, change: Residency) {
        self.sequence += 1;
        if self.remembered.len() == REMEMBERED_EVENTS_MAX {
            self.remembered.pop_front();
        }
        self.remembered.push_back(change);
        let item = WatchItem::Change(self.position(), change);
        self.watchers.retain(|watcher| watcher.try_send(item).is_ok());
    }

    /// Events after `from` where they are remembered; else `present` and what comes after it.
    pub(super) fn watch(&mut self, from: Option<Position>, present: impl Iterator<Item = Residency>) -> Watch {
        let (items, from) = match from.and_then(|from| Some((self.events_after(from)?, from))) {
            Some((events, from)) => (events, Some(from)),
            None => {
                let present = present.map(WatchItem::Present);
                let synced = WatchItem::Synced(self.position());
                (std::iter::once(WatchItem::Reset).chain(present).chain([synced]).collect(), None)
            }
        };
        let (sender, receiver) = mpsc::channel(items.len() + WATCH_BEHIND_EVENTS_MAX);
        for item in items {
            // The channel has room for all of them.
            let _has_room = sender.try_send(item);
        }
        self.watchers.push(sender);
        Watch::new(receiver, from)
    }

    fn position(&self) -> Position {
        Position { epoch: self.epoch, sequence: self.sequence }
    }

    fn events_after(&self, from: Position) -> Option<Vec<WatchItem>> {
        let forgotten = self.sequence - self.remembered.len() as u64;
        if from.epoch != self.epoch || !(forgotten..=self.sequence).contains(&from.sequence) {
            return None;
        }
        let numbered = self.remembered.iter().zip(forgotten + 1..);
        let later = numbered.filter(|(_, sequence)| *sequence > from.sequence);
        let item = |(change, sequence): (&Residency, u64)| {
            WatchItem::Change(Position { epoch: self.epoch, sequence }, *change)
        };
        Some(later.map(item).collect())
    }
}
