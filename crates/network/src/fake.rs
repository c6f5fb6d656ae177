//! A network driver without a network, for tests and simulation: keeps plans, follows orders to fail or to be slow.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use oblak_model::{NetworkId, PortId};
use oblak_platform::driver::{Availability, BoxDuplex, DriverError, DriverResult};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::overlay::{self, Overlay, Underlay};
use crate::{Capabilities, NetworkDriver, NetworkHandle, NetworkPlan, PortCounters, PortHandle, PortKind, Protocol};

/// Bytes that fit into a fake connection in one direction.
const PIPE: usize = 64 * 1024;

/// The fake. Clones share one world, so a clone is what a restarted agent would open.
#[derive(Clone, Debug, Default)]
pub struct FakeNetwork {
    world: Arc<Mutex<World>>,
    single: bool,
}

#[derive(Debug, Default)]
struct World {
    networks: BTreeMap<NetworkId, Network>,
    failures: VecDeque<DriverError>,
    delay: Duration,
    occupied: BTreeSet<SocketAddr>,
    services_started: u64,
    changes: u64,
}

/// MTU of the pretended underlay.
const UNDERLAY_MTU: u16 = 1500;

#[derive(Debug)]
struct Network {
    plan: NetworkPlan,
    handle: NetworkHandle,
    granted: Vec<(PortId, SocketAddr, Protocol)>,
    counters: BTreeMap<PortId, PortCounters>,
}

impl FakeNetwork {
    /// An empty world.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// An empty world of a driver that cannot carry networks between nodes.
    #[must_use]
    pub fn without_overlay() -> Self {
        Self { single: true, ..Self::default() }
    }

    fn world(&self) -> MutexGuard<'_, World> {
        // Every change of the world is complete when the lock is given back, so a panic elsewhere does not spoil it.
        self.world.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The next call that changes something fails with `error`; several are used in the order given.
    pub fn fail_next(&self, error: DriverError) {
        self.world().failures.push_back(error);
    }

    /// Calls that change something take this long.
    pub fn set_delay(&self, delay: Duration) {
        self.world().delay = delay;
    }

    /// Pretends that a process of the host listens on `address`.
    pub fn occupy(&self, address: SocketAddr) {
        self.world().occupied.insert(address);
    }

    /// Forgets what is plugged, as a reboot of the machine does. Plans are kept.
    pub fn reboot(&self) {
        let mut world = self.world();
        world.services_started = 0;
        for network in world.networks.values_mut() {
            network.handle = NetworkHandle::default();
            network.granted.clear();
        }
    }

    /// Sets what [`NetworkDriver::counters`] tells about a port.
    pub fn set_counters(&self, id: NetworkId, port: PortId, counters: PortCounters) {
        if let Some(network) = self.world().networks.get_mut(&id) {
            network.counters.insert(port, counters);
        }
    }

    /// The plan that was applied last.
    #[must_use]
    pub fn plan(&self, id: NetworkId) -> Option<NetworkPlan> {
        self.world().networks.get(&id).map(|n| n.plan.clone())
    }

    /// How often something was really changed.
    #[must_use]
    pub fn changes(&self) -> u64 {
        self.world().changes
    }

    /// How often netd was started.
    #[must_use]
    pub fn services_started(&self) -> u64 {
        self.world().services_started
    }

    async fn obstacles(&self) -> DriverResult<()> {
        let delay = self.world().delay;
        if !delay.is_zero() {
            tokio::time::sleep(delay).await;
        }
        self.world().failures.pop_front().map_or(Ok(()), Err)
    }
}

impl World {
    fn apply(&mut self, plan: &NetworkPlan) -> NetworkHandle {
        let mut handle = NetworkHandle { netns: Some(netns("n", &plan.id.short())), ..NetworkHandle::default() };
        let before = self.networks.remove(&plan.id);
        let mut granted: Vec<(PortId, SocketAddr, Protocol)> = Vec::new();
        for port in plan.ports.iter().filter(|p| p.kind != PortKind::Remote) {
            let made = match port.kind {
                PortKind::Tap => PortHandle::Tap {
                    netns: netns("n", &plan.id.short()),
                    device: format!("t{}", port.id.short()),
                    vnet_hdr: true,
                },
                PortKind::Netns | PortKind::Remote => PortHandle::Netns {
                    netns: netns("i", &port.instance.short()),
                    userns: port.userns.map(|_| netns("u", &port.instance.short())),
                    resolv_conf: format!("search {}.{}.oblak.internal\n", plan.name, plan.project),
                },
            };
            handle.ports.insert(port.id, made);
            for publish in &port.publish {
                let mine = (port.id, publish.host, publish.protocol);
                let had = before.as_ref().is_some_and(|b| b.granted.contains(&mine));
                let others = self.networks.values().flat_map(|n| &n.granted).chain(&granted);
                let clash = |g: &&(PortId, SocketAddr, Protocol)| g.2 == publish.protocol && meet(g.1, publish.host);
                if let Some((other, ..)) = others.into_iter().find(clash) {
                    handle.refused.push((port.id, publish.host, format!("already published by port {other}")));
                } else if !had && self.occupied.iter().any(|o| meet(*o, publish.host)) {
                    handle.refused.push((port.id, publish.host, "in use by another process on the host".into()));
                } else {
                    granted.push(mine);
                }
            }
        }
        if before.as_ref().is_none_or(|b| b.plan != *plan || b.handle != handle) {
            self.changes += 1;
        }
        let mut counters = before.map(|b| b.counters).unwrap_or_default();
        counters.retain(|id, _| handle.ports.contains_key(id));
        for id in handle.ports.keys() {
            counters.entry(*id).or_default();
        }
        self.networks.insert(plan.id, Network { plan: plan.clone(), handle: handle.clone(), granted, counters });
        handle
    }
}

