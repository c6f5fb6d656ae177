//! What a plan consists of.

use oblak_model::wire::NewEvent;
use oblak_model::{About, Kind, Object, Severity};

use crate::lifecycle::Ops;

/// One change: committed as a whole, together with others where they fit.
#[derive(Debug, Clone, Default)]
pub struct Change {
    /// Guards and writes.
    pub ops: Ops,
    /// What people are told when it is committed.
    pub events: Vec<NewEvent>,
}

impl Change {
    /// A change of one object.
    pub fn update<K: Kind>(object: &Object<K>) -> Self {
        let mut change = Self::default();
        change.ops.update(object);
        change
    }

    /// Tells people about it.
    #[must_use]
    pub fn event(mut self, event: NewEvent) -> Self {
        self.events.push(event);
        self
    }
}

/// An event about an object.
pub fn event<K: Kind>(object: &Object<K>, severity: Severity, reason: &str, message: impl Into<String>) -> NewEvent {
    NewEvent {
        project: object.metadata.project.clone(),
        about: About { kind: K::KIND.into(), name: object.metadata.name.clone(), id: object.metadata.id },
        severity,
        reason: reason.into(),
        message: message.into(),
    }
}
