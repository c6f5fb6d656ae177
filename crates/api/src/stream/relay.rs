//! Between a person's WebSocket and a stream of the tunnel, both ways, as fast as the slower side reads.

use std::time::Duration;

use axum::extract::ws::{CloseFrame, Message, WebSocket, close_code};
use bytes::{Bytes, BytesMut};
use futures_util::stream::{SplitSink, SplitStream};
use futures_util::{SinkExt, StreamExt};
use oblak_platform::frame::{Channel, Control, Frame, FrameCodec};
use tokio::io::{AsyncReadExt, AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::codec::{Decoder, Encoder};

use super::tunnel::Stream;

/// Bytes read from the guest at once.
const CHUNK: usize = 32 * 1024;
/// How long the person's side may take to answer the end of the stream.
const CLOSING: Duration = Duration::from_secs(2);

/// What the agent's side of the stream carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mode {
    /// Frames, passed on unchanged.
    Frames,
    /// Bytes; on the WebSocket they are stdin and stdout.
    Raw,
}

/// Runs until either end goes, or the person's side is silent (no answer to pings) for `idle`.
pub(super) async fn relay(socket: WebSocket, stream: Stream, mode: Mode, idle: Duration) {
    let (sink, source) = socket.split();
    let (read, write) = tokio::io::split(stream);
    let (heard, last) = watch::channel(Instant::now());
    let up = up(source, write, mode, heard);
    tokio::pin!(up);
    tokio::select! {
        // Closing with something unread resets the connection, and the last words could be lost on the way: the other side closes
        // first (RFC 6455, section 7.1.1).
        () = down(sink, read, mode, idle, last) => drop(tokio::time::timeout(CLOSING, up).await),
        () = &mut up => {}
    }
}

/// From the guest to the person.
async fn down(
    mut sink: SplitSink<WebSocket, Message>,
    mut read: ReadHalf<Stream>,
    mode: Mode,
    idle: Duration,
    last: watch::Receiver<Instant>,
) {
    let mut ticks = tokio::time::interval((idle / 3).max(Duration::from_millis(10)));
    let mut buffer = BytesMut::with_capacity(CHUNK);
    if mode == Mode::Raw && send(&mut sink, Frame::control(&Control::Ready)).await.is_err() {
        return;
    }
    loop {
        buffer.reserve(CHUNK);
        let n = tokio::select! {
            biased;
            _ = ticks.tick() => {
                if last.borrow().elapsed() > idle || sink.send(Message::Ping(Bytes::new())).await.is_err() {
                    return;
                }
                continue;
            }
            n = read.read_buf(&mut buffer) => n,
        };
        let ended = matches!(n, Ok(0) | Err(_));
        if forward(&mut sink, &mut buffer, mode).await.is_err() {
            return;
        }
        if ended {
            if mode == Mode::Raw {
                let _ = send(&mut sink, Frame::control(&Control::Eof)).await;
            }
            let close = CloseFrame { code: close_code::NORMAL, reason: "".into() };
            let _ = sink.send(Message::Close(Some(close))).await;
            return;
        }
    }
}

/// The connection to the person is gone, or the agent sent nonsense.
struct Broken;

async fn forward(sink: &mut SplitSink<WebSocket, Message>, buffer: &mut BytesMut, mode: Mode) -> Result<(), Broken> {
    match mode {
        Mode::Raw if buffer.is_empty() => Ok(()),
        Mode::Raw => send(sink, Frame::new(Channel::Stdout, buffer.split().freeze())).await,
        Mode::Frames => {
            while let Some(frame) = FrameCodec.decode(buffer).map_err(|_| Broken)? {
                send(sink, frame).await?;
            }
            Ok(())
        }
    }
}

async fn send(sink: &mut SplitSink<WebSocket, Message>, frame: Frame) -> Result<(), Broken> {
    sink.send(Message::Binary(frame.to_message())).await.map_err(|_| Broken)
}

/// From the person to the guest.
async fn up(
    mut source: SplitStream<WebSocket>,
    mut write: WriteHalf<Stream>,
    mode: Mode,
    heard: watch::Sender<Instant>,
) {
    let mut closed = false;
    // The guest's side is gone: what comes is dropped, what the guest said last still goes down.
    let mut gone = false;
    while let Some(Ok(message)) = source.next().await {
        heard.send_replace(Instant::now());
        let bytes = match message {
            Message::Binary(bytes) => bytes,
            Message::Ping(_) | Message::Pong(_) => continue,
            Message::Text(_) | Message::Close(_) => break,
        };
        let Some(frame) = Frame::from_message(bytes) else { break };
        let eof = frame.as_control() == Some(Control::Eof);
        let written = match mode {
            _ if closed || gone => Ok(()),
            Mode::Frames => {
                let mut out = BytesMut::new();
                match FrameCodec.encode(frame, &mut out) {
                    Ok(()) => write.write_all(&out).await,
                    Err(error) => Err(error),
                }
            }
            Mode::Raw if eof => {
                closed = true;
                write.shutdown().await
            }
            Mode::Raw if frame.channel == Channel::Stdin => write.write_all(&frame.payload).await,
            Mode::Raw => Ok(()),
        };
        let flushed = match written {
            Ok(()) if !closed && !gone => write.flush().await,
            other => other,
        };
        gone |= flushed.is_err();
    }
}
