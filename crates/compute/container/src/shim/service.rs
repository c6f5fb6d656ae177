//! What the shim answers on its socket.

use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use nix::sys::signal::Signal;
use oblak_compute::shim::cgroup::Group;
use oblak_compute::shim::{Answer, Call, Fanout, FenceCall, Fencer, Input, Service, ShimRecord, serve_console};
use oblak_compute::{ExecRequest, GuestSpec};
use oblak_platform::clock::SystemClock;
use oblak_platform::driver::{DriverError, DriverResult};
use oblak_platform::process::Identity;
use serde::Deserialize;
use tokio::sync::{mpsc, watch};

use super::exec::Session;
use super::guest::CgroupFreezer;
use super::reaper::Reaper;
use super::runtime::{Action, Runtime};
use crate::bundle;
use crate::task::CONTAINER_GROUP;

/// Parts of the living container that requests work on.
pub struct Shared {
    pub dir: PathBuf,
    pub spec: GuestSpec,
    pub record: Mutex<ShimRecord>,
    pub main: Option<Identity>,
    pub group: Group,
    pub fanout: Fanout,
    pub input: mpsc::Sender<Input>,
    pub ended: watch::Receiver<bool>,
    pub runtime: Runtime,
    pub reaper: Reaper,
    pub rootfs: PathBuf,
    pub capabilities: Vec<String>,
    pub fencer: Arc<Fencer>,
}

impl Shared {
    /// The record as it is now.
    pub fn record(&self) -> ShimRecord {
        self.record.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn signal(&self, number: i32) -> DriverResult<()> {
        let signal = Signal::try_from(number)
            .map_err(|_| DriverError::permanent("bad_signal", format!("{number} is not a signal; see signal(7)")))?;
        if let Some(main) = &self.main {
            main.signal(signal);
        }
        Ok(())
    }

    /// Writes down that the end is wanted, so that whoever looks later knows it was no failure.
    fn mark_stopping(&self) -> DriverResult<()> {
        let mut record = self.record.lock().unwrap_or_else(PoisonError::into_inner);
        if !record.stopping {
            record.stopping = true;
            record.write(&self.dir).map_err(|e| DriverError::io(&format!("{}", self.dir.display()), &e))?;
        }
        Ok(())
    }

    async fn wait_ended(&self) {
        let mut ended = self.ended.clone();
        let _ = ended.wait_for(|e| *e).await;
    }

    async fn stop(self: Arc<Self>, grace: Duration) -> DriverResult<()> {
        // A full disk must not keep a container alive.
        let _ = self.mark_stopping();
        if !grace.is_zero() {
            // A frozen process hears no signal. One that is frozen because its lease has ended must not go on, not even to end well.
            if !self.fencer.may_start(&SystemClock) {
                return self.end_by_force().await;
            }
            let _ = self.group.child(CONTAINER_GROUP).freeze(false);
            self.signal(match self.spec.container.stop_signal {
                0 => libc::SIGTERM,
                asked => asked,
            })?;
            if tokio::time::timeout(grace, self.wait_ended()).await.is_ok() {
                return Ok(());
            }
        }
        self.end_by_force().await
    }

    /// Killed before it is let go, so that it does nothing more.
    async fn end_by_force(&self) -> DriverResult<()> {
        self.group.child(CONTAINER_GROUP).kill_once();
        let _ = self.group.child(CONTAINER_GROUP).freeze(false);
        self.group.child(CONTAINER_GROUP).kill_once();
        self.wait_ended().await;
        Ok(())
    }
}

/// The service of one container.
pub struct ContainerService {
    shared: Arc<Shared>,
    execs: AtomicU64,
}

#[derive(Deserialize)]
struct StopArgs {
    grace_ms: u64,
}

#[derive(Deserialize)]
struct SignalArgs {
    signal: i32,
}

#[derive(Deserialize)]
struct ExecArgs {
    request: ExecRequest,
}

impl ContainerService {
    /// For a running container.
    pub fn new(shared: Arc<Shared>) -> Self {
        Self { shared, execs: AtomicU64::new(0) }
    }

