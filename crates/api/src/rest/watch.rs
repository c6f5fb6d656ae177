//! Watching a kind: server-sent events from a revision on (WHATWG HTML, section 9.2).

use std::collections::HashSet;
use std::sync::atomic::Ordering;
use std::time::Duration;

use axum::body::Body;
use axum::http::{HeaderMap, HeaderValue, header};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use oblak_model::{ApiError, Code, Object, Revision};
use oblak_store::cache::Item;
use oblak_store::objects;
use oblak_store::{Change, MAX_PAGE, Prefix, StoreError, WatchError, WatchItem, WatchStream};
use tokio::sync::{OwnedSemaphorePermit, mpsc};
use uuid::Uuid;

use super::list::Filter;
use crate::docs::{self, Doc};
use crate::error::{Answer, store_error};
use crate::kinds::Resource;
use crate::request::Query;
use crate::state::App;

/// Events written ahead of a slow reader; then the store's own limits apply, and in the end `compacted`.
const AHEAD: usize = 64;
/// A comment after so much silence keeps proxies from closing the connection.
const KEEP_ALIVE: Duration = Duration::from_secs(15);
/// Bookmarks are not sent more often.
const BOOKMARK: Duration = Duration::from_secs(2);

pub(super) async fn watch<K: Resource>(
    app: &App,
    scope: Option<&str>,
    filter: Filter,
    query: &Query,
    headers: &HeaderMap,
) -> Answer {
    let mut from: Option<Revision> = query.parsed("from", "a revision such as 1-42")?;
    // What an EventSource of a browser sends after it was cut off.
    if let Some(last) = headers.get("last-event-id").and_then(|v| v.to_str().ok()?.parse().ok()) {
        from = Some(last);
    }
    let permit = std::sync::Arc::clone(&app.watches).try_acquire_owned().map_err(|_| {
        ApiError::new(Code::RateLimited, "the server has as many watches as it allows; try again later")
    })?;
    let from = match from {
        Some(revision) => revision,
        None => app.store.revision().await?,
    };
    let prefix = objects::object_prefix::<K>(scope);
    let stream = app.store.watch(&prefix, from).await;
    let seen = if filter.hides() { Some(shown_at::<K>(app, &filter, &prefix, from).await?) } else { None };
    let (sender, mut receiver) = mpsc::channel::<Bytes>(AHEAD);
    let pump = Pump::<K> { app: app.clone(), filter, seen, sender, _permit: permit, kind: std::marker::PhantomData };
    oblak_platform::task::spawn(pump.run(stream, from));
    let body = Body::from_stream(futures_util::stream::poll_fn(move |context| {
        receiver.poll_recv(context).map(|item| item.map(Ok::<_, std::convert::Infallible>))
    }));
    Ok(event_stream(body))
}

/// The headers of a stream of events.
pub(crate) fn event_stream(body: Body) -> Response {
    let mut response = body.into_response();
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    response
}

/// Ids of what a caller sees at a revision.
async fn shown_at<K: Resource>(
    app: &App,
    filter: &Filter,
    prefix: &Prefix,
    at: Revision,
) -> Result<HashSet<Uuid>, ApiError> {
    let (mut ids, mut after) = (HashSet::new(), None);
    loop {
        let page = match app.store.list(prefix, MAX_PAGE, after, Some(at)).await {
            Ok(page) => page,
            // The watch says it in its own way.
            Err(StoreError::Compacted { .. }) => return Ok(ids),
            Err(error) => return Err(store_error(&error)),
        };
        after = page.entries.last().map(|entry| entry.key.clone());
        for entry in page.entries {
            let value = docs::decode(&entry).map_err(|e| store_error(&e))?;
            let Some(id) = value.object().map(|doc| doc.id) else { continue };
            let item = Item::new(entry, value);
            let value = filter.value::<K>(app, &item)?;
            if filter.matches::<K>(&item, value.as_ref())? {
                ids.insert(id);
            }
        }
        if !page.more {
            return Ok(ids);
        }
    }
}

struct Pump<K> {
    app: App,
    filter: Filter,
    /// Where some objects are hidden: those that the reader knows. Nothing is said about the end of others.
    seen: Option<HashSet<Uuid>>,
    sender: mpsc::Sender<Bytes>,
    _permit: OwnedSemaphorePermit,
    kind: std::marker::PhantomData<K>,
}

/// The reader is gone.
struct Closed;

impl<K: Resource> Pump<K> {
    async fn run(mut self, stream: Result<WatchStream, WatchError>, from: Revision) {
        self.app.metrics.watches.fetch_add(1, Ordering::Relaxed);
        let (stopping, sender) = (self.app.stopping.clone(), self.sender.clone());
        tokio::select! {
            biased;
            () = stopping.cancelled() => {}
            () = sender.closed() => {}
            _ = self.follow(stream, from) => {}
        }
        self.app.metrics.watches.fetch_sub(1, Ordering::Relaxed);
    }

