//! Instances move between two nodes, each in a network namespace of its own.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test may panic")]

use std::process::Command;
use std::time::{Duration, Instant};

use oblak_e2e::two::{DEADLINE, Two, text};
use oblak_e2e::{eventually, until};
use serde_json::Value;

/// Says something ten times a second.
const TICKS: &str = "i=0; while [ $i -lt 100000 ]; do echo tick-$i; i=$((i+1)); sleep 0.1; done";
const MOVE: Duration = Duration::from_secs(120);

/// What people are told by a command that succeeds.
#[track_caller]
fn told(two: &Two, words: &[&str]) -> String {
    let ran = two.oblak(words);
    assert_eq!(ran.code, 0, "{words:?}: {}", ran.err);
    ran.err
}

/// An instance as the api shows it.
fn instance(two: &Two, name: &str) -> Value {
    let shown: Value =
        serde_json::from_str(&two.oblak(&["get", "instance", name, "-o", "json"]).out).unwrap_or_default();
    shown.get("items").map_or(shown.clone(), |items| items[0].clone())
}

fn node_of(two: &Two, name: &str) -> String {
    instance(two, name)["status"]["placement"]["node_name"].as_str().unwrap_or_default().to_string()
}

fn phase(two: &Two, name: &str) -> String {
    instance(two, name)["status"]["migration"]["phase"].as_str().unwrap_or_default().to_string()
}

/// Runs a script in an instance, again while its agent is busy.
#[track_caller]
fn sh(two: &Two, name: &str, script: &str) -> String {
    let mut last = String::new();
    let ran = eventually(DEADLINE, || {
        let ran = two.oblak(&["exec", name, "--", "sh", "-c", script]);
        last = format!("{}{}", ran.out, ran.err);
        (ran.code == 0).then_some(ran.out)
    });
    ran.unwrap_or_else(|| panic!("{script}: {last}")).trim().to_string()
}

fn address(two: &Two, name: &str) -> String {
    instance(two, name)["status"]["addresses"][0]["address"].as_str().unwrap().to_string()
}

/// Lines that an instance has heard on its connection.
fn count(two: &Two, name: &str) -> u64 {
    sh(two, name, "wc -l </tmp/heard").parse().unwrap()
}

/// Emulators of the guest that live, over both nodes.
fn emulators(id: &str) -> usize {
    let alive = |entry: std::fs::DirEntry| {
        let line = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line);
        line.contains("qemu-system") && line.contains(id)
    };
    std::fs::read_dir("/proc").unwrap().flatten().filter_map(|e| alive(e).then_some(())).count()
}

fn signal(two: &Two, node: usize, name: &str) {
    // The server was started first, the agents after it in order.
    let pid = two.children[node + 1].id().to_string();
    assert!(Command::new("kill").args([name, &pid]).status().unwrap().success());
}

fn alone_on(two: &Two, only: &str, work: impl FnOnce()) {
    let other = if only == "n1" { "n2" } else { "n1" };
    two.oblak(&["node", "cordon", other]).ok();
    work();
    two.oblak(&["node", "uncordon", other]).ok();
}

fn start(two: &mut Two) -> String {
    let server = text(&two.dir.join("s"));
    two.start(0, &["server", "--data", &server, "--listen", "0.0.0.0:7443", "--server-name", "192.0.2.1"]);
    until("a context for the user", DEADLINE, || two.dir.join("config.json").exists().then_some(()));
    let token = || two.oblak(&["token", "create", "--expires-in", "1h", "-q"]);
    let token = until("a token", DEADLINE, || Some(token()).filter(|t| t.code == 0)).ok();
    let token = token.trim().to_string();
    for (node, name) in [(0, "n1"), (1, "n2")] {
        two.agent(node, &token);
        two.ready(name);
    }
    token
}

