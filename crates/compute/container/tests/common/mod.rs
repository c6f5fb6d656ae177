//! A machine corner for one test: directories, a busybox root file system, a driver, and their removal afterwards.

#![allow(dead_code, clippy::unwrap_used, reason = "shared by several test programs")]

use std::collections::BTreeMap;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use oblak_compute::conformance::{Behaviour, ExecOutput, Harness, run_exec};
use oblak_compute::shim::cgroup::Cgroups;
use oblak_compute::{Boot, ComputeDriver, ContainerOptions, ExecRequest, GuestSpec, Observation};
use oblak_compute_container::{Config, OciDriver};
use oblak_model::{InstanceId, Isolation, Size};
use uuid::Uuid;

pub const PATIENCE: Duration = Duration::from_secs(60);

pub struct World {
    dir: Option<tempfile::TempDir>,
    pub config: Config,
    driver: Mutex<Arc<OciDriver>>,
    ids: Mutex<Vec<InstanceId>>,
    next_base: AtomicU32,
}

/// An example of this package; cargo builds them together with the tests, unless told to build single tests.
pub fn example(name: &str) -> PathBuf {
    let test = std::env::current_exe().unwrap();
    let path = test.parent().unwrap().parent().unwrap().join("examples").join(name);
    assert!(path.exists(), "{} is missing: cargo build -p oblak-compute-container --examples", path.display());
    path
}

impl World {
    /// `None`, with the reason printed, when containers cannot run here.
    pub async fn new(name: &str) -> Option<Self> {
        Self::with_runtime(name, &["crun", "runc"]).await
    }

    pub async fn with_runtime(name: &str, runtimes: &[&str]) -> Option<Self> {
        if !nix::unistd::geteuid().is_root() {
            println!("skipped: {name}: needs root");
            return None;
        }
        if !Path::new("/bin/busybox").exists() {
            println!("skipped: {name}: needs /bin/busybox (package busybox-static)");
            return None;
        }
        // Mode 0700 on purpose: the container must work although its user cannot reach these directories.
        let dir = tempfile::Builder::new().prefix("oblak-container-").tempdir().unwrap();
        make_rootfs(&dir.path().join("layer"));
        let shim = vec![example("container-shim").to_string_lossy().into_owned()];
        let mut config = Config::new(dir.path().join("instances"), dir.path().join("state"), shim);
        config.runtimes = runtimes.iter().map(ToString::to_string).collect();
        let driver = Arc::new(OciDriver::new(config.clone()));
        let capabilities = driver.probe().await;
        if capabilities.isolations.is_empty() {
            println!("skipped: {name}: {:?}", capabilities.unavailable);
            return None;
        }
        let next_base = AtomicU32::new(1_000_000);
        Some(Self { dir: Some(dir), config, driver: Mutex::new(driver), ids: Mutex::default(), next_base })
    }

    pub fn path(&self) -> &Path {
        self.dir.as_ref().unwrap().path()
    }

    pub fn oci(&self) -> Arc<OciDriver> {
        self.driver.lock().unwrap().clone()
    }

    /// A container that runs `script` in busybox's shell.
    pub fn container(&self, script: &str) -> GuestSpec {
        let id = InstanceId(Uuid::new_v4());
        self.ids.lock().unwrap().push(id);
        let dir = self.config.instances.join(id.to_string());
        std::fs::create_dir_all(&dir).unwrap();
        std::fs::set_permissions(&dir, std::fs::Permissions::from_mode(0o711)).unwrap();
        GuestSpec {
            id,
            name: "test".into(),
            project: "default".into(),
            isolation: Isolation::Container,
            dir: dir.clone(),
            run: 1,
            epoch: 1,
            vcpus_milli: 1000,
            memory: Size::mib(64),
            boot: Boot::Oci {
                layers: vec![self.path().join("layer")],
                upper: dir.join("upper"),
                upper_size: Size::ZERO,
            },
            disks: Vec::new(),
            nics: Vec::new(),
            hostname: "test".into(),
            seed: None,
            fence: None,
            container: ContainerOptions {
                argv: vec!["sh".into(), "-c".into(), script.into()],
                env: BTreeMap::new(),
                id_base: self.next_base.fetch_add(65_536, Ordering::Relaxed),
                pids_max: 64,
                resolv_conf: "nameserver 192.0.2.1\n".into(),
                ..ContainerOptions::default()
            },
        }
    }

    pub async fn start(&self, spec: &GuestSpec) -> Observation {
        self.oci().ensure(spec).await.unwrap_or_else(|e| panic!("ensure: {e:?}"))
    }

    pub async fn run(&self, spec: &GuestSpec, argv: &[&str]) -> ExecOutput {
        let request = ExecRequest { argv: argv.iter().map(ToString::to_string).collect(), ..ExecRequest::default() };
        let driver = self.oci();
        let stream =
            driver.exec().unwrap().exec(spec.id, &request).await.unwrap_or_else(|e| panic!("exec {argv:?}: {e:?}"));
        run_exec(stream, b"", PATIENCE).await
    }

