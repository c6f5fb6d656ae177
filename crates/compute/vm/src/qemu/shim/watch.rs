//! What the shim knows about its machine, kept up to date from the monitor's events.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use nix::sys::signal::Signal;
use oblak_compute::shim::{Fencer, Freezer, ShimRecord};
use oblak_platform::clock::SystemClock;
use oblak_platform::process::Identity;
use serde_json::{Value, json};
use tokio::sync::{Notify, broadcast::error::RecvError};
use tokio::time::Instant;

use super::Guest;
use super::service::{Usage, View};
use crate::qemu::cmdline::volume_of_device;
use crate::qemu::qmp::{CLOSED, Event, Qmp, QmpError};

/// How long a question to the emulator may take before the last known answer is given instead.
const ASK_DEADLINE: Duration = Duration::from_millis(1500);
/// How long the emulator may take to stop the processors before it is stopped itself.
const FREEZE_DEADLINE: Duration = Duration::from_millis(500);
/// A guest that was stopped by a full disk is tried again this often.
const RETRY_EVERY: Duration = Duration::from_secs(5);
/// It counts as recovered when no new error came for this long.
const QUIET: Duration = Duration::from_secs(3);
/// The power button is pressed again this often: a guest that is still booting does not see the first press.
const PRESS_EVERY: Duration = Duration::from_secs(4);
/// How long the emulator may take to end by itself before it is killed.
const QUIT_DEADLINE: Duration = Duration::from_millis(700);

/// What matters at the end.
#[derive(Clone, Debug, Default)]
pub struct Seen {
    /// The machine ran.
    pub started: bool,
    /// Why it could not be brought to life.
    pub problem: Option<String>,
    /// Reason of the SHUTDOWN event (QEMU `ShutdownCause`).
    pub shutdown: String,
    /// Somebody asked for the end.
    pub asked: bool,
}

#[derive(Default)]
struct State {
    seen: Seen,
    qmp: Option<Arc<Qmp>>,
    status: String,
    /// The emulator as a whole was stopped, because it did not answer.
    signalled: bool,
    volumes: Vec<oblak_model::VolumeId>,
    warnings: BTreeMap<String, (String, String)>,
    /// When the last write error for lack of space came.
    full_since: Option<Instant>,
    stop_at: Option<Instant>,
}

/// Shared by the supervisor and the socket.
pub struct Watch {
    state: Mutex<State>,
    stop: Notify,
    retry: Notify,
    dir: PathBuf,
    shim: Mutex<ShimRecord>,
    weaker: Vec<(String, String, String)>,
    fencer: Arc<Fencer>,
}

/// Stops the processors through the monitor, or the whole emulator when that does not answer.
#[async_trait]
impl Freezer for Watch {
    async fn freeze(&self) -> bool {
        if let Some(qmp) = self.qmp()
            && qmp.execute_with("stop", Value::Null, None, FREEZE_DEADLINE).await.is_ok()
        {
            return true;
        }
        let stopped = self.emulator().is_some_and(|emulator| emulator.signal(Signal::SIGSTOP));
        self.lock().signalled = stopped;
        stopped
    }
    async fn thaw(&self) -> bool {
        if let Some(emulator) = self.emulator() {
            emulator.signal(Signal::SIGCONT);
        }
        self.lock().signalled = false;
        let Some(qmp) = self.qmp() else { return false };
        // One that waits for its memory, or was sent to another node, stands still for another reason and may run there.
        if !self.lock().seen.started {
            return true;
        }
        match ask_status(&qmp).await.as_deref() {
            None => return false,
            Some("postmigrate" | "finish-migrate") => return true,
            Some(_) => {}
        }
        qmp.execute_with("cont", Value::Null, None, ASK_DEADLINE).await.is_ok()
    }
    async fn is_paused(&self) -> bool {
        self.lock().status == "paused"
    }
    async fn is_still(&self) -> bool {
        let state = self.lock();
        state.signalled || state.status != "running"
    }
}

impl Watch {
    /// Of a machine whose emulator was just executed.
    pub fn new(guest: &Guest) -> Self {
        let state = State {
            status: "prelaunch".into(),
            volumes: guest.record.spec.disks.iter().map(|d| d.volume).collect(),
            ..State::default()
        };
        Self {
            state: Mutex::new(state),
            stop: Notify::new(),
            retry: Notify::new(),
            dir: guest.dir.path().to_path_buf(),
            shim: Mutex::new(guest.shim.clone()),
            weaker: guest.weaker.clone(),
            fencer: guest.fencer.clone(),
        }
    }

    /// The machine's fence.
    pub fn fencer(&self) -> &Fencer {
        &self.fencer
    }

