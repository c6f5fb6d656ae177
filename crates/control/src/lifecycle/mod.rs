//! Plans that more than one part of the control plane carries out: placing, resizing and removing an instance, events, idempotency records.
//!
//! Invariant: pure. Objects in, guards and writes out; no I/O, no clock, no types of HTTP.

mod assign;
mod batch;
mod events;
mod finalize;
mod idempotency;
mod migrate;
mod relocate;
mod world;

pub(crate) use assign::sub;
pub use assign::{Assignment, assign_instance, host_port_ops, resize};
pub use batch::{Batch, Ops};
pub use events::{EVENT_FOLD, Recent, event_ops, new_event};
pub use finalize::{InstanceParts, finalize_instance, release_volume};
pub use idempotency::{IDEMPOTENCY_LIFE, IdempotencyRecord, idempotency_key, idempotency_prefix};
pub use migrate::{Switch, give_up, refuse, reserve, switch};
pub use relocate::{Relocation, relocate};
pub use world::{DEFAULT_STRATEGY, build_world, explanation, node_spec, project_id, request, scheduler_id};
pub(crate) use world::{image_nodes, places_of};

#[cfg(test)]
mod tests;
