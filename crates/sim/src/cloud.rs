//! A whole cloud in one process, and what must hold across its machines.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use oblak_client::{Auth, Client, ClientConfig};
use oblak_compute::ComputeDriver as _;
use oblak_compute::fake::FakeDriver;
use oblak_control::ha::HaConfig;
use oblak_model::{Image, ImageId, Instance, InstanceId, NodeId, NodePhase, Phase, Power};
use oblak_network::NetworkDriver as _;
use oblak_platform::clock::SharedClock;
use oblak_platform::random::SharedRandom;
use oblak_store::{SharedStore, Store as _};
use oblak_volume::VolumeDriver as _;
use tokio::time::Instant;
use uuid::Uuid;

use crate::chance::{Dice, SeededRandom, VirtualClock};
use crate::check::{Checks, Mirror};
use crate::link::Pause;
use crate::mutation::Mutation;
use crate::net::Net;
use crate::node::Machine;
use crate::server::{ControlPlane, SERVERS, urls};
use crate::store::{Moods, SimStore};
use crate::trace::Trace;
use crate::{Error, Settings};

/// The cloud.
pub struct Cloud {
    /// What it was made from.
    pub settings: Settings,
    /// What happened.
    pub trace: Trace,
    /// The checks of the store.
    pub checks: Checks,
    /// The store.
    pub store: Arc<SimStore>,
    /// How the store behaves.
    pub moods: Moods,
    /// The network.
    pub net: Net,
    /// The servers of the control plane.
    pub servers: Vec<ControlPlane>,
    /// The machines.
    pub machines: Vec<Machine>,
    clock: VirtualClock,
    token: String,
}

impl Cloud {
    /// Makes everything below `dir` and switches it on.
    ///
    /// # Errors
    /// Files cannot be written, or the first objects cannot be made.
    pub async fn start(settings: Settings, dir: &Path, trace: Trace) -> Result<Self, Error> {
        let seed = settings.seed;
        let clock = VirtualClock::new(Instant::now());
        let shared: SharedClock = Arc::new(clock);
        let checks = Checks::new(trace.clone());
        let moods = Moods::new(seed);
        let store = Arc::new(SimStore::new(shared.clone(), moods.clone(), checks.clone(), settings.mutation));
        let dynamic: SharedStore = store.clone();
        let random: SharedRandom = Arc::new(SeededRandom::new(seed, "bootstrap"));
        let first = (dynamic.clone(), shared.clone(), random.clone());
        // As a process of its own, so that no thread computes the password's hash.
        let token = oblak_platform::task::Process::new()
            .spawn(async move {
                let (store, clock, random) = first;
                oblak_api::bootstrap(store.clone(), clock.clone(), random.clone()).await?;
                oblak_api::admin_token(store.as_ref(), clock.as_ref(), random.as_ref(), "sim").await
            })
            .await
            .map_err(|e| Error::Setup(e.to_string()))?
            .map_err(|e| Error::Setup(e.to_string()))?
            .ok_or_else(|| Error::Setup("there is no administrator".into()))?;
        let net = Net::new(seed, trace.clone());
        let no_margin = settings.mutation == Some(Mutation::NoFencingMargin);
        let margin = if no_margin { Duration::ZERO } else { HaConfig::default().margin };
        let server = |n| {
            let (pause, pki) = (Pause::new(shared.clone()), dir.join("pki"));
            let server = ControlPlane::new(n, store.clone(), pause, net.clone(), pki, seed, trace.clone());
            server.with_ha(HaConfig { margin, ..HaConfig::default() })
        };
        let servers: Vec<ControlPlane> = (0..SERVERS).map(server).collect();
        servers.iter().for_each(ControlPlane::start);
        let mut dice = Dice::new(seed, "machines");
        let mut machines = Vec::new();
        for n in 1..=settings.nodes {
            let id = NodeId(Uuid::from_u64_pair(0x0190_0000_0000_7000, dice.roll() >> 2 | 1 << 63));
            let skew = i64::try_from(dice.below(4_000_000)).unwrap_or(0) - 2_000_000;
            machines.push(Machine::new(seed, &format!("n{n}"), id, clock.skewed(skew), dir)?);
        }
        let cloud = Self { settings, trace, checks, store, moods, net, servers, machines, clock, token };
        for n in 0..cloud.machines.len() {
            cloud.start_agent(n)?;
        }
        Ok(cloud)
    }

