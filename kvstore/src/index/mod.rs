//! What do we have, and where? A tree of nodes, one per block, with its copy in each tier; the order in which copies go; numbered
//! events of what came and went. Owns no slot and no byte: a copy is the name of its first slot.
//!
//! Invariants, checked by [`Index::check`]:
//! * a node exists while it has a copy, is being filled, or has children;
//! * its `children` count, per tier, the children with a copy there (a block being filled counts as one in host memory), its
//!   `idle_children` those whose copy in host memory nobody uses;
//! * a node is in a tier's order exactly while it has a copy in that tier, and a candidate there exactly while it is a leaf;
//! * victims are leaves of their tier, and nothing leaves the union of the tiers while a child is in it, so that what is present
//!   hangs together. Where a copy is lost all the same (a fault, a segment that changes owner), the node stays as a ghost: its
//!   subtree is dead in O(1), goes before anything else, and lives again if the block is put again.

pub mod events;
mod eviction;
pub mod namespaces;

use hashbrown::HashTable;
use tender_proto::{BlockKey, sum};

use self::events::Events;
pub use self::eviction::{Eviction, Lru};
use self::namespaces::Namespaces;
use crate::limits;
use crate::names::{NamespaceId, NodeId, Place, SlotId, TenantId};
use crate::tier::slab::ShelfId;
use crate::verb::Residency;

/// One block.
#[derive(Clone, Copy, Debug)]
pub struct Node {
    /// Its key.
    pub key: BlockKey,
    /// Its namespace: the same key under another is another block.
    pub namespace: NamespaceId,
    /// The block before it.
    pub parent: NodeId,
    first_child: NodeId,
    next_sibling: NodeId,
    previous_sibling: NodeId,
    copies: [SlotId; 2],
    /// First slot of the copy that is being filled: shards reserved or already there, the block not yet whole.
    pub filling: SlotId,
    children: [u32; 2],
    /// Children with a copy in host memory that nobody uses.
    idle_children: u32,
    /// Leases and write-backs that use the copy in host memory.
    users: u32,
    /// A write-back is queued or under way.
    pub writing: bool,
    /// Was found in a tier since it was put; worth more than one that never was.
    pub reused: bool,
    /// A slot is being sought for it: it stays while others go.
    pub pinned: bool,
}

/// Where a node counts as its parent's child.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Held {
    /// Per tier; a block being filled counts as one in host memory.
    tiers: [bool; 2],
    /// In host memory, and nobody uses it.
    idle: bool,
}

/// The index of one node's tiers.
pub struct Index {
    nodes: Vec<Node>,
    free: Vec<NodeId>,
    table: HashTable<NodeId>,
    table_seed: u64,
    orders: [Box<dyn Eviction>; 2],
    dead: Vec<NodeId>,
    /// Blocks with a copy, per tier.
    pub blocks: [u64; 2],
    /// All namespaces.
    pub namespaces: Namespaces,
    /// What came and went.
    pub events: Events,
}

impl Node {
    /// First slot of its copy in a tier.
    pub fn copy(&self, place: Place) -> Option<SlotId> {
        let slot = self.copies[place.at()];
        (slot != SlotId::NONE).then_some(slot)
    }

    /// Whether it can be found.
    pub fn is_present(&self) -> bool {
        self.copies != [SlotId::NONE; 2]
    }

    /// Whether nothing hangs on its copy in a tier. In host memory children in use do not count: they stay anyway, and their chain would
    /// be stuck as long as its end is leased or being written. On disk all count, for the union of the tiers is to stay closed.
    fn is_leaf(&self, place: Place) -> bool {
        match place {
            Place::Host => self.users == 0 && self.idle_children == 0,
            Place::Disk => self.children[Place::Disk.at()] == 0,
        }
    }

    fn is_ghost(&self) -> bool {
        !self.is_present() && self.filling == SlotId::NONE && !self.pinned
    }
}

/// Blocks walked to find out whether a parent link would close a ring.
const RING_STEPS_MAX: usize = 4_096;

fn hash(seed: u64, namespace: NamespaceId, key: &BlockKey) -> u64 {
    sum::mix(sum::seed(key, tender_proto::Shard::WHOLE, seed) ^ u64::from(namespace.0))
}

