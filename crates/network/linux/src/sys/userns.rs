//! Network namespaces that belong to a user namespace: capabilities of that user namespace reach them (user_namespaces(7)).

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::sys::stat::fstat;
use nix::sys::wait::waitpid;
use nix::unistd::{ForkResult, Pid, fork};

use super::netns::{bind, open_namespace};

/// Ids in the user namespace, as many as a container has.
const IDS: u32 = 65_536;
/// How long one step of the child may take; the kernel may be busy with taking other namespaces away.
const STEP: Duration = Duration::from_secs(30);

// NS_GET_USERNS of linux/nsfs.h: a new descriptor of the user namespace that owns a namespace.
nix::ioctl_none!(ns_get_userns, 0xb7, 0x1);

/// Makes a user namespace whose ids 0.. are host ids `base`.. and a network namespace of it, mounted on the files `user` and
/// `net`. That of the network comes last and says that both are there.
///
/// A process can be the first of a new user namespace only when it has one thread, and somebody outside has to write its maps: so
/// a child of ours goes through both steps, and ends as soon as the files hold what it has made.
pub(super) fn make(base: u32, user: &Path, net: &Path) -> io::Result<()> {
    let (mut ours, theirs) = UnixStream::pair()?;
    ours.set_read_timeout(Some(STEP))?;
    let parent = nix::unistd::getpid().as_raw();
    // SAFETY: the child makes plain system calls only and never returns, so it needs no lock that another thread may hold.
    let child = match unsafe { fork() }? {
        ForkResult::Child => in_child(parent, theirs.as_raw_fd(), ours.as_raw_fd()),
        ForkResult::Parent { child } => Child(child),
    };
    drop(theirs);
    answer(&mut ours)?;
    let map = format!("0 {base} {IDS}");
    for file in ["uid_map", "gid_map"] {
        std::fs::write(child.file(file), &map)?;
    }
    ours.write_all(&[0])?;
    answer(&mut ours)?;
    bind(&child.file("ns/user"), user)?;
    bind(&child.file("ns/net"), net)
}

/// Whether the user namespace mounted at `user` owns the network namespace mounted at `net`.
pub(crate) fn owns(user: &Path, net: &Path) -> io::Result<bool> {
    let (Some(user), Some(net)) = (open_namespace(user)?, open_namespace(net)?) else { return Ok(false) };
    // SAFETY: a valid descriptor of a namespace; the call takes no argument and returns a new descriptor.
    let owner = unsafe { File::from(OwnedFd::from_raw_fd(ns_get_userns(net.as_raw_fd())?)) };
    let (one, other) = (fstat(&user)?, fstat(&owner)?);
    Ok((one.st_dev, one.st_ino) == (other.st_dev, other.st_ino))
}

struct Child(Pid);

impl Child {
    fn file(&self, name: &str) -> std::path::PathBuf {
        Path::new("/proc").join(self.0.to_string()).join(name)
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        // It is not reaped before this, so the pid is still its own.
        let _ = kill(self.0, Signal::SIGKILL);
        let _ = waitpid(self.0, None);
    }
}

/// The result of a step of the child: its errno, zero for none.
fn answer(from: &mut UnixStream) -> io::Result<()> {
    let mut errno = [0; 4];
    from.read_exact(&mut errno)?;
    match i32::from_ne_bytes(errno) {
        0 => Ok(()),
        errno => Err(io::Error::from_raw_os_error(errno)),
    }
}

fn in_child(parent: i32, socket: RawFd, not_ours: RawFd) -> ! {
    // SAFETY: system calls on plain values and on memory of this stack.
    unsafe {
        libc::close(not_ours);
        libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
        // Killed before the request was in force, the parent would leave a child for ever.
        if libc::getppid() != parent {
            libc::_exit(1);
        }
        for namespace in [libc::CLONE_NEWUSER, libc::CLONE_NEWNET] {
            let errno = if libc::unshare(namespace) == 0 { 0 } else { *libc::__errno_location() };
            let answer = errno.to_ne_bytes();
            libc::write(socket, answer.as_ptr().cast(), answer.len());
            let mut go = 0u8;
            // After the last step this waits for the end: nothing is sent any more.
            while libc::read(socket, (&raw mut go).cast(), 1) < 0 && *libc::__errno_location() == libc::EINTR {}
        }
        libc::_exit(0)
    }
}
