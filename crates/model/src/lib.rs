//! The words of Oblak as types: every resource kind with its spec and status, ids, names, sizes, times, errors.
//!
//! Invariant: no I/O, no async, no clock and no randomness of its own. Everything here is data and pure functions.
//!
//! Start reading at [`object::Object`] and [`object::Kind`]; each kind has a module of its own below `kinds`.

pub mod cluster;
pub mod error;
pub mod explain;
pub mod id;
pub mod kinds;
pub mod members;
pub mod meta;
pub mod name;
pub mod object;
pub mod selector;
pub mod size;
pub mod time;
pub mod validate;
pub mod wire;

pub use cluster::{ClusterLeader, ClusterServer, ClusterServers};
pub use error::{ApiError, Code};
pub use id::*;
pub use kinds::*;
pub use meta::{Condition, Metadata, Revision};
pub use object::{Kind, List, Object, Scope};
pub use size::Size;
pub use time::{Span, Timestamp};
pub use validate::{Problem, Problems};
