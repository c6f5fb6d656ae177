//! Starting a shim so that it outlives whoever asked for it.
//!
//! The caller executes the shim's command with a pipe as standard output and waits for one line of JSON on it. The shim
//! calls [`detach`] first thing in `main`: it leaves the session, the process group, the parent and the cgroup of its
//! caller, so neither a signal to the group nor systemd's `KillMode=control-group` reaches it.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use oblak_platform::driver::{DriverError, DriverResult};
use serde_json::Value;
use tokio::io::BufReader;
use tokio::process::{Child, ChildStdin, ChildStdout};

use super::ahead::{AHEAD_ENV, Prompt};
use super::server::read_line;
use super::{cgroup, file};

/// Environment variables that a shim keeps from its caller.
const KEPT: [&str; 4] = ["PATH", "HOME", oblak_platform::process::BOOT_ID_ENV, "RUST_BACKTRACE"];
/// What a shim wrote to its standard error is cut at the next start when it is longer than this.
const ERRORS_BYTES: u64 = 64 * 1024;

/// Code of the error of a shim that ended without a word.
pub(super) const SHIM_DIED: &str = "shim_died";

/// A shim that has not answered yet.
#[derive(Debug)]
pub(super) struct Spawned {
    child: Child,
    output: ChildStdout,
    dir: PathBuf,
}

/// Starts `command` with `--dir <dir>` appended and waits until the shim says that it is ready; returns what it said.
/// Dropping the future does not stop the shim.
///
/// # Errors
/// What the shim reported; retry when it died without a word or did not answer within `deadline` (it goes on then).
pub async fn spawn_shim(command: &[String], dir: &Path, deadline: Duration) -> DriverResult<Value> {
    let (shim, _) = spawn(command, dir, false)?;
    shim.answer(deadline).await
}

/// Executes a shim; with `ahead` it waits for a draft and then the word on the pipe that is returned.
pub(super) fn spawn(command: &[String], dir: &Path, ahead: bool) -> DriverResult<(Spawned, Option<ChildStdin>)> {
    let (program, args) = command
        .split_first()
        .ok_or_else(|| DriverError::permanent("no_shim_command", "the command of the shim is empty"))?;
    let errors = open_errors(dir).map_err(|e| DriverError::io(&format!("{}", dir.display()), &e))?;
    let mut shim = tokio::process::Command::new(program);
    shim.args(args).arg("--dir").arg(dir);
    shim.env_clear();
    for name in KEPT {
        if let Some(value) = std::env::var_os(name) {
            shim.env(name, value);
        }
    }
    // One arena and an early return of freed memory: a shim lives long and is counted by its private memory (mallopt(3)).
    shim.env("MALLOC_ARENA_MAX", "1").env("MALLOC_TRIM_THRESHOLD_", "65536");
    if ahead {
        shim.env(AHEAD_ENV, "1").stdin(Stdio::piped());
    } else {
        shim.stdin(Stdio::null());
    }
    shim.stdout(Stdio::piped()).stderr(errors);
    let mut child = shim.spawn().map_err(|e| {
        DriverError::permanent(
            "shim_not_executable",
            format!("cannot execute the shim {program:?}: {e}; is the program still there?"),
        )
    })?;
    let output = child.stdout.take().ok_or_else(|| DriverError::retry("io", "the shim has no output pipe"))?;
    let input = child.stdin.take();
    Ok((Spawned { child, output, dir: dir.to_path_buf() }, input))
}

impl Spawned {
    /// Waits until the shim says that it is ready; see [`spawn_shim`].
    pub(super) async fn answer(self, deadline: Duration) -> DriverResult<Value> {
        let Self { mut child, output, dir } = self;
        let wait = async {
            let line = read_line(&mut BufReader::new(output)).await;
            // The process we started only forks; it is gone by now or in a moment.
            let _ = child.wait().await;
            line
        };
        match tokio::time::timeout(deadline, wait).await {
            Ok(Ok(Some(line))) => {
                let mut said: Value = serde_json::from_slice(&line).map_err(|e| {
                    DriverError::permanent("bad_answer", format!("the shim of {} said nonsense: {e}", dir.display()))
                })?;
                match said.get_mut("error") {
                    Some(error) => Err(serde_json::from_value(error.take())
                        .unwrap_or_else(|e| DriverError::permanent("bad_answer", e.to_string()))),
                    None => Ok(said.get_mut("ok").map(Value::take).unwrap_or_default()),
                }
            }
            Ok(_) => Err(DriverError::retry(
                SHIM_DIED,
                format!("the shim of {} died at its start; {}", dir.display(), last_error(&dir)),
            )),
            Err(_) => Err(DriverError::retry(
                "shim_timeout",
                format!("the shim of {} is not ready after {deadline:?}; it is left running", dir.display()),
            )),
        }
    }
}

