//! `stop`, `start`, `restart`, `pause`, `resume`, `resize`.

use std::ops::ControlFlow;

use oblak_model::{FlavorKind, Instance, InstanceKind, Phase, Power};
use serde_json::{Value, json};

use super::launch::why;
use super::{each, patch_spec};
use crate::args::{PowerArgs, ResizeArgs, WaitArgs};
use crate::error::{CliError, NOT_FOUND, Result};
use crate::session::Session;
use crate::wait::{Progress, Step, deleted, say_instance, took, until};

/// What to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    Stop,
    Start,
    Restart,
    Pause,
    Resume,
}

impl Change {
    fn noun(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Start => "start",
            Self::Restart => "restart",
            Self::Pause => "pause",
            Self::Resume => "resumption",
        }
    }

    /// The patch that asks for it, from what is asked for and observed now.
    fn patch(self, now: &Instance) -> Result<Value> {
        let name = &now.metadata.name;
        let again = json!({"power": "running", "restart_generation": now.spec.restart_generation + 1});
        // Ended by itself although it should run: only another generation starts it.
        let ended = now.spec.power == Power::Running && matches!(now.status.phase, Phase::Stopped | Phase::Failed);
        let refuse = |hint: String| {
            let text =
                format!("{name} is {}, it cannot be {}d", now.status.phase, self.noun().trim_end_matches("ption"));
            Err(CliError::new(text.replace("resumd", "resumed"), hint))
        };
        Ok(match self {
            Self::Pause | Self::Resume if now.spec.power == Power::Stopped || ended => {
                return refuse(format!("`oblak start {name}` starts it"));
            }
            Self::Start if ended => again,
            Self::Restart => again,
            Self::Stop => json!({"power": "stopped"}),
            Self::Pause => json!({"power": "paused"}),
            Self::Start | Self::Resume => json!({"power": "running"}),
        })
    }

    /// Whether it is carried out.
    fn done(self, asked: &Instance, now: &Instance) -> bool {
        let phase = now.status.phase;
        let observed = &now.status.observed;
        // A report about an older spec says nothing about what was asked for.
        let fresh = observed.generation >= asked.metadata.generation;
        let restarted = observed.restart_generation >= asked.spec.restart_generation;
        match self {
            Self::Stop => phase == Phase::Stopped || (phase == Phase::Pending && now.status.placement.is_none()),
            Self::Start | Self::Restart => fresh && restarted && phase == Phase::Running,
            Self::Resume => fresh && phase == Phase::Running,
            Self::Pause => phase == Phase::Paused,
        }
    }
}

/// Changes the power of instances.
pub async fn run(session: &Session, change: Change, args: &PowerArgs) -> Result<()> {
    each(session, &args.names, |name| async move { one(session, change, &name, args.wait).await }).await
}

async fn one(session: &Session, change: Change, name: &str, wait: WaitArgs) -> Result<()> {
    let before = session.get::<InstanceKind>(name).await?;
    let asked = patch_spec::<InstanceKind>(session, name, change.patch(&before)?).await?;
    if wait.no_wait {
        return session.out.done(&asked, &format!("{name}: {} asked for", change.noun()));
    }
    let mut progress = Progress::new(session.out);
    let result = until::<InstanceKind, Instance>(
        session,
        asked.metadata.id,
        &format!("the {} of {name}", change.noun()),
        wait.timeout,
        |now| {
            let Some(now) = now else { return deleted("instance", name) };
            say_instance(&mut progress, now);
            step(change, &asked, now)
        },
    )
    .await;
    let time = progress.end();
    let now = result?;
    session.out.done(&now, &format!("{name} is {} after {}", now.status.phase, took(time)))
}

fn step(change: Change, asked: &Instance, now: &Instance) -> Step<Instance> {
    let name = &now.metadata.name;
    if change.done(asked, now) {
        return ControlFlow::Break(Ok(now.clone()));
    }
    // A failure only counts when the node has seen what was asked for, not one of before.
    let fresh = now.status.observed.generation >= asked.metadata.generation;
    let failed = now.status.phase == Phase::Failed && change != Change::Stop;
    let restarted = now.status.observed.restart_generation >= asked.spec.restart_generation;
    if fresh && failed && restarted {
        return ControlFlow::Break(Err(CliError::new(
            format!("the {} of {name} failed: {}", change.noun(), why(now)),
            format!("`oblak logs {name}` and `oblak describe instance/{name}` say more"),
        )));
    }
    if now.metadata.is_deleting() {
        return deleted("instance", name);
    }
    // A running guest that refuses says so as the reason of its phase.
    let refused = ["Unsupported", "NotSupported"].contains(&now.status.reason.as_str());
    if fresh && restarted && refused {
        return ControlFlow::Break(Err(CliError::new(
            format!("the {} of {name} is not possible: {}", change.noun(), now.status.message),
            format!("`oblak describe instance/{name}` says more"),
        )));
    }
    ControlFlow::Continue(())
}

