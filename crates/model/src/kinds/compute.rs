//! Flavors and instances.

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;

use schemars::JsonSchema;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::migration::{Migrate, MigrationPhase, MigrationStatus};
use crate::id::{ImageId, NodeId, PortId, SnapshotId, VolumeId};
use crate::meta::Condition;
use crate::object::{Kind, Object, Scope};
use crate::selector::Selector;
use crate::size::Size;
use crate::time::{Span, Timestamp};
use crate::validate::Problems;

/// How an instance is separated from the others.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Isolation {
    /// Namespaces and cgroups of the host's kernel.
    Container,
    /// A small virtual machine.
    Microvm,
    /// A full virtual machine.
    #[default]
    Vm,
    /// A whole machine.
    Metal,
}

impl Isolation {
    /// The word on the wire.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Container => "container",
            Self::Microvm => "microvm",
            Self::Vm => "vm",
            Self::Metal => "metal",
        }
    }
}

impl fmt::Display for Isolation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// An amount of CPU in thousandths of a vCPU. A number on the wire: `2`, `0.5`; strings such as `500m` are accepted in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Cpus(pub u32);

impl Cpus {
    /// Thousandths.
    #[must_use]
    pub const fn milli(self) -> u32 {
        self.0
    }
    /// Whole vCPUs, rounded up.
    #[must_use]
    pub const fn whole(self) -> u32 {
        self.0.div_ceil(1000)
    }
}

impl fmt::Display for Cpus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_multiple_of(1000) {
            return f.pad(&(self.0 / 1000).to_string());
        }
        f.pad(format!("{}.{:03}", self.0 / 1000, self.0 % 1000).trim_end_matches('0'))
    }
}

impl std::str::FromStr for Cpus {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let bad = || format!("{text:?} is not a number of vCPUs; write for example 2, 0.5 or 500m");
        if let Some(milli) = text.strip_suffix('m') {
            return milli.parse().map(Self).map_err(|_| bad());
        }
        let (whole, fraction) = text.split_once('.').unwrap_or((text, "0"));
        if fraction.is_empty() || fraction.len() > 3 || !fraction.bytes().all(|b| b.is_ascii_digit()) {
            return Err(bad());
        }
        let whole: u32 = whole.parse().map_err(|_| bad())?;
        let milli: u32 = format!("{fraction:0<3}").parse().map_err(|_| bad())?;
        whole.checked_mul(1000).and_then(|n| n.checked_add(milli)).map(Self).ok_or_else(bad)
    }
}

impl Serialize for Cpus {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if self.0.is_multiple_of(1000) {
            serializer.serialize_u32(self.0 / 1000)
        } else {
            serializer.serialize_f64(f64::from(self.0) / 1000.0)
        }
    }
}

impl<'de> Deserialize<'de> for Cpus {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let value = serde_json::Value::deserialize(deserializer)?;
        let text = match &value {
            serde_json::Value::Number(n) => n.to_string(),
            serde_json::Value::String(s) => s.clone(),
            _ => return Err(serde::de::Error::custom("expected a number of vCPUs such as 2, 0.5 or \"500m\"")),
        };
        text.parse().map_err(serde::de::Error::custom)
    }
}

impl JsonSchema for Cpus {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Cpus".into()
    }
    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        schemars::json_schema!({"oneOf": [{"type": "number", "minimum": 0}, {"type": "string", "pattern": "^[0-9.]+m?$"}], "description": "vCPUs, to three decimals."})
    }
}

/// What an instance gets of a machine.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Resources {
    /// vCPUs.
    pub vcpus: Cpus,
    /// Memory.
    pub memory: Size,
    /// Root disk.
    pub disk: Size,
}

/// How vCPUs are backed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum CpuPolicy {
    /// Shares the host's CPUs with others.
    #[default]
    Shared,
    /// Host CPUs of its own.
    Pinned,
    /// Host CPUs of its own, real-time scheduling.
    Realtime,
}

/// Kind of flavors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FlavorKind;
/// A size that instances come in.
pub type Flavor = Object<FlavorKind>;

/// What is asked for of a flavor.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct FlavorSpec {
    /// vCPUs.
    pub vcpus: Cpus,
    /// Memory.
    pub memory: Size,
    /// Root disk.
    pub disk: Size,
    /// How vCPUs are backed.
    #[serde(default)]
    pub cpu_policy: CpuPolicy,
    /// Price of an hour, in millionths of the cloud's currency.
    #[serde(default)]
    pub price_per_hour_micros: u64,
}

