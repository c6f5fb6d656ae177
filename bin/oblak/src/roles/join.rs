//! `oblak join`: this machine becomes a node of a cloud elsewhere, or one more server of it ([`super::cluster::enter`]).
//!
//! ```text
//!   fetch the authority (nobody trusted yet) ──► its digest is that of the token? ──► from now on trust only it
//!     ──► send the secret, our public key, name and zone ──► certificate ──► kept ──► agent
//! ```
//! The secret is said to nobody who cannot prove to be of the pinned authority.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use oblak_client::{Auth, Client, ClientConfig, ClientError, introduce};
use oblak_identity::join::{JoinToken, Pin};
use oblak_model::members::{InspectJoinToken, JoinTokenFor};
use oblak_model::wire::{Heartbeat, NodeCertificate};
use oblak_model::{Code, JoinRole, Timestamp};
use oblak_platform::layout::Layout;
use oblak_platform::{clock, telemetry};
use serde::Serialize;

use super::cluster::{MemberFile, enter};
use super::credentials::{Credentials, joining_key};
use super::{agent, detach, layout, node_name, require_root, running, runtime, up};
use crate::args::{EtcdArgs, JoinArgs, UpArgs};

/// Certificates, leases and logs of machines whose clocks differ by more make no sense together.
const SKEW: Duration = Duration::from_secs(300);

#[derive(Serialize)]
struct Enroll<'a> {
    join_token: &'a str,
    csr_pem: &'a str,
    name: &'a str,
    zone: &'a str,
    labels: std::collections::BTreeMap<String, String>,
}

/// Runs the role.
pub fn run(args: &JoinArgs) -> Result<ExitCode> {
    require_root("oblak join")?;
    let layout = layout(&args.data)?;
    let hold = match running::take(&layout)? {
        Ok(hold) => hold,
        Err(Some(found)) if found.role == "agent" => {
            println!("this machine has joined already and its agent runs (process {})", found.process.pid);
            return Ok(ExitCode::SUCCESS);
        }
        Err(_) => {
            bail!("another oblak process serves {}; choose another directory with --data", layout.root().display())
        }
    };
    if MemberFile::load(&layout)?.is_some() {
        super::tell("this machine is a server of the cloud already; starting it");
        return as_server(args, &layout, hold);
    }
    let credentials = match runtime()?.block_on(become_node(args, &layout))? {
        Became::Node(credentials) => *credentials,
        Became::Server => return as_server(args, &layout, hold),
    };
    if args.detach {
        drop(hold);
        let data = layout.root().display().to_string();
        let mut words = vec!["agent".to_string(), "--data".into(), data];
        words.extend(["--underlay".to_string(), args.underlay.to_string()]);
        words.extend(args.recipes.iter().flat_map(|dir| ["--recipes".to_string(), dir.display().to_string()]));
        words.extend(args.pools.iter().flat_map(|pool| ["--shared-pool".to_string(), pool.to_string()]));
        words.extend(args.log_json.then(|| "--log-json".to_string()));
        return detach::start(&layout, words);
    }
    telemetry::init(args.log_json);
    let recipes = args.recipes.as_deref();
    let options = agent::Options { zone: String::new(), recipes, underlay: args.underlay, pools: &args.pools };
    agent::serve(&layout, &credentials, &options)
}

/// What this machine is now.
enum Became {
    Node(Box<Credentials>),
    Server,
}

/// From here on it is started like the first server.
fn as_server(args: &JoinArgs, layout: &Layout, hold: running::Hold) -> Result<ExitCode> {
    let server = &args.server_args;
    if args.detach {
        drop(hold);
        let words = std::env::args_os().skip(1).filter(|word| word != "--detach");
        return detach::start(layout, words);
    }
    let up = UpArgs {
        data: args.data.clone(),
        listen: server.listen,
        detach: false,
        node_name: args.node_name.clone(),
        zone: args.zone.clone().unwrap_or_else(|| "zone-1".into()),
        server_names: server.server_names.clone(),
        underlay: args.underlay,
        pools: args.pools.clone(),
        ha: server.ha.clone(),
        recipes: args.recipes.clone(),
        etcd: EtcdArgs { member_certificate_life: server.member_certificate_life, ..EtcdArgs::default() },
        node_certificate_life: None,
        no_context: server.no_context,
        log_json: args.log_json,
    };
    up::serve(&up, layout, &hold)
}

