//! From objects of the model to the words of the scheduler, and back to an explanation for people.

use std::collections::{BTreeMap, BTreeSet};

use oblak_model::explain::{ConstraintReport, Explanation};
use oblak_model::selector::Requirement;
use oblak_model::{
    AffinityTerm, Image, ImagePhase, Instance, Isolation, Node, NodeFacts, NodePhase, Resources, Topology, Volume,
};
use oblak_scheduler as s;
use sha2::{Digest, Sha256};
use uuid::Uuid;

/// How instances are placed that do not say: full nodes first, so that whole nodes stay free for large instances.
pub const DEFAULT_STRATEGY: s::Strategy = s::Strategy::Pack;

/// Weight of a preferred affinity: half of what a whole node's fullness is worth.
const PREFERENCE: u32 = s::PPM / 2;

/// The scheduler's id of a project: the head of a digest of its name.
#[must_use]
pub fn project_id(name: &str) -> s::ProjectId {
    let digest = Sha256::digest(name.as_bytes());
    s::ProjectId(digest.iter().take(16).fold(0u128, |id, byte| (id << 8) | u128::from(*byte)))
}

/// The scheduler's id of an instance.
#[must_use]
pub fn scheduler_id(instance: &Instance) -> s::InstanceId {
    s::InstanceId(raw(instance.metadata.id))
}

/// The feature that a node has when it can open the volumes of a shared pool.
fn pool_feature(pool: &str) -> String {
    format!("pool:{pool}")
}

fn raw(id: Uuid) -> u128 {
    id.as_u128()
}

fn isolation(i: Isolation) -> s::Isolation {
    match i {
        Isolation::Container => s::Isolation::Container,
        Isolation::Microvm => s::Isolation::Microvm,
        Isolation::Vm => s::Isolation::Vm,
        Isolation::Metal => s::Isolation::Metal,
    }
}

fn resources(r: Resources) -> s::Resources {
    s::Resources::new(r.vcpus.milli(), r.memory.0, r.disk.0)
}

/// A node with the volumes and images that are on it.
#[must_use]
pub fn node_spec(node: &Node, volumes: BTreeSet<s::VolumeId>, images: BTreeSet<s::ImageId>) -> s::NodeSpec {
    let (status, over) = (&node.status, &node.spec.overcommit);
    let open = node.spec.schedulable && !node.metadata.is_deleting();
    let mut isolations: BTreeMap<_, _> = status
        .facts
        .unavailable
        .iter()
        .map(|(i, reason)| (isolation(*i), s::Support::No(reason.as_str().into())))
        .collect();
    isolations.extend(status.facts.isolations.iter().map(|i| (isolation(*i), s::Support::Yes)));
    s::NodeSpec {
        zone: node.spec.zone.clone(),
        state: match (status.phase, open) {
            (NodePhase::Ready, true) => s::NodeState::Ready,
            (NodePhase::Ready, false) => s::NodeState::Draining,
            _ => s::NodeState::Down,
        },
        overcommit: s::Overcommit {
            cpu: over.cpu_percent.saturating_mul(10),
            memory: over.memory_percent.saturating_mul(10),
            disk: over.disk_percent.saturating_mul(10),
        },
        labels: node.metadata.labels.clone(),
        isolations,
        features: features(&status.facts),
        volumes,
        images,
        ..s::NodeSpec::new(s::NodeId(raw(node.metadata.id)), node.metadata.name.as_str(), resources(status.capacity))
    }
}

fn features(facts: &NodeFacts) -> BTreeSet<String> {
    let probes = facts.probes.iter().filter(|p| p.available).map(|p| p.name.clone());
    probes.chain(facts.pools.iter().filter(|p| p.problem.is_empty()).map(|p| pool_feature(&p.name))).collect()
}

/// What an instance asks of a node. `volumes` are those it has attached.
#[must_use]
pub fn request(instance: &Instance, volumes: &[Volume], default_strategy: s::Strategy) -> s::Request {
    let (rules, resolved) = (&instance.spec.placement, &instance.status.resolved);
    // A volume in a shared pool goes wherever that pool is.
    let placed = volumes.iter().filter(|v| v.status.node.is_some() && v.spec.pool.is_empty());
    let pools = volumes.iter().map(|v| &v.spec.pool).chain([&instance.spec.pool]).filter(|pool| !pool.is_empty());
    let affinity = rules.affinity.iter().map(|term| affinity(term, s::Direction::Together));
    let anti = rules.anti_affinity.iter().map(|term| self::affinity(term, s::Direction::Apart));
    s::Request {
        labels: instance.metadata.labels.clone(),
        node_labels: rules.node_selector.iter().flat_map(|selector| &selector.0).map(label_rule).collect(),
        zones: rules.zones.clone(),
        features: pools.map(|pool| pool_feature(pool)).collect(),
        affinity: affinity.chain(anti).collect(),
        volumes: placed
            .map(|v| s::VolumeRef { id: s::VolumeId(raw(v.metadata.id)), name: v.metadata.name.clone() })
            .collect(),
        image: Some(s::ImageId(raw(resolved.image.0))),
        strategy: rules.strategy.map_or(default_strategy, |strategy| match strategy {
            oblak_model::Strategy::Pack => s::Strategy::Pack,
            oblak_model::Strategy::Spread => s::Strategy::Spread,
        }),
        ..s::Request::new(
            s::InstanceId(raw(instance.metadata.id)),
            project_id(instance.scope_key()),
            isolation(resolved.isolation),
            resources(resolved.resources),
        )
    }
}