    /// Starts the agent of a machine.
    ///
    /// # Errors
    /// Files cannot be written.
    pub fn start_agent(&self, n: usize) -> Result<(), Error> {
        let neighbour = self.machines.get((n + 1) % self.machines.len().max(1)).map(|m| &m.guests);
        self.machines[n].start(&self.net, self.settings.mutation, neighbour)
    }

    /// A client of the administrator with a link of its own.
    ///
    /// # Errors
    /// Never for a token that the API made.
    pub fn client(&self, who: &str) -> Result<Client, Error> {
        let urls = urls();
        let mut config = ClientConfig::new(&urls[0], "", Auth::Bearer(self.token.clone()));
        config.others = urls;
        let random = Arc::new(SeededRandom::new(self.settings.seed, who));
        Ok(Client::in_process(&config, self.net.link(who, None), Arc::new(self.clock), random)?)
    }

    /// No instance runs on two machines, none runs where it is not placed, no run was started twice. Holds at every moment.
    pub async fn check_guests(&self) {
        self.store.look().await;
        let mut seen: BTreeMap<InstanceId, &str> = BTreeMap::new();
        for machine in &self.machines {
            for (id, run) in machine.guests.started_twice() {
                self.trace.violation(format_args!("run {run} of guest {id} was started twice on {}", machine.name));
            }
            for id in machine.guests.running() {
                if let Some(other) = seen.insert(id, &machine.name) {
                    self.trace.violation(format_args!("guest {id} runs on {other} and on {}", machine.name));
                }
                let mirror = self.checks.mirror();
                let placed = mirror.instances.get(&id).map(|i| i.status.placement.as_ref().map(|p| p.node));
                drop(mirror);
                if placed != Some(Some(machine.id)) {
                    self.trace
                        .violation(format_args!("guest {id} runs on {}, its placement is {placed:?}", machine.name));
                }
            }
        }
    }

    /// What keeps the cloud from being what is asked for; none when it is.
    pub async fn unrest(&self) -> Option<String> {
        self.store.look().await;
        if let Some(why) = self.restless_object() {
            return Some(why);
        }
        let instances: Vec<Instance> = self.checks.mirror().instances.values().cloned().collect();
        for instance in instances {
            if let Some(why) = self.unsettled(&instance).await {
                return Some(why);
            }
        }
        None
    }

    /// A node or volume that is not as it should be.
    fn restless_object(&self) -> Option<String> {
        let mirror = self.checks.mirror();
        if let Some(node) = mirror.nodes.values().find(|n| n.status.phase != NodePhase::Ready) {
            return Some(format!("node {} is {:?}: {}", node.metadata.name, node.status.phase, node.status.message));
        }
        if mirror.nodes.len() < self.machines.len() {
            return Some(format!("only {} nodes are registered", mirror.nodes.len()));
        }
        if let Some(image) = mirror.images.values().find(|image| image.metadata.is_deleting()) {
            return Some(format!("image {} is still being deleted", image.metadata.name));
        }
        let volume = mirror.volumes.values().find(|v| v.metadata.is_deleting());
        volume.map(|volume| format!("volume {} is still being deleted", volume.metadata.name))
    }

