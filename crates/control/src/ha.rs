//! High availability: which guests depend on the lease of their node, and where they go when it has ended.
//!
//! ```text
//!  node's lease gone ── margin ──► too many lost at once? ──yes──► held; a person confirms
//!                                     │ no                              │
//!                                     ▼                                 ▼
//!                        (power it off, if there is a command) ──► relocate: guarded by "lease absent"
//! ```
//! An instance is moved only when its old guest cannot run any more: its shim freezes it at the end of the lease (`placement.fenced`, and the
//! node has said that this is in force), or a person says that the node is lost. The margin covers what freezing takes. Everything else of a
//! lost node stays where it is, `unknown`.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use oblak_model::wire::NewEvent;
use oblak_model::{Evacuation, Instance, Node, NodeId, NodePhase, Severity, Timestamp, Volume};
use oblak_store::cache::Item;
use oblak_store::{Guard, Prefix, SharedStore, StoreError, objects};
use tokio::time::Instant;

use crate::caches::Caches;
use crate::change::{Change, event};
use crate::drive::Reconciler;
use crate::placement::{Plan, ready};
use crate::world::LiveWorld;

/// Nodes that were lost within this time count as lost at once.
const AT_ONCE: Duration = Duration::from_secs(60);
/// Instances moved in one pass; the rest in the next.
const PER_PASS: usize = 64;
/// How often it is looked whether the margin of a lost node is over.
const SOON: Duration = Duration::from_millis(100);
const SWEEP: Duration = Duration::from_secs(5);
/// How long the command that powers a node off may take.
const POWER_OFF: Duration = Duration::from_secs(10);

/// Powers machines off from outside, for example through their BMC.
pub trait Power: Send + Sync {
    /// Makes sure that the node with this name runs nothing any more. The error is for people.
    fn off(&self, node: &str) -> futures_util::future::BoxFuture<'static, Result<(), String>>;
}

/// How it behaves.
#[derive(Clone)]
pub struct HaConfig {
    /// Time between the end of a lease and the start elsewhere: what freezing a guest takes, and how far clocks may run apart in the length
    /// of a lease.
    pub margin: Duration,
    /// When more than this part of the nodes that were up is lost at once, and at least two, nothing is evacuated.
    pub brake_percent: u32,
    /// Asked before a node is evacuated. When it fails, people are told and the fences of the guests are relied upon.
    pub power: Option<Arc<dyn Power>>,
}

impl Default for HaConfig {
    fn default() -> Self {
        Self { margin: Duration::from_secs(2), brake_percent: 50, power: None }
    }
}

/// The reconciler.
#[derive(Default)]
pub struct Ha {
    config: HaConfig,
    live: LiveWorld,
    /// Since when leases are seen to be gone, with the epoch that they had. Only in memory: a new leader waits the whole margin again.
    gone: BTreeMap<NodeId, (u64, Instant)>,
    /// Whether the margin of one of them is not over yet.
    soon: bool,
    power_off: Vec<Node>,
    powered_off: BTreeSet<(NodeId, u64)>,
}

impl Ha {
    /// With these settings.
    pub fn new(config: HaConfig) -> Self {
        Self { config, ..Self::default() }
    }

    /// Nodes whose lease has been gone for the margin.
    fn due(&mut self, caches: &Caches, nodes: &[Arc<Item<Node>>]) -> Vec<Node> {
        let leased = |n: &Node| caches.keys.get(&objects::lease_key(id(n))).is_some();
        let without: Vec<&Node> = nodes.iter().map(|n| &n.value).filter(|n| !leased(n)).collect();
        self.gone.retain(|node, (epoch, _)| without.iter().any(|n| id(n) == *node && n.status.epoch == *epoch));
        self.powered_off.retain(|(node, _)| self.gone.contains_key(node));
        let now = Instant::now();
        let mut due = Vec::new();
        self.soon = false;
        for node in without {
            let (_, since) = *self.gone.entry(id(node)).or_insert((node.status.epoch, now));
            if now.duration_since(since) < self.config.margin {
                self.soon = true;
            } else if node.status.phase == NodePhase::Down {
                due.push(node.clone());
            }
        }
        due
    }
}

fn id(node: &Node) -> NodeId {
    NodeId(node.metadata.id)
}

