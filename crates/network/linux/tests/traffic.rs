//! What guests can reach: each other, the outside, published ports.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use oblak_network::{NetworkDriver, PortKind, Protocol, PublishPlan, Rule};
use support::{Bed, HOST, OUTSIDE, PATIENCE, SILENCE, Server, ask, guest, output, pings, plan_with, v4};
use tokio::io::AsyncReadExt;

use PortKind::Netns;

const LOOPBACK: Ipv4Addr = Ipv4Addr::LOCALHOST;

fn tcp(port: u16) -> Rule {
    Rule { protocol: Some(Protocol::Tcp), ports: Some((port, port)), peers: Vec::new() }
}

#[tokio::test]
async fn guests_reach_each_other_their_gateway_and_the_outside() {
    let Some(bed) = Bed::new() else { return };
    let driver = bed.linux();
    let plan = plan_with("talk", &[Netns, Netns]);
    let handle = driver.ensure(&plan).await.unwrap();
    let [a, b] = [0, 1].map(|i| guest(&handle, &plan.ports[i]));
    assert!(pings(&a, v4(&plan.ports[1]).into(), PATIENCE));
    assert!(pings(&b, v4(&plan.ports[0]).into(), PATIENCE));
    assert!(pings(&a, plan.subnets[0].gateway, PATIENCE));
    assert!(pings(&a, Ipv4Addr::new(169, 254, 169, 254).into(), PATIENCE), "the metadata address is there");
    let server = Server::start(&bed.outside, OUTSIDE, 0);
    assert_eq!(ask(&a, OUTSIDE, server.port, PATIENCE).unwrap(), HOST.to_string(), "behind the host's address");
    let counters = driver.counters(plan.id).await.unwrap()[&plan.ports[0].id];
    assert!(counters.rx_packets > 3 && counters.tx_packets > 3 && counters.rx_bytes > 300, "{counters:?}");
    let ranges = output(&a, "cat", &["/proc/sys/net/ipv4/ping_group_range"]);
    assert_eq!(ranges.split_whitespace().collect::<Vec<_>>(), ["0", "2147483647"]);
}

#[tokio::test]
async fn without_nat_there_is_no_way_out() {
    let Some(bed) = Bed::new() else { return };
    let driver = bed.linux();
    let mut plan = plan_with("closed", &[Netns, Netns]);
    plan.nat = false;
    let handle = driver.ensure(&plan).await.unwrap();
    let a = guest(&handle, &plan.ports[0]);
    assert!(pings(&a, v4(&plan.ports[1]).into(), PATIENCE));
    assert!(!pings(&a, OUTSIDE.into(), SILENCE));
    assert!(!bed.links().iter().any(|l| l.starts_with("ou")), "no uplink: {:?}", bed.links());
    plan.nat = true;
    driver.ensure(&plan).await.unwrap();
    assert!(pings(&a, OUTSIDE.into(), PATIENCE));
    plan.nat = false;
    driver.ensure(&plan).await.unwrap();
    assert!(!pings(&a, OUTSIDE.into(), SILENCE));
}

#[tokio::test]
async fn equal_subnets_of_two_networks_work_and_do_not_meet() {
    let Some(bed) = Bed::new() else { return };
    let driver = bed.linux();
    let (one, two) = (plan_with("one", &[Netns, Netns]), plan_with("two", &[Netns]));
    let (first, second) = (driver.ensure(&one).await.unwrap(), driver.ensure(&two).await.unwrap());
    let (a, c) = (guest(&first, &one.ports[0]), guest(&second, &two.ports[0]));
    assert_eq!(v4(&one.ports[0]), v4(&two.ports[0]));
    assert!(pings(&a, v4(&one.ports[1]).into(), PATIENCE));
    assert!(!pings(&c, v4(&one.ports[1]).into(), SILENCE), "10.77.0.11 exists in the other network only");
    for from in [&a, &c] {
        assert!(pings(from, OUTSIDE.into(), PATIENCE));
    }
    // The uplink addresses of the other network, both ends.
    let uplinks = output(&bed.host, "ip", &["-4", "-o", "addr"]);
    let ends: Vec<Ipv4Addr> = uplinks
        .split_whitespace()
        .filter_map(|w| w.strip_suffix("/31")?.parse().ok())
        .flat_map(|host: Ipv4Addr| [host, Ipv4Addr::from(host.to_bits() + 1)])
        .collect();
    assert_eq!(ends.len(), 4, "{uplinks}");
    for from in [&a, &c] {
        let reached = ends.iter().filter(|end| pings(from, IpAddr::V4(**end), SILENCE)).count();
        assert_eq!(reached, 0, "uplinks are out of reach for guests");
    }
}

