//! What would happen if nodes went down or came, played on a copy.

use std::collections::BTreeSet;
use std::time::Duration;

use oblak_model::{
    AffinityTerm, Cpus, Instance, InstanceId, InstanceSpec, Isolation, Node, NodeFacts, NodeId, NodePhase, NodeSpec,
    Phase, Placement, Port, PortId, PortSpec, Publish, Resources, Size, Timestamp, Topology, Volume, VolumeId,
    VolumeSpec,
};
use oblak_sim::whatif::scale::{self, Scale};
use oblak_sim::whatif::{Answer, Fate, LiveState, Outcome, Question, ask};
use uuid::Uuid;

const LEASE: Duration = Duration::from_secs(15);

fn node(n: u128, isolations: &[Isolation]) -> Node {
    let mut node = Node::new(&format!("n{n}"), NodeSpec::default());
    node.metadata.id = Uuid::from_u128(n);
    node.status.phase = NodePhase::Ready;
    node.status.capacity = Resources { vcpus: Cpus(4000), memory: Size::gib(8), disk: Size::gib(100) };
    node.status.facts = NodeFacts { isolations: isolations.to_vec(), ..NodeFacts::default() };
    node
}

/// Adds an instance of so much memory on a node.
fn instance(state: &mut LiveState, name: &str, gib: u64, on: Option<u128>) -> usize {
    let n = 100 + state.instances.len() as u128;
    let mut instance = Instance::new(name, InstanceSpec { image: "busybox".into(), ..InstanceSpec::default() });
    instance.metadata.id = Uuid::from_u128(n);
    instance.metadata.project = Some("default".into());
    let resources = Resources { vcpus: Cpus(500), memory: Size::gib(gib), disk: Size::gib(1) };
    let status = &mut instance.status;
    status.resolved.isolation = Isolation::Container;
    status.resolved.resources = resources;
    status.phase = if on.is_some() { Phase::Running } else { Phase::Pending };
    status.placement = on.map(|node| Placement {
        node: NodeId(Uuid::from_u128(node)),
        node_name: format!("n{node}"),
        resources,
        at: Timestamp::EPOCH,
        why: String::new(),
        generation: 1,
        fenced: false,
        fence_turn: 0,
    });
    let owner = InstanceId(instance.metadata.id);
    let mut port =
        Port::new(&format!("{name}-0"), PortSpec { network: "default".into(), instance: owner, ..PortSpec::default() });
    port.metadata.id = Uuid::from_u128(n + 1000);
    port.metadata.project = Some("default".into());
    port.status.node = on.map(|node| NodeId(Uuid::from_u128(node)));
    instance.status.resolved.ports.push(PortId(port.metadata.id));
    state.ports.push(port);
    state.instances.push(instance);
    state.instances.len() - 1
}

fn three_nodes() -> LiveState {
    let both = [Isolation::Container, Isolation::Vm];
    let nodes = vec![node(1, &both), node(2, &[Isolation::Vm]), node(3, &both)];
    LiveState { at: Timestamp::from_micros(1_800_000_000_000_000), nodes, ..LiveState::default() }
}

fn down(state: &LiveState, nodes: &[u128]) -> Answer {
    let nodes: BTreeSet<NodeId> = nodes.iter().map(|n| NodeId(Uuid::from_u128(*n))).collect();
    ask(state, &Question::NodesDown(nodes), LEASE).expect("the copy can be played")
}

fn fate<'a>(answer: &'a Answer, name: &str) -> &'a Fate {
    answer.instances.iter().find(|fate| fate.instance == name).unwrap_or_else(|| panic!("nothing is said of {name}"))
}

