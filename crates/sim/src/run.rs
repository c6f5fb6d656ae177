//! One simulation from begin to end.

use std::time::Duration;

use oblak_client::Client;
use oblak_model::{Instance, InstanceKind, NodeKind, Volume, VolumeKind};
use serde_json::json;
use tokio::time::Instant;

use crate::cloud::Cloud;
use crate::trace::Trace;
use crate::workload::Worker;
use crate::{Error, Settings, chaos};

/// Clients at work.
const WORKERS: usize = 3;
/// How soon after everything was mended the cloud must be what is asked for. The longest pauses are the restart policy's (60 s) and a
/// client's deadline on a dead connection (30 s).
const SETTLES_WITHIN: Duration = Duration::from_secs(300);
/// Longest time a message is on its way: two delays of the worst weather, and a slow commit in between.
const ARRIVES_WITHIN: Duration = Duration::from_secs(15);
/// The agent takes a network away a moment after its last port.
const CLEARS_WITHIN: Duration = Duration::from_secs(30);
/// How often it is looked at the guests.
const LOOK_EVERY: Duration = Duration::from_millis(250);

/// What came of it.
#[derive(Clone, Debug)]
pub struct Report {
    /// Lines of the trace.
    pub lines: u64,
    /// Digest of the trace.
    pub digest: u64,
    /// The invariant that did not hold, if one did not.
    pub violation: Option<String>,
    /// The last lines of the trace.
    pub last: Vec<String>,
    /// Virtual seconds from mending to rest.
    pub settled_after: f64,
}

/// Simulates. Everything happens in this thread.
///
/// # Errors
/// The simulation could not be set up; a violation is no error but part of the report.
pub fn run(settings: Settings, out: Option<Box<dyn std::io::Write + Send>>) -> Result<Report, Error> {
    let base = ["/dev/shm", "/tmp"].into_iter().map(std::path::Path::new).find(|p| p.is_dir());
    let dir = tempfile::Builder::new().prefix("oblak-sim-").tempdir_in(base.unwrap_or(std::path::Path::new(".")))?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build()?;
    let report = runtime.block_on(async {
        let trace = Trace::new(Instant::now(), out);
        let cloud = Cloud::start(settings, dir.path(), trace).await?;
        simulate(&cloud).await
    });
    // Tasks hold files; they go before the directory does.
    drop(runtime);
    report
}

async fn simulate(cloud: &Cloud) -> Result<Report, Error> {
    let settings = &cloud.settings;
    cloud.settle(Duration::from_secs(60)).await;
    let pause = Duration::from_secs_f64(settings.pause_s);
    let mut workers = Vec::new();
    for n in 1..=WORKERS {
        let name = format!("c{n}");
        let client = cloud.client(&name)?;
        workers.push(Worker::new(&name, client, settings.seed, settings.nodes, pause, cloud.trace.clone()));
    }
    if cloud.trace.violated().is_none() {
        disturb(cloud, &mut workers).await;
    }
    chaos::heal(cloud);
    // What was on its way when the work ended still arrives: later than that nothing may appear out of nowhere.
    tokio::time::sleep(ARRIVES_WITHIN).await;
    let healed = Instant::now();
    let admin = cloud.client("admin")?;
    tidy(cloud, &admin).await;
    cloud.settle(SETTLES_WITHIN).await;
    let settled_after = healed.elapsed().as_secs_f64();
    if cloud.trace.violated().is_none() {
        tokio::time::sleep(CLEARS_WITHIN).await;
        cloud.check_leaks().await;
        for worker in &mut workers {
            if !worker.compare_all().await {
                cloud.trace.violation("a question was not answered though nothing was broken any more");
            }
        }
    }
    if cloud.trace.violated().is_none() {
        clear(cloud, &admin).await;
    }
    cloud.trace.flush();
    let (lines, digest) = cloud.trace.digest();
    Ok(Report { lines, digest, violation: cloud.trace.violated(), last: cloud.trace.last(), settled_after })
}

/// Work and chaos at the same time, until the time is over or something is wrong.
async fn disturb(cloud: &Cloud, workers: &mut [Worker]) {
    let end = Instant::now() + Duration::from_secs_f64(cloud.settings.hours * 3600.0);
    let watching = async {
        while Instant::now() < end && cloud.trace.violated().is_none() {
            cloud.check_guests().await;
            tokio::time::sleep(LOOK_EVERY).await;
        }
    };
    let working = futures_util::future::join_all(workers.iter_mut().map(Worker::work));
    let breaking = async {
        if cloud.settings.chaos {
            chaos::run(cloud).await;
        } else {
            std::future::pending::<()>().await;
        }
    };
    tokio::select! {
        biased;
        () = watching => {}
        _ = working => {}
        () = breaking => {}
    }
}

/// What people do afterwards: nodes are taken back into service.
async fn tidy(cloud: &Cloud, admin: &Client) {
    for machine in &cloud.machines {
        let mut left = 60;
        let patch = json!({"spec": {"schedulable": true}});
        while left > 0 && admin.patch::<NodeKind>("", &machine.name, &patch, None).await.is_err() {
            tokio::time::sleep(Duration::from_secs(1)).await;
            left -= 1;
        }
    }
}

/// Deletes everything and looks whether anything stays.
async fn clear(cloud: &Cloud, admin: &Client) {
    let instances: Vec<Instance> = cloud.checks.mirror().instances.values().cloned().collect();
    for instance in instances {
        if let Err(error) = admin.delete::<InstanceKind>("default", &instance.metadata.name).await {
            cloud.trace.violation(format_args!("{} cannot be deleted: {error}", instance.metadata.name));
        }
    }
    cloud.settle(SETTLES_WITHIN).await;
    let volumes: Vec<Volume> = cloud.checks.mirror().volumes.values().cloned().collect();
    for volume in volumes {
        if let Err(error) = admin.delete::<VolumeKind>("default", &volume.metadata.name).await {
            cloud.trace.violation(format_args!("{} cannot be deleted: {error}", volume.metadata.name));
        }
    }
    cloud.settle(SETTLES_WITHIN).await;
    tokio::time::sleep(CLEARS_WITHIN).await;
    cloud.check_leaks().await;
    let mirror = cloud.checks.mirror();
    let mut left: Vec<String> = mirror
        .keys
        .keys()
        .filter(|key| matches!(key.segments().next(), Some("instance" | "port" | "volume" | "hostport" | "address")))
        .map(ToString::to_string)
        .collect();
    left.extend(mirror.nodes.keys().filter_map(|id| {
        let sum = mirror.reserved(*id);
        (sum.instances != 0).then(|| format!("reservation of {id}: {sum:?}"))
    }));
    drop(mirror);
    if !left.is_empty() {
        cloud.trace.violation(format_args!("left over in the store: {}", left.join(", ")));
    }
}
