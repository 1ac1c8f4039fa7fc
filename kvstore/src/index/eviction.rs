//! In which order blocks go: per shelf of a tier, behind a trait, because better orders than LRU exist.

use std::collections::BTreeMap;

use crate::names::NodeId;
use crate::tier::slab::ShelfId;

/// Orders the nodes that have a copy in one tier. Only leaves (what that is, the index says) are candidates, so that a long chain does
/// not hide them. Owns no bytes and decides nothing: whether a candidate may go (leased, being written, holding up another tier) is
/// the index's to say. Nodes are told to it in this order: `enter`, then any of the others, then `leave`.
pub trait Eviction: Send {
    /// A node got a copy in a shelf of this tier, which counts as a use.
    fn enter(&mut self, node: NodeId, shelf: ShelfId, is_leaf: bool, now_ms: u64);

    /// A node was used, or turned out to be still needed. Of nodes used together the one used last goes last.
    fn touch(&mut self, node: NodeId, now_ms: u64);

    /// Whether a node is a leaf; may be said again.
    fn set_leaf(&mut self, node: NodeId, is_leaf: bool);

    /// A node lost its copy.
    fn leave(&mut self, node: NodeId);

    /// The leaf that should go first. Stays where it is.
    fn coldest(&self, shelf: ShelfId) -> Option<NodeId>;

    /// When that leaf was used last, to compare shelves by.
    fn coldest_use_ms(&self, shelf: ShelfId) -> Option<u64>;
}

/// Least recently used leaf first. A node that becomes a leaf takes the place that its own last use gives it.
#[derive(Debug, Default)]
pub struct Lru {
    uses: Vec<Use>,
    /// Per shelf: leaves by the number of their last use.
    leaves: Vec<BTreeMap<u64, NodeId>>,
    last_use: u64,
}

#[derive(Clone, Copy, Debug)]
struct Use {
    number: u64,
    at_ms: u64,
    shelf: ShelfId,
    is_leaf: bool,
}

impl Lru {
    fn leaves(&mut self, shelf: ShelfId) -> &mut BTreeMap<u64, NodeId> {
        let place = shelf.0 as usize;
        if self.leaves.len() <= place {
            self.leaves.resize(place + 1, BTreeMap::new());
        }
        &mut self.leaves[place]
    }
}

impl Eviction for Lru {
    fn enter(&mut self, node: NodeId, shelf: ShelfId, is_leaf: bool, now_ms: u64) {
        self.last_use += 1;
        let entered = Use { number: self.last_use, at_ms: now_ms, shelf, is_leaf };
        if self.uses.len() <= node.place() {
            self.uses.resize(node.place() + 1, Use { number: 0, at_ms: 0, shelf, is_leaf: false });
        }
        self.uses[node.place()] = entered;
        if is_leaf {
            self.leaves(shelf).insert(entered.number, node);
        }
    }

    fn touch(&mut self, node: NodeId, now_ms: u64) {
        let Use { shelf, is_leaf, .. } = self.uses[node.place()];
        self.leave(node);
        self.enter(node, shelf, is_leaf, now_ms);
    }

    fn set_leaf(&mut self, node: NodeId, is_leaf: bool) {
        let Use { number, shelf, is_leaf: was_leaf, .. } = self.uses[node.place()];
        self.uses[node.place()].is_leaf = is_leaf;
        if was_leaf == is_leaf {
            return;
        }
        if is_leaf {
            self.leaves(shelf).insert(number, node);
        } else {
            self.leaves(shelf).remove(&number);
        }
    }

    fn leave(&mut self, node: NodeId) {
        let Use { number, shelf, is_leaf, .. } = self.uses[node.place()];
        if is_leaf {
            self.leaves(shelf).remove(&number);
        }
    }

    fn coldest(&self, shelf: ShelfId) -> Option<NodeId> {
        self.leaves.get(shelf.0 as usize)?.first_key_value().map(|(_, node)| *node)
    }

    fn coldest_use_ms(&self, shelf: ShelfId) -> Option<u64> {
        self.coldest(shelf).map(|node| self.uses[node.place()].at_ms)
    }
}
