//! `volume ...`

use std::ops::ControlFlow;

use oblak_model::{
    Instance, InstanceKind, Phase, Power, Size, Volume, VolumeAttachment, VolumeId, VolumeKind, VolumePhase, VolumeSpec,
};
use serde_json::json;

use super::{create, list, object, patch_spec};
use crate::args::{AttachArgs, DetachArgs, GrowArgs, VolumeCommand, VolumeCreateArgs};
use crate::error::{CliError, Result, USAGE};
use crate::session::Session;
use crate::show::word;
use crate::wait::{Progress, deleted, say_instance, until};

/// `volume ...`
pub async fn run(session: &Session, command: VolumeCommand) -> Result<()> {
    match command {
        VolumeCommand::Create(args) => make(session, args).await,
        VolumeCommand::List(args) => list::kind::<VolumeKind>(session, args.label.as_ref()).await,
        VolumeCommand::Attach(args) => attach(session, &args).await,
        VolumeCommand::Detach(args) => detach(session, &args).await,
        VolumeCommand::Grow(args) => grow(session, &args).await,
        VolumeCommand::Delete(args) => object::delete_all::<VolumeKind>(session, &args.names, args.wait).await,
    }
}

async fn make(session: &Session, args: VolumeCreateArgs) -> Result<()> {
    let spec = VolumeSpec {
        size: args.size,
        format: args.format.into(),
        pool: args.pool,
        from_volume: args.from_volume,
        from_snapshot: args.from_snapshot,
    };
    create::<VolumeKind>(session, Volume::new(&args.name, spec), args.labels.labels).await.map(drop)
}

/// What `update` does with an instance's volumes: read, change, write, again when somebody else was faster.
async fn change(
    session: &Session,
    instance: &str,
    mut edit: impl FnMut(&mut Vec<VolumeAttachment>),
) -> Result<Instance> {
    let changed = session
        .client
        .update::<InstanceKind>(&session.project, instance, |object| {
            edit(&mut object.spec.volumes);
            Ok(())
        })
        .await;
    match changed {
        Ok(instance) => Ok(instance),
        Err(error) => Err(session.explain_missing::<InstanceKind>(instance, error).await),
    }
}

async fn attach(session: &Session, args: &AttachArgs) -> Result<()> {
    let volume = session.get::<VolumeKind>(&args.volume).await?;
    let name = volume.metadata.name.clone();
    let new = VolumeAttachment { volume: name.clone(), read_only: args.read_only, mount: args.mount.clone() };
    let asked = change(session, &args.instance, |volumes| {
        if let Some(old) = volumes.iter_mut().find(|v| v.volume == name) {
            old.clone_from(&new);
        } else {
            volumes.push(new.clone());
        }
    })
    .await
    .map_err(|error| where_to(&args.instance, error))?;
    if args.wait.no_wait {
        return session.out.done(&asked, &format!("attaching {name} to {} asked for", args.instance));
    }
    let mut progress = Progress::new(session.out);
    let what = format!("attaching {name} to {}", args.instance);
    let id = VolumeId(volume.metadata.id);
    let result = until::<InstanceKind, Instance>(session, asked.metadata.id, &what, args.wait.timeout, |now| {
        let Some(now) = now else { return deleted("instance", &args.instance) };
        say_instance(&mut progress, now);
        match plugged(&asked, now, id) {
            Some(true) => ControlFlow::Break(Ok(now.clone())),
            Some(false) => ControlFlow::Break(Err(refusal(
                &what,
                now,
                &format!("the wish is kept until then; `oblak volume detach {name}` takes it back"),
            ))),
            None => ControlFlow::Continue(()),
        }
    })
    .await;
    progress.end();
    let now = result?;
    let off = now.spec.power == Power::Stopped || now.status.placement.is_none();
    let when = if off { " and plugged in when it starts" } else { "" };
    session.out.done(&now, &format!("{name} is attached to {}{when}", args.instance))
}

/// Containers see a volume at a place that only the person knows.
fn where_to(instance: &str, error: CliError) -> CliError {
    if !error.message.contains("/mount: must say") {
        return error;
    }
    let message = format!("{instance} is a container: it must be said where it sees the volume");
    CliError { message, ..error }.with_hint("give --mount PATH, for example --mount /data")
}

/// Whether the volume is plugged in, cannot be, or is not yet.
fn plugged(asked: &Instance, now: &Instance, volume: VolumeId) -> Option<bool> {
    let observed = &now.status.observed;
    // What does not run has nothing to plug into; the volume is its own from now on.
    let off = now.spec.power == Power::Stopped && matches!(now.status.phase, Phase::Stopped | Phase::Pending);
    if observed.volumes.contains(&volume) || off || now.status.placement.is_none() {
        return Some(true);
    }
    let fresh = observed.generation >= asked.metadata.generation;
    (fresh && blocked(now)).then_some(false)
}

/// Whether the node says that something cannot be done, as a reason beside its state, and not only that it waits.
fn blocked(now: &Instance) -> bool {
    let status = &now.status;
    let waits = status.reason.is_empty() || status.reason.starts_with("WaitingFor");
    match status.phase {
        Phase::Failed => true,
        Phase::Running | Phase::Paused => !waits && !status.message.is_empty(),
        _ => false,
    }
}

fn refusal(what: &str, now: &Instance, hint: &str) -> CliError {
    CliError::new(format!("{what} is not possible: {}", super::launch::why(now)), hint)
}