    fn emulator(&self) -> Option<Identity> {
        self.shim.lock().unwrap_or_else(PoisonError::into_inner).guest.clone()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
    /// For the judgement at the end.
    pub fn seen(&self) -> Seen {
        self.lock().seen.clone()
    }
    /// Why the machine did not come to life.
    pub fn set_problem(&self, problem: &str) {
        self.lock().seen.problem = Some(problem.into());
    }
    /// The monitor is there.
    pub fn connect(&self, qmp: &Arc<Qmp>) {
        self.lock().qmp = Some(Arc::clone(qmp));
    }
    /// The machine runs.
    pub fn started(&self) {
        let mut state = self.lock();
        state.seen.started = true;
        state.status = "running".into();
    }
    fn qmp(&self) -> Option<Arc<Qmp>> {
        self.lock().qmp.clone()
    }

    fn full_since(&self) -> Option<Instant> {
        self.lock().full_since
    }
    fn grace_left(&self) -> Option<Duration> {
        self.lock().stop_at?.checked_duration_since(Instant::now()).filter(|left| !left.is_zero())
    }

    /// Handles events, presses the power button and retries full disks until the monitor closes.
    pub async fn follow(self: &Arc<Self>) {
        let Some(qmp) = self.qmp() else { return };
        let mut events = qmp.events();
        // Closed before there was a subscriber: nobody would tell.
        if qmp.is_closed() {
            return;
        }
        let stopping = tokio::spawn(Arc::clone(self).carry_out_stop());
        let retrying = tokio::spawn(Arc::clone(self).retry_full_disks());
        let guarding = tokio::spawn({
            let watch = Arc::clone(self);
            async move { watch.fencer.guard(&SystemClock, watch.as_ref()).await }
        });
        loop {
            match events.recv().await {
                Ok(event) if event.name == CLOSED => break,
                Ok(event) => self.note(&event),
                // Only states matter, and those are asked for when somebody wants to know.
                Err(RecvError::Lagged(_)) => {}
                Err(RecvError::Closed) => break,
            }
        }
        stopping.abort();
        retrying.abort();
        guarding.abort();
    }

    fn note(&self, event: &Event) {
        let mut state = self.lock();
        match event.name.as_str() {
            "STOP" => state.status = "paused".into(),
            "RESUME" => {
                state.status = "running".into();
                state.seen.started = true;
            }
            "SHUTDOWN" => state.seen.shutdown = event.text("reason").to_string(),
            "GUEST_PANICKED" => {
                warn(&mut state, "GuestPanic", "Panicked", "the kernel of the guest panicked; see its console");
            }
            "RESET" => {
                state.warnings.remove("GuestPanic");
            }
            "BLOCK_IO_ERROR" => {
                drop(state);
                self.note_io_error(event);
            }
            _ => {}
        }
    }

    fn note_io_error(&self, event: &Event) {
        let mut state = self.lock();
        let disk = disk_of(event);
        if event.flag("nospace") && event.text("action") == "stop" {
            state.full_since = Some(Instant::now());
            let text = format!(
                "no space left for {disk}; the machine is frozen and goes on by itself when there is space again"
            );
            warn(&mut state, "IoError", "DiskFull", &text);
            self.retry.notify_one();
        } else {
            let (operation, reason) = (event.text("operation"), event.text("reason"));
            warn(&mut state, "IoError", "IoError", &format!("a {operation} on {disk} failed: {reason}"));
        }
    }

    async fn retry_full_disks(self: Arc<Self>) {
        loop {
            self.retry.notified().await;
            while let Some(since) = self.full_since() {
                tokio::time::sleep(RETRY_EVERY).await;
                let Some(qmp) = self.qmp() else { return };
                let status = ask_status(&qmp).await.unwrap_or_default();
                if !self.fencer.may_start(&SystemClock) {
                    continue;
                }
                if status == "io-error" && qmp.execute("cont", Value::Null).await.is_err() {
                    continue;
                }
                // Writes that fail again bring a new event within moments.
                tokio::time::sleep(QUIET).await;
                let mut state = self.lock();
                if state.full_since == Some(since) {
                    state.full_since = None;
                    state.warnings.remove("IoError");
                }
            }
        }
    }

    /// Asks for the end within `grace`; a shorter one given later wins.
    pub fn ask_to_stop(&self, grace: Duration) {
        let at = Instant::now() + grace;
        let mut state = self.lock();
        state.seen.asked = true;
        state.stop_at = Some(state.stop_at.map_or(at, |old| old.min(at)));
        drop(state);
        let mut shim = self.shim.lock().unwrap_or_else(PoisonError::into_inner);
        if !shim.stopping {
            shim.stopping = true;
            // Only for a reader after a crash of this shim; the stop goes on without it.
            if let Err(e) = shim.write(&self.dir) {
                eprintln!("cannot write shim.json: {e}");
            }
        }
        self.stop.notify_one();
    }

    async fn carry_out_stop(self: Arc<Self>) {
        self.stop.notified().await;
        let Some(qmp) = self.qmp() else { return };
        // One whose lease has ended must not go on, not even to end well.
        if !self.fencer.may_start(&SystemClock) {
            self.ask_to_stop(Duration::ZERO);
        }
        // A frozen guest cannot react to a button.
        if self.grace_left().is_some() && ask_status(&qmp).await.is_some_and(|s| s != "running") {
            let _ = qmp.execute("cont", Value::Null).await;
        }
        while let Some(left) = self.grace_left() {
            let _ = qmp.execute_with("system_powerdown", Value::Null, None, ASK_DEADLINE).await;
            tokio::select! {
                () = tokio::time::sleep(left.min(PRESS_EVERY)) => {}
                () = self.stop.notified() => {}
            }
        }
        // The emulator writes its caches back when it quits; a killed one does not.
        let _ = qmp.execute_with("quit", Value::Null, None, QUIT_DEADLINE).await;
        tokio::time::sleep(QUIT_DEADLINE).await;
        if let Some(emulator) = self.emulator() {
            emulator.kill();
        }
    }

    /// Counters of all disks; `None` when the emulator does not answer.
    pub async fn usage(&self) -> Option<Usage> {
        let answer = ask(&*self.qmp()?, "query-blockstats", Value::Null).await?;
        let mut usage = Usage::default();
        for disk in answer.as_array().into_iter().flatten() {
            usage.read_bytes += disk["stats"]["rd_bytes"].as_u64().unwrap_or(0);
            usage.write_bytes += disk["stats"]["wr_bytes"].as_u64().unwrap_or(0);
        }
        Some(usage)
    }

    /// The state for the driver, as fresh as the emulator answers.
    pub async fn view(&self) -> View {
        let mut stuck = false;
        if let Some(qmp) = self.qmp() {
            match (ask_status(&qmp).await, ask_volumes(&qmp).await) {
                (Some(status), Some(volumes)) => {
                    let mut state = self.lock();
                    state.status = status;
                    state.volumes = volumes;
                }
                _ => stuck = !qmp.is_closed(),
            }
        }
        let state = self.lock();
        let mut warnings: Vec<_> =
            state.warnings.iter().map(|(kind, (reason, text))| (kind.clone(), reason.clone(), text.clone())).collect();
        warnings.extend(self.weaker.iter().cloned());
        if stuck {
            warnings.push((
                "Responsive".into(),
                "MonitorBusy".into(),
                "the emulator does not answer; it may be busy with its disks".into(),
            ));
        }
        View {
            status: state.status.clone(),
            disk_full: state.full_since.is_some(),
            started: state.seen.started,
            stopping: state.seen.asked,
            volumes: state.volumes.clone(),
            warnings,
        }
    }
}

fn warn(state: &mut State, kind: &str, reason: &str, text: &str) {
    state.warnings.insert(kind.into(), (reason.into(), text.into()));
}

/// What people call the disk of a BLOCK_IO_ERROR event.
fn disk_of(event: &Event) -> String {
    let device = event.text("qom-path").split('/').find(|part| part.starts_with("vol-") || part.ends_with("-disk"));
    match device {
        Some("root-disk") => "the root disk".into(),
        Some(id) => volume_of_device(id).map_or_else(|| id.to_string(), |v| format!("volume {v}")),
        None => match event.text("node-name") {
            "root" => "the root disk".into(),
            other => format!("disk {other}"),
        },
    }
}

async fn ask(qmp: &Qmp, command: &str, arguments: Value) -> Option<Value> {
    match qmp.execute_with(command, arguments, None, ASK_DEADLINE).await {
        Ok(value) => Some(value),
        Err(QmpError::Refused { .. }) => Some(Value::Null),
        Err(_) => None,
    }
}

async fn ask_status(qmp: &Qmp) -> Option<String> {
    Some(ask(qmp, "query-status", Value::Null).await?["status"].as_str().unwrap_or_default().to_string())
}

async fn ask_volumes(qmp: &Qmp) -> Option<Vec<oblak_model::VolumeId>> {
    let children = ask(qmp, "qom-list", json!({"path": "/machine/peripheral"})).await?;
    let names = children.as_array().into_iter().flatten().filter_map(|c| c["name"].as_str());
    let mut volumes: Vec<_> = names.filter_map(volume_of_device).collect();
    volumes.sort();
    Some(volumes)
}
