//! Classes: nodes that no condition on state, zone, isolation, features or labels can tell apart.
//!
//! Per attribute (a zone, a label, a feature, ...) there is a bit set of the classes that have it, so conditions
//! are evaluated for 64 classes at a time. A label key with many values (a host name, a rack) would make every node a
//! class of its own; beyond [`WIDE`] values its values leave the class and are kept as lists of nodes instead. A key
//! that became wide stays wide: it costs a list, and flapping would cost a pass over its nodes.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::hash::FastMap;
use crate::node::{Isolation, NodeSpec, NodeState};
use crate::slots::SlotSet;
use crate::tree::NIL;

/// The most values of a label key that are worth classes of their own.
pub(crate) const WIDE: usize = 16;

/// Stands for any value of a wide key in a class.
const ANY: u32 = u32::MAX;

/// A growing set of small numbers.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Bits(Vec<u64>);

impl Bits {
    pub(crate) fn set(&mut self, at: u32) {
        let word = at as usize / 64;
        if word >= self.0.len() {
            self.0.resize(word + 1, 0);
        }
        self.0[word] |= 1 << (at % 64);
    }

    pub(crate) fn clear(&mut self, at: u32) {
        if let Some(word) = self.0.get_mut(at as usize / 64) {
            *word &= !(1 << (at % 64));
        }
    }

    pub(crate) fn get(&self, at: u32) -> bool {
        self.word(at as usize / 64) >> (at % 64) & 1 == 1
    }

    pub(crate) fn word(&self, at: usize) -> u64 {
        self.0.get(at).copied().unwrap_or(0)
    }

    fn is_empty(&self) -> bool {
        self.0.iter().all(|word| *word == 0)
    }

    pub(crate) fn words(&self) -> usize {
        self.0.len()
    }

    pub(crate) fn from_words(words: Vec<u64>) -> Self {
        Self(words)
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = u32> + '_ {
        self.0.iter().enumerate().flat_map(|(at, word)| {
            let mut rest = *word;
            std::iter::from_fn(move || {
                let bit = (rest != 0).then(|| rest.trailing_zeros())?;
                rest &= rest - 1;
                Some(at as u32 * 64 + bit)
            })
        })
    }
}

/// Something that a class has or lacks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Attribute {
    Ready,
    Zone(u32),
    Isolation(Isolation),
    Feature(u32),
    Label(u32, u32),
    Key(u32),
}

/// The attributes of a node, with interned names.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Tags {
    pub(crate) ready: bool,
    pub(crate) zone: u32,
    isolations: Box<[Isolation]>,
    features: Box<[u32]>,
    labels: Box<[(u32, u32)]>,
}

impl Tags {
    fn attributes(&self) -> impl Iterator<Item = Attribute> + '_ {
        let ready = self.ready.then_some(Attribute::Ready);
        let labels = self.labels.iter().flat_map(|(key, value)| {
            [Some(Attribute::Key(*key)), (*value != ANY).then_some(Attribute::Label(*key, *value))]
        });
        ready
            .into_iter()
            .chain([Attribute::Zone(self.zone)])
            .chain(self.isolations.iter().copied().map(Attribute::Isolation))
            .chain(self.features.iter().copied().map(Attribute::Feature))
            .chain(labels.flatten())
    }

    fn has_key(&self, key: u32) -> bool {
        self.labels.iter().any(|(k, _)| *k == key)
    }
}

#[derive(Debug, Clone)]
pub(crate) struct Class {
    pub(crate) tags: Tags,
    /// The tree of its nodes.
    pub(crate) root: u32,
    pub(crate) members: u32,
}

#[derive(Debug, Clone, Default)]
pub(crate) struct Classes {
    names: FastMap<Arc<str>, u32>,
    slots: Vec<Option<Class>>,
    vacant: Vec<u32>,
    by_tags: FastMap<Tags, u32>,
    bits: FastMap<Attribute, Bits>,
    /// Key → value → nodes that have it; narrow keys only.
    values: FastMap<u32, BTreeMap<u32, u32>>,
    /// Key → value → the nodes that have it; wide keys only.
    wide: FastMap<u32, FastMap<u32, SlotSet>>,
}

impl Classes {
    /// The number of a name; names of zones, features and node labels are few and live long, so they are kept.
    fn intern(&mut self, name: &str) -> u32 {
        if let Some(known) = self.names.get(name) {
            return *known;
        }
        let fresh = self.names.len() as u32;
        self.names.insert(name.into(), fresh);
        fresh
    }

    /// The number of a name, if any node ever used it.
    pub(crate) fn name(&self, name: &str) -> Option<u32> {
        self.names.get(name).copied()
    }

    pub(crate) fn tags(&mut self, spec: &NodeSpec) -> Tags {
        let mut labels: Vec<(u32, u32)> =
            spec.labels.iter().map(|(key, value)| (self.intern(key), self.intern(value))).collect();
        labels.sort_unstable();
        let mut features: Vec<u32> = spec.features.iter().map(|feature| self.intern(feature)).collect();
        features.sort_unstable();
        Tags {
            ready: spec.state == NodeState::Ready,
            zone: self.intern(&spec.zone),
            isolations: Isolation::ALL.into_iter().filter(|isolation| spec.offers(*isolation)).collect(),
            features: features.into(),
            labels: labels.into(),
        }
    }