async fn become_node(args: &JoinArgs, layout: &Layout) -> Result<Became> {
    let token: Option<JoinToken> = args.token.as_deref().map(str::parse).transpose()?;
    let now = clock::system().now();
    let Some(found) = Credentials::load(layout)? else {
        let token = token.ok_or_else(|| {
            anyhow!(
                "this machine is not a node yet: give --token TOKEN; `oblak join-token create` on the cloud prints one"
            )
        })?;
        let name = node_name(args.node_name.as_deref())?;
        let (key_pem, csr_pem) = joining_key(layout)?;
        let client = introduced(args, &token).await?;
        let what: JoinTokenFor = client
            .post_json("/v1/cluster/join-token", &InspectJoinToken { join_token: token.secret().into() })
            .await
            .map_err(|e| explain(&args.server, e))?;
        if what.role == JoinRole::Server {
            enter::enter(args, layout, &client, &token, &name).await?;
            return Ok(Became::Server);
        }
        return enroll(args, layout, &client, &token, &name, key_pem, &csr_pem).await.map(node);
    };
    if let Some(token) = &token
        && Pin::of_pem(&found.ca_pem)? != token.pin
    {
        bail!(
            "this machine is node {:?} of another cloud ({}); use another --data directory, or remove {} to leave that cloud",
            found.name,
            found.server,
            layout.node().display()
        );
    }
    match token {
        Some(token) if found.has_ended(now) => {
            let csr_pem = oblak_identity::pki::node_request_with(&found.key_pem)?;
            let client = introduced(args, &token).await?;
            enroll(args, layout, &client, &token, &found.name, found.key_pem.clone(), &csr_pem).await.map(node)
        }
        None if found.has_ended(now) => bail!(
            "the certificate of this node ended at {}; its guests run on; give --token TOKEN with a new token of `oblak join-token create`",
            found.expires_at
        ),
        _ => {
            still_member(args, layout, &found).await?;
            let found = Credentials { server: args.server.clone(), ..found };
            found.save(layout)?;
            super::tell(&format!("this machine is node {:?} already; starting its agent", found.name));
            Ok(node(found))
        }
    }
}

/// A node that was removed is told so here and not only in the log of its agent. Whatever else is wrong, the agent tries again by itself.
async fn still_member(args: &JoinArgs, layout: &Layout, found: &Credentials) -> Result<()> {
    let auth = Auth::Certificate { cert_pem: found.certificate_pem.clone(), key_pem: found.key_pem.clone() };
    let config =
        ClientConfig { timeout: Duration::from_secs(5), ..ClientConfig::new(&args.server, &found.ca_pem, auth) };
    // No lease has the epoch 0, so this renews nothing.
    match Client::new(&config)?.node_heartbeat(found.id, &Heartbeat::default()).await {
        Err(error) if error.code() == Some(Code::NodeRemoved) => bail!(
            "this machine was node {:?} and was removed from the cloud; guests that are left in {} are not known to the cloud any more. To join again as a new node remove {} and repeat with a new token",
            found.name,
            layout.root().display(),
            layout.node().join("node.json").display()
        ),
        _ => Ok(()),
    }
}

fn node(credentials: Credentials) -> Became {
    Became::Node(Box::new(credentials))
}

/// A client that trusts only the authority that the token pins.
async fn introduced(args: &JoinArgs, token: &JoinToken) -> Result<Client> {
    let seen = introduce(&args.server).await.map_err(|e| explain(&args.server, e))?;
    if let Some(problem) = seen.now.and_then(|theirs| clock_problem(clock::system().now(), theirs)) {
        bail!("{problem}");
    }
    let pin = Pin::of_pem(&seen.ca_pem).with_context(|| format!("{} is no server of Oblak", args.server))?;
    if pin != token.pin {
        bail!(
            "{} is not the cloud that this token is for: its authority has the digest {pin}, the token says {}. Either the token is of another cloud, or somebody stands between this machine and the server (man in the middle). Nothing secret was sent",
            args.server,
            token.pin
        );
    }
    Ok(Client::new(&ClientConfig::new(&args.server, &seen.ca_pem, Auth::None))?)
}

