//! Reads the log of etcd below our prefix, revision by revision.
//!
//! The whole prefix is watched, whatever part a reader wants: every commit of ours leaves a record there, so every revision is heard of and
//! nobody depends on etcd's progress notices, which in etcd before 3.4.25 and 3.5.8 may overtake events (etcd issue 15220). Notices are
//! asked for only to see that the other end is alive.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use etcd_client::{EventType, WatchOptions, WatchRequestSender, WatchResponse, WatchResponseStream};
use oblak_store::{Change, WatchEvent};

use crate::cluster::{ATTEMPT, Chosen};
use crate::failure::{Failure, Kind};
use crate::keys::Found;
use crate::meta::Known;
use crate::store::Core;

/// How often a quiet server is asked for a sign of life, and after how many silent ones it is left.
const BEAT: Duration = Duration::from_millis(1500);
const BEATS: u32 = 3;
/// Largest answer. Fragments are about as large as etcd's limit for requests (1.5 MiB), but a single event is never split: it has the new
/// and the previous value.
const ANSWER_BYTES: usize = 64 << 20;

/// What one revision did below our prefix.
pub struct Step {
    pub n: u64,
    /// None when it concerned no key of the store.
    pub event: Option<WatchEvent>,
}

/// Why the log cannot be read on.
pub enum Ended {
    /// It begins after this revision now.
    Compacted(u64),
    /// A server failed, or refused. Trying again goes on where it stopped.
    Failed(Failure),
}

impl From<Failure> for Ended {
    fn from(failure: Failure) -> Self {
        Self::Failed(failure)
    }
}

struct Open {
    chosen: Chosen,
    requests: WatchRequestSender,
    answers: WatchResponseStream,
    /// The beginning of a revision whose rest comes with the next fragment.
    partial: Option<(u64, Vec<Change>)>,
    heard: Instant,
}

/// A position in the log, and the stream that reads from there.
pub struct Tail {
    core: Arc<Core>,
    at: u64,
    open: Option<Open>,
}

impl Tail {
    /// Reads strictly after `at`.
    pub fn new(core: Arc<Core>, at: u64) -> Self {
        Self { core, at, open: None }
    }

    /// The next revisions. After an error the next call opens the stream again.
    pub async fn next(&mut self) -> Result<Vec<Step>, Ended> {
        let read = self.read().await;
        if let Err(ended) = &read
            && let Some(open) = self.open.take()
            && matches!(ended, Ended::Failed(failure) if failure.is_transient())
        {
            self.core.cluster.failed(&open.chosen).await;
        }
        read
    }

    async fn read(&mut self) -> Result<Vec<Step>, Ended> {
        let open = match &mut self.open {
            Some(open) => open,
            closed => closed.insert(connect(&self.core, self.at).await?),
        };
        loop {
            let answer = match tokio::time::timeout(BEAT, open.answers.message()).await {
                Ok(Ok(Some(answer))) => answer,
                Ok(Ok(None)) => {
                    return Err(Failure::new(Kind::Lost, format!("{} ended the watch", open.chosen.url)).into());
                }
                Ok(Err(error)) => return Err(Failure::from_client(&open.chosen.url, &error).into()),
                Err(_) => {
                    let silent = open.heard.elapsed();
                    if silent > BEAT * BEATS {
                        return Err(Failure::timeout(&open.chosen.url, silent).into());
                    }
                    // A full queue of requests means that the other end takes none; its silence ends the stream.
                    let _ = tokio::time::timeout(BEAT, open.requests.request_progress()).await;
                    continue;
                }
            };
            open.heard = Instant::now();
            self.core.cluster.note(answer.header())?;
            if answer.canceled() {
                return Err(cancelled(&open.chosen.url, &answer));
            }
            let steps = steps(&self.core, open, &answer, self.at)?;
            if let Some(last) = steps.last() {
                self.at = last.n;
                return Ok(steps);
            }
        }
    }
}

fn cancelled(url: &str, answer: &WatchResponse) -> Ended {
    match u64::try_from(answer.compact_revision()) {
        Ok(n) if n > 0 => Ended::Compacted(n),
        _ => Failure::new(Kind::Refused, format!("{url} ended the watch: {}", answer.cancel_reason())).into(),
    }
}

async fn connect(core: &Core, at: u64) -> Result<Open, Ended> {
    let chosen = core.cluster.choose().await?;
    let (start, end) = core.space.all();
    // One revision early: when the log was compacted at exactly `at`, all after it is there, but etcd may have dropped deletions at it.
    let options = WatchOptions::new()
        .with_range(end)
        .with_start_revision(i64::try_from(at.max(1)).unwrap_or(i64::MAX))
        .with_prev_key()
        .with_fragment();
    let mut client = chosen.client.watch_client().max_decoding_message_size(ANSWER_BYTES);
    let failure = match tokio::time::timeout(ATTEMPT, client.watch(start, Some(options))).await {
        Ok(Ok(stream)) => {
            let (requests, answers) = stream.split();
            return Ok(Open { chosen, requests, answers, partial: None, heard: Instant::now() });
        }
        Ok(Err(error)) => Failure::from_client(&chosen.url, &error),
        Err(_) => Failure::timeout(&chosen.url, ATTEMPT),
    };
    if failure.is_transient() {
        core.cluster.failed(&chosen).await;
    }
    Err(failure.into())
}

/// The whole revisions after `at` in an answer and what was left over before it.
fn steps(core: &Core, open: &mut Open, answer: &WatchResponse, at: u64) -> Result<Vec<Step>, Ended> {
    let fragment = answer.0.fragment;
    let mut found: Vec<(u64, Vec<Change>)> = open.partial.take().into_iter().collect();
    for event in answer.events() {
        let Some(kv) = event.kv() else { continue };
        let n = u64::try_from(kv.mod_revision()).unwrap_or(0);
        if n <= at {
            continue;
        }
        if found.last().is_none_or(|(last, _)| *last != n) {
            found.push((n, Vec::new()));
        }
        match core.space.parse(kv.key()) {
            Found::Data(key) => {
                let prev = event.prev_kv().map(|prev| (prev.mod_revision(), prev.create_revision()));
                let deleted = event.event_type() == EventType::Delete;
                let (prev, created) = match (prev, deleted) {
                    (Some((prev, created)), true) => (Some(prev), created),
                    (Some((prev, _)), false) => (Some(prev), kv.create_revision()),
                    (None, false) if kv.version() <= 1 => (None, kv.create_revision()),
                    // The version before was compacted away while we were reading.
                    (None, _) => return Err(Ended::Compacted(n)),
                };
                let value = (!deleted).then(|| Bytes::copy_from_slice(kv.value()));
                let change =
                    Change { key, value, prev: prev.map(|prev| core.revision(prev)), created: core.revision(created) };
                if let Some((_, changes)) = found.last_mut() {
                    changes.push(change);
                }
            }
            Found::Meta => core.adopt(Known::parse(kv)?),
            Found::Other => {}
        }
    }
    if fragment {
        open.partial = found.pop();
    }
    let step = |(n, changes): (u64, Vec<Change>)| Step {
        n,
        event: (!changes.is_empty()).then(|| WatchEvent { revision: core.at(n), changes }),
    };
    Ok(found.into_iter().map(step).collect())
}
