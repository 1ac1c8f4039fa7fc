//! In which order blocks go: a list per shelf of a tier, behind a trait, because better orders than LRU exist.

use super::ids::NodeId;
use crate::tier::slab::ShelfId;

/// Orders the nodes that have a copy in one tier. Owns no bytes and decides nothing: whether a node may go (leased, inner, not yet
/// written) is the index's to say.
pub trait Eviction: Send {
    /// A node that is in no list of this tier enters a shelf's list as its hottest.
    fn insert(&mut self, shelf: ShelfId, node: NodeId, now_ms: u64);

    /// A node of that list was used, or turned out to be still needed.
    fn touch(&mut self, shelf: ShelfId, node: NodeId, now_ms: u64);

    /// A node leaves that list.
    fn remove(&mut self, shelf: ShelfId, node: NodeId);

    /// The node that should go first. Stays in the list.
    fn coldest(&self, shelf: ShelfId) -> Option<NodeId>;

    /// When the coldest was used last, to compare shelves by.
    fn coldest_use_ms(&self, shelf: ShelfId) -> Option<u64>;
}

/// Least recently used first. A chain is touched from its leaf to its root, so that of one chain the leaf is always the coldest.
#[derive(Debug, Default)]
pub struct Lru {
    links: Vec<Links>,
    lists: Vec<List>,
}

#[derive(Clone, Copy, Debug)]
struct Links {
    hotter: NodeId,
    colder: NodeId,
    used_ms: u64,
}

#[derive(Clone, Copy, Debug)]
struct List {
    hottest: NodeId,
    coldest: NodeId,
}

impl Lru {
    fn list(&mut self, shelf: ShelfId) -> &mut List {
        let place = shelf.0 as usize;
        if self.lists.len() <= place {
            self.lists.resize(place + 1, List { hottest: NodeId::NONE, coldest: NodeId::NONE });
        }
        &mut self.lists[place]
    }
}

impl Eviction for Lru {
    fn insert(&mut self, shelf: ShelfId, node: NodeId, now_ms: u64) {
        let hottest = std::mem::replace(&mut self.list(shelf).hottest, node);
        if hottest == NodeId::NONE {
            self.list(shelf).coldest = node;
        } else {
            self.links[hottest.place()].hotter = node;
        }
        let links = Links { hotter: NodeId::NONE, colder: hottest, used_ms: now_ms };
        if self.links.len() <= node.place() {
            let none = Links { hotter: NodeId::NONE, colder: NodeId::NONE, used_ms: 0 };
            self.links.resize(node.place() + 1, none);
        }
        self.links[node.place()] = links;
    }

    fn touch(&mut self, shelf: ShelfId, node: NodeId, now_ms: u64) {
        self.remove(shelf, node);
        self.insert(shelf, node, now_ms);
    }

    fn remove(&mut self, shelf: ShelfId, node: NodeId) {
        let Links { hotter, colder, .. } = self.links[node.place()];
        match hotter {
            NodeId::NONE => self.list(shelf).hottest = colder,
            hotter => self.links[hotter.place()].colder = colder,
        }
        match colder {
            NodeId::NONE => self.list(shelf).coldest = hotter,
            colder => self.links[colder.place()].hotter = hotter,
        }
    }

    fn coldest(&self, shelf: ShelfId) -> Option<NodeId> {
        let coldest = self.lists.get(shelf.0 as usize)?.coldest;
        (coldest != NodeId::NONE).then_some(coldest)
    }

    fn coldest_use_ms(&self, shelf: ShelfId) -> Option<u64> {
        self.coldest(shelf).map(|node| self.links[node.place()].used_ms)
    }
}
