//! Console, exec and log streams of fake guests.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use futures_util::{SinkExt, StreamExt};
use oblak_model::InstanceId;
use oblak_platform::driver::BoxDuplex;
use oblak_platform::frame::{Channel, Control, Frame, FrameCodec};
use tokio::io::{AsyncRead, DuplexStream, ReadBuf};
use tokio_util::codec::Framed;

use super::FakeWorld;
use crate::ExecRequest;

const PIPE_BYTES: usize = 64 * 1024;

type Stream = Framed<DuplexStream, FrameCodec>;

/// A console that repeats what is typed.
pub(super) fn console(world: Arc<FakeWorld>, id: InstanceId) -> BoxDuplex {
    let (near, far) = tokio::io::duplex(PIPE_BYTES);
    tokio::spawn(async move {
        let mut stream = Framed::new(far, FrameCodec);
        if stream.send(Frame::control(&Control::Ready)).await.is_err() {
            return;
        }
        while let Some(Ok(frame)) = stream.next().await {
            if frame.channel == Channel::Stdin {
                world.print(id, &frame.payload);
                if stream.send(Frame::new(Channel::Stdout, frame.payload)).await.is_err() {
                    return;
                }
            }
        }
    });
    Box::new(near)
}

/// A command inside: `echo`, `cat`, `true`, `false`, `sleep N` and `sh -c "exit N"` do what they always do.
pub(super) fn exec(request: &ExecRequest) -> BoxDuplex {
    let (near, far) = tokio::io::duplex(PIPE_BYTES);
    let request = request.clone();
    tokio::spawn(async move {
        let mut stream = Framed::new(far, FrameCodec);
        if stream.send(Frame::control(&Control::Ready)).await.is_ok()
            && let Some(code) = run(&request, &mut stream).await
        {
            let _ = stream.send(Frame::control(&Control::Exit { code })).await;
        }
    });
    Box::new(near)
}

/// The exit code, or none when the person hung up.
async fn run(request: &ExecRequest, stream: &mut Stream) -> Option<i32> {
    let words: Vec<&str> = request.argv.iter().map(String::as_str).collect();
    match words.as_slice() {
        ["true"] => Some(0),
        ["false"] => Some(1),
        ["echo", rest @ ..] => {
            stream.send(Frame::new(Channel::Stdout, format!("{}\n", rest.join(" ")))).await.ok()?;
            Some(0)
        }
        ["sh", "-c", line] if line.starts_with("exit ") => line["exit ".len()..].trim().parse().ok().or(Some(2)),
        ["sleep", seconds] => {
            let time = Duration::from_secs(seconds.parse().unwrap_or(0));
            tokio::select! {
                () = tokio::time::sleep(time) => Some(0),
                code = signalled(stream) => code,
            }
        }
        ["cat"] => loop {
            let frame = stream.next().await?.ok()?;
            match frame.as_control() {
                Some(Control::Eof) => return Some(0),
                Some(Control::Signal { signal }) => return Some(128 + signal),
                _ if frame.channel == Channel::Stdin => {
                    stream.send(Frame::new(Channel::Stdout, frame.payload)).await.ok()?;
                }
                _ => {}
            }
        },
        _ => {
            let text = format!("{}: not found\n", words.first().unwrap_or(&""));
            stream.send(Frame::new(Channel::Stderr, text)).await.ok()?;
            Some(127)
        }
    }
}

async fn signalled(stream: &mut Stream) -> Option<i32> {
    loop {
        if let Some(Control::Signal { signal }) = stream.next().await?.ok()?.as_control() {
            return Some(128 + signal);
        }
    }
}

/// The console output of a guest.
pub(super) struct FakeLog {
    world: Arc<FakeWorld>,
    id: InstanceId,
    position: u64,
    follow: bool,
    wait: Option<Pin<Box<dyn Future<Output = ()> + Send>>>,
}

impl FakeLog {
    pub(super) fn new(world: Arc<FakeWorld>, id: InstanceId, tail: Option<u64>, follow: bool) -> Self {
        let position = world.lock().guests.get(&id).map_or(0, |guest| {
            let skip = tail.map_or(0, |lines| tail_offset(&guest.log, lines));
            guest.log_start + skip as u64
        });
        Self { world, id, position, follow, wait: None }
    }

    /// `None` when the guest is gone, empty when there is nothing new.
    fn take(&mut self, most: usize) -> Option<Bytes> {
        let state = self.world.lock();
        let guest = state.guests.get(&self.id)?;
        self.position = self.position.max(guest.log_start);
        let from = usize::try_from(self.position - guest.log_start).unwrap_or(usize::MAX).min(guest.log.len());
        let chunk = &guest.log[from..guest.log.len().min(from.saturating_add(most))];
        self.position += chunk.len() as u64;
        Some(Bytes::copy_from_slice(chunk))
    }
}

impl AsyncRead for FakeLog {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, out: &mut ReadBuf<'_>) -> Poll<std::io::Result<()>> {
        loop {
            if let Some(wait) = &mut self.wait {
                std::task::ready!(wait.as_mut().poll(cx));
                self.wait = None;
            }
            // Registered before looking, so nothing printed in between is missed.
            let world = self.world.clone();
            let mut wait: Pin<Box<dyn Future<Output = ()> + Send>> =
                Box::pin(async move { world.changed.notified().await });
            let early = wait.as_mut().poll(cx).is_ready();
            match self.take(out.remaining()) {
                Some(chunk) if !chunk.is_empty() => {
                    out.put_slice(&chunk);
                    return Poll::Ready(Ok(()));
                }
                Some(_) if self.follow => {
                    if !early {
                        self.wait = Some(wait);
                    }
                }
                _ => return Poll::Ready(Ok(())),
            }
        }
    }
}

fn tail_offset(log: &[u8], lines: u64) -> usize {
    if lines == 0 {
        return log.len();
    }
    let body = log.strip_suffix(b"\n").unwrap_or(log);
    let wanted = usize::try_from(lines).unwrap_or(usize::MAX);
    body.iter().enumerate().rev().filter(|(_, b)| **b == b'\n').nth(wanted - 1).map_or(0, |(i, _)| i + 1)
}
