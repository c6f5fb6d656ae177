//! The store on an etcd cluster, for control planes of more than one machine. Commits are etcd transactions, revisions are etcd's.
//!
//! Invariant: no transaction takes effect twice, or after its outcome was told; an answer from another etcd cluster than the one that was
//! opened is never believed; what a watch delivers was read from the log of etcd, never guessed from what this process wrote.
//!
//! Start reading at `keys` (what lies in etcd), then `commit`, then `hub`. The reasons are in `docs/decisions/0006-etcd-store.md`.

pub mod admin;
mod cluster;
mod commit;
mod failure;
mod hub;
mod janitor;
mod keys;
mod leases;
pub mod members;
mod meta;
mod options;
mod read;
mod store;
pub mod supervise;
mod tail;
#[cfg(feature = "testing")]
pub mod testing;
#[cfg(test)]
mod tests;
mod watcher;

pub use options::{EtcdOptions, Tls};
pub use store::EtcdStore;