    async fn exec(&self, request: ExecRequest) -> DriverResult<Answer> {
        let number = self.execs.fetch_add(1, Ordering::Relaxed);
        let shared = self.shared.clone();
        // In a task of its own: a person who hangs up during the start must not leave a process without an owner.
        let start = tokio::spawn(async move { start_exec(&shared, &request, number).await });
        let session = start.await.map_err(|e| DriverError::retry("exec_failed", e.to_string()))??;
        Ok(Answer::stream(move |stream| session.serve(stream)))
    }
}

async fn start_exec(shared: &Shared, request: &ExecRequest, number: u64) -> DriverResult<Session> {
    if request.argv.first().is_none_or(String::is_empty) {
        return Err(DriverError::permanent("empty_command", "argv: name a program to run"));
    }
    if shared.group.child(CONTAINER_GROUP).is_frozen() {
        return Err(DriverError::permanent("paused", "the container is paused; resume it first"));
    }
    let spec = &shared.spec;
    let who = if request.user.is_empty() { &spec.container.user } else { &request.user };
    let user = crate::user::resolve(&shared.rootfs, who)?;
    let mut env = bundle::environment(spec, &user);
    if request.tty.is_some() {
        env.entry("TERM".into()).or_insert_with(|| "xterm".into());
    }
    for line in &request.env {
        let (name, value) = line
            .split_once('=')
            .ok_or_else(|| DriverError::permanent("bad_env", format!("env: {line:?} is not of the form NAME=value")))?;
        env.insert(name.into(), value.into());
    }
    let env: Vec<String> = env.iter().map(|(k, v)| format!("{k}={v}")).collect();
    let cwd = if request.cwd.is_empty() { bundle::cwd(spec) } else { request.cwd.clone() };
    let process = bundle::process(&request.argv, &env, &cwd, &user, request.tty, &shared.capabilities);
    let name = format!("exec-{number}");
    let file = shared.runtime.stage.join(format!("{name}.json"));
    std::fs::write(&file, process.to_string()).map_err(|e| DriverError::io("exec", &e))?;
    let started = shared.runtime.start(&shared.reaper, Action::Exec(&file), &name, request.tty.is_some()).await;
    let _ = std::fs::remove_file(&file);
    let started = started
        .map_err(|e| if e.code == "runtime_refused" { DriverError { code: "exec_failed".into(), ..e } } else { e })?;
    // Some runtimes do not look at consoleSize.
    if let Some((cols, rows)) = request.tty {
        started.streams.input.resize(cols, rows);
    }
    Ok(Session::new(started, shared.reaper.clone()))
}

#[async_trait]
impl Service for ContainerService {
    async fn call(&self, call: Call) -> DriverResult<Answer> {
        let shared = self.shared.clone();
        match call.op.as_str() {
            "state" => {
                let value = serde_json::to_value(shared.record())
                    .map_err(|e| DriverError::retry("bad_answer", e.to_string()))?;
                Ok(Answer::Value(value))
            }
            "console" => {
                let attachment = shared.fanout.attach()?;
                let input = shared.input.clone();
                Ok(Answer::stream(move |stream| serve_console(stream, attachment, input)))
            }
            "exec" => self.exec(call.parse::<ExecArgs>()?.request).await,
            "fence" => {
                let state = shared.fencer.set(call.parse::<FenceCall>()?.fence).await;
                let value = serde_json::to_value(state).map_err(|e| DriverError::retry("bad_answer", e.to_string()))?;
                Ok(Answer::Value(value))
            }
            "resume" => {
                let freezer = CgroupFreezer(shared.group.child(CONTAINER_GROUP));
                shared.fencer.resume(&SystemClock, &freezer).await?;
                Ok(Answer::done())
            }
            "signal" => {
                shared.signal(call.parse::<SignalArgs>()?.signal)?;
                Ok(Answer::done())
            }
            "stop" => {
                let grace = Duration::from_millis(call.parse::<StopArgs>()?.grace_ms);
                // Goes on when the caller hangs up: a stop that was asked for is not taken back.
                let stop = tokio::spawn(shared.stop(grace));
                stop.await.map_err(|e| DriverError::retry("stop_failed", e.to_string()))??;
                Ok(Answer::done())
            }
            "shutdown" => {
                tokio::spawn(shared.stop(Duration::ZERO));
                Ok(Answer::done())
            }
            other => Err(DriverError::unsupported(format!("the shim of a container does not know {other}"))),
        }
    }
}
