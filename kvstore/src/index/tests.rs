//! The index against a plain map, and the promises of its tree.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;
use tender_proto::{BlockLayout, Namespace, TenantSalt};

use super::*;

const SHELF: ShelfId = ShelfId(0);
const NODES: usize = 24;

fn index() -> (Index, NamespaceId, BlockKey) {
    let mut index = Index::new(1, 7);
    let namespace = Namespace::text("model", "bf16", 4);
    let root = namespace.root(&TenantSalt::PUBLIC);
    let attached = index.namespaces.attach(TenantId(0), namespace, BlockLayout::opaque(4096), root, |_| true);
    (index, attached.expect("the first namespace").0, root)
}

/// A chain of that many blocks.
fn chain(root: BlockKey, count: usize) -> Vec<BlockKey> {
    root.chain(&(0..4 * count as u32).collect::<Vec<_>>(), 4)
}

fn put(index: &mut Index, namespace: NamespaceId, key: BlockKey, parent: BlockKey, place: Place, slot: u32) -> NodeId {
    let node = index.find_or_insert(namespace, key, parent);
    index.publish(node, place, SlotId::new(0, slot), SHELF, 4096, u64::from(slot));
    node
}

fn leave(index: &mut Index, node: NodeId, place: Place) {
    index.withdraw(node, place, 4096);
}

fn victim(index: &mut Index, place: Place) -> Option<NodeId> {
    index.victim(place, SHELF, 1_000, |_, _| true)
}

#[derive(Clone, Debug)]
enum Step {
    Insert(usize),
    Publish(usize, bool),
    Withdraw(usize, bool),
    Fill(usize),
    Unfill(usize),
    Evict(bool),
    DropDead,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        (0..NODES).prop_map(Step::Insert),
        (0..NODES, any::<bool>()).prop_map(|(at, disk)| Step::Publish(at, disk)),
        (0..NODES, any::<bool>()).prop_map(|(at, disk)| Step::Withdraw(at, disk)),
        (0..NODES).prop_map(Step::Fill),
        (0..NODES).prop_map(Step::Unfill),
        any::<bool>().prop_map(Step::Evict),
        Just(Step::DropDead),
    ];
    prop::collection::vec(step, 1..200)
}

fn place(disk: bool) -> Place {
    if disk { Place::Disk } else { Place::Host }
}

/// The same as the index, as sets of places in a tree: the parent of `at` is `(at - 1) / 2`, that of 0 the root.
#[derive(Debug, Default)]
struct Model {
    copies: [BTreeSet<usize>; 2],
    filling: BTreeSet<usize>,
}

impl Model {
    fn parent(at: usize) -> Option<usize> {
        (at > 0).then(|| (at - 1) / 2)
    }

    fn held(&self, at: usize) -> bool {
        self.filling.contains(&at) || self.copies.iter().any(|copies| copies.contains(&at))
    }

    /// A node is there for itself or for what hangs under it.
    fn exists(&self, at: usize) -> bool {
        (0..NODES).filter(|&other| self.held(other)).any(|mut other| {
            loop {
                if other == at {
                    return true;
                }
                match Self::parent(other) {
                    Some(parent) => other = parent,
                    None => return false,
                }
            }
        })
    }

    fn children(&self, at: usize) -> impl Iterator<Item = usize> {
        (0..NODES).filter(move |&child| Self::parent(child) == Some(at))
    }