    /// Counts the labels of a node. Returns the keys that became wide by it: their nodes must be classed again.
    pub(crate) fn count_labels(&mut self, slot: u32, tags: &Tags) -> Vec<u32> {
        let mut widened = Vec::new();
        for (key, value) in &tags.labels {
            if let Some(values) = self.wide.get_mut(key) {
                values.entry(*value).or_default().insert(slot);
                continue;
            }
            let values = self.values.entry(*key).or_default();
            *values.entry(*value).or_default() += 1;
            if values.len() > WIDE {
                self.values.remove(key);
                let mut values = FastMap::<u32, SlotSet>::default();
                values.entry(*value).or_default().insert(slot);
                self.wide.insert(*key, values);
                widened.push(*key);
            }
        }
        widened
    }

    /// Adds a node to the list of a key that has just become wide. False when the node does not have the key.
    pub(crate) fn widen(&mut self, key: u32, slot: u32, tags: &Tags) -> bool {
        for (_, value) in tags.labels.iter().filter(|(k, _)| *k == key) {
            self.wide.entry(key).or_default().entry(*value).or_default().insert(slot);
        }
        tags.has_key(key)
    }

    pub(crate) fn discount_labels(&mut self, slot: u32, tags: &Tags) {
        for (key, value) in &tags.labels {
            if let Some(values) = self.wide.get_mut(key) {
                if let Some(nodes) = values.get_mut(value) {
                    nodes.remove(slot);
                    if nodes.is_empty() {
                        values.remove(value);
                    }
                }
            } else if let Some(values) = self.values.get_mut(key) {
                if let Some(count) = values.get_mut(value) {
                    *count -= 1;
                    if *count == 0 {
                        values.remove(value);
                    }
                }
                if values.is_empty() {
                    self.values.remove(key);
                }
            }
        }
    }

    /// The class of a node with these tags, made when missing; adds one member.
    pub(crate) fn join(&mut self, tags: &Tags) -> u32 {
        let mut tags = tags.clone();
        for (key, value) in &mut tags.labels {
            if self.wide.contains_key(key) {
                *value = ANY;
            }
        }
        if let Some(known) = self.by_tags.get(&tags).copied() {
            self.get_mut(known).members += 1;
            return known;
        }
        let id = self.vacant.pop().unwrap_or_else(|| {
            self.slots.push(None);
            (self.slots.len() - 1) as u32
        });
        for attribute in tags.attributes() {
            self.bits.entry(attribute).or_default().set(id);
        }
        self.by_tags.insert(tags.clone(), id);
        self.slots[id as usize] = Some(Class { tags, root: NIL, members: 1 });
        id
    }

    /// Takes one member away; the last one takes the class with it. The node must be out of the tree already.
    pub(crate) fn leave(&mut self, id: u32) {
        let class = self.get_mut(id);
        class.members -= 1;
        if class.members > 0 {
            return;
        }
        let Some(class) = self.slots[id as usize].take() else { return };
        self.vacant.push(id);
        self.by_tags.remove(&class.tags);
        for attribute in class.tags.attributes() {
            if let Some(bits) = self.bits.get_mut(&attribute) {
                bits.clear(id);
                if bits.is_empty() {
                    self.bits.remove(&attribute);
                }
            }
        }
    }

    pub(crate) fn get(&self, id: u32) -> &Class {
        self.slots[id as usize].as_ref().expect("a node or a bit set refers to this class, so it has members")
    }

    pub(crate) fn get_mut(&mut self, id: u32) -> &mut Class {
        self.slots[id as usize].as_mut().expect("a node refers to this class, so it has members")
    }

    pub(crate) fn bits(&self, attribute: Attribute) -> Option<&Bits> {
        self.bits.get(&attribute)
    }

    /// The nodes with this label, when its key is wide.
    pub(crate) fn wide_nodes(&self, key: u32, value: u32) -> Option<&SlotSet> {
        self.wide.get(&key)?.get(&value)
    }

    pub(crate) fn is_wide(&self, key: u32) -> bool {
        self.wide.contains_key(&key)
    }

    pub(crate) fn len(&self) -> usize {
        self.by_tags.len()
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (u32, &Class)> {
        self.slots.iter().enumerate().filter_map(|(id, class)| Some((id as u32, class.as_ref()?)))
    }

    /// Do the bit sets say about this class exactly what its tags say?
    pub(crate) fn bits_agree(&self, id: u32) -> bool {
        let tags = &self.get(id).tags;
        let has: Vec<Attribute> = tags.attributes().collect();
        has.iter().all(|attribute| self.bits.get(attribute).is_some_and(|bits| bits.get(id)))
            && self.bits.values().filter(|bits| bits.get(id)).count() == has.len()
    }
}
