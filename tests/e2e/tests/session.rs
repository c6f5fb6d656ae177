//! The session of the README, line by line, through the command line as a user types it.

#![allow(clippy::unwrap_used, reason = "a test that panics has failed")]

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use oblak_e2e::{Cloud, Running, Terminal, until};
use oblak_model::{InstanceKind, NetworkKind, Phase, VolumeKind};
use serde_json::Value;

const SOON: Duration = Duration::from_secs(60);
const BOOT: Duration = Duration::from_secs(180);

struct Session {
    cloud: Cloud,
    key: PathBuf,
}

impl Session {
    #[track_caller]
    fn oblak(&self, line: &str) -> String {
        self.cloud.oblak(&line.split_whitespace().collect::<Vec<_>>()).ok()
    }

    #[track_caller]
    fn ssh(&self, script: &str) -> String {
        self.cloud.oblak(&["ssh", "web", "--", script]).ok().trim().to_string()
    }

    #[track_caller]
    fn json(&self, line: &str) -> Value {
        let text = self.oblak(&format!("{line} -o json"));
        serde_json::from_str(&text).unwrap_or_else(|e| panic!("{line} -o json: {e}\n{text}"))
    }

    fn launch(&mut self) {
        let images = self.oblak("image list");
        for (name, content) in [("tiny", ""), ("busybox", "oci"), ("debian-12", "disk")] {
            let line = images.lines().find(|l| l.starts_with(name)).unwrap_or_else(|| panic!("no {name} in\n{images}"));
            assert!(line.contains(content), "{line}");
        }
        let keygen =
            Command::new("ssh-keygen").args(["-q", "-t", "ed25519", "-N", "", "-f"]).arg(&self.key).output().unwrap();
        assert!(keygen.status.success(), "{keygen:?}");
        let public = self.key.with_extension("pub");
        let watch = Running::start(self.cloud.command(&["list", "--watch"]));
        self.oblak(&format!("launch tiny --name web --isolation vm --key {} --wait", public.display()));
        self.oblak("launch busybox --name job --isolation container --wait -- httpd -f -p 80 -h /");
        watch.expect("web", SOON);
        watch.expect("job", SOON);
        watch.interrupt();
        self.cloud.machine.remember();
    }

    fn look(&self) {
        let table = self.oblak("list");
        let web = table.lines().find(|l| l.starts_with("web ")).unwrap_or_else(|| panic!("no web in\n{table}"));
        for word in ["vm", "running", "10.80.0.", "n1"] {
            assert!(web.contains(word), "no {word} in {web}");
        }
        assert!(self.oblak("list -o wide").lines().next().unwrap().len() > table.lines().next().unwrap().len());
        let yaml = self.oblak("list -o yaml");
        assert!(yaml.contains("kind: instance") && yaml.contains("name: job"), "{yaml}");
        let list = self.json("list");
        let items = list["items"].as_array().unwrap();
        assert_eq!(items.len(), 2, "{list}");
        assert!(list["revision"].is_string() && list.get("next").is_some(), "{list}");
        for field in ["id", "name", "project", "labels", "generation", "revision", "created_at"] {
            assert!(items[0]["metadata"].get(field).is_some(), "no metadata.{field} in {}", items[0]);
        }
        let nodes = self.oblak("node list");
        assert!(nodes.contains("n1") && nodes.contains("ready"), "{nodes}");
        let version = self.oblak("version");
        assert!(version.contains(env!("CARGO_PKG_VERSION")), "{version}");
        let events = self.oblak("events");
        for word in ["Scheduled", "Started", "web", "job"] {
            assert!(events.contains(word), "no {word} in\n{events}");
        }
        for shell in ["bash", "zsh", "fish"] {
            let script = self.oblak(&format!("completion {shell}"));
            assert!(script.contains("oblak") && script.contains("launch"), "{shell}: {script}");
        }
    }

    fn talk(&self) {
        assert_eq!(self.ssh("hostname"), "web", "from our metadata service");
        self.cloud.exec("job", &["ping", "-c1", "-W10", "web"]).ok();
        let page = self.ssh("ping -c1 -W10 job >/dev/null && wget -qO- http://job/etc/passwd");
        assert!(page.contains("root:x:0:0"), "{page}");
        let failed = self.cloud.oblak(&["ssh", "web", "--", "exit 3"]);
        assert_eq!(failed.code, 3, "{failed:?}");
        let logs = Running::start(self.cloud.command(&["logs", "web", "--follow"]));
        logs.expect("oblak: ready hostname=web", SOON);
        self.ssh("echo line-for-the-log >/dev/console");
        logs.expect("line-for-the-log", SOON);
        logs.interrupt();
    }

