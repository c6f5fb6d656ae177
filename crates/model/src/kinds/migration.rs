//! Moving an instance to another node: what is asked for, and how far it is.

use std::fmt;
use std::net::SocketAddr;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::Resources;
use crate::id::NodeId;
use crate::size::Size;
use crate::time::Timestamp;

/// Moving an instance. A larger generation does it once.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Migrate {
    /// Name of the node it moves to; the scheduler chooses when empty.
    #[serde(default)]
    pub to: String,
    /// While it runs. Otherwise it is stopped, moved and started.
    #[serde(default)]
    pub live: bool,
    /// Give it up, as long as the instance is on the old node.
    #[serde(default)]
    pub cancel: bool,
    /// Counter: grows by one with each migration asked for.
    #[serde(default)]
    pub generation: u64,
}

/// How far a migration is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum MigrationPhase {
    /// The target has its resources reserved and makes ready.
    #[default]
    Preparing,
    /// The target waits for the source.
    Ready,
    /// Disks and memory are on their way; the guest runs on the old node.
    Copying,
    /// The instance is on the new node; the old one still has something of it, or the new one has not reported yet.
    Finishing,
    /// On the new node, nothing is left on the old one.
    Done,
    /// Given up because somebody asked for that; the instance stayed where it was.
    Cancelled,
    /// Could not be done; the instance stayed where it was.
    Failed,
}

impl MigrationPhase {
    /// The word on the wire.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Preparing => "preparing",
            Self::Ready => "ready",
            Self::Copying => "copying",
            Self::Finishing => "finishing",
            Self::Done => "done",
            Self::Cancelled => "cancelled",
            Self::Failed => "failed",
        }
    }
    /// Before the switch: the instance is on the old node and both have its resources.
    #[must_use]
    pub const fn is_open(self) -> bool {
        matches!(self, Self::Preparing | Self::Ready | Self::Copying)
    }
    /// Nothing more happens.
    #[must_use]
    pub const fn is_over(self) -> bool {
        matches!(self, Self::Done | Self::Cancelled | Self::Failed)
    }
    /// Over without a move.
    #[must_use]
    pub const fn stayed(self) -> bool {
        matches!(self, Self::Cancelled | Self::Failed)
    }
}

impl fmt::Display for MigrationPhase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// A migration as it is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct MigrationStatus {
    /// `spec.migration.generation` that this is about.
    pub generation: u64,
    /// How far it is.
    pub phase: MigrationPhase,
    /// While it runs.
    pub live: bool,
    /// Node that it leaves.
    pub from: NodeId,
    /// Its name.
    pub from_name: String,
    /// Node that it moves to.
    pub to: NodeId,
    /// Its name.
    pub to_name: String,
    /// What is reserved on the target until the switch.
    pub resources: Resources,
    /// Where the target listens for the source.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address: Option<SocketAddr>,
    /// Bytes of disks and memory in all, as far as known.
    #[serde(default)]
    pub total: Size,
    /// Bytes left; grows when the guest writes faster than is sent.
    #[serde(default)]
    pub remaining: Size,
    /// How long the guest stood still for the switch, in milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub downtime_ms: Option<u64>,
    /// The guest runs (or rests, when it is switched off) on the new node.
    #[serde(default)]
    pub arrived: bool,
    /// Nothing of it is left on the old node.
    #[serde(default)]
    pub left: bool,
    /// Stable CamelCase reason of a failure.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub reason: String,
    /// For people.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub message: String,
    /// When it began.
    pub started_at: Timestamp,
    /// When it was over.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ended_at: Option<Timestamp>,
}

/// What an agent reports of a migration.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "step", rename_all = "snake_case")]
pub enum MigrationStep {
    /// Target: it waits for the source at this address.
    Prepared {
        /// Of the listener of its agent.
        address: SocketAddr,
    },
    /// Source: how far the copy is.
    Progress {
        /// Bytes in all.
        total: Size,
        /// Bytes left.
        remaining: Size,
    },
    /// Source: the guest stands still and the target has all of it. From the commit of this on the target owns it.
    HandOver {
        /// How long it had stood still when this was sent, in milliseconds.
        downtime_ms: Option<u64>,
    },
    /// Source or target, before the switch: it cannot be done.
    Failed {
        /// Stable code.
        reason: String,
        /// For people.
        message: String,
    },
    /// Target, after the switch: the guest is there as it should be.
    Arrived {},
    /// Source, after the switch: nothing is left.
    Left {},
}

impl MigrationStep {
    /// Whether a later report makes this one worthless.
    #[must_use]
    pub const fn is_progress(&self) -> bool {
        matches!(self, Self::Progress { .. })
    }
}
