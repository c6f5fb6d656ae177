//! The shim of one container: prepares its file systems, calls the runtime, keeps log and exit code, serves its socket.

mod copy;
mod exec;
mod guest;
mod probe;
mod pty;
mod reaper;
mod runtime;
mod service;
mod stage;
mod stdio;
mod sys;
mod template;
pub mod upper;

use std::collections::BTreeMap;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use oblak_compute::shim::cgroup::{Cgroups, Group};
use oblak_compute::shim::{ExitRecord, Ready, ShimLock, ShimRecord, detach};
use oblak_compute::{GuestSpec, NicAttach};
use oblak_platform::driver::{DriverError, DriverResult};
use oblak_platform::fsx;

use crate::bundle::{self, Environment};
use crate::task::{self, Task};
use stage::{Rooted, Stage};

/// How long processes that an earlier shim left may take to die.
const LEFTOVER: Duration = Duration::from_secs(5);
/// How long a shim that was started ahead may take to see that its caller is gone.
const WITHDRAWAL: Duration = Duration::from_secs(1);

/// Entry of `oblak shim container --dir <dir>`: `dir` is the driver's directory within the instance's. Must be called before
/// the process has started a thread. Ends when the container has ended.
#[must_use]
pub fn shim_main(dir: &Path) -> ExitCode {
    let result = detach().map_err(|e| DriverError::io("start of the shim", &e)).and_then(|mut ready| {
        let result = run(dir, &mut ready);
        if let Err(error) = &result {
            ready.fail(error);
        }
        result
    });
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Standard error is a file in the directory.
            let _ = writeln!(std::io::stderr(), "{}", error.detail);
            ExitCode::FAILURE
        }
    }
}

fn run(dir: &Path, ready: &mut Ready) -> DriverResult<()> {
    let io = |e: std::io::Error| DriverError::io(&format!("{}", dir.display()), &e);
    let draft = ready.draft();
    let _lock = acquire(dir)?;
    let early = draft.map(|draft| Early::make(dir, draft)).transpose();
    if !ready.granted() {
        return Ok(());
    }
    let mut task: Task =
        fsx::read_json(&dir.join(task::TASK)).map_err(io)?.ok_or_else(|| DriverError::gone("the task is gone"))?;
    let early = match early {
        Ok(None) => None,
        Ok(Some(early)) if early.adopt(&mut task).is_ok() => Some(early),
        // A mount namespace serves once. Another shim finds out what is wrong, if it still is.
        _ => {
            ready.withdraw();
            return Ok(());
        }
    };
    if task.probe {
        return probe::run(&task, ready);
    }
    if already_taken(dir, task.spec.run).map_err(io)? {
        ready.ok(&serde_json::json!({"started": false}));
        return Ok(());
    }
    let early = early.map_or_else(|| Early::begin(dir, &task), Ok)?;
    let prepared = prepare(&task, early, dir)?;
    let runtime = oblak_compute::shim::runtime().map_err(io)?;
    runtime.block_on(guest::live(&task, prepared, dir, ready))
}

