use std::collections::BTreeMap;

use oblak_model::wire::{NODE_FINALIZER, NewEvent};
use oblak_model::{
    About, Cpus, Instance, InstanceId, InstanceKind, InstanceSpec, Isolation, Node, NodeFacts, NodePhase, NodeSpec,
    Phase, Port, PortSpec, Publish, Resources, Revision, Severity, Size, SubnetId, Timestamp, Volume, VolumePhase,
    VolumeSpec,
};
use oblak_store::objects::{self, Allocation};
use oblak_store::{CommitOutcome, Guard, MAX_TXN_OPS, MemoryStore, Prefix, Store, Txn, list_all};
use uuid::Uuid;

use super::*;

fn node() -> Node {
    let mut node = Node::new("n1", NodeSpec::default());
    node.metadata.id = Uuid::from_u128(1);
    node.status.phase = NodePhase::Ready;
    node.status.capacity = Resources { vcpus: Cpus(2000), memory: Size::gib(4), disk: Size::gib(100) };
    node.status.facts = NodeFacts { isolations: vec![Isolation::Vm], ..NodeFacts::default() };
    node
}

fn instance(name: &str, n: u128) -> Instance {
    let mut instance = Instance::new(name, InstanceSpec { image: "tiny".into(), ..InstanceSpec::default() });
    instance.metadata.id = Uuid::from_u128(n);
    instance.metadata.project = Some("default".into());
    instance.spec.publish = vec![Publish { host_port: 8080, port: 80, ..Publish::default() }];
    instance.status.resolved.resources = Resources { vcpus: Cpus(1000), memory: Size::gib(1), disk: Size::gib(4) };
    instance
}

fn port(of: &Instance) -> Port {
    let mut port = Port::new(
        &format!("{}-0", of.metadata.name),
        PortSpec { instance: InstanceId(of.metadata.id), ..PortSpec::default() },
    );
    port.metadata.id = Uuid::from_u128(of.metadata.id.as_u128() + 1000);
    port.metadata.project = Some("default".into());
    port.status.subnets = vec![SubnetId(Uuid::from_u128(7))];
    port.status.addresses = vec!["10.80.0.2".parse().unwrap()];
    port
}

async fn commit(store: &MemoryStore, ops: Ops) -> Revision {
    let mut batch = Batch::new();
    batch.absorb(ops);
    let txn = batch.into_txn(Txn::random().id);
    match store.commit(txn).await.unwrap() {
        CommitOutcome::Committed(revision) => revision,
        other => panic!("{other:?}"),
    }
}

async fn read<K: oblak_model::Kind>(store: &MemoryStore, object: &oblak_model::Object<K>) -> oblak_model::Object<K> {
    objects::decode(&store.get(&objects::key_of(object)).await.unwrap().unwrap()).unwrap()
}

async fn allocation(store: &MemoryStore, node: &Node) -> Option<(Allocation, Revision)> {
    let key = objects::allocation_key(node.metadata.id.into());
    let entry = store.get(&key).await.unwrap()?;
    Some((objects::decode_value(&key, &entry.value).unwrap(), entry.revision))
}

