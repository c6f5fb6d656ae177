//! Launch of a container through the API of a real cloud beside bare `crun run` of the same root file system.

use std::io::Read;
use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use nix::sched::CloneFlags;
use oblak_e2e::Cloud;
use oblak_model::{Instance, InstanceSpec, Isolation, RestartPolicy};
use serde_json::json;

use crate::Context;
use crate::product::{self, Launch};
use crate::report::{Goal, Row, Table};
use crate::stats::Samples;

const ROUNDS: usize = 21;
/// Says a word, then waits to be ended.
const SCRIPT: &str = "echo ready; trap exit TERM; sleep 1000 & wait";
const DEADLINE: Duration = Duration::from_secs(30);

/// Runs the measurement.
pub fn run(context: &Context, table: &mut Table) -> Result<()> {
    let mut cloud = product::cloud()?;
    product::image_ready(&cloud, "busybox")?;
    // The first launch unpacks the layer; that is not what is measured.
    let first = launch(&mut cloud, "warm")?;
    let dir = context.temp()?;
    let root = dir.path().join("root");
    copy_root(&cloud, &first.instance, &root)?;
    product::delete(&mut cloud, &first.instance)?;
    let bare = Bare::new(dir.path(), &root)?;
    // Whichever of its runtimes works here; the first call also warms its store.
    let podman = ["crun", "runc"].into_iter().find(|runtime| by_podman(runtime, &root).is_ok());
    let (mut floor, mut peer) = (Samples::default(), Samples::default());
    let (mut accepted, mut running, mut output) = (Samples::default(), Samples::default(), Samples::default());
    for round in 0..ROUNDS {
        floor.push_ms(bare.run(round)?);
        let done = launch(&mut cloud, &format!("c{round}"))?;
        accepted.push_ms(done.accepted);
        running.push_ms(done.running);
        output.push_ms(first_output(&cloud, &done)?);
        product::delete(&mut cloud, &done.instance)?;
        if let Some(runtime) = podman {
            peer.push_ms(by_podman(runtime, &root)?);
        }
    }
    let floor_is = "crun run to first output";
    table.row(
        Row::beside(format!("create to running, beside {floor_is}"), "ms", &floor, &running)
            .goal(Goal::RatioAtMost(3.0)),
    );
    table.row(
        Row::beside(format!("create to first output, beside {floor_is}"), "ms", &floor, &output)
            .goal(Goal::RatioAtMost(3.0)),
    );
    table.row(Row::median("  of that until the request is answered", "ms", &accepted));
    if let Some(runtime) = podman {
        let peer_is = format!("create to first output, beside podman run with {runtime} (no network)");
        table.row(Row::beside(peer_is, "ms", &peer, &output));
    } else {
        table.note("podman: not installed, or runs nothing here");
    }
    table.note("ours has a network with address, user namespace, system call filter, limits, logs and durable records; bare crun has none of these");
    table.note("running is when a watcher of the API hears it; first output is when the shim writes it to the log");
    cloud.clear();
    Ok(())
}

fn launch(cloud: &mut Cloud, name: &str) -> Result<Launch> {
    let spec = InstanceSpec {
        isolation: Some(Isolation::Container),
        image: "busybox".into(),
        flavor: "xs".into(),
        command: ["sh", "-c", SCRIPT].map(String::from).to_vec(),
        restart_policy: Some(RestartPolicy::Never),
        ..InstanceSpec::default()
    };
    product::launch(cloud, &Instance::new(name, spec))
}