impl Index {
    /// Nothing yet. `table_seed` makes the table's hash unknown to whoever chooses keys.
    pub fn new(tenant_count: usize, table_seed: u64) -> Self {
        Self {
            nodes: Vec::new(),
            free: Vec::new(),
            table: HashTable::new(),
            table_seed,
            orders: [Box::new(Lru::default()), Box::new(Lru::default())],
            dead: Vec::new(),
            blocks: [0; 2],
            namespaces: Namespaces::new(tenant_count),
            events: Events::new(tenant_count),
        }
    }

    /// The node of that name.
    pub fn node(&self, node: NodeId) -> &Node {
        &self.nodes[node.place()]
    }

    /// Marks of a node that the caller owns: `writing`, `reused`.
    pub fn node_mut(&mut self, node: NodeId) -> &mut Node {
        &mut self.nodes[node.place()]
    }

    /// Number of nodes, ghosts included.
    pub fn count(&self) -> usize {
        self.nodes.len() - self.free.len()
    }

    /// One past the highest name of a node, for walks over all.
    pub fn end(&self) -> u32 {
        self.nodes.len() as u32
    }

    /// The block with that key.
    pub fn find(&self, namespace: NamespaceId, key: &BlockKey) -> Option<NodeId> {
        let same = |node: &NodeId| {
            let node = self.node(*node);
            node.key == *key && node.namespace == namespace
        };
        self.table.find(hash(self.table_seed, namespace, key), same).copied()
    }

    /// The block with that key, as a ghost if it was not known, hung under its parent (a ghost too, if it was not known).
    pub fn find_or_insert(&mut self, namespace: NamespaceId, key: BlockKey, parent: BlockKey) -> NodeId {
        let node = self.find(namespace, &key).unwrap_or_else(|| self.insert(namespace, key));
        if self.node(node).parent == NodeId::NONE && !self.is_root(node) {
            let parent = self.find(namespace, &parent).unwrap_or_else(|| self.insert(namespace, parent));
            if !self.is_under(parent, node) {
                self.link(parent, node);
            }
        }
        node
    }

    /// Whether a block is another, or hangs under it. Keys come from clients, which may claim anything: in a ring nothing would ever be a
    /// leaf. A block without children is looked at once, so this costs nothing but where a chain is put together from its end.
    fn is_under(&self, node: NodeId, above: NodeId) -> bool {
        if self.node(above).first_child == NodeId::NONE {
            return node == above;
        }
        let parent = |&node: &NodeId| Some(self.node(node).parent).filter(|&parent| parent != NodeId::NONE);
        // A chain too long to be walked is taken for a ring: its parts are found all the same, and only evicted in another order.
        let mut chain = std::iter::successors(Some(node), parent);
        chain.by_ref().take(RING_STEPS_MAX).any(|node| node == above) || chain.next().is_some()
    }

    fn insert(&mut self, namespace: NamespaceId, key: BlockKey) -> NodeId {
        let node = Node {
            key,
            namespace,
            parent: NodeId::NONE,
            first_child: NodeId::NONE,
            next_sibling: NodeId::NONE,
            previous_sibling: NodeId::NONE,
            copies: [SlotId::NONE; 2],
            filling: SlotId::NONE,
            children: [0; 2],
            idle_children: 0,
            users: 0,
            writing: false,
            reused: false,
            pinned: false,
        };
        let id = self.free.pop().unwrap_or_else(|| {
            self.nodes.push(node);
            NodeId(self.nodes.len() as u32 - 1)
        });
        self.nodes[id.place()] = node;
        let seed = self.table_seed;
        let nodes = &self.nodes;
        self.table.insert_unique(hash(seed, namespace, &key), id, |node| {
            let node = &nodes[node.place()];
            hash(seed, node.namespace, &node.key)
        });
        id
    }

    fn link(&mut self, parent: NodeId, node: NodeId) {
        let sibling = std::mem::replace(&mut self.nodes[parent.place()].first_child, node);
        if sibling != NodeId::NONE {
            self.nodes[sibling.place()].previous_sibling = node;
        }
        let record = &mut self.nodes[node.place()];
        (record.parent, record.next_sibling) = (parent, sibling);
        self.count_child(parent, Held::default(), self.held(node));
    }

