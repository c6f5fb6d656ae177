//! `oblak agent`: one node of a server elsewhere.

use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use oblak_agent::{Agent, AgentConfig, UnderlayChoice};
use oblak_client::{Auth, Client, ClientConfig};
use oblak_model::wire::NodeCertificate;
use oblak_platform::layout::Layout;
use oblak_platform::{clock, telemetry};
use serde::Serialize;

use super::credentials::{Credentials, joining_key};
use super::{layout, node_name, require_root, running, runtime, shutdown_on_signal};
use crate::args::{AgentArgs, PoolArg};
use crate::drivers;
use crate::peers::Peers;

/// What a person says about a node.
pub struct Options<'a> {
    /// Zone of a new node.
    pub zone: String,
    /// Directory of the image recipes.
    pub recipes: Option<&'a Path>,
    /// Where tunnels begin.
    pub underlay: UnderlayChoice,
    /// Pools that other nodes have too.
    pub pools: &'a [PoolArg],
}

/// An agent with the real drivers.
pub fn assemble(
    layout: &Layout,
    url: &str,
    credentials: &Credentials,
    name: &str,
    options: &Options<'_>,
) -> Result<Agent> {
    let auth =
        Auth::Certificate { cert_pem: credentials.certificate_pem.clone(), key_pem: credentials.key_pem.clone() };
    let mut target = ClientConfig::new(url, credentials.ca_pem.clone(), auth);
    target.others = oblak_agent::known_servers(layout);
    let client = Client::new(&target)?;
    let mut config = AgentConfig::new(credentials.id, name, layout.clone());
    config.zone.clone_from(&options.zone);
    config.underlay = options.underlay;
    let drivers = drivers::real(layout, options.recipes, options.pools)?;
    let agent = Agent::new(config, client, drivers, clock::system()).context("cannot start the agent")?;
    Ok(agent.renewing(credentials.renewal(layout)).reaching(Arc::new(Peers::new(layout))))
}

/// Runs the agent of a machine that has joined, until it is told to stop.
pub fn serve(layout: &Layout, credentials: &Credentials, options: &Options<'_>) -> Result<ExitCode> {
    runtime()?.block_on(async {
        let shutdown = shutdown_on_signal()?;
        let agent = assemble(layout, &credentials.server, credentials, &credentials.name, options)?;
        running::publish(layout, "agent", None, true)?;
        agent.run(shutdown).await;
        Ok(ExitCode::SUCCESS)
    })
}

#[derive(Serialize)]
struct Enroll<'a> {
    csr_pem: &'a str,
    name: &'a str,
}

/// Makes a key, has the server sign it. The key never leaves this machine.
async fn enroll(args: &AgentArgs, layout: &Layout, name: &str) -> Result<Credentials> {
    let (Some(server), Some(ca), Some(token)) = (&args.server, &args.ca, &args.token) else {
        bail!(
            "this machine is not a node yet: run `oblak join URL --token TOKEN` with a token of `oblak join-token create`; or give --server URL, --ca FILE (pki/ca.pem of the server's data directory) and --token TOKEN of a cloud administrator"
        )
    };
    let ca_pem = std::fs::read_to_string(ca).with_context(|| format!("cannot read {}", ca.display()))?;
    let (key_pem, csr_pem) = joining_key(layout)?;
    let client = Client::new(&ClientConfig::new(server, ca_pem, Auth::Bearer(token.clone())))?;
    let enrolled: NodeCertificate = client.post_json("/v1/nodes/enroll", &Enroll { csr_pem: &csr_pem, name }).await?;
    Ok(Credentials::of(server, name, key_pem, enrolled))
}

/// Runs the role.
pub fn run(args: &AgentArgs) -> Result<ExitCode> {
    require_root("oblak agent")?;
    telemetry::init(args.log_json);
    let layout = layout(&args.data)?;
    let Ok(_hold) = running::take(&layout)? else { bail!("another oblak process serves {}", layout.root().display()) };
    let mut credentials = match Credentials::load(&layout)? {
        Some(credentials) => credentials,
        None => {
            let name = node_name(args.node_name.as_deref())?;
            let credentials = runtime()?.block_on(enroll(args, &layout, &name))?;
            credentials.save(&layout)?;
            credentials
        }
    };
    if let Some(name) = &args.node_name {
        credentials.name = node_name(Some(name))?;
    } else if credentials.name.is_empty() {
        credentials.name = node_name(None)?;
    }
    if let Some(server) = &args.server {
        credentials.server.clone_from(server);
    }
    if credentials.server.is_empty() {
        bail!("it is not known which server this node belongs to; give --server URL");
    }
    credentials.save(&layout)?;
    let recipes = args.recipes.as_deref();
    let options = Options { zone: args.zone.clone(), recipes, underlay: args.underlay, pools: &args.pools };
    serve(&layout, &credentials, &options)
}
