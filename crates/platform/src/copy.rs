//! Copies of files that share blocks where the file system can, and keep holes where it cannot.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use nix::unistd::Whence;

/// Most bytes per copy_file_range(2) call, so that a copy of a huge file is still interruptible by the kernel.
const CHUNK_BYTES: usize = 64 << 20;
/// Buffer of copies that the kernel cannot make by itself.
const BUFFER_BYTES: usize = 1 << 20;

/// Copies a file to a new one (mode 0600) and makes it durable. Returns whether blocks are shared.
///
/// # Errors
/// Any I/O error; the caller removes what was written.
pub fn file(from: &Path, to: &Path) -> io::Result<bool> {
    let source = File::open(from)?;
    let target = OpenOptions::new().write(true).create_new(true).mode(0o600).open(to)?;
    let shared = clone(&source, &target)?;
    if !shared {
        sparse(&source, &target)?;
    }
    target.sync_all()?;
    Ok(shared)
}

/// Lets `target` share the blocks of `source` (FICLONE, ioctl_ficlone(2)); false when this file system cannot.
///
/// # Errors
/// Any I/O error but "not supported".
pub fn clone(source: &File, target: &File) -> io::Result<bool> {
    // SAFETY: both descriptors are open; FICLONE takes the source's descriptor by value.
    if unsafe { libc::ioctl(target.as_raw_fd(), libc::FICLONE, source.as_raw_fd()) } == 0 {
        return Ok(true);
    }
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        Some(libc::EOPNOTSUPP | libc::ENOTTY | libc::EXDEV | libc::EINVAL | libc::ENOSYS) => Ok(false),
        _ => Err(error),
    }
}

/// Copies the parts that hold data (lseek(2), SEEK_DATA and SEEK_HOLE).
fn sparse(source: &File, target: &File) -> io::Result<()> {
    let len = source.metadata()?.len();
    target.set_len(len)?;
    let end = i64::try_from(len).map_err(io::Error::other)?;
    let mut at = 0;
    while at < end {
        let start = match nix::unistd::lseek(source, at, Whence::SeekData) {
            Ok(start) => start,
            // No data up to the end.
            Err(nix::errno::Errno::ENXIO) => break,
            Err(errno) => return Err(errno.into()),
        };
        let stop = nix::unistd::lseek(source, start, Whence::SeekHole)?;
        range(source, target, start, stop)?;
        at = stop;
    }
    Ok(())
}

fn range(source: &File, target: &File, start: i64, stop: i64) -> io::Result<()> {
    use nix::errno::Errno;
    let (mut from, mut to) = (start, start);
    while from < stop {
        let len = usize::try_from(stop - from).map_err(io::Error::other)?.min(CHUNK_BYTES);
        let copied = match nix::fcntl::copy_file_range(source, Some(&mut from), target, Some(&mut to), len) {
            Ok(copied) => copied,
            // Not within one file system, or not with this one: through our own memory then.
            Err(Errno::EXDEV | Errno::EOPNOTSUPP | Errno::ENOSYS | Errno::EINVAL) => {
                let copied = through_memory(source, target, from, len)?;
                from += i64::try_from(copied).map_err(io::Error::other)?;
                to = from;
                copied
            }
            Err(errno) => return Err(errno.into()),
        };
        if copied == 0 {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the file became shorter while it was copied"));
        }
    }
    Ok(())
}

fn through_memory(source: &File, target: &File, at: i64, len: usize) -> io::Result<usize> {
    use std::os::unix::fs::FileExt;
    let at = u64::try_from(at).map_err(io::Error::other)?;
    let mut buffer = vec![0; len.min(BUFFER_BYTES)];
    let read = source.read_at(&mut buffer, at)?;
    target.write_all_at(&buffer[..read], at)?;
    Ok(read)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{FileExt, MetadataExt};

    #[test]
    fn holes_stay_holes_and_bytes_stay_bytes() {
        let dir = tempfile::tempdir().unwrap();
        let (from, to) = (dir.path().join("from"), dir.path().join("to"));
        let source = File::create(&from).unwrap();
        source.set_len(64 << 20).unwrap();
        source.write_all_at(&[7; 5000], 10 << 20).unwrap();
        source.write_all_at(&[9; 100], (64 << 20) - 100).unwrap();
        file(&from, &to).unwrap();
        let meta = std::fs::metadata(&to).unwrap();
        assert_eq!(meta.len(), 64 << 20);
        assert!(meta.blocks() * 512 < 1 << 20, "{} blocks", meta.blocks());
        assert_eq!(std::fs::read(&from).unwrap(), std::fs::read(&to).unwrap());
        assert_eq!(file(&from, &to).unwrap_err().kind(), io::ErrorKind::AlreadyExists);
        let empty = dir.path().join("empty");
        File::create(&empty).unwrap().set_len(1 << 20).unwrap();
        file(&empty, &dir.path().join("empty2")).unwrap();
    }
}
