//! The world: nodes and what is placed on them, indexed as it changes.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::amount::{Amounts, PPM, Resource, Resources, Round, format_amount, tightness};
use crate::classes::{Classes, Tags};
use crate::groups::Groups;
use crate::hash::FastMap;
use crate::ids::{InstanceId, NodeId, ProjectId};
use crate::instances::Instances;
use crate::node::NodeSpec;
use crate::request::Request;
use crate::slots::SlotSet;
use crate::tree::{Forest, NIL};

/// Why a change to the world was refused; the world is as it was.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WorldError {
    /// The node is not known.
    #[error("node {0} is not known")]
    UnknownNode(NodeId),
    /// The node still has instances.
    #[error("node {node} still has {instances} instances; move or delete them first")]
    NodeInUse {
        /// Its name.
        node: Arc<str>,
        /// How many.
        instances: u32,
    },
    /// The instance is placed already.
    #[error("instance {instance} is already placed on {node}")]
    AlreadyPlaced {
        /// The instance.
        instance: InstanceId,
        /// The name of the node it is on.
        node: Arc<str>,
    },
    /// The instance is not placed.
    #[error("instance {0} is not placed")]
    NotPlaced(InstanceId),
    /// The node has too little left.
    #[error("{resource} {} asked, {} free on {node}", format_amount(*resource, *asked, Round::Up), format_amount(*resource, *free, Round::Down))]
    DoesNotFit {
        /// The name of the node.
        node: Arc<str>,
        /// The resource that runs out.
        resource: Resource,
        /// Milli-vCPUs or bytes.
        asked: u64,
        /// Milli-vCPUs or bytes.
        free: u64,
    },
    /// The sum of what is placed cannot be counted in 64 bits.
    #[error("{resource} placed on {node} exceeds what can be counted")]
    Overflow {
        /// The name of the node.
        node: Arc<str>,
        /// The resource.
        resource: Resource,
    },
}

/// An instance on a node.
#[derive(Debug, Clone, Copy)]
pub struct Placement<'a> {
    /// The instance.
    pub instance: InstanceId,
    /// The node.
    pub node: NodeId,
    /// The project of the instance.
    pub project: ProjectId,
    /// The labels of the instance.
    pub labels: &'a BTreeMap<String, String>,
    /// What it takes.
    pub resources: Resources,
}

impl Request {
    /// This request, placed on `node`.
    #[must_use]
    pub fn placed_on(&self, node: NodeId) -> Placement<'_> {
        Placement { instance: self.id, node, project: self.project, labels: &self.labels, resources: self.resources }
    }
}

/// How full a node is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Usage {
    /// The most that may be promised (allocatable x overcommit): milli-vCPUs, bytes, bytes.
    pub limit: [u64; 3],
    /// What is promised.
    pub used: [u64; 3],
    /// Instances on the node.
    pub instances: u32,
}

impl Usage {
    /// What can still be promised.
    #[must_use]
    pub fn free(&self) -> [u64; 3] {
        let mut free = self.limit;
        for (free, used) in free.iter_mut().zip(self.used) {
            *free = free.saturating_sub(used);
        }
        free
    }
}

#[derive(Debug, Clone)]
pub(crate) struct Node {
    /// As in `spec`; passes over all nodes stay within this array.
    pub(crate) id: NodeId,
    pub(crate) zone: u32,
    pub(crate) spec: Arc<NodeSpec>,
    pub(crate) tags: Arc<Tags>,
    pub(crate) class: u32,
    pub(crate) usage: Usage,
}

/// The index. Cheap to change (logarithmic in the number of nodes), cheap to ask; see [`crate::decide`].
///
/// Two operations cost more, and are rare: an [`upsert_node`](Self::upsert_node) that changes the zone of a node with
/// instances visits every label group, and one that gives a label key its seventeenth value visits every node, once
/// per key.
#[derive(Debug, Clone)]
pub struct World {
    pub(crate) nodes: Vec<Option<Node>>,
    vacant: Vec<u32>,
    pub(crate) by_id: FastMap<NodeId, u32>,
    /// One tree per class.
    pub(crate) forest: Forest,
    /// One tree of all nodes that are ready, for requests that most of them pass.
    pub(crate) ready: Forest,
    pub(crate) ready_root: u32,
    pub(crate) ready_count: usize,
    pub(crate) classes: Classes,
    pub(crate) groups: Groups,
    pub(crate) instances: Instances,
    /// Volume or image → nodes that have it.
    pub(crate) holders: FastMap<Held, SlotSet>,
}

