//! Moving instances between this node and others.
//!
//! The placement in the store says whose a guest is; see decision 0033. What must survive the agent is a [`Mark`] beside the
//! instance: that its copy here is a target's and never was ours, or that our copy was handed over and must not run before it has been
//! *read* that the move was given up.
//!
//! Start reading at [`decide`].

mod source;
mod target;
mod wire;

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use oblak_compute::ComputeDriver;
use oblak_model::wire::ReportItem;
use oblak_model::{Instance, InstanceId, MigrationPhase, MigrationStep, NodeId};
use oblak_platform::driver::{DriverError, DriverResult};
use oblak_platform::fsx;
use serde::{Deserialize, Serialize};

use crate::context::{Context, lock};
use crate::owner::Owner;
use crate::perform;

pub use source::Moves;
pub use wire::listen;

/// File name below the instance's directory.
pub const FILE: &str = "moving.json";

/// What must not be forgotten about a copy of a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mark {
    /// Which migration.
    pub generation: u64,
    /// What the copy here is.
    pub role: Role,
    /// For a source: how long the guest had stood still when it was handed over, in milliseconds.
    #[serde(default)]
    pub downtime_ms: Option<u64>,
}

/// What a copy is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// A target's: it has never run here.
    Target,
    /// A source's that was handed over: the other node may run it.
    HandedOver,
}

impl Mark {
    /// Reads it.
    pub fn load(dir: &Path) -> io::Result<Option<Self>> {
        fsx::read_json(&dir.join(FILE))
    }
    fn save(self, dir: &Path) -> DriverResult<()> {
        fsx::create_dir_private(dir, 0o711)
            .and_then(|()| fsx::write_json(&dir.join(FILE), &self))
            .map_err(|e| DriverError::io("cannot write the mark of a migration", &e))
    }
    fn remove(dir: &Path) -> DriverResult<()> {
        fsx::remove_file_if_exists(&dir.join(FILE))
            .and_then(|()| fsx::sync_dir(dir))
            .map_err(|e| DriverError::io("cannot remove the mark of a migration", &e))
    }
}

/// What an owner does about a migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Nothing: the instance lives here as always.
    Live,
    /// Nothing but wait for the other side.
    Wait,
    /// Target: make everything ready.
    Prepare,
    /// Target, after the switch: let it run.
    Arrive,
    /// Target: remove a copy that never was ours.
    Forget,
    /// Source: begin.
    Send,
    /// Source: say again that it is handed over.
    HandOverAgain,
    /// Source: what was under way has ended with an earlier agent.
    GiveUp,
    /// Source: the move was given up, the guest goes on here.
    Stay,
    /// Source, after the switch: remove what is left.
    Leave,
}

/// The next step. `sending` says whether a task of this agent is at work for it.
pub fn decide(instance: &Instance, here: NodeId, mark: Option<Mark>, sending: bool) -> Step {
    let status = &instance.status;
    let placed_here = status.placement.as_ref().is_some_and(|p| p.node == here);
    let open = status.open_migration();
    let target_of = mark.filter(|m| m.role == Role::Target).map(|m| m.generation);
    if !placed_here {
        return match (open.filter(|m| m.to == here), target_of) {
            (Some(m), Some(generation)) if m.generation != generation => Step::Forget,
            (Some(m), _) if m.phase == MigrationPhase::Preparing => Step::Prepare,
            (Some(_), _) => Step::Wait,
            (None, Some(_)) => Step::Forget,
            (None, None) => {
                let leaves = |m: &&oblak_model::MigrationStatus| m.phase == MigrationPhase::Finishing && m.from == here;
                if status.migration.as_ref().filter(leaves).is_some_and(|m| !m.left) { Step::Leave } else { Step::Wait }
            }
        };
    }
    if let Some(generation) = target_of {
        // Placed here by the switch of that very migration. Otherwise the old node was lost before it, and what came so far is worth nothing.
        let switched = |m: &oblak_model::MigrationStatus| {
            m.generation == generation && matches!(m.phase, MigrationPhase::Finishing | MigrationPhase::Done)
        };
        return if status.migration.as_ref().is_some_and(switched) { Step::Arrive } else { Step::Forget };
    }
    let handed_over = mark.map(|m| m.generation);
    if let Some(m) = open.filter(|m| m.from == here && m.phase != MigrationPhase::Preparing) {
        return match handed_over {
            _ if sending => Step::Wait,
            Some(generation) if generation == m.generation => Step::HandOverAgain,
            _ if m.phase == MigrationPhase::Ready => Step::Send,
            _ => Step::GiveUp,
        };
    }
    if let Some(generation) = handed_over {
        // Only what was written about this very migration tells that the other node will never run it.
        let given_up = status
            .migration
            .as_ref()
            .is_some_and(|m| m.generation > generation || (m.generation == generation && m.phase.stayed()));
        return if given_up { Step::Stay } else { Step::Wait };
    }
    if sending { Step::Stay } else { Step::Live }
}

