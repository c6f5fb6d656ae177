//! What goes over the wire beside objects: login, apply and plan, and the protocol between an agent and the API.
//!
//! Agent protocol, all below `/v1/nodes/{node-id}` with the node's client certificate (or its token):
//! - `POST register` with [`Register`] → [`Registered`]: makes or updates the node object, starts a lease.
//! - `POST heartbeat` with [`Heartbeat`] → [`HeartbeatAnswer`]: renews the lease; carries usage samples.
//! - `GET watch`: server-sent events, each a [`NodeEvent`]: first every object that concerns the node, then `synced`, then changes.
//! - `POST report` with [`Report`] → [`ReportAnswer`]: status of objects that the node has; at most [`REPORT_LIMIT`] items.
//! - `GET tunnel` (WebSocket): carries yamux; the API server opens streams, each begins with one line of JSON,
//!   [`StreamRequest`], answered by one line, [`StreamAnswer`]; then the bytes of that kind of stream.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::explain::Explanation;
use crate::id::{ImageId, InstanceId, NodeId, SnapshotId, VolumeId};
use crate::kinds::{
    About, ImageContent, ImagePhase, MigrationStep, NodeFacts, NodeUnderlay, Observed, Phase, Resources, Severity,
    SnapshotPhase, VolumePhase,
};
use crate::meta::{Condition, Revision};
use crate::size::Size;

/// Finalizer of objects that a node still has something of. The agent's report `Released` takes it away.
pub const NODE_FINALIZER: &str = "node";

/// `POST /v1/login`.
#[derive(Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Login {
    /// User name.
    pub user: String,
    /// Password.
    pub password: String,
}

/// Answer to a login.
#[derive(Clone, Serialize, Deserialize, JsonSchema)]
pub struct LoggedIn {
    /// Bearer token for `Authorization`.
    pub token: String,
    /// User name.
    pub user: String,
    /// When the token ends.
    pub expires_at: crate::time::Timestamp,
}

/// `GET /v1/version`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct VersionInfo {
    /// Version of the server.
    pub version: String,
    /// Versions of the API it speaks.
    pub api: Vec<String>,
}

/// `GET /v1/whoami`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct WhoAmI {
    /// User name.
    pub user: String,
    /// May do everything.
    pub cloud_admin: bool,
    /// Role by project.
    pub roles: BTreeMap<String, crate::kinds::Role>,
}

/// One resource of `apply`: any kind a user may create.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Resource {
    /// Kind.
    pub kind: String,
    /// Name and labels; the rest is ignored.
    pub metadata: ResourceMeta,
    /// Spec of the kind.
    #[serde(default)]
    pub spec: serde_json::Value,
    /// Ignored: what `oblak get -o yaml` printed may be applied again.
    #[serde(default, skip_serializing)]
    #[schemars(skip)]
    pub status: Option<serde_json::Value>,
}

/// Name and labels of a resource to apply. Other metadata is accepted and ignored.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct ResourceMeta {
    /// Name.
    pub name: String,
    /// Labels.
    #[serde(default)]
    pub labels: crate::meta::Labels,
}

/// `POST /v1/projects/{project}/apply[?plan=true]`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Apply {
    /// What should exist. Created or changed all together, or nothing is.
    pub resources: Vec<Resource>,
}

/// What apply does with one resource.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Action {
    /// Does not exist yet.
    Create,
    /// Exists and differs.
    Update,
    /// Exists and is the same.
    Unchanged,
}

/// One change of apply or plan.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Change {
    /// Kind.
    pub kind: String,
    /// Name.
    pub name: String,
    /// What is done.
    pub action: Action,
    /// Fields that differ: JSON pointer, old value, new value.
    #[serde(default)]
    pub fields: Vec<FieldChange>,
    /// For instances: the node it would land on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
    /// Why there; or why the instance does not fit anywhere.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub why: Option<String>,
    /// When it does not fit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub explanation: Option<Explanation>,
}

