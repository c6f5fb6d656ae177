//! Durable creates over HTTPS: 64 clients, each with a connection of its own, through TLS, authentication, validation, admission and the
//! store; beside raw redb that writes the same keys and bytes, transaction by transaction, with group commit.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, PoisonError};
use std::time::Instant;

use anyhow::{Context as _, Result};
use bytes::Bytes;
use oblak_model::{Instance, InstanceSpec, Key, KeySpec, NetworkAttachment, Subnet, SubnetSpec};
use oblak_store::{Prefix, RedbOptions, RedbStore, SharedStore, Store, WatchItem, WatchStream};
use tokio::sync::Mutex;

use crate::Context;
use crate::raw::{Raw, Writes};
use crate::report::{Goal, Row, Table};
use crate::service::{Bare, Service};
use crate::stats::Samples;
use crate::wire::{Connection, Http};

const CLIENTS: usize = 64;
const ROUNDS: usize = 21;
/// Creates in one round.
const CREATES: usize = 1280;
const PUBLIC_KEY: &str =
    "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIAABAgMEBQYHCAkKCwwNDg8QERITFBUWFxgZGhscHR4f bench@example";

/// Runs the measurement.
pub fn run(context: &Context, table: &mut Table) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let outcome = runtime.block_on(measure(context, table));
    runtime.shutdown_timeout(std::time::Duration::from_secs(5));
    outcome
}

async fn measure(context: &Context, table: &mut Table) -> Result<()> {
    let dir = context.temp()?;
    let path = dir.path().join("api.redb");
    let redb = Arc::new(tokio::task::spawn_blocking(move || RedbStore::open(&path, RedbOptions::default())).await??);
    let store: SharedStore = redb.clone();
    let service = Service::start(&store, &dir.path().join("pki")).await?;
    let client = service.client()?;
    // Room for all addresses.
    client.create("default", &oblak_model::Network::new("wide", oblak_model::NetworkSpec::default())).await?;
    client.create("default", &Subnet::new("wide", SubnetSpec::new("wide", "10.128.0.0/12".parse()?))).await?;
    let raw = Arc::new(Raw::open(&dir.path().join("raw.redb"))?);
    let mut connections = Vec::new();
    for _ in 0..CLIENTS {
        connections.push(Arc::new(Mutex::new(
            Connection::open(service.address, &service.ca_pem, &service.token, Http::One).await?,
        )));
    }
    let bare = Bare::start(&dir.path().join("pki"), vec![("/bare", Bytes::new())]).await?;
    let mut bare_connections = Vec::new();
    for _ in 0..CLIENTS {
        bare_connections.push(Arc::new(Mutex::new(
            Connection::open(bare.address, &service.ca_pem, &service.token, Http::One).await?,
        )));
    }
    for (plural, body) in [("keys", key as fn(usize) -> Result<Bytes>), ("instances", instance)] {
        let (mut ours, mut floor, mut fsyncs, mut echo) =
            (Samples::default(), Samples::default(), Samples::default(), Samples::default());
        let (mut bytes, mut keys) = (0, 0);
        for round in 0..ROUNDS {
            let mut watch = store.watch(&Prefix::all(), store.revision().await?).await.context("cannot watch")?;
            let bodies: Vec<Bytes> = (0..CREATES).map(|n| body(round * CREATES + n)).collect::<Result<_>>()?;
            echo.push(over_https(&bare_connections, "/bare", bodies.clone()).await?);
            let before = redb.stats().await?.fsyncs;
            ours.push(over_https(&connections, &format!("/v1/projects/default/{plural}"), bodies).await?);
            fsyncs.push(CREATES as f64 / (redb.stats().await?.fsyncs - before).max(1) as f64);
            let written = collect(&mut watch, CREATES).await?;
            keys = written[0].len();
            bytes = written[0].iter().map(|(k, v)| k.as_str().len() + v.len()).sum();
            floor.push(over_raw(&raw, written).await?);
        }
        table.row(
            Row::beside(
                format!("over HTTPS: {plural}, {keys} keys and {bytes} bytes each"),
                "creates/s",
                &floor,
                &ours,
            )
            .goal(Goal::RatioAtLeast(0.4)),
        );
        table.row(Row::beside(
            format!("  {plural} beside a bare handler that gives the body back"),
            "creates/s",
            &echo,
            &ours,
        ));
        table.row(Row::median(format!("  {plural} made durable by one fsync"), "creates", &fsyncs));
    }
    table.note("over HTTPS: HTTP/1.1, 64 connections of a lean client on the same cores; the raw side has no client, network, TLS or validation at all");
    Ok(())
}

fn key(n: usize) -> Result<Bytes> {
    let object = Key::new(&format!("k{n}"), KeySpec { public_key: PUBLIC_KEY.into() });
    Ok(serde_json::to_vec(&object)?.into())
}

fn instance(n: usize) -> Result<Bytes> {
    let network = NetworkAttachment { network: "wide".into(), ..NetworkAttachment::default() };
    let spec = InstanceSpec { image: "busybox".into(), networks: Some(vec![network]), ..InstanceSpec::default() };
    Ok(serde_json::to_vec(&Instance::new(&format!("i{n}"), spec))?.into())
}

/// Creates per second.
async fn over_https(connections: &[Arc<Mutex<Connection>>], path: &str, bodies: Vec<Bytes>) -> Result<f64> {
    let (count, bodies, next) = (bodies.len(), Arc::new(bodies), Arc::new(AtomicUsize::new(0)));
    let started = Instant::now();
    let clients: Vec<_> = connections
        .iter()
        .map(|connection| {
            let (connection, bodies, next) = (connection.clone(), bodies.clone(), next.clone());
            let path = path.to_string();
            tokio::spawn(async move {
                let mut connection = connection.lock().await;
                while let Some(body) = bodies.get(next.fetch_add(1, Ordering::Relaxed)) {
                    connection.create(&path, body.clone()).await?;
                }
                Ok::<_, anyhow::Error>(())
            })
        })
        .collect();
    for client in clients {
        client.await??;
    }
    Ok(count as f64 / started.elapsed().as_secs_f64())
}

/// What the creates wrote, commit by commit.
async fn collect(watch: &mut WatchStream, commits: usize) -> Result<Vec<Writes>> {
    let mut written = Vec::new();
    while written.len() < commits {
        let item = watch.next().await.context("the watch ended")??;
        let WatchItem::Event(event) = item else { continue };
        written.push(event.changes.into_iter().filter_map(|c| Some((c.key, c.value?))).collect());
    }
    Ok(written)
}

/// Transactions per second.
async fn over_raw(raw: &Arc<Raw>, written: Vec<Writes>) -> Result<f64> {
    let (count, queue) = (written.len(), Arc::new(std::sync::Mutex::new(written)));
    let started = Instant::now();
    let clients: Vec<_> = (0..CLIENTS)
        .map(|_| {
            let (raw, queue) = (raw.clone(), queue.clone());
            tokio::spawn(async move {
                loop {
                    let next = queue.lock().unwrap_or_else(PoisonError::into_inner).pop();
                    let Some(writes) = next else { return Ok::<_, anyhow::Error>(()) };
                    raw.commit(writes).await?;
                }
            })
        })
        .collect();
    for client in clients {
        client.await??;
    }
    Ok(count as f64 / started.elapsed().as_secs_f64())
}
