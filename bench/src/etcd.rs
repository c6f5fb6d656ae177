//! Creates per second on a real etcd: 16 projects at once, beside bare transactions of etcd with the same keys and values.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use anyhow::{Context as _, Result, bail};
use etcd_client::{Client, Compare, CompareOp, Txn as EtcdTxn, TxnOp};
use oblak_store::{Key, Store, Txn};
use oblak_store_etcd::testing::{Server, Settings, available};
use oblak_store_etcd::{EtcdOptions, EtcdStore};

use crate::Context;
use crate::report::{Goal, Row, Table};
use crate::stats::Samples;

const PROJECTS: u64 = 16;
/// Clients in each project.
const CLIENTS: u64 = 2;
const ROUNDS: u64 = 15;
/// Creates in one turn of one side.
const CREATES: u64 = 1600;
/// About the size of an instance.
const VALUE_BYTES: usize = 800;

/// Runs the measurement.
pub fn run(_: &Context, table: &mut Table) -> Result<()> {
    if !available(&["etcd", "setpriv"]) {
        bail!("etcd (package etcd-server) and setpriv (util-linux) are needed");
    }
    let server = Server::start(&Settings { durable: true, ..Settings::default() });
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(async {
        let store = Arc::new(EtcdStore::open(EtcdOptions::new([server.url()])).await?);
        let raw = Client::connect([server.url()], None).await?;
        let (mut ours, mut theirs) = (Samples::default(), Samples::default());
        for round in 0..ROUNDS {
            // Who goes first changes, so that neither always finds the disk tired.
            for side in if round % 2 == 0 { [0, 1] } else { [1, 0] } {
                if side == 0 {
                    let store = Arc::clone(&store);
                    ours.push(storm(round, move |pair| create_in_store(Arc::clone(&store), pair)).await?);
                } else {
                    let raw = raw.clone();
                    theirs.push(storm(round, move |pair| create_in_etcd(raw.clone(), pair)).await?);
                }
            }
        }
        let what = format!("creates of {VALUE_BYTES} bytes with a name, {PROJECTS} projects, {} clients", PROJECTS * CLIENTS);
        table.row(Row::beside(what, "creates/s", &theirs, &ours).goal(Goal::RatioAtLeast(0.8)));
        table.note("raw: one transaction with two conditions and two puts; ours also records the transaction's id and follows the log");
        Ok(())
    })
}

/// The object's key and that of its name.
type Pair = (Key, Key);

fn pair(round: u64, n: u64) -> Result<Pair> {
    let project = n % PROJECTS;
    let object = Key::new(format!(
        "/instance/p{project}/{round:08x}-{n:04x}-7000-{:016x}",
        n.wrapping_mul(0x9e37_79b9_7f4a_7c15)
    ))?;
    Ok((object, Key::new(format!("/name/instance/p{project}/web-{round}-{n}"))?))
}

/// Lets the clients create as fast as they can; creates per second.
async fn storm<F>(round: u64, create: impl Fn(Pair) -> F + Clone + Send + 'static) -> Result<f64>
where
    F: Future<Output = Result<()>> + Send + 'static,
{
    let next = Arc::new(AtomicU64::new(0));
    let start = Instant::now();
    let clients: Vec<_> = (0..PROJECTS * CLIENTS)
        .map(|_| {
            let (next, create) = (Arc::clone(&next), create.clone());
            tokio::spawn(async move {
                loop {
                    let n = next.fetch_add(1, Ordering::Relaxed);
                    if n >= CREATES {
                        return anyhow::Ok(());
                    }
                    create(pair(round, n)?).await?;
                }
            })
        })
        .collect();
    for client in clients {
        client.await.context("a client panicked")??;
    }
    Ok(CREATES as f64 / start.elapsed().as_secs_f64())
}

async fn create_in_store(store: Arc<EtcdStore>, (object, name): Pair) -> Result<()> {
    let txn = Txn::random().create(object, vec![b'v'; VALUE_BYTES]).create(name, "id");
    let outcome = store.commit(txn).await?;
    outcome.revision().map(drop).with_context(|| format!("the create was refused: {outcome:?}"))
}

async fn create_in_etcd(mut client: Client, (object, name): Pair) -> Result<()> {
    let (object, name) = (format!("raw/d{object}"), format!("raw/d{name}"));
    let absent = |key: &str| Compare::create_revision(key, CompareOp::Equal, 0);
    let txn = EtcdTxn::new()
        .when([absent(&object), absent(&name)])
        .and_then([TxnOp::put(object, vec![b'v'; VALUE_BYTES], None), TxnOp::put(name, "id", None)]);
    if !client.txn(txn).await?.succeeded() {
        bail!("the create was refused");
    }
    Ok(())
}
