//! What a user reads when something does not fit, word for word.

#![allow(clippy::unwrap_used, reason = "an unexpected None or Err is a failed test")]

use std::collections::{BTreeMap, BTreeSet};

use oblak_scheduler::*;

const GIB: u64 = 1 << 30;

fn node(id: u128, free_memory: u64) -> NodeSpec {
    let capacity = Resources::new(8000, free_memory, 100 * GIB);
    NodeSpec { zone: "a".to_owned(), ..NodeSpec::new(NodeId(id), format!("n{id}"), capacity) }
        .supports(&[Isolation::Container, Isolation::Microvm])
}

fn request() -> Request {
    Request::new(InstanceId(99), ProjectId(1), Isolation::Container, Resources::new(1000, GIB, GIB))
}

fn world(nodes: impl IntoIterator<Item = NodeSpec>) -> World {
    let mut world = World::new();
    nodes.into_iter().for_each(|node| world.upsert_node(node));
    world
}

fn without_microvm(mut node: NodeSpec) -> NodeSpec {
    node.isolations.insert(Isolation::Microvm, Support::No("/dev/kvm is not usable".into()));
    node
}

fn labelled(mut node: NodeSpec, key: &str, value: &str) -> NodeSpec {
    node.labels.insert(key.to_owned(), value.to_owned());
    node
}

fn running(world: &mut World, id: u128, node: u128, app: &str) {
    let labels = BTreeMap::from([("app".to_owned(), app.to_owned())]);
    let request = Request { id: InstanceId(id), labels, ..request() };
    world.place(request.placed_on(NodeId(node))).unwrap();
}

fn rule(direction: Direction, topology: Topology, selector: &str) -> AffinityRule {
    let selector = selector.split(',').map(|rule| rule.parse().unwrap()).collect();
    AffinityRule { direction, topology, strength: Strength::Required, selector }
}

#[track_caller]
fn refused(world: &World, request: &Request) -> String {
    decide(world, request).expect_err("nothing should fit").to_string()
}

#[test]
fn memory_and_isolation_read_as_in_the_manual() {
    let nodes = [node(1, 22_978_075_034), without_microvm(node(2, 16 * GIB)), node(3, 8 * GIB)];
    let big = Request { isolation: Isolation::Microvm, resources: Resources::new(1000, 1024 * GIB, 0), ..request() };
    assert_eq!(
        refused(&world(nodes), &big),
        "0 of 3 nodes fit: memory 1 TiB asked, 21.4 GiB free on n1 (3 nodes); \
         isolation microvm not supported on n2: /dev/kvm is not usable (1 node)"
    );
}

#[test]
fn a_cloud_without_nodes_says_so() {
    assert_eq!(refused(&world([]), &request()), "0 of 0 nodes fit: there are no nodes yet");
}

#[test]
fn every_resource_has_numbers() {
    let one = world([node(1, 4 * GIB)]);
    for (resources, text) in [
        (Resources::new(8500, 0, 0), "0 of 1 nodes fit: cpu 8.5 vCPU asked, 8 vCPU free on n1 (1 node)"),
        (Resources::new(0, 4 * GIB + 1, 0), "0 of 1 nodes fit: memory 4.1 GiB asked, 4 GiB free on n1 (1 node)"),
        (Resources::new(0, 0, 200 * GIB), "0 of 1 nodes fit: disk 200 GiB asked, 100 GiB free on n1 (1 node)"),
        (
            Resources::new(9000, 5 * GIB, 0),
            "0 of 1 nodes fit: cpu 9 vCPU asked, 8 vCPU free on n1 (1 node); memory 5 GiB asked, 4 GiB free on n1 (1 node)",
        ),
    ] {
        assert_eq!(refused(&one, &Request { resources, ..request() }), text);
    }
}

#[test]
fn what_is_placed_is_not_free_and_overcommit_counts() {
    let over = Overcommit { cpu: 2000, memory: 1000, disk: 1000 };
    let mut world =
        world([NodeSpec { overcommit: over, allocatable: Resources::new(6000, GIB, GIB), ..node(1, 4 * GIB) }]);
    let first = Request { id: InstanceId(1), resources: Resources::new(2500, 0, 0), ..request() };
    assert_eq!(decide(&world, &first).unwrap().node, NodeId(1));
    world.place(first.placed_on(NodeId(1))).unwrap();
    let big = Request { resources: Resources::new(10_000, 0, 0), ..request() };
    assert_eq!(refused(&world, &big), "0 of 1 nodes fit: cpu 10 vCPU asked, 9.5 vCPU free on n1 (1 node)");
    assert_eq!(
        world.place(big.placed_on(NodeId(1))).unwrap_err().to_string(),
        "cpu 10 vCPU asked, 9.5 vCPU free on n1"
    );
}

