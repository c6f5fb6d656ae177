//! `oblak join` with a token of role `server`: the keys of the cloud come here, then this machine is a member of etcd.
//!
//! ```text
//!   own secret on disk ──► asked with it and the token ──► keys, then member.json on disk ──► etcd, API and agent as `up` starts them
//! ```
//! A crash anywhere is healed by joining again: with the same secret the cloud gives the same place and the same keys. `member.json` comes last;
//! once it is there this machine is a server and needs no token.

use std::net::{SocketAddr, ToSocketAddrs};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use oblak_client::{Client, ClientError};
use oblak_identity::join::JoinToken;
use oblak_identity::members::Keys;
use oblak_model::Code;
use oblak_model::members::{JoinServer, ServerAdmitted};
use oblak_platform::layout::Layout;
use oblak_platform::{clock, fsx, random};
use oblak_store_etcd::supervise::{Founding, probe};
use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use super::file::{MemberFile, address_towards, dir};
use crate::args::JoinArgs;

const JOINING: &str = "joining.json";
/// How long a place is waited for that is not free yet: the server before this one may still be copying.
const PLACE: Duration = Duration::from_secs(120);
const PAUSE: Duration = Duration::from_secs(1);

/// Answers that stay the same when asked again.
const REFUSED: &[Code] =
    &[Code::JoinTokenUnknown, Code::JoinTokenExpired, Code::JoinTokenUsed, Code::NameTaken, Code::Forbidden];

/// What this machine joins as, kept until it has joined.
#[derive(Clone, Serialize, Deserialize)]
struct Joining {
    key: String,
    name: String,
    peer_url: String,
}

/// Becomes a server. `client` trusts only the authority that the token pins.
pub async fn enter(
    args: &JoinArgs,
    layout: &Layout,
    client: &Client,
    token: &JoinToken,
    name: &str,
) -> Result<MemberFile> {
    // Before anybody reserves a place for it.
    probe()?;
    if layout.store().join("oblak.redb").exists() || layout.pki().join("ca.key").exists() {
        let there = Keys::load(&layout.pki()).ok().map(|keys| oblak_identity::join::Pin::of_pem(&keys.ca_pem));
        if there.is_none_or(|pin| pin.ok() != Some(token.pin)) || layout.store().join("oblak.redb").exists() {
            bail!(
                "{} is the directory of another cloud's server; use another one with --data",
                layout.root().display()
            );
        }
    }
    let mut file = wanted(args, name)?;
    let joining = joining(layout, &file)?;
    let admitted = match ask(client, token, &joining).await {
        Err(ClientError::Api(problem)) if REFUSED.contains(&problem.code) => {
            // This machine has no place under this name, so nothing is kept for another attempt.
            fsx::remove_file_if_exists(&dir(layout).join(JOINING)).context("cannot tidy up")?;
            return Err(ClientError::Api(problem).into());
        }
        answer => answer.context("the cloud has no place for this server")?,
    };
    let keys = Keys {
        ca_pem: admitted.ca_pem,
        ca_key_pem: admitted.ca_key_pem,
        etcd_ca_pem: Some(admitted.etcd_ca_pem),
        etcd_ca_key_pem: Some(admitted.etcd_ca_key_pem),
    };
    if oblak_identity::join::Pin::of_pem(&keys.ca_pem)? != token.pin {
        bail!("the server answered with another authority than it has; it must be upgraded or is not what it says");
    }
    keys.install(&layout.pki(), clock::system().now())?;
    let members = admitted.members.into_iter().map(|member| (member.name, member.peer_url)).collect();
    file.founding = Founding::Joining { members };
    file.prefix = admitted.prefix;
    file.quota_bytes = admitted.quota_bytes;
    file.endpoints = admitted.endpoints;
    file.save(layout)?;
    fsx::remove_file_if_exists(&dir(layout).join(JOINING)).context("cannot tidy up after joining")?;
    crate::roles::tell(&format!("joined {} as server {name:?}", args.server));
    Ok(file)
}

fn wanted(args: &JoinArgs, name: &str) -> Result<MemberFile> {
    let server = &args.server_args;
    let address = match server.advertise {
        Some(address) => address,
        None => towards(&args.server)?,
    };
    Ok(MemberFile {
        name: name.into(),
        address,
        client_port: server.client_port,
        peer_port: server.peer_port,
        founding: Founding::Joining { members: Vec::new() },
        founded: false,
        prefix: String::new(),
        quota_bytes: 0,
        endpoints: Vec::new(),
        first_incarnation: 1,
        filling: None,
        removed: false,
    })
}

/// The address from which the server is reached: the other servers can most likely reach it too.
fn towards(url: &str) -> Result<std::net::IpAddr> {
    let rest = url.trim_start_matches("https://").trim_end_matches('/');
    let with_port = if rest.rsplit_once(':').is_some_and(|(_, port)| port.parse::<u16>().is_ok()) {
        rest.to_owned()
    } else {
        format!("{rest}:443")
    };
    let resolved: Vec<SocketAddr> =
        with_port.to_socket_addrs().with_context(|| format!("cannot resolve {rest}"))?.collect();
    let found = resolved.into_iter().find_map(address_towards);
    found.context("cannot tell at which address other servers reach this machine; give --advertise ADDRESS")
}

/// Who joins. An attempt that was interrupted goes on as who it was.
fn joining(layout: &Layout, file: &MemberFile) -> Result<Joining> {
    let path = dir(layout).join(JOINING);
    let known: Option<Joining> = fsx::read_json(&path).context("cannot read what was joined as before")?;
    if let Some(known) = known
        && known.name == file.name
        && known.peer_url == file.peer_url()
    {
        return Ok(known);
    }
    let random = random::system();
    let mut bytes = [0u8; 32];
    random.fill(&mut bytes);
    let key = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    let joining = Joining { key, name: file.name.clone(), peer_url: file.peer_url() };
    fsx::create_dir_private(&dir(layout), 0o700).context("cannot make the directory of etcd")?;
    fsx::write_json(&path, &joining).with_context(|| format!("cannot write {}", path.display()))?;
    Ok(joining)
}

async fn ask(client: &Client, token: &JoinToken, joining: &Joining) -> Result<ServerAdmitted, ClientError> {
    let body = JoinServer {
        join_token: token.secret().into(),
        key: joining.key.clone(),
        name: joining.name.clone(),
        peer_url: joining.peer_url.clone(),
    };
    let end = Instant::now() + PLACE;
    let mut told = false;
    loop {
        let error = match client.post_json("/v1/cluster/join", &body).await {
            Ok(admitted) => return Ok(admitted),
            Err(error) => error,
        };
        let wait = matches!(&error, ClientError::Api(problem) if problem.code == Code::Unavailable);
        if !wait || Instant::now() >= end {
            return Err(error);
        }
        if !told {
            told = true;
            crate::roles::tell(&format!("waiting for a place among the servers: {error}"));
        }
        tokio::time::sleep(PAUSE).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_address_is_the_one_towards_the_server() {
        assert_eq!(towards("https://127.0.0.1:7443").unwrap(), "127.0.0.1".parse::<std::net::IpAddr>().unwrap());
        assert!(towards("https://localhost/").unwrap().is_loopback());
    }
}