/// What is, of a flavor.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct FlavorStatus {}

impl Kind for FlavorKind {
    const KIND: &'static str = "flavor";
    const PLURAL: &'static str = "flavors";
    const SCOPE: Scope = Scope::Cloud;
    type Spec = FlavorSpec;
    type Status = FlavorStatus;
    fn validate(spec: &FlavorSpec, problems: &mut Problems) {
        problems.require((100..=1_024_000).contains(&spec.vcpus.0), "/spec/vcpus", "must be 0.1 to 1024");
        problems.require(
            (Size::mib(16)..=Size::gib(64 * 1024)).contains(&spec.memory),
            "/spec/memory",
            "must be 16 MiB to 64 TiB",
        );
        problems.require(spec.disk <= Size::gib(1024 * 1024), "/spec/disk", "must be at most 1 PiB");
    }
    fn validate_update(old: &FlavorSpec, new: &FlavorSpec, problems: &mut Problems) {
        let same = (old.vcpus, old.memory, old.disk) == (new.vcpus, new.memory, new.disk);
        problems.require(same, "/spec", "vcpus, memory and disk cannot change; make a new flavor");
    }
    fn name_problem(name: &str) -> Option<String> {
        crate::name::dotted_problem(name)
    }
}

/// Kind of instances.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct InstanceKind;
/// An isolated execution environment.
pub type Instance = Object<InstanceKind>;

/// The power state asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Power {
    /// On.
    #[default]
    Running,
    /// Off; disks and addresses are kept.
    Stopped,
    /// Frozen; memory is kept.
    Paused,
}

/// What to do when a guest ends by itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum RestartPolicy {
    /// Start it again, with growing pauses.
    Always,
    /// Start it again unless it ended with code 0 (a machine: unless it was shut down from inside).
    #[default]
    OnFailure,
    /// Leave it stopped.
    Never,
}

/// One interface.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct NetworkAttachment {
    /// Network name.
    pub network: String,
    /// Wanted address; any free one when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address: Option<IpAddr>,
    /// Security group names; `default` when empty.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub security_groups: Vec<String>,
}

/// Transport of a published port or a rule.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Transport {
    /// TCP.
    #[default]
    Tcp,
    /// UDP.
    Udp,
}

/// A port of the host that leads into the instance.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Publish {
    /// Port of the host.
    pub host_port: u16,
    /// Port of the instance.
    pub port: u16,
    /// TCP or UDP.
    #[serde(default)]
    pub protocol: Transport,
    /// Address of the host; all when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host_address: Option<IpAddr>,
}

/// A volume plugged into an instance.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct VolumeAttachment {
    /// Volume name.
    pub volume: String,
    /// Write-protected.
    #[serde(default, skip_serializing_if = "is_false")]
    pub read_only: bool,
    /// Where a container sees it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mount: Option<String>,
}

/// Which nodes an instance may run on.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct PlacementRules {
    /// Node labels.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub node_selector: Option<Selector>,
    /// Zones; any when empty.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub zones: Vec<String>,
    /// On the same node as instances of the project with these labels.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub affinity: Vec<AffinityTerm>,
    /// Not on the same node as instances of the project with these labels.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub anti_affinity: Vec<AffinityTerm>,
    /// Fill nodes or spread over them; the cloud's default when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub strategy: Option<Strategy>,
}

/// Fill nodes or spread over them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Strategy {
    /// Fill the fullest node that fits.
    Pack,
    /// Take the emptiest node.
    Spread,
}

/// Nearness to other instances.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct AffinityTerm {
    /// Which instances of the project.
    pub selector: Selector,
    /// What counts as the same place.
    #[serde(default)]
    pub topology: Topology,
    /// Must hold; otherwise it is only preferred.
    #[serde(default = "yes")]
    pub required: bool,
}

/// What counts as the same place.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Topology {
    /// One machine.
    #[default]
    Node,
    /// One zone.
    Zone,
}

fn yes() -> bool {
    true
}

#[allow(clippy::trivially_copy_pass_by_ref)] // serde passes a reference
fn is_false(b: &bool) -> bool {
    !*b
}

/// Whose user ids a container runs with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum UserNamespace {
    /// Ids of its own: root inside is nobody outside.
    #[default]
    Private,
    /// The host's ids. Needs the project's admin.
    Host,
}