    /// Standard output and error of a shell line inside.
    pub async fn sh(&self, spec: &GuestSpec, line: &str) -> String {
        let out = self.run(spec, &["sh", "-c", line]).await;
        format!("{}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr))
    }

    pub fn shim_pid(&self, spec: &GuestSpec) -> i32 {
        let text = std::fs::read_to_string(spec.dir.join("container/shim.json")).unwrap();
        let value: serde_json::Value = serde_json::from_str(&text).unwrap();
        i32::try_from(value["shim"]["pid"].as_i64().unwrap()).unwrap()
    }

    pub async fn log(&self, spec: &GuestSpec) -> String {
        use tokio::io::AsyncReadExt;
        let mut text = Vec::new();
        self.oci().logs(spec.id, None, false).await.unwrap().read_to_end(&mut text).await.unwrap();
        String::from_utf8_lossy(&text).into_owned()
    }
}

impl Drop for World {
    fn drop(&mut self) {
        let (config, ids) = (self.config.clone(), self.ids.lock().map(|i| i.clone()).unwrap_or_default());
        // A runtime of its own, on a thread of its own: a test may be panicking inside of one.
        let cleaned = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            let driver = OciDriver::new(config);
            runtime.block_on(async {
                for id in ids {
                    if let Err(e) = driver.remove(id).await {
                        println!("cleaning up {id}: {e:?}");
                    }
                }
            });
        });
        let _ = cleaned.join();
        drop(self.dir.take());
    }
}

fn make_rootfs(root: &Path) {
    for dir in ["bin", "dev", "etc", "proc", "root", "sys", "tmp", "var", "data"] {
        std::fs::create_dir_all(root.join(dir)).unwrap();
    }
    std::fs::copy("/bin/busybox", root.join("bin/busybox")).unwrap();
    for name in [
        "cat", "chown", "dd", "echo", "false", "grep", "hostname", "id", "ip", "kill", "ls", "mkdir", "mount", "ping",
        "ps", "reboot", "seq", "sh", "sleep", "stat", "stty", "touch", "true", "umount", "unshare", "wc", "yes",
        "tail", "head", "rm", "tr", "df",
    ] {
        symlink("busybox", root.join("bin").join(name)).unwrap();
    }
    std::fs::write(root.join("etc/passwd"), "root:x:0:0:root:/root:/bin/sh\nweb:x:33:33::/tmp:/bin/sh\n").unwrap();
    std::fs::write(root.join("etc/group"), "root:x:0:\nweb:x:33:\nlogs:x:4:web\n").unwrap();
    std::fs::set_permissions(root.join("tmp"), std::fs::Permissions::from_mode(0o1777)).unwrap();
    std::fs::set_permissions(root, std::fs::Permissions::from_mode(0o755)).unwrap();
}

/// The main process of a container that ends when asked.
pub const POLITE: &str = "trap 'exit 0' TERM; while :; do sleep 0.05; done";

#[async_trait]
impl Harness for World {
    fn driver(&self) -> Arc<dyn ComputeDriver> {
        self.oci()
    }
    async fn restart(&self) {
        *self.driver.lock().unwrap() = Arc::new(OciDriver::new(self.config.clone()));
    }
    async fn spec(&self, behaviour: Behaviour) -> Result<GuestSpec, String> {
        Ok(match behaviour {
            Behaviour::Runs => self.container(POLITE),
            Behaviour::Exits(code) => self.container(&format!("exit {code}")),
            Behaviour::IgnoresStop => self.container("trap '' TERM; while :; do sleep 1; done"),
            Behaviour::Prints => {
                self.container("echo one; echo two; echo three; trap 'exit 0' TERM; while :; do sleep 0.05; done")
            }
            Behaviour::Busy => self.container("while :; do :; done"),
        })
    }
    async fn leaks(&self, spec: &GuestSpec) -> Vec<String> {
        leaks(spec)
    }
    fn patience(&self) -> Duration {
        PATIENCE
    }
}

/// Name of a container's cgroup, from its directory.
pub fn group(dir: &Path) -> String {
    use oblak_compute::shim::cgroup;
    let id = dir.file_name().unwrap().to_string_lossy();
    cgroup::name_of(cgroup::ROOT, &id, dir.parent().unwrap())
}

/// Processes, cgroups, mounts, loop devices and files that carry the guest's id.
pub fn leaks(spec: &GuestSpec) -> Vec<String> {
    let id = spec.id.to_string();
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc").unwrap().filter_map(Result::ok) {
        let Some(pid) = entry.file_name().to_str().and_then(|n| n.parse::<i32>().ok()) else { continue };
        let line = std::fs::read_to_string(entry.path().join("cmdline")).unwrap_or_default();
        let groups = std::fs::read_to_string(entry.path().join("cgroup")).unwrap_or_default();
        if line.contains(&id) || groups.contains(&id) {
            found.push(format!("process {pid}: {line:?} {groups:?}"));
        }
    }
    if Cgroups::detect().unwrap().group(&group(&spec.dir)).exists() {
        found.push("a cgroup".into());
    }
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    found.extend(mounts.lines().filter(|l| l.contains(&id)).map(|l| format!("mount {l}")));
    for entry in std::fs::read_dir("/sys/block").unwrap().filter_map(Result::ok) {
        let backing = std::fs::read_to_string(entry.path().join("loop/backing_file")).unwrap_or_default();
        if backing.contains(&id) {
            found.push(format!("loop device {:?}", entry.file_name()));
        }
    }
    if spec.dir.join("container").exists() {
        found.push("the container's directory".into());
    }
    found
}
