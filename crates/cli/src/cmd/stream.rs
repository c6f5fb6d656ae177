//! Carrying an interactive stream between this terminal (or pipe) and an instance.

use oblak_client::{FrameSink, FrameSource, FrameStream};
use oblak_platform::frame::{Channel, Control, Frame};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::error::{CliError, Result};
use crate::term;

/// Bytes read at once.
const CHUNK: usize = 32 * 1024;

/// How a stream is carried.
#[derive(Clone, Copy, Debug, Default)]
pub struct Ways {
    /// Pass standard input on.
    pub stdin: bool,
    /// Standard input is a terminal in raw mode: keys go through as they are.
    pub raw: bool,
    /// This byte of a raw terminal leaves.
    pub escape: Option<u8>,
    /// Tell the other end about the size of the terminal.
    pub resize: bool,
    /// Ctrl-C (when not raw) is passed on as a signal first.
    pub interrupt: bool,
}

/// How a stream ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// The command ended with this code.
    Exit(i32),
    /// The other end closed.
    Closed,
    /// The escape key.
    Left,
    /// A signal to this process.
    Signal(i32),
}

/// Carries bytes both ways until one side ends.
pub async fn relay(stream: FrameStream, ways: Ways) -> Result<End> {
    let (mut sink, source) = stream.split();
    let end = tokio::select! {
        end = receive(source) => end,
        end = send(&mut sink, ways) => end,
    };
    // Best effort: the other end notices a broken connection as well.
    let _ = tokio::time::timeout(std::time::Duration::from_millis(500), sink.close()).await;
    end
}

async fn receive(mut source: FrameSource) -> Result<End> {
    let (mut stdout, mut stderr) = (tokio::io::stdout(), tokio::io::stderr());
    loop {
        let Some(frame) = source.next().await? else { return Ok(End::Closed) };
        match frame.channel {
            Channel::Stdout => {
                stdout.write_all(&frame.payload).await.map_err(|e| CliError::output(&e))?;
                stdout.flush().await.map_err(|e| CliError::output(&e))?;
            }
            Channel::Stderr => {
                let _ = stderr.write_all(&frame.payload).await;
                let _ = stderr.flush().await;
            }
            Channel::Control => match frame.as_control() {
                Some(Control::Exit { code }) => return Ok(End::Exit(code)),
                Some(Control::Error { code, detail }) => {
                    return Err(CliError::new(detail, format!("the node says {code:?}; `oblak events` may say more")));
                }
                _ => {}
            },
            Channel::Stdin => {}
        }
    }
}

fn listen(kind: SignalKind) -> Result<Signal> {
    signal(kind).map_err(|e| CliError::new(format!("cannot listen for signals: {e}"), "try again"))
}

async fn send(sink: &mut FrameSink, ways: Ways) -> Result<End> {
    let mut window = listen(SignalKind::window_change())?;
    let mut interrupt = listen(SignalKind::interrupt())?;
    let mut terminate = listen(SignalKind::terminate())?;
    let mut hangup = listen(SignalKind::hangup())?;
    let mut stdin = tokio::io::stdin();
    let mut open = ways.stdin;
    let mut interrupted = false;
    let mut buffer = vec![0u8; CHUNK];
    if !open {
        say(sink, &Control::Eof).await;
    }
    loop {
        tokio::select! {
            read = stdin.read(&mut buffer), if open => match read {
                Ok(0) | Err(_) => {
                    open = false;
                    say(sink, &Control::Eof).await;
                }
                Ok(n) => {
                    let bytes = &buffer[..n];
                    let escape = ways.escape.filter(|_| ways.raw).and_then(|e| bytes.iter().position(|b| *b == e));
                    let bytes = &bytes[..escape.unwrap_or(n)];
                    if !bytes.is_empty() && sink.send(&Frame::new(Channel::Stdin, bytes.to_vec())).await.is_err() {
                        // The other end is gone; what it still had to say is with the receiver.
                        open = false;
                    }
                    if escape.is_some() {
                        return Ok(End::Left);
                    }
                }
            },
            _ = window.recv(), if ways.resize => {
                let (cols, rows) = term::size();
                say(sink, &Control::Resize { cols, rows }).await;
            }
            _ = interrupt.recv() => {
                if !ways.interrupt || interrupted {
                    return Ok(End::Signal(2));
                }
                interrupted = true;
                say(sink, &Control::Signal { signal: 2 }).await;
            }
            _ = terminate.recv() => return Ok(End::Signal(15)),
            _ = hangup.recv() => return Ok(End::Signal(1)),
        }
    }
}

/// A message beside the bytes. If it cannot be sent the receiver learns why.
async fn say(sink: &mut FrameSink, message: &Control) {
    let _ = sink.send(&Frame::control(message)).await;
}
