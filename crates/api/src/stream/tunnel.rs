//! The tunnels of agents: one WebSocket each, many streams inside (yamux); this side opens them.

use std::collections::HashMap;
use std::future::poll_fn;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::task::Poll;
use std::time::Duration;

use axum::extract::ws::WebSocketUpgrade;
use axum::extract::{Path, State};
use oblak_model::wire::{StreamAnswer, StreamRequest};
use oblak_model::{ApiError, Code, NodeId};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::sync::{mpsc, oneshot};
use tokio_util::compat::{Compat, FuturesAsyncReadCompatExt};
use yamux::{Config, Connection, Mode};

use super::bytes::WebSocketBytes;
use crate::auth::Caller;
use crate::error::{Answer, Fault};
use crate::node::{own_node, until_removed};
use crate::request::Query;
use crate::state::App;

/// Streams in one tunnel; with yamux's first window of 256 KiB each this bounds the memory that an agent can make us use.
const STREAMS: usize = 256;
const WINDOW: usize = 96 << 20;
/// Largest WebSocket message from an agent.
const MESSAGE: usize = 1 << 20;
/// Requests for streams that wait for one tunnel.
const WAITING: usize = 64;
/// How long an agent has to answer a request for a stream.
const ANSWER: Duration = Duration::from_secs(30);
/// Longest answer line.
const LINE: u64 = 64 * 1024;

/// A stream to an agent, after its answer.
pub(super) type Stream = BufReader<Compat<yamux::Stream>>;

type Reply = oneshot::Sender<Result<yamux::Stream, yamux::ConnectionError>>;

struct Handle {
    id: u64,
    open: mpsc::Sender<Reply>,
}

/// Tunnels that are open now.
#[derive(Default)]
pub(crate) struct Tunnels {
    by_node: Mutex<HashMap<NodeId, Vec<Handle>>>,
    next: AtomicU64,
}

impl Tunnels {
    /// How many there are.
    pub fn count(&self) -> usize {
        self.by_node.lock().unwrap_or_else(PoisonError::into_inner).values().map(Vec::len).sum()
    }

    /// Nodes that can be reached.
    pub fn nodes(&self) -> Vec<NodeId> {
        let mut nodes: Vec<_> = self.by_node.lock().unwrap_or_else(PoisonError::into_inner).keys().copied().collect();
        nodes.sort();
        nodes
    }

    fn add(&self, node: NodeId) -> (u64, mpsc::Receiver<Reply>) {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let (open, requests) = mpsc::channel(WAITING);
        let mut by_node = self.by_node.lock().unwrap_or_else(PoisonError::into_inner);
        by_node.entry(node).or_default().push(Handle { id, open });
        (id, requests)
    }

    fn remove(&self, node: NodeId, id: u64) {
        let mut by_node = self.by_node.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(handles) = by_node.get_mut(&node) {
            handles.retain(|handle| handle.id != id);
            if handles.is_empty() {
                by_node.remove(&node);
            }
        }
    }

    /// The newest tunnel: an older one of the same node is most likely a connection that died without saying so.
    fn newest(&self, node: NodeId) -> Option<mpsc::Sender<Reply>> {
        let by_node = self.by_node.lock().unwrap_or_else(PoisonError::into_inner);
        by_node.get(&node)?.last().map(|handle| handle.open.clone())
    }

    /// Opens a stream and waits for the agent's answer.
    ///
    /// # Errors
    /// `node_unreachable`, or what the agent says.
    pub async fn open(&self, node: NodeId, request: &StreamRequest) -> Result<Stream, ApiError> {
        let unreachable = |why: &str| {
            ApiError::new(Code::NodeUnreachable, "the node's agent is not connected; see `oblak node list`")
                .inside(format!("{node}: {why}"))
        };
        let opening = async {
            let tunnel = self.newest(node).ok_or_else(|| unreachable("no tunnel"))?;
            let (reply, opened) = oneshot::channel();
            tunnel.send(reply).await.map_err(|_| unreachable("the tunnel has ended"))?;
            let stream = opened.await.map_err(|_| unreachable("the tunnel has ended"))?;
            let stream = stream.map_err(|e| unreachable(&e.to_string()))?;
            let mut stream = BufReader::new(stream.compat());
            let mut line = serde_json::to_vec(request).map_err(|e| ApiError::internal(e.to_string()))?;
            line.push(b'\n');
            let io = |e: std::io::Error| unreachable(&e.to_string());
            stream.write_all(&line).await.map_err(io)?;
            stream.flush().await.map_err(io)?;
            answer(&mut stream).await?;
            Ok(stream)
        };
        tokio::time::timeout(ANSWER, opening).await.map_err(|_| unreachable("no answer in time"))?
    }
}

