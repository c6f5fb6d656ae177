//! `cluster ...`

use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use data_encoding::BASE32_NOPAD;
use oblak_model::Size;
use oblak_model::members::{BackupRequest, ClusterStatus, MemberRole, ServerRemoved};
use oblak_platform::random;

use super::list::encode;
use crate::args::{BackupArgs, ClusterCommand, Global};
use crate::error::{CliError, Result};
use crate::out::Out;
use crate::session::Session;
use crate::table::Table;
use crate::term;

/// What recovery keys begin with.
const RECOVERY: &str = "oblakrecovery1_";

/// `cluster ...`
pub(crate) async fn run(command: ClusterCommand, global: &Global, out: Out) -> Result<()> {
    let session = Session::open(global, out)?;
    match command {
        ClusterCommand::Status => show(&session, &session.client.get_json("/v1/cluster/status").await?),
        ClusterCommand::Defragment => {
            show(&session, &session.client.post_json("/v1/cluster/defragment", &serde_json::json!({})).await?)
        }
        ClusterCommand::Backup(args) => backup(&session, &args).await,
        ClusterCommand::RemoveServer(args) => {
            let path = format!("/v1/cluster/servers/{}/remove", encode(&args.name));
            let removed: ServerRemoved = session.client.post_json(&path, &serde_json::json!({})).await?;
            if session.out.machine() {
                return session.out.value(&removed);
            }
            session.out.note(&format!(
                "server {} was removed; votes left: {}. It still has the keys of this cloud: wipe its pki directory",
                removed.name, removed.voters
            ));
            Ok(())
        }
    }
}

fn show(session: &Session, status: &ClusterStatus) -> Result<()> {
    if session.out.machine() {
        return session.out.value(status);
    }
    let size = |bytes: u64| Size(bytes).to_string();
    let store = &status.store;
    let mut text = format!(
        "store: {}, revision {}, {} keys, {}{}{}\n",
        store.backend,
        store.revision,
        store.keys,
        size(store.bytes),
        if store.quota_bytes > 0 { format!(" of {}", size(store.quota_bytes)) } else { String::new() },
        if store.writable { "" } else { ", TAKES NO WRITES" }
    );
    for alarm in &store.alarms {
        text.push_str(&format!("alarm: {alarm}\n"));
    }
    if let Some(leader) = &status.control_leader {
        text.push_str(&format!("control: led by {leader}\n"));
    }
    if !status.members.is_empty() {
        let mut table = Table::new(&["SERVER", "ROLE", "STATE", "SIZE", "IN USE", "ETCD", "URL"]);
        for member in &status.members {
            let role = match member.role {
                MemberRole::Voter if member.leader => "leader",
                MemberRole::Voter => "voter",
                MemberRole::Learner => "learner",
                MemberRole::Unstarted => "unstarted",
            };
            let name = if member.name.is_empty() { &member.id } else { &member.name };
            let state = match (member.healthy, session.out.wide()) {
                (true, _) => "ready".to_owned(),
                (false, true) => format!("away: {}", member.problem),
                (false, false) => "away".to_owned(),
            };
            table.row(vec![
                name.clone(),
                role.into(),
                state,
                size(member.bytes),
                size(member.bytes_in_use),
                member.version.clone(),
                member.url.clone(),
            ]);
        }
        text.push('\n');
        text.push_str(&table.render(session.out.color));
    }
    let mut table = Table::new(&["CERTIFICATE", "ENDS"]);
    for certificate in &status.certificates {
        table.row(vec![certificate.name.clone(), certificate.expires_at.to_string()]);
    }
    text.push('\n');
    text.push_str(&table.render(session.out.color));
    for advice in &status.advice {
        text.push_str(&format!("\nto do: {advice}"));
    }
    if !status.advice.is_empty() {
        text.push('\n');
    }
    session.out.data(&text)
}

async fn backup(session: &Session, args: &BackupArgs) -> Result<()> {
    if args.file.exists() {
        return Err(CliError::usage(format!("{} exists", args.file.display()), "choose another name"));
    }
    let passphrase = if args.recovery_key {
        let mut bytes = [0u8; 20];
        random::system().fill(&mut bytes);
        format!("{RECOVERY}{}", BASE32_NOPAD.encode(&bytes).to_ascii_lowercase())
    } else {
        passphrase(args.passphrase_file.as_deref(), true)
            .map_err(|e| CliError::new(e, "give --passphrase-file or --recovery-key"))?
    };
    let partial = with_suffix(&args.file, ".partial");
    let written = write(session, &passphrase, &partial).await;
    if written.is_err() {
        // Of no use to anybody.
        let _ = std::fs::remove_file(&partial);
    }
    let bytes = written?;
    std::fs::rename(&partial, &args.file).map_err(|e| CliError::file(&args.file, "write", &e))?;
    session.out.note(&format!("{} written to {}", Size(bytes), args.file.display()));
    if args.recovery_key {
        session.out.note("the recovery key follows; it is shown once, and without it the backup is useless");
        session.out.data(&format!("{passphrase}\n"))?;
    }
    Ok(())
}

async fn write(session: &Session, passphrase: &str, partial: &Path) -> Result<u64> {
    let failed = |e: &std::io::Error| CliError::file(partial, "write", e);
    let request = BackupRequest { passphrase: passphrase.into() };
    let mut stream = session.client.post_stream("/v1/cluster/backup", &request).await?;
    let mut options = std::fs::OpenOptions::new();
    let mut file = options.create(true).write(true).truncate(true).mode(0o600).open(partial).map_err(|e| failed(&e))?;
    let mut bytes = 0;
    while let Some(piece) = stream.next().await? {
        file.write_all(&piece).map_err(|e| failed(&e))?;
        bytes += piece.len() as u64;
    }
    file.sync_all().map_err(|e| failed(&e))?;
    Ok(bytes)
}

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

/// The first line of a file, or what a person types; twice when it is a new one.
///
/// # Errors
/// In words for people.
pub fn passphrase(file: Option<&Path>, new: bool) -> std::result::Result<String, String> {
    if let Some(path) = file {
        let text = std::fs::read_to_string(path).map_err(|e| format!("cannot read {}: {e}", path.display()))?;
        return Ok(text.lines().next().unwrap_or_default().to_owned());
    }
    let ask = |prompt: &str| term::secret(prompt, false).map_err(|e| e.message);
    let first = ask("passphrase of the backup")?;
    if new && ask("the same again")? != first {
        return Err("the two are not the same".into());
    }
    Ok(first)
}
