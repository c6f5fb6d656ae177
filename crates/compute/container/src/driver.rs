//! The driver: a thin layer over files, cgroups and shims, without any state of its own that a restart would lose.

use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use async_trait::async_trait;
use oblak_compute::shim::cgroup::{Cgroups, Group, Limits};
use oblak_compute::shim::{
    Ahead, ExitRecord, Fence, FenceState, LogReader, ShimRecord, Standing, client, end_shim, file, log, standing,
};
use oblak_compute::{
    Capabilities, ComputeDriver, Console, Exec, ExecRequest, Fencing, GuestSpec, GuestState, Observation, Pause,
    Resize, UsageSample,
};
use oblak_model::{InstanceId, Isolation, Size};
use oblak_platform::clock::{Clock, SystemClock};
use oblak_platform::driver::{Availability, BoxDuplex, BoxRead, DriverError, DriverResult};
use oblak_platform::fsx;

use crate::probe::{self, Candidate};
use crate::shim::upper;
use crate::task::{self, CONTAINER_GROUP, Layering, Task, Warning};

/// How long a shim may take to report that its container runs. Copying layers, where that is needed, takes its time.
const START: Duration = Duration::from_secs(120);
/// How long a shim may take for an answer that needs no waiting.
const ANSWER: Duration = Duration::from_secs(10);
/// How long a shim may take to answer after the grace of a stop is over, before it is taken for stuck.
const STOPPED: Duration = Duration::from_secs(5);
/// How long processes may take to die of SIGKILL.
const DEATH: Duration = Duration::from_secs(10);

/// How the driver is set up.
#[derive(Clone, Debug)]
pub struct Config {
    /// Parent of the instances' directories: `GuestSpec::dir` is `<instances>/<id>`.
    pub instances: PathBuf,
    /// Where the driver remembers probes, and keeps templates of file systems.
    pub state: PathBuf,
    /// Command that ends in [`crate::shim_main`] when `--dir <dir>` is appended, for example `oblak shim container`.
    pub shim_command: Vec<String>,
    /// Runtimes, names or paths, the preferred one first.
    pub runtimes: Vec<String>,
    /// Bytes per part of a container's log.
    pub log_part_bytes: u64,
    /// Parts of a container's log that are kept.
    pub log_parts: usize,
    /// How layers become readable for a container.
    pub layering: Layering,
}

impl Config {
    /// The usual set-up.
    #[must_use]
    pub fn new(instances: impl Into<PathBuf>, state: impl Into<PathBuf>, shim_command: Vec<String>) -> Self {
        Self {
            instances: instances.into(),
            state: state.into(),
            shim_command,
            runtimes: ["crun", "runc", "youki"].map(String::from).to_vec(),
            log_part_bytes: log::PART_BYTES,
            log_parts: log::PARTS,
            layering: Layering::Auto,
        }
    }

    /// Where templates of writable layers are kept.
    pub(crate) fn templates(&self) -> PathBuf {
        self.state.join("templates")
    }
}

/// See the crate.
pub struct OciDriver {
    config: Config,
    /// One start at a time per guest; entries live as long as somebody holds them.
    starting: Mutex<HashMap<InstanceId, Weak<tokio::sync::Mutex<()>>>>,
    ahead: Ahead,
    candidates: tokio::sync::OnceCell<Vec<Candidate>>,
}

impl OciDriver {
    /// A driver; it looks at the machine when it is first used.
    #[must_use]
    pub fn new(config: Config) -> Self {
        Self { config, starting: Mutex::default(), ahead: Ahead::default(), candidates: tokio::sync::OnceCell::new() }
    }

    fn dir(&self, id: InstanceId) -> PathBuf {
        task::container_dir(&self.config.instances.join(id.to_string()))
    }

    async fn candidates(&self) -> &[Candidate] {
        self.candidates.get_or_init(|| probe::all(&self.config)).await
    }

    async fn runtime(&self) -> DriverResult<&Candidate> {
        let candidates = self.candidates().await;
        candidates.iter().find(|c| c.result.available).ok_or_else(|| {
            let reasons: Vec<String> = candidates.iter().map(|c| format!("{}: {}", c.name, c.result.detail)).collect();
            DriverError::unsupported(format!("no OCI runtime works here ({}); install crun", reasons.join("; ")))
        })
    }

