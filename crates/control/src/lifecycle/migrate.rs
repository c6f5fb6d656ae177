//! The commits of a migration: both nodes have the instance's resources until it is decided, and it is decided once.

use oblak_model::{
    Instance, InstanceId, MigrationPhase, MigrationStatus, Node, NodeId, Phase, Port, Power, Revision, Size, Timestamp,
};
use oblak_store::objects::{self, Allocation};

use super::assign::{add, sub, write_allocation};
use super::batch::Ops;
use super::relocate::{Relocation, relocate};

/// Begins the migration that the spec asks for: reserves the target. `None` when the instance asks for none or has no place.
#[must_use]
pub fn reserve(
    instance: &Instance,
    to: &Node,
    at: Timestamp,
    allocation: Option<(Allocation, Revision)>,
) -> Option<Ops> {
    let target = NodeId(to.metadata.id);
    let status = fresh(instance, Some(to), at)?;
    let resources = status.resources;
    let mut new = instance.clone();
    new.status.migration = Some(status);
    let mut ops = Ops::new();
    ops.update(&new);
    let before = allocation.map_or_else(Allocation::default, |(a, _)| a);
    let after =
        Allocation { resources: add(before.resources, resources), instances: before.instances.saturating_add(1) };
    write_allocation(&mut ops, target, allocation.map(|(_, r)| r), after);
    Some(ops)
}

/// Says that the migration that the spec asks for cannot begin.
#[must_use]
pub fn refuse(instance: &Instance, to: Option<&Node>, reason: &str, message: &str, at: Timestamp) -> Option<Ops> {
    let mut status = fresh(instance, to, at)?;
    status.phase = MigrationPhase::Failed;
    status.reason = reason.into();
    status.message = message.into();
    status.ended_at = Some(at);
    let mut new = instance.clone();
    new.status.migration = Some(status);
    let mut ops = Ops::new();
    ops.update(&new);
    Some(ops)
}

fn fresh(instance: &Instance, to: Option<&Node>, at: Timestamp) -> Option<MigrationStatus> {
    let asked = instance.spec.migration.as_ref()?;
    let placement = instance.status.placement.as_ref()?;
    Some(MigrationStatus {
        generation: asked.generation,
        phase: MigrationPhase::Preparing,
        live: asked.live,
        from: placement.node,
        from_name: placement.node_name.clone(),
        to: to.map_or_else(NodeId::default, |n| NodeId(n.metadata.id)),
        to_name: to.map_or_else(|| asked.to.clone(), |n| n.metadata.name.clone()),
        resources: placement.resources,
        address: None,
        total: Size::ZERO,
        remaining: Size::ZERO,
        downtime_ms: None,
        arrived: false,
        left: false,
        reason: String::new(),
        message: String::new(),
        started_at: at,
        ended_at: None,
    })
}

/// Ends a migration before its switch: `instance` gets the new status, the operations give the reservation back. Writing the instance is
/// left to the caller, who may change more of it.
#[must_use]
pub fn give_up(
    instance: &mut Instance,
    phase: MigrationPhase,
    reason: &str,
    message: &str,
    at: Timestamp,
    allocation: Option<(Allocation, Revision)>,
) -> Ops {
    let mut ops = Ops::new();
    let Some(migration) = instance.status.migration.as_mut().filter(|m| m.phase.is_open()) else { return ops };
    migration.phase = phase;
    migration.reason = reason.into();
    migration.message = message.into();
    migration.ended_at = Some(at);
    if let Some((reserved, revision)) = allocation {
        write_allocation(&mut ops, migration.to, Some(revision), without(reserved, migration));
    }
    ops
}

fn without(reserved: Allocation, migration: &MigrationStatus) -> Allocation {
    Allocation {
        resources: sub(reserved.resources, migration.resources),
        instances: reserved.instances.saturating_sub(1),
    }
}

/// What the switch needs, all as read from one view of the store.
#[derive(Clone, Copy, Debug)]
pub struct Switch<'a> {
    /// The instance, with an open migration.
    pub instance: &'a Instance,
    /// The target.
    pub to: &'a Node,
    /// Its ports.
    pub ports: &'a [Port],
    /// What is reserved on the node that it leaves.
    pub from_allocation: Option<(Allocation, Revision)>,
    /// What is reserved on the target, this instance included.
    pub to_allocation: Option<(Allocation, Revision)>,
    /// How long the guest had stood still when the source said so, in milliseconds.
    pub downtime_ms: Option<u64>,
    /// When.
    pub at: Timestamp,
}

/// The switch: from this commit on the instance is the target's. `None` when there is nothing to switch.
///
/// The old node cannot run it any more because it said so itself, and says so only after it has written that down.
#[must_use]
pub fn switch(switch: &Switch<'_>) -> Option<Ops> {
    let migration = switch.instance.status.open_migration()?;
    if switch.instance.status.placement.as_ref()?.node != migration.from {
        // It was lost meanwhile and started elsewhere.
        return None;
    }
    let mut instance = switch.instance.clone();
    let status = instance.status.migration.as_mut()?;
    status.phase = MigrationPhase::Finishing;
    status.downtime_ms = switch.downtime_ms;
    status.remaining = Size::ZERO;
    let runs = migration.live && switch.instance.spec.power != Power::Stopped;
    let phase = match switch.instance.spec.power {
        Power::Stopped => Phase::Stopped,
        Power::Paused if runs => Phase::Paused,
        _ if runs => Phase::Running,
        _ => Phase::Scheduled,
    };
    let why = format!("moved from {} as asked", migration.from_name);
    relocate(&Relocation {
        instance: &instance,
        to: switch.to,
        why: &why,
        at: switch.at,
        ports: switch.ports,
        volumes: &[],
        from_allocation: switch.from_allocation,
        // The reservation becomes the placement.
        to_allocation: switch.to_allocation.map(|(a, r)| (without(a, migration), r)),
        phase,
        reason: "Moved",
    })
    .map(|mut ops| {
        // This source removes what it has by itself and says when; see `MigrationStatus::left`.
        let superseded = objects::superseded_key(migration.from, InstanceId(instance.metadata.id));
        ops.writes.retain(|write| !matches!(write, oblak_store::Write::Put { key, .. } if *key == superseded));
        ops
    })
}
