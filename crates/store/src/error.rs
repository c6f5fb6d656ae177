//! What can go wrong, said so that the operator knows what to do.

use std::path::PathBuf;

use oblak_model::Revision;

use crate::{Key, LeaseId, MAX_TXN_BYTES, MAX_TXN_OPS};

/// Result of this crate.
pub type Result<T, E = StoreError> = std::result::Result<T, E>;

/// A failed store operation. A guard that did not hold is not an error but a [`crate::CommitOutcome`].
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The text is not a key.
    #[error("{key:?} is not a valid key: {reason}")]
    InvalidKey {
        /// The beginning of the text.
        key: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// More than one commit may hold.
    #[error(
        "this change needs {ops} operations and {bytes} bytes at once; at most {MAX_TXN_OPS} operations and {MAX_TXN_BYTES} bytes are committed together, split it into stages"
    )]
    TooLarge {
        /// Guards plus writes.
        ops: usize,
        /// Keys plus values.
        bytes: usize,
    },
    /// One transaction writes the same key twice, so its meaning would depend on order.
    #[error("one commit writes {key} twice; keep one of the two writes")]
    DuplicateWrite {
        /// The key.
        key: Key,
    },
    /// The lease expired, was revoked or never existed.
    #[error("lease {0} does not exist any more; ask for a new one")]
    LeaseGone(LeaseId),
    /// The revision is older than the history kept, or of another incarnation.
    #[error(
        "the history before revision {oldest} is gone; list again and continue from the revision that the list returns"
    )]
    Compacted {
        /// First revision that can still be asked for.
        oldest: Revision,
    },
    /// Another process has the database open.
    #[error("the database {} is in use by another process; stop that process or choose another data directory", path.display())]
    Locked {
        /// The file.
        path: PathBuf,
    },
    /// The file is not what was written.
    #[error("the database {} is damaged ({detail}); move it away and restore a backup", path.display())]
    Corrupt {
        /// The file.
        path: PathBuf,
        /// What was found.
        detail: String,
    },
    /// Written by another version of this program.
    #[error("the database {} has schema {found}, this program reads {supported}; use the program version that wrote it or restore a backup", path.display())]
    Schema {
        /// The file.
        path: PathBuf,
        /// Version in the file.
        found: u32,
        /// Version of this program.
        supported: u32,
    },
    /// No space; nothing of the change was kept.
    #[error("the disk holding {} is full; free some space and try again", path.display())]
    DiskFull {
        /// The file.
        path: PathBuf,
    },
    /// The file cannot be read or written; nothing of the change was kept.
    #[error("cannot {action} the database {}: {source}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The servers of the store do not answer, or have no majority; nothing of the change was kept.
    #[error("the store cannot be reached ({detail}); check that its servers run and are connected, then try again")]
    Unreachable {
        /// Which server said what.
        detail: String,
    },
    /// The servers of the store answer, and say no: credentials, certificates, limits, a cluster that is not ours.
    #[error("the store refuses the request: {detail}")]
    Refused {
        /// Why, and what to do.
        detail: String,
    },
    /// The servers of the store have no room; nothing of the change was kept.
    #[error("the store is full ({detail}); free some space, defragment its servers and clear the alarm")]
    Quota {
        /// What it said.
        detail: String,
    },
    /// The store was closed or its writer stopped.
    #[error("the store is closed; restart the server")]
    Closed,
    /// A value does not decode as the type it should have.
    #[error("the value of {key} cannot be read: {reason}")]
    Codec {
        /// Whose value.
        key: Key,
        /// Why.
        reason: String,
    },
    /// A reader waited for a revision that did not arrive in time.
    #[error("the cache is at revision {at} and did not reach {wanted} in time; try again")]
    Behind {
        /// Where the cache is.
        at: Revision,
        /// What was waited for.
        wanted: Revision,
    },
}

impl StoreError {
    /// Whether the same call may succeed later without anybody changing the request.
    #[must_use]
    pub fn is_retryable(&self) -> bool {
        matches!(
            self,
            Self::DiskFull { .. }
                | Self::Io { .. }
                | Self::Behind { .. }
                | Self::Unreachable { .. }
                | Self::Quota { .. }
        )
    }
}
