//! Ordered sets of nodes: a treap per class over one shared arena, indexed by node slot.
//!
//! Order is (free share of the scarcest resource, node id): fullest first. Every tree node also knows the most that is
//! free of each resource anywhere below it, so a search skips whole subtrees where nothing can fit. Priorities are a
//! hash of the node id, so the shape depends on the content only, not on the order of the operations.

use std::ops::ControlFlow;

use crate::amount::Amounts;

/// No node.
pub(crate) const NIL: u32 = u32::MAX;

/// cpu in thousandths, memory and disk in MiB, and the *joint* room of cpu and memory.
///
/// Rounded up and saturated to 32 bits, so that a leaf is one cache line: what fits is covered, what is covered may
/// still fail to fit by less than a MiB, and is checked exactly when it is visited.
///
/// A subtree that mixes nodes without cpu and nodes without memory looks roomy in both. The fourth number, the smaller
/// of the two in the common unit of 1 thousandth of a vCPU = 4 MiB, unmasks it: whoever fits has at least the joint
/// room that the request has joint need.
pub(crate) type Room = [u32; 4];

pub(crate) fn room(amounts: &Amounts) -> Room {
    let [cpu, memory, disk] = *amounts;
    let small = |amount: u64| u32::try_from(amount).unwrap_or(u32::MAX);
    let (cpu, memory, disk) = (small(cpu), small(memory.div_ceil(1 << 20)), small(disk.div_ceil(1 << 20)));
    [cpu, memory, disk, cpu.min(memory.div_ceil(4))]
}

fn covers(room: &Room, need: &Room) -> bool {
    room[0] >= need[0] && room[1] >= need[1] && room[2] >= need[2] && room[3] >= need[3]
}

#[derive(Debug, Clone, Copy)]
#[repr(align(64))]
struct Leaf {
    id: u128,
    key: u32,
    priority: u32,
    left: u32,
    right: u32,
    free: Room,
    most: Room,
}

/// The arena. A slot is in at most one tree at a time; roots are kept by the classes.
#[derive(Debug, Clone, Default)]
pub(crate) struct Forest {
    leaves: Vec<Leaf>,
}

impl Forest {
    /// Adds `slot` to the tree at `root` with the given order key, and returns the new root.
    pub(crate) fn add(&mut self, root: u32, slot: u32, id: u128, key: u32, free: &Amounts) -> u32 {
        let at = slot as usize;
        let free = room(free);
        let leaf = Leaf { id, key, priority: priority(id), left: NIL, right: NIL, free, most: free };
        if at >= self.leaves.len() {
            self.leaves.resize(at + 1, leaf);
        }
        self.leaves[at] = leaf;
        self.insert(root, slot)
    }

    /// Takes `slot` out of the tree at `root` (it must be there) and returns the new root.
    pub(crate) fn take(&mut self, root: u32, slot: u32) -> u32 {
        if root == NIL {
            return NIL;
        }
        if root == slot {
            let Leaf { left, right, .. } = self.leaves[slot as usize];
            return self.join(left, right);
        }
        if self.before(slot, root) {
            let left = self.take(self.leaves[root as usize].left, slot);
            self.leaves[root as usize].left = left;
        } else {
            let right = self.take(self.leaves[root as usize].right, slot);
            self.leaves[root as usize].right = right;
        }
        self.pull(root);
        root
    }

    /// The order key that `slot` was added with.
    pub(crate) fn key(&self, slot: u32) -> u32 {
        self.leaves[slot as usize].key
    }

    /// Visits the nodes with `low <= key <= high` that may have room, in order, until told to stop.
    pub(crate) fn ascend<F>(&self, root: u32, low: u32, high: u32, need: &Room, visit: &mut F) -> ControlFlow<()>
    where
        F: FnMut(u32) -> ControlFlow<()>,
    {
        if root == NIL {
            return ControlFlow::Continue(());
        }
        let leaf = &self.leaves[root as usize];
        if !covers(&leaf.most, need) {
            return ControlFlow::Continue(());
        }
        if leaf.key >= low {
            self.ascend(leaf.left, low, high, need, visit)?;
            if leaf.key <= high && covers(&leaf.free, need) {
                visit(root)?;
            }
        }
        if leaf.key <= high { self.ascend(leaf.right, low, high, need, visit) } else { ControlFlow::Continue(()) }
    }

    /// The largest key in `low..=high` of a node that may have room.
    pub(crate) fn last_key(&self, root: u32, low: u32, high: u32, need: &Room) -> Option<u32> {
        if root == NIL {
            return None;
        }
        let leaf = &self.leaves[root as usize];
        if !covers(&leaf.most, need) {
            return None;
        }
        if leaf.key <= high {
            if let Some(key) = self.last_key(leaf.right, low, high, need) {
                return Some(key);
            }
            if leaf.key >= low && covers(&leaf.free, need) {
                return Some(leaf.key);
            }
        }
        if leaf.key >= low { self.last_key(leaf.left, low, high, need) } else { None }
    }

    fn before(&self, a: u32, b: u32) -> bool {
        let (a, b) = (&self.leaves[a as usize], &self.leaves[b as usize]);
        (a.key, a.id) < (b.key, b.id)
    }