/// What placing takes, removing gives back: afterwards only what was there before is left.
#[tokio::test]
async fn placing_and_removing_leaves_nothing() {
    let store = MemoryStore::new();
    let (node, web) = (node(), instance("web", 10));
    let port = port(&web);
    let mut data = Volume::new("data", VolumeSpec { size: Size::gib(1), ..VolumeSpec::default() });
    data.metadata.id = Uuid::from_u128(20);
    data.metadata.project = Some("default".into());
    data.status.attached_to = Some(InstanceId(web.metadata.id));
    data.status.phase = VolumePhase::InUse;
    let mut ops = Ops::new();
    ops.create(&web);
    ops.create(&port);
    ops.create(&data);
    ops.put(
        objects::address_key(port.status.subnets[0], port.status.addresses[0]),
        objects::encode_value(&port.metadata.id),
    );
    commit(&store, ops).await;

    let (web, port, data) = (read(&store, &web).await, read(&store, &port).await, read(&store, &data).await);
    let assignment = Assignment {
        instance: &web,
        node: &node,
        why: "the only one",
        at: Timestamp::EPOCH,
        ports: std::slice::from_ref(&port),
        volumes: std::slice::from_ref(&data),
        allocation: allocation(&store, &node).await,
    };
    commit(&store, assign_instance(&assignment)).await;
    let placed = read(&store, &web).await;
    assert_eq!(placed.status.phase, Phase::Scheduled);
    assert!(placed.metadata.finalizers.contains(NODE_FINALIZER));
    let reserved = allocation(&store, &node).await.unwrap().0;
    assert_eq!((reserved.instances, reserved.resources), (1, web.status.resolved.resources));
    let data = read(&store, &data).await;
    assert_eq!(data.status.node, Some(node.metadata.id.into()));

    // A second instance that publishes the same port cannot be placed on the node.
    let other = instance("other", 11);
    let mut ops = Ops::new();
    ops.create(&other);
    commit(&store, ops).await;
    let other = read(&store, &other).await;
    let ops = assign_instance(&Assignment {
        instance: &other,
        ports: &[],
        volumes: &[],
        allocation: allocation(&store, &node).await,
        ..assignment
    });
    let mut batch = Batch::new();
    batch.absorb(ops);
    match store.commit(batch.into_txn(Txn::random().id)).await.unwrap() {
        CommitOutcome::GuardFailed { guard: Guard::Absent(key), .. } => assert!(key.as_str().starts_with("/hostport/")),
        other => panic!("{other:?}"),
    }

    let port = read(&store, &port).await;
    let parts = InstanceParts {
        instance: &placed,
        ports: &[port],
        volumes: &[data],
        allocation: allocation(&store, &node).await,
    };
    commit(&store, finalize_instance(&parts)).await;
    let left: Vec<_> = list_all(&store, &Prefix::all(), None).await.unwrap().0;
    let mut keys: Vec<_> = left.iter().map(|e| e.key.segments().next().unwrap().to_string()).collect();
    keys.dedup();
    assert_eq!(keys, ["allocation", "instance", "name", "volume"], "{left:?}");
    assert_eq!(allocation(&store, &node).await.unwrap().0, Allocation::default());
    let data: Volume = objects::decode(left.iter().find(|e| e.key.starts_with("/volume/")).unwrap()).unwrap();
    assert_eq!((data.status.attached_to, data.status.phase), (None, VolumePhase::Available));
}

#[test]
fn a_resize_keeps_to_the_limits_of_the_node() {
    let (node, web) = (node(), instance("web", 10));
    let placement = oblak_model::Placement {
        node: node.metadata.id.into(),
        node_name: "n1".into(),
        resources: web.status.resolved.resources,
        at: Timestamp::EPOCH,
        why: String::new(),
        generation: 1,
        fenced: false,
        fence_turn: 1,
    };
    let reserved = Resources { vcpus: Cpus(2000), memory: Size::gib(3), disk: Size::gib(8) };
    let allocation = (Allocation { resources: reserved, instances: 2 }, Revision::new(1, 1));
    let wanted = |memory| Resources { memory, ..placement.resources };
    let (ops, after) = resize(&placement, wanted(Size::gib(2)), &node, allocation).unwrap();
    assert_eq!(after.resources.memory, Size::gib(2));
    assert_eq!(ops.writes.len(), 1);
    let why = resize(&placement, wanted(Size::gib(3)), &node, allocation).unwrap_err();
    assert_eq!(why.to_string(), "0 of 1 nodes fit: memory 3 GiB asked, 2 GiB free on n1 (1 node)");
    // Shrinking always works, even on a node that is over its limits.
    let full = (Allocation { resources: Resources { memory: Size::gib(64), ..reserved }, instances: 2 }, allocation.1);
    assert!(resize(&placement, wanted(Size::mib(512)), &node, full).is_ok());
}

