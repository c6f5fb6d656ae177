//! Nodes.

use std::net::IpAddr;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::compute::{Isolation, Resources};
use crate::meta::Condition;
use crate::object::{Kind, Object, Scope};
use crate::size::Size;
use crate::time::Timestamp;
use crate::validate::Problems;

/// Kind of nodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NodeKind;
/// A machine that runs the agent.
pub type Node = Object<NodeKind>;

/// How much more is promised than there is, in percent: 100 promises what there is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Overcommit {
    /// vCPUs.
    pub cpu_percent: u32,
    /// Memory.
    pub memory_percent: u32,
    /// Disk.
    pub disk_percent: u32,
}

impl Default for Overcommit {
    fn default() -> Self {
        Self { cpu_percent: 400, memory_percent: 100, disk_percent: 200 }
    }
}

/// What is asked for of a node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct NodeSpec {
    /// Zone: nodes that fail together.
    #[serde(default = "default_zone")]
    pub zone: String,
    /// Whether new instances may come here.
    #[serde(default = "yes")]
    pub schedulable: bool,
    /// How much more is promised than there is.
    #[serde(default)]
    pub overcommit: Overcommit,
}

fn default_zone() -> String {
    "zone-1".into()
}
fn yes() -> bool {
    true
}

impl Default for NodeSpec {
    fn default() -> Self {
        Self { zone: default_zone(), schedulable: true, overcommit: Overcommit::default() }
    }
}

/// Whether a node can be used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum NodePhase {
    /// Never heard of.
    #[default]
    Unknown,
    /// Its lease is alive.
    Ready,
    /// Its lease has expired.
    Down,
    /// Its lease is alive; it still removes guests that were started elsewhere while it was away, and gets no others before that.
    Cleaning,
}

impl NodePhase {
    /// Whether its agent can be reached.
    #[must_use]
    pub const fn is_up(self) -> bool {
        matches!(self, Self::Ready | Self::Cleaning)
    }
}

/// What is to become of the instances with `ha` of a node that is down.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Evacuation {
    /// They are started elsewhere when the lease has been gone long enough.
    #[default]
    Automatic,
    /// Too many nodes were lost at once: they wait for a person.
    Held,
    /// A person says that the node is lost: `oblak node evacuate --confirm`.
    Confirmed,
}

impl Evacuation {
    #[allow(clippy::trivially_copy_pass_by_ref)] // serde passes a reference
    fn is_automatic(&self) -> bool {
        *self == Self::Automatic
    }
}

/// A place for volumes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct PoolFact {
    /// Name.
    pub name: String,
    /// Several nodes have the same volumes in it.
    #[serde(default)]
    pub shared: bool,
    /// Directory.
    #[serde(default)]
    pub path: String,
    /// Why it cannot be used; empty when it can.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub problem: String,
}

/// One thing that was looked for on a node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Probe {
    /// What: `kvm`, `crun`, `nft`, ...
    pub name: String,
    /// Whether it can be used.
    pub available: bool,
    /// Version, or the reason why not.
    pub detail: String,
}

/// One NUMA node.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct NumaNode {
    /// Number.
    pub id: u32,
    /// CPUs, as in `/sys/devices/system/node/node*/cpulist`.
    pub cpus: String,
    /// Memory.
    pub memory: Size,
}

/// One disk or pool.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct DiskFact {
    /// Where it is mounted or its device.
    pub path: String,
    /// File system type.
    pub fs: String,
    /// Size.
    pub size: Size,
    /// Free.
    pub free: Size,
}

/// Where tunnels of a node begin that carry networks to other nodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct NodeUnderlay {
    /// Address that other nodes reach it at.
    pub address: IpAddr,
    /// MTU of the interface that has the address, in bytes.
    pub mtu: u16,
}

/// What a node is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct NodeFacts {
    /// Host name.
    #[serde(default)]
    pub hostname: String,
    /// Kernel release.
    #[serde(default)]
    pub kernel: String,
    /// Operating system.
    #[serde(default)]
    pub os: String,
    /// CPU architecture as uname(2) says.
    #[serde(default)]
    pub architecture: String,
    /// CPU model.
    #[serde(default)]
    pub cpu_model: String,
    /// Logical CPUs.
    #[serde(default)]
    pub cpus: u32,
    /// Memory.
    #[serde(default)]
    pub memory: Size,
    /// NUMA nodes.
    #[serde(default)]
    pub numa: Vec<NumaNode>,
    /// `v1`, `v2` or `hybrid`.
    #[serde(default)]
    pub cgroup: String,
    /// Disks.
    #[serde(default)]
    pub disks: Vec<DiskFact>,
    /// Accelerator for machines: `kvm` or `tcg`.
    #[serde(default)]
    pub accelerator: String,
    /// What was looked for.
    #[serde(default)]
    pub probes: Vec<Probe>,
    /// Isolations that can be used.
    #[serde(default)]
    pub isolations: Vec<Isolation>,
    /// Isolations that cannot, with the reason.
    #[serde(default)]
    pub unavailable: Vec<(Isolation, String)>,
    /// Lines that a person should see.
    #[serde(default)]
    pub notices: Vec<String>,
    /// Addresses.
    #[serde(default)]
    pub addresses: Vec<IpAddr>,
    /// Where its tunnels begin; absent when networks stay on this node.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub underlay: Option<NodeUnderlay>,
    /// Pools beside the node's own.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub pools: Vec<PoolFact>,
}

/// What is, of a node.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct NodeStatus {
    /// Whether it can be used.
    #[serde(default)]
    pub phase: NodePhase,
    /// For people.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub message: String,
    /// What can be given to instances, before overcommit.
    #[serde(default)]
    pub capacity: Resources,
    /// What is given to instances.
    #[serde(default)]
    pub allocated: Resources,
    /// Instances placed there.
    #[serde(default)]
    pub instances: u64,
    /// What it is.
    #[serde(default)]
    pub facts: NodeFacts,
    /// Version of the agent.
    #[serde(default)]
    pub agent_version: String,
    /// The boot that the agent last reported from.
    #[serde(default)]
    pub boot_id: String,
    /// Epoch of its lease: grows with every new lease.
    #[serde(default)]
    pub epoch: u64,
    /// When the phase last changed.
    #[serde(default)]
    pub phase_since: Timestamp,
    /// What is to become of its instances with `ha` while it is down.
    #[serde(default, skip_serializing_if = "Evacuation::is_automatic")]
    pub evacuation: Evacuation,
    /// Facts.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub conditions: Vec<Condition>,
}

impl Kind for NodeKind {
    const KIND: &'static str = "node";
    const PLURAL: &'static str = "nodes";
    const SCOPE: Scope = Scope::Cloud;
    const CREATABLE: bool = false;
    type Spec = NodeSpec;
    type Status = NodeStatus;
    fn validate(spec: &NodeSpec, problems: &mut Problems) {
        problems.add_some("/spec/zone", crate::name::problem(&spec.zone));
        let o = &spec.overcommit;
        for (field, value) in
            [("cpu_percent", o.cpu_percent), ("memory_percent", o.memory_percent), ("disk_percent", o.disk_percent)]
        {
            problems.require((1..=10_000).contains(&value), format!("/spec/overcommit/{field}"), "must be 1 to 10000");
        }
    }
}
