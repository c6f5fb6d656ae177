//! The real netd, started by the driver, asked by a guest through the driver's rules: DHCP, DNS, metadata.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream, UdpSocket};
use std::path::Path;
use std::time::Instant;

use oblak_network::{InstanceMetadata, NetworkDriver, NetworkPlan, PortKind};
use oblak_network_linux::LinuxNetwork;
use oblak_platform::{fsx, process::Identity};
use support::frames::{BROADCAST, Wire, datagram, ethernet, mac};
use support::{Bed, PATIENCE, guest, plan_with, v4, within};

/// Ends the netd of a data directory, whichever it is by then.
struct EndNetd(std::path::PathBuf);

impl Drop for EndNetd {
    fn drop(&mut self) {
        if let Ok(Some(netd)) = fsx::read_json::<Identity>(&self.0.join("netd.pid.json")) {
            netd.kill();
        }
    }
}

#[test]
#[ignore = "run by guests_are_served only"]
fn netd_process() {
    let dir = std::env::args().skip_while(|a| a != "--dir").nth(1);
    if let Some(dir) = dir {
        assert_eq!(oblak_netd::main(Path::new(&dir)), std::process::ExitCode::SUCCESS);
    }
}

fn plan() -> NetworkPlan {
    let mut plan = plan_with("blue", &[PortKind::Netns, PortKind::Netns, PortKind::Remote]);
    plan.overlay = Some(oblak_network::OverlayPlan { vni: 7, local: support::HOST.into() });
    plan.ports[2].tunnel = Some(support::OUTSIDE.into());
    let port = &mut plan.ports[0];
    port.metadata = Some(InstanceMetadata {
        instance: port.instance,
        name: "web".into(),
        project: "demo".into(),
        public_keys: BTreeMap::new(),
        user_data: None,
        availability_zone: "z1".into(),
        instance_type: "s".into(),
        meta: BTreeMap::new(),
    });
    plan
}

#[tokio::test]
async fn guests_are_served() {
    let Some(bed) = Bed::new() else { return };
    let me = std::env::current_exe().unwrap();
    // What follows `--` is a filter for the test program, so the added `--dir` does not disturb it.
    let config = bed.config(&[me.to_str().unwrap(), "netd_process", "--ignored", "--nocapture", "--"]);
    let driver = LinuxNetwork::new(&config).unwrap();
    let dir = bed.data().join("network");
    let _end = EndNetd(dir.clone());
    driver.ensure_services().await.unwrap();
    let plan = plan();
    let handle = driver.ensure(&plan).await.unwrap();
    let netns = guest(&handle, &plan.ports[0]);

    let end = Instant::now() + PATIENCE;
    let address = loop {
        match resolve(&netns, "guest11") {
            Some(address) => break address,
            None => assert!(Instant::now() < end, "{}", std::fs::read_to_string(dir.join("netd.log")).unwrap()),
        }
    };
    assert_eq!(address, v4(&plan.ports[1]), "by name");
    assert_eq!(resolve(&netns, "guest12"), Some(v4(&plan.ports[2])), "on another node");
    let id = metadata(&netns, "/latest/meta-data/instance-id");
    assert!(id.contains(&plan.ports[0].instance.to_string()), "{id}");
    assert_eq!(offered(&netns, &plan), v4(&plan.ports[0]), "by DHCP");

    driver.remove(plan.id).await.unwrap();
    assert_eq!(driver.list().await.unwrap(), []);
    driver.ensure(&plan).await.unwrap();
    let end = Instant::now() + PATIENCE;
    while resolve(&netns, "guest11").is_none() {
        assert!(Instant::now() < end, "served again after the network was made anew");
    }
}

/// Asks the gateway for an A record of `<name>.blue.demo.oblak.internal`.
fn resolve(netns: &Path, name: &str) -> Option<Ipv4Addr> {
    let socket = within(netns, || UdpSocket::bind("0.0.0.0:0")).unwrap();
    socket.set_read_timeout(Some(std::time::Duration::from_millis(100))).unwrap();
    let mut question = vec![0, 7, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    for label in [name, "blue", "demo", "oblak", "internal"] {
        question.push(label.len() as u8);
        question.extend(label.as_bytes());
    }
    question.extend([0, 0, 1, 0, 1]);
    socket.send_to(&question, "10.77.0.1:53").ok()?;
    let mut answer = [0; 512];
    let size = socket.recv(&mut answer).ok()?;
    // The address is the end of the answer record, unless others follow; the question asks for nothing else.
    let answers = u16::from_be_bytes([answer[6], answer[7]]);
    let record = answer[..size].windows(6).find(|w| w[..2] == [0, 4] && w[2] == 10)?;
    (answers == 1).then(|| Ipv4Addr::new(record[2], record[3], record[4], record[5]))
}

fn metadata(netns: &Path, path: &str) -> String {
    let to = SocketAddr::from(([169, 254, 169, 254], 80));
    let mut stream = within(netns, || TcpStream::connect_timeout(&to, PATIENCE)).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    write!(stream, "GET {path} HTTP/1.1\r\nHost: metadata\r\nConnection: close\r\n\r\n").unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    assert!(text.starts_with("HTTP/1.1 200"), "{text}");
    text
}

/// The address that a DHCP server offers.
fn offered(netns: &Path, plan: &NetworkPlan) -> Ipv4Addr {
    let me = mac(&plan.ports[0].mac);
    let mut discover = vec![0; 240];
    discover[..8].copy_from_slice(&[1, 1, 6, 0, 0xca, 0xfe, 0xba, 0xbe]);
    discover[28..34].copy_from_slice(&me);
    discover[236..].copy_from_slice(&[99, 130, 83, 99]);
    discover.extend([53, 1, 1, 255]);
    let packet = datagram(Ipv4Addr::UNSPECIFIED, Ipv4Addr::BROADCAST, (68, 67), &discover);
    let mut wire = Wire::open(netns, "eth0");
    wire.send(&ethernet(BROADCAST, me, 0x0800, &packet));
    // Ethernet 14, IPv4 20, UDP 8; then `op` 2 for an answer, the transaction, and the offered address at 16.
    let is_offer = |f: &[u8]| f.len() > 62 && f[34..38] == [0, 67, 0, 68] && f[46..50] == [0xca, 0xfe, 0xba, 0xbe];
    let seen = wire.until_one(is_offer, PATIENCE);
    let offer = seen.into_iter().find(|f| is_offer(f)).expect("an offer");
    Ipv4Addr::new(offer[58], offer[59], offer[60], offer[61])
}
