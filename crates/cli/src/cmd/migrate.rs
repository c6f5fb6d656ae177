//! `migrate`, `node drain`.

use std::ops::ControlFlow;

use futures_util::StreamExt;
use oblak_model::{Instance, InstanceKind, Isolation, MigrationPhase, MigrationStatus, NodeKind, Phase, Span};
use serde_json::json;

use super::{list, patch_spec};
use crate::args::{DrainArgs, MigrateArgs};
use crate::error::{CliError, Result};
use crate::session::Session;
use crate::wait::{Progress, Step, deleted, took, until};

/// `migrate`.
pub async fn migrate(session: &Session, args: &MigrateArgs) -> Result<()> {
    let name = &args.name;
    if args.cancel {
        return cancel(session, args).await;
    }
    let instance = session.get::<InstanceKind>(name).await?;
    let patch = wish(&instance, args.to.as_deref().unwrap_or_default(), args.live);
    let asked = patch_spec::<InstanceKind>(session, name, patch).await?;
    if args.no_wait {
        return session.out.done(&asked, &format!("{name}: move asked for"));
    }
    let mut progress = Progress::new(session.out);
    let outcome = follow(session, &asked, args.timeout, |text| progress.say(&format!("{name} moving"), text)).await;
    let time = progress.end();
    let (now, migration) = outcome?;
    session.out.done(&now, &format!("{name} is on {} after {}{}", migration.to_name, took(time), still(&migration)))
}

/// How long the guest stood still.
fn still(migration: &MigrationStatus) -> String {
    migration.downtime_ms.map(|ms| format!(", stood still for {ms} ms")).unwrap_or_default()
}

fn generation(instance: &Instance) -> u64 {
    instance.spec.migration.as_ref().map_or(0, |m| m.generation)
}

fn wish(instance: &Instance, to: &str, live: bool) -> serde_json::Value {
    json!({"migration": {"to": to, "live": live, "cancel": false, "generation": generation(instance) + 1}})
}

async fn cancel(session: &Session, args: &MigrateArgs) -> Result<()> {
    let name = &args.name;
    let asked = patch_spec::<InstanceKind>(session, name, json!({"migration": {"cancel": true}})).await?;
    if args.no_wait {
        return session.out.done(&asked, &format!("{name}: the end of its move asked for"));
    }
    let what = format!("the end of the move of {name}");
    let now = until::<InstanceKind, Instance>(session, asked.metadata.id, &what, args.timeout, |now| {
        let Some(now) = now else { return deleted("instance", name) };
        if now.status.is_moving() { ControlFlow::Continue(()) } else { ControlFlow::Break(Ok(now.clone())) }
    })
    .await?;
    match &now.status.migration {
        Some(m) if m.phase == MigrationPhase::Done => Err(CliError::new(
            format!("{name} is on {} already: it was too late to stop that", m.to_name),
            format!("`oblak migrate {name} --to {}` moves it back", m.from_name),
        )),
        _ => session.out.done(&now, &format!("{name} stays where it is")),
    }
}

/// One line about how far a move is.
fn telling(migration: &MigrationStatus) -> String {
    let to = format!("to {}: {}", migration.to_name, migration.phase);
    if migration.phase == MigrationPhase::Copying && migration.total.0 > 0 {
        return format!("{to}, {} of {} left", migration.remaining, migration.total);
    }
    to
}

/// Waits until a move is over.
async fn follow(
    session: &Session,
    asked: &Instance,
    limit: Span,
    mut say: impl FnMut(&str),
) -> Result<(Instance, MigrationStatus)> {
    let (name, wanted) = (asked.metadata.name.clone(), generation(asked));
    let step = |now: Option<&Instance>| -> Step<(Instance, MigrationStatus)> {
        let Some(now) = now else { return deleted("instance", &name) };
        let Some(migration) = now.status.migration.as_ref().filter(|m| m.generation >= wanted) else {
            return ControlFlow::Continue(());
        };
        say(&telling(migration));
        match migration.phase {
            MigrationPhase::Done => ControlFlow::Break(Ok((now.clone(), migration.clone()))),
            phase if phase.stayed() => ControlFlow::Break(Err(CliError::new(
                format!("{name} stays on {}: {}", migration.from_name, migration.message),
                format!("`oblak describe instance/{name}` says more"),
            ))),
            _ => ControlFlow::Continue(()),
        }
    };
    until::<InstanceKind, _>(session, asked.metadata.id, &format!("the move of {name}"), limit, step).await
}

