//! The scheduler's figures: decisions per second in a large world, and how well it packs.
//!
//! Pure like the rest: the caller passes a clock, the worlds come from a seed.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use crate::{
    AffinityRule, Decision, Direction, ImageId, InstanceId, Isolation, LabelRule, NodeId, NodeSpec, Overcommit,
    ProjectId, Request, Resources, Strategy, Strength, Topology, VolumeId, VolumeRef, World, decide, find,
};

/// What the throughput is measured on, in words; print it beside the figures.
pub const MIX: &str = "\
nodes: 8 zones, 3 sizes (64/96/128 cores, 256/512/1024 GiB; cpu x4, memory x1), labels disk (2 values), tier (2), \
rack (200) and host (one per node), a fifth without microvm, a third with sriov, 10 of 50 images cached on each, one \
local volume on each; instances: 5 flavors from 1 vCPU/2 GiB to 8 vCPU/16 GiB in 20,000 groups of 5,000 projects; \
requests: 70 % pack, 30 % spread; 60 % container, 25 % vm, 15 % microvm; half prefer a node with their image; and of \
all: 20 % one zone, 10 % a label, 5 % not a label, 4 % a feature, 10 % apart from their group by node, 5 % preferably \
apart by zone, 5 % preferably apart by node, 3 % in the zone of their group, 1 % one rack, 1 % the node of a local \
volume, 1 % impossible (explained in full)";

const GIB: u64 = 1 << 30;
const TIB: u64 = 1 << 40;
const ZONES: u64 = 8;
const RACKS: u64 = 200;
const IMAGES: u64 = 50;
const PROJECTS: u64 = 5_000;

/// vCPUs, memory in GiB, disk in GiB, and how many of 100 instances are like this.
const FLAVORS: [(u32, u64, u64, u64); 5] =
    [(1, 2, 10, 45), (2, 4, 20, 30), (4, 8, 40, 15), (8, 16, 80, 5), (1, 8, 20, 5)];

/// A small deterministic generator (`SplitMix64`: an additive counter and a finalizer).
struct Dice(u64);

impl Dice {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit.max(1)
    }

    fn percent(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }
}

/// How large the world is and how often each thing is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Size {
    /// Nodes.
    pub nodes: u32,
    /// Instances placed before measuring.
    pub instances: u32,
    /// Decisions per measurement.
    pub decisions: u32,
    /// Same seed, same world, same decisions.
    pub seed: u64,
}

impl Default for Size {
    /// The size of the promise: 10,000 nodes, 1,000,000 instances.
    fn default() -> Self {
        Self { nodes: 10_000, instances: 1_000_000, decisions: 200_000, seed: 1 }
    }
}

/// What was measured, all on one core.
#[derive(Debug, Clone, PartialEq)]
pub struct Throughput {
    /// The size of the world.
    pub size: Size,
    /// Instances really placed (fewer when the nodes were full).
    pub placed: u32,
    /// Kinds of nodes that conditions can tell apart.
    pub classes: usize,
    /// Decide and place, while filling the world from empty.
    pub fill_per_second: f64,
    /// Decide only, in the full world.
    pub decisions_per_second: f64,
    /// Decide only, three runners-up reported.
    pub with_alternatives_per_second: f64,
    /// Decide, place, and remove an older instance.
    pub churn_per_second: f64,
    /// Half of the decisions took at most this long.
    pub median: Duration,
    /// All but one in a hundred took at most this long.
    pub p99: Duration,
    /// Of a thousand decisions, how many were refusals with an explanation.
    pub refused_per_mille: u32,
}

impl fmt::Display for Throughput {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "mix: {MIX}")?;
        writeln!(
            f,
            "world: {} nodes in {} classes, {} instances placed (decide + place from empty: {:.0}/s)",
            self.size.nodes, self.classes, self.placed, self.fill_per_second
        )?;
        writeln!(
            f,
            "decide: {:.0}/s, median {:.1} us, p99 {:.1} us, {} per mille refused",
            self.decisions_per_second,
            micros(self.median),
            micros(self.p99),
            self.refused_per_mille
        )?;
        writeln!(f, "decide with 3 runners-up: {:.0}/s", self.with_alternatives_per_second)?;
        write!(f, "decide + place + unplace an older one: {:.0}/s", self.churn_per_second)
    }
}

