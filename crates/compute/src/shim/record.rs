//! What a shim leaves on disk, and what can be concluded from it after any crash.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::time::Duration;

use nix::fcntl::{Flock, FlockArg};
use oblak_model::Timestamp;
use oblak_platform::driver::{DriverError, DriverResult};
use oblak_platform::fsx;
use oblak_platform::process::{Identity, boot_id};
use serde::{Deserialize, Serialize};

use super::file;

/// `shim.json`: the run that a shim has taken on. Written durably *before* the guest's first instruction, so whatever is
/// killed afterwards, nobody starts the same run again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShimRecord {
    /// `container`, `qemu`.
    pub kind: String,
    /// The run.
    pub run: u64,
    /// Epoch of the node's lease when it was started.
    pub epoch: u64,
    /// The shim.
    pub shim: Identity,
    /// The guest's main process, once it exists.
    #[serde(default)]
    pub guest: Option<Identity>,
    /// When the run started.
    pub started_at: Timestamp,
    /// `kvm`, `tcg` or the OCI runtime's name.
    #[serde(default)]
    pub runtime: String,
    /// Somebody asked it to end.
    #[serde(default)]
    pub stopping: bool,
}

impl ShimRecord {
    /// Reads it; `None` when no run was ever started.
    ///
    /// # Errors
    /// Any I/O error, `InvalidData` when the file is damaged.
    pub fn read(dir: &Path) -> io::Result<Option<Self>> {
        fsx::read_json(&dir.join(file::RECORD))
    }
    /// Writes it durably.
    ///
    /// # Errors
    /// Any I/O error.
    pub fn write(&self, dir: &Path) -> io::Result<()> {
        fsx::write_json(&dir.join(file::RECORD), self)
    }
}

/// `exit.json`: how a run ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExitRecord {
    /// The run.
    pub run: u64,
    /// Exit code; 128 + n when ended by signal n; none when it never started.
    pub code: Option<i32>,
    /// Stable CamelCase reason.
    pub reason: String,
    /// For people.
    pub message: String,
    /// Whether somebody had asked it to end.
    pub asked: bool,
    /// When the run started.
    #[serde(default)]
    pub started_at: Option<Timestamp>,
    /// When it ended.
    pub at: Timestamp,
    /// As in [`ShimRecord`].
    #[serde(default)]
    pub runtime: String,
}

impl ExitRecord {
    /// Reads it; `None` when no run has ended.
    ///
    /// # Errors
    /// As [`ShimRecord::read`].
    pub fn read(dir: &Path) -> io::Result<Option<Self>> {
        fsx::read_json(&dir.join(file::EXIT))
    }
    /// Writes it durably.
    ///
    /// # Errors
    /// Any I/O error.
    pub fn write(&self, dir: &Path) -> io::Result<()> {
        fsx::write_json(&dir.join(file::EXIT), self)
    }
    /// Whether the end counts as a failure: nobody asked for it and the guest did not report success.
    #[must_use]
    pub fn is_failure(&self) -> bool {
        !self.asked && self.code != Some(0)
    }
}

/// What the files of a guest and the process table say together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Standing {
    /// No run was ever started here.
    Never,
    /// The shim lives and the run has not ended.
    Alive(ShimRecord),
    /// The last run has ended and its end is known.
    Ended(ExitRecord),
    /// The shim died without saying how the run ended. Its guest may still run: end it, then write an [`ExitRecord`].
    Lost(ShimRecord),
    /// The run belongs to an earlier boot of the machine; none of its processes exist.
    Rebooted(ShimRecord),
}

/// Looks at the directory of a guest.
///
/// # Errors
/// Any I/O error, `InvalidData` when a file is damaged.
pub fn standing(dir: &Path) -> io::Result<Standing> {
    // The shim writes the exit record and dies: looking at the process first and at the exit record last cannot miss it.
    let Some(record) = ShimRecord::read(dir)? else {
        return Ok(ExitRecord::read(dir)?.map_or(Standing::Never, Standing::Ended));
    };
    let alive = record.shim.is_alive();
    if let Some(exit) = ExitRecord::read(dir)?
        && exit.run >= record.run
    {
        return Ok(Standing::Ended(exit));
    }
    Ok(if alive {
        Standing::Alive(record)
    } else if record.shim.boot_id == boot_id() {
        Standing::Lost(record)
    } else {
        Standing::Rebooted(record)
    })
}

/// The lock of a guest's directory: held by the living shim, or by a driver that cleans up.
#[derive(Debug)]
pub struct ShimLock {
    _file: Flock<File>,
}