    /// A child of `parent` was held like this, and is held like that now.
    fn count_child(&mut self, parent: NodeId, before: Held, after: Held) {
        let record = &mut self.nodes[parent.place()];
        for (count, (before, after)) in record.children.iter_mut().zip(before.tiers.into_iter().zip(after.tiers)) {
            *count = *count + u32::from(after) - u32::from(before);
        }
        record.idle_children = record.idle_children + u32::from(after.idle) - u32::from(before.idle);
        self.reorder(parent);
    }

    /// Puts a node among the candidates of each tier, or takes it from there.
    fn reorder(&mut self, node: NodeId) {
        let record = self.nodes[node.place()];
        for place in [Place::Host, Place::Disk] {
            if record.copy(place).is_some() {
                self.orders[place.at()].set_leaf(node, record.is_leaf(place));
            }
        }
    }

    fn held(&self, node: NodeId) -> Held {
        let node = self.node(node);
        let on_host = node.copies[0] != SlotId::NONE;
        Held {
            tiers: [on_host || node.filling != SlotId::NONE, node.copies[1] != SlotId::NONE],
            idle: on_host && node.users == 0,
        }
    }

    /// The namespace's root: it has no bytes and is always there.
    pub fn is_root(&self, node: NodeId) -> bool {
        let node = self.node(node);
        node.key.tag() == self.namespaces.get(node.namespace).tag
    }

    /// Applies a change to a node's copies and keeps all counts right.
    fn change(&mut self, node: NodeId, change: impl FnOnce(&mut Node)) {
        let (before, was_present) = (self.held(node), self.node(node).is_present());
        change(&mut self.nodes[node.place()]);
        let (after, is_present) = (self.held(node), self.node(node).is_present());
        let Node { parent, namespace, .. } = *self.node(node);
        if parent != NodeId::NONE && before != after {
            self.count_child(parent, before, after);
        }
        self.reorder(node);
        let blocks = &mut self.namespaces.get_mut(namespace).blocks;
        *blocks = *blocks + u64::from(is_present) - u64::from(was_present);
        self.bury_or_forget(node);
    }

    /// A node without any copy is forgotten when nothing hangs under it, and dead with all below it otherwise.
    fn bury_or_forget(&mut self, node: NodeId) {
        let mut node = node;
        while node != NodeId::NONE && self.node(node).is_ghost() {
            if self.node(node).first_child != NodeId::NONE {
                if !self.is_root(node) {
                    self.dead.push(node);
                }
                return;
            }
            let parent = self.node(node).parent;
            self.forget(node);
            node = parent;
        }
    }

    /// Forgets a node that was looked up for a put that came to nothing.
    pub fn forget_if_unused(&mut self, node: NodeId) {
        if self.node(node).is_ghost() && self.node(node).first_child == NodeId::NONE {
            self.bury_or_forget(node);
        }
    }

    fn forget(&mut self, node: NodeId) {
        let Node { key, namespace, parent, next_sibling, previous_sibling, .. } = *self.node(node);
        if next_sibling != NodeId::NONE {
            self.nodes[next_sibling.place()].previous_sibling = previous_sibling;
        }
        if previous_sibling != NodeId::NONE {
            self.nodes[previous_sibling.place()].next_sibling = next_sibling;
        } else if parent != NodeId::NONE {
            self.nodes[parent.place()].first_child = next_sibling;
        }
        let found = self.table.find_entry(hash(self.table_seed, namespace, &key), |&id| id == node);
        found.expect("every node is in the table").remove();
        self.free.push(node);
    }

    /// A copy became readable: it enters the tier's order and watchers are told.
    pub fn publish(&mut self, node: NodeId, place: Place, slot: SlotId, shelf: ShelfId, block_bytes: u32, now_ms: u64) {
        assert!(self.node(node).copy(place).is_none(), "a tier holds one copy of a block");
        self.orders[place.at()].enter(node, shelf, false, now_ms);
        self.change(node, |node| node.copies[place.at()] = slot);
        self.blocks[place.at()] += 1;
        self.tell(node, place, true, block_bytes);
    }

    /// A copy lies elsewhere in its tier from now on: nobody is told.
    pub fn move_copy(&mut self, node: NodeId, place: Place, slot: SlotId, shelf: ShelfId, now_ms: u64) {
        self.orders[place.at()].leave(node);
        self.orders[place.at()].enter(node, shelf, false, now_ms);
        self.change(node, |node| node.copies[place.at()] = slot);
    }

