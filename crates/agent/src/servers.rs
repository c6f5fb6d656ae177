//! The servers of the cloud, as this node knows them: learnt from whichever answers, kept on disk for the next start.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use oblak_model::{ClusterServer, ServerId};
use oblak_platform::fsx;
use oblak_platform::layout::Layout;

use crate::backoff::Backoff;
use crate::context::Context;

/// How often it is asked which servers there are. A server that is away is noticed by its silence, not here.
const LEARN: Duration = Duration::from_secs(10);

/// What is known of the servers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Servers {
    /// The address at which the lease is kept; empty before the first heartbeat.
    pub home: String,
    /// All that are alive.
    pub all: Vec<ClusterServer>,
}

/// Where a tunnel goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum End {
    /// To the server where the lease is kept, by the address that works.
    Home,
    /// To this server.
    Server(ServerId),
}

impl Servers {
    /// One tunnel to each server, with the addresses to try. A single server is reached where it was found, and so is one that is not in
    /// the list under the address that we use.
    pub fn ends(&self) -> BTreeMap<End, Vec<String>> {
        let mut ends = BTreeMap::new();
        if self.all.len() > 1 {
            ends.extend(self.all.iter().map(|server| (End::Server(server.id), server.endpoints.clone())));
        }
        if !self.home.is_empty() && !ends.values().flatten().any(|url| *url == self.home) {
            ends.insert(End::Home, vec![self.home.clone()]);
        }
        ends
    }
}

fn file(layout: &Layout) -> PathBuf {
    layout.node().join("servers.json")
}

fn keep(layout: &Layout, endpoints: &[String]) -> std::io::Result<()> {
    fsx::create_dir_private(&layout.node(), 0o700)?;
    fsx::write_json(&file(layout), &endpoints)
}

/// The addresses that were known when the agent ran last.
#[must_use]
pub fn known_servers(layout: &Layout) -> Vec<String> {
    // Only a help: without it the one that the node joined is asked.
    fsx::read_json(&file(layout)).ok().flatten().unwrap_or_default()
}

/// Notes at which server the lease is kept.
pub fn note_home(ctx: &Context) {
    let home = ctx.client.server();
    ctx.servers.send_if_modified(|servers| {
        let moved = servers.home != home;
        servers.home = home;
        moved
    });
}

/// Asks which servers there are, until the agent ends.
pub async fn run(ctx: Arc<Context>) {
    let mut backoff = Backoff::new(Duration::from_millis(500), LEARN);
    let mut kept = known_servers(&ctx.config.layout);
    while !ctx.cancel.is_cancelled() {
        let pause = match ctx.client.cluster_servers().await {
            Ok(found) => {
                let endpoints = found.endpoints();
                ctx.client.learn(endpoints.iter().cloned());
                ctx.servers.send_if_modified(|servers| {
                    let changed = servers.all != found.servers;
                    servers.all = found.servers;
                    changed
                });
                if !endpoints.is_empty() && endpoints != kept {
                    match keep(&ctx.config.layout, &endpoints) {
                        Ok(()) => kept = endpoints,
                        Err(error) => tracing::warn!(%error, "cannot write down where the servers are"),
                    }
                }
                backoff.reset();
                LEARN
            }
            // Before it is registered a node may be told that it does not exist; older servers have no list.
            Err(error) => {
                tracing::debug!(%error, "it is not known which servers there are");
                backoff.next()
            }
        };
        tokio::select! { biased; () = ctx.cancel.cancelled() => return, () = tokio::time::sleep(pause) => {} }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use oblak_model::Timestamp;

    fn server(n: u128, endpoints: &[&str]) -> ClusterServer {
        ClusterServer {
            id: ServerId(uuid::Uuid::from_u128(n)),
            name: format!("s{n}"),
            endpoints: endpoints.iter().map(ToString::to_string).collect(),
            version: "1".into(),
            protocol: 1,
            started_at: Timestamp::default(),
        }
    }

    #[test]
    fn one_tunnel_to_each_server() {
        let ends = |home: &str, all: Vec<ClusterServer>| {
            let ends = Servers { home: home.into(), all }.ends();
            ends.into_values().map(|urls| urls.join(" ")).collect::<Vec<_>>()
        };
        assert!(ends("", vec![]).is_empty());
        assert_eq!(ends("h", vec![]), ["h"], "an older server has no list");
        assert_eq!(ends("h", vec![server(1, &["a"])]), ["h"], "the only server is at home");
        let two = || vec![server(1, &["a", "h"]), server(2, &["b"])];
        assert_eq!(ends("h", two()), ["a h", "b"]);
        assert_eq!(ends("x", two()), ["x", "a h", "b"], "behind an address that only we know");
    }
}
