//! One network over several nodes: who reaches whom, what is kept out, what stays quiet.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use oblak_network::{NetworkDriver, NetworkPlan, PortKind, Protocol, Rule, SubnetPlan};
use support::cloud::{Cloud, sent};
use support::frames::{BROADCAST, Mac, Wire, arp, contains, ethernet, mac, udp};
use support::{PATIENCE, SILENCE, Server, ask, everything, guest, output, pings, plan_with, v4, within};

use PortKind::Netns;

const VNI: u32 = 0x0012_3456;
const IPV4: u16 = 0x0800;
const ARP: u16 = 0x0806;

fn open(name: &str, ports: usize) -> NetworkPlan {
    let mut plan = plan_with(name, &vec![Netns; ports]);
    for port in &mut plan.ports {
        port.ingress = everything();
    }
    plan
}

/// Whether a ping with this many bytes in its IP packet arrives without being cut into pieces.
fn fits(from: &Path, to: IpAddr, bytes: u16) -> bool {
    let header = if to.is_ipv4() { 28 } else { 48 };
    let (size, to) = ((bytes - header).to_string(), to.to_string());
    let arguments = ["-M", "do", "-c1", "-W1", "-q", "-s", &size, &to];
    within(from, || Command::new("ping").args(arguments).output()).unwrap().status.success()
}

#[tokio::test]
async fn guests_of_two_nodes_reach_each_other_over_both_families() {
    let Some(cloud) = Cloud::new(2) else { return };
    for over_v4 in [true, false] {
        let mut plan = open("across", 2);
        plan.subnets.push(SubnetPlan {
            cidr: "fd77::/64".parse().unwrap(),
            gateway: "fd77::1".parse().unwrap(),
            lease_s: 60,
        });
        for (i, port) in plan.ports.iter_mut().enumerate() {
            port.addresses.push(format!("fd77::{}", i + 10).parse().unwrap());
        }
        let handles = cloud.apply(&plan, &[0, 1], over_v4).await;
        let [a, b] = [0, 1].map(|i| guest(&handles[i], &plan.ports[i]));
        let started = Instant::now();
        assert!(pings(&a, v4(&plan.ports[1]).into(), PATIENCE));
        println!("first answer over {} after {:?}", if over_v4 { "IPv4" } else { "IPv6" }, started.elapsed());
        assert!(pings(&b, v4(&plan.ports[0]).into(), PATIENCE));
        assert!(pings(&a, "fd77::11".parse().unwrap(), PATIENCE));
        let server = Server::start(&b, v4(&plan.ports[1]), 0);
        let seen = ask(&a, v4(&plan.ports[1]), server.port, PATIENCE).unwrap();
        assert_eq!(seen, v4(&plan.ports[0]).to_string(), "from its own address");
        // Exactly as large as the network says, and not more.
        let mtu = if over_v4 { 1450 } else { 1430 };
        for to in [IpAddr::from(v4(&plan.ports[1])), "fd77::11".parse().unwrap()] {
            assert!(fits(&a, to, mtu), "{mtu} bytes to {to}");
            assert!(!fits(&a, to, mtu + 1), "{} bytes to {to}", mtu + 1);
        }
        for node in &cloud.nodes {
            node.driver.remove(plan.id).await.unwrap();
        }
    }
}

#[tokio::test]
async fn groups_hold_across_nodes() {
    let Some(cloud) = Cloud::new(2) else { return };
    let mut plan = plan_with("groups", &[Netns, Netns, Netns]);
    for port in &mut plan.ports {
        port.ingress.clear();
    }
    let home = [0, 1, 0];
    let handles = cloud.apply(&plan, &home, true).await;
    let [a, b, c] = [0, 1, 2].map(|i| guest(&handles[home[i]], &plan.ports[i]));
    let address = v4(&plan.ports[1]);
    let server = Server::start(&b, address, 0);
    assert!(!pings(&a, address.into(), SILENCE), "closed by default");
    let peers = vec![format!("{}/32", v4(&plan.ports[2])).parse().unwrap()];
    plan.ports[1].ingress =
        vec![Rule { protocol: Some(Protocol::Tcp), ports: Some((server.port, server.port)), peers }];
    cloud.apply(&plan, &home, true).await;
    assert!(ask(&c, address, server.port, PATIENCE).is_ok(), "the peer that is named, and answers to it");
    assert!(ask(&a, address, server.port, SILENCE).is_err(), "not another one");
    assert!(!pings(&c, address.into(), SILENCE), "not another protocol");
    plan.ports[2].egress = Some(Vec::new());
    cloud.apply(&plan, &home, true).await;
    assert!(ask(&c, address, server.port, SILENCE).is_err(), "what may not leave does not");
}

