//! Runs qemu-img: formats always named, a deadline always set, and without privileges, because most of what it reads was
//! written through a guest's process.

use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use oblak_platform::driver::{DriverError, DriverResult};
use oblak_platform::process::pidfd_open;
use oblak_volume::Format;

/// For work that does not depend on the size of a disk.
pub const QUICK: Duration = Duration::from_secs(60);
/// For work that reads or writes whole disks.
pub const COPY: Duration = Duration::from_secs(2 * 3600);
/// Address space it may use: images with damaged tables make it ask for absurd amounts.
const MAX_MEMORY_BYTES: libc::rlim_t = 2 << 30;
/// Files it may open.
const MAX_FILES: libc::rlim_t = 64;
/// Most of its message that is passed on.
const MAX_MESSAGE_BYTES: u64 = 4096;
/// Number of CAP_DAC_OVERRIDE and of the last capability (linux/capability.h).
const CAP_DAC_OVERRIDE: libc::c_ulong = 1;
const CAP_LAST: libc::c_ulong = 40;

/// The name qemu-img gives a format; directories have none.
pub fn name_of(format: Format) -> &'static str {
    match format {
        Format::Qcow2 => "qcow2",
        Format::Raw | Format::Directory => "raw",
    }
}

/// As whom it runs.
#[derive(Clone, Copy, Debug)]
pub struct Runner<'a> {
    /// Directory it works in; files of ours are named relative to it.
    pub dir: &'a Path,
    /// Owner of the files it works on.
    pub owner: (u32, u32),
    /// Other files that it reads.
    pub reads: &'a [&'a Path],
    /// What it is for, in messages.
    pub what: &'a str,
}

impl Runner<'_> {
    /// Runs it to its end.
    ///
    /// # Errors
    /// `qemu_img_missing`, `qemu_img_timeout`, `disk_full`, `volume_in_use`, `image_missing`, `io`, `qemu_img_failed`.
    pub fn run(&self, args: &[&str], deadline: Duration) -> DriverResult<()> {
        let mut command = Command::new("qemu-img");
        command.args(args).current_dir(self.dir).env_clear().env("LC_ALL", "C").env("PATH", path());
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        self.confine(&mut command);
        let mut child = command.spawn().map_err(|e| match e.kind() {
            io::ErrorKind::NotFound => {
                DriverError::permanent("qemu_img_missing", "qemu-img is not installed; install the package qemu-utils")
            }
            _ => DriverError::io(&format!("{}: starting qemu-img", self.what), &e),
        })?;
        let in_time = wait(&mut child, deadline);
        if !matches!(in_time, Ok(true)) {
            let _ = child.kill();
        }
        let mut message = String::new();
        if let Some(stderr) = child.stderr.take() {
            let _ = stderr.take(MAX_MESSAGE_BYTES).read_to_string(&mut message);
        }
        let status = child.wait().map_err(|e| DriverError::io(self.what, &e))?;
        match in_time {
            Ok(true) if status.success() => Ok(()),
            Ok(true) => Err(self.failure(&message)),
            Ok(false) => {
                let detail = format!("{}: qemu-img did not end within {} s", self.what, deadline.as_secs());
                Err(DriverError::retry("qemu_img_timeout", detail))
            }
            Err(error) => Err(DriverError::io(self.what, &error)),
        }
    }

    fn failure(&self, message: &str) -> DriverError {
        let line = message.lines().find(|l| !l.trim().is_empty()).unwrap_or("no message").trim();
        let detail = format!("{}: {}", self.what, line.strip_prefix("qemu-img: ").unwrap_or(line));
        let has = |text: &str| message.contains(text);
        if has("No space left on device") || has("Disk quota exceeded") {
            DriverError::io(self.what, &io::Error::from_raw_os_error(libc::ENOSPC))
        } else if has("Failed to get") && has("lock") {
            DriverError::retry("volume_in_use", format!("{}: the volume is in use; stop its instance first", self.what))
        } else if has("Could not open") && has("No such file") {
            DriverError::permanent("image_missing", detail)
        } else if has("Input/output error") {
            DriverError::retry("io", detail)
        } else {
            DriverError::retry("qemu_img_failed", detail)
        }
    }

    /// As the files' owner. Where that user cannot reach the files (a data directory only root may enter), as root with the one
    /// capability that opens files.
    fn confine(&self, command: &mut Command) {
        let (uid, gid) = self.owner;
        let is_root = nix::unistd::geteuid().is_root();
        let mut paths = self.reads.iter().flat_map(|p| p.ancestors().map(move |a| (a, a == *p)));
        let enters = may(self.dir, self.owner, 1);
        let reaches = enters && paths.all(|(p, is_file)| may(p, self.owner, if is_file { 4 } else { 1 }));
        // SAFETY: between fork and exec only system calls are made; nothing is allocated and no lock is taken.
        unsafe {
            command.pre_exec(move || {
                check(libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL))?;
                check(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))?;
                limit(libc::RLIMIT_AS, MAX_MEMORY_BYTES)?;
                limit(libc::RLIMIT_NOFILE, MAX_FILES)?;
                limit(libc::RLIMIT_CORE, 0)?;
                if !is_root {
                    return Ok(());
                }
                for capability in (0..=CAP_LAST).filter(|c| reaches || *c != CAP_DAC_OVERRIDE) {
                    // Fails only for numbers this kernel does not know.
                    libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0);
                }
                if reaches {
                    check(libc::setgroups(0, std::ptr::null()))?;
                    check(libc::setresgid(gid, gid, gid))?;
                    check(libc::setresuid(uid, uid, uid))?;
                    // Changing the user clears it.
                    check(libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL))?;
                }
                Ok(())
            });
        }
    }
}

