//! The API server: the only door into the cloud.
//!
//! Invariant: stateless. Everything that must survive is in the store before it is acknowledged; what is kept in memory (cache, rate limits,
//! usage samples, tunnels) may be lost at any moment. Every request goes through [`oblak_identity::authorize`].
//!
//! Start reading at [`Server`], then `rest` (one generic implementation for all kinds), `kinds` (what is special about each), `node` (the
//! protocol of agents) and `stream` (console, exec, logs, ports through the agents' tunnels).

mod admin;
mod apply;
mod auth;
mod bootstrap;
mod cluster;
mod commit;
mod config;
mod docs;
mod draft;
mod error;
mod explain;
#[doc(hidden)]
pub mod fuzzing;
mod kinds;
mod limits;
mod members;
mod metrics;
mod middleware;
mod node;
pub mod openapi;
mod request;
mod rest;
mod routes;
mod server;
mod session;
mod state;
mod stream;
mod usage;

pub use auth::PeerNode;
pub use bootstrap::{ADMIN, Bootstrap, admin_token, bootstrap};
pub use config::{ApiConfig, Limits};
pub use error::ServerError;
pub use members::{Cluster, ClusterLook, Room};
pub use server::Server;
