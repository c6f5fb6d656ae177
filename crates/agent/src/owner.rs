//! The owner task of one instance: the only one that calls the compute driver about it.

use std::sync::Arc;
use std::time::Duration;

use oblak_compute::shim::Fence;
use oblak_compute::{ComputeDriver, GuestState, Observation};
use oblak_model::wire::ReportItem;
use oblak_model::{About, Condition, Instance, InstanceId, Isolation, Observed, Phase, Severity, VolumeId};
use oblak_platform::driver::{DriverError, Remedy};
use tokio::sync::Notify;
use tokio::time::Instant;

use crate::backoff::Backoff;
use crate::context::{Context, lock};
use crate::decide::{Action, decide, decide_fence, fence_turn};
use crate::migrate;
use crate::perform::{self, Done};
use crate::record::Record;
use crate::snapshots;

/// A guest that ran this long is healthy: its failures are forgotten.
const HEALTHY_AFTER: Duration = Duration::from_secs(60);
/// Looked at again this often when there is nothing to do and the guest does not run.
const IDLE: Duration = Duration::from_secs(30);

/// Memory of the task; everything that must survive it is in [`Record`].
pub struct Owner {
    pub(crate) id: InstanceId,
    pub(crate) record: Option<Record>,
    /// What the last report said.
    reported: Option<ReportItem>,
    /// Text about what it waits for or what went wrong: (reason, message, failed for good).
    pub(crate) note: Option<(String, String, bool)>,
    /// Generation of the spec that the note is about.
    noted_for: u64,
    /// When it began to wait for what a start needs.
    waits_since: Option<Instant>,
    backoff: Backoff,
    quarantined: bool,
    /// The fence for a guest that is placed here as far as is known; see [`crate::lease::Keeper::fence`].
    pub(crate) fence: Option<Fence>,
    /// Since when the server does not name the instance.
    missed_since: Option<Instant>,
}

/// An instance that was moved away is named as such within this time after it is no longer named as one of this node.
const MISSED: Duration = Duration::from_secs(1);

/// What is waited for shorter than this, a network being made for example, is not worth a commit of its own.
const PATIENCE: Duration = Duration::from_millis(150);

/// What a step leads to.
enum Next {
    Again,
    Wait(Duration),
    Gone,
}

/// Starts the task of an instance unless it runs already.
pub fn spawn(ctx: &Arc<Context>, id: InstanceId) {
    let notify = {
        let mut owners = lock(&ctx.owners);
        if owners.contains_key(&id) {
            return;
        }
        let notify = Arc::new(Notify::new());
        owners.insert(id, notify.clone());
        notify
    };
    oblak_platform::task::spawn(run(ctx.clone(), id, notify));
}

async fn run(ctx: Arc<Context>, id: InstanceId, notify: Arc<Notify>) {
    let mut owner = Owner::new(id, load(&ctx, id));
    loop {
        match owner.step(&ctx).await {
            Next::Again => tokio::task::yield_now().await,
            Next::Gone => break,
            Next::Wait(pause) => tokio::select! {
                () = notify.notified() => {}
                () = tokio::time::sleep(pause) => {}
                () = ctx.cancel.cancelled() => break,
            },
        }
        if ctx.cancel.is_cancelled() {
            break;
        }
    }
    lock(&ctx.owners).remove(&id);
}

fn load(ctx: &Context, id: InstanceId) -> Option<Record> {
    match Record::load(&ctx.instance_dir(id)) {
        Ok(record) => record,
        Err(error) => {
            // Written atomically, so this is a broken disk. The driver's own record still tells whether the guest runs.
            tracing::error!(instance = %id, %error, "the record of an instance cannot be read");
            None
        }
    }
}

impl Owner {
    fn new(id: InstanceId, record: Option<Record>) -> Self {
        Self {
            id,
            record,
            reported: None,
            note: None,
            noted_for: 0,
            waits_since: None,
            backoff: Backoff::new(Duration::from_millis(250), Duration::from_secs(20)),
            quarantined: false,
            fence: None,
            missed_since: None,
        }
    }