/// One field that differs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct FieldChange {
    /// JSON pointer.
    pub field: String,
    /// Before; absent when new.
    #[serde(default)]
    pub old: Option<serde_json::Value>,
    /// After; absent when removed.
    #[serde(default)]
    pub new: Option<serde_json::Value>,
}

/// Answer to apply and plan.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Applied {
    /// Per resource, in the order given.
    pub changes: Vec<Change>,
    /// Whether anything was committed (never for a plan).
    pub committed: bool,
    /// Revision of the commit, or the one that the plan was made at.
    pub revision: Revision,
    /// Price of an hour of everything planned, in millionths.
    #[serde(default)]
    pub price_per_hour_micros: u64,
}

/// `GET .../instances/{name}/explain`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Explain {
    /// One paragraph for people.
    pub text: String,
    /// The instance's phase.
    pub phase: Phase,
    /// Where it is, if anywhere.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
    /// What ruled out which nodes, when it is not placed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub explanation: Option<Explanation>,
}

/// Usage of one instance, counters since its start and rates over the last interval.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Usage {
    /// CPU time in nanoseconds.
    pub cpu_ns: u64,
    /// Thousandths of a CPU over the last interval.
    pub cpu_milli: u64,
    /// Memory in use.
    pub memory: Size,
    /// Bytes read from disks.
    pub disk_read: Size,
    /// Bytes written to disks.
    pub disk_write: Size,
    /// Bytes received.
    pub net_rx: Size,
    /// Bytes sent.
    pub net_tx: Size,
    /// When.
    pub at: crate::time::Timestamp,
}

/// A node introduces itself.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Register {
    /// Name it wants to have.
    pub name: String,
    /// Zone; only used when the node is new.
    pub zone: String,
    /// Labels; only used when the node is new.
    #[serde(default)]
    pub labels: crate::meta::Labels,
    /// What it is.
    pub facts: NodeFacts,
    /// What it can give to instances.
    pub capacity: Resources,
    /// Agent version.
    pub version: String,
    /// Boot id.
    pub boot_id: String,
}

/// Answer to a registration.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Registered {
    /// The node's name.
    pub name: String,
    /// Epoch of the lease.
    pub epoch: u64,
    /// Length of the lease in milliseconds, counted from before the renewal was sent.
    pub lease_ms: u64,
    /// Epoch of the lease that was alive when this one began: nothing of the node was started elsewhere in between.
    #[serde(default)]
    pub continues: Option<u64>,
}

/// A certificate of a node with what it needs to know about it. Answer to an enrolment and to `POST /v1/nodes/{id}/certificate`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct NodeCertificate {
    /// Id of the node.
    pub id: NodeId,
    /// Its name.
    #[serde(default)]
    pub name: String,
    /// The certificate.
    pub certificate_pem: String,
    /// The authority that it must trust.
    pub ca_pem: String,
    /// When to ask for the next one.
    #[serde(default)]
    pub renew_at: crate::time::Timestamp,
    /// When it ends.
    #[serde(default)]
    pub expires_at: crate::time::Timestamp,
}

/// `POST /v1/nodes/{id}/certificate`: a node renews its certificate.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RenewCertificate {
    /// Certificate request (PKCS #10, PEM). Only its public key is used.
    pub csr_pem: String,
}

/// `POST /v1/nodes/{name}/remove`: a node leaves the cloud for good.
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RemoveNode {
    /// Also when something lives there, which is lost then.
    #[serde(default)]
    pub force: bool,
}

/// `POST /v1/nodes/{name}/evacuate`: a node that is down is lost, and its instances with `ha` are to be started elsewhere.
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct EvacuateNode {
    /// Somebody has made sure that the node is off, or can reach neither disks nor networks.
    #[serde(default)]
    pub confirm: bool,
}

