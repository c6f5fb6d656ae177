//! The life of one run: taken on, started, watched, ended.
//!
//! ```text
//! take on (shim.json, durable) -> runtime run -> guest known (shim.json) -> ready
//!    -> main process ends -> everything in the cgroup is killed -> exit.json (durable) -> cgroup removed -> shim ends
//! ```
//! Killed before "take on", nothing has happened. Killed after it, the driver finds a run without an end, kills what is in
//! the cgroup, and writes the end itself.

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use oblak_compute::shim::cgroup::Group;
use oblak_compute::shim::{
    ExitRecord, Fanout, Fencer, Freezer, Input, LogWriter, Ready, ShimListener, ShimRecord, file,
};
use oblak_platform::clock::{Clock, SystemClock};
use oblak_platform::driver::{DriverError, DriverResult};
use oblak_platform::frame::{Channel, Frame};
use oblak_platform::process::{Identity, boot_id};
use tokio::sync::{mpsc, watch};

use super::Prepared;
use super::reaper::Reaper;
use super::runtime::{Action, Runtime};
use super::service::{ContainerService, Shared};
use super::stdio::{Output, Sink};
use crate::task::{CONTAINER_GROUP, RUNTIME_GROUP, Task};

/// Bytes of output read at once.
const CHUNK: usize = 8192;
/// How long the last output is waited for after everything was killed.
const DRAIN: Duration = Duration::from_secs(2);
/// How long processes of the container may take to die of SIGKILL.
const DEATH: Duration = Duration::from_secs(30);

/// Lives the run of `task` to its end. Errors are reported before the run is taken on; afterwards they are its end.
pub async fn live(task: &Task, prepared: Prepared, dir: &Path, ready: &mut Ready) -> DriverResult<()> {
    let group = &prepared.group.clone();
    let io = |e: std::io::Error| DriverError::io(&format!("{}", dir.display()), &e);
    let spec = &task.spec;
    let tracking = group.child(RUNTIME_GROUP).tracking_file().map_err(io)?;
    let reaper = Reaper::start(std::fs::OpenOptions::new().write(true).open(tracking).map_err(io)?).map_err(io)?;
    let log = LogWriter::open(&dir.join(file::LOG), task.log_part_bytes, task.log_parts).map_err(io)?;
    let listener = ShimListener::bind(&dir.join(file::SOCKET)).map_err(io)?;
    let fencer = Arc::new(Fencer::new(spec.fence.clone(), boot_id(), dir));
    fencer.check_start(&SystemClock)?;
    let mut record = ShimRecord {
        kind: "container".into(),
        run: spec.run,
        epoch: spec.epoch,
        shim: Identity::current(),
        guest: None,
        started_at: SystemClock.now(),
        runtime: task.runtime_name.clone(),
        stopping: false,
    };
    record.write(dir).map_err(io)?;

    let runtime = Runtime { program: task.runtime.clone(), stage: prepared.stage.dir.clone(), id: spec.id.to_string() };
    let started = match runtime.start(&reaper, Action::Run, "run", spec.container.tty).await {
        Ok(started) => started,
        Err(error) => {
            let end = End { code: None, reason: "StartFailed", message: error.detail, asked: false };
            finish(dir, group, &record, end).await?;
            ready.ok(&serde_json::json!({"started": false}));
            return Ok(());
        }
    };
    record.guest.clone_from(&started.identity);
    // Not needed to find the guest again (the cgroup does that), so a failure here does not end it.
    let _ = record.write(dir);
    ready.ok(&serde_json::json!({"started": true}));

    let fanout = Fanout::new();
    let (input, typed) = mpsc::channel(16);
    tokio::spawn(type_in(typed, started.streams.input));
    let log = Arc::new(Mutex::new(log));
    let pumps = [(Channel::Stdout, started.streams.stdout), (Channel::Stderr, started.streams.stderr)]
        .map(|(channel, output)| tokio::spawn(pump(output, channel, log.clone(), fanout.clone())));
    let (ended, ended_seen) = watch::channel(false);
    let shared = Arc::new(Shared {
        dir: dir.to_path_buf(),
        spec: spec.clone(),
        record: Mutex::new(record),
        main: started.identity,
        group: group.clone(),
        fanout: fanout.clone(),
        input,
        ended: ended_seen,
        runtime,
        reaper: reaper.clone(),
        rootfs: prepared.rootfs,
        capabilities: prepared.capabilities,
        fencer: fencer.clone(),
    });
    let guard = tokio::spawn({
        let group = group.child(CONTAINER_GROUP);
        async move { fencer.guard(&SystemClock, &CgroupFreezer(group)).await }
    });
    let server = tokio::spawn(listener.serve(Arc::new(ContainerService::new(shared.clone()))));

    let code = reaper.wait(started.pid).await;
    guard.abort();
    let record = shared.record();
    let end = how(code, &record, &group.child(CONTAINER_GROUP));
    // With the first process its pid namespace is gone too; this is for what the runtime may have left outside of it.
    group.kill(DEATH).await;
    for pump in pumps {
        let _ = tokio::time::timeout(DRAIN, pump).await;
    }
    fanout.close();
    finish(dir, group, &record, end).await?;
    let _ = ended.send(true);
    // Answers and last frames of open connections; all that is left to do for them needs no waiting.
    for _ in 0..32 {
        tokio::task::yield_now().await;
    }
    server.abort();
    let _ = oblak_platform::fsx::remove_file_if_exists(&dir.join(file::SOCKET));
    Ok(())
}

