//! Ways into the parsers for the fuzzer; nobody else calls them.

use std::path::Path;

use http::{HeaderMap, HeaderValue, header};

use crate::disk::{self, Detected, header as disk_header};
use crate::error::{Code, ImageError, Result};
use crate::oci::{Document, config};
use crate::record::DiskFormat;
use crate::reference::Reference;
use crate::store::Limits;

/// What is decided about the file of a disk before a tool may open it.
///
/// # Errors
/// As an import.
pub fn disk(path: &Path) -> Result<u64> {
    match disk::detect_file(path)? {
        Detected::Disk(DiskFormat::Qcow2) => disk_header::check_qcow2(path).map(|()| 2),
        Detected::Disk(DiskFormat::Vmdk) => disk_header::check_vmdk(path).map(|()| 3),
        Detected::Disk(DiskFormat::Raw) => disk_header::check_raw(path),
        other => Err(ImageError::new(Code::UnsupportedFormat, format!("{other:?}"))),
    }
}

/// A name of an image in a registry.
///
/// # Errors
/// As an import.
pub fn reference(text: &str) -> Result<()> {
    Reference::parse(text).map(drop)
}

/// Whether the value of `WWW-Authenticate` is a challenge that we know.
#[must_use]
pub fn challenge(text: &str) -> bool {
    let Ok(value) = HeaderValue::from_str(text) else { return false };
    crate::registry::challenge(&HeaderMap::from_iter([(header::WWW_AUTHENTICATE, value)])).is_some()
}

/// An index, a manifest or (for the same bytes) a configuration.
///
/// # Errors
/// As an import.
pub fn documents(bytes: &[u8]) -> Result<()> {
    match Document::parse(bytes)? {
        Document::Index(index) => index.select().map(drop),
        Document::Manifest(manifest) => {
            manifest.check(&Limits::default())?;
            config(bytes, &manifest).map(drop)
        }
    }
}
