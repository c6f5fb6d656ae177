//! Three servers, each in a network namespace of its own with an etcd of its own: joining, the death of one, backup and restore, certificates
//! that end soon; and a cloud that moves from its file into etcd.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test may panic")]

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use oblak_e2e::{Cloud, Draft, Env, Machine, Ran, Running, Settings, eventually, revive, until};
use oblak_model::Phase;
use oblak_model::members::{ClusterStatus, MemberRole};
use oblak_platform::process::Identity;
use oblak_store_etcd::testing::available;

const SOON: Duration = Duration::from_secs(90);
/// Renewed several times while the test runs.
const LIFE: &str = "20s";
const WORDS: &str = "correct horse battery staple";

/// Hosts on one wire.
struct Hosts {
    env: Env,
    dir: PathBuf,
    hosts: Vec<Host>,
}

struct Host {
    namespace: String,
    data: PathBuf,
    machine: Machine,
    oblak: Option<Child>,
}

impl Hosts {
    fn new(count: usize) -> Option<Self> {
        if !available(&["etcd", "ip", "nsenter"]) {
            return None;
        }
        let env = Env::find()?;
        let dir = tempfile::Builder::new().prefix("oblak-e2e-clu-").rand_bytes(5).tempdir_in("/tmp").unwrap().keep();
        // Guests run as users of their own and must be able to pass through.
        std::fs::set_permissions(&dir, std::os::unix::fs::PermissionsExt::from_mode(0o711)).unwrap();
        std::fs::write(dir.join("words"), format!("{WORDS}\n")).unwrap();
        let mut hosts = Self { env, dir, hosts: Vec::new() };
        let bridge = hosts.bridge();
        ip(&["netns", "add", &bridge]);
        ip(&["-n", &bridge, "link", "add", "br0", "type", "bridge"]);
        ip(&["-n", &bridge, "link", "set", "br0", "up"]);
        for n in 0..count {
            let namespace = format!("obc{}-{n}", std::process::id());
            ip(&["netns", "add", &namespace]);
            ip(&["-n", &namespace, "link", "set", "lo", "up"]);
            let port = format!("p{n}");
            ip(&["-n", &namespace, "link", "add", "wan", "type", "veth", "peer", "name", &port, "netns", &bridge]);
            ip(&["-n", &bridge, "link", "set", &port, "master", "br0", "up"]);
            ip(&["-n", &namespace, "addr", "add", &format!("{}/24", address(n)), "dev", "wan"]);
            ip(&["-n", &namespace, "link", "set", "wan", "up"]);
            let data = hosts.dir.join(format!("n{}", n + 1));
            let machine = Machine::new(&data);
            hosts.hosts.push(Host { namespace, data, machine, oblak: None });
        }
        Some(hosts)
    }

    fn bridge(&self) -> String {
        format!("obc{}-br", std::process::id())
    }

