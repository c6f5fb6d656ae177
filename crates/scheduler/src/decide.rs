//! The decision: the best node that fits, found without looking at all of them.

use std::fmt;
use std::ops::ControlFlow;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::amount::{PPM, Resource, format_ppm, share, tightness};
use crate::classes::Bits;
use crate::explain::{Explanation, explain_query};
use crate::ids::NodeId;
use crate::query::{Place, Query};
use crate::request::{Request, Strategy};
use crate::tree::Forest;
use crate::world::{World, WorldError};

/// How many of the fullest nodes `pack` compares for balance.
pub const WINDOW: usize = 8;

/// How far below the best score a node may be to be compared for balance: a tenth of a node's fullness.
pub const NEARLY: i64 = 100_000;

/// A node and its score.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Alternative {
    /// The node.
    pub node: NodeId,
    /// Its name.
    pub name: Arc<str>,
    /// Its score.
    pub score: i64,
}

/// Where an instance should go.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Decision {
    /// The best node.
    pub node: NodeId,
    /// Its name.
    pub name: Arc<str>,
    /// Its score: 0 to 1,000,000 for how full (pack) or empty (spread) it is, plus what the wishes are worth there.
    pub score: i64,
    /// The next best, best first; as many as the request asked for, if there are as many. With `pack` the nodes compared
    /// for balance come in that order, before the others.
    pub alternatives: Vec<Alternative>,
    /// Why this one.
    pub why: Why,
}

/// What made a node the best.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Why {
    /// How nodes were compared.
    pub strategy: Strategy,
    /// The node's scarcest resource,
    pub scarcest: Resource,
    /// and the share of it that was free before this placement, in millionths.
    pub free_ppm: u32,
    /// How far apart the free shares of cpu and memory will be after this placement, in millionths.
    pub imbalance_ppm: u32,
    /// What preferred rules and locality added to the score (or took away).
    pub wishes: i64,
}

impl fmt::Display for Why {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let extreme = match self.strategy {
            Strategy::Pack => "fullest",
            Strategy::Spread => "emptiest",
        };
        let free = format_ppm(i64::from(self.free_ppm));
        write!(f, "{extreme} node that fits: {free} of its {} is free", self.scarcest)?;
        match self.wishes {
            0 => Ok(()),
            gain @ 1.. => write!(f, ", preferences add {}", format_ppm(gain)),
            loss => write!(f, ", preferences take {}", format_ppm(-loss)),
        }
    }
}

impl fmt::Display for Decision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.name, self.why)
    }
}

/// The best node for a request, or why there is none.
///
/// Nodes that pass every condition are ranked by *score*: how full the node is (`pack`) or how empty (`spread`) before
/// the placement, by its scarcest resource, in millionths; plus what the wishes are worth there. Equal scores go to the
/// smallest node id. The ranking is exact: the same as from looking at every node.
///
/// `spread` takes the first of the ranking. `pack` looks at the first [`WINDOW`], as far as they are within [`NEARLY`]
/// of the first, and takes the one whose cpu and memory would be left most in balance (wishes count here too): a node
/// with much of the one and none of the other is room that nobody can use.
///
/// Nothing is reserved: call [`World::place`], or use [`decide_batch`].
///
/// # Errors
/// The explanation, when no node passes.
pub fn decide(world: &World, request: &Request) -> Result<Decision, Box<Explanation>> {
    let query = Query::new(world, request);
    match search(&query) {
        Some(decision) => Ok(decision),
        None => Err(Box::new(explain_query(&query))),
    }
}

/// Like [`decide`], without the cost of an explanation.
#[must_use]
pub fn find(world: &World, request: &Request) -> Option<Decision> {
    search(&Query::new(world, request))
}

/// Why a request of a batch was not placed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Unplaced {
    /// No node passes every condition.
    #[error("{0}")]
    NoFit(Box<Explanation>),
    /// The world refused; in practice, the instance is placed already.
    #[error("{0}")]
    Refused(WorldError),
}

/// Decides the requests in their order, each seeing the reservations of those before it; what is decided is placed.
pub fn decide_batch(world: &mut World, requests: &[Request]) -> Vec<Result<Decision, Unplaced>> {
    requests.iter().map(|request| decide_and_place(world, request)).collect()
}

