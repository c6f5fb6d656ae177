//! A second machine joins: here both are on one machine, told apart by their data directories.

#![allow(clippy::unwrap_used, reason = "a test that panics has failed")]

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use oblak_e2e::{Cloud, Draft, Machine, Running, Settings, until};
use oblak_model::{Image, ImageKind, Node, NodeKind, NodePhase, Phase};
use oblak_platform::fsx;
use serde_json::Value;

const SOON: Duration = Duration::from_secs(30);
/// Renewed several times while the test runs.
const LIFE: &str = "9s";

/// A machine beside the one of the cloud.
struct Second {
    data: PathBuf,
    machine: Machine,
    agent: Option<Child>,
}

impl Second {
    fn new(cloud: &Cloud, name: &str) -> Self {
        let data = cloud.dir.join(name);
        let machine = Machine::new(&data);
        Self { data, machine, agent: None }
    }

    fn log(&self) -> PathBuf {
        self.data.with_extension("log")
    }

    fn said(&self) -> String {
        std::fs::read_to_string(self.log()).unwrap_or_default()
    }

    fn command(&self, cloud: &Cloud, token: Option<&str>, words: &[&str]) -> Command {
        let mut command = cloud.command(&["join", &server(cloud), "--node-name", "n2", "--data"]);
        command.arg(&self.data).arg("--recipes").arg(&cloud.env.recipes).args(words);
        if let Some(token) = token {
            command.args(["--token", token]);
        }
        command
    }

    /// Joins and leaves the agent running.
    fn start(&mut self, cloud: &Cloud, token: Option<&str>, words: &[&str]) {
        let log = std::fs::OpenOptions::new().create(true).append(true).open(self.log()).unwrap();
        let mut command = self.command(cloud, token, words);
        command.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log);
        self.agent = Some(command.spawn().unwrap());
    }

    fn stop(&mut self) {
        if let Some(mut agent) = self.agent.take() {
            let _ = agent.kill();
            let _ = agent.wait();
        }
    }

    fn certificate(&self) -> String {
        let file: Option<Value> = fsx::read_json(&self.data.join("node/node.json")).unwrap_or_default();
        file.map(|f| f["certificate_pem"].as_str().unwrap_or_default().to_string()).unwrap_or_default()
    }
}

impl Drop for Second {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- log of the second machine ---\n{}", self.said());
        }
        self.stop();
        self.machine.power_off();
    }
}

fn server(cloud: &Cloud) -> String {
    cloud.client().server()
}

fn token(cloud: &Cloud, words: &[&str]) -> String {
    cloud.oblak(&[&["join-token", "create"], words].concat()).ok().trim().to_string()
}

fn node(cloud: &Cloud, name: &str) -> Option<Node> {
    cloud.wait(cloud.client().get::<NodeKind>("", name)).ok()
}

fn on(draft: Draft, node: &str) -> Draft {
    draft.with(|spec| spec.placement.node_selector = Some(format!("host={node}").parse().unwrap()))
}