#[tokio::test]
async fn services_of_the_host_are_out_of_reach() {
    let Some(bed) = Bed::new() else { return };
    let driver = bed.linux();
    let plan = plan_with("walled", &[Netns]);
    let handle = driver.ensure(&plan).await.unwrap();
    let a = guest(&handle, &plan.ports[0]);
    let server = Server::start(&bed.host, Ipv4Addr::UNSPECIFIED, 0);
    assert!(ask(&bed.outside, HOST, server.port, PATIENCE).is_ok(), "it does serve the outside");
    assert!(ask(&a, HOST, server.port, SILENCE).is_err());
    // The way back in: the outside knows a route to the guests but must not be let in.
    let uplinks = output(&bed.host, "ip", &["-4", "-o", "addr"]);
    let end = uplinks.split_whitespace().find_map(|w| w.strip_suffix("/31")?.parse::<Ipv4Addr>().ok()).unwrap();
    let route = format!("{end}/31");
    output(&bed.outside, "ip", &["route", "add", &route, "via", &HOST.to_string()]);
    assert!(!pings(&bed.outside, Ipv4Addr::from(end.to_bits() + 1).into(), SILENCE));
}

#[tokio::test]
async fn groups_let_in_what_they_name_and_replies() {
    let Some(bed) = Bed::new() else { return };
    let driver = bed.linux();
    let mut plan = plan_with("groups", &[Netns, Netns, Netns]);
    for port in &mut plan.ports {
        port.ingress.clear();
    }
    let handle = driver.ensure(&plan).await.unwrap();
    let [a, b, c] = [0, 1, 2].map(|i| guest(&handle, &plan.ports[i]));
    let address = v4(&plan.ports[1]);
    let server = Server::start(&b, address, 0);
    assert!(!pings(&a, address.into(), SILENCE), "closed by default");
    assert!(ask(&a, address, server.port, SILENCE).is_err());
    assert!(pings(&a, OUTSIDE.into(), PATIENCE), "replies come back");

    plan.ports[1].ingress = vec![tcp(server.port)];
    driver.ensure(&plan).await.unwrap();
    assert_eq!(ask(&a, address, server.port, PATIENCE).unwrap(), v4(&plan.ports[0]).to_string());
    assert!(!pings(&a, address.into(), SILENCE), "only what was named");

    plan.ports[1].ingress[0].peers = vec![format!("{}/32", v4(&plan.ports[2])).parse().unwrap()];
    driver.ensure(&plan).await.unwrap();
    assert!(ask(&c, address, server.port, PATIENCE).is_ok());
    assert!(ask(&a, address, server.port, SILENCE).is_err(), "not from others");

    plan.ports[2].egress = Some(vec![Rule { protocol: Some(Protocol::Icmp), ports: None, peers: Vec::new() }]);
    driver.ensure(&plan).await.unwrap();
    assert!(ask(&c, address, server.port, SILENCE).is_err(), "may not leave");
    assert!(pings(&c, OUTSIDE.into(), PATIENCE));
}

#[tokio::test]
async fn two_subnets_are_routed_under_the_same_rules() {
    let Some(bed) = Bed::new() else { return };
    let driver = bed.linux();
    let mut plan = plan_with("subnets", &[Netns, Netns]);
    plan.subnets.push(oblak_network::SubnetPlan {
        cidr: "10.88.0.0/24".parse().unwrap(),
        gateway: "10.88.0.1".parse().unwrap(),
        lease_s: 600,
    });
    plan.ports[1].addresses = vec!["10.88.0.5".parse().unwrap()];
    let handle = driver.ensure(&plan).await.unwrap();
    let [a, b] = [0, 1].map(|i| guest(&handle, &plan.ports[i]));
    assert!(pings(&a, "10.88.0.5".parse().unwrap(), PATIENCE));
    plan.ports[1].ingress.clear();
    driver.ensure(&plan).await.unwrap();
    assert!(!pings(&a, "10.88.0.5".parse().unwrap(), SILENCE));
    assert!(pings(&b, v4(&plan.ports[0]).into(), PATIENCE));
}

