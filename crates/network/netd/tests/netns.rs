//! netd as a process of its own, guests as network namespaces with the usual clients: udhcpc, dig, curl.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::net::UdpSocket;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use oblak_model::{InstanceId, NetworkId, PortId};
use oblak_netd::config::{NetConfig, read_status, wait_served, write_config};
use oblak_network::{InstanceMetadata, NetworkPlan, PortKind, PortPlan, SubnetPlan};
use tempfile::TempDir;
use uuid::Uuid;

/// Set in the process that is netd.
const NETD_DIR: &str = "OBLAK_TEST_NETD_DIR";
const PATIENCE: Duration = Duration::from_secs(20);

#[test]
#[ignore = "started as a process by the other tests"]
fn netd_process() {
    if let Some(dir) = std::env::var_os(NETD_DIR) {
        oblak_platform::telemetry::init(false);
        let code = oblak_netd::main(Path::new(&dir));
        assert_eq!(format!("{code:?}"), format!("{:?}", std::process::ExitCode::SUCCESS));
    }
}

/// What is missing for these tests, if anything.
fn missing() -> Option<String> {
    if !nix::unistd::geteuid().is_root() {
        return Some("needs root".into());
    }
    let tools = ["ip", "nsenter", "busybox", "dig", "curl"];
    tools
        .iter()
        .find(|t| Command::new("which").arg(t).output().is_ok_and(|o| !o.status.success()))
        .map(|t| format!("{t} is not installed"))
}

macro_rules! need_tools {
    () => {
        if let Some(reason) = missing() {
            println!("skipped: {reason}");
            return;
        }
    };
}

fn sh(command: &str) -> Output {
    Command::new("sh").args(["-c", command]).stdin(Stdio::null()).output().unwrap()
}