/// What went with a node.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct NodeRemoved {
    /// Its name.
    pub name: String,
    /// Lost instances, each as `project/name`.
    pub instances: Vec<String>,
    /// Lost volumes.
    pub volumes: Vec<String>,
    /// Lost snapshots.
    pub snapshots: Vec<String>,
    /// Images whose only copy was there and that nobody can fetch again.
    pub images: Vec<String>,
}

/// A node is alive.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Heartbeat {
    /// Epoch of the lease to renew.
    pub epoch: u64,
    /// Samples since the last heartbeat.
    #[serde(default)]
    pub usage: Vec<(InstanceId, Usage)>,
}

/// Answer to a heartbeat.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct HeartbeatAnswer {
    /// Whether the lease is still the node's. If not, it registers again.
    pub valid: bool,
}

/// What an agent is told of another node that has ports of its networks: where to reach it, and nothing else. Comes in a node's watch as an
/// object of the kind [`PEER`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Peer {
    /// The node.
    pub id: NodeId,
    /// Its name.
    pub name: String,
    /// Where its tunnels begin; absent when it has none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub underlay: Option<NodeUnderlay>,
}

/// An instance that this node may still have something of although it was moved elsewhere. Comes in a node's watch as an object of the kind
/// [`SUPERSEDED`]; the agent ends and removes what is left, and says so with [`ReportItem::Left`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SupersededInstance {
    /// The instance.
    pub id: InstanceId,
    /// Its `status.placement.generation` when it was here.
    pub placement: u64,
}

/// Kind of [`SupersededInstance`] in events.
pub const SUPERSEDED: &str = "superseded";

/// Kind of [`Peer`] in events.
pub const PEER: &str = "peer";

/// One event of a node's watch.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum NodeEvent {
    /// The object is now like this.
    Put {
        /// Kind.
        kind: String,
        /// The whole object.
        object: serde_json::Value,
    },
    /// The object is gone, or no longer concerns this node.
    Delete {
        /// Kind.
        kind: String,
        /// Id.
        id: Uuid,
    },
    /// Everything that exists has been sent; what was not sent does not exist.
    Synced {
        /// Up to here.
        revision: Revision,
    },
}

/// Most items in one report.
pub const REPORT_LIMIT: usize = 200;

/// What a node reports.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// Epoch of the node's lease.
    pub epoch: u64,
    /// The items.
    pub items: Vec<ReportItem>,
    /// Things that happened, for people.
    #[serde(default)]
    pub events: Vec<NewEvent>,
}

/// Status of one object.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum ReportItem {
    /// Of an instance placed here.
    Instance {
        /// Project.
        project: String,
        /// Which.
        id: InstanceId,
        /// Phase.
        phase: Phase,
        /// Reason of the phase.
        reason: String,
        /// For people.
        message: String,
        /// Details.
        observed: Box<Observed>,
        /// Facts, whole list.
        conditions: Vec<Condition>,
    },
    /// Of a volume placed here.
    Volume {
        /// Project.
        project: String,
        /// Which.
        id: VolumeId,
        /// Phase `available` or `failed` (the API knows about `in_use`).
        phase: VolumePhase,
        /// Reason.
        reason: String,
        /// For people.
        message: String,
        /// Size.
        size: Size,
        /// Bytes it takes.
        used: Size,
        /// Generation carried out.
        generation: u64,
        /// Whether a guest has it plugged in now.
        plugged: bool,
    },
    /// Of an image imported here.
    Image {
        /// Project.
        project: String,
        /// Which.
        id: ImageId,
        /// Phase.
        phase: ImagePhase,
        /// Reason.
        reason: String,
        /// For people.
        message: String,
        /// Percent.
        progress: u8,
        /// Digest when ready.
        digest: Option<String>,
        /// Bytes stored.
        size: Size,
        /// Size of the disk.
        virtual_size: Size,
        /// What it holds.
        content: Option<ImageContent>,
        /// Generation imported.
        generation: u64,
        /// Facts.
        properties: BTreeMap<String, String>,
    },
    /// Whether a copy of an image that another node has imported is here.
    ImageCopy {
        /// Project.
        project: String,
        /// Which.
        id: ImageId,
        /// Digest of the copy.
        digest: String,
        /// Whether it is here; a copy that has become outdated is dropped.
        present: bool,
    },
    /// Of a snapshot here.
    Snapshot {
        /// Project.
        project: String,
        /// Which.
        id: SnapshotId,
        /// Phase.
        phase: SnapshotPhase,
        /// For people.
        message: String,
        /// Bytes it takes.
        size: Size,
        /// Whether it holds memory.
        has_memory: bool,
    },
    /// How far a migration is, from one of its two nodes.
    Migration {
        /// Project.
        project: String,
        /// Which.
        id: InstanceId,
        /// Which migration of it.
        generation: u64,
        /// How far.
        step: MigrationStep,
    },
    /// Nothing is left here of an instance that was moved elsewhere.
    Left {
        /// Which.
        id: InstanceId,
        /// The placement that nothing is left of.
        placement: u64,
    },
    /// Nothing of the object is left on this node: takes away [`NODE_FINALIZER`].
    Released {
        /// Kind of the object (`object_kind`, since `kind` is this item's tag).
        object_kind: String,
        /// Project.
        project: String,
        /// Which.
        id: Uuid,
    },
}

