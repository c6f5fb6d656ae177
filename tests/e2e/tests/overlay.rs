//! Two nodes, each in a network namespace of its own, and one network over both.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test may panic")]

use std::time::Duration;

use oblak_e2e::two::{DEADLINE, Two, text};
use oblak_e2e::{eventually, until};

/// An image lies on the node that fetched it, so each node has one of its own.
const IMAGE: &str = r#"{"kind": "image", "metadata": {"name": "busy2"}, "spec": {"source": {"type": "recipe", "recipe": "busybox"}, "content": "oci"}}"#;

#[test]
fn guests_on_two_nodes_reach_each_other_by_name() {
    let Some(mut two) = Two::new() else { return };
    let server = text(&two.dir.join("s"));
    two.start(0, &["server", "--data", &server, "--listen", "0.0.0.0:7443", "--server-name", "192.0.2.1"]);
    until("a context for the user", DEADLINE, || two.dir.join("config.json").exists().then_some(()));
    let token = || two.oblak(&["token", "create", "--expires-in", "1h", "-q"]);
    let token = until("a token", DEADLINE, || Some(token()).filter(|t| t.code == 0)).ok();
    // An image is fetched by a node that is there: each in turn is the only one.
    two.agent(0, token.trim());
    two.ready("n1");
    two.oblak(&["image", "wait", "busybox"]).ok();
    let mut first = two.children.remove(1);
    first.kill().unwrap();
    first.wait().unwrap();
    two.away("n1");
    two.agent(1, token.trim());
    two.ready("n2");
    std::fs::write(two.dir.join("image.json"), IMAGE).unwrap();
    two.oblak(&["apply", "-f", "image.json"]).ok();
    two.oblak(&["image", "wait", "busy2"]).ok();
    two.agent(0, token.trim());
    two.ready("n1");
    // The first was told, the second has found the address from which it reaches the server.
    for (name, address) in [("n1", "192.0.2.1"), ("n2", "192.0.2.2")] {
        let wanted = serde_json::json!({"address": address, "mtu": 1500});
        assert_eq!(two.node(name)["status"]["facts"]["underlay"], wanted);
    }

    two.oblak(&["launch", "busybox", "--name", "web", "--zone", "zone-1", "--wait", "--", "sleep", "10000"]).ok();
    two.oblak(&["launch", "busy2", "--name", "db", "--zone", "zone-2", "--wait", "--", "sleep", "10000"]).ok();
    for (from, to) in [("web", "db"), ("db", "web")] {
        // The other node may hear of the new guest a moment later.
        let reached = eventually(Duration::from_secs(20), || {
            let ran = two.oblak(&["exec", from, "--", "ping", "-c1", "-W1", to]);
            ran.out.contains("1 packets received").then_some(())
        });
        assert!(reached.is_some(), "{from} does not reach {to}");
        let shown = two.oblak(&["exec", from, "--", "ip", "link", "show", "eth0"]).ok();
        assert!(shown.contains("mtu 1450"), "{shown}");
    }
    two.oblak(&["delete", "web", "db"]).ok();
    let clean = || {
        let left = two.machines.iter().flat_map(|m| m.leftovers(false)).collect::<Vec<_>>();
        if left.is_empty() { Ok(()) } else { Err(left) }
    };
    assert!(eventually(DEADLINE, || clean().ok()).is_some(), "left behind: {:?}", clean());
}
