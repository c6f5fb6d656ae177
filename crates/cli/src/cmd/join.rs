//! `join-token ...`

use oblak_model::{JoinToken, JoinTokenKind, JoinTokenSpec};

use super::object::{AT_ONCE, delete_all};
use super::{check, list};
use crate::args::{JoinTokenCommand, JoinTokenCreateArgs};
use crate::error::{CliError, Result};
use crate::session::Session;

/// `join-token ...`
pub async fn run(session: &Session, command: JoinTokenCommand) -> Result<()> {
    match command {
        JoinTokenCommand::Create(args) => create(session, args).await,
        JoinTokenCommand::List(args) => list::kind::<JoinTokenKind>(session, args.label.as_ref()).await,
        JoinTokenCommand::Delete(args) => delete_all::<JoinTokenKind>(session, &args.names, AT_ONCE).await,
    }
}

async fn create(session: &Session, args: JoinTokenCreateArgs) -> Result<()> {
    let random = || format!("join-{}", &uuid::Uuid::new_v4().simple().to_string()[..8]);
    let name = args.name.unwrap_or_else(random);
    let spec = JoinTokenSpec { role: args.role.into(), ttl: args.ttl, description: args.description };
    let token = JoinToken::new(&name, spec);
    check(&token)?;
    let made = session.client.create::<JoinTokenKind>(&session.project, &token).await?;
    if session.out.machine() {
        return session.out.object(&made);
    }
    let secret = made.status.secret.as_ref().ok_or_else(|| {
        CliError::new("the server sent no secret", format!("`oblak join-token delete {name}` and try again"))
    })?;
    session.out.note(&format!(
        "{} works once, until {}. On the new machine: oblak join {} --token TOKEN",
        made.describe(),
        made.status.expires_at,
        session.client.server()
    ));
    session.out.data(&format!("{secret}\n"))
}
