//! The scheduler: which node an instance should run on, or exactly why none will do.
//!
//! Invariant: pure. No I/O, no clock, no randomness, no threads: the same world and the same request give the same
//! answer, whatever order the world was built in. It never promises more of a node than allocatable x overcommit, and
//! all arithmetic on quantities is checked or saturating integer arithmetic.
//!
//! Start reading at [`World`] (what is known; changed as events arrive), then [`decide`] (the answer) and
//! [`explain`] (the refusal). Inside:
//!
//! - `classes`: nodes that conditions cannot tell apart form a class; conditions are bit sets over classes.
//! - `tree`: within a class, nodes are ordered by the free share of their scarcest resource, with the most free room
//!   of every subtree, so the best node that has room is found in a few steps.
//! - `groups`: instances of a project with equal labels, counted per node and zone, answer affinity.
//! - `query`: a request resolved against these indexes; `decide` searches, `explain` counts.
//!
//! **Exactness.** The ranking by score is the one that looking at every node would give, for both strategies and any mix
//! of wishes; nothing is sampled. What is a heuristic is the score itself: placing one request at a time is not optimal
//! bin packing. [`bench::packing`] compares it with exhaustive best fits.
//!
//! **Not symmetric.** Affinity rules bind the request that carries them. Give all members of a group the same rule.

mod amount;
mod balance;
pub mod bench;
mod classes;
mod decide;
mod explain;
mod groups;
mod hash;
mod ids;
mod instances;
mod labels;
mod node;
mod query;
mod request;
mod slots;
mod tree;
mod verify;
mod world;

pub use amount::{Overcommit, PPM, Resource, Resources, Round, format_bytes, format_cpu};
pub use balance::{Advice, Fullness, LEAST_GAIN, Move, balance};
pub use decide::{Alternative, Decision, NEARLY, Unplaced, WINDOW, Why, decide, decide_batch, find, plan};
pub use explain::{Condition, Explanation, RuledOut, explain};
pub use ids::{ImageId, InstanceId, NodeId, ParseIdError, ProjectId, VolumeId};
pub use labels::{LabelRule, ParseRuleError};
pub use node::{Isolation, NodeSpec, NodeState, Support};
pub use request::{AffinityRule, Direction, Request, Strategy, Strength, Topology, VolumeRef};
pub use world::{Placement, Usage, World, WorldError};

/// What it is worth that the node has the image already: as much as 5 % of fullness.
pub const IMAGE_BONUS: i64 = 50_000;

/// What it is worth that the node has the data of a volume in `near_volumes`: as much as 20 % of fullness.
pub const VOLUME_BONUS: i64 = 200_000;