#[test]
fn a_second_machine_joins_works_and_is_removed() {
    let env = BTreeMap::from([("OBLAK_NODE_CERTIFICATE_LIFE".to_string(), LIFE.into())]);
    let Some(mut cloud) = Cloud::prepare(Settings { env, ..Settings::default() }) else { return };
    cloud.up();
    let mut second = Second::new(&cloud, "second");

    // Refusals before anything is there: a token of another cloud, junk, none, a server that is not there.
    let t1 = token(&cloud, &["first", "--ttl", "10m"]);
    let run = |command: Command| Running::start(command).wait(SOON).fails();
    let pin = t1.split('_').nth(1).unwrap();
    let other = t1.replace(pin, &format!("{}{}", if pin.starts_with('a') { "b" } else { "a" }, &pin[1..]));
    let refused = run(second.command(&cloud, Some(&other), &[]));
    assert!(refused.contains("man in the middle") && refused.contains("Nothing secret was sent"), "{refused}");
    assert!(run(second.command(&cloud, Some("junk"), &[])).contains("no join token"));
    assert!(run(second.command(&cloud, None, &[])).contains("oblak join-token create"));
    let mut nowhere = cloud.command(&["join", "https://127.0.0.1:1", "--token", &t1, "--data"]);
    nowhere.arg(&second.data);
    assert!(run(nowhere).contains("is the server up"));
    let mut taken = cloud.command(&["join", &server(&cloud), "--token", &t1, "--node-name", "n1", "--data"]);
    taken.arg(&second.data);
    assert!(run(taken).contains("there is a node \"n1\" already"));
    let role = cloud.oblak(&["join-token", "create", "--role", "server"]).fails();
    assert!(role.contains("servers cannot join this cloud"), "{role}");

    // It joins, with zone and labels, and both are ready.
    second.start(&cloud, Some(&t1), &["--zone", "zone-2", "--label", "host=n2"]);
    let n2 = until("n2 is ready", SOON, || node(&cloud, "n2").filter(|n| n.status.phase == NodePhase::Ready));
    assert_eq!((n2.spec.zone.as_str(), n2.metadata.labels["host"].as_str()), ("zone-2", "n2"));
    let list = cloud.oblak(&["node", "list"]).ok();
    assert_eq!(list.lines().filter(|l| l.contains("ready")).count(), 2, "{list}");
    assert!(cloud.oblak(&["node", "show", "n2"]).ok().contains("joined with join-token/first"));
    assert!(cloud.oblak(&["join-token", "list"]).ok().contains("used"));
    let again = Second::new(&cloud, "third");
    let refused = run(again.command(&cloud, Some(&t1), &[]));
    assert!(refused.contains("is used up: node \"n2\" joined with it"), "{refused}");
    assert!(Running::start(second.command(&cloud, Some(&t1), &[])).wait(SOON).ok().contains("joined already"));

    // One container each; the image that one node has made is copied to the other.
    Draft::container("one", &["sleep", "1000"])
        .with(|spec| spec.placement.zones = vec!["zone-1".into()])
        .create(&cloud)
        .unwrap();
    cloud.in_phase("one", Phase::Running, SOON);
    on(Draft::container("two", &["sleep", "1000"]), "n2").create(&cloud).unwrap();
    let two = cloud.in_phase("two", Phase::Running, SOON);
    assert_eq!(two.status.placement.as_ref().unwrap().node_name, "n2");
    assert_ne!(cloud.instance("one").status.placement, two.status.placement);
    let copied = until("the copy is known", SOON, || {
        let image: Option<Image> = cloud.wait(cloud.client().get::<ImageKind>("default", "busybox")).ok();
        image.filter(|i| i.status.nodes.len() == 2)
    });
    assert!(copied.status.node.is_some_and(|n| copied.status.nodes.contains(&n)), "{:?}", copied.status);
    assert!(cloud.oblak(&["image", "list", "-o", "wide"]).ok().contains("n2"));
    assert_eq!(cloud.exec("two", &["echo", "over the tunnel"]).ok().trim(), "over the tunnel");

    // Certificates are renewed under a stream that goes on, and under a guest that does not notice.
    let shim = |data: &std::path::Path| -> Option<Value> {
        fsx::read_json(&data.join("instances").join(two.metadata.id.to_string()).join("container/shim.json"))
            .ok()
            .flatten()
    };
    let (before, run_before) = (second.certificate(), shim(&second.data));
    let script = "i=0; while sleep 0.3; do i=$((i+1)); echo tick-$i; done";
    let stream = Running::start(cloud.command(&["exec", "two", "--", "sh", "-c", script]));
    stream.expect("tick-1\n", SOON);
    let middle =
        until("the first renewal", SOON, || Some(second.certificate()).filter(|c| *c != before && !c.is_empty()));
    until("the second renewal", SOON, || Some(second.certificate()).filter(|c| *c != middle && !c.is_empty()));
    let seen = stream.out().lines().count();
    stream.expect(&format!("tick-{}\n", seen + 3), SOON);
    drop(stream);
    assert_eq!(shim(&second.data), run_before, "the guest is the same");
    // A restarted agent has the new certificate.
    second.stop();
    second.start(&cloud, None, &[]);
    until("the agent is back", SOON, || node(&cloud, "n2").filter(|n| n.status.epoch > n2.status.epoch));

    // Cordoned: what is there stays, nothing comes.
    cloud.oblak(&["node", "cordon", "n2"]).ok();
    on(Draft::container("three", &["sleep", "1000"]), "n2").create(&cloud).unwrap();
    cloud.when("three", "no place", SOON, |i| i.status.reason == "DoesNotFit");
    cloud.oblak(&["node", "uncordon", "n2"]).ok();
    cloud.in_phase("three", Phase::Running, SOON);
    cloud.oblak(&["delete", "three", "--wait"]).ok();
    let drain = cloud.oblak(&["node", "drain", "n2"]).fails();
    assert!(drain.contains("has no underlay address") && drain.contains("default/two"), "{drain}");

    // Removed: refused first, then with what is lost; the agent is shut out, its guest goes on.
    let refused = cloud.oblak(&["node", "remove", "n2"]).fails();
    assert!(refused.contains("1 instance (default/two)") && refused.contains("--force"), "{refused}");
    second.machine.remember();
    let lost = cloud.oblak(&["node", "remove", "n2", "--force"]).ok();
    assert!(lost.contains("lost instance default/two"), "{lost}");
    assert_eq!(cloud.instance("two").status.reason, "NodeRemoved");
    until("the agent says so", SOON, || second.said().contains("was removed from the cloud").then_some(()));
    assert_eq!(shim(&second.data), run_before, "the guest goes on");
    second.stop();
    let removed = run(second.command(&cloud, Some(&token(&cloud, &[])), &[]));
    assert!(removed.contains("was removed from the cloud"), "{removed}");
    cloud.oblak(&["delete", "two", "--wait"]).ok();
    assert_eq!(cloud.oblak(&["node", "list"]).ok().lines().filter(|l| l.contains("n2")).count(), 0);

    // The owner of that machine ends what is left there.
    let data = second.data.display().to_string();
    cloud.oblak(&["down", "--data", &data, "--stop-guests"]).ok();
    drop(second);
    cloud.finish();
}

