//! Gives images that have to be fetched or built a node that does it.

use std::sync::Arc;
use std::time::Duration;

use oblak_model::wire::NODE_FINALIZER;
use oblak_model::{Image, ImagePhase, ImageSource, Instance, NodeId, Severity, Timestamp};
use oblak_store::Prefix;
use oblak_store::cache::Item;

use crate::caches::Caches;
use crate::change::{Change, event};
use crate::drive::Reconciler;
use crate::placement::ready;

/// The reconciler.
#[derive(Debug)]
pub struct Images;

impl Reconciler for Images {
    fn name(&self) -> &'static str {
        "images"
    }
    fn sweep(&self) -> Duration {
        Duration::from_secs(30)
    }
    fn plan(&mut self, caches: &Caches, _now: Timestamp) -> Vec<Change> {
        let all = Prefix::all();
        let nodes: Vec<NodeId> = ready(&caches.nodes.all(&all)).iter().map(|n| NodeId(n.value.metadata.id)).collect();
        let images = caches.images.all(&all);
        let idle: Vec<&Arc<Item<Image>>> = images.iter().filter(|i| needs_node(&i.value, &nodes)).collect();
        if idle.is_empty() || nodes.is_empty() {
            return Vec::new();
        }
        let instances = caches.instances.all(&all);
        idle.into_iter().map(|image| assign(&image.value, &nodes, &instances)).collect()
    }
}

/// Work to do, and nobody (alive) who does it. An image that is ready somewhere stays there even while that node is away.
fn needs_node(image: &Image, alive: &[NodeId]) -> bool {
    let wanted = !image.spec.on_demand || image.status.wanted;
    let busy = image.status.node.is_some_and(|n| alive.contains(&n) || image.status.phase == ImagePhase::Ready);
    let fetched = !matches!(image.spec.source, ImageSource::Upload {});
    fetched && wanted && !busy && !image.metadata.is_deleting()
}

/// A node where an instance waits for it, otherwise the first.
fn assign(image: &Image, nodes: &[NodeId], instances: &[Arc<Item<Instance>>]) -> Change {
    let waiting = instances.iter().filter(|i| i.value.status.resolved.image.0 == image.metadata.id);
    let there = waiting.filter_map(|i| i.value.status.placement.as_ref().map(|p| p.node)).find(|n| nodes.contains(n));
    let mut new = image.clone();
    new.status.node = there.or_else(|| nodes.first().copied());
    new.metadata.finalizers.insert(NODE_FINALIZER.into());
    Change::update(&new).event(event(image, Severity::Normal, "Assigned", "a node fetches or builds the image"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use oblak_model::{ImageSpec, Visibility};

    fn image(on_demand: bool) -> Image {
        let spec = ImageSpec {
            source: ImageSource::Recipe { recipe: "tiny".into() },
            checksum: None,
            firmware: oblak_model::ImageFirmware::Bios,
            on_demand,
            visibility: Visibility::Public,
            min_memory: oblak_model::Size::ZERO,
            content: None,
            retry_generation: 0,
        };
        Image::new("tiny", spec)
    }

    #[test]
    fn on_demand_waits_until_it_is_wanted() {
        let nodes = [NodeId(uuid::Uuid::from_u128(1))];
        assert!(needs_node(&image(false), &nodes));
        let mut lazy = image(true);
        assert!(!needs_node(&lazy, &nodes));
        lazy.status.wanted = true;
        assert!(needs_node(&lazy, &nodes));
        lazy.status.node = Some(nodes[0]);
        assert!(!needs_node(&lazy, &nodes));
        assert!(needs_node(&lazy, &[]), "its node is gone before it was ready");
        lazy.status.phase = ImagePhase::Ready;
        assert!(!needs_node(&lazy, &[]));
    }
}
