//! The driver's calls. Everything that lasts is on disk or in the processes themselves; this object only holds locks and
//! what was found out about the node.

use std::time::Duration;

use async_trait::async_trait;
use oblak_compute::shim::{
    Ahead, ExitRecord, Fence, FenceState, LogReader, ShimLock, ShimRecord, call, call_as, cgroup, end_shim, file,
    open_stream,
};
use oblak_compute::{
    Capabilities, ComputeDriver, Console, Exec, Fencing, GuestSpec, GuestState, Hotplug, Migrate, Observation, Pause,
    Resize, SnapshotGuest, UsageSample, Vnc,
};
use oblak_model::{InstanceId, Isolation};
use oblak_platform::clock::{Clock, SystemClock};
use oblak_platform::driver::{Availability, BoxDuplex, BoxRead, DriverError, DriverResult};
use oblak_platform::fsx;
use serde_json::json;
use tokio::sync::OnceCell;

use super::config::QemuConfig;
use super::probe::{self, AccelChoice, Emulator};
use super::record::{self, GuestDir, OnDisk, Record};
use super::session::{LockBook, Session, refused, unknown};
use super::shim::{Usage, View};
use super::start;

/// How long a shim may take to answer a question.
const SHIM_DEADLINE: Duration = Duration::from_secs(5);
/// How long a start may take until the emulator runs.
pub(super) const START_DEADLINE: Duration = Duration::from_secs(90);
/// How long a start from a snapshot may take: its memory is read from disk.
const LOAD_DEADLINE: Duration = Duration::from_secs(660);
/// How long killed processes may take to disappear.
const KILL_DEADLINE: Duration = Duration::from_secs(20);
/// What a stop may take beyond its grace before the shim itself is ended.
const STOP_MARGIN: Duration = Duration::from_secs(8);

/// Virtual machines by qemu.
pub struct QemuDriver {
    pub(super) config: QemuConfig,
    pub(super) locks: LockBook,
    /// Held while a uid is picked and recorded, so that no two machines get the same.
    pub(super) uids: tokio::sync::Mutex<()>,
    ahead: Ahead,
    emulator: OnceCell<Emulator>,
    accel: OnceCell<AccelChoice>,
}

impl QemuDriver {
    /// A driver for this node. Touches nothing.
    #[must_use]
    pub fn new(config: QemuConfig) -> Self {
        Self {
            config,
            locks: LockBook::default(),
            uids: tokio::sync::Mutex::new(()),
            ahead: Ahead::default(),
            emulator: OnceCell::new(),
            accel: OnceCell::new(),
        }
    }

    /// The directory of a machine.
    pub(super) fn dir(&self, id: InstanceId) -> GuestDir {
        GuestDir(self.config.instances.join(id.to_string()))
    }

    pub(super) async fn session(&self, id: InstanceId) -> DriverResult<Session> {
        let locks = self.locks.of(id);
        Session::open(&self.dir(id), id, &locks).await
    }

    pub(super) async fn emulator(&self) -> DriverResult<&Emulator> {
        self.emulator.get_or_try_init(|| probe::emulator(&self.config)).await
    }

    pub(super) async fn accel(&self) -> DriverResult<&AccelChoice> {
        let config = self.config.clone();
        self.accel
            .get_or_try_init(|| async {
                tokio::task::spawn_blocking(move || probe::choose_accel(&config))
                    .await
                    .map_err(|e| DriverError::retry("probe", format!("the KVM probe failed: {e}")))?
            })
            .await
    }

    async fn observe_alive(&self, dir: &GuestDir, record: &Record, shim: &ShimRecord) -> DriverResult<Observation> {
        let view = match call_as::<View>(dir.path(), "state", &json!({}), SHIM_DEADLINE).await {
            Ok(view) => Some(view),
            Err(_) => match OnDisk::read(dir)? {
                // It ended while we asked.
                OnDisk::Ended(_, exit) => return Ok(record::ended(&exit)),
                OnDisk::Lost(_, shim) => return Ok(record::ended(&record::lost_exit(&shim, SystemClock.now()))),
                _ => None,
            },
        };
        let mut seen = observation(record, shim, view);
        FenceState::read(dir.path()).show(&mut seen);
        Ok(seen)
    }

