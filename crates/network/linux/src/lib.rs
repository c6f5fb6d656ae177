//! Networks with what Linux has: a namespace and a bridge per network, taps and veths, nftables.
//!
//! A network lives in a namespace of its own, so equal subnets of two projects never meet. Guests are plugged into its bridge;
//! rules on the port's side keep them from passing for one another and let in only what their security groups allow. A veth to
//! the host with a pair of addresses of its own carries NAT and published ports. netd, a process per node, answers DHCP, DNS and
//! metadata; it is told by files. Ports on other nodes are behind a VXLAN device in the bridge (docs/decisions/0021-overlay.md).
//!
//! Invariant: everything is found again from the kernel (names and aliases of interfaces, comments of tables); files are only
//! wishes and decisions. Only one `ensure` or `remove` runs at a time per data directory. No tokio worker changes its namespace.
//!
//! Start reading at [`LinuxNetwork`], then `node` (the steps), `firewall` (the rules), `sys` (the kernel).

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use oblak_model::{NetworkId, PortId};
use oblak_network::{Capabilities, NetworkDriver, NetworkHandle, NetworkPlan, Overlay, PortCounters, Underlay};
use oblak_platform::driver::{BoxDuplex, DriverError, DriverResult};
use oblak_platform::fsx;
use oblak_platform::layout::Layout;
use tokio::sync::{Mutex, oneshot};

mod firewall;
mod host;
mod names;
mod node;
mod observe;
mod overlay;
mod plan;
mod ports;
mod probe;
mod publish;
mod services;
mod state;
mod sys;
mod uplink;

use node::{At, Node};
use sys::netns::NetNs;

/// Namespaces are mounted below this directory, one subdirectory per data directory.
pub const DEFAULT_RUN: &str = "/run/oblak";
/// A guest that does not answer is given up after this long.
const DIAL_TIMEOUT: Duration = Duration::from_secs(10);

/// Settings of the driver.
#[derive(Clone, Debug)]
pub struct Config {
    /// The node's data directory; state is kept in its `network` directory.
    pub data: PathBuf,
    /// Where namespaces are mounted, [`DEFAULT_RUN`] usually.
    pub run: PathBuf,
    /// Program and first arguments of netd; `--dir <data>/network` is added.
    pub netd_command: Vec<String>,
    /// Network namespace that plays the host; `None` for that of the process.
    pub host_netns: Option<PathBuf>,
}

impl Config {
    /// The usual settings for a data directory.
    pub fn new(data: impl Into<PathBuf>, netd_command: Vec<String>) -> Self {
        Self { data: data.into(), run: DEFAULT_RUN.into(), netd_command, host_netns: None }
    }
}

/// The driver. Cheap to make; everything it knows is on disk and in the kernel.
pub struct LinuxNetwork {
    node: Arc<Node>,
    netd_command: Vec<String>,
    /// Held by the thread that works; a cancelled call that still waits here never starts.
    turn: Arc<Mutex<Turn>>,
}

#[derive(Default)]
struct Turn {
    swept: bool,
}

impl LinuxNetwork {
    /// Opens the data directory, which is made if it is missing.
    ///
    /// # Errors
    /// When the directory or the host's namespace cannot be opened.
    pub fn new(config: &Config) -> DriverResult<Self> {
        let what = || format!("opening the data directory {}", config.data.display());
        fsx::create_dir_private(&config.data, 0o700).at(what)?;
        // One directory has one name, however it is reached.
        let data = std::fs::canonicalize(&config.data).at(what)?;
        let host = match &config.host_netns {
            None => NetNs::current().at(|| "opening the host's network namespace".into())?,
            Some(path) => NetNs::open(path).at(|| format!("opening {}", path.display()))?.ok_or_else(|| {
                DriverError::permanent("no_namespace", format!("{} is not a namespace", path.display()))
            })?,
        };
        let names = names::Names::new(&data, &config.run);
        let state = state::State::new(Layout::new(data).network());
        let node = Arc::new(Node { names, state, host });
        Ok(Self { node, netd_command: config.netd_command.clone(), turn: Arc::default() })
    }

    /// Runs `work` on a thread of its own when its turn has come. Once begun it is finished even if the caller goes away, and
    /// nothing else begins before.
    async fn change<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Node) -> DriverResult<T> + Send + 'static,
    ) -> DriverResult<T> {
        let mut turn = Arc::clone(&self.turn).lock_owned().await;
        self.ask(move |node| {
            if !turn.swept {
                node.sweep()?;
                turn.swept = true;
            }
            let result = work(node);
            drop(turn);
            result
        })
        .await
    }

    /// Runs `work` on a thread of its own.
    async fn ask<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Node) -> DriverResult<T> + Send + 'static,
    ) -> DriverResult<T> {
        let (node, (sender, receiver)) = (Arc::clone(&self.node), oneshot::channel());
        let thread = std::thread::Builder::new().name("network".into());
        thread
            .spawn(move || {
                // Nobody listening means that the call was cancelled.
                let _ = sender.send(work(&node));
            })
            .at(|| "starting a thread".into())?;
        receiver
            .await
            .unwrap_or_else(|_| Err(DriverError::retry("panicked", "the network driver failed inside; see the log")))
    }
}

#[async_trait]
impl NetworkDriver for LinuxNetwork {
    fn name(&self) -> &'static str {
        "linux"
    }

    async fn probe(&self) -> Capabilities {
        self.ask(|node| Ok(node.probe())).await.unwrap_or_default()
    }

    async fn ensure(&self, plan: &NetworkPlan) -> DriverResult<NetworkHandle> {
        let plan = plan.clone();
        self.change(move |node| node.ensure(&plan)).await
    }

    async fn observe(&self, id: NetworkId) -> DriverResult<Option<NetworkHandle>> {
        self.ask(move |node| node.observe(id)).await
    }

    async fn list(&self) -> DriverResult<Vec<NetworkId>> {
        self.ask(Node::list).await
    }

    async fn remove(&self, id: NetworkId) -> DriverResult<()> {
        self.change(move |node| node.remove(id)).await
    }

    async fn counters(&self, id: NetworkId) -> DriverResult<BTreeMap<PortId, PortCounters>> {
        self.ask(move |node| node.counters(id)).await
    }

    async fn dial(&self, id: NetworkId, to: SocketAddr) -> DriverResult<BoxDuplex> {
        let socket = self.ask(move |node| node.socket_towards(id, to)).await?;
        let connect = tokio::net::TcpSocket::from_std_stream(socket).connect(to);
        match tokio::time::timeout(DIAL_TIMEOUT, connect).await {
            Ok(Ok(stream)) => Ok(Box::new(stream)),
            Ok(Err(e)) => Err(DriverError::retry("unreachable", format!("{to} in network {id}: {e}"))),
            Err(_) => Err(DriverError::retry("unreachable", format!("{to} in network {id} does not answer"))),
        }
    }

    async fn ensure_services(&self) -> DriverResult<()> {
        let command = self.netd_command.clone();
        self.change(move |node| services::ensure(node.state.dir(), &command)).await
    }

    async fn stop_services(&self) -> DriverResult<()> {
        self.change(|node| services::stop(node.state.dir())).await
    }

    fn overlay(&self) -> Option<&dyn Overlay> {
        Some(self)
    }
}

#[async_trait]
impl Overlay for LinuxNetwork {
    async fn underlay(&self, address: IpAddr) -> DriverResult<Underlay> {
        self.ask(move |node| overlay::underlay(node, address)).await
    }
}
