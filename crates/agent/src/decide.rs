//! What to do next with an instance: a pure function of what is asked for, what is observed and what the agent remembers.
//!
//! ```text
//!                 ┌──────────────── restart / resize that needs it ───────────────┐
//!                 │                                                               ▼
//!  (absent) ── Start ──► starting ──► running ──── Pause ───► paused          stopping
//!                 ▲                    │  ▲ └──── Resume ◄──────┘                 │
//!                 │                    │  └─ Attach · Detach · Resize             │
//!                 │                    ▼                                          ▼
//!                 └── policy ── failed / stopped ◄───────── Stop ─────────────────┘
//!  any state ── Restore ──► running or stopped
//!  any state, deletion asked ── Remove ──► (absent) ── Release
//! ```

use std::time::Duration;

use oblak_compute::{GuestState, Observation};
use oblak_model::{Instance, Power, Resources, RestartPolicy, SnapshotId, VolumeId};

use crate::backoff::pause;
use crate::record::Record;

/// First pause before a guest that ended by itself is started again.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
/// Longest such pause.
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

/// The next step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Nothing to do.
    Idle,
    /// Nothing to do yet; look again after this long.
    Wait(Duration),
    /// Start a new run.
    Start {
        /// Whether it is started because it ended by itself.
        after_failure: bool,
    },
    /// End it as asked; `then_start` for a restart.
    Stop {
        /// Start it again at once.
        then_start: bool,
    },
    /// Freeze.
    Pause,
    /// Let it run on.
    Resume,
    /// Plug a volume in.
    Attach(VolumeId),
    /// Pull a volume.
    Detach(VolumeId),
    /// Change vCPUs and memory.
    Resize(Resources),
    /// Make it depend on the lease of the node, or no longer.
    Fence(bool),
    /// Go back to a snapshot.
    Restore(SnapshotId),
    /// End it by force and remove everything.
    Remove,
}

/// The restart policy with the default filled in.
#[must_use]
pub fn policy(instance: &Instance) -> RestartPolicy {
    instance.spec.restart_policy.unwrap_or_default()
}

/// What to do next. `record` is `None` before the first run; `since_end` is the time since the run ended, as far as known;
/// `boot_id` names this boot of the machine.
#[must_use]
pub fn decide(
    instance: &Instance,
    observed: &Observation,
    record: Option<&Record>,
    since_end: Duration,
    boot_id: &str,
) -> Action {
    if instance.metadata.is_deleting() {
        return Action::Remove;
    }
    if let Some(restore) = restore_wanted(instance, record) {
        return Action::Restore(restore);
    }
    match observed.state {
        GuestState::Running | GuestState::Paused => live(instance, observed, record),
        GuestState::Starting if instance.spec.power == Power::Stopped => Action::Stop { then_start: false },
        GuestState::Starting | GuestState::Stopping => Action::Wait(Duration::from_millis(200)),
        GuestState::Absent | GuestState::Stopped | GuestState::Failed => {
            ended(instance, observed, record, since_end, boot_id)
        }
    }
}

/// What comes before everything else that is done to a live guest: that it depends on the lease of the node as it should. `may_renew` says
/// that the node has a lease, and that the instance is known to be placed here under it.
#[must_use]
pub fn decide_fence(instance: &Instance, observed: &Observation, may_renew: bool) -> Option<Action> {
    let placement = instance.status.placement.as_ref()?;
    let live = matches!(observed.state, GuestState::Running | GuestState::Paused);
    if !live || instance.metadata.is_deleting() {
        return None;
    }
    let wanted = placement.fenced;
    let renew = observed.lease_ended || !observed.fenced;
    match (wanted, renew) {
        (false, _) => observed.fenced.then_some(Action::Fence(false)),
        (true, true) if may_renew => Some(Action::Fence(true)),
        // A frozen guest is left alone until it is known whether it is still ours.
        (true, true) if observed.lease_ended => Some(Action::Wait(Duration::from_millis(200))),
        (true, _) => None,
    }
}

/// `status.placement.fence_turn` as far as it is in force.
#[must_use]
pub fn fence_turn(instance: &Instance, observed: &Observation) -> u64 {
    let Some(placement) = &instance.status.placement else { return 0 };
    let ended = matches!(observed.state, GuestState::Absent | GuestState::Stopped | GuestState::Failed);
    // What does not run is started with the fence that is asked for.
    if ended || observed.fenced == placement.fenced { placement.fence_turn } else { 0 }
}

fn restore_wanted(instance: &Instance, record: Option<&Record>) -> Option<SnapshotId> {
    let wanted = instance.spec.restore.as_ref()?.generation;
    let done = record.map_or(wanted, |r| r.restore_generation);
    instance.status.resolved.restore.filter(|_| wanted > done)
}

