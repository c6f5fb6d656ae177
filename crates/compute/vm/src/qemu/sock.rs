//! Unix sockets below instance directories of any depth.

use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::net::UnixStream;

/// A socket address holds at most 107 bytes (unix(7)); through a descriptor of its directory any depth works.
fn with_short_path<T>(path: &Path, f: impl FnOnce(&Path) -> io::Result<T>) -> io::Result<T> {
    let bad = || io::Error::new(io::ErrorKind::InvalidInput, "socket path has no directory");
    let (dir, name) = (path.parent().ok_or_else(bad)?, path.file_name().ok_or_else(bad)?);
    let dir = std::fs::OpenOptions::new().read(true).custom_flags(libc::O_PATH | libc::O_DIRECTORY).open(dir)?;
    f(&PathBuf::from(format!("/proc/self/fd/{}", dir.as_raw_fd())).join(name))
}

/// Listens at `path`, replacing what a dead predecessor left. For a shim, whose umask keeps others out.
///
/// # Errors
/// Any I/O error.
pub fn listen(path: &Path) -> io::Result<UnixListener> {
    oblak_platform::fsx::remove_file_if_exists(path)?;
    with_short_path(path, |p| UnixListener::bind(p))
}

/// Connects to `path`.
///
/// # Errors
/// Any I/O error; `TimedOut` when the queue of the listener is full for that long.
pub async fn connect(path: &Path, deadline: Duration) -> io::Result<UnixStream> {
    // The descriptor of the directory must live until the connection stands, so this connects without waiting and asks again.
    let end = tokio::time::Instant::now() + deadline;
    loop {
        match with_short_path(path, connect_now) {
            Ok(stream) => return UnixStream::from_std(stream),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                if tokio::time::Instant::now() >= end {
                    return Err(io::ErrorKind::TimedOut.into());
                }
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            Err(e) => return Err(e),
        }
    }
}

fn connect_now(path: &Path) -> io::Result<std::os::unix::net::UnixStream> {
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let fd = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    connect(fd.as_raw_fd(), &UnixAddr::new(path)?)?;
    Ok(fd.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn works_at_any_depth() {
        let temp = tempfile::tempdir().unwrap();
        let dir = temp.path().join("x".repeat(150));
        std::fs::create_dir(&dir).unwrap();
        let path = dir.join("qmp.sock");
        std::fs::write(&path, "stale").unwrap();
        let listener = listen(&path).unwrap();
        let stream = connect(&path, Duration::from_secs(1)).await.unwrap();
        listener.accept().unwrap();
        drop((stream, listener));
        assert_eq!(connect(&path, Duration::from_secs(1)).await.unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
    }
}
