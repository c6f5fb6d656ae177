//! Advice: which moves would even the nodes out.
//!
//! The fullness of a node is the used share of its scarcest resource. A move is worth advising when the fuller of the two nodes it touches
//! ends up clearly less full than the source was. The fullest node that can be helped goes first; of its instances the one that helps most.

use std::collections::BTreeSet;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::amount::{PPM, Resource, format_ppm, tightness};
use crate::decide::find;
use crate::ids::{InstanceId, NodeId};
use crate::node::NodeState;
use crate::request::{Request, Strategy};
use crate::world::{Usage, World};

/// Moves that gain less are not worth the trouble: two hundredths of a node.
pub const LEAST_GAIN: u32 = PPM / 50;

/// Sources looked at for one move, fullest first.
const SOURCES: usize = 64;

/// How full a node is, by its scarcest resource.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fullness {
    /// The resource of which the smallest share is free.
    pub scarcest: Resource,
    /// The used share of it, in millionths.
    pub used_ppm: u32,
}

impl Fullness {
    fn of(usage: &Usage) -> Self {
        let (free, scarcest) = tightness(&usage.free(), &usage.limit);
        Self { scarcest, used_ppm: PPM.saturating_sub(free) }
    }
}

impl std::fmt::Display for Fullness {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} of its {}", format_ppm(i64::from(self.used_ppm)), self.scarcest)
    }
}

/// One move, and what the two nodes are like before and after it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Move {
    /// The instance.
    pub instance: InstanceId,
    /// Where it is,
    pub from: NodeId,
    /// and the name of that node.
    pub from_name: Arc<str>,
    /// Where it should go,
    pub to: NodeId,
    /// and the name of that node.
    pub to_name: Arc<str>,
    /// The source before and after.
    pub source: (Fullness, Fullness),
    /// The target before and after.
    pub target: (Fullness, Fullness),
}

impl Move {
    /// By how much the fuller of the two nodes is less full afterwards, in millionths of a node.
    #[must_use]
    pub fn gain_ppm(&self) -> u32 {
        self.source.0.used_ppm.saturating_sub(self.source.1.used_ppm.max(self.target.1.used_ppm))
    }
}

impl std::fmt::Display for Move {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (source, target) = (&self.source, &self.target);
        write!(f, "{} uses {}, {} uses {}; ", self.from_name, source.0, self.to_name, target.0)?;
        let after = |fullness: &Fullness| format_ppm(i64::from(fullness.used_ppm));
        write!(f, "afterwards {} and {}", after(&source.1), after(&target.1))
    }
}

/// What to do, and what it would come to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Advice {
    /// In this order: a later move may need the room of an earlier one.
    pub moves: Vec<Move>,
    /// The used share of the fullest and of the emptiest ready node, in millionths, before
    pub before: Option<(u32, u32)>,
    /// and after.
    pub after: Option<(u32, u32)>,
}

/// Advises at most `most` moves of the placed instances that `movable` asks for, each instance once.
///
/// Only ready nodes give and take. Every condition of a request holds where it goes; where it is now counts as free while a target is sought.
#[must_use]
pub fn balance(world: &World, movable: &[Request], most: usize) -> Advice {
    let mut trial = world.clone();
    let before = extremes(world);
    let mut left: BTreeSet<usize> = (0..movable.len()).filter(|at| trial.instance(movable[*at].id).is_some()).collect();
    let mut moves = Vec::new();
    while moves.len() < most {
        let Some((at, found)) = next(&mut trial, movable, &left) else { break };
        left.remove(&at);
        let _ = trial.unplace(found.instance);
        if trial.place(movable[at].placed_on(found.to)).is_err() {
            // Cannot be: it was found to fit. What is not carried out is not advised.
            break;
        }
        moves.push(found);
    }
    Advice { moves, before, after: extremes(&trial) }
}

fn extremes(world: &World) -> Option<(u32, u32)> {
    let ready = world.nodes().filter(|(spec, _)| spec.state == NodeState::Ready);
    let full: Vec<u32> = ready.map(|(_, usage)| Fullness::of(&usage).used_ppm).collect();
    Some((*full.iter().max()?, *full.iter().min()?))
}

/// The best move off the fullest node that has one. The world is left as it was.
fn next(world: &mut World, movable: &[Request], left: &BTreeSet<usize>) -> Option<(usize, Move)> {
    let ready = world.nodes().filter(|(spec, _)| spec.state == NodeState::Ready);
    let mut sources: Vec<(u32, NodeId)> = ready.map(|(spec, usage)| (Fullness::of(&usage).used_ppm, spec.id)).collect();
    sources.sort_by_key(|(full, id)| (std::cmp::Reverse(*full), *id));
    let lowest = sources.last().map_or(0, |(full, _)| *full);
    sources.truncate(SOURCES);
    for (full, source) in sources {
        if full.saturating_sub(lowest) < LEAST_GAIN {
            return None;
        }
        let here: Vec<usize> = left
            .iter()
            .copied()
            .filter(|at| world.instance(movable[*at].id).is_some_and(|(on, _)| on == source))
            .collect();
        let mut best: Option<(usize, Move)> = None;
        // Of several that are alike the first speaks for all.
        let mut seen: Vec<Request> = Vec::new();
        for at in here {
            let alike = Request { id: InstanceId(0), ..movable[at].clone() };
            if seen.contains(&alike) {
                continue;
            }
            seen.push(alike);
            let found = target(world, &movable[at], source).filter(|found| found.gain_ppm() >= LEAST_GAIN);
            let Some(found) = found else { continue };
            if best.as_ref().is_none_or(|(_, known)| found.gain_ppm() > known.gain_ppm()) {
                best = Some((at, found));
            }
        }
        if best.is_some() {
            return best;
        }
    }
    None
}