fn must(command: &str) -> String {
    let output = sh(command);
    assert!(output.status.success(), "{command}: {}{}", text(&output.stdout), text(&output.stderr));
    text(&output.stdout)
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// A network namespace that goes away with the value.
struct Netns(String);

impl Netns {
    fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("netdt-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        must(&format!("ip netns add {name} && ip -n {name} link set lo up"));
        Self(name)
    }
    fn path(&self) -> PathBuf {
        Path::new("/run/netns").join(&self.0)
    }
    fn run(&self, command: &str) -> Output {
        sh(&format!("exec nsenter --net={} {command}", self.path().display()))
    }
    fn ask(&self, command: &str) -> String {
        let output = self.run(command);
        assert!(output.status.success(), "{command}: {}{}", text(&output.stdout), text(&output.stderr));
        text(&output.stdout).trim().to_string()
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        sh(&format!("ip netns del {}", self.0));
    }
}

/// A network: namespace, bridge with the gateway and the metadata address, and its plan.
struct Net {
    ns: Netns,
    plan: NetworkPlan,
}

impl Net {
    fn new(name: &str, project: &str) -> Self {
        let ns = Netns::new();
        must(&format!(
            "ip -n {0} link add br0 type bridge && ip -n {0} addr add 10.1.2.1/24 dev br0 && ip -n {0} addr add 169.254.169.254/32 dev br0 && ip -n {0} link set br0 up",
            ns.0
        ));
        let subnet =
            SubnetPlan { cidr: "10.1.2.0/24".parse().unwrap(), gateway: "10.1.2.1".parse().unwrap(), lease_s: 3600 };
        let plan = NetworkPlan {
            id: NetworkId(Uuid::now_v7()),
            name: name.into(),
            project: project.into(),
            mtu: 1400,
            nat: false,
            subnets: vec![subnet],
            ports: vec![],
            forwarders: vec!["127.0.0.53".parse().unwrap()],
            overlay: None,
        };
        Self { ns, plan }
    }

    fn plan_port(&mut self, hostname: &str, n: u8) {
        let instance = InstanceId(Uuid::now_v7());
        self.plan.ports.push(PortPlan {
            id: PortId(Uuid::now_v7()),
            instance,
            index: 0,
            kind: PortKind::Tap,
            mac: mac(n),
            addresses: vec![format!("10.1.2.{n}").parse().unwrap()],
            hostname: hostname.into(),
            ingress: vec![],
            egress: None,
            publish: vec![],
            userns: None,
            tunnel: None,
            standby: false,
            midstream: false,
            metadata: Some(InstanceMetadata {
                instance,
                name: hostname.into(),
                project: self.plan.project.clone(),
                public_keys: [("k".to_string(), "ssh-ed25519 AAAA k".to_string())].into(),
                user_data: Some(format!("#!/bin/sh\necho {hostname}\n")),
                availability_zone: "z1".into(),
                instance_type: "s".into(),
                meta: [].into(),
            }),
        });
    }

    /// A machine on the bridge, without an address.
    fn plug(&self, n: u8) -> Netns {
        let guest = Netns::new();
        must(&format!(
            "ip -n {net} link add p{n} type veth peer name eth0 netns {guest} && ip -n {net} link set p{n} master br0 up && \
             ip -n {guest} link set eth0 address {mac} && ip -n {guest} link set eth0 up",
            net = self.ns.0,
            guest = guest.0,
            mac = mac(n)
        ));
        guest
    }

    fn config(&self) -> NetConfig {
        NetConfig { netns: self.ns.path(), bridge: "br0".into(), plan: self.plan.clone() }
    }
}

fn mac(n: u8) -> String {
    format!("02:00:00:00:00:{n:02x}")
}

/// The node: a directory and a netd in a namespace of its own, where the DNS server outside is too.
struct Node {
    dir: TempDir,
    ns: Netns,
    netd: Option<Child>,
}

impl Node {
    fn new() -> Self {
        let dir = tempfile::Builder::new().prefix("oblak-netd-").tempdir().unwrap();
        let script = dir.path().join("udhcpc.sh");
        std::fs::write(
            &script,
            "#!/bin/sh\n[ \"$1\" = bound ] || exit 0\nip addr add \"$ip/$mask\" dev \"$interface\"\n\
             set -- $staticroutes\nwhile [ $# -ge 2 ]; do ip route add \"$1\" via \"$2\"; shift 2; done\n\
             echo \"ip=$ip router=$router dns=$dns domain=$domain search=$search mtu=$mtu host=$hostname lease=$lease\"\n",
        )
        .unwrap();
        std::fs::set_permissions(&script, std::fs::Permissions::from_mode(0o755)).unwrap();
        let mut node = Self { dir, ns: Netns::new(), netd: None };
        node.start();
        node
    }

    fn dir(&self) -> PathBuf {
        self.dir.path().join("network")
    }

    fn start(&mut self) {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net={}", self.ns.path().display())).arg(std::env::current_exe().unwrap());
        command.args(["--exact", "netd_process", "--ignored", "--nocapture"]).env(NETD_DIR, self.dir());
        command.env("OBLAK_LOG", "oblak_netd=debug").stdin(Stdio::null()).stdout(Stdio::null());
        // SAFETY: prctl is async-signal-safe. netd must not outlive a killed test.
        unsafe {
            command.pre_exec(|| {
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                Ok(())
            });
        }
        self.netd = Some(command.spawn().unwrap());
    }

    /// kill -9.
    fn kill(&mut self) {
        if let Some(mut netd) = self.netd.take() {
            netd.kill().unwrap();
            netd.wait().unwrap();
        }
    }

    async fn serve(&self, net: &Net) {
        let generation = write_config(&self.dir(), &net.config()).unwrap();
        wait_served(&self.dir(), net.plan.id, &generation, PATIENCE).await.unwrap();
    }

    /// What udhcpc in the guest is told; empty when nobody answers.
    fn dhcp(&self, guest: &Netns) -> String {
        let script = self.dir.path().join("udhcpc.sh");
        let tries = "-f -n -q -t 4 -T 1 -O search -O mtu -O staticroutes";
        let output = guest.run(&format!("busybox udhcpc {tries} -i eth0 -s {}", script.display()));
        text(&output.stdout).lines().find(|l| l.starts_with("ip=")).unwrap_or_default().to_string()
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.kill();
    }
}

const GET: &str = "curl -s -m 5 -f http://169.254.169.254";

fn dig(guest: &Netns, what: &str) -> String {
    guest.ask(&format!("dig @10.1.2.1 +time=2 +tries=2 {what}"))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_gets_address_names_and_metadata() {
    need_tools!();
    let node = Node::new();
    let mut net = Net::new("blue", "p1");
    net.plan_port("web", 10);
    net.plan_port("job", 11);
    let (web, stranger) = (net.plug(10), net.plug(66));
    node.serve(&net).await;
    let lease = node.dhcp(&web);
    assert_eq!(
        lease,
        "ip=10.1.2.10 router=10.1.2.1 dns=10.1.2.1 domain=blue.p1.oblak.internal search=blue.p1.oblak.internal mtu=1400 host=web lease=3600"
    );
    assert!(web.ask("ip route").contains("169.254.169.254 via 10.1.2.1"));
    assert_eq!(dig(&web, "+short job.blue.p1.oblak.internal"), "10.1.2.11");
    assert_eq!(dig(&web, "+short JOB"), "10.1.2.11");
    assert_eq!(dig(&web, "+short +tcp job"), "10.1.2.11");
    assert_eq!(dig(&web, "+short -x 10.1.2.11"), "job.blue.p1.oblak.internal.");
    assert!(dig(&web, "nope.blue.p1.oblak.internal").contains("status: NXDOMAIN"));
    assert!(dig(&web, "AAAA job").contains("status: NOERROR"));
    assert_eq!(web.ask(&format!("{GET}/latest/meta-data/local-hostname")), "web");
    assert_eq!(web.ask(&format!("{GET}/latest/user-data")), "#!/bin/sh\necho web");
    assert!(
        web.ask(&format!("{GET}/openstack/latest/meta_data.json"))
            .contains("\"hostname\":\"web.blue.p1.oblak.internal\"")
    );
    let token = web.ask(&format!("{GET}/latest/api/token -X PUT -H 'X-aws-ec2-metadata-token-ttl-seconds: 60'"));
    assert_eq!(web.ask(&format!("{GET}/latest/meta-data/mac -H 'X-aws-ec2-metadata-token: {token}'")), mac(10));
    // A machine nobody knows gets no address; with one that it made up it gets no metadata.
    assert_eq!(node.dhcp(&stranger), "");
    stranger.ask("ip addr add 10.1.2.66/24 dev eth0");
    stranger.ask("ip route add 169.254.169.254 via 10.1.2.1");
    let code = "curl -s -m 5 -o /dev/null -w %{http_code} http://169.254.169.254/latest/meta-data/";
    assert_eq!(stranger.ask(code), "404");
    // Nothing of a network is reachable from the node's own namespace.
    assert!(!node.ns.run("curl -s -m 1 http://169.254.169.254/").status.success());
    let tasks = must(&format!("cat /proc/{}/task/*/status", node.netd.as_ref().unwrap().id()));
    let kept = format!("CapEff:\t{:016x}", oblak_netd::privileges::kept());
    assert!(tasks.lines().any(|l| l == kept), "the thread of netd keeps more than {kept}");
    let mib = private_kib(node.netd.as_ref().unwrap().id()) / 1024;
    assert!(mib <= 4, "netd uses {mib} MiB of its own");
}

/// Private memory of a process (proc(5), smaps_rollup), the pages of its program left out: they are the file's.
fn private_kib(pid: u32) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap();
    let value = |key: &str| {
        let line = text.lines().find(|l| l.starts_with(key)).unwrap_or("0 0");
        line.split_ascii_whitespace().nth(1).and_then(|n| n.parse::<u64>().ok()).unwrap_or(0)
    };
    println!("netd: private dirty {} KiB, pss {} KiB", value("Private_Dirty:"), value("Pss:"));
    value("Private_Dirty:")
}

#[tokio::test(flavor = "multi_thread")]
async fn networks_with_the_same_addresses_keep_apart() {
    need_tools!();
    let node = Node::new();
    let nets = ["p1", "p2"].map(|project| {
        let mut net = Net::new("same", project);
        net.plan_port(&format!("web-{project}"), 10);
        net
    });
    for (net, project) in nets.iter().zip(["p1", "p2"]) {
        let guest = net.plug(10);
        node.serve(net).await;
        assert!(node.dhcp(&guest).contains(&format!("host=web-{project} ")));
        assert_eq!(guest.ask(&format!("{GET}/latest/meta-data/local-hostname")), format!("web-{project}"));
        assert_eq!(dig(&guest, &format!("+short web-{project}")), "10.1.2.10");
        let other = if project == "p1" { "p2" } else { "p1" };
        assert!(dig(&guest, &format!("web-{other}.same.{other}.oblak.internal")).contains("status: NXDOMAIN"));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn changes_are_picked_up_and_kills_survived() {
    need_tools!();
    let mut node = Node::new();
    let mut net = Net::new("blue", "p1");
    net.plan_port("web", 10);
    let web = net.plug(10);
    node.serve(&net).await;
    assert!(node.dhcp(&web).starts_with("ip=10.1.2.10 "));
    assert_eq!(dig(&web, "+short late"), "");
    net.plan_port("late", 12);
    let start = Instant::now();
    node.serve(&net).await;
    println!("a new plan is served after {:?}", start.elapsed());
    assert_eq!(dig(&web, "+short late"), "10.1.2.12");
    let token = web.ask(&format!("{GET}/latest/api/token -X PUT -H 'X-aws-ec2-metadata-token-ttl-seconds: 60'"));
    node.kill();
    assert!(
        wait_served(&node.dir(), net.plan.id, "x", Duration::ZERO)
            .await
            .unwrap_err()
            .to_string()
            .contains("does not run")
    );
    node.start();
    node.serve(&net).await;
    assert_eq!(dig(&web, "+short late"), "10.1.2.12");
    assert_eq!(web.ask(&format!("{GET}/latest/meta-data/mac -H 'X-aws-ec2-metadata-token: {token}'")), mac(10));
    // A second netd for the same directory steps back.
    let first = node.netd.take();
    node.start();
    let mut second = std::mem::replace(&mut node.netd, first).unwrap();
    assert!(tokio::task::spawn_blocking(move || second.wait()).await.unwrap().unwrap().success());
    assert_eq!(dig(&web, "+short late"), "10.1.2.12");
    // The bridge is made anew: the sockets follow.
    must(&format!("ip -n {} link del br0", net.ns.0));
    must(&format!(
        "ip -n {0} link add br0 type bridge && ip -n {0} addr add 10.1.2.1/24 dev br0 && ip -n {0} link set br0 up && ip -n {0} link set p10 master br0",
        net.ns.0
    ));
    let end = Instant::now() + PATIENCE;
    while text(&web.run("dig @10.1.2.1 +time=1 +tries=1 +short late").stdout).trim() != "10.1.2.12" {
        assert!(Instant::now() < end, "not served on the new bridge");
    }
    // A broken file leaves what was served, and says so.
    let file = node.dir().join(net.plan.id.to_string()).join("netd.json");
    std::fs::write(&file, "{").unwrap();
    let error = wait_served(&node.dir(), net.plan.id, "x", Duration::from_secs(2)).await.unwrap_err();
    assert!(error.to_string().contains("netd.json"), "{error}");
    assert_eq!(dig(&web, "+short late"), "10.1.2.12");
    // The network goes away: so do the sockets.
    std::fs::remove_dir_all(file.parent().unwrap()).unwrap();
    let end = Instant::now() + PATIENCE;
    while !read_status(&node.dir()).unwrap().networks.is_empty() {
        assert!(Instant::now() < end, "still served");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert!(!web.run("dig @10.1.2.1 +time=1 +tries=1 late").status.success());
}

#[tokio::test(flavor = "multi_thread")]
async fn foreign_names_are_asked_outside_once() {
    need_tools!();
    let node = Node::new();
    let (asked, server) = outside(&node.ns);
    let mut net = Net::new("blue", "p1");
    net.plan_port("web", 10);
    let web = net.plug(10);
    node.serve(&net).await;
    assert!(node.dhcp(&web).starts_with("ip=10.1.2.10 "));
    for name in ["www.example.org", "WWW.example.ORG"] {
        assert_eq!(dig(&web, &format!("+short {name}")), "192.0.2.7");
    }
    assert_eq!(asked.load(Ordering::SeqCst), 1, "the second answer came from the cache");
    assert!(dig(&web, "secret.other.oblak.internal").contains("status: NXDOMAIN"));
    assert_eq!(asked.load(Ordering::SeqCst), 1, "names of ours are never asked outside");
    // Somebody with an address outside of the network is not answered: netd is no open resolver.
    web.ask("ip addr add 192.0.2.99/32 dev eth0");
    must(&format!("ip -n {} route add 192.0.2.99 dev br0", net.ns.0));
    assert!(!web.run("dig -b 192.0.2.99 @10.1.2.1 +time=1 +tries=1 www.example.org").status.success());
    drop(server);
}

/// A DNS server in the node's namespace that says 192.0.2.7 to everything, and the number of questions it got.
fn outside(ns: &Netns) -> (std::sync::Arc<AtomicU32>, UdpSocket) {
    let path = ns.path();
    let socket = std::thread::spawn(move || {
        let file = std::fs::File::open(path).unwrap();
        nix::sched::setns(file, nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
        UdpSocket::bind("127.0.0.53:53").unwrap()
    });
    let socket = socket.join().unwrap();
    let asked = std::sync::Arc::new(AtomicU32::new(0));
    let (count, answers) = (std::sync::Arc::clone(&asked), socket.try_clone().unwrap());
    answers.set_read_timeout(Some(PATIENCE)).unwrap();
    std::thread::spawn(move || {
        use hickory_proto::op::{Message, MessageType};
        use hickory_proto::rr::{RData, Record, rdata::A};
        let mut buffer = [0; 1500];
        while let Ok((len, peer)) = answers.recv_from(&mut buffer) {
            count.fetch_add(1, Ordering::SeqCst);
            let mut message = Message::from_vec(&buffer[..len]).unwrap();
            message.metadata.message_type = MessageType::Response;
            let name = message.queries[0].name.clone();
            message.add_answer(Record::from_rdata(name, 60, RData::A(A::new(192, 0, 2, 7))));
            // A forged answer first: with another id it must not be believed.
            let mut forged = message.clone();
            forged.metadata.id ^= 1;
            forged.answers[0].data = RData::A(A::new(6, 6, 6, 6));
            answers.send_to(&forged.to_vec().unwrap(), peer).unwrap();
            answers.send_to(&message.to_vec().unwrap(), peer).unwrap();
        }
    });
    (asked, socket)
}