/// Freezes the processes of the container.
/// Freezes the processes of a container.
pub struct CgroupFreezer(pub Group);

/// How often it is looked whether the kernel has stopped every process.
const FREEZE_LOOKS: u32 = 20;

#[async_trait]
impl Freezer for CgroupFreezer {
    async fn freeze(&self) -> bool {
        if self.0.freeze(true).is_err() {
            return false;
        }
        // One that sleeps in the kernel cannot be stopped there, and cannot do anything either.
        for _ in 0..FREEZE_LOOKS {
            if self.0.is_still() {
                break;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        true
    }
    async fn thaw(&self) -> bool {
        self.0.freeze(false).is_ok()
    }
    async fn is_paused(&self) -> bool {
        self.0.is_frozen()
    }
}

struct End {
    code: Option<i32>,
    reason: &'static str,
    message: String,
    asked: bool,
}

fn how(code: i32, record: &ShimRecord, group: &Group) -> End {
    let killed = code == 128 + libc::SIGKILL;
    let out_of_memory = killed && group.oom_kills() > 0;
    let (reason, message) = match code {
        _ if out_of_memory => {
            ("OutOfMemory", "the container used more memory than it was given and was killed".to_string())
        }
        _ if record.stopping && killed => ("Killed", String::new()),
        _ if record.stopping => ("Stopped", String::new()),
        0 => ("Completed", String::new()),
        129.. => ("Signaled", format!("the main process died of signal {}", code - 128)),
        _ => ("Error", format!("the main process ended with code {code}")),
    };
    End { code: Some(code), reason, message, asked: record.stopping }
}

/// Writes down how the run ended, then removes what is not needed any more.
async fn finish(dir: &Path, group: &Group, record: &ShimRecord, end: End) -> DriverResult<()> {
    group.kill(DEATH).await;
    let exit = ExitRecord {
        run: record.run,
        code: end.code,
        reason: end.reason.into(),
        message: end.message,
        asked: end.asked,
        started_at: Some(record.started_at),
        at: SystemClock.now(),
        runtime: record.runtime.clone(),
    };
    // A full disk must not lose the end of a run: until it is written the guest counts as alive, so trying again is right.
    for attempt in 0..60u32 {
        match exit.write(dir) {
            Ok(()) => break,
            Err(_) if dir.exists() && attempt < 59 => tokio::time::sleep(Duration::from_secs(1)).await,
            Err(e) => return Err(DriverError::io(&format!("{}", dir.display()), &e)),
        }
    }
    let _ = group.remove();
    Ok(())
}

async fn pump(mut output: Output, channel: Channel, log: Arc<Mutex<LogWriter>>, fanout: Fanout) {
    if matches!(output, Output::Ended) {
        return;
    }
    let mut buffer = vec![0u8; CHUNK];
    while let Ok(n) = output.read(&mut buffer).await {
        if n == 0 {
            return;
        }
        // A full disk costs log lines, never the container.
        let _ = log.lock().unwrap_or_else(PoisonError::into_inner).write(&buffer[..n]);
        fanout.publish(&Frame::new(channel, buffer[..n].to_vec()));
    }
}

async fn type_in(mut typed: mpsc::Receiver<Input>, mut sink: Sink) {
    while let Some(message) = typed.recv().await {
        match message {
            Input::Bytes(bytes) => drop(sink.write_all(&bytes).await),
            Input::Resize(cols, rows) => sink.resize(cols, rows),
            // Others are attached too: one person who leaves does not end the input of the container.
            Input::Eof | Input::Signal(_) => {}
        }
    }
}
