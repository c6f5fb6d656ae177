//! Mirrors of what the reconcilers look at.

use std::sync::Arc;

use bytes::Bytes;
use oblak_model::{
    Image, Instance, InstanceId, Kind, Node, NodeId, NodeKind, Object, Port, PortKind, Revision, Snapshot, Volume,
};
use oblak_store::cache::{CacheGroup, GroupBuilder, Item, Notice};
use oblak_store::{Cache, CacheSource, Entry, Prefix, SharedStore, StoreError, objects};
use tokio::sync::watch;

/// Index of ports by their instance.
const BY_INSTANCE: &str = "instance";
/// How long a reconciler waits for its own commit to show.
const OWN_COMMIT: std::time::Duration = std::time::Duration::from_secs(5);

/// The mirrors, and one counter that moves when any of them does.
pub struct Caches {
    /// Instances.
    pub instances: Cache<Instance>,
    /// Nodes.
    pub nodes: Cache<Node>,
    /// Images.
    pub images: Cache<Image>,
    /// Volumes.
    pub volumes: Cache<Volume>,
    /// Snapshots.
    pub snapshots: Cache<Snapshot>,
    /// Ports.
    pub ports: Cache<Port>,
    /// Reservations, host ports and leases, undecoded.
    pub keys: Cache<Bytes>,
    changed: watch::Sender<u64>,
    group: CacheGroup,
}

fn objects<K: Kind>() -> CacheSource<Object<K>> {
    CacheSource::objects()
}

fn prefix(text: &str) -> Prefix {
    Prefix::new(text).expect("a constant prefix is valid")
}

impl Caches {
    /// Reads everything once and follows.
    pub async fn start(store: &SharedStore) -> Result<Arc<Self>, StoreError> {
        let by_instance = |item: &Item<Port>| vec![item.value.spec.instance.to_string()];
        let raw = |entry: &Entry| Ok(entry.value.clone());
        let keys = CacheSource::new(prefix("/allocation"), raw)
            .and(prefix("/hostport"))
            .and(prefix("/lease"))
            .and(prefix("/superseded"));
        let mut group = GroupBuilder::new(store.clone());
        let caches = Self {
            instances: group.add(objects()),
            nodes: group.add(objects()),
            images: group.add(objects()),
            volumes: group.add(objects()),
            snapshots: group.add(objects()),
            ports: group.add(objects::<PortKind>().index(BY_INSTANCE, by_instance)),
            keys: group.add(keys),
            changed: watch::Sender::new(0),
            group: group.start().await?,
        };
        let caches = Arc::new(caches);
        follow(&caches, &caches.instances);
        follow(&caches, &caches.nodes);
        follow(&caches, &caches.images);
        follow(&caches, &caches.volumes);
        follow(&caches, &caches.snapshots);
        follow(&caches, &caches.keys);
        Ok(caches)
    }

    /// Keeps all mirrors at one revision while the guard lives: what was committed together is seen together.
    pub async fn hold(&self) -> impl Sized + Send {
        self.group.hold().await
    }

    /// Hears of any change. Ports are left out: they change only together with their instance.
    pub fn subscribe(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    /// A node.
    pub fn node(&self, id: NodeId) -> Option<Arc<Item<Node>>> {
        self.nodes.get(&objects::object_key::<NodeKind>("_", id.0))
    }

    /// Ports of an instance, by interface.
    pub fn ports_of(&self, instance: InstanceId) -> Vec<Port> {
        let mut ports: Vec<Port> =
            self.ports.find(BY_INSTANCE, &instance.to_string()).iter().map(|i| i.value.clone()).collect();
        ports.sort_by_key(|p| p.spec.index);
        ports
    }

    /// Returns when the mirrors show a commit, or after a while: an outdated plan only fails its guards.
    pub async fn catch_up(&self, revision: Revision) {
        // The last one that is told: the others show it already.
        let _ = self.keys.wait_for(revision, OWN_COMMIT).await;
    }
}

fn follow<T: Send + Sync + 'static>(caches: &Arc<Caches>, cache: &Cache<T>) {
    let mut notices = cache.subscribe();
    let caches = Arc::downgrade(caches);
    oblak_platform::task::spawn(async move {
        while let Some(Notice::Change(_) | Notice::Resync) = notices.next().await {
            let Some(caches) = caches.upgrade() else { return };
            caches.changed.send_modify(|n| *n = n.wrapping_add(1));
        }
    });
}
