//! Events: the same thing that happens again within a while is counted, not repeated.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use oblak_model::wire::NewEvent;
use oblak_model::{Event, EventKind, EventSpec, Timestamp};
use oblak_store::objects;
use uuid::Uuid;

use super::batch::Ops;

/// The same event within this time of its last occurrence is counted.
pub const EVENT_FOLD: Duration = Duration::from_secs(600);
/// Events remembered for folding; forgetting one early only makes a second event.
const REMEMBERED: usize = 1024;
/// Longest message of an event in bytes; more is cut.
const MESSAGE_BYTES: usize = 2048;

/// An event object that nothing has been folded into.
#[must_use]
pub fn new_event(id: Uuid, new: &NewEvent, source: &str, now: Timestamp) -> Event {
    let mut message = new.message.clone();
    if message.len() > MESSAGE_BYTES {
        let end = (0..=MESSAGE_BYTES).rev().find(|at| message.is_char_boundary(*at)).unwrap_or(0);
        message.truncate(end);
    }
    let mut event = Event::new(
        &id.to_string(),
        EventSpec {
            about: new.about.clone(),
            severity: new.severity,
            reason: new.reason.clone(),
            message,
            source: source.into(),
            count: 1,
            first_at: now,
            last_at: now,
        },
    );
    event.metadata.id = id;
    event.metadata.project.clone_from(&new.project);
    event.metadata.created_at = now;
    event.metadata.generation = 1;
    event
}

/// Writes an event. Without guard: two writers of one event could at worst lose a count.
#[must_use]
pub fn event_ops(event: &Event) -> Ops {
    let mut ops = Ops::new();
    ops.put(objects::object_key::<EventKind>(event.scope_key(), event.metadata.id), objects::encode(event));
    ops
}

type Sameness = (Uuid, String, String);

/// Remembers recent events, so that the next one of the same kind is folded into them. One per writing process, in memory only.
#[derive(Debug, Default)]
pub struct Recent {
    seen: BTreeMap<Sameness, Event>,
    order: VecDeque<Sameness>,
}

impl Recent {
    /// Remembers nothing yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// The event to write: a new one under `id`, or the one of before with its count raised.
    pub fn note(&mut self, id: Uuid, new: &NewEvent, source: &str, now: Timestamp) -> Event {
        let fresh = new_event(id, new, source, now);
        let sameness = (new.about.id, fresh.spec.reason.clone(), fresh.spec.message.clone());
        if let Some(event) = self.seen.get_mut(&sameness)
            && now.since(event.spec.last_at) <= EVENT_FOLD
        {
            event.spec.count = event.spec.count.saturating_add(1);
            event.spec.last_at = now;
            return event.clone();
        }
        if self.seen.insert(sameness.clone(), fresh.clone()).is_none() {
            self.order.push_back(sameness);
        }
        if self.order.len() > REMEMBERED
            && let Some(oldest) = self.order.pop_front()
        {
            self.seen.remove(&oldest);
        }
        fresh
    }
}