/// The lock of the container. A shim that was started ahead by somebody who is gone needs a moment to end.
fn acquire(dir: &Path) -> DriverResult<ShimLock> {
    let io = |e: std::io::Error| DriverError::io(&format!("{}", dir.display()), &e);
    let end = Instant::now() + WITHDRAWAL;
    loop {
        if let Some(lock) = ShimLock::try_acquire(dir).map_err(io)? {
            return Ok(lock);
        }
        if ShimRecord::read(dir).map_err(io)?.is_some() || Instant::now() > end {
            return Err(DriverError::retry("shim_running", format!("another shim works in {}", dir.display())));
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// An empty cgroup, and a stage that may have the root file system on it already.
struct Early {
    cgroups: Cgroups,
    group: Group,
    outside: sys::Outside,
    stage: Stage,
    rooted: Option<(Task, Rooted)>,
}

impl Early {
    /// Everything that can be done with a draft of the task.
    fn make(dir: &Path, draft: serde_json::Value) -> DriverResult<Self> {
        let draft: Task =
            serde_json::from_value(draft).map_err(|e| DriverError::permanent("bad_draft", e.to_string()))?;
        let mut early = Self::begin(dir, &draft)?;
        let rooted = early.stage.root(&draft, None, dir)?;
        early.rooted = Some((draft, rooted));
        Ok(early)
    }

    fn begin(dir: &Path, task: &Task) -> DriverResult<Self> {
        let cgroups = Cgroups::detect().map_err(|e| DriverError::unsupported(format!("cgroups: {e}")))?;
        let group = task::group(&cgroups, task.spec.id, task::instances_of(&task.spec.dir));
        end_leftovers(&group)?;
        nix::sys::prctl::set_child_subreaper(true).map_err(|e| DriverError::io("subreaper", &e.into()))?;
        let outside = sys::Outside::new().map_err(|e| DriverError::io("root directory", &e))?;
        sys::private_mounts().map_err(|e| DriverError::io("private mount namespace", &e))?;
        Ok(Self { cgroups, group, outside, stage: Stage::new(&needed(task, dir)?)?, rooted: None })
    }

    /// Makes it serve what is wanted now; refuses when the draft was another one. Namespaces that were mounted since are not to be
    /// seen from here, so they are fetched from where they are.
    fn adopt(&self, task: &mut Task) -> std::io::Result<()> {
        if self.rooted.as_ref().is_none_or(|(draft, _)| *draft != task.clone().draft()) {
            return Err(std::io::Error::other("the draft was another one"));
        }
        let mut fetched = BTreeMap::<PathBuf, PathBuf>::new();
        for nic in &mut task.spec.nics {
            let NicAttach::Netns { netns, userns } = &mut nic.attach else { continue };
            for path in std::iter::once(netns).chain(userns) {
                if let Some(known) = fetched.get(path) {
                    path.clone_from(known);
                    continue;
                }
                let target = self.stage.dir.join(format!("namespace-{}", fetched.len()));
                let namespace = self.outside.open(path)?;
                std::fs::File::create(&target)?;
                sys::bind(Path::new(&format!("/proc/self/fd/{}", namespace.as_raw_fd())), &target)?;
                fetched.insert(std::mem::replace(path, target.clone()), target);
            }
        }
        Ok(())
    }
}

/// Paths that the stage must not hide.
fn needed<'a>(task: &'a Task, dir: &'a Path) -> DriverResult<Vec<&'a Path>> {
    let root = task::root(&task.spec)?;
    let mut needed: Vec<&Path> = vec![dir, root.upper, &task.templates, &task.runtime];
    needed.extend(root.layers.iter().map(std::path::PathBuf::as_path));
    needed.extend(task.spec.disks.iter().map(|d| d.path.as_path()));
    needed.extend(task::netns(&task.spec)?);
    needed.extend(task::userns(&task.spec)?);
    Ok(needed)
}

/// A run that any shim has taken on is never started again, whatever became of that shim.
fn already_taken(dir: &Path, run: u64) -> std::io::Result<bool> {
    let taken = ShimRecord::read(dir)?.is_some_and(|r| r.run >= run);
    Ok(taken || ExitRecord::read(dir)?.is_some_and(|e| e.run >= run))
}

/// Ends what an earlier shim of this container left in its cgroup. We hold the lock, so nothing is added.
fn end_leftovers(group: &Group) -> DriverResult<()> {
    if !group.exists() {
        return Ok(());
    }
    let end = Instant::now() + LEFTOVER;
    while !group.pids().is_empty() {
        group.kill_once();
        let _ = group.child(task::CONTAINER_GROUP).freeze(false);
        group.kill_once();
        if Instant::now() > end {
            return Err(DriverError::retry(
                "leftover",
                format!("processes of an earlier run in cgroup {} do not die", group.path()),
            ));
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    group.remove().map_err(|e| DriverError::io("cgroup of an earlier run", &e))
}

/// What [`guest::live`] needs of the preparation.
#[derive(Debug)]
pub(crate) struct Prepared {
    group: Group,
    stage: Stage,
    rootfs: std::path::PathBuf,
    capabilities: Vec<String>,
}

fn prepare(task: &Task, early: Early, dir: &Path) -> DriverResult<Prepared> {
    let (spec, Early { cgroups, group, mut stage, rooted, .. }) = (&task.spec, early);
    let joined = stage.joined(spec)?;
    let rooted = match rooted {
        Some((_, rooted)) => rooted,
        None => stage.root(task, joined.as_deref(), dir)?,
    };
    let parts = stage.rest(task, rooted, joined, dir)?;
    let user = crate::user::resolve(&parts.root, &spec.container.user)?;
    let capabilities = crate::security::capabilities(&spec.container)?;
    let env = environment(spec, &cgroups, &group, capabilities.clone())?;
    let config = bundle::config(spec, &user, &parts, &env);
    write_config(&stage, &config)?;
    let io = |e: std::io::Error| DriverError::io(&format!("{}", dir.display()), &e);
    if stage.warnings.is_empty() {
        fsx::remove_file_if_exists(&dir.join(task::WARNINGS)).map_err(io)?;
    } else {
        fsx::write_json(&dir.join(task::WARNINGS), &stage.warnings).map_err(io)?;
    }
    Ok(Prepared { group, stage, rootfs: parts.root, capabilities })
}

fn environment<'a>(
    spec: &'a GuestSpec,
    cgroups: &Cgroups,
    group: &Group,
    capabilities: Vec<String>,
) -> DriverResult<Environment<'a>> {
    let swap_v1 = std::path::Path::new("/sys/fs/cgroup/memory/memory.memsw.limit_in_bytes").exists();
    let swaps = std::fs::read_to_string("/proc/swaps").map_or(0, |t| t.lines().count());
    Ok(Environment {
        cgroup: group.child(task::CONTAINER_GROUP).path(),
        cgroup_version: cgroups.version(),
        // In version 2 the file exists exactly where swap is accounted; asking for it without swap only risks a refusal.
        limits_swap: if cgroups.version() == 1 { swap_v1 } else { swaps > 1 },
        netns: task::netns(spec)?,
        capabilities,
    })
}

fn write_config(stage: &Stage, config: &serde_json::Value) -> DriverResult<()> {
    // Only this namespace sees the stage; the configuration may hold secrets of the environment.
    std::fs::write(stage.dir.join("config.json"), config.to_string()).map_err(|e| DriverError::io("config.json", &e))
}
