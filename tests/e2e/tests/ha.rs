//! Nodes that die, are cut off, or whose agent stands still: what runs with `ha` goes on elsewhere, and never twice.
//!
//! A server and two nodes, each in a network namespace. One kernel has them all, so a frozen guest of a lost node can be looked at.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test may panic")]

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use oblak_e2e::{Env, Machine, Ran, Running, eventually, holds_for, until};
use serde_json::Value;

const DEADLINE: Duration = Duration::from_secs(90);
/// Lease, margin and start: 15 s are promised; guests of this machine may be emulated, and it may be busy.
const FAILOVER: Duration = Duration::from_secs(15 + 10);
const NODES: [&str; 2] = ["n1", "n2"];
/// Writes who it is and a number, again and again, to the shared directory.
const WRITER: &str =
    "me=$(cat /proc/sys/kernel/random/uuid); i=0; while :; do i=$((i+1)); echo $me $i >> /data/log; sleep 0.05; done";

struct Lab {
    env: Env,
    dir: PathBuf,
    server: Option<Child>,
    agents: [Option<Child>; 2],
    machines: [Machine; 2],
}

impl Lab {
    fn new() -> Option<Self> {
        let env = Env::find()?;
        let dir = tempfile::Builder::new().prefix("oblak-e2e-ha-").rand_bytes(5).tempdir_in("/tmp").unwrap().keep();
        // Guests run as users of their own and must be able to pass through.
        std::fs::set_permissions(&dir, std::os::unix::fs::PermissionsExt::from_mode(0o711)).unwrap();
        std::fs::create_dir(dir.join("pool")).unwrap();
        std::fs::set_permissions(dir.join("pool"), std::os::unix::fs::PermissionsExt::from_mode(0o711)).unwrap();
        let machines = NODES.map(|n| Machine::new(&dir.join(n)));
        let lab = Self { env, dir, server: None, agents: [None, None], machines };
        let hub = lab.namespace("s");
        ip(&["netns", "add", &hub]);
        ip(&["-n", &hub, "link", "set", "lo", "up"]);
        ip(&["-n", &hub, "link", "add", "hub", "type", "bridge"]);
        ip(&["-n", &hub, "addr", "add", "192.0.2.254/24", "dev", "hub"]);
        ip(&["-n", &hub, "link", "set", "hub", "up"]);
        for (n, name) in NODES.iter().enumerate() {
            let own = lab.namespace(name);
            ip(&["netns", "add", &own]);
            ip(&["-n", &own, "link", "set", "lo", "up"]);
            ip(&["-n", &hub, "link", "add", name, "type", "veth", "peer", "name", "wan", "netns", &own]);
            ip(&["-n", &hub, "link", "set", name, "master", "hub"]);
            ip(&["-n", &hub, "link", "set", name, "up"]);
            ip(&["-n", &own, "addr", "add", &format!("192.0.2.{}/24", n + 1), "dev", "wan"]);
            ip(&["-n", &own, "link", "set", "wan", "up"]);
        }
        Some(lab)
    }

    fn namespace(&self, name: &str) -> String {
        format!("obha{}{name}", std::process::id())
    }