    async fn step(&mut self, ctx: &Arc<Context>) -> Next {
        // Before the world is looked at, so that the world is at least as new.
        self.fence = ctx.lease.fence(ctx.clock.boottime());
        let instance = ctx.world().instances.get(&self.id).cloned();
        if let Some(placement) = self.superseded(ctx, instance.as_deref()) {
            return self.leave(ctx, placement).await;
        }
        let Some(instance) = instance else { return self.forgotten(ctx).await };
        self.missed_since = None;
        self.turn_to(instance.metadata.generation);
        let isolation = instance.status.resolved.isolation;
        let Some(driver) = ctx.drivers.compute.get(&isolation).cloned() else {
            if instance.metadata.is_deleting() {
                perform::release(ctx, &instance);
                return Next::Wait(IDLE);
            }
            self.note =
                Some(("Unsupported".into(), format!("this node has no driver for isolation {isolation}"), true));
            self.report(ctx, &instance, &Observation::absent());
            return Next::Wait(IDLE);
        };
        match migrate::step(ctx, self, &driver, &instance).await {
            Ok(migrate::Then::Live) => {}
            Ok(migrate::Then::Again) => return Next::Again,
            Ok(migrate::Then::Wait { pause, quiet }) => {
                if !quiet && let Ok(observed) = driver.observe(self.id).await {
                    self.report(ctx, &instance, &observed);
                }
                return Next::Wait(pause);
            }
            Err(error) => {
                tracing::warn!(instance = %instance.metadata.name, %error, "a migration is held up");
                return Next::Wait(self.backoff.next());
            }
        }
        // The network of a container is made for its ids, and a start waits for the network: so the ids come first.
        let waits = isolation == Isolation::Container && !instance.metadata.is_deleting() && self.record.is_none();
        if waits && let Err(error) = perform::record(ctx, self, &instance) {
            return self.failed(ctx, &instance, &Observation::absent(), &error);
        }
        let observed = match driver.observe(self.id).await {
            Ok(observed) => observed,
            Err(error) => return self.failed(ctx, &instance, &Observation::absent(), &error),
        };
        // Left standing by an earlier agent that had not handed it over: see the marks above.
        if observed.reason == "Moving" {
            return match migrate::stop_sending(&driver, self.id).await {
                Ok(()) => Next::Again,
                Err(error) => self.failed(ctx, &instance, &observed, &error),
            };
        }
        self.note_health(ctx, &observed);
        self.note_plugged(ctx, &observed);
        let since_end = observed.ended_at.map_or(Duration::MAX, |at| ctx.clock.now().since(at));
        let boot_id = &ctx.config.boot_id;
        let action = decide_fence(&instance, &observed, self.fence.is_some())
            .unwrap_or_else(|| decide(&instance, &observed, self.record.as_ref(), since_end, boot_id));
        if action == Action::Idle {
            let live = matches!(observed.state, GuestState::Running | GuestState::Paused);
            self.backoff.reset();
            if self.settled(&observed) {
                self.note = None;
            }
            self.report(ctx, &instance, &observed);
            if snapshots::work(ctx, &driver, &instance, live).await {
                return Next::Wait(Duration::from_millis(500));
            }
            return Next::Wait(if live { ctx.config.observe_every } else { IDLE });
        }
        if let Action::Wait(pause) = action {
            self.report(ctx, &instance, &observed);
            return Next::Wait(pause.max(Duration::from_millis(20)));
        }
        if ctx.is_removed() && matches!(action, Action::Start { .. } | Action::Stop { then_start: true }) {
            return Next::Wait(IDLE);
        }
        tracing::debug!(instance = %instance.metadata.name, ?action, state = ?observed.state, "acting");
        self.act(ctx, &driver, &instance, &observed, &action).await
    }

    /// What went wrong with an older spec says nothing about this one: a report names the generation that it is about.
    fn turn_to(&mut self, generation: u64) {
        if self.noted_for != generation {
            self.noted_for = generation;
            self.note = None;
        }
    }

    /// Whether an idle state says everything by itself: notes of the way there are outdated.
    fn settled(&self, observed: &Observation) -> bool {
        matches!(observed.state, GuestState::Running | GuestState::Paused | GuestState::Stopped)
    }

    async fn act(
        &mut self,
        ctx: &Arc<Context>,
        driver: &Arc<dyn ComputeDriver>,
        instance: &Arc<Instance>,
        observed: &Observation,
        action: &Action,
    ) -> Next {
        self.announce(ctx, instance, observed, action);
        let result = tokio::select! {
            result = perform::perform(ctx, self, driver, instance, observed, action) => result,
            // A deletion overtakes whatever takes long; drivers leave nothing behind when a call is dropped.
            () = overtaken(ctx, instance) => return Next::Again,
        };
        match result {
            Ok(Done::Again) => {
                self.note = None;
                self.waits_since = None;
                self.backoff.reset();
                Next::Again
            }
            Ok(Done::WaitingFor(reason, message)) => {
                let waited = self.waits_since.get_or_insert_with(Instant::now).elapsed();
                self.note = Some((reason, message, false));
                if waited < PATIENCE {
                    return Next::Wait(PATIENCE - waited);
                }
                self.report(ctx, instance, observed);
                Next::Wait(Duration::from_secs(2))
            }
            Ok(Done::Removed) => Next::Wait(IDLE),
            Err(error) => self.failed(ctx, instance, observed, &error),
        }
    }

