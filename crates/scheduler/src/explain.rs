//! Why a request does not fit: per condition, how many nodes it rules out and which one comes closest.

use std::fmt;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::amount::{Resource, Round, format_amount};
use crate::groups::Group;
use crate::ids::NodeId;
use crate::labels::{LabelRule, join_rules};
use crate::node::{NodeSpec, NodeState};
use crate::query::{About, Query, Test};
use crate::request::{AffinityRule, Direction, Request, Topology};
use crate::world::{Node, World};

/// The kind of a condition; stable, for programs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Condition {
    /// The node takes new instances.
    State,
    /// The request names one node.
    OnlyNode,
    /// The request excludes nodes.
    AvoidNodes,
    /// The node supports the isolation.
    Isolation,
    /// The node is in one of the zones.
    Zone,
    /// The node has the feature.
    Feature,
    /// Enough vCPUs are free.
    Cpu,
    /// Enough memory is free.
    Memory,
    /// Enough disk is free.
    Disk,
    /// A rule on node labels.
    Label,
    /// The data of a volume is on the node.
    Volume,
    /// Selected instances are near.
    Affinity,
    /// Selected instances are not near.
    AntiAffinity,
}

/// One condition and what it does to the nodes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RuledOut {
    /// Which condition.
    pub condition: Condition,
    /// What it says about the closest node, in words.
    pub text: String,
    /// Nodes that break it, whatever else they break.
    pub nodes: u32,
    /// Nodes that break it and no condition before it in the fixed order of checking; over all conditions these add up
    /// to the nodes that do not fit.
    pub charged: u32,
    /// Nodes that break it and nothing else: so many would fit if it were dropped.
    pub alone: u32,
    /// The node that comes closest to passing: one that breaks nothing else, if there is one, with the least missing.
    pub closest: NodeId,
    /// What was asked, for conditions that count: milli-vCPUs or bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub asked: Option<u64>,
    /// What the closest node has free, for conditions that count: milli-vCPUs or bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub free: Option<u64>,
}

/// Which nodes a request fits on and what rules out the others.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Explanation {
    /// Nodes known.
    pub nodes: u32,
    /// Nodes that pass every condition.
    pub fit: u32,
    /// The conditions that rule something out, the one that rules out most first.
    pub conditions: Vec<RuledOut>,
}

impl fmt::Display for RuledOut {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let plural = if self.nodes == 1 { "" } else { "s" };
        write!(f, "{} ({} node{plural})", self.text, self.nodes)
    }
}

impl fmt::Display for Explanation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of {} nodes fit", self.fit, self.nodes)?;
        if self.nodes == 0 {
            return f.write_str(": there are no nodes yet");
        }
        for (at, condition) in self.conditions.iter().enumerate() {
            write!(f, "{} {condition}", if at == 0 { ":" } else { ";" })?;
        }
        Ok(())
    }
}

impl std::error::Error for Explanation {}

/// Looks at every node. Works for requests that fit too.
#[must_use]
pub fn explain(world: &World, request: &Request) -> Explanation {
    explain_query(&Query::new(world, request))
}

/// Less is closer: breaks other conditions too, what is missing, how many others, id.
type Distance = (bool, u64, u32, NodeId);

#[derive(Clone, Copy, Default)]
struct Tally {
    nodes: u32,
    charged: u32,
    alone: u32,
    closest: Option<(Distance, u32)>,
}

/// The conditions by what they depend on, so that most are evaluated once per class instead of once per node.
struct Sorted<'q, 'a> {
    query: &'q Query<'a>,
    /// Conditions on the node itself, but for room.
    on_node: Vec<usize>,
    /// Where each resource's condition is.
    room: Vec<(usize, usize)>,
    /// Broken conditions per class, filled in as classes are met.
    by_class: Vec<Option<Vec<usize>>>,
    /// The instances that the affinity rules select, per condition.
    selected: Vec<Vec<&'a Group>>,
}