    /// Writes down the end of a run whose shim could not, after making sure that nothing of it runs any more. The caller
    /// holds the lock of the machine's life.
    pub(super) async fn settle(&self, dir: &GuestDir, shim: &ShimRecord) -> DriverResult<ExitRecord> {
        let lock = end_shim(dir.path(), KILL_DEADLINE).await?;
        self.settle_locked(dir, shim, lock.as_ref()).await
    }

    async fn settle_locked(
        &self,
        dir: &GuestDir,
        shim: &ShimRecord,
        _lock: Option<&ShimLock>,
    ) -> DriverResult<ExitRecord> {
        if let Some(emulator) = &shim.guest {
            emulator.kill();
            if !emulator.wait_gone(KILL_DEADLINE).await {
                return Err(DriverError::retry(
                    "emulator_stuck",
                    format!("the emulator (pid {}) does not die", emulator.pid),
                ));
            }
        }
        if let Ok(Some(exit)) = ExitRecord::read(dir.path())
            && exit.run >= shim.run
        {
            return Ok(exit);
        }
        let exit = record::lost_exit(shim, SystemClock.now());
        exit.write(dir.path()).map_err(|e| DriverError::io("cannot write exit.json", &e))?;
        Ok(exit)
    }

    /// Ends a machine by force, whatever its shim does.
    pub(super) async fn end_by_force(&self, dir: &GuestDir, shim: &ShimRecord) -> DriverResult<()> {
        // Asked politely first: the emulator then writes its caches back.
        let _ = call(dir.path(), "shutdown", &json!({}), Duration::from_secs(1)).await;
        if !shim.shim.wait_gone(Duration::from_secs(3)).await {
            let lock = end_shim(dir.path(), KILL_DEADLINE).await?;
            let asked = ShimRecord { stopping: true, ..shim.clone() };
            self.settle_locked(dir, &asked, lock.as_ref()).await?;
        }
        Ok(())
    }

    async fn clear_group(&self, id: InstanceId) -> DriverResult<()> {
        let Ok(cgroups) = cgroup::Cgroups::detect() else { return Ok(()) };
        // A machine that an earlier version started has another name in its record.
        let recorded = self.dir(id).read().ok().flatten().map(|record| record.cgroup);
        let mut names = vec![start::cgroup_of(&self.config, id)];
        names.extend(recorded.filter(|name| *name != names[0]));
        for name in names {
            clear(&cgroups.group(&name)).await?;
        }
        Ok(())
    }

    /// Writes the record and starts its shim. The caller holds the lock of the machine's life.
    async fn launch(&self, dir: &GuestDir, spec: &GuestSpec) -> DriverResult<()> {
        let (emulator, accel) = (self.emulator().await?, self.accel().await?.accel);
        let uids = self.uids.lock().await;
        let uid = record::pick_uid(&self.config.instances, spec.id, self.config.uids)?;
        let record = start::plan(&self.config, spec, emulator, accel, uid);
        if record.firmware.is_some() {
            start::prepare_vars(&self.config, dir)?;
        }
        dir.write(&record)?;
        drop(uids);
        self.run_shim(dir, START_DEADLINE).await
    }

    pub(super) async fn run_shim(&self, dir: &GuestDir, deadline: Duration) -> DriverResult<()> {
        self.ahead.start(&self.config.shim_command, dir.path(), deadline).await.map(drop)
    }

    /// Starts from a record that is complete already; see [`super::snapshot`].
    pub(super) async fn launch_record(&self, dir: &GuestDir, record: &Record) -> DriverResult<()> {
        dir.write(record)?;
        self.run_shim(dir, LOAD_DEADLINE).await
    }

    pub(super) async fn observe_dir(&self, dir: &GuestDir) -> DriverResult<Observation> {
        match OnDisk::read(dir)? {
            OnDisk::Nothing | OnDisk::NotStarted(_, None) => Ok(Observation::absent()),
            OnDisk::NotStarted(_, Some(exit)) | OnDisk::Ended(_, exit) => Ok(record::ended(&exit)),
            OnDisk::Alive(record, shim) => self.observe_alive(dir, &record, &shim).await,
            OnDisk::Lost(record, shim) => {
                let locks = self.locks.of(record.spec.id);
                // Somebody who works on it will settle it; the answer is the same.
                match locks.life.try_lock() {
                    Ok(_life) => Ok(record::ended(&self.settle(dir, &shim).await?)),
                    Err(_) => Ok(record::ended(&record::lost_exit(&shim, SystemClock.now()))),
                }
            }
        }
    }
}

