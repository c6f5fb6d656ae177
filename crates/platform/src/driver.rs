//! What all driver families share: the error, the answer of a probe, byte streams.

use serde::{Deserialize, Serialize};
use tokio::io::{AsyncRead, AsyncWrite};

/// What the caller should do about a failed driver call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Remedy {
    /// Try again later; the world may get better by itself.
    Retry,
    /// The same call will fail again; somebody has to change something.
    Permanent,
    /// What the call is about does not exist any more.
    Gone,
    /// The driver cannot do this here; the detail says why.
    Unsupported,
}

/// The error of every driver call.
#[derive(Clone, Debug, thiserror::Error, Serialize, Deserialize)]
#[error("{detail}")]
pub struct DriverError {
    /// What the caller should do.
    pub remedy: Remedy,
    /// Stable snake_case code such as `disk_full`, `qemu_missing`.
    pub code: String,
    /// For people: the object, what happened, what can be done.
    pub detail: String,
}

impl DriverError {
    /// Worth another try.
    pub fn retry(code: &str, detail: impl Into<String>) -> Self {
        Self { remedy: Remedy::Retry, code: code.into(), detail: detail.into() }
    }
    /// Will fail again.
    pub fn permanent(code: &str, detail: impl Into<String>) -> Self {
        Self { remedy: Remedy::Permanent, code: code.into(), detail: detail.into() }
    }
    /// The object does not exist.
    pub fn gone(detail: impl Into<String>) -> Self {
        Self { remedy: Remedy::Gone, code: "gone".into(), detail: detail.into() }
    }
    /// Not possible here.
    pub fn unsupported(detail: impl Into<String>) -> Self {
        Self { remedy: Remedy::Unsupported, code: "unsupported".into(), detail: detail.into() }
    }
    /// From an I/O error with context: a full disk is permanent until somebody frees space, the rest is worth another try.
    pub fn io(context: &str, error: &std::io::Error) -> Self {
        match error.raw_os_error() {
            Some(libc::ENOSPC | libc::EDQUOT) => Self::retry(
                "disk_full",
                format!("{context}: no space left on the disk; free some or use a smaller size"),
            ),
            _ => Self::retry("io", format!("{context}: {error}")),
        }
    }
}

/// Result of driver calls.
pub type DriverResult<T> = Result<T, DriverError>;

/// Whether something can be used here, and if not, why not.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Availability {
    /// What it is about, for example `kvm`, `crun`, `nftables`.
    pub name: String,
    /// Whether it can be used.
    pub available: bool,
    /// Version when available, reason when not.
    pub detail: String,
}

impl Availability {
    /// It works; `detail` is usually a version.
    pub fn yes(name: impl Into<String>, detail: impl Into<String>) -> Self {
        Self { name: name.into(), available: true, detail: detail.into() }
    }
    /// It does not, because of `reason`.
    pub fn no(name: impl Into<String>, reason: impl Into<String>) -> Self {
        Self { name: name.into(), available: false, detail: reason.into() }
    }
}

/// A bidirectional byte stream.
pub trait Duplex: AsyncRead + AsyncWrite + Send + Unpin + 'static {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin + 'static> Duplex for T {}

/// Owned [`Duplex`].
pub type BoxDuplex = Box<dyn Duplex>;

/// Owned readable stream.
pub type BoxRead = Box<dyn AsyncRead + Send + Unpin + 'static>;
