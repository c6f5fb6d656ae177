//! Watches of a collection, which outlive the server that began them.

use std::time::Duration;

use futures_util::future::BoxFuture;
use oblak_model::{Kind, Object, Revision};
use tokio::time::{Instant, sleep_until, timeout_at};

use crate::Result;
use crate::sse::{Event, Parser};
use crate::transport::{Client, ClientError, TextStream};

/// The server says something at least every 15 seconds. Twice nothing: nobody is there any more.
const SILENCE: Duration = Duration::from_secs(32);
/// A watch is given up when no server has answered for so long.
const PATIENCE: Duration = Duration::from_secs(60);
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LAST_PAUSE: Duration = Duration::from_secs(2);

/// One event of a watch.
#[derive(Clone, Debug, PartialEq)]
pub enum WatchEvent<K: Kind> {
    /// New or changed.
    Put(Box<Object<K>>, Revision),
    /// Gone: id and name.
    Delete(uuid::Uuid, String, Revision),
    /// Nothing happened up to here.
    Bookmark(Revision),
}

/// A watch on a collection. When its server goes away it is continued on another, or on the same when it is back, after the last event
/// that was read: nothing is lost, nothing comes twice.
pub struct Watch<K> {
    client: Client,
    /// Path and query, without the revision.
    path: String,
    /// Everything up to here was read.
    at: Revision,
    stream: Stream,
    trouble: Option<Trouble>,
    kind: std::marker::PhantomData<K>,
}

enum Stream {
    Open(TextStream, Parser, Instant),
    /// Kept here, so that whoever stops waiting for an event does not stop the attempt.
    Opening(BoxFuture<'static, Result<TextStream>>),
    Broken,
}

struct Trouble {
    since: Instant,
    next: Instant,
    pause: Duration,
    why: String,
}

impl<K> std::fmt::Debug for Watch<K> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Watch").field("path", &self.path).field("at", &self.at).finish_non_exhaustive()
    }
}

impl<K: Kind> Watch<K> {
    pub(crate) async fn open(client: Client, path: String, at: Revision) -> Result<Self> {
        let body = client.get_stream(&with_revision(&path, at)).await?;
        let stream = Stream::Open(body, Parser::default(), Instant::now() + SILENCE);
        Ok(Self { client, path, at, stream, trouble: None, kind: std::marker::PhantomData })
    }

    /// The next event. May be dropped and called again at any time.
    ///
    /// # Errors
    /// `compacted`: list again. What else a server refuses. The last failure when no server has answered for a minute.
    pub async fn next(&mut self) -> Result<WatchEvent<K>> {
        loop {
            match &mut self.stream {
                Stream::Open(body, parser, silence) => {
                    if let Some(event) = parser.next_event().map_err(ClientError::Answer)? {
                        match parse_event::<K>(&event) {
                            Ok(None) => {}
                            Ok(Some(event)) => {
                                self.trouble = None;
                                self.at = match &event {
                                    WatchEvent::Put(_, at) | WatchEvent::Delete(.., at) | WatchEvent::Bookmark(at) => {
                                        *at
                                    }
                                };
                                return Ok(event);
                            }
                            Err(error) => self.broke(error)?,
                        }
                        continue;
                    }
                    let silent = || ClientError::Answer("nothing was heard on the watch".into());
                    match timeout_at(*silence, body.next()).await.unwrap_or_else(|_| Err(silent())) {
                        Ok(Some(bytes)) => {
                            parser.push(&bytes);
                            *silence = Instant::now() + SILENCE;
                        }
                        Ok(None) => self.broke(ClientError::Answer("the server ended the watch".into()))?,
                        Err(error) => self.broke(error)?,
                    }
                }
                Stream::Broken => {
                    if let Some(trouble) = &self.trouble {
                        sleep_until(trouble.next).await;
                    }
                    let (client, path) = (self.client.clone(), with_revision(&self.path, self.at));
                    self.stream = Stream::Opening(Box::pin(async move { client.get_stream(&path).await }));
                }
                Stream::Opening(attempt) => match attempt.await {
                    Ok(body) => self.stream = Stream::Open(body, Parser::default(), Instant::now() + SILENCE),
                    Err(error) => self.broke(error)?,
                },
            }
        }
    }

    /// Why nothing can come at the moment; none while the watch is open.
    pub fn interrupted(&self) -> Option<&str> {
        match self.stream {
            Stream::Open(..) => None,
            Stream::Opening(_) | Stream::Broken => self.trouble.as_ref().map(|trouble| trouble.why.as_str()),
        }
    }

    /// Notes a failure; gives it back when it is no use to go on.
    fn broke(&mut self, error: ClientError) -> Result<()> {
        self.stream = Stream::Broken;
        let now = Instant::now();
        let passing = matches!(error, ClientError::Answer(_)) || error.is_retryable();
        let trouble =
            self.trouble.get_or_insert(Trouble { since: now, next: now, pause: FIRST_PAUSE, why: String::new() });
        if !passing || now.duration_since(trouble.since) > PATIENCE {
            return Err(error);
        }
        trouble.why = error.to_string();
        trouble.next = now + trouble.pause;
        trouble.pause = (trouble.pause * 2).min(LAST_PAUSE);
        Ok(())
    }
}

fn with_revision(path: &str, at: Revision) -> String {
    format!("{path}&from={at}")
}

fn parse_event<K: Kind>(event: &Event) -> Result<Option<WatchEvent<K>>> {
    let bad = |e: &dyn std::fmt::Display| ClientError::Answer(format!("a watch event: {e}"));
    let revision = || event.id.parse::<Revision>().map_err(|e| bad(&e));
    match event.name.as_str() {
        "put" => {
            Ok(Some(WatchEvent::Put(Box::new(serde_json::from_str(&event.data).map_err(|e| bad(&e))?), revision()?)))
        }
        "delete" => {
            #[derive(serde::Deserialize)]
            struct Gone {
                id: uuid::Uuid,
                #[serde(default)]
                name: String,
            }
            let gone: Gone = serde_json::from_str(&event.data).map_err(|e| bad(&e))?;
            Ok(Some(WatchEvent::Delete(gone.id, gone.name, revision()?)))
        }
        "bookmark" => Ok(Some(WatchEvent::Bookmark(revision()?))),
        "error" => {
            let problem: oblak_model::ApiError = serde_json::from_str(&event.data).map_err(|e| bad(&e))?;
            Err(problem.into())
        }
        _ => Ok(None),
    }
}