impl Reconciler for Ha {
    fn name(&self) -> &'static str {
        "ha"
    }
    fn sweep(&self) -> Duration {
        if self.soon { SOON } else { SWEEP }
    }
    fn plan(&mut self, caches: &Caches, now: Timestamp) -> Vec<Change> {
        let all = Prefix::all();
        let (nodes, instances) = (caches.nodes.all(&all), caches.instances.all(&all));
        let mut changes: Vec<Change> = instances.iter().filter_map(|i| turn_fence(&i.value, &nodes)).collect();
        let due = self.due(caches, &nodes);
        if due.is_empty() {
            return changes;
        }
        let holds = brake(nodes.iter().map(|n| &n.value), now, self.config.brake_percent);
        let mut leaving: Vec<(Node, Vec<&Instance>)> = Vec::new();
        for node in due {
            let there = |i: &&Arc<Item<Instance>>| is_on(&i.value, id(&node));
            let moving: Vec<&Instance> =
                instances.iter().filter(there).filter(|i| may_move(&i.value, &node)).map(|i| &i.value).collect();
            // Also those whose fence is not in force: a person may know that they can be moved.
            let waiting = instances.iter().filter(there).filter(|i| i.value.spec.ha).count();
            match node.status.evacuation {
                Evacuation::Automatic if holds && waiting > 0 => changes.push(hold(&node, waiting)),
                held if moving.is_empty() || held == Evacuation::Held => {}
                _ if self.must_be_off(&node) => self.power_off.push(node.clone()),
                _ => leaving.push((node.clone(), moving)),
            }
            if !holds && node.status.evacuation != Evacuation::Held {
                changes.extend(adopt_volumes(caches, &node, &nodes));
            }
        }
        if !leaving.is_empty() {
            self.live.catch_up(caches);
            let mut plan = Plan::new(caches, &mut self.live, now);
            for (node, moving) in &leaving {
                changes.extend(evacuate(&mut plan, node, moving));
            }
        }
        changes
    }

    async fn look(&mut self, _: &SharedStore, _: Timestamp) -> Result<Vec<Change>, StoreError> {
        let Some(power) = self.config.power.clone() else { return Ok(Vec::new()) };
        let asked = std::mem::take(&mut self.power_off);
        let off =
            asked.iter().map(|node| {
                let answer = power.off(&node.metadata.name);
                async move {
                    tokio::time::timeout(POWER_OFF, answer).await.unwrap_or_else(|_| Err("it takes too long".into()))
                }
            });
        let outcomes = futures_util::future::join_all(off).await;
        self.powered_off.extend(asked.iter().map(|node| (id(node), node.status.epoch)));
        Ok(asked.iter().zip(outcomes).map(|(node, outcome)| Change::default().event(told_off(node, outcome))).collect())
    }
}

impl Ha {
    fn must_be_off(&self, node: &Node) -> bool {
        self.config.power.is_some() && !self.powered_off.contains(&(id(node), node.status.epoch))
    }
}

fn told_off(node: &Node, outcome: Result<(), String>) -> NewEvent {
    match outcome {
        Ok(()) => event(node, Severity::Normal, "PoweredOff", "powered off before its instances are started elsewhere"),
        Err(why) => {
            let text =
                format!("could not be powered off ({why}); its guests stand still by themselves since its lease ended");
            event(node, Severity::Warning, "PowerOffFailed", text)
        }
    }
}

fn is_on(instance: &Instance, node: NodeId) -> bool {
    instance.status.placement.as_ref().is_some_and(|p| p.node == node)
}

/// Whether so many nodes were lost at once that the fault is rather ours.
fn brake<'a>(nodes: impl Iterator<Item = &'a Node>, now: Timestamp, percent: u32) -> bool {
    let (mut up, mut lost) = (0u64, 0u64);
    for node in nodes.filter(|n| !n.metadata.is_deleting()) {
        match node.status.phase {
            NodePhase::Ready | NodePhase::Cleaning => up += 1,
            NodePhase::Down if now.since(node.status.phase_since) < AT_ONCE => lost += 1,
            NodePhase::Down | NodePhase::Unknown => {}
        }
    }
    lost >= 2 && lost * 100 > (up + lost) * u64::from(percent)
}