#[tokio::test]
async fn subnets_are_routed_by_the_node_of_the_sender() {
    let Some(cloud) = Cloud::new(2) else { return };
    let mut plan = open("routed", 2);
    plan.subnets.push(SubnetPlan {
        cidr: "10.88.0.0/24".parse().unwrap(),
        gateway: "10.88.0.1".parse().unwrap(),
        lease_s: 60,
    });
    plan.ports[1].addresses = vec!["10.88.0.5".parse().unwrap()];
    let handles = cloud.apply(&plan, &[0, 1], true).await;
    let [a, b] = [0, 1].map(|i| guest(&handles[i], &plan.ports[i]));
    assert!(pings(&a, "10.88.0.5".parse().unwrap(), PATIENCE));
    assert!(pings(&b, v4(&plan.ports[0]).into(), PATIENCE));
    plan.ports[1].ingress.clear();
    cloud.apply(&plan, &[0, 1], true).await;
    assert!(!pings(&a, "10.88.0.5".parse().unwrap(), SILENCE), "under the same rules");
}

/// Address and MAC of the gateway are the same everywhere, it answers where the guest is, and what nobody has asked for is not sent around.
#[tokio::test]
async fn the_gateway_is_local_and_the_underlay_stays_quiet() {
    let Some(cloud) = Cloud::new(2) else { return };
    let plan = open("quiet", 2);
    let handles = cloud.apply(&plan, &[0, 1], true).await;
    let guests = [0, 1].map(|i| guest(&handles[i], &plan.ports[i]));
    let tunnels = [0, 1].map(|i| handles[i].netns.clone().unwrap());
    assert!(pings(&guests[0], v4(&plan.ports[1]).into(), PATIENCE));
    let before = [0, 1].map(|i| sent(&tunnels[i], "vx0"));
    assert!(before[0] > 0);
    let mut macs = Vec::new();
    for from in &guests {
        output(from, "ip", &["neigh", "flush", "all"]);
        assert!(pings(from, plan.subnets[0].gateway, PATIENCE));
        let known = output(from, "ip", &["neigh", "show", "10.77.0.1"]);
        macs.push(known.split(' ').skip_while(|w| *w != "lladdr").nth(1).unwrap().to_string());
        assert!(!pings(from, "10.77.0.77".parse().unwrap(), SILENCE), "nobody has it");
    }
    assert_eq!(macs[0], macs[1]);
    let (me, there) = (mac(&plan.ports[0].mac), mac(&plan.ports[1].mac));
    let mut wire = Wire::open(&guests[0], "eth0");
    wire.send(&ethernet(BROADCAST, me, IPV4, &udp(v4(&plan.ports[0]), Ipv4Addr::BROADCAST, (1, 2), "broadcast")));
    wire.send(&ethernet(
        [1, 0, 0x5e, 0, 0, 1],
        me,
        IPV4,
        &udp(v4(&plan.ports[0]), [224, 0, 0, 1].into(), (1, 2), "multicast"),
    ));
    wire.send(&ethernet([2, 0, 0, 9, 9, 9], me, IPV4, &udp(v4(&plan.ports[0]), v4(&plan.ports[1]), (1, 2), "unknown")));
    wire.send(&ethernet(there, me, IPV4, &udp(v4(&plan.ports[0]), [10, 77, 0, 99].into(), (1, 2), "not its address")));
    // Answered by the bridge from what it was told.
    output(&guests[0], "ip", &["neigh", "flush", "all"]);
    wire.send(&ethernet(BROADCAST, me, ARP, &arp_request(me, v4(&plan.ports[0]), v4(&plan.ports[1]))));
    let reply = |f: &[u8]| f.len() >= 42 && f[12..14] == [8, 6] && f[20..22] == [0, 2] && f[22..28] == there;
    assert!(wire.until_one(reply, PATIENCE).iter().any(|f| reply(f)), "an answer with the MAC of the guest elsewhere");
    assert_eq!([0, 1].map(|i| sent(&tunnels[i], "vx0")), before, "not one packet has left a node");
}