/// Why an instance cannot be moved, as far as can be seen from here.
fn obstacle(instance: &Instance) -> Option<String> {
    if instance.status.is_moving() {
        return Some("it is moving already".into());
    }
    if !instance.status.resolved.volumes.is_empty() {
        return Some("it has volumes, whose bytes are on the node".into());
    }
    if !instance.spec.pool.is_empty() {
        return Some(format!("its root disk is in pool {}", instance.spec.pool));
    }
    let machine = instance.status.resolved.isolation != Isolation::Container;
    if machine && !matches!(instance.status.phase, Phase::Running | Phase::Paused) {
        return Some(format!("it is {}: a machine moves only while it runs", instance.status.phase));
    }
    None
}

fn title(instance: &Instance) -> String {
    format!("{}/{}", instance.scope_key(), instance.metadata.name)
}

fn is_live(instance: &Instance) -> bool {
    instance.status.resolved.isolation != Isolation::Container
}

/// `node drain`.
pub async fn drain(session: &Session, args: &DrainArgs) -> Result<()> {
    let node = session.get::<NodeKind>(&args.name).await?;
    let all = list::all_projects::<InstanceKind>(session, None, "").await?;
    let here = |i: &Instance| {
        i.status.placement.as_ref().is_some_and(|p| p.node.0 == node.metadata.id) && !i.metadata.is_deleting()
    };
    let mut moves: Vec<Instance> = all.items.into_iter().filter(here).collect();
    moves.sort_by_key(title);
    if args.plan {
        for instance in &moves {
            let how = match obstacle(instance) {
                Some(why) => format!("cannot be moved: {why}"),
                None if is_live(instance) => "moves while it runs".into(),
                None => "is stopped, moved and started".into(),
            };
            session.out.data(&format!("{}  {how}\n", title(instance)))?;
        }
        return Ok(());
    }
    let node = patch_spec::<NodeKind>(session, &args.name, json!({"schedulable": false})).await?;
    let count = moves.len();
    let moved = futures_util::stream::iter(moves.into_iter().enumerate().map(|(n, instance)| async move {
        let outcome = away(session, &instance, args.timeout).await;
        match &outcome {
            Ok(text) => session.out.note(&format!("[{}/{count}] {text}", n + 1)),
            Err(error) => {
                session.out.note(&format!("[{}/{count}] {} stays: {}", n + 1, title(&instance), error.message));
            }
        }
        outcome.err().map(|error| format!("{} ({})", title(&instance), error.message))
    }))
    .buffer_unordered(args.parallel.into())
    .collect::<Vec<_>>()
    .await;
    let rest: Vec<String> = moved.into_iter().flatten().collect();
    if rest.is_empty() {
        return session.out.done(&node, &format!("{} takes no new instances and has none", node.describe()));
    }
    Err(CliError::new(
        format!("{} takes no new instances now; still there: {}", node.describe(), rest.join("; ")),
        format!("remove what holds them and drain again, or `oblak node uncordon {}`", args.name),
    ))
}

/// Moves one instance to wherever it fits.
async fn away(session: &Session, instance: &Instance, limit: Span) -> Result<String> {
    if let Some(why) = obstacle(instance) {
        return Err(CliError::new(why, ""));
    }
    let patch = json!({"spec": wish(instance, "", is_live(instance))});
    let project = instance.scope_key();
    let asked = session.client.patch::<InstanceKind>(project, &instance.metadata.name, &patch, None).await?;
    let mut there = session.clone();
    there.project = project.into();
    let (_, migration) = follow(&there, &asked, limit, |_| {}).await?;
    Ok(format!("{} is on {}{}", title(instance), migration.to_name, still(&migration)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use oblak_model::{InstanceSpec, VolumeId};

    #[test]
    fn what_cannot_move_is_said_beforehand() {
        let mut web = Instance::new("web", InstanceSpec::default());
        web.status.resolved.isolation = Isolation::Vm;
        web.status.phase = Phase::Running;
        assert_eq!(obstacle(&web), None);
        web.status.phase = Phase::Stopped;
        assert!(obstacle(&web).unwrap().contains("is stopped"));
        web.status.resolved.isolation = Isolation::Container;
        assert_eq!(obstacle(&web), None);
        web.status.resolved.volumes.push(VolumeId::default());
        assert!(obstacle(&web).unwrap().contains("volumes"));
    }
}
