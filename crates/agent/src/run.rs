//! Starting and ending the agent.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::sync::{Arc, Mutex, RwLock};

use oblak_client::Client;
use oblak_platform::clock::SharedClock;
use oblak_platform::fsx;
use oblak_platform::task::{inherit, process};
use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;

use crate::config::AgentConfig;
use crate::context::{Context, NetworkState};
use crate::lease::Keeper;
use crate::migrate::Moves;
use crate::reporter::Reporter;
use crate::rotate::{self, Renewal};
use crate::services::{Drivers, PeerNet};
use crate::world::World;
use crate::{images, link, migrate, networks, servers, tunnel, volumes};

/// The agent of one node.
pub struct Agent {
    ctx: Arc<Context>,
    renewal: Option<Renewal>,
}

impl Agent {
    /// An agent that has not started yet.
    ///
    /// # Errors
    /// When the directories below the data directory cannot be made.
    pub fn new(config: AgentConfig, client: Client, drivers: Drivers, clock: SharedClock) -> std::io::Result<Self> {
        let instances = config.layout.instances();
        fsx::create_dir_private(&instances, 0o711)?;
        fsx::create_dir_private(&config.layout.node(), 0o700)?;
        let ctx = Context {
            lease: Keeper::new(&config.layout, &config.boot_id),
            config,
            client,
            drivers,
            clock,
            world: RwLock::new(World::default()),
            synced: watch::Sender::new(false),
            reporter: Reporter::default(),
            networks: watch::Sender::new(Arc::new(NetworkState::default())),
            volumes: watch::Sender::new(Arc::new(BTreeMap::new())),
            plugged: Mutex::new(BTreeMap::new()),
            images: watch::Sender::new(Arc::new(BTreeMap::new())),
            servers: watch::Sender::default(),
            epoch: AtomicU64::new(0),
            removed: AtomicBool::new(false),
            wake_networks: Notify::new(),
            wake_volumes: Notify::new(),
            wake_images: Notify::new(),
            owners: Mutex::new(BTreeMap::new()),
            id_bases: Mutex::new(BTreeSet::new()),
            container_ids: Mutex::new(BTreeMap::new()),
            peers: None,
            listening: watch::Sender::new(None),
            moves: Moves::default(),
            cancel: CancellationToken::new(),
        };
        link::load_ids(&ctx);
        Ok(Self { ctx: Arc::new(ctx), renewal: None })
    }

    /// Renews the certificate of the node while it runs.
    #[must_use]
    pub fn renewing(self, renewal: Renewal) -> Self {
        Self { renewal: Some(renewal), ..self }
    }

    /// Gives it a way to other agents, by which instances can move.
    #[must_use]
    pub fn reaching(mut self, peers: Arc<dyn PeerNet>) -> Self {
        // Nobody shares the context before it runs.
        if let Some(ctx) = Arc::get_mut(&mut self.ctx) {
            ctx.peers = Some(peers);
        }
        self
    }

    /// Works until `shutdown`. Guests, shims and networks stay as they are afterwards.
    pub async fn run(self, shutdown: CancellationToken) {
        let ctx = self.ctx;
        let mut tasks = tokio::task::JoinSet::new();
        tasks.spawn(inherit(process(), link::lease(ctx.clone())));
        tasks.spawn(inherit(process(), link::watch(ctx.clone())));
        tasks.spawn(inherit(process(), networks::run(ctx.clone())));
        tasks.spawn(inherit(process(), volumes::run(ctx.clone())));
        tasks.spawn(inherit(process(), images::run(ctx.clone())));
        tasks.spawn(inherit(process(), servers::run(ctx.clone())));
        tasks.spawn(inherit(process(), tunnel::run(ctx.clone())));
        tasks.spawn(inherit(process(), migrate::listen(ctx.clone())));
        if let Some(renewal) = self.renewal {
            tasks.spawn(inherit(process(), rotate::run(ctx.clone(), renewal)));
        }
        let reporting = ctx.clone();
        tasks.spawn(inherit(process(), async move {
            let epoch = reporting.clone();
            reporting.reporter.run(&reporting.client, reporting.config.node, || epoch.epoch(), &reporting.cancel).await;
        }));
        shutdown.cancelled().await;
        ctx.cancel.cancel();
        let deadline = tokio::time::sleep(std::time::Duration::from_secs(5));
        tokio::pin!(deadline);
        loop {
            tokio::select! {
                ended = tasks.join_next() => if ended.is_none() { return },
                () = &mut deadline => return tasks.abort_all(),
            }
        }
    }
}
