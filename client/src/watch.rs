//! Residency as a stream: which blocks are present, and what changes.

use tender_proto::BlockKey;
use tokio::sync::mpsc;

use crate::Tier;

/// A place in the stream of one store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Position {
    /// Of the store; changes when it starts anew.
    pub epoch: u64,
    /// Number of the last event seen.
    pub sequence: u64,
}

/// One block in one tier.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Residency {
    /// The block.
    pub key: BlockKey,
    /// The block before it, or the root.
    pub parent: BlockKey,
    /// The tier.
    pub tier: Tier,
    /// There, or gone.
    pub present: bool,
    /// First half of the namespace's root.
    pub namespace: [u8; 16],
    /// All shards together.
    pub block_bytes: u32,
}

/// What a watch says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WatchItem {
    /// Forget what you held: a snapshot follows.
    Reset,
    /// Part of the snapshot.
    Present(Residency),
    /// The snapshot is complete as of this position.
    Synced(Position),
    /// Something changed.
    Change(Position, Residency),
}

/// A stream of residency; ends with `None` when the store is gone. Watch again from [`Watch::position`]: a store that no longer
/// remembers that far, or has started anew, sends a snapshot.
#[derive(Debug)]
pub struct Watch {
    items: mpsc::Receiver<WatchItem>,
    position: Option<Position>,
    /// Keeps a stream open that nobody feeds any more.
    _open: Option<mpsc::Sender<WatchItem>>,
}

impl Watch {
    pub(crate) fn new(items: mpsc::Receiver<WatchItem>, position: Option<Position>) -> Self {
        Self { items, position, _open: None }
    }

    /// A stream that has ended.
    pub(crate) fn ended() -> Self {
        Self::new(mpsc::channel(1).1, None)
    }

    /// A stream that says `items`, then is silent for good.
    pub(crate) fn silent_after<const N: usize>(items: [WatchItem; N]) -> Self {
        let (sender, receiver) = mpsc::channel(N.max(1));
        for item in items {
            // The channel was made as long as the items are many, so each has its place.
            let _has_room = sender.try_send(item);
        }
        Self { items: receiver, position: None, _open: Some(sender) }
    }

    /// The next item, or `None` when the store is gone.
    pub async fn next(&mut self) -> Option<WatchItem> {
        let item = self.items.recv().await?;
        if let WatchItem::Synced(position) | WatchItem::Change(position, _) = item {
            self.position = Some(position);
        }
        Some(item)
    }

    /// The last position seen.
    pub fn position(&self) -> Option<Position> {
        self.position
    }
}