    /// A copy leaves; returns its first slot. The node may be gone afterwards.
    pub fn withdraw(&mut self, node: NodeId, place: Place, block_bytes: u32) -> SlotId {
        let slot = self.node(node).copy(place).expect("only a copy that is there is withdrawn");
        self.orders[place.at()].leave(node);
        self.blocks[place.at()] -= 1;
        self.tell(node, place, false, block_bytes);
        self.change(node, |node| node.copies[place.at()] = SlotId::NONE);
        slot
    }

    /// Sets or clears the copy that is being filled. The node may be gone afterwards.
    pub fn set_filling(&mut self, node: NodeId, slot: SlotId) {
        self.change(node, |node| node.filling = slot);
    }

    fn tell(&mut self, node: NodeId, place: Place, present: bool, block_bytes: u32) {
        let Node { key, parent, namespace, .. } = *self.node(node);
        let parent = self.parent_key(parent);
        let record = self.namespaces.get(namespace);
        let event = Residency { key, parent, place, present, namespace: record.tag, block_bytes };
        self.events.push(record.tenant, event);
    }

    /// Key of a parent; zeros for none.
    pub fn parent_key(&self, parent: NodeId) -> BlockKey {
        if parent == NodeId::NONE { BlockKey::from_bytes([0; 32]) } else { self.node(parent).key }
    }

    /// A block was used, in every tier that holds it. Blocks of one chain are touched from the last to the first.
    pub fn touch(&mut self, node: NodeId, now_ms: u64) {
        for place in [Place::Host, Place::Disk] {
            if self.node(node).copy(place).is_some() {
                self.orders[place.at()].touch(node, now_ms);
            }
        }
    }

    /// The copy that should leave this shelf: the coldest that may go and that `free` finds unused. Those in front of it which may not
    /// go are moved behind, each once for every time they come to the front.
    pub fn victim(
        &mut self,
        place: Place,
        shelf: ShelfId,
        now_ms: u64,
        mut free: impl FnMut(NodeId, &Node) -> bool,
    ) -> Option<NodeId> {
        for _ in 0..limits::VICTIM_STEPS_MAX {
            let coldest = self.orders[place.at()].coldest(shelf)?;
            if self.may_go(coldest, place) && free(coldest, self.node(coldest)) {
                return Some(coldest);
            }
            self.orders[place.at()].touch(coldest, now_ms);
        }
        None
    }

    /// A block that may leave its tier, below one that may not because of it; or that one itself.
    pub fn leaf_below(&self, node: NodeId, place: Place) -> Option<NodeId> {
        let mut at = node;
        for _ in 0..limits::VICTIM_STEPS_MAX {
            if self.node(at).is_leaf(place) {
                return self.may_go(at, place).then_some(at);
            }
            let holds = |child: &NodeId| {
                let held = self.held(*child);
                if place == Place::Host { held.idle } else { held.tiers[Place::Disk.at()] }
            };
            at = self.children_of(at).take(limits::VICTIM_STEPS_MAX).find(holds)?;
        }
        None
    }

    fn children_of(&self, node: NodeId) -> impl Iterator<Item = NodeId> {
        let some = |node: NodeId| (node != NodeId::NONE).then_some(node);
        std::iter::successors(some(self.node(node).first_child), move |&child| some(self.node(child).next_sibling))
    }

    /// Whether a copy may leave its tier: nothing hangs on it there, and the union of the tiers stays closed. From host memory it may go
    /// although others hang on it: then it must be written to disk first ([`Index::is_needed`]).
    fn may_go(&self, node: NodeId, place: Place) -> bool {
        let node = self.node(node);
        let closed = place == Place::Host || node.copy(Place::Host).is_some() || node.children[Place::Host.at()] == 0;
        !node.pinned && node.is_leaf(place) && closed
    }

    /// Whether other blocks would be out of reach without this one.
    pub fn is_needed(&self, node: NodeId) -> bool {
        self.node(node).children != [0; 2]
    }

    /// Somebody begins to use a block's copy in host memory: it is no candidate until they are done.
    pub fn begin_use(&mut self, node: NodeId) {
        self.change(node, |node| node.users += 1);
    }