    async fn follow(&mut self, stream: Result<WatchStream, WatchError>, from: Revision) -> Result<(), Closed> {
        let mut stream = match stream {
            Ok(stream) => stream,
            Err(error) => return self.fail(&error).await,
        };
        // Says at once that the watch is on.
        self.send(format!("event: bookmark\nid: {from}\ndata: {{\"revision\":\"{from}\"}}\n\n").into()).await?;
        let mut last_bookmark = tokio::time::Instant::now();
        loop {
            let item = match tokio::time::timeout(KEEP_ALIVE, stream.next()).await {
                Err(_) => {
                    self.send(Bytes::from_static(b": still here\n\n")).await?;
                    continue;
                }
                Ok(None) => return Ok(()),
                Ok(Some(Err(error))) => return self.fail(&error).await,
                Ok(Some(Ok(item))) => item,
            };
            match item {
                WatchItem::Event(event) => {
                    for change in event.changes {
                        self.change(change, event.revision).await?;
                    }
                }
                WatchItem::Progress(revision) if last_bookmark.elapsed() >= BOOKMARK => {
                    last_bookmark = tokio::time::Instant::now();
                    self.send(
                        format!("event: bookmark\nid: {revision}\ndata: {{\"revision\":\"{revision}\"}}\n\n").into(),
                    )
                    .await?;
                }
                WatchItem::Progress(_) => {}
            }
        }
    }

    async fn change(&mut self, change: Change, revision: Revision) -> Result<(), Closed> {
        let Ok(id) = change.key.last().parse::<Uuid>() else { return Ok(()) };
        if let Some(raw) = &change.value {
            match self.shown(&change, raw, revision) {
                Ok(Some(json)) => {
                    if let Some(seen) = &mut self.seen {
                        seen.insert(id);
                    }
                    return self.send(put(revision, &json)).await;
                }
                // An object that did not exist before and is not shown now was never shown.
                Ok(None) if change.prev.is_none() => return Ok(()),
                Ok(None) => {}
                Err(error) => {
                    tracing::error!(key = %change.key, %error, "an object cannot be shown to a watch");
                    return Ok(());
                }
            }
        }
        if self.seen.as_mut().is_some_and(|seen| !seen.remove(&id)) {
            return Ok(());
        }
        let name = match &change.value {
            Some(_) => name_of(&self.app, &change).unwrap_or_default(),
            None => self.app.gone.name(&change.key).await,
        };
        let data = serde_json::json!({"id": id, "name": name});
        self.send(format!("event: delete\nid: {revision}\ndata: {data}\n\n").into()).await
    }

    /// The JSON of an object that the watch shows.
    fn shown(&self, change: &Change, raw: &Bytes, revision: Revision) -> Result<Option<Vec<u8>>, ApiError> {
        let entry =
            oblak_store::Entry { key: change.key.clone(), value: raw.clone(), revision, created: change.created };
        let value: Doc = docs::decode(&entry).map_err(|e| store_error(&e))?;
        let item = Item::new(entry, value);
        let value = self.filter.value::<K>(&self.app, &item)?;
        if !self.filter.matches::<K>(&item, value.as_ref())? {
            return Ok(None);
        }
        if K::DECORATED {
            let mut object: Object<K> = docs::object(&item).map_err(|e| store_error(&e))?;
            K::decorate(&self.app, &mut object);
            return serde_json::to_vec(&object).map(Some).map_err(|e| ApiError::internal(e.to_string()));
        }
        Ok(Some(docs::json(&item)))
    }

    async fn fail(&self, error: &WatchError) -> Result<(), Closed> {
        let problem = match error {
            WatchError::Compacted { .. } => ApiError::new(
                Code::Compacted,
                "the changes since that revision are no longer kept; list again and watch from the new revision",
            ),
            WatchError::Store(error) => store_error(error),
        };
        let data = serde_json::to_string(&problem).unwrap_or_default();
        self.send(format!("event: error\ndata: {data}\n\n").into()).await
    }

    async fn send(&self, event: Bytes) -> Result<(), Closed> {
        self.sender.send(event).await.map_err(|_| Closed)
    }
}

fn put(revision: Revision, json: &[u8]) -> Bytes {
    let mut out = Vec::with_capacity(json.len() + 48);
    out.extend_from_slice(format!("event: put\nid: {revision}\ndata: ").as_bytes());
    // Our JSON has no line breaks: serde_json escapes those in strings.
    out.extend_from_slice(json);
    out.extend_from_slice(b"\n\n");
    out.into()
}

fn name_of(app: &App, change: &Change) -> Option<Box<str>> {
    Some(app.docs.get(&change.key)?.value.object()?.name.clone())
}