    fn command(&self, place: &str, words: &[&str]) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net=/run/netns/{}", self.namespace(place))).arg(&self.env.binary).args(words);
        command.env("OBLAK_CONFIG", self.dir.join("config.json")).env("HOME", &self.dir);
        command.env("OBLAK_IMAGE_CACHE", &self.env.images).env("OBLAK_RECIPES", &self.env.recipes);
        command.env_remove("OBLAK_SERVER").env_remove("OBLAK_TOKEN").current_dir(&self.dir);
        command
    }

    fn start(&self, place: &str, words: &[&str]) -> Child {
        let log = std::fs::OpenOptions::new().create(true).append(true).open(self.dir.join(format!("{place}.log")));
        let log = log.unwrap();
        let mut command = self.command(place, words);
        command.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log);
        command.spawn().unwrap()
    }

    /// Server and nodes, with what guests need on both.
    fn up(&mut self) {
        let data = text(&self.dir.join("s"));
        let words = ["server", "--data", &data, "--listen", "192.0.2.254:7443", "--server-name", "192.0.2.254"];
        self.server = Some(self.start("s", &words));
        until("a context for the user", DEADLINE, || self.dir.join("config.json").exists().then_some(()));
        let token = || self.oblak(&["token", "create", "--expires-in", "1h", "-q"]);
        let token = until("a token", DEADLINE, || Some(token()).filter(|t| t.code == 0)).ok();
        for (n, node) in NODES.into_iter().enumerate() {
            self.agent(n, Some(token.trim()));
            self.in_phase(node, "ready");
        }
        for (name, zone) in [("one", "zone-1"), ("two", "zone-2")] {
            self.oblak(&["launch", "busybox", "--name", name, "--zone", zone, "--wait", "--", "sleep", "10000"]).ok();
        }
        self.oblak(&["delete", "one", "two", "--wait"]).ok();
    }

    fn agent(&mut self, n: usize, token: Option<&str>) {
        let (data, ca) = (text(&self.dir.join(NODES[n])), text(&self.dir.join("s/pki/ca.pem")));
        let pool = format!("shared={}", text(&self.dir.join("pool")));
        let (underlay, zone) = (format!("192.0.2.{}", n + 1), format!("zone-{}", n + 1));
        let mut words = vec!["agent", "--data", &data, "--node-name", NODES[n], "--zone", &zone];
        words.extend(["--underlay", &underlay, "--shared-pool", &pool]);
        if let Some(token) = token {
            words.extend(["--server", "https://192.0.2.254:7443", "--ca", &ca, "--token", token]);
        }
        self.agents[n] = Some(self.start(NODES[n], &words));
    }

    #[track_caller]
    fn oblak(&self, words: &[&str]) -> Ran {
        Running::start(self.command("s", words)).wait(DEADLINE)
    }

    fn get(&self, what: &str, name: &str) -> Value {
        let shown: Value =
            serde_json::from_str(&self.oblak(&["get", what, name, "-o", "json"]).out).unwrap_or_default();
        shown.get("items").map_or(shown.clone(), |items| items[0].clone())
    }

    fn in_phase(&self, node: &str, phase: &str) {
        let seen = eventually(DEADLINE, || (self.get("node", node)["status"]["phase"] == phase).then_some(()));
        if seen.is_none() {
            panic!("{node} does not get {phase}: {}\n{}", self.get("node", node)["status"], self.logs());
        }
    }

    fn logs(&self) -> String {
        let log = |n: &str| std::fs::read_to_string(self.dir.join(format!("{n}.log"))).unwrap_or_default();
        let tail = |text: String| text.lines().rev().take(60).map(String::from).collect::<Vec<_>>().join("\n");
        ["s", "n1", "n2"].map(|n| format!("--- {n}, newest first ---\n{}", tail(log(n)))).join("\n")
    }

    /// Waits until the instance runs on a node, and says how long that took.
    fn runs_on(&self, name: &str, node: &str, within: Duration) -> Duration {
        let begun = Instant::now();
        let there = |i: &Value| i["status"]["phase"] == "running" && i["status"]["placement"]["node_name"] == node;
        if eventually(within, || Some(self.get("instance", name)).filter(there)).is_none() {
            panic!("{name} does not run on {node}: {}\n{}", self.get("instance", name)["status"], self.logs());
        }
        begun.elapsed()
    }

    /// The guest's fence is in force, so its node may be lost.
    fn fenced(&self, name: &str) {
        let status = || self.get("instance", name)["status"].clone();
        let fenced = |s: &Value| {
            let (asked, done) = (&s["placement"], &s["observed"]);
            asked["fenced"] == true
                && asked["fence_turn"] == done["fence_turn"]
                && asked["generation"] == done["placement"]
        };
        until("the fence to be in force", DEADLINE, || Some(status()).filter(fenced));
    }

    fn node_of(&self, name: &str) -> usize {
        let node = self.get("instance", name)["status"]["placement"]["node_name"].clone();
        NODES.iter().position(|n| *n == node).expect("a placed instance")
    }

    /// Everything of a node dies at once, as with its power.
    fn power_off(&mut self, n: usize) {
        self.machines[n].remember();
        let mut agent = self.agents[n].take().expect("a running agent");
        agent.kill().unwrap();
        for (process, _) in self.machines[n].processes() {
            process.kill();
        }
        agent.wait().unwrap();
    }

    fn signal_agent(&self, n: usize, signal: Signal) {
        let pid = self.agents[n].as_ref().expect("a running agent").id();
        kill(Pid::from_raw(i32::try_from(pid).unwrap()), signal).unwrap();
    }

    fn link(&self, n: usize, state: &str) {
        ip(&["-n", &self.namespace("s"), "link", "set", NODES[n], state]);
    }

    /// Writers of the shared file in the order of their lines, each as often as it took over.
    fn writers(&self) -> Vec<String> {
        let entries = |dir: &Path| std::fs::read_dir(dir).into_iter().flatten().flatten().map(|e| e.path());
        // Beside the volume, the pool may have a file that a node tries it with just now.
        let mut all = entries(&self.dir.join("pool")).flat_map(|volume| entries(&volume).collect::<Vec<_>>());
        let tree = all.find(|path| path.extension().is_some_and(|e| e == "tree"));
        let log = std::fs::read_to_string(tree.unwrap().join("log")).unwrap_or_default();
        let mut writers: Vec<String> = log.lines().filter_map(|l| l.split(' ').next()).map(String::from).collect();
        writers.dedup();
        writers
    }

    /// Nobody writes who has been superseded: one writer after the other, and only the last one is still at it.
    fn took_over(&self, times: usize) {
        until("the new writer", DEADLINE, || (self.writers().len() > times).then_some(()));
        assert!(holds_for(Duration::from_secs(3), || self.writers().len() == times + 1), "{:?}", self.writers());
        let mut distinct = self.writers();
        distinct.sort();
        distinct.dedup();
        assert_eq!(distinct.len(), times + 1, "a writer came back after another had taken over");
    }

    /// The node is back and has removed what runs elsewhere now.
    fn cleaned(&self, n: usize) {
        self.in_phase(NODES[n], "ready");
        let id = self.get("instance", "db")["metadata"]["id"].as_str().expect("an id").to_string();
        let left = self.dir.join(NODES[n]).join("instances").join(id);
        until("the old guest to be removed", DEADLINE, || (!left.exists()).then_some(()));
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        for child in self.agents.iter_mut().chain([&mut self.server]).flatten() {
            let _ = child.kill();
            let _ = child.wait();
        }
        for machine in &mut self.machines {
            machine.remember();
            machine.power_off();
        }
        for name in ["s", "n1", "n2"] {
            let _ = Command::new("ip").args(["netns", "del", &self.namespace(name)]).output();
        }
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

#[track_caller]
fn ip(arguments: &[&str]) {
    let out = Command::new("ip").args(arguments).output().unwrap();
    assert!(out.status.success(), "ip {arguments:?}: {}", String::from_utf8_lossy(&out.stderr));
}

fn text(path: &Path) -> String {
    path.to_str().unwrap().to_string()
}

#[test]
fn a_guest_with_ha_goes_on_elsewhere_and_never_twice() {
    let Some(mut lab) = Lab::new() else { return };
    lab.up();
    // What could not be started elsewhere is refused.
    let refused = lab.oblak(&["launch", "busybox", "--name", "no", "--ha", "--", "sleep", "1"]).fails();
    assert!(refused.contains("root disk is only on the node"), "{refused}");
    lab.oblak(&["volume", "create", "local", "--size", "16MiB", "--format", "directory"]).ok();
    let words =
        ["launch", "busybox", "--name", "no", "--ha", "--ephemeral", "--volume", "local:/data", "--", "sleep", "1"];
    let refused = lab.oblak(&words).fails();
    assert!(refused.contains("volume/local is only on one node"), "{refused}");
    let refused = lab.oblak(&["volume", "create", "x", "--size", "16MiB", "--pool", "nowhere"]).fails();
    assert!(refused.contains("no node has a shared pool"), "{refused}");

    lab.oblak(&["volume", "create", "log", "--size", "16MiB", "--format", "directory", "--pool", "shared"]).ok();
    let words = ["launch", "busybox", "--name", "db", "--ha", "--ephemeral", "--volume", "log:/data", "--wait"];
    lab.oblak(&[&words[..], &["--", "sh", "-c", WRITER]].concat()).ok();
    lab.oblak(&["launch", "busybox", "--name", "plain", "--wait", "--", "sleep", "10000"]).ok();
    lab.fenced("db");

    // Both agents stand still: rather the control plane is cut off. Nothing is moved; the guest stands still and goes on as itself.
    (0..2).for_each(|n| lab.signal_agent(n, Signal::SIGSTOP));
    let held = || lab.oblak(&["events", "-A"]).out.contains("EvacuationHeld").then_some(());
    until("the brake to hold", DEADLINE, held);
    (0..2).for_each(|n| lab.signal_agent(n, Signal::SIGCONT));
    NODES.iter().for_each(|node| lab.in_phase(node, "ready"));
    lab.runs_on("db", NODES[lab.node_of("db")], DEADLINE);
    assert_eq!((lab.writers().len(), &lab.get("instance", "db")["status"]["placement"]["generation"]), (1, &1.into()));
    lab.fenced("db");

    // The power of its node goes.
    let (first, other) = (lab.node_of("db"), 1 - lab.node_of("db"));
    lab.power_off(first);
    let took = lab.runs_on("db", NODES[other], FAILOVER);
    println!("power off -> running elsewhere: {:.1} s", took.as_secs_f64());
    lab.took_over(1);
    lab.agent(first, None);
    lab.cleaned(first);
    lab.fenced("db");

    // Its link is cut in both directions: it stands still before the other one begins, and is removed when the link is back.
    lab.link(other, "down");
    let took = lab.runs_on("db", NODES[first], FAILOVER);
    println!("link cut -> running elsewhere: {:.1} s", took.as_secs_f64());
    lab.took_over(2);
    lab.link(other, "up");
    lab.cleaned(other);
    lab.took_over(2);
    lab.fenced("db");

    // Its agent stands still for longer than the lease, then goes on.
    lab.signal_agent(first, Signal::SIGSTOP);
    let took = lab.runs_on("db", NODES[other], FAILOVER);
    println!("agent stopped -> running elsewhere: {:.1} s", took.as_secs_f64());
    lab.took_over(3);
    lab.signal_agent(first, Signal::SIGCONT);
    lab.cleaned(first);
    lab.took_over(3);
    lab.fenced("db");

    // Nothing reaches its node any more, though it can still send.
    let cut = "add table inet cut; add chain inet cut c { type filter hook input priority -300; }; add rule inet cut c iifname wan drop";
    let nft = |words: &str| {
        let place = format!("--net=/run/netns/{}", lab.namespace(NODES[other]));
        assert!(Command::new("nsenter").args([&place, "nft", words]).status().unwrap().success());
    };
    nft(cut);
    let took = lab.runs_on("db", NODES[first], FAILOVER);
    println!("one direction cut -> running elsewhere: {:.1} s", took.as_secs_f64());
    lab.took_over(4);
    nft("delete table inet cut");
    lab.cleaned(other);
    lab.took_over(4);
    // What is not restarted elsewhere was never touched.
    assert_eq!(lab.get("instance", "plain")["status"]["placement"]["generation"], 1);
}

#[test]
fn a_machine_on_a_shared_pool_goes_on_elsewhere() {
    let Some(mut lab) = Lab::new() else { return };
    lab.up();
    lab.oblak(&["launch", "tiny", "--name", "vm", "--flavor", "xs", "--ha", "--pool", "shared", "--wait"]).ok();
    lab.fenced("vm");
    // Its image is brought to the node that may have to start it.
    let copied = || (lab.get("image", "tiny")["status"]["nodes"].as_array().map(Vec::len) == Some(2)).then_some(());
    until("the image on both nodes", DEADLINE, copied);
    let (first, other) = (lab.node_of("vm"), 1 - lab.node_of("vm"));
    let id = lab.get("instance", "vm")["metadata"]["id"].as_str().expect("an id").to_string();
    lab.link(first, "down");
    let took = lab.runs_on("vm", NODES[other], FAILOVER);
    println!("link of a machine's node cut -> running elsewhere: {:.1} s", took.as_secs_f64());
    let fence: Value =
        oblak_platform::fsx::read_json(&lab.dir.join(NODES[first]).join("instances").join(&id).join("fence.json"))
            .unwrap()
            .expect("the shim says so");
    assert_eq!(fence["lease_ended"], true, "the old one stands still");
    assert!(lab.dir.join("pool").join(&id).join("epoch-00000000000000000002").exists());
    lab.link(first, "up");
    lab.in_phase(NODES[first], "ready");
    let left = lab.dir.join(NODES[first]).join("instances").join(&id);
    until("the old machine to be removed", DEADLINE, || (!left.exists()).then_some(()));
    assert_eq!(lab.node_of("vm"), other);
}
