//! Client of the QEMU Machine Protocol: JSON lines over a unix socket (QEMU docs/interop/qmp-spec).
//!
//! One reader task per connection gives replies to the callers by id and events to every subscriber. Whatever the far end
//! sends, memory stays bounded: lines have a greatest length, events a ring of fixed size, and every call has a deadline.

mod wire;

use std::collections::HashMap;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;
use tokio::net::unix::OwnedWriteHalf;
use tokio::sync::{broadcast, oneshot};
use tokio::task::JoinHandle;

use super::sock;
pub use wire::{Event, Incoming, LineReader, MAX_LINE, parse_line};

/// How many events a subscriber may lag behind before it loses the oldest.
pub const EVENT_BUFFER: usize = 256;
/// Name of the event that subscribers get when the connection has ended; QEMU has none of that name.
pub const CLOSED: &str = "OBLAK_CLOSED";
/// Deadline of an ordinary command.
pub const COMMAND_DEADLINE: Duration = Duration::from_secs(10);
/// Commands that may wait for an answer at once on one connection.
const MAX_PENDING: usize = 64;

/// Why a command did not succeed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum QmpError {
    /// QEMU understood the command and refused it.
    #[error("{desc}")]
    Refused {
        /// Class of the error: `GenericError`, `CommandNotFound`, `DeviceNotFound`, ...
        class: String,
        /// QEMU's text.
        desc: String,
    },
    /// No answer within the deadline.
    #[error("the machine's monitor did not answer {what} within {} s", .after.as_secs())]
    Timeout {
        /// The command.
        what: String,
        /// The deadline.
        after: Duration,
    },
    /// The connection ended; usually because the machine did.
    #[error("the machine's monitor closed the connection")]
    Closed,
    /// Could not be opened.
    #[error("cannot reach the machine's monitor: {0}")]
    Connect(String),
    /// The far end does not speak QMP.
    #[error("the machine's monitor answered something that is not QMP: {0}")]
    Protocol(String),
}

impl QmpError {
    /// Whether QEMU refused with this class.
    #[must_use]
    pub fn is_class(&self, name: &str) -> bool {
        matches!(self, Self::Refused { class, .. } if class == name)
    }
    /// Whether QEMU refused and its text holds `part`.
    #[must_use]
    pub fn says(&self, part: &str) -> bool {
        matches!(self, Self::Refused { desc, .. } if desc.contains(part))
    }
}

type Pending = Arc<Mutex<HashMap<u64, oneshot::Sender<Result<Value, QmpError>>>>>;

/// One connection, ready for commands.
pub struct Qmp {
    writer: tokio::sync::Mutex<OwnedWriteHalf>,
    pending: Pending,
    next: std::sync::atomic::AtomicU64,
    events: broadcast::Sender<Event>,
    reader: JoinHandle<()>,
}

impl Drop for Qmp {
    fn drop(&mut self) {
        self.reader.abort();
    }
}

/// Takes the entry of a call out again when its future is dropped.
struct Forget<'a>(&'a Pending, u64);

impl Drop for Forget<'_> {
    fn drop(&mut self) {
        lock(self.0).remove(&self.1);
    }
}

fn lock(pending: &Pending) -> std::sync::MutexGuard<'_, HashMap<u64, oneshot::Sender<Result<Value, QmpError>>>> {
    pending.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

impl Qmp {
    /// Connects to the monitor socket at `path` (of any length) and negotiates. QEMU serves one client per monitor at a time, so this may
    /// wait for another client to leave; `deadline` covers all of it.
    ///
    /// # Errors
    /// [`QmpError::Connect`], [`QmpError::Timeout`], [`QmpError::Protocol`].
    pub async fn connect(path: &Path, deadline: Duration) -> Result<Self, QmpError> {
        let work = async {
            let stream = sock::connect(path, deadline).await.map_err(|e| QmpError::Connect(e.to_string()))?;
            Self::negotiate(stream).await
        };
        tokio::time::timeout(deadline, work)
            .await
            .map_err(|_| QmpError::Timeout { what: "the connection".into(), after: deadline })?
    }

    /// Negotiates over a stream that is connected already.
    ///
    /// # Errors
    /// As [`Self::connect`].
    pub async fn from_stream(stream: UnixStream, deadline: Duration) -> Result<Self, QmpError> {
        tokio::time::timeout(deadline, Self::negotiate(stream))
            .await
            .map_err(|_| QmpError::Timeout { what: "the connection".into(), after: deadline })?
    }

