//! A pretended machine: what survives its agent, and the agent that comes and goes.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use oblak_agent::fake::NoSeeds;
use oblak_agent::{Agent, AgentConfig, Drivers};
use oblak_client::{Auth, Client, ClientConfig};
use oblak_compute::ComputeDriver;
use oblak_compute::fake::FakeWorld;
use oblak_model::{DiskFact, Isolation, NodeFacts, NodeId, Size};
use oblak_network::fake::FakeNetwork;
use oblak_platform::clock::SharedClock;
use oblak_platform::layout::Layout;
use oblak_platform::task::Process;
use oblak_volume::fake::FakeDriver as FakeVolumes;
use tokio_util::sync::CancellationToken;

use crate::Error;
use crate::chance::{Dice, SeededRandom, VirtualClock};
use crate::drivers::{Compute, Days, Images};
use crate::mutation::Mutation;
use crate::net::Net;
use crate::trace::Trace;

/// A machine.
pub struct Machine {
    /// Its name.
    pub name: String,
    /// Its id.
    pub id: NodeId,
    /// Its guests; they survive the agent.
    pub guests: Arc<FakeWorld>,
    /// Its networks.
    pub networks: FakeNetwork,
    /// Its disks.
    pub volumes: FakeVolumes,
    /// How its drivers behave.
    pub days: Days,
    /// Its images.
    pub images: Images,
    clock: SharedClock,
    layout: Layout,
    seed: u64,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    agent: Option<Process>,
    starts: u64,
    boots: u64,
}

impl Machine {
    /// A machine that is off. Its files lie below `dir`.
    ///
    /// # Errors
    /// The directory cannot be made.
    pub fn new(seed: u64, name: &str, id: NodeId, clock: VirtualClock, dir: &Path) -> Result<Self, Error> {
        let clock: SharedClock = Arc::new(clock);
        let dir = dir.join(name);
        std::fs::create_dir_all(&dir)?;
        let days = Days::new(seed, name);
        Ok(Self {
            name: name.into(),
            id,
            guests: FakeWorld::new(clock.clone()),
            networks: FakeNetwork::new(),
            volumes: FakeVolumes::new(),
            images: Images::new(days.clone()),
            days,
            clock,
            layout: Layout::new(&dir),
            seed,
            state: Mutex::default(),
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether an agent runs.
    #[must_use]
    pub fn is_on(&self) -> bool {
        self.lock().agent.is_some()
    }

    /// Starts the agent; fine when it runs.
    ///
    /// # Errors
    /// The agent cannot use its directory.
    pub fn start(
        &self,
        net: &Net,
        mutation: Option<Mutation>,
        neighbour: Option<&Arc<FakeWorld>>,
    ) -> Result<(), Error> {
        if self.is_on() {
            return Ok(());
        }
        let (start, boot) = {
            let mut state = self.lock();
            state.starts += 1;
            (state.starts, state.boots)
        };
        // A shim notices late, but always within the margin.
        let mut dice = Dice::new(self.seed, &format!("shims of {} {start}", self.name));
        let late = dice.between(Duration::ZERO, Duration::from_millis(1900));
        let never = Duration::from_secs(3600);
        self.guests.set_freezes_late(if mutation == Some(Mutation::NoFence) { never } else { late });
        let compute: Arc<dyn ComputeDriver> =
            Arc::new(Compute::new(&self.guests, self.days.clone(), mutation, neighbour));
        let drivers = Drivers {
            compute: BTreeMap::from([(Isolation::Container, compute.clone()), (Isolation::Vm, compute)]),
            network: Arc::new(self.networks.clone()),
            volume: Arc::new(self.volumes.clone()),
            pools: BTreeMap::new(),
            images: Arc::new(self.images.with(mutation)),
            seeds: Arc::new(NoSeeds),
        };
        let random = Arc::new(SeededRandom::new(self.seed, &format!("agent {} {start}", self.name)));
        let urls = crate::server::urls();
        let mut config = ClientConfig::new(&urls[0], "", Auth::None);
        config.others = urls;
        let client = Client::in_process(&config, net.link(&self.name, Some(self.id)), self.clock.clone(), random)?;
        let mut settings = AgentConfig::new(self.id, &self.name, self.layout.clone());
        settings.boot_id = format!("{}-boot-{boot}", self.name);
        settings.machine = Some(facts(&self.name));
        settings.observe_every = Duration::from_secs(2);
        let agent = Agent::new(settings, client, drivers, self.clock.clone())?;
        let process = Process::new();
        process.spawn(agent.run(CancellationToken::new()));
        self.lock().agent = Some(process);
        Ok(())
    }

    /// Kills the agent between two steps; guests, networks and disks stay.
    pub fn kill(&self, trace: &Trace) {
        if let Some(process) = self.lock().agent.take() {
            process.kill();
            trace.note("chaos", format_args!("the agent of {} is killed", self.name));
        }
    }

    /// Cuts the power: the agent and the guests end, disks stay.
    pub fn reboot(&self, trace: &Trace) {
        self.kill(trace);
        self.guests.reboot();
        self.networks.reboot();
        self.lock().boots += 1;
        trace.note("chaos", format_args!("{} is rebooted", self.name));
    }
}

/// A small machine, so that it gets full.
fn facts(name: &str) -> NodeFacts {
    NodeFacts {
        hostname: name.into(),
        kernel: "6.1.0".into(),
        os: "Simulated".into(),
        architecture: "x86_64".into(),
        cpus: 4,
        memory: Size::gib(8),
        disks: vec![DiskFact { path: "/".into(), fs: "ext4".into(), size: Size::gib(100), free: Size::gib(100) }],
        ..NodeFacts::default()
    }
}
