//! Which server, as whom, in which project: flags first, then environment, then the context file.

use std::time::Duration;

use oblak_client::{Auth, Client, ClientConfig, ClientError, ListOptions};
use oblak_model::{Code, DEFAULT_PROJECT, ImageKind, Kind, List, Object};

use crate::args::Global;
use crate::context::{self, Context, Contexts};
use crate::error::{CliError, NOT_FOUND, Result};
use crate::near::did_you_mean;
use crate::out::Out;

/// What a command works with.
#[derive(Clone, Debug)]
pub struct Session {
    /// The server.
    pub client: Client,
    /// The project.
    pub project: String,
    /// How to print.
    pub out: Out,
    /// How the client was made.
    config: ClientConfig,
    /// When the servers of the context were asked for; none without a context.
    learnt_at: Option<i64>,
    /// The flags that lead another process of this program to the same place.
    pub flags: Vec<String>,
}

/// The servers of a context are asked for again after this long.
const LEARN_SECONDS: i64 = 600;

/// Seconds since 1970.
pub fn now() -> i64 {
    oblak_platform::clock::system().now().as_micros() / 1_000_000
}

/// Reads the context file.
pub fn contexts() -> Result<Contexts> {
    let file = context::default_file();
    context::load(&file).map_err(|e| CliError::file(&file, "read the contexts in", &e))
}

/// PEM from `OBLAK_CA`: the text itself or the file that holds it.
pub fn ca_from_env() -> Result<Option<String>> {
    match std::env::var("OBLAK_CA") {
        Ok(text) if text.contains("-----BEGIN") => Ok(Some(text)),
        Ok(path) if !path.is_empty() => {
            let path = std::path::PathBuf::from(path);
            std::fs::read_to_string(&path).map(Some).map_err(|e| CliError::file(&path, "read the certificate in", &e))
        }
        _ => Ok(None),
    }
}

fn env(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|v| !v.is_empty())
}

/// The context that the flags mean, if any.
fn chosen<'a>(global: &Global, all: &'a Contexts) -> Result<Option<&'a Context>> {
    if let Some(name) = &global.context {
        return all.contexts.get(name).map(Some).ok_or_else(|| unknown_context(name, all));
    }
    let current = all.contexts.get(&all.current);
    let Some(server) = &global.server else { return Ok(current) };
    // Another server than that of the context must never see its token.
    let same = |c: &&Context| c.server.trim_end_matches('/') == server.trim_end_matches('/');
    Ok(current.filter(same).or_else(|| all.contexts.values().find(same)))
}

/// The error for a context that does not exist.
pub fn unknown_context(name: &str, all: &Contexts) -> CliError {
    let guess = did_you_mean(name, all.contexts.keys().map(String::as_str));
    let hint = if guess.is_empty() { "`oblak context list` shows those there are".into() } else { guess };
    CliError::new(format!("context {name:?} does not exist"), hint).with_code(NOT_FOUND)
}

impl Session {
    /// Finds out where to go. Connects on first use.
    pub fn open(global: &Global, out: Out) -> Result<Self> {
        let all = contexts()?;
        let context = chosen(global, &all)?;
        let server = global.server.clone().or_else(|| context.map(|c| c.server.clone())).ok_or_else(|| {
            CliError::new(
                format!("no cloud is known to this user ({} has no context)", context::default_file().display()),
                "start one here with `oblak up`, or log in to one with `oblak login --server URL --ca FILE`",
            )
        })?;
        let ca = ca_from_env()?.or_else(|| context.map(|c| c.ca_pem.clone())).ok_or_else(|| {
            CliError::new(
                format!("the certificate authority of {server} is not known"),
                "set OBLAK_CA to the file pki/ca.pem of its data directory, or log in with `oblak login --server URL --ca FILE`",
            )
        })?;
        let token = env("OBLAK_TOKEN").or_else(|| context.map(|c| c.token.clone()).filter(|t| !t.is_empty()));
        let project = global
            .project
            .clone()
            .or_else(|| context.map(|c| c.project.clone()).filter(|p| !p.is_empty()))
            .unwrap_or_else(|| DEFAULT_PROJECT.into());
        let mut config = ClientConfig::new(server, ca, token.map_or(Auth::None, Auth::Bearer));
        // The authority vouches for each of them: a token goes to no other cloud.
        let same = context.filter(|c| c.ca_pem == config.ca_pem);
        config.others = same.map(|c| c.servers.clone()).unwrap_or_default();
        let learnt_at = same.map(|c| c.learnt_at);
        let client = Client::new(&config)?;
        Ok(Self { client, flags: flags(global, &project), project, out, config, learnt_at })
    }

