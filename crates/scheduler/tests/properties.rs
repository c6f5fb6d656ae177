//! The scheduler against a specification that looks at every node, over random worlds, histories and requests.

#![allow(clippy::unwrap_used, reason = "an unexpected None or Err is a failed test")]

mod common;

use std::collections::{BTreeMap, BTreeSet};

use common::{Model, Running};
use oblak_scheduler::*;
use proptest::collection::{btree_map, btree_set, vec};
use proptest::option;
use proptest::prelude::*;
use proptest::strategy::Strategy;

const PROJECTS: u128 = 2;

fn labels(
    keys: &'static [&'static str],
    values: &'static [&'static str],
) -> impl Strategy<Value = BTreeMap<String, String>> {
    btree_map(
        prop::sample::select(keys).prop_map(str::to_owned),
        prop::sample::select(values).prop_map(str::to_owned),
        0..3,
    )
}

fn resources(most: u32) -> impl Strategy<Value = Resources> {
    (0..=most, 0..=most, 0..=most)
        .prop_map(|(cpu, memory, disk)| Resources::new(cpu * 500, u64::from(memory) << 29, u64::from(disk) << 30))
}

fn isolation() -> impl Strategy<Value = Isolation> {
    prop::sample::select(&Isolation::ALL[..])
}

fn node(ids: u128) -> impl Strategy<Value = NodeSpec> {
    let identity = (0..ids, prop::sample::select(&["", "a", "b"][..]));
    let state = prop_oneof![8 => Just(NodeState::Ready), 1 => Just(NodeState::Draining), 1 => Just(NodeState::Down)];
    let over = prop::sample::select(&[500u32, 1000, 1500, 4000][..]);
    let holds = (btree_set((0u128..3).prop_map(VolumeId), 0..2), btree_set((0u128..3).prop_map(ImageId), 0..3));
    let supports =
        btree_map(isolation(), prop_oneof![4 => Just(Support::Yes), 1 => Just(Support::No("no KVM".into()))], 0..5);
    let features = btree_set(prop::sample::select(&["nested", "sriov"][..]).prop_map(str::to_owned), 0..3);
    // `host` has a value per node, so that worlds of more than sixteen nodes have a wide key.
    let tags = (labels(&["disk", "gpu"], &["x", "y"]), any::<bool>());
    (identity, state, (resources(16), resources(16)), over, supports, features, tags, holds).prop_map(
        |(
            (id, zone),
            state,
            (capacity, allocatable),
            over,
            isolations,
            features,
            (mut labels, host),
            (volumes, images),
        )| {
            if host {
                labels.insert("host".into(), format!("h{id}"));
            }
            NodeSpec {
                zone: zone.to_owned(),
                state,
                allocatable,
                overcommit: Overcommit { cpu: over, memory: 1000, disk: 1500 },
                labels,
                isolations,
                features,
                volumes,
                images,
                ..NodeSpec::new(NodeId(id), format!("n{id}"), capacity)
            }
        },
    )
}

fn instance_labels() -> impl Strategy<Value = BTreeMap<String, String>> {
    labels(&["app", "tier"], &["web", "db"])
}

fn selector() -> impl Strategy<Value = Vec<LabelRule>> {
    vec(
        prop::sample::select(&["app=web", "app=db", "tier!=web", "tier", "!app"][..])
            .prop_map(|rule| rule.parse().unwrap()),
        0..3,
    )
}

fn affinity() -> impl Strategy<Value = AffinityRule> {
    let direction = prop_oneof![1 => Just(Direction::Together), 2 => Just(Direction::Apart)];
    let topology = prop_oneof![Just(Topology::Node), Just(Topology::Zone)];
    let strength = prop_oneof![1 => Just(Strength::Required), 2 => (1..400_000u32).prop_map(Strength::Preferred)];
    (direction, topology, strength, selector()).prop_map(|(direction, topology, strength, selector)| AffinityRule {
        direction,
        topology,
        strength,
        selector,
    })
}

