//! The end of the emulator: noticing it, and saying why.

use std::io;
use std::os::fd::OwnedFd;

use oblak_compute::shim::ExitRecord;
use oblak_platform::clock::{Clock, SystemClock};
use oblak_platform::process::pidfd_open;
use tokio::io::unix::AsyncFd;

use super::Guest;
use super::watch::Watch;
use crate::qemu::sandbox;

/// The emulator as our child.
pub struct Exit {
    pid: i32,
    pidfd: AsyncFd<OwnedFd>,
    code: std::sync::Mutex<Option<i32>>,
}

impl Exit {
    /// Of a child of this process.
    pub fn of(pid: i32) -> io::Result<Self> {
        // SAFETY: an owned descriptor stays open and the same for as long as it is owned, here by the AsyncFd.
        let pidfd = unsafe { AsyncFd::register(pidfd_open(pid)?) }?;
        Ok(Self { pid, pidfd, code: std::sync::Mutex::new(None) })
    }
    /// Its pid.
    pub fn pid(&self) -> i32 {
        self.pid
    }
    /// Waits for its end and tells the exit code, 128 + n when signal n ended it. May be asked again.
    pub async fn wait(&self) -> i32 {
        loop {
            {
                let mut code = self.code.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
                if code.is_none() {
                    *code = sandbox::reap(self.pid);
                }
                if let Some(code) = *code {
                    return code;
                }
            }
            // A pidfd is readable once the process has ended (pidfd_open(2)).
            if let Ok(mut guard) = self.pidfd.readable().await {
                guard.clear_ready();
            }
        }
    }
    /// SIGKILL. Not reaped yet means that the pid is still the child's.
    pub fn kill(&self) {
        let code = self.code.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if code.is_none() {
            let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(self.pid), nix::sys::signal::Signal::SIGKILL);
        }
    }
}

/// Why it ended, from everything that is known.
pub fn judge(watch: &Watch, guest: &Guest, code: i32, last_words: &str) -> ExitRecord {
    let seen = watch.seen();
    let out_of_memory = guest.group.as_ref().is_some_and(|g| g.oom_kills() > guest.oom_before);
    let (code, reason, message) = if let Some(problem) = seen.problem {
        let why = if last_words.is_empty() { problem } else { last_words.to_string() };
        (Some(code), "StartFailed", format!("the machine could not be started: {why}"))
    } else if !seen.started {
        (Some(code), "StartFailed", format!("the machine could not be started: {}", or_silence(last_words)))
    } else if seen.shutdown == "guest-shutdown" {
        let message = if seen.asked { "the guest shut down when asked to" } else { "the guest shut down" };
        (Some(0), if seen.asked { "Stopped" } else { "GuestShutdown" }, message.to_string())
    } else if seen.asked {
        (Some(137), "Killed", "the guest did not shut down in time and was ended by force".to_string())
    } else if out_of_memory {
        (Some(code), "OutOfMemory", "the emulator used more memory than the machine's limit and was killed".to_string())
    } else if code == 137 {
        (Some(code), "Killed", "the emulator was killed from outside".to_string())
    } else if code > 128 && seen.shutdown.is_empty() {
        (Some(code), "Crashed", format!("the emulator crashed with signal {}: {}", code - 128, or_silence(last_words)))
    } else if seen.shutdown == "host-signal" || seen.shutdown == "host-qmp-quit" {
        (Some(143), "Terminated", "the emulator was told to end from outside".to_string())
    } else {
        (Some(code), "EmulatorEnded", format!("the emulator ended with code {code}: {}", or_silence(last_words)))
    };
    ExitRecord {
        run: guest.record.spec.run,
        code,
        reason: reason.into(),
        message,
        asked: seen.asked,
        started_at: Some(guest.shim.started_at),
        at: SystemClock.now(),
        runtime: guest.record.accel.name().into(),
    }
}

fn or_silence(words: &str) -> &str {
    if words.is_empty() { "it left no message" } else { words }
}
