//! What every network driver must do, as tests. A driver passes a [`Testbed`] to [`run`].
//!
//! Panics on the first thing that is wrong, as tests do.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "test code that other crates call")]

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use oblak_platform::driver::Remedy;
use tokio::time::timeout;

use crate::overlay::OverlayPlan;
use crate::{
    NetworkDriver, NetworkHandle, NetworkPlan, PortHandle, PortKind, PortPlan, Protocol, PublishPlan, Rule, SubnetPlan,
};

/// A node on which a driver can be tried.
pub trait Testbed: Send + Sync {
    /// Opens the driver. A second one finds what the first has made: this is how a restart is played.
    fn driver(&self) -> Arc<dyn NetworkDriver>;
    /// Takes an address of the host, as another process would, until the answer is dropped.
    fn occupy(&self, address: SocketAddr) -> Box<dyn Send>;
    /// An address of the node where tunnels may begin.
    fn underlay(&self) -> IpAddr;
}

/// The longest any call may take in a test.
const DEADLINE: Duration = Duration::from_secs(30);

/// All cases, one after the other, on one testbed that is left as it was.
pub async fn run(bed: &dyn Testbed) {
    let before = bed.driver().list().await.unwrap();
    nothing_is_fine(bed).await;
    ensure_twice_and_find_again(bed).await;
    whole_state(bed).await;
    counters_of_local_ports(bed).await;
    refused_publishes(bed).await;
    cancellation(bed).await;
    dial_only_guests(bed).await;
    overlay(bed).await;
    assert_eq!(bed.driver().list().await.unwrap(), before, "everything made was removed");
}

/// Removing, observing and counting what does not exist.
async fn nothing_is_fine(bed: &dyn Testbed) {
    let driver = bed.driver();
    let id = plan("nothing").id;
    driver.remove(id).await.unwrap();
    assert_eq!(driver.observe(id).await.unwrap(), None);
    assert_eq!(driver.counters(id).await.unwrap_err().remedy, Remedy::Gone);
    assert!(driver.probe().await.available);
}

/// The same plan again changes nothing, and a restarted driver sees the same.
async fn ensure_twice_and_find_again(bed: &dyn Testbed) {
    let driver = bed.driver();
    let mut wanted = plan("twice");
    wanted.ports =
        vec![port(&wanted, PortKind::Tap, 10), port(&wanted, PortKind::Netns, 11), port(&wanted, PortKind::Remote, 12)];
    let first = driver.ensure(&wanted).await.unwrap();
    check_handle(&wanted, &first);
    assert_eq!(driver.ensure(&wanted).await.unwrap(), first);
    drop(driver);
    let again = bed.driver();
    assert!(again.list().await.unwrap().contains(&wanted.id));
    assert_eq!(again.observe(wanted.id).await.unwrap(), Some(first.clone()));
    assert_eq!(again.ensure(&wanted).await.unwrap(), first);
    remove(&*again, &wanted).await;
}

/// A plan is the whole truth: ports come, change their kind and go.
async fn whole_state(bed: &dyn Testbed) {
    let driver = bed.driver();
    let mut wanted = plan("whole");
    let (a, b) = (port(&wanted, PortKind::Tap, 10), port(&wanted, PortKind::Netns, 11));
    for ports in [vec![a.clone()], vec![a.clone(), b.clone()], vec![b.clone()], vec![]] {
        wanted.ports = ports;
        let handle = driver.ensure(&wanted).await.unwrap();
        check_handle(&wanted, &handle);
        assert_eq!(driver.observe(wanted.id).await.unwrap(), Some(handle));
    }
    let mut changed = a;
    wanted.ports = vec![changed.clone()];
    driver.ensure(&wanted).await.unwrap();
    changed.kind = PortKind::Netns;
    wanted.ports = vec![changed.clone()];
    check_handle(&wanted, &driver.ensure(&wanted).await.unwrap());
    changed.kind = PortKind::Remote;
    wanted.ports = vec![changed];
    check_handle(&wanted, &driver.ensure(&wanted).await.unwrap());
    remove(&*driver, &wanted).await;
}

async fn counters_of_local_ports(bed: &dyn Testbed) {
    let driver = bed.driver();
    let mut wanted = plan("count");
    wanted.ports = vec![port(&wanted, PortKind::Tap, 10), port(&wanted, PortKind::Remote, 11)];
    driver.ensure(&wanted).await.unwrap();
    let counters = driver.counters(wanted.id).await.unwrap();
    assert_eq!(counters.keys().collect::<Vec<_>>(), [&wanted.ports[0].id]);
    remove(&*driver, &wanted).await;
}