    fn terminals(&self) {
        let mut console = Terminal::start(self.cloud.command(&["console", "web"]));
        until("the console's shell answers", SOON, || {
            console.send("\r");
            oblak_e2e::eventually(Duration::from_secs(2), || console.seen().contains('#').then_some(()))
        });
        console.send("echo console-$((40+2))\r");
        console.expect("console-42", SOON);
        console.send("\u{1d}");
        assert_eq!(console.wait(SOON), 0, "^] leaves");

        let mut shell = Terminal::start(self.cloud.command(&["exec", "-it", "job", "--", "sh"]));
        shell.expect("#", SOON);
        shell.send("stty size\r");
        shell.expect("24 80", SOON);
        shell.resize(132, 50);
        until("the new size arrives", SOON, || {
            shell.send("stty size\r");
            oblak_e2e::eventually(Duration::from_secs(1), || shell.seen().contains("50 132").then_some(()))
        });
        shell.send("exit 7\r");
        assert_eq!(shell.wait(SOON), 7);
    }

    fn volumes(&self) {
        let disks = || self.ssh("ls /sys/class/block | grep '^vd.$' | tr '\\n' ' '");
        let before = disks();
        self.oblak("volume create data --size 1GiB");
        let plug = || {
            self.oblak("volume attach data web");
            until("the disk comes", SOON, || {
                let now = disks();
                now.split(' ').find(|d| !before.split(' ').any(|b| b == *d)).map(ToString::to_string)
            })
        };
        let disk = plug();
        assert_eq!(self.ssh(&format!("cat /sys/class/block/{disk}/size")), (1u64 << 21).to_string());
        let write = "mount -t ext4 /dev/DISK /mnt && echo kept >/mnt/file && umount /mnt";
        self.ssh(&format!("mkfs.ext2 -F /dev/{disk} >/dev/null 2>&1; {}", write.replace("DISK", &disk)));
        let listed = self.oblak("volume list");
        assert!(listed.contains("data") && listed.contains("web"), "{listed}");
        let error = self.cloud.oblak(&["volume", "delete", "data"]).fails();
        assert!(error.contains("web"), "{error}");
        self.oblak("volume detach data");
        until("the disk goes", SOON, || (disks() == before).then_some(()));
        let disk = plug();
        assert_eq!(self.ssh(&format!("mount -t ext4 /dev/{disk} /mnt && cat /mnt/file && umount /mnt")), "kept");
        self.oblak("volume detach data web");
        self.oblak("volume delete data");
        assert!(self.cloud.all::<VolumeKind>("default").is_empty());
    }

    fn snapshots(&self) {
        let boot =
            self.ssh("echo there >/run/in-memory; echo there >/on-disk; sync; cat /proc/sys/kernel/random/boot_id");
        self.oblak("snapshot web s1");
        assert!(self.oblak("snapshots web").contains("s1"));
        self.ssh("rm /run/in-memory /on-disk; sync");
        self.oblak("restore web s1");
        let now = self.ssh("cat /run/in-memory /on-disk /proc/sys/kernel/random/boot_id | tr '\\n' ' '");
        assert_eq!(now, format!("there there {boot}"), "disk and memory are back, without a boot");
        self.oblak("delete snapshot/s1");
    }

    fn power(&self) {
        let run = || self.cloud.instance("web").status.observed.run;
        let first = run();
        self.oblak("pause web");
        assert_eq!(self.cloud.instance("web").status.phase, Phase::Paused);
        self.oblak("resume web");
        self.ssh("true");
        assert_eq!(run(), first);
        self.oblak("resize web --flavor m");
        let flavor = self.json("get flavor/m");
        let vcpus = flavor["spec"]["vcpus"].as_u64().unwrap();
        until("the guest sees its new size", BOOT, || (self.ssh("nproc") == vcpus.to_string()).then_some(()));
        let kib: u64 = self.ssh("awk '/MemTotal/ {print $2}' /proc/meminfo").parse().unwrap();
        let m: u64 = oblak_model::Size::mib(1).0;
        let asked = serde_json::from_value::<oblak_model::Size>(flavor["spec"]["memory"].clone()).unwrap();
        assert!(kib * 1024 > asked.0 / 10 * 8 && kib * 1024 <= asked.0, "{} of {}", kib / 1024, asked.0 / m);
        let before = run();
        self.oblak("restart web");
        assert_eq!(run(), before + 1);
        self.oblak("stop web");
        assert_eq!(self.cloud.instance("web").status.phase, Phase::Stopped);
        self.oblak("start web");
        assert_eq!(self.ssh("hostname"), "web");
    }