/// What only containers know.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ContainerSpec {
    /// Replaces the image's entrypoint.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub entrypoint: Option<Vec<String>>,
    /// Working directory.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub workdir: Option<String>,
    /// `name` or `uid[:gid]` inside.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// Give the main process a terminal.
    #[serde(skip_serializing_if = "is_false")]
    pub tty: bool,
    /// Write-protect the root file system.
    #[serde(skip_serializing_if = "is_false")]
    pub read_only_root: bool,
    /// Whose user ids.
    pub userns: UserNamespace,
    /// Capabilities beyond the default ones, without `CAP_`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub cap_add: Vec<String>,
    /// Capabilities to take away.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub cap_drop: Vec<String>,
}

/// Going back to a snapshot. A larger generation does it once.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Restore {
    /// Snapshot name.
    pub snapshot: String,
    /// Counter: grows by one with each restore asked for.
    pub generation: u64,
}

/// What is asked for of an instance.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct InstanceSpec {
    /// How it is isolated. When absent: `container` for OCI images, `vm` for the others.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub isolation: Option<Isolation>,
    /// Image name or id.
    pub image: String,
    /// Flavor name; `s` when empty.
    #[serde(default)]
    pub flavor: String,
    /// Root disk when it should be larger than the flavor's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk: Option<Size>,
    /// Power state.
    #[serde(default)]
    pub power: Power,
    /// Counter: grows by one with each restart asked for.
    #[serde(default)]
    pub restart_generation: u64,
    /// What to do when it ends by itself; `on_failure` when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub restart_policy: Option<RestartPolicy>,
    /// Time to end by itself before force is used.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stop_grace: Option<Span>,
    /// Arguments (containers): replace the image's command.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub command: Vec<String>,
    /// Environment (containers).
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub env: BTreeMap<String, String>,
    /// Names of ssh keys it accepts.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub keys: Vec<String>,
    /// Given to cloud-init by the metadata service, at most 64 KiB.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user_data: Option<String>,
    /// Interfaces; one in network `default` when absent, none when empty.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub networks: Option<Vec<NetworkAttachment>>,
    /// Ports of the host that lead into it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub publish: Vec<Publish>,
    /// Volumes plugged in.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub volumes: Vec<VolumeAttachment>,
    /// Which nodes it may run on.
    #[serde(default)]
    pub placement: PlacementRules,
    /// Started on another node when its own is lost. Its disks must be in a pool that other nodes can open, or be `ephemeral`.
    #[serde(default, skip_serializing_if = "is_false")]
    pub ha: bool,
    /// The root disk need not outlive the node: started elsewhere, the instance begins with a fresh one.
    #[serde(default, skip_serializing_if = "is_false")]
    pub ephemeral: bool,
    /// Pool of the root disk; on the node itself when empty.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub pool: String,
    /// What only containers know.
    #[serde(default)]
    pub container: ContainerSpec,
    /// Going back to a snapshot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub restore: Option<Restore>,
    /// Moving to another node.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub migration: Option<Migrate>,
}

impl InstanceSpec {
    /// The interfaces, with the default filled in.
    #[must_use]
    pub fn interfaces(&self) -> Vec<NetworkAttachment> {
        self.networks.clone().unwrap_or_else(|| {
            vec![NetworkAttachment { network: super::DEFAULT_NETWORK.into(), ..NetworkAttachment::default() }]
        })
    }
}

/// Where an instance is in its life.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Waits for a node, an image or a volume; `reason` and `message` say which.
    #[default]
    Pending,
    /// Has a node that has not started it yet.
    Scheduled,
    /// Being started.
    Starting,
    /// Runs.
    Running,
    /// Frozen.
    Paused,
    /// Being stopped.
    Stopping,
    /// Off.
    Stopped,
    /// Ended or could not start, and is not started again by itself.
    Failed,
    /// Its node cannot be reached.
    Unknown,
    /// Being removed.
    Deleting,
}

impl Phase {
    /// The word on the wire.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Pending => "pending",
            Self::Scheduled => "scheduled",
            Self::Starting => "starting",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Stopping => "stopping",
            Self::Stopped => "stopped",
            Self::Failed => "failed",
            Self::Unknown => "unknown",
            Self::Deleting => "deleting",
        }
    }
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// Node and resources chosen for an instance.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Placement {
    /// The node.
    pub node: NodeId,
    /// Its name.
    pub node_name: String,
    /// What is reserved there.
    pub resources: Resources,
    /// When it was chosen.
    pub at: Timestamp,
    /// Why this node.
    #[serde(default)]
    pub why: String,
    /// Which placement of the instance this is: grows by one with every node it is given. Reports and openings of disks that name an older
    /// one are refused.
    #[serde(default)]
    pub generation: u64,
    /// The guest is to be frozen when the lease of its node ends, because it may be started elsewhere then.
    #[serde(default, skip_serializing_if = "is_false")]
    pub fenced: bool,
    /// Grows with every change of `fenced`; the node repeats it when it has carried the change out.
    #[serde(default)]
    pub fence_turn: u64,
}

