//! Many instances at once on one node: more than fit into one commit.

use std::sync::Arc;
use std::time::Duration;

use oblak_control::{Candidate, run};
use oblak_model::cluster::PROTOCOL;
use oblak_model::{
    ClusterServer, Cpus, Instance, InstanceId, InstanceKind, InstanceSpec, Isolation, Kind, Node, NodeFacts, NodeId,
    NodePhase, NodeSpec, Object, Port, PortId, PortSpec, Resources, ServerId, Size, Timestamp,
};
use oblak_platform::{clock, random};
use oblak_store::objects::{self, Allocation};
use oblak_store::{MemoryStore, SharedStore, Txn, list_all};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

const INSTANCES: usize = 120;
const SIZE: Resources = Resources { vcpus: Cpus(500), memory: Size(64 << 20), disk: Size(1 << 30) };

fn candidate() -> Candidate {
    let server = ClusterServer {
        id: ServerId(Uuid::now_v7()),
        name: "s1".into(),
        endpoints: Vec::new(),
        version: "1".into(),
        protocol: PROTOCOL,
        started_at: Timestamp::EPOCH,
    };
    Candidate { server, alone: true }
}

async fn put<K: Kind>(store: &SharedStore, object: &Object<K>) {
    let txn = Txn::random().put(objects::key_of(object), objects::encode(object));
    let outcome = store.commit(txn).await.expect("the store answers");
    assert!(outcome.revision().is_some());
}

fn node() -> Node {
    let mut node = Node::new("n1", NodeSpec::default());
    node.metadata.id = Uuid::now_v7();
    node.status.phase = NodePhase::Ready;
    node.status.capacity = Resources { vcpus: Cpus(64_000), memory: Size::gib(64), disk: Size::gib(1024) };
    node.status.facts = NodeFacts { isolations: vec![Isolation::Container], ..NodeFacts::default() };
    node
}

fn instance(n: usize, user_data: &str) -> (Instance, Port) {
    let spec = InstanceSpec { image: "busybox".into(), user_data: Some(user_data.into()), ..InstanceSpec::default() };
    let mut instance = Instance::new(&format!("i{n}"), spec);
    instance.metadata.id = Uuid::now_v7();
    instance.metadata.project = Some("default".into());
    instance.status.resolved.isolation = Isolation::Container;
    instance.status.resolved.resources = SIZE;
    let spec =
        PortSpec { network: "default".into(), instance: InstanceId(instance.metadata.id), ..PortSpec::default() };
    let mut port = Port::new(&format!("i{n}-0"), spec);
    port.metadata.id = Uuid::now_v7();
    port.metadata.project = Some("default".into());
    instance.status.resolved.ports.push(PortId(port.metadata.id));
    (instance, port)
}

/// All find their place without a pause between the commits, though each commit changes what is reserved on the node, and the largest
/// allowed user data would not fit into the commits that the number of operations allows.
#[tokio::test(flavor = "multi_thread")]
async fn a_burst_is_placed_on_one_node_without_pauses() {
    let store: SharedStore = Arc::new(MemoryStore::new());
    let node = node();
    let id = NodeId(node.metadata.id);
    put(&store, &node).await;
    let reserved = objects::encode_value(&Allocation::default());
    let lease = objects::encode_value(&1u64);
    let txn = Txn::random().put(objects::allocation_key(id), reserved).put(objects::lease_key(id), lease);
    assert!(store.commit(txn).await.unwrap().revision().is_some());
    let user_data = "x".repeat(oblak_model::MAX_USER_DATA);
    for n in 0..INSTANCES {
        let (instance, port) = instance(n, &user_data);
        put(&store, &instance).await;
        put(&store, &port).await;
    }
    let cancel = CancellationToken::new();
    let control = tokio::spawn(run(store.clone(), clock::system(), random::system(), candidate(), cancel.clone()));
    let all_placed = async {
        loop {
            let (entries, _) =
                list_all(store.as_ref(), &objects::object_prefix::<InstanceKind>(None), None).await.unwrap();
            let placed = entries.iter().filter(|e| {
                let instance: Instance = objects::decode(e).unwrap();
                instance.status.placement.is_some_and(|p| p.node == id)
            });
            if placed.count() == INSTANCES {
                return;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), all_placed).await.expect("all are placed");
    cancel.cancel();
    control.await.unwrap().unwrap();
    let entry = store.get(&objects::allocation_key(id)).await.unwrap().unwrap();
    let reserved: Allocation = objects::decode_value(&entry.key, &entry.value).unwrap();
    assert_eq!(reserved.instances, INSTANCES as u64);
    assert_eq!(reserved.resources.vcpus, Cpus(500 * INSTANCES as u32));
    let events =
        list_all(store.as_ref(), &objects::object_prefix::<oblak_model::EventKind>(None), None).await.unwrap().0;
    assert_eq!(events.len(), INSTANCES, "each is told once");
}
