//! One more process in the container, with a person or a program at the other end.

use std::time::Duration;

use futures_util::stream::SplitSink;
use futures_util::{SinkExt, StreamExt};
use nix::sys::signal::Signal;
use oblak_compute::shim::fanout::input_of;
use oblak_compute::shim::{Input, ShimStream};
use oblak_platform::frame::{Channel, Control, Frame};
use oblak_platform::process::Identity;

use super::reaper::Reaper;
use super::runtime::Started;
use super::stdio::{Output, Sink};

/// Bytes read at once.
const CHUNK: usize = 8192;
/// How long output is still read after the process has ended; its children may hold the pipes open for ever.
const DRAIN: Duration = Duration::from_millis(500);
/// How long a process whose person hung up has before it is killed.
const HANGUP: Duration = Duration::from_secs(2);

/// Owns the process: when it is dropped early, the process is told to go.
#[derive(Debug)]
pub struct Session {
    started: Started,
    reaper: Reaper,
    guard: Guard,
}

#[derive(Debug)]
struct Guard(Option<Identity>);

impl Drop for Guard {
    fn drop(&mut self) {
        if let Some(process) = self.0.take() {
            process.signal(Signal::SIGHUP);
            if let Ok(runtime) = tokio::runtime::Handle::try_current() {
                runtime.spawn(async move {
                    tokio::time::sleep(HANGUP).await;
                    process.kill();
                });
            }
        }
    }
}

impl Session {
    /// For a process that was just started.
    pub fn new(mut started: Started, reaper: Reaper) -> Self {
        let guard = Guard(started.identity.take());
        Self { started, reaper, guard }
    }

    /// Carries bytes until the process has ended or the other side hangs up.
    pub async fn serve(self, stream: ShimStream) {
        let Self { started, reaper, mut guard } = self;
        let process = guard.0.clone();
        let (mut sink, mut source) = stream.split();
        let mut input = started.streams.input;
        let incoming = async {
            while let Some(Ok(frame)) = source.next().await {
                match input_of(&frame) {
                    Some(message) => apply(message, &mut input, process.as_ref()).await,
                    None => continue,
                }
            }
        };
        let (pid, stdout, stderr) = (started.pid, started.streams.stdout, started.streams.stderr);
        let outgoing = async {
            if sink.send(Frame::control(&Control::Ready)).await.is_err() {
                return false;
            }
            let Some(code) = pump(pid, stdout, stderr, &reaper, &mut sink).await else { return false };
            let _ = sink.send(Frame::control(&Control::Exit { code })).await;
            let _ = sink.close().await;
            true
        };
        tokio::select! {
            () = incoming => {}
            ended = outgoing => if ended { guard.0 = None },
        }
    }
}

async fn apply(message: Input, input: &mut Sink, process: Option<&Identity>) {
    match message {
        // A process that closed its input does not want it; that is no reason to end the session.
        Input::Bytes(bytes) => {
            if input.write_all(&bytes).await.is_err() {
                *input = Sink::Closed;
            }
        }
        Input::Resize(cols, rows) => input.resize(cols, rows),
        Input::Eof => input.end().await,
        Input::Signal(number) => {
            if let (Some(process), Ok(signal)) = (process, Signal::try_from(number)) {
                process.signal(signal);
            }
        }
    }
}

/// Sends all output, then returns the exit code; `None` when the other side is gone.
async fn pump(
    pid: i32,
    mut stdout: Output,
    mut stderr: Output,
    reaper: &Reaper,
    sink: &mut SplitSink<ShimStream, Frame>,
) -> Option<i32> {
    let (mut out_buffer, mut err_buffer) = (vec![0u8; CHUNK], vec![0u8; CHUNK]);
    let mut code = None;
    let mut drained = std::pin::pin!(tokio::time::sleep(Duration::MAX));
    let mut exit = std::pin::pin!(reaper.wait(pid));
    loop {
        let (out_open, err_open) = (!matches!(stdout, Output::Ended), !matches!(stderr, Output::Ended));
        if let (Some(code), false, false) = (code, out_open, err_open) {
            return Some(code);
        }
        tokio::select! {
            n = stdout.read(&mut out_buffer), if out_open => match n {
                Ok(n) if n > 0 => if sink.send(Frame::new(Channel::Stdout, out_buffer[..n].to_vec())).await.is_err() { return None },
                _ => stdout = Output::Ended,
            },
            n = stderr.read(&mut err_buffer), if err_open => match n {
                Ok(n) if n > 0 => if sink.send(Frame::new(Channel::Stderr, err_buffer[..n].to_vec())).await.is_err() { return None },
                _ => stderr = Output::Ended,
            },
            ended = &mut exit, if code.is_none() => {
                code = Some(ended);
                drained.as_mut().reset(tokio::time::Instant::now() + DRAIN);
            }
            () = &mut drained, if code.is_some() => return code,
        }
    }
}