fn affinity(term: &AffinityTerm, direction: s::Direction) -> s::AffinityRule {
    s::AffinityRule {
        direction,
        topology: match term.topology {
            Topology::Node => s::Topology::Node,
            Topology::Zone => s::Topology::Zone,
        },
        strength: if term.required { s::Strength::Required } else { s::Strength::Preferred(PREFERENCE) },
        selector: term.selector.0.iter().map(label_rule).collect(),
    }
}

fn label_rule(requirement: &Requirement) -> s::LabelRule {
    match requirement.clone() {
        Requirement::Equals(key, value) => s::LabelRule::Is(key, value),
        Requirement::NotEquals(key, value) => s::LabelRule::IsNot(key, value),
        Requirement::Exists(key) => s::LabelRule::Exists(key),
        Requirement::Missing(key) => s::LabelRule::Absent(key),
    }
}

/// Nodes that have an image. What is not ready is nowhere.
pub(crate) fn image_nodes(image: &Image) -> BTreeSet<Uuid> {
    let status = &image.status;
    let ready = status.phase == ImagePhase::Ready;
    status.node.iter().chain(&status.nodes).filter(|_| ready).map(|node| node.0).collect()
}

/// Everything that an instance takes: its place, and room on the target of a migration, under an id that no instance has.
pub(crate) fn places_of(instance: &Instance) -> impl Iterator<Item = s::Placement<'_>> {
    let here = placement_of(instance);
    let coming = here.and(instance.status.open_migration()).map(|migration| s::Placement {
        instance: s::InstanceId(!raw(instance.metadata.id)),
        node: s::NodeId(raw(migration.to.0)),
        project: project_id(instance.scope_key()),
        labels: &instance.metadata.labels,
        resources: resources(migration.resources),
    });
    here.into_iter().chain(coming)
}

/// What an instance takes and where; none while it is on no node.
fn placement_of(instance: &Instance) -> Option<s::Placement<'_>> {
    let placement = instance.status.placement.as_ref()?;
    Some(s::Placement {
        instance: s::InstanceId(raw(instance.metadata.id)),
        node: s::NodeId(raw(placement.node.0)),
        project: project_id(instance.scope_key()),
        labels: &instance.metadata.labels,
        resources: resources(placement.resources),
    })
}

/// The whole world as the objects show it. Instances on nodes that are gone are left out.
pub fn build_world<'a>(
    nodes: impl IntoIterator<Item = &'a Node>,
    instances: impl IntoIterator<Item = &'a Instance>,
    volumes: impl IntoIterator<Item = &'a Volume>,
    images: impl IntoIterator<Item = &'a Image>,
) -> s::World {
    let mut volumes_on: BTreeMap<Uuid, BTreeSet<s::VolumeId>> = BTreeMap::new();
    for volume in volumes {
        if let Some(node) = volume.status.node {
            volumes_on.entry(node.0).or_default().insert(s::VolumeId(raw(volume.metadata.id)));
        }
    }
    let mut images_on: BTreeMap<Uuid, BTreeSet<s::ImageId>> = BTreeMap::new();
    for image in images {
        for node in image_nodes(image) {
            images_on.entry(node).or_default().insert(s::ImageId(raw(image.metadata.id)));
        }
    }
    let mut world = s::World::new();
    for node in nodes {
        let id = node.metadata.id;
        world.upsert_node(node_spec(
            node,
            volumes_on.remove(&id).unwrap_or_default(),
            images_on.remove(&id).unwrap_or_default(),
        ));
    }
    for placement in instances.into_iter().flat_map(places_of) {
        // An unknown node or a repeated id is not the scheduler's problem to solve.
        let _ = world.adopt(placement);
    }
    world
}

/// An explanation as the API shows it. A node counts for every constraint that it fails.
#[must_use]
pub fn explanation(of: &s::Explanation) -> Explanation {
    let constraints = of.conditions.iter().map(|c| ConstraintReport {
        constraint: constraint_name(c.condition).into(),
        nodes: c.nodes.into(),
        detail: c.text.clone(),
    });
    Explanation { nodes: of.nodes.into(), fitting: of.fit.into(), constraints: constraints.collect() }
}

const fn constraint_name(condition: s::Condition) -> &'static str {
    match condition {
        s::Condition::State => "state",
        s::Condition::OnlyNode => "only_node",
        s::Condition::AvoidNodes => "avoid_nodes",
        s::Condition::Isolation => "isolation",
        s::Condition::Zone => "zone",
        s::Condition::Feature => "feature",
        s::Condition::Cpu => "cpu",
        s::Condition::Memory => "memory",
        s::Condition::Disk => "disk",
        s::Condition::Label => "labels",
        s::Condition::Volume => "volume",
        s::Condition::Affinity => "affinity",
        s::Condition::AntiAffinity => "anti_affinity",
    }
}
