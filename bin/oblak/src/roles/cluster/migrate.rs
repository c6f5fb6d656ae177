//! `oblak cluster migrate-store`: the state of a cloud moves from its file into etcd.
//!
//! ```text
//!   file ──► etcd (empty, under a mark that names the file's state) ──► compared ──► mark done ──► file renamed ──► mark gone
//! ```
//! Until the file is renamed it is the state of the cloud, and no server starts on etcd beside it; after that etcd is. So a crash anywhere is healed
//! by running the command again. The incarnation in etcd is higher: an `If-Match` with an old revision fails, watches are told
//! `compacted`, and no guard can hold by accident.

use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use oblak_backup::copy;
use oblak_identity::join::Pin;
use oblak_identity::members::Keys;
use oblak_platform::layout::Layout;
use oblak_platform::{fsx, random, telemetry};
use oblak_store::{RedbOptions, RedbStore, Store};
use oblak_store_etcd::EtcdStore;

use super::file::MemberFile;
use crate::args::MigrateArgs;
use crate::roles::{layout, require_root, running, runtime, state};

/// The command, in the file of a member that it is filling.
const MIGRATE: &str = "migrate-store";

/// Runs the command.
pub fn run(args: &MigrateArgs) -> Result<ExitCode> {
    require_root("oblak cluster migrate-store")?;
    telemetry::init(false);
    if !args.etcd.cluster && args.etcd.endpoints.is_empty() {
        bail!(
            "say where the state shall go: --cluster for an etcd that this server runs itself, or --etcd URL,.. for one of others"
        );
    }
    let layout = layout(&args.data)?;
    let Ok(_hold) = running::take(&layout)? else {
        bail!("the cloud on {} runs; stop it first with `oblak down` (guests go on)", layout.root().display())
    };
    runtime()?.block_on(migrate(args, &layout))
}

async fn migrate(args: &MigrateArgs, layout: &Layout) -> Result<ExitCode> {
    let file = layout.store().join("oblak.redb");
    let moved = layout.store().join("oblak.redb.migrated");
    if !file.exists() {
        if !moved.exists() {
            bail!("there is no store {} to move", file.display());
        }
        // The switch was made; only the mark may be left.
        let target = target(args, layout, 1).await?;
        return finish(layout, &*target, &moved).await;
    }
    let path = file.clone();
    let opened = tokio::task::spawn_blocking(move || RedbStore::open(&path, RedbOptions::default())).await?;
    let source = opened.context("cannot open the store")?;
    let (entries, revision) = copy::everything(&source).await?;
    tokio::task::spawn_blocking(move || drop(source)).await?;
    let pin = Keys::load(&layout.pki()).and_then(|keys| Pin::of_pem(&keys.ca_pem))?;
    let origin = format!("the cloud with the authority {pin}");
    let target = target(args, layout, revision.incarnation.saturating_add(1)).await?;
    let reached = target.revision().await?;
    if reached.incarnation <= revision.incarnation {
        bail!(
            "the target has incarnation {} and the file {revision}: it was used before; choose another --etcd-prefix",
            reached.incarnation
        );
    }
    copy::import(&*target, &entries, &origin, random::system().as_ref()).await?;
    println!("{} keys copied and compared", entries.len());
    std::fs::rename(&file, &moved).with_context(|| format!("cannot rename {}", file.display()))?;
    fsx::sync_dir(&layout.store()).context("cannot make the switch durable")?;
    finish(layout, &*target, &moved).await
}

async fn target(args: &MigrateArgs, layout: &Layout, first_incarnation: u32) -> Result<Arc<EtcdStore>> {
    if !args.etcd.cluster {
        let mut options = state::options(&args.etcd)?;
        options.first_incarnation = first_incarnation;
        return Ok(Arc::new(EtcdStore::open(options).await.context("cannot open the store in etcd")?));
    }
    let member = match MemberFile::load(layout)? {
        Some(member) => member,
        None => {
            let mut member = MemberFile::first(&args.etcd, layout)?;
            member.first_incarnation = first_incarnation;
            member.filling = Some(MIGRATE.into());
            member.save(layout)?;
            member
        }
    };
    let life = args.etcd.member_certificate_life.map(|life| life.0);
    Ok(super::member::bring_up(layout, member, life).await?.1)
}

async fn finish(layout: &Layout, target: &dyn Store, moved: &std::path::Path) -> Result<ExitCode> {
    copy::unmark(target, random::system().as_ref()).await?;
    MemberFile::filled(layout)?;
    println!(
        "the state is in etcd now (revision {}); the old file is {}: remove it when all is well. Start the cloud as before, with the same --etcd flags if it is an etcd of others.",
        target.revision().await?,
        moved.display()
    );
    Ok(ExitCode::SUCCESS)
}
