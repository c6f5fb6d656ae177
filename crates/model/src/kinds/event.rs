//! Events: what happened to an object, for people.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::object::{Kind, Object, Scope};
use crate::time::Timestamp;
use crate::validate::Problems;

/// Kind of events.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EventKind;
/// Something that happened. Events are kept for a while, then dropped.
pub type Event = Object<EventKind>;

/// Whether somebody should look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Severity {
    /// All is well.
    #[default]
    Normal,
    /// Somebody should look.
    Warning,
}

/// The object an event is about.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
pub struct About {
    /// Kind.
    pub kind: String,
    /// Name.
    pub name: String,
    /// Id.
    pub id: Uuid,
}

/// What happened.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct EventSpec {
    /// To what.
    pub about: About,
    /// Whether somebody should look.
    #[serde(default)]
    pub severity: Severity,
    /// Stable CamelCase reason: `Scheduled`, `Started`, `DoesNotFit`, ...
    pub reason: String,
    /// For people.
    pub message: String,
    /// Who says so: `api`, `control`, `agent/<node>`.
    pub source: String,
    /// How often the same happened.
    #[serde(default)]
    pub count: u64,
    /// First time.
    #[serde(default)]
    pub first_at: Timestamp,
    /// Last time.
    #[serde(default)]
    pub last_at: Timestamp,
}

/// Nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct EventStatus {}

impl Kind for EventKind {
    const KIND: &'static str = "event";
    const PLURAL: &'static str = "events";
    const SCOPE: Scope = Scope::Project;
    const CREATABLE: bool = false;
    type Spec = EventSpec;
    type Status = EventStatus;
    fn validate(_: &EventSpec, _: &mut Problems) {}
    fn name_problem(_: &str) -> Option<String> {
        None
    }
}
