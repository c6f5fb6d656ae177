//! Shims that are started before all that their guest needs is there.
//!
//! Such a shim cuts its ties, does what it can with a draft of the task, and waits for the word. It holds nothing but its own process
//! (and what ends with it, such as mounts of its own namespace): when its caller goes away it ends as if it had never been. What
//! it made in the guest's directory is used by the next start, or goes with the directory.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use oblak_platform::driver::{DriverError, DriverResult};
use serde_json::Value;
use tokio::io::AsyncWriteExt;
use tokio::process::ChildStdin;

use super::spawn::{SHIM_DIED, Spawned, spawn, spawn_shim};

/// Tells the shim that its standard input brings a draft and then the word.
pub(super) const AHEAD_ENV: &str = "OBLAK_SHIM_AHEAD";
/// What lets a waiting shim go.
const WORD: &[u8] = b"go\n";
/// Shims that wait at the same time; starts beyond them just take a little longer.
const MAX_WAITING: usize = 8;
/// Longest draft in bytes: it fits into a pipe (pipe(7)), so that nobody waits for a shim that does not read.
const DRAFT_BYTES: usize = 60 * 1024;

/// Waiting shims of a driver by their directory.
#[derive(Debug, Default)]
pub struct Ahead(Mutex<HashMap<PathBuf, Waiting>>);

#[derive(Debug)]
struct Waiting {
    shim: Spawned,
    word: ChildStdin,
}

impl Ahead {
    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<PathBuf, Waiting>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the shim of `dir` waits.
    #[must_use]
    pub fn waits(&self, dir: &Path) -> bool {
        self.lock().contains_key(dir)
    }

    /// Starts the shim of `dir` ahead, with what is known of its task, unless one waits there already or too many do.
    ///
    /// # Errors
    /// When it cannot be executed.
    pub async fn prepare(&self, command: &[String], dir: &Path, draft: &Value) -> DriverResult<()> {
        let line = format!("{draft}\n");
        if line.len() > DRAFT_BYTES || self.lock().len() >= MAX_WAITING || self.lock().contains_key(dir) {
            return Ok(());
        }
        let (shim, word) = spawn(command, dir, true)?;
        let mut word = word.ok_or_else(|| DriverError::retry("io", "the shim has no input pipe"))?;
        word.write_all(line.as_bytes()).await.map_err(|e| DriverError::io("draft of the shim", &e))?;
        self.lock().entry(dir.to_path_buf()).or_insert(Waiting { shim, word });
        Ok(())
    }

    /// As [`spawn_shim`], by the shim that waits, if there is one and its draft has turned out right.
    ///
    /// # Errors
    /// As [`spawn_shim`].
    pub async fn start(&self, command: &[String], dir: &Path, deadline: Duration) -> DriverResult<Value> {
        let waiting = self.lock().remove(dir);
        if let Some(mut waiting) = waiting
            && waiting.word.write_all(WORD).await.is_ok()
        {
            // The pipe stays open until the shim has answered, so it never takes a slow caller for one that left.
            let answer = waiting.shim.answer(deadline).await;
            drop(waiting.word);
            match answer {
                // It could not use its draft, or died: whatever it was, a run that it has taken on is not started again.
                Err(e) if e.code == SHIM_DIED => {}
                answer => return answer,
            }
        }
        spawn_shim(command, dir, deadline).await
    }

    /// Lets the shim that waits for `dir` end, if there is one.
    pub fn forget(&self, dir: &Path) {
        self.lock().remove(dir);
    }
}

/// The other end: what a shim that was started ahead is told.
#[derive(Debug)]
pub(super) struct Prompt(BufReader<File>);

impl Prompt {
    pub(super) fn new(input: File) -> Self {
        Self(BufReader::new(input))
    }

    /// The draft; waits for it.
    pub(super) fn draft(&mut self) -> io::Result<Value> {
        let mut line = String::new();
        (&mut self.0).take(DRAFT_BYTES as u64).read_line(&mut line)?;
        Ok(serde_json::from_str(&line)?)
    }

    /// Waits for the word; false when the caller left without it.
    pub(super) fn granted(&mut self) -> bool {
        let mut line = Vec::new();
        let read = (&mut self.0).take(WORD.len() as u64).read_until(b'\n', &mut line);
        read.is_ok() && line == WORD
    }
}
