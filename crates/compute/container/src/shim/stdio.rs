//! Standard streams of a process in the container: three pipes or one terminal.

use std::io;
use std::os::fd::OwnedFd;
use std::process::{Command, Stdio};
use std::sync::Arc;

use nix::fcntl::OFlag;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::unix::pipe;

use super::pty::Pty;

/// Where output comes from.
#[derive(Debug)]
pub enum Output {
    /// A pipe.
    Pipe(pipe::Receiver),
    /// The terminal.
    Pty(Arc<Pty>),
    /// Nothing will come.
    Ended,
}

impl Output {
    /// Reads; 0 at the end. Cancellation loses nothing.
    pub async fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Pipe(pipe) => pipe.read(buffer).await,
            Self::Pty(pty) => pty.read(buffer).await,
            Self::Ended => Ok(0),
        }
    }
}

/// Where input goes.
#[derive(Debug)]
pub enum Sink {
    /// A pipe.
    Pipe(pipe::Sender),
    /// The terminal.
    Pty(Arc<Pty>),
    /// Nobody reads it.
    Closed,
}

impl Sink {
    /// Writes everything.
    pub async fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        match self {
            Self::Pipe(pipe) => pipe.write_all(bytes).await,
            Self::Pty(pty) => pty.write_all(bytes).await,
            Self::Closed => Ok(()),
        }
    }
    /// No more input: closes the pipe; a terminal gets its end-of-file character.
    pub async fn end(&mut self) {
        match self {
            Self::Pty(pty) => {
                let _ = pty.write_all(&[4]).await;
            }
            _ => *self = Self::Closed,
        }
    }
    /// Another window size; only terminals have one.
    pub fn resize(&self, cols: u16, rows: u16) {
        if let Self::Pty(pty) = self {
            pty.resize(cols, rows);
        }
    }
}

/// Both ends of one process's streams.
#[derive(Debug)]
pub struct Streams {
    pub input: Sink,
    pub stdout: Output,
    pub stderr: Output,
}

impl Streams {
    /// Of a terminal.
    pub fn of_pty(pty: Pty) -> Self {
        let pty = Arc::new(pty);
        Self { input: Sink::Pty(pty.clone()), stdout: Output::Pty(pty), stderr: Output::Ended }
    }

    /// Gives `command` pipes, and standard input too when asked for, and returns our ends.
    pub fn pipes(command: &mut Command, with_input: bool) -> io::Result<Self> {
        let pair = || nix::unistd::pipe2(OFlag::O_CLOEXEC).map_err(io::Error::from);
        let receiver = |fd: OwnedFd| pipe::Receiver::from_owned_fd(nonblocking(fd)?).map(Output::Pipe);
        let (out_read, out_write) = pair()?;
        let (err_read, err_write) = pair()?;
        command.stdout(Stdio::from(out_write)).stderr(Stdio::from(err_write));
        let input = if with_input {
            let (in_read, in_write) = pair()?;
            command.stdin(Stdio::from(in_read));
            Sink::Pipe(pipe::Sender::from_owned_fd(nonblocking(in_write)?)?)
        } else {
            command.stdin(Stdio::null());
            Sink::Closed
        };
        Ok(Self { input, stdout: receiver(out_read)?, stderr: receiver(err_read)? })
    }
}

fn nonblocking(fd: OwnedFd) -> io::Result<OwnedFd> {
    nix::fcntl::fcntl(&fd, nix::fcntl::FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
    Ok(fd)
}