#[test]
fn a_machine_moves_under_its_connections_and_a_container_with_its_files() {
    let Some(mut two) = Two::new() else { return };
    let token = start(&mut two);
    alone_on(&two, "n1", || {
        let machine = ["launch", "tiny", "--name", "db", "--flavor", "xs", "--wait"];
        two.oblak(&machine).ok();
        // Both ends of a connection keep their own side open: the program ends with the first end of a side.
        let peer =
            format!("({TICKS}) | nc -l -p 9001 >/dev/null & sleep 100000 | nc -l -p 9000 >/tmp/heard & sleep 100000");
        two.oblak(&["launch", "busybox", "--name", "peer", "--wait", "--", "sh", "-c", &peer]).ok();
    });
    assert_eq!(node_of(&two, "db"), "n1");
    let id = instance(&two, "db")["metadata"]["id"].as_str().unwrap().to_string();
    let peer = address(&two, "peer");
    sh(&two, "db", "echo on the disk >/root/file; sync; echo in memory >/tmp/file");
    let boot = "cat /proc/sys/kernel/random/boot_id";
    let boot_id = sh(&two, "db", boot);

    // Two connections, one that the machine sends on and one on which it only hears.
    let quiet = "2>/dev/null </dev/null";
    sh(&two, "db", &format!("({TICKS}) {quiet} | setsid nc {peer} 9000 >/dev/null 2>&1 & true"));
    sh(&two, "db", &format!("sleep 100000 {quiet} | setsid nc {peer} 9001 >/tmp/heard 2>/dev/null & true"));
    for name in ["db", "peer"] {
        until("the connections", DEADLINE, || (count(&two, name) > 5).then_some(()));
    }

    // It moves while it runs.
    let refused = two.oblak(&["migrate", "db", "--to", "n1", "--live"]).fails();
    assert!(refused.contains("is on n1 already"), "{refused}");
    let said = told(&two, &["migrate", "db", "--to", "n2", "--live"]);
    println!("{said}");
    assert!(said.contains("db is on n2") && said.contains("stood still for"), "{said}");
    assert_eq!(node_of(&two, "db"), "n2");
    assert_eq!(sh(&two, "db", boot), boot_id, "the same run of the guest");
    assert_eq!(sh(&two, "db", "cat /root/file /tmp/file"), "on the disk\nin memory");
    assert_eq!(emulators(&id), 1);
    assert!(!two.dir.join("a/instances").join(&id).exists(), "nothing is left on the old node");
    for name in ["db", "peer"] {
        let before = count(&two, name);
        let goes_on = eventually(DEADLINE, || (count(&two, name) > before + 20).then_some(()));
        assert!(goes_on.is_some(), "{name} hears no more: {before}, then {}", count(&two, name));
        let whole = "n=0; while read -r line; do [ \"$line\" = tick-$n ] || { echo \"$line, not tick-$n\"; exit; }; n=$((n+1)); done </tmp/heard; echo whole";
        let told = sh(&two, name, whole);
        // The last line may be half written.
        assert!(told == "whole" || told.starts_with("tick-"), "{told}");
    }
    let reached = sh(&two, "peer", &format!("ping -c1 -W2 {}", address(&two, "db")));
    assert!(reached.contains("1 packets received"), "{reached}");

    // Stopped halfway by a person: the other node's agent does not answer.
    signal(&two, 0, "-STOP");
    two.oblak(&["migrate", "db", "--to", "n1", "--live", "--no-wait"]).ok();
    until("it to begin", DEADLINE, || (phase(&two, "db") == "preparing").then_some(()));
    let busy = two.oblak(&["stop", "db"]).fails();
    assert!(busy.contains("is moving to n1"), "{busy}");
    assert!(told(&two, &["migrate", "db", "--cancel"]).contains("stays where it is"));
    signal(&two, 0, "-CONT");
    assert_eq!((phase(&two, "db").as_str(), node_of(&two, "db").as_str()), ("cancelled", "n2"));
    assert_eq!(sh(&two, "db", boot), boot_id);

    // The agent of the source is killed in the middle.
    two.ready("n1");
    two.oblak(&["migrate", "db", "--to", "n1", "--live", "--no-wait"]).ok();
    until("it to copy", DEADLINE, || matches!(phase(&two, "db").as_str(), "copying" | "finishing").then_some(()));
    let begun = Instant::now();
    let mut agent = two.children.remove(2);
    agent.kill().unwrap();
    agent.wait().unwrap();
    println!("killed while {}", phase(&two, "db"));
    two.agent(1, &token);
    until("it to be over", MOVE, || matches!(phase(&two, "db").as_str(), "failed" | "done").then_some(()));
    println!("over ({}) after {:?}", phase(&two, "db"), begun.elapsed());
    two.ready("n2");
    assert_eq!(sh(&two, "db", boot), boot_id, "the same run of the guest");
    until("one emulator", DEADLINE, || (emulators(&id) == 1).then_some(()));
    until("it runs", DEADLINE, || (instance(&two, "db")["status"]["phase"] == "running").then_some(()));

    // A container is stopped, moved and started, with its address and what it wrote.
    let before = address(&two, "peer");
    sh(&two, "peer", "echo kept >/etc/kept; ln -s kept /etc/link");
    let refused = two.oblak(&["migrate", "peer", "--live"]).fails();
    assert!(refused.contains("leave --live away"), "{refused}");
    two.oblak(&["migrate", "peer", "--to", "n2"]).ok();
    until("it runs", DEADLINE, || (instance(&two, "peer")["status"]["phase"] == "running").then_some(()));
    assert_eq!((node_of(&two, "peer"), address(&two, "peer")), ("n2".into(), before));
    assert_eq!(sh(&two, "peer", "cat /etc/link"), "kept");

    // A node is drained.
    let from = "n2";
    if node_of(&two, "db") != from {
        two.oblak(&["migrate", "db", "--to", from, "--live"]).ok();
    }
    let plan = two.oblak(&["node", "drain", from, "--plan"]).ok();
    assert!(
        plan.contains("default/db  moves while it runs") && plan.contains("default/peer  is stopped, moved"),
        "{plan}"
    );
    println!("{}", told(&two, &["node", "drain", from]));
    for name in ["db", "peer"] {
        assert_eq!(node_of(&two, name), "n1");
    }
    assert_eq!(sh(&two, "db", boot), boot_id);
    two.oblak(&["node", "uncordon", from]).ok();
    two.oblak(&["delete", "db", "peer", "--wait"]).ok();
    let clean = || {
        let left = two.machines.iter().flat_map(|m| m.leftovers(false)).collect::<Vec<_>>();
        if left.is_empty() { Ok(()) } else { Err(left) }
    };
    assert!(eventually(DEADLINE, || clean().ok()).is_some(), "left behind: {:?}", clean());
}