#[test]
fn the_largest_instance_fits_into_one_commit() {
    let mut big = instance("big", 10);
    // What the API accepts: publish + volumes + interfaces <= 46.
    big.spec.publish = (0..22).map(|n| Publish { host_port: 1000 + n, port: 80, ..Publish::default() }).collect();
    let ports: Vec<_> = (0..8)
        .map(|n| {
            let mut p = port(&big);
            p.metadata.name = format!("big-{n}");
            p.metadata.id = Uuid::from_u128(500 + n);
            p
        })
        .collect();
    let volumes: Vec<_> = (0..16)
        .map(|n| {
            let mut v = Volume::new(&format!("v{n}"), VolumeSpec::default());
            v.metadata.id = Uuid::from_u128(600 + n);
            v.status.attached_to = Some(InstanceId(big.metadata.id));
            v
        })
        .collect();
    let node = node();
    let assign = assign_instance(&Assignment {
        instance: &big,
        node: &node,
        why: "",
        at: Timestamp::EPOCH,
        ports: &ports,
        volumes: &volumes,
        allocation: None,
    });
    assert!(assign.guards.len() + assign.writes.len() + 2 <= MAX_TXN_OPS);
    big.status.placement = Some(oblak_model::Placement {
        node: node.metadata.id.into(),
        node_name: String::new(),
        resources: Resources::default(),
        at: Timestamp::EPOCH,
        why: String::new(),
        generation: 1,
        fenced: false,
        fence_turn: 1,
    });
    let allocation = Some((Allocation::default(), Revision::new(1, 1)));
    let end = finalize_instance(&InstanceParts { instance: &big, ports: &ports, volumes: &volumes, allocation });
    assert!(end.guards.len() + end.writes.len() + 2 <= MAX_TXN_OPS);
}

#[test]
fn events_are_counted_not_repeated() {
    let mut recent = Recent::new();
    let new = NewEvent {
        project: Some("default".into()),
        about: About { kind: "instance".into(), name: "web".into(), id: Uuid::from_u128(1) },
        severity: Severity::Warning,
        reason: "DoesNotFit".into(),
        message: "no".into(),
    };
    let at = |secs: i64| Timestamp::from_micros(secs * 1_000_000);
    let first = recent.note(Uuid::from_u128(5), &new, "control", at(0));
    let second = recent.note(Uuid::from_u128(6), &new, "control", at(60));
    assert_eq!((second.metadata.id, second.spec.count, second.spec.first_at), (first.metadata.id, 2, at(0)));
    let later = recent.note(Uuid::from_u128(7), &new, "control", at(60 + 601));
    assert_eq!((later.metadata.id, later.spec.count), (Uuid::from_u128(7), 1));
}

#[test]
fn the_world_explains_itself() {
    let (node, mut huge) = (node(), instance("huge", 10));
    huge.status.resolved.resources.memory = Size::gib(1024);
    huge.status.resolved.isolation = Isolation::Vm;
    let world = build_world([&node], [], [], []);
    let request = request(&huge, &[], oblak_scheduler::Strategy::Pack);
    let why = explanation(&oblak_scheduler::explain(&world, &request));
    assert_eq!(why.to_string(), "0 of 1 nodes fit: memory 1 TiB asked, 4 GiB free on n1 (1 node)");
    huge.status.resolved.resources.memory = Size::gib(1);
    let request = self::request(&huge, &[], oblak_scheduler::Strategy::Pack);
    assert!(oblak_scheduler::decide(&world, &request).is_ok());
}