#[tokio::test]
async fn ipv6_inside_and_out() {
    let Some(bed) = Bed::new() else { return };
    let driver = bed.linux();
    let mut plan = plan_with("six", &[Netns, Netns, Netns]);
    plan.subnets.push(oblak_network::SubnetPlan {
        cidr: "fd77::/64".parse().unwrap(),
        gateway: "fd77::1".parse().unwrap(),
        lease_s: 600,
    });
    for (i, port) in plan.ports.iter_mut().take(2).enumerate() {
        port.addresses.push(format!("fd77::{}", i + 10).parse().unwrap());
    }
    let handle = driver.ensure(&plan).await.unwrap();
    let [a, b] = [0, 1].map(|i| guest(&handle, &plan.ports[i]));
    assert!(pings(&a, "fd77::11".parse().unwrap(), PATIENCE));
    assert!(pings(&a, "fd77::1".parse().unwrap(), PATIENCE));
    for (netns, address) in [(&bed.host, "2001:db8::1/64"), (&bed.outside, "2001:db8::2/64")] {
        output(netns, "ip", &["addr", "add", address, "dev", "wan", "nodad"]);
    }
    assert!(pings(&a, "2001:db8::2".parse().unwrap(), PATIENCE), "through NAT");
    plan.ports[1].ingress.clear();
    driver.ensure(&plan).await.unwrap();
    assert!(!pings(&a, "fd77::11".parse().unwrap(), SILENCE));
    assert!(pings(&b, "fd77::10".parse().unwrap(), PATIENCE));
}

#[tokio::test]
async fn published_ports_work_from_everywhere() {
    let Some(bed) = Bed::new() else { return };
    let driver = bed.linux();
    let mut plan = plan_with("publish", &[Netns, Netns]);
    let publish = |host: Ipv4Addr, port| PublishPlan {
        host: SocketAddr::from((host, port)),
        guest_port: 80,
        protocol: Protocol::Tcp,
    };
    plan.ports[0].ingress.clear();
    plan.ports[0].publish = vec![publish(Ipv4Addr::UNSPECIFIED, 8080)];
    plan.ports[1].publish = vec![publish(LOOPBACK, 8081), publish(HOST, 8082)];
    let handle = driver.ensure(&plan).await.unwrap();
    assert_eq!(handle.refused, []);
    let [a, b] = [0, 1].map(|i| guest(&handle, &plan.ports[i]));
    let _servers = [Server::start(&a, v4(&plan.ports[0]), 80), Server::start(&b, v4(&plan.ports[1]), 80)];
    assert_eq!(ask(&bed.outside, HOST, 8080, PATIENCE).unwrap(), OUTSIDE.to_string(), "the client's address is kept");
    assert!(ask(&bed.host, LOOPBACK, 8080, PATIENCE).is_ok());
    assert!(ask(&bed.host, HOST, 8080, PATIENCE).is_ok());
    assert!(ask(&bed.host, LOOPBACK, 8081, PATIENCE).is_ok());
    assert!(ask(&bed.outside, HOST, 8081, SILENCE).is_err(), "loopback only");
    assert!(ask(&bed.outside, HOST, 8082, PATIENCE).is_ok());
    assert!(ask(&bed.host, LOOPBACK, 8082, SILENCE).is_err(), "that address only");
    for from in [&a, &b] {
        assert!(ask(from, HOST, 8080, PATIENCE).is_ok(), "guests may use it as well");
    }
    plan.nat = false;
    driver.ensure(&plan).await.unwrap();
    assert!(ask(&bed.outside, HOST, 8080, PATIENCE).is_ok(), "publishing does not need NAT");
    assert!(!pings(&a, OUTSIDE.into(), SILENCE));
    plan.ports[0].publish.clear();
    driver.ensure(&plan).await.unwrap();
    assert!(ask(&bed.outside, HOST, 8080, SILENCE).is_err(), "withdrawn");
}