fn hold(node: &Node, instances: usize) -> Change {
    let mut new = node.clone();
    new.status.evacuation = Evacuation::Held;
    let text = format!(
        "too many nodes were lost at once to believe it: {instances} instances with ha wait. `oblak node evacuate {} --confirm` starts them elsewhere",
        node.metadata.name
    );
    new.status.message.clone_from(&text);
    Change::update(&new).event(event(node, Severity::Warning, "EvacuationHeld", text))
}

/// Whether nothing of the instance can run on its lost node any more.
fn may_move(instance: &Instance, node: &Node) -> bool {
    let Some(placement) = &instance.status.placement else { return false };
    // One that is to be deleted moves too, or its deletion would wait for a node that may never come back.
    if !instance.spec.ha {
        return false;
    }
    let observed = &instance.status.observed;
    let in_force = if observed.placement == placement.generation {
        observed.fence_turn == placement.fence_turn
    } else {
        // Not heard of since it was placed there: then whoever starts it starts it with the first fence.
        placement.fence_turn == 1
    };
    node.status.evacuation == Evacuation::Confirmed || (placement.fenced && in_force)
}

/// Turns fences on where another node could take over, and off where none could: then nothing is won by standing still.
fn turn_fence(instance: &Instance, nodes: &[Arc<Item<Node>>]) -> Option<Change> {
    let placement = instance.status.placement.as_ref().filter(|_| !instance.metadata.is_deleting())?;
    if !instance.spec.ha && !placement.fenced {
        return None;
    }
    let own = nodes.iter().find(|n| id(&n.value) == placement.node)?;
    let other = nodes.iter().any(|n| id(&n.value) != placement.node && could_take(&n.value, instance));
    let wanted = instance.spec.ha && other;
    // Before the node has spoken, what was first asked for counts (see `may_move`); a node that is away hears nothing anyway.
    let heard = instance.status.observed.placement == placement.generation;
    if placement.fenced == wanted || !own.value.status.phase.is_up() || !(wanted || heard) {
        return None;
    }
    let mut new = instance.clone();
    let placement = new.status.placement.as_mut()?;
    placement.fenced = wanted;
    placement.fence_turn += 1;
    Some(Change::update(&new))
}

fn could_take(node: &Node, instance: &Instance) -> bool {
    let facts = &node.status.facts;
    let pool = &instance.spec.pool;
    node.status.phase.is_up()
        && node.spec.schedulable
        && !node.metadata.is_deleting()
        && facts.isolations.contains(&instance.status.resolved.isolation)
        && (pool.is_empty() || has_pool(node, pool))
}

/// Moves what fits; each by a commit of its own that fails when the node has a lease again, or is not the one that was looked at.
fn evacuate(plan: &mut Plan<'_>, node: &Node, moving: &[&Instance]) -> Vec<Change> {
    let mut changes = Vec::new();
    for instance in moving.iter().take(PER_PASS) {
        let Some(mut change) = plan.relocate(instance, node) else { continue };
        if !change.ops.writes.is_empty() {
            change.ops.guard(Guard::Absent(objects::lease_key(id(node))));
            change.ops.guard(Guard::Revision(objects::key_of(node), node.metadata.revision));
        }
        changes.push(change);
    }
    changes
}

/// Gives volumes in shared pools that no instance has to a node that lives; the epoch keeps the lost one from them.
fn adopt_volumes(caches: &Caches, lost: &Node, nodes: &[Arc<Item<Node>>]) -> Vec<Change> {
    let volumes = caches.volumes.all(&Prefix::all());
    let left = volumes
        .iter()
        .map(|v| &v.value)
        .filter(|v| v.status.node == Some(id(lost)) && v.status.attached_to.is_none() && !v.spec.pool.is_empty());
    let adopt = |volume: &Volume| {
        let to = ready(nodes).into_iter().find(|n| has_pool(&n.value, &volume.spec.pool))?;
        let mut new = volume.clone();
        new.status.node = Some(id(&to.value));
        new.status.epoch += 1;
        let mut change = Change::update(&new);
        change.ops.guard(Guard::Absent(objects::lease_key(id(lost))));
        Some(change)
    };
    left.filter_map(adopt).take(PER_PASS).collect()
}

