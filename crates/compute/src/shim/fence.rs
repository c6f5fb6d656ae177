//! The fence: a guest that may be started on another node is frozen by its shim when the lease of its node ends.
//!
//! ```text
//!  agent ── after each renewal ──► lease.json (one per node)
//!                                      ▲ read when the known deadline is reached
//!  shim of each fenced guest ──────────┘
//!
//!              deadline reached, no later one for the guest's epoch
//!   running ───────────────────────────────────────────────────────► frozen ──► ended by the agent (it runs elsewhere)
//!      ▲                                                                │
//!      └────────── a later deadline, and the guest's epoch holds ◄──────┘
//! ```
//!
//! Nothing here depends on the agent being alive: killed or stopped, it only fails to renew. The lease is counted from before its renewal was
//! sent, in `CLOCK_BOOTTIME`, so it ends here no later than where it was granted. A guest without a fence is never touched.
//!
//! Start reading at [`judge`].

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use async_trait::async_trait;
use oblak_platform::clock::Clock;
use oblak_platform::driver::{DriverError, DriverResult};
use oblak_platform::fsx;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use super::file;
use crate::{GuestState, Observation};

/// Longest sleep before the clock is looked at again: the timers of the runtime stand still while the machine is suspended.
const LOOK_EVERY: Duration = Duration::from_millis(500);
/// How often a frozen guest's shim looks for a later deadline.
const FROZEN_EVERY: Duration = Duration::from_millis(200);
/// Pause after a freezer failed.
const AGAIN: Duration = Duration::from_millis(50);
/// How long a change of the fence may take to be in force.
const SET_DEADLINE: Duration = Duration::from_secs(2);

/// The lease of a node, as its agent writes it down after each renewal.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lease {
    /// The boot that the deadline is of.
    pub boot_id: String,
    /// Epoch of the lease.
    pub epoch: u64,
    /// Oldest epoch from which on the node has had a lease without interruption up to now.
    pub since: u64,
    /// End of the lease, in milliseconds of `CLOCK_BOOTTIME`.
    pub deadline_ms: u64,
}

impl Lease {
    /// Reads it; `None` when there is none.
    ///
    /// # Errors
    /// Any I/O error, `InvalidData` when it is damaged.
    pub fn read(path: &Path) -> io::Result<Option<Self>> {
        fsx::read_json(path)
    }

    /// Writes it: whole or not at all, and worth nothing after a reboot.
    ///
    /// # Errors
    /// Any I/O error.
    pub fn write(&self, path: &Path) -> io::Result<()> {
        fsx::write_json_until_boot(path, self)
    }

    /// Whether a guest of `epoch` may run at `now`.
    #[must_use]
    pub fn covers(&self, epoch: u64, boot_id: &str, now: Duration) -> bool {
        self.boot_id == boot_id
            && (self.since..=self.epoch).contains(&epoch)
            && now < Duration::from_millis(self.deadline_ms)
    }
}

/// What a fenced guest depends on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fence {
    /// Where the node's [`Lease`] is.
    pub lease: PathBuf,
    /// Epoch in which the guest was last known to belong to this node.
    pub epoch: u64,
}

/// What is to be done with a fenced guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It may run until then (`CLOCK_BOOTTIME`).
    RunUntil(Duration),
    /// It must stand still.
    Freeze,
}

/// Decides by the lease alone.
#[must_use]
pub fn judge(fence: &Fence, lease: Option<&Lease>, boot_id: &str, now: Duration) -> Verdict {
    match lease.filter(|lease| lease.covers(fence.epoch, boot_id, now)) {
        Some(lease) => Verdict::RunUntil(Duration::from_millis(lease.deadline_ms)),
        None => Verdict::Freeze,
    }
}

/// Stops and lets go the processors of a guest.
#[async_trait]
pub trait Freezer: Send + Sync {
    /// Freezes. Returns whether it stands still now.
    async fn freeze(&self) -> bool;
    /// Lets it run on. Returns whether it does.
    async fn thaw(&self) -> bool;
    /// Whether it stands still already, because somebody asked for that.
    async fn is_paused(&self) -> bool;
    /// Whether it stands still, for whatever reason.
    async fn is_still(&self) -> bool {
        self.is_paused().await
    }
}