impl ShimLock {
    /// Takes the lock if nobody has it and writes the caller's identity into it. `None` when somebody has it.
    ///
    /// # Errors
    /// Any I/O error; `NotFound` when the directory is gone.
    pub fn try_acquire(dir: &Path) -> io::Result<Option<Self>> {
        let path = dir.join(file::LOCK);
        // A lock on a file that was removed meanwhile protects nothing: take the new one. Twice is unlikely, five is enough.
        for _ in 0..5 {
            let opened =
                OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(&path)?;
            let mut lock = match Flock::lock(opened, FlockArg::LockExclusiveNonblock) {
                Ok(lock) => lock,
                Err((_, nix::errno::Errno::EWOULDBLOCK)) => return Ok(None),
                Err((_, e)) => return Err(e.into()),
            };
            let here = lock.metadata()?.ino();
            if std::fs::metadata(&path).is_ok_and(|m| m.ino() == here) {
                lock.set_len(0)?;
                lock.rewind()?;
                lock.write_all(&serde_json::to_vec(&Identity::current())?)?;
                return Ok(Some(Self { _file: lock }));
            }
        }
        Err(io::Error::other("the shim lock keeps changing"))
    }

    /// Who wrote the lock last.
    fn holder(dir: &Path) -> Option<Identity> {
        let mut text = String::new();
        File::open(dir.join(file::LOCK)).ok()?.take(4096).read_to_string(&mut text).ok()?;
        serde_json::from_str(&text).ok()
    }
}

/// Ends the shim of `dir` by SIGKILL, whatever it is doing, and returns its lock: while that is held no other can start.
/// `None` when the directory does not exist.
///
/// # Errors
/// Retry when it still holds the lock after `deadline`.
pub async fn end_shim(dir: &Path, deadline: Duration) -> DriverResult<Option<ShimLock>> {
    let end = tokio::time::Instant::now() + deadline;
    let me = Identity::current();
    loop {
        match ShimLock::try_acquire(dir) {
            Ok(Some(lock)) => return Ok(Some(lock)),
            Ok(None) => {}
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(DriverError::io(&format!("lock of {}", dir.display()), &e)),
        }
        // The lock may be held by this very process (another task that cleans up): wait for that one.
        if let Some(holder) = ShimLock::holder(dir).filter(|h| *h != me) {
            holder.kill();
        }
        if tokio::time::Instant::now() >= end {
            return Err(DriverError::retry("shim_stuck", format!("the shim of {} does not die", dir.display())));
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(run: u64, shim: Identity) -> ShimRecord {
        ShimRecord {
            kind: "test".into(),
            run,
            epoch: 0,
            shim,
            guest: None,
            started_at: Timestamp::EPOCH,
            runtime: String::new(),
            stopping: false,
        }
    }

    #[test]
    fn standing_follows_files_and_processes() {
        let temp = tempfile::tempdir().unwrap();
        let dir = temp.path();
        assert_eq!(standing(dir).unwrap(), Standing::Never);
        let me = Identity::current();
        let alive = record(1, me.clone());
        alive.write(dir).unwrap();
        assert_eq!(standing(dir).unwrap(), Standing::Alive(alive.clone()));
        let dead = record(1, Identity { start_ticks: me.start_ticks + 1, ..me.clone() });
        dead.write(dir).unwrap();
        assert_eq!(standing(dir).unwrap(), Standing::Lost(dead));
        let old = record(1, Identity { boot_id: "another".into(), ..me.clone() });
        old.write(dir).unwrap();
        assert_eq!(standing(dir).unwrap(), Standing::Rebooted(old));
        let exit = ExitRecord {
            run: 1,
            code: Some(3),
            reason: "Error".into(),
            message: String::new(),
            asked: false,
            started_at: None,
            at: Timestamp::EPOCH,
            runtime: String::new(),
        };
        exit.write(dir).unwrap();
        assert_eq!(standing(dir).unwrap(), Standing::Ended(exit));
        // A later run is not covered by the end of an earlier one.
        record(2, me).write(dir).unwrap();
        assert!(matches!(standing(dir).unwrap(), Standing::Alive(r) if r.run == 2));
    }

    #[tokio::test]
    async fn the_lock_is_exclusive_and_survives_removal_of_its_file() {
        let temp = tempfile::tempdir().unwrap();
        let dir = temp.path();
        let lock = ShimLock::try_acquire(dir).unwrap().unwrap();
        assert!(ShimLock::try_acquire(dir).unwrap().is_none());
        assert_eq!(end_shim(dir, Duration::from_millis(30)).await.unwrap_err().code, "shim_stuck");
        std::fs::remove_file(dir.join(file::LOCK)).unwrap();
        assert!(ShimLock::try_acquire(dir).unwrap().is_some());
        drop(lock);
        assert!(end_shim(dir, Duration::from_secs(1)).await.unwrap().is_some());
        assert!(end_shim(&dir.join("none"), Duration::from_secs(1)).await.unwrap().is_none());
    }
}
