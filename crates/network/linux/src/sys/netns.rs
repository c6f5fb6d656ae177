//! Network namespaces that have a name: a file on which the namespace is mounted (namespaces(7)), so that it outlives us.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::statfs::fstatfs;

use super::userns;

/// File system type of namespace files (`NSFS_MAGIC`, linux/magic.h).
const NSFS_MAGIC: i64 = 0x6e73_6673;

/// An open network namespace.
#[derive(Debug)]
pub(crate) struct NetNs {
    file: File,
    path: PathBuf,
}

impl NetNs {
    /// That of the calling thread.
    pub(crate) fn current() -> io::Result<Self> {
        let path = PathBuf::from("/proc/thread-self/ns/net");
        Ok(Self { file: File::open(&path)?, path })
    }

    /// The one mounted at `path`; `None` when there is no file or no namespace on it (after a reboot the file may be left).
    pub(crate) fn open(path: &Path) -> io::Result<Option<Self>> {
        Ok(open_namespace(path)?.map(|file| Self { file, path: path.to_path_buf() }))
    }

    /// The one at `path`, made if it is missing.
    pub(crate) fn ensure(path: &Path) -> io::Result<Self> {
        if let Some(found) = Self::open(path)? {
            return Ok(found);
        }
        on_thread(|| -> io::Result<()> {
            unshare(CloneFlags::CLONE_NEWNET)?;
            bind(Path::new("/proc/thread-self/ns/net"), path)
        })??;
        Self::made(path)
    }

    /// A new one at `path`, where there is none, and a new user namespace that owns it at `user`; see [`userns::make`].
    pub(crate) fn create_owned(path: &Path, user: &Path, base: u32) -> io::Result<Self> {
        // A crash between the two mounts left one that owns nothing.
        Self::remove(user)?;
        userns::make(base, user, path)?;
        Self::made(path)
    }

    /// Runs `work` on a thread of its own inside a new namespace that nobody else sees and that ends with it.
    pub(crate) fn scratch<T: Send>(work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
        on_thread(|| {
            unshare(CloneFlags::CLONE_NEWNET)?;
            work()
        })?
    }

    fn made(path: &Path) -> io::Result<Self> {
        Self::open(path)?
            .ok_or_else(|| io::Error::other(format!("{}: the namespace did not stay mounted", path.display())))
    }

    /// Takes the name away. The namespace itself ends with its last process and socket. Fine when there is nothing.
    pub(crate) fn remove(path: &Path) -> io::Result<()> {
        match umount2(path, MntFlags::MNT_DETACH) {
            Ok(()) | Err(nix::Error::EINVAL | nix::Error::ENOENT) => {}
            Err(e) => return Err(e.into()),
        }
        oblak_platform::fsx::remove_file_if_exists(path)
    }

    /// Where it is mounted.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Its descriptor.
    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// Runs `work` on a thread of its own inside the namespace. What it opens stays in the namespace, wherever it is used later.
    pub(crate) fn within<T: Send>(&self, work: impl FnOnce() -> T + Send) -> io::Result<T> {
        on_thread(|| -> io::Result<T> {
            setns(&self.file, CloneFlags::CLONE_NEWNET)?;
            Ok(work())
        })?
    }
}

/// The namespace mounted at `path`; `None` when there is no file or no namespace on it.
pub(super) fn open_namespace(path: &Path) -> io::Result<Option<File>> {
    let file = match OpenOptions::new().read(true).custom_flags(libc::O_CLOEXEC | libc::O_NOFOLLOW).open(path) {
        Ok(file) => file,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(e),
    };
    // The width of the field depends on the architecture.
    #[allow(clippy::unnecessary_cast, reason = "statfs f_type is not i64 everywhere")]
    let is_namespace = fstatfs(&file)?.filesystem_type().0 as i64 == NSFS_MAGIC;
    Ok(is_namespace.then_some(file))
}

/// Mounts the namespace `source` on the file `path`, made if it is missing.
pub(super) fn bind(source: &Path, path: &Path) -> io::Result<()> {
    OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(path)?;
    mount(Some(source), path, None::<&str>, MsFlags::MS_BIND, None::<&str>)?;
    Ok(())
}

/// A thread that changes its namespace is never used for anything else.
fn on_thread<T: Send>(work: impl FnOnce() -> T + Send) -> io::Result<T> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("netns".into()).spawn_scoped(scope, work)?;
        thread.join().map_err(|_| io::Error::other("a thread in a network namespace panicked"))
    })
}
