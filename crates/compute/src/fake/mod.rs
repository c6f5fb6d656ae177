//! Scriptable fake compute driver: a machine in memory whose guests do what a script says.
//!
//! No threads and no tasks per guest: the state of a guest is computed from its script and the time that has passed, so
//! ten thousand of them cost nothing, and under tokio's paused time every run is the same.
//!
//! A guest is scripted in memory ([`FakeWorld::script`], [`FakeWorld::set_default`]) or by its own spec: the environment
//! variable `OBLAK_FAKE` or arguments after a program called `fake`, for example
//! `fake start_delay=2s fail=3:retry run_for=10s exit=3 stop_delay=1s ignore_stop hang=stop output=hello`.

mod driver;
mod migrate;
mod script;
mod stream;

pub use driver::FakeDriver;
pub use script::{Op, Script};

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use oblak_model::{InstanceId, Isolation, Size, SnapshotId, Timestamp, VolumeId};
use oblak_platform::clock::SharedClock;
use tokio::sync::Notify;
use tokio::time::Instant;

use crate::shim::fence::{Verdict, judge};
use crate::shim::{Fence, FenceState, Lease};
use crate::{GuestSpec, GuestState, Observation};

/// Bytes of console output kept per guest.
const LOG_BYTES: usize = 64 * 1024;

/// The machine that fake drivers drive. It outlives them, as a real machine outlives the agent.
pub struct FakeWorld {
    clock: SharedClock,
    isolations: Vec<Isolation>,
    state: Mutex<State>,
    changed: Notify,
}

/// The fence of a guest, as its shim would carry it out.
#[derive(Clone)]
struct Fenced {
    fence: Fence,
    boot_id: String,
}

#[derive(Default)]
struct State {
    guests: BTreeMap<InstanceId, Guest>,
    scripts: BTreeMap<InstanceId, Script>,
    default: Script,
    freezes_late: Duration,
    starts: BTreeMap<(InstanceId, u64), u64>,
}

/// How a run was ended before its script would have ended it.
#[derive(Clone)]
struct Ended {
    at: Instant,
    wall: Timestamp,
    code: Option<i32>,
    reason: &'static str,
    failed: bool,
}

struct Guest {
    spec: GuestSpec,
    script: Script,
    failures_left: u32,
    /// When the run began to start; none before the first success.
    begun: Option<(Instant, Timestamp)>,
    run: u64,
    ended: Option<Ended>,
    /// When the guest was asked to stop and when force would be used.
    stop: Option<(Instant, Instant)>,
    paused_since: Option<Instant>,
    paused_for: Duration,
    fence: Option<Fenced>,
    volumes: BTreeMap<VolumeId, Size>,
    snapshots: BTreeMap<SnapshotId, bool>,
    log: Vec<u8>,
    log_start: u64,
    outgoing: Option<migrate::Outgoing>,
    incoming: Option<migrate::Incoming>,
}

impl FakeWorld {
    /// An empty machine that can run everything.
    #[must_use]
    pub fn new(clock: SharedClock) -> Arc<Self> {
        Self::with_isolations(clock, vec![Isolation::Container, Isolation::Vm])
    }

