//! WebSocket streams: console, exec, vnc, port-forward.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::{Bytes, BytesMut};
use futures_util::{Sink, SinkExt, Stream, StreamExt};
use oblak_model::InstanceKind;
use oblak_platform::frame::{Channel, Control, Frame, MAX_PAYLOAD};
use tokio::net::TcpStream;
use tokio_rustls::client::TlsStream;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::{Error as WsError, Message};

use crate::Result;
use crate::edge::{CONNECT, Edge};
use crate::objects::{encode, object_path};
use crate::transport::{Client, ClientError, of_this_server, root_cause};

pub(crate) type Socket = WebSocketStream<TlsStream<TcpStream>>;

/// Frames both ways.
#[derive(Debug)]
pub struct FrameStream {
    socket: Socket,
}

impl FrameStream {
    /// The next frame; `None` when the stream has ended.
    ///
    /// # Errors
    /// [`ClientError::Answer`] when the connection broke.
    pub async fn next(&mut self) -> Result<Option<Frame>> {
        next_frame(&mut self.socket).await
    }

    /// Sends a frame.
    ///
    /// # Errors
    /// [`ClientError::Answer`] when the connection broke.
    pub async fn send(&mut self, frame: &Frame) -> Result<()> {
        let sent = self.socket.send(Message::Binary(frame.to_message())).await;
        sent.map_err(|e| ClientError::Answer(format!("the stream broke: {}", root_cause(&e))))
    }

    /// Two halves, so that both directions can be served at once.
    #[must_use]
    pub fn split(self) -> (FrameSink, FrameSource) {
        let (sink, stream) = self.socket.split();
        (FrameSink { sink }, FrameSource { stream })
    }

    /// As plain bytes: Stdin frames out, Stdout frames in. For port-forward and vnc.
    #[must_use]
    pub fn into_bytes(self) -> ByteStream {
        ByteStream { socket: self.socket, rest: BytesMut::new(), ended: false }
    }
}

async fn next_frame(messages: &mut (impl Stream<Item = Result<Message, WsError>> + Unpin)) -> Result<Option<Frame>> {
    loop {
        match messages.next().await {
            None | Some(Ok(Message::Close(_)) | Err(WsError::ConnectionClosed | WsError::AlreadyClosed)) => {
                return Ok(None);
            }
            Some(Err(e)) => return Err(ClientError::Answer(format!("the stream broke: {}", root_cause(&e)))),
            Some(Ok(Message::Binary(bytes))) => {
                let frame = Frame::from_message(bytes);
                return frame.map(Some).ok_or_else(|| ClientError::Answer("a stream frame cannot be read".into()));
            }
            Some(Ok(_)) => {}
        }
    }
}

/// A command to run inside an instance.
#[derive(Clone, Debug, Default)]
pub struct ExecOptions {
    /// Program and arguments.
    pub argv: Vec<String>,
    /// Added environment, `NAME=value`.
    pub env: Vec<String>,
    /// User inside; the guest's default when empty.
    pub user: String,
    /// Working directory inside; the guest's default when empty.
    pub cwd: String,
    /// Size of the terminal, if it should have one.
    pub tty: Option<(u16, u16)>,
}

/// Sending half of a [`FrameStream`].
#[derive(Debug)]
pub struct FrameSink {
    sink: futures_util::stream::SplitSink<Socket, Message>,
}

impl FrameSink {
    /// Sends a frame.
    ///
    /// # Errors
    /// [`ClientError::Answer`] when the connection broke.
    pub async fn send(&mut self, frame: &Frame) -> Result<()> {
        let sent = self.sink.send(Message::Binary(frame.to_message())).await;
        sent.map_err(|e| ClientError::Answer(format!("the stream broke: {}", root_cause(&e))))
    }
    /// Says that nothing more comes.
    pub async fn close(&mut self) {
        let _ = self.sink.close().await;
    }
}

/// Receiving half of a [`FrameStream`].
#[derive(Debug)]
pub struct FrameSource {
    stream: futures_util::stream::SplitStream<Socket>,
}

impl FrameSource {
    /// As [`FrameStream::next`].
    ///
    /// # Errors
    /// [`ClientError::Answer`] when the connection broke.
    pub async fn next(&mut self) -> Result<Option<Frame>> {
        next_frame(&mut self.stream).await
    }
}

/// A [`FrameStream`] as an ordinary byte stream.
#[derive(Debug)]
pub struct ByteStream {
    socket: Socket,
    rest: BytesMut,
    ended: bool,
}

fn broken(e: WsError) -> std::io::Error {
    match e {
        WsError::Io(e) => e,
        other => std::io::Error::other(other),
    }
}