#[tokio::test]
async fn a_taken_host_port_is_refused_with_the_reason() {
    let Some(bed) = Bed::new() else { return };
    let driver = bed.linux();
    let server = Server::start(&bed.host, Ipv4Addr::UNSPECIFIED, 0);
    let mut plan = plan_with("taken", &[Netns]);
    let publish = |host: SocketAddr| PublishPlan { host, guest_port: 80, protocol: Protocol::Tcp };
    let wanted = ["0.0.0.0:0", "198.51.100.7:9000", "[::1]:9001"].map(|t| t.parse::<SocketAddr>().unwrap());
    plan.ports[0].publish = wanted.iter().map(|h| publish(*h)).collect();
    plan.ports[0].publish.push(publish(SocketAddr::from((Ipv4Addr::UNSPECIFIED, server.port))));
    let handle = driver.ensure(&plan).await.unwrap();
    let reasons: Vec<_> = handle.refused.iter().map(|r| r.2.as_str()).collect();
    assert_eq!(reasons.len(), 4, "{reasons:?}");
    for part in ["in use by another process", "not an address of the host", "IPv6", "port 0"] {
        assert!(reasons.iter().any(|r| r.contains(part)), "{part}: {reasons:?}");
    }
    assert_eq!(driver.observe(plan.id).await.unwrap().unwrap().refused, handle.refused);
    let asked = ask(&bed.outside, HOST, server.port, PATIENCE).unwrap();
    assert_eq!(asked, OUTSIDE.to_string(), "the process that has it keeps it");
}

#[tokio::test]
async fn dial_reaches_a_guest_past_its_groups() {
    let Some(bed) = Bed::new() else { return };
    let driver = bed.linux();
    let mut plan = plan_with("dial", &[Netns]);
    plan.ports[0].ingress.clear();
    let handle = driver.ensure(&plan).await.unwrap();
    let address = v4(&plan.ports[0]);
    let server = Server::start(&guest(&handle, &plan.ports[0]), address, 0);
    let mut stream = driver.dial(plan.id, SocketAddr::from((address, server.port))).await.unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).await.unwrap();
    assert_eq!(text, plan.subnets[0].gateway.to_string());
    let refused = driver.dial(plan.id, SocketAddr::from((address, 1))).await.err().unwrap();
    assert_eq!(refused.code, "unreachable");
}

/// An established connection does not notice what happens to other ports.
#[tokio::test]
async fn flows_of_other_ports_go_on() {
    use std::io::{Read, Write};
    let Some(bed) = Bed::new() else { return };
    let driver = bed.linux();
    let mut plan = plan_with("flows", &[Netns, Netns]);
    plan.ports[1].ingress = support::everything();
    let handle = driver.ensure(&plan).await.unwrap();
    let [a, b] = [0, 1].map(|i| guest(&handle, &plan.ports[i]));
    let address = v4(&plan.ports[1]);
    let listener = support::within(&b, || std::net::TcpListener::bind((address, 0))).unwrap();
    let to = listener.local_addr().unwrap();
    let mut client = support::within(&a, || std::net::TcpStream::connect_timeout(&to, PATIENCE)).unwrap();
    let (mut server, _) = listener.accept().unwrap();
    for last in 20..24 {
        plan.ports.push(oblak_network::conformance::port(&plan, PortKind::Tap, last));
        driver.ensure(&plan).await.unwrap();
        plan.ports.pop();
        driver.ensure(&plan).await.unwrap();
        let mut byte = [last];
        client.write_all(&byte).unwrap();
        server.set_read_timeout(Some(PATIENCE)).unwrap();
        server.read_exact(&mut byte).unwrap();
        assert_eq!(byte, [last]);
    }
}

/// The first packet of a new guest gets through: nothing waits for the kernel to notice that the link is up.
#[tokio::test]
async fn a_new_guest_is_reachable_at_once() {
    let Some(bed) = Bed::new() else { return };
    let driver = bed.linux();
    let mut plan = plan_with("at-once", &[]);
    driver.ensure(&plan).await.unwrap();
    let mut slowest = std::time::Duration::ZERO;
    for last in 10..18 {
        plan.ports.push(oblak_network::conformance::port(&plan, Netns, last));
        let handle = driver.ensure(&plan).await.unwrap();
        let port = plan.ports.last().unwrap();
        let started = std::time::Instant::now();
        let refused = driver.dial(plan.id, SocketAddr::from((v4(port), 1))).await.err().unwrap();
        assert!(refused.detail.contains("refused"), "{refused}");
        assert!(pings(&guest(&handle, port), OUTSIDE.into(), PATIENCE));
        slowest = slowest.max(started.elapsed());
    }
    // A lost first packet would cost a second, the initial retransmission timeout (RFC 6298).
    assert!(slowest.as_millis() < 900, "{slowest:?}");
}