#[test]
fn a_batch_keeps_the_first_guard_and_the_last_write() {
    let mut web = instance("web", 10);
    let mut batch = Batch::new();
    let mut ops = Ops::new();
    ops.create(&web);
    batch.absorb(ops);
    web.metadata.labels = BTreeMap::from([("a".to_string(), "b".to_string())]);
    let mut ops = Ops::new();
    ops.update(&web);
    batch.absorb(ops);
    let txn = batch.into_txn(Txn::random().id);
    assert_eq!((txn.guards.len(), txn.writes.len()), (2, 2));
    assert!(txn.guards.iter().all(|g| matches!(g, Guard::Absent(_))));
    let key = objects::object_key::<InstanceKind>("default", web.metadata.id);
    assert!(txn.writes.iter().any(
        |w| matches!(w, oblak_store::Write::Put { key: k, value, .. } if *k == key && value == &objects::encode(&web))
    ));
}

/// Moving takes from one node what it gives to the other, raises what fences the old node, and leaves that node its task.
#[tokio::test]
async fn moving_is_one_commit_that_supersedes_the_old_node() {
    let store = MemoryStore::new();
    let (first, mut second, web) = (node(), node(), instance("web", 10));
    second.metadata.id = Uuid::from_u128(2);
    second.metadata.name = "n2".into();
    let port = port(&web);
    let mut data = Volume::new("data", VolumeSpec { size: Size::gib(1), ..VolumeSpec::default() });
    data.metadata.id = Uuid::from_u128(20);
    data.metadata.project = Some("default".into());
    let mut ops = Ops::new();
    ops.create(&web);
    ops.create(&port);
    ops.create(&data);
    commit(&store, ops).await;
    let (web, port, data) = (read(&store, &web).await, read(&store, &port).await, read(&store, &data).await);
    let placed = assign_instance(&Assignment {
        instance: &web,
        node: &first,
        why: "first",
        at: Timestamp::EPOCH,
        ports: std::slice::from_ref(&port),
        volumes: std::slice::from_ref(&data),
        allocation: None,
    });
    commit(&store, placed).await;
    let (web, port, data) = (read(&store, &web).await, read(&store, &port).await, read(&store, &data).await);
    let to = |node| Relocation {
        instance: &web,
        to: node,
        why: "n1 is lost",
        at: Timestamp::EPOCH,
        ports: std::slice::from_ref(&port),
        volumes: std::slice::from_ref(&data),
        from_allocation: None,
        to_allocation: None,
        phase: Phase::Scheduled,
        reason: "Evacuated",
    };
    assert!(relocate(&to(&first)).is_none(), "it is there already");
    let from_allocation = allocation(&store, &first).await;
    let ops = relocate(&Relocation { from_allocation, ..to(&second) }).unwrap();
    commit(&store, ops.clone()).await;

    let moved = read(&store, &web).await;
    let placement = moved.status.placement.unwrap();
    assert_eq!((placement.node, placement.generation), (second.metadata.id.into(), 2));
    assert_eq!(moved.status.phase, Phase::Scheduled);
    assert_eq!(allocation(&store, &first).await.unwrap().0, Allocation::default());
    assert_eq!(allocation(&store, &second).await.unwrap().0.resources, web.status.resolved.resources);
    assert_eq!(read(&store, &port).await.status.node, Some(second.metadata.id.into()));
    let data = read(&store, &data).await;
    assert_eq!((data.status.node, data.status.epoch), (Some(second.metadata.id.into()), 1));
    let ports = store.get(&objects::host_port_key(first.metadata.id.into(), "tcp", 8080)).await.unwrap();
    assert!(ports.is_none(), "the old node's port is free again");
    let key = objects::superseded_key(first.metadata.id.into(), InstanceId(web.metadata.id));
    let left = store.get(&key).await.unwrap().unwrap();
    assert_eq!(objects::decode_value::<objects::Superseded>(&key, &left.value).unwrap().placement, 1);

    // The same plan again, or one made from an older view, does nothing.
    let mut again = Batch::new();
    again.absorb(ops);
    assert!(matches!(store.commit(again.into_txn(Txn::random().id)).await.unwrap(), CommitOutcome::GuardFailed { .. }));
}

