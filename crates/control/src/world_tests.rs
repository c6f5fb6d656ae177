//! The world that is kept up is the world that would be built now, whatever happened in between.

use std::time::Duration;

use oblak_model::{
    Cpus, ImageKind, ImagePhase, ImageSource, ImageSpec, InstanceKind, InstanceSpec, Isolation, Kind, MigrationPhase,
    MigrationStatus, NodeFacts, NodeKind, NodePhase, NodeSpec, Object, Placement, Resources, Size, VolumeSpec,
};
use oblak_platform::clock;
use oblak_store::{CommitOutcome, HistoryLimits, MemoryStore, SharedStore, Txn, Write, objects};
use proptest::prelude::*;

use super::*;
use crate::drive::Reconciler as _;
use crate::lifecycle::Batch;
use crate::placement::Placer;

const NODES: u128 = 4;
const OTHERS: u128 = 6;

#[derive(Clone, Debug)]
enum Step {
    Node {
        id: u128,
        zone: bool,
        up: bool,
    },
    NodeGone {
        id: u128,
    },
    Instance {
        id: u128,
        label: u8,
        size: u8,
        node: Option<u128>,
        /// Where it is moving.
        to: Option<u128>,
    },
    InstanceGone {
        id: u128,
    },
    Volume {
        id: u128,
        node: Option<u128>,
    },
    Image {
        id: u128,
        ready: bool,
        nodes: Vec<u128>,
    },
    /// A plan of which this part of the changes is committed; the rest is lost.
    Plan {
        committed: usize,
    },
    /// Whoever is behind must list again.
    Compact,
    Look,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let node = || prop::option::of(0..NODES);
    let step = prop_oneof![
        3 => (0..NODES, any::<bool>(), any::<bool>()).prop_map(|(id, zone, up)| Step::Node { id, zone, up }),
        1 => (0..NODES).prop_map(|id| Step::NodeGone { id }),
        6 => (0..OTHERS, 0..3u8, 1..4u8, node(), node())
            .prop_map(|(id, label, size, node, to)| Step::Instance { id, label, size, node, to }),
        2 => (0..OTHERS).prop_map(|id| Step::InstanceGone { id }),
        2 => (0..OTHERS, node()).prop_map(|(id, node)| Step::Volume { id, node }),
        2 => (0..OTHERS, any::<bool>(), prop::collection::vec(0..NODES, 0..3))
            .prop_map(|(id, ready, nodes)| Step::Image { id, ready, nodes }),
        4 => (0..4usize).prop_map(|committed| Step::Plan { committed }),
        1 => Just(Step::Compact),
        4 => Just(Step::Look),
    ];
    prop::collection::vec(step, 1..60)
}

fn uuid(kind: u128, n: u128) -> Uuid {
    Uuid::from_u128((kind << 64) | (n + 1))
}

fn node_id(n: u128) -> NodeId {
    NodeId(uuid(1, n))
}

struct Cloud {
    store: SharedStore,
    caches: Arc<Caches>,
    placer: Placer,
    live: LiveWorld,
}

impl Cloud {
    async fn new() -> Self {
        let limits = HistoryLimits { revisions: 100_000, age: Duration::from_secs(3600) };
        let store: SharedStore = Arc::new(MemoryStore::with(clock::system(), limits));
        let caches = Caches::start(&store).await.unwrap();
        Self { store, caches, placer: Placer::default(), live: LiveWorld::default() }
    }

    async fn write(&self, write: Write) {
        let outcome = self.store.commit(Txn { writes: vec![write], ..Txn::random() }).await.unwrap();
        assert!(matches!(outcome, CommitOutcome::Committed(_)), "{outcome:?}");
    }

    async fn put<K: Kind>(&self, mut object: Object<K>, id: Uuid) {
        object.metadata.id = id;
        self.write(objects::put(objects::key_of(&object), objects::encode(&object))).await;
    }

    async fn delete<K: Kind>(&self, scope: &str, id: Uuid) {
        self.write(Write::Delete { key: objects::object_key::<K>(scope, id) }).await;
    }

    async fn caught_up(&self) {
        let head = self.store.revision().await.unwrap();
        self.caches.catch_up(head).await;
    }

    async fn step(&mut self, step: Step) {
        match step {
            Step::Node { id, zone, up } => self.put(node(zone, up), node_id(id).0).await,
            Step::NodeGone { id } => self.delete::<NodeKind>("_", node_id(id).0).await,
            Step::Instance { id, label, size, node, to } => {
                let mut instance = instance(label, size, node);
                instance.status.migration = to.map(|to| moving(&instance, to));
                self.put(instance, uuid(2, id)).await;
            }
            Step::InstanceGone { id } => self.delete::<InstanceKind>("p", uuid(2, id)).await,
            Step::Volume { id, node } => {
                let mut volume = Volume::new("v", VolumeSpec::default());
                volume.metadata.project = Some("p".into());
                volume.status.node = node.map(node_id);
                self.put(volume, uuid(3, id)).await;
            }
            Step::Image { id, ready, nodes } => self.put(image(ready, nodes), uuid(4, id)).await,
            Step::Plan { committed } => self.plan(committed).await,
            Step::Compact => {
                let head = self.store.revision().await.unwrap();
                self.store.compact(head).await.unwrap();
            }
            Step::Look => self.look().await,
        }
    }