/// A new guest with the address of an old one is found by those who still remember the old one.
#[tokio::test]
async fn an_address_moves_to_a_new_guest() {
    let Some(bed) = Bed::new() else { return };
    let driver = bed.linux();
    let mut plan = plan_with("reuse", &[Netns, Netns]);
    let handle = driver.ensure(&plan).await.unwrap();
    let a = guest(&handle, &plan.ports[0]);
    let address = v4(&plan.ports[1]);
    let server = Server::start(&bed.outside, OUTSIDE, 0);
    assert!(pings(&a, address.into(), PATIENCE));
    assert!(ask(&guest(&handle, &plan.ports[1]), OUTSIDE, server.port, PATIENCE).is_ok(), "the gateway knows it");
    let mut heir = oblak_network::conformance::port(&plan, Netns, 11);
    heir.mac = "02:00:00:77:ff:ff".into();
    plan.ports[1] = heir;
    let handle = driver.ensure(&plan).await.unwrap();
    let started = std::time::Instant::now();
    assert!(pings(&a, address.into(), PATIENCE));
    assert!(ask(&guest(&handle, &plan.ports[1]), OUTSIDE, server.port, PATIENCE).is_ok());
    assert!(started.elapsed().as_secs() < 2, "{:?}", started.elapsed());
}

#[tokio::test]
async fn published_udp_answers() {
    let Some(bed) = Bed::new() else { return };
    let driver = bed.linux();
    let mut plan = plan_with("udp", &[Netns]);
    let host = SocketAddr::from((Ipv4Addr::UNSPECIFIED, 5353));
    plan.ports[0].publish = vec![PublishPlan { host, guest_port: 53, protocol: Protocol::Udp }];
    let handle = driver.ensure(&plan).await.unwrap();
    let bind = |netns: &std::path::Path, to: (Ipv4Addr, u16)| {
        let socket = support::within(netns, || std::net::UdpSocket::bind(to)).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        socket
    };
    let server = bind(&guest(&handle, &plan.ports[0]), (v4(&plan.ports[0]), 53));
    for (from, to) in [(&bed.outside, HOST), (&bed.host, LOOPBACK)] {
        let client = bind(from, (Ipv4Addr::UNSPECIFIED, 0));
        client.connect((to, 5353)).unwrap();
        client.send(b"question").unwrap();
        let mut buffer = [0; 16];
        let (size, peer) = server.recv_from(&mut buffer).unwrap();
        server.send_to(&buffer[..size], peer).unwrap();
        assert_eq!(client.recv(&mut buffer).unwrap(), 8, "from {to}");
    }
}

/// A guest that came from another node brings connections that this node has not seen begin. Here the node is made to forget one.
#[tokio::test]
async fn a_port_that_has_moved_keeps_its_connections_and_opens_none() {
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream};
    use std::time::Duration;
    const FORGOTTEN: Duration = Duration::from_secs(3);

    let Some(bed) = Bed::new() else { return };
    let driver = bed.linux();
    let mut plan = plan_with("moved", &[Netns, Netns]);
    plan.ports[0].ingress = support::everything();
    plan.ports[1].ingress.clear();
    let handle = driver.ensure(&plan).await.unwrap();
    let [a, b] = [0, 1].map(|i| guest(&handle, &plan.ports[i]));
    let short = |name: &str| format!("/proc/sys/net/netfilter/nf_conntrack_{name}");
    let tune = || std::fs::write(short("tcp_timeout_established"), "1");
    support::within(handle.netns.as_ref().unwrap(), tune).unwrap();
    let address = SocketAddr::new(v4(&plan.ports[0]).into(), 9000);
    let listener = support::within(&a, || TcpListener::bind(address)).unwrap();
    let mut ours = support::within(&b, || TcpStream::connect_timeout(&address, PATIENCE)).unwrap();
    let (mut theirs, _) = listener.accept().unwrap();
    theirs.write_all(b"1").unwrap();
    let mut byte = [0u8; 1];
    ours.read_exact(&mut byte).unwrap();
    // The entry lives for a second after the last packet; nothing tells when it is gone.
    std::thread::sleep(FORGOTTEN);

    theirs.write_all(b"2").unwrap();
    ours.set_read_timeout(Some(SILENCE)).unwrap();
    assert!(ours.read_exact(&mut byte).is_err(), "b lets nothing in, and nobody remembers that b has opened it");
    plan.ports[1].midstream = true;
    driver.ensure(&plan).await.unwrap();
    ours.set_read_timeout(Some(PATIENCE)).unwrap();
    ours.read_exact(&mut byte).unwrap();
    assert_eq!(&byte, b"2", "sent again by TCP until it passes");
    let server = Server::start(&b, v4(&plan.ports[1]), 0);
    assert!(ask(&a, v4(&plan.ports[1]), server.port, SILENCE).is_err(), "new connections are still refused");
}
