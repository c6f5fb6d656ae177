//! What goes on as long as the member runs: certificates are renewed, members come and go, space is given back.

use std::sync::Arc;
use std::time::Duration;

use nix::sys::signal::Signal;
use oblak_platform::clock;
use oblak_platform::layout::Layout;
use oblak_platform::process::Identity;
use oblak_store_etcd::EtcdStore;
use oblak_store_etcd::members::{Keeper, Step, View};

use super::file::MemberFile;
use super::member::ensure_certificate;

const EVERY: Duration = Duration::from_secs(3);
const MINUTE: u64 = 60;

/// Runs until the runtime ends.
pub async fn run(layout: Layout, mut file: MemberFile, life: Option<Duration>, store: Arc<EtcdStore>) {
    let mut keeper = match file
        .options(&layout)
        .map_err(|e| e.to_string())
        .and_then(|options| Keeper::new(options).map_err(|e| e.to_string()))
    {
        Ok(keeper) => keeper,
        Err(error) => {
            tracing::error!(error, "nobody looks after the members of the store");
            return;
        }
    };
    let mut said = String::new();
    loop {
        tokio::time::sleep(EVERY).await;
        if let Err(error) = pass(&layout, &mut file, life, &store, &mut keeper).await {
            let error = format!("{error:#}");
            if error != said {
                tracing::warn!(error, "looking after the members of the store failed; it goes on");
                said = error;
            }
        } else {
            said.clear();
        }
    }
}

async fn pass(
    layout: &Layout,
    file: &mut MemberFile,
    life: Option<Duration>,
    store: &EtcdStore,
    keeper: &mut Keeper,
) -> anyhow::Result<()> {
    if ensure_certificate(layout, file, life)? {
        tracing::info!("the certificate of etcd was renewed");
        retarget(layout, file, store, keeper, false)?;
    }
    let view = keeper.look().await?;
    let endpoints = view.endpoints();
    if !endpoints.is_empty() && endpoints != file.endpoints {
        tracing::info!(members = endpoints.join(" "), "the members of the store have changed");
        file.endpoints = endpoints;
        file.save(layout)?;
        retarget(layout, file, store, keeper, true)?;
    }
    let Some(own) = view.members.iter().find(|member| member.peer_urls.contains(&file.peer_url())) else {
        // Those who answered are the cluster; there is nothing left to do here. Guests go on.
        tracing::error!("this server was removed from the cluster; it stops");
        file.removed = true;
        file.save(layout)?;
        Identity::current().signal(Signal::SIGTERM);
        return std::future::pending().await;
    };
    let turn = u64::try_from(clock::system().now().as_micros()).unwrap_or(0) / 1_000_000 / MINUTE;
    for step in keeper.plan(&view, own.id, turn) {
        perform(&step, &view, own.id, file, store, keeper).await?;
    }
    Ok(())
}

fn retarget(
    layout: &Layout,
    file: &MemberFile,
    store: &EtcdStore,
    keeper: &mut Keeper,
    same_certificates: bool,
) -> anyhow::Result<()> {
    let options = file.options(layout)?;
    store.retarget(&options, same_certificates)?;
    Ok(keeper.retarget(options)?)
}

async fn perform(
    step: &Step,
    view: &View,
    own: u64,
    file: &MemberFile,
    store: &EtcdStore,
    keeper: &Keeper,
) -> anyhow::Result<()> {
    let admin = keeper.admin();
    let name = |id: u64| view.members.iter().find(|member| member.id == id).map_or("", |member| member.name.as_str());
    match step {
        // Refused as long as it has not caught up; the next pass tries again. Or another server was faster.
        Step::Promote(id) => match admin.promote(*id).await {
            Ok(()) => tracing::info!(server = name(*id), "a server has got its vote"),
            Err(error) => tracing::debug!(server = name(*id), %error, "a server gets no vote yet"),
        },
        Step::GiveUp(id) => {
            tracing::warn!(
                member = format!("{id:x}"),
                "a server that was let in has not come; its place is taken away"
            );
            admin.remove_member(*id).await?;
        }
        Step::Defragment => {
            tracing::info!("giving unused space of etcd back");
            let index = store.endpoints().iter().position(|url| *url == file.client_url());
            if let Some(index) = index {
                admin.defragment_one(index).await?;
            }
        }
        Step::MakeRoom => keeper.make_room(view, own, store).await?,
    }
    Ok(())
}
