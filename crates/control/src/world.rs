//! The scheduler's world, kept up with the mirrors instead of being built for every plan.
//!
//! What a plan tries out in it ([`LiveWorld::place`]) is taken back before the next one: whether it was committed is told by the mirrors
//! alone, so a commit that failed, or whose outcome nobody knows, leaves no trace here.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use oblak_model::{Image, ImageId, Instance, Node, NodeId, Timestamp, Volume};
use oblak_scheduler as s;
use oblak_store::Prefix;
use oblak_store::cache::{CacheChange, Item, Notice, Subscription};
use uuid::Uuid;

use crate::caches::Caches;
use crate::lifecycle::{build_world, image_nodes, node_spec, places_of};

/// What has come since the last look, of each kind.
struct Subscriptions {
    nodes: Subscription<Node>,
    instances: Subscription<Instance>,
    volumes: Subscription<Volume>,
    images: Subscription<Image>,
}

/// In builds with assertions the world is compared with one built anew so often.
const AUDIT_EVERY: u64 = 32;

/// Some of what came cannot be applied as a difference: everything is read again.
struct Again;

/// The order in which instances are placed: the oldest first.
pub type Turn = (Timestamp, Uuid);

/// Which nodes have a volume or an image.
type Holders = BTreeMap<Uuid, BTreeSet<Uuid>>;

/// The world as of one revision of the mirrors, and which instances wait for a node.
#[derive(Default)]
pub struct LiveWorld {
    world: s::World,
    pending: BTreeMap<Turn, Arc<Item<Instance>>>,
    images: BTreeMap<ImageId, Arc<Item<Image>>>,
    /// Per node.
    volumes_on: Holders,
    images_on: Holders,
    /// Places on nodes that do not exist; they count again when their node comes back.
    strays: BTreeSet<s::InstanceId>,
    /// What the last plan placed, and what it moved: those as they are in the mirrors.
    tried: Vec<s::InstanceId>,
    moved: Vec<Instance>,
    subscriptions: Option<Subscriptions>,
    /// How often everything was read, and how often it was caught up with.
    rebuilt: u64,
    caught_up: u64,
}

impl std::fmt::Debug for LiveWorld {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (nodes, instances) = (self.world.node_count(), self.world.instance_count());
        write!(f, "LiveWorld({nodes} nodes, {instances} instances, {} pending)", self.pending.len())
    }
}

impl LiveWorld {
    /// Takes back what the last plan tried, and takes in what has changed since. The caller holds the mirrors.
    pub fn catch_up(&mut self, caches: &Caches) {
        for instance in std::mem::take(&mut self.tried) {
            // The mirrors may have moved on, but not this world: what was tried is still there.
            let _ = self.world.unplace(instance);
        }
        for instance in std::mem::take(&mut self.moved) {
            for place in places_of(&instance) {
                let _ = self.world.unplace(place.instance);
            }
            self.adopt(&instance);
        }
        if self.take_in(caches).is_err() {
            self.rebuild(caches);
        }
        self.caught_up += 1;
        if cfg!(debug_assertions) && self.caught_up.is_multiple_of(AUDIT_EVERY) {
            // Tests and simulations stop here; the product has no time for it.
            assert_eq!(self.audit(caches), Ok(()), "the scheduler's world differs from what the mirrors show");
        }
    }

    /// Compares this world with one that is built now. Costs a pass over everything.
    fn audit(&self, caches: &Caches) -> Result<(), String> {
        let all = Prefix::all();
        let (nodes, instances) = (caches.nodes.all(&all), caches.instances.all(&all));
        let (volumes, images) = (caches.volumes.all(&all), caches.images.all(&all));
        let fresh = build_world(
            nodes.iter().map(|i| &i.value),
            instances.iter().map(|i| &i.value),
            volumes.iter().map(|i| &i.value),
            images.iter().map(|i| &i.value),
        );
        self.world.verify()?;
        self.world.same_as(&fresh)?;
        let pending: BTreeSet<Turn> = instances.iter().map(|i| &i.value).filter(|i| is_pending(i)).map(turn).collect();
        let known: BTreeSet<Turn> = self.pending.keys().copied().collect();
        if known == pending { Ok(()) } else { Err(format!("pending: kept {known:?}, computed {pending:?}")) }
    }

