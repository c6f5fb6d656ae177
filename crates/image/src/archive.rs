//! Archives that hold an image: tars of an OCI layout, and exports of another store. Only the few names that such an archive has are
//! taken out of it.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use tar::EntryType;

use crate::blobs;
use crate::digest::Digest;
use crate::error::{Code, Context, ImageError, Result};
use crate::oci::DOCUMENT_BYTES;
use crate::progress::Reporter;
use crate::store::Limits;
use crate::unpack::{broken, decompress};

/// Name of the record in an export.
pub(crate) const RECORD: &str = "oblak-image.json";
/// More than any image has blobs; without a bound an archive of empty entries would go on for ever.
const MAX_ENTRIES: usize = 4096;

/// What an archive turned out to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    OciLayout,
    Export,
}

/// Takes the image out of `file` into `dir`.
pub(crate) fn extract(file: &Path, dir: &Path, limits: &Limits, reporter: &Reporter) -> Result<Kind> {
    let input = File::open(file).context(|| format!("cannot open {}", file.display()))?;
    fs::create_dir_all(dir.join("blobs/sha256")).context(|| format!("cannot create {}", dir.display()))?;
    let mut plain = decompress(input)?;
    let mut first = [0; 512];
    let got = read_up_to(&mut plain, &mut first)?;
    if got < 512 || first.get(257..262) != Some(b"ustar") {
        return Err(ImageError::new(
            Code::UnsupportedFormat,
            "the content is compressed and no archive of an image; decompress a disk image before importing it",
        ));
    }
    let mut archive = tar::Archive::new((&first[..]).chain(plain));
    let mut total = 0;
    // Raw: names of an image's parts fit into a plain header, extension headers are of no interest.
    for (count, entry) in archive.entries().map_err(|e| broken(&e))?.raw(true).enumerate() {
        reporter.check()?;
        if count >= MAX_ENTRIES {
            return Err(ImageError::new(Code::ImageTooBig, format!("the archive has more than {MAX_ENTRIES} entries")));
        }
        let mut entry = entry.map_err(|e| broken(&e))?;
        let Some(target) = target(&entry, dir) else { continue };
        let size = entry.header().entry_size().map_err(|e| broken(&e))?;
        let document = target.extension().is_some();
        let limit = if document { DOCUMENT_BYTES as u64 } else { limits.blob_bytes };
        total += size;
        if size > limit || total > limits.blob_bytes {
            return Err(blobs::too_big("the archive", total, limit));
        }
        write(&mut entry, &target, size, reporter)?;
    }
    if dir.join(RECORD).is_file() {
        return Ok(Kind::Export);
    }
    if dir.join("oci-layout").is_file() {
        return Ok(Kind::OciLayout);
    }
    Err(ImageError::new(
        Code::UnsupportedFormat,
        "the archive is no image: it has no oci-layout file (images saved by docker before version 25 must be saved again with --format oci-archive or pushed to a registry)",
    ))
}

fn read_up_to(input: &mut impl Read, buffer: &mut [u8]) -> Result<usize> {
    let mut got = 0;
    while got < buffer.len() {
        match input.read(&mut buffer[got..]) {
            Ok(0) => break,
            Ok(n) => got += n,
            Err(e) => return Err(broken(&e)),
        }
    }
    Ok(got)
}

fn target<R: Read>(entry: &tar::Entry<'_, R>, dir: &Path) -> Option<PathBuf> {
    if !matches!(entry.header().entry_type(), EntryType::Regular | EntryType::Continuous) {
        return None;
    }
    let bytes = entry.header().path_bytes().into_owned();
    let name = std::str::from_utf8(&bytes).ok()?.trim_start_matches("./");
    if matches!(name, "oci-layout" | "index.json" | RECORD) {
        return Some(dir.join(name));
    }
    let hex = name.strip_prefix("blobs/sha256/")?;
    let digest: Digest = format!("sha256:{hex}").parse().ok()?;
    Some(dir.join("blobs/sha256").join(digest.hex()))
}

fn write(entry: &mut impl Read, target: &Path, size: u64, reporter: &Reporter) -> Result<()> {
    let describe = || format!("cannot write {}", target.display());
    let mut file = blobs::create(target)?;
    let mut buffer = vec![0; blobs::CHUNK];
    let mut written = 0;
    loop {
        reporter.check()?;
        let n = entry.read(&mut buffer).map_err(|e| broken(&e))?;
        if n == 0 {
            break;
        }
        file.write_all(&buffer[..n]).context(describe)?;
        written += n as u64;
    }
    if written == size {
        return Ok(());
    }
    Err(ImageError::new(Code::ImageTruncated, format!("the archive ends after {written} of {size} bytes of a blob")))
}