fn has_pool(node: &Node, pool: &str) -> bool {
    node.status.facts.pools.iter().any(|p| p.name == pool && p.problem.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;
    use oblak_model::{InstanceSpec, NodeSpec, Placement, Resources};

    fn node(n: u128, phase: NodePhase, since_secs: i64) -> Node {
        let mut node = Node::new(&format!("n{n}"), NodeSpec::default());
        node.metadata.id = uuid::Uuid::from_u128(n);
        node.status.phase = phase;
        node.status.phase_since = Timestamp::from_micros(since_secs * 1_000_000);
        node
    }

    #[test]
    fn the_brake_holds_when_most_nodes_are_lost_at_once() {
        let now = Timestamp::from_micros(1_000_000_000);
        let braked = |down: &[i64], up: u128| {
            let down = down.iter().enumerate().map(|(n, since)| node(100 + n as u128, NodePhase::Down, *since));
            let nodes: Vec<Node> = down.chain((0..up).map(|n| node(n, NodePhase::Ready, 0))).collect();
            brake(nodes.iter(), now, 50)
        };
        assert!(!braked(&[999], 1), "one of two is a failure like any other");
        assert!(!braked(&[999], 0));
        assert!(braked(&[999, 990], 1));
        assert!(!braked(&[999, 990], 2), "half is not more than half");
        assert!(!braked(&[999, 100], 1), "one was lost long ago");
    }

    fn placed(fenced: bool, turn: u64) -> Instance {
        let mut db = Instance::new("db", InstanceSpec { ha: true, ..InstanceSpec::default() });
        db.status.placement = Some(Placement {
            node: NodeId(uuid::Uuid::from_u128(1)),
            node_name: "n1".into(),
            resources: Resources::default(),
            at: Timestamp::EPOCH,
            why: String::new(),
            generation: 4,
            fenced,
            fence_turn: turn,
        });
        db
    }

    #[test]
    fn only_what_stands_still_for_certain_is_moved() {
        let mut lost = node(1, NodePhase::Down, 0);
        let mut db = placed(true, 1);
        assert!(may_move(&db, &lost), "never heard of there: the first fence holds");
        db.status.placement.as_mut().unwrap().fence_turn = 3;
        assert!(!may_move(&db, &lost), "it may have heard of turn 2, which was off");
        db.status.observed.placement = 4;
        db.status.observed.fence_turn = 2;
        assert!(!may_move(&db, &lost));
        db.status.observed.fence_turn = 3;
        assert!(may_move(&db, &lost));
        assert!(!may_move(&placed(false, 1), &lost), "nobody could take over when it was last looked at");
        lost.status.evacuation = Evacuation::Confirmed;
        assert!(may_move(&placed(false, 1), &lost), "a person knows");
        db.spec.ha = false;
        assert!(!may_move(&db, &lost));
    }

    fn item(node: Node) -> Arc<Item<Node>> {
        let (key, value) = (objects::key_of(&node), objects::encode(&node));
        let (revision, created) = (oblak_store::Revision::ZERO, oblak_store::Revision::ZERO);
        Arc::new(Item::new(oblak_store::Entry { key, value, revision, created }, node))
    }

    #[test]
    fn a_fence_is_on_only_where_somebody_could_take_over() {
        let own = || item(node(1, NodePhase::Ready, 0));
        let able = |phase| {
            let mut other = node(2, phase, 0);
            other.status.facts.isolations = vec![oblak_model::Isolation::Vm];
            item(other)
        };
        let fenced = |change: Option<Change>| {
            let change = change?;
            let oblak_store::Write::Put { value, key, .. } = &change.ops.writes[0] else { panic!("a put") };
            let instance: Instance = objects::decode_value(key, value).unwrap();
            instance.status.placement.map(|p| (p.fenced, p.fence_turn))
        };
        let mut db = placed(true, 1);
        assert_eq!(fenced(turn_fence(&db, &[own()])), None, "its node has not spoken yet");
        db.status.observed.placement = 4;
        assert_eq!(fenced(turn_fence(&db, &[own()])), Some((false, 2)));
        assert_eq!(fenced(turn_fence(&db, &[own(), able(NodePhase::Down)])), Some((false, 2)));
        assert_eq!(fenced(turn_fence(&db, &[own(), able(NodePhase::Ready)])), None);
        assert_eq!(fenced(turn_fence(&placed(false, 2), &[own(), able(NodePhase::Ready)])), Some((true, 3)));
        assert_eq!(fenced(turn_fence(&placed(false, 2), &[able(NodePhase::Ready)])), None, "its node is no more");
    }
}