fn arp_request(sender: Mac, address: Ipv4Addr, target: Ipv4Addr) -> Vec<u8> {
    let mut request = arp(sender, address, target, "");
    request[7] = 1;
    request
}

/// A frame as VXLAN carries it (RFC 7348, section 5).
fn tunneled(vni: u32, frame: &[u8]) -> Vec<u8> {
    let [_, a, b, c] = vni.to_be_bytes();
    [&[0x08, 0, 0, 0, a, b, c, 0], frame].concat()
}

#[tokio::test]
async fn forged_tunnel_packets_never_arrive() {
    let Some(cloud) = Cloud::new(2) else { return };
    let plan = open("forged", 3);
    let handles = cloud.apply(&plan, &[0, 1, 1], true).await;
    let [far, victim, local] = [0, 1, 2].map(|i| (mac(&plan.ports[i].mac), v4(&plan.ports[i])));
    let mut wire = Wire::open(&guest(&handles[1], &plan.ports[1]), "eth0");
    let mut gateway = Wire::open(handles[1].netns.as_ref().unwrap(), "br0");
    let to = SocketAddr::new(cloud.nodes[1].v4, 4789);
    let send = |from: &Path, vni: u32, frame: &[u8]| {
        within(from, || UdpSocket::bind("0.0.0.0:0").unwrap().send_to(&tunneled(vni, frame), to).unwrap());
    };
    let datagram = |from: Ipv4Addr, text: &str| udp(from, victim.1, (4000, 5000), text);
    let honest = |text: &str| ethernet(victim.0, far.0, IPV4, &datagram(far.1, text));
    let shown = output(handles[1].netns.as_ref().unwrap(), "ip", &["-o", "link", "show", "br0"]);
    let gateway_mac = mac(shown.split(' ').skip_while(|w| *w != "link/ether").nth(1).unwrap());
    // Who is not a node gets nothing in, however right the rest is.
    send(&cloud.stranger, VNI, &honest("stranger"));
    // Even a node can only speak for ports that are elsewhere, and only to ports that are here.
    let node = &cloud.nodes[0].host;
    let forged = [
        ("bad-mac", ethernet(victim.0, [2, 0, 0, 1, 2, 3], IPV4, &datagram(far.1, "bad-mac"))),
        ("bad-ip", ethernet(victim.0, far.0, IPV4, &datagram([10, 77, 0, 50].into(), "bad-ip"))),
        ("local-ip", ethernet(victim.0, local.0, IPV4, &datagram(local.1, "local-ip"))),
        ("gateway-ip", ethernet(victim.0, gateway_mac, IPV4, &datagram([10, 77, 0, 1].into(), "gateway-ip"))),
        ("broadcast", ethernet(BROADCAST, far.0, IPV4, &datagram(far.1, "broadcast"))),
        ("arp-gateway", ethernet(victim.0, far.0, ARP, &arp(far.0, [10, 77, 0, 1].into(), victim.1, "arp-gateway"))),
        ("to-gateway", ethernet(gateway_mac, far.0, IPV4, &udp(far.1, [192, 0, 2, 9].into(), (1, 2), "to-gateway"))),
    ];
    for (_, frame) in &forged {
        send(node, VNI, frame);
    }
    send(node, VNI + 1, &honest("other-network"));
    send(node, VNI, &honest("honest"));
    let mut seen = wire.until("honest", PATIENCE);
    assert!(seen.iter().any(|f| contains(f, "honest")), "a node's packet for a guest elsewhere arrives");
    seen.extend(gateway.until("none", Duration::from_millis(100)));
    for name in forged.iter().map(|(name, _)| *name).chain(["stranger", "other-network"]) {
        assert!(!seen.iter().any(|f| contains(f, name)), "{name} arrived");
    }
    let rules = output(&cloud.nodes[1].host, "nft", &["list", "ruleset"]);
    assert!(rules.contains("counter packets 1 bytes"), "the stranger was counted: {rules}");
}

