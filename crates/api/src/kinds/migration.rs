//! Whether a migration may be asked for: everything that can be known before it begins.

use oblak_control::lifecycle::give_up;
use oblak_model::{
    ApiError, Code, Instance, InstanceId, InstanceKind, Isolation, Kind, MigrationPhase, Node, NodeKind, NodePhase,
    Phase, SnapshotKind,
};

use crate::draft::Draft;

fn wrong(text: String) -> ApiError {
    ApiError::new(Code::WrongState, text)
}

fn unsupported(text: String) -> ApiError {
    ApiError::new(Code::Unsupported, text)
}

/// While an instance moves, its spec stays: two nodes work from it. Only giving up is accepted.
pub(super) fn keep_still(old: &Instance, new: &Instance) -> Result<(), ApiError> {
    let Some(migration) = old.status.migration.as_ref().filter(|m| !m.phase.is_over()) else { return Ok(()) };
    let mut same = new.spec.clone();
    same.migration.clone_from(&old.spec.migration);
    let cancels = matches!((&old.spec.migration, &new.spec.migration),
        (Some(old), Some(new)) if new.cancel && *new == oblak_model::Migrate { cancel: true, ..old.clone() });
    if same == old.spec && (cancels || new.spec.migration == old.spec.migration) {
        if cancels && migration.phase == MigrationPhase::Finishing {
            return Err(wrong(format!("{} is on {} already", old.describe(), migration.to_name)).at("/spec/migration"));
        }
        return Ok(());
    }
    Err(wrong(format!(
        "{} is moving to {}; wait, or stop that with `oblak migrate {} --cancel`",
        old.describe(),
        migration.to_name,
        old.metadata.name
    )))
}

/// Checks a migration that is asked for.
pub(super) fn ask(draft: &mut Draft, old: &Instance, new: &Instance) -> Result<(), ApiError> {
    let Some(asked) = &new.spec.migration else { return Ok(()) };
    let last = old.spec.migration.as_ref().map_or(0, |m| m.generation);
    if asked.generation == last {
        let only_cancel = old
            .spec
            .migration
            .as_ref()
            .is_some_and(|m| asked.cancel && *asked == oblak_model::Migrate { cancel: true, ..m.clone() });
        let nothing = || wrong(format!("{} is not moving", old.describe())).at("/spec/migration/cancel");
        let same = old.spec.migration.as_ref() == Some(asked);
        return if same || (only_cancel && old.status.is_moving()) { Ok(()) } else { Err(nothing()) };
    }
    if asked.generation != last + 1 {
        return Err(ApiError::invalid("/spec/migration/generation", format!("must be {}", last + 1)));
    }
    if asked.cancel {
        return Err(ApiError::invalid("/spec/migration/cancel", "is for a migration that has begun"));
    }
    let Some(placement) = &old.status.placement else {
        return Err(wrong(format!("{} has no node yet", old.describe())));
    };
    let from = draft.get::<NodeKind>("_", placement.node.0)?;
    let from = from.ok_or_else(|| wrong(format!("node {} of {} is gone", placement.node_name, old.describe())))?;
    reachable(&from)?;
    movable(draft, old, asked.live)?;
    if asked.live {
        runs(old)?;
    }
    if asked.to.is_empty() {
        return Ok(());
    }
    let to = draft.need::<NodeKind>("_", &asked.to, "/spec/migration/to")?;
    let at_to = |e: ApiError| e.at("/spec/migration/to");
    if to.metadata.name != asked.to {
        return Err(at_to(ApiError::new(Code::Invalid, format!("must be the name of the node, {}", to.metadata.name))));
    }
    if placement.node.0 == to.metadata.id {
        return Err(at_to(wrong(format!("{} is on {} already", old.describe(), asked.to))));
    }
    open(&to).and_then(|()| reachable(&to)).map_err(at_to)?;
    if asked.live {
        same_machine(old, &from, &to)?;
    }
    Ok(())
}