/// Something whose presence on a node matters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Held {
    Volume(u128),
    Image(u128),
}

pub(crate) fn held(spec: &NodeSpec) -> impl Iterator<Item = Held> + '_ {
    let volumes = spec.volumes.iter().map(|volume| Held::Volume(volume.0));
    volumes.chain(spec.images.iter().map(|image| Held::Image(image.0)))
}

impl Default for World {
    fn default() -> Self {
        Self::new()
    }
}

impl World {
    /// Without nodes.
    #[must_use]
    pub fn new() -> Self {
        Self {
            nodes: Vec::new(),
            vacant: Vec::new(),
            by_id: FastMap::default(),
            forest: Forest::default(),
            ready: Forest::default(),
            ready_root: NIL,
            ready_count: 0,
            classes: Classes::default(),
            groups: Groups::default(),
            instances: Instances::default(),
            holders: FastMap::default(),
        }
    }

    /// Adds a node, or replaces what is known about it; what is placed on it stays placed, also when the node shrank
    /// below it (then nothing more fits until enough has left).
    pub fn upsert_node(&mut self, spec: NodeSpec) {
        let tags = Arc::new(self.classes.tags(&spec));
        let limit = spec.limits();
        let (slot, usage) = match self.by_id.get(&spec.id).copied() {
            Some(slot) => {
                let old = self.detach(slot);
                if old.zone != tags.zone && old.usage.instances > 0 {
                    self.groups.moved(slot, old.zone, tags.zone);
                }
                (slot, Usage { limit, ..old.usage })
            }
            None => (self.vacant_slot(), Usage { limit, used: [0; 3], instances: 0 }),
        };
        for key in self.classes.count_labels(slot, &tags) {
            self.class_again(key, slot);
        }
        for item in held(&spec) {
            self.holders.entry(item).or_default().insert(slot);
        }
        self.by_id.insert(spec.id, slot);
        let class = self.classes.join(&tags);
        self.nodes[slot as usize] =
            Some(Node { id: spec.id, zone: tags.zone, spec: Arc::new(spec), tags, class, usage });
        self.enter_trees(slot);
    }

    /// Forgets a node without instances.
    ///
    /// # Errors
    /// When the node is not known, or has instances.
    pub fn remove_node(&mut self, id: NodeId) -> Result<(), WorldError> {
        let slot = self.slot(id)?;
        let node = self.at(slot);
        if node.usage.instances > 0 {
            return Err(WorldError::NodeInUse { node: Arc::clone(&node.spec.name), instances: node.usage.instances });
        }
        self.detach(slot);
        self.by_id.remove(&id);
        self.vacant.push(slot);
        Ok(())
    }

    /// Reserves room for an instance.
    ///
    /// Checks resources only: that the other conditions hold is what [`crate::decide`] is for.
    ///
    /// # Errors
    /// When the node is not known or has too little left, or when the instance is placed already.
    pub fn place(&mut self, placement: Placement<'_>) -> Result<(), WorldError> {
        let slot = self.slot(placement.node)?;
        self.check_room(slot, placement.resources.amounts())?;
        self.adopt(placement)
    }

    /// Records what is a fact already: an instance that runs on a node, even where it exceeds the limits (after the
    /// node shrank, or overcommit was lowered).
    ///
    /// # Errors
    /// When the node is not known, the instance is placed already, or the sum overflows.
    pub fn adopt(&mut self, placement: Placement<'_>) -> Result<(), WorldError> {
        let slot = self.slot(placement.node)?;
        if let Some(placed) = self.instances.get(placement.instance) {
            let node = Arc::clone(&self.at(placed.node).spec.name);
            return Err(WorldError::AlreadyPlaced { instance: placement.instance, node });
        }
        let node = self.at(slot);
        let used = plus(node, placement.resources.amounts())?;
        let (zone, count) = (node.zone, node.usage.instances + 1);
        self.set_used(slot, used, count);
        let group = self.groups.acquire(placement.project, placement.labels);
        if !self.instances.insert(placement.instance, slot, placement.resources, group) {
            self.groups.release(group);
        }
        self.groups.arrived(group, slot, zone);
        Ok(())
    }