    /// Whether a copy may leave its tier while nobody uses anything.
    fn may_go(&self, at: usize, place: Place) -> bool {
        let on_host = |child: usize| self.copies[0].contains(&child) || self.filling.contains(&child);
        let closed = place == Place::Host || self.copies[0].contains(&at) || !self.children(at).any(on_host);
        closed && !self.children(at).any(|child| self.copies[place.at()].contains(&child))
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn it_is_a_map_of_what_was_published(steps in steps()) {
        let (mut index, namespace, root) = index();
        let mut keys: Vec<BlockKey> = Vec::new();
        for at in 0..NODES {
            let parent = Model::parent(at).map_or(root, |parent| keys[parent]);
            keys.push(parent.child(&[at as u32; 4], &[]));
        }
        let parent_of = |at: usize| Model::parent(at).map_or(root, |parent| keys[parent]);
        // A put names the whole chain, from its first block on.
        let insert = |index: &mut Index, at: usize| {
            let mut chain: Vec<usize> = std::iter::successors(Some(at), |&at| Model::parent(at)).collect();
            chain.reverse();
            let nodes = chain.into_iter().map(|at| index.find_or_insert(namespace, keys[at], parent_of(at)));
            nodes.last().expect("a chain ends with its last block")
        };
        let by_key: BTreeMap<BlockKey, usize> = keys.iter().copied().zip(0..).collect();
        let mut model = Model::default();
        for step in steps {
            match step {
                Step::Insert(at) => {
                    let node = insert(&mut index, at);
                    index.forget_if_unused(node);
                }
                Step::Publish(at, disk) if !model.copies[place(disk).at()].contains(&at) => {
                    let node = insert(&mut index, at);
                    index.publish(node, place(disk), SlotId::new(0, at as u32), SHELF, 4096, at as u64);
                    model.copies[place(disk).at()].insert(at);
                }
                Step::Withdraw(at, disk) if model.copies[place(disk).at()].contains(&at) => {
                    let node = index.find(namespace, &keys[at]).expect("it has a copy");
                    leave(&mut index, node, place(disk));
                    model.copies[place(disk).at()].remove(&at);
                }
                Step::Fill(at) if !model.filling.contains(&at) => {
                    let node = insert(&mut index, at);
                    index.set_filling(node, SlotId::new(1, at as u32));
                    model.filling.insert(at);
                }
                Step::Unfill(at) if model.filling.contains(&at) => {
                    let node = index.find(namespace, &keys[at]).expect("it is being filled");
                    index.set_filling(node, SlotId::NONE);
                    model.filling.remove(&at);
                }
                Step::Evict(disk) => {
                    let place = place(disk);
                    let Some(node) = victim(&mut index, place) else { continue };
                    let at = by_key[&index.node(node).key];
                    prop_assert!(model.copies[place.at()].contains(&at), "a victim has a copy");
                    prop_assert!(model.may_go(at, place), "victims are leaves, and leave the union of the tiers closed");
                    leave(&mut index, node, place);
                    model.copies[place.at()].remove(&at);
                }
                Step::DropDead => {
                    let Some(node) = index.next_dead() else { continue };
                    let at = by_key[&index.node(node).key];
                    let parent = Model::parent(at).expect("what hangs on the root is never dead");
                    prop_assert!(!model.held(parent), "only what cannot be reached is dead");
                    for place in [Place::Host, Place::Disk] {
                        if model.copies[place.at()].remove(&at) {
                            leave(&mut index, node, place);
                        }
                    }
                }
                _ => {}
            }
            index.check(|_, _| SHELF);
            for (at, key) in keys.iter().enumerate() {
                let node = index.find(namespace, key);
                prop_assert_eq!(node.is_some(), model.exists(at), "node {} at {:?}", at, &model);
                for place in [Place::Host, Place::Disk] {
                    let copy = node.and_then(|node| index.node(node).copy(place));
                    let expected = model.copies[place.at()].contains(&at).then(|| SlotId::new(0, at as u32));
                    prop_assert_eq!(copy, expected);
                }
            }
            let blocks = model.copies.each_ref().map(|copies| copies.len() as u64);
            prop_assert_eq!(index.blocks, blocks);
            let union = model.copies[0].union(&model.copies[1]).count() as u64;
            prop_assert_eq!(index.namespaces.get(namespace).blocks, union);
        }
    }
}

#[test]
fn a_chain_goes_from_its_leaf() {
    let (mut index, namespace, root) = index();
    let keys = chain(root, 4);
    let nodes: Vec<NodeId> = (0..4)
        .map(|at| {
            put(&mut index, namespace, keys[at], if at == 0 { root } else { keys[at - 1] }, Place::Host, at as u32)
        })
        .collect();
    for &node in nodes.iter().rev() {
        assert_eq!(victim(&mut index, Place::Host), Some(node), "the last block of the chain goes first");
        leave(&mut index, node, Place::Host);
    }
    assert_eq!(index.count(), 0, "nothing is left, not even the root");
}

#[test]
fn the_coldest_leaf_goes_first_and_a_used_one_stays() {
    let (mut index, namespace, root) = index();
    let nodes = [1u32, 2, 3].map(|at| put(&mut index, namespace, root.child(&[at], &[]), root, Place::Host, at));
    index.touch(nodes[0], 50);
    assert_eq!(victim(&mut index, Place::Host), Some(nodes[1]));
    let busy = nodes[1];
    assert_eq!(
        index.victim(Place::Host, SHELF, 60, |node, _| node != busy),
        Some(nodes[2]),
        "what is in use is passed over"
    );
}

#[test]
fn nothing_leaves_disk_while_a_child_is_in_memory_alone() {
    let (mut index, namespace, root) = index();
    let keys = chain(root, 2);
    let parent = put(&mut index, namespace, keys[0], root, Place::Disk, 0);
    let child = put(&mut index, namespace, keys[1], keys[0], Place::Host, 1);
    assert_eq!(victim(&mut index, Place::Disk), None, "the child would be out of reach");
    leave(&mut index, child, Place::Host);
    assert_eq!(victim(&mut index, Place::Disk), Some(parent));
}

#[test]
fn a_lost_block_buries_what_hangs_under_it_until_it_is_put_again() {
    let (mut index, namespace, root) = index();
    let keys = chain(root, 3);
    let nodes = [0, 1, 2].map(|at: usize| {
        put(&mut index, namespace, keys[at], if at == 0 { root } else { keys[at - 1] }, Place::Host, at as u32)
    });
    leave(&mut index, nodes[0], Place::Host);
    assert_eq!(index.next_dead(), Some(nodes[1]), "its child cannot be reached");
    put(&mut index, namespace, keys[0], root, Place::Host, 9);
    assert_eq!(index.next_dead(), None, "all is well again");
    leave(&mut index, nodes[0], Place::Host);
    leave(&mut index, nodes[1], Place::Host);
    assert_eq!(index.next_dead(), Some(nodes[2]), "a grandchild is found too");
}

#[test]
fn a_pinned_block_stays() {
    let (mut index, namespace, root) = index();
    let keys = chain(root, 2);
    let parent = put(&mut index, namespace, keys[0], root, Place::Host, 0);
    let child = put(&mut index, namespace, keys[1], keys[0], Place::Host, 1);
    index.node_mut(child).pinned = true;
    assert_eq!(victim(&mut index, Place::Host), None);
    leave(&mut index, parent, Place::Host);
    assert_eq!(index.next_dead(), None, "not even when it is dead");
}

#[test]
fn blocks_that_claim_to_be_each_others_parents_can_be_got_rid_of() {
    let (mut index, namespace, _) = index();
    let [one, other] = [1, 2].map(|byte| BlockKey::from_bytes([byte; 32]));
    let first = put(&mut index, namespace, one, other, Place::Host, 0);
    let second = put(&mut index, namespace, other, one, Place::Host, 1);
    let (mut left, mut steps) = (2, 0);
    while let Some(node) = victim(&mut index, Place::Host) {
        leave(&mut index, node, Place::Host);
        (left, steps) = (left - 1, steps + 1);
        assert!(steps <= 2, "each goes once");
    }
    assert_eq!((left, index.count()), (0, 0), "{first:?} and {second:?} leave nothing behind");
}

#[test]
fn events_are_numbered_and_a_gap_is_told() {
    let (mut index, namespace, root) = index();
    let node = put(&mut index, namespace, root.child(&[1], &[]), root, Place::Host, 0);
    leave(&mut index, node, Place::Host);
    let events = index.events.after(TenantId(0), 0, 10).expect("all are remembered");
    assert_eq!(events.iter().map(|event| event.present).collect::<Vec<_>>(), [true, false]);
    assert_eq!(index.events.after(TenantId(0), 1, 10).map(|events| events.len()), Some(1));
    assert_eq!(index.events.after(TenantId(0), 3, 10), None, "a number of the future is a gap");
    for _ in 0..limits::EVENTS_MAX {
        index.events.push(TenantId(0), events[0]);
    }
    assert_eq!(index.events.after(TenantId(0), 1, 10), None, "what is forgotten is a gap");
    assert!(index.events.after(TenantId(0), 2, 10).is_some());
}
