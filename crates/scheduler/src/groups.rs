//! Where instances with given labels are: the index behind affinity.
//!
//! Instances of one project with equal labels form a group; a group counts its instances per node and per zone. A
//! selector is answered from posting lists (label of a project → groups), so its cost depends on how many groups match
//! and not on how many instances there are. Lists are keyed by hash and hits are verified, so nothing is interned for
//! ever and labels that nobody uses any more cost nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use crate::hash::{FastMap, hash_parts};
use crate::ids::ProjectId;
use crate::labels::{LabelRule, value_of};

pub(crate) type Labels = [(Box<str>, Box<str>)];

/// Equal labels in one project.
#[derive(Debug, Clone)]
pub(crate) struct Group {
    pub(crate) project: ProjectId,
    pub(crate) labels: Arc<Labels>,
    /// How many shapes refer to this group.
    pub(crate) users: u32,
    /// Node slot → instances.
    pub(crate) nodes: BTreeMap<u32, u32>,
    /// Zone → instances.
    pub(crate) zones: BTreeMap<u32, u32>,
}

/// All groups. Groups are shared (`Arc`), so copying the index for a plan copies pointers.
#[derive(Debug, Clone, Default)]
pub(crate) struct Groups {
    slots: Vec<Option<Arc<Group>>>,
    vacant: Vec<u32>,
    by_labels: FastMap<u64, Vec<u32>>,
    postings: FastMap<u64, BTreeSet<u32>>,
}

fn whole_hash<'a>(project: ProjectId, labels: impl Iterator<Item = (&'a str, &'a str)>) -> u64 {
    labels.fold(hash_parts(project.0, &[]), |hash, (key, value)| hash_parts(u128::from(hash), &[key, value]))
}

fn posting_hashes(project: ProjectId, labels: &Labels) -> Vec<u64> {
    let mut hashes = vec![hash_parts(project.0, &[])];
    hashes.extend(labels.iter().map(|(key, value)| hash_parts(project.0, &[key, value])));
    hashes
}

impl Groups {
    /// The group of these labels, made when missing; adds one user.
    pub(crate) fn acquire(&mut self, project: ProjectId, labels: &BTreeMap<String, String>) -> u32 {
        let hash = whole_hash(project, labels.iter().map(|(k, v)| (k.as_str(), v.as_str())));
        let same = |group: &Group| {
            group.project == project
                && group.labels.len() == labels.len()
                && group.labels.iter().zip(labels).all(|((k, v), (key, value))| **k == **key && **v == **value)
        };
        let known = self.by_labels.get(&hash).into_iter().flatten();
        if let Some(id) = known.copied().find(|id| self.get(*id).is_some_and(same)) {
            if let Some(group) = self.get_mut(id) {
                group.users += 1;
            }
            return id;
        }
        let labels: Arc<Labels> =
            labels.iter().map(|(k, v)| (k.as_str().into(), v.as_str().into())).collect::<Vec<_>>().into();
        let group =
            Group { project, labels: Arc::clone(&labels), users: 1, nodes: BTreeMap::new(), zones: BTreeMap::new() };
        let id = self.vacant.pop().unwrap_or_else(|| {
            self.slots.push(None);
            (self.slots.len() - 1) as u32
        });
        self.slots[id as usize] = Some(Arc::new(group));
        self.by_labels.entry(hash).or_default().push(id);
        for posting in posting_hashes(project, &labels) {
            self.postings.entry(posting).or_default().insert(id);
        }
        id
    }

    /// Adds one user.
    pub(crate) fn hold(&mut self, id: u32) {
        if let Some(group) = self.get_mut(id) {
            group.users += 1;
        }
    }

    /// Takes one user away; the last one takes the group with it.
    pub(crate) fn release(&mut self, id: u32) {
        let Some(group) = self.get_mut(id) else { return };
        group.users -= 1;
        if group.users > 0 {
            return;
        }
        let (project, labels) = (group.project, Arc::clone(&group.labels));
        self.slots[id as usize] = None;
        self.vacant.push(id);
        let hash = whole_hash(project, labels.iter().map(|(k, v)| (k.as_ref(), v.as_ref())));
        if let Some(ids) = self.by_labels.get_mut(&hash) {
            ids.retain(|other| *other != id);
            if ids.is_empty() {
                self.by_labels.remove(&hash);
            }
        }
        for posting in posting_hashes(project, &labels) {
            if let Some(ids) = self.postings.get_mut(&posting) {
                ids.remove(&id);
                if ids.is_empty() {
                    self.postings.remove(&posting);
                }
            }
        }
    }

    pub(crate) fn get(&self, id: u32) -> Option<&Group> {
        self.slots.get(id as usize)?.as_deref()
    }

    fn get_mut(&mut self, id: u32) -> Option<&mut Group> {
        self.slots.get_mut(id as usize)?.as_mut().map(Arc::make_mut)
    }

    pub(crate) fn arrived(&mut self, id: u32, node: u32, zone: u32) {
        if let Some(group) = self.get_mut(id) {
            *group.nodes.entry(node).or_default() += 1;
            *group.zones.entry(zone).or_default() += 1;
        }
    }

    pub(crate) fn left(&mut self, id: u32, node: u32, zone: u32) {
        if let Some(group) = self.get_mut(id) {
            subtract(&mut group.nodes, node, 1);
            subtract(&mut group.zones, zone, 1);
        }
    }

    /// A node with instances on it changed its zone. Visits every group: an operator's rare act, not a hot path.
    pub(crate) fn moved(&mut self, node: u32, from: u32, to: u32) {
        for slot in self.slots.iter_mut().flatten() {
            let Some(count) = slot.nodes.get(&node).copied() else { continue };
            let group = Arc::make_mut(slot);
            subtract(&mut group.zones, from, count);
            *group.zones.entry(to).or_default() += count;
        }
    }

    /// The groups of the project that the selector matches, in a fixed order.
    pub(crate) fn matching(&self, project: ProjectId, selector: &[LabelRule]) -> Vec<&Group> {
        let everything = hash_parts(project.0, &[]);
        let mut narrowest: Option<&BTreeSet<u32>> = None;
        let exact = selector.iter().filter_map(|rule| match rule {
            LabelRule::Is(key, value) => Some(hash_parts(project.0, &[key, value])),
            LabelRule::IsNot(..) | LabelRule::Exists(_) | LabelRule::Absent(_) => None,
        });
        for posting in exact.chain([everything]) {
            let Some(ids) = self.postings.get(&posting) else { return Vec::new() };
            if narrowest.is_none_or(|best| ids.len() < best.len()) {
                narrowest = Some(ids);
            }
        }
        let candidates = narrowest.into_iter().flatten().filter_map(|id| self.get(*id));
        candidates
            .filter(|group| group.project == project && !group.nodes.is_empty())
            .filter(|group| selector.iter().all(|rule| rule.holds(value_of(&group.labels, rule.key()))))
            .collect()
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (u32, &Group)> {
        self.slots.iter().enumerate().filter_map(|(id, group)| Some((id as u32, group.as_deref()?)))
    }
}

fn subtract(counts: &mut BTreeMap<u32, u32>, key: u32, by: u32) {
    if let Some(count) = counts.get_mut(&key) {
        *count = count.saturating_sub(by);
        if *count == 0 {
            counts.remove(&key);
        }
    }
}