/// What [`decide_batch`] would answer, leaving the world alone. Costs a copy of the node index, not of the instances.
#[must_use]
pub fn plan(world: &World, requests: &[Request]) -> Vec<Result<Decision, Unplaced>> {
    let mut trial = world.fork();
    let answer = |request: &Request| match world.instance(request.id) {
        Some((node, _)) => {
            let node = world.node(node).map_or_else(|| "".into(), |spec| Arc::clone(&spec.name));
            Err(Unplaced::Refused(WorldError::AlreadyPlaced { instance: request.id, node }))
        }
        None => decide_and_place(&mut trial, request),
    };
    requests.iter().map(answer).collect()
}

fn decide_and_place(world: &mut World, request: &Request) -> Result<Decision, Unplaced> {
    let decision = decide(world, request).map_err(Unplaced::NoFit)?;
    world.place(request.placed_on(decision.node)).map_err(Unplaced::Refused)?;
    Ok(decision)
}

#[derive(Clone, Copy)]
struct Candidate {
    score: i64,
    id: NodeId,
    slot: u32,
}

/// The best few so far, best first.
struct Best {
    keep: usize,
    found: Vec<Candidate>,
}

impl Best {
    fn offer(&mut self, candidate: Candidate) {
        if self.found.iter().any(|known| known.slot == candidate.slot) {
            return;
        }
        let rank = (-candidate.score, candidate.id);
        let at = self.found.partition_point(|known| (-known.score, known.id) < rank);
        if at < self.keep {
            self.found.truncate(self.keep - 1);
            self.found.insert(at, candidate);
        }
    }

    /// The score that a newcomer has to reach, once the list is full.
    fn bar(&self) -> Option<i64> {
        if self.found.len() < self.keep { None } else { self.found.last().map(|worst| worst.score) }
    }

    /// Could a node with this id and at most this score still enter?
    fn open_to(&self, score: i64, id: NodeId) -> bool {
        self.found.len() < self.keep
            || self.found.last().is_none_or(|worst| score > worst.score || (score == worst.score && id < worst.id))
    }
}

fn search(query: &Query<'_>) -> Option<Decision> {
    let wanted = usize::from(query.request.alternatives) + 1;
    let keep = match query.request.strategy {
        Strategy::Pack => wanted.max(WINDOW),
        Strategy::Spread => wanted,
    };
    let mut best = Best { keep, found: Vec::with_capacity(keep) };
    if let Some(slots) = query.few_candidates() {
        for slot in slots {
            consider(query, slot, &mut best);
        }
    } else {
        search_trees(query, &mut best);
    }
    let mut found = best.found;
    if query.request.strategy == Strategy::Pack {
        balance(query, &mut found);
    }
    let mut found = found.into_iter().take(wanted);
    let winner = found.next()?;
    let described = |candidate: Candidate| {
        let name = Arc::clone(&query.world.at(candidate.slot).spec.name);
        Alternative { node: candidate.id, name, score: candidate.score }
    };
    let usage = query.world.at(winner.slot).usage;
    let (free_ppm, scarcest) = tightness(&usage.free(), &usage.limit);
    let why = Why {
        strategy: query.request.strategy,
        scarcest,
        free_ppm,
        imbalance_ppm: imbalance(query, winner.slot),
        wishes: query.wishes_on(winner.slot),
    };
    let Alternative { node, name, score } = described(winner);
    Some(Decision { node, name, score, alternatives: found.map(described).collect(), why })
}

/// Orders the nodes that are nearly as good as the first by how balanced they would be left.
fn balance(query: &Query<'_>, found: &mut [Candidate]) {
    let Some(first) = found.first() else { return };
    let near = found.iter().take(WINDOW).take_while(|other| other.score >= first.score.saturating_sub(NEARLY)).count();
    found[..near].sort_by_cached_key(|candidate| {
        let worth = query.wishes_on(candidate.slot) - i64::from(imbalance(query, candidate.slot));
        (-worth, -candidate.score, candidate.id)
    });
}

/// How far apart the free shares of cpu and memory would be; nothing, on a node that lacks one of them.
fn imbalance(query: &Query<'_>, slot: u32) -> u32 {
    let usage = query.world.at(slot).usage;
    let free = usage.free();
    let left = |at: usize| share(free[at].saturating_sub(query.need[at]), usage.limit[at]);
    match (left(Resource::Cpu as usize), left(Resource::Memory as usize)) {
        (Some(cpu), Some(memory)) => cpu.abs_diff(memory),
        _ => 0,
    }
}