/// The emptiest node that takes the instance, as if it were nowhere now. The world is left as it was.
fn target(world: &mut World, request: &Request, source: NodeId) -> Option<Move> {
    let before = Fullness::of(&world.usage(source)?);
    let (_, resources) = world.instance(request.id)?;
    // What it has counts, not what it would ask for now: they differ while a resize waits.
    let mut wanted = Request { resources, strategy: Strategy::Spread, alternatives: 0, ..request.clone() };
    wanted.avoid_nodes.push(source);
    world.unplace(request.id).ok()?;
    let found = find(world, &wanted).and_then(|decision| {
        let there = world.usage(decision.node)?;
        let mut with = there;
        for (used, more) in with.used.iter_mut().zip(resources.amounts()) {
            *used = used.saturating_add(more);
        }
        let source_name = Arc::clone(&world.node(source)?.name);
        Some(Move {
            instance: request.id,
            from: source,
            from_name: source_name,
            to: decision.node,
            to_name: decision.name,
            source: (before, Fullness::of(&world.usage(source)?)),
            target: (Fullness::of(&there), Fullness::of(&with)),
        })
    });
    // It was there a moment ago, so it fits as a fact even on a node that is over its limits.
    let back = world.adopt(crate::Placement { resources, ..request.placed_on(source) });
    debug_assert!(back.is_ok());
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{AffinityRule, Direction, Isolation, LabelRule, NodeSpec, ProjectId, Resources, Strength, Topology};

    const GIB: u64 = 1 << 30;

    fn node(id: u128) -> NodeSpec {
        let capacity = Resources::new(16_000, 16 * GIB, 100 * GIB);
        NodeSpec::new(NodeId(id), format!("n{id}"), capacity).supports(&[Isolation::Vm])
    }

    fn request(id: u128, gib: u64) -> Request {
        Request::new(InstanceId(id), ProjectId(1), Isolation::Vm, Resources::new(1000, gib * GIB, GIB))
    }

    fn world(nodes: u128, on_first: &[Request]) -> World {
        let mut world = World::new();
        for id in 1..=nodes {
            world.upsert_node(node(id));
        }
        for request in on_first {
            world.place(request.placed_on(NodeId(1))).unwrap();
        }
        world
    }

    #[test]
    fn evens_out_and_stops_when_it_is_even() {
        let all: Vec<Request> = (10..20).map(|id| request(id, 1)).collect();
        let advice = balance(&world(2, &all), &all, 100);
        assert_eq!(advice.moves.len(), 5, "{:#?}", advice.moves);
        let (most, least) = advice.after.unwrap();
        assert_eq!(most, least);
        assert!(advice.moves.iter().all(|m| m.gain_ppm() >= LEAST_GAIN && m.from == NodeId(1)));
        assert_eq!(
            advice.moves[0].to_string(),
            "n1 uses 62.5 % of its cpu, n2 uses 0 % of its cpu; afterwards 56.2 % and 6.2 %"
        );
        // Nothing is left to do.
        let mut even = world(2, &all);
        for step in &advice.moves {
            even.unplace(step.instance).unwrap();
            let request = all.iter().find(|r| r.id == step.instance).unwrap();
            even.place(request.placed_on(step.to)).unwrap();
        }
        assert_eq!(balance(&even, &all, 100).moves, []);
    }

    #[test]
    fn keeps_to_the_bound_and_to_the_largest_gain() {
        let all = vec![request(10, 1), request(11, 6), request(12, 1)];
        let advice = balance(&world(3, &all), &all, 1);
        assert_eq!(advice.moves.len(), 1);
        // 8 of 16 GiB: moving the 6 leaves 2 and makes 6; moving a 1 leaves 7.
        assert_eq!(advice.moves[0].instance, InstanceId(11));
        assert_eq!(balance(&world(3, &all), &all, 0).moves, []);
    }

    #[test]
    fn conditions_hold_where_it_goes() {
        let apart = AffinityRule {
            direction: Direction::Apart,
            topology: Topology::Node,
            strength: Strength::Required,
            selector: vec![LabelRule::Is("app".into(), "db".into())],
        };
        let mut all: Vec<Request> = (10..14).map(|id| request(id, 3)).collect();
        for request in &mut all {
            request.labels.insert("app".into(), "db".into());
            request.affinity = vec![apart.clone()];
        }
        let mut other = request(20, 1);
        other.labels.insert("app".into(), "db".into());
        let mut crowded = world(2, &all);
        crowded.place(other.placed_on(NodeId(2))).unwrap();
        assert_eq!(balance(&crowded, &all, 10).moves, [], "the only other node has one already");
        // Local disks keep an instance where they are, and nodes that are not ready take nothing.
        let mut bound = request(30, 4);
        bound.volumes.push(crate::VolumeRef { id: crate::VolumeId(1), name: "data".into() });
        let mut here = World::new();
        here.upsert_node(NodeSpec { volumes: [crate::VolumeId(1)].into(), ..node(1) });
        here.upsert_node(node(2));
        here.upsert_node(NodeSpec { state: NodeState::Draining, ..node(3) });
        here.place(bound.placed_on(NodeId(1))).unwrap();
        assert_eq!(balance(&here, &[bound], 10).moves, []);
    }

    #[test]
    fn the_world_it_was_asked_about_stays() {
        let all: Vec<Request> = (10..20).map(|id| request(id, 1)).collect();
        let asked = world(3, &all);
        let before = asked.clone();
        let first = balance(&asked, &all, 3);
        assert_eq!(first, balance(&asked, &all, 3), "the same question has the same answer");
        asked.same_as(&before).unwrap();
        asked.verify().unwrap();
    }
}