/// What a shim says about its fence.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FenceState {
    /// There is one.
    pub fenced: bool,
    /// The guest is frozen because its lease has ended. Said before it is, so that nobody takes it for one that a person had paused.
    pub lease_ended: bool,
}

impl FenceState {
    /// As the shim in `dir` last wrote it; without a shim that knows fences there is none.
    #[must_use]
    pub fn read(dir: &Path) -> Self {
        fsx::read_json(&dir.join(file::FENCE)).ok().flatten().unwrap_or_default()
    }

    /// Shows it in what a driver observed of a live guest.
    pub fn show(self, seen: &mut Observation) {
        seen.fenced = self.fenced;
        seen.lease_ended = self.lease_ended;
        if self.lease_ended && matches!(seen.state, GuestState::Running | GuestState::Paused) {
            seen.state = GuestState::Paused;
            seen.reason = "LeaseEnded".into();
            seen.message = "frozen: the lease of the node has ended, so it may be started elsewhere".into();
        }
    }
}

/// The fence of one guest: who changes it and who carries it out.
#[derive(Debug)]
pub struct Fencer {
    wanted: watch::Sender<Option<Fence>>,
    state: watch::Sender<FenceState>,
    boot_id: String,
    dir: PathBuf,
    /// Held while it is decided whether the guest stands still, and by whoever lets it go.
    gate: tokio::sync::Mutex<()>,
}

/// Arguments of the operation `fence` of a shim; the answer is a [`FenceState`].
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct FenceCall {
    /// The fence from now on.
    pub fence: Option<Fence>,
}

/// Asks the shim in `dir` for another fence, or for none.
///
/// # Errors
/// As [`super::call`]; `fence_not_set` (retry) when it is not in force.
pub async fn ask(dir: &Path, fence: Option<Fence>) -> DriverResult<()> {
    let fenced = fence.is_some();
    let state: FenceState = super::call_as(dir, "fence", &FenceCall { fence }, SET_DEADLINE * 2).await?;
    if state.fenced != fenced || state.lease_ended {
        return Err(DriverError::retry("fence_not_set", "the guest's fence could not be changed yet"));
    }
    Ok(())
}

impl Fencer {
    /// With the fence that the guest is started with; `dir` is the shim's.
    #[must_use]
    pub fn new(fence: Option<Fence>, boot_id: String, dir: &Path) -> Self {
        let state = FenceState { fenced: fence.is_some(), lease_ended: false };
        let (wanted, state_now) = (watch::Sender::new(fence), watch::Sender::new(state));
        let fencer = Self { wanted, state: state_now, boot_id, dir: dir.into(), gate: tokio::sync::Mutex::new(()) };
        fencer.write(state);
        fencer
    }

    /// For drivers, which ask no shim about it. Without the file they see no fence, and so does the control plane: nothing is moved then.
    fn write(&self, state: FenceState) {
        if let Err(error) = fsx::write_json_until_boot(&self.dir.join(file::FENCE), &state) {
            eprintln!("cannot write {}: {error}", file::FENCE);
        }
    }

    /// Starts only what the lease covers.
    ///
    /// # Errors
    /// `lease_ended` (retry).
    pub fn check_start(&self, clock: &dyn Clock) -> DriverResult<()> {
        if self.may_start(clock) {
            return Ok(());
        }
        Err(DriverError::retry("lease_ended", "the lease of this node has ended; the instance may run elsewhere"))
    }

    /// Whether the guest may be started now.
    #[must_use]
    pub fn may_start(&self, clock: &dyn Clock) -> bool {
        let fence = self.wanted.borrow().clone();
        fence.is_none_or(|fence| self.look(&fence, clock) != Verdict::Freeze)
    }

    /// Lets a guest go on that somebody had paused.
    ///
    /// # Errors
    /// `lease_ended` (retry): nobody may while its lease has ended. `not_resumed` (retry): the freezer failed.
    pub async fn resume(&self, clock: &dyn Clock, freezer: &dyn Freezer) -> DriverResult<()> {
        let _gate = self.gate.lock().await;
        self.check_start(clock)?;
        if freezer.thaw().await {
            return Ok(());
        }
        Err(DriverError::retry("not_resumed", "the guest could not be set going yet"))
    }

