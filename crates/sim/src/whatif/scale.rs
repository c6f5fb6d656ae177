//! A made-up cloud of any size, and how it takes the loss of some of its nodes: the figure for `docs/performance.md`.

use std::time::{Duration, Instant};

use oblak_model::{
    Cpus, Instance, InstanceId, InstanceSpec, Isolation, Node, NodeFacts, NodeId, NodePhase, NodeSpec, Placement, Port,
    PortId, PortSpec, Resources, Size, Timestamp,
};
use uuid::Uuid;

use super::{Answer, LiveState, Outcome, Question, WhatIfError, ask};

/// How large.
#[derive(Clone, Copy, Debug)]
pub struct Scale {
    /// Nodes.
    pub nodes: usize,
    /// Instances, spread evenly.
    pub instances: usize,
    /// Nodes that die at once.
    pub dead: usize,
}

/// What was measured.
#[derive(Clone, Copy, Debug)]
pub struct Figures {
    /// From the death until everything that fits runs elsewhere, in virtual seconds.
    pub virtual_seconds: f64,
    /// Time on this machine, the copy of the state included.
    pub real_seconds: f64,
    /// Instances that run elsewhere.
    pub moved: usize,
    /// Instances that fit nowhere.
    pub unfit: usize,
    /// Commits.
    pub commits: u64,
    /// The most memory that this process has had so far, in MiB.
    pub peak_mib: u64,
}

/// Plays it once.
///
/// # Errors
/// As [`ask`].
pub fn run(scale: Scale, lease: Duration) -> Result<Figures, WhatIfError> {
    let state = cloud(scale);
    let dead = state.nodes.iter().take(scale.dead).map(|node| NodeId(node.metadata.id)).collect();
    let begun = Instant::now();
    let answer: Answer = ask(&state, &Question::NodesDown(dead), lease)?;
    Ok(Figures {
        virtual_seconds: answer.seconds,
        real_seconds: begun.elapsed().as_secs_f64(),
        moved: answer.count(Outcome::Moves),
        unfit: answer.count(Outcome::DoesNotFit),
        commits: answer.commits,
        peak_mib: peak_mib(),
    })
}

/// `VmHWM` of proc(5).
fn peak_mib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok()).unwrap_or(0) / 1024
}

/// Nodes of eight zones and instances of one size, 50 projects and 20 labels. Each node can hold a quarter more than it does.
#[must_use]
pub fn cloud(scale: Scale) -> LiveState {
    let at = Timestamp::from_micros(1_767_225_600_000_000);
    let size = Resources { vcpus: Cpus(1000), memory: Size::gib(2), disk: Size::gib(10) };
    let each = (scale.instances.div_ceil(scale.nodes.max(1)) * 5).div_ceil(4) as u64;
    let nodes: Vec<Node> = (0..scale.nodes).map(|n| node(n, each, size, at)).collect();
    let mut state = LiveState { at, ..LiveState::default() };
    for n in 0..scale.instances {
        let (instance, port) = instance(n, &nodes[n % scale.nodes], size, at);
        state.instances.push(instance);
        state.ports.push(port);
    }
    state.nodes = nodes;
    state
}

fn id(kind: u64, n: usize) -> Uuid {
    Uuid::from_u64_pair(0x0190_0000_0000_7000 | kind << 20, 1 << 63 | n as u64)
}

fn node(n: usize, each: u64, size: Resources, at: Timestamp) -> Node {
    let mut node = Node::new(&format!("n{n}"), NodeSpec { zone: format!("zone-{}", n % 8), ..NodeSpec::default() });
    node.metadata.id = id(1, n);
    node.metadata.created_at = at;
    node.status.phase = NodePhase::Ready;
    node.status.capacity = Resources {
        vcpus: Cpus(u32::try_from(u64::from(size.vcpus.0) * each).unwrap_or(u32::MAX)),
        memory: Size(size.memory.0 * each),
        disk: Size(size.disk.0 * each),
    };
    node.spec.overcommit.cpu_percent = 100;
    node.status.facts = NodeFacts { isolations: vec![Isolation::Container, Isolation::Vm], ..NodeFacts::default() };
    node
}

fn instance(n: usize, on: &Node, size: Resources, at: Timestamp) -> (Instance, Port) {
    let mut instance =
        Instance::new(&format!("i{n}"), InstanceSpec { image: "busybox".into(), ..InstanceSpec::default() });
    instance.metadata.id = id(2, n);
    instance.metadata.project = Some(format!("p{}", n % 50));
    instance.metadata.created_at = at;
    instance.metadata.labels.insert("app".into(), format!("a{}", n % 20));
    instance.status.resolved.isolation = Isolation::Container;
    instance.status.resolved.resources = size;
    instance.status.phase = oblak_model::Phase::Running;
    instance.status.placement = Some(Placement {
        node: NodeId(on.metadata.id),
        node_name: on.metadata.name.clone(),
        resources: size,
        at,
        why: String::new(),
        generation: 1,
        fenced: false,
        fence_turn: 0,
    });
    let owner = InstanceId(instance.metadata.id);
    let mut port =
        Port::new(&format!("i{n}-0"), PortSpec { network: "default".into(), instance: owner, ..PortSpec::default() });
    port.metadata.id = id(3, n);
    port.metadata.project.clone_from(&instance.metadata.project);
    port.metadata.created_at = at;
    port.status.node = Some(NodeId(on.metadata.id));
    instance.status.resolved.ports.push(PortId(port.metadata.id));
    (instance, port)
}
