//! One etcd server on this machine: started, kept running, adopted after a crash of ours, stopped when asked.
//!
//! ```text
//!   record of a process ──► alive ──► adopted ─────────────► watched ──► gone ──► pause (grows, bounded) ──┐
//!          │                                                    ▲                                           │
//!          └─ none, or dead (pid, start time and boot say so) ──► started, recorded ◄───────────────────────┘
//! ```
//! etcd outlives the process that started it, as guests do: an upgrade of this program interrupts no quorum.

mod binary;
mod flags;
mod limits;
mod process;

use std::path::{Path, PathBuf};
use std::time::Duration;

pub use binary::{Binary, probe};
pub use flags::{Certificates, Founding, Settings, client_url, peer_url};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// What goes wrong with the server process.
#[derive(Debug, thiserror::Error)]
pub enum SuperviseError {
    /// There is no etcd.
    #[error(
        "etcd was not found ({looked}); install it (Debian and Ubuntu: `apt-get install etcd-server`), or name it in OBLAK_ETCD_BINARY"
    )]
    NotFound {
        /// Where was looked.
        looked: String,
    },
    /// There is one that cannot be used.
    #[error("{} cannot be used: {reason}", path.display())]
    Unusable {
        /// Which.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// A file or process of ours.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// Why it failed.
        source: std::io::Error,
    },
    /// What etcd had stored is gone.
    #[error(
        "the data of this member of etcd are gone ({} is missing): starting empty would look like a new cloud. Put the directory back from where it went; or, when other servers go on, remove this one with `oblak cluster remove-server` there and join it anew in an empty data directory; or restore a backup with `oblak cluster restore`",
        path.display()
    )]
    DataGone {
        /// Where they were.
        path: PathBuf,
    },
}

impl SuperviseError {
    fn io(action: &'static str, path: &Path, source: std::io::Error) -> Self {
        Self::Io { action, path: path.into(), source }
    }
}

/// First and longest pause before etcd is started again.
const PAUSE: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(30));
/// After so long a life the pauses begin anew.
const HEALTHY: Duration = Duration::from_secs(60);
/// How often it is looked whether the process lives. It may not be our child, so nobody tells us.
const LOOK: Duration = Duration::from_millis(200);
/// Time to write down what it has, after SIGTERM.
const STOP: Duration = Duration::from_secs(10);

/// Keeps one etcd server running.
pub struct Supervisor {
    settings: Settings,
    binary: Binary,
    process: process::Slot,
}

impl Supervisor {
    /// Finds etcd and its process, if there is one; starts nothing.
    ///
    /// # Errors
    /// [`SuperviseError`]: no usable etcd, unreadable files, or data that are gone.
    pub fn new(settings: Settings) -> Result<Self, SuperviseError> {
        let binary = probe()?;
        let process = process::Slot::load(&settings.dir)?;
        Ok(Self { settings, binary, process })
    }

    /// The version of etcd, such as `3.4.23`.
    #[must_use]
    pub fn version(&self) -> &str {
        &self.binary.version
    }

    /// Makes sure that the process runs: adopts it or starts it.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn ensure(&mut self) -> Result<(), SuperviseError> {
        if self.process.is_alive() {
            return Ok(());
        }
        let data = self.settings.data();
        if self.settings.founded && !data.join("member").exists() {
            return Err(SuperviseError::DataGone { path: data });
        }
        self.process.start(&self.binary.path, &self.settings)
    }

    /// Keeps it running until `shutdown`, and leaves it running then.
    pub async fn run(mut self, shutdown: CancellationToken) {
        let mut pause = PAUSE.0;
        loop {
            let begun = Instant::now();
            match self.ensure() {
                Ok(()) => {
                    while self.process.is_alive() {
                        tokio::select! {
                            biased;
                            () = shutdown.cancelled() => return,
                            () = tokio::time::sleep(LOOK) => {}
                        }
                    }
                    tracing::warn!(log = %self.settings.log().display(), "etcd has ended; its log says why");
                }
                Err(error) => tracing::error!(%error, "etcd cannot be started"),
            }
            if begun.elapsed() >= HEALTHY {
                pause = PAUSE.0;
            }
            tokio::select! {
                biased;
                () = shutdown.cancelled() => return,
                () = tokio::time::sleep(pause) => {}
            }
            pause = (pause * 2).min(PAUSE.1);
        }
    }
}

/// Stops the etcd whose files are in `dir`, when one runs. Says whether there was one.
///
/// # Errors
/// Its record cannot be read, or it does not end.
pub async fn stop(dir: &Path) -> Result<bool, SuperviseError> {
    process::stop(dir, STOP).await
}

/// Whether an etcd of these files runs, and as which process.
#[must_use]
pub fn running(dir: &Path) -> Option<i32> {
    process::Slot::load(dir).ok().filter(process::Slot::is_known_alive).and_then(|slot| slot.pid())
}