fn micros(time: Duration) -> f64 {
    time.as_secs_f64() * 1e6
}

/// Fills a world and measures decisions in it. `clock` is any monotonic time; see [`MIX`] for what is asked.
pub fn throughput(size: Size, mut clock: impl FnMut() -> Duration) -> Throughput {
    let mut dice = Dice(size.seed);
    let mut world = World::new();
    for at in 0..size.nodes {
        world.upsert_node(bench_node(&mut dice, at));
    }
    let started = clock();
    let mut serial = 0;
    let mut attempts = 0;
    while world.instance_count() < size.instances as usize && attempts < u64::from(size.instances) * 2 {
        attempts += 1;
        let request = bench_request(&mut dice, size, &mut serial);
        if let Some(decision) = find(&world, &request) {
            place(&mut world, &request, &decision);
        }
    }
    let fill_per_second = rate(attempts, clock() - started);
    let placed = world.instance_count() as u32;

    let mut requests: Vec<Request> = (0..size.decisions).map(|_| bench_request(&mut dice, size, &mut serial)).collect();
    let count = u64::from(size.decisions);
    let started = clock();
    let refused = requests.iter().filter(|request| decide(&world, request).is_err()).count() as u64;
    let decisions_per_second = rate(count, clock() - started);

    let (median, p99) = latencies(&world, &requests, &mut clock);

    requests.iter_mut().for_each(|request| request.alternatives = 3);
    let started = clock();
    let some = requests.iter().filter(|request| decide(&world, request).is_ok()).count() as u64;
    let with_alternatives_per_second = rate(some + refused, clock() - started);

    requests.iter_mut().for_each(|request| request.alternatives = 0);
    let classes = world.class_count();
    let started = clock();
    for request in &requests {
        let old = InstanceId(u128::from(dice.below(serial)));
        // A miss (never placed, or gone already) is part of the churn.
        let _ = world.unplace(old);
        if let Ok(decision) = decide(&world, request) {
            place(&mut world, request, &decision);
        }
    }
    let churn_per_second = rate(count, clock() - started);
    let refused_per_mille = (refused * 1000 / count.max(1)) as u32;
    Throughput {
        size,
        placed,
        classes,
        fill_per_second,
        decisions_per_second,
        with_alternatives_per_second,
        churn_per_second,
        median,
        p99,
        refused_per_mille,
    }
}

fn rate(count: u64, time: Duration) -> f64 {
    count as f64 / time.as_secs_f64().max(1e-9)
}

fn place(world: &mut World, request: &Request, decision: &Decision) {
    world.place(request.placed_on(decision.node)).expect("the decision was made on this world, for a new instance");
}

fn latencies(world: &World, requests: &[Request], clock: &mut impl FnMut() -> Duration) -> (Duration, Duration) {
    let mut times: Vec<Duration> = requests
        .iter()
        .map(|request| {
            let started = clock();
            let decision = decide(world, request);
            let time = clock() - started;
            drop(decision);
            time
        })
        .collect();
    times.sort_unstable();
    let at = |percent: usize| times.get(times.len().saturating_sub(1) * percent / 100).copied().unwrap_or_default();
    (at(50), at(99))
}