/// How a step ended.
pub enum Then {
    /// The instance lives here as always.
    Live,
    /// Look again at once.
    Again,
    /// Look again after this long; `quiet` when nothing is to be reported about the guest.
    Wait { pause: Duration, quiet: bool },
}

const LOOK: Duration = Duration::from_secs(1);

/// Carries the next step out.
pub async fn step(
    ctx: &Arc<Context>,
    owner: &mut Owner,
    driver: &Arc<dyn ComputeDriver>,
    instance: &Arc<Instance>,
) -> DriverResult<Then> {
    let (id, dir) = (owner.id, ctx.instance_dir(owner.id));
    let mark = Mark::load(&dir).map_err(|e| DriverError::io("cannot read the mark of a migration", &e))?;
    let generation = instance.status.migration.as_ref().map_or(0, |m| m.generation);
    match decide(instance, ctx.config.node, mark, ctx.moves.is_sending(id)) {
        Step::Live => return Ok(Then::Live),
        Step::Wait => {
            let quiet = instance.status.placement.as_ref().is_none_or(|p| p.node != ctx.config.node);
            return Ok(Then::Wait { pause: LOOK, quiet });
        }
        Step::Prepare => return target::prepare(ctx, owner, instance).await,
        Step::Arrive => target::arrive(ctx, owner, driver, instance).await?,
        Step::Forget => clean(ctx, owner).await?,
        Step::Send => source::begin(ctx, owner, driver, instance).await?,
        Step::HandOverAgain => {
            let downtime_ms = mark.and_then(|m| m.downtime_ms);
            report(ctx, instance, generation, MigrationStep::HandOver { downtime_ms });
            return Ok(Then::Wait { pause: LOOK, quiet: false });
        }
        Step::GiveUp => {
            stop_sending(driver, id).await?;
            let message = "the agent of the source was restarted while it was copying".to_string();
            report(ctx, instance, generation, MigrationStep::Failed { reason: "AgentRestarted".into(), message });
            return Ok(Then::Wait { pause: LOOK, quiet: false });
        }
        Step::Stay => {
            if ctx.moves.cancel(id) {
                return Ok(Then::Wait { pause: Duration::from_millis(50), quiet: false });
            }
            stop_sending(driver, id).await?;
            Mark::remove(&dir)?;
        }
        Step::Leave => {
            ctx.moves.cancel(id);
            clean(ctx, owner).await?;
            report(ctx, instance, generation, MigrationStep::Left {});
            return Ok(Then::Wait { pause: LOOK, quiet: true });
        }
    }
    Ok(Then::Again)
}

/// Lets a guest that stands still for a move that is no more go on.
pub async fn stop_sending(driver: &Arc<dyn ComputeDriver>, id: InstanceId) -> DriverResult<()> {
    match driver.migrate() {
        Some(ability) => ability.stop_sending(id).await,
        None => Ok(()),
    }
}

/// Removes everything of an instance from this node, whatever drives it. The server is told nothing.
pub async fn clean(ctx: &Context, owner: &mut Owner) -> DriverResult<()> {
    for driver in ctx.drivers.compute.values() {
        driver.remove(owner.id).await?;
    }
    perform::clear_files(ctx, owner).await
}

/// Queues a report about a migration.
pub fn report(ctx: &Context, instance: &Instance, generation: u64, step: MigrationStep) {
    ctx.report(ReportItem::Migration {
        project: instance.metadata.project.clone().unwrap_or_default(),
        id: InstanceId(instance.metadata.id),
        generation,
        step,
    });
}

