//! What the two nodes of a migration report, checked against which of them may say it.

use oblak_control::lifecycle::{Switch, give_up, switch};
use oblak_model::{
    ApiError, Instance, InstanceId, InstanceKind, MigrationPhase, MigrationStep, NodeId, NodeKind, PortKind,
};

use crate::docs::BY_INSTANCE;
use crate::draft::Draft;

/// Longest reason and message that are kept, in bytes.
const TEXT: usize = 512;

type Refusal = Option<String>;

fn cut(text: &str) -> String {
    let end = (0..=TEXT.min(text.len())).rev().find(|at| text.is_char_boundary(*at)).unwrap_or(0);
    text[..end].to_string()
}

/// Adds one report to the change.
pub(super) fn apply(
    draft: &mut Draft,
    node: NodeId,
    project: &str,
    id: InstanceId,
    generation: u64,
    step: &MigrationStep,
) -> Result<Refusal, ApiError> {
    let refuse = |why: &str| Ok(Some(why.to_string()));
    let Some(old) = draft.get::<InstanceKind>(project, id.0)? else { return refuse("gone") };
    let Some(migration) = old.status.migration.clone().filter(|m| m.generation == generation) else {
        return refuse("there is no such migration");
    };
    let (source, target) = (node == migration.from, node == migration.to);
    let open = migration.phase.is_open();
    let mut new = old.clone();
    let Some(status) = new.status.migration.as_mut() else { return refuse("gone") };
    match step {
        MigrationStep::Prepared { address } if target && migration.phase == MigrationPhase::Preparing => {
            status.phase = MigrationPhase::Ready;
            status.address = Some(*address);
        }
        MigrationStep::Progress { total, remaining }
            if source && matches!(migration.phase, MigrationPhase::Ready | MigrationPhase::Copying) =>
        {
            status.phase = MigrationPhase::Copying;
            (status.total, status.remaining) = (*total, *remaining);
        }
        MigrationStep::HandOver { downtime_ms } if source && open && migration.phase != MigrationPhase::Preparing => {
            return hand_over(draft, &old, *downtime_ms);
        }
        MigrationStep::Failed { reason, message } if (source || target) && open => {
            let allocation = draft.allocation(migration.to)?;
            let ops = give_up(&mut new, MigrationPhase::Failed, &cut(reason), &cut(message), draft.now, allocation);
            draft.batch.absorb(ops);
        }
        MigrationStep::Arrived {} if target && migration.phase == MigrationPhase::Finishing => status.arrived = true,
        MigrationStep::Left {} if source && migration.phase == MigrationPhase::Finishing => status.left = true,
        _ => return refuse("the migration is past that"),
    }
    if let Some(status) = new.status.migration.as_mut()
        && status.phase == MigrationPhase::Finishing
        && status.arrived
        && status.left
    {
        status.phase = MigrationPhase::Done;
        status.ended_at = Some(draft.now);
    }
    if new != old {
        draft.update(&new);
    }
    Ok(None)
}

/// The instance becomes the target's.
fn hand_over(draft: &mut Draft, instance: &Instance, downtime_ms: Option<u64>) -> Result<Refusal, ApiError> {
    let Some(migration) = instance.status.open_migration() else { return Ok(Some("it is decided already".into())) };
    if instance.metadata.is_deleting() {
        return Ok(Some("the instance is being deleted".into()));
    }
    let Some(to) = draft.get::<NodeKind>("_", migration.to.0)? else {
        return Ok(Some("the target is gone".into()));
    };
    let id = InstanceId(instance.metadata.id);
    let mut ports = draft.indexed::<PortKind>(BY_INSTANCE, &format!("port/{}", id.0), instance.scope_key())?;
    ports.retain(|port| port.spec.instance == id);
    let parts = Switch {
        instance,
        to: &to,
        ports: &ports,
        from_allocation: draft.allocation(migration.from)?,
        to_allocation: draft.allocation(migration.to)?,
        downtime_ms,
        at: draft.now,
    };
    match switch(&parts) {
        Some(ops) => {
            draft.batch.absorb(ops);
            Ok(None)
        }
        None => Ok(Some("there is nothing to switch".into())),
    }
}
