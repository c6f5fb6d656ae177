//! Terminals of containers: the runtime makes them and hands their master over on a socket.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::net::{UnixListener, UnixStream};

/// How long the runtime may take to hand over a terminal.
const DEADLINE: Duration = Duration::from_secs(10);

/// The socket that the runtime is told of (`--console-socket`).
#[derive(Debug)]
pub struct ConsoleSocket {
    listener: UnixListener,
    path: PathBuf,
}

impl ConsoleSocket {
    /// Binds `path`, which must be short; it is removed on drop.
    pub fn bind(path: PathBuf) -> io::Result<Self> {
        Ok(Self { listener: UnixListener::bind(&path)?, path })
    }

    /// The path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Takes the master that the runtime has sent or is about to send.
    pub async fn master(&self) -> io::Result<Pty> {
        let receive = async {
            let (stream, _) = self.listener.accept().await?;
            let fd = stream.async_io(Interest::READABLE, || receive_fd(&stream)).await?;
            Pty::new(fd)
        };
        tokio::time::timeout(DEADLINE, receive)
            .await
            .map_err(|_| io::Error::other("the runtime did not hand over a terminal"))?
    }
}

impl Drop for ConsoleSocket {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

fn receive_fd(stream: &UnixStream) -> io::Result<OwnedFd> {
    let mut data = [0u8; 4096];
    let mut slices = [io::IoSliceMut::new(&mut data)];
    let mut control = nix::cmsg_space!([i32; 2]);
    let message = recvmsg::<()>(
        stream.as_raw_fd(),
        &mut slices,
        Some(&mut control),
        MsgFlags::MSG_CMSG_CLOEXEC | MsgFlags::MSG_DONTWAIT,
    )?;
    let mut found = None;
    for part in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(fds) = part {
            for fd in fds {
                // SAFETY: the kernel has just made this descriptor for us. More than one is closed here.
                found = Some(unsafe { OwnedFd::from_raw_fd(fd) });
            }
        }
    }
    found.ok_or_else(|| io::Error::other("the runtime sent no terminal"))
}

/// The master side of a terminal.
#[derive(Debug)]
pub struct Pty(AsyncFd<OwnedFd>);

impl Pty {
    fn new(fd: OwnedFd) -> io::Result<Self> {
        let flags = nix::fcntl::fcntl(&fd, nix::fcntl::FcntlArg::F_GETFL)?;
        let flags = nix::fcntl::OFlag::from_bits_retain(flags) | nix::fcntl::OFlag::O_NONBLOCK;
        nix::fcntl::fcntl(&fd, nix::fcntl::FcntlArg::F_SETFL(flags))?;
        // SAFETY: an OwnedFd keeps its descriptor open and unchanged as long as it lives, and it lives in the result.
        Ok(Self(unsafe { AsyncFd::register(fd) }?))
    }

    /// Reads; 0 when nobody has the other side open any more.
    pub async fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        let result =
            self.0.async_io(Interest::READABLE, |fd| nix::unistd::read(fd, buffer).map_err(io::Error::from)).await;
        match result {
            Err(e) if e.raw_os_error() == Some(libc::EIO) => Ok(0),
            other => other,
        }
    }

    /// Writes everything.
    pub async fn write_all(&self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let n = self
                .0
                .async_io(Interest::WRITABLE, |fd| nix::unistd::write(fd, bytes).map_err(io::Error::from))
                .await?;
            bytes = &bytes[n..];
        }
        Ok(())
    }

    /// Tells the programs that the window has another size.
    pub fn resize(&self, cols: u16, rows: u16) {
        let size = libc::winsize { ws_row: rows, ws_col: cols, ws_xpixel: 0, ws_ypixel: 0 };
        // SAFETY: valid descriptor and structure. A failure means that the terminal is gone, which nobody needs to hear.
        unsafe { libc::ioctl(self.0.as_raw_fd(), libc::TIOCSWINSZ, &raw const size) };
    }
}
