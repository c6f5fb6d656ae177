//! Several servers on one etcd of three members: any of them may be killed or frozen at any time.

#![allow(clippy::unwrap_used, reason = "a test that panics has failed")]

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use oblak_client::{Auth, Client, ClientConfig, ListOptions, WatchEvent};
use oblak_e2e::{Cloud, Draft, Machine, Settings, eventually, until};
use oblak_model::{ClusterServers, Instance, InstanceId, InstanceKind, NodeKind, NodePhase, Phase};
use oblak_platform::fsx;
use oblak_store_etcd::testing::Members;
use serde_json::Value;

const SOON: Duration = Duration::from_secs(60);
/// Lease 5 s, and what an election and a slow machine take.
const TAKEOVER: Duration = Duration::from_secs(15);
const GUESTS: usize = 24;
/// Requests at once.
const HANDS: usize = 6;

/// A process of the program with a data directory of its own. Ends with this value.
struct Role {
    name: &'static str,
    data: PathBuf,
    machine: Machine,
    child: Option<Child>,
}

impl Role {
    fn new(cloud: &Cloud, name: &'static str) -> Self {
        let data = cloud.dir.join(name);
        Self { name, machine: Machine::new(&data), data, child: None }
    }

    fn log(&self) -> PathBuf {
        self.data.with_extension("log")
    }

    fn said(&self) -> String {
        std::fs::read_to_string(self.log()).unwrap_or_default()
    }

    fn run(&mut self, mut command: Command) {
        let log = std::fs::OpenOptions::new().create(true).append(true).open(self.log()).unwrap();
        command.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log);
        self.child = Some(command.spawn().unwrap());
    }

    /// A server with the authority of the first one.
    fn serve(cloud: &Cloud, name: &'static str, etcd: &str) -> Self {
        let mut role = Self::new(cloud, name);
        copy(&cloud.data.join("pki"), &role.data.join("pki"));
        let mut command = cloud.command(&["server", "--no-context", "--listen", "127.0.0.1:0", "--name", name]);
        command.args(["--etcd", etcd, "--data"]).arg(&role.data);
        role.run(command);
        role
    }

    /// A node that joins at one server.
    fn join(cloud: &Cloud, name: &'static str, server: &str) -> Self {
        let mut role = Self::new(cloud, name);
        let token = cloud.oblak(&["join-token", "create"]).ok().trim().to_string();
        let mut command = cloud.command(&["join", server, "--node-name", name, "--token", &token, "--data"]);
        command.arg(&role.data).arg("--recipes").arg(&cloud.env.recipes);
        command.env("OBLAK_IMAGE_CACHE", &cloud.env.images);
        role.run(command);
        role
    }

    fn url(&self) -> Option<String> {
        let file: Value = fsx::read_json(&self.data.join("run/oblak.json")).ok().flatten()?;
        file["url"].as_str().map(Into::into)
    }

    fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.as_ref().unwrap().id().cast_signed()), signal).unwrap();
    }

    fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

impl Drop for Role {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- log of {} ---\n{}", self.name, self.said());
        }
        self.kill();
        self.machine.power_off();
    }
}

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    // Each server has a certificate of its own; only the authority is shared.
    for name in ["ca.pem", "ca.key"] {
        std::fs::copy(from.join(name), to.join(name)).unwrap();
    }
}

fn servers(cloud: &Cloud) -> Option<ClusterServers> {
    cloud.wait(cloud.client().cluster_servers()).ok()
}

/// Name and epoch of the leader.
fn leader(cloud: &Cloud) -> Option<(String, u64)> {
    let all = servers(cloud)?;
    let leader = all.leader?;
    Some((all.servers.iter().find(|s| s.id == leader.server)?.name.clone(), leader.epoch))
}

/// A client that knows these servers, and tries them in this order.
fn client(cloud: &Cloud, urls: &[String]) -> Client {
    let text: Value = fsx::read_json(&cloud.dir.join("config.json")).unwrap().unwrap();
    let context = &text["contexts"]["local"];
    let word = |name: &str| context[name].as_str().unwrap().to_string();
    let mut config = ClientConfig::new(&urls[0], word("ca_pem"), Auth::Bearer(word("token")));
    config.others = urls[1..].to_vec();
    Client::new(&config).unwrap()
}

/// What a watch that is never closed by the test has seen.
#[derive(Default)]
struct Seen {
    /// How often each instance appeared without having been there.
    born: BTreeMap<String, usize>,
    alive: BTreeMap<InstanceId, Instance>,
    /// Revisions in the order in which they came.
    ordered: bool,
    last: oblak_model::Revision,
    failed: Option<String>,
}

