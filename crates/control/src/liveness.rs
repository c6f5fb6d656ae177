//! Notices nodes whose lease has ended.

use std::time::Duration;

use oblak_model::{Evacuation, Instance, Node, NodeId, NodePhase, Phase, Severity, Timestamp};
use oblak_store::{Guard, Prefix, objects};

use crate::caches::Caches;
use crate::change::{Change, event};
use crate::drive::Reconciler;

/// The reconciler.
#[derive(Debug)]
pub struct Liveness;

impl Reconciler for Liveness {
    fn name(&self) -> &'static str {
        "liveness"
    }
    fn sweep(&self) -> Duration {
        Duration::from_secs(5)
    }
    fn plan(&mut self, caches: &Caches, now: Timestamp) -> Vec<Change> {
        let all = Prefix::all();
        let leased = |n: &Node| caches.keys.get(&objects::lease_key(NodeId(n.metadata.id))).is_some();
        let wrong: Vec<_> = caches
            .nodes
            .all(&all)
            .into_iter()
            .filter(|n| {
                let phase = n.value.status.phase;
                phase.is_up() != leased(&n.value) || (phase == NodePhase::Cleaning && !has_left(caches, &n.value))
            })
            .collect();
        let turn = |n: &Node| if leased(n) { back(n, has_left(caches, n), now) } else { down(n, now) };
        let mut changes: Vec<Change> = wrong.iter().map(|n| turn(&n.value)).collect();
        let away: Vec<NodeId> = caches
            .nodes
            .all(&all)
            .iter()
            .filter(|n| !n.value.status.phase.is_up() || !leased(&n.value))
            .map(|n| NodeId(n.value.metadata.id))
            .collect();
        if !away.is_empty() {
            let instances = caches.instances.all(&all);
            changes.extend(instances.iter().filter_map(|i| unknown(&i.value, &away)));
        }
        changes
    }
}

fn down(node: &Node, now: Timestamp) -> Change {
    let mut new = node.clone();
    new.status.phase = NodePhase::Down;
    new.status.phase_since = now;
    new.status.message = "its agent has not been heard of; guests may still run there".into();
    let mut change =
        Change::update(&new).event(event(node, Severity::Warning, "NodeDown", "the lease of the node has ended"));
    // Node and lease are seen through two caches; one that lags must not take a node down that has just come.
    change.ops.guard(Guard::Absent(objects::lease_key(NodeId(node.metadata.id))));
    change
}

/// Whether the node may still have something of instances that were moved away from it.
fn has_left(caches: &Caches, node: &Node) -> bool {
    !caches.keys.all(&objects::superseded_prefix(NodeId(node.metadata.id))).is_empty()
}

/// A lease lives, so the node does.
fn back(node: &Node, has_left: bool, now: Timestamp) -> Change {
    let mut new = node.clone();
    new.status.phase = if has_left { NodePhase::Cleaning } else { NodePhase::Ready };
    new.status.phase_since = now;
    new.status.evacuation = Evacuation::Automatic;
    if !has_left {
        new.status.message.clear();
    }
    let mut change =
        Change::update(&new).event(event(node, Severity::Normal, "NodeReady", "the lease of the node is alive"));
    change.ops.guard(Guard::Present(objects::lease_key(NodeId(node.metadata.id))));
    change
}

/// What a node that is away last said of its guests may be wrong by now.
fn unknown(instance: &Instance, away: &[NodeId]) -> Option<Change> {
    let on = instance.status.placement.as_ref()?.node;
    let stays = matches!(instance.status.phase, Phase::Unknown | Phase::Stopped | Phase::Failed | Phase::Deleting);
    if stays || !away.contains(&on) {
        return None;
    }
    let mut new = instance.clone();
    new.status.phase = Phase::Unknown;
    new.status.reason = "NodeDown".into();
    new.status.message =
        format!("node {} cannot be reached", new.status.placement.as_ref().map_or("", |p| p.node_name.as_str()));
    Some(Change::update(&new))
}
