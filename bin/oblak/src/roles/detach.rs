//! Starting a role in the background and waiting until it serves.

use std::ffi::OsStr;
use std::fs::OpenOptions;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use oblak_platform::layout::Layout;

use super::running;

/// Time a detached process has to become ready.
const READY_WITHIN: Duration = Duration::from_secs(60);

/// Time after that in which its node should be, too. Where it takes longer, the command line says what is missing.
const COMPLETE_WITHIN: Duration = Duration::from_secs(20);

/// Starts our own program with these arguments and waits until it serves the directory. What it printed until then is shown.
pub fn start<W: AsRef<OsStr>>(layout: &Layout, words: impl IntoIterator<Item = W>) -> Result<ExitCode> {
    let log = layout.logs().join("oblak.log");
    let open = || {
        OpenOptions::new()
            .create(true)
            .append(true)
            .mode(0o600)
            .open(&log)
            .with_context(|| format!("cannot open {}", log.display()))
    };
    let (out, err) = (open()?, open()?);
    let start = out.metadata().map_or(0, |m| m.len());
    let mut command = Command::new(std::env::current_exe().context("cannot find our own program")?);
    // In the directory of the caller: the words may name others relative to it.
    command.args(words).stdin(Stdio::null()).stdout(out).stderr(err);
    // A session of its own, so that closing the terminal does not end it.
    // SAFETY: setsid is async-signal-safe and touches no memory of the parent.
    unsafe { command.pre_exec(|| nix::unistd::setsid().map(drop).map_err(Into::into)) };
    let mut child = command.spawn().context("cannot start the background process")?;
    let deadline = Instant::now() + READY_WITHIN;
    let mut served_since = None;
    loop {
        if let Some(status) = child.try_wait().context("cannot wait for the background process")? {
            bail!("{}", said(&log, start, status));
        }
        let ready = running::read(layout).filter(|r| r.process.pid == i32::try_from(child.id()).unwrap_or(-1));
        if let Some(running) = ready
            && (running.complete || served_since.get_or_insert_with(Instant::now).elapsed() >= COMPLETE_WITHIN)
        {
            print!(
                "{}",
                tail(&log, start)
                    .lines()
                    .filter(|l| !l.contains(" INFO "))
                    .map(|l| format!("{l}\n"))
                    .collect::<String>()
            );
            println!("log: {}   stop: oblak down --data {}", log.display(), layout.root().display());
            return Ok(ExitCode::SUCCESS);
        }
        if Instant::now() >= deadline {
            bail!("oblak did not become ready within {} s; see {}", READY_WITHIN.as_secs(), log.display());
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// What the process said before it ended, or why it could not say anything.
fn said(log: &std::path::Path, start: u64, status: std::process::ExitStatus) -> String {
    let text = tail(log, start);
    // Its last word is the reason; ours would be the same once more.
    if let Some((_, reason)) = text.trim_end().rsplit_once("error: ").filter(|(_, r)| !r.contains('\n')) {
        return reason.to_string();
    }
    let free = nix::sys::statvfs::statvfs(log).map_or(u64::MAX, |fs| fs.blocks_available());
    if text.trim().is_empty() && free == 0 {
        return format!(
            "the disk holding {} is full, so nothing could be written there; free some space",
            log.display()
        );
    }
    format!("oblak ended with {status}:\n{text}")
}

/// What was written to the log since `start`, at most the last 64 KiB.
fn tail(log: &std::path::Path, start: u64) -> String {
    use std::io::{Read, Seek, SeekFrom};
    let Ok(mut file) = std::fs::File::open(log) else { return String::new() };
    let length = file.metadata().map_or(0, |m| m.len());
    let from = start.max(length.saturating_sub(64 * 1024));
    let mut text = String::new();
    if file.seek(SeekFrom::Start(from)).is_ok() {
        let _ = file.take(64 * 1024).read_to_string(&mut text);
    }
    text
}
