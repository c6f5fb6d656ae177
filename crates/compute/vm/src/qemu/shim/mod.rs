//! The shim of one machine: starts the emulator, watches it, keeps its console, writes down how it ended.
//!
//! One thread. It answers `state`, `console` and `stop` on `shim.sock` (see [`oblak_compute::shim::server`]); pausing,
//! plugging and snapshots go from the driver to the emulator directly, over a monitor of their own, and show up here as
//! events. When the shim dies the kernel kills the emulator with it (parent death signal), so a machine is never unwatched.

mod console;
mod end;
pub(crate) mod open;
mod service;
mod watch;

use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use oblak_compute::shim::{
    ExitRecord, Fanout, Fencer, LogWriter, Ready, ShimListener, ShimLock, ShimRecord, Standing, cgroup, detach, file,
    runtime,
};
use oblak_platform::clock::{Clock, SystemClock};
use oblak_platform::driver::{DriverError, DriverResult};
use oblak_platform::process::{Identity, boot_id};
use serde_json::{Value, json};
use tokio::sync::mpsc;

use super::cmdline;
use super::jobs;
use super::qmp::Qmp;
use super::record::{Accel, GuestDir, Record};
use super::sandbox::{self, Job, Waiting};

pub use service::{Usage, View};
use watch::Watch;

/// Kind in the shim's record.
pub const KIND: &str = "qemu";
/// How long the emulator may take to open its monitor. Reading disk headers over a slow pool is the longest part.
const GREETING_DEADLINE: Duration = Duration::from_secs(60);
/// How long loading the memory of a snapshot may take.
const LOAD_DEADLINE: Duration = Duration::from_secs(600);
/// Lines typed ahead that are kept for a guest that does not read.
const TYPED_AHEAD: usize = 16;
/// Size of one part of the emulator's own log, and how many are kept.
const QEMU_LOG: (u64, usize) = (32 * 1024, 2);

/// The entry of `oblak shim vm --dir <instance dir>`. Must be called before any thread exists.
#[must_use]
pub fn shim_main(dir: &Path) -> ExitCode {
    let mut ready = match detach() {
        Ok(ready) => ready,
        Err(e) => {
            eprintln!("cannot detach: {e}");
            return ExitCode::FAILURE;
        }
    };
    // Only its start is ahead: what a machine is depends on its network.
    ready.draft();
    if !ready.granted() {
        return ExitCode::SUCCESS;
    }
    let result = runtime()
        .map_err(|e| DriverError::io("runtime", &e))
        .and_then(|runtime| runtime.block_on(run(&GuestDir(dir.to_path_buf()), &mut ready)));
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ready.fail(&error);
            ExitCode::FAILURE
        }
    }
}

/// A running emulator and what belongs to it.
struct Guest {
    dir: GuestDir,
    record: Record,
    shim: ShimRecord,
    group: Option<cgroup::Group>,
    /// Kills for lack of memory that the group counted before this run: it may be left from an earlier one.
    oom_before: u64,
    weaker: Vec<(String, String, String)>,
    fencer: Arc<Fencer>,
}

async fn run(dir: &GuestDir, ready: &mut Ready) -> DriverResult<()> {
    let busy = || DriverError::retry("shim_busy", format!("another shim works in {}", dir.path().display()));
    let _lock = ShimLock::try_acquire(dir.path()).map_err(|e| DriverError::io("lock", &e))?.ok_or_else(busy)?;
    let Some(record) = dir.read()? else {
        // Removed while this shim was on its way.
        let _ = oblak_platform::fsx::remove_file_if_exists(&dir.path().join(file::LOCK));
        return Err(DriverError::gone(format!("no machine is recorded in {}", dir.path().display())));
    };
    refuse_second_start(dir, &record).await?;
    let fencer = Arc::new(Fencer::new(record.spec.fence.clone(), boot_id(), dir.path()));
    fencer.check_start(&SystemClock)?;
    let mut weaker = Vec::new();
    let group = make_group(&record, &mut weaker);
    let oom_before = group.as_ref().map_or(0, cgroup::Group::oom_kills);
    let (shim, opened, output) = match start(dir, &record, group.as_ref(), &mut weaker) {
        Ok(started) => started,
        Err(error) => {
            clean(dir, group.as_ref());
            return Err(error);
        }
    };
    let guest = Guest { dir: dir.clone(), record, shim, group, oom_before, weaker, fencer };
    supervise(guest, opened.monitor, opened.serial, output, ready).await
}