/// Copies between nodes that are at work in this process.
impl Moves {
    /// Ends the task of an instance; true while it is still there.
    pub fn cancel(&self, id: InstanceId) -> bool {
        lock(&self.0).get(&id).inspect(|token| token.cancel()).is_some()
    }
    /// Whether a task is at work.
    pub fn is_sending(&self, id: InstanceId) -> bool {
        lock(&self.0).contains_key(&id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use oblak_model::{InstanceSpec, MigrationStatus, Placement, Resources, Size, Timestamp};
    use uuid::Uuid;

    fn node(n: u128) -> NodeId {
        NodeId(Uuid::from_u128(n))
    }

    /// From node 1 to node 2.
    fn moving(placed: u128, generation: u64, phase: MigrationPhase) -> Instance {
        let mut i = Instance::new("db", InstanceSpec::default());
        i.status.placement = Some(Placement {
            node: node(placed),
            node_name: String::new(),
            resources: Resources::default(),
            at: Timestamp::EPOCH,
            why: String::new(),
            generation: 1,
            fenced: false,
            fence_turn: 0,
        });
        i.status.migration = Some(MigrationStatus {
            generation,
            phase,
            live: true,
            from: node(1),
            from_name: String::new(),
            to: node(2),
            to_name: String::new(),
            resources: Resources::default(),
            address: None,
            total: Size::ZERO,
            remaining: Size::ZERO,
            downtime_ms: None,
            arrived: false,
            left: false,
            reason: String::new(),
            message: String::new(),
            started_at: Timestamp::EPOCH,
            ended_at: None,
        });
        i
    }

    fn mark(role: Role, generation: u64) -> Option<Mark> {
        Some(Mark { generation, role, downtime_ms: None })
    }

    #[test]
    fn the_source_runs_on_only_when_it_read_that_it_may() {
        use MigrationPhase as P;
        let source = |placed, phase, mark, sending| decide(&moving(placed, 3, phase), node(1), mark, sending);
        assert_eq!(source(1, P::Preparing, None, false), Step::Live);
        assert_eq!(source(1, P::Ready, None, false), Step::Send);
        assert_eq!(source(1, P::Copying, None, true), Step::Wait);
        assert_eq!(source(1, P::Copying, None, false), Step::GiveUp, "an earlier agent was at work");
        let handed_over = mark(Role::HandedOver, 3);
        assert_eq!(source(1, P::Copying, handed_over, false), Step::HandOverAgain);
        assert_eq!(source(1, P::Ready, handed_over, false), Step::HandOverAgain);
        for phase in [P::Failed, P::Cancelled] {
            assert_eq!(source(1, phase, handed_over, false), Step::Stay);
        }
        assert_eq!(source(2, P::Finishing, handed_over, false), Step::Leave);
        // News from before the migration, or none at all: it stands still.
        assert_eq!(decide(&moving(1, 2, P::Failed), node(1), handed_over, false), Step::Wait);
        let mut old = moving(1, 3, P::Ready);
        old.status.migration = None;
        assert_eq!(decide(&old, node(1), handed_over, false), Step::Wait);
        // Cancelled under a task that is at work.
        assert_eq!(source(1, P::Cancelled, None, true), Step::Stay);
        assert_eq!(source(1, P::Cancelled, None, false), Step::Live);
    }

    #[test]
    fn the_target_runs_only_what_is_placed_there() {
        use MigrationPhase as P;
        let target = |placed, phase, mark| decide(&moving(placed, 3, phase), node(2), mark, false);
        assert_eq!(target(1, P::Preparing, None), Step::Prepare);
        assert_eq!(target(1, P::Preparing, mark(Role::Target, 2)), Step::Forget, "left from an earlier try");
        for phase in [P::Ready, P::Copying] {
            assert_eq!(target(1, phase, mark(Role::Target, 3)), Step::Wait);
        }
        assert_eq!(target(2, P::Finishing, mark(Role::Target, 3)), Step::Arrive);
        assert_eq!(target(1, P::Cancelled, mark(Role::Target, 3)), Step::Forget);
        for phase in [P::Ready, P::Copying, P::Failed] {
            assert_eq!(target(2, phase, mark(Role::Target, 3)), Step::Forget, "placed here because node 1 was lost");
        }
        assert_eq!(target(2, P::Finishing, None), Step::Live);
        assert_eq!(target(2, P::Done, None), Step::Live);
    }
}
