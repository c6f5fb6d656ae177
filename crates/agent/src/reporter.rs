//! Reports to the API: the newest status per object, sent together, again until taken.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Mutex;
use std::time::Duration;

use oblak_client::Client;
use oblak_model::NodeId;
use oblak_model::wire::{NewEvent, REPORT_LIMIT, Report, ReportItem, STALE_EPOCH};
use tokio::sync::Notify;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::backoff::Backoff;

/// Events kept while the API cannot be reached; the oldest are dropped first.
const MAX_EVENTS: usize = 1000;
/// While many come, gathers what comes within this time into one report. Short, because a person may be waiting for `running`.
const GATHER: Duration = Duration::from_millis(2);
/// After so much silence a status is sent at once.
const QUIET: Duration = Duration::from_millis(10);
/// Events go along with the next status; alone they are sent after this time.
const EVENTS_ALONE: Duration = Duration::from_millis(50);
/// Looks this often whether the node is registered by now.
const UNREGISTERED: Duration = Duration::from_millis(20);

#[derive(Default)]
struct Waiting {
    /// One item per object and sort: a newer status replaces an older one that was not sent yet, so this is bounded by the objects.
    items: BTreeMap<(u8, Uuid), ReportItem>,
    events: VecDeque<NewEvent>,
}

/// The queue of what is to be reported.
#[derive(Default)]
pub struct Reporter {
    waiting: Mutex<Waiting>,
    wake: Notify,
    has_events: Notify,
}

fn slot(item: &ReportItem) -> (u8, Uuid) {
    match item {
        ReportItem::Instance { id, .. } => (0, id.0),
        ReportItem::Volume { id, .. } => (1, id.0),
        ReportItem::Image { id, .. } => (2, id.0),
        ReportItem::Snapshot { id, .. } => (3, id.0),
        ReportItem::ImageCopy { id, .. } => (4, id.0),
        ReportItem::Migration { id, .. } => (5, id.0),
        ReportItem::Left { id, .. } => (6, id.0),
        // After everything else, so that the last status arrives before the object may go away.
        ReportItem::Released { id, .. } => (9, *id),
    }
}

impl Reporter {
    fn lock(&self) -> std::sync::MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Queues a status.
    pub fn report(&self, item: ReportItem) {
        self.lock().items.insert(slot(&item), item);
        self.wake.notify_one();
    }

    /// Queues an event.
    pub fn event(&self, event: NewEvent) {
        let mut waiting = self.lock();
        if waiting.events.len() >= MAX_EVENTS {
            waiting.events.pop_front();
        }
        waiting.events.push_back(event);
        drop(waiting);
        self.has_events.notify_one();
    }

    /// What is to be sent now; events without a status only when `alone`.
    fn take(&self, alone: bool) -> Option<(Vec<ReportItem>, Vec<NewEvent>)> {
        let mut waiting = self.lock();
        if waiting.items.is_empty() && !alone {
            return None;
        }
        let keys: Vec<_> = waiting.items.keys().take(REPORT_LIMIT).copied().collect();
        let items: Vec<_> = keys.iter().filter_map(|k| waiting.items.remove(k)).collect();
        let count = waiting.events.len().min(REPORT_LIMIT);
        let events: Vec<_> = waiting.events.drain(..count).collect();
        if items.is_empty() && events.is_empty() { None } else { Some((items, events)) }
    }

    /// Puts back what could not be sent, unless something newer came meanwhile.
    fn put_back(&self, items: Vec<ReportItem>, events: Vec<NewEvent>) {
        let mut waiting = self.lock();
        for item in items {
            waiting.items.entry(slot(&item)).or_insert(item);
        }
        for event in events.into_iter().rev() {
            if waiting.events.len() < MAX_EVENTS {
                waiting.events.push_front(event);
            }
        }
    }

