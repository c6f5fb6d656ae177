//! A server of the control plane: the real API and the real reconcilers as one process that can be killed. The store survives it.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use oblak_api::{ApiConfig, Server};
use oblak_control::Candidate;
use oblak_control::ha::HaConfig;
use oblak_model::cluster::PROTOCOL;
use oblak_model::{ClusterServer, ServerId};
use oblak_platform::clock::SharedClock;
use oblak_platform::random::SharedRandom;
use oblak_platform::task::Process;
use oblak_store::SharedStore;
use tokio_util::sync::CancellationToken;

use crate::chance::SeededRandom;
use crate::link::{Pause, StoreLink};
use crate::net::Net;
use crate::store::SimStore;
use crate::trace::Trace;

/// Servers of a cloud.
pub const SERVERS: usize = 2;

/// Addresses of the servers.
#[must_use]
pub fn urls() -> Vec<String> {
    (0..SERVERS).map(|n| format!("https://{}", host(n))).collect()
}

fn host(n: usize) -> String {
    format!("s{}", n + 1)
}

/// One server.
pub struct ControlPlane {
    n: usize,
    store: Arc<SimStore>,
    /// The pauses of its machine.
    pub pause: Pause,
    net: Net,
    pki: PathBuf,
    seed: u64,
    trace: Trace,
    ha: HaConfig,
    state: Mutex<(Option<Process>, u64)>,
}

impl ControlPlane {
    /// One that does not run yet.
    #[must_use]
    pub fn new(n: usize, store: Arc<SimStore>, pause: Pause, net: Net, pki: PathBuf, seed: u64, trace: Trace) -> Self {
        Self { n, store, pause, net, pki, seed, trace, ha: HaConfig::default(), state: Mutex::default() }
    }

    /// With other settings of high availability.
    #[must_use]
    pub fn with_ha(self, ha: HaConfig) -> Self {
        Self { ha, ..self }
    }

    fn id(&self) -> ServerId {
        let low = (self.seed >> 2 | 1 << 63) ^ u64::try_from(self.n).unwrap_or(0);
        ServerId(uuid::Uuid::from_u64_pair(0x0190_0000_0000_7000, low))
    }

    /// What it is called in the trace.
    #[must_use]
    pub fn name(&self) -> String {
        host(self.n)
    }

    /// Starts it; fine when it runs.
    pub fn start(&self) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.0.is_some() {
            return;
        }
        state.1 += 1;
        let process = Process::new();
        let random = |role: &str| -> SharedRandom {
            Arc::new(SeededRandom::new(self.seed, &format!("{role} {} {}", self.n, state.1)))
        };
        let (api, control) = (random("api"), random("control"));
        let reach =
            |leader| -> SharedStore { Arc::new(StoreLink::new(self.store.clone(), self.pause.clone(), leader)) };
        let (store, leads) = (reach(None), reach(Some(self.id())));
        let clock: SharedClock = Arc::new(self.pause.clone());
        let (net, trace, host) = (self.net.clone(), self.trace.clone(), self.name());
        let mut config = ApiConfig::new(([127, 0, 0, 1], 0).into(), &self.pki);
        // Rates are counted by virtual time, and a simulated minute must not need a real one.
        config.limits.requests_per_second = 1_000_000;
        config.limits.requests_burst = 1_000_000;
        let server = ClusterServer {
            id: self.id(),
            name: self.name(),
            endpoints: vec![format!("https://{}", self.name())],
            version: env!("CARGO_PKG_VERSION").into(),
            protocol: PROTOCOL,
            started_at: clock.now(),
        };
        let candidate = Candidate { server, alone: false };
        let ha = self.ha.clone();
        let inside = process.clone();
        process.spawn(async move {
            let server = match Server::in_process(config, store, clock.clone(), api).await {
                Ok(server) => server,
                Err(error) => return trace.violation(format_args!("the api does not start: {error}")),
            };
            trace.note(&host, "serving");
            net.serve(&host, Some((server.router(), inside)));
            let control = oblak_control::run_with(leads, clock, control, candidate, ha, CancellationToken::new());
            if let Err(error) = control.await {
                trace.violation(format_args!("the reconcilers do not start: {error}"));
            }
            drop(server);
        });
        state.0 = Some(process);
    }

    /// Kills it between two steps.
    pub fn kill(&self) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(process) = state.0.take() {
            self.net.serve(&self.name(), None);
            process.kill();
            self.trace.note("chaos", format_args!("server {} is killed", self.name()));
        }
    }
}