fn observation(record: &Record, shim: &ShimRecord, view: Option<View>) -> Observation {
    let mut seen = Observation {
        state: GuestState::Starting,
        run: shim.run,
        pid: shim.guest.as_ref().map(|g| g.pid),
        started_at: Some(shim.started_at),
        runtime: record.accel.name().into(),
        ..Observation::absent()
    };
    let Some(view) = view else {
        seen.state = if shim.stopping { GuestState::Stopping } else { GuestState::Running };
        seen.volumes = record.spec.disks.iter().map(|d| d.volume).collect();
        let text = "the process that watches over the machine does not answer";
        seen.warnings.push(("Responsive".into(), "ShimUnresponsive".into(), text.into()));
        return seen;
    };
    seen.state = if view.stopping {
        GuestState::Stopping
    } else if !view.started {
        if record.incoming {
            seen.reason = "Arriving".into();
            seen.message = "its memory is on its way from another node".into();
        }
        GuestState::Starting
    } else if view.disk_full || view.status == "io-error" {
        seen.reason = "DiskFull".into();
        seen.message = "frozen because a disk is full; free space on the node's disk and it goes on".into();
        GuestState::Paused
    } else {
        match view.status.as_str() {
            "paused" => GuestState::Paused,
            // Not a pause that anybody asked for: whoever moves it decides what comes next.
            "finish-migrate" | "postmigrate" => {
                seen.reason = "Moving".into();
                seen.message = "stands still while it moves to another node".into();
                GuestState::Paused
            }
            "shutdown" => GuestState::Stopping,
            "internal-error" => {
                seen.reason = "InternalError".into();
                seen.message = "the processor could not go on executing the guest; restart the machine".into();
                GuestState::Paused
            }
            _ => GuestState::Running,
        }
    };
    seen.volumes = view.volumes;
    seen.warnings = view.warnings;
    seen
}

