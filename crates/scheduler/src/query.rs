//! A request, resolved against a world: one check per condition, one wish per preference.

use crate::amount::Amounts;
use crate::classes::{Attribute, Bits};
use crate::groups::Group;
use crate::labels::LabelRule;
use crate::request::{AffinityRule, Direction, Request, Strength, Topology, VolumeRef};
use crate::slots::SlotSet;
use crate::tree::{Room, room};
use crate::world::{Held, Node, World};
use crate::{IMAGE_BONUS, Resource, VOLUME_BONUS};

/// Below this many candidates, a condition that names its nodes is answered by looking at each of them.
const FEW: usize = 128;

/// Above this many groups, the nodes of a selector are merged once instead of asking every group about every node.
const MANY_GROUPS: usize = 16;

/// What a condition is about, for the explanation.
#[derive(Clone, Copy)]
pub(crate) enum About<'a> {
    State,
    OnlyNode,
    AvoidNodes,
    Resource(Resource),
    Isolation,
    Zone,
    Label(&'a LabelRule),
    Feature(&'a str),
    Volume(&'a VolumeRef),
    Affinity(&'a AffinityRule),
}

/// How a condition is tested.
pub(crate) enum Test<'a> {
    /// The class has the attribute.
    Has(Option<&'a Bits>),
    /// The class lacks the attribute.
    Lacks(Option<&'a Bits>),
    /// The class has one of the attributes.
    AnyOf(Vec<&'a Bits>),
    /// The class has none of the attributes.
    NoneOf(Vec<&'a Bits>),
    /// There is enough free.
    Room(Resource),
    /// The label of a wide key, read from the node.
    Label(&'a LabelRule, Option<&'a SlotSet>),
    /// The node is in the set.
    In(&'a SlotSet),
    /// One of the selected instances is on the node.
    Near(Members<'a>),
    /// None of them is.
    Far(Members<'a>),
    /// It is this node.
    Only(Option<u32>),
    /// It is none of these.
    Except(Vec<u32>),
}

impl Test<'_> {
    /// Does the answer depend on the node's class only?
    pub(crate) fn is_of_class(&self) -> bool {
        matches!(self, Self::Has(_) | Self::Lacks(_) | Self::AnyOf(_) | Self::NoneOf(_))
    }
}

pub(crate) struct Check<'a> {
    pub(crate) about: About<'a>,
    pub(crate) test: Test<'a>,
}

/// The instances that a selector matches.
pub(crate) struct Members<'a> {
    groups: Vec<&'a Group>,
    merged: Option<Vec<u32>>,
}

impl<'a> Members<'a> {
    fn new(groups: Vec<&'a Group>) -> Self {
        let merged = (groups.len() > MANY_GROUPS).then(|| merge(&groups));
        Self { groups, merged }
    }

    pub(crate) fn on(&self, slot: u32) -> bool {
        match &self.merged {
            Some(slots) => slots.binary_search(&slot).is_ok(),
            None => self.groups.iter().any(|group| group.nodes.contains_key(&slot)),
        }
    }

    fn size(&self) -> usize {
        self.merged.as_ref().map_or_else(|| self.groups.iter().map(|group| group.nodes.len()).sum(), Vec::len)
    }

    fn slots(&self) -> Vec<u32> {
        self.merged.clone().unwrap_or_else(|| merge(&self.groups))
    }
}

fn merge(groups: &[&Group]) -> Vec<u32> {
    let mut slots: Vec<u32> = groups.iter().flat_map(|group| group.nodes.keys().copied()).collect();
    slots.sort_unstable();
    slots.dedup();
    slots
}

fn zones_of(groups: &[&Group]) -> Vec<u32> {
    let mut zones: Vec<u32> = groups.iter().flat_map(|group| group.zones.keys().copied()).collect();
    zones.sort_unstable();
    zones.dedup();
    zones
}

/// A preference: what it is worth, and where it is fulfilled (or, with a negative worth, violated).
pub(crate) struct Wish<'a> {
    pub(crate) worth: i64,
    pub(crate) place: Place<'a>,
}

pub(crate) enum Place<'a> {
    Nodes(&'a SlotSet),
    Members(Members<'a>),
    Zones(Vec<u32>),
}

impl Wish<'_> {
    /// The nodes where it counts, when there are so few that looking at each is cheaper than allowing for it anywhere.
    pub(crate) fn few_nodes(&self) -> Option<Vec<u32>> {
        match &self.place {
            Place::Nodes(slots) => (slots.len() <= 64).then(|| slots.to_vec()),
            Place::Members(members) => (members.size() <= 64).then(|| members.slots()),
            Place::Zones(_) => None,
        }
    }

    pub(crate) fn of_zone(&self, zone: u32) -> i64 {
        match &self.place {
            Place::Zones(zones) if zones.binary_search(&zone).is_ok() => self.worth,
            Place::Zones(_) | Place::Nodes(_) | Place::Members(_) => 0,
        }
    }

    pub(crate) fn of_node(&self, slot: u32) -> i64 {
        let counts = match &self.place {
            Place::Nodes(slots) => slots.contains(slot),
            Place::Members(members) => members.on(slot),
            Place::Zones(_) => false,
        };
        if counts { self.worth } else { 0 }
    }
}

pub(crate) struct Query<'a> {
    pub(crate) world: &'a World,
    pub(crate) request: &'a Request,
    pub(crate) need: Amounts,
    /// As coarse as the trees.
    pub(crate) room: Room,
    pub(crate) checks: Vec<Check<'a>>,
    pub(crate) wishes: Vec<Wish<'a>>,
}

impl<'a> Query<'a> {
    pub(crate) fn new(world: &'a World, request: &'a Request) -> Self {
        let need = request.resources.amounts();
        let mut query =
            Self { world, request, need, room: room(&need), checks: Vec::with_capacity(8), wishes: Vec::new() };
        query.add_fixed_checks();
        query.add_labels();
        query.add_volumes();
        query.add_affinity();
        query.add_locality();
        query
    }

    fn check(&mut self, about: About<'a>, test: Test<'a>) {
        self.checks.push(Check { about, test });
    }

    fn bits(&self, attribute: Attribute) -> Option<&'a Bits> {
        self.world.classes.bits(attribute)
    }

    /// In the order in which a node that several conditions rule out is charged to one of them.
    fn add_fixed_checks(&mut self) {
        let (world, request) = (self.world, self.request);
        self.check(About::State, Test::Has(self.bits(Attribute::Ready)));
        if let Some(id) = request.only_node {
            self.check(About::OnlyNode, Test::Only(world.by_id.get(&id).copied()));
        }
        if !request.avoid_nodes.is_empty() {
            let slots = request.avoid_nodes.iter().filter_map(|id| world.by_id.get(id).copied()).collect();
            self.check(About::AvoidNodes, Test::Except(slots));
        }
        self.check(About::Isolation, Test::Has(self.bits(Attribute::Isolation(request.isolation))));
        if !request.zones.is_empty() {
            let numbers = request.zones.iter().filter_map(|zone| world.classes.name(zone));
            let zones = numbers.filter_map(|zone| self.bits(Attribute::Zone(zone))).collect();
            self.check(About::Zone, Test::AnyOf(zones));
        }
        for feature in &request.features {
            let number = world.classes.name(feature);
            let bits = number.and_then(|feature| self.bits(Attribute::Feature(feature)));
            self.check(About::Feature(feature), Test::Has(bits));
        }
        for resource in Resource::ALL {
            self.check(About::Resource(resource), Test::Room(resource));
        }
    }

    fn add_labels(&mut self) {
        for rule in &self.request.node_labels {
            let test = self.label_test(rule);
            self.check(About::Label(rule), test);
        }
    }

    fn label_test(&self, rule: &'a LabelRule) -> Test<'a> {
        let classes = &self.world.classes;
        let key = classes.name(rule.key());
        let key_bits = key.and_then(|key| self.bits(Attribute::Key(key)));
        match rule {
            LabelRule::Exists(_) => Test::Has(key_bits),
            LabelRule::Absent(_) => Test::Lacks(key_bits),
            LabelRule::Is(_, value) | LabelRule::IsNot(_, value) => {
                let pair = key.zip(classes.name(value));
                if key.is_some_and(|key| classes.is_wide(key)) {
                    return Test::Label(rule, pair.and_then(|(key, value)| classes.wide_nodes(key, value)));
                }
                let bits = pair.and_then(|(key, value)| self.bits(Attribute::Label(key, value)));
                if matches!(rule, LabelRule::Is(..)) { Test::Has(bits) } else { Test::Lacks(bits) }
            }
        }
    }

    fn add_volumes(&mut self) {
        for volume in &self.request.volumes {
            let test = match self.world.holders.get(&Held::Volume(volume.id.0)) {
                Some(slots) => Test::In(slots),
                None => Test::Only(None),
            };
            self.check(About::Volume(volume), test);
        }
    }

    fn add_affinity(&mut self) {
        for rule in &self.request.affinity {
            let groups = self.world.groups.matching(self.request.project, &rule.selector);
            match rule.strength {
                Strength::Required if groups.is_empty() && self.is_first_of(rule) => {}
                Strength::Required => {
                    let test = self.affinity_test(rule, groups);
                    self.check(About::Affinity(rule), test);
                }
                Strength::Preferred(_) if groups.is_empty() => {}
                Strength::Preferred(weight) => {
                    let worth = match rule.direction {
                        Direction::Together => i64::from(weight),
                        Direction::Apart => -i64::from(weight),
                    };
                    let place = match rule.topology {
                        Topology::Node => Place::Members(Members::new(groups)),
                        Topology::Zone => Place::Zones(zones_of(&groups)),
                    };
                    self.wishes.push(Wish { worth, place });
                }
            }
        }
    }

    fn affinity_test(&self, rule: &AffinityRule, groups: Vec<&'a Group>) -> Test<'a> {
        match (rule.topology, rule.direction) {
            (Topology::Node, Direction::Together) => Test::Near(Members::new(groups)),
            (Topology::Node, Direction::Apart) => Test::Far(Members::new(groups)),
            (Topology::Zone, direction) => {
                let zones = zones_of(&groups);
                let bits = zones.iter().filter_map(|zone| self.bits(Attribute::Zone(*zone))).collect();
                if direction == Direction::Together { Test::AnyOf(bits) } else { Test::NoneOf(bits) }
            }
        }
    }

    fn is_first_of(&self, rule: &AffinityRule) -> bool {
        let own = &self.request.labels;
        rule.direction == Direction::Together
            && rule.selector.iter().all(|term| term.holds(own.get(term.key()).map(String::as_str)))
    }

    fn add_locality(&mut self) {
        let image = self.request.image.map(|image| (Held::Image(image.0), IMAGE_BONUS));
        let volumes = self.request.near_volumes.iter().map(|volume| (Held::Volume(volume.0), VOLUME_BONUS));
        for (item, worth) in image.into_iter().chain(volumes) {
            if let Some(slots) = self.world.holders.get(&item) {
                self.wishes.push(Wish { worth, place: Place::Nodes(slots) });
            }
        }
    }

    /// Does a check hold on a node?
    pub(crate) fn holds(&self, test: &Test<'_>, slot: u32) -> bool {
        let class = || self.world.at(slot).class;
        match test {
            Test::Has(bits) => bits.is_some_and(|bits| bits.get(class())),
            Test::Lacks(bits) => !bits.is_some_and(|bits| bits.get(class())),
            Test::AnyOf(bits) => bits.iter().any(|bits| bits.get(class())),
            Test::NoneOf(bits) => !bits.iter().any(|bits| bits.get(class())),
            Test::Room(resource) => {
                let at = *resource as usize;
                self.world.at(slot).usage.free()[at] >= self.need[at]
            }
            Test::Label(rule, nodes) => match rule {
                LabelRule::Is(..) => nodes.is_some_and(|nodes| nodes.contains(slot)),
                _ => rule.holds(self.world.at(slot).spec.labels.get(rule.key()).map(String::as_str)),
            },
            Test::In(slots) => slots.contains(slot),
            Test::Near(members) => members.on(slot),
            Test::Far(members) => !members.on(slot),
            Test::Only(only) => *only == Some(slot),
            Test::Except(slots) => !slots.contains(&slot),
        }
    }

    /// Is there room on a node?
    pub(crate) fn fits(&self, node: &Node) -> bool {
        node.usage.free().iter().zip(self.need).all(|(free, need)| *free >= need)
    }

    /// Do the checks that neither the classes nor the room in the tree have answered hold on a node?
    pub(crate) fn holds_on_node(&self, slot: u32) -> bool {
        self.checks.iter().all(|check| match &check.test {
            Test::Room(_) => true,
            test => test.is_of_class() || self.holds(test, slot),
        })
    }

    /// 64 classes at a time: those that pass every check of classes.
    pub(crate) fn class_word(&self, word: usize) -> u64 {
        let mut passing = u64::MAX;
        for check in &self.checks {
            passing &= match &check.test {
                Test::Has(bits) => bits.map_or(0, |bits| bits.word(word)),
                Test::Lacks(bits) => !bits.map_or(0, |bits| bits.word(word)),
                Test::AnyOf(bits) => bits.iter().fold(0, |any, bits| any | bits.word(word)),
                Test::NoneOf(bits) => !bits.iter().fold(0, |any, bits| any | bits.word(word)),
                _ => u64::MAX,
            };
            if passing == 0 {
                break;
            }
        }
        passing
    }

    /// The classes that pass every check of classes. All of them are ready.
    pub(crate) fn passing_classes(&self) -> Bits {
        let words = self.bits(Attribute::Ready).map_or(0, Bits::words);
        Bits::from_words((0..words).map(|word| self.class_word(word)).collect())
    }

    /// The only nodes that can pass, when some condition names them and they are few.
    pub(crate) fn few_candidates(&self) -> Option<Vec<u32>> {
        let size = |test: &Test<'_>| match test {
            Test::Only(_) => Some(1),
            Test::In(slots) => Some(slots.len()),
            Test::Label(LabelRule::Is(..), nodes) => Some(nodes.map_or(0, SlotSet::len)),
            Test::Near(members) => Some(members.size()),
            _ => None,
        };
        let sized = self.checks.iter().filter_map(|check| Some((size(&check.test)?, &check.test)));
        let (_, test) = sized.min_by_key(|(size, _)| *size).filter(|(size, _)| *size <= FEW)?;
        Some(match test {
            Test::Only(only) => only.iter().copied().collect(),
            Test::In(slots) => slots.to_vec(),
            Test::Label(_, nodes) => nodes.map(SlotSet::to_vec).unwrap_or_default(),
            Test::Near(members) => members.slots(),
            _ => return None,
        })
    }

    /// What the request's wishes are worth on a node.
    pub(crate) fn wishes_on(&self, slot: u32) -> i64 {
        let zone = self.world.at(slot).zone;
        self.wishes.iter().map(|wish| wish.of_zone(zone) + wish.of_node(slot)).sum()
    }

    /// The groups that an affinity rule selects.
    pub(crate) fn selected(&self, rule: &AffinityRule) -> Vec<&'a Group> {
        self.world.groups.matching(self.request.project, &rule.selector)
    }

    /// The name of a node that has the volume, for the explanation.
    pub(crate) fn holder_of(&self, volume: &VolumeRef) -> Option<&'a str> {
        let slots = self.world.holders.get(&Held::Volume(volume.id.0))?;
        let slots = slots.to_vec();
        let ids = slots.iter().map(|slot| &self.world.at(*slot).spec);
        ids.min_by_key(|spec| spec.id).map(|spec| &*spec.name)
    }
}
