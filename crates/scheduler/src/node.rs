//! What the scheduler knows about a node.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::amount::{Overcommit, Resources};
use crate::ids::{ImageId, NodeId, VolumeId};

/// How an instance is separated from its neighbours.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Isolation {
    /// Namespaces and control groups.
    Container,
    /// A small virtual machine without firmware.
    Microvm,
    /// A full virtual machine.
    Vm,
    /// The whole machine.
    Metal,
}

impl Isolation {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Container, Self::Microvm, Self::Vm, Self::Metal];
}

impl fmt::Display for Isolation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Container => "container",
            Self::Microvm => "microvm",
            Self::Vm => "vm",
            Self::Metal => "metal",
        })
    }
}

/// Whether a node offers an isolation, and if not, why not (shown to the user).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Support {
    /// It works here.
    Yes,
    /// It does not, because of this.
    No(Arc<str>),
}

/// May new instances be placed on the node?
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NodeState {
    /// Yes.
    #[default]
    Ready,
    /// No: it is being emptied.
    Draining,
    /// No: it is not heard of.
    Down,
}

impl fmt::Display for NodeState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ready => "ready",
            Self::Draining => "draining",
            Self::Down => "down",
        })
    }
}

/// A node as reported. What is placed on it is not part of this; the world keeps count.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeSpec {
    /// Identity; the smaller id wins ties.
    pub id: NodeId,
    /// Name, for sentences.
    pub name: Arc<str>,
    /// Failure domain. The empty name is a zone like any other.
    #[serde(default)]
    pub zone: String,
    /// May it take new instances?
    #[serde(default)]
    pub state: NodeState,
    /// What the machine has.
    pub capacity: Resources,
    /// What of it is for guests, before overcommit; never counts for more than `capacity`.
    pub allocatable: Resources,
    /// How much of `allocatable` may be promised.
    #[serde(default)]
    pub overcommit: Overcommit,
    /// Labels that rules look at.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    /// Isolations; one that is missing here is not supported.
    #[serde(default)]
    pub isolations: BTreeMap<Isolation, Support>,
    /// Runtimes and abilities, such as `runtime/crun`, `nested`, `sriov`.
    #[serde(default)]
    pub features: BTreeSet<String>,
    /// Volumes whose data is on this node.
    #[serde(default)]
    pub volumes: BTreeSet<VolumeId>,
    /// Images in this node's cache.
    #[serde(default)]
    pub images: BTreeSet<ImageId>,
}

impl NodeSpec {
    /// A ready node without labels that supports nothing yet: fill in the rest with struct update syntax.
    pub fn new(id: NodeId, name: impl Into<Arc<str>>, capacity: Resources) -> Self {
        Self {
            id,
            name: name.into(),
            zone: String::new(),
            state: NodeState::Ready,
            capacity,
            allocatable: capacity,
            overcommit: Overcommit::default(),
            labels: BTreeMap::new(),
            isolations: BTreeMap::new(),
            features: BTreeSet::new(),
            volumes: BTreeSet::new(),
            images: BTreeSet::new(),
        }
    }

    /// Marks the isolations as supported.
    #[must_use]
    pub fn supports(mut self, isolations: &[Isolation]) -> Self {
        self.isolations.extend(isolations.iter().map(|isolation| (*isolation, Support::Yes)));
        self
    }

    /// The most that may be promised on this node, per resource.
    pub(crate) fn limits(&self) -> crate::amount::Amounts {
        let usable = Resources {
            cpu_milli: self.allocatable.cpu_milli.min(self.capacity.cpu_milli),
            memory: self.allocatable.memory.min(self.capacity.memory),
            disk: self.allocatable.disk.min(self.capacity.disk),
        };
        self.overcommit.limits(usable)
    }

    pub(crate) fn offers(&self, isolation: Isolation) -> bool {
        matches!(self.isolations.get(&isolation), Some(Support::Yes))
    }

    pub(crate) fn why_not(&self, isolation: Isolation) -> &str {
        match self.isolations.get(&isolation) {
            Some(Support::No(reason)) => reason,
            Some(Support::Yes) | None => "the node does not offer it",
        }
    }
}
