//! `oblak up`: everything in one process.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Result, bail};
use oblak_model::{NodeId, NodeKind, NodePhase};
use oblak_platform::layout::Layout;
use oblak_platform::{clock, random, telemetry};
use oblak_store::{SharedStore, objects};

use super::agent::{Options, assemble};
use super::banner::Banner;
use super::credentials::{Credentials, made_now};
use super::detach;
use super::running::{self, Hold, Running};
use super::{layout, node_name, require_root, runtime, server, shutdown_on_signal};
use crate::args::UpArgs;

/// Pause between two looks at whether the node is ready.
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// Runs the role.
pub fn run(args: &UpArgs) -> Result<ExitCode> {
    require_root("oblak up")?;
    let layout = layout(&args.data)?;
    let hold = match running::take(&layout)? {
        Ok(hold) => hold,
        Err(found) => return already(&layout, found),
    };
    if args.detach {
        drop(hold);
        let words = std::env::args_os().skip(1).filter(|w| w != "--detach");
        return detach::start(&layout, words);
    }
    serve(args, &layout, &hold)
}

/// Serves a directory that is held, until it is told to stop.
pub fn serve(args: &UpArgs, layout: &Layout, _hold: &Hold) -> Result<ExitCode> {
    telemetry::init(args.log_json);
    let name = node_name(args.node_name.as_deref())?;
    let mut etcd = args.etcd.clone();
    etcd.member_name.get_or_insert_with(|| name.clone());
    runtime()?.block_on(async {
        let shutdown = shutdown_on_signal()?;
        let (names, life) = (&args.server_names, args.node_certificate_life);
        let plane = server::prepare(layout, args.listen, Some(&name), names, &etcd, life).await?;
        let credentials = node_credentials(layout, &plane.ca_pem)?;
        let recipes = args.recipes.as_deref();
        let options = Options { zone: args.zone.clone(), recipes, underlay: args.underlay, pools: &args.pools };
        let agent = assemble(layout, &plane.url, &credentials, &name, &options)?;
        let context = if args.no_context { None } else { Some(server::write_context(&plane).await?) };
        let banner = Banner {
            url: &plane.url,
            password: plane.bootstrap.admin_password.as_deref(),
            context,
            data: layout.root(),
            notices: &[],
        };
        super::tell(&banner.text());
        // Whoever waits for this file shows what was printed before it.
        running::publish(layout, "up", Some(plane.url.clone()), false)?;
        let complete = tokio::spawn(complete(layout.clone(), plane.url.clone(), plane.store(), credentials.id));
        let agent = tokio::spawn(agent.run(shutdown.clone()));
        let served = plane.serve(shutdown.clone(), &args.ha).await;
        shutdown.cancel();
        complete.abort();
        let _ = agent.await;
        served?;
        Ok(ExitCode::SUCCESS)
    })
}

/// Says that guests can be started, once the node beside us is ready for them. Nobody depends on it: it only spares the first command after
/// `up --detach` the answer that there is no node yet.
async fn complete(layout: Layout, url: String, store: SharedStore, node: NodeId) {
    let key = objects::object_key::<NodeKind>("_", node.0);
    loop {
        if let Ok(Some(entry)) = store.get(&key).await
            && objects::decode::<NodeKind>(&entry).is_ok_and(|node| node.status.phase == NodePhase::Ready)
        {
            break;
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
    if let Err(error) = running::publish(&layout, "up", Some(url), true) {
        tracing::warn!(%error, "the run file does not say that the node is ready");
    }
}

/// The node's certificate comes straight from the authority beside it; it is made anew at every start, and renewed like any
/// other while it runs.
fn node_credentials(layout: &Layout, ca_pem: &str) -> Result<Credentials> {
    let now = clock::system().now();
    let id = match Credentials::load(layout)? {
        Some(known) => known.id,
        None => NodeId(random::uuid7(random::system().as_ref(), now)),
    };
    let ca = oblak_identity::pki::ensure_ca(&layout.pki(), now)?;
    let made = oblak_identity::pki::issue_node_cert(&ca, id, now)?;
    let (renew_at, expires_at) = made_now();
    let credentials = Credentials {
        id,
        name: String::new(),
        server: String::new(),
        certificate_pem: made.certificate_pem,
        key_pem: made.key_pem,
        ca_pem: ca_pem.to_string(),
        renew_at,
        expires_at,
    };
    credentials.save(layout)?;
    Ok(credentials)
}

fn already(layout: &Layout, found: Option<Running>) -> Result<ExitCode> {
    match found {
        Some(Running { url: Some(url), process, .. }) => {
            println!("Oblak is up already: {url} (process {}, data {})", process.pid, layout.root().display());
            Ok(ExitCode::SUCCESS)
        }
        _ => bail!("another oblak process is just starting on {}; try again in a moment", layout.root().display()),
    }
}