#[async_trait]
impl ComputeDriver for QemuDriver {
    fn name(&self) -> &'static str {
        "qemu"
    }

    async fn probe(&self) -> Capabilities {
        let mut found = Capabilities::default();
        match self.emulator().await {
            Ok(emulator) => {
                found.probed.push(Availability::yes("qemu", format!("{} ({})", emulator.version, emulator.machine)));
                found.isolations.push(Isolation::Vm);
            }
            Err(e) => {
                found.probed.push(Availability::no("qemu", &e.detail));
                found.unavailable.push((Isolation::Vm, e.detail));
                return found;
            }
        }
        match probe::image_tool(&self.config) {
            Ok(path) => found.probed.push(Availability::yes("qemu-img", path.display().to_string())),
            Err(e) => found.probed.push(Availability::no("qemu-img", e.detail)),
        }
        let uefi = self.config.ovmf.0.is_file() && self.config.ovmf.1.is_file();
        found.probed.push(if uefi {
            Availability::yes("ovmf", self.config.ovmf.0.display().to_string())
        } else {
            Availability::no("ovmf", "not installed; run `apt install ovmf` for machines that boot through UEFI")
        });
        found.probed.push(match cgroup::Cgroups::detect() {
            Ok(cgroups) => Availability::yes("cgroup", format!("version {}", cgroups.version())),
            Err(e) => Availability::no("cgroup", e.to_string()),
        });
        match self.accel().await {
            Ok(choice) => {
                found.accelerator = choice.accel.name().into();
                found.probed.push(choice.probed.clone());
                found.notices.extend((!choice.notice.is_empty()).then(|| choice.notice.clone()));
            }
            Err(e) => {
                found.isolations.clear();
                found.unavailable.push((Isolation::Vm, e.detail));
            }
        }
        found
    }

    async fn prepare(&self, spec: &GuestSpec) -> DriverResult<()> {
        start::check(&self.config, spec)?;
        let locks = self.locks.of(spec.id);
        let Ok(_life) = locks.life.try_lock() else { return Ok(()) };
        let dir = self.dir(spec.id);
        if !matches!(OnDisk::read(&dir)?, OnDisk::Nothing) || !dir.path().exists() {
            return Ok(());
        }
        self.ahead.prepare(&self.config.shim_command, dir.path(), &serde_json::Value::Null).await
    }

    async fn ensure(&self, spec: &GuestSpec) -> DriverResult<Observation> {
        start::check(&self.config, spec)?;
        let locks = self.locks.of(spec.id);
        let _life = locks.life.lock().await;
        let dir = self.dir(spec.id);
        let end = tokio::time::Instant::now() + START_DEADLINE;
        loop {
            match OnDisk::read(&dir)? {
                OnDisk::Alive(record, shim) => return self.observe_alive(&dir, &record, &shim).await,
                OnDisk::Ended(_, exit) if exit.run >= spec.run => return Ok(record::ended(&exit)),
                OnDisk::Lost(_, shim) => {
                    self.settle(&dir, &shim).await?;
                    continue;
                }
                OnDisk::NotStarted(record, _) if record.spec.run > spec.run => {
                    let detail =
                        format!("run {} of machine {} is older than run {}", spec.run, spec.id, record.spec.run);
                    return Err(DriverError::permanent("old_run", detail));
                }
                _ => {}
            }
            match self.launch(&dir, spec).await {
                // The shim of a call that was dropped is at work; it will be done or gone in a moment.
                Err(e)
                    if matches!(e.code.as_str(), "shim_busy" | "already_ran") && tokio::time::Instant::now() < end =>
                {
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
                Err(e) => return Err(e),
                Ok(()) => return self.observe_dir(&dir).await,
            }
        }
    }

    async fn observe(&self, id: InstanceId) -> DriverResult<Observation> {
        self.observe_dir(&self.dir(id)).await
    }

    async fn list(&self) -> DriverResult<Vec<InstanceId>> {
        record::list(&self.config.instances)
    }

    async fn stop(&self, id: InstanceId, grace: Duration) -> DriverResult<()> {
        let dir = self.dir(id);
        let shim = match OnDisk::read(&dir)? {
            OnDisk::Alive(_, shim) => shim,
            OnDisk::Lost(_, shim) => {
                let locks = self.locks.of(id);
                let _life = locks.life.lock().await;
                self.settle(&dir, &shim).await?;
                return Ok(());
            }
            _ => return Ok(()),
        };
        let arguments = json!({"grace_ms": u64::try_from(grace.as_millis()).unwrap_or(u64::MAX)});
        let asked = call(dir.path(), "stop", &arguments, SHIM_DEADLINE).await;
        if asked.is_ok() && shim.shim.wait_gone(grace + STOP_MARGIN).await {
            return Ok(());
        }
        self.end_by_force(&dir, &shim).await
    }

    async fn remove(&self, id: InstanceId) -> DriverResult<()> {
        let dir = self.dir(id);
        if !dir.path().exists() {
            return self.clear_group(id).await;
        }
        let locks = self.locks.of(id);
        let life = locks.life.lock().await;
        self.ahead.forget(dir.path());
        // Nothing here trusts the record: a damaged one must not keep a machine from being removed. The directory may be
        // another driver's, whose shim has the same files.
        let shim = ShimRecord::read(dir.path()).ok().flatten();
        let ours = dir.record().exists() || shim.as_ref().is_some_and(|s| s.kind == super::shim::KIND);
        if ours {
            let lock = end_shim(dir.path(), KILL_DEADLINE).await?;
            if let Ok(Some(shim)) = ShimRecord::read(dir.path()) {
                self.settle_locked(&dir, &shim, lock.as_ref()).await?;
            }
            self.clear_group(id).await?;
            remove_files(&dir)?;
            drop(lock);
        } else if shim.is_none() {
            // Of a shim that was started ahead and got no word.
            let errors = dir.path().join(file::ERRORS);
            fsx::remove_file_if_exists(&errors)
                .map_err(|e| DriverError::io("cannot remove a file of the machine", &e))?;
        }
        drop(life);
        drop(locks);
        self.locks.prune(|other| self.dir(other).record().exists());
        Ok(())
    }

    async fn usage(&self, id: InstanceId) -> DriverResult<UsageSample> {
        let dir = self.dir(id);
        let (record, shim) = match OnDisk::read(&dir)? {
            OnDisk::Alive(record, shim) => (record, shim),
            OnDisk::Nothing => return Err(unknown(id)),
            _ => return Err(DriverError::gone(format!("the machine {id} does not run"))),
        };
        let counted = cgroup::Cgroups::detect().ok().and_then(|c| c.group(&record.cgroup).usage());
        let mut sample = match counted {
            Some(sample) => sample,
            None => super::screen::process_usage(&shim)
                .ok_or_else(|| DriverError::gone(format!("the machine {id} has just ended")))?,
        };
        // The block layer knows what the guest did; the cgroup knows only what the host wrote in its name, often later.
        if let Ok(disks) = call_as::<Usage>(dir.path(), "usage", &json!({}), SHIM_DEADLINE).await {
            sample.disk_read_bytes = disks.read_bytes;
            sample.disk_write_bytes = disks.write_bytes;
        }
        Ok(sample)
    }

    async fn logs(&self, id: InstanceId, tail: Option<u64>, follow: bool) -> DriverResult<BoxRead> {
        let dir = self.dir(id);
        if !dir.record().exists() {
            return Err(unknown(id));
        }
        let log = dir.console_log();
        // A follower ends when the log's directory is removed, so it has to be there from the beginning.
        fsx::create_dir_private(&log, 0o700).map_err(|e| DriverError::io("console log", &e))?;
        Ok(Box::new(LogReader::open(&log, tail, follow).map_err(|e| DriverError::io("console log", &e))?))
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
    fn vnc(&self) -> Option<&dyn Vnc> {
        Some(self)
    }
    fn hotplug(&self) -> Option<&dyn Hotplug> {
        Some(self)
    }
    fn snapshot(&self) -> Option<&dyn SnapshotGuest> {
        Some(self)
    }
    fn resize(&self) -> Option<&dyn Resize> {
        Some(self)
    }
    fn migrate(&self) -> Option<&dyn Migrate> {
        Some(self)
    }
}

/// Ends whatever is in a group and removes it. Fine when there is none.
async fn clear(group: &cgroup::Group) -> DriverResult<()> {
    if !group.exists() {
        return Ok(());
    }
    group.kill(KILL_DEADLINE).await;
    // A killed process leaves the list before it leaves the group; the kernel calls that busy for a moment.
    let end = tokio::time::Instant::now() + KILL_DEADLINE;
    while let Err(e) = group.remove() {
        if tokio::time::Instant::now() >= end {
            return Err(DriverError::io("cannot remove the cgroup", &e));
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    Ok(())
}

/// Takes away everything that was made in the directory, the record last: what is listed can be removed again.
fn remove_files(dir: &GuestDir) -> DriverResult<()> {
    let trees = [dir.console_log(), dir.qemu_log(), dir.snapshots(), dir.path().join("sandbox")];
    let names = [
        file::SOCKET,
        file::ERRORS,
        "boot-kernel",
        "boot-initrd",
        ".vars.fd.tmp",
        file::FENCE,
        file::RECORD,
        file::EXIT,
    ];
    let mut files: Vec<_> = names.iter().map(|name| dir.path().join(name)).collect();
    files.extend([
        dir.qmp_socket(),
        dir.agent_socket(),
        dir.nbd_socket(),
        dir.vars(),
        dir.record(),
        dir.path().join(file::LOCK),
    ]);
    let work = || -> std::io::Result<()> {
        trees.iter().try_for_each(|tree| fsx::remove_dir_if_exists(tree))?;
        files.iter().try_for_each(|file| fsx::remove_file_if_exists(file))?;
        let written: Vec<_> = files.iter().filter_map(|f| f.file_name()?.to_str()).collect();
        fsx::remove_temporaries(dir.path(), &written)?;
        fsx::sync_dir(dir.path())
    };
    work().map_err(|e| DriverError::io(&format!("cannot clean {}", dir.path().display()), &e))
}

#[async_trait]
impl Pause for QemuDriver {
    async fn pause(&self, id: InstanceId) -> DriverResult<()> {
        let session = self.session(id).await?;
        session.qmp.execute("stop", serde_json::Value::Null).await.map_err(|e| refused(id, "pause", &e)).map(drop)
    }
    async fn resume(&self, id: InstanceId) -> DriverResult<()> {
        // Only the shim knows whether it may go on: the lease of the node may have ended meanwhile.
        let dir = self.dir(id);
        super::session::running(&dir, id)?;
        call(dir.path(), "resume", &json!({}), SHIM_DEADLINE).await.map(drop)
    }
}

#[async_trait]
impl Fencing for QemuDriver {
    async fn fence(&self, id: InstanceId, fence: Option<Fence>) -> DriverResult<()> {
        let dir = self.dir(id);
        super::session::running(&dir, id)?;
        oblak_compute::shim::fence::ask(dir.path(), fence).await
    }
}

#[async_trait]
impl Console for QemuDriver {
    async fn console(&self, id: InstanceId) -> DriverResult<BoxDuplex> {
        let dir = self.dir(id);
        super::session::running(&dir, id)?;
        open_stream(dir.path(), "console", &json!({}), SHIM_DEADLINE).await
    }
}