/// A run starts once: what is written down of it decides, not what the caller believes.
async fn refuse_second_start(dir: &GuestDir, record: &Record) -> DriverResult<()> {
    let old = match dir.standing()? {
        Standing::Never => return Ok(()),
        Standing::Ended(exit) if exit.run < record.spec.run => return Ok(()),
        Standing::Lost(old) | Standing::Rebooted(old) if old.run < record.spec.run => old,
        _ => return Err(DriverError::permanent("already_ran", format!("run {} was started already", record.spec.run))),
    };
    // Its shim was killed a moment ago; the kernel has sent the death signal, which takes effect when it likes.
    if let Some(emulator) = old.guest {
        emulator.kill();
        if !emulator.wait_gone(Duration::from_secs(10)).await {
            return Err(DriverError::retry("emulator_stuck", format!("the emulator of run {} does not die", old.run)));
        }
    }
    Ok(())
}

fn make_group(record: &Record, weaker: &mut Vec<(String, String, String)>) -> Option<cgroup::Group> {
    let made = cgroup::Cgroups::detect().and_then(|cgroups| {
        let group = cgroups.group(&record.cgroup);
        group.create()?;
        group.limit(&limits(record))?;
        Ok(group)
    });
    made.map_err(|e| unlimited(weaker, &e)).ok()
}

fn unlimited(weaker: &mut Vec<(String, String, String)>, error: &std::io::Error) {
    weaker.push(("Limits".into(), "CgroupUnavailable".into(), format!("CPU and memory are not limited: {error}")));
}

/// Limits of the machine's cgroup: its vCPUs, plus a tenth for the emulator's own work; its memory, plus what the emulator
/// needs; its threads: vCPUs, up to 64 for I/O, some for screens and jobs.
#[must_use]
pub fn limits(record: &Record) -> cgroup::Limits {
    let milli = record.spec.vcpus_milli.max(100);
    cgroup::Limits {
        cpu_milli: milli + milli / 10,
        memory_bytes: record.spec.memory.as_u64() + cmdline::overhead_bytes(record),
        pids: record.max_vcpus + 128,
    }
}

fn clean(dir: &GuestDir, group: Option<&cgroup::Group>) {
    for path in [dir.qmp_socket(), dir.agent_socket(), dir.nbd_socket(), dir.path().join(file::SOCKET)] {
        let _ = oblak_platform::fsx::remove_file_if_exists(&path);
    }
    if let Some(group) = group {
        let _ = group.remove();
    }
}

fn mount_point(dir: &GuestDir) -> DriverResult<std::path::PathBuf> {
    let path = dir.path().join("sandbox");
    oblak_platform::fsx::create_dir_private(&path, 0o700)
        .map_err(|e| DriverError::io(&path.display().to_string(), &e))?;
    Ok(path)
}