impl<'q, 'a> Sorted<'q, 'a> {
    fn new(query: &'q Query<'a>) -> Self {
        let (mut on_node, mut room) = (Vec::new(), Vec::new());
        for (at, check) in query.checks.iter().enumerate() {
            match check.test {
                Test::Room(resource) => room.push((at, resource as usize)),
                _ if check.test.is_of_class() => {}
                _ => on_node.push(at),
            }
        }
        let selected = query.checks.iter().map(|check| match check.about {
            About::Affinity(rule) => query.selected(rule),
            _ => Vec::new(),
        });
        Self { query, on_node, room, by_class: Vec::new(), selected: selected.collect() }
    }

    /// The conditions that a node breaks, in no particular order.
    fn broken(&mut self, slot: u32, node: &Node, broken: &mut Vec<usize>) {
        let class = node.class as usize;
        if class >= self.by_class.len() {
            self.by_class.resize(class + 1, None);
        }
        let checks = &self.query.checks;
        let of_class = self.by_class[class].get_or_insert_with(|| {
            let breaks = |at: &usize| checks[*at].test.is_of_class() && !self.query.holds(&checks[*at].test, slot);
            (0..checks.len()).filter(breaks).collect()
        });
        broken.clear();
        broken.extend_from_slice(of_class);
        let (used, limit) = (&node.usage.used, &node.usage.limit);
        let short = |at: usize| limit[at].saturating_sub(used[at]) < self.query.need[at];
        broken.extend(self.room.iter().filter(|(_, resource)| short(*resource)).map(|(at, _)| *at));
        broken.extend(self.on_node.iter().filter(|at| !self.query.holds(&checks[**at].test, slot)));
    }

    /// How far a node is from passing a condition; comparable within one condition only.
    fn missing(&self, at: usize, slot: u32, node: &Node) -> u64 {
        match self.query.checks[at].about {
            About::State => u64::from(node.spec.state == NodeState::Down),
            About::Resource(resource) => {
                let at = resource as usize;
                self.query.need[at].saturating_sub(node.usage.free()[at])
            }
            About::Affinity(rule) if rule.direction == Direction::Apart => self.near(at, rule, slot, node),
            _ => 0,
        }
    }

    /// How many of the instances that a rule selects are on the node, or in its zone.
    fn near(&self, at: usize, rule: &AffinityRule, slot: u32, node: &Node) -> u64 {
        let counts = self.selected[at].iter().map(|group| match rule.topology {
            Topology::Node => group.nodes.get(&slot),
            Topology::Zone => group.zones.get(&node.zone),
        });
        counts.flatten().map(|count| u64::from(*count)).sum()
    }

    fn describe(&self, at: usize, tally: &Tally) -> Option<RuledOut> {
        let (_, slot) = tally.closest?;
        let (about, node) = (self.query.checks[at].about, self.query.world.at(slot));
        let (asked, free) = match about {
            About::Resource(resource) => {
                let at = resource as usize;
                (Some(self.query.need[at]), Some(node.usage.free()[at]))
            }
            _ => (None, None),
        };
        let near = match about {
            About::Affinity(rule) => self.near(at, rule, slot, node),
            _ => 0,
        };
        Some(RuledOut {
            condition: condition(about),
            text: sentence(self.query, about, node, near),
            nodes: tally.nodes,
            charged: tally.charged,
            alone: tally.alone,
            closest: node.id,
            asked,
            free,
        })
    }
}

pub(crate) fn explain_query(query: &Query<'_>) -> Explanation {
    let mut sorted = Sorted::new(query);
    let mut tallies = vec![Tally::default(); query.checks.len()];
    let mut broken = Vec::with_capacity(query.checks.len());
    let (mut nodes, mut fit) = (0, 0);
    for (slot, node) in query.world.live() {
        nodes += 1;
        sorted.broken(slot, node, &mut broken);
        let Some(first) = broken.iter().min() else {
            fit += 1;
            continue;
        };
        tallies[*first].charged += 1;
        let others = broken.len() as u32 - 1;
        for at in broken.iter().copied() {
            let tally = &mut tallies[at];
            tally.nodes += 1;
            tally.alone += u32::from(others == 0);
            // A node that breaks more cannot be closer than one that breaks only this: most need no second look.
            if tally.closest.is_none_or(|((crowded, ..), _)| (others > 0) <= crowded) {
                let distance = (others > 0, sorted.missing(at, slot, node), others, node.id);
                if tally.closest.is_none_or(|(least, _)| distance < least) {
                    tally.closest = Some((distance, slot));
                }
            }
        }
    }
    let mut conditions: Vec<RuledOut> =
        tallies.iter().enumerate().filter_map(|(at, tally)| sorted.describe(at, tally)).collect();
    conditions.sort_by_key(|condition| std::cmp::Reverse(condition.nodes));
    Explanation { nodes, fit, conditions }
}