async fn enroll(
    args: &JoinArgs,
    layout: &Layout,
    client: &Client,
    token: &JoinToken,
    name: &str,
    key_pem: String,
    csr_pem: &str,
) -> Result<Credentials> {
    let body = Enroll {
        join_token: token.secret(),
        csr_pem,
        name,
        zone: args.zone.as_deref().unwrap_or_default(),
        labels: args.labels.iter().cloned().collect(),
    };
    let issued: NodeCertificate =
        client.post_json("/v1/nodes/enroll", &body).await.map_err(|e| explain(&args.server, e))?;
    if Pin::of_pem(&issued.ca_pem)? != token.pin {
        bail!("the server answered with another authority than it has; it must be upgraded or is not what it says");
    }
    let credentials = Credentials::of(&args.server, name, key_pem, issued);
    credentials.save(layout)?;
    super::tell(&format!("joined {} as node {:?}", args.server, credentials.name));
    Ok(credentials)
}

/// What a person can do about an error of the first calls.
fn explain(server: &str, error: ClientError) -> anyhow::Error {
    let ClientError::Unreachable { reason, .. } = &error else { return error.into() };
    let has = |word: &str| reason.contains(word);
    if has("not valid for name") || has("NotValidForName") {
        let hint = "use one of the names of its certificate, or start the server with --server-name for this one";
        return anyhow!("{error}; {hint}");
    }
    if has("expired") || has("not valid yet") || has("Expired") || has("NotValidYet") {
        return anyhow!("{error}; look at the clocks of both machines (`timedatectl`)");
    }
    if has("certificate") || has("UnknownIssuer") || has("BadSignature") {
        return anyhow!(
            "the server at {server} shows the right authority but cannot prove to be of it ({reason}): somebody may stand between this machine and the server (man in the middle). Nothing secret was sent"
        );
    }
    anyhow!(
        "{error}; is the server up, does it listen on that address (not only on 127.0.0.1), and does a firewall let its port through?"
    )
}

/// What is wrong with our clock or theirs.
fn clock_problem(ours: Timestamp, theirs: Timestamp) -> Option<String> {
    let (ahead, by) = if ours > theirs { (true, ours.since(theirs)) } else { (false, theirs.since(ours)) };
    if by <= SKEW {
        return None;
    }
    let by = oblak_model::Span(by);
    let side = if ahead { "ahead of" } else { "behind" };
    Some(format!(
        "the clock of this machine is {by} {side} that of the server (here {ours}, there {theirs}); set the wrong one right, for example with `timedatectl set-ntp true`, and try again"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clocks_that_differ_too_much_are_named() {
        let at = |seconds: i64| Timestamp::from_micros(seconds * 1_000_000);
        assert_eq!(clock_problem(at(1000), at(1000)), None);
        assert_eq!(clock_problem(at(1000), at(1299)), None);
        let text = clock_problem(at(1000), at(1000 + 7200)).unwrap();
        assert!(text.contains("2h behind that of the server"), "{text}");
        assert!(clock_problem(at(400_000), at(0)).unwrap().contains("4d ahead of"));
    }

    #[test]
    fn errors_say_what_to_do() {
        let of = |reason: &str| {
            let error = ClientError::Unreachable { server: "https://s:1".into(), reason: reason.into() };
            explain("https://s:1", error).to_string()
        };
        assert!(of("Connection refused (os error 111)").contains("is the server up"));
        assert!(of("invalid peer certificate: UnknownIssuer").contains("man in the middle"));
        assert!(of("invalid peer certificate: certificate not valid for name \"s\"").contains("--server-name"));
        assert!(of("invalid peer certificate: certificate not valid yet").contains("clocks"));
    }
}
