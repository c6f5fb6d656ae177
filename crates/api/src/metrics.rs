//! Figures for Prometheus, in its text format (version 0.0.4). Bounded: routes are those of the router, guests at most [`GUESTS`].

use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use axum::http::Method;
use oblak_model::{Instance, InstanceKind};

use crate::state::App;

/// Upper bounds of the latency histogram in microseconds.
const BUCKETS: [u64; 12] =
    [250, 500, 1_000, 2_500, 5_000, 10_000, 25_000, 50_000, 100_000, 500_000, 1_000_000, 5_000_000];
/// Guests with gauges of their own; the rest is left out and counted.
const GUESTS: usize = 2_000;

#[derive(Default)]
struct Route {
    by_status: BTreeMap<(&'static str, u16), u64>,
    buckets: [u64; BUCKETS.len()],
    micros: u64,
    count: u64,
}

/// Counters of this server.
#[derive(Default)]
pub(crate) struct Metrics {
    routes: Mutex<BTreeMap<String, Route>>,
    commits: AtomicU64,
    conflicts: AtomicU64,
    pub watches: AtomicU64,
}

impl Metrics {
    pub fn request(&self, method: &Method, route: &str, status: u16, took: Duration) {
        let micros = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        let mut routes = self.routes.lock().unwrap_or_else(PoisonError::into_inner);
        let entry = match routes.get_mut(route) {
            Some(entry) => entry,
            None => routes.entry(route.to_string()).or_default(),
        };
        // Clients may send any word as a method; only the usual ones become labels.
        let word = match *method {
            Method::GET => "GET",
            Method::POST => "POST",
            Method::PUT => "PUT",
            Method::PATCH => "PATCH",
            Method::DELETE => "DELETE",
            _ => "other",
        };
        *entry.by_status.entry((word, status)).or_default() += 1;
        for (bound, count) in BUCKETS.iter().zip(&mut entry.buckets) {
            *count += u64::from(micros <= *bound);
        }
        entry.micros = entry.micros.saturating_add(micros);
        entry.count += 1;
    }

    pub fn committed(&self) {
        self.commits.fetch_add(1, Ordering::Relaxed);
    }

    pub fn conflicted(&self) {
        self.conflicts.fetch_add(1, Ordering::Relaxed);
    }