fn live(instance: &Instance, observed: &Observation, record: Option<&Record>) -> Action {
    if instance.spec.power == Power::Stopped {
        return Action::Stop { then_start: false };
    }
    if record.is_some_and(|r| instance.spec.restart_generation > r.restart_generation) {
        return Action::Stop { then_start: true };
    }
    let paused = observed.state == GuestState::Paused;
    match (instance.spec.power, paused) {
        (Power::Paused, false) => return Action::Pause,
        // A guest that stands still because of a full disk is let go by its driver when there is room again, not by us.
        (Power::Running, true) if observed.reason.is_empty() => return Action::Resume,
        _ => {}
    }
    let wanted = &instance.status.resolved.volumes;
    if let Some(extra) = observed.volumes.iter().find(|v| !wanted.contains(v)) {
        return Action::Detach(*extra);
    }
    if let Some(missing) = wanted.iter().find(|v| !observed.volumes.contains(v)) {
        return Action::Attach(*missing);
    }
    let placed = instance.status.placement.as_ref().map(|p| p.resources);
    match (placed, record) {
        (Some(placed), Some(record))
            if (placed.vcpus, placed.memory) != (record.resources.vcpus, record.resources.memory) =>
        {
            Action::Resize(placed)
        }
        _ => Action::Idle,
    }
}

