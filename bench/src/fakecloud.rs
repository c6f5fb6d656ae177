//! A whole cloud of one process over fake drivers: the real API over TLS, the real store on disk, the real control plane and the real
//! agent; only guests, networks, volumes and images are pretended.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use oblak_agent::fake::{FakeImages, NoSeeds};
use oblak_agent::{Agent, AgentConfig, Drivers};
use oblak_client::{Auth, Client, ClientConfig};
use oblak_compute::ComputeDriver;
use oblak_compute::fake::{FakeDriver, FakeWorld};
use oblak_control::Candidate;
use oblak_identity::pki;
use oblak_model::cluster::PROTOCOL;
use oblak_model::{
    ClusterServer, Cpus, Flavor, FlavorSpec, Image, ImageKind, ImagePhase, Instance, InstanceSpec, Isolation, Network,
    NetworkAttachment, NetworkSpec, Node, NodeId, NodeKind, NodePhase, ServerId, Size, Subnet, SubnetSpec,
};
use oblak_network::fake::FakeNetwork;
use oblak_platform::layout::Layout;
use oblak_platform::{clock, random};
use oblak_store::{RedbOptions, RedbStore, SharedStore};
use uuid::Uuid;

use crate::service::Service;

/// Network and flavor that hold thousands of instances.
const WIDE: &str = "wide";
const NODE: &str = "n1";
/// How much more than it has the node promises: the guests need nothing.
const OVERCOMMIT: u32 = 10_000;
const READY_WITHIN: Duration = Duration::from_secs(30);

/// Ends when dropped.
pub struct FakeCloud {
    /// The store.
    pub store: SharedStore,
    /// A client of the administrator.
    pub client: Client,
    _service: Service,
}

impl FakeCloud {
    /// Starts everything below `dir` and waits until instances can be made.
    pub async fn start(dir: &Path) -> Result<Self> {
        let layout = Layout::new(dir);
        std::fs::create_dir_all(layout.store())?;
        let path = layout.store().join("oblak.redb");
        let store = tokio::task::spawn_blocking(move || RedbStore::open(&path, RedbOptions::default())).await??;
        let store: SharedStore = Arc::new(store);
        let service = Service::start(&store, &layout.pki()).await?;
        let stopping = service.stopping();
        let (time, chance) = (clock::system(), random::system());
        tokio::spawn(oblak_control::run(store.clone(), time, chance, candidate(), stopping.clone()));
        tokio::spawn(agent(&layout, &service)?.run(stopping));
        let client = service.client()?;
        let cloud = Self { store, client, _service: service };
        cloud.prepare().await?;
        Ok(cloud)
    }

    async fn prepare(&self) -> Result<()> {
        let client = &self.client;
        let flavor =
            FlavorSpec { vcpus: Cpus(100), memory: Size::mib(16), disk: Size::mib(64), ..FlavorSpec::default() };
        client.create("", &Flavor::new(WIDE, flavor)).await?;
        client.create("default", &Network::new(WIDE, NetworkSpec::default())).await?;
        client.create("default", &Subnet::new(WIDE, SubnetSpec::new(WIDE, "10.144.0.0/16".parse()?))).await?;
        let ready = async {
            loop {
                let node: Option<Node> = client.get::<NodeKind>("", NODE).await.ok();
                let image: Image = client.get::<ImageKind>("default", "busybox").await?;
                if node.is_some_and(|n| n.status.phase == NodePhase::Ready) && image.status.phase == ImagePhase::Ready {
                    return Ok(());
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        match tokio::time::timeout(READY_WITHIN, ready).await {
            Ok(done) => done.map_err(|e: oblak_client::ClientError| e)?,
            Err(_) => bail!("the node or the image does not get ready"),
        }
        let over =
            serde_json::json!({"cpu_percent": OVERCOMMIT, "memory_percent": OVERCOMMIT, "disk_percent": OVERCOMMIT});
        client.patch::<NodeKind>("", NODE, &serde_json::json!({"spec": {"overcommit": over}}), None).await?;
        Ok(())
    }
}

/// A small container in the wide network.
pub fn instance(name: &str) -> Instance {
    let network = NetworkAttachment { network: WIDE.into(), ..NetworkAttachment::default() };
    let spec = InstanceSpec {
        image: "busybox".into(),
        flavor: WIDE.into(),
        networks: Some(vec![network]),
        ..InstanceSpec::default()
    };
    Instance::new(name, spec)
}

fn agent(layout: &Layout, service: &Service) -> Result<Agent> {
    let now = clock::system().now();
    let node = NodeId(Uuid::now_v7());
    let ca = pki::ensure_ca(&layout.pki(), now)?;
    let made = pki::issue_node_cert(&ca, node, now)?;
    let auth = Auth::Certificate { cert_pem: made.certificate_pem, key_pem: made.key_pem };
    let url = format!("https://{}", service.address);
    let client = Client::new(&ClientConfig::new(url, service.ca_pem.clone(), auth))?;
    let compute: Arc<dyn ComputeDriver> = Arc::new(FakeDriver::new(FakeWorld::new(clock::system())));
    let drivers = Drivers {
        pools: BTreeMap::new(),
        compute: BTreeMap::from([(Isolation::Container, compute.clone()), (Isolation::Vm, compute)]),
        network: Arc::new(FakeNetwork::new()),
        volume: Arc::new(oblak_volume::fake::FakeDriver::new()),
        images: Arc::new(FakeImages::default()),
        seeds: Arc::new(NoSeeds),
    };
    Agent::new(AgentConfig::new(node, NODE, layout.clone()), client, drivers, clock::system())
        .context("the agent does not start")
}

/// The only server of a cloud.
pub fn candidate() -> Candidate {
    let server = ClusterServer {
        id: ServerId(uuid::Uuid::nil()),
        name: "bench".into(),
        endpoints: vec![],
        version: env!("CARGO_PKG_VERSION").into(),
        protocol: PROTOCOL,
        started_at: clock::system().now(),
    };
    Candidate { server, alone: true }
}
