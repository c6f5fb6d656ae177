//! What the API says about the servers of a cloud and where it keeps its state.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{JoinRole, Timestamp};

/// `POST /v1/cluster/join-token`: what is this join token for? Asking uses nothing up.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct InspectJoinToken {
    /// Secret part of the join token.
    pub join_token: String,
}

/// What a join token is for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct JoinTokenFor {
    /// What the machine becomes.
    pub role: JoinRole,
    /// Until when.
    pub expires_at: Timestamp,
}

/// `POST /v1/cluster/join`: a machine becomes one more server.
#[derive(Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct JoinServer {
    /// Secret part of a join token of role `server`.
    pub join_token: String,
    /// A secret that the machine made itself: who lost the answer asks again with the same and gets the same answer.
    pub key: String,
    /// Name of the server.
    pub name: String,
    /// Where the other servers reach its etcd, `https://ADDRESS:PORT`.
    pub peer_url: String,
}

/// What the new server is handed over: with this it is a server. Never logged.
#[derive(Clone, Serialize, Deserialize, JsonSchema)]
pub struct ServerAdmitted {
    /// Certificate of the authority.
    pub ca_pem: String,
    /// Its key.
    pub ca_key_pem: String,
    /// Certificate of etcd's authority.
    pub etcd_ca_pem: String,
    /// Its key.
    pub etcd_ca_key_pem: String,
    /// All members of etcd, the new one included.
    pub members: Vec<MemberAddress>,
    /// URLs of the members that answer clients.
    pub endpoints: Vec<String>,
    /// Below which text the keys of this cloud lie in etcd.
    pub prefix: String,
    /// Largest size of etcd's database in bytes.
    pub quota_bytes: u64,
}

/// A member of etcd and where its peers reach it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct MemberAddress {
    /// Its name.
    pub name: String,
    /// `https://ADDRESS:PORT`.
    pub peer_url: String,
}

/// `GET /v1/cluster/status`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct ClusterStatus {
    /// Version of the server that answers.
    pub version: String,
    /// Where the state is, and how that is.
    pub store: StoreHealth,
    /// Members of etcd; empty where the state is in a file.
    pub members: Vec<StoreMember>,
    /// The server whose controllers work.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub control_leader: Option<String>,
    /// Certificates of the server that answers.
    pub certificates: Vec<CertificateLife>,
    /// What a person should do, one sentence each; empty when nothing.
    pub advice: Vec<String>,
}

/// The state of the control plane.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct StoreHealth {
    /// `redb` or `etcd`.
    pub backend: String,
    /// Newest revision.
    pub revision: String,
    /// Live keys.
    pub keys: u64,
    /// Size of the file or database in bytes.
    pub bytes: u64,
    /// Above this size of the database etcd takes no writes, in bytes; 0 where that is not known.
    #[serde(default)]
    pub quota_bytes: u64,
    /// Alarms of etcd, such as `nospace on n1`.
    #[serde(default)]
    pub alarms: Vec<String>,
    /// Whether writes work.
    pub writable: bool,
}

/// What a member of etcd does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum MemberRole {
    /// Its vote counts.
    #[default]
    Voter,
    /// It copies and has no vote yet.
    Learner,
    /// It was admitted and has not come yet.
    Unstarted,
}

/// A member of etcd.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct StoreMember {
    /// Name of the server.
    pub name: String,
    /// Name in etcd's own words.
    pub id: String,
    /// What it does.
    pub role: MemberRole,
    /// Whether it leads.
    pub leader: bool,
    /// Whether it answers.
    pub healthy: bool,
    /// Where clients reach it.
    pub url: String,
    /// Where other members reach it.
    pub peer_url: String,
    /// Version of etcd.
    pub version: String,
    /// Size of its database in bytes.
    pub bytes: u64,
    /// Bytes of it in use.
    pub bytes_in_use: u64,
    /// What is wrong, in words.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub problem: String,
}

/// A certificate and its life.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct CertificateLife {
    /// Name of its file below `pki/`.
    pub name: String,
    /// When it begins.
    pub not_before: Timestamp,
    /// When it ends.
    pub expires_at: Timestamp,
}

/// `POST /v1/cluster/backup`. Answered with the encrypted archive as `application/octet-stream`.
#[derive(Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct BackupRequest {
    /// What opens it: a passphrase of at least 12 characters, or a recovery key.
    pub passphrase: String,
}

/// Answer to `POST /v1/cluster/servers/{name}/remove`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ServerRemoved {
    /// Name of the server.
    pub name: String,
    /// How many votes are left.
    pub voters: usize,
}