#[test]
fn says_what_moves_where_and_what_fits_nowhere_and_why() {
    let mut state = three_nodes();
    instance(&mut state, "stays", 5, Some(1));
    instance(&mut state, "small", 1, Some(3));
    instance(&mut state, "large", 4, Some(3));
    let bound = instance(&mut state, "bound", 1, Some(3));
    let mut data = Volume::new("data", VolumeSpec::default());
    data.metadata.id = Uuid::from_u128(900);
    data.metadata.project = Some("default".into());
    data.status.node = Some(NodeId(Uuid::from_u128(3)));
    state.instances[bound].status.resolved.volumes.push(VolumeId(data.metadata.id));
    state.volumes.push(data);

    let answer = down(&state, &[3]);
    let names: Vec<&str> = answer.instances.iter().map(|fate| fate.instance.as_str()).collect();
    assert_eq!(names, ["small", "bound", "large"], "what is not on the node is not spoken of");
    let small = fate(&answer, "small");
    assert_eq!((small.outcome, small.from.as_deref(), small.to.as_deref()), (Outcome::Moves, Some("n3"), Some("n1")));
    let after = small.seconds.expect("it runs again");
    assert!((15.0..20.0).contains(&after), "noticed when the lease ends, then started: {after}");
    let large = fate(&answer, "large");
    assert_eq!((large.outcome, large.to.as_deref(), large.seconds), (Outcome::DoesNotFit, None, None));
    assert!(large.why.contains("memory 4 GiB asked"), "{}", large.why);
    assert!(large.why.contains("isolation container not supported on n2"), "{}", large.why);
    assert!(fate(&answer, "bound").why.contains("volume data is on n3"), "{}", fate(&answer, "bound").why);
    assert!(answer.commits > 0 && answer.seconds >= after);
}

#[test]
fn the_same_question_has_the_same_answer() {
    let mut state = three_nodes();
    for n in 0..12 {
        instance(&mut state, &format!("i{n}"), 1, Some([1, 3][n % 2]));
    }
    let text = |answer: &Answer| serde_json::to_string(answer).expect("an answer is JSON");
    let first = down(&state, &[1]);
    assert_eq!(text(&first), text(&down(&state, &[1])));
    assert_eq!((first.count(Outcome::Moves), first.count(Outcome::DoesNotFit)), (2, 4), "{}", text(&first));
}

#[test]
fn rules_and_host_ports_hold_for_what_is_evacuated() {
    let mut state = three_nodes();
    state.nodes[1] = node(2, &[Isolation::Container]);
    for (name, on) in [("a", 1), ("b", 2), ("c", 3)] {
        let at = instance(&mut state, name, 1, Some(on));
        let instance = &mut state.instances[at];
        instance.metadata.labels.insert("app".into(), "db".into());
        let selector = "app=db".parse().expect("a selector");
        instance.spec.placement.anti_affinity =
            vec![AffinityTerm { selector, topology: Topology::Node, required: true }];
    }
    let answer = down(&state, &[3]);
    assert_eq!(fate(&answer, "c").outcome, Outcome::DoesNotFit);
    assert!(fate(&answer, "c").why.contains("anti-affinity"), "{}", fate(&answer, "c").why);

    let mut state = three_nodes();
    for (name, on) in [("web", 1), ("other", 3)] {
        let at = instance(&mut state, name, 1, Some(on));
        state.instances[at].spec.publish = vec![Publish { host_port: 8080, port: 80, ..Publish::default() }];
    }
    let answer = down(&state, &[3]);
    assert!(fate(&answer, "other").why.contains("host port 8080 is taken on n1"), "{}", fate(&answer, "other").why);
}

#[test]
fn all_nodes_down_leaves_nothing_to_run_on() {
    let mut state = three_nodes();
    instance(&mut state, "web", 1, Some(1));
    // One that is down already counts too.
    state.nodes[2].status.phase = NodePhase::Down;
    instance(&mut state, "lost", 1, Some(3));
    let answer = down(&state, &[1, 2, 3]);
    assert_eq!(answer.count(Outcome::DoesNotFit), 2);
    assert!(fate(&answer, "web").why.contains("is down"), "{}", fate(&answer, "web").why);
}

#[test]
fn more_nodes_take_what_waits() {
    let mut state = three_nodes();
    instance(&mut state, "full", 8, Some(1));
    instance(&mut state, "full-too", 8, Some(3));
    instance(&mut state, "waits", 6, None);
    instance(&mut state, "giant", 64, None);
    let added = Question::NodesAdded(vec![node(9, &[Isolation::Container])]);
    let answer = ask(&state, &added, LEASE).expect("the copy can be played");
    assert_eq!((fate(&answer, "waits").outcome, fate(&answer, "waits").to.as_deref()), (Outcome::Placed, Some("n9")));
    assert_eq!(fate(&answer, "giant").outcome, Outcome::DoesNotFit);
}

#[test]
fn hundreds_of_instances_move_while_the_rest_stays() {
    let scale = Scale { nodes: 50, instances: 1000, dead: 5 };
    let figures = scale::run(scale, LEASE).expect("the copy can be played");
    assert_eq!((figures.moved, figures.unfit), (100, 0));
    assert!((15.0..30.0).contains(&figures.virtual_seconds), "{figures:?}");
}