    fn write_requests(&self, out: &mut String) {
        let routes = self.routes.lock().unwrap_or_else(PoisonError::into_inner);
        head(out, "oblak_http_requests_total", "counter", "Requests answered.");
        for (route, entry) in &*routes {
            for ((method, status), count) in &entry.by_status {
                let _ = writeln!(
                    out,
                    "oblak_http_requests_total{{route=\"{route}\",method=\"{method}\",status=\"{status}\"}} {count}"
                );
            }
        }
        head(out, "oblak_http_request_seconds", "histogram", "Time to answer.");
        for (route, entry) in &*routes {
            for (bound, count) in BUCKETS.iter().zip(&entry.buckets) {
                let le = seconds(*bound);
                let _ = writeln!(out, "oblak_http_request_seconds_bucket{{route=\"{route}\",le=\"{le}\"}} {count}");
            }
            let (count, sum) = (entry.count, seconds(entry.micros));
            let _ = writeln!(out, "oblak_http_request_seconds_bucket{{route=\"{route}\",le=\"+Inf\"}} {count}");
            let _ = writeln!(out, "oblak_http_request_seconds_sum{{route=\"{route}\"}} {sum}");
            let _ = writeln!(out, "oblak_http_request_seconds_count{{route=\"{route}\"}} {count}");
        }
    }
}

/// Microseconds as seconds, without rounding.
fn seconds(micros: u64) -> String {
    format!("{}.{:06}", micros / 1_000_000, micros % 1_000_000)
}

fn head(out: &mut String, name: &str, kind: &str, help: &str) {
    let _ = writeln!(out, "# HELP {name} {help}\n# TYPE {name} {kind}");
}

fn single(out: &mut String, name: &str, kind: &str, help: &str, value: u64) {
    head(out, name, kind, help);
    let _ = writeln!(out, "{name} {value}");
}

/// The whole page.
pub(crate) async fn render(app: &App) -> String {
    let mut out = String::with_capacity(8192);
    let m = &app.metrics;
    m.write_requests(&mut out);
    let load = |n: &AtomicU64| n.load(Ordering::Relaxed);
    single(&mut out, "oblak_commits_total", "counter", "Commits made by this server.", load(&m.commits));
    single(
        &mut out,
        "oblak_commit_conflicts_total",
        "counter",
        "Commits planned anew after a conflict.",
        load(&m.conflicts),
    );
    single(&mut out, "oblak_watches", "gauge", "Open watches of clients and agents.", load(&m.watches));
    single(&mut out, "oblak_streams", "gauge", "Open console, exec, log and port streams.", app.streams.open() as u64);
    single(&mut out, "oblak_tunnels", "gauge", "Tunnels of agents.", app.tunnels.count() as u64);
    if let Ok(stats) = app.store.stats().await {
        single(&mut out, "oblak_store_keys", "gauge", "Live keys.", stats.keys);
        single(&mut out, "oblak_store_bytes", "gauge", "Size of the store.", stats.bytes);
        single(&mut out, "oblak_store_commits_total", "counter", "Transactions committed.", stats.commits);
        single(&mut out, "oblak_store_batches_total", "counter", "Durable batches.", stats.batches);
        single(&mut out, "oblak_store_fsyncs_total", "counter", "Calls of fdatasync.", stats.fsyncs);
        single(&mut out, "oblak_store_watchers", "gauge", "Open watches of the store.", stats.watchers);
        single(&mut out, "oblak_store_leases", "gauge", "Live leases.", stats.leases);
    }
    let cache = app.docs.stats();
    single(&mut out, "oblak_cache_items", "gauge", "Values in the cache.", cache.items as u64);
    single(&mut out, "oblak_cache_bytes", "gauge", "Bytes of values in the cache.", cache.bytes as u64);
    single(&mut out, "oblak_cache_resyncs_total", "counter", "Times the cache had to list again.", cache.resyncs);
    single(&mut out, "oblak_cache_broken", "gauge", "Values that cannot be decoded.", cache.broken as u64);
    guests(app, &mut out);
    out
}

fn guests(app: &App, out: &mut String) {
    let instances = app.all::<InstanceKind>(None).unwrap_or_default();
    let mut phases: BTreeMap<(&str, &str), u64> = BTreeMap::new();
    for instance in &instances {
        let isolation = instance.status.resolved.isolation.as_str();
        *phases.entry((instance.status.phase.as_str(), isolation)).or_default() += 1;
    }
    head(out, "oblak_instances", "gauge", "Instances by phase.");
    for ((phase, isolation), count) in phases {
        let _ = writeln!(out, "oblak_instances{{phase=\"{phase}\",isolation=\"{isolation}\"}} {count}");
    }
    let sampled: Vec<_> =
        instances.iter().filter_map(|i| Some((i, app.usage.latest(i.metadata.id)?))).take(GUESTS).collect();
    let mut family = |name: &str, kind: &str, help: &str, value: &dyn Fn(&oblak_model::wire::Usage) -> String| {
        head(out, name, kind, help);
        for (instance, usage) in &sampled {
            let _ = writeln!(out, "{name}{{{}}} {}", labels(instance), value(usage));
        }
    };
    family("oblak_guest_cpu_seconds_total", "counter", "CPU time of a guest.", &|u| seconds(u.cpu_ns / 1000));
    family("oblak_guest_memory_bytes", "gauge", "Memory that a guest uses.", &|u| u.memory.0.to_string());
    family("oblak_guest_disk_read_bytes_total", "counter", "Bytes read.", &|u| u.disk_read.0.to_string());
    family("oblak_guest_disk_written_bytes_total", "counter", "Bytes written.", &|u| u.disk_write.0.to_string());
    family("oblak_guest_network_received_bytes_total", "counter", "Bytes received.", &|u| u.net_rx.0.to_string());
    family("oblak_guest_network_sent_bytes_total", "counter", "Bytes sent.", &|u| u.net_tx.0.to_string());
}

/// Names are validated, so nothing needs escaping.
fn labels(instance: &Instance) -> String {
    let node = instance.status.placement.as_ref().map_or("", |p| p.node_name.as_str());
    format!("project=\"{}\",instance=\"{}\",node=\"{node}\"", instance.scope_key(), instance.metadata.name)
}