fn netns(kind: &str, short: &str) -> PathBuf {
    PathBuf::from(format!("/fake/netns/oblak-{kind}-{short}"))
}

fn meet(a: SocketAddr, b: SocketAddr) -> bool {
    a.port() == b.port() && (a.ip() == b.ip() || a.ip().is_unspecified() || b.ip().is_unspecified())
}

#[async_trait]
impl NetworkDriver for FakeNetwork {
    fn name(&self) -> &'static str {
        "fake"
    }

    async fn probe(&self) -> Capabilities {
        Capabilities { available: true, probed: vec![Availability::yes("fake", "always")] }
    }

    async fn ensure(&self, plan: &NetworkPlan) -> DriverResult<NetworkHandle> {
        self.obstacles().await?;
        overlay::check(plan)?;
        if self.single && plan.overlay.is_some() {
            return Err(DriverError::unsupported("this driver cannot carry networks between nodes"));
        }
        Ok(self.world().apply(plan))
    }

    async fn observe(&self, id: NetworkId) -> DriverResult<Option<NetworkHandle>> {
        let found = self.world().networks.get(&id).map(|n| n.handle.clone());
        Ok(found.filter(|h| h.netns.is_some()))
    }

    async fn list(&self) -> DriverResult<Vec<NetworkId>> {
        Ok(self.world().networks.keys().copied().collect())
    }

    async fn remove(&self, id: NetworkId) -> DriverResult<()> {
        self.obstacles().await?;
        let mut world = self.world();
        if world.networks.remove(&id).is_some() {
            world.changes += 1;
        }
        Ok(())
    }

    async fn counters(&self, id: NetworkId) -> DriverResult<BTreeMap<PortId, PortCounters>> {
        let found = self.world().networks.get(&id).map(|n| n.counters.clone());
        found.ok_or_else(|| DriverError::gone(format!("network {id} is not on this node")))
    }

    /// A connection that sends back what it is sent.
    async fn dial(&self, id: NetworkId, to: SocketAddr) -> DriverResult<BoxDuplex> {
        let known = match self.world().networks.get(&id) {
            None => return Err(DriverError::gone(format!("network {id} is not on this node"))),
            Some(network) => network.plan.ports.iter().find(|p| p.addresses.contains(&to.ip())).map(|p| p.kind),
        };
        match known {
            None => {
                return Err(DriverError::permanent("not_in_network", format!("{} is not in network {id}", to.ip())));
            }
            Some(PortKind::Remote) => {
                return Err(DriverError::permanent("not_here", format!("{} is on another node", to.ip())));
            }
            Some(PortKind::Tap | PortKind::Netns) => {}
        }
        let (near, mut far) = tokio::io::duplex(PIPE);
        tokio::spawn(async move {
            let mut buffer = vec![0; 4096];
            while let Ok(size @ 1..) = far.read(&mut buffer).await {
                if far.write_all(&buffer[..size]).await.is_err() {
                    break;
                }
            }
        });
        Ok(Box::new(near))
    }

    async fn ensure_services(&self) -> DriverResult<()> {
        self.obstacles().await?;
        self.world().services_started = 1;
        Ok(())
    }

    async fn stop_services(&self) -> DriverResult<()> {
        self.obstacles().await?;
        self.world().services_started = 0;
        Ok(())
    }

    fn overlay(&self) -> Option<&dyn Overlay> {
        (!self.single).then_some(self as &dyn Overlay)
    }
}

#[async_trait]
impl Overlay for FakeNetwork {
    async fn underlay(&self, address: IpAddr) -> DriverResult<Underlay> {
        Ok(Underlay { address, mtu: UNDERLAY_MTU })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::conformance::{self, Testbed};

    struct Bed(FakeNetwork);

    impl Testbed for Bed {
        fn driver(&self) -> Arc<dyn NetworkDriver> {
            Arc::new(self.0.clone())
        }
        fn occupy(&self, address: SocketAddr) -> Box<dyn Send> {
            self.0.occupy(address);
            Box::new(())
        }
        fn underlay(&self) -> IpAddr {
            [192, 0, 2, 1].into()
        }
    }

    #[tokio::test]
    async fn conforms() {
        conformance::run(&Bed(FakeNetwork::new())).await;
        conformance::run(&Bed(FakeNetwork::without_overlay())).await;
    }

    #[tokio::test]
    async fn follows_orders() {
        let fake = FakeNetwork::new();
        let plan = conformance::plan("orders");
        fake.fail_next(DriverError::retry("boom", "told to fail"));
        assert_eq!(fake.ensure(&plan).await.unwrap_err().code, "boom");
        assert!(fake.list().await.unwrap().is_empty());
        fake.ensure(&plan).await.unwrap();
        fake.reboot();
        assert_eq!(fake.observe(plan.id).await.unwrap(), None);
        assert_eq!(fake.list().await.unwrap(), vec![plan.id]);
    }
}