fn open_errors(dir: &Path) -> io::Result<File> {
    let path = dir.join(file::ERRORS);
    let long = std::fs::metadata(&path).is_ok_and(|m| m.len() > ERRORS_BYTES);
    if long {
        oblak_platform::fsx::remove_file_if_exists(&path)?;
    }
    std::fs::OpenOptions::new().append(true).create(true).mode(0o600).open(path)
}

fn last_error(dir: &Path) -> String {
    let text = std::fs::read_to_string(dir.join(file::ERRORS)).unwrap_or_default();
    let tail: String = text.trim().chars().rev().take(300).collect::<String>().chars().rev().collect();
    if tail.is_empty() { "it left no message".into() } else { format!("its last words: {tail}") }
}

/// The shim's end of the handshake. Dropping it unanswered tells the caller that the shim failed.
#[derive(Debug)]
pub struct Ready {
    pipe: Option<File>,
    prompt: Option<Prompt>,
}

impl Ready {
    /// What is known of the task so far, when the shim was started ahead ([`super::Ahead`]); waits for it.
    pub fn draft(&mut self) -> Option<Value> {
        // Without a draft there is nothing to do ahead; the word is waited for all the same.
        self.prompt.as_mut().map(|p| p.draft().unwrap_or_default())
    }
    /// Waits until the guest may be started. False: it is not to be, and the caller is gone or has forgotten this shim.
    pub fn granted(&mut self) -> bool {
        self.prompt.take().is_none_or(|mut p| p.granted())
    }
    /// Tells the caller that the guest's main process exists or has ended already.
    pub fn ok(&mut self, value: &Value) {
        self.say(&serde_json::json!({ "ok": value }));
    }
    /// Tells the caller why it does not.
    pub fn fail(&mut self, error: &DriverError) {
        self.say(&serde_json::json!({ "error": error }));
    }
    /// Tells the caller nothing: it shall start another shim.
    pub fn withdraw(&mut self) {
        self.pipe = None;
    }
    fn say(&mut self, value: &Value) {
        if let Some(mut pipe) = self.pipe.take() {
            // The caller may be gone; the shim goes on without it.
            let _ = pipe.write_all(format!("{value}\n").as_bytes());
        }
    }
}

/// Cuts all ties to the caller. Must be the first thing a shim does, before any thread exists: it forks.
///
/// # Errors
/// Any error of the operating system; `Other` when there are several threads.
pub fn detach() -> io::Result<Ready> {
    if std::fs::read_dir("/proc/self/task")?.count() != 1 {
        return Err(io::Error::other("a shim must detach before it starts threads"));
    }
    // SAFETY: nothing in this process owns descriptors above 2 yet; what the caller leaked is closed.
    unsafe { libc::close_range(3, libc::c_uint::MAX, 0) };
    let pipe = own(1)?;
    let prompt = std::env::var_os(AHEAD_ENV).is_some().then(|| own(0)).transpose()?.map(Prompt::new);
    // SAFETY: there is one thread. What we execute is not meant.
    unsafe { std::env::remove_var(AHEAD_ENV) };
    let null = std::fs::OpenOptions::new().read(true).write(true).open("/dev/null")?;
    nix::unistd::dup2_stdin(&null)?;
    nix::unistd::dup2_stdout(&null)?;
    // SAFETY: there is one thread, so the child is a full copy.
    match unsafe { nix::unistd::fork() }? {
        // SAFETY: ends without running destructors or flushing buffers that the child has too.
        nix::unistd::ForkResult::Parent { .. } => unsafe { libc::_exit(0) },
        nix::unistd::ForkResult::Child => {}
    }
    nix::unistd::setsid()?;
    std::env::set_current_dir("/")?;
    nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o077));
    if let Err(e) = cgroup::leave_callers_group() {
        let _ = writeln!(io::stderr(), "the shim stays in the cgroup of its caller: {e}");
    }
    Ok(Ready { pipe: Some(pipe), prompt })
}

/// A duplicate of a standard descriptor, which leads to the caller; not inherited by what we execute.
fn own(fd: RawFd) -> io::Result<File> {
    // SAFETY: only makes a new descriptor.
    let duplicate = unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 3) };
    if duplicate < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: just created above.
    Ok(File::from(unsafe { OwnedFd::from_raw_fd(duplicate) }))
}

/// The runtime of a shim: one thread, no pool.
///
/// # Errors
/// Any error of the operating system.
pub fn runtime() -> io::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()
}