    /// Gives the room of an instance back, and returns where it was.
    ///
    /// # Errors
    /// When the instance is not placed.
    pub fn unplace(&mut self, instance: InstanceId) -> Result<NodeId, WorldError> {
        let (placed, shape, last) = self.instances.remove(instance).ok_or(WorldError::NotPlaced(instance))?;
        let node = self.at(placed.node);
        let (id, zone) = (node.id, node.zone);
        let (used, count) = (minus(node.usage.used, shape.resources.amounts()), node.usage.instances - 1);
        self.set_used(placed.node, used, count);
        self.groups.left(shape.group, placed.node, zone);
        if last {
            self.groups.release(shape.group);
        }
        Ok(id)
    }

    /// Changes what an instance takes, on the node where it is.
    ///
    /// # Errors
    /// When the instance is not placed, or the node has too little left; then nothing changed.
    pub fn resize(&mut self, instance: InstanceId, resources: Resources) -> Result<(), WorldError> {
        let placed = self.instances.get(instance).ok_or(WorldError::NotPlaced(instance))?;
        let shape = *self.instances.shape(placed.shape);
        let without = minus(self.at(placed.node).usage.used, shape.resources.amounts());
        let count = self.at(placed.node).usage.instances;
        let (asked, had) = (resources.amounts(), shape.resources.amounts());
        let limit = self.at(placed.node).usage.limit;
        for resource in Resource::ALL {
            let at = resource as usize;
            let free = limit[at].saturating_sub(without[at]);
            if asked[at] > had[at] && asked[at] > free {
                let node = Arc::clone(&self.at(placed.node).spec.name);
                return Err(WorldError::DoesNotFit { node, resource, asked: asked[at], free });
            }
        }
        // No overflow: what grows fits below its limit, what does not grow was counted before.
        let mut used = without;
        for (used, asked) in used.iter_mut().zip(asked) {
            *used = used.saturating_add(asked);
        }
        self.set_used(placed.node, used, count);
        // Held across the change of shape, so that the group never runs out of users in between.
        self.groups.hold(shape.group);
        if self.instances.remove(instance).is_some_and(|(_, _, last)| last) {
            self.groups.release(shape.group);
        }
        if !self.instances.insert(instance, placed.node, resources, shape.group) {
            self.groups.release(shape.group);
        }
        Ok(())
    }

    /// A copy for trying things out. Shares the groups and leaves the list of instances behind: it costs time
    /// proportional to the nodes and groups, not to the instances. Instances of the original cannot be unplaced in it.
    #[must_use]
    pub(crate) fn fork(&self) -> Self {
        Self {
            nodes: self.nodes.clone(),
            vacant: self.vacant.clone(),
            by_id: self.by_id.clone(),
            forest: self.forest.clone(),
            ready: self.ready.clone(),
            ready_root: self.ready_root,
            ready_count: self.ready_count,
            classes: self.classes.clone(),
            groups: self.groups.clone(),
            instances: Instances::default(),
            holders: self.holders.clone(),
        }
    }

    /// Nodes known.
    #[must_use]
    pub fn node_count(&self) -> usize {
        self.by_id.len()
    }

    /// Instances placed.
    #[must_use]
    pub fn instance_count(&self) -> usize {
        self.instances.len()
    }

    /// Kinds of nodes that conditions can tell apart; what a decision costs grows with this, not with the nodes.
    #[must_use]
    pub fn class_count(&self) -> usize {
        self.classes.len()
    }

    /// What was said about a node.
    #[must_use]
    pub fn node(&self, id: NodeId) -> Option<&NodeSpec> {
        Some(&self.at(*self.by_id.get(&id)?).spec)
    }

    /// How full a node is.
    #[must_use]
    pub fn usage(&self, id: NodeId) -> Option<Usage> {
        Some(self.at(*self.by_id.get(&id)?).usage)
    }

    /// Where an instance is, and what it takes.
    #[must_use]
    pub fn instance(&self, id: InstanceId) -> Option<(NodeId, Resources)> {
        let placed = self.instances.get(id)?;
        Some((self.at(placed.node).id, self.instances.shape(placed.shape).resources))
    }

    /// All nodes, in no particular order.
    pub fn nodes(&self) -> impl Iterator<Item = (&NodeSpec, Usage)> {
        self.nodes.iter().flatten().map(|node| (&*node.spec, node.usage))
    }