#[tokio::test]
async fn a_guest_moves_and_keeps_its_address() {
    let Some(cloud) = Cloud::new(3) else { return };
    let plan = open("moves", 3);
    let handles = cloud.apply(&plan, &[0, 1, 0], true).await;
    let [a, c] = [0, 2].map(|i| guest(&handles[0], &plan.ports[i]));
    let address: IpAddr = v4(&plan.ports[1]).into();
    assert!(pings(&a, address, PATIENCE));
    // To a third node, to the node of the others, and back.
    for to in [2, 0, 1] {
        let handles = cloud.apply(&plan, &[0, to, 0], true).await;
        let moved = guest(&handles[to], &plan.ports[1]);
        let started = Instant::now();
        for from in [&a, &c] {
            assert!(pings(from, address, PATIENCE), "at node {to}");
        }
        assert!(pings(&moved, v4(&plan.ports[0]).into(), PATIENCE));
        assert!(started.elapsed() < Duration::from_secs(2), "{:?}: found at once", started.elapsed());
    }
    // Another guest gets the address: those who remember the old MAC are told.
    let mut heir = plan.clone();
    heir.ports[1] = oblak_network::conformance::port(&plan, Netns, 11);
    heir.ports[1].mac = "02:00:00:77:ff:ff".into();
    heir.ports[1].ingress = everything();
    cloud.apply(&heir, &[0, 1, 0], true).await;
    let started = Instant::now();
    assert!(pings(&a, address, PATIENCE));
    assert!(started.elapsed() < Duration::from_secs(2), "{:?}", started.elapsed());
}

#[tokio::test]
async fn the_tunnel_comes_with_the_first_port_elsewhere_and_leaves_nothing() {
    let Some(cloud) = Cloud::new(2) else { return };
    let before = cloud.traces();
    let plan = open("traces", 3);
    let alone = cloud.apply(&plan, &[0, 0, 0], true).await;
    let netns = alone[0].netns.clone().unwrap();
    let tunnel = || output(&netns, "ip", &["-d", "link", "show", "vx0"]);
    assert_eq!(tunnel(), "", "nobody is elsewhere");
    let single = cloud.traces();
    cloud.apply(&plan, &[0, 1, 1], true).await;
    let shown = tunnel();
    for part in [
        "vxlan id 1193046",
        "local 192.0.2.1",
        "dstport 4789",
        "nolearning",
        "learning off flood off",
        "neigh_suppress on",
    ] {
        assert!(shown.contains(part), "{part}: {shown}");
    }
    let known = |what: &[&str]| output(&netns, what[0], &what[1..]).lines().count();
    let told = [
        known(&["ip", "neigh", "show", "dev", "br0", "nud", "permanent"]),
        known(&["sh", "-c", "bridge fdb show dev vx0 | grep -c ' dst 192.0.2.2 ' | xargs seq"]),
    ];
    assert_eq!(told, [2, 2]);
    cloud.apply(&plan, &[0, 0, 0], true).await;
    assert_eq!(tunnel(), "", "gone with the last one");
    assert_eq!(known(&["ip", "neigh", "show", "dev", "br0", "nud", "permanent"]), 0);
    assert_eq!(cloud.traces(), single);
    cloud.apply(&plan, &[0, 1, 1], true).await;
    for node in &cloud.nodes {
        node.driver.remove(plan.id).await.unwrap();
    }
    assert_eq!(cloud.traces(), before);
}

#[tokio::test]
async fn what_stands_in_the_way_is_named() {
    let Some(cloud) = Cloud::new(1) else { return };
    let node = &cloud.nodes[0];
    let ability = node.driver.overlay().unwrap();
    let found = ability.underlay(node.v4).await.unwrap();
    assert_eq!((found.address, found.mtu), (node.v4, 1500));
    let error = ability.underlay([198, 51, 100, 7].into()).await.unwrap_err();
    assert!(error.code == "underlay_missing" && error.detail.contains("198.51.100.7"), "{error}");
    let mut plan = open("blocked", 2);
    plan.ports[1].kind = PortKind::Remote;
    plan.ports[1].tunnel = Some([192, 0, 2, 9].into());
    plan.overlay = Some(oblak_network::OverlayPlan { vni: VNI, local: node.v4 });
    let held = within(&node.host, || UdpSocket::bind("0.0.0.0:4789")).unwrap();
    let error = node.driver.ensure(&plan).await.unwrap_err();
    assert!(error.code == "underlay_port_taken" && error.detail.contains("4789"), "{error}");
    drop(held);
    node.driver.ensure(&plan).await.unwrap();
    let mut twin = open("twin", 2);
    twin.ports[1] = plan.ports[1].clone();
    twin.overlay = plan.overlay;
    assert_eq!(node.driver.ensure(&twin).await.unwrap_err().code, "vni_taken");
}