    /// The world.
    pub fn world(&self) -> &s::World {
        &self.world
    }

    /// Instances that wait for a node and have their turn after `after`.
    pub fn pending(&self, after: Option<Turn>) -> impl Iterator<Item = &Arc<Item<Instance>>> {
        let begin = after.map_or(std::ops::Bound::Unbounded, std::ops::Bound::Excluded);
        self.pending.range((begin, std::ops::Bound::Unbounded)).map(|(_, item)| item)
    }

    /// An image, whatever project it belongs to.
    pub fn image(&self, id: ImageId) -> Option<&Image> {
        self.images.get(&id).map(|item| &item.value)
    }

    /// Reserves room until the next [`Self::catch_up`].
    pub fn place(&mut self, placement: s::Placement<'_>) -> Result<(), s::WorldError> {
        self.world.place(placement)?;
        self.tried.push(placement.instance);
        Ok(())
    }

    /// Moves a reservation elsewhere until the next [`Self::catch_up`]: that of an instance whose node is lost.
    pub fn relocate(&mut self, instance: &Instance, to: s::Placement<'_>) -> Result<(), s::WorldError> {
        // It may be a stray, or have been moved by this plan already.
        let _ = self.world.unplace(to.instance);
        self.moved.push(instance.clone());
        self.world.place(to)
    }

    fn take_in(&mut self, caches: &Caches) -> Result<(), Again> {
        let Some(mut from) = self.subscriptions.take() else { return Err(Again) };
        let mut nodes = BTreeSet::new();
        while let Some(notice) = from.volumes.try_next() {
            let change = only_change(notice)?;
            let at = |item: &Arc<Item<Volume>>| item.value.status.node.map(|n| n.0).into_iter().collect();
            moved(&mut self.volumes_on, &change, at, &mut nodes);
        }
        while let Some(notice) = from.images.try_next() {
            let change = only_change(notice)?;
            moved(&mut self.images_on, &change, |item| image_nodes(&item.value), &mut nodes);
            self.image_changed(&change);
        }
        while let Some(notice) = from.nodes.try_next() {
            self.node_changed(only_change(notice)?, &mut nodes)?;
        }
        for node in nodes {
            self.node_again(caches, node);
        }
        while let Some(notice) = from.instances.try_next() {
            self.instance_changed(&only_change(notice)?)?;
        }
        self.subscriptions = Some(from);
        Ok(())
    }

    fn image_changed(&mut self, change: &CacheChange<Image>) {
        if let Some(old) = &change.old {
            self.images.remove(&ImageId(old.value.metadata.id));
        }
        if let Some(new) = &change.new {
            self.images.insert(ImageId(new.value.metadata.id), new.clone());
        }
    }

    /// Nodes that came or changed are noted; one that went, or that has instances already when it comes, is worth a new world.
    fn node_changed(&mut self, change: CacheChange<Node>, nodes: &mut BTreeSet<Uuid>) -> Result<(), Again> {
        match (change.old, change.new) {
            (Some(_), Some(new)) => {
                nodes.insert(new.value.metadata.id);
                Ok(())
            }
            (None, Some(new)) if self.strays.is_empty() => {
                nodes.insert(new.value.metadata.id);
                Ok(())
            }
            (None, None) => Ok(()),
            _ => Err(Again),
        }
    }

    /// Says anew what is known of a node; free when nothing that counts has changed, as with most reports.
    fn node_again(&mut self, caches: &Caches, node: Uuid) {
        let Some(item) = caches.node(NodeId(node)) else { return };
        let volumes = self.volumes_on.get(&node).into_iter().flatten().map(|id| s::VolumeId(id.as_u128())).collect();
        let images = self.images_on.get(&node).into_iter().flatten().map(|id| s::ImageId(id.as_u128())).collect();
        let spec = node_spec(&item.value, volumes, images);
        if self.world.node(spec.id) != Some(&spec) {
            self.world.upsert_node(spec);
        }
    }