    /// What is so now.
    #[must_use]
    pub fn state(&self) -> FenceState {
        *self.state.borrow()
    }

    /// Changes the fence, and returns when that is in force.
    pub async fn set(&self, fence: Option<Fence>) -> FenceState {
        let fenced = fence.is_some();
        let mut state = self.state.subscribe();
        state.mark_unchanged();
        self.wanted.send_replace(fence);
        // Bounded: a freezer that fails is tried again by the guard, and whoever asks sees what is so.
        let settled = tokio::time::timeout(SET_DEADLINE, state.wait_for(|s| s.fenced == fenced && !s.lease_ended));
        let _ = settled.await;
        self.state()
    }

    fn look(&self, fence: &Fence, clock: &dyn Clock) -> Verdict {
        let lease = Lease::read(&fence.lease).ok().flatten();
        judge(fence, lease.as_ref(), &self.boot_id, clock.boottime())
    }

    fn say(&self, fenced: bool, lease_ended: bool) {
        let state = FenceState { fenced, lease_ended };
        if self.state.send_replace(state) != state {
            self.write(state);
        }
    }

    /// Carries the fence out until dropped.
    pub async fn guard(&self, clock: &dyn Clock, freezer: &dyn Freezer) {
        let mut wanted = self.wanted.subscribe();
        // Whether the guest stands still because of us, and not because somebody had paused it before.
        let mut frozen = false;
        let mut was_paused = false;
        loop {
            let fence = wanted.borrow_and_update().clone();
            let gate = self.gate.lock().await;
            let verdict = fence.as_ref().map(|fence| self.look(fence, clock));
            let pause = match verdict {
                // Whoever let it go meanwhile, past us, is not obeyed.
                Some(Verdict::Freeze) if frozen => {
                    if freezer.is_still().await || freezer.freeze().await {
                        FROZEN_EVERY
                    } else {
                        AGAIN
                    }
                }
                Some(Verdict::Freeze) => {
                    self.say(true, true);
                    was_paused = freezer.is_paused().await;
                    frozen = was_paused || freezer.freeze().await;
                    if frozen { FROZEN_EVERY } else { AGAIN }
                }
                _ if frozen && !was_paused && !freezer.thaw().await => AGAIN,
                other => {
                    frozen = false;
                    self.say(other.is_some(), false);
                    match other {
                        Some(Verdict::RunUntil(deadline)) => {
                            drop(gate);
                            self.sleep_until(deadline, clock, &mut wanted).await;
                            continue;
                        }
                        _ => Duration::MAX,
                    }
                }
            };
            drop(gate);
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                changed = wanted.changed() => if changed.is_err() { return },
            }
        }
    }

    /// Until the deadline of boot time, or until the fence changes.
    async fn sleep_until(&self, deadline: Duration, clock: &dyn Clock, wanted: &mut watch::Receiver<Option<Fence>>) {
        loop {
            let left = deadline.saturating_sub(clock.boottime());
            if left.is_zero() {
                return;
            }
            tokio::select! {
                () = tokio::time::sleep(left.min(LOOK_EVERY)) => {}
                _ = wanted.changed() => return,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use oblak_model::Timestamp;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};
    use tokio::time::Instant;

    const BOOT: &str = "boot";

    fn lease(since: u64, epoch: u64, deadline_ms: u64) -> Lease {
        Lease { boot_id: BOOT.into(), epoch, since, deadline_ms }
    }

    #[test]
    fn only_an_unbroken_lease_of_this_boot_lets_a_guest_run() {
        let fence = Fence { lease: PathBuf::new(), epoch: 3 };
        let now = Duration::from_millis(100);
        let of = |lease: &Lease| judge(&fence, Some(lease), BOOT, now);
        assert_eq!(of(&lease(3, 3, 101)), Verdict::RunUntil(Duration::from_millis(101)));
        assert_eq!(of(&lease(3, 3, 100)), Verdict::Freeze, "the deadline itself is too late");
        assert_eq!(
            of(&lease(2, 5, 200)),
            Verdict::RunUntil(Duration::from_millis(200)),
            "renewed by a restarted agent"
        );
        assert_eq!(of(&lease(4, 5, 200)), Verdict::Freeze, "the lease was lost in between: it may run elsewhere");
        assert_eq!(of(&lease(1, 2, 200)), Verdict::Freeze, "a lease from before");
        assert_eq!(judge(&fence, Some(&lease(3, 3, 200)), "another", now), Verdict::Freeze);
        assert_eq!(judge(&fence, None, BOOT, now), Verdict::Freeze);
    }

    struct Virtual(Instant);

    impl Clock for Virtual {
        fn now(&self) -> Timestamp {
            Timestamp::EPOCH
        }
        fn boottime(&self) -> Duration {
            self.0.elapsed()
        }
    }

    #[derive(Default)]
    struct Processors {
        still: AtomicBool,
        paused: AtomicBool,
    }

    #[async_trait]
    impl Freezer for Processors {
        async fn freeze(&self) -> bool {
            self.still.store(true, Ordering::Relaxed);
            true
        }
        async fn thaw(&self) -> bool {
            self.still.store(false, Ordering::Relaxed);
            true
        }
        async fn is_paused(&self) -> bool {
            self.paused.load(Ordering::Relaxed)
        }
        async fn is_still(&self) -> bool {
            self.still.load(Ordering::Relaxed)
        }
    }

    #[tokio::test(start_paused = true)]
    async fn freezes_at_the_deadline_and_goes_on_only_with_a_lease_that_never_ended() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lease.json");
        let clock = Virtual(Instant::now());
        let ms = |n: u64| tokio::time::sleep(Duration::from_millis(n));
        lease(1, 1, 5000).write(&path).unwrap();
        let fencer = Arc::new(Fencer::new(Some(Fence { lease: path.clone(), epoch: 1 }), BOOT.into(), dir.path()));
        assert!(fencer.may_start(&clock));
        let guest = Arc::new(Processors::default());
        let guarding = tokio::spawn({
            let (fencer, guest) = (fencer.clone(), guest.clone());
            let clock = Virtual(clock.0);
            async move { fencer.guard(&clock, guest.as_ref()).await }
        });
        let still = || guest.still.load(Ordering::Relaxed);
        ms(4000).await;
        lease(1, 1, 9000).write(&path).unwrap();
        ms(4990).await;
        assert!(!still(), "a renewed lease is honoured");
        ms(20).await;
        assert!(still() && fencer.state().lease_ended, "frozen at the deadline");
        assert!(!fencer.may_start(&clock));

        // The agent is back with a new lease; whether the guest runs elsewhere by now is not known yet.
        lease(2, 2, 20_000).write(&path).unwrap();
        ms(1000).await;
        assert!(still(), "the lease was interrupted");
        let state = fencer.set(Some(Fence { lease: path.clone(), epoch: 2 })).await;
        assert_eq!(state, FenceState { fenced: true, lease_ended: false });
        assert!(!still(), "the control plane said that it is still this node's");

        // Nobody sets a guest going whose lease has ended: not through the shim, and not past it for long.
        ms(18_500).await;
        assert!(still() && fencer.state().lease_ended);
        assert_eq!(fencer.resume(&clock, guest.as_ref()).await.unwrap_err().code, "lease_ended");
        assert!(still());
        guest.still.store(false, Ordering::Relaxed);
        ms(201).await;
        assert!(still(), "frozen again");
        lease(2, 2, 30_000).write(&path).unwrap();
        ms(201).await;
        assert!(!still());

        // Who was paused before is not set going by a lease that comes back.
        guest.paused.store(true, Ordering::Relaxed);
        guest.still.store(true, Ordering::Relaxed);
        ms(11_000).await;
        assert!(fencer.state().lease_ended);
        lease(2, 2, 60_000).write(&path).unwrap();
        ms(500).await;
        assert!(still() && !fencer.state().lease_ended);

        // Without a fence no deadline counts.
        guest.still.store(false, Ordering::Relaxed);
        fencer.set(None).await;
        ms(60_000).await;
        assert!(!still() && fencer.state() == FenceState::default());
        guarding.abort();
    }
}
