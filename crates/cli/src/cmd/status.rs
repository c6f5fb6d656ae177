//! `usage`, `explain`, `version`, `whoami`, `completion`.

use oblak_model::wire::VersionInfo;
use oblak_model::{ImageKind, InstanceKind, Kind};
use serde_json::json;

use crate::args::{CompletionArgs, Global, ObjectArgs, ShellWord};
use crate::error::{CliError, Result};
use crate::kinds::{self, Visit};
use crate::out::Out;
use crate::session::Session;
use crate::show::{Show, word};
use crate::table::{Table, age, now};

/// `usage`.
pub async fn usage(session: &Session, name: &str) -> Result<()> {
    let usage = match session.client.usage(&session.project, name).await {
        Ok(usage) => usage,
        Err(error) => return Err(session.explain_missing::<InstanceKind>(name, error).await),
    };
    if session.out.machine() {
        return session.out.value(&usage);
    }
    let mut table =
        Table::new(&["NAME", "CPU", "CPU TIME", "MEMORY", "DISK READ", "DISK WRITE", "NET IN", "NET OUT", "AGE"]);
    table.row(vec![
        name.into(),
        format!("{}.{} %", usage.cpu_milli / 10, usage.cpu_milli % 10),
        format!("{}.{} s", usage.cpu_ns / 1_000_000_000, usage.cpu_ns / 100_000_000 % 10),
        usage.memory.to_string(),
        usage.disk_read.to_string(),
        usage.disk_write.to_string(),
        usage.net_rx.to_string(),
        usage.net_tx.to_string(),
        age(usage.at, now()),
    ]);
    session.out.data(&table.render(session.out.color))
}

/// `explain`.
pub async fn explain(session: &Session, args: &ObjectArgs) -> Result<()> {
    let (kind, name) = kinds::split(&args.what, args.name.as_deref())?;
    if !matches!(kind.as_str(), "instance" | "instances" | "i") {
        return kinds::visit(&kind, State { session, name }).await;
    }
    let explain = match session.client.explain(&session.project, &name).await {
        Ok(explain) => explain,
        Err(error) => return Err(session.explain_missing::<InstanceKind>(&name, error).await),
    };
    if session.out.machine() {
        return session.out.value(&explain);
    }
    session.out.data(&format!("{}\n", explain.text.trim_end()))
}

/// What an object that no scheduler places says about itself.
struct State<'a> {
    session: &'a Session,
    name: String,
}

impl Visit for State<'_> {
    type Out = ();
    async fn visit<K: Show>(self) -> Result<()> {
        let object = self.session.get::<K>(&self.name).await?;
        let status = serde_json::to_value(&object.status).unwrap_or_default();
        let part = |field: &str| status.get(field).and_then(|v| v.as_str()).filter(|t| !t.is_empty());
        let Some(phase) = part("phase") else {
            return Err(CliError::usage(
                format!("{} has no state to explain", object.describe()),
                format!("`oblak describe {}` shows it", object.describe()),
            ));
        };
        if self.session.out.machine() {
            return self.session.out.value(&status);
        }
        let mut text = format!("{} is {phase}", object.describe());
        if let Some(message) = part("message").or_else(|| part("reason")) {
            text.push_str(&format!(": {message}"));
        }
        if K::KIND == ImageKind::KIND && phase == "pending" && status["wanted"] == false {
            text.push_str(": it is made when an instance first needs it");
        }
        self.session.out.data(&format!("{text}\n"))
    }
}

/// `version`: the server is asked, but need not answer.
pub async fn version(global: &Global, out: Out) -> Result<()> {
    let client = env!("CARGO_PKG_VERSION");
    let asked = match Session::open(global, out) {
        Ok(session) => session.client.version().await.map_err(CliError::from),
        Err(error) => Err(error),
    };
    if out.machine() {
        let server: Option<VersionInfo> = asked.as_ref().ok().cloned();
        out.value(&json!({"client": {"version": client}, "server": server}))?;
    } else {
        let server = match &asked {
            Ok(info) => format!("{} (API {})", info.version, info.api.join(", ")),
            Err(_) => "not reached".into(),
        };
        out.data(&format!("client  {client}\nserver  {server}\n"))?;
    }
    if let Err(error) = asked {
        out.note(&format!("note: {}", error.message));
    }
    Ok(())
}

/// `whoami`.
pub async fn whoami(session: &Session) -> Result<()> {
    let me = session.client.whoami().await?;
    if session.out.machine() {
        return session.out.value(&me);
    }
    let mut text =
        format!("user     {}\nserver   {}\nproject  {}\n", me.user, session.client.server(), session.project);
    if me.cloud_admin {
        text.push_str("role     administrator of the whole cloud\n");
    }
    for (project, role) in &me.roles {
        text.push_str(&format!("role     {} of project {project}\n", word(role)));
    }
    session.out.data(&text)
}

/// `completion`.
pub fn completion(out: Out, args: &CompletionArgs, root: &clap::Command) -> Result<()> {
    use clap_complete::Shell;
    let shell = match args.shell {
        ShellWord::Bash => Shell::Bash,
        ShellWord::Zsh => Shell::Zsh,
        ShellWord::Fish => Shell::Fish,
    };
    let mut root = root.clone();
    let name = root.get_name().to_string();
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut root, name, &mut script);
    out.data(&String::from_utf8_lossy(&script))
}
