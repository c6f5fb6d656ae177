//! Keeps the networks of this node equal to what the world asks for.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use oblak_model::{Instance, InstanceId, Isolation, NetworkId, NodeId, PortId};
use oblak_network::{NetworkHandle, NetworkPlan};

use crate::assemble::{Here, local_networks, network_plan};
use crate::backoff::Backoff;
use crate::context::{Context, NetworkState, lock};
use crate::tunnels::Tunnels;

/// Looked at again this often even when nothing woke us: somebody may have taken a namespace away.
const SWEEP: Duration = Duration::from_secs(30);

/// How long what belongs to a new port is waited for.
const SETTLE: Duration = Duration::from_millis(20);

/// Runs until the agent ends.
pub async fn run(ctx: Arc<Context>) {
    let mut backoff = Backoff::new(Duration::from_millis(200), Duration::from_secs(10));
    let mut applied: BTreeMap<NetworkId, Arc<NetworkPlan>> = BTreeMap::new();
    let mut cut_off: BTreeMap<NodeId, String> = BTreeMap::new();
    loop {
        let mut pause = SWEEP;
        if *ctx.synced.borrow() {
            complain(&ctx, &mut cut_off);
            settle(&ctx).await;
            if pass(&ctx, &mut applied).await {
                backoff.reset();
            } else {
                pause = backoff.next();
            }
        }
        tokio::select! {
            () = ctx.wake_networks.notified() => {}
            // After the sweep's pause even unchanged plans are made again.
            () = tokio::time::sleep(pause) => applied.clear(),
            () = ctx.cancel.cancelled() => return,
        }
    }
}

/// A launch tells of a port, then of its instance, and a container gets its ids after that: waits a moment, so that one pass serves all.
async fn settle(ctx: &Context) {
    let settled = async {
        while unsettled(ctx) {
            ctx.wake_networks.notified().await;
        }
    };
    tokio::select! {
        () = settled => {}
        () = tokio::time::sleep(SETTLE) => {}
        () = ctx.cancel.cancelled() => {}
    }
}

/// Whether a port of this node cannot be plugged yet.
fn unsettled(ctx: &Context) -> bool {
    let world = ctx.world();
    let ids = lock(&ctx.container_ids);
    let waits = |instance: &Instance| {
        let container = instance.status.resolved.isolation == Isolation::Container;
        container && !instance.metadata.is_deleting() && !ids.contains_key(&InstanceId(instance.metadata.id))
    };
    let mut local = world.ports.values().filter(|p| p.status.node == Some(ctx.config.node));
    local.any(|p| world.instances.get(&p.spec.instance).is_none_or(|i| waits(i)))
}

/// Says once which nodes cannot be reached though networks are there and here.
fn complain(ctx: &Context, told: &mut BTreeMap<NodeId, String>) {
    let now: BTreeMap<NodeId, String> = Tunnels::of(&ctx.world(), ctx.config.node).cut_off().collect();
    for (_, reason) in now.iter().filter(|(node, reason)| told.get(*node) != Some(*reason)) {
        tracing::warn!("guests here cannot reach those of the same networks on {reason}");
    }
    *told = now;
}

/// One pass; false when something has to be tried again.
async fn pass(ctx: &Context, applied: &mut BTreeMap<NetworkId, Arc<NetworkPlan>>) -> bool {
    let zone = ctx.zone();
    let (wanted, plans) = {
        let world = ctx.world();
        let wanted = local_networks(&world, ctx.config.node);
        let ids = lock(&ctx.container_ids);
        let here = Here { node: ctx.config.node, zone: &zone, container_ids: &ids };
        let plans: Vec<_> = wanted.iter().filter_map(|id| network_plan(&world, &here, *id)).collect();
        (wanted, plans)
    };
    tracing::debug!(wanted = wanted.len(), known = plans.len(), "looking at the networks");
    let mut good = true;
    if !plans.is_empty()
        && let Err(error) = ctx.drivers.network.ensure_services().await
    {
        tracing::warn!(%error, "network services (DHCP, DNS, metadata) cannot be started");
        good = false;
    }
    for plan in plans {
        let plan = Arc::new(plan);
        if applied.get(&plan.id) == Some(&plan) {
            continue;
        }
        match ctx.drivers.network.ensure(&plan).await {
            Ok(handle) => {
                publish(ctx, &plan, &handle);
                applied.insert(plan.id, plan);
            }
            Err(error) => {
                tracing::warn!(network = %plan.name, %error, "network cannot be made");
                ctx.networks.send_modify(|state| drop(Arc::make_mut(state).errors.insert(plan.id, error)));
                ctx.wake_owners();
                good = false;
            }
        }
    }
    collect(ctx, &wanted, applied).await && good
}

fn publish(ctx: &Context, plan: &Arc<NetworkPlan>, handle: &NetworkHandle) {
    let changed = ctx.networks.send_if_modified(|state| {
        let mut new = NetworkState::clone(state);
        new.errors.remove(&plan.id);
        new.ports.retain(|_, (network, ..)| *network != plan.id);
        new.ports.extend(handle.ports.iter().map(|(port, h)| (*port, (plan.id, plan.mtu, h.clone()))));
        for port in &plan.ports {
            new.refused.remove(&port.id);
        }
        for (port, address, reason) in &handle.refused {
            new.refused.entry(*port).or_default().push(format!("{address}: {reason}"));
        }
        let changed = new.ports != state.ports || new.refused != state.refused || !state.errors.is_empty();
        new.plans.insert(plan.id, plan.clone());
        *state = Arc::new(new);
        changed
    });
    if changed {
        ctx.wake_owners();
    }
}

/// Removes networks that no instance here uses any more.
async fn collect(
    ctx: &Context,
    wanted: &BTreeSet<NetworkId>,
    applied: &mut BTreeMap<NetworkId, Arc<NetworkPlan>>,
) -> bool {
    let Ok(existing) = ctx.drivers.network.list().await else { return false };
    let mut good = true;
    for id in existing.into_iter().filter(|id| !wanted.contains(id)) {
        // What the server has not told us of may belong to guests that it has forgotten: those stay (see the owner's quarantine).
        if unknown_guests(ctx).await {
            continue;
        }
        if let Err(error) = ctx.drivers.network.remove(id).await {
            tracing::warn!(network = %id, %error, "network cannot be removed");
            good = false;
        }
        applied.remove(&id);
        ctx.networks.send_modify(|state| {
            let state = Arc::make_mut(state);
            let gone: Vec<PortId> =
                state.ports.iter().filter(|(_, (network, ..))| *network == id).map(|(port, _)| *port).collect();
            for port in gone {
                state.ports.remove(&port);
                state.refused.remove(&port);
            }
            state.plans.remove(&id);
            state.errors.remove(&id);
        });
    }
    good
}

/// While a guest is here that the control plane does not know, no network is collected: it may be using it.
async fn unknown_guests(ctx: &Context) -> bool {
    for driver in ctx.drivers.compute.values() {
        let Ok(guests) = driver.list().await else { return true };
        let world = ctx.world();
        if guests.iter().any(|g| !world.instances.contains_key(g)) {
            return true;
        }
    }
    false
}