    /// The program on one of the hosts.
    fn command(&self, n: usize, words: &[&str]) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net=/run/netns/{}", self.hosts[n].namespace)).arg(&self.env.binary).args(words);
        command.env("OBLAK_CONFIG", self.dir.join(format!("config-{}.json", n + 1))).env("HOME", &self.dir);
        command.env("OBLAK_IMAGE_CACHE", &self.env.images).env("OBLAK_RECIPES", &self.env.recipes);
        command.env("OBLAK_ETCD_CERTIFICATE_LIFE", LIFE).env("OBLAK_NODE_CERTIFICATE_LIFE", LIFE);
        command.env_remove("OBLAK_SERVER").env_remove("OBLAK_TOKEN").current_dir(&self.dir);
        command
    }

    fn log(&self, n: usize) -> PathBuf {
        self.dir.join(format!("n{}.log", n + 1))
    }

    /// Starts what stays, and waits until it serves.
    fn start(&mut self, n: usize, words: &[&str]) {
        let (name, data) = (format!("n{}", n + 1), text(&self.hosts[n].data));
        let log = std::fs::OpenOptions::new().create(true).append(true).open(self.log(n)).unwrap();
        let mut command = self.command(n, &[words, &["--node-name", &name, "--data", &data]].concat());
        command.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log);
        let child = command.spawn().unwrap();
        let pid = child.id();
        self.hosts[n].oblak = Some(child);
        let ready = eventually(Duration::from_secs(120), || {
            if let Ok(Some(status)) = self.hosts[n].oblak.as_mut().unwrap().try_wait() {
                panic!("{name} ended with {status}:\n{}", self.said(n));
            }
            let file: Option<serde_json::Value> =
                oblak_platform::fsx::read_json(&self.hosts[n].data.join("run/oblak.json")).ok().flatten();
            file.filter(|file| file["process"]["pid"].as_u64() == Some(u64::from(pid))).map(drop)
        });
        assert!(ready.is_some(), "{name} does not get ready:\n{}", self.said(n));
    }

    fn said(&self, n: usize) -> String {
        std::fs::read_to_string(self.log(n)).unwrap_or_default()
    }

    /// Runs one command of a user of a host.
    #[track_caller]
    fn oblak(&self, n: usize, words: &[&str]) -> Ran {
        Running::start(self.command(n, words)).wait(SOON)
    }

    fn status(&self, n: usize) -> Option<ClusterStatus> {
        serde_json::from_str(&self.oblak(n, &["cluster", "status", "-o", "json"]).out).ok()
    }

    /// Waits until the members look like this, as host `n` sees them: name and role, in order of the names.
    fn members(&self, n: usize, wanted: &[(&str, MemberRole)]) -> ClusterStatus {
        let mut last = None;
        let found = eventually(SOON, || {
            last = self.status(n);
            let status = last.clone()?;
            let seen: Vec<_> = status.members.iter().map(|member| (member.name.as_str(), member.role)).collect();
            (seen == wanted && status.members.iter().all(|member| member.healthy)).then_some(status)
        });
        found.unwrap_or_else(|| panic!("the members are not {wanted:?} but {last:#?}\n{}", self.said(n)))
    }

    fn etcd(&self, n: usize) -> Identity {
        let file: Option<Identity> =
            oblak_platform::fsx::read_json(&self.hosts[n].data.join("etcd/process.json")).unwrap();
        revive(file.expect("a record of etcd"))
    }

    /// The end of oblak alone.
    fn kill_oblak(&mut self, n: usize) {
        let mut child = self.hosts[n].oblak.take().unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
    }

    /// The end of a host: everything that runs there.
    fn kill_host(&mut self, n: usize) {
        let etcd = self.etcd(n);
        self.kill_oblak(n);
        assert!(etcd.kill());
        self.hosts[n].machine.power_off();
    }

    fn token(&self, n: usize) -> String {
        self.oblak(n, &["join-token", "create", "--role", "server"]).ok().trim().to_owned()
    }

    fn join(&mut self, n: usize, through: usize, token: &str) {
        let url = format!("https://{}:7443", address(through));
        self.start(n, &["join", &url, "--token", token]);
    }
}

impl Drop for Hosts {
    fn drop(&mut self) {
        for n in 0..self.hosts.len() {
            if std::thread::panicking() {
                let said = self.said(n);
                eprintln!("--- n{} ---\n{}", n + 1, &said[said.len().saturating_sub(3000)..]);
            }
            let host = &mut self.hosts[n];
            if let Some(mut child) = host.oblak.take() {
                let _ = child.kill();
                let _ = child.wait();
            }
            host.machine.power_off();
            let _ = Command::new("ip").args(["netns", "del", &host.namespace]).output();
        }
        let _ = Command::new("ip").args(["netns", "del", &self.bridge()]).output();
        if std::env::var_os("OBLAK_TEST_KEEP").is_none() || !std::thread::panicking() {
            let _ = std::fs::remove_dir_all(&self.dir);
        }
    }
}

fn address(n: usize) -> String {
    format!("192.0.2.{}", n + 1)
}

#[track_caller]
fn ip(arguments: &[&str]) {
    let out = Command::new("ip").args(arguments).output().unwrap();
    assert!(out.status.success(), "ip {arguments:?}: {}", String::from_utf8_lossy(&out.stderr));
}

fn text(path: &Path) -> String {
    path.to_str().unwrap().to_string()
}

fn mode(path: &Path) -> u32 {
    use std::os::unix::fs::PermissionsExt;
    std::fs::metadata(path).unwrap().permissions().mode() & 0o777
}

