//! Gives volumes a node when there is no doubt which; otherwise they get that of the first instance that uses them.

use std::time::Duration;

use oblak_model::wire::NODE_FINALIZER;
use oblak_model::{NodeId, Severity, SnapshotId, Timestamp, Volume, VolumePhase};
use oblak_store::Prefix;

use crate::caches::Caches;
use crate::change::{Change, event};
use crate::drive::Reconciler;
use crate::placement::ready;

/// The reconciler.
#[derive(Debug)]
pub struct Volumes;

impl Reconciler for Volumes {
    fn name(&self) -> &'static str {
        "volumes"
    }
    fn sweep(&self) -> Duration {
        Duration::from_secs(30)
    }
    fn plan(&mut self, caches: &Caches, _now: Timestamp) -> Vec<Change> {
        let all = Prefix::all();
        let homeless: Vec<_> = caches
            .volumes
            .all(&all)
            .into_iter()
            .filter(|v| v.value.status.node.is_none() && !v.value.metadata.is_deleting())
            .collect();
        if homeless.is_empty() {
            return Vec::new();
        }
        let nodes = caches.nodes.all(&all);
        let alive = ready(&nodes);
        let only = match alive.as_slice() {
            [one] if nodes.len() == 1 => Some(NodeId(one.value.metadata.id)),
            _ => None,
        };
        homeless.iter().filter_map(|v| settle(&v.value, source(caches, &v.value), only)).collect()
    }
}

/// The node of what the volume starts from: a copy is made where the original is.
fn source(caches: &Caches, volume: &Volume) -> Option<NodeId> {
    let all = Prefix::all();
    if let Some(id) = volume.status.source_volume {
        return caches.volumes.all(&all).iter().find(|v| v.value.metadata.id == id.0)?.value.status.node;
    }
    let id: SnapshotId = volume.status.source_snapshot?;
    caches.snapshots.all(&all).iter().find(|s| s.value.metadata.id == id.0)?.value.status.node
}

fn settle(volume: &Volume, source: Option<NodeId>, only: Option<NodeId>) -> Option<Change> {
    let mut new = volume.clone();
    if let Some(node) = source.or(only) {
        new.status.node = Some(node);
        new.metadata.finalizers.insert(NODE_FINALIZER.into());
        return Some(Change::update(&new).event(event(
            volume,
            Severity::Normal,
            "Assigned",
            "a node makes the volume",
        )));
    }
    let (reason, message) = ("WaitingForFirstUse", "made on the node of the first instance that uses it");
    if volume.status.reason == reason {
        return None;
    }
    new.status.phase = VolumePhase::Pending;
    new.status.reason = reason.into();
    new.status.message = message.into();
    Some(Change::update(&new))
}

#[cfg(test)]
mod tests {
    use super::*;
    use oblak_model::{Size, VolumeSpec};

    #[test]
    fn waits_when_there_is_a_choice_and_says_so_once() {
        let volume = Volume::new("data", VolumeSpec { size: Size::gib(1), ..VolumeSpec::default() });
        let node = NodeId(uuid::Uuid::from_u128(7));
        assert_eq!(settle(&volume, None, Some(node)).unwrap().events.len(), 1);
        assert!(settle(&volume, None, None).is_some());
        let mut told = volume.clone();
        told.status.reason = "WaitingForFirstUse".into();
        assert!(settle(&told, None, None).is_none());
    }
}
