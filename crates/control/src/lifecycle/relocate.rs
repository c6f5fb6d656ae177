//! Moving a placed instance from one node to another.

use oblak_model::{Instance, InstanceId, Node, NodeId, Phase, Placement, Port, Revision, Timestamp, Volume};
use oblak_store::objects::{self, Allocation, Superseded};

use super::assign::{add, host_port_key, host_port_ops, sub, write_allocation};
use super::batch::Ops;

/// A placed instance and the node it moves to, all as read from one view of the store.
#[derive(Clone, Copy, Debug)]
pub struct Relocation<'a> {
    /// The instance. It has a placement.
    pub instance: &'a Instance,
    /// The node it moves to.
    pub to: &'a Node,
    /// Why, and why there, for people.
    pub why: &'a str,
    /// When.
    pub at: Timestamp,
    /// Its ports.
    pub ports: &'a [Port],
    /// Its volumes that move with it: those in a shared pool, or whose bytes have been brought over. Others stay where they are.
    pub volumes: &'a [Volume],
    /// What is reserved on the node that it leaves, with the revision it was read at; none when that node is no more.
    pub from_allocation: Option<(Allocation, Revision)>,
    /// What is reserved on the node that it moves to; none when nothing ever was.
    pub to_allocation: Option<(Allocation, Revision)>,
    /// The phase it has from now on: `scheduled` when the new node is to start it, `running` when it runs there already.
    pub phase: Phase,
    /// Stable reason of that phase.
    pub reason: &'a str,
}

/// Moves an instance: the object with its next placement, both reservations, its host ports, the node of its ports and of the volumes given.
///
/// From this commit on, nothing that the old node says of the instance is believed, and volumes in shared pools refuse it: the placement's
/// generation and the volumes' epochs have grown. The key [`objects::superseded_key`] tells the old node to remove what it still has; its
/// agent takes the key away, so it outlives even the instance.
///
/// The caller adds the guard that says why the old node cannot run the guest any more: its lease is absent, or it has stopped the guest.
/// `None` when there is nothing to move: the instance has no placement, or is on that node already.
#[must_use]
pub fn relocate(relocation: &Relocation<'_>) -> Option<Ops> {
    let old = relocation.instance.status.placement.as_ref()?;
    let (from, to) = (old.node, NodeId(relocation.to.metadata.id));
    if from == to {
        return None;
    }
    let mut instance = relocation.instance.clone();
    // Who starts it there starts it with the first fence. What runs there already does so without one, until its agent says that the second is
    // in force: until then it must not be started elsewhere.
    let runs = matches!(relocation.phase, Phase::Running | Phase::Paused);
    let status = &mut instance.status;
    let resources = status.resolved.resources;
    status.phase = relocation.phase;
    status.reason = relocation.reason.into();
    status.message = relocation.why.into();
    status.placement = Some(Placement {
        node: to,
        node_name: relocation.to.metadata.name.clone(),
        resources,
        at: relocation.at,
        why: relocation.why.into(),
        generation: old.generation + 1,
        fenced: instance.spec.ha,
        fence_turn: if runs { 2 } else { 1 },
    });
    let mut ops = Ops::new();
    ops.update(&instance);
    if let Some((reserved, revision)) = relocation.from_allocation {
        let after = Allocation {
            resources: sub(reserved.resources, old.resources),
            instances: reserved.instances.saturating_sub(1),
        };
        write_allocation(&mut ops, from, Some(revision), after);
    }
    let before = relocation.to_allocation.map_or_else(Allocation::default, |(a, _)| a);
    let after =
        Allocation { resources: add(before.resources, resources), instances: before.instances.saturating_add(1) };
    write_allocation(&mut ops, to, relocation.to_allocation.map(|(_, r)| r), after);
    for publish in &instance.spec.publish {
        ops.delete(host_port_key(from, publish));
    }
    ops.extend(host_port_ops(to, &instance, &[], &instance.spec.publish));
    for port in relocation.ports {
        let mut port = port.clone();
        port.status.node = Some(to);
        ops.update(&port);
    }
    for volume in relocation.volumes {
        let mut volume = volume.clone();
        volume.status.node = Some(to);
        volume.status.epoch += 1;
        ops.update(&volume);
    }
    let left = objects::superseded_key(from, InstanceId(instance.metadata.id));
    ops.put(left, objects::encode_value(&Superseded { placement: old.generation }));
    Some(ops)
}