    fn start_lock(&self, id: InstanceId) -> Arc<tokio::sync::Mutex<()>> {
        let mut all = self.starting.lock().unwrap_or_else(PoisonError::into_inner);
        all.retain(|_, lock| lock.strong_count() > 0);
        if let Some(lock) = all.get(&id).and_then(Weak::upgrade) {
            return lock;
        }
        let lock = Arc::new(tokio::sync::Mutex::new(()));
        all.insert(id, Arc::downgrade(&lock));
        lock
    }

    /// What stands in the container's directory, with runs that lost their shim brought to an end first.
    async fn settled(&self, id: InstanceId) -> DriverResult<Standing> {
        let dir = self.dir(id);
        let found = look(&dir)?;
        let (record, reason, message) = match &found {
            Standing::Lost(record) => (record, "ShimLost", "the container's shim died; the container was ended"),
            Standing::Rebooted(record) => (record, "NodeRebooted", "the machine was restarted while the container ran"),
            _ => return Ok(found),
        };
        let Some(_lock) = end_shim(&dir, DEATH).await? else { return Ok(Standing::Never) };
        // Somebody else may have settled it, or even started a new run, before we had the lock.
        let again = look(&dir)?;
        if again != found {
            return Ok(again);
        }
        let group = group(&self.config.instances, id)?;
        let out_of_memory = group.child(CONTAINER_GROUP).oom_kills() > 0;
        end_group(&group).await?;
        let exit = ExitRecord {
            run: record.run,
            code: None,
            reason: reason.into(),
            message: if out_of_memory { format!("{message}; it had run out of memory") } else { message.into() },
            asked: record.stopping,
            started_at: Some(record.started_at),
            at: SystemClock.now(),
            runtime: record.runtime.clone(),
        };
        exit.write(&dir).map_err(|e| at(&dir, &e))?;
        let _ = fsx::remove_file_if_exists(&dir.join(file::SOCKET));
        Ok(Standing::Ended(exit))
    }

    /// The directory and record of a container that runs; `Gone` otherwise.
    async fn live(&self, id: InstanceId) -> DriverResult<(PathBuf, ShimRecord)> {
        match self.settled(id).await? {
            Standing::Alive(record) => Ok((self.dir(id), record)),
            _ => Err(DriverError::gone(format!("container {id} does not run"))),
        }
    }

    async fn task(&self, spec: &GuestSpec) -> DriverResult<Task> {
        let runtime = self.runtime().await?;
        Ok(Task {
            spec: spec.clone(),
            probe: false,
            runtime: runtime.program.clone(),
            runtime_name: runtime.name.clone(),
            layering: self.config.layering,
            templates: self.config.templates(),
            log_part_bytes: self.config.log_part_bytes,
            log_parts: self.config.log_parts,
        })
    }

    fn check(&self, spec: &GuestSpec) -> DriverResult<()> {
        task::check(spec)?;
        let wanted = self.config.instances.join(spec.id.to_string());
        if spec.dir == wanted {
            return Ok(());
        }
        let text = format!("dir: {} should be {}", spec.dir.display(), wanted.display());
        Err(DriverError::permanent("bad_dir", text))
    }

    async fn start(&self, spec: &GuestSpec) -> DriverResult<()> {
        let task = self.task(spec).await?;
        let dir = self.dir(spec.id);
        let io = |e: io::Error| at(&dir, &e);
        fsx::create_dir_private(&dir, 0o700).map_err(io)?;
        fsx::write_json(&dir.join(task::TASK), &task).map_err(io)?;
        self.ahead.start(&self.config.shim_command, &dir, START).await.map(drop)
    }
}

fn look(dir: &Path) -> DriverResult<Standing> {
    standing(dir).map_err(|e| at(dir, &e))
}

fn at(dir: &Path, e: &io::Error) -> DriverError {
    DriverError::io(&format!("{}", dir.display()), e)
}

