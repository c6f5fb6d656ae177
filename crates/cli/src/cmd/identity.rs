//! `key`, `flavor`, `project`, `user`, `token`.

use oblak_model::{
    Flavor, FlavorKind, FlavorSpec, Grant, KeyKind, Project, ProjectKind, ProjectSpec, Timestamp, Token, TokenKind,
    TokenSpec, User, UserKind, UserSpec,
};
use serde_json::json;

use super::object::{AT_ONCE, delete_all};
use super::{check, create, launch, list, patch_spec};
use crate::args::{
    FlavorCommand, KeyCommand, ProjectCommand, TokenCommand, TokenCreateArgs, UserCommand, UserCreateArgs,
};
use crate::error::{CliError, Result};
use crate::session::Session;
use crate::show::word;
use crate::table::now;
use crate::term;

/// `key ...`
pub async fn key(session: &Session, command: KeyCommand) -> Result<()> {
    match command {
        KeyCommand::Create(args) => {
            let path = if args.file == std::path::Path::new("-") { "/dev/stdin".into() } else { args.file };
            let key = launch::register(session, &path, args.name.as_deref(), args.labels.labels).await?;
            session.out.done(&key, &format!("{} is registered", key.describe()))
        }
        KeyCommand::List(args) => list::kind::<KeyKind>(session, args.label.as_ref()).await,
        KeyCommand::Delete(args) => delete_all::<KeyKind>(session, &args.names, AT_ONCE).await,
    }
}

/// `flavor ...`
pub async fn flavor(session: &Session, command: FlavorCommand) -> Result<()> {
    match command {
        FlavorCommand::Create(args) => {
            let spec = FlavorSpec {
                vcpus: args.vcpus,
                memory: args.memory,
                disk: args.disk,
                price_per_hour_micros: args.price_per_hour,
                ..FlavorSpec::default()
            };
            create::<FlavorKind>(session, Flavor::new(&args.name, spec), args.labels.labels).await.map(drop)
        }
        FlavorCommand::List(args) => list::kind::<FlavorKind>(session, args.label.as_ref()).await,
        FlavorCommand::Delete(args) => delete_all::<FlavorKind>(session, &args.names, AT_ONCE).await,
    }
}

/// `project ...`
pub async fn project(session: &Session, command: ProjectCommand) -> Result<()> {
    match command {
        ProjectCommand::Create(args) => {
            let spec = ProjectSpec { description: args.description, ..ProjectSpec::default() };
            create::<ProjectKind>(session, Project::new(&args.name, spec), args.labels.labels).await?;
            session.out.note(&format!("work in it with -p {0}, or with OBLAK_PROJECT={0}", args.name));
            Ok(())
        }
        ProjectCommand::List(args) => list::kind::<ProjectKind>(session, args.label.as_ref()).await,
        ProjectCommand::Delete(args) => delete_all::<ProjectKind>(session, &args.names, AT_ONCE).await,
        ProjectCommand::Grant(args) => {
            let role = args.role.into();
            let grant = Grant { user: args.user.clone(), role };
            let made = edit(session, &args.project_name, |grants| {
                grants.retain(|g| g.user != grant.user);
                grants.push(grant.clone());
            })
            .await?;
            session.out.done(&made, &format!("{} is {} of {}", args.user, word(role), made.describe()))
        }
        ProjectCommand::Revoke { project_name, user } => {
            let made = edit(session, &project_name, |grants| grants.retain(|g| g.user != user)).await?;
            session.out.done(&made, &format!("{user} has no role in {}", made.describe()))
        }
    }
}

async fn edit(session: &Session, project: &str, mut change: impl FnMut(&mut Vec<Grant>)) -> Result<Project> {
    let edited = session
        .client
        .update::<ProjectKind>(&session.project, project, |p| {
            change(&mut p.spec.grants);
            Ok(())
        })
        .await;
    match edited {
        Ok(project) => Ok(project),
        Err(error) => Err(session.explain_missing::<ProjectKind>(project, error).await),
    }
}

/// `user ...`
pub async fn user(session: &Session, command: UserCommand) -> Result<()> {
    match command {
        UserCommand::Create(args) => make_user(session, args).await,
        UserCommand::List(args) => list::kind::<UserKind>(session, args.label.as_ref()).await,
        UserCommand::Delete(args) => delete_all::<UserKind>(session, &args.names, AT_ONCE).await,
        UserCommand::Password { name, password_stdin } => {
            let password = new_password(&name, password_stdin)?;
            let user = patch_spec::<UserKind>(session, &name, json!({"password": password})).await?;
            session.out.done(&user, &format!("{} has a new password", user.describe()))
        }
    }
}

async fn make_user(session: &Session, args: UserCreateArgs) -> Result<()> {
    let password = if args.no_password { None } else { Some(new_password(&args.name, args.password_stdin)?) };
    let spec = UserSpec {
        full_name: args.full_name,
        email: args.email,
        cloud_admin: args.cloud_admin,
        disabled: false,
        password,
    };
    create::<UserKind>(session, User::new(&args.name, spec), args.labels.labels).await.map(drop)
}

/// Asked for twice on a terminal, since it cannot be seen.
fn new_password(user: &str, from_stdin: bool) -> Result<String> {
    let password = term::secret(&format!("new password of {user}"), from_stdin)?;
    if !from_stdin && term::secret("once more", false)? != password {
        return Err(CliError::new("the two passwords differ", "try again"));
    }
    Ok(password)
}

/// `token ...`
pub async fn token(session: &Session, command: TokenCommand) -> Result<()> {
    match command {
        TokenCommand::Create(args) => make_token(session, args).await,
        TokenCommand::List(args) => list::kind::<TokenKind>(session, args.label.as_ref()).await,
        TokenCommand::Delete(args) => delete_all::<TokenKind>(session, &args.names, AT_ONCE).await,
    }
}

async fn make_token(session: &Session, args: TokenCreateArgs) -> Result<()> {
    let random = || format!("token-{}", &uuid::Uuid::new_v4().simple().to_string()[..8]);
    let name = args.name.unwrap_or_else(random);
    let expires_at = args.expires_in.map(|span| {
        let micros = i64::try_from(span.0.as_micros()).unwrap_or(i64::MAX);
        Timestamp::from_micros(now().as_micros().saturating_add(micros))
    });
    let spec = TokenSpec { user: args.user, description: args.description, expires_at };
    let mut token = Token::new(&name, spec);
    token.metadata.labels.extend(args.labels.labels);
    check(&token)?;
    let made = session.client.create::<TokenKind>(&session.project, &token).await?;
    if session.out.machine() {
        return session.out.object(&made);
    }
    session.out.note(&format!("{} created; its secret is not shown again:", made.describe()));
    let secret = made.status.secret.ok_or_else(|| {
        CliError::new("the server sent no secret", format!("`oblak token delete {name}` and try again"))
    })?;
    session.out.data(&format!("{secret}\n"))
}
