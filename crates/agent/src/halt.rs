//! Ending everything on this node without the control plane: what `down --stop-guests` does.

use std::time::Duration;

use oblak_model::InstanceId;
use oblak_platform::layout::Layout;

use crate::record::{FILE, Record};
use crate::services::Drivers;

/// Time that guests have to end by themselves.
const GRACE: Duration = Duration::from_secs(20);
/// Guests that are stopped at the same time.
const PARALLEL: usize = 16;

/// Stops every guest of this node and takes its networks and their services down; the next agent starts what should run again. Returns how many ran.
pub async fn stop_guests(drivers: &Drivers, layout: &Layout) -> usize {
    let mut stopped = 0;
    let mut tasks = tokio::task::JoinSet::new();
    for record in records(layout) {
        let Some(driver) = drivers.compute.get(&record.isolation).cloned() else { continue };
        let dir = layout.instances().join(record.id.to_string());
        while tasks.len() >= PARALLEL {
            stopped += usize::from(matches!(tasks.join_next().await, Some(Ok(true))));
        }
        tasks.spawn(async move {
            let runs = driver.observe(record.id).await.is_ok_and(|o| {
                !matches!(
                    o.state,
                    oblak_compute::GuestState::Absent
                        | oblak_compute::GuestState::Stopped
                        | oblak_compute::GuestState::Failed
                )
            });
            // So that the next agent takes the end for an order, not for a failure.
            let ordered = Record { stop_ordered: true, ..record.clone() };
            if runs && let Err(error) = ordered.save(&dir) {
                tracing::warn!(instance = %record.name, %error, "the record of an instance cannot be written");
            }
            if let Err(error) = driver.stop(record.id, GRACE).await {
                tracing::warn!(instance = %record.name, %error, "guest cannot be stopped");
                return false;
            }
            runs
        });
    }
    while let Some(done) = tasks.join_next().await {
        stopped += usize::from(matches!(done, Ok(true)));
    }
    for network in drivers.network.list().await.unwrap_or_default() {
        if let Err(error) = drivers.network.remove(network).await {
            tracing::warn!(%network, %error, "network cannot be removed");
        }
    }
    if let Err(error) = drivers.network.stop_services().await {
        tracing::warn!(%error, "netd cannot be stopped");
    }
    stopped
}

fn records(layout: &Layout) -> Vec<Record> {
    let Ok(entries) = std::fs::read_dir(layout.instances()) else { return Vec::new() };
    let dirs = entries.flatten().filter(|e| e.path().join(FILE).exists());
    dirs.filter(|e| e.file_name().to_str().is_some_and(|n| n.parse::<InstanceId>().is_ok()))
        .filter_map(|e| Record::load(&e.path()).ok().flatten())
        .collect()
}
