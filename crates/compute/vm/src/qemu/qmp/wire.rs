//! Lines of QMP: reading them with a limit, telling replies from events.

use serde::Deserialize;
use serde_json::Value;
use tokio::io::{AsyncRead, AsyncReadExt};

use super::QmpError;

/// Longest line in bytes that is accepted. The largest honest answer, `query-qmp-schema`, is below 300 KiB in QEMU 7.2.
pub const MAX_LINE: usize = 4 << 20;

/// Something that happened to the machine.
#[derive(Clone, Debug, PartialEq)]
pub struct Event {
    /// Its name, for example `SHUTDOWN`.
    pub name: String,
    /// Its data; null when it has none.
    pub data: Value,
}

impl Event {
    /// A text field of the data, empty when absent.
    #[must_use]
    pub fn text(&self, field: &str) -> &str {
        self.data.get(field).and_then(Value::as_str).unwrap_or_default()
    }
    /// A boolean field of the data, false when absent.
    #[must_use]
    pub fn flag(&self, field: &str) -> bool {
        self.data.get(field).and_then(Value::as_bool).unwrap_or_default()
    }
}

/// What a line can be.
#[derive(Debug, PartialEq)]
pub enum Incoming {
    /// What qemu says first.
    Greeting,
    /// Answer to a command.
    Reply {
        /// The id that the command had.
        id: u64,
        /// What it gave.
        result: Result<Value, QmpError>,
    },
    /// Something that happened.
    Event(Event),
    /// An answer that says not to which command.
    Orphan,
}

#[derive(Deserialize)]
struct Line {
    #[serde(rename = "QMP")]
    greeting: Option<Value>,
    event: Option<String>,
    #[serde(default)]
    data: Value,
    #[serde(rename = "return", default, deserialize_with = "present")]
    result: Option<Value>,
    error: Option<Refusal>,
    id: Option<Value>,
}

/// Tells `"return": null` from no `return`.
fn present<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Option<Value>, D::Error> {
    Value::deserialize(deserializer).map(Some)
}

#[derive(Deserialize)]
struct Refusal {
    #[serde(default)]
    class: String,
    #[serde(default)]
    desc: String,
}

/// Understands one line.
///
/// # Errors
/// [`QmpError::Protocol`] when it is none of what a line can be.
pub fn parse_line(line: &[u8]) -> Result<Incoming, QmpError> {
    let line: Line = serde_json::from_slice(line).map_err(|e| QmpError::Protocol(e.to_string()))?;
    if let Some(name) = line.event {
        return Ok(Incoming::Event(Event { name, data: line.data }));
    }
    if line.greeting.is_some() {
        return Ok(Incoming::Greeting);
    }
    let result = match (line.result, line.error) {
        (_, Some(refusal)) => Err(QmpError::Refused { class: refusal.class, desc: refusal.desc }),
        (Some(value), None) => Ok(value),
        (None, None) => return Err(QmpError::Protocol("neither event nor answer".into())),
    };
    Ok(line.id.as_ref().and_then(Value::as_u64).map_or(Incoming::Orphan, |id| Incoming::Reply { id, result }))
}

/// Splits a stream into lines of at most `limit` bytes. Cancellation-safe: a dropped `next` loses nothing.
pub struct LineReader<R> {
    inner: R,
    buffer: Vec<u8>,
    /// Bytes of `buffer` known to hold no newline.
    scanned: usize,
    limit: usize,
}

impl<R: AsyncRead + Unpin> LineReader<R> {
    /// With the limit [`MAX_LINE`].
    pub fn new(inner: R) -> Self {
        Self::with_limit(inner, MAX_LINE)
    }
    /// With a limit of the caller's choice.
    pub fn with_limit(inner: R, limit: usize) -> Self {
        Self { inner, buffer: Vec::new(), scanned: 0, limit }
    }

    /// The next line without its end; `None` at the end of the stream (a last line without an end is dropped).
    ///
    /// # Errors
    /// [`QmpError::Protocol`] for a line that is too long, [`QmpError::Closed`] when reading fails.
    pub async fn next(&mut self) -> Result<Option<Vec<u8>>, QmpError> {
        loop {
            while let Some(at) = self.buffer[self.scanned..].iter().position(|b| *b == b'\n') {
                let end = self.scanned + at;
                let rest = self.buffer.split_off(end + 1);
                let mut line = std::mem::replace(&mut self.buffer, rest);
                self.scanned = 0;
                line.truncate(end);
                if line.last() == Some(&b'\r') {
                    line.pop();
                }
                if !line.is_empty() {
                    return Ok(Some(line));
                }
            }
            self.scanned = self.buffer.len();
            if self.buffer.len() > self.limit {
                return Err(QmpError::Protocol(format!("a line is longer than {} bytes", self.limit)));
            }
            self.buffer.reserve(4096);
            if self.inner.read_buf(&mut self.buffer).await.map_err(|_| QmpError::Closed)? == 0 {
                return Ok(None);
            }
        }
    }
}