impl tokio::io::AsyncRead for ByteStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut tokio::io::ReadBuf<'_>,
    ) -> Poll<std::io::Result<()>> {
        loop {
            if !self.rest.is_empty() {
                let n = self.rest.len().min(buf.remaining());
                buf.put_slice(&self.rest.split_to(n));
                return Poll::Ready(Ok(()));
            }
            if self.ended {
                return Poll::Ready(Ok(()));
            }
            match futures_util::ready!(Pin::new(&mut self.socket).poll_next(cx)) {
                None | Some(Ok(Message::Close(_)) | Err(WsError::ConnectionClosed | WsError::AlreadyClosed)) => {
                    self.ended = true;
                }
                Some(Err(e)) => return Poll::Ready(Err(broken(e))),
                Some(Ok(Message::Binary(bytes))) => self.take(bytes)?,
                Some(Ok(_)) => {}
            }
        }
    }
}

impl ByteStream {
    fn take(&mut self, bytes: Bytes) -> std::io::Result<()> {
        let frame = Frame::from_message(bytes).ok_or_else(|| std::io::Error::other("a stream frame cannot be read"))?;
        if frame.channel == Channel::Stdout {
            self.rest.extend_from_slice(&frame.payload);
        }
        match frame.as_control() {
            Some(Control::Error { detail, .. }) => return Err(std::io::Error::other(detail)),
            Some(Control::Eof | Control::Exit { .. }) => self.ended = true,
            _ => {}
        }
        Ok(())
    }
}

impl tokio::io::AsyncWrite for ByteStream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<std::io::Result<usize>> {
        futures_util::ready!(Pin::new(&mut self.socket).poll_ready(cx)).map_err(broken)?;
        let n = buf.len().min(MAX_PAYLOAD.min(64 * 1024));
        let frame = Frame::new(Channel::Stdin, Bytes::copy_from_slice(&buf[..n]));
        Pin::new(&mut self.socket).start_send(Message::Binary(frame.to_message())).map_err(broken)?;
        Poll::Ready(Ok(n))
    }
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.socket).poll_flush(cx).map_err(broken)
    }
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        futures_util::ready!(Pin::new(&mut self.socket).poll_ready(cx)).map_err(broken)?;
        Pin::new(&mut self.socket)
            .start_send(Message::Binary(Frame::control(&Control::Eof).to_message()))
            .map_err(broken)?;
        Pin::new(&mut self.socket).poll_flush(cx).map_err(broken)
    }
}

impl Client {
    /// Opens a WebSocket on any path, on the first server that lets us.
    pub(crate) async fn open(&self, path: &str) -> Result<Socket> {
        let servers = self.servers();
        let mut last = ClientError::Config("no server is known".into());
        for server in &servers {
            let late = || ClientError::Timeout { server: server.clone(), seconds: self.timeout.as_secs() };
            let opened = tokio::time::timeout(self.timeout, self.open_at(server, path)).await;
            match opened.map_err(|_| late()).and_then(|opened| opened) {
                Ok(socket) => return Ok(socket),
                // Another server may have the tunnel that this one lacks. Nothing has begun yet, so asking again is harmless.
                Err(error) if error.is_unsure() || of_this_server(&error) => last = error,
                Err(error) => return Err(error),
            }
        }
        Err(last)
    }

    async fn open_at(&self, server: &str, path: &str) -> Result<Socket> {
        let unreachable = |reason: String| ClientError::Unreachable { server: server.into(), reason };
        let Edge::Network(network) = &*self.inner.edge else {
            return Err(unreachable("streams need a network".into()));
        };
        let named = server.trim_start_matches("https://");
        let authority: http::uri::Authority =
            named.parse().map_err(|_| ClientError::Config("the server's address is broken".into()))?;
        let host = authority.host().trim_start_matches('[').trim_end_matches(']').to_string();
        let tcp = TcpStream::connect((host.as_str(), authority.port_u16().unwrap_or(443)));
        let tcp = tokio::time::timeout(CONNECT, tcp).await;
        let tcp = tcp.map_err(|_| unreachable("it does not answer".into()))?.map_err(|e| unreachable(e.to_string()))?;
        let _ = tcp.set_nodelay(true);
        let mut tls = (*network.tls()).clone();
        tls.alpn_protocols = vec![b"http/1.1".to_vec()];
        let name = rustls::pki_types::ServerName::try_from(host)
            .map_err(|_| ClientError::Config("the server's name is broken".into()))?;
        let tls = tokio_rustls::TlsConnector::from(Arc::new(tls))
            .connect(name, tcp)
            .await
            .map_err(|e| unreachable(root_cause(&e)))?;
        let mut request = http::Request::builder()
            .uri(format!("wss://{named}{path}"))
            .header("host", named)
            .header("connection", "Upgrade")
            .header("upgrade", "websocket")
            .header("sec-websocket-version", "13")
            .header("sec-websocket-key", tokio_tungstenite::tungstenite::handshake::client::generate_key())
            .body(())
            .map_err(|e| ClientError::Config(e.to_string()))?;
        request.headers_mut().extend(self.headers());
        match tokio_tungstenite::client_async(request, tls).await {
            Ok((socket, _)) => Ok(socket),
            Err(WsError::Http(response)) => Err(refused(&response)),
            Err(e) => Err(unreachable(root_cause(&e))),
        }
    }

