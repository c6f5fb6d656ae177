//! What the other servers are told of this one.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Context, Result};
use oblak_control::Candidate;
use oblak_identity::pki;
use oblak_model::cluster::PROTOCOL;
use oblak_model::{ClusterServer, ServerId};
use oblak_platform::layout::Layout;
use oblak_platform::{clock, fsx, random};
use serde::{Deserialize, Serialize};

/// Addresses of this machine that are told when nothing else is known: more only make a client slower.
const ADDRESSES: usize = 4;

#[derive(Serialize, Deserialize)]
struct Kept {
    id: ServerId,
}

/// This server. Its id belongs to the data directory, which is locked: no other process has the same.
pub fn candidate(layout: &Layout, name: String, endpoints: Vec<String>, alone: bool) -> Result<Candidate> {
    let now = clock::system().now();
    let file = layout.server();
    let id = match fsx::read_json::<Kept>(&file).with_context(|| format!("cannot read {}", file.display()))? {
        Some(kept) => kept.id,
        None => {
            let id = ServerId(random::uuid7(random::system().as_ref(), now));
            fsx::write_json(&file, &Kept { id }).with_context(|| format!("cannot write {}", file.display()))?;
            id
        }
    };
    let server = ClusterServer {
        id,
        name,
        endpoints,
        version: env!("CARGO_PKG_VERSION").into(),
        protocol: PROTOCOL,
        started_at: now,
    };
    Ok(Candidate { server, alone })
}

/// Where others reach a server that listens there: under the names it was given, else at the address it listens on, else at those of this
/// machine.
pub fn endpoints(bound: SocketAddr, names: &[String]) -> Vec<String> {
    let url = |host: &str| match host.parse::<IpAddr>() {
        Ok(ip) => format!("https://{}", SocketAddr::new(ip, bound.port())),
        Err(_) => format!("https://{host}:{}", bound.port()),
    };
    if !names.is_empty() {
        return names.iter().map(|name| url(name)).collect();
    }
    if !bound.ip().is_unspecified() {
        return vec![url(&bound.ip().to_string())];
    }
    let local = pki::local_names().into_iter().filter_map(|name| name.parse::<IpAddr>().ok());
    let mut found: Vec<IpAddr> = local.filter(|ip| !ip.is_loopback() && (ip.is_ipv4() || bound.is_ipv6())).collect();
    found.sort();
    found.truncate(ADDRESSES);
    if found.is_empty() {
        return vec![super::running::local_url(bound)];
    }
    found.iter().map(|ip| url(&ip.to_string())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_says_where_it_is() {
        let at = |text: &str, names: &[&str]| {
            let names: Vec<String> = names.iter().map(ToString::to_string).collect();
            endpoints(text.parse().unwrap(), &names)
        };
        assert_eq!(at("10.0.0.7:7443", &[]), ["https://10.0.0.7:7443"]);
        assert_eq!(at("[2001:db8::7]:1", &[]), ["https://[2001:db8::7]:1"]);
        assert_eq!(at("0.0.0.0:1", &["api.example", "::1"]), ["https://api.example:1", "https://[::1]:1"]);
        let anywhere = at("0.0.0.0:1", &[]);
        assert!(!anywhere.is_empty() && anywhere.iter().all(|url| url.ends_with(":1") && !url.contains("0.0.0.0")));
    }

    #[test]
    fn it_stays_the_same_server() {
        let dir = tempfile::tempdir().unwrap();
        let layout = Layout::new(dir.path());
        let id = || candidate(&layout, "a".into(), Vec::new(), true).unwrap().server.id;
        assert_eq!(id(), id());
        std::fs::remove_file(layout.server()).unwrap();
        let other = id();
        assert_eq!(other, id());
    }
}
