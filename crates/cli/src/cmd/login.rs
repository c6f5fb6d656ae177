//! `login` and `context ...`

use oblak_client::{Auth, Client, ClientConfig, ClientError};
use oblak_model::{Code, DEFAULT_PROJECT};
use serde_json::json;

use crate::args::{ContextCommand, Global, LoginArgs};
use crate::context::{self, Context, Contexts, Person};
use crate::error::{CliError, Result};
use crate::out::Out;
use crate::session::{contexts, unknown_context};
use crate::table::Table;
use crate::term;

/// `login`.
pub async fn login(global: &Global, out: Out, args: &LoginArgs) -> Result<()> {
    let all = contexts()?;
    let server = global.server.clone().or_else(|| all.contexts.get(&all.current).map(|c| c.server.clone()));
    let server = server.ok_or_else(|| {
        CliError::usage("which server?", "name it with --server https://HOST:7443 and its authority with --ca FILE")
    })?;
    let server = server.trim_end_matches('/').to_string();
    let ca_pem = authority(args, &server, &all)?;
    let client = Client::new(&ClientConfig::new(&server, &ca_pem, Auth::None))?;
    // A server that is not there is said before a password is asked for.
    client.version().await.map_err(|error| untrusted(error, &server))?;
    let password = term::secret(&format!("password of {} at {server}", args.user), args.password_stdin)?;
    let logged = client.login(&args.user, &password).await.map_err(|error| match error.code() {
        Some(Code::Unauthenticated) => {
            CliError::from(error).with_hint("check user and password; `oblak up` printed those of admin")
        }
        _ => error.into(),
    })?;
    let project = global.project.clone().unwrap_or_else(|| DEFAULT_PROJECT.into());
    let name = global.context.clone().unwrap_or_else(|| context_name(&server, &all));
    let expires = logged.expires_at;
    let servers = servers(&server, &ca_pem, &logged.token).await;
    let learnt_at = crate::session::now();
    let context = Context { server: server.clone(), servers, learnt_at, ca_pem, token: logged.token, project };
    let file = context::default_file();
    context::put(&file, &name, context, owner()).map_err(|e| CliError::file(&file, "write the context to", &e))?;
    if out.machine() {
        return out.value(&json!({"context": name, "server": server, "user": logged.user, "expires_at": expires}));
    }
    out.note(&format!("logged in as {} at {server} until {expires}; context {name:?} is in use", logged.user));
    Ok(())
}

/// The servers of the cloud; none when there is only one. Those of an older version do not tell.
async fn servers(server: &str, ca_pem: &str, token: &str) -> Vec<String> {
    let Ok(client) = Client::new(&ClientConfig::new(server, ca_pem, Auth::Bearer(token.into()))) else {
        return Vec::new();
    };
    let found = client.learn_servers().await.unwrap_or_default();
    if found.len() > 1 { found } else { Vec::new() }
}

/// Certificate authority: the file that was given, else that of a context with the same server.
fn authority(args: &LoginArgs, server: &str, all: &Contexts) -> Result<String> {
    if let Some(path) = &args.ca {
        if path.to_string_lossy().contains("-----BEGIN") {
            return Ok(path.to_string_lossy().into_owned());
        }
        return std::fs::read_to_string(path).map_err(|e| CliError::file(path, "read the certificate in", &e));
    }
    let known = all.contexts.values().find(|c| c.server.trim_end_matches('/') == server);
    known.map(|c| c.ca_pem.clone()).ok_or_else(|| {
        CliError::usage(
            format!("the certificate authority of {server} is not known"),
            "copy pki/ca.pem from the data directory of the server and give it with --ca FILE",
        )
    })
}

fn untrusted(error: ClientError, server: &str) -> CliError {
    let text = error.to_string();
    let error = CliError::from(error);
    if text.contains("certificate") || text.contains("UnknownIssuer") {
        return error.with_hint(format!(
            "--ca is not the authority of {server}; copy pki/ca.pem from its data directory again"
        ));
    }
    error
}

/// The name of the context that has this server already, else its host.
fn context_name(server: &str, all: &Contexts) -> String {
    if let Some((name, _)) = all.contexts.iter().find(|(_, c)| c.server.trim_end_matches('/') == server) {
        return name.clone();
    }
    let host = server.trim_start_matches("https://");
    let host = host.rsplit_once(':').map_or(host, |(h, _)| h);
    host.trim_matches(['[', ']']).to_string()
}

fn owner() -> Option<(u32, u32)> {
    if std::env::var_os("OBLAK_CONFIG").is_some() { None } else { Person::behind_this().owner }
}

/// `context ...`
pub fn context(out: Out, command: &ContextCommand) -> Result<()> {
    let mut all = contexts()?;
    match command {
        ContextCommand::List => list(out, &all),
        ContextCommand::Use { name } => {
            if !all.contexts.contains_key(name) {
                return Err(unknown_context(name, &all));
            }
            all.current.clone_from(name);
            save(&all)?;
            out.note(&format!("context {name:?} is in use"));
            Ok(())
        }
        ContextCommand::Delete { name } => {
            if all.contexts.remove(name).is_none() {
                return Err(unknown_context(name, &all));
            }
            if all.current == *name {
                all.current.clear();
            }
            save(&all)?;
            out.note(&format!("context {name:?} is forgotten"));
            Ok(())
        }
    }
}

fn save(all: &Contexts) -> Result<()> {
    let file = context::default_file();
    context::save(&file, all, owner()).map_err(|e| CliError::file(&file, "write the contexts to", &e))
}

fn list(out: Out, all: &Contexts) -> Result<()> {
    if out.machine() {
        let items: Vec<_> = all
            .contexts
            .iter()
            .map(|(name, c)| json!({"name": name, "server": c.server, "project": c.project, "current": *name == all.current}))
            .collect();
        return out.value(&json!({ "items": items }));
    }
    if all.contexts.is_empty() {
        out.note("there are no contexts; `oblak up` makes one, and so does `oblak login`");
        return Ok(());
    }
    let mut table = Table::new(&["CURRENT", "NAME", "SERVER", "PROJECT"]);
    for (name, context) in &all.contexts {
        let mark = if *name == all.current { "*" } else { " -" };
        table.row(vec![mark.trim().into(), name.clone(), context.server.clone(), context.project.clone()]);
    }
    out.data(&table.render(out.color))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_contexts() {
        let mut all = Contexts::default();
        assert_eq!(context_name("https://cloud.example:7443", &all), "cloud.example");
        assert_eq!(context_name("https://[::1]:7443", &all), "::1");
        all.contexts
            .insert("home".into(), Context { server: "https://cloud.example:7443/".into(), ..Context::default() });
        assert_eq!(context_name("https://cloud.example:7443", &all), "home");
    }
}