fn group(instances: &Path, id: InstanceId) -> DriverResult<Group> {
    let cgroups = Cgroups::detect().map_err(|e| DriverError::unsupported(format!("cgroups: {e}")))?;
    Ok(task::group(&cgroups, id, instances))
}

/// Kills everything in a container's cgroup and removes it.
async fn end_group(group: &Group) -> DriverResult<()> {
    if !group.exists() {
        return Ok(());
    }
    let end = tokio::time::Instant::now() + DEATH;
    loop {
        // What is frozen dies when it is thawed, and does nothing before.
        group.kill_once();
        let _ = group.child(CONTAINER_GROUP).freeze(false);
        let empty = group.kill(Duration::from_millis(100)).await;
        // A process that has just ended keeps its group busy for a moment.
        if empty && group.remove().is_ok() {
            return Ok(());
        }
        if tokio::time::Instant::now() >= end {
            return Err(DriverError::retry(
                "processes_left",
                format!("processes in cgroup {} do not die", group.path()),
            ));
        }
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

fn observation(dir: &Path, id: InstanceId, standing: Standing) -> Observation {
    let mut seen = Observation::absent();
    match standing {
        Standing::Never => {}
        Standing::Alive(record) | Standing::Lost(record) | Standing::Rebooted(record) => {
            let instances = || task::instances_of(task::instances_of(dir));
            let frozen = || group(instances(), id).is_ok_and(|g| g.child(CONTAINER_GROUP).is_frozen());
            seen.state = match &record.guest {
                _ if record.stopping => GuestState::Stopping,
                None => GuestState::Starting,
                Some(_) if frozen() => GuestState::Paused,
                Some(_) => GuestState::Running,
            };
            seen.run = record.run;
            seen.pid = record.guest.map(|g| g.pid);
            seen.started_at = Some(record.started_at);
            seen.runtime = record.runtime;
            if let Ok(Some(task)) = fsx::read_json::<Task>(&dir.join(task::TASK)) {
                seen.volumes = task.spec.disks.iter().map(|d| d.volume).collect();
            }
            seen.warnings =
                fsx::read_json::<Vec<Warning>>(&dir.join(task::WARNINGS)).ok().flatten().unwrap_or_default();
            FenceState::read(dir).show(&mut seen);
        }
        Standing::Ended(exit) => {
            seen.state = if exit.is_failure() { GuestState::Failed } else { GuestState::Stopped };
            seen.run = exit.run;
            seen.exit_code = exit.code;
            seen.message = exit.message;
            seen.reason = exit.reason;
            seen.started_at = exit.started_at;
            seen.ended_at = Some(exit.at);
            seen.runtime = exit.runtime;
        }
    }
    seen
}

#[async_trait]
impl ComputeDriver for OciDriver {
    fn name(&self) -> &'static str {
        "oci"
    }

    async fn probe(&self) -> Capabilities {
        let candidates = self.candidates().await;
        let mut capabilities =
            Capabilities { probed: candidates.iter().map(|c| c.result.clone()).collect(), ..Capabilities::default() };
        match Cgroups::detect() {
            Ok(found) => capabilities.probed.push(Availability::yes("cgroup", format!("version {}", found.version()))),
            Err(e) => capabilities.probed.push(Availability::no("cgroup", e.to_string())),
        }
        match self.runtime().await {
            Ok(_) => capabilities.isolations.push(Isolation::Container),
            Err(e) => capabilities.unavailable.push((Isolation::Container, e.detail)),
        }
        capabilities
    }

    async fn prepare(&self, spec: &GuestSpec) -> DriverResult<()> {
        self.check(spec)?;
        let dir = self.dir(spec.id);
        let lock = self.start_lock(spec.id);
        // Somebody starts or removes it already; and a container that had a run may have to be settled first.
        let Ok(_one_at_a_time) = lock.try_lock() else { return Ok(()) };
        if self.ahead.waits(&dir) || look(&dir)? != Standing::Never {
            return Ok(());
        }
        let draft = self.task(spec).await?.draft();
        fsx::create_dir_private(&dir, 0o700).map_err(|e| at(&dir, &e))?;
        // For `remove`, which finds the writable layer by it.
        fsx::write_json_until_boot(&dir.join(task::TASK), &draft).map_err(|e| at(&dir, &e))?;
        let draft = serde_json::to_value(draft).map_err(|e| DriverError::permanent("bad_spec", e.to_string()))?;
        self.ahead.prepare(&self.config.shim_command, &dir, &draft).await
    }

    async fn ensure(&self, spec: &GuestSpec) -> DriverResult<Observation> {
        self.check(spec)?;
        let lock = self.start_lock(spec.id);
        let _one_at_a_time = lock.lock().await;
        let dir = self.dir(spec.id);
        let known = match self.settled(spec.id).await? {
            Standing::Alive(record) => Some(record.run),
            Standing::Ended(exit) if exit.run >= spec.run => Some(exit.run),
            _ => None,
        };
        if known.is_none() {
            self.start(spec).await?;
        }
        // A shim that another caller has just started may still be at work.
        let end = tokio::time::Instant::now() + START;
        loop {
            let seen = observation(&dir, spec.id, self.settled(spec.id).await?);
            if seen.state != GuestState::Starting || tokio::time::Instant::now() >= end {
                return Ok(seen);
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    async fn observe(&self, id: InstanceId) -> DriverResult<Observation> {
        Ok(observation(&self.dir(id), id, self.settled(id).await?))
    }

    async fn list(&self) -> DriverResult<Vec<InstanceId>> {
        let entries = match std::fs::read_dir(&self.config.instances) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            other => other.map_err(|e| at(&self.config.instances, &e))?,
        };
        let mut ids: Vec<InstanceId> = entries
            .filter_map(Result::ok)
            .filter_map(|e| e.file_name().to_str()?.parse::<InstanceId>().ok())
            .filter(|id| self.dir(*id).exists())
            .collect();
        ids.sort_unstable();
        Ok(ids)
    }

    async fn stop(&self, id: InstanceId, grace: Duration) -> DriverResult<()> {
        let Standing::Alive(record) = self.settled(id).await? else { return Ok(()) };
        let dir = self.dir(id);
        let grace_ms = u64::try_from(grace.as_millis()).unwrap_or(u64::MAX);
        let asked =
            client::call(&dir, "stop", &serde_json::json!({"grace_ms": grace_ms}), grace.saturating_add(STOPPED)).await;
        if asked.is_ok() || !matches!(look(&dir)?, Standing::Alive(r) if r.run == record.run) {
            return Ok(());
        }
        // The shim does not answer, or died of something else: the end is wanted all the same.
        let Some(_lock) = end_shim(&dir, DEATH).await? else { return Ok(()) };
        end_group(&group(&self.config.instances, id)?).await?;
        if let Standing::Lost(record) = look(&dir)? {
            let exit = ExitRecord {
                run: record.run,
                code: Some(128 + libc::SIGKILL),
                reason: "Killed".into(),
                message: "the container's shim did not answer".into(),
                asked: true,
                started_at: Some(record.started_at),
                at: SystemClock.now(),
                runtime: record.runtime,
            };
            exit.write(&dir).map_err(|e| at(&dir, &e))?;
        }
        Ok(())
    }

    async fn remove(&self, id: InstanceId) -> DriverResult<()> {
        let dir = self.dir(id);
        self.ahead.forget(&dir);
        let lock = end_shim(&dir, DEATH).await?;
        // Also without a directory: somebody may have deleted it under a running container.
        end_group(&group(&self.config.instances, id)?).await?;
        if lock.is_none() {
            return Ok(());
        }
        // The task goes last, because it tells where the writable layer is.
        if let Ok(Some(task)) = fsx::read_json::<Task>(&dir.join(task::TASK))
            && let Ok(root) = task::root(&task.spec)
        {
            upper::remove(root.upper).map_err(|e| at(root.upper, &e))?;
        }
        for entry in std::fs::read_dir(&dir).map_err(|e| at(&dir, &e))? {
            let entry = entry.map_err(|e| at(&dir, &e))?;
            if entry.file_name() == task::TASK {
                continue;
            }
            let path = entry.path();
            let kind = entry.file_type().map_err(|e| at(&path, &e))?;
            let removed =
                if kind.is_dir() { fsx::remove_dir_if_exists(&path) } else { fsx::remove_file_if_exists(&path) };
            removed.map_err(|e| at(&path, &e))?;
        }
        fsx::remove_dir_if_exists(&dir).map_err(|e| at(&dir, &e))
    }

    async fn usage(&self, id: InstanceId) -> DriverResult<UsageSample> {
        self.live(id).await?;
        group(&self.config.instances, id)?
            .child(CONTAINER_GROUP)
            .usage()
            .ok_or_else(|| DriverError::gone(format!("container {id} has just ended")))
    }

    async fn logs(&self, id: InstanceId, tail: Option<u64>, follow: bool) -> DriverResult<BoxRead> {
        let dir = self.dir(id);
        if !dir.join(file::RECORD).exists() {
            return Err(DriverError::gone(format!("container {id} was never started here")));
        }
        Ok(Box::new(LogReader::open(&dir.join(file::LOG), tail, follow).map_err(|e| at(&dir, &e))?))
    }

    fn pause(&self) -> Option<&dyn Pause> {
        Some(self)
    }
    fn fencing(&self) -> Option<&dyn Fencing> {
        Some(self)
    }
    fn console(&self) -> Option<&dyn Console> {
        Some(self)
    }
    fn exec(&self) -> Option<&dyn Exec> {
        Some(self)
    }
    fn resize(&self) -> Option<&dyn Resize> {
        Some(self)
    }
}

#[async_trait]
impl Pause for OciDriver {
    async fn pause(&self, id: InstanceId) -> DriverResult<()> {
        self.live(id).await?;
        group(&self.config.instances, id)?
            .child(CONTAINER_GROUP)
            .freeze(true)
            .map_err(|e| DriverError::io(&format!("pause of container {id}"), &e))
    }
    async fn resume(&self, id: InstanceId) -> DriverResult<()> {
        // Only the shim knows whether it may go on: the lease of the node may have ended meanwhile.
        let (dir, _) = self.live(id).await?;
        client::call(&dir, "resume", &serde_json::json!({}), ANSWER).await.map(drop)
    }
}

#[async_trait]
impl Fencing for OciDriver {
    async fn fence(&self, id: InstanceId, fence: Option<Fence>) -> DriverResult<()> {
        let (dir, _) = self.live(id).await?;
        oblak_compute::shim::fence::ask(&dir, fence).await
    }
}

#[async_trait]
impl Console for OciDriver {
    async fn console(&self, id: InstanceId) -> DriverResult<BoxDuplex> {
        let (dir, _) = self.live(id).await?;
        client::open_stream(&dir, "console", &serde_json::json!({}), ANSWER).await
    }
}

#[async_trait]
impl Exec for OciDriver {
    async fn exec(&self, id: InstanceId, request: &ExecRequest) -> DriverResult<BoxDuplex> {
        let (dir, _) = self.live(id).await?;
        client::open_stream(&dir, "exec", &serde_json::json!({"request": request}), Duration::from_secs(40)).await
    }
}

#[async_trait]
impl Resize for OciDriver {
    async fn resize(&self, id: InstanceId, vcpus_milli: u32, memory: Size) -> DriverResult<()> {
        let (dir, _) = self.live(id).await?;
        let task: Option<Task> = fsx::read_json(&dir.join(task::TASK)).map_err(|e| at(&dir, &e))?;
        let mut task = task.ok_or_else(|| DriverError::gone(format!("container {id} is not here")))?;
        let pids = crate::bundle::pids(&task.spec);
        let limits = Limits { cpu_milli: vcpus_milli, memory_bytes: memory.as_u64(), pids };
        group(&self.config.instances, id)?.child(CONTAINER_GROUP).limit(&limits).map_err(|e| {
            DriverError::permanent(
                "resize_refused",
                format!("container {id} cannot have {memory}: it may use more already ({e})"),
            )
        })?;
        task.spec.vcpus_milli = vcpus_milli;
        task.spec.memory = memory;
        fsx::write_json(&dir.join(task::TASK), &task).map_err(|e| at(&dir, &e))
    }
}
