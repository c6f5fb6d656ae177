//! A member comes up: certificate, etcd, store.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use oblak_identity::members::{MEMBER_LIFE, ensure_etcd_ca, ensure_member_cert};
use oblak_identity::pki;
use oblak_platform::clock;
use oblak_platform::layout::Layout;
use oblak_store::StoreError;
use oblak_store_etcd::EtcdStore;
use oblak_store_etcd::admin::Admin;
use oblak_store_etcd::supervise::{Founding, Supervisor, running};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::file::{self, MemberFile};
use super::gate::Gate;
use super::keep;

/// A cluster that was switched off comes back server by server; whoever is first waits so long for the others.
const OTHERS: Duration = Duration::from_secs(180);
/// etcd answers within a second or two, on a slow disk later.
const ANSWER: Duration = Duration::from_secs(60);
const PAUSE: Duration = Duration::from_millis(200);

/// A member at work. Its etcd goes on when this ends.
pub struct Member {
    /// The store on it.
    pub store: Arc<EtcdStore>,
    /// What the API may do.
    pub gate: Arc<Gate>,
}

/// Makes the certificate when it is needed. Says whether a new one was made.
pub fn ensure_certificate(layout: &Layout, file: &MemberFile, life: Option<Duration>) -> Result<bool> {
    let now = clock::system().now();
    let ca = ensure_etcd_ca(&layout.pki(), now)?;
    let mut names = pki::local_names();
    names.push(file.address.to_string());
    names.sort();
    names.dedup();
    Ok(ensure_member_cert(&layout.pki(), &ca, &names, now, life.unwrap_or(MEMBER_LIFE))?)
}

/// Starts or adopts etcd, opens the store on it, and looks after it from then on.
pub async fn start(layout: &Layout, file: MemberFile, life: Option<Duration>) -> Result<Member> {
    let (file, store) = bring_up(layout, file, life).await?;
    let gate = Arc::new(Gate::new(layout.clone(), file.name.clone()));
    tokio::spawn(keep::run(layout.clone(), file, life, Arc::clone(&store)));
    Ok(Member { store, gate })
}

/// Starts or adopts etcd and opens the store on it.
pub async fn bring_up(
    layout: &Layout,
    mut file: MemberFile,
    life: Option<Duration>,
) -> Result<(MemberFile, Arc<EtcdStore>)> {
    ensure_certificate(layout, &file, life)?;
    let mut supervisor = Supervisor::new(file.settings(layout))?;
    supervisor.ensure()?;
    let version = supervisor.version().to_owned();
    tokio::spawn(supervisor.run(CancellationToken::new()));
    found(layout, &mut file).await?;
    let store = Arc::new(open(layout, &file).await?);
    tracing::info!(
        name = file.name,
        etcd = version,
        endpoints = file.endpoints.join(" "),
        "this server is a member of the store"
    );
    Ok((file, store))
}

/// Waits until the member exists, and writes down that it does: from then on it never starts empty again.
async fn found(layout: &Layout, file: &mut MemberFile) -> Result<()> {
    if file.founded {
        return Ok(());
    }
    let mut own = file.options(layout)?;
    own.endpoints = vec![file.client_url()];
    own.patience = PAUSE;
    let admin = Admin::new(&own)?;
    let end = Instant::now() + ANSWER;
    loop {
        let answered = match &file.founding {
            Founding::New { .. } => admin.members().await.map(drop),
            // A learner says how it is and nothing else.
            Founding::Joining { .. } => admin.statuses().await.pop().map_or(Ok(()), |(_, status)| status.map(drop)),
        };
        match answered {
            Ok(()) => break,
            Err(error @ StoreError::Refused { .. }) => return Err(error).context("etcd does not let us in"),
            Err(error) if Instant::now() >= end => {
                let log = file.settings(layout).log();
                bail!("etcd does not answer ({error}); it said:\n{}", last_lines(&log));
            }
            Err(_) => tokio::time::sleep(PAUSE).await,
        }
    }
    if matches!(file.founding, Founding::New { .. }) {
        admin.require_root().await.context("cannot close etcd to others")?;
    }
    file.founded = true;
    file.save(layout)
}

fn last_lines(log: &std::path::Path) -> String {
    let text = std::fs::read_to_string(log).unwrap_or_default();
    let lines: Vec<_> = text.lines().collect();
    lines[lines.len().saturating_sub(8)..].join("\n")
}

/// Opens the store, waiting for the other members when too few are there.
async fn open(layout: &Layout, file: &MemberFile) -> Result<EtcdStore> {
    let end = Instant::now() + OTHERS;
    let mut told = false;
    loop {
        match EtcdStore::open(file.options(layout)?).await {
            Ok(store) => return Ok(store),
            Err(error @ StoreError::Unreachable { .. }) if Instant::now() < end => {
                if !told {
                    told = true;
                    crate::roles::tell(&format!(
                        "waiting for the other servers of this cloud ({}): {error}",
                        file.endpoints.join(", ")
                    ));
                }
                if running(&file::dir(layout)).is_none() {
                    tracing::warn!("etcd of this server does not run");
                }
                tokio::time::sleep(PAUSE).await;
            }
            Err(error) => {
                return Err(error).context("cannot open the store in etcd; are enough of the other servers up?");
            }
        }
    }
}