    /// An empty machine that can run these.
    #[must_use]
    pub fn with_isolations(clock: SharedClock, isolations: Vec<Isolation>) -> Arc<Self> {
        Arc::new(Self { clock, isolations, state: Mutex::default(), changed: Notify::new() })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What this guest does, before or after it is started. Beats what its spec says.
    pub fn script(&self, id: InstanceId, script: Script) {
        let mut state = self.lock();
        if let Some(guest) = state.guests.get_mut(&id) {
            guest.failures_left = script.fail_starts;
            guest.script = script.clone();
        }
        state.scripts.insert(id, script);
        drop(state);
        self.changed.notify_waiters();
    }

    /// What guests do that have no script of their own.
    pub fn set_default(&self, script: Script) {
        self.lock().default = script;
    }

    /// The guest's shim and process vanish without a trace of how.
    pub fn lose(&self, id: InstanceId) {
        self.end(id, None, "ShimLost", true);
    }

    /// The guest ends by itself with `code`.
    pub fn exit(&self, id: InstanceId, code: i32) {
        self.end(id, Some(code), if code == 0 { "Completed" } else { "Error" }, code != 0);
    }

    /// The record of the guest disappears too.
    pub fn forget(&self, id: InstanceId) {
        let mut state = self.lock();
        state.guests.remove(&id);
        // An instance that comes back after it was moved away is a new one to the driver; what was started twice stays known.
        state.starts.retain(|(guest, _), times| *guest != id || *times > 1);
        drop(state);
        self.changed.notify_waiters();
    }

    /// Shims freeze their guests this long after the end of the lease.
    pub fn set_freezes_late(&self, late: Duration) {
        self.lock().freezes_late = late;
    }

    /// Whether the lease has ended that a guest depends on, as far as its shim has noticed.
    fn is_frozen(&self, guest: &Guest, late: Duration) -> bool {
        let Some(Fenced { fence, boot_id }) = &guest.fence else { return false };
        let lease = Lease::read(&fence.lease).ok().flatten();
        judge(fence, lease.as_ref(), boot_id, self.clock.boottime().saturating_sub(late)) == Verdict::Freeze
    }

    fn fenced(&self, fence: Option<Fence>) -> Option<Fenced> {
        let fence = fence?;
        let boot_id = Lease::read(&fence.lease).ok().flatten().map(|lease| lease.boot_id).unwrap_or_default();
        Some(Fenced { fence, boot_id })
    }

    fn look(&self, id: InstanceId) -> Observation {
        let state = self.lock();
        let Some(guest) = state.guests.get(&id) else { return Observation::absent() };
        let mut seen = guest.observe(Instant::now());
        let fenced = guest.fence.is_some();
        FenceState { fenced, lease_ended: self.is_frozen(guest, state.freezes_late) }.show(&mut seen);
        seen
    }

    /// Power cut: everything that ran has ended; records stay.
    pub fn reboot(&self) {
        let ids: Vec<InstanceId> = self.lock().guests.keys().copied().collect();
        for id in ids {
            self.end(id, None, "NodeRebooted", true);
        }
    }

    /// How often `run` of a guest was really started: more than once is a bug of whoever drives it.
    #[must_use]
    pub fn starts(&self, id: InstanceId, run: u64) -> u64 {
        self.lock().starts.get(&(id, run)).copied().unwrap_or(0)
    }

    /// Every `(guest, run)` that was started more than once.
    #[must_use]
    pub fn started_twice(&self) -> Vec<(InstanceId, u64)> {
        self.lock().starts.iter().filter(|(_, n)| **n > 1).map(|(k, _)| *k).collect()
    }

    /// Guests that run or start now; those that are frozen because the lease of their node has ended do not.
    #[must_use]
    pub fn running(&self) -> BTreeSet<InstanceId> {
        let now = Instant::now();
        let state = self.lock();
        let live = |g: &Guest| {
            !matches!(g.state(now), GuestState::Absent | GuestState::Stopped | GuestState::Failed)
                && !self.is_frozen(g, state.freezes_late)
        };
        state.guests.iter().filter(|(_, g)| live(g)).map(|(id, _)| *id).collect()
    }

    /// Adds to the guest's console output.
    pub fn print(&self, id: InstanceId, bytes: &[u8]) {
        if let Some(guest) = self.lock().guests.get_mut(&id) {
            guest.print(bytes);
        }
        self.changed.notify_waiters();
    }

    fn end(&self, id: InstanceId, code: Option<i32>, reason: &'static str, failed: bool) {
        let wall = self.clock.now();
        if let Some(guest) = self.lock().guests.get_mut(&id) {
            guest.end(Instant::now(), wall, code, reason, failed);
        }
        self.changed.notify_waiters();
    }
}

impl Guest {
    fn new(spec: &GuestSpec, script: Script) -> Self {
        Self {
            spec: spec.clone(),
            failures_left: script.fail_starts,
            script,
            begun: None,
            run: 0,
            ended: None,
            stop: None,
            paused_since: None,
            paused_for: Duration::ZERO,
            fence: None,
            volumes: BTreeMap::new(),
            snapshots: BTreeMap::new(),
            log: Vec::new(),
            log_start: 0,
            outgoing: None,
            incoming: None,
        }
    }

    fn begin(&mut self, spec: &GuestSpec, now: Instant, wall: Timestamp) {
        self.spec = spec.clone();
        self.run = spec.run;
        self.begun = Some((now, wall));
        self.ended = None;
        self.stop = None;
        self.outgoing = None;
        self.paused_since = None;
        self.paused_for = Duration::ZERO;
        self.volumes = spec.disks.iter().map(|d| (d.volume, Size::ZERO)).collect();
        let output = self.script.output.clone();
        if !output.is_empty() {
            self.print(output.as_bytes());
            self.print(b"\n");
        }
    }