    /// Says what is going to happen when it may take a while.
    fn announce(&mut self, ctx: &Context, instance: &Instance, observed: &Observation, action: &Action) {
        let state = match action {
            Action::Stop { .. } => GuestState::Stopping,
            Action::Start { .. } if self.note.is_none() => GuestState::Starting,
            _ => return,
        };
        // `starting` costs a commit and is over at once when everything is here; say it only when it was slow before.
        if state == GuestState::Stopping {
            self.report(ctx, instance, &Observation { state, ..observed.clone() });
        }
    }

    fn failed(&mut self, ctx: &Context, instance: &Instance, observed: &Observation, error: &DriverError) -> Next {
        let for_good = !matches!(error.remedy, Remedy::Retry);
        let repeated = self.note.as_ref().is_some_and(|(code, text, _)| *code == error.code && *text == error.detail);
        self.note = Some((error.code.clone(), error.detail.clone(), for_good));
        if !repeated {
            tracing::warn!(instance = %instance.metadata.name, %error, "cannot carry out what is asked for");
            let project = instance.metadata.project.as_deref();
            ctx.event(project, about(instance), Severity::Warning, &camel(&error.code), error.detail.clone());
        }
        self.report(ctx, instance, observed);
        Next::Wait(if for_good { IDLE } else { self.backoff.next() })
    }

    /// The placement of which something is left here, or may be, although the instance was moved since then. That it was moved stays true
    /// however old our view of the world is.
    fn superseded(&mut self, ctx: &Context, instance: Option<&Instance>) -> Option<u64> {
        let moved = ctx.world().superseded.get(&self.id).copied();
        // What was handed over to another node is removed by `migrate`.
        let placement = instance.and_then(|i| i.status.placement.as_ref()).filter(|p| p.node == ctx.config.node);
        let now = placement.map(|p| p.generation);
        match (&mut self.record, now) {
            (Some(record), Some(now)) if record.placement == 0 => {
                // Of an agent that did not write it down; written with the next order.
                record.placement = now;
                None
            }
            (Some(record), Some(now)) => (record.placement < now).then_some(record.placement),
            (Some(record), None) => moved.filter(|moved| record.placement <= *moved),
            (None, _) => moved,
        }
    }

    /// Ends and removes what is left of an earlier placement, then says so.
    async fn leave(&mut self, ctx: &Arc<Context>, placement: u64) -> Next {
        if let Some(record) = self.record.clone() {
            let Some(driver) = ctx.drivers.compute.get(&record.isolation).cloned() else { return Next::Wait(IDLE) };
            if let Err(error) = perform::clear(ctx, self, &driver).await {
                tracing::warn!(instance = %record.name, %error, "cannot remove what is left of an instance that was moved");
                return Next::Wait(self.backoff.next());
            }
            tracing::info!(instance = %record.name, placement, "removed what was left of an instance that was moved");
        }
        self.backoff.reset();
        self.reported = None;
        let told = ctx.world().superseded.get(&self.id).copied();
        if let Some(moved) = told {
            ctx.report(ReportItem::Left { id: self.id, placement: moved.max(placement) });
        }
        let is_here = ctx.world().instances.contains_key(&self.id);
        if is_here && self.record.is_none() && told.is_none() {
            return Next::Again;
        }
        // The answer to the report takes the task away.
        Next::Wait(Duration::from_millis(500))
    }