    fn instance_changed(&mut self, change: &CacheChange<Instance>) -> Result<(), Again> {
        let (old, new) = (change.old.as_deref().map(|i| &i.value), change.new.as_ref().map(|i| &i.value));
        if let Some(old) = old {
            self.pending.remove(&turn(old));
        }
        if let Some(item) = change.new.as_ref().filter(|item| is_pending(&item.value)) {
            self.pending.insert(turn(&item.value), item.clone());
        }
        if same_place(old, new) {
            return Ok(());
        }
        for place in old.into_iter().flat_map(places_of) {
            if !self.strays.remove(&place.instance) {
                self.world.unplace(place.instance).map_err(|_| Again)?;
            }
        }
        if let Some(new) = new {
            self.adopt(new);
        }
        Ok(())
    }

    /// What is placed is a fact. An unknown node is not the scheduler's problem to solve.
    fn adopt(&mut self, instance: &Instance) {
        for place in places_of(instance) {
            if self.world.adopt(place).is_err() {
                self.strays.insert(place.instance);
            }
        }
    }

    fn rebuild(&mut self, caches: &Caches) {
        let subscriptions = Subscriptions {
            nodes: caches.nodes.subscribe(),
            instances: caches.instances.subscribe(),
            volumes: caches.volumes.subscribe(),
            images: caches.images.subscribe(),
        };
        *self = Self {
            subscriptions: Some(subscriptions),
            rebuilt: self.rebuilt + 1,
            caught_up: self.caught_up,
            ..Self::default()
        };
        let all = Prefix::all();
        for item in caches.volumes.all(&all) {
            if let Some(node) = item.value.status.node {
                self.volumes_on.entry(node.0).or_default().insert(item.value.metadata.id);
            }
        }
        for item in caches.images.all(&all) {
            for node in image_nodes(&item.value) {
                self.images_on.entry(node).or_default().insert(item.value.metadata.id);
            }
            self.images.insert(ImageId(item.value.metadata.id), item);
        }
        for item in caches.nodes.all(&all) {
            self.node_again(caches, item.value.metadata.id);
        }
        for item in caches.instances.all(&all) {
            self.adopt(&item.value);
            if is_pending(&item.value) {
                self.pending.insert(turn(&item.value), item);
            }
        }
        tracing::debug!(?self, "the scheduler's world was built");
    }
}

/// When an instance has its turn.
pub fn turn(instance: &Instance) -> Turn {
    (instance.metadata.created_at, instance.metadata.id)
}

/// Whether an instance waits for a node.
pub fn is_pending(instance: &Instance) -> bool {
    instance.status.placement.is_none() && !instance.metadata.is_deleting()
}

fn only_change<T>(notice: Notice<T>) -> Result<CacheChange<T>, Again> {
    match notice {
        Notice::Change(change) => Ok(change),
        Notice::Resync => Err(Again),
    }
}

/// Whether a change leaves everything alone that the scheduler counts.
fn same_place(old: Option<&Instance>, new: Option<&Instance>) -> bool {
    let all = |of: Option<&Instance>| {
        let counts = |p: s::Placement<'_>| (p.instance, p.node, p.resources, p.project, p.labels.clone());
        of.into_iter().flat_map(places_of).map(counts).collect::<Vec<_>>()
    };
    all(old) == all(new)
}

/// Follows which nodes have something; notes the nodes for which that has changed.
fn moved<K: oblak_model::Kind>(
    holders: &mut Holders,
    change: &CacheChange<oblak_model::Object<K>>,
    at: impl Fn(&Arc<Item<oblak_model::Object<K>>>) -> BTreeSet<Uuid>,
    nodes: &mut BTreeSet<Uuid>,
) {
    let before = change.old.as_ref().map(&at).unwrap_or_default();
    let after = change.new.as_ref().map(&at).unwrap_or_default();
    let Some(id) = change.new.as_ref().or(change.old.as_ref()).map(|item| item.value.metadata.id) else { return };
    for node in before.difference(&after) {
        if let Some(held) = holders.get_mut(node) {
            held.remove(&id);
            if held.is_empty() {
                holders.remove(node);
            }
        }
        nodes.insert(*node);
    }
    for node in after.difference(&before) {
        holders.entry(*node).or_default().insert(id);
        nodes.insert(*node);
    }
}

#[cfg(test)]
#[path = "world_tests.rs"]
mod tests;