fn bench_node(dice: &mut Dice, at: u32) -> NodeSpec {
    let capacity = match dice.below(10) {
        0..4 => Resources::new(64_000, 256 * GIB, 4 * TIB),
        4..8 => Resources::new(96_000, 512 * GIB, 8 * TIB),
        _ => Resources::new(128_000, 1024 * GIB, 8 * TIB),
    };
    let isolations = [Isolation::Container, Isolation::Vm, Isolation::Microvm];
    let supported = if dice.percent(80) { &isolations[..] } else { &isolations[..2] };
    let mut node = NodeSpec::new(NodeId(u128::from(at)), format!("n{at}"), capacity).supports(supported);
    node.overcommit.cpu = 4000;
    node.zone = format!("zone-{}", dice.below(ZONES));
    let mut label = |key: &str, value: String| node.labels.insert(key.to_owned(), value);
    label("disk", if dice.percent(60) { "ssd" } else { "hdd" }.to_owned());
    label("tier", if dice.percent(10) { "gold" } else { "standard" }.to_owned());
    label("rack", format!("r{}", dice.below(RACKS)));
    label("host", format!("n{at}"));
    if dice.percent(33) {
        node.features.insert("sriov".to_owned());
    }
    node.images.extend((0..10).map(|_| ImageId(u128::from(dice.below(IMAGES)))));
    node.volumes.insert(VolumeId(u128::from(at)));
    node
}

fn bench_request(dice: &mut Dice, size: Size, serial: &mut u64) -> Request {
    let id = InstanceId(u128::from(*serial));
    *serial += 1;
    let isolation = match dice.below(100) {
        0..60 => Isolation::Container,
        60..85 => Isolation::Vm,
        _ => Isolation::Microvm,
    };
    let project = dice.below(PROJECTS);
    let app = format!("app-{}", dice.below(4));
    let mut request = Request::new(id, ProjectId(u128::from(project)), isolation, flavor(dice));
    let group = vec![LabelRule::is("app", app.as_str())];
    request.labels.insert("app".to_owned(), app);
    request.strategy = if dice.percent(70) { Strategy::Pack } else { Strategy::Spread };
    request.image = dice.percent(50).then(|| ImageId(u128::from(dice.below(IMAGES))));
    let mut rule = |direction, topology, strength| {
        request.affinity.push(AffinityRule { direction, topology, strength, selector: group.clone() });
    };
    match dice.below(100) {
        0..20 => request.zones.push(format!("zone-{}", dice.below(ZONES))),
        20..30 => request.node_labels.push(LabelRule::is("disk", "ssd")),
        30..35 => request.node_labels.push(LabelRule::IsNot("tier".to_owned(), "gold".to_owned())),
        35..39 => drop(request.features.insert("sriov".to_owned())),
        39..49 => rule(Direction::Apart, Topology::Node, Strength::Required),
        49..54 => rule(Direction::Apart, Topology::Zone, Strength::Preferred(100_000)),
        54..59 => rule(Direction::Apart, Topology::Node, Strength::Preferred(100_000)),
        59..62 => rule(Direction::Together, Topology::Zone, Strength::Required),
        62 => request.node_labels.push(LabelRule::is("rack", format!("r{}", dice.below(RACKS)))),
        63 => {
            let at = dice.below(u64::from(size.nodes));
            request.volumes.push(VolumeRef { id: VolumeId(u128::from(at)), name: format!("volume-{at}") });
        }
        64 => request.resources.memory = 4 * TIB,
        _ => {}
    }
    request
}

fn flavor(dice: &mut Dice) -> Resources {
    let mut roll = dice.below(100);
    for (cpus, memory, disk, weight) in FLAVORS {
        if roll < weight {
            return Resources::new(cpus * 1000, memory * GIB, disk * GIB);
        }
        roll -= weight;
    }
    Resources::new(1000, GIB, GIB)
}

/// How much fits, compared with looking at every node for the best fit.
#[derive(Debug, Clone, PartialEq)]
pub struct Packing {
    /// Worlds sampled.
    pub worlds: u32,
    /// Requests offered, over all worlds; each world is offered a tenth more than it can hold.
    pub offered: u64,
    /// Placed by [`decide`].
    pub placed: u64,
    /// Ours: the mean share of cpu and memory in use at the end.
    pub filled: f64,
    /// Against each of the exhaustive best fits,
    pub against: Vec<Comparison>,
    /// and in every world against whichever of them filled that world most: mean ratio,
    pub mean_ratio: f64,
    /// and the worst.
    pub worst_ratio: f64,
}

