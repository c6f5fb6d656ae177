//! Join tokens: one machine each may join the cloud with one.

use std::time::Duration;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::id::NodeId;
use crate::object::{Kind, Object, Scope};
use crate::time::{Span, Timestamp};
use crate::validate::Problems;

/// Kind of join tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct JoinTokenKind;
/// A secret with which one machine joins, once.
pub type JoinToken = Object<JoinTokenKind>;

/// A token that lies around longer than this is a risk that nobody needs.
const LONGEST: Duration = Duration::from_secs(30 * 86_400);
const SHORTEST: Duration = Duration::from_secs(1);

/// What a machine becomes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum JoinRole {
    /// It runs an agent.
    #[default]
    Node,
    /// It serves the API and holds the state.
    Server,
}

/// What is asked for of a join token.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct JoinTokenSpec {
    /// What the machine becomes.
    #[serde(default)]
    pub role: JoinRole,
    /// How long the token works, counted by the server's clock from its creation: 1 s to 30 d.
    #[serde(default = "hour")]
    pub ttl: Span,
    /// What it is for.
    #[serde(default)]
    pub description: String,
}

fn hour() -> Span {
    Span::secs(3600)
}

impl Default for JoinTokenSpec {
    fn default() -> Self {
        Self { role: JoinRole::Node, ttl: hour(), description: String::new() }
    }
}

/// What is, of a join token.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct JoinTokenStatus {
    /// The token with the digest of the authority's certificate; only in the answer to its creation.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub secret: Option<String>,
    /// When it stops working.
    #[serde(default)]
    pub expires_at: Timestamp,
    /// When a machine joined with it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub used_at: Option<Timestamp>,
    /// The node that it became.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<NodeId>,
    /// Name of that node.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub node_name: String,
}

impl Kind for JoinTokenKind {
    const KIND: &'static str = "join-token";
    const PLURAL: &'static str = "join-tokens";
    const SCOPE: Scope = Scope::Cloud;
    type Spec = JoinTokenSpec;
    type Status = JoinTokenStatus;
    fn validate(spec: &JoinTokenSpec, problems: &mut Problems) {
        problems.require(spec.description.len() <= 256, "/spec/description", "is longer than 256 bytes");
        problems.require((SHORTEST..=LONGEST).contains(&spec.ttl.0), "/spec/ttl", "must be 1s to 30d");
    }
    fn validate_update(old: &JoinTokenSpec, new: &JoinTokenSpec, problems: &mut Problems) {
        problems.require(old.role == new.role, "/spec/role", "cannot change; make a new token");
        problems.require(old.ttl == new.ttl, "/spec/ttl", "cannot change; make a new token");
    }
}
