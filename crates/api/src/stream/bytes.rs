//! A WebSocket as a stream of bytes, for yamux: binary messages in order, cut anywhere. Pings keep it alive and notice a dead peer.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::extract::ws::{Message, WebSocket};
use bytes::{Buf, Bytes};
use futures_util::io::{AsyncRead, AsyncWrite};
use futures_util::{Sink, Stream};
use tokio::time::{Instant, Interval, MissedTickBehavior};

/// Bytes in one message towards the agent.
const MESSAGE: usize = 64 * 1024;

/// The adapter.
pub(super) struct WebSocketBytes {
    socket: WebSocket,
    rest: Bytes,
    tick: Interval,
    ping_due: bool,
    heard: Instant,
    idle: Duration,
}

impl WebSocketBytes {
    /// Ends with `TimedOut` when nothing, not even the answer to a ping, came for `idle`.
    pub fn new(socket: WebSocket, idle: Duration) -> Self {
        let mut tick = tokio::time::interval((idle / 3).max(Duration::from_millis(10)));
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        Self { socket, rest: Bytes::new(), tick, ping_due: false, heard: Instant::now(), idle }
    }

    fn poll_ping(&mut self, context: &mut Context<'_>) -> io::Result<()> {
        while self.tick.poll_tick(context).is_ready() {
            if self.heard.elapsed() > self.idle {
                return Err(io::Error::new(io::ErrorKind::TimedOut, "the agent does not answer pings"));
            }
            self.ping_due = true;
        }
        if self.ping_due
            && let Poll::Ready(ready) = Pin::new(&mut self.socket).poll_ready(context)
        {
            ready.map_err(broken)?;
            Pin::new(&mut self.socket).start_send(Message::Ping(Bytes::new())).map_err(broken)?;
            self.ping_due = false;
            if let Poll::Ready(flushed) = Pin::new(&mut self.socket).poll_flush(context) {
                flushed.map_err(broken)?;
            }
        }
        Ok(())
    }
}

fn broken(error: axum::Error) -> io::Error {
    io::Error::new(io::ErrorKind::ConnectionReset, error)
}

impl AsyncRead for WebSocketBytes {
    fn poll_read(mut self: Pin<&mut Self>, context: &mut Context<'_>, out: &mut [u8]) -> Poll<io::Result<usize>> {
        let this = &mut *self;
        this.poll_ping(context)?;
        loop {
            if !this.rest.is_empty() {
                let n = this.rest.len().min(out.len());
                this.rest.copy_to_slice(&mut out[..n]);
                return Poll::Ready(Ok(n));
            }
            match ready!(Pin::new(&mut this.socket).poll_next(context)) {
                None | Some(Ok(Message::Close(_))) => return Poll::Ready(Ok(0)),
                Some(Err(error)) => return Poll::Ready(Err(broken(error))),
                Some(Ok(message)) => {
                    this.heard = Instant::now();
                    match message {
                        Message::Binary(bytes) => this.rest = bytes,
                        Message::Text(_) => {
                            let text = "a tunnel carries binary messages only";
                            return Poll::Ready(Err(io::Error::new(io::ErrorKind::InvalidData, text)));
                        }
                        Message::Ping(_) | Message::Pong(_) | Message::Close(_) => {}
                    }
                }
            }
        }
    }
}

impl AsyncWrite for WebSocketBytes {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        ready!(Pin::new(&mut self.socket).poll_ready(context)).map_err(broken)?;
        let n = bytes.len().min(MESSAGE);
        let message = Message::Binary(Bytes::copy_from_slice(&bytes[..n]));
        Pin::new(&mut self.socket).start_send(message).map_err(broken)?;
        Poll::Ready(Ok(n))
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_flush(context).map_err(broken)
    }

    fn poll_close(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_close(context).map_err(broken)
    }
}