    fn apply(&self) {
        let stack = "\
kind: network
metadata: {name: back}
spec: {}
---
kind: subnet
metadata: {name: back}
spec: {network: back, cidr: 10.9.0.0/24}
---
kind: volume
metadata: {name: db}
spec: {size: 64MiB, format: directory}
---
kind: instance
metadata: {name: db, labels: {tier: db}}
spec:
  image: busybox
  flavor: xs
  command: [sleep, '100000']
  networks: [{network: back}]
  volumes: [{volume: db, mount: /data}]
---
kind: instance
metadata: {name: front, labels: {tier: front}}
spec:
  image: IMAGE
  flavor: xs
  command: [sleep, '100000']
  networks: [{network: back}, {network: default}]
";
        let file = |name: &str, image: &str| {
            let path = self.cloud.dir.join(name);
            std::fs::write(&path, stack.replace("IMAGE", image)).unwrap();
            path.display().to_string()
        };
        // One bad resource: nothing of the others either.
        let bad = self.cloud.oblak(&["apply", "-f", &file("bad.yaml", "nonsense")]).fails();
        assert!(bad.contains("nonsense") && bad.contains("front"), "{bad}");
        assert!(self.cloud.all::<VolumeKind>("default").is_empty());
        assert_eq!(self.cloud.all::<NetworkKind>("default").len(), 1);
        assert_eq!(self.cloud.all::<InstanceKind>("default").len(), 2);

        let good = file("stack.yaml", "busybox");
        let plan = self.oblak(&format!("apply -f {good} --plan"));
        assert!(plan.contains("create") && plan.contains("n1") && plan.contains("db"), "{plan}");
        assert_eq!(self.cloud.all::<InstanceKind>("default").len(), 2, "a plan changes nothing");
        self.oblak(&format!("apply -f {good} --wait"));
        self.cloud.exec("front", &["ping", "-c1", "-W5", "db"]).ok();
        self.cloud.exec("db", &["sh", "-c", "echo x >/data/file"]).ok();
        let again = self.oblak(&format!("apply -f {good}"));
        assert!(again.contains("unchanged") && !again.contains("create"), "{again}");
        assert_eq!(self.cloud.instance("front").status.addresses.len(), 2);
        self.oblak("delete front db");
        self.oblak("delete volume/db");
        self.oblak("delete network/back");
    }

    fn too_big(&self) {
        self.oblak("flavor create huge --vcpus 1 --memory 1TiB --disk 1GiB");
        self.oblak("launch busybox --name big --flavor huge");
        let text = until("an explanation", SOON, || {
            Some(self.oblak("explain instance/big")).filter(|t| t.contains("nodes fit"))
        });
        assert!(text.contains("0 of 1 nodes fit: memory 1 TiB asked, "), "{text}");
        assert!(text.contains(" free on n1"), "{text}");
        let listed = self.oblak("list");
        assert!(listed.lines().any(|l| l.starts_with("big ") && l.contains("pending")), "{listed}");
        self.oblak("delete big");
        let placed = self.oblak("explain instance/job");
        assert!(placed.contains("n1"), "{placed}");
    }

    fn down_and_up(&mut self) {
        let (web, job) = (self.cloud.instance("web"), self.cloud.instance("job"));
        let before = (self.cloud.shim(&web), self.cloud.shim(&job));
        self.cloud.down(&[]);
        assert!(before.0.guest().is_alive() && before.1.guest().is_alive());
        let error = self.cloud.oblak(&["list"]).fails();
        assert!(error.contains("127.0.0.1"), "says whom it cannot reach: {error}");
        self.cloud.up();
        self.cloud.in_phase("web", Phase::Running, SOON);
        self.cloud.in_phase("job", Phase::Running, SOON);
        assert_eq!((self.cloud.shim(&web), self.cloud.shim(&job)), before);
        assert_eq!(self.ssh("wget -qO- http://job/etc/passwd | head -n1"), "root:x:0:0:root:/root:/bin/sh");
    }
}

#[test]
fn the_session_of_the_readme() {
    let Some(cloud) = Cloud::start() else { return };
    let key = cloud.dir.join("id");
    let mut session = Session { cloud, key };
    let mut step = |name: &str, run: &mut dyn FnMut(&mut Session)| {
        let start = std::time::Instant::now();
        run(&mut session);
        println!("{name}: {:.1} s", start.elapsed().as_secs_f32());
    };
    step("launch", &mut |s| s.launch());
    step("look", &mut |s| s.look());
    step("talk", &mut |s| s.talk());
    step("terminals", &mut |s| s.terminals());
    step("volumes", &mut |s| s.volumes());
    step("snapshots", &mut |s| s.snapshots());
    step("power", &mut |s| s.power());
    step("apply", &mut |s| s.apply());
    step("too big", &mut |s| s.too_big());
    step("down and up", &mut |s| s.down_and_up());
    step("delete", &mut |s| drop(s.oblak("delete web job")));
    assert!(session.cloud.all::<InstanceKind>("default").is_empty());
    session.cloud.finish();
}