#[test]
fn three_servers_survive_the_death_of_one() {
    use MemberRole::{Learner, Voter};
    let Some(mut hosts) = Hosts::new(3) else { return };
    let networks = |hosts: &Hosts, n: usize| hosts.oblak(n, &["network", "list"]).ok();

    // The first: one member that votes.
    hosts.start(0, &["up", "--cluster"]);
    let alone = hosts.members(0, &[("n1", Voter)]);
    assert_eq!(alone.store.backend, "etcd");
    assert!(alone.advice.iter().any(|advice| advice.starts_with("one vote")), "{:?}", alone.advice);
    assert!(!hosts.hosts[0].data.join("store/oblak.redb").exists());
    hosts.oblak(0, &["network", "create", "first", "--cidr", "10.91.0.0/24"]).ok();

    // A guest under all of it.
    hosts.oblak(0, &["launch", "busybox", "--name", "witness", "--wait", "--", "sleep", "10000"]).ok();
    let witness = hosts.oblak(0, &["get", "instance", "witness", "-o", "json"]).ok();
    let witness: oblak_model::Instance = serde_json::from_str(&witness).unwrap();
    let shim = |hosts: &Hosts| {
        let record = format!("instances/{}/container/shim.json", witness.metadata.id);
        std::fs::read_to_string(hosts.hosts[0].data.join(record)).unwrap()
    };
    let shim_before = shim(&hosts);

    // oblak dies: etcd goes on, and is adopted.
    let etcd = hosts.etcd(0);
    hosts.kill_oblak(0);
    assert!(etcd.is_alive());
    hosts.start(0, &["up"]);
    assert_eq!(hosts.etcd(0), etcd, "the same etcd");
    // etcd dies: it is started again.
    assert!(etcd.kill());
    until("another etcd", SOON, || Some(hosts.etcd(0)).filter(|now| *now != etcd && now.is_alive()));
    until("the network after that", SOON, || hosts.oblak(0, &["network", "list"]).out.contains("first").then_some(()));

    // The second learns; the third makes three votes.
    let token = hosts.token(0);
    hosts.join(1, 0, &token);
    hosts.members(1, &[("n1", Voter), ("n2", Learner)]);
    for key in ["ca.key", "etcd-ca.key", "etcd.key"] {
        assert_eq!(mode(&hosts.hosts[1].data.join("pki").join(key)), 0o600, "{key}");
    }
    let again = Running::start(hosts.command(
        2,
        &[
            "join",
            "https://192.0.2.1:7443",
            "--token",
            &token,
            "--node-name",
            "n3",
            "--data",
            &text(&hosts.hosts[2].data),
        ],
    ));
    let refused = again.wait(SOON).fails();
    assert!(refused.contains("is used up"), "{refused}");
    assert!(!hosts.hosts[2].data.join("pki/ca.key").exists() && !hosts.hosts[2].data.join("etcd/member.json").exists());
    assert!(!hosts.hosts[2].data.join("etcd/joining.json").exists(), "a refusal leaves nothing");
    // The third is killed while it joins, and joins with the same token.
    let token = hosts.token(1);
    let words = ["join", "https://192.0.2.2:7443", "--token", &token, "--node-name", "n3", "--data"];
    let data = text(&hosts.hosts[2].data);
    let mut half = hosts.command(2, &[&words[..], &[data.as_str()]].concat());
    let mut half = half.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let begun =
        |hosts: &Hosts| ["etcd/joining.json", "etcd/member.json"].iter().any(|f| hosts.hosts[2].data.join(f).exists());
    until("it is joining", SOON, || begun(&hosts).then_some(()));
    half.kill().unwrap();
    half.wait().unwrap();
    hosts.join(2, 1, &token);
    assert!(!hosts.hosts[2].data.join("etcd/joining.json").exists());
    let three = [("n1", Voter), ("n2", Voter), ("n3", Voter)];
    let status = hosts.members(2, &three);
    assert_eq!(status.members.iter().filter(|member| member.leader).count(), 1);
    assert!(status.advice.is_empty(), "{:?}", status.advice);
    let shown = hosts.oblak(0, &["cluster", "status"]).ok();
    for word in ["etcd", "leader", "n3", "etcd.pem", "of 4"] {
        assert!(shown.contains(word), "{word} in\n{shown}");
    }
    hosts.oblak(2, &["network", "create", "second", "--cidr", "10.92.0.0/24"]).ok();

    // Certificates are renewed while all of it runs, and no guest notices.
    let ends = |hosts: &Hosts| {
        let status = hosts.status(0)?;
        status.certificates.iter().find(|c| c.name == "etcd.pem").map(|c| c.expires_at)
    };
    let before = until("the certificate", SOON, || ends(&hosts));
    until("the renewal", SOON, || ends(&hosts).filter(|now| *now > before));
    until("the next renewal", SOON, || ends(&hosts).filter(|now| now.since(before) > Duration::from_secs(20)));
    hosts.members(0, &three);
    assert_eq!(shim(&hosts), shim_before, "the guest is the same");

    // A backup is useless without its words.
    let file = hosts.dir.join("backup");
    let words = text(&hosts.dir.join("words"));
    hosts.oblak(1, &["cluster", "backup", &text(&file), "--passphrase-file", &words]).ok();
    assert_eq!(mode(&file), 0o600);
    let bytes = std::fs::read(&file).unwrap();
    for secret in ["PRIVATE KEY", "10.92.0.0", "second"] {
        assert!(!bytes.windows(secret.len()).any(|window| window == secret.as_bytes()), "{secret}");
    }
    hosts.oblak(1, &["network", "create", "later", "--cidr", "10.93.0.0/24"]).ok();

    // A host dies: the others go on, and it comes back.
    hosts.kill_host(0);
    let others = |hosts: &Hosts, n| {
        until("an answer of the others", SOON, || {
            let ran = hosts.oblak(n, &["network", "list"]);
            (ran.code == 0).then_some(ran.out)
        })
    };
    for n in [1, 2] {
        assert!(others(&hosts, n).contains("later"));
    }
    until("a write without n1", SOON, || {
        let ran = hosts.oblak(2, &["network", "create", "without", "--cidr", "10.94.0.0/24"]);
        (ran.code == 0 || ran.err.contains("taken")).then_some(())
    });
    let status = until("n1 is missed", SOON, || hosts.status(1).filter(|s| s.members.iter().any(|m| !m.healthy)));
    assert!(status.advice.iter().any(|advice| advice.contains("n1 does not answer")), "{:?}", status.advice);
    // Without it one more is needed to remove another.
    let refused = hosts.oblak(1, &["cluster", "remove-server", "n3"]).fails();
    assert!(refused.contains("nothing would work"), "{refused}");
    hosts.start(0, &["up"]);
    hosts.members(0, &three);
    assert!(networks(&hosts, 0).contains("without"));

    // One leaves for good.
    hosts.oblak(0, &["cluster", "remove-server", "n3"]).ok();
    hosts.members(0, &[("n1", Voter), ("n2", Voter)]);
    until("n3 stops", SOON, || hosts.hosts[2].oblak.as_mut().unwrap().try_wait().unwrap());
    assert!(hosts.said(2).contains("was removed from the cluster"));
    let data = text(&hosts.hosts[2].data);
    assert!(hosts.oblak(2, &["up", "--data", &data]).fails().contains("to join again"));

    // A new life from the backup, elsewhere.
    let fresh = hosts.dir.join("fresh");
    let wrong = hosts.dir.join("wrong");
    std::fs::write(&wrong, "wrong horse battery staple\n").unwrap();
    let restore = |hosts: &Hosts, words: &str| {
        hosts.oblak(2, &["cluster", "restore", &text(&file), "--passphrase-file", words, "--data", &text(&fresh)])
    };
    assert!(restore(&hosts, &text(&wrong)).fails().contains("passphrase"));
    assert!(!fresh.join("pki").exists());
    let said = restore(&hosts, &words).ok();
    assert!(said.contains("intact") && said.contains("restored as incarnation"), "{said}");
    assert!(restore(&hosts, &words).fails().contains("holds the state of a cloud"));
    hosts.hosts[2].machine.power_off();
    hosts.hosts[2].data.clone_from(&fresh);
    hosts.hosts[2].machine = Machine::new(&fresh);
    hosts.start(2, &["up"]);
    let list = networks(&hosts, 2);
    assert!(list.contains("second") && !list.contains("later"), "{list}");
    let status = hosts.status(2).unwrap();
    let incarnation: u32 = status.store.revision.split('-').next().unwrap().parse().unwrap();
    assert!(incarnation > 1 && status.store.backend == "redb", "{status:?}");
    let known = hosts.oblak(2, &["network", "list"]);
    assert_eq!(known.code, 0, "{}", known.err);
}