/// A host port that is taken is refused with a reason, everything else is made; who has a port keeps it.
async fn refused_publishes(bed: &dyn Testbed) {
    let driver = bed.driver();
    let host = SocketAddr::from(([127, 0, 0, 1], 18_431));
    let publish =
        |port: u16| PublishPlan { host: SocketAddr::new(host.ip(), port), guest_port: 80, protocol: Protocol::Tcp };
    let (mut one, mut two) = (plan("pub-one"), plan("pub-two"));
    let mut publisher = port(&one, PortKind::Netns, 10);
    publisher.publish = vec![publish(host.port()), publish(host.port() + 1)];
    one.ports = vec![publisher];
    let mut rival = port(&two, PortKind::Netns, 10);
    rival.publish = vec![publish(host.port())];
    two.ports = vec![rival];

    let guard = bed.occupy(SocketAddr::new(host.ip(), host.port() + 1));
    let handle = driver.ensure(&one).await.unwrap();
    check_handle(&one, &handle);
    let refused: Vec<_> = handle.refused.iter().map(|(_, host, _)| host.port()).collect();
    assert_eq!(refused, [host.port() + 1], "{:?}", handle.refused);
    assert!(!handle.refused[0].2.is_empty());
    drop(guard);

    let handle = driver.ensure(&two).await.unwrap();
    assert_eq!(handle.refused.len(), 1, "another network has it");
    assert_eq!(
        driver.ensure(&one).await.unwrap().refused.iter().filter(|r| r.1 == host).count(),
        0,
        "it stays with the first"
    );
    remove(&*driver, &one).await;
    assert_eq!(driver.ensure(&two).await.unwrap().refused, [], "free again");
    remove(&*driver, &two).await;
}

/// Calls given up at any moment leave nothing that a later `ensure` or `remove` does not settle.
async fn cancellation(bed: &dyn Testbed) {
    let driver = bed.driver();
    let mut wanted = plan("cancel");
    wanted.ports = vec![port(&wanted, PortKind::Tap, 10), port(&wanted, PortKind::Netns, 11)];
    for micros in [0, 50, 500, 2_000, 8_000] {
        let _ = timeout(Duration::from_micros(micros), driver.ensure(&wanted)).await;
        check_handle(&wanted, &timeout(DEADLINE, driver.ensure(&wanted)).await.unwrap().unwrap());
        let _ = timeout(Duration::from_micros(micros), driver.remove(wanted.id)).await;
        let _ = timeout(Duration::from_micros(micros), driver.ensure(&wanted)).await;
        remove(&*driver, &wanted).await;
    }
}

async fn dial_only_guests(bed: &dyn Testbed) {
    let driver = bed.driver();
    let mut wanted = plan("dial");
    wanted.ports = vec![port(&wanted, PortKind::Netns, 10)];
    driver.ensure(&wanted).await.unwrap();
    let stranger = SocketAddr::from(([127, 0, 0, 1], 22));
    let error = driver.dial(wanted.id, stranger).await.err().expect("an address that is not a guest's");
    assert_eq!(error.remedy, Remedy::Permanent, "{error}");
    remove(&*driver, &wanted).await;
    assert_eq!(driver.dial(wanted.id, stranger).await.err().unwrap().remedy, Remedy::Gone);
}

/// Ports on other nodes come, move and go without touching the local ones; plans that cannot be are refused before anything is made.
async fn overlay(bed: &dyn Testbed) {
    let driver = bed.driver();
    let mut wanted = plan("overlay");
    let local = bed.underlay();
    wanted.overlay = Some(OverlayPlan { vni: 0x00ab_cdef, local });
    wanted.ports = vec![port(&wanted, PortKind::Tap, 10), port(&wanted, PortKind::Remote, 11)];
    let [near, far] = [2, 3].map(|last| neighbour(local, last));
    wanted.ports[1].tunnel = Some(near);
    let Some(ability) = driver.overlay() else {
        let error = driver.ensure(&wanted).await.unwrap_err();
        assert_eq!(error.code, "unsupported", "{error}");
        return;
    };
    assert_eq!(ability.underlay(local).await.unwrap().address, local);
    let spoil: [fn(&mut NetworkPlan); 5] = [
        |p| p.overlay = None,
        |p| p.ports[1].tunnel = p.overlay.map(|o| o.local),
        |p| p.ports[1].tunnel = Some(if p.overlay.unwrap().local.is_ipv4() { [0; 16].into() } else { [1; 4].into() }),
        |p| p.overlay.as_mut().unwrap().vni = 0,
        |p| p.overlay.as_mut().unwrap().vni = 1 << 24,
    ];
    for spoil in spoil {
        let mut bad = wanted.clone();
        spoil(&mut bad);
        assert_eq!(driver.ensure(&bad).await.unwrap_err().code, "plan_invalid");
    }
    assert!(!driver.list().await.unwrap().contains(&wanted.id));

    let handle = driver.ensure(&wanted).await.unwrap();
    check_handle(&wanted, &handle);
    assert_eq!(driver.ensure(&wanted).await.unwrap(), handle);
    let remote = SocketAddr::new(wanted.ports[1].addresses[0], 22);
    assert_eq!(driver.dial(wanted.id, remote).await.err().unwrap().code, "not_here", "it is dialed where it is");
    for tunnel in [Some(far), None, Some(near)] {
        wanted.ports[1].tunnel = tunnel;
        assert_eq!(driver.ensure(&wanted).await.unwrap(), handle);
        assert_eq!(bed.driver().observe(wanted.id).await.unwrap().as_ref(), Some(&handle));
    }
    wanted.ports[1].kind = PortKind::Netns;
    wanted.ports[1].tunnel = None;
    check_handle(&wanted, &driver.ensure(&wanted).await.unwrap());
    wanted.ports[1].kind = PortKind::Remote;
    wanted.ports[1].tunnel = Some(far);
    check_handle(&wanted, &driver.ensure(&wanted).await.unwrap());
    remove(&*driver, &wanted).await;
}

