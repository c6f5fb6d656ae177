//! Sets of node slots that stay small when few nodes are in them and fast to ask when many are.

use crate::classes::Bits;

/// Beyond this many, a bit per node is smaller and faster than a list.
const LISTED: usize = 64;

/// A set of node slots.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum SlotSet {
    /// Sorted.
    Few(Vec<u32>),
    Many {
        bits: Bits,
        count: usize,
    },
}

impl Default for SlotSet {
    fn default() -> Self {
        Self::Few(Vec::new())
    }
}

impl SlotSet {
    pub(crate) fn insert(&mut self, slot: u32) {
        match self {
            Self::Few(list) => {
                if let Err(at) = list.binary_search(&slot) {
                    list.insert(at, slot);
                }
                if list.len() > LISTED {
                    let mut bits = Bits::default();
                    list.iter().for_each(|slot| bits.set(*slot));
                    *self = Self::Many { bits, count: LISTED + 1 };
                }
            }
            Self::Many { bits, count } => {
                *count += usize::from(!bits.get(slot));
                bits.set(slot);
            }
        }
    }

    pub(crate) fn remove(&mut self, slot: u32) {
        match self {
            Self::Few(list) => {
                if let Ok(at) = list.binary_search(&slot) {
                    list.remove(at);
                }
            }
            Self::Many { bits, count } => {
                *count -= usize::from(bits.get(slot));
                bits.clear(slot);
                // Half as many, so that a set at the border does not change its form with every change.
                if *count <= LISTED / 2 {
                    *self = Self::Few(bits.iter().collect());
                }
            }
        }
    }

    pub(crate) fn contains(&self, slot: u32) -> bool {
        match self {
            Self::Few(list) => list.binary_search(&slot).is_ok(),
            Self::Many { bits, .. } => bits.get(slot),
        }
    }

    pub(crate) fn len(&self) -> usize {
        match self {
            Self::Few(list) => list.len(),
            Self::Many { count, .. } => *count,
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// In ascending order.
    pub(crate) fn to_vec(&self) -> Vec<u32> {
        match self {
            Self::Few(list) => list.clone(),
            Self::Many { bits, .. } => bits.iter().collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn is_a_set(steps in prop::collection::vec((0u32..200, 0u8..4), 0..600)) {
            let (mut set, mut plain) = (SlotSet::default(), BTreeSet::new());
            for (at, (slot, kind)) in steps.iter().enumerate() {
                // Grows in the first half, shrinks in the second, so that both forms and both changes are met.
                if (at < steps.len() / 2) == (*kind > 0) {
                    set.insert(*slot);
                    plain.insert(*slot);
                } else {
                    set.remove(*slot);
                    plain.remove(slot);
                }
                prop_assert_eq!(set.len(), plain.len());
                prop_assert_eq!(set.contains(*slot), plain.contains(slot));
            }
            prop_assert_eq!(set.to_vec(), plain.into_iter().collect::<Vec<_>>());
        }
    }
}