    fn above(&self, a: u32, b: u32) -> bool {
        let (a, b) = (&self.leaves[a as usize], &self.leaves[b as usize]);
        (a.priority, a.id) > (b.priority, b.id)
    }

    fn pull(&mut self, at: u32) {
        let Leaf { left, right, free, .. } = self.leaves[at as usize];
        let mut most = free;
        for child in [left, right] {
            if child != NIL {
                for (mine, theirs) in most.iter_mut().zip(self.leaves[child as usize].most) {
                    *mine = (*mine).max(theirs);
                }
            }
        }
        self.leaves[at as usize].most = most;
    }

    fn insert(&mut self, root: u32, slot: u32) -> u32 {
        if root == NIL {
            return slot;
        }
        if self.above(slot, root) {
            let (left, right) = self.split(root, slot);
            self.leaves[slot as usize].left = left;
            self.leaves[slot as usize].right = right;
            self.pull(slot);
            return slot;
        }
        if self.before(slot, root) {
            let left = self.insert(self.leaves[root as usize].left, slot);
            self.leaves[root as usize].left = left;
        } else {
            let right = self.insert(self.leaves[root as usize].right, slot);
            self.leaves[root as usize].right = right;
        }
        self.pull(root);
        root
    }

    /// Splits the tree into what comes before `slot` and what comes after.
    fn split(&mut self, root: u32, slot: u32) -> (u32, u32) {
        if root == NIL {
            return (NIL, NIL);
        }
        if self.before(root, slot) {
            let (left, right) = self.split(self.leaves[root as usize].right, slot);
            self.leaves[root as usize].right = left;
            self.pull(root);
            (root, right)
        } else {
            let (left, right) = self.split(self.leaves[root as usize].left, slot);
            self.leaves[root as usize].left = right;
            self.pull(root);
            (left, root)
        }
    }

    fn join(&mut self, left: u32, right: u32) -> u32 {
        if left == NIL {
            return right;
        }
        if right == NIL {
            return left;
        }
        if self.above(left, right) {
            let joined = self.join(self.leaves[left as usize].right, right);
            self.leaves[left as usize].right = joined;
            self.pull(left);
            left
        } else {
            let joined = self.join(left, self.leaves[right as usize].left);
            self.leaves[right as usize].left = joined;
            self.pull(right);
            right
        }
    }
}

fn priority(id: u128) -> u32 {
    crate::hash::hash_parts(id, &[]) as u32
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn listed(forest: &Forest, root: u32, low: u32, high: u32, need: &Room) -> Vec<u32> {
        let mut seen = Vec::new();
        let _ = forest.ascend(root, low, high, need, &mut |slot| {
            seen.push(slot);
            ControlFlow::Continue(())
        });
        seen
    }

    proptest! {
        #[test]
        fn finds_what_a_sorted_list_finds(
            entries in prop::collection::vec((0u32..20, 0u64..10, 0u64..10, any::<bool>()), 1..60),
            need in (0u64..10, 0u64..10), low in 0u32..20, span in 0u32..20,
        ) {
            let mut forest = Forest::default();
            let mut root = NIL;
            for (slot, (key, cpu, memory, _)) in entries.iter().enumerate() {
                root = forest.add(root, slot as u32, slot as u128, *key, &[*cpu, *memory << 22, 5]);
            }
            for (slot, entry) in entries.iter().enumerate() {
                if entry.3 {
                    root = forest.take(root, slot as u32);
                }
            }
            let high = low + span;
            let need_room = room(&[need.0, need.1 << 22, 0]);
            let mut expected: Vec<(u32, u32)> = entries.iter().enumerate()
                .filter(|(_, e)| !e.3 && e.1 >= need.0 && e.2 >= need.1 && (low..=high).contains(&e.0))
                .map(|(slot, e)| (e.0, slot as u32)).collect();
            expected.sort_unstable();
            prop_assert_eq!(forest.last_key(root, low, high, &need_room), expected.last().map(|e| e.0));
            let expected: Vec<u32> = expected.into_iter().map(|e| e.1).collect();
            prop_assert_eq!(listed(&forest, root, low, high, &need_room), expected);
        }

        #[test]
        fn the_shape_does_not_depend_on_history(keys in prop::collection::vec(0u32..50, 1..40)) {
            let (mut one, mut two) = (Forest::default(), Forest::default());
            let (mut a, mut b) = (NIL, NIL);
            for (slot, key) in keys.iter().enumerate() {
                a = one.add(a, slot as u32, slot as u128, *key, &[1, 1, 1]);
            }
            for (slot, key) in keys.iter().enumerate().rev() {
                b = two.add(b, slot as u32, slot as u128, 99 - *key, &[2, 2, 2]);
            }
            for (slot, key) in keys.iter().enumerate() {
                b = two.take(b, slot as u32);
                b = two.add(b, slot as u32, slot as u128, *key, &[1, 1, 1]);
            }
            prop_assert_eq!(a, b);
            for slot in 0..keys.len() {
                let (x, y) = (&one.leaves[slot], &two.leaves[slot]);
                prop_assert_eq!((x.left, x.right, x.most), (y.left, y.right, y.most));
            }
        }
    }
}
