//! Which OCI runtime works here.

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use oblak_compute::{Boot, ContainerOptions, GuestSpec};
use oblak_model::{InstanceId, Isolation, Size};
use oblak_platform::driver::{Availability, DriverResult};
use oblak_platform::fsx;
use oblak_platform::process::boot_id;
use serde::{Deserialize, Serialize};

use crate::driver::Config;
use crate::task::{self, Layering, Task};

/// Where runtimes lie when PATH is poor, as under some service managers.
const DIRECTORIES: [&str; 6] = ["/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin"];
/// How long a probe may take.
const DEADLINE: Duration = Duration::from_secs(30);
/// First host id of the container of a probe. It writes nothing, so any range does.
const PROBE_ID_BASE: u32 = 1 << 30;

/// A runtime that was found, and whether it works.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Candidate {
    /// `crun`, `runc`, `youki`.
    pub name: String,
    /// The executable.
    pub program: PathBuf,
    /// Whether a container really ran, with version or reason.
    pub result: Availability,
}

/// A remembered probe: true for this boot and this very executable.
#[derive(Serialize, Deserialize)]
struct Remembered {
    boot_id: String,
    inode: u64,
    size: u64,
    modified: i64,
    candidate: Candidate,
}

/// Probes every runtime of the configuration in its order.
pub async fn all(config: &Config) -> Vec<Candidate> {
    let mut found = Vec::new();
    for wanted in &config.runtimes {
        found.push(one(config, wanted).await);
    }
    found
}

async fn one(config: &Config, wanted: &str) -> Candidate {
    let name = Path::new(wanted).file_name().map_or_else(|| wanted.to_string(), |n| n.to_string_lossy().into_owned());
    let no = |program: PathBuf, reason: String| Candidate {
        result: Availability::no(&name, reason),
        name: name.clone(),
        program,
    };
    let Some(program) = find(wanted) else {
        return no(PathBuf::from(wanted), format!("{wanted} is not installed"));
    };
    let Ok(meta) = std::fs::metadata(&program) else { return no(program, "cannot be read".into()) };
    let memory = config.state.join(format!("runtime-{name}.json"));
    if let Ok(Some(old)) = fsx::read_json::<Remembered>(&memory)
        && (old.boot_id.as_str(), old.inode, old.size, old.modified)
            == (boot_id().as_str(), meta.ino(), meta.size(), meta.mtime())
        && old.candidate.program == program
        && old.candidate.result.available
    {
        return old.candidate;
    }
    let candidate = match (version(&program).await, try_out(config, &name, &program).await) {
        (Some(version), Ok(())) => Candidate { result: Availability::yes(&name, version), name: name.clone(), program },
        (None, _) => no(program, "does not tell its version".into()),
        (_, Err(e)) => no(program, format!("cannot run a container here: {}", e.detail)),
    };
    let remembered = Remembered {
        boot_id: boot_id(),
        inode: meta.ino(),
        size: meta.size(),
        modified: meta.mtime(),
        candidate: candidate.clone(),
    };
    if let Err(e) = fsx::create_dir_private(&config.state, 0o700).and_then(|()| fsx::write_json(&memory, &remembered)) {
        tracing::warn!(path = %memory.display(), error = %e, "the probe of the OCI runtime could not be remembered");
    }
    candidate
}

/// The executable called `wanted`.
fn find(wanted: &str) -> Option<PathBuf> {
    if wanted.contains('/') {
        return Path::new(wanted).is_file().then(|| PathBuf::from(wanted));
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(DIRECTORIES.iter().map(PathBuf::from))
        .map(|d| d.join(wanted))
        .find(|p| p.is_file())
}

/// The version that the program prints, its own words without the program's name.
async fn version(program: &Path) -> Option<String> {
    let mut command = tokio::process::Command::new(program);
    command.arg("--version").kill_on_drop(true).stdin(std::process::Stdio::null());
    let output = tokio::time::timeout(Duration::from_secs(10), command.output()).await.ok()?.ok()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let line = text.lines().next()?;
    Some(line.split_whitespace().last()?.to_string())
}

/// Runs a trivial container.
async fn try_out(config: &Config, name: &str, program: &Path) -> DriverResult<()> {
    let io = |e: std::io::Error| oblak_platform::driver::DriverError::io(&format!("{}", config.state.display()), &e);
    let id = InstanceId(oblak_platform::random::uuid7(
        &oblak_platform::random::SystemRandom,
        oblak_platform::clock::Clock::now(&oblak_platform::clock::SystemClock),
    ));
    let dir = config.state.join(format!("probe-{id}"));
    fsx::create_dir_private(&dir, 0o700).map_err(io)?;
    let task = Task {
        spec: trivial(id),
        probe: true,
        runtime: program.to_path_buf(),
        runtime_name: name.to_string(),
        layering: Layering::Auto,
        templates: config.templates(),
        log_part_bytes: config.log_part_bytes,
        log_parts: config.log_parts,
    };
    let result = match fsx::write_json(&dir.join(task::TASK), &task).map_err(io) {
        Ok(()) => oblak_compute::shim::spawn_shim(&config.shim_command, &dir, DEADLINE).await.map(drop),
        Err(e) => Err(e),
    };
    let _ = fsx::remove_dir_if_exists(&dir);
    result
}

fn trivial(id: InstanceId) -> GuestSpec {
    GuestSpec {
        id,
        name: "probe".into(),
        project: String::new(),
        isolation: Isolation::Container,
        dir: PathBuf::new(),
        run: 1,
        epoch: 0,
        vcpus_milli: 1000,
        memory: Size::mib(64),
        boot: Boot::Oci { layers: Vec::new(), upper: PathBuf::new(), upper_size: Size::ZERO },
        disks: Vec::new(),
        nics: Vec::new(),
        hostname: "probe".into(),
        seed: None,
        fence: None,
        container: ContainerOptions {
            argv: vec!["/bin/true".into()],
            env: BTreeMap::new(),
            id_base: PROBE_ID_BASE,
            read_only_root: true,
            pids_max: 64,
            ..ContainerOptions::default()
        },
    }
}