/// Opens, spawns, writes down, executes. When it fails nothing runs and nothing claims that the run was started.
fn start(
    dir: &GuestDir,
    record: &Record,
    group: Option<&cgroup::Group>,
    weaker: &mut Vec<(String, String, String)>,
) -> DriverResult<(ShimRecord, open::Opened, std::os::fd::OwnedFd)> {
    let (waiting, opened) = prepare(dir, record, weaker)?;
    let pid = waiting.identity.pid;
    if let Some(Err(e)) = group.map(|g| g.add(pid)) {
        unlimited(weaker, &e);
    }
    let shim = ShimRecord {
        kind: KIND.into(),
        run: record.spec.run,
        epoch: record.spec.epoch,
        shim: Identity::current(),
        guest: Some(waiting.identity.clone()),
        started_at: SystemClock.now(),
        runtime: record.accel.name().into(),
        stopping: false,
    };
    // If the write fails, `waiting` is dropped: the child reads the end of its pipe and goes.
    shim.write(dir.path()).map_err(|e| DriverError::io("cannot write shim.json", &e))?;
    match waiting.execute() {
        Ok(output) => Ok((shim, opened, output)),
        Err(problem) => {
            let _ = oblak_platform::fsx::remove_file_if_exists(&dir.path().join(file::RECORD));
            let _ = oblak_platform::fsx::sync_dir(dir.path());
            reap_soon(pid);
            Err(DriverError::permanent("emulator_not_started", format!("the emulator cannot be started: {problem}")))
        }
    }
}