/// An event that somebody reports.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct NewEvent {
    /// Project of the object; absent for kinds of the cloud.
    pub project: Option<String>,
    /// The object.
    pub about: About,
    /// Whether somebody should look.
    pub severity: Severity,
    /// CamelCase reason.
    pub reason: String,
    /// For people.
    pub message: String,
}

/// Reason for a refusal in [`ReportAnswer`]: the item is to be sent again when the node has registered.
pub const STALE_EPOCH: &str = "stale epoch: register again";

/// Answer to a report.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ReportAnswer {
    /// Indexes of items that were not taken, each with the reason (object gone, not on this node, stale epoch).
    pub refused: Vec<(usize, String)>,
}

/// First line of a stream that the API opens through an agent's tunnel.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "stream", rename_all = "snake_case")]
pub enum StreamRequest {
    /// Frames, both ways.
    Console {
        /// Which.
        instance: InstanceId,
    },
    /// Frames, both ways.
    Exec {
        /// Which.
        instance: InstanceId,
        /// Program and arguments.
        argv: Vec<String>,
        /// `NAME=value`.
        env: Vec<String>,
        /// Working directory; empty for the default.
        cwd: String,
        /// User; empty for the default.
        user: String,
        /// Terminal size.
        tty: Option<(u16, u16)>,
    },
    /// Raw bytes towards the API until the end.
    Logs {
        /// Which.
        instance: InstanceId,
        /// Last lines only.
        tail: Option<u64>,
        /// Go on.
        follow: bool,
    },
    /// Raw RFB bytes.
    Vnc {
        /// Which.
        instance: InstanceId,
    },
    /// Raw TCP bytes to a port of the instance, from inside its network.
    Forward {
        /// Which.
        instance: InstanceId,
        /// TCP port.
        port: u16,
    },
    /// Content of an image towards the API (a tar stream of the image store's export).
    ImageGet {
        /// Which.
        image: ImageId,
    },
    /// Content of an uploaded image from the API, after [`StreamAnswer::Ok`] as frames of `oblak_platform::frame`: bytes on the
    /// channel `Stdin`, then the control message `Eof` (so that a broken connection is not taken for the end). The agent imports
    /// it and answers with a second [`StreamAnswer`] line.
    ImagePut {
        /// Which.
        image: ImageId,
        /// Name, for messages.
        name: String,
        /// Bytes that will come.
        length: Option<u64>,
        /// Digest that the content must have.
        checksum: Option<String>,
    },
}

/// Line that answers a [`StreamRequest`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "answer", rename_all = "snake_case")]
pub enum StreamAnswer {
    /// The stream follows.
    Ok,
    /// There will be none.
    Error {
        /// Stable code.
        code: String,
        /// For people.
        detail: String,
    },
}