/// Everything the spec names, resolved when it was accepted: what the agent works with.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Resolved {
    /// Isolation with the default filled in.
    pub isolation: Isolation,
    /// The image.
    pub image: ImageId,
    /// Flavor name, for metadata.
    pub flavor: String,
    /// Size.
    pub resources: Resources,
    /// Ports in order of the interfaces.
    pub ports: Vec<PortId>,
    /// Volumes in order of `spec.volumes`.
    pub volumes: Vec<VolumeId>,
    /// OpenSSH lines by key name.
    pub public_keys: BTreeMap<String, String>,
    /// The snapshot of `spec.restore`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub restore: Option<SnapshotId>,
}

/// An address of an instance.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct InstanceAddress {
    /// Network name.
    pub network: String,
    /// The address.
    pub address: IpAddr,
    /// MAC address.
    pub mac: String,
}

/// What the node reports. Only the agent of the instance's node writes it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Observed {
    /// Generation of the spec that the report is about.
    pub generation: u64,
    /// Number of the current or last run.
    pub run: u64,
    /// `spec.restart_generation` that has been carried out.
    pub restart_generation: u64,
    /// `spec.restore.generation` that has been carried out.
    pub restore_generation: u64,
    /// Times it was started again after it ended by itself.
    pub restart_count: u64,
    /// Exit code of the last run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exit_code: Option<i32>,
    /// When the run started.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub started_at: Option<Timestamp>,
    /// When it ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ended_at: Option<Timestamp>,
    /// `kvm`, `tcg`, `crun`, ...
    #[serde(default)]
    pub runtime: String,
    /// Volumes plugged in now.
    #[serde(default)]
    pub volumes: Vec<VolumeId>,
    /// Host ports that could not be taken, with reasons.
    #[serde(default)]
    pub refused: Vec<String>,
    /// What is in force now; differs from the placement until a resize is carried out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resources: Option<Resources>,
    /// `status.placement.generation` that the report is about; 0 from an agent that does not say.
    #[serde(default)]
    pub placement: u64,
    /// `status.placement.fence_turn` that is in force.
    #[serde(default)]
    pub fence_turn: u64,
}

/// What is, of an instance.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct InstanceStatus {
    /// Where it is in its life.
    #[serde(default)]
    pub phase: Phase,
    /// Stable CamelCase reason of the phase.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub reason: String,
    /// For people.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub message: String,
    /// Node and resources; absent until one is chosen.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub placement: Option<Placement>,
    /// The migration that is under way, or the last one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub migration: Option<MigrationStatus>,
    /// What the names in the spec stand for.
    #[serde(default)]
    pub resolved: Resolved,
    /// Addresses.
    #[serde(default)]
    pub addresses: Vec<InstanceAddress>,
    /// What the node reports.
    #[serde(default)]
    pub observed: Observed,
    /// Facts.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub conditions: Vec<Condition>,
}

impl InstanceStatus {
    /// The migration that has not been decided yet: the instance is on the old node.
    #[must_use]
    pub fn open_migration(&self) -> Option<&MigrationStatus> {
        self.migration.as_ref().filter(|m| m.phase.is_open())
    }
    /// Whether both nodes of a migration have something of the instance.
    #[must_use]
    pub fn is_moving(&self) -> bool {
        self.migration.as_ref().is_some_and(|m| !m.phase.is_over())
    }
    /// Whether the node is one end of a migration that is not over.
    #[must_use]
    pub fn moves_through(&self, node: NodeId) -> bool {
        self.migration.as_ref().is_some_and(|m| !m.phase.is_over() && (m.from == node || m.to == node))
    }
    /// Whether the node is the target of a migration that is not decided yet.
    #[must_use]
    pub fn moves_to(&self, node: NodeId) -> bool {
        self.open_migration().is_some_and(|m| m.to == node)
    }
    /// Whether the port of the instance came to the node by a migration.
    #[must_use]
    pub fn came_by_migration(&self, node: NodeId) -> bool {
        let came = |m: &MigrationStatus| {
            m.to == node && m.live && matches!(m.phase, MigrationPhase::Finishing | MigrationPhase::Done)
        };
        self.migration.as_ref().is_some_and(came)
    }
}