/// Ours against one exhaustive best fit.
#[derive(Debug, Clone, PartialEq)]
pub struct Comparison {
    /// What it minimizes over all nodes that fit.
    pub name: &'static str,
    /// What it placed.
    pub placed: u64,
    /// What is filled, ours over its, mean over the worlds.
    pub mean_ratio: f64,
}

impl fmt::Display for Packing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "packing: {} worlds, {} requests, {} placed, {:.2} % of cpu and memory filled",
            self.worlds,
            self.offered,
            self.placed,
            self.filled * 100.0
        )?;
        for other in &self.against {
            writeln!(
                f,
                "  exhaustive best fit by {}: {} placed; ours fills {:.4} of it",
                other.name, other.placed, other.mean_ratio
            )?;
        }
        write!(f, "  best of these per world: ours fills {:.4} (worst {:.4})", self.mean_ratio, self.worst_ratio)
    }
}

type Choose = fn(&World, &Request) -> Option<NodeId>;

/// Exhaustive best fits by what would be left *after* the placement. The scheduler ranks nodes by what is left of the
/// scarcest resource *before*, because that order does not depend on the request and can be kept in an index, and then
/// compares a few for balance.
const EXHAUSTIVE: [(&str, Choose); 3] = [
    ("least left of the scarcest resource", |world, request| exhaustive(world, request, |left| left[0].min(left[1]))),
    ("least left of the most plentiful resource", |world, request| {
        exhaustive(world, request, |left| left[0].max(left[1]))
    }),
    ("least left of cpu and memory together", |world, request| exhaustive(world, request, |left| left[0] + left[1])),
];

/// Offers the same requests to [`decide`] and to searches of every node, and compares what is filled in the end.
#[must_use]
pub fn packing(worlds: u32, nodes: u32, seed: u64) -> Packing {
    let comparison = |(name, _)| Comparison { name, placed: 0, mean_ratio: 0.0 };
    let against = EXHAUSTIVE.map(comparison).to_vec();
    let worst_ratio = f64::INFINITY;
    let mut total = Packing { worlds, offered: 0, placed: 0, filled: 0.0, against, mean_ratio: 0.0, worst_ratio };
    let part = 1.0 / f64::from(worlds);
    for at in 0..worlds {
        let mut dice = Dice(seed.wrapping_add(u64::from(at) << 32));
        let specs: Vec<NodeSpec> = (0..nodes).map(|at| sampled_node(&mut dice, at)).collect();
        let requests = sampled_requests(&mut dice, &specs);
        let ours = fill(&specs, &requests, |world, request| find(world, request).map(|decision| decision.node));
        let mut least = f64::INFINITY;
        for (comparison, (_, choose)) in total.against.iter_mut().zip(EXHAUSTIVE) {
            let theirs = fill(&specs, &requests, choose);
            let ratio = filled(&ours) / filled(&theirs).max(f64::MIN_POSITIVE);
            comparison.placed += theirs.instance_count() as u64;
            comparison.mean_ratio += ratio * part;
            least = least.min(ratio);
        }
        total.offered += requests.len() as u64;
        total.placed += ours.instance_count() as u64;
        total.filled += filled(&ours) * part;
        total.mean_ratio += least * part;
        total.worst_ratio = total.worst_ratio.min(least);
    }
    total
}

/// Nodes of uneven shape: without that, every order packs alike.
fn sampled_node(dice: &mut Dice, at: u32) -> NodeSpec {
    let cores = [16, 32, 48, 64][dice.below(4) as usize];
    let memory = u64::from(cores) * [2, 4, 8][dice.below(3) as usize] * GIB;
    let capacity = Resources::new(cores * 1000, memory, 4 * TIB);
    let mut node = NodeSpec::new(NodeId(u128::from(at)), format!("n{at}"), capacity);
    node.zone = format!("zone-{}", dice.below(3));
    node.overcommit = Overcommit { cpu: 1500, memory: 1000, disk: 1000 };
    node.supports(&[Isolation::Container])
}

