//! Reads from the cache over HTTPS beside a bare axum handler that answers the same bytes behind the same TLS, asked by the same client.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Result;
use oblak_model::{Instance, InstanceSpec};
use oblak_store::{MemoryStore, SharedStore};

use crate::Context;
use crate::report::{Goal, Row, Table};
use crate::service::{Bare, Service};
use crate::stats::Samples;
use crate::wire::{Connection, Http};

const ROUNDS: usize = 21;
/// Time of one side in one round.
const TURN: Duration = Duration::from_millis(250);
const CONNECTIONS: usize = 2;
/// Requests at once on each HTTP/2 connection.
const STREAMS: usize = 8;
/// Instances in the list.
const LISTED: usize = 100;

const ONE: &str = "/v1/projects/default/instances/i7";
const LIST: &str = "/v1/projects/default/instances";

/// Runs the measurement.
pub fn run(context: &Context, table: &mut Table) -> Result<()> {
    let dir = context.temp()?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let outcome = runtime.block_on(measure(dir.path(), table));
    runtime.shutdown_timeout(Duration::from_secs(5));
    outcome
}

async fn measure(dir: &Path, table: &mut Table) -> Result<()> {
    let store: SharedStore = Arc::new(MemoryStore::new());
    let pki = dir.join("pki");
    let service = Service::start(&store, &pki).await?;
    let client = service.client()?;
    for n in 0..LISTED {
        let spec = InstanceSpec { image: "busybox".into(), ..InstanceSpec::default() };
        client.create("default", &Instance::new(&format!("i{n}"), spec)).await?;
    }
    let mut asked = Connection::open(service.address, &service.ca_pem, &service.token, Http::One).await?;
    let (one, list) = (asked.get(ONE).await?, asked.get(LIST).await?);
    let sizes = (one.len(), list.len());
    let bare = Bare::start(&pki, vec![(ONE, one), (LIST, list)]).await?;
    for (what, path, http) in [
        (format!("GET one instance, {} bytes, HTTP/1.1", sizes.0), ONE, Http::One),
        (format!("GET one instance, {} bytes, HTTP/2, {STREAMS} at once", sizes.0), ONE, Http::Two),
        (format!("list of {LISTED}, {} bytes, HTTP/1.1", sizes.1), LIST, Http::One),
        (format!("list of {LISTED}, {} bytes, HTTP/2, {STREAMS} at once", sizes.1), LIST, Http::Two),
    ] {
        let (mut floor, mut ours) = (Samples::default(), Samples::default());
        for round in 0..ROUNDS {
            // Who goes first changes.
            for side in if round % 2 == 0 { [0, 1] } else { [1, 0] } {
                let address = if side == 0 { bare.address } else { service.address };
                let speed = turn(&service, address, path, http).await?;
                if side == 0 { floor.push(speed) } else { ours.push(speed) }
            }
        }
        table.row(Row::beside(what, "reads/s", &floor, &ours).goal(Goal::RatioAtLeast(0.7)));
    }
    table.note(format!(
        "{CONNECTIONS} connections, kept alive, bearer token checked each time; client and server share the cores"
    ));
    Ok(())
}

/// Reads per second.
async fn turn(service: &Service, address: SocketAddr, path: &'static str, http: Http) -> Result<f64> {
    let mut connections = Vec::new();
    for _ in 0..CONNECTIONS {
        let first = Connection::open(address, &service.ca_pem, &service.token, http).await?;
        let more: Vec<_> = (1..STREAMS).filter_map(|_| first.share()).collect();
        connections.push(first);
        connections.extend(more);
    }
    let started = Instant::now();
    let clients: Vec<_> = connections
        .into_iter()
        .map(|mut connection| {
            tokio::spawn(async move {
                let mut count = 0u64;
                while started.elapsed() < TURN {
                    connection.get(path).await?;
                    count += 1;
                }
                Ok::<_, anyhow::Error>(count)
            })
        })
        .collect();
    let mut count = 0;
    for client in clients {
        count += client.await??;
    }
    Ok(count as f64 / started.elapsed().as_secs_f64())
}
