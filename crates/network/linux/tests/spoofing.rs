//! An attacker in a guest sends frames by hand; the victim watches its wire.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use std::net::Ipv4Addr;

use oblak_network::{NetworkDriver, NetworkHandle, NetworkPlan, PortKind};
use support::frames::{BROADCAST, Wire, arp, contains, ethernet, mac, udp};
use support::{Bed, PATIENCE, everything, guest, plan_with, v4};

const IPV4: u16 = 0x0800;
const ARP: u16 = 0x0806;
const VLAN: u16 = 0x8100;

/// Attacker, victim and a third guest; all of them let everything in, so only the guard can stop a frame.
async fn trio(bed: &Bed, name: &str) -> (NetworkPlan, NetworkHandle) {
    let mut plan = plan_with(name, &[PortKind::Netns; 3]);
    for port in &mut plan.ports {
        port.ingress = everything();
    }
    let handle = bed.linux().ensure(&plan).await.unwrap();
    (plan, handle)
}

#[tokio::test]
async fn forged_frames_never_arrive() {
    let Some(bed) = Bed::new() else { return };
    let (plan, handle) = trio(&bed, "spoof").await;
    let [me, victim, third] = [0, 1, 2].map(|i| (mac(&plan.ports[i].mac), v4(&plan.ports[i])));
    let gateway: Ipv4Addr = plan.subnets[0].gateway.to_string().parse().unwrap();
    let stranger = mac("02:de:ad:be:ef:01");
    let ports = (4000, 5000);
    let datagram = |from, text: &str| udp(from, victim.1, ports, text);
    let forged: Vec<(&str, Vec<u8>)> = vec![
        ("bad-mac", ethernet(victim.0, stranger, IPV4, &datagram(me.1, "bad-mac"))),
        ("third-mac", ethernet(victim.0, third.0, IPV4, &datagram(me.1, "third-mac"))),
        ("bad-ip", ethernet(victim.0, me.0, IPV4, &datagram(Ipv4Addr::new(10, 77, 0, 200), "bad-ip"))),
        ("third-ip", ethernet(victim.0, me.0, IPV4, &datagram(third.1, "third-ip"))),
        ("gateway-ip", ethernet(victim.0, me.0, IPV4, &datagram(gateway, "gateway-ip"))),
        ("arp-gateway", ethernet(BROADCAST, me.0, ARP, &arp(me.0, gateway, victim.1, "arp-gateway"))),
        ("arp-third", ethernet(victim.0, me.0, ARP, &arp(me.0, third.1, victim.1, "arp-third"))),
        ("arp-mac", ethernet(victim.0, me.0, ARP, &arp(third.0, me.1, victim.1, "arp-mac"))),
        ("dhcp-server", ethernet(victim.0, me.0, IPV4, &udp(me.1, victim.1, (67, 68), "dhcp-server"))),
        ("not-its-ip", ethernet(victim.0, me.0, IPV4, &udp(me.1, third.1, ports, "not-its-ip"))),
        ("group-frame", ethernet(BROADCAST, me.0, IPV4, &udp(me.1, third.1, ports, "group-frame"))),
        ("vlan", ethernet(victim.0, me.0, VLAN, &[&[0, 5, 8, 0][..], &datagram(me.1, "vlan")].concat())),
        ("unknown-type", ethernet(victim.0, me.0, 0x88cc, b"unknown-type")),
        (
            "ipv6",
            ethernet(victim.0, me.0, 0x86dd, &[&[0x60, 0, 0, 0, 0, 0, 59, 64][..], &[0xfe; 32], b"ipv6"].concat()),
        ),
    ];
    let mut wire = Wire::open(&guest(&handle, &plan.ports[1]), "eth0");
    let mut attacker = Wire::open(&guest(&handle, &plan.ports[0]), "eth0");
    for (_, frame) in &forged {
        attacker.send(frame);
    }
    // The honest frame goes last: when it is there, everything before it was decided.
    attacker.send(&ethernet(victim.0, me.0, IPV4, &datagram(me.1, "honest")));
    let seen = wire.until("honest", PATIENCE);
    assert!(seen.iter().any(|f| contains(f, "honest")), "the honest one arrives");
    for (name, _) in &forged {
        assert!(!seen.iter().any(|f| contains(f, name)), "{name} arrived");
    }
}

#[tokio::test]
async fn honest_arp_and_dhcp_requests_pass() {
    let Some(bed) = Bed::new() else { return };
    let (plan, handle) = trio(&bed, "honest").await;
    let (me, address) = (mac(&plan.ports[0].mac), v4(&plan.ports[0]));
    let mut gateway = Wire::open(handle.netns.as_ref().unwrap(), "br0");
    let mut guest = Wire::open(&guest(&handle, &plan.ports[0]), "eth0");
    let nobody = Ipv4Addr::UNSPECIFIED;
    guest.send(&ethernet(BROADCAST, me, ARP, &arp(me, nobody, address, "probe")));
    guest.send(&ethernet(BROADCAST, me, IPV4, &udp(nobody, Ipv4Addr::BROADCAST, (68, 67), "discover")));
    let seen = gateway.until("discover", PATIENCE);
    for text in ["probe", "discover"] {
        assert!(seen.iter().any(|f| contains(f, text)), "{text}");
    }
}

/// Frames for one guest are not shown to another.
#[tokio::test]
async fn guests_do_not_overhear_each_other() {
    let Some(bed) = Bed::new() else { return };
    let (plan, handle) = trio(&bed, "hear").await;
    let [me, victim, third] = [0, 1, 2].map(|i| (mac(&plan.ports[i].mac), v4(&plan.ports[i])));
    let mut wire = Wire::open(&guest(&handle, &plan.ports[2]), "eth0");
    let mut sender = Wire::open(&guest(&handle, &plan.ports[0]), "eth0");
    let nobody = mac("02:00:00:00:00:99");
    sender.send(&ethernet(victim.0, me.0, IPV4, &udp(me.1, victim.1, (1, 2), "private")));
    sender.send(&ethernet(nobody, me.0, IPV4, &udp(me.1, victim.1, (1, 2), "unknown")));
    sender.send(&ethernet(third.0, me.0, IPV4, &udp(me.1, third.1, (1, 2), "for-you")));
    let seen = wire.until("for-you", PATIENCE);
    assert!(seen.iter().any(|f| contains(f, "for-you")));
    assert!(!seen.iter().any(|f| contains(f, "private") || contains(f, "unknown")));
}