    pub(crate) fn live(&self) -> impl Iterator<Item = (u32, &Node)> {
        self.nodes.iter().enumerate().filter_map(|(slot, node)| Some((slot as u32, node.as_ref()?)))
    }

    pub(crate) fn at(&self, slot: u32) -> &Node {
        self.nodes[slot as usize].as_ref().expect("slots in the indexes belong to live nodes")
    }

    fn slot(&self, id: NodeId) -> Result<u32, WorldError> {
        self.by_id.get(&id).copied().ok_or(WorldError::UnknownNode(id))
    }

    fn vacant_slot(&mut self) -> u32 {
        self.vacant.pop().unwrap_or_else(|| {
            self.nodes.push(None);
            (self.nodes.len() - 1) as u32
        })
    }

    fn check_room(&self, slot: u32, asked: Amounts) -> Result<(), WorldError> {
        let node = self.at(slot);
        let free = node.usage.free();
        for resource in Resource::ALL {
            let at = resource as usize;
            if asked[at] > free[at] {
                let node = Arc::clone(&node.spec.name);
                return Err(WorldError::DoesNotFit { node, resource, asked: asked[at], free: free[at] });
            }
        }
        Ok(())
    }

    fn enter_trees(&mut self, slot: u32) {
        let node = self.at(slot);
        let (id, class, free) = (node.id.0, node.class, node.usage.free());
        let (key, _) = tightness(&free, &node.usage.limit);
        debug_assert!(key <= PPM);
        let ready = node.tags.ready;
        let root = self.classes.get(class).root;
        self.classes.get_mut(class).root = self.forest.add(root, slot, id, key, &free);
        if ready {
            self.ready_root = self.ready.add(self.ready_root, slot, id, key, &free);
            self.ready_count += 1;
        }
    }

    fn leave_trees(&mut self, slot: u32) {
        let (class, ready) = (self.at(slot).class, self.at(slot).tags.ready);
        let root = self.classes.get(class).root;
        self.classes.get_mut(class).root = self.forest.take(root, slot);
        if ready {
            self.ready_root = self.ready.take(self.ready_root, slot);
            self.ready_count -= 1;
        }
    }

    fn set_used(&mut self, slot: u32, used: Amounts, instances: u32) {
        self.leave_trees(slot);
        if let Some(node) = &mut self.nodes[slot as usize] {
            node.usage.used = used;
            node.usage.instances = instances;
        }
        self.enter_trees(slot);
    }

    /// Takes a node out of every index and returns it; the slot is empty then.
    fn detach(&mut self, slot: u32) -> Node {
        self.leave_trees(slot);
        let node = self.nodes[slot as usize].take().expect("the caller looked the slot up by id");
        self.classes.leave(node.class);
        self.classes.discount_labels(slot, &node.tags);
        for item in held(&node.spec) {
            if let Some(slots) = self.holders.get_mut(&item) {
                slots.remove(slot);
                if slots.is_empty() {
                    self.holders.remove(&item);
                }
            }
        }
        node
    }

    /// A label key became wide: its nodes (but `except`, which is not in the index now) move to other classes.
    fn class_again(&mut self, key: u32, except: u32) {
        for slot in 0..self.nodes.len() as u32 {
            if slot == except || self.nodes[slot as usize].is_none() {
                continue;
            }
            let tags = Arc::clone(&self.at(slot).tags);
            if !self.classes.widen(key, slot, &tags) {
                continue;
            }
            self.leave_trees(slot);
            self.classes.leave(self.at(slot).class);
            let class = self.classes.join(&tags);
            if let Some(node) = &mut self.nodes[slot as usize] {
                node.class = class;
            }
            self.enter_trees(slot);
        }
    }
}

fn plus(node: &Node, more: Amounts) -> Result<Amounts, WorldError> {
    let mut sum = node.usage.used;
    for resource in Resource::ALL {
        let at = resource as usize;
        sum[at] = sum[at]
            .checked_add(more[at])
            .ok_or_else(|| WorldError::Overflow { node: Arc::clone(&node.spec.name), resource })?;
    }
    Ok(sum)
}

fn minus(mut used: Amounts, less: Amounts) -> Amounts {
    for (used, less) in used.iter_mut().zip(less) {
        *used = used.saturating_sub(less);
    }
    used
}
