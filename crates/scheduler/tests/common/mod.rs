//! A scheduler without an index: the specification that the real one is compared with.

use std::collections::BTreeMap;

use oblak_scheduler::{
    AffinityRule, Direction, IMAGE_BONUS, InstanceId, LabelRule, NEARLY, NodeId, NodeSpec, NodeState, PPM, ProjectId,
    Request, Resources, Strategy, Strength, Support, Topology, VOLUME_BONUS, WINDOW,
};

#[derive(Debug, Clone)]
pub struct Running {
    pub node: NodeId,
    pub project: ProjectId,
    pub labels: BTreeMap<String, String>,
    pub resources: Resources,
}

#[derive(Debug, Clone, Default)]
pub struct Model {
    pub nodes: BTreeMap<NodeId, NodeSpec>,
    pub running: BTreeMap<InstanceId, Running>,
}

fn amounts(r: Resources) -> [u128; 3] {
    [u128::from(r.cpu_milli), u128::from(r.memory), u128::from(r.disk)]
}

fn rule_holds(rule: &LabelRule, labels: &BTreeMap<String, String>) -> bool {
    match rule {
        LabelRule::Is(key, value) => labels.get(key) == Some(value),
        LabelRule::IsNot(key, value) => labels.get(key) != Some(value),
        LabelRule::Exists(key) => labels.contains_key(key),
        LabelRule::Absent(key) => !labels.contains_key(key),
    }
}

impl Model {
    pub fn limits(&self, node: &NodeSpec) -> [u128; 3] {
        let (capacity, usable) = (amounts(node.capacity), amounts(node.allocatable));
        let ratios = [node.overcommit.cpu, node.overcommit.memory, node.overcommit.disk].map(u128::from);
        std::array::from_fn(|at| usable[at].min(capacity[at]) * ratios[at] / 1000)
    }

    pub fn used(&self, node: NodeId) -> [u128; 3] {
        let mut used = [0; 3];
        for running in self.running.values().filter(|running| running.node == node) {
            for (sum, more) in used.iter_mut().zip(amounts(running.resources)) {
                *sum += more;
            }
        }
        used
    }

    pub fn free(&self, node: &NodeSpec) -> [u128; 3] {
        let (limits, used) = (self.limits(node), self.used(node.id));
        std::array::from_fn(|at| limits[at].saturating_sub(used[at]))
    }

    fn selected<'a>(&'a self, request: &'a Request, rule: &'a AffinityRule) -> impl Iterator<Item = &'a Running> {
        self.running.values().filter(move |running| {
            running.project == request.project && rule.selector.iter().all(|term| rule_holds(term, &running.labels))
        })
    }

    fn near(&self, request: &Request, rule: &AffinityRule, node: &NodeSpec) -> bool {
        self.selected(request, rule).any(|running| match rule.topology {
            Topology::Node => running.node == node.id,
            Topology::Zone => self.nodes[&running.node].zone == node.zone,
        })
    }

    fn affinity_passes(&self, request: &Request, rule: &AffinityRule, node: &NodeSpec) -> bool {
        if rule.strength != Strength::Required {
            return true;
        }
        match rule.direction {
            Direction::Apart => !self.near(request, rule, node),
            Direction::Together => {
                let first = self.selected(request, rule).next().is_none()
                    && rule.selector.iter().all(|term| rule_holds(term, &request.labels));
                first || self.near(request, rule, node)
            }
        }
    }

    pub fn passes(&self, request: &Request, node: &NodeSpec) -> bool {
        let free = self.free(node);
        node.state == NodeState::Ready
            && request.only_node.is_none_or(|only| only == node.id)
            && !request.avoid_nodes.contains(&node.id)
            && node.isolations.get(&request.isolation) == Some(&Support::Yes)
            && (request.zones.is_empty() || request.zones.contains(&node.zone))
            && request.features.is_subset(&node.features)
            && amounts(request.resources).iter().zip(free).all(|(asked, free)| *asked <= free)
            && request.node_labels.iter().all(|rule| rule_holds(rule, &node.labels))
            && request.volumes.iter().all(|volume| node.volumes.contains(&volume.id))
            && request.affinity.iter().all(|rule| self.affinity_passes(request, rule, node))
    }

    pub fn score(&self, request: &Request, node: &NodeSpec) -> i64 {
        let (limits, free) = (self.limits(node), self.free(node));
        let shares = (0..3).filter(|at| limits[*at] > 0).map(|at| free[at] * u128::from(PPM) / limits[at]);
        let tightest = shares.min().unwrap_or(0) as i64;
        let mut score = match request.strategy {
            Strategy::Pack => i64::from(PPM) - tightest,
            Strategy::Spread => tightest,
        };
        if request.image.is_some_and(|image| node.images.contains(&image)) {
            score += IMAGE_BONUS;
        }
        score +=
            VOLUME_BONUS * request.near_volumes.iter().filter(|volume| node.volumes.contains(volume)).count() as i64;
        for rule in &request.affinity {
            if let Strength::Preferred(weight) = rule.strength
                && self.near(request, rule, node)
            {
                score += match rule.direction {
                    Direction::Together => i64::from(weight),
                    Direction::Apart => -i64::from(weight),
                };
            }
        }
        score
    }

    /// All nodes that pass, best first.
    pub fn ranking(&self, request: &Request) -> Vec<(NodeId, i64)> {
        let passing = self.nodes.values().filter(|node| self.passes(request, node));
        let mut ranked: Vec<(NodeId, i64)> = passing.map(|node| (node.id, self.score(request, node))).collect();
        ranked.sort_by_key(|(id, score)| (-score, *id));
        if request.strategy == Strategy::Pack && !ranked.is_empty() {
            let bar = ranked[0].1 - NEARLY;
            let near = ranked.iter().take(WINDOW).filter(|(_, score)| *score >= bar).count();
            ranked[..near].sort_by_key(|(id, score)| (-self.balance(request, &self.nodes[id], *score), -score, *id));
        }
        ranked
    }

    /// Balance after the placement, and wishes.
    fn balance(&self, request: &Request, node: &NodeSpec, score: i64) -> i64 {
        let (limits, free, asked) = (self.limits(node), self.free(node), amounts(request.resources));
        let shares = (0..3).filter(|at| limits[*at] > 0).map(|at| free[at] * u128::from(PPM) / limits[at]);
        let wishes = score - (i64::from(PPM) - shares.min().unwrap_or(0) as i64);
        if limits[0] == 0 || limits[1] == 0 {
            return wishes;
        }
        let left = |at: usize| ((free[at] - asked[at]) * u128::from(PPM) / limits[at]) as i64;
        wishes - (left(0) - left(1)).abs()
    }
}
