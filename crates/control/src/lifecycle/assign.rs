//! Giving an instance a node, and changing what it has there.

use oblak_model::explain::{ConstraintReport, Explanation};
use oblak_model::wire::NODE_FINALIZER;
use oblak_model::{
    Cpus, Instance, Node, NodeId, Phase, Placement, Port, Publish, Resources, Revision, Size, Timestamp, Transport,
    Volume,
};
use oblak_store::objects::{self, Allocation};
use oblak_store::{Guard, Key};

use super::batch::Ops;

/// An instance and the node chosen for it.
#[derive(Clone, Copy, Debug)]
pub struct Assignment<'a> {
    /// The instance, as read.
    pub instance: &'a Instance,
    /// The node.
    pub node: &'a Node,
    /// Why this node, for people.
    pub why: &'a str,
    /// When.
    pub at: Timestamp,
    /// Its ports, as read.
    pub ports: &'a [Port],
    /// Its volumes, as read.
    pub volumes: &'a [Volume],
    /// What is reserved on the node, and the revision it was read at; none when nothing ever was.
    pub allocation: Option<(Allocation, Revision)>,
}

/// Places an instance: the object, the reservation, its host ports, and the node of its ports and of volumes that had none.
#[must_use]
pub fn assign_instance(assignment: &Assignment<'_>) -> Ops {
    let node = NodeId(assignment.node.metadata.id);
    let resources = assignment.instance.status.resolved.resources;
    let mut instance = assignment.instance.clone();
    instance.metadata.finalizers.insert(NODE_FINALIZER.into());
    instance.status.phase = Phase::Scheduled;
    instance.status.reason = "Scheduled".into();
    instance.status.message = assignment.why.into();
    instance.status.placement = Some(Placement {
        node,
        node_name: assignment.node.metadata.name.clone(),
        resources,
        at: assignment.at,
        why: assignment.why.into(),
        generation: instance.status.observed.placement + 1,
        // Safe in both directions: whether another node could take it over is looked at later.
        fenced: instance.spec.ha,
        fence_turn: 1,
    });
    let mut ops = Ops::new();
    ops.update(&instance);
    let before = assignment.allocation.map_or_else(Allocation::default, |(a, _)| a);
    let after =
        Allocation { resources: add(before.resources, resources), instances: before.instances.saturating_add(1) };
    write_allocation(&mut ops, node, assignment.allocation.map(|(_, r)| r), after);
    ops.extend(host_port_ops(node, &instance, &[], &instance.spec.publish));
    for port in assignment.ports {
        let mut port = port.clone();
        port.status.node = Some(node);
        ops.update(&port);
    }
    for volume in assignment.volumes.iter().filter(|volume| volume.status.node != Some(node)) {
        let mut volume = volume.clone();
        // One that another node had is in a shared pool, or this node would not have been chosen.
        if volume.status.node.is_some() {
            volume.status.epoch += 1;
        }
        volume.status.node = Some(node);
        volume.metadata.finalizers.insert(NODE_FINALIZER.into());
        ops.update(&volume);
    }
    ops
}

/// Takes and frees host ports on a node: those of `new` that are not in `old` must be free, those of `old` that are not in `new` become so.
#[must_use]
pub fn host_port_ops(node: NodeId, instance: &Instance, old: &[Publish], new: &[Publish]) -> Ops {
    let mut ops = Ops::new();
    let has =
        |list: &[Publish], p: &Publish| list.iter().any(|o| (o.host_port, o.protocol) == (p.host_port, p.protocol));
    for publish in new.iter().filter(|p| !has(old, p)) {
        let key = host_port_key(node, publish);
        ops.guard(Guard::Absent(key.clone()));
        ops.put(key, objects::encode_value(&instance.metadata.id));
    }
    for publish in old.iter().filter(|p| !has(new, p)) {
        ops.delete(host_port_key(node, publish));
    }
    ops
}

pub(super) fn host_port_key(node: NodeId, publish: &Publish) -> Key {
    let protocol = match publish.protocol {
        Transport::Tcp => "tcp",
        Transport::Udp => "udp",
    };
    objects::host_port_key(node, protocol, publish.host_port)
}

/// Changes what a placed instance has on its node; the caller writes the instance with the placement returned.
///
/// # Errors
/// What is missing on the node, when a resource that grows does not fit.
pub fn resize(
    placement: &Placement,
    wanted: Resources,
    node: &Node,
    allocation: (Allocation, Revision),
) -> Result<(Ops, Placement), Explanation> {
    let (reserved, revision) = allocation;
    let others = sub(reserved.resources, placement.resources);
    let limit = limit_of(node);
    let mut constraints = Vec::new();
    let mut check = |name: &str, asked: u64, had: u64, free: u64, show: &dyn Fn(u64) -> String| {
        if asked > had && asked > free {
            constraints.push(ConstraintReport {
                constraint: name.into(),
                nodes: 1,
                detail: format!("{name} {} asked, {} free on {}", show(asked), show(free), node.metadata.name),
            });
        }
    };
    let (had, free) = (placement.resources, sub(limit, others));
    let cpu = |milli: u64| Cpus(u32::try_from(milli).unwrap_or(u32::MAX)).to_string();
    let size = |bytes: u64| Size(bytes).to_string();
    check("cpu", wanted.vcpus.0.into(), had.vcpus.0.into(), free.vcpus.0.into(), &cpu);
    check("memory", wanted.memory.0, had.memory.0, free.memory.0, &size);
    check("disk", wanted.disk.0, had.disk.0, free.disk.0, &size);
    if !constraints.is_empty() {
        return Err(Explanation { nodes: 1, fitting: 0, constraints });
    }
    let mut ops = Ops::new();
    let after = Allocation { resources: add(others, wanted), ..reserved };
    write_allocation(&mut ops, placement.node, Some(revision), after);
    Ok((ops, Placement { resources: wanted, ..placement.clone() }))
}

/// The most that may be promised of a node.
fn limit_of(node: &Node) -> Resources {
    let (capacity, over) = (node.status.capacity, node.spec.overcommit);
    let part =
        |amount: u64, percent: u32| u64::try_from(u128::from(amount) * u128::from(percent) / 100).unwrap_or(u64::MAX);
    Resources {
        vcpus: Cpus(u32::try_from(part(capacity.vcpus.0.into(), over.cpu_percent)).unwrap_or(u32::MAX)),
        memory: Size(part(capacity.memory.0, over.memory_percent)),
        disk: Size(part(capacity.disk.0, over.disk_percent)),
    }
}

pub(super) fn write_allocation(ops: &mut Ops, node: NodeId, read_at: Option<Revision>, after: Allocation) {
    let key = objects::allocation_key(node);
    ops.guard(match read_at {
        Some(revision) => Guard::Revision(key.clone(), revision),
        None => Guard::Absent(key.clone()),
    });
    ops.put(key, objects::encode_value(&after));
}

pub(super) fn add(a: Resources, b: Resources) -> Resources {
    Resources { vcpus: Cpus(a.vcpus.0.saturating_add(b.vcpus.0)), memory: a.memory + b.memory, disk: a.disk + b.disk }
}

pub(crate) fn sub(a: Resources, b: Resources) -> Resources {
    Resources { vcpus: Cpus(a.vcpus.0.saturating_sub(b.vcpus.0)), memory: a.memory - b.memory, disk: a.disk - b.disk }
}
