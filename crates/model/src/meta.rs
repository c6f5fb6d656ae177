//! What every object carries: identity, labels, generation and revision.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::str::FromStr;

use schemars::JsonSchema;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use uuid::Uuid;

use crate::time::Timestamp;

/// A point in the history of the store. Opaque to users: only equality and order within one incarnation mean anything.
///
/// The incarnation grows when a store is restored from a backup, so revisions seen before the restore are recognised as foreign.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Revision {
    /// Which life of the store; starts at 1.
    pub incarnation: u32,
    /// Counter of commits within that life.
    pub n: u64,
}

impl Revision {
    /// Before the first commit of any store.
    pub const ZERO: Self = Self { incarnation: 0, n: 0 };

    /// A revision from its parts.
    #[must_use]
    pub const fn new(incarnation: u32, n: u64) -> Self {
        Self { incarnation, n }
    }
}

impl fmt::Display for Revision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.incarnation, self.n)
    }
}

/// The text was not of the form `<incarnation>-<n>`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a revision; expected two numbers such as \"1-42\"")]
pub struct ParseRevisionError(String);

impl FromStr for Revision {
    type Err = ParseRevisionError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let bad = || ParseRevisionError(text.chars().take(64).collect());
        let (incarnation, n) = text.split_once('-').ok_or_else(bad)?;
        Ok(Self { incarnation: incarnation.parse().map_err(|_| bad())?, n: n.parse().map_err(|_| bad())? })
    }
}

impl Serialize for Revision {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Revision {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        std::borrow::Cow::<str>::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

impl JsonSchema for Revision {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Revision".into()
    }
    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        schemars::json_schema!({"type": "string", "pattern": "^[0-9]+-[0-9]+$", "description": "Opaque point in history; use it for If-Match and watch."})
    }
}

/// Labels: short key, short value. See [`crate::validate::labels`] for the limits.
pub type Labels = BTreeMap<String, String>;

/// The part of an object that is the same for every kind. Every field down to `created_at` is always written, also when it is empty:
/// scripts find the same shape everywhere.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Metadata {
    /// Unique for ever. UUID version 7, given by the server.
    #[serde(default)]
    pub id: Uuid,
    /// Unique among the objects of the same kind in the same project. Does not change.
    #[serde(default)]
    pub name: String,
    /// The project that owns the object; null for kinds of the whole cloud.
    #[serde(default)]
    pub project: Option<String>,
    /// Free labels, for selection.
    #[serde(default)]
    pub labels: Labels,
    /// Grows by one with every change of `spec`.
    #[serde(default)]
    pub generation: u64,
    /// Changes with every change of the object; the ETag.
    #[serde(default)]
    pub revision: Revision,
    /// When the server accepted the object.
    #[serde(default)]
    pub created_at: Timestamp,
    /// When deletion was asked for. The object goes away when `finalizers` is empty.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deleted_at: Option<Timestamp>,
    /// Who still has to clean up before the object may go away.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub finalizers: BTreeSet<String>,
}

impl Metadata {
    /// Whether deletion has been asked for.
    #[must_use]
    pub fn is_deleting(&self) -> bool {
        self.deleted_at.is_some()
    }
}

/// One fact about an object: what, whether, why and since when.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Condition {
    /// CamelCase name of the fact, for example `DiskFull`.
    #[serde(rename = "type")]
    pub kind: String,
    /// Whether the fact holds.
    pub status: bool,
    /// Stable CamelCase reason.
    pub reason: String,
    /// For people: what happened and what can be done.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub message: String,
    /// When `status` last changed.
    pub at: Timestamp,
}

/// Sets a condition: replaces the one of the same type; keeps its time when the truth of it did not change.
pub fn set_condition(conditions: &mut Vec<Condition>, new: Condition) {
    if let Some(old) = conditions.iter_mut().find(|c| c.kind == new.kind) {
        let at = if old.status == new.status { old.at } else { new.at };
        *old = Condition { at, ..new };
    } else {
        conditions.push(new);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn revision_prints_and_parses() {
        let r = Revision::new(3, 17);
        assert_eq!(r.to_string(), "3-17");
        assert_eq!("3-17".parse::<Revision>().unwrap(), r);
        assert!("3".parse::<Revision>().is_err());
        assert!("a-b".parse::<Revision>().is_err());
        assert_eq!(serde_json::to_string(&r).unwrap(), "\"3-17\"");
    }
}
