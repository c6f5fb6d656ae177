//! The shim's socket: `shim.sock`, mode 0600, only for the user that runs the shim (and root).
//!
//! A client sends one line of JSON, `{"op": "...", ...arguments}`, and gets one line back: `{"ok": value}` or
//! `{"error": {remedy, code, detail}}`. For streaming operations frames ([`oblak_platform::frame`]) follow in both
//! directions on the same connection. Operations that every shim knows: `state`, `console`, `signal {signal}`,
//! `stop {grace_ms}`, `shutdown`; containers add `exec {request}`.

use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use futures_util::future::BoxFuture;
use oblak_platform::driver::{DriverError, DriverResult};
use oblak_platform::frame::FrameCodec;
use serde::de::DeserializeOwned;
use serde_json::Value;
use tokio::io::{AsyncBufRead, AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;
use tokio_util::codec::Framed;

/// Longest request or answer line in bytes.
pub const LINE_BYTES: usize = 256 * 1024;
/// Most connections served at once; more wait in the listen queue.
pub const CONNECTIONS: usize = 32;
/// How long a client may take to send its request.
const REQUEST_DEADLINE: Duration = Duration::from_secs(5);
/// Read buffer of a connection; small because a shim's memory is counted.
const BUFFER_BYTES: usize = 4096;

/// The rest of a connection as frames.
pub type ShimStream = Framed<BufReader<UnixStream>, FrameCodec>;

/// One request.
#[derive(Clone, Debug)]
pub struct Call {
    /// The operation.
    pub op: String,
    /// The whole request object.
    pub args: Value,
}

impl Call {
    /// The arguments as a type.
    ///
    /// # Errors
    /// Permanent when they do not fit.
    pub fn parse<T: DeserializeOwned>(&self) -> DriverResult<T> {
        T::deserialize(&self.args)
            .map_err(|e| DriverError::permanent("bad_request", format!("shim request {}: {e}", self.op)))
    }
}

/// What a streaming operation does with its connection.
pub type StreamFn = Box<dyn FnOnce(ShimStream) -> BoxFuture<'static, ()> + Send>;

/// What a service answers.
pub enum Answer {
    /// One value, then the connection is closed.
    Value(Value),
    /// One value, then frames.
    Stream(Value, StreamFn),
}

impl Answer {
    /// `null`.
    #[must_use]
    pub fn done() -> Self {
        Self::Value(Value::Null)
    }
    /// Frames, handled by `serve`.
    pub fn stream<F, Fut>(serve: F) -> Self
    where
        F: FnOnce(ShimStream) -> Fut + Send + 'static,
        Fut: Future<Output = ()> + Send + 'static,
    {
        Self::Stream(Value::Null, Box::new(move |s| Box::pin(serve(s))))
    }
}

/// What a shim offers.
#[async_trait]
pub trait Service: Send + Sync + 'static {
    /// Handles one request. Dropped when the client goes away before the answer.
    async fn call(&self, call: Call) -> DriverResult<Answer>;
}

/// A unix socket may have a path of at most 107 bytes (unix(7)); through a descriptor of its directory any depth works.
pub(super) fn with_short_path<T>(path: &Path, f: impl FnOnce(&Path) -> io::Result<T>) -> io::Result<T> {
    let bad = || io::Error::new(io::ErrorKind::InvalidInput, "socket path has no directory");
    let dir = path.parent().ok_or_else(bad)?;
    let name = path.file_name().ok_or_else(bad)?;
    let dir = std::fs::OpenOptions::new().read(true).custom_flags(libc::O_PATH | libc::O_DIRECTORY).open(dir)?;
    f(&PathBuf::from(format!("/proc/self/fd/{}", dir.as_raw_fd())).join(name))
}

/// The listening socket of a shim.
#[derive(Debug)]
pub struct ShimListener(UnixListener);

impl ShimListener {
    /// Binds `path`, replacing the socket of a dead predecessor. Call it in the shim only, with the shim's lock held: it
    /// changes the umask for a moment.
    ///
    /// # Errors
    /// Any I/O error.
    pub fn bind(path: &Path) -> io::Result<Self> {
        oblak_platform::fsx::remove_file_if_exists(path)?;
        let old = nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o177));
        let listener = with_short_path(path, |p| UnixListener::bind(p));
        nix::sys::stat::umask(old);
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
        Ok(Self(listener?))
    }

    /// Serves until dropped.
    pub async fn serve(self, service: Arc<dyn Service>) {
        let places = Arc::new(Semaphore::new(CONNECTIONS));
        loop {
            let Ok(place) = places.clone().acquire_owned().await else { return };
            match self.0.accept().await {
                Ok((stream, _)) => {
                    let service = service.clone();
                    tokio::spawn(async move {
                        handle(stream, service).await;
                        drop(place);
                    });
                }
                // Out of descriptors or memory: existing connections go on; look again soon.
                Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
            }
        }
    }
}