    /// That many are done with it.
    pub fn end_use(&mut self, node: NodeId, users: u32) {
        self.change(node, |node| node.users -= users);
    }

    /// When a shelf's coldest copy was used last.
    pub fn coldest_use_ms(&self, place: Place, shelf: ShelfId) -> Option<u64> {
        self.orders[place.at()].coldest_use_ms(shelf)
    }

    /// A block with a copy that no lookup can reach, if there is one.
    pub fn next_dead(&mut self) -> Option<NodeId> {
        for _ in 0..limits::VICTIM_STEPS_MAX {
            let ghost = *self.dead.last()?;
            let record = self.node(ghost);
            if !record.is_ghost() || record.first_child == NodeId::NONE || self.is_root(ghost) {
                self.dead.pop();
                continue;
            }
            let child = record.first_child;
            if self.node(child).is_present() && !self.node(child).pinned {
                return Some(child);
            }
            // A child that is being filled may bring the chain back to life; its siblings go by age like everything else.
            if self.node(child).is_ghost() {
                self.dead.push(child);
            } else {
                self.dead.pop();
            }
        }
        None
    }

    /// Blocks of a tenant that are present, from name `from` on; at most `count`, and where to go on.
    pub fn present(&self, tenant: TenantId, from: u32, count: usize) -> (Vec<NodeId>, Option<u32>) {
        let mut found = Vec::new();
        for (id, node) in (from..).zip(&self.nodes[(from as usize).min(self.nodes.len())..]) {
            if found.len() == count || id - from >= 64 * count as u32 {
                return (found, Some(id));
            }
            if self.is_in_use(NodeId(id)) && node.is_present() && self.namespaces.get(node.namespace).tenant == tenant {
                found.push(NodeId(id));
            }
        }
        (found, None)
    }

    /// Whether the name stands for a block: names are used again.
    pub fn is_in_use(&self, node: NodeId) -> bool {
        let record = self.node(node);
        self.find(record.namespace, &record.key) == Some(node)
    }

    fn range(&self, from: u32, to: u32) -> impl Iterator<Item = NodeId> {
        (from..to.min(self.end())).map(NodeId).filter(|&node| self.is_in_use(node))
    }

    /// Blocks with a name from `from` up to `to` that are in host memory.
    pub fn in_host(&self, from: u32, to: u32) -> Vec<NodeId> {
        self.range(from, to).filter(|&node| self.node(node).copy(Place::Host).is_some()).collect()
    }

    /// Blocks of a namespace with a name from `from` up to `to`.
    pub fn of_namespace(&self, namespace: NamespaceId, from: u32, to: u32) -> Vec<NodeId> {
        self.range(from, to).filter(|&node| self.node(node).namespace == namespace).collect()
    }

    /// Every invariant of this file, for tests: counts and orders derived anew from the nodes.
    pub fn check(&self, shelf_of: impl Fn(Place, SlotId) -> ShelfId) {
        let mut children = vec![([0u32; 2], 0u32); self.nodes.len()];
        for id in self.table.iter().copied() {
            let node = self.node(id);
            assert_eq!(self.find(node.namespace, &node.key), Some(id), "a node is found by its key");
            if node.parent != NodeId::NONE {
                let (counts, idle) = &mut children[node.parent.place()];
                let held = self.held(id);
                counts.iter_mut().zip(held.tiers).for_each(|(count, held)| *count += u32::from(held));
                *idle += u32::from(held.idle);
            }
            assert!(
                !node.is_ghost() || node.first_child != NodeId::NONE,
                "a node without copies or children is forgotten"
            );
            for place in [Place::Host, Place::Disk].into_iter().filter(|&place| node.is_leaf(place)) {
                if let Some(slot) = node.copy(place) {
                    let coldest = self.orders[place.at()].coldest(shelf_of(place, slot));
                    assert!(coldest.is_some(), "a leaf is among its shelf's candidates");
                }
            }
        }
        for id in self.table.iter().copied() {
            let node = self.node(id);
            assert_eq!((node.children, node.idle_children), children[id.place()], "children are counted");
        }
        assert_eq!(self.table.len(), self.count(), "free nodes are not in the table");
    }
}

#[cfg(test)]
mod tests;