/// `resize`.
pub async fn resize(session: &Session, args: &ResizeArgs) -> Result<()> {
    let name = &args.name;
    let before = session.get::<InstanceKind>(name).await?;
    let patch = json!({"spec": {"flavor": args.flavor}});
    let asked = match session.client.patch::<InstanceKind>(&session.project, name, &patch, None).await {
        Ok(asked) => asked,
        Err(error) => {
            let error = CliError::from(error);
            return Err(match session.suggest::<FlavorKind>(&args.flavor).await {
                Some(hint) => error.with_hint(hint).with_code(NOT_FOUND),
                None => error,
            });
        }
    };
    if args.wait.no_wait {
        return session.out.done(&asked, &format!("{name}: resize to {} asked for", args.flavor));
    }
    let mut progress = Progress::new(session.out);
    let what = format!("the resize of {name}");
    let result = until::<InstanceKind, Instance>(session, asked.metadata.id, &what, args.wait.timeout, |now| {
        let Some(now) = now else { return deleted("instance", name) };
        say_instance(&mut progress, now);
        resized(&asked, now)
    })
    .await;
    let time = progress.end();
    let now = result?;
    let how = if now.status.observed.run > before.status.observed.run { ", it was restarted for that" } else { "" };
    let r = now.status.resolved.resources;
    let size = format!("{} vCPUs, {} memory, {} disk", r.vcpus, r.memory, r.disk);
    session.out.done(&now, &format!("{name} is now {} ({size}) after {}{how}", args.flavor, took(time)))
}

fn resized(asked: &Instance, now: &Instance) -> Step<Instance> {
    let observed = &now.status.observed;
    if observed.generation < asked.metadata.generation && now.status.placement.is_some() {
        return ControlFlow::Continue(());
    }
    let wanted = now.status.resolved.resources;
    let in_force = observed.resources.is_none_or(|r| (r.vcpus, r.memory) == (wanted.vcpus, wanted.memory));
    // What is off takes its new size when it starts.
    let settled = matches!(now.status.phase, Phase::Running | Phase::Paused) && in_force;
    let off = now.spec.power == Power::Stopped && now.status.phase == Phase::Stopped;
    if settled || off || now.status.placement.is_none() {
        return ControlFlow::Break(Ok(now.clone()));
    }
    if now.status.phase == Phase::Failed {
        return ControlFlow::Break(Err(CliError::new(
            format!("{} failed: {}", now.metadata.name, why(now)),
            "`oblak logs` says more; another --flavor can be tried",
        )));
    }
    ControlFlow::Continue(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use oblak_model::InstanceSpec;

    fn instance(power: Power, phase: Phase) -> Instance {
        let mut i = Instance::new("web", InstanceSpec { image: "tiny".into(), power, ..InstanceSpec::default() });
        i.metadata.generation = 3;
        i.status.phase = phase;
        i.status.observed.generation = 3;
        i
    }

    #[test]
    fn patches() {
        let running = instance(Power::Running, Phase::Running);
        assert_eq!(Change::Stop.patch(&running).unwrap(), json!({"power": "stopped"}));
        assert_eq!(Change::Pause.patch(&running).unwrap(), json!({"power": "paused"}));
        let again = json!({"power": "running", "restart_generation": 1});
        assert_eq!(Change::Restart.patch(&running).unwrap(), again);
        assert_eq!(Change::Start.patch(&running).unwrap(), json!({"power": "running"}));
        // Ended by itself: asking for `running` again would change nothing.
        assert_eq!(Change::Start.patch(&instance(Power::Running, Phase::Failed)).unwrap(), again);
    }

    #[test]
    fn what_is_off_is_not_resumed() {
        let off = instance(Power::Stopped, Phase::Stopped);
        let error = Change::Resume.patch(&off).unwrap_err();
        assert_eq!(error.message, "web is stopped, it cannot be resumed");
        assert_eq!(error.hint, "`oblak start web` starts it");
        assert_eq!(Change::Pause.patch(&off).unwrap_err().message, "web is stopped, it cannot be paused");
    }

    #[test]
    fn reports_of_before_do_not_count() {
        let mut asked = instance(Power::Running, Phase::Running);
        asked.spec.restart_generation = 2;
        let mut now = asked.clone();
        now.status.observed.restart_generation = 1;
        assert!(step(Change::Restart, &asked, &now).is_continue());
        now.status.observed.restart_generation = 2;
        assert!(matches!(step(Change::Restart, &asked, &now), ControlFlow::Break(Ok(_))));
        now.status.observed.generation = 2;
        assert!(step(Change::Restart, &asked, &now).is_continue());
        now.status.phase = Phase::Failed;
        assert!(step(Change::Restart, &asked, &now).is_continue());
        now.status.observed.generation = 3;
        assert!(matches!(step(Change::Restart, &asked, &now), ControlFlow::Break(Err(_))));
    }

    #[test]
    fn an_old_refusal_is_not_one_of_the_restart() {
        let mut asked = instance(Power::Running, Phase::Running);
        asked.spec.restart_generation = 2;
        let mut now = asked.clone();
        now.status.reason = "Unsupported".into();
        now.status.message = "containers take volumes when they start".into();
        now.status.observed.restart_generation = 1;
        for phase in [Phase::Running, Phase::Stopping, Phase::Stopped, Phase::Failed] {
            now.status.phase = phase;
            assert!(step(Change::Restart, &asked, &now).is_continue(), "{phase}");
        }
        // A refused pause is one.
        now.status.phase = Phase::Running;
        now.status.observed.restart_generation = 2;
        assert!(matches!(step(Change::Pause, &asked, &now), ControlFlow::Break(Err(_))));
    }
}
