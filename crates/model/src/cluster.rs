//! The servers of a cloud: who they are, where they answer, and which of them leads.
//!
//! Every server keeps a [`ClusterServer`] in the store under its own lease, so the list shows who is alive. One of them leads: it runs the
//! reconcilers. All of them serve the API.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::id::ServerId;
use crate::time::Timestamp;

/// Version of what servers and agents say to each other.
pub const PROTOCOL: u32 = 1;

/// A server that is alive.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ClusterServer {
    /// Stays the same when the server is restarted; belongs to its data directory.
    pub id: ServerId,
    /// Name for people: the host's, unless one was given.
    pub name: String,
    /// Where clients and agents reach it, best first: `https://host:port`.
    pub endpoints: Vec<String>,
    /// Version of the program.
    pub version: String,
    /// Newest protocol between servers and agents that it speaks.
    pub protocol: u32,
    /// When its process started.
    pub started_at: Timestamp,
}

/// The server that runs the reconcilers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ClusterLeader {
    /// Which.
    pub server: ServerId,
    /// Grows by one with every election; two leaders never have the same.
    pub epoch: u64,
    /// Since when.
    pub since: Timestamp,
}

/// `GET /v1/cluster/servers`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ClusterServers {
    /// Those whose lease is alive, in order of their ids.
    pub servers: Vec<ClusterServer>,
    /// The leader; null while one is being elected, or when the last one has just died.
    pub leader: Option<ClusterLeader>,
}

impl ClusterServers {
    /// Every endpoint once, the first of each server before the second of any.
    #[must_use]
    pub fn endpoints(&self) -> Vec<String> {
        let most = self.servers.iter().map(|s| s.endpoints.len()).max().unwrap_or(0);
        let mut all: Vec<String> = Vec::new();
        for endpoint in (0..most).flat_map(|n| self.servers.iter().filter_map(move |s| s.endpoints.get(n))) {
            if !all.contains(endpoint) {
                all.push(endpoint.clone());
            }
        }
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoints_are_interleaved_and_named_once() {
        let server = |n: u128, endpoints: &[&str]| ClusterServer {
            id: ServerId(uuid::Uuid::from_u128(n)),
            name: format!("s{n}"),
            endpoints: endpoints.iter().map(ToString::to_string).collect(),
            version: "1".into(),
            protocol: PROTOCOL,
            started_at: Timestamp::default(),
        };
        let servers = vec![server(1, &["a", "b"]), server(2, &[]), server(3, &["c", "a", "d"])];
        let all = ClusterServers { servers, leader: None };
        assert_eq!(all.endpoints(), ["a", "c", "b", "d"]);
        assert!(ClusterServers::default().endpoints().is_empty());
    }
}