fn reap_soon(pid: i32) {
    for _ in 0..100 {
        if sandbox::reap(pid).is_some() {
            return;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn prepare(
    dir: &GuestDir,
    record: &Record,
    weaker: &mut Vec<(String, String, String)>,
) -> DriverResult<(Waiting, open::Opened)> {
    let spawn = |namespaces: bool| -> DriverResult<(std::io::Result<Waiting>, open::Opened)> {
        let mut opened = open::open(dir, record, namespaces)?;
        let job = Job {
            program: record.qemu.clone(),
            arguments: cmdline::arguments(record, &opened.inputs),
            uid: record.uid,
            groups: device_groups(record.accel),
            fds: opened.held.numbers(),
            files: std::mem::take(&mut opened.files),
            devices: if record.accel == Accel::Kvm { vec!["kvm"] } else { Vec::new() },
            mount_point: mount_point(dir)?,
            namespaces,
        };
        let waiting = sandbox::prepare(&job);
        // The child has its own copies; ours would keep locks and sockets alive after the emulator is gone.
        opened.held = sandbox::Held::default();
        Ok((waiting, opened))
    };
    let (waiting, opened) = spawn(true)?;
    match waiting {
        Ok(waiting) => Ok((waiting, opened)),
        Err(e) if matches!(e.raw_os_error(), Some(libc::EPERM | libc::EINVAL | libc::ENOSPC)) => {
            drop(opened);
            weaker.push((
                "Confinement".into(),
                "NoNamespaces".into(),
                format!("the emulator has no namespaces of its own: {e}"),
            ));
            let (waiting, opened) = spawn(false)?;
            Ok((waiting.map_err(|e| DriverError::io("cannot start the emulator", &e))?, opened))
        }
        Err(e) => Err(DriverError::io("cannot start the emulator", &e)),
    }
}

/// The group that may use the host's /dev/kvm, for an emulator that has no /dev of its own.
fn device_groups(accel: Accel) -> Vec<u32> {
    use std::os::unix::fs::MetadataExt;
    match accel {
        Accel::Kvm => std::fs::metadata("/dev/kvm").map(|m| vec![m.gid()]).unwrap_or_default(),
        Accel::Tcg => Vec::new(),
    }
}

async fn supervise(
    guest: Guest,
    monitor: std::os::unix::net::UnixStream,
    serial: std::os::unix::net::UnixStream,
    output: std::os::fd::OwnedFd,
    ready: &mut Ready,
) -> DriverResult<()> {
    let io = |e: std::io::Error| DriverError::io("shim", &e);
    let pid = guest.shim.guest.as_ref().map_or(0, |g| g.pid);
    let exited = end::Exit::of(pid).map_err(io)?;
    let fanout = Fanout::new();
    let (typed, input) = mpsc::channel(TYPED_AHEAD);
    let log = LogWriter::open(
        &guest.dir.console_log(),
        oblak_compute::shim::log::PART_BYTES,
        oblak_compute::shim::log::PARTS,
    )
    .map_err(io)?;
    serial.set_nonblocking(true).map_err(io)?;
    let serial = tokio::net::UnixStream::from_std(serial).map_err(io)?;
    let console = tokio::spawn(console::pump(serial, log, fanout.clone(), input));
    let words = console::Words::default();
    let own_log = LogWriter::open(&guest.dir.qemu_log(), QEMU_LOG.0, QEMU_LOG.1).map_err(io)?;
    let output = tokio::net::unix::pipe::Receiver::from_owned_fd(output).map_err(io)?;
    let chatter = tokio::spawn(console::listen(output, own_log, words.clone()));
    let watch = Arc::new(Watch::new(&guest));
    let service = Arc::new(service::VmService { watch: Arc::clone(&watch), fanout: fanout.clone(), input: typed });
    let listener = ShimListener::bind(&guest.dir.path().join(file::SOCKET)).map_err(io)?;
    let server = tokio::spawn(listener.serve(service));

    let code = tokio::select! {
        code = exited.wait() => code,
        code = tend(&watch, monitor, &guest, ready, &exited) => code,
    };
    // What the guest and the emulator said last is in the pipes still; both end with the process.
    let _ = tokio::time::timeout(Duration::from_secs(2), async { tokio::join!(console, chatter) }).await;
    let exit = end::judge(&watch, &guest, code, &words.tail());
    finish(&guest, &exit);
    ready.ok(&Value::Null);
    fanout.close();
    server.abort();
    // Attached people read what is queued for them; nobody can hold the shim longer than this.
    tokio::time::sleep(Duration::from_millis(50)).await;
    Ok(())
}

fn finish(guest: &Guest, exit: &ExitRecord) {
    // Without the record the run counts as lost, which is still the truth for a reader; there is nobody to tell otherwise.
    if let Err(e) = exit.write(guest.dir.path()) {
        eprintln!("cannot write exit.json: {e}");
    }
    clean(&guest.dir, guest.group.as_ref());
}

/// Brings the machine to life and follows its events until the emulator ends. Returns its exit code.
async fn tend(
    watch: &Arc<Watch>,
    monitor: std::os::unix::net::UnixStream,
    guest: &Guest,
    ready: &mut Ready,
    exited: &end::Exit,
) -> i32 {
    match come_alive(watch, monitor, guest).await {
        Ok(()) => ready.ok(&json!({"pid": exited.pid()})),
        Err(error) => {
            watch.set_problem(&error);
            exited.kill();
            return exited.wait().await;
        }
    }
    watch.follow().await;
    // The monitor closed: the emulator is on its way out. One that hangs there is of no use to anybody.
    match tokio::time::timeout(Duration::from_secs(10), exited.wait()).await {
        Ok(code) => code,
        Err(_) => {
            exited.kill();
            exited.wait().await
        }
    }
}

async fn come_alive(watch: &Arc<Watch>, monitor: std::os::unix::net::UnixStream, guest: &Guest) -> Result<(), String> {
    monitor.set_nonblocking(true).map_err(|e| e.to_string())?;
    let stream = tokio::net::UnixStream::from_std(monitor).map_err(|e| e.to_string())?;
    let qmp = Arc::new(Qmp::from_stream(stream, GREETING_DEADLINE).await.map_err(|e| e.to_string())?);
    watch.connect(&qmp);
    if let Some(snapshot) = guest.record.load {
        let arguments = json!({"tag": snapshot.to_string(), "vmstate": "root", "devices": ["root"]});
        jobs::run(&qmp, "snapshot-load", arguments, LOAD_DEADLINE)
            .await
            .map_err(|e| format!("the snapshot cannot be loaded: {e}"))?;
    }
    if guest.record.incoming {
        // Its memory is on another node still; whoever decides that it is ours lets it run, and the event says so.
        return Ok(());
    }
    qmp.execute("cont", Value::Null).await.map_err(|e| e.to_string())?;
    watch.started();
    Ok(())
}