/// qemu-img's version, or why there is none.
pub fn version() -> Result<String, String> {
    let output = Command::new("qemu-img").arg("--version").stdin(Stdio::null()).output();
    let output = output.map_err(|e| format!("qemu-img cannot be run ({e}); install the package qemu-utils"))?;
    let text = String::from_utf8_lossy(&output.stdout);
    let version = text.split_ascii_whitespace().nth(2).filter(|_| output.status.success());
    version.map(str::to_string).ok_or_else(|| "qemu-img does not tell its version".into())
}

fn path() -> std::ffi::OsString {
    std::env::var_os("PATH").unwrap_or_else(|| "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin".into())
}

/// Whether the mode lets `who` do `bit` (4 read, 2 write, 1 enter) to a file. Lists beyond the mode are not looked at.
fn may(path: &Path, (uid, gid): (u32, u32), bit: u32) -> bool {
    std::fs::metadata(path).is_ok_and(|meta| {
        let shift = if meta.uid() == uid {
            6
        } else if meta.gid() == gid {
            3
        } else {
            0
        };
        meta.mode() >> shift & bit != 0
    })
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn limit(resource: libc::__rlimit_resource_t, most: libc::rlim_t) -> io::Result<()> {
    let limit = libc::rlimit { rlim_cur: most, rlim_max: most };
    // SAFETY: setrlimit reads the struct, which outlives the call.
    check(unsafe { libc::setrlimit(resource, &raw const limit) })
}

/// Whether the child ended in time.
fn wait(child: &mut Child, deadline: Duration) -> io::Result<bool> {
    let pid = i32::try_from(child.id()).map_err(io::Error::other)?;
    let pidfd = pidfd_open(pid)?;
    let end = Instant::now() + deadline;
    loop {
        if child.try_wait()?.is_some() {
            return Ok(true);
        }
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(false);
        }
        let timeout = PollTimeout::try_from(left.min(Duration::from_secs(60))).unwrap_or(PollTimeout::MAX);
        use std::os::fd::AsFd;
        match poll(&mut [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)], timeout) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}
