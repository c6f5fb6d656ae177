//! What the tests on real machines share: a driver with directories of its own, specs of tiny guests, cleaning up.

#![allow(dead_code, reason = "each test binary uses a part of it")]

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use oblak_compute::{Boot, ComputeDriver, DiskFormat, GuestSpec, GuestState, Observation};
use oblak_compute_vm::{QemuConfig, QemuDriver};
use oblak_model::{InstanceId, Isolation, Size};
use tokio::io::AsyncReadExt;
use uuid::Uuid;

/// Names the directory with `vmlinuz`, `initrd.img` and `tiny.qcow2` (see `images/tiny`).
pub const TINY_ENV: &str = "OBLAK_TEST_TINY";

/// The directory of the tiny image, or a line that says why the test is skipped.
pub fn tiny() -> Option<PathBuf> {
    let skip = |why: &str| {
        println!("skipped: {why}");
        None
    };
    let Some(dir) = std::env::var_os(TINY_ENV).map(PathBuf::from) else {
        return skip(&format!("{TINY_ENV} does not name a directory with the tiny image"));
    };
    for file in ["vmlinuz", "initrd.img", "tiny.qcow2"] {
        if !dir.join(file).is_file() {
            return skip(&format!("{} has no {file}", dir.display()));
        }
    }
    if !nix::unistd::geteuid().is_root() {
        return skip("machines need root");
    }
    let there = |program: &str| std::process::Command::new(program).arg("--version").output().is_ok();
    if !there("qemu-system-x86_64") || !there("qemu-img") {
        return skip("qemu-system-x86_64 and qemu-img are not installed");
    }
    Some(dir)
}

/// The shim's program, built as an example beside the tests.
pub fn shim_program() -> PathBuf {
    let me = std::env::current_exe().expect("the path of this test");
    let path = me.parent().and_then(Path::parent).expect("target directory").join("examples/vm_shim");
    assert!(path.is_file(), "{} is not built; run `cargo build -p oblak-compute-vm --examples`", path.display());
    path
}

pub struct World {
    pub temp: tempfile::TempDir,
    pub tiny: PathBuf,
    pub cgroup: String,
    driver: Mutex<Arc<QemuDriver>>,
}

impl World {
    pub fn new(tiny: PathBuf) -> Self {
        let temp = tempfile::Builder::new().prefix("oblak-vm-").tempdir().expect("a temporary directory");
        let cgroup = format!("oblak/test-{}", Uuid::new_v4().simple());
        let driver = Mutex::new(Arc::new(QemuDriver::new(config(temp.path(), &cgroup))));
        Self { temp, tiny, cgroup, driver }
    }
    pub fn driver(&self) -> Arc<QemuDriver> {
        Arc::clone(&self.driver.lock().expect("no test panics here"))
    }
    /// A new driver that remembers nothing, as after a kill of the agent.
    pub fn restart(&self) {
        *self.driver.lock().expect("no test panics here") =
            Arc::new(QemuDriver::new(config(self.temp.path(), &self.cgroup)));
    }
    pub fn instances(&self) -> PathBuf {
        self.temp.path().join("instances")
    }
    pub fn dir(&self, id: InstanceId) -> PathBuf {
        self.instances().join(id.to_string())
    }

    /// A spec of a tiny machine whose root disk is an overlay of its own.
    pub fn spec(&self) -> GuestSpec {
        let id = InstanceId(Uuid::now_v7());
        let dir = self.dir(id);
        std::fs::create_dir_all(&dir).expect("instance directory");
        let root = dir.join("root.qcow2");
        let base = self.tiny.join("tiny.qcow2");
        qemu_img(&["create", "-q", "-f", "qcow2", "-b", text(&base), "-F", "qcow2", text(&root)]);
        GuestSpec {
            id,
            name: "tiny, \"quoted\"".into(),
            project: "test".into(),
            isolation: Isolation::Vm,
            dir,
            run: 1,
            epoch: 1,
            vcpus_milli: 1000,
            memory: Size::mib(192),
            boot: Boot::Kernel {
                kernel: self.tiny.join("vmlinuz"),
                initrd: Some(self.tiny.join("initrd.img")),
                cmdline: "root=LABEL=oblak-tiny console=ttyS0 quiet panic=10 net.ifnames=0".into(),
                root: Some(root),
                format: DiskFormat::Qcow2,
            },
            disks: Vec::new(),
            nics: Vec::new(),
            hostname: "tiny".into(),
            seed: None,
            fence: None,
            container: oblak_compute::ContainerOptions::default(),
        }
    }