async fn handle(stream: UnixStream, service: Arc<dyn Service>) {
    let allowed = stream.peer_cred().is_ok_and(|c| c.uid() == 0 || c.uid() == nix::unistd::geteuid().as_raw());
    if !allowed {
        return;
    }
    let mut stream = BufReader::with_capacity(BUFFER_BYTES, stream);
    let answer = match tokio::time::timeout(REQUEST_DEADLINE, read_line(&mut stream)).await {
        Ok(Ok(Some(line))) => match parse_call(&line) {
            Ok(call) => {
                let mut rest = std::pin::pin!(service.call(call));
                // A client that hangs up cancels its call; what it set in motion is the service's business. Early frames
                // wait in the socket until the answer is out.
                tokio::select! {
                    answer = &mut rest => answer,
                    gone = stream.get_ref().ready(tokio::io::Interest::READABLE) => {
                        if gone.is_ok_and(tokio::io::Ready::is_read_closed) { return }
                        rest.await
                    }
                }
            }
            Err(e) => Err(e),
        },
        _ => return,
    };
    let (line, serve) = match answer {
        Ok(Answer::Value(value)) => (serde_json::json!({ "ok": value }), None),
        Ok(Answer::Stream(value, serve)) => (serde_json::json!({ "ok": value }), Some(serve)),
        Err(error) => (serde_json::json!({ "error": error }), None),
    };
    let mut bytes = line.to_string().into_bytes();
    bytes.push(b'\n');
    if stream.write_all(&bytes).await.is_err() {
        return;
    }
    match serve {
        Some(serve) => serve(Framed::with_capacity(stream, FrameCodec, BUFFER_BYTES)).await,
        None => drop(stream.shutdown().await),
    }
}

/// Understands one request.
///
/// # Errors
/// `bad_request`, permanent.
pub fn parse_call(line: &[u8]) -> DriverResult<Call> {
    let bad = |e: String| DriverError::permanent("bad_request", format!("shim request is not understood: {e}"));
    let args: Value = serde_json::from_slice(line).map_err(|e| bad(e.to_string()))?;
    let op = args.get("op").and_then(Value::as_str).ok_or_else(|| bad("no op".into()))?.to_string();
    Ok(Call { op, args })
}

/// One line without its end; `None` at the end of the stream.
pub(super) async fn read_line<R: AsyncBufRead + Unpin>(stream: &mut R) -> io::Result<Option<Vec<u8>>> {
    let mut line = Vec::new();
    loop {
        let chunk = stream.fill_buf().await?;
        if chunk.is_empty() {
            return Ok(None);
        }
        if let Some(end) = chunk.iter().position(|b| *b == b'\n') {
            line.extend_from_slice(&chunk[..end]);
            stream.consume(end + 1);
            return Ok(Some(line));
        }
        line.extend_from_slice(chunk);
        let n = chunk.len();
        stream.consume(n);
        if line.len() > LINE_BYTES {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "line on the shim socket is too long"));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shim::{Fanout, Input, call, call_as, open_stream, serve_console};
    use bytes::Bytes;
    use futures_util::{SinkExt, StreamExt};
    use oblak_platform::driver::Remedy;
    use oblak_platform::frame::{Channel, Control, Frame};
    use tokio::sync::mpsc;

    struct Echo {
        fanout: Fanout,
        input: mpsc::Sender<Input>,
    }

    #[async_trait]
    impl Service for Echo {
        async fn call(&self, call: Call) -> DriverResult<Answer> {
            match call.op.as_str() {
                "state" => Ok(Answer::Value(serde_json::json!({ "run": 7, "echo": call.args["x"] }))),
                "console" => {
                    let (attachment, input) = (self.fanout.attach()?, self.input.clone());
                    Ok(Answer::stream(move |s| serve_console(s, attachment, input)))
                }
                "hang" => std::future::pending().await,
                other => Err(DriverError::unsupported(format!("no {other} here"))),
            }
        }
    }

    #[tokio::test]
    async fn answers_streams_and_errors() {
        let temp = tempfile::tempdir().unwrap();
        // Deeper than a socket address can be.
        let dir = temp.path().join("d".repeat(120));
        std::fs::create_dir(&dir).unwrap();
        let path = dir.join(crate::shim::file::SOCKET);
        std::fs::write(&path, "stale").unwrap();
        let (input, mut typed) = mpsc::channel(4);
        let fanout = Fanout::new();
        let listener = ShimListener::bind(&path).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        let server = tokio::spawn(listener.serve(Arc::new(Echo { fanout: fanout.clone(), input })));
        let limit = Duration::from_secs(5);

        let value = call(&dir, "state", &serde_json::json!({"x": "y"}), limit).await.unwrap();
        assert_eq!(value, serde_json::json!({"run": 7, "echo": "y"}));
        #[derive(serde::Deserialize)]
        struct Run {
            run: u64,
        }
        assert_eq!(call_as::<Run>(&dir, "state", &serde_json::json!({}), limit).await.unwrap().run, 7);
        let error = call(&dir, "nonsense", &serde_json::json!({}), limit).await.unwrap_err();
        assert_eq!((error.remedy, error.detail.as_str()), (Remedy::Unsupported, "no nonsense here"));
        let error = call(&dir, "hang", &serde_json::json!({}), Duration::from_millis(50)).await.unwrap_err();
        assert_eq!(error.code, "shim_timeout");

        let mut one =
            Framed::new(open_stream(&dir, "console", &serde_json::json!({}), limit).await.unwrap(), FrameCodec);
        let mut two =
            Framed::new(open_stream(&dir, "console", &serde_json::json!({}), limit).await.unwrap(), FrameCodec);
        for stream in [&mut one, &mut two] {
            assert_eq!(stream.next().await.unwrap().unwrap().as_control(), Some(Control::Ready));
        }
        fanout.publish(&Frame::new(Channel::Stdout, "hello"));
        for stream in [&mut one, &mut two] {
            assert_eq!(stream.next().await.unwrap().unwrap().payload, Bytes::from("hello"));
        }
        two.send(Frame::new(Channel::Stdin, "typed")).await.unwrap();
        two.send(Frame::control(&Control::Resize { cols: 80, rows: 24 })).await.unwrap();
        assert_eq!(typed.recv().await, Some(Input::Bytes("typed".into())));
        assert_eq!(typed.recv().await, Some(Input::Resize(80, 24)));

        server.abort();
        let _ = server.await;
        assert_eq!(call(&dir, "state", &serde_json::json!({}), limit).await.unwrap_err().code, "shim_unreachable");
    }
}