    /// The server does not know the instance. If it is really here, it is kept until a person decides.
    async fn forgotten(&mut self, ctx: &Context) -> Next {
        // A copy of a migration that is over: never ours, or handed over to another node.
        let mark = migrate::Mark::load(&ctx.instance_dir(self.id));
        if matches!(mark, Ok(Some(_))) {
            if !*ctx.synced.borrow() {
                return Next::Wait(Duration::from_secs(1));
            }
            ctx.moves.cancel(self.id);
            return match migrate::clean(ctx, self).await {
                Ok(()) => Next::Again,
                Err(error) => {
                    tracing::warn!(instance = %self.id, %error, "what a migration left cannot be removed yet");
                    Next::Wait(self.backoff.next())
                }
            };
        }
        let Some(unused) = self.record.as_ref().map(|r| r.run == 0) else {
            lock(&ctx.plugged).retain(|_, by| *by != self.id);
            return Next::Gone;
        };
        if !*ctx.synced.borrow() {
            return Next::Wait(Duration::from_secs(1));
        }
        let missed = self.missed_since.get_or_insert_with(Instant::now).elapsed();
        if missed < MISSED {
            return Next::Wait(MISSED - missed);
        }
        if unused && self.forget_unused(ctx).await {
            return Next::Again;
        }
        if let Some(record) = self.record.as_ref().filter(|_| !self.quarantined) {
            self.quarantined = true;
            tracing::warn!(instance = %record.name, id = %self.id, "the control plane does not know this guest; it is left alone");
            let node = About { kind: "node".into(), name: ctx.config.name.clone(), id: ctx.config.node.0 };
            let text = format!(
                "guest {} ({}, project {}) runs here but the control plane does not know it; it is left alone until a person removes it",
                record.name, self.id, record.project
            );
            ctx.event(None, node, Severity::Warning, "Quarantined", text);
        }
        Next::Wait(IDLE)
    }

    /// Removes what was made here for the first run of an instance that went elsewhere before that run was ordered.
    async fn forget_unused(&mut self, ctx: &Context) -> bool {
        let Some(record) = self.record.as_ref().filter(|r| r.fresh) else { return false };
        let Some(driver) = ctx.drivers.compute.get(&record.isolation) else { return false };
        if !driver.observe(self.id).await.is_ok_and(|seen| seen.state == GuestState::Absent) {
            return false;
        }
        if let Err(error) = perform::clear(ctx, self, driver).await {
            tracing::warn!(instance = %self.id, %error, "what was prepared for an instance that went elsewhere cannot be removed");
            return false;
        }
        true
    }

    fn note_health(&mut self, ctx: &Context, observed: &Observation) {
        let healthy = observed.state == GuestState::Running
            && observed.started_at.is_some_and(|at| ctx.clock.now().since(at) >= HEALTHY_AFTER);
        if let Some(record) = self.record.as_mut().filter(|r| healthy && r.failures > 0) {
            record.failures = 0;
            if let Err(error) = record.save(&ctx.instance_dir(self.id)) {
                tracing::warn!(instance = %self.id, %error, "the record of an instance cannot be written");
            }
        }
    }

    fn note_plugged(&self, ctx: &Context, observed: &Observation) {
        let live = !matches!(observed.state, GuestState::Absent | GuestState::Stopped | GuestState::Failed);
        let now: Vec<VolumeId> = if live { observed.volumes.clone() } else { Vec::new() };
        let mut plugged = lock(&ctx.plugged);
        let before = plugged.clone();
        plugged.retain(|volume, by| *by != self.id || now.contains(volume));
        plugged.extend(now.into_iter().map(|v| (v, self.id)));
        if *plugged != before {
            ctx.wake_volumes.notify_one();
        }
    }

    /// Queues a report when it says something new.
    pub(crate) fn report(&mut self, ctx: &Context, instance: &Instance, observed: &Observation) {
        let (phase, reason, message) = phase(instance, observed, self.note.as_ref());
        let record = self.record.as_ref();
        let details = Observed {
            generation: instance.metadata.generation,
            run: observed.run.max(record.map_or(0, |r| r.run)),
            restart_generation: record.map_or(0, |r| r.restart_generation),
            restore_generation: record.map_or(0, |r| r.restore_generation),
            restart_count: record.map_or(0, |r| r.restart_count),
            exit_code: observed.exit_code,
            started_at: observed.started_at,
            ended_at: observed.ended_at,
            runtime: observed.runtime.clone(),
            volumes: observed.volumes.clone(),
            refused: refused(ctx, instance),
            resources: record.map(|r| r.resources),
            placement: instance.status.placement.as_ref().map_or(0, |p| p.generation),
            fence_turn: fence_turn(instance, observed),
        };
        let conditions = conditions(ctx, instance, observed, &details.refused);
        let item = ReportItem::Instance {
            project: instance.metadata.project.clone().unwrap_or_default(),
            id: self.id,
            phase,
            reason,
            message,
            observed: Box::new(details),
            conditions,
        };
        let shown = instance.status.phase == phase || phase == Phase::Deleting;
        if self.reported.as_ref() != Some(&item) || !shown {
            ctx.report(item.clone());
            self.reported = Some(item);
        }
    }
}