fn open(node: &Node) -> Result<(), ApiError> {
    if node.metadata.is_deleting() || !node.spec.schedulable {
        let name = &node.metadata.name;
        return Err(wrong(format!("node {name} takes no instances; `oblak node uncordon {name}` changes that")));
    }
    Ok(())
}

fn reachable(node: &Node) -> Result<(), ApiError> {
    let name = &node.metadata.name;
    if node.status.phase != NodePhase::Ready {
        return Err(ApiError::new(Code::NodeUnreachable, format!("node {name} cannot be reached")));
    }
    if node.status.facts.underlay.is_none() {
        return Err(unsupported(format!(
            "node {name} has no underlay address, so no other node can reach it; start its agent with --underlay"
        )));
    }
    Ok(())
}

fn movable(draft: &Draft, instance: &Instance, live: bool) -> Result<(), ApiError> {
    let name = instance.describe();
    if !instance.status.resolved.volumes.is_empty() {
        return Err(unsupported(format!(
            "{name} has volumes, whose bytes are on its node; detach them first (they stay there)"
        ))
        .at("/spec/volumes"));
    }
    if !instance.spec.pool.is_empty() {
        return Err(unsupported(format!(
            "{name} has its root disk in pool {}; moving such a disk from hand to hand is not supported, `ha` starts it elsewhere",
            instance.spec.pool
        ))
        .at("/spec/pool"));
    }
    let id = InstanceId(instance.metadata.id);
    let snapshots = draft.list::<SnapshotKind>(Some(instance.scope_key()))?;
    if let Some(snapshot) = snapshots.iter().find(|s| s.status.instance == Some(id)) {
        return Err(ApiError::new(
            Code::InUse,
            format!("{name} has snapshot {}, which lies beside its disk; delete it first", snapshot.metadata.name),
        ));
    }
    if !live && instance.status.resolved.isolation != Isolation::Container {
        return Err(unsupported(format!("{name} is a machine, which moves only while it runs; add --live"))
            .at("/spec/migration/live"));
    }
    Ok(())
}

fn runs(instance: &Instance) -> Result<(), ApiError> {
    let (name, isolation) = (instance.describe(), instance.status.resolved.isolation);
    let at = |e: ApiError| e.at("/spec/migration/live");
    if isolation != Isolation::Vm {
        return Err(at(unsupported(format!("a {isolation} moves by a stop and a start; leave --live away"))));
    }
    if !matches!(instance.status.phase, Phase::Running | Phase::Paused) {
        return Err(at(wrong(format!("{name} is {}; only what runs can move while it runs", instance.status.phase))));
    }
    Ok(())
}

fn same_machine(instance: &Instance, from: &Node, to: &Node) -> Result<(), ApiError> {
    let name = instance.describe();
    let at = |e: ApiError| e.at("/spec/migration/live");
    let (a, b) = (&from.status.facts, &to.status.facts);
    let differs = |what: &str, a: &str, b: &str| {
        at(unsupported(format!(
            "{name} would not find the same machine: {what} {a:?} on {}, {b:?} on {}",
            from.metadata.name, to.metadata.name
        )))
    };
    if a.accelerator != b.accelerator {
        return Err(differs("the accelerator is", &a.accelerator, &b.accelerator));
    }
    if a.accelerator == "kvm" && a.cpu_model != b.cpu_model {
        return Err(differs("the CPU is", &a.cpu_model, &b.cpu_model));
    }
    Ok(())
}

/// A deletion ends a migration that is not decided, in its own commit.
pub(super) fn overtake(draft: &mut Draft, instance: &mut Instance) -> Result<(), ApiError> {
    let Some(to) = instance.status.open_migration().map(|m| m.to) else { return Ok(()) };
    let allocation = draft.allocation(to)?;
    let text = format!("{} is deleted", InstanceKind::KIND);
    let ops = give_up(instance, MigrationPhase::Cancelled, "Deleting", &text, draft.now, allocation);
    draft.batch.absorb(ops);
    Ok(())
}