fn request(ids: u128) -> impl Strategy<Value = Request> {
    let rules = prop::sample::select(
        &["disk=x", "disk!=x", "gpu", "!gpu", "host=h3", "host!=h3", "host", "!host", "disk=never"][..],
    );
    let node_labels = prop_oneof![2 => Just(vec![]), 1 => vec(rules.prop_map(|rule| rule.parse().unwrap()), 1..3)];
    let zones = prop_oneof![3 => Just(vec![]), 1 => vec(prop::sample::select(&["a", "b", "nowhere"][..]).prop_map(str::to_owned), 1..3)];
    let features = prop_oneof![3 => Just(BTreeSet::new()), 1 => Just(BTreeSet::from(["nested".to_owned()]))];
    let volume =
        option::weighted(0.15, (0u128..4).prop_map(|id| VolumeRef { id: VolumeId(id), name: format!("v{id}") }));
    let wishes = (vec((0u128..3).prop_map(VolumeId), 0..2), option::of((0u128..3).prop_map(ImageId)));
    let nodes =
        (option::weighted(0.05, (0..ids + 1).prop_map(NodeId)), option::weighted(0.2, (0..ids + 1).prop_map(NodeId)));
    let choice = (any::<bool>(), 0u8..4);
    let identity = (0..PROJECTS, resources(4), isolation(), instance_labels());
    (identity, node_labels, zones, features, vec(affinity(), 0..3), volume, wishes, (nodes, choice)).prop_map(
        |(
            (project, resources, isolation, labels),
            node_labels,
            zones,
            features,
            affinity,
            volume,
            (near, image),
            ((only, avoid), (pack, more)),
        )| Request {
            labels,
            node_labels,
            zones,
            features,
            affinity,
            volumes: volume.into_iter().collect(),
            near_volumes: near,
            image,
            only_node: only,
            avoid_nodes: avoid.into_iter().collect(),
            strategy: if pack { oblak_scheduler::Strategy::Pack } else { oblak_scheduler::Strategy::Spread },
            alternatives: more,
            ..Request::new(InstanceId(0), ProjectId(project), isolation, resources)
        },
    )
}

#[derive(Debug, Clone)]
enum Op {
    Upsert(NodeSpec),
    Remove(u128),
    Schedule(Request),
    Place(Request, u128),
    Adopt(Request, u128),
    Unplace(usize),
    Resize(usize, Resources),
}

fn op(ids: u128) -> impl Strategy<Value = Op> {
    prop_oneof![
        4 => node(ids).prop_map(Op::Upsert),
        1 => (0..ids).prop_map(Op::Remove),
        8 => request(ids).prop_map(Op::Schedule),
        2 => (request(ids), 0..ids).prop_map(|(request, node)| Op::Place(request, node)),
        1 => (request(ids), 0..ids).prop_map(|(request, node)| Op::Adopt(request, node)),
        3 => any::<usize>().prop_map(Op::Unplace),
        1 => (any::<usize>(), resources(6)).prop_map(|(at, resources)| Op::Resize(at, resources)),
    ]
}

/// The scheduler and the specification, driven together.
#[derive(Default)]
struct Pair {
    world: World,
    model: Model,
    next: u128,
    /// Nodes that a fact (`adopt`, a smaller `upsert`) may have pushed over their limits.
    forced: BTreeSet<NodeId>,
}

impl Pair {
    fn start(nodes: Vec<NodeSpec>) -> Self {
        let mut pair = Self::default();
        for node in nodes {
            pair.apply(Op::Upsert(node));
        }
        pair
    }

    fn record(&mut self, request: &Request, node: NodeId) {
        let Request { project, labels, resources, .. } = request.clone();
        self.model.running.insert(request.id, Running { node, project, labels, resources });
    }

    fn fresh(&mut self, request: Request) -> Request {
        self.next += 1;
        Request { id: InstanceId(self.next), ..request }
    }

    fn pick(&self, at: usize) -> Option<InstanceId> {
        let count = self.model.running.len();
        if count == 0 { None } else { self.model.running.keys().nth(at % count).copied() }
    }

    fn apply(&mut self, op: Op) {
        match op {
            Op::Upsert(spec) => {
                self.forced.insert(spec.id);
                self.world.upsert_node(spec.clone());
                self.model.nodes.insert(spec.id, spec);
            }
            Op::Remove(id) => {
                let id = NodeId(id);
                let empty = self.model.running.values().all(|running| running.node != id);
                let removed = self.world.remove_node(id).is_ok();
                assert_eq!(removed, empty && self.model.nodes.remove(&id).is_some());
            }
            Op::Schedule(request) => {
                let request = self.fresh(request);
                if let Some(Ok(decision)) = decide_batch(&mut self.world, std::slice::from_ref(&request)).pop() {
                    self.record(&request, decision.node);
                }
            }
            Op::Place(request, node) => {
                let request = self.fresh(request);
                let fits = self.model.nodes.get(&NodeId(node)).is_some_and(|spec| {
                    let Resources { cpu_milli, memory, disk } = request.resources;
                    let free = self.model.free(spec);
                    u128::from(cpu_milli) <= free[0] && u128::from(memory) <= free[1] && u128::from(disk) <= free[2]
                });
                assert_eq!(self.world.place(request.placed_on(NodeId(node))).is_ok(), fits);
                if fits {
                    self.record(&request, NodeId(node));
                    assert!(matches!(
                        self.world.place(request.placed_on(NodeId(node))),
                        Err(WorldError::AlreadyPlaced { .. } | WorldError::DoesNotFit { .. })
                    ));
                }
            }
            Op::Adopt(request, node) => {
                let request = self.fresh(request);
                let known = self.model.nodes.contains_key(&NodeId(node));
                assert_eq!(self.world.adopt(request.placed_on(NodeId(node))).is_ok(), known);
                if known {
                    self.forced.insert(NodeId(node));
                    self.record(&request, NodeId(node));
                }
            }
            Op::Unplace(at) => {
                if let Some(id) = self.pick(at) {
                    let node = self.model.running.remove(&id).unwrap().node;
                    assert_eq!(self.world.unplace(id), Ok(node));
                    assert_eq!(self.world.unplace(id), Err(WorldError::NotPlaced(id)));
                }
            }
            Op::Resize(at, resources) => {
                if let Some(id) = self.pick(at)
                    && self.world.resize(id, resources).is_ok()
                {
                    self.model.running.get_mut(&id).unwrap().resources = resources;
                }
            }
        }
    }