    async fn negotiate(stream: UnixStream) -> Result<Self, QmpError> {
        let (read, write) = stream.into_split();
        let mut lines = LineReader::new(read);
        let greeting = lines.next().await?.ok_or(QmpError::Closed)?;
        if !matches!(parse_line(&greeting)?, Incoming::Greeting) {
            return Err(QmpError::Protocol("no greeting".into()));
        }
        let pending = Pending::default();
        let (events, _) = broadcast::channel(EVENT_BUFFER);
        let reader = tokio::spawn(read_loop(lines, Arc::clone(&pending), events.clone()));
        let this = Self {
            writer: tokio::sync::Mutex::new(write),
            pending,
            next: std::sync::atomic::AtomicU64::new(1),
            events,
            reader,
        };
        this.execute("qmp_capabilities", Value::Null).await?;
        Ok(this)
    }

    /// Events from now on. A subscriber that lags more than [`EVENT_BUFFER`] behind loses the oldest and is told so.
    #[must_use]
    pub fn events(&self) -> broadcast::Receiver<Event> {
        self.events.subscribe()
    }

    /// Whether the connection has ended.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.reader.is_finished()
    }

    /// Runs a command with [`COMMAND_DEADLINE`]; `arguments` is an object or null.
    ///
    /// # Errors
    /// [`QmpError`].
    pub async fn execute(&self, command: &str, arguments: Value) -> Result<Value, QmpError> {
        self.execute_with(command, arguments, None, COMMAND_DEADLINE).await
    }

    /// Runs a command and hands a file descriptor over with it (SCM_RIGHTS, unix(7)).
    ///
    /// # Errors
    /// [`QmpError`].
    pub async fn execute_with_fd(
        &self,
        command: &str,
        arguments: Value,
        fd: BorrowedFd<'_>,
    ) -> Result<Value, QmpError> {
        self.execute_with(command, arguments, Some(fd), COMMAND_DEADLINE).await
    }

    /// Runs a command with everything chosen by the caller.
    ///
    /// # Errors
    /// [`QmpError`].
    pub async fn execute_with(
        &self,
        command: &str,
        arguments: Value,
        fd: Option<BorrowedFd<'_>>,
        deadline: Duration,
    ) -> Result<Value, QmpError> {
        let id = self.next.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let (tell, told) = oneshot::channel();
        {
            let mut pending = lock(&self.pending);
            if pending.len() >= MAX_PENDING {
                return Err(QmpError::Protocol(format!("more than {MAX_PENDING} commands wait for an answer")));
            }
            pending.insert(id, tell);
        }
        let _forget = Forget(&self.pending, id);
        if self.reader.is_finished() {
            return Err(QmpError::Closed);
        }
        let mut message = json!({"execute": command, "id": id});
        if !arguments.is_null() {
            message["arguments"] = arguments;
        }
        let work = async {
            self.send(&message, fd).await.map_err(|_| QmpError::Closed)?;
            told.await.map_err(|_| QmpError::Closed)?
        };
        tokio::time::timeout(deadline, work)
            .await
            .map_err(|_| QmpError::Timeout { what: command.to_string(), after: deadline })?
    }

    async fn send(&self, message: &Value, fd: Option<BorrowedFd<'_>>) -> std::io::Result<()> {
        let mut line = serde_json::to_vec(message)?;
        line.push(b'\n');
        let mut writer = self.writer.lock().await;
        let Some(fd) = fd else { return writer.write_all(&line).await };
        let stream = writer.as_ref();
        let sent = stream
            .async_io(tokio::io::Interest::WRITABLE, || {
                let fds = [fd.as_raw_fd()];
                nix::sys::socket::sendmsg::<()>(
                    stream.as_raw_fd(),
                    &[std::io::IoSlice::new(&line)],
                    &[nix::sys::socket::ControlMessage::ScmRights(&fds)],
                    nix::sys::socket::MsgFlags::MSG_NOSIGNAL,
                    None,
                )
                .map_err(std::io::Error::from)
            })
            .await?;
        writer.write_all(&line[sent..]).await
    }
}

async fn read_loop<R: tokio::io::AsyncRead + Unpin>(
    mut lines: LineReader<R>,
    pending: Pending,
    events: broadcast::Sender<Event>,
) {
    let end = loop {
        let line = match lines.next().await {
            Ok(Some(line)) => line,
            Ok(None) => break QmpError::Closed,
            Err(error) => break error,
        };
        match parse_line(&line) {
            Ok(Incoming::Reply { id, result }) => {
                if let Some(tell) = lock(&pending).remove(&id) {
                    let _ = tell.send(result);
                }
            }
            Ok(Incoming::Event(event)) => {
                let _ = events.send(event);
            }
            // A reply without our id belongs to nobody; a second greeting means nothing.
            Ok(Incoming::Greeting | Incoming::Orphan) => {}
            Err(error) => break error,
        }
    };
    for (_, tell) in lock(&pending).drain() {
        let _ = tell.send(Err(end.clone()));
    }
    let _ = events.send(Event { name: CLOSED.into(), data: Value::Null });
}

#[cfg(test)]
mod tests;
