//! `get` and `delete` of any kind.

use std::ops::ControlFlow;

use oblak_client::ClientError;
use oblak_model::selector::Selector;
use oblak_model::{Code, List};

use super::{each, list};
use crate::args::{DeleteArgs, GetArgs, WaitArgs};
use crate::error::{CliError, Result};
use crate::kinds::{self, Visit};
use crate::session::Session;
use crate::show::{Names, Show, table};
use crate::wait::{Progress, until};

/// `get`.
pub async fn get(session: &Session, args: &GetArgs) -> Result<()> {
    if let Some((kind, name)) = args.what.split_once('/') {
        let mut names = vec![name.to_string()];
        for more in &args.names {
            match more.split_once('/') {
                Some((other, name)) if other == kind => names.push(name.to_string()),
                _ => return Err(CliError::usage(format!("{more:?} is not {kind}/NAME"), "get one kind at a time")),
            }
        }
        return kinds::visit(kind, Get { session, names: &names }).await;
    }
    if args.names.is_empty() {
        return kinds::visit(&args.what, All { session, label: args.label.as_ref() }).await.map_err(|error| {
            // Elsewhere a plain name means an instance.
            let meant = !kinds::is_kind(&args.what) && error.hint.starts_with("use one of");
            let hint = format!("an instance of that name is instance/{}; or {}", args.what, error.hint);
            if meant { error.with_hint(hint) } else { error }
        });
    }
    kinds::visit(&args.what, Get { session, names: &args.names }).await
}

struct All<'a> {
    session: &'a Session,
    label: Option<&'a Selector>,
}

impl Visit for All<'_> {
    type Out = ();
    async fn visit<K: Show>(self) -> Result<()> {
        list::kind::<K>(self.session, self.label).await
    }
}

struct Get<'a> {
    session: &'a Session,
    names: &'a [String],
}

impl Visit for Get<'_> {
    type Out = ();
    async fn visit<K: Show>(self) -> Result<()> {
        some::<K>(self.session, self.names).await
    }
}

/// Prints objects by name: one as an object, several as a list.
pub async fn some<K: Show>(session: &Session, names: &[String]) -> Result<()> {
    let mut items = Vec::new();
    for name in names {
        items.push(session.get::<K>(name).await?);
    }
    if session.out.machine() {
        if let [one] = items.as_slice() {
            return session.out.object(one);
        }
        let revision = items.iter().map(|o| o.metadata.revision).max().unwrap_or_default();
        return session.out.list(&List { items, revision, next: None });
    }
    let names = if K::NAMES { Names::load(session).await } else { Names::default() };
    session.out.data(&table(&items, &names, session.out.wide()).render(session.out.color))
}

/// `delete`.
pub async fn delete(session: &Session, args: &DeleteArgs) -> Result<()> {
    if args.names.len() == 2 && !args.names[0].contains('/') && kinds::is_kind(&args.names[0]) {
        // Not `KIND NAME`: deleting an instance called `volume` by accident would be worse than asking.
        let [kind, name] = [&args.names[0], &args.names[1]];
        return Err(CliError::usage(
            format!("is {kind:?} a kind or an instance?"),
            format!("write {kind}/{name}, or instance/{kind} instance/{name}"),
        ));
    }
    each(session, &args.names, |what| async move {
        let (kind, name) = kinds::split(&what, None)?;
        kinds::visit(&kind, Delete { session, name, wait: args.wait }).await
    })
    .await
}

struct Delete<'a> {
    session: &'a Session,
    name: String,
    wait: WaitArgs,
}

impl Visit for Delete<'_> {
    type Out = ();
    async fn visit<K: Show>(self) -> Result<()> {
        one::<K>(self.session, &self.name, self.wait).await
    }
}

/// Deletes several objects of one kind.
pub async fn delete_all<K: Show>(session: &Session, names: &[String], wait: WaitArgs) -> Result<()> {
    each(session, names, |name| async move { one::<K>(session, &name, wait).await }).await
}

/// Waiting for kinds that go away at once costs nothing.
pub const AT_ONCE: WaitArgs = WaitArgs { wait: true, no_wait: false, timeout: oblak_model::Span::secs(300) };

async fn one<K: Show>(session: &Session, name: &str, wait: WaitArgs) -> Result<()> {
    let object = session.get::<K>(name).await?;
    if let Some(owner) = object.metadata.project.as_ref().filter(|owner| **owner != session.project) {
        return Err(CliError::new(
            format!("{} belongs to project {owner}, which offers it to everybody", object.describe()),
            format!("it can be deleted there: `oblak -p {owner} delete {}`", object.describe()),
        ));
    }
    let id = object.metadata.id;
    // By id: a new object that takes the name meanwhile is not meant.
    match session.client.delete::<K>(&session.project, &id.to_string()).await {
        Ok(()) => {}
        Err(ClientError::Api(e)) if e.code == Code::NotFound => {}
        Err(error) => return Err(error.into()),
    }
    let what = object.describe();
    if wait.no_wait {
        session.out.note(&format!("{what} is being deleted"));
        return Ok(());
    }
    let mut progress = Progress::new(session.out);
    let gone = until::<K, ()>(session, id, &format!("the deletion of {what}"), wait.timeout, |now| {
        if now.is_none() {
            return ControlFlow::Break(Ok(()));
        }
        progress.say(&format!("{what} is being deleted"), "");
        ControlFlow::Continue(())
    })
    .await;
    progress.end();
    gone?;
    session.out.note(&format!("{what} deleted"));
    Ok(())
}