    /// Plans as the product does, and commits only some of it.
    async fn plan(&mut self, committed: usize) {
        self.caught_up().await;
        let changes = {
            let _held = self.caches.hold().await;
            self.placer.plan(&self.caches, Timestamp::EPOCH)
        };
        for change in changes.into_iter().take(committed) {
            let mut batch = Batch::new();
            batch.absorb(change.ops);
            let outcome = self.store.commit(batch.into_txn(Txn::random().id)).await.unwrap();
            assert!(!matches!(outcome, CommitOutcome::Unknown(_)));
        }
    }

    async fn look(&mut self) {
        self.caught_up().await;
        let _held = self.caches.hold().await;
        // The one that only looks, and the one that also tries things out.
        self.live.catch_up(&self.caches);
        self.same(&self.live);
        self.placer.live.catch_up(&self.caches);
        self.same(&self.placer.live);
    }

    fn same(&self, live: &LiveWorld) {
        live.audit(&self.caches).unwrap();
    }
}

fn node(zone: bool, up: bool) -> Node {
    let mut node = Node::new("n", NodeSpec { zone: if zone { "a" } else { "b" }.into(), ..NodeSpec::default() });
    node.status.phase = if up { NodePhase::Ready } else { NodePhase::Down };
    node.status.capacity = Resources { vcpus: Cpus(4000), memory: Size::gib(8), disk: Size::gib(80) };
    node.status.facts = NodeFacts { isolations: vec![Isolation::Container], ..NodeFacts::default() };
    node
}

fn instance(label: u8, size: u8, node: Option<u128>) -> Instance {
    let mut instance = Instance::new("i", InstanceSpec { image: "busybox".into(), ..InstanceSpec::default() });
    instance.metadata.project = Some("p".into());
    instance.metadata.labels.insert("app".into(), format!("a{label}"));
    let resources = Resources {
        vcpus: Cpus(1000 * u32::from(size)),
        memory: Size::gib(u64::from(size)),
        disk: Size::gib(u64::from(size)),
    };
    instance.status.resolved.isolation = Isolation::Container;
    instance.status.resolved.resources = resources;
    instance.status.placement = node.map(|n| Placement {
        node: node_id(n),
        node_name: "n".into(),
        resources,
        at: Timestamp::EPOCH,
        why: String::new(),
        generation: 1,
        fenced: false,
        fence_turn: 0,
    });
    instance
}

fn moving(instance: &Instance, to: u128) -> MigrationStatus {
    MigrationStatus {
        generation: 1,
        phase: MigrationPhase::Copying,
        live: false,
        from: instance.status.placement.as_ref().map_or_else(NodeId::default, |p| p.node),
        from_name: String::new(),
        to: node_id(to),
        to_name: String::new(),
        resources: instance.status.resolved.resources,
        address: None,
        total: Size::ZERO,
        remaining: Size::ZERO,
        downtime_ms: None,
        arrived: false,
        left: false,
        reason: String::new(),
        message: String::new(),
        started_at: Timestamp::EPOCH,
        ended_at: None,
    }
}

fn image(ready: bool, nodes: Vec<u128>) -> Image {
    let spec = ImageSpec {
        source: ImageSource::Recipe { recipe: "busybox".into() },
        checksum: None,
        firmware: oblak_model::ImageFirmware::Bios,
        on_demand: false,
        visibility: oblak_model::Visibility::Public,
        min_memory: Size::ZERO,
        content: None,
        retry_generation: 0,
    };
    let mut image = Object::<ImageKind>::new("image", spec);
    image.metadata.project = Some("p".into());
    image.status.phase = if ready { ImagePhase::Ready } else { ImagePhase::Importing };
    image.status.nodes = nodes.into_iter().map(node_id).collect();
    image
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]
    #[test]
    fn is_what_would_be_built_now(steps in steps()) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        runtime.block_on(async {
            let mut cloud = Cloud::new().await;
            for step in steps {
                cloud.step(step).await;
            }
            cloud.look().await;
        });
    }
}

/// The mirrors tell the last thousand changes one by one; who missed more reads everything again.
#[tokio::test]
async fn who_falls_behind_starts_over() {
    let mut cloud = Cloud::new().await;
    cloud.step(Step::Node { id: 0, zone: true, up: true }).await;
    cloud.look().await;
    for n in 0..3000u128 {
        cloud.step(Step::Instance { id: n % 7, label: 0, size: 1, node: (n % 2 == 0).then_some(0), to: None }).await;
    }
    let before = cloud.live.rebuilt;
    cloud.look().await;
    assert_eq!(cloud.live.rebuilt, before + 1);
    // And otherwise it does not.
    cloud.step(Step::Instance { id: 1, label: 1, size: 2, node: Some(0), to: None }).await;
    cloud.look().await;
    assert_eq!(cloud.live.rebuilt, before + 1);
}

/// Many that fit nowhere do not keep one waiting that does.
#[tokio::test]
async fn those_who_do_not_fit_do_not_block_the_others() {
    let mut cloud = Cloud::new().await;
    cloud.step(Step::Node { id: 0, zone: true, up: true }).await;
    for n in 0..600u128 {
        let mut large = instance(0, 1, None);
        // All different, so that each has to be looked at.
        large.status.resolved.resources.memory = Size(Size::gib(1024).0 + n as u64);
        cloud.put(large, uuid(2, n)).await;
    }
    let mut small = instance(0, 1, None);
    small.metadata.created_at = Timestamp::from_micros(1);
    cloud.put(small, uuid(2, 1000)).await;
    let key = objects::object_key::<InstanceKind>("p", uuid(2, 1000));
    for _ in 0..20 {
        cloud.plan(usize::MAX).await;
        cloud.caught_up().await;
        if cloud.caches.instances.get(&key).unwrap().value.status.placement.is_some() {
            return;
        }
    }
    panic!("the small one was never placed");
}
