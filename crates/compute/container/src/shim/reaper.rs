//! Children of the shim, by birth or by adoption (it is a subreaper): each end is kept until somebody asks for it.

use std::collections::{HashMap, VecDeque};
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::sync::{Arc, Mutex, PoisonError};

use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::Notify;

/// Ends of processes that nobody has asked for yet; orphans of the container are some, so old ones are forgotten.
const KEPT: usize = 256;

#[derive(Debug, Default)]
struct Ends {
    codes: HashMap<i32, i32>,
    order: VecDeque<i32>,
}

/// See the module.
#[derive(Clone, Debug)]
pub struct Reaper {
    ends: Arc<Mutex<Ends>>,
    wake: Arc<Notify>,
    tracking: Arc<File>,
}

impl Reaper {
    /// Starts reaping. `tracking` is a `cgroup.procs` file that every process we start joins before it executes anything.
    pub fn start(tracking: File) -> io::Result<Self> {
        let signals = signal(SignalKind::child())?;
        let reaper = Self { ends: Arc::default(), wake: Arc::default(), tracking: Arc::new(tracking) };
        tokio::spawn(reaper.clone().run(signals));
        Ok(reaper)
    }

    async fn run(self, mut signals: Signal) {
        loop {
            self.reap();
            self.wake.notify_waiters();
            if signals.recv().await.is_none() {
                return;
            }
        }
    }

    fn reap(&self) {
        let mut ends = self.ends.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            let (pid, code) = match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::Exited(pid, code)) => (pid, code),
                Ok(WaitStatus::Signaled(pid, signal, _)) => (pid, 128 + signal as i32),
                Ok(WaitStatus::StillAlive) | Err(_) => return,
                Ok(_) => continue,
            };
            ends.codes.insert(pid.as_raw(), code);
            ends.order.push_back(pid.as_raw());
            if ends.order.len() > KEPT
                && let Some(old) = ends.order.pop_front()
            {
                ends.codes.remove(&old);
            }
        }
    }

    fn take(&self, pid: i32) -> Option<i32> {
        let mut ends = self.ends.lock().unwrap_or_else(PoisonError::into_inner);
        let code = ends.codes.remove(&pid)?;
        ends.order.retain(|p| *p != pid);
        Some(code)
    }

    /// Waits for the end of a child; 128 + n when it died of signal n. Only one may wait for a pid.
    pub async fn wait(&self, pid: i32) -> i32 {
        loop {
            let woken = self.wake.notified();
            tokio::pin!(woken);
            woken.as_mut().enable();
            if let Some(code) = self.take(pid) {
                return code;
            }
            woken.await;
        }
    }

    /// Starts a program that dies with the shim and can be found in its cgroup, so that a shim killed at any moment leaves
    /// no runtime behind that would go on to start a container.
    pub fn spawn(&self, mut command: Command) -> io::Result<i32> {
        let tracking = self.tracking.as_raw_fd();
        let shim = nix::unistd::getpid().as_raw();
        // SAFETY: between fork and exec only system calls on plain values are made.
        unsafe {
            command.pre_exec(move || {
                if libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) != 0 {
                    return Err(io::Error::last_os_error());
                }
                // The shim may have died before the request was in force.
                if libc::getppid() != shim {
                    return Err(io::Error::from_raw_os_error(libc::ESRCH));
                }
                if libc::write(tracking, b"0".as_ptr().cast(), 1) != 1 {
                    return Err(io::Error::last_os_error());
                }
                libc::umask(0o022);
                Ok(())
            });
        }
        let child = command.spawn()?;
        i32::try_from(child.id()).map_err(io::Error::other)
    }
}