    /// No node that only ever took what was decided is over its limits.
    fn assert_within_limits(&self) {
        for (spec, usage) in self.world.nodes() {
            let limits = self.model.limits(spec);
            assert_eq!(usage.limit.map(u128::from), limits);
            assert_eq!(usage.used.map(u128::from), self.model.used(spec.id));
            if !self.forced.contains(&spec.id) {
                assert!(usage.used.iter().zip(limits).all(|(used, limit)| u128::from(*used) <= limit), "{}", spec.name);
            }
        }
    }

    /// The same content, put together in one go.
    fn rebuilt(&self) -> World {
        let mut world = World::new();
        for spec in self.model.nodes.values().rev() {
            world.upsert_node(spec.clone());
        }
        for (id, running) in self.model.running.iter().rev() {
            let Running { node, project, labels, resources } = running;
            world
                .adopt(Placement { instance: *id, node: *node, project: *project, labels, resources: *resources })
                .unwrap();
        }
        world
    }

    fn assert_decides_as_specified(&self, request: &Request) {
        let ranking = self.model.ranking(request);
        match decide(&self.world, request) {
            Ok(decision) => {
                let mut ours = vec![(decision.node, decision.score)];
                ours.extend(decision.alternatives.iter().map(|other| (other.node, other.score)));
                let wanted = usize::from(request.alternatives) + 1;
                assert_eq!(ours, ranking.into_iter().take(wanted).collect::<Vec<_>>());
            }
            Err(explanation) => {
                assert_eq!(ranking, vec![], "{explanation}");
                assert_eq!(explanation.fit, 0);
            }
        }
    }

    fn assert_explanation_adds_up(&self, request: &Request) {
        let explanation = explain(&self.world, request);
        let conditions = &explanation.conditions;
        assert_eq!(explanation.nodes as usize, self.model.nodes.len());
        assert_eq!(explanation.fit as usize, self.model.ranking(request).len());
        assert_eq!(explanation.fit + conditions.iter().map(|c| c.charged).sum::<u32>(), explanation.nodes);
        for condition in conditions {
            assert!(condition.nodes >= 1 && condition.nodes <= explanation.nodes);
            assert!(condition.charged <= condition.nodes && condition.alone <= condition.charged);
            assert!(self.model.nodes.contains_key(&condition.closest));
            if let (Some(asked), Some(free)) = (condition.asked, condition.free) {
                assert!(asked > free, "{condition}");
            }
        }
        assert!(conditions.is_sorted_by_key(|condition| std::cmp::Reverse(condition.nodes)));
    }
}

