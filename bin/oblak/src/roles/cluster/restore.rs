//! `oblak cluster restore`: a new life of a cloud from a backup.
//!
//! ```text
//!   read to the end ──► directory empty? ──► keys ──► store: into a file under another name, renamed │ into an etcd that is made, under a mark
//! ```
//! The store is the last thing that appears, so an interrupted restore is repeated. Its incarnation is one that nobody has seen: what
//! programs and agents remember of the life before is answered with `compacted`.

use std::fs::File;
use std::io::BufReader;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use oblak_backup::archive::{self, Archive};
use oblak_backup::copy;
use oblak_identity::members::Keys;
use oblak_platform::layout::Layout;
use oblak_platform::{clock, fsx, random, telemetry};
use oblak_store::{RedbOptions, RedbStore};

use super::file::MemberFile;
use crate::args::RestoreArgs;
use crate::roles::{layout, require_root, running, runtime};

/// The command, in the file of a member that it is filling.
const RESTORE: &str = "restore";
/// The next incarnation is so much later at most. The step is random: who restores one backup twice gets two lives that are told apart.
const STEP: u32 = 1 << 16;

/// Runs the command.
pub fn run(args: &RestoreArgs) -> Result<ExitCode> {
    telemetry::init(false);
    let passphrase = oblak_cli::passphrase(args.passphrase_file.as_deref(), false).map_err(anyhow::Error::msg)?;
    let file = File::open(&args.file).with_context(|| format!("cannot open {}", args.file.display()))?;
    let archive = archive::read(&passphrase, BufReader::new(file))?;
    let keys: Keys = serde_json::from_value(archive.keys.clone()).context("the keys in the backup cannot be read")?;
    let head = &archive.head;
    println!(
        "backup of {} (revision {}, {}, oblak {}): {} keys, intact",
        head.at,
        head.revision,
        head.backend,
        head.version,
        archive.entries.len()
    );
    if args.check {
        return Ok(ExitCode::SUCCESS);
    }
    require_root("oblak cluster restore")?;
    if !args.etcd.endpoints.is_empty() {
        bail!(
            "restoring into an etcd of others is not supported: restore into a file and use `oblak cluster migrate-store --etcd`"
        );
    }
    let layout = layout(&args.data)?;
    let Ok(_hold) = running::take(&layout)? else { bail!("an oblak process serves {}", layout.root().display()) };
    let store = layout.store().join("oblak.redb");
    let member = MemberFile::load(&layout)?;
    let unfinished =
        args.etcd.cluster && member.as_ref().is_some_and(|member| member.filling.as_deref() == Some(RESTORE));
    if store.exists() || (member.is_some() && !unfinished) {
        bail!(
            "{} holds the state of a cloud; restore into another directory, or move store, etcd and pki away",
            layout.root().display()
        );
    }
    keys.install(&layout.pki(), clock::system().now())?;
    let incarnation = next_incarnation(head.revision.incarnation);
    if args.etcd.cluster {
        runtime()?.block_on(into_etcd(args, &layout, &archive, member, incarnation))?;
    } else {
        runtime()?.block_on(into_file(&layout, &archive, incarnation))?;
    }
    let cluster = if args.etcd.cluster { " --cluster" } else { "" };
    println!(
        "restored as incarnation {incarnation}. Start it with `oblak up{cluster} --data {}`. Guests that the backup does not know will be reported as Quarantined and left alone.",
        layout.root().display()
    );
    Ok(ExitCode::SUCCESS)
}

fn next_incarnation(before: u32) -> u32 {
    let mut bytes = [0u8; 4];
    random::system().fill(&mut bytes);
    before.saturating_add(1 + u32::from_le_bytes(bytes) % STEP)
}

/// Into a file of another name, which is renamed when all of it is there.
async fn into_file(layout: &Layout, archive: &Archive, incarnation: u32) -> Result<()> {
    let target = layout.store().join("oblak.redb");
    let temporary = layout.store().join("restoring.redb");
    fsx::remove_file_if_exists(&temporary).context("cannot remove what an interrupted restore has left")?;
    {
        let path = temporary.clone();
        let opened = tokio::task::spawn_blocking(move || RedbStore::open(&path, RedbOptions::default())).await?;
        let store = opened.context("cannot make the store")?;
        let random = random::system();
        copy::import(&store, &archive.entries, "a backup", random.as_ref()).await?;
        copy::unmark(&store, random.as_ref()).await?;
        // Dropping waits for the writer, which blocks.
        tokio::task::spawn_blocking(move || drop(store)).await?;
    }
    let (from, to) = (temporary.clone(), target.clone());
    let restored =
        tokio::task::spawn_blocking(move || oblak_store::redb::restore(&from, &to, Some(incarnation))).await?;
    restored.context("cannot begin the new incarnation")?;
    fsx::remove_file_if_exists(&temporary).context("cannot tidy up after the restore")
}

/// Into a new etcd of one member.
async fn into_etcd(
    args: &RestoreArgs,
    layout: &Layout,
    archive: &Archive,
    member: Option<MemberFile>,
    incarnation: u32,
) -> Result<()> {
    let member = match member {
        Some(member) => member,
        None => {
            let mut member = MemberFile::first(&args.etcd, layout)?;
            member.first_incarnation = incarnation;
            member.filling = Some(RESTORE.into());
            member.save(layout)?;
            member
        }
    };
    let life = args.etcd.member_certificate_life.map(|life| life.0);
    let (_, store) = super::member::bring_up(layout, member, life).await?;
    let random = random::system();
    copy::import(&*store, &archive.entries, "a backup", random.as_ref()).await?;
    copy::unmark(&*store, random.as_ref()).await?;
    MemberFile::filled(layout)
}
