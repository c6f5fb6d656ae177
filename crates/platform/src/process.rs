//! Identity of processes: pid, start time and boot id together, because a bare pid is reused.

use std::path::Path;

use serde::{Deserialize, Serialize};

/// Environment variable that replaces the boot id; a test uses it to play a reboot of the machine.
pub const BOOT_ID_ENV: &str = "OBLAK_BOOT_ID";

/// The id of this boot of the machine (`/proc/sys/kernel/random/boot_id`, proc(5)).
#[must_use]
pub fn boot_id() -> String {
    if let Ok(id) = std::env::var(BOOT_ID_ENV) {
        return id;
    }
    std::fs::read_to_string("/proc/sys/kernel/random/boot_id")
        .map_or_else(|_| "unknown".into(), |s| s.trim().to_string())
}

/// One process, once. After a reboot every recorded identity is stale by definition.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Identity {
    /// Process id in our pid namespace.
    pub pid: i32,
    /// Field 22 of `/proc/<pid>/stat`: clock ticks after boot, proc(5).
    pub start_ticks: u64,
    /// The boot it was seen in.
    pub boot_id: String,
}

impl Identity {
    /// The identity of a process that exists now; `None` when it is gone or a zombie.
    #[must_use]
    pub fn of(pid: i32) -> Option<Self> {
        let (state, start_ticks) = read_stat(pid)?;
        if state == 'Z' || state == 'X' {
            return None;
        }
        Some(Self { pid, start_ticks, boot_id: boot_id() })
    }

    /// The identity of the calling process.
    #[must_use]
    pub fn current() -> Self {
        let pid = i32::try_from(std::process::id()).unwrap_or(i32::MAX);
        Self::of(pid).unwrap_or(Self { pid, start_ticks: 0, boot_id: boot_id() })
    }

    /// Whether exactly this process still runs.
    #[must_use]
    pub fn is_alive(&self) -> bool {
        Self::of(self.pid).as_ref() == Some(self)
    }

    /// Sends a signal if exactly this process still runs. Returns whether it was sent.
    pub fn signal(&self, signal: nix::sys::signal::Signal) -> bool {
        // A pidfd pins the process: between the check and the signal the pid cannot be reused.
        let Ok(fd) = pidfd_open(self.pid) else { return false };
        if !self.is_alive() {
            return false;
        }
        pidfd_send(&fd, signal as i32)
    }

    /// SIGKILL, see [`Self::signal`].
    pub fn kill(&self) -> bool {
        self.signal(nix::sys::signal::Signal::SIGKILL)
    }

    /// Waits until the process is gone, at most `deadline`. Works for processes that are not our children.
    pub async fn wait_gone(&self, deadline: std::time::Duration) -> bool {
        let end = tokio::time::Instant::now() + deadline;
        while self.is_alive() {
            if tokio::time::Instant::now() >= end {
                return false;
            }
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
        true
    }
}

fn read_stat(pid: i32) -> Option<(char, u64)> {
    let text = std::fs::read_to_string(Path::new("/proc").join(pid.to_string()).join("stat")).ok()?;
    // The command may hold spaces and parentheses; fields are counted from the last ')'.
    let rest = &text[text.rfind(')')? + 1..];
    let mut fields = rest.split_ascii_whitespace();
    let state = fields.next()?.chars().next()?;
    let start = fields.nth(18)?.parse().ok()?;
    Some((state, start))
}

/// A file descriptor that refers to a process (pidfd_open(2)).
///
/// # Errors
/// The operating system's error, `ESRCH` when there is no such process.
pub fn pidfd_open(pid: i32) -> std::io::Result<std::os::fd::OwnedFd> {
    use std::os::fd::FromRawFd;
    // SAFETY: pidfd_open takes two integers and returns a new descriptor that nobody else owns.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    if fd < 0 {
        return Err(std::io::Error::last_os_error());
    }
    let fd = i32::try_from(fd).map_err(|_| std::io::Error::other("descriptor out of range"))?;
    // SAFETY: fd was just returned by the kernel.
    Ok(unsafe { std::os::fd::OwnedFd::from_raw_fd(fd) })
}

fn pidfd_send(fd: &std::os::fd::OwnedFd, signal: i32) -> bool {
    use std::os::fd::AsRawFd;
    // SAFETY: plain integers and a null siginfo pointer, which the call allows (pidfd_send_signal(2)).
    unsafe {
        libc::syscall(libc::SYS_pidfd_send_signal, fd.as_raw_fd(), signal, std::ptr::null::<libc::siginfo_t>(), 0) == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn knows_itself_and_the_dead() {
        let me = Identity::current();
        assert!(me.is_alive());
        let mut other = me.clone();
        other.start_ticks += 1;
        assert!(!other.is_alive());
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let id = Identity::of(i32::try_from(child.id()).unwrap()).unwrap();
        assert!(id.kill());
        child.wait().unwrap();
        assert!(!id.is_alive());
        assert!(!id.kill());
    }
}