fn condition(about: About<'_>) -> Condition {
    match about {
        About::State => Condition::State,
        About::OnlyNode => Condition::OnlyNode,
        About::AvoidNodes => Condition::AvoidNodes,
        About::Resource(Resource::Cpu) => Condition::Cpu,
        About::Resource(Resource::Memory) => Condition::Memory,
        About::Resource(Resource::Disk) => Condition::Disk,
        About::Isolation => Condition::Isolation,
        About::Zone => Condition::Zone,
        About::Label(_) => Condition::Label,
        About::Feature(_) => Condition::Feature,
        About::Volume(_) => Condition::Volume,
        About::Affinity(rule) if rule.direction == Direction::Together => Condition::Affinity,
        About::Affinity(_) => Condition::AntiAffinity,
    }
}

/// `near` counts the instances that an affinity rule selects; other conditions do not look at it.
fn sentence(query: &Query<'_>, about: About<'_>, node: &Node, near: u64) -> String {
    let request = query.request;
    let (spec, name) = (&node.spec, &node.spec.name);
    match about {
        About::State => format!("node {name} is {}", spec.state),
        About::OnlyNode => only_node(query, request, name),
        About::AvoidNodes => format!("node {name} is excluded by the request"),
        About::Resource(resource) => {
            let at = resource as usize;
            let asked = format_amount(resource, query.need[at], Round::Up);
            let free = format_amount(resource, node.usage.free()[at], Round::Down);
            format!("{resource} {asked} asked, {free} free on {name}")
        }
        About::Isolation => {
            let isolation = request.isolation;
            format!("isolation {isolation} not supported on {name}: {}", spec.why_not(isolation))
        }
        About::Zone => format!("zone {} asked, {name} is in {}", request.zones.join(" or "), quoted(&spec.zone)),
        About::Label(rule) => label(rule, spec),
        About::Feature(feature) => format!("feature {feature} asked, {name} does not have it"),
        About::Volume(volume) => match query.holder_of(volume) {
            Some(holder) => format!("volume {} is on {holder}, not on {name}", volume.name),
            None => format!("volume {} is on no node", volume.name),
        },
        About::Affinity(rule) => affinity(rule, spec, near),
    }
}

fn only_node(query: &Query<'_>, request: &Request, name: &Arc<str>) -> String {
    let Some(id) = request.only_node else { return String::new() };
    match query.world.node(id) {
        Some(wanted) => format!("node {} asked, {name} is another", wanted.name),
        None => format!("node {id} asked, it is not known"),
    }
}

fn quoted(zone: &str) -> String {
    if zone.is_empty() { "no zone".to_owned() } else { zone.to_owned() }
}

fn label(rule: &LabelRule, spec: &NodeSpec) -> String {
    let name = &spec.name;
    match (rule, spec.labels.get(rule.key())) {
        (LabelRule::Absent(key) | LabelRule::IsNot(key, _), Some(value)) => {
            format!("label {rule} asked, {name} has {key}={value}")
        }
        (_, Some(value)) => format!("label {rule} asked, {name} has {}={value}", rule.key()),
        (_, None) => format!("label {rule} asked, {name} does not have it"),
    }
}

fn affinity(rule: &AffinityRule, spec: &NodeSpec, near: u64) -> String {
    let (name, selector) = (&spec.name, join_rules(&rule.selector));
    let (level, here) = match rule.topology {
        Topology::Node => ("node", name.to_string()),
        Topology::Zone => ("zone", format!("zone {} of {name}", quoted(&spec.zone))),
    };
    match rule.direction {
        Direction::Together => format!("affinity to {selector} on the same {level} asked, none on {here}"),
        Direction::Apart => format!("anti-affinity to {selector} on the same {level} asked, {near} on {here}"),
    }
}