/// Largest user data in bytes; the limit of OpenStack and cloud-init's OpenStack datasource.
pub const MAX_USER_DATA: usize = 64 * 1024;

impl Kind for InstanceKind {
    const KIND: &'static str = "instance";
    const PLURAL: &'static str = "instances";
    const SCOPE: Scope = Scope::Project;
    const ALIASES: &'static [&'static str] = &["i"];
    type Spec = InstanceSpec;
    type Status = InstanceStatus;

    fn validate(spec: &InstanceSpec, problems: &mut Problems) {
        problems.require(!spec.image.is_empty(), "/spec/image", "must name an image; `oblak image list` shows them");
        if let Some(text) = &spec.user_data {
            problems.require(
                text.len() <= MAX_USER_DATA,
                "/spec/user_data",
                format!("has {} bytes; at most {MAX_USER_DATA} are allowed", text.len()),
            );
        }
        if let Some(disk) = spec.disk {
            problems.require(disk >= Size::mib(16), "/spec/disk", "must be at least 16 MiB");
        }
        validate_lists(spec, problems);
        for (i, p) in spec.publish.iter().enumerate() {
            problems.require(p.host_port != 0, format!("/spec/publish/{i}/host_port"), "must be 1 to 65535");
            problems.require(p.port != 0, format!("/spec/publish/{i}/port"), "must be 1 to 65535");
            let twice = spec.publish[..i].iter().any(|o| (o.host_port, o.protocol) == (p.host_port, p.protocol));
            problems.require(!twice, format!("/spec/publish/{i}/host_port"), "is published twice");
        }
        for (i, v) in spec.volumes.iter().enumerate() {
            problems.add_some(format!("/spec/volumes/{i}/volume"), crate::name::problem(&v.volume));
            let twice = spec.volumes[..i].iter().any(|o| o.volume == v.volume);
            problems.require(!twice, format!("/spec/volumes/{i}/volume"), "is attached twice");
            if let Some(mount) = &v.mount {
                let ok = mount.starts_with('/')
                    && mount != "/"
                    && !mount.split('/').any(|s| s == "..")
                    && mount.len() <= 4096;
                problems.require(
                    ok,
                    format!("/spec/volumes/{i}/mount"),
                    "must be an absolute path below / without `..`",
                );
            }
        }
        for (name, value) in &spec.env {
            let ok = !name.is_empty() && !name.contains(['=', '\0']) && !value.contains('\0');
            problems.require(ok, format!("/spec/env/{name}"), "must have a name without '=' and a value without NUL");
        }
    }

    fn validate_update(old: &InstanceSpec, new: &InstanceSpec, problems: &mut Problems) {
        let fixed = "cannot change; delete the instance and launch a new one";
        problems.require(old.isolation == new.isolation, "/spec/isolation", fixed);
        problems.require(old.image == new.image, "/spec/image", fixed);
        problems.require(old.networks == new.networks, "/spec/networks", fixed);
        problems.require(old.pool == new.pool, "/spec/pool", fixed);
        problems.require(
            new.restart_generation >= old.restart_generation,
            "/spec/restart_generation",
            "must not get smaller",
        );
        let generation = |s: &InstanceSpec| s.restore.as_ref().map_or(0, |r| r.generation);
        problems.require(generation(new) >= generation(old), "/spec/restore/generation", "must not get smaller");
        let generation = |s: &InstanceSpec| s.migration.as_ref().map_or(0, |m| m.generation);
        problems.require(generation(new) >= generation(old), "/spec/migration/generation", "must not get smaller");
    }
}

fn validate_lists(spec: &InstanceSpec, problems: &mut Problems) {
    let limits = [
        ("/spec/command", spec.command.len(), 1024),
        ("/spec/env", spec.env.len(), 1024),
        ("/spec/keys", spec.keys.len(), 64),
        ("/spec/publish", spec.publish.len(), 64),
        ("/spec/volumes", spec.volumes.len(), 16),
        ("/spec/networks", spec.networks.as_ref().map_or(0, Vec::len), 8),
    ];
    for (field, len, limit) in limits {
        problems.require(len <= limit, field, format!("has {len} entries; at most {limit} are allowed"));
    }
}