#[test]
fn the_closest_node_is_one_that_lacks_nothing_else() {
    // n2 has more memory but is down; n1 is where adding memory would help.
    let nodes = [node(1, 8 * GIB), NodeSpec { state: NodeState::Down, ..node(2, 30 * GIB) }, node(3, 4 * GIB)];
    let big = Request { resources: Resources::new(0, 32 * GIB, 0), ..request() };
    assert_eq!(
        refused(&world(nodes), &big),
        "0 of 3 nodes fit: memory 32 GiB asked, 8 GiB free on n1 (3 nodes); node n2 is down (1 node)"
    );
}

#[test]
fn conditions_on_the_node_are_named() {
    let nodes = || [labelled(node(1, GIB), "disk", "hdd"), node(2, GIB)];
    let volume = VolumeRef { id: VolumeId(7), name: "data".to_owned() };
    let mut with_volume = node(3, 0);
    with_volume.volumes.insert(VolumeId(7));
    let cases: Vec<(Vec<NodeSpec>, Request, &str)> = vec![
        (
            vec![
                NodeSpec { state: NodeState::Draining, ..node(1, GIB) },
                NodeSpec { state: NodeState::Down, ..node(2, GIB) },
            ],
            request(),
            "0 of 2 nodes fit: node n1 is draining (2 nodes)",
        ),
        (
            nodes().into(),
            Request { node_labels: vec!["disk=ssd".parse().unwrap()], ..request() },
            "0 of 2 nodes fit: label disk=ssd asked, n1 has disk=hdd (2 nodes)",
        ),
        (
            nodes().into(),
            Request { node_labels: vec!["!disk".parse().unwrap(), "gpu".parse().unwrap()], ..request() },
            "0 of 2 nodes fit: label gpu asked, n2 does not have it (2 nodes); label !disk asked, n1 has disk=hdd (1 node)",
        ),
        (
            nodes().into(),
            Request { zones: vec!["b".to_owned(), "c".to_owned()], ..request() },
            "0 of 2 nodes fit: zone b or c asked, n1 is in a (2 nodes)",
        ),
        (
            nodes().into(),
            Request { features: BTreeSet::from(["sriov".to_owned()]), ..request() },
            "0 of 2 nodes fit: feature sriov asked, n1 does not have it (2 nodes)",
        ),
        (
            nodes().into(),
            Request { isolation: Isolation::Metal, ..request() },
            "0 of 2 nodes fit: isolation metal not supported on n1: the node does not offer it (2 nodes)",
        ),
        (
            vec![node(1, GIB), with_volume.clone()],
            Request { volumes: vec![volume.clone()], ..request() },
            "0 of 2 nodes fit: memory 1 GiB asked, 0 B free on n3 (1 node); volume data is on n3, not on n1 (1 node)",
        ),
        (
            nodes().into(),
            Request { volumes: vec![volume], ..request() },
            "0 of 2 nodes fit: volume data is on no node (2 nodes)",
        ),
        (
            nodes().into(),
            Request { avoid_nodes: vec![NodeId(1), NodeId(2)], ..request() },
            "0 of 2 nodes fit: node n1 is excluded by the request (2 nodes)",
        ),
        (
            nodes().into(),
            Request { only_node: Some(NodeId(2)), node_labels: vec!["gpu".parse().unwrap()], ..request() },
            "0 of 2 nodes fit: label gpu asked, n2 does not have it (2 nodes); node n2 asked, n1 is another (1 node)",
        ),
        (
            nodes().into(),
            Request { only_node: Some(NodeId(9)), ..request() },
            "0 of 2 nodes fit: node 00000000-0000-0000-0000-000000000009 asked, it is not known (2 nodes)",
        ),
    ];
    for (nodes, request, text) in cases {
        assert_eq!(refused(&world(nodes), &request), text);
    }
}

#[test]
fn a_label_with_many_values_reads_the_same() {
    let nodes = (1..=40).map(|id| labelled(node(id, GIB), "host", &format!("h{id}")));
    let world = world(nodes);
    assert_eq!(world.class_count(), 1, "host names do not make classes");
    let on = |rule: &str| Request { node_labels: vec![rule.parse().unwrap()], ..request() };
    assert_eq!(decide(&world, &on("host=h17")).unwrap().node, NodeId(17));
    assert_eq!(decide(&world, &on("host!=h1")).unwrap().node, NodeId(2));
    assert_eq!(refused(&world, &on("host=h99")), "0 of 40 nodes fit: label host=h99 asked, n1 has host=h1 (40 nodes)");
    assert_eq!(refused(&world, &on("!host")), "0 of 40 nodes fit: label !host asked, n1 has host=h1 (40 nodes)");
}

