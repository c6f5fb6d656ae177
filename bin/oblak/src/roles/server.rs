//! `oblak server`: the API and the control plane.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context as _, Result, bail};
use oblak_api::{ApiConfig, Bootstrap, Server};
use oblak_cli::context::{Context, Person, put};
use oblak_control::Candidate;
use oblak_model::Span;
use oblak_platform::layout::Layout;
use oblak_platform::{clock, fsx, random, telemetry};
use oblak_store::SharedStore;
use tokio_util::sync::CancellationToken;

use super::candidate::{candidate, endpoints};
use super::{layout, node_name, running, runtime, shutdown_on_signal};
use crate::args::{EtcdArgs, HaArgs, ServerArgs};

/// The control plane, ready to serve.
pub struct ControlPlane {
    server: Server,
    store: SharedStore,
    candidate: Candidate,
    /// URL for clients on this machine.
    pub url: String,
    /// Certificate of the authority.
    pub ca_pem: String,
    /// What was made the first time.
    pub bootstrap: Bootstrap,
}

/// Opens the store, makes what must exist, binds the listener.
pub async fn prepare(
    layout: &Layout,
    listen: SocketAddr,
    name: Option<&str>,
    names: &[String],
    etcd: &EtcdArgs,
    node_certificate_life: Option<Span>,
) -> Result<ControlPlane> {
    let (clock, random) = (clock::system(), random::system());
    let super::state::State { store, cluster, alone } = super::state::open(layout, etcd).await?;
    let bootstrap = oblak_api::bootstrap(store.clone(), clock.clone(), random.clone())
        .await
        .context("cannot make the first objects")?;
    let mut config = ApiConfig::new(listen, layout.pki());
    config.server_names.extend(names.iter().cloned());
    if let Some(life) = node_certificate_life {
        config.node_certificate_life = life.0;
    }
    let server = Server::bind(config, store.clone(), clock, random).await?;
    if let Some(cluster) = cluster {
        server.with_cluster(cluster);
    }
    let bound = server.local_addr().context("the server has no address")?;
    let url = running::local_url(bound);
    let ca_pem =
        std::fs::read_to_string(layout.pki().join("ca.pem")).context("cannot read the certificate of the authority")?;
    if let Some(password) = &bootstrap.admin_password {
        let file = layout.root().join("admin-password");
        fsx::write_atomic(&file, format!("{password}\n").as_bytes(), 0o600)
            .with_context(|| format!("cannot write {}", file.display()))?;
    }
    let candidate = candidate(layout, node_name(name)?, endpoints(bound, names), alone)?;
    Ok(ControlPlane { server, store, candidate, url, ca_pem, bootstrap })
}

impl ControlPlane {
    /// The store, for who lives in the same process.
    pub fn store(&self) -> SharedStore {
        self.store.clone()
    }

    /// Serves until `shutdown`.
    pub async fn serve(self, shutdown: CancellationToken, ha: &HaArgs) -> Result<()> {
        let (clock, random) = (clock::system(), random::system());
        let ha = super::power::settings(ha);
        let stop = shutdown.child_token();
        let control = oblak_control::run_with(self.store, clock, random, self.candidate, ha, stop);
        let ends = shutdown.clone().drop_guard();
        let control = tokio::spawn(async move {
            // A server without reconcilers could lead and do nothing: rather none.
            let _ends = ends;
            control.await
        });
        let served = self.server.serve(shutdown.clone()).await;
        shutdown.cancel();
        let control = control.await.context("the reconcilers ended")?;
        served.context("the API ended")?;
        control.context("the reconcilers ended")
    }
}

/// Whether the token still stands for somebody, as far as its record tells.
async fn is_known_token(store: &SharedStore, token: &str) -> bool {
    let key = oblak_store::objects::secret_key("token", &oblak_identity::tokens::digest(token));
    matches!(store.get(&key).await, Ok(Some(_)))
}

/// Gives the user of this machine a context with a token of the first administrator.
pub async fn write_context(plane: &ControlPlane) -> Result<PathBuf> {
    let person = Person::behind_this();
    let file = std::env::var_os("OBLAK_CONFIG").map_or_else(|| person.file(), PathBuf::from);
    let contexts = oblak_cli::context::load(&file).with_context(|| format!("cannot read {}", file.display()))?;
    let known = contexts.contexts.get("local").filter(|c| c.ca_pem == plane.ca_pem && !c.token.is_empty()).cloned();
    let token = match known {
        Some(context) if is_known_token(&plane.store, &context.token).await => context.token,
        _ => oblak_api::admin_token(
            plane.store.as_ref(),
            clock::system().as_ref(),
            random::system().as_ref(),
            "command line of this machine",
        )
        .await
        .context("cannot make a token for the command line")?
        .context("no administrator can log in; the context for the command line was not written (use --no-context)")?,
    };
    let context = Context {
        server: plane.url.clone(),
        servers: Vec::new(),
        learnt_at: 0,
        ca_pem: plane.ca_pem.clone(),
        token,
        project: oblak_model::DEFAULT_PROJECT.into(),
    };
    put(&file, "local", context, person.owner).with_context(|| format!("cannot write {}", file.display()))?;
    Ok(file)
}

/// Runs the role.
pub fn run(args: &ServerArgs) -> Result<ExitCode> {
    telemetry::init(args.log_json);
    let layout = layout(&args.data)?;
    let Ok(_hold) = running::take(&layout)? else { bail!("another oblak process serves {}", layout.root().display()) };
    runtime()?.block_on(async {
        let shutdown = shutdown_on_signal()?;
        let (names, name) = (&args.server_names, args.name.as_deref());
        let plane = prepare(&layout, args.listen, name, names, &args.etcd, args.node_certificate_life).await?;
        running::publish(&layout, "server", Some(plane.url.clone()), true)?;
        let context = if args.no_context { None } else { Some(write_context(&plane).await?) };
        let banner = super::banner::Banner {
            url: &plane.url,
            password: plane.bootstrap.admin_password.as_deref(),
            context,
            data: layout.root(),
            notices: &[],
        };
        super::tell(&banner.text());
        plane.serve(shutdown, &args.ha).await?;
        Ok(ExitCode::SUCCESS)
    })
}