#[test]
fn a_cloud_moves_from_its_file_into_etcd() {
    if !available(&["etcd"]) {
        return;
    }
    let Some(mut cloud) = Cloud::prepare(Settings::default()) else { return };
    cloud.up();
    cloud.oblak(&["network", "create", "kept", "--cidr", "10.95.0.0/24"]).ok();
    cloud.oblak(&["volume", "create", "bytes", "--size", "16MiB"]).ok();
    let guest = Draft::container("a", &["sleep", "100000"]).run(&mut cloud);
    let shim = cloud.shim(&guest);
    let before = cloud.wait(cloud.client().get::<oblak_model::NetworkKind>("default", "kept")).unwrap();
    let data = text(&cloud.data);
    let ports = ["--etcd-client-port", "23791", "--etcd-peer-port", "23801", "--advertise", "127.0.0.1"];
    let migrate = [&["cluster", "migrate-store", "--data", &data, "--cluster"][..], &ports].concat();
    let runs = cloud.oblak(&migrate).fails();
    assert!(runs.contains("oblak down"), "{runs}");
    cloud.kill_server();
    let said = cloud.oblak(&migrate).ok();
    assert!(said.contains("copied and compared") && said.contains("is in etcd now"), "{said}");
    assert!(!cloud.data.join("store/oblak.redb").exists());
    // Again: nothing is left to do.
    cloud.oblak(&migrate).ok();

    cloud.up();
    let after = cloud.wait(cloud.client().get::<oblak_model::NetworkKind>("default", "kept")).unwrap();
    assert_eq!(after.metadata.id, before.metadata.id);
    assert_eq!(after.spec, before.spec);
    let (was, is) = (before.metadata.revision, after.metadata.revision);
    assert!(is.incarnation > was.incarnation, "{was} {is}");
    // Who still has the old revision changes nothing with it, and watches are told to begin again.
    let stale = cloud.wait(cloud.client().replace(&before)).unwrap_err();
    assert_eq!(stale.code(), Some(oblak_model::Code::PreconditionFailed), "{stale}");
    let watch = async {
        let mut watch = cloud
            .client()
            .watch::<oblak_model::NetworkKind>("default", was, &oblak_client::ListOptions::default())
            .await?;
        watch.next().await
    };
    assert_eq!(cloud.wait(watch).unwrap_err().code(), Some(oblak_model::Code::Compacted));
    let adopted = cloud.in_phase("a", Phase::Running, SOON);
    assert_eq!(cloud.shim(&adopted), shim, "the same processes");
    assert!(cloud.oblak(&["volume", "list"]).ok().contains("bytes"));
    cloud.clear();
    cloud.down(&["--stop-guests", "--stop-etcd"]);
    assert!(oblak_platform::fsx::read_json::<Identity>(&cloud.data.join("etcd/process.json")).unwrap().is_none());
    cloud.nothing_left(true);
}

