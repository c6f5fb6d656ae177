//! From the request to create an instance until it runs, on fake drivers: durable commits, and time in units of one fsync.

use std::io::Write;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use oblak_client::{Client, ListOptions, Watch, WatchEvent};
use oblak_model::{Instance, InstanceKind, Phase};

use crate::Context;
use crate::fakecloud::{FakeCloud, instance};
use crate::report::{Goal, Row, Table};
use crate::stats::{Samples, timed};

const ROUNDS: usize = 41;
/// Instances made at once.
const BURST: usize = 200;
const DEADLINE: Duration = Duration::from_secs(60);
/// Between two instances, so that what follows one (its events) is not counted for the next.
const REST: Duration = Duration::from_millis(60);

/// Runs the measurement.
pub fn run(context: &Context, table: &mut Table) -> Result<()> {
    let dir = context.temp()?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let outcome = runtime.block_on(measure(dir.path(), table));
    runtime.shutdown_timeout(Duration::from_secs(5));
    outcome
}

async fn measure(dir: &Path, table: &mut Table) -> Result<()> {
    let cloud = FakeCloud::start(&dir.join("data")).await?;
    let (store, client) = (&cloud.store, &cloud.client);
    let mut disk = std::fs::File::create(dir.join("fsync"))?;
    let (mut fsync, mut took, mut accepted) = (Samples::default(), Samples::default(), Samples::default());
    let (mut commits, mut fsyncs, mut settled) = (Samples::default(), Samples::default(), Samples::default());
    let idle = {
        let before = store.stats().await?.commits;
        tokio::time::sleep(Duration::from_secs(1)).await;
        store.stats().await?.commits - before
    };
    let mut watch = client.watch::<InstanceKind>("default", store.revision().await?, &ListOptions::default()).await?;
    for round in 0..ROUNDS {
        tokio::time::sleep(REST).await;
        disk.write_all(&[round as u8; 4096])?;
        let (synced, time) = timed(|| disk.sync_data());
        synced?;
        fsync.push_ms(time);
        let name = format!("i{round}");
        let before = store.stats().await?;
        let started = Instant::now();
        client.create("default", &instance(&name)).await?;
        accepted.push_ms(started.elapsed());
        running(&mut watch, 1).await?;
        took.push_ms(started.elapsed());
        let after = store.stats().await?;
        commits.push((after.commits - before.commits) as f64);
        fsyncs.push((after.fsyncs - before.fsyncs) as f64);
        tokio::time::sleep(REST).await;
        settled.push((store.stats().await?.commits - before.commits) as f64);
    }
    table.row(Row::median("durable commits, create to running", "commits", &commits).goal(Goal::AtMost(3.0)));
    table.row(Row::median("  fsyncs of the store meanwhile", "fsyncs", &fsyncs));
    table.row(Row::median("  commits until all is quiet (events)", "commits", &settled));
    table.row(
        Row::beside("create to running beside one fsync of the same disk", "ms", &fsync, &took)
            .goal(Goal::RatioAtMost(10.0)),
    );
    table.row(Row::median("  of that until the request is answered", "ms", &accepted));
    let started = Instant::now();
    let before = store.stats().await?;
    let mut making = tokio::task::JoinSet::new();
    for n in 0..BURST {
        let client = client.clone();
        making.spawn(async move { client.create("default", &instance(&format!("b{n}"))).await });
    }
    while let Some(made) = making.join_next().await {
        made??;
    }
    if let Err(error) = running(&mut watch, BURST).await {
        return Err(error.context(format!("not running: {}", missing(client).await?)));
    }
    let each = started.elapsed().as_secs_f64() / BURST as f64;
    let after = store.stats().await?;
    table.row(Row::value(format!("{BURST} at once: created and running"), "instances/s", 1.0 / each));
    let per = |of: u64| of as f64 / BURST as f64;
    table.row(Row::value("  commits each", "commits", per(after.commits - before.commits)));
    table.row(Row::value("  fsyncs of the store each", "fsyncs", per(after.fsyncs - before.fsyncs)));
    table.note("real API over TLS, real redb, real control plane and agent in one process; running is when a watcher of the API hears it");
    table.note(format!("an idle cloud makes {idle} commits in a second"));
    table.note("peer, for scale: OpenStack with its fake driver needs 2.9 s on this kind of machine");
    Ok(())
}

/// What the instances that do not run say.
async fn missing(client: &Client) -> Result<String> {
    let all = client.list_all::<InstanceKind>("default", &ListOptions::default()).await?.items;
    let others = all.iter().filter(|i| i.status.phase != Phase::Running).take(3);
    let line =
        |i: &Instance| format!("{} {} {} {:?}", i.metadata.name, i.status.phase, i.status.reason, i.status.message);
    Ok(others.map(line).collect::<Vec<_>>().join("; "))
}

/// Waits until as many instances have been reported running.
pub async fn running(watch: &mut Watch<InstanceKind>, count: usize) -> Result<()> {
    let mut seen = std::collections::BTreeSet::new();
    let all = async {
        while seen.len() < count {
            let event = watch.next().await?;
            if let WatchEvent::Put(object, _) = event {
                match object.status.phase {
                    Phase::Running => drop(seen.insert(object.metadata.id)),
                    Phase::Failed => bail!("{} failed: {}", object.metadata.name, object.status.message),
                    _ => {}
                }
            }
        }
        Ok(())
    };
    let outcome = tokio::time::timeout(DEADLINE, all).await;
    outcome.with_context(|| format!("{} of {count} run", seen.len()))?
}