    fn end(&mut self, now: Instant, wall: Timestamp, code: Option<i32>, reason: &'static str, failed: bool) {
        if self.begun.is_some() && self.finished(now).is_none() {
            self.ended = Some(Ended { at: now, wall, code, reason, failed });
        }
    }

    /// When and how the run has ended by `now`, by force, by request or by its script.
    fn finished(&self, now: Instant) -> Option<Ended> {
        let (begun, wall) = self.begun?;
        let at = |at: Instant, code, reason, failed| Ended { at, wall: after(wall, at - begun), code, reason, failed };
        let mut ends: Vec<Ended> = self.ended.iter().cloned().collect();
        if let Some((asked, force)) = self.stop {
            let willing = asked + self.script.stop_delay;
            // A frozen guest hears nothing; force reaches it all the same.
            if !self.script.ignore_stop && willing < force && self.paused_since.is_none() {
                ends.push(at(willing, Some(143), "Stopped", false));
            } else {
                ends.push(at(force, Some(137), "Killed", false));
            }
        }
        if let Some(run_for) = self.script.run_for
            && self.paused_since.is_none()
        {
            let code = self.script.exit_code;
            let when = begun + self.script.start_delay + run_for + self.paused_for;
            ends.push(at(when, Some(code), if code == 0 { "Completed" } else { "Error" }, code != 0));
        }
        if let Some(lost) = self.script.lost_after {
            ends.push(at(begun + self.script.start_delay + lost, None, "ShimLost", true));
        }
        ends.into_iter().filter(|e| e.at <= now).min_by_key(|e| e.at)
    }

    fn state(&self, now: Instant) -> GuestState {
        let Some((begun, _)) = self.begun else {
            return if self.incoming.is_some() { GuestState::Starting } else { GuestState::Absent };
        };
        if let Some(ended) = self.finished(now) {
            return if ended.failed { GuestState::Failed } else { GuestState::Stopped };
        }
        if now < begun + self.script.start_delay {
            GuestState::Starting
        } else if self.stop.is_some() {
            GuestState::Stopping
        } else if self.paused_since.is_some() || self.is_still(now) {
            GuestState::Paused
        } else {
            GuestState::Running
        }
    }

    fn observe(&self, now: Instant) -> Observation {
        let state = self.state(now);
        if state == GuestState::Absent {
            return Observation::absent();
        }
        let ended = self.finished(now);
        let live = ended.is_none();
        Observation {
            state,
            run: self.run,
            exit_code: ended.as_ref().and_then(|e| e.code),
            message: ended
                .as_ref()
                .filter(|e| e.failed)
                .map_or(String::new(), |e| format!("the fake guest ended: {}", e.reason)),
            reason: ended.as_ref().map_or(self.moving(now), |e| e.reason).to_string(),
            pid: None,
            started_at: self.begun.map(|(_, wall)| wall),
            ended_at: ended.map(|e| e.wall),
            runtime: "fake".into(),
            volumes: if live { self.volumes.keys().copied().collect() } else { Vec::new() },
            warnings: Vec::new(),
            fenced: false,
            lease_ended: false,
        }
    }

    /// Whether it stands still because it is sent elsewhere.
    fn is_still(&self, now: Instant) -> bool {
        self.outgoing.as_ref().is_some_and(|out| out.is_still(now))
    }

    fn moving(&self, now: Instant) -> &'static str {
        match (self.is_still(now), &self.incoming) {
            (true, _) => "Moving",
            (false, Some(_)) => "Arriving",
            (false, None) => "",
        }
    }

    fn is_live(&self, now: Instant) -> bool {
        self.begun.is_some() && self.finished(now).is_none()
    }

    fn print(&mut self, bytes: &[u8]) {
        self.log.extend_from_slice(bytes);
        let over = self.log.len().saturating_sub(LOG_BYTES);
        self.log.drain(..over);
        self.log_start += over as u64;
    }
}

fn after(wall: Timestamp, time: Duration) -> Timestamp {
    Timestamp::from_micros(wall.as_micros().saturating_add(i64::try_from(time.as_micros()).unwrap_or(i64::MAX)))
}