/// Every way to drop or loosen one condition. Wishes only change the order, so they are left alone.
fn relaxations(request: &Request) -> Vec<Request> {
    let mut relaxed = Vec::new();
    let mut add = |change: &dyn Fn(&mut Request)| {
        let mut copy = request.clone();
        change(&mut copy);
        relaxed.push(copy);
    };
    add(&|r| r.zones.clear());
    add(&|r| r.features.clear());
    add(&|r| r.only_node = None);
    add(&|r| r.avoid_nodes.clear());
    add(&|r| r.volumes.clear());
    add(&|r| r.resources.cpu_milli /= 2);
    add(&|r| r.resources.memory /= 2);
    add(&|r| r.resources.disk = 0);
    for at in 0..request.node_labels.len() {
        add(&|r| {
            r.node_labels.remove(at);
        });
    }
    for at in 0..request.affinity.len() {
        add(&|r| {
            r.affinity.remove(at);
        });
        add(&|r| r.affinity[at].strength = Strength::Preferred(1000));
    }
    if !request.zones.is_empty() {
        add(&|r| r.zones.push("a".to_owned()));
    }
    relaxed
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn agrees_with_looking_at_every_node(
        nodes in vec(node(8), 1..8), ops in vec(op(8), 0..40), requests in vec(request(8), 1..12),
    ) {
        let mut pair = Pair::start(nodes);
        for op in ops {
            pair.apply(op);
        }
        pair.assert_within_limits();
        for request in &requests {
            pair.assert_decides_as_specified(request);
            pair.assert_explanation_adds_up(request);
        }
    }

    #[test]
    fn never_exceeds_what_may_be_promised(nodes in vec(node(12), 1..12), requests in vec(request(12), 1..120)) {
        let mut pair = Pair::start(nodes);
        pair.forced.clear();
        for request in requests {
            pair.apply(Op::Schedule(request));
        }
        pair.assert_within_limits();
    }

    #[test]
    fn the_index_equals_one_built_from_scratch(
        nodes in vec(node(40), 1..50), ops in vec(op(40), 0..120), requests in vec(request(40), 1..6),
    ) {
        let mut pair = Pair::start(nodes);
        for op in ops {
            pair.apply(op);
        }
        prop_assert_eq!(pair.world.verify(), Ok(()));
        let rebuilt = pair.rebuilt();
        prop_assert_eq!(rebuilt.verify(), Ok(()));
        prop_assert_eq!(pair.world.node_count(), rebuilt.node_count());
        prop_assert_eq!(pair.world.instance_count(), rebuilt.instance_count());
        for request in &requests {
            prop_assert_eq!(decide(&pair.world, request), decide(&pair.world, request));
            prop_assert_eq!(decide(&pair.world, request), decide(&rebuilt, request));
            pair.assert_decides_as_specified(request);
        }
    }

    #[test]
    fn relaxing_a_condition_never_makes_it_worse(
        nodes in vec(node(8), 1..8), ops in vec(op(8), 0..30), requests in vec(request(8), 1..8),
    ) {
        let mut pair = Pair::start(nodes);
        for op in ops {
            pair.apply(op);
        }
        for request in &requests {
            let before = explain(&pair.world, request).fit;
            for relaxed in relaxations(request) {
                prop_assert!(explain(&pair.world, &relaxed).fit >= before, "{:?}", relaxed);
                prop_assert_eq!(find(&pair.world, &relaxed).is_some(), explain(&pair.world, &relaxed).fit > 0);
            }
        }
    }

    #[test]
    fn a_plan_is_what_the_batch_then_does(
        nodes in vec(node(8), 1..8), ops in vec(op(8), 0..20), requests in vec(request(8), 1..20),
    ) {
        let mut pair = Pair::start(nodes);
        for op in ops {
            pair.apply(op);
        }
        let requests: Vec<Request> = requests.into_iter().map(|request| pair.fresh(request)).collect();
        let usage = |world: &World| world.nodes().map(|(spec, usage)| (spec.id, usage)).collect::<Vec<_>>();
        let before = usage(&pair.world);
        let planned = plan(&pair.world, &requests);
        prop_assert_eq!(&usage(&pair.world), &before);
        prop_assert_eq!(pair.world.verify(), Ok(()));
        prop_assert_eq!(&decide_batch(&mut pair.world, &requests), &planned);
        let placed = planned.iter().filter(|answer| answer.is_ok()).count();
        prop_assert_eq!(pair.world.instance_count(), pair.model.running.len() + placed);
        // Asked again, those that were placed are refused, by the plan as by the batch.
        prop_assert_eq!(plan(&pair.world, &requests).iter().filter(|a| matches!(a, Err(Unplaced::Refused(_)))).count(), placed);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    /// Large enough for the other forms of every set: images on most nodes, volumes on hundreds, labels with hundreds of
    /// values, selectors that match hundreds of groups.
    #[test]
    fn agrees_in_large_worlds_too(
        nodes in vec(node(400), 250..500), placed in vec((instance_labels(), 0u128..400, resources(2)), 100..300),
        requests in vec(request(400), 20..40),
    ) {
        let mut pair = Pair::start(nodes);
        for (serial, (mut labels, node, resources)) in placed.into_iter().enumerate() {
            labels.insert("serial".to_owned(), serial.to_string());
            let request = Request { labels, ..Request::new(InstanceId(0), ProjectId(0), Isolation::Container, resources) };
            pair.apply(Op::Place(request, node));
        }
        prop_assert_eq!(pair.world.verify(), Ok(()));
        for mut request in requests {
            request.project = ProjectId(0);
            pair.assert_decides_as_specified(&request);
            pair.assert_explanation_adds_up(&request);
        }
    }
}
