//! Two nodes, each in a network namespace of its own, with a wire between them.

#![allow(clippy::unwrap_used, clippy::missing_panics_doc, reason = "a test may panic")]

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use crate::{Env, Machine, Ran, Running, eventually, until};

/// Time for anything that a test waits for.
pub const DEADLINE: Duration = Duration::from_secs(90);

/// Two namespaces with a wire between them, and what runs in them.
pub struct Two {
    /// What the tests are given.
    pub env: Env,
    /// Everything of the test lies here: `s` for the server, `a` and `b` for the nodes.
    pub dir: PathBuf,
    /// The namespaces.
    pub names: [String; 2],
    /// What was started and stays.
    pub children: Vec<Child>,
    /// The nodes from outside.
    pub machines: [Machine; 2],
}

impl Two {
    /// `None`, with the reason printed, when it cannot run here.
    ///
    /// # Panics
    /// When a namespace cannot be made.
    #[must_use]
    pub fn new() -> Option<Self> {
        let env = Env::find()?;
        let dir = tempfile::Builder::new().prefix("oblak-e2e-two-").rand_bytes(5).tempdir_in("/tmp").unwrap().keep();
        // Guests run as users of their own and must be able to pass through.
        std::fs::set_permissions(&dir, std::os::unix::fs::PermissionsExt::from_mode(0o711)).unwrap();
        let names = ["a", "b"].map(|n| format!("obe{}{n}", std::process::id()));
        let machines = ["a", "b"].map(|n| Machine::new(&dir.join(n)));
        let two = Self { env, dir, names, children: Vec::new(), machines };
        let [a, b] = &two.names;
        for name in [a, b] {
            ip(&["netns", "add", name]);
            ip(&["-n", name, "link", "set", "lo", "up"]);
        }
        ip(&["-n", a, "link", "add", "wan", "type", "veth", "peer", "name", "wan", "netns", b]);
        for (name, address) in [(a, "192.0.2.1/24"), (b, "192.0.2.2/24")] {
            ip(&["-n", name, "addr", "add", address, "dev", "wan"]);
            ip(&["-n", name, "link", "set", "wan", "up"]);
        }
        Some(two)
    }

    /// The program in one of the namespaces.
    #[must_use]
    pub fn command(&self, node: usize, words: &[&str]) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net=/run/netns/{}", self.names[node])).arg(&self.env.binary).args(words);
        command.env("OBLAK_CONFIG", self.dir.join("config.json")).env("HOME", &self.dir);
        command.env("OBLAK_IMAGE_CACHE", &self.env.images).env("OBLAK_RECIPES", &self.env.recipes);
        command.env_remove("OBLAK_SERVER").env_remove("OBLAK_TOKEN").current_dir(&self.dir);
        command
    }

    /// Starts what stays.
    ///
    /// # Panics
    /// When it cannot be started.
    pub fn start(&mut self, node: usize, words: &[&str]) {
        let log = std::fs::File::create(self.dir.join(format!("{node}.log"))).unwrap();
        let mut command = self.command(node, words);
        command.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log);
        self.children.push(command.spawn().unwrap());
    }

    /// Runs one command of a user.
    #[track_caller]
    #[must_use]
    pub fn oblak(&self, words: &[&str]) -> Ran {
        Running::start(self.command(0, words)).wait(DEADLINE)
    }

    /// Starts the agent of a node.
    pub fn agent(&mut self, node: usize, token: &str) {
        let [ca, data] = ["s/pki/ca.pem", ["a", "b"][node]].map(|n| text(&self.dir.join(n)));
        let (name, zone) = [("n1", "zone-1"), ("n2", "zone-2")][node];
        let mut words = vec!["agent", "--server", "https://192.0.2.1:7443", "--ca", &ca, "--token", token];
        words.extend(["--data", &data, "--node-name", name, "--zone", zone]);
        if node == 0 {
            words.extend(["--underlay", "192.0.2.1"]);
        }
        self.start(node, &words);
    }

    /// The node as the api shows it; null while it is not known.
    #[must_use]
    pub fn node(&self, name: &str) -> serde_json::Value {
        let shown: serde_json::Value =
            serde_json::from_str(&self.oblak(&["node", "get", name, "-o", "json"]).out).unwrap_or_default();
        shown.get("items").map_or(shown.clone(), |items| items[0].clone())
    }

    /// Waits until a node is ready.
    ///
    /// # Panics
    /// When it does not get so in time.
    pub fn ready(&self, name: &str) {
        let ready = || (self.node(name)["status"]["phase"] == "ready").then_some(());
        if eventually(DEADLINE, ready).is_none() {
            let log = |n: usize| std::fs::read_to_string(self.dir.join(format!("{n}.log"))).unwrap_or_default();
            panic!("{name} does not get ready:\n{}\n{}", log(0), log(1));
        }
    }

    /// Waits until the lease of a node has ended.
    pub fn away(&self, name: &str) {
        until("its lease to end", DEADLINE, || (self.node(name)["status"]["phase"] == "down").then_some(()));
    }
}

impl Drop for Two {
    fn drop(&mut self) {
        for child in &mut self.children {
            let _ = child.kill();
            let _ = child.wait();
        }
        for machine in &mut self.machines {
            machine.remember();
            machine.power_off();
        }
        for name in &self.names {
            let _ = Command::new("ip").args(["netns", "del", name]).output();
        }
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

#[track_caller]
fn ip(arguments: &[&str]) {
    let out = Command::new("ip").args(arguments).output().unwrap();
    assert!(out.status.success(), "ip {arguments:?}: {}", String::from_utf8_lossy(&out.stderr));
}

/// A path as an argument.
///
/// # Panics
/// When it is no text.
#[must_use]
pub fn text(path: &Path) -> String {
    path.to_str().unwrap().to_string()
}