    /// Interactive console of an instance.
    ///
    /// # Errors
    /// `wrong_state`, `unsupported`, `node_unreachable`, and as every call.
    pub async fn console(&self, project: &str, instance: &str) -> Result<FrameStream> {
        let path = format!("{}/console", object_path::<InstanceKind>(project, instance));
        Ok(FrameStream { socket: self.open(&path).await? })
    }

    /// Runs a command inside an instance.
    ///
    /// # Errors
    /// As [`Self::console`].
    pub async fn exec(&self, project: &str, instance: &str, options: &ExecOptions) -> Result<FrameStream> {
        let mut query: Vec<String> = options.argv.iter().map(|a| format!("argv={}", encode(a))).collect();
        query.extend(options.env.iter().map(|e| format!("env={}", encode(e))));
        for (name, value) in [("user", &options.user), ("cwd", &options.cwd)] {
            if !value.is_empty() {
                query.push(format!("{name}={}", encode(value)));
            }
        }
        if let Some((cols, rows)) = options.tty {
            query.push(format!("tty=true&cols={cols}&rows={rows}"));
        }
        let path = format!("{}/exec?{}", object_path::<InstanceKind>(project, instance), query.join("&"));
        Ok(FrameStream { socket: self.open(&path).await? })
    }

    /// The screen of a machine: RFB bytes.
    ///
    /// # Errors
    /// As [`Self::console`].
    pub async fn vnc(&self, project: &str, instance: &str) -> Result<FrameStream> {
        let path = format!("{}/vnc", object_path::<InstanceKind>(project, instance));
        Ok(FrameStream { socket: self.open(&path).await? })
    }

    /// A TCP connection to a port of an instance, from inside its network.
    ///
    /// # Errors
    /// As [`Self::console`].
    pub async fn forward(&self, project: &str, instance: &str, port: u16) -> Result<FrameStream> {
        let path = format!("{}/forward?port={port}", object_path::<InstanceKind>(project, instance));
        Ok(FrameStream { socket: self.open(&path).await? })
    }
}

fn refused(response: &http::Response<Option<Vec<u8>>>) -> ClientError {
    let body = response.body().as_deref().unwrap_or_default();
    serde_json::from_slice::<oblak_model::ApiError>(body).map_or_else(
        |_| {
            ClientError::Answer(format!(
                "{}: {}",
                response.status(),
                String::from_utf8_lossy(&body[..body.len().min(300)])
            ))
        },
        ClientError::from,
    )
}

/// Bytes over WebSocket messages without frames: what the tunnel runs on.
pub(crate) fn raw_bytes(socket: Socket) -> RawBytes {
    RawBytes { socket, rest: Bytes::new() }
}

/// See [`raw_bytes`].
#[derive(Debug)]
pub struct RawBytes {
    socket: Socket,
    rest: Bytes,
}

impl tokio::io::AsyncRead for RawBytes {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut tokio::io::ReadBuf<'_>,
    ) -> Poll<std::io::Result<()>> {
        loop {
            if !self.rest.is_empty() {
                let n = self.rest.len().min(buf.remaining());
                buf.put_slice(&self.rest.split_to(n));
                return Poll::Ready(Ok(()));
            }
            match futures_util::ready!(Pin::new(&mut self.socket).poll_next(cx)) {
                None | Some(Ok(Message::Close(_)) | Err(WsError::ConnectionClosed | WsError::AlreadyClosed)) => {
                    return Poll::Ready(Ok(()));
                }
                Some(Err(e)) => return Poll::Ready(Err(broken(e))),
                Some(Ok(Message::Binary(bytes))) => self.rest = bytes,
                Some(Ok(_)) => {}
            }
        }
    }
}

impl tokio::io::AsyncWrite for RawBytes {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<std::io::Result<usize>> {
        futures_util::ready!(Pin::new(&mut self.socket).poll_ready(cx)).map_err(broken)?;
        let n = buf.len().min(64 * 1024);
        Pin::new(&mut self.socket).start_send(Message::Binary(Bytes::copy_from_slice(&buf[..n]))).map_err(broken)?;
        Poll::Ready(Ok(n))
    }
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.socket).poll_flush(cx).map_err(broken)
    }
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.socket).poll_close(cx).map_err(broken)
    }
}