#[test]
fn after_a_restore_unknown_guests_and_volumes_are_left_alone() {
    let Some(mut cloud) = Cloud::prepare(Settings::default()) else { return };
    cloud.up();
    let known = Draft::container("known", &["sleep", "100000"]).run(&mut cloud);
    let known_shim = cloud.shim(&known);
    let file = text(&cloud.dir.join("backup"));
    let key = cloud.oblak(&["cluster", "backup", &file, "--recovery-key"]).ok();
    let words = cloud.dir.join("words");
    std::fs::write(&words, &key).unwrap();
    // Made after the backup.
    cloud.oblak(&["volume", "create", "later", "--size", "16MiB", "--format", "directory"]).ok();
    let words_of_guest = ["sh", "-c", "echo precious > /data/file; exec sleep 100000"];
    let launch = ["launch", "busybox", "--name", "later", "--volume", "later:/data", "--wait", "--"];
    cloud.oblak(&[&launch[..], &words_of_guest].concat()).ok();
    cloud.machine.remember();
    let later = cloud.instance("later");
    let later_shim = cloud.shim(&later);
    let volumes = cloud.data.join("volumes");
    let precious = || {
        let found = Command::new("grep").args(["-rl", "precious"]).arg(&volumes).output().unwrap();
        String::from_utf8_lossy(&found.stdout).lines().count()
    };
    until("its bytes", SOON, || (precious() == 1).then_some(()));

    cloud.kill_server();
    let data = text(&cloud.data);
    let words = text(&words);
    let restore = ["cluster", "restore", &file, "--passphrase-file", &words, "--data", &data];
    assert!(cloud.oblak(&restore).fails().contains("holds the state of a cloud"));
    std::fs::remove_dir_all(cloud.data.join("store")).unwrap();
    std::fs::remove_dir_all(cloud.data.join("pki")).unwrap();
    cloud.oblak(&restore).ok();
    cloud.up();
    let adopted = cloud.in_phase("known", Phase::Running, SOON);
    assert_eq!(cloud.shim(&adopted), known_shim);
    until("the unknown guest is reported", SOON, || {
        cloud.oblak(&["events", "-A"]).out.contains("Quarantined").then_some(())
    });
    assert_eq!(cloud.shim(&later), later_shim, "it runs on");
    assert!(cloud.oblak(&["list"]).ok().lines().all(|line| !line.contains("later")));
    assert_eq!(precious(), 1, "its bytes are kept");
}