    /// Learns now and then which servers the cloud has, for the time when one of them is away. Nothing is lost when it fails.
    pub async fn refresh_servers(&self) {
        let Some(at) = self.learnt_at else { return };
        if (now() - at).abs() < LEARN_SECONDS {
            return;
        }
        let client = self.client.within(Duration::from_secs(2));
        if let Ok(found) = client.learn_servers().await {
            let file = context::default_file();
            let mut known = self.config.others.clone();
            known.push(self.config.server.clone());
            // Asked again with the next command.
            let _ = context::note_servers(&file, &known, &self.config.ca_pem, &found, now());
        }
    }

    /// A client whose calls may take longer.
    pub fn patient(&self, timeout: Duration) -> Result<Client> {
        Ok(Client::new(&ClientConfig { timeout, ..self.config.clone() })?)
    }

    /// One object; names that are near when there is none.
    pub async fn get<K: Kind>(&self, name: &str) -> Result<Object<K>> {
        match self.client.get::<K>(&self.project, name).await {
            Ok(object) => Ok(object),
            Err(error) => Err(self.explain_missing::<K>(name, error).await),
        }
    }

    /// Adds what may have been meant to a `not_found`.
    pub async fn explain_missing<K: Kind>(&self, name: &str, error: ClientError) -> CliError {
        if error.code() != Some(Code::NotFound) {
            return error.into();
        }
        let error = CliError::from(error);
        match self.suggest::<K>(name).await {
            Some(hint) => error.with_hint(hint),
            None => error,
        }
    }

    /// Names near to this one. `None` when it exists, or when nothing can be said.
    pub async fn suggest<K: Kind>(&self, name: &str) -> Option<String> {
        let options = ListOptions { limit: Some(1000), ..ListOptions::default() };
        let mut list = self.client.list::<K>(&self.project, &options).await.ok()?;
        list.items.extend(self.offered::<K>(&options).await.unwrap_or_default());
        let names: Vec<&str> = list.items.iter().map(|o| o.metadata.name.as_str()).collect();
        if names.contains(&name) {
            return None;
        }
        let guess = did_you_mean(name, names);
        if !guess.is_empty() {
            return Some(guess);
        }
        let command = if K::KIND == "instance" { "oblak list".into() } else { format!("oblak get {}", K::PLURAL) };
        if K::KIND == ImageKind::KIND {
            return Some(format!("`oblak image list` shows those of project {} and the public ones", self.project));
        }
        if K::SCOPE != oblak_model::Scope::Project {
            return Some(format!("`{command}` shows those there are"));
        }
        Some(format!("`{command}` shows those of project {}", self.project))
    }

    /// Everything of a kind that can be used in this project: its own objects first, then what others offer.
    pub async fn list<K: Kind>(&self, label: Option<&oblak_model::selector::Selector>) -> Result<List<K>> {
        let options = ListOptions { label: label.map(ToString::to_string), ..ListOptions::default() };
        let mut list = self.client.list_all::<K>(&self.project, &options).await?;
        list.items.extend(self.offered::<K>(&options).await?);
        Ok(list)
    }

    /// What other projects offer and this one may use.
    async fn offered<K: Kind>(&self, options: &ListOptions) -> Result<Vec<Object<K>>> {
        if K::KIND != ImageKind::KIND {
            return Ok(Vec::new());
        }
        let mut items = self.client.list_offered::<K>(options).await?.items;
        items.retain(|object| object.metadata.project.as_deref() != Some(self.project.as_str()));
        Ok(items)
    }
}

/// What another process of this program has to be told. The environment is inherited and needs no telling.
fn flags(global: &Global, project: &str) -> Vec<String> {
    let mut flags = vec!["--project".to_string(), project.to_string()];
    for (flag, value) in [("--context", &global.context), ("--server", &global.server)] {
        if let Some(value) = value {
            flags.extend([flag.to_string(), value.clone()]);
        }
    }
    flags
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_only_goes_to_its_own_server() {
        let mut all = Contexts { current: "home".into(), ..Contexts::default() };
        all.contexts.insert("home".into(), Context { server: "https://a:1".into(), ..Context::default() });
        all.contexts.insert("work".into(), Context { server: "https://b:1".into(), ..Context::default() });
        let pick = |context: Option<&str>, server: Option<&str>| {
            let global =
                Global { context: context.map(Into::into), server: server.map(Into::into), ..Global::default() };
            chosen(&global, &all).map(|c| c.map(|c| c.server.clone()))
        };
        assert_eq!(pick(None, None).unwrap().as_deref(), Some("https://a:1"));
        assert_eq!(pick(None, Some("https://b:1/")).unwrap().as_deref(), Some("https://b:1"));
        assert_eq!(pick(None, Some("https://evil:1")).unwrap(), None);
        assert_eq!(pick(Some("work"), None).unwrap().as_deref(), Some("https://b:1"));
        assert_eq!(pick(Some("wrok"), None).unwrap_err().hint, "did you mean work?");
    }
}