impl Seen {
    fn take(&mut self, event: WatchEvent<InstanceKind>) {
        let at = match event {
            WatchEvent::Put(object, at) => {
                if self.alive.insert(InstanceId(object.metadata.id), (*object).clone()).is_none() {
                    *self.born.entry(object.metadata.name).or_default() += 1;
                }
                at
            }
            WatchEvent::Delete(id, _, at) => {
                self.alive.remove(&InstanceId(id));
                at
            }
            WatchEvent::Bookmark(at) => at,
        };
        self.ordered &= at >= self.last;
        self.last = at;
    }
}

#[test]
fn any_server_may_die_or_freeze() {
    Members::with(3, |members| async move {
        let etcd = members.urls(0).join(",");
        // The harness blocks; the members stay until it has ended.
        tokio::task::block_in_place(|| scenario(&etcd));
        drop(members);
    });
}

/// Follows all instances on a thread of its own until told to stop.
struct Watcher {
    seen: Arc<Mutex<Seen>>,
    stop: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Watcher {
    fn start(client: Client) -> Self {
        let (seen, stop) = (Arc::new(Mutex::new(Seen { ordered: true, ..Seen::default() })), Arc::default());
        let (into, until): (_, Arc<AtomicBool>) = (Arc::clone(&seen), Arc::clone(&stop));
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let list = client.list_all::<InstanceKind>("default", &ListOptions::default()).await.unwrap();
                assert!(list.items.is_empty());
                let mut watch =
                    client.watch::<InstanceKind>("default", list.revision, &ListOptions::default()).await.unwrap();
                while !until.load(Ordering::Relaxed) {
                    match tokio::time::timeout(Duration::from_millis(200), watch.next()).await {
                        Err(_) => {}
                        Ok(Ok(event)) => into.lock().unwrap().take(event),
                        Ok(Err(error)) => return into.lock().unwrap().failed = Some(error.to_string()),
                    }
                }
            });
        });
        Self { seen, stop, thread: Some(thread) }
    }

    fn end(mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.take().unwrap().join().unwrap();
        assert_eq!(self.seen.lock().unwrap().failed, None);
    }
}

/// Everything exists once, was started once and runs on one of the nodes.
fn each_runs_once(cloud: &Cloud, n2: &Role, names: &BTreeSet<String>) {
    let all = cloud.all::<InstanceKind>("default");
    let found: Vec<&str> = all.iter().map(|i| i.metadata.name.as_str()).collect();
    assert_eq!(found.len(), names.len(), "{found:?}");
    assert!(names.iter().all(|name| found.contains(&name.as_str())), "{found:?}");
    let here: Vec<Machine> = [&cloud.data, &n2.data]
        .map(|data| {
            let mut machine = Machine::new(data);
            machine.remember();
            machine
        })
        .into();
    for instance in &all {
        let id = instance.metadata.id.to_string();
        let shims: Vec<String> = here
            .iter()
            .flat_map(Machine::processes)
            .map(|(_, command)| command)
            .filter(|command| command.contains(" shim container ") && command.contains(&id))
            .collect();
        assert_eq!(shims.len(), 1, "{}: {shims:?}", instance.metadata.name);
        assert_eq!(instance.status.observed.run, 1, "{} was started more than once", instance.metadata.name);
    }
}

/// Many hands create at once while the leader is killed. Returns how long nobody led.
fn storm(cloud: &Cloud, urls: &[String], leads: &mut Role, names: &BTreeSet<String>) -> Duration {
    let made = Mutex::new(0usize);
    let work: Mutex<Vec<&String>> = Mutex::new(names.iter().collect());
    let epoch = leader(cloud).unwrap().1;
    std::thread::scope(|scope| {
        for _ in 0..HANDS {
            scope.spawn(|| {
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
                let client = client(cloud, urls);
                while let Some(name) = { work.lock().unwrap().pop() } {
                    let draft = Draft::container(name, &["sh", "-c", "echo hello; exec sleep 100000"]);
                    let created = runtime.block_on(client.create("default", draft.object()));
                    created.unwrap_or_else(|error| panic!("{name} was not created: {error}"));
                    *made.lock().unwrap() += 1;
                }
            });
        }
        until("a third is created", SOON, || (*made.lock().unwrap() >= GUESTS / 3).then_some(()));
        leads.kill();
    });
    let killed = Instant::now();
    until("another one leads", TAKEOVER, || leader(cloud).filter(|now| now.1 > epoch));
    killed.elapsed()
}

/// Lets the server of the harness end and start again, so that `wanted` leads, the only other one.
fn hand_over(cloud: &mut Cloud) -> (String, u64) {
    let before = leader(cloud).unwrap();
    if before.0 != "n1" {
        return before;
    }
    cloud.down(&[]);
    cloud.up();
    let now = leader(cloud).expect("an orderly end leaves no gap");
    assert!(now.0 != "n1" && now.1 == before.1 + 1, "{before:?} {now:?}");
    now
}