/// Another address with this last byte.
fn neighbour(of: IpAddr, last: u8) -> IpAddr {
    match of {
        IpAddr::V4(a) => {
            let [x, y, z, w] = a.octets();
            [x, y, z, w ^ last].into()
        }
        IpAddr::V6(a) => {
            let mut octets = a.octets();
            octets[15] ^= last;
            octets.into()
        }
    }
}

/// Removes twice and looks that nothing is left.
async fn remove(driver: &dyn NetworkDriver, plan: &NetworkPlan) {
    for _ in 0..2 {
        timeout(DEADLINE, driver.remove(plan.id)).await.unwrap().unwrap();
        assert_eq!(driver.observe(plan.id).await.unwrap(), None);
        assert!(!driver.list().await.unwrap().contains(&plan.id));
    }
}

/// The handle has exactly the local ports, each of its kind.
fn check_handle(plan: &NetworkPlan, handle: &NetworkHandle) {
    let wanted: BTreeSet<_> = plan.ports.iter().filter(|p| p.kind != PortKind::Remote).map(|p| p.id).collect();
    assert_eq!(handle.ports.keys().copied().collect::<BTreeSet<_>>(), wanted);
    assert!(handle.netns.is_some());
    for port in plan.ports.iter().filter(|p| p.kind != PortKind::Remote) {
        match (&handle.ports[&port.id], port.kind) {
            (PortHandle::Tap { vnet_hdr, device, .. }, PortKind::Tap) => assert!(*vnet_hdr && !device.is_empty()),
            (PortHandle::Netns { resolv_conf, .. }, PortKind::Netns) => {
                assert!(resolv_conf.contains(&format!("{}.{}.oblak.internal", plan.name, plan.project)));
            }
            (other, kind) => panic!("{kind:?} became {other:?}"),
        }
    }
}

/// A network 10.77.0.0/24 without ports; every call gives another id.
#[must_use]
pub fn plan(name: &str) -> NetworkPlan {
    NetworkPlan {
        id: fresh().into(),
        name: name.into(),
        project: "demo".into(),
        mtu: 1400,
        nat: true,
        subnets: vec![SubnetPlan {
            cidr: "10.77.0.0/24".parse().unwrap(),
            gateway: "10.77.0.1".parse().unwrap(),
            lease_s: 3600,
        }],
        ports: Vec::new(),
        forwarders: Vec::new(),
        overlay: None,
    }
}

/// A port of a new instance with the address `10.77.0.<last>` in the first subnet, reachable by pings only.
#[must_use]
pub fn port(plan: &NetworkPlan, kind: PortKind, last: u8) -> PortPlan {
    let address: IpAddr = match plan.subnets[0].cidr.network() {
        IpAddr::V4(base) => IpAddr::V4((base.to_bits() + u32::from(last)).into()),
        IpAddr::V6(base) => IpAddr::V6((base.to_bits() + u128::from(last)).into()),
    };
    PortPlan {
        id: fresh().into(),
        instance: fresh().into(),
        index: 0,
        kind,
        mac: format!("02:00:00:77:00:{last:02x}"),
        addresses: vec![address],
        hostname: format!("guest{last}"),
        ingress: vec![Rule { protocol: Some(Protocol::Icmp), ports: None, peers: Vec::new() }],
        egress: None,
        publish: Vec::new(),
        metadata: None,
        userns: None,
        tunnel: None,
        standby: false,
        midstream: false,
    }
}

/// Unique on this machine, ordered by age, so that tests that run side by side do not meet.
fn fresh() -> uuid::Uuid {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let next = NEXT.fetch_add(1, Ordering::Relaxed);
    let mut bytes = *uuid::Uuid::now_v7().as_bytes();
    // The tail becomes a name of an interface: counter and process make it unlike any other.
    bytes[11..13].copy_from_slice(&(std::process::id() as u16).to_be_bytes());
    bytes[13..16].copy_from_slice(&next.to_be_bytes()[5..8]);
    uuid::Uuid::from_bytes(bytes)
}
