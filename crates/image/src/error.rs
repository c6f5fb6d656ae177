//! What can go wrong with an image, with a stable code for programs and a sentence for people.

use std::fmt;
use std::io;

use oblak_platform::driver::DriverError;

/// Stable reason of a failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Code {
    /// The content contradicts itself or its digest inside an image.
    ImageCorrupt,
    /// The content ends before it should.
    ImageTruncated,
    /// A size limit would be passed.
    ImageTooBig,
    /// The content is not what the caller's checksum says.
    ChecksumMismatch,
    /// Neither a disk, nor a kernel, nor an OCI image that can be used.
    UnsupportedFormat,
    /// It points or writes outside of itself.
    UnsafeImage,
    /// No such image, file, URL, tag or recipe.
    NotFound,
    /// The registry refused the credentials.
    RegistryAuth,
    /// A server could not be reached or answered wrongly.
    Network,
    /// No space left.
    DiskFull,
    /// The caller gave up.
    Cancelled,
    /// The request itself is wrong.
    Invalid,
    /// A recipe failed; the detail has its last words.
    RecipeFailed,
    /// This machine lacks something that is needed.
    Unsupported,
    /// Any other trouble with the local disk.
    Io,
}

impl Code {
    /// The code on the wire.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::ImageCorrupt => "image_corrupt",
            Self::ImageTruncated => "image_truncated",
            Self::ImageTooBig => "image_too_big",
            Self::ChecksumMismatch => "checksum_mismatch",
            Self::UnsupportedFormat => "unsupported_format",
            Self::UnsafeImage => "unsafe_image",
            Self::NotFound => "not_found",
            Self::RegistryAuth => "registry_auth",
            Self::Network => "network",
            Self::DiskFull => "disk_full",
            Self::Cancelled => "cancelled",
            Self::Invalid => "invalid",
            Self::RecipeFailed => "recipe_failed",
            Self::Unsupported => "unsupported",
            Self::Io => "io",
        }
    }

    /// Whether the same call may succeed later without anybody changing anything.
    #[must_use]
    pub fn is_transient(self) -> bool {
        matches!(self, Self::Network | Self::DiskFull | Self::Io | Self::Cancelled | Self::RecipeFailed)
    }
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// The error of this crate.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{detail}")]
pub struct ImageError {
    /// For programs.
    pub code: Code,
    /// For people: what happened to which object and what can be done.
    pub detail: String,
}

/// Result of this crate.
pub type Result<T, E = ImageError> = std::result::Result<T, E>;

impl ImageError {
    /// From its parts.
    pub fn new(code: Code, detail: impl Into<String>) -> Self {
        Self { code, detail: detail.into() }
    }

    /// The caller gave up.
    #[must_use]
    pub fn cancelled() -> Self {
        Self::new(Code::Cancelled, "the import was cancelled")
    }

    /// From an I/O error; a full disk gets its own code.
    #[must_use]
    pub fn io(context: &str, error: &io::Error) -> Self {
        // An unpacker or a limit may have put our own error inside.
        if let Some(own) = error.get_ref().and_then(|e| e.downcast_ref::<Self>()) {
            return own.clone();
        }
        match error.raw_os_error() {
            Some(libc::ENOSPC | libc::EDQUOT) => Self::new(
                Code::DiskFull,
                format!("{context}: no space left on the disk; remove images that nobody uses or make the disk bigger"),
            ),
            _ => Self::new(Code::Io, format!("{context}: {error}")),
        }
    }
}

impl From<ImageError> for io::Error {
    fn from(error: ImageError) -> Self {
        Self::other(error)
    }
}

impl From<ImageError> for DriverError {
    fn from(error: ImageError) -> Self {
        let code = error.code.as_str();
        match error.code {
            Code::Unsupported => Self::unsupported(error.detail),
            c if c.is_transient() => Self::retry(code, error.detail),
            _ => Self::permanent(code, error.detail),
        }
    }
}

/// Adds context to I/O errors.
pub(crate) trait Context<T> {
    fn context(self, what: impl FnOnce() -> String) -> Result<T>;
}

impl<T> Context<T> for io::Result<T> {
    fn context(self, what: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|e| ImageError::io(&what(), &e))
    }
}

impl<T> Context<T> for nix::Result<T> {
    fn context(self, what: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|e| ImageError::io(&what(), &io::Error::from(e)))
    }
}