fn scenario(etcd: &str) {
    let Some(mut cloud) = Cloud::prepare(Settings::default()) else { return };
    cloud.settings.env.insert("OBLAK_ETCD".into(), etcd.into());
    cloud.up();
    let mut roles = vec![Role::serve(&cloud, "s2", etcd), Role::serve(&cloud, "s3", etcd)];
    until("three servers", SOON, || servers(&cloud).filter(|all| all.servers.len() == 3));
    assert_eq!(leader(&cloud).unwrap().0, "n1", "the first one leads");
    let (first, _) = hand_over(&mut cloud);
    let mut leads = roles.remove(roles.iter().position(|role| role.name == first).unwrap());
    let rest = roles.remove(0);
    let home = cloud.client().server();
    let urls = [leads.url().unwrap(), rest.url().unwrap(), home.clone()];

    // A node whose agent has joined at the server that will die.
    let n2 = Role::join(&cloud, "n2", &urls[0]);
    until("n2 is ready and knows all servers", SOON, || {
        let known: Vec<String> = fsx::read_json(&n2.data.join("node/servers.json")).ok().flatten()?;
        let node = cloud.wait(cloud.client().get::<NodeKind>("", "n2")).ok()?;
        (known.len() == 3 && node.status.phase == NodePhase::Ready).then_some(())
    });
    let watcher = Watcher::start(client(&cloud, &urls));
    let mut names: BTreeSet<String> = (0..GUESTS).map(|n| format!("g{n}")).collect();

    let gap = storm(&cloud, &urls, &mut leads, &names);
    println!("killed the leader: another one led after {:.1} s", gap.as_secs_f64());
    let running = || {
        let all = cloud.all::<InstanceKind>("default");
        all.iter().filter(|i| i.status.phase == Phase::Running).count() == GUESTS
    };
    until("all run", SOON * 2, || running().then_some(()));
    each_runs_once(&cloud, &n2, &names);
    let node = cloud.wait(cloud.client().get::<NodeKind>("", "n2")).unwrap();
    assert_eq!((node.status.phase, node.status.epoch), (NodePhase::Ready, 1), "its lease went on at another server");

    // A leader that is frozen for longer than its lease, while somebody waits for a new guest.
    let (frozen, epoch) = hand_over(&mut cloud);
    assert_eq!(frozen, rest.name);
    // The server of the harness listens on another port after each start.
    let home = cloud.client().server();
    until("n2 knows where it is now", SOON, || {
        let known: Vec<String> = fsx::read_json(&n2.data.join("node/servers.json")).ok().flatten()?;
        known.contains(&home).then_some(())
    });
    rest.signal(Signal::SIGSTOP);
    names.insert("late".into());
    cloud.oblak(&["launch", "busybox", "--name", "late", "--wait", "--timeout", "60s", "--", "sleep", "100000"]).ok();
    let after = leader(&cloud).unwrap();
    assert_eq!(after, ("n1".into(), epoch + 1));
    rest.signal(Signal::SIGCONT);
    until("it is back", SOON, || servers(&cloud).filter(|all| all.servers.len() == 2));
    assert_eq!(leader(&cloud).unwrap(), after, "and does not lead");
    each_runs_once(&cloud, &n2, &names);

    // Every server reaches the guests of every node.
    let on = |node: &str| {
        let all = cloud.all::<InstanceKind>("default");
        let mut there = all.into_iter().filter(|i| i.status.placement.as_ref().is_some_and(|p| p.node_name == node));
        there.find(|i| i.metadata.name != "late").map(|i| i.metadata.name)
    };
    for url in [&home, &rest.url().unwrap()] {
        for name in ["n1", "n2"].map(on).into_iter().flatten() {
            let one = client(&cloud, std::slice::from_ref(url)).only(url).unwrap();
            let hello = eventually(SOON, || {
                let mut logs = cloud.wait(one.logs("default", &name, None, false)).ok()?;
                let text = cloud.wait(logs.next()).ok()??;
                (&text[..] == b"hello\n").then_some(())
            });
            assert!(hello.is_some(), "{url} does not reach {name}");
        }
    }

    // The watch has seen all of it, each once and in order.
    until("the watch has seen it", SOON, || {
        let all = cloud.all::<InstanceKind>("default");
        let seen = watcher.seen.lock().unwrap();
        all.iter().all(|i| seen.alive.get(&InstanceId(i.metadata.id)) == Some(i)).then_some(())
    });
    {
        let seen = watcher.seen.lock().unwrap();
        assert!(seen.ordered && seen.born.len() == GUESTS + 1, "{:?}", seen.born);
        assert!(seen.born.values().all(|times| *times == 1), "{:?}", seen.born);
    }
    cloud.clear();
    until("the watch sees the end", SOON, || watcher.seen.lock().unwrap().alive.is_empty().then_some(()));
    watcher.end();
    cloud.finish();
}
