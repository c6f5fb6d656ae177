//! Begins migrations that are asked for, and ends those that cannot go on.

use std::sync::Arc;
use std::time::Duration;

use oblak_model::{
    Instance, MigrationPhase, MigrationStatus, Node, NodeId, NodePhase, Severity, Timestamp, Transport, Volume,
};
use oblak_scheduler as s;
use oblak_store::cache::Item;
use oblak_store::objects::{self, Allocation};
use oblak_store::{Prefix, Revision};

use crate::caches::Caches;
use crate::change::{Change, event};
use crate::drive::Reconciler;
use crate::lifecycle::{DEFAULT_STRATEGY, build_world, explanation, give_up, refuse, request, reserve};

/// Migrations begun in one pass: each changes what the next one finds reserved.
const PER_PASS: usize = 1;

/// The reconciler.
#[derive(Debug)]
pub struct Migrations;

impl Reconciler for Migrations {
    fn name(&self) -> &'static str {
        "migrations"
    }
    fn sweep(&self) -> Duration {
        Duration::from_secs(10)
    }
    fn plan(&mut self, caches: &Caches, now: Timestamp) -> Vec<Change> {
        let all = Prefix::all();
        let instances = caches.instances.all(&all);
        let ended = instances.iter().find_map(|i| end(caches, &i.value, now));
        if let Some(change) = ended {
            return vec![change];
        }
        let asked = instances.iter().filter(|i| is_asked(&i.value)).take(PER_PASS);
        asked.filter_map(|i| begin(caches, &instances, &i.value, now)).collect()
    }
}

fn is_asked(instance: &Instance) -> bool {
    let Some(asked) = &instance.spec.migration else { return false };
    let done = instance.status.migration.as_ref().map_or(0, |m| m.generation);
    asked.generation > done
        && !asked.cancel
        && !instance.status.is_moving()
        && !instance.metadata.is_deleting()
        && instance.status.placement.is_some()
}

fn node(caches: &Caches, id: NodeId) -> Option<Arc<Item<Node>>> {
    caches.nodes.get(&objects::object_key::<oblak_model::NodeKind>("_", id.0))
}

fn allocation(caches: &Caches, node: NodeId) -> Option<(Allocation, Revision)> {
    let key = objects::allocation_key(node);
    let item = caches.keys.get(&key)?;
    objects::decode_value(&key, &item.value).ok().map(|allocation| (allocation, item.revision))
}

/// Why a migration that is open cannot go on.
fn obstacle(
    caches: &Caches,
    instance: &Instance,
    migration: &MigrationStatus,
) -> Option<(MigrationPhase, &'static str, String)> {
    let cancelled = instance.spec.migration.as_ref().is_some_and(|m| m.cancel && m.generation >= migration.generation);
    if cancelled {
        return Some((MigrationPhase::Cancelled, "Cancelled", "cancelled as asked".into()));
    }
    for (id, name, reason) in
        [(migration.to, &migration.to_name, "TargetLost"), (migration.from, &migration.from_name, "SourceLost")]
    {
        let lives = node(caches, id).is_some_and(|n| n.value.status.phase == NodePhase::Ready);
        if !lives {
            return Some((MigrationPhase::Failed, reason, format!("node {name} cannot be reached")));
        }
    }
    None
}

fn end(caches: &Caches, instance: &Instance, now: Timestamp) -> Option<Change> {
    let migration = instance.status.migration.as_ref()?;
    if migration.phase == MigrationPhase::Finishing {
        // Neither end waits for a node that has gone: the old one was removed, or the new one lost and the instance started elsewhere.
        let moved_on = instance.status.placement.as_ref().is_none_or(|p| p.node != migration.to);
        let mut new = instance.clone();
        let status = new.status.migration.as_mut()?;
        status.left |= node(caches, migration.from).is_none();
        status.arrived |= moved_on;
        if status.left && status.arrived {
            (status.phase, status.ended_at) = (MigrationPhase::Done, Some(now));
        }
        return (new != *instance).then(|| Change::update(&new));
    }
    let migration = instance.status.open_migration()?;
    let (phase, reason, message) = obstacle(caches, instance, migration)?;
    let mut new = instance.clone();
    let mut ops = give_up(&mut new, phase, reason, &message, now, allocation(caches, migration.to));
    ops.update(&new);
    let severity = if phase == MigrationPhase::Cancelled { Severity::Normal } else { Severity::Warning };
    let text = format!("stays on {}: {message}", migration.from_name);
    Some(Change { ops, events: Vec::new() }.event(event(instance, severity, "MigrationEnded", text)))
}

/// Whether a node can take an instance from another one: they reach each other, and a guest that runs finds the same machine.
fn takes(from: &Node, to: &Node, live: bool) -> bool {
    let (a, b) = (&from.status.facts, &to.status.facts);
    let same = a.accelerator == b.accelerator && (a.accelerator != "kvm" || a.cpu_model == b.cpu_model);
    a.underlay.is_some() && b.underlay.is_some() && (same || !live)
}

fn begin(caches: &Caches, instances: &[Arc<Item<Instance>>], instance: &Instance, now: Timestamp) -> Option<Change> {
    let all = Prefix::all();
    let asked = instance.spec.migration.as_ref()?;
    let nodes = caches.nodes.all(&all);
    let named = nodes.iter().find(|n| n.value.metadata.name == asked.to).map(|n| &n.value);
    let refused = |reason: &str, message: &str| {
        let ops = refuse(instance, named, reason, message, now)?;
        let text = format!("cannot move: {message}");
        Some(Change { ops, events: Vec::new() }.event(event(instance, Severity::Warning, reason, text)))
    };
    if named.is_none() && !asked.to.is_empty() {
        return refused("NodeMissing", "there is no such node any more");
    }
    let (volumes, images) = (caches.volumes.all(&all), caches.images.all(&all));
    let world = build_world(
        nodes.iter().map(|n| &n.value),
        instances.iter().map(|i| &i.value),
        volumes.iter().map(|v| &v.value),
        images.iter().map(|i| &i.value),
    );
    let attached: Vec<Volume> = Vec::new();
    let mut request = request(instance, &attached, DEFAULT_STRATEGY);
    request.only_node = named.map(|n| s::NodeId(n.metadata.id.as_u128()));
    let from = instance.status.placement.as_ref()?.node;
    let source = nodes.iter().find(|n| n.value.metadata.id == from.0)?;
    let unlike = nodes.iter().filter(|n| n.value.metadata.id == from.0 || !takes(&source.value, &n.value, asked.live));
    request.avoid_nodes = unlike.map(|n| s::NodeId(n.value.metadata.id.as_u128())).collect();
    let decision = match s::decide(&world, &request) {
        Ok(decision) => decision,
        Err(unfit) => return refused("DoesNotFit", &explanation(&unfit).to_string()),
    };
    let target = nodes.iter().find(|n| n.value.metadata.id.as_u128() == decision.node.0).map(|n| &n.value)?;
    let id = NodeId(target.metadata.id);
    for publish in &instance.spec.publish {
        let protocol = if publish.protocol == Transport::Udp { "udp" } else { "tcp" };
        if caches.keys.get(&objects::host_port_key(id, protocol, publish.host_port)).is_some() {
            let text = format!("host port {} is taken on {}", publish.host_port, target.metadata.name);
            return refused("HostPortTaken", &text);
        }
    }
    let ops = reserve(instance, target, now, allocation(caches, id))?;
    let text = format!("moving to {}{}", target.metadata.name, if asked.live { " while it runs" } else { "" });
    Some(Change { ops, events: Vec::new() }.event(event(instance, Severity::Normal, "Moving", text)))
}
