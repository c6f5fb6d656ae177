//! `snapshot`, `restore`, `snapshots`.

use std::ops::ControlFlow;

use oblak_client::ListOptions;
use oblak_model::{Instance, InstanceKind, Isolation, Phase, Snapshot, SnapshotKind, SnapshotPhase, SnapshotSpec};
use serde_json::json;

use super::launch::why;
use super::{check, patch_spec};
use crate::args::{RestoreArgs, SnapshotArgs, SnapshotsArgs};
use crate::error::{CliError, Result};
use crate::session::Session;
use crate::show::word;
use crate::wait::{Progress, Step, deleted, say_instance, took, until};

/// `snapshot`.
pub async fn snapshot(session: &Session, args: &SnapshotArgs) -> Result<()> {
    let instance = session.get::<InstanceKind>(&args.instance).await?;
    let runs = matches!(instance.status.phase, Phase::Running | Phase::Paused);
    let machine = instance.status.resolved.isolation != Isolation::Container;
    let memory = args.memory || (!args.no_memory && runs && machine);
    let spec = SnapshotSpec { instance: Some(args.instance.clone()), volume: None, memory };
    let asked = Snapshot::new(&args.name, spec);
    check(&asked)?;
    let made = session.client.create::<SnapshotKind>(&session.project, &asked).await?;
    if args.wait.no_wait {
        return session.out.done(&made, &format!("{} asked for", made.describe()));
    }
    let mut progress = Progress::new(session.out);
    let what = format!("the snapshot {}", args.name);
    let result = until::<SnapshotKind, Snapshot>(session, made.metadata.id, &what, args.wait.timeout, |now| {
        let Some(now) = now else { return deleted("snapshot", &args.name) };
        progress.say(&format!("{} {}", now.describe(), word(now.status.phase)), &now.status.message);
        match now.status.phase {
            SnapshotPhase::Ready => ControlFlow::Break(Ok(now.clone())),
            SnapshotPhase::Failed => ControlFlow::Break(Err(CliError::new(
                format!("the snapshot failed: {}", now.status.message),
                format!("`oblak delete snapshot/{}` removes what is left; then try again", args.name),
            ))),
            SnapshotPhase::Deleting => deleted("snapshot", &args.name),
            SnapshotPhase::Pending => ControlFlow::Continue(()),
        }
    })
    .await;
    let time = progress.end();
    let done = result?;
    let with = if done.status.has_memory { "disk and memory" } else { "disk" };
    let text =
        format!("{} of {} taken ({with}, {}) after {}", done.describe(), args.instance, done.status.size, took(time));
    session.out.done(&done, &text)
}

/// `restore`.
pub async fn restore(session: &Session, args: &RestoreArgs) -> Result<()> {
    let name = &args.instance;
    let before = session.get::<InstanceKind>(name).await?;
    session.get::<SnapshotKind>(&args.snapshot).await?;
    let generation = before.spec.restore.as_ref().map_or(0, |r| r.generation) + 1;
    let patch = json!({"restore": {"snapshot": args.snapshot, "generation": generation}});
    let asked = patch_spec::<InstanceKind>(session, name, patch).await?;
    if args.wait.no_wait {
        return session.out.done(&asked, &format!("{name}: going back to {} asked for", args.snapshot));
    }
    let mut progress = Progress::new(session.out);
    let what = format!("going back to {}", args.snapshot);
    let result = until::<InstanceKind, Instance>(session, asked.metadata.id, &what, args.wait.timeout, |now| {
        let Some(now) = now else { return deleted("instance", name) };
        say_instance(&mut progress, now);
        restored(&asked, now, generation)
    })
    .await;
    let time = progress.end();
    let now = result?;
    let text = format!("{name} is back at {} and {} after {}", args.snapshot, now.status.phase, took(time));
    session.out.done(&now, &text)
}

fn restored(asked: &Instance, now: &Instance, generation: u64) -> Step<Instance> {
    let status = &now.status;
    let fresh = status.observed.generation >= asked.metadata.generation;
    let settled = matches!(status.phase, Phase::Running | Phase::Paused | Phase::Stopped);
    if fresh && settled && status.observed.restore_generation >= generation {
        return ControlFlow::Break(Ok(now.clone()));
    }
    if now.metadata.is_deleting() {
        return deleted("instance", &now.metadata.name);
    }
    if fresh && status.phase == Phase::Failed {
        return ControlFlow::Break(Err(CliError::new(
            format!("{} could not go back: {}", now.metadata.name, why(now)),
            format!("`oblak describe instance/{}` says more", now.metadata.name),
        )));
    }
    ControlFlow::Continue(())
}

/// `snapshots`.
pub async fn list(session: &Session, args: &SnapshotsArgs) -> Result<()> {
    let mut options = ListOptions::default();
    if let Some(name) = &args.instance {
        let instance = session.get::<InstanceKind>(name).await?;
        options.fields.push(format!("status.instance={}", instance.metadata.id));
    }
    let list = session.client.list_all::<SnapshotKind>(&session.project, &options).await?;
    super::list::print(session, &list).await
}