/// Requests of uneven shape for a tenth more than the world holds, of cpu or of memory, whichever comes first.
fn sampled_requests(dice: &mut Dice, specs: &[NodeSpec]) -> Vec<Request> {
    let mut room = [0.0, 0.0];
    for spec in specs {
        let limits = spec.limits();
        room[0] += limits[0] as f64 * 1.1;
        room[1] += limits[1] as f64 * 1.1;
    }
    let mut requests = Vec::new();
    while room[0] > 0.0 && room[1] > 0.0 {
        let cpus = [500, 1000, 2000, 4000, 8000, 16_000][(dice.below(6).min(dice.below(6))) as usize];
        let memory = u64::from(cpus) * [1, 2, 4, 8][dice.below(4) as usize] * GIB / 1000;
        let resources = Resources::new(cpus, memory, dice.below(50) * GIB);
        room[0] -= f64::from(cpus);
        room[1] -= memory as f64;
        let id = InstanceId(requests.len() as u128);
        let mut request = Request::new(id, ProjectId(0), Isolation::Container, resources);
        if dice.percent(20) {
            request.zones.push(format!("zone-{}", dice.below(3)));
        }
        requests.push(request);
    }
    requests
}

fn fill(specs: &[NodeSpec], requests: &[Request], choose: Choose) -> World {
    let mut world = World::new();
    specs.iter().for_each(|spec| world.upsert_node(spec.clone()));
    for request in requests {
        if let Some(node) = choose(&world, request) {
            world.place(request.placed_on(node)).expect("the node was chosen because it fits");
        }
    }
    world
}

/// Looks at every node and takes the one with the smallest `measure` of the shares of cpu and memory left.
fn exhaustive(world: &World, request: &Request, measure: fn([f64; 2]) -> f64) -> Option<NodeId> {
    let asked = request.resources.amounts();
    let left = |usage: crate::Usage| {
        let free = usage.free();
        let left = |at: usize| Some(free[at].checked_sub(asked[at])? as f64 / usage.limit[at] as f64);
        free[2].checked_sub(asked[2])?;
        Some([left(0)?, left(1)?])
    };
    let in_zone = |spec: &NodeSpec| request.zones.is_empty() || request.zones.contains(&spec.zone);
    let fitting = world.nodes().filter(|(spec, _)| in_zone(spec));
    let ranked = fitting.filter_map(|(spec, usage)| Some((measure(left(usage)?), spec.id)));
    ranked.min_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1))).map(|(_, id)| id)
}

fn filled(world: &World) -> f64 {
    let mut sums: BTreeMap<usize, (f64, f64)> = BTreeMap::new();
    for (_, usage) in world.nodes() {
        for at in 0..2 {
            let (used, limit) = sums.entry(at).or_default();
            *used += usage.used[at] as f64;
            *limit += usage.limit[at] as f64;
        }
    }
    sums.values().map(|(used, limit)| used / limit.max(1.0)).sum::<f64>() / 2.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packs_within_two_percent_of_exhaustive_best_fit() {
        let packing = packing(6, 30, 7);
        assert!(packing.mean_ratio >= 0.98, "{packing}");
        assert!(packing.offered > packing.placed && packing.placed > 0, "the worlds must have been full: {packing}");
    }

    #[test]
    fn the_benchmark_runs_and_counts() {
        let mut ticks = 0;
        let clock = || {
            ticks += 1;
            Duration::from_micros(ticks)
        };
        let size = Size { nodes: 100, instances: 2000, decisions: 300, seed: 3 };
        let figures = throughput(size, clock);
        assert_eq!(figures.placed, 2000);
        assert_eq!(figures.p99, Duration::from_micros(1));
        assert!(figures.refused_per_mille < 100, "{figures}");
    }
}