    async fn unsettled(&self, instance: &Instance) -> Option<String> {
        let (name, status) = (&instance.metadata.name, &instance.status);
        let because = |what: &str| {
            let message = if status.message.is_empty() { &status.reason } else { &status.message };
            Some(format!("instance {name} ({}, {message:?}): {what}", status.phase))
        };
        if instance.metadata.is_deleting() {
            return because("is still being deleted");
        }
        let Some(placement) = &status.placement else {
            return if status.reason == "DoesNotFit" { None } else { because("is not placed") };
        };
        let wanted = match instance.spec.power {
            Power::Running => Phase::Running,
            Power::Stopped => Phase::Stopped,
            Power::Paused => Phase::Paused,
        };
        if status.phase != wanted {
            return because(&format!("should be {wanted}"));
        }
        let observed = &status.observed;
        if observed.generation != instance.metadata.generation {
            return because("its last change has not been carried out");
        }
        // What does not run is not restarted.
        if wanted == Phase::Running && observed.restart_generation != instance.spec.restart_generation {
            return because("has not been restarted");
        }
        let Some(machine) = self.machines.iter().find(|m| m.id == placement.node) else {
            return because("is placed on a node that does not exist");
        };
        let id = InstanceId(instance.metadata.id);
        let live = machine.guests.running().contains(&id);
        if live != (wanted != Phase::Stopped) {
            return because(&format!("the guest lives: {live}"));
        }
        if live {
            let seen = FakeDriver::new(machine.guests.clone()).observe(id).await.ok()?;
            let has: BTreeSet<_> = seen.volumes.iter().copied().collect();
            let wants: BTreeSet<_> = status.resolved.volumes.iter().copied().collect();
            if has != wants {
                return because(&format!("has the volumes {has:?}, should have {wants:?}"));
            }
            if observed.resources != Some(placement.resources) {
                return because("its size is not the one asked for");
            }
        }
        None
    }

    /// What is on the machines, or in the store, for objects that do not exist any more. Only once everything has settled.
    pub async fn check_leaks(&self) {
        for machine in &self.machines {
            let guests = FakeDriver::new(machine.guests.clone()).list().await.unwrap_or_default();
            let networks = machine.networks.list().await.unwrap_or_default();
            let volumes = machine.volumes.list().await.unwrap_or_default();
            let mirror = self.checks.mirror();
            let here = |id: Uuid| is_on(&mirror, InstanceId(id), machine.id);
            let guests = guests.into_iter().filter(|id| !here(id.0)).map(|id| format!("guest {id}"));
            let local = |network: &oblak_model::NetworkId| {
                mirror.ports.values().any(|p| p.status.network == *network && p.status.node == Some(machine.id))
            };
            let networks = networks.iter().filter(|id| !local(id)).map(|id| format!("network {id}"));
            let known =
                |id: Uuid| mirror.volumes.get(&id).is_some_and(|v| v.status.node == Some(machine.id)) || here(id);
            let volumes = volumes.iter().filter(|id| !known(id.0)).map(|id| format!("disk {id}"));
            let wanted = |id: &ImageId| {
                let used = || mirror.instances.values().any(|i| i.status.resolved.image == *id);
                let counted = |i: &Image| i.status.node == Some(machine.id) || i.status.nodes.contains(&machine.id);
                mirror.images.get(id).is_some_and(|image| counted(image) || used())
            };
            let images = machine.images.here().into_iter().filter(|id| !wanted(id)).map(|id| format!("image {id}"));
            let leaked: Vec<String> = guests.chain(networks).chain(volumes).chain(images).collect();
            if !leaked.is_empty() {
                self.trace.violation(format_args!("left over on {}: {}", machine.name, leaked.join(", ")));
            }
        }
    }

    /// Waits until the cloud is what is asked for.
    pub async fn settle(&self, within: Duration) {
        let deadline = Instant::now() + within;
        loop {
            self.check_guests().await;
            let Some(why) = self.unrest().await else { return };
            if Instant::now() >= deadline {
                self.trace.violation(format_args!("not settled after {} s: {why}", within.as_secs()));
                return;
            }
            if self.trace.violated().is_some() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
    }

    /// Forgets the history of the store, so that who is behind must list again.
    pub async fn compact(&self) {
        if let Ok(head) = self.store.revision().await {
            self.trace.note("chaos", format_args!("history up to {head} is forgotten"));
            let _ = self.store.compact(head).await;
        }
    }
}

fn is_on(mirror: &Mirror, id: InstanceId, node: NodeId) -> bool {
    mirror.instances.get(&id).is_some_and(|i| i.status.placement.as_ref().is_some_and(|p| p.node == node))
}