#[test]
fn asking_what_would_happen_changes_nothing() {
    let Some(mut cloud) = Cloud::prepare(Settings::default()) else { return };
    cloud.up();
    let mut second = Second::new(&cloud, "second");
    second.start(&cloud, Some(&token(&cloud, &["first"])), &["--label", "host=n2"]);
    until("n2 is ready", SOON, || node(&cloud, "n2").filter(|n| n.status.phase == NodePhase::Ready));
    // Two on n2: one that could run on n1 too, and one that could not.
    cloud.oblak(&["node", "cordon", "n1"]).ok();
    Draft::container("free", &["sleep", "1000"]).create(&cloud).unwrap();
    on(Draft::container("bound", &["sleep", "1000"]), "n2").create(&cloud).unwrap();
    for name in ["free", "bound"] {
        let there = cloud.in_phase(name, Phase::Running, SOON);
        assert_eq!(there.status.placement.unwrap().node_name, "n2");
    }
    cloud.oblak(&["node", "uncordon", "n1"]).ok();
    let placed = || {
        let all = cloud.all::<oblak_model::InstanceKind>("default");
        all.into_iter().map(|i| (i.metadata.name, i.metadata.generation, i.status.placement)).collect::<Vec<_>>()
    };
    let before = placed();

    // Something fits nowhere, so the exit code is that of a refusal; the answer is the data all the same.
    let ran = cloud.oblak(&["whatif", "node-down", "n2", "-o", "json"]);
    assert_eq!(ran.code, 4, "{}", ran.err);
    let answer: Value = serde_json::from_str(&ran.out).unwrap();
    let fate = |name: &str| {
        let all = answer["instances"].as_array().unwrap();
        all.iter().find(|fate| fate["instance"] == name).unwrap_or_else(|| panic!("{answer}")).clone()
    };
    let (free, bound) = (fate("free"), fate("bound"));
    assert_eq!((&free["outcome"], &free["from"], &free["to"]), (&"moves".into(), &"n2".into(), &"n1".into()));
    let seconds = free["seconds"].as_f64().unwrap();
    assert!((5.0..15.0).contains(&seconds), "a lease of 5 s, and a start: {seconds}");
    assert_eq!(bound["outcome"], "does_not_fit");
    assert!(bound["why"].as_str().unwrap().contains("label host=n2 asked"), "{bound}");
    let table = cloud.oblak(&["whatif", "node-down", "n1"]).ok();
    assert!(!table.contains("free"), "nothing of n2 is concerned: {table}");
    assert!(cloud.oblak(&["whatif", "node-down", "n9"]).fails().contains("n9"));

    let advice = cloud.oblak(&["cluster", "balance", "--plan", "-o", "json"]).ok();
    assert!(serde_json::from_str::<Value>(&advice).unwrap()["moves"].is_array(), "{advice}");
    assert!(cloud.oblak(&["cluster", "balance"]).fails().contains("--plan"));

    assert_eq!(placed(), before);
    assert_eq!(node(&cloud, "n2").unwrap().status.phase, NodePhase::Ready);
    cloud.oblak(&["delete", "free", "bound", "--wait"]).ok();
    let data = second.data.display().to_string();
    second.stop();
    cloud.oblak(&["down", "--data", &data, "--stop-guests"]).ok();
    drop(second);
    cloud.finish();
}
