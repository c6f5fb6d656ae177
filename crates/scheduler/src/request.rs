//! What is to be placed, and under which conditions.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use crate::amount::Resources;
use crate::ids::{ImageId, InstanceId, NodeId, ProjectId, VolumeId};
use crate::labels::LabelRule;
use crate::node::Isolation;

/// Which of the nodes that fit is the best one.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Strategy {
    /// The fullest: leaves whole nodes free for large instances.
    #[default]
    Pack,
    /// The emptiest: a failure of one node hurts least.
    Spread,
}

/// How far "together" reaches.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Topology {
    /// The same node.
    Node,
    /// The same zone.
    Zone,
}

/// Near to, or away from, the selected instances.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Direction {
    /// Where at least one of them is.
    Together,
    /// Where none of them is.
    Apart,
}

/// A rule is either a condition or a wish.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Strength {
    /// A node that breaks the rule is ruled out.
    Required,
    /// Following the rule is worth this many millionths of score; a whole node's fullness is worth 1,000,000.
    Preferred(u32),
}

/// A rule about other instances of the same project.
///
/// `Together` + `Required` with a selector that matches the request's own labels and no placed instance yet is
/// satisfied everywhere: otherwise the first of a group could never start. Rules bind the request that carries them:
/// what is already placed does not push newcomers away.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AffinityRule {
    /// Near or away.
    pub direction: Direction,
    /// Same node or same zone.
    pub topology: Topology,
    /// Condition or wish.
    pub strength: Strength,
    /// Which instances; all rules must hold. Empty selects every instance of the project.
    pub selector: Vec<LabelRule>,
}

/// A volume and the name it has in sentences.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeRef {
    /// Identity.
    pub id: VolumeId,
    /// Name.
    pub name: String,
}

/// One instance to place.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Request {
    /// The instance.
    pub id: InstanceId,
    /// Its project.
    pub project: ProjectId,
    /// What it needs.
    pub resources: Resources,
    /// How it is isolated.
    pub isolation: Isolation,
    /// Its own labels, which selectors of others will see.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    /// Conditions on the node's labels; all must hold.
    #[serde(default)]
    pub node_labels: Vec<LabelRule>,
    /// Zones it may run in; empty means any.
    #[serde(default)]
    pub zones: Vec<String>,
    /// Features the node must have.
    #[serde(default)]
    pub features: BTreeSet<String>,
    /// Rules about other instances.
    #[serde(default)]
    pub affinity: Vec<AffinityRule>,
    /// Volumes whose data must be on the node.
    #[serde(default)]
    pub volumes: Vec<VolumeRef>,
    /// Volumes whose data had better be on the node.
    #[serde(default)]
    pub near_volumes: Vec<VolumeId>,
    /// The image; a node that has it is preferred.
    #[serde(default)]
    pub image: Option<ImageId>,
    /// The only node it may run on.
    #[serde(default)]
    pub only_node: Option<NodeId>,
    /// Nodes it must not run on (where it failed before, or what it is moving away from).
    #[serde(default)]
    pub avoid_nodes: Vec<NodeId>,
    /// Which fitting node is best.
    #[serde(default)]
    pub strategy: Strategy,
    /// How many runners-up to report.
    #[serde(default)]
    pub alternatives: u8,
}

impl Request {
    /// A request without conditions: fill in the rest with struct update syntax.
    #[must_use]
    pub fn new(id: InstanceId, project: ProjectId, isolation: Isolation, resources: Resources) -> Self {
        Self {
            id,
            project,
            resources,
            isolation,
            labels: BTreeMap::new(),
            node_labels: Vec::new(),
            zones: Vec::new(),
            features: BTreeSet::new(),
            affinity: Vec::new(),
            volumes: Vec::new(),
            near_volumes: Vec::new(),
            image: None,
            only_node: None,
            avoid_nodes: Vec::new(),
            strategy: Strategy::Pack,
            alternatives: 0,
        }
    }
}