/// Time of the first output: the log is written once, so it was last changed then.
fn first_output(cloud: &Cloud, launch: &Launch) -> Result<Duration> {
    let dir = cloud.data.join("instances").join(launch.instance.metadata.id.to_string());
    let end = Instant::now() + DEADLINE;
    loop {
        if let Some(log) = find_log(&dir) {
            let written = log.metadata()?.modified()?;
            return Ok(written.duration_since(launch.began).unwrap_or_default());
        }
        if Instant::now() > end {
            bail!("no output of {} below {}", launch.instance.metadata.name, dir.display());
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// The file below `dir` that holds exactly the output.
fn find_log(dir: &Path) -> Option<PathBuf> {
    let mut dirs = vec![dir.to_path_buf()];
    while let Some(dir) = dirs.pop() {
        for entry in std::fs::read_dir(dir).ok()?.flatten() {
            let path = entry.path();
            if entry.file_type().is_ok_and(|t| t.is_dir()) {
                // The guest's own files are not ours to search.
                if path.file_name().is_some_and(|n| n != "rootfs" && n != "merged" && n != "upper" && n != "root") {
                    dirs.push(path);
                }
            } else if path.components().any(|c| c.as_os_str().to_string_lossy().starts_with("log"))
                && std::fs::read(&path).is_ok_and(|text| text.windows(5).any(|w| w == b"ready"))
            {
                return Some(path);
            }
        }
    }
    None
}

/// Copies the root file system as the container sees it.
fn copy_root(cloud: &Cloud, instance: &Instance, to: &Path) -> Result<()> {
    let pid = cloud.shim(instance).guest().pid;
    std::fs::create_dir(to)?;
    let copy = format!("cd /proc/{pid}/root && tar -c --one-file-system . | tar -x -C '{}'", to.display());
    let status = Command::new("sh").args(["-c", &copy]).stderr(Stdio::null()).status()?;
    // Files that change while they are read do not matter here.
    if !to.join("bin/busybox").exists() {
        bail!("the root file system could not be copied ({status})");
    }
    Ok(())
}

/// Bare crun. It refuses hybrid cgroups unless version 2 is hidden, so it is started in a mount namespace that was made before the clock runs.
struct Bare {
    bundle: PathBuf,
    namespace: std::fs::File,
    _holder: Holder,
}

/// Holds the namespace; ends when dropped.
struct Holder(Child);

impl Drop for Holder {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Bare {
    fn new(dir: &Path, root: &Path) -> Result<Self> {
        let bundle = dir.join("bundle");
        std::fs::create_dir(&bundle)?;
        std::fs::write(bundle.join("config.json"), plain_config(root).to_string())?;
        let script = "umount -l /sys/fs/cgroup/unified 2>/dev/null; echo ready; exec sleep 1000";
        let mut holder = Holder(
            Command::new("unshare")
                .args(["-m", "sh", "-c", script])
                .stdin(Stdio::null())
                .stdout(Stdio::piped())
                .spawn()
                .context("unshare")?,
        );
        let mut word = [0u8; 6];
        holder.0.stdout.take().context("no pipe")?.read_exact(&mut word).context("no mount namespace")?;
        let namespace = std::fs::File::open(format!("/proc/{}/ns/mnt", holder.0.id()))?;
        Ok(Self { bundle, namespace, _holder: holder })
    }

    /// From the start of crun to the first output.
    fn run(&self, round: usize) -> Result<Duration> {
        let name = format!("oblak-bench-{}-{round}", std::process::id());
        let mut command = Command::new("crun");
        command.args(["run", &name]).current_dir(&self.bundle).stdin(Stdio::null()).stdout(Stdio::piped());
        let namespace = self.namespace.as_raw_fd();
        let bundle = std::ffi::CString::new(self.bundle.as_os_str().as_encoded_bytes())?;
        // SAFETY: setns and chdir are system calls; the descriptor and the string outlive the call of `spawn`.
        unsafe {
            command.pre_exec(move || {
                let fd = std::os::fd::BorrowedFd::borrow_raw(namespace);
                nix::sched::setns(fd, CloneFlags::CLONE_NEWNS)?;
                nix::unistd::chdir(bundle.as_c_str())?;
                Ok(())
            });
        }
        first_word(command)
    }
}

/// Runs a command until it says something; then lets it end.
fn first_word(mut command: Command) -> Result<Duration> {
    let began = Instant::now();
    let mut child = command.spawn().with_context(|| format!("{:?}", command.get_program()))?;
    let mut out = child.stdout.take().context("no pipe")?;
    let mut word = [0u8; 5];
    let read = out.read_exact(&mut word);
    let took = began.elapsed();
    drop(out);
    let status = child.wait()?;
    read.with_context(|| format!("{:?} said nothing ({status})", command.get_program()))?;
    Ok(took)
}

/// With limits of its own: it asks for more open files than a container may have here.
fn by_podman(runtime: &str, root: &Path) -> Result<Duration> {
    let mut command = Command::new("podman");
    command
        .args(["--runtime", runtime, "--cgroup-manager", "cgroupfs", "run", "--rm", "--network", "none"])
        .args(["--ulimit", "nofile=1024:1024", "--ulimit", "nproc=1024:1024", "--rootfs"])
        .arg(root)
        .args(["echo", "ready"]);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
    first_word(command)
}

fn plain_config(root: &Path) -> serde_json::Value {
    let spaces = ["pid", "ipc", "uts", "mount", "network", "cgroup"].map(|kind| json!({"type": kind}));
    json!({
        "ociVersion": "1.0.2",
        "root": {"path": root},
        "process": {"user": {"uid": 0, "gid": 0}, "args": ["/bin/sh", "-c", "echo ready"], "env": ["PATH=/bin"], "cwd": "/"},
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"]},
        ],
        "linux": {"namespaces": spaces},
    })
}