/// Resolves when the instance is to be deleted although it was not when the action began.
async fn overtaken(ctx: &Context, instance: &Instance) {
    if instance.metadata.is_deleting() {
        return std::future::pending().await;
    }
    let id = InstanceId(instance.metadata.id);
    loop {
        tokio::time::sleep(Duration::from_millis(100)).await;
        if ctx.world().instances.get(&id).is_some_and(|i| i.metadata.is_deleting()) {
            return;
        }
    }
}

/// The phase that people see.
fn phase(
    instance: &Instance,
    observed: &Observation,
    note: Option<&(String, String, bool)>,
) -> (Phase, String, String) {
    let (mut phase, mut reason, mut message) = match observed.state {
        GuestState::Absent => (Phase::Starting, String::new(), String::new()),
        GuestState::Starting => (Phase::Starting, observed.reason.clone(), observed.message.clone()),
        GuestState::Running => (Phase::Running, observed.reason.clone(), observed.message.clone()),
        GuestState::Paused => (Phase::Paused, observed.reason.clone(), observed.message.clone()),
        GuestState::Stopping => (Phase::Stopping, observed.reason.clone(), observed.message.clone()),
        GuestState::Stopped => (Phase::Stopped, observed.reason.clone(), observed.message.clone()),
        GuestState::Failed => (Phase::Failed, observed.reason.clone(), observed.message.clone()),
    };
    // However it ended: that it does not run is what was asked for. The reason still says how.
    let ended = matches!(observed.state, GuestState::Absent | GuestState::Failed);
    if ended && instance.spec.power == oblak_model::Power::Stopped {
        phase = Phase::Stopped;
    }
    if let Some((code, text, for_good)) = note {
        reason = camel(code);
        message.clone_from(text);
        let live = matches!(observed.state, GuestState::Running | GuestState::Paused | GuestState::Stopping);
        if !live {
            phase = if *for_good { Phase::Failed } else { Phase::Starting };
        }
    }
    if instance.metadata.is_deleting() {
        phase = Phase::Deleting;
    }
    (phase, reason, message)
}

fn refused(ctx: &Context, instance: &Instance) -> Vec<String> {
    let networks = ctx.networks.borrow();
    instance.status.resolved.ports.iter().filter_map(|p| networks.refused.get(p)).flatten().cloned().collect()
}

fn conditions(ctx: &Context, instance: &Instance, observed: &Observation, refused: &[String]) -> Vec<Condition> {
    let mut out: Vec<Condition> = Vec::new();
    let at = |kind: &str| {
        let old = instance.status.conditions.iter().find(|c| c.kind == kind && c.status);
        old.map_or_else(|| ctx.clock.now(), |c| c.at)
    };
    for (kind, reason, message) in &observed.warnings {
        out.push(Condition {
            kind: kind.clone(),
            status: true,
            reason: reason.clone(),
            message: message.clone(),
            at: at(kind),
        });
    }
    if !refused.is_empty() {
        let kind = "PortNotPublished".to_string();
        out.push(Condition {
            at: at(&kind),
            kind,
            status: true,
            reason: "AddressInUse".into(),
            message: refused.join("; "),
        });
    }
    out
}

/// The object as events name it.
pub fn about(instance: &Instance) -> About {
    About { kind: "instance".into(), name: instance.metadata.name.clone(), id: instance.metadata.id }
}

/// `disk_full` → `DiskFull`.
fn camel(code: &str) -> String {
    oblak_model::object::pascal(&code.replace('_', "-"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_note_ends_with_the_spec_that_it_is_about() {
        let mut owner = Owner::new(InstanceId::default(), None);
        owner.turn_to(1);
        owner.note = Some(("unsupported".into(), "volumes are attached when it starts".into(), true));
        owner.turn_to(1);
        assert!(owner.note.is_some());
        owner.turn_to(2);
        assert!(owner.note.is_none(), "a restart is not refused because an attachment was");
    }

    #[test]
    fn what_ended_and_is_to_be_stopped_is_stopped() {
        let mut web = Instance::new("web", oblak_model::InstanceSpec::default());
        let lost =
            Observation { state: GuestState::Failed, reason: "NodeRebooted".into(), run: 1, ..Observation::absent() };
        assert_eq!(phase(&web, &lost, None).0, Phase::Failed);
        web.spec.power = oblak_model::Power::Stopped;
        let (now, reason, _) = phase(&web, &lost, None);
        assert_eq!((now, reason.as_str()), (Phase::Stopped, "NodeRebooted"), "how it ended is still said");
    }
}
