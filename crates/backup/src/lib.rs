//! Backups of the control plane: one encrypted file with every key of the store and the keys of the cloud; and moving all of a store into
//! another one.
//!
//! Invariant: without the passphrase a file says nothing but its size and parameters; a file that was cut, reordered or changed is not
//! accepted, and nothing of it is used before its end was seen; a store that holds something is never written into.
//!
//! Start reading at [`envelope`] (what is around), then [`archive`] (what is inside), then [`copy`].

pub mod archive;
pub mod copy;
pub mod envelope;

use std::path::PathBuf;

use oblak_store::StoreError;

/// What goes wrong with backups.
#[derive(Debug, thiserror::Error)]
pub enum BackupError {
    /// The file is not one, or damaged.
    #[error("this is no intact backup: {0}")]
    Damaged(String),
    /// The passphrase is wrong, or the beginning was changed.
    #[error("the passphrase does not open this backup (or its beginning was changed)")]
    Passphrase,
    /// The passphrase cannot be used.
    #[error("the passphrase {0}")]
    Weak(&'static str),
    /// A newer program wrote it.
    #[error("this backup has format {found}, this program reads {known}; use the version that wrote it")]
    Format {
        /// Found.
        found: u32,
        /// Known.
        known: u32,
    },
    /// The target holds something.
    #[error("the target is not empty: it holds {0} keys; choose an empty one")]
    NotEmpty(u64),
    /// After copying the target does not hold what the source does.
    #[error("the copy differs from the original ({0}); nothing was switched over")]
    Differs(String),
    /// A file.
    #[error("cannot read {}: {source}", path.display())]
    Io {
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Cryptography failed, which it never should.
    #[error("cannot encrypt: {0}")]
    Crypto(String),
}

/// Results of this crate.
pub type Result<T, E = BackupError> = std::result::Result<T, E>;