fn ended(
    instance: &Instance,
    observed: &Observation,
    record: Option<&Record>,
    since_end: Duration,
    boot_id: &str,
) -> Action {
    if instance.spec.power == Power::Stopped {
        return Action::Idle;
    }
    let Some(record) = record.filter(|r| r.run > 0) else { return Action::Start { after_failure: false } };
    // The order was written down but the driver was not reached before a crash: ordering the same run again is safe.
    let never_seen = observed.state == GuestState::Absent || observed.run < record.run;
    if record.stop_ordered || never_seen || instance.spec.restart_generation > record.restart_generation {
        return Action::Start { after_failure: false };
    }
    // Cut off by the end of the machine, not ended by itself before that.
    let rebooted = record.boot_id != boot_id
        && (observed.exit_code.is_none() || matches!(observed.reason.as_str(), "NodeRebooted" | "HostRebooted"));
    let failed = observed.state == GuestState::Failed || observed.exit_code.unwrap_or(0) != 0;
    let again = match policy(instance) {
        RestartPolicy::Always => true,
        RestartPolicy::OnFailure => failed || rebooted,
        RestartPolicy::Never => false,
    };
    if !again {
        return Action::Idle;
    }
    if rebooted {
        return Action::Start { after_failure: false };
    }
    let due =
        if record.failures == 0 { Duration::ZERO } else { pause(FIRST_PAUSE, LONGEST_PAUSE, record.failures - 1) };
    if since_end >= due { Action::Start { after_failure: true } } else { Action::Wait(due - since_end) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use oblak_model::{InstanceSpec, Restore, Timestamp};

    const BOOT: &str = "this-boot";

    fn instance(power: Power) -> Instance {
        let mut i = Instance::new("web", InstanceSpec { image: "tiny".into(), power, ..InstanceSpec::default() });
        i.metadata.id = uuid::Uuid::now_v7();
        i
    }

    fn seen(state: GuestState) -> Observation {
        Observation { state, run: 1, ..Observation::absent() }
    }

    fn record(i: &Instance) -> Record {
        Record { run: 1, boot_id: BOOT.into(), ..Record::new(i) }
    }

    fn next(i: &Instance, o: &Observation, r: &Record) -> Action {
        decide(i, o, Some(r), Duration::from_secs(3600), BOOT)
    }

    #[test]
    fn starts_what_never_ran_and_leaves_running_alone() {
        let i = instance(Power::Running);
        assert_eq!(
            decide(&i, &Observation::absent(), None, Duration::ZERO, BOOT),
            Action::Start { after_failure: false }
        );
        assert_eq!(next(&i, &seen(GuestState::Running), &record(&i)), Action::Idle);
        let off = instance(Power::Stopped);
        assert_eq!(decide(&off, &Observation::absent(), None, Duration::ZERO, BOOT), Action::Idle);
    }

    #[test]
    fn power() {
        let stopped = instance(Power::Stopped);
        assert_eq!(next(&stopped, &seen(GuestState::Running), &record(&stopped)), Action::Stop { then_start: false });
        assert_eq!(next(&stopped, &seen(GuestState::Stopped), &record(&stopped)), Action::Idle);
        let paused = instance(Power::Paused);
        assert_eq!(next(&paused, &seen(GuestState::Running), &record(&paused)), Action::Pause);
        assert_eq!(next(&paused, &seen(GuestState::Paused), &record(&paused)), Action::Idle);
        let running = instance(Power::Running);
        assert_eq!(next(&running, &seen(GuestState::Paused), &record(&running)), Action::Resume);
        let full = Observation { reason: "DiskFull".into(), ..seen(GuestState::Paused) };
        assert_eq!(next(&running, &full, &record(&running)), Action::Idle);
        let again = Record { stop_ordered: true, ..record(&running) };
        assert_eq!(next(&running, &seen(GuestState::Stopped), &again), Action::Start { after_failure: false });
    }

    #[test]
    fn policies() {
        let mut i = instance(Power::Running);
        let clean = Observation { exit_code: Some(0), ..seen(GuestState::Stopped) };
        let bad = Observation { exit_code: Some(1), ..seen(GuestState::Failed) };
        assert_eq!(next(&i, &clean, &record(&i)), Action::Idle, "a machine shut down from inside stays off");
        assert_eq!(next(&i, &bad, &record(&i)), Action::Start { after_failure: true });
        i.spec.restart_policy = Some(RestartPolicy::Never);
        assert_eq!(next(&i, &bad, &record(&i)), Action::Idle);
        i.spec.restart_policy = Some(RestartPolicy::Always);
        assert_eq!(next(&i, &clean, &record(&i)), Action::Start { after_failure: true });
        let often = Record { failures: 4, ..record(&i) };
        assert_eq!(decide(&i, &bad, Some(&often), Duration::from_secs(3), BOOT), Action::Wait(Duration::from_secs(5)));
    }

    #[test]
    fn a_reboot_starts_what_should_run_at_once() {
        let i = instance(Power::Running);
        let r = Record { boot_id: "another".into(), failures: 9, ..record(&i) };
        assert_eq!(
            decide(&i, &seen(GuestState::Stopped), Some(&r), Duration::ZERO, BOOT),
            Action::Start { after_failure: false }
        );
        let done_before = Observation { exit_code: Some(0), ..seen(GuestState::Stopped) };
        assert_eq!(next(&i, &done_before, &r), Action::Idle, "what had ended before stays ended");
    }

    #[test]
    fn restart_restore_and_delete() {
        let mut i = instance(Power::Running);
        let r = record(&i);
        i.spec.restart_generation += 1;
        assert_eq!(next(&i, &seen(GuestState::Running), &r), Action::Stop { then_start: true });
        assert_eq!(next(&i, &seen(GuestState::Stopped), &r), Action::Start { after_failure: false });
        let snapshot = SnapshotId(uuid::Uuid::now_v7());
        i.spec.restore = Some(Restore { snapshot: "s1".into(), generation: 1 });
        i.status.resolved.restore = Some(snapshot);
        assert_eq!(next(&i, &seen(GuestState::Running), &r), Action::Restore(snapshot));
        i.metadata.deleted_at = Some(Timestamp::EPOCH);
        assert_eq!(next(&i, &seen(GuestState::Running), &r), Action::Remove);
    }

    #[test]
    fn a_fence_comes_before_everything_else_and_needs_a_lease() {
        let mut i = instance(Power::Running);
        i.status.placement = Some(oblak_model::Placement {
            node: oblak_model::NodeId::default(),
            node_name: "n1".into(),
            resources: Resources::default(),
            at: Timestamp::EPOCH,
            why: String::new(),
            generation: 1,
            fenced: true,
            fence_turn: 3,
        });
        let free = seen(GuestState::Running);
        let fenced = Observation { fenced: true, ..free.clone() };
        let frozen = Observation { lease_ended: true, state: GuestState::Paused, ..fenced.clone() };
        assert_eq!(decide_fence(&i, &free, true), Some(Action::Fence(true)));
        assert_eq!(decide_fence(&i, &free, false), None);
        assert_eq!(decide_fence(&i, &fenced, true), None);
        assert_eq!(decide_fence(&i, &frozen, true), Some(Action::Fence(true)));
        assert!(matches!(decide_fence(&i, &frozen, false), Some(Action::Wait(_))), "nobody lets it go on meanwhile");
        assert_eq!((fence_turn(&i, &free), fence_turn(&i, &fenced)), (0, 3));
        assert_eq!(fence_turn(&i, &Observation::absent()), 3);
        i.status.placement.as_mut().unwrap().fenced = false;
        assert_eq!(decide_fence(&i, &frozen, false), Some(Action::Fence(false)), "nobody else could run it");
        assert_eq!(decide_fence(&i, &seen(GuestState::Stopped), true), None);
    }

    #[test]
    fn volumes_are_pulled_before_others_are_plugged() {
        let mut i = instance(Power::Running);
        let (a, b) = (VolumeId(uuid::Uuid::now_v7()), VolumeId(uuid::Uuid::now_v7()));
        i.status.resolved.volumes = vec![a];
        let o = Observation { volumes: vec![b], ..seen(GuestState::Running) };
        assert_eq!(next(&i, &o, &record(&i)), Action::Detach(b));
        let o = Observation { volumes: vec![], ..seen(GuestState::Running) };
        assert_eq!(next(&i, &o, &record(&i)), Action::Attach(a));
    }

    #[test]
    fn an_order_lost_in_a_crash_is_given_again() {
        let i = instance(Power::Running);
        let r = Record { run: 2, ..record(&i) };
        assert_eq!(next(&i, &seen(GuestState::Stopped), &r), Action::Start { after_failure: false });
    }
}