/// Looks at one node on its own.
fn consider(query: &Query<'_>, slot: u32, best: &mut Best) {
    let node = query.world.at(slot);
    let passes = query.class_word(node.class as usize / 64) >> (node.class % 64) & 1 == 1
        && query.fits(node)
        && query.holds_on_node(slot);
    if passes {
        best.offer(scored(query, slot, query.world.forest.key(slot)));
    }
}

fn scored(query: &Query<'_>, slot: u32, key: u32) -> Candidate {
    let base = base_score(query.request.strategy, key);
    Candidate { score: base + query.wishes_on(slot), id: query.world.at(slot).id, slot }
}

fn base_score(strategy: Strategy, key: u32) -> i64 {
    match strategy {
        Strategy::Pack => i64::from(PPM) - i64::from(key),
        Strategy::Spread => i64::from(key),
    }
}

/// A wish that few nodes fulfil does not raise what others could score: those nodes are looked at beforehand.
fn search_trees(query: &Query<'_>, best: &mut Best) {
    let mut anywhere = 0;
    let mut by_zone = false;
    for wish in &query.wishes {
        if matches!(wish.place, Place::Zones(_)) {
            by_zone = true;
        } else if wish.worth > 0 {
            match wish.few_nodes() {
                Some(slots) => slots.into_iter().for_each(|slot| consider(query, slot, best)),
                None => anywhere += wish.worth,
            }
        }
    }
    let classes = query.passing_classes();
    let members: usize = classes.iter().map(|class| query.world.classes.get(class).members as usize).sum();
    if !by_zone && members * COMMON >= query.world.ready_count {
        let all = Tree { forest: &query.world.ready, root: query.world.ready_root, bonus: anywhere, classes: &classes };
        return all.search(query, best);
    }
    for number in classes.iter() {
        let class = query.world.classes.get(number);
        let zone: i64 = query.wishes.iter().map(|wish| wish.of_zone(class.tags.zone)).sum();
        let bonus = zone + anywhere;
        Tree { forest: &query.world.forest, root: class.root, bonus, classes: &classes }.search(query, best);
    }
}

/// When at least one in so many ready nodes passes the conditions on classes, one walk through all ready nodes that
/// skips the others is cheaper than a walk per class.
const COMMON: usize = 12;

/// Nodes in order, and the most that wishes can add to the score of any of them.
struct Tree<'a> {
    forest: &'a Forest,
    root: u32,
    bonus: i64,
    classes: &'a Bits,
}

impl Tree<'_> {
    fn search(&self, query: &Query<'_>, best: &mut Best) {
        match query.request.strategy {
            Strategy::Pack => self.fullest(query, best),
            Strategy::Spread => self.emptiest(query, best),
        }
    }

    /// Offers a node unless nothing from here on can enter the list.
    fn visit(&self, query: &Query<'_>, slot: u32, best: &mut Best) -> ControlFlow<()> {
        let key = self.forest.key(slot);
        let most = base_score(query.request.strategy, key) + self.bonus;
        let node = query.world.at(slot);
        if !best.open_to(most, node.id) {
            return ControlFlow::Break(());
        }
        if self.classes.get(node.class) && query.fits(node) && query.holds_on_node(slot) {
            best.offer(scored(query, slot, key));
        }
        ControlFlow::Continue(())
    }

    fn fullest(&self, query: &Query<'_>, best: &mut Best) {
        let high = best.bar().map_or(i64::from(PPM), |bar| i64::from(PPM) + self.bonus - bar);
        let Ok(high) = u32::try_from(high) else { return };
        let _ = self.forest.ascend(self.root, 0, high, &query.room, &mut |slot| self.visit(query, slot, best));
    }

    /// From the emptiest down, one value of the order key at a time, because within a value the smallest id comes first.
    fn emptiest(&self, query: &Query<'_>, best: &mut Best) {
        let mut high = PPM;
        loop {
            let low = best.bar().map_or(0, |bar| (bar - self.bonus).max(0));
            let Some(low) = u32::try_from(low).ok().filter(|low| *low <= high) else { return };
            let Some(key) = self.forest.last_key(self.root, low, high, &query.room) else { return };
            let _ = self.forest.ascend(self.root, key, key, &query.room, &mut |slot| self.visit(query, slot, best));
            let Some(next) = key.checked_sub(1) else { return };
            high = next;
        }
    }
}