async fn detach(session: &Session, args: &DetachArgs) -> Result<()> {
    let volume = session.get::<VolumeKind>(&args.volume).await?;
    let name = volume.metadata.name.clone();
    let holder = match (&args.instance, volume.status.attached_to) {
        (Some(instance), _) => session.get::<InstanceKind>(instance).await?,
        (None, Some(id)) => session.get::<InstanceKind>(&id.to_string()).await?,
        (None, None) => {
            return Err(CliError::new(format!("{name} is not attached"), "`oblak volume list` shows which are"));
        }
    };
    let instance = holder.metadata.name.clone();
    if volume.status.attached_to.is_none_or(|id| id.0 != holder.metadata.id) {
        return Err(CliError::new(
            format!("{name} is not attached to {instance}"),
            "`oblak volume list` shows where it is",
        )
        .with_code(USAGE));
    }
    let asked = change(session, &instance, |volumes| volumes.retain(|v| v.volume != name)).await?;
    if args.wait.no_wait {
        return session.out.done(&asked, &format!("detaching {name} from {instance} asked for"));
    }
    let what = format!("detaching {name} from {instance}");
    let mut progress = Progress::new(session.out);
    let held = holder.metadata.id;
    let (project, client) = (&session.project, &session.client);
    let waiting = until::<VolumeKind, Volume>(session, volume.metadata.id, &what, args.wait.timeout, |now| {
        let Some(now) = now else { return deleted("volume", &name) };
        progress.say(&format!("volume {name} {}", word(now.status.phase)), &now.status.message);
        match now.status.attached_to {
            Some(id) if id.0 == held => ControlFlow::Continue(()),
            _ => ControlFlow::Break(Ok(now.clone())),
        }
    })
    .await;
    progress.end();
    match waiting {
        Ok(now) => session.out.done(&now, &format!("{name} is detached from {instance}")),
        Err(mut error) => {
            // The guest has a say in this: why it keeps the volume is noted on the instance.
            if let Ok(now) = client.get::<InstanceKind>(project, &instance).await
                && !now.status.message.is_empty()
            {
                error.message = format!("{}: {}", error.message, super::launch::why(&now));
            }
            Err(error.with_hint(format!("unmount it inside {instance}, or stop {instance}; then it is let go")))
        }
    }
}

async fn grow(session: &Session, args: &GrowArgs) -> Result<()> {
    let before = session.get::<VolumeKind>(&args.name).await?;
    let size = new_size(before.spec.size, &args.size)?;
    let asked = patch_spec::<VolumeKind>(session, &args.name, json!({"size": size})).await?;
    if args.wait.no_wait {
        return session.out.done(&asked, &format!("growing {} to {size} asked for", args.name));
    }
    let mut progress = Progress::new(session.out);
    let what = format!("growing {}", args.name);
    let result = until::<VolumeKind, Volume>(session, asked.metadata.id, &what, args.wait.timeout, |now| {
        let Some(now) = now else { return deleted("volume", &args.name) };
        progress.say(&format!("volume {} {}", args.name, word(now.status.phase)), &now.status.message);
        if now.status.observed_generation >= asked.metadata.generation && now.status.phase == VolumePhase::Failed {
            return ControlFlow::Break(Err(CliError::new(
                format!("{what} failed: {}", now.status.message),
                "make room on the node, or stop the instance that uses it",
            )));
        }
        // Not made anywhere yet: it will be made in its new size.
        if now.status.size >= size || now.status.node.is_none() {
            return ControlFlow::Break(Ok(now.clone()));
        }
        ControlFlow::Continue(())
    })
    .await;
    progress.end();
    let now = result?;
    session.out.done(&now, &format!("{} has {size} now; grow the file system inside as well", args.name))
}

/// `2GiB` is the size, `+1GiB` is that much more.
fn new_size(old: Size, text: &str) -> Result<Size> {
    let (more, number) = text.strip_prefix('+').map_or((false, text), |rest| (true, rest));
    let size: Size = number.parse().map_err(|e: oblak_model::size::ParseSizeError| {
        CliError::usage(e.to_string(), "write --size 2GiB, or --size +1GiB")
    })?;
    Ok(if more { old + size } else { size })
}

#[cfg(test)]
mod tests {
    use super::*;
    use oblak_model::{InstanceSpec, NodeId, Placement, Resources, Timestamp};

    #[test]
    fn sizes() {
        assert_eq!(new_size(Size::gib(1), "2GiB").unwrap(), Size::gib(2));
        assert_eq!(new_size(Size::gib(1), "+2GiB").unwrap(), Size::gib(3));
        assert_eq!(new_size(Size::gib(1), "much").unwrap_err().code, USAGE);
    }

    #[test]
    fn plugging() {
        let volume = VolumeId(uuid::Uuid::now_v7());
        let mut asked = Instance::new("web", InstanceSpec::default());
        asked.metadata.generation = 2;
        asked.status.phase = Phase::Running;
        asked.status.placement = Some(Placement {
            node: NodeId::default(),
            node_name: "n1".into(),
            resources: Resources::default(),
            at: Timestamp::EPOCH,
            why: String::new(),
            generation: 1,
            fenced: false,
            fence_turn: 1,
        });
        let mut now = asked.clone();
        assert_eq!(plugged(&asked, &now, volume), None);
        now.status.reason = "NoFreeSlot".into();
        now.status.message = "the machine has no free slot".into();
        assert_eq!(plugged(&asked, &now, volume), None, "an old report");
        now.status.observed.generation = 2;
        assert_eq!(plugged(&asked, &now, volume), Some(false));
        now.status.reason = "WaitingForVolume".into();
        assert_eq!(plugged(&asked, &now, volume), None);
        now.status.observed.volumes = vec![volume];
        assert_eq!(plugged(&asked, &now, volume), Some(true));
        let mut off = asked.clone();
        off.spec.power = Power::Stopped;
        off.status.phase = Phase::Stopped;
        assert_eq!(plugged(&asked, &off, volume), Some(true));
    }
}