/// Reads an answer line.
///
/// # Errors
/// What the agent says, or `node_unreachable` when the stream ends first.
pub(super) async fn answer(stream: &mut Stream) -> Result<(), ApiError> {
    let ended = |why: String| ApiError::new(Code::NodeUnreachable, "the node's agent ended the stream").inside(why);
    let mut line = String::new();
    let mut limited = stream.take(LINE);
    limited.read_line(&mut line).await.map_err(|e| ended(e.to_string()))?;
    if !line.ends_with('\n') {
        return Err(ended(format!("answer line cut after {} bytes", line.len())));
    }
    match serde_json::from_str(&line).map_err(|e| ended(format!("answer line: {e}")))? {
        StreamAnswer::Ok => Ok(()),
        StreamAnswer::Error { code, detail } => {
            let known = Code::ALL.iter().find(|c| c.as_str() == code).copied();
            Err(ApiError::new(known.unwrap_or(Code::WrongState), detail).inside(format!("agent says {code}")))
        }
    }
}

/// `GET /v1/nodes/{id}/tunnel`.
pub(crate) async fn tunnel(
    State(app): State<App>,
    caller: Caller,
    Path(name): Path<String>,
    query: Query,
    upgrade: Result<WebSocketUpgrade, axum::extract::ws::rejection::WebSocketUpgradeRejection>,
) -> Answer {
    query.only(&[])?;
    let node = own_node(&caller, &name)?;
    let upgrade = upgrade.map_err(|e| not_websocket(&e.to_string()))?;
    let upgrade = upgrade.max_message_size(MESSAGE).max_frame_size(MESSAGE);
    Ok(upgrade.on_upgrade(move |socket| async move {
        let socket = WebSocketBytes::new(socket, app.config.limits.stream_idle);
        let (id, requests) = app.tunnels.add(node);
        tracing::info!(%node, "a tunnel is open");
        let stopping = app.stopping.clone();
        tokio::select! {
            biased;
            () = stopping.cancelled() => {}
            () = until_removed(&app, node) => {}
            () = drive(socket, requests) => {}
        }
        app.tunnels.remove(node, id);
        tracing::info!(%node, "a tunnel has ended");
    }))
}

/// A stream path was called without the upgrade.
pub(super) fn not_websocket(why: &str) -> Fault {
    ApiError::new(Code::Malformed, format!("this path is a WebSocket: {why}")).into()
}

/// Opens streams as they are asked for and moves their bytes, until the connection ends.
async fn drive(socket: WebSocketBytes, mut requests: mpsc::Receiver<Reply>) {
    let mut config = Config::default();
    config.set_max_num_streams(STREAMS);
    config.set_max_connection_receive_window(Some(WINDOW));
    let mut connection = Connection::new(socket, config, Mode::Client);
    let mut waiting: Option<Reply> = None;
    poll_fn(|context| {
        loop {
            if waiting.is_none() {
                match requests.poll_recv(context) {
                    Poll::Ready(Some(reply)) => waiting = Some(reply),
                    Poll::Ready(None) => return Poll::Ready(()),
                    Poll::Pending => {}
                }
            }
            if waiting.is_some()
                && let Poll::Ready(opened) = connection.poll_new_outbound(context)
            {
                let failed = opened.is_err();
                if let Some(reply) = waiting.take() {
                    // Whoever asked may be gone; the stream is dropped then.
                    let _ = reply.send(opened);
                }
                if failed {
                    return Poll::Ready(());
                }
                continue;
            }
            match connection.poll_next_inbound(context) {
                // Agents open no streams; one that does is closed at once.
                Poll::Ready(Some(Ok(_))) => {}
                Poll::Ready(Some(Err(error))) => {
                    tracing::debug!(%error, "tunnel");
                    return Poll::Ready(());
                }
                Poll::Ready(None) => return Poll::Ready(()),
                Poll::Pending => return Poll::Pending,
            }
        }
    })
    .await;
}
