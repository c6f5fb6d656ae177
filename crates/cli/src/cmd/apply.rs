//! `apply`: many resources, all or nothing.

use std::io::Read;
use std::ops::ControlFlow;
use std::path::Path;

use oblak_client::ClientError;
use oblak_model::wire::{Action, Applied, Apply, Change, FieldChange, Resource};
use oblak_model::{ImageKind, InstanceKind, Power, Span, Volume, VolumeKind, VolumePhase};
use tokio::time::Instant;

use super::{documents, image, launch};
use crate::args::ApplyArgs;
use crate::error::{CliError, DOES_NOT_FIT, Result, TIMEOUT};
use crate::session::Session;
use crate::show::price;
use crate::table::{Table, one_line};
use crate::wait::{Progress, deleted, until};

/// Longest value that is shown of a change.
const VALUE: usize = 60;

/// `apply`.
pub async fn apply(session: &Session, args: &ApplyArgs) -> Result<u8> {
    let mut resources = Vec::new();
    for file in &args.files {
        let text = read(file)?;
        let name = if file == Path::new("-") { "standard input".into() } else { file.display().to_string() };
        resources.extend(documents::read(&name, &text).await?);
    }
    if resources.is_empty() {
        return Err(CliError::usage("there is nothing to apply", "give a file with at least one resource"));
    }
    twice(&resources)?;
    let applied = session.client.apply(&session.project, &Apply { resources }, args.plan).await.map_err(refused)?;
    if session.out.machine() {
        session.out.value(&applied)?;
    } else {
        session.out.data(&text(&applied, session.out.color))?;
        session.out.note(&summary(&applied, args.plan));
    }
    if args.wait {
        wait(session, &applied, args.timeout).await?;
    }
    let no_room = applied.changes.iter().any(|c| c.explanation.as_ref().is_some_and(|e| e.fitting == 0));
    Ok(if args.plan && no_room { DOES_NOT_FIT } else { 0 })
}

/// The number of a resource means nothing to the author of a file; its name is in the message.
fn refused(error: ClientError) -> CliError {
    let field = match &error {
        ClientError::Api(problem) => problem.field.clone().unwrap_or_default(),
        _ => String::new(),
    };
    let inside = field.strip_prefix("/resources/").and_then(|rest| rest.split_once('/'));
    let error = CliError::from(error);
    match inside {
        Some((_, path)) if error.hint.contains(&field) => {
            error.with_hint(format!("correct {} and try again", path.replace('/', ".")))
        }
        _ => error,
    }
}

fn read(file: &Path) -> Result<String> {
    let mut text = String::new();
    let limit = documents::LIMIT + 1;
    let read = if file == Path::new("-") {
        std::io::stdin().take(limit).read_to_string(&mut text)
    } else {
        std::fs::File::open(file).and_then(|f| f.take(limit).read_to_string(&mut text))
    };
    read.map_err(|e| CliError::file(file, "read", &e))?;
    if text.len() as u64 > documents::LIMIT {
        return Err(CliError::usage(format!("{} is larger than 8 MiB", file.display()), "split it"));
    }
    Ok(text)
}

/// The same resource in two places is a mistake that only one of them would survive.
fn twice(resources: &[Resource]) -> Result<()> {
    for (i, one) in resources.iter().enumerate() {
        if resources[..i].iter().any(|o| (&o.kind, &o.metadata.name) == (&one.kind, &one.metadata.name)) {
            let what = format!("{}/{} is described twice", one.kind, one.metadata.name);
            return Err(CliError::usage(what, "remove or rename one of them"));
        }
    }
    Ok(())
}

fn verb(action: Action) -> &'static str {
    match action {
        Action::Create => "create",
        Action::Update => "change",
        Action::Unchanged => "unchanged",
    }
}

fn text(applied: &Applied, color: bool) -> String {
    let mut table = Table::new(&["ACTION", "RESOURCE", "NODE", "WHY"]);
    for change in &applied.changes {
        let why = change.explanation.as_ref().map(ToString::to_string).or_else(|| change.why.clone());
        table.row(vec![
            verb(change.action).into(),
            format!("{}/{}", change.kind, change.name),
            change.node.clone().unwrap_or_default(),
            why.unwrap_or_default(),
        ]);
    }
    let mut lines = table.render(color);
    for change in applied.changes.iter().filter(|c| c.action == Action::Update) {
        lines.push_str(&fields(change));
    }
    lines
}

/// The fields that differ, old and new.
fn fields(change: &Change) -> String {
    let value = |v: &Option<serde_json::Value>| match v {
        None => "nothing".to_string(),
        Some(v) => {
            let text = one_line(&v.to_string());
            if text.chars().count() > VALUE { text.chars().take(VALUE).collect::<String>() + "..." } else { text }
        }
    };
    let line = |f: &FieldChange| format!("  {}: {} -> {}\n", f.field, value(&f.old), value(&f.new));
    let all: String = change.fields.iter().map(line).collect();
    if all.is_empty() { all } else { format!("\n{}/{}:\n{all}", change.kind, change.name) }
}

