//! The link to the API: registration and lease, heartbeat, the watch of what concerns this node.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use oblak_client::Result;
use oblak_model::InstanceId;
use oblak_model::wire::{Heartbeat, NodeEvent, Register};

use crate::backoff::Backoff;
use crate::context::Context;
use crate::facts;
use crate::owner;
use crate::record::Record;
use crate::servers;
use crate::usage::Sampler;
use crate::world::{Touched, World};

/// Most guests whose usage goes with one heartbeat.
const USAGE_LIMIT: usize = 2000;

/// Deadline of a registration, which waits for a commit.
const REGISTER_CALL: Duration = Duration::from_secs(5);
/// Deadline of a renewal: one that is lost must leave time for others before the lease (5 s) ends.
const RENEW_CALL: Duration = Duration::from_millis(1500);

fn backoff() -> Backoff {
    Backoff::new(Duration::from_millis(100), Duration::from_secs(5))
}

/// Keeps the node registered and its lease alive until the agent ends.
pub async fn lease(ctx: Arc<Context>) {
    let sampler = Sampler::default();
    let mut backoff = backoff();
    while !ctx.cancel.is_cancelled() {
        let outcome = tokio::select! { outcome = hold(&ctx, &sampler, &mut backoff) => outcome, () = ctx.cancel.cancelled() => return };
        if let Err(error) = outcome {
            ctx.note_removal(&error);
            tracing::debug!(%error, "no lease; registering again");
        }
        tokio::select! { () = tokio::time::sleep(backoff.next()) => {}, () = ctx.cancel.cancelled() => return }
    }
}

async fn hold(ctx: &Context, sampler: &Sampler, backoff: &mut Backoff) -> Result<()> {
    let facts = facts::gather(ctx).await;
    let capacity = facts::capacity(&facts, ctx.config.reserved_memory);
    let body = Register {
        name: ctx.config.name.clone(),
        zone: ctx.config.zone.clone(),
        labels: ctx.config.labels.clone(),
        facts,
        capacity,
        version: env!("CARGO_PKG_VERSION").into(),
        boot_id: ctx.config.boot_id.clone(),
    };
    let before = ctx.clock.boottime();
    let registered = ctx.client.within(REGISTER_CALL).node_register(ctx.config.node, &body).await?;
    ctx.lease.began(&registered, before);
    ctx.epoch.store(registered.epoch, Ordering::Relaxed);
    ctx.removed.store(false, Ordering::Relaxed);
    servers::note_home(ctx);
    tracing::info!(node = %registered.name, epoch = registered.epoch, "registered");
    backoff.reset();
    // Instances may wait for a lease.
    ctx.wake_owners();
    let client = ctx.client.within(RENEW_CALL);
    loop {
        tokio::time::sleep(ctx.config.heartbeat_every).await;
        let mut usage = sampler.sample(ctx).await;
        usage.truncate(USAGE_LIMIT);
        let heartbeat = Heartbeat { epoch: registered.epoch, usage };
        let before = ctx.clock.boottime();
        match client.node_heartbeat(ctx.config.node, &heartbeat).await {
            Ok(answer) if answer.valid => ctx.lease.renewed(before),
            Ok(_) => return Ok(()),
            // Asking again is cheaper than a new lease, as long as there is one.
            Err(error) if error.code().is_none() && ctx.lease.is_alive(ctx.clock.boottime()) => {
                tracing::debug!(%error, "the lease was not renewed; trying again");
            }
            Err(error) => return Err(error),
        }
        servers::note_home(ctx);
    }
}

/// Keeps the world up to date until the agent ends.
pub async fn watch(ctx: Arc<Context>) {
    let mut backoff = backoff();
    while !ctx.cancel.is_cancelled() {
        let outcome =
            tokio::select! { outcome = follow(&ctx, &mut backoff) => outcome, () = ctx.cancel.cancelled() => return };
        if let Err(error) = outcome {
            ctx.note_removal(&error);
            tracing::debug!(%error, "the watch ended; watching again");
        }
        tokio::select! { () = tokio::time::sleep(backoff.next()) => {}, () = ctx.cancel.cancelled() => return }
    }
}

async fn follow(ctx: &Arc<Context>, backoff: &mut Backoff) -> Result<()> {
    let epoch = ctx.lease.asking();
    let mut events = ctx.client.node_watch(ctx.config.node).await?;
    let mut homes = ctx.servers.subscribe();
    let home = ctx.client.server();
    // A fresh world, so that what was deleted while we were not looking is missed in it.
    let mut fresh = Some(World::default());
    loop {
        let event = tokio::select! {
            biased;
            () = ctx.lease.ask_again.notified() => {
                backoff.reset();
                return Ok(());
            }
            event = events.next() => event?,
            // The lease is kept at another server now: this one is frozen or cut off, and its watch would only fall silent.
            _ = homes.wait_for(|servers| !servers.home.is_empty() && servers.home != home) => return Ok(()),
        };
        let Some(event) = event else { return Ok(()) };
        if let Some(mut world) = fresh.take() {
            if matches!(event, NodeEvent::Synced { .. }) {
                backoff.reset();
                swap(ctx, world, epoch);
            } else {
                world.apply(event);
                fresh = Some(world);
            }
            continue;
        }
        let touched = ctx.world.write().unwrap_or_else(std::sync::PoisonError::into_inner).apply(event);
        dispatch(ctx, &touched);
    }
}

fn swap(ctx: &Arc<Context>, world: World, epoch: u64) {
    let mut touched = Touched::all(&world);
    {
        let mut current = ctx.world.write().unwrap_or_else(std::sync::PoisonError::into_inner);
        touched.merge(Touched::all(&current));
        *current = world;
    }
    // Only now: who asks for the lease's fence and then looks into the world must not find the old one.
    ctx.lease.synced(epoch);
    ctx.synced.send_replace(true);
    for id in recorded(ctx) {
        touched.instances.insert(id);
    }
    dispatch(ctx, &touched);
}

/// Instances that have a record, or the mark of a migration, on this disk.
fn recorded(ctx: &Context) -> Vec<InstanceId> {
    let Ok(entries) = std::fs::read_dir(ctx.config.layout.instances()) else { return Vec::new() };
    let of_ours =
        |path: std::path::PathBuf| [crate::record::FILE, crate::migrate::FILE].iter().any(|f| path.join(f).exists());
    let with_record = entries.flatten().filter(|e| of_ours(e.path()));
    with_record.filter_map(|e| e.file_name().to_str()?.parse().ok()).collect()
}

fn dispatch(ctx: &Arc<Context>, touched: &Touched) {
    for id in &touched.instances {
        owner::spawn(ctx, *id);
    }
    ctx.wake(touched);
}

/// Learns from the records on disk which host ids are given away.
pub fn load_ids(ctx: &Context) {
    let mut taken = crate::context::lock(&ctx.id_bases);
    let mut known = crate::context::lock(&ctx.container_ids);
    for id in recorded(ctx) {
        if let Ok(Some(record)) = Record::load(&ctx.instance_dir(id))
            && record.id_base != 0
        {
            taken.insert(record.id_base);
            known.insert(id, record.id_base);
        }
    }
}