    async fn events_alone(&self) {
        while self.lock().events.is_empty() {
            self.has_events.notified().await;
        }
        tokio::time::sleep(EVENTS_ALONE).await;
    }

    /// Sends what is queued until cancelled.
    pub async fn run(&self, client: &Client, node: NodeId, epoch: impl Fn() -> u64, cancel: &CancellationToken) {
        let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(5));
        let mut last: Option<Instant> = None;
        let mut alone = false;
        while !cancel.is_cancelled() {
            if epoch() == 0 {
                // Not registered yet: nothing would be taken.
                tokio::select! { () = tokio::time::sleep(UNREGISTERED) => {}, () = cancel.cancelled() => {} }
                continue;
            }
            let Some((items, events)) = self.take(std::mem::take(&mut alone)) else {
                tokio::select! {
                    () = self.wake.notified() => {
                        if last.is_some_and(|at| at.elapsed() < QUIET) {
                            tokio::time::sleep(GATHER).await;
                        }
                    }
                    () = self.events_alone() => alone = true,
                    () = cancel.cancelled() => {}
                }
                continue;
            };
            let report = Report { epoch: epoch(), items, events };
            last = Some(Instant::now());
            let again = match client.node_report(node, &report).await {
                Ok(answer) => self.refused(report, &answer.refused),
                Err(error) => {
                    tracing::debug!(%error, "report not sent; trying again");
                    self.put_back(report.items, report.events);
                    true
                }
            };
            if again {
                tokio::select! { () = tokio::time::sleep(backoff.next()) => {}, () = cancel.cancelled() => {} }
            } else {
                backoff.reset();
            }
        }
    }

    /// Puts back what was refused only because the node is not registered (again) yet. Returns whether there was any.
    fn refused(&self, report: Report, refused: &[(usize, String)]) -> bool {
        let mut early = Vec::new();
        for (index, reason) in refused {
            let Some(item) = report.items.get(*index) else { continue };
            if reason == STALE_EPOCH {
                early.push(item.clone());
            } else {
                tracing::debug!(item = ?slot(item), reason, "report not taken");
            }
        }
        let any = !early.is_empty();
        if any {
            self.put_back(early, report.events);
        }
        any
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn released(n: u128) -> ReportItem {
        ReportItem::Released { object_kind: "instance".into(), project: "default".into(), id: Uuid::from_u128(n) }
    }

    #[test]
    fn newest_wins_and_failures_do_not_overwrite() {
        let r = Reporter::default();
        r.report(released(1));
        r.report(released(1));
        r.report(released(2));
        let (items, events) = r.take(false).unwrap();
        assert_eq!(items.len(), 2);
        assert!(r.take(false).is_none());
        r.report(released(1));
        r.put_back(items, events);
        assert_eq!(r.take(false).unwrap().0.len(), 2);
    }

    fn event() -> NewEvent {
        let about = oblak_model::About { kind: "instance".into(), name: "web".into(), id: Uuid::from_u128(1) };
        let severity = oblak_model::Severity::Normal;
        NewEvent { project: None, about, severity, reason: "Started".into(), message: String::new() }
    }

    #[test]
    fn events_go_along_with_a_status() {
        let r = Reporter::default();
        r.event(event());
        assert!(r.take(false).is_none());
        r.report(released(1));
        assert_eq!(r.take(false).unwrap().1.len(), 1);
        r.event(event());
        assert_eq!(r.take(true).unwrap().1.len(), 1);
    }

    #[test]
    fn what_came_before_the_registration_is_sent_again() {
        let r = Reporter::default();
        let report = Report { items: vec![released(1), released(2), released(3)], ..Report::default() };
        let refused = [(0, STALE_EPOCH.to_string()), (2, "the object is gone".to_string())];
        assert!(r.refused(report.clone(), &refused));
        assert_eq!(r.take(false).unwrap().0, [released(1)]);
        assert!(!r.refused(report, &refused[1..]));
        assert!(r.take(false).is_none());
    }
}