#[tokio::test]
async fn a_move_reserves_both_ends_and_leaves_one() {
    let store = MemoryStore::new();
    let (first, mut second, web) = (node(), node(), instance("web", 10));
    second.metadata.id = Uuid::from_u128(2);
    second.metadata.name = "n2".into();
    let port = port(&web);
    let mut ops = Ops::new();
    ops.create(&web);
    ops.create(&port);
    commit(&store, ops).await;
    let (mut web, port) = (read(&store, &web).await, read(&store, &port).await);
    web.spec.migration = Some(oblak_model::Migrate { to: "n2".into(), live: true, cancel: false, generation: 1 });
    let ports = std::slice::from_ref(&port);
    let at = Timestamp::EPOCH;
    let assignment =
        Assignment { instance: &web, node: &first, why: "first", at, ports, volumes: &[], allocation: None };
    commit(&store, assign_instance(&assignment)).await;
    let (mut web, port) = (read(&store, &web).await, read(&store, &port).await);
    let given = web.status.resolved.resources;

    commit(&store, reserve(&web, &second, at, None).unwrap()).await;
    web = read(&store, &web).await;
    assert!(web.status.moves_to(second.metadata.id.into()) && !web.status.moves_to(first.metadata.id.into()));
    for end in [&first, &second] {
        assert_eq!(allocation(&store, end).await.unwrap().0.resources, given);
    }

    // Given up: the reservation is gone, the instance where it was.
    let phase = oblak_model::MigrationPhase::Cancelled;
    let ops = give_up(&mut web, phase, "Cancelled", "", at, allocation(&store, &second).await);
    let mut all = Ops::new();
    all.update(&web);
    all.extend(ops);
    commit(&store, all).await;
    web = read(&store, &web).await;
    assert_eq!(allocation(&store, &second).await.unwrap().0, Allocation::default());
    assert_eq!(web.status.placement.as_ref().unwrap().node, first.metadata.id.into());
    let switching = |web: &Instance, from, to| {
        switch(&Switch {
            instance: web,
            to: &second,
            ports: std::slice::from_ref(&port),
            from_allocation: from,
            to_allocation: to,
            downtime_ms: Some(40),
            at,
        })
    };
    assert!(switching(&web, None, None).is_none(), "what was given up is never switched");

    // Again, to the end. Of the switch and a rollback planned from the same view one is committed.
    web.spec.migration.as_mut().unwrap().generation = 2;
    commit(&store, reserve(&web, &second, at, allocation(&store, &second).await).unwrap()).await;
    web = read(&store, &web).await;
    let mut rolled_back = web.clone();
    let back = give_up(&mut rolled_back, phase, "Cancelled", "", at, allocation(&store, &second).await);
    let mut rollback = Ops::new();
    rollback.update(&rolled_back);
    rollback.extend(back);
    let mut lost = web.clone();
    lost.status.placement.as_mut().unwrap().node = Uuid::from_u128(3).into();
    assert!(switching(&lost, None, None).is_none(), "what was started elsewhere meanwhile is not switched");
    let ops = switching(&web, allocation(&store, &first).await, allocation(&store, &second).await).unwrap();
    commit(&store, ops).await;
    let mut late = Batch::new();
    late.absorb(rollback);
    assert!(matches!(store.commit(late.into_txn(Txn::random().id)).await.unwrap(), CommitOutcome::GuardFailed { .. }));
    let moved = read(&store, &web).await;
    let placement = moved.status.placement.as_ref().unwrap();
    assert_eq!(placement.node, second.metadata.id.into());
    assert_eq!(placement.fence_turn, 2, "it runs there without a fence until its agent has said that there is one");
    assert_eq!(moved.status.phase, Phase::Running);
    let migration = moved.status.migration.as_ref().unwrap();
    assert_eq!((migration.phase, migration.downtime_ms), (oblak_model::MigrationPhase::Finishing, Some(40)));
    assert_eq!(allocation(&store, &first).await.unwrap().0, Allocation::default());
    assert_eq!(allocation(&store, &second).await.unwrap().0.resources, given);
    assert_eq!(read(&store, &port).await.status.node, Some(second.metadata.id.into()));
}