    pub async fn wait(&self, id: InstanceId, states: &[GuestState], limit: Duration) -> Observation {
        let end = Instant::now() + limit;
        loop {
            let seen = self.driver().observe(id).await.expect("observe");
            if states.contains(&seen.state) {
                return seen;
            }
            assert!(
                Instant::now() < end,
                "{id} should be in one of {states:?} but is {seen:?}\n{}",
                self.console_now(id)
            );
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// The console so far.
    pub fn console_now(&self, id: InstanceId) -> String {
        let mut parts: Vec<_> =
            std::fs::read_dir(self.dir(id).join("log")).into_iter().flatten().flatten().map(|e| e.path()).collect();
        parts.sort();
        parts.iter().map(|p| String::from_utf8_lossy(&std::fs::read(p).unwrap_or_default()).into_owned()).collect()
    }

    /// Waits until the console, read through the driver, holds `wanted`.
    pub async fn wait_console(&self, id: InstanceId, wanted: &str, limit: Duration) -> String {
        let mut reader = self.driver().logs(id, None, true).await.expect("logs");
        let mut all = Vec::new();
        let work = async {
            loop {
                if String::from_utf8_lossy(&all).contains(wanted) {
                    return;
                }
                assert!(reader.read_buf(&mut all).await.expect("console") > 0, "the console ended");
            }
        };
        if tokio::time::timeout(limit, work).await.is_err() {
            panic!("{wanted:?} should be on the console:\n{}", self.console_now(id));
        }
        String::from_utf8_lossy(&all).into_owned()
    }

    /// Runs a shell command inside through the guest agent, as people do with `oblak exec`.
    pub async fn sh(&self, id: InstanceId, script: &str) -> (String, Option<i32>) {
        let request = oblak_compute::ExecRequest {
            argv: ["sh", "-c", script].map(String::from).to_vec(),
            ..oblak_compute::ExecRequest::default()
        };
        let driver = self.driver();
        let stream = driver.exec().expect("exec").exec(id, &request).await.expect("exec");
        let out = oblak_compute::conformance::run_exec(stream, b"", Duration::from_secs(120)).await;
        assert_eq!(out.error, None, "{script}\n{}", self.console_now(id));
        (String::from_utf8_lossy(&out.stdout).into_owned(), out.code)
    }

    /// What is left of a machine.
    pub fn leaks(&self, id: InstanceId) -> Vec<String> {
        let mut found = Vec::new();
        let name = id.to_string();
        for entry in std::fs::read_dir("/proc").into_iter().flatten().flatten() {
            let Ok(line) = std::fs::read(entry.path().join("cmdline")) else { continue };
            if String::from_utf8_lossy(&line).contains(&name) {
                found.push(format!("process {}", entry.file_name().to_string_lossy()));
            }
        }
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        found.extend(mounts.lines().filter(|l| l.contains(&name)).map(|l| format!("mount {l}")));
        for tree in std::fs::read_dir("/sys/fs/cgroup").into_iter().flatten().flatten() {
            let group = oblak_compute::shim::cgroup::name_of(&self.cgroup, &format!("vm-{id}"), &self.instances());
            let group = tree.path().join(group);
            if group.exists() {
                found.push(group.display().to_string());
            }
        }
        for entry in std::fs::read_dir(self.dir(id)).into_iter().flatten().flatten() {
            if entry.file_name() != "root.qcow2" {
                found.push(entry.path().display().to_string());
            }
        }
        found
    }
}

impl Drop for World {
    /// Ends what a failed test left: each shim by the identity in its record, and with it its emulator.
    fn drop(&mut self) {
        for entry in std::fs::read_dir(self.instances()).into_iter().flatten().flatten() {
            if let Ok(Some(record)) = oblak_compute::shim::ShimRecord::read(&entry.path()) {
                record.shim.kill();
                record.guest.map(|g| g.kill());
            }
        }
        let end = Instant::now() + Duration::from_secs(5);
        for tree in std::fs::read_dir("/sys/fs/cgroup").into_iter().flatten().flatten() {
            let parent = tree.path().join(&self.cgroup);
            for group in std::fs::read_dir(&parent).into_iter().flatten().flatten().filter(|e| e.path().is_dir()) {
                while std::fs::remove_dir(group.path()).is_err() && group.path().exists() && Instant::now() < end {
                    std::thread::sleep(Duration::from_millis(10));
                }
            }
            let _ = std::fs::remove_dir(parent);
        }
    }
}

fn config(root: &Path, cgroup: &str) -> QemuConfig {
    let shim = vec![shim_program().display().to_string()];
    QemuConfig { cgroup_parent: cgroup.into(), ..QemuConfig::new(root.join("instances"), root.join("state"), shim) }
}

pub fn text(path: &Path) -> &str {
    path.to_str().expect("a plain path")
}

pub fn qemu_img(arguments: &[&str]) {
    let status = std::process::Command::new("qemu-img").args(arguments).status().expect("qemu-img");
    assert!(status.success(), "qemu-img {arguments:?}");
}
