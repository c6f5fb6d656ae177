//! Measures a container's launch through the driver and its shim against the bare runtime on the same root file system.
//!
//! `cargo run -p oblak-compute-container --example launch-cost -- [rounds]` as root; interleaved, medians. A launch goes from
//! the request to the observed end of `true`. The bare runtime gets a plain configuration: no user namespace, no system call
//! filter, no overlay, no log, no durable record. Between the two stand the parts that make the difference, one by one.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use oblak_compute::{Boot, ComputeDriver, ContainerOptions, GuestSpec, GuestState};
use oblak_compute_container::{Config, OciDriver, shim_main};
use oblak_model::{InstanceId, Isolation, Size};
use uuid::Uuid;

type Failure = Box<dyn std::error::Error>;

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().collect();
    // The driver executes this very program as its shim.
    if let [_, flag, dir] = args.as_slice()
        && flag == "--dir"
    {
        return shim_main(Path::new(dir));
    }
    let rounds = args.get(1).and_then(|n| n.parse().ok()).unwrap_or(20);
    match measure(rounds) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            println!("launch-cost: {e}");
            ExitCode::FAILURE
        }
    }
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    times.get(times.len() / 2).copied().unwrap_or_default()
}

fn measure(rounds: usize) -> Result<(), Failure> {
    let temp = tempfile::tempdir()?;
    let root = temp.path().join("layer");
    for dir in ["bin", "dev", "etc", "proc", "sys", "tmp"] {
        std::fs::create_dir_all(root.join(dir))?;
    }
    std::fs::copy("/bin/busybox", root.join("bin/true"))?;
    let bundle = temp.path().join("bundle");
    std::fs::create_dir(&bundle)?;
    std::fs::write(bundle.join("config.json"), plain_config(&root).to_string())?;
    let me = std::env::current_exe()?.to_string_lossy().into_owned();
    let driver = OciDriver::new(Config::new(temp.path().join("instances"), temp.path().join("state"), vec![me]));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let capabilities = runtime.block_on(driver.probe());
    println!(
        "probed: {:?}",
        capabilities.probed.iter().map(|p| format!("{} {}", p.name, p.detail)).collect::<Vec<_>>()
    );
    let (mut bare, mut ready, mut whole, mut clean) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for _ in 0..rounds {
        bare.push(bare_run(&bundle)?);
        let began = Instant::now();
        let spec = spec(temp.path(), &root)?;
        runtime.block_on(async {
            let mut seen = driver.ensure(&spec).await?;
            ready.push(began.elapsed());
            while !matches!(seen.state, GuestState::Stopped | GuestState::Failed) {
                tokio::time::sleep(Duration::from_millis(1)).await;
                seen = driver.observe(spec.id).await?;
            }
            whole.push(began.elapsed());
            if seen.exit_code != Some(0) {
                return Err(Failure::from(format!("{seen:?}")));
            }
            driver.remove(spec.id).await?;
            clean.push(began.elapsed());
            Ok(())
        })?;
    }
    let (bare, ready, whole, clean) = (median(bare), median(ready), median(whole), median(clean));
    let times = |d: Duration| d.as_secs_f64() / bare.as_secs_f64();
    println!("bare runtime, run to end          {bare:>10.1?}");
    println!("driver, request to running        {ready:>10.1?}  {:.2}x", times(ready));
    println!("driver, request to observed end   {whole:>10.1?}  {:.2}x", times(whole));
    println!("driver, request to removed        {clean:>10.1?}  {:.2}x", times(clean));
    Ok(())
}

/// crun refuses hybrid cgroups unless version 2 is hidden, so the bare runtime needs a namespace too; it is made before the
/// clock runs.
fn bare_run(bundle: &Path) -> Result<Duration, Failure> {
    let script = "umount -l /sys/fs/cgroup/unified 2>/dev/null; a=$(date +%s%N); crun run \"$1\" || exit 1; b=$(date +%s%N); echo $((b-a))";
    let output = Command::new("unshare")
        .args(["-m", "sh", "-c", script, "sh", &format!("bare-{}", Uuid::new_v4())])
        .current_dir(bundle)
        .stdin(Stdio::null())
        .output()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let nanos: u64 =
        text.trim().parse().map_err(|_| format!("crun: {text} {}", String::from_utf8_lossy(&output.stderr)))?;
    Ok(Duration::from_nanos(nanos))
}

fn plain_config(root: &Path) -> serde_json::Value {
    let spaces = ["pid", "ipc", "uts", "mount", "network", "cgroup"].map(|t| serde_json::json!({"type": t}));
    serde_json::json!({
        "ociVersion": "1.0.2",
        "root": {"path": root},
        "process": {"user": {"uid": 0, "gid": 0}, "args": ["/bin/true"], "env": ["PATH=/bin"], "cwd": "/"},
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"]},
        ],
        "linux": {"namespaces": spaces},
    })
}

fn spec(temp: &Path, root: &Path) -> Result<GuestSpec, Failure> {
    let id = InstanceId(Uuid::new_v4());
    let dir: PathBuf = temp.join("instances").join(id.to_string());
    std::fs::create_dir_all(&dir)?;
    Ok(GuestSpec {
        id,
        name: "cost".into(),
        project: "default".into(),
        isolation: Isolation::Container,
        dir: dir.clone(),
        run: 1,
        epoch: 1,
        vcpus_milli: 1000,
        memory: Size::mib(64),
        boot: Boot::Oci { layers: vec![root.to_path_buf()], upper: dir.join("upper"), upper_size: Size::ZERO },
        disks: Vec::new(),
        nics: Vec::new(),
        hostname: "cost".into(),
        seed: None,
        fence: None,
        container: ContainerOptions {
            argv: vec!["/bin/true".into()],
            env: BTreeMap::new(),
            id_base: 1_000_000,
            ..ContainerOptions::default()
        },
    })
}