#[test]
fn affinity_says_what_is_in_the_way() {
    let mut world = world([node(1, 4 * GIB), NodeSpec { zone: "b".to_owned(), ..node(2, 4 * GIB) }]);
    running(&mut world, 1, 1, "web");
    running(&mut world, 2, 1, "web");
    running(&mut world, 3, 2, "web");
    for (direction, topology, selector, text) in [
        (
            Direction::Apart,
            Topology::Node,
            "app=web",
            "0 of 2 nodes fit: anti-affinity to app=web on the same node asked, 1 on n2 (2 nodes)",
        ),
        (
            Direction::Apart,
            Topology::Zone,
            "app=web",
            "0 of 2 nodes fit: anti-affinity to app=web on the same zone asked, 1 on zone b of n2 (2 nodes)",
        ),
        (
            Direction::Together,
            Topology::Node,
            "app=db,!canary",
            "0 of 2 nodes fit: affinity to app=db,!canary on the same node asked, none on n1 (2 nodes)",
        ),
    ] {
        let request = Request { affinity: vec![rule(direction, topology, selector)], ..request() };
        assert_eq!(refused(&world, &request), text);
        // Another project is neither in the way nor of any help.
        let elsewhere = Request { project: ProjectId(2), ..request };
        assert_eq!(decide(&world, &elsewhere).is_ok(), direction == Direction::Apart);
    }
}

#[test]
fn the_first_of_a_group_may_start_anywhere_and_the_rest_follow() {
    let mut world = world([node(1, 4 * GIB), node(2, 4 * GIB)]);
    let member = |id: u128, strategy| Request {
        id: InstanceId(id),
        labels: BTreeMap::from([("app".to_owned(), "web".to_owned())]),
        affinity: vec![rule(Direction::Together, Topology::Node, "app=web")],
        strategy,
        ..request()
    };
    let requests = [member(1, Strategy::Spread), member(2, Strategy::Spread), member(3, Strategy::Spread)];
    let nodes: Vec<NodeId> = decide_batch(&mut world, &requests).into_iter().map(|d| d.unwrap().node).collect();
    assert_eq!(nodes, [NodeId(1); 3]);
}

#[test]
fn the_structured_form_carries_the_numbers() {
    let big = Request { resources: Resources::new(1000, 1024 * GIB, 0), ..request() };
    let explanation = decide(&world([node(1, 4 * GIB), node(2, 8 * GIB)]), &big).unwrap_err();
    assert_eq!(
        serde_json::to_value(&explanation).unwrap(),
        serde_json::json!({
            "nodes": 2, "fit": 0,
            "conditions": [{
                "condition": "memory", "text": "memory 1 TiB asked, 8 GiB free on n2",
                "nodes": 2, "charged": 2, "alone": 2, "closest": "00000000-0000-0000-0000-000000000002",
                "asked": 1024 * GIB, "free": 8 * GIB,
            }],
        })
    );
    let back: Explanation = serde_json::from_value(serde_json::to_value(&explanation).unwrap()).unwrap();
    assert_eq!(back, *explanation);
}

#[test]
fn what_fits_is_explained_too() {
    let world = world([node(1, 4 * GIB), node(2, GIB / 2)]);
    assert_eq!(
        explain(&world, &request()).to_string(),
        "1 of 2 nodes fit: memory 1 GiB asked, 512 MiB free on n2 (1 node)"
    );
    let decision = decide(&world, &request()).unwrap();
    assert_eq!(decision.to_string(), "n1: fullest node that fits: 100 % of its cpu is free");
}

#[test]
fn wishes_decide_between_nodes_that_fit() {
    let mut cached = node(2, 4 * GIB);
    cached.images.insert(ImageId(5));
    let world = world([node(1, 4 * GIB), cached]);
    let request = Request { image: Some(ImageId(5)), alternatives: 3, ..request() };
    let decision = decide(&world, &request).unwrap();
    assert_eq!(decision.to_string(), "n2: fullest node that fits: 100 % of its cpu is free, preferences add 5 %");
    assert_eq!(decision.alternatives.iter().map(|other| (&*other.name, other.score)).collect::<Vec<_>>(), [("n1", 0)]);
}
