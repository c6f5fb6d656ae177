//! The index against the facts: everything that is kept incrementally, computed again from scratch.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::ControlFlow;

use crate::amount::{Amounts, tightness};
use crate::ids::ProjectId;
use crate::tree::Forest;
use crate::world::World;

type GroupKey = (ProjectId, Vec<(String, String)>);

impl World {
    /// Recomputes every index from the nodes and the placed instances and compares.
    ///
    /// Costs a pass over everything; meant for tests and for an operator who suspects a bug.
    ///
    /// # Errors
    /// The first difference, in words.
    pub fn verify(&self) -> Result<(), String> {
        self.verify_usage()?;
        self.verify_classes()?;
        self.verify_groups()?;
        self.verify_holders()
    }

    /// Whether two worlds say the same, however they came about: nodes, what is placed on them, and the labels it has.
    ///
    /// Costs a pass over everything; meant for tests of who keeps a world up to date.
    ///
    /// # Errors
    /// The first difference, in words.
    pub fn same_as(&self, other: &Self) -> Result<(), String> {
        let nodes = |world: &Self| -> BTreeMap<u128, (crate::NodeSpec, crate::Usage)> {
            world.nodes().map(|(spec, usage)| (spec.id.0, (spec.clone(), usage))).collect()
        };
        differs(&nodes(self), &nodes(other), || "nodes".to_owned())?;
        let placed = |world: &Self| -> BTreeMap<u128, (u128, crate::Resources, GroupKey)> {
            let one = |(id, placed): (crate::InstanceId, crate::instances::Placed)| {
                let shape = world.instances.shape(placed.shape);
                let group = world.groups.iter().find(|(group, _)| *group == shape.group).map(|(_, group)| group);
                let labels = group.into_iter().flat_map(|group| &*group.labels);
                let labels = labels.map(|(k, v)| (k.to_string(), v.to_string())).collect();
                let project = group.map_or(ProjectId(0), |group| group.project);
                (id.0, (world.at(placed.node).id.0, shape.resources, (project, labels)))
            };
            world.instances.iter().map(one).collect()
        };
        differs(&placed(self), &placed(other), || "placed instances".to_owned())
    }

    fn verify_usage(&self) -> Result<(), String> {
        let mut used: BTreeMap<u32, (Amounts, u32)> = BTreeMap::new();
        for (_, placed) in self.instances.iter() {
            let (sum, count) = used.entry(placed.node).or_default();
            for (sum, more) in sum.iter_mut().zip(self.instances.shape(placed.shape).resources.amounts()) {
                *sum += more;
            }
            *count += 1;
        }
        for (slot, node) in self.live() {
            let (sum, count) = used.remove(&slot).unwrap_or_default();
            let name = &node.spec.name;
            differs(&node.usage.used, &sum, || format!("used on {name}"))?;
            differs(&node.usage.instances, &count, || format!("instances on {name}"))?;
            differs(&node.usage.limit, &node.spec.limits(), || format!("limits of {name}"))?;
            differs(&self.by_id.get(&node.id), &Some(&slot), || format!("slot of {name}"))?;
        }
        differs(&used.len(), &0, || "nodes with instances that are not known".to_owned())?;
        differs(&self.by_id.len(), &self.live().count(), || "nodes by id".to_owned())
    }

    fn verify_classes(&self) -> Result<(), String> {
        let mut members: BTreeMap<u32, Vec<(u32, u128, u32)>> = BTreeMap::new();
        for (slot, node) in self.live() {
            let (key, _) = tightness(&node.usage.free(), &node.usage.limit);
            differs(&self.forest.key(slot), &key, || format!("order key of {}", node.spec.name))?;
            members.entry(node.class).or_default().push((key, node.id.0, slot));
        }
        differs(&self.classes.iter().count(), &members.len(), || "classes".to_owned())?;
        let of_ready = members.iter().filter(|(class, _)| self.classes.get(**class).tags.ready);
        let ready = of_ready.flat_map(|(_, nodes)| nodes.iter().copied()).collect();
        differs(&self.ready_count, &self.verify_tree(&self.ready, self.ready_root, ready, "ready nodes")?, || {
            "count of ready nodes".to_owned()
        })?;
        for (id, class) in self.classes.iter() {
            let expected = members.remove(&id).unwrap_or_default();
            let count = self.verify_tree(&self.forest, class.root, expected, "nodes of a class")?;
            differs(&(class.members as usize), &count, || format!("members of class {id}"))?;
            differs(&self.classes.bits_agree(id), &true, || format!("bit sets of class {id}"))?;
        }
        Ok(())
    }

    /// Are exactly these nodes (order key, id, slot) in the tree, in order? Returns how many they are.
    fn verify_tree(
        &self,
        forest: &Forest,
        root: u32,
        mut expected: Vec<(u32, u128, u32)>,
        what: &str,
    ) -> Result<usize, String> {
        expected.sort_unstable();
        let mut listed = Vec::new();
        let _ = forest.ascend(root, 0, u32::MAX, &[0; 4], &mut |slot| {
            listed.push((forest.key(slot), self.at(slot).id.0, slot));
            ControlFlow::Continue(())
        });
        differs(&listed, &expected, || what.to_owned())?;
        Ok(listed.len())
    }

    fn verify_groups(&self) -> Result<(), String> {
        type Counts = (BTreeMap<u32, u32>, BTreeMap<u32, u32>, BTreeSet<u32>);
        let mut expected: BTreeMap<u32, Counts> = BTreeMap::new();
        for (_, placed) in self.instances.iter() {
            let (nodes, zones, shapes) = expected.entry(self.instances.shape(placed.shape).group).or_default();
            *nodes.entry(placed.node).or_default() += 1;
            *zones.entry(self.at(placed.node).zone).or_default() += 1;
            shapes.insert(placed.shape);
        }
        let mut seen: BTreeSet<GroupKey> = BTreeSet::new();
        for (id, group) in self.groups.iter() {
            let (nodes, zones, shapes) = expected.remove(&id).unwrap_or_default();
            differs(&group.nodes, &nodes, || format!("nodes of group {id}"))?;
            differs(&group.zones, &zones, || format!("zones of group {id}"))?;
            differs(&(group.users as usize), &shapes.len(), || format!("users of group {id}"))?;
            let labels = group.labels.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect();
            differs(&seen.insert((group.project, labels)), &true, || format!("group {id} is there once"))?;
        }
        differs(&expected.len(), &0, || "groups that are not known".to_owned())
    }

    fn verify_holders(&self) -> Result<(), String> {
        let mut expected: BTreeMap<crate::world::Held, Vec<u32>> = BTreeMap::new();
        for (slot, node) in self.live() {
            for item in crate::world::held(&node.spec) {
                expected.entry(item).or_default().push(slot);
            }
        }
        let actual = self.holders.iter().map(|(item, slots)| (*item, slots.to_vec())).collect();
        differs(&expected, &actual, || "holders of volumes and images".to_owned())
    }
}

fn differs<T: PartialEq + std::fmt::Debug>(kept: &T, computed: &T, what: impl Fn() -> String) -> Result<(), String> {
    if kept == computed { Ok(()) } else { Err(format!("{}: kept {kept:?}, computed {computed:?}", what())) }
}