fn summary(applied: &Applied, plan: bool) -> String {
    let count = |action: Action| applied.changes.iter().filter(|c| c.action == action).count();
    let (new, changed, same) = (count(Action::Create), count(Action::Update), count(Action::Unchanged));
    let cost = match applied.price_per_hour_micros {
        0 => String::new(),
        micros => format!(", {} per hour", price(micros)),
    };
    if plan {
        return format!("plan: {new} to create, {changed} to change, {same} unchanged{cost}; nothing was done");
    }
    format!("{new} created, {changed} changed, {same} unchanged{cost}")
}

/// Waits until all is as described, within one time for everything.
async fn wait(session: &Session, applied: &Applied, limit: Span) -> Result<()> {
    let deadline = Instant::now() + limit.0;
    for change in &applied.changes {
        let rest = Span(deadline.saturating_duration_since(Instant::now()));
        if rest.0.is_zero() {
            return Err(CliError::new(
                format!("not everything was ready within {limit}"),
                "it goes on without us: `oblak list` shows how far it is",
            )
            .with_code(TIMEOUT));
        }
        match change.kind.as_str() {
            "instance" => {
                let instance = session.get::<InstanceKind>(&change.name).await?;
                if instance.spec.power == Power::Running {
                    launch::wait_running(session, &instance, rest).await?;
                }
            }
            "image" => {
                let object = session.get::<ImageKind>(&change.name).await?;
                if !object.spec.on_demand || object.status.wanted {
                    image::wait(session, &object, rest).await?;
                }
            }
            "volume" => {
                let object = session.get::<VolumeKind>(&change.name).await?;
                volume(session, &object, rest).await?;
            }
            _ => {}
        }
    }
    Ok(())
}

async fn volume(session: &Session, volume: &Volume, limit: Span) -> Result<()> {
    let name = &volume.metadata.name;
    let mut progress = Progress::new(session.out);
    let result = until::<VolumeKind, ()>(session, volume.metadata.id, &format!("making volume {name}"), limit, |now| {
        let Some(now) = now else { return deleted("volume", name) };
        progress.say(&format!("volume {name} is being made"), &now.status.message);
        match now.status.phase {
            VolumePhase::Available | VolumePhase::InUse => ControlFlow::Break(Ok(())),
            // With several nodes it is made with the first instance that uses it.
            VolumePhase::Pending if now.status.node.is_none() => ControlFlow::Break(Ok(())),
            VolumePhase::Failed => ControlFlow::Break(Err(CliError::new(
                format!("volume {name} failed: {}", now.status.message),
                "remove the cause and apply again",
            ))),
            VolumePhase::Deleting => deleted("volume", name),
            VolumePhase::Pending => ControlFlow::Continue(()),
        }
    })
    .await;
    progress.end();
    result
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn change(kind: &str, name: &str, action: Action) -> Change {
        Change {
            kind: kind.into(),
            name: name.into(),
            action,
            fields: Vec::new(),
            node: None,
            why: None,
            explanation: None,
        }
    }

    #[test]
    fn plans_are_tables() {
        let mut web = change("instance", "web", Action::Create);
        web.node = Some("n1".into());
        web.why = Some("the only node that fits".into());
        let mut job = change("instance", "job", Action::Update);
        job.fields = vec![FieldChange { field: "/spec/flavor".into(), old: Some(json!("s")), new: Some(json!("m")) }];
        let applied = Applied {
            changes: vec![change("volume", "data", Action::Unchanged), web, job],
            committed: false,
            revision: oblak_model::Revision::new(1, 2),
            price_per_hour_micros: 1_500_000,
        };
        assert_eq!(
            text(&applied, false),
            "ACTION     RESOURCE      NODE  WHY\n\
             unchanged  volume/data   -     -\n\
             create     instance/web  n1    the only node that fits\n\
             change     instance/job  -     -\n\
             \ninstance/job:\n  /spec/flavor: \"s\" -> \"m\"\n"
        );
        assert_eq!(
            summary(&applied, true),
            "plan: 1 to create, 1 to change, 1 unchanged, 1.5 per hour; nothing was done"
        );
    }

    #[test]
    fn nothing_is_described_twice() {
        let one = Resource {
            kind: "volume".into(),
            metadata: oblak_model::wire::ResourceMeta { name: "data".into(), ..Default::default() },
            spec: json!({}),
            status: None,
        };
        assert_eq!(twice(&[one.clone(), one]).unwrap_err().message, "volume/data is described twice");
    }
}
