//! Layers become trees that overlayfs takes as lower directories.
//!
//! A layer is hostile until proven otherwise: names are resolved by the kernel inside of the tree (`openat2` with `RESOLVE_IN_ROOT`), so
//! no `..`, absolute name, symbolic link or hard link leads out; sizes and counts are bounded; device nodes are left out unless the
//! policy wants them; attributes that would speak to overlayfs itself are dropped. Whiteouts (`.wh.name`, OCI layer specification)
//! become character devices 0:0, opaque directories get `trusted.overlay.opaque`.

mod entry;
mod tree;

use std::fs::{self, File};
use std::io::{self, BufReader, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use futures_util::{StreamExt, TryStreamExt, stream};
use oblak_platform::fsx;

use crate::digest::{Digest, Hashing};
use crate::error::{Code, Context, ImageError, Result};
use crate::progress::Reporter;
use crate::record::StoredLayer;
use crate::store::{ImageStore, Limits, blocking};

/// Layers at a time: unpacking is bound by processor and disk.
const PARALLEL: usize = 2;
/// zstd windows up to 2^27 bytes, the default bound of zstd itself.
const ZSTD_WINDOW_LOG: u32 = 27;

/// How a layer is unpacked.
#[derive(Clone, Debug)]
pub struct Policy {
    /// Bound of all file content.
    pub bytes: u64,
    /// Bound of the number of entries.
    pub entries: u64,
    /// Whether device nodes are made.
    pub device_nodes: bool,
}

impl Policy {
    pub(crate) fn of(limits: &Limits, device_nodes: bool) -> Self {
        Self { bytes: limits.layer_bytes, entries: limits.layer_entries, device_nodes }
    }
}

/// What was unpacked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unpacked {
    /// Digest of the uncompressed tar.
    pub diff_id: Digest,
    /// Bytes of all files.
    pub bytes: u64,
    /// Entries made.
    pub entries: u64,
    /// Entries left out: devices, sockets.
    pub skipped: u64,
}

/// The trees of `layers`, lowest first; those that are missing are unpacked.
pub(crate) async fn layers(
    store: &ImageStore,
    layers: &[StoredLayer],
    reporter: &Arc<Reporter>,
) -> Result<Vec<PathBuf>> {
    // Futures first, so that no closure over references becomes part of the stream's type: the whole must be `Send`.
    let jobs: Vec<_> = layers.iter().map(|layer| one(store, layer, reporter)).collect();
    stream::iter(jobs).buffered(PARALLEL).try_collect().await
}

async fn one(store: &ImageStore, layer: &StoredLayer, reporter: &Arc<Reporter>) -> Result<PathBuf> {
    let inner = &store.inner;
    let target = inner.blobs.tree(&layer.diff_id);
    let _one = inner.locks.hold(format!("tree:{}", layer.diff_id), reporter.cancel()).await?;
    if target.is_dir() {
        return Ok(target);
    }
    let work = store.work_dir()?;
    let (blob, layer, reporter) = (inner.blobs.path(&layer.digest), layer.clone(), Arc::clone(reporter));
    let policy = Policy::of(&inner.options.limits, inner.options.device_nodes);
    blocking(move || {
        let tree = work.path().join("tree");
        fs::create_dir(&tree).context(|| "cannot unpack".into())?;
        let file = File::open(&blob).context(|| format!("cannot open layer {}", layer.digest))?;
        let result = layer_into(file, &tree, &policy, &mut || reporter.check())?;
        if result.diff_id != layer.diff_id {
            return Err(ImageError::new(
                Code::ImageCorrupt,
                format!("layer {} should unpack to {} but is {}", layer.digest, layer.diff_id, result.diff_id),
            ));
        }
        if result.skipped > 0 {
            tracing::info!(layer = %layer.digest, entries = result.skipped, "left device nodes and sockets out");
        }
        // Everything of the tree is on the disk before its name appears.
        nix::unistd::syncfs(File::open(&tree).context(|| "cannot sync".into())?)
            .context(|| "cannot sync an unpacked layer".into())?;
        fs::rename(&tree, &target).context(|| format!("cannot store the tree of layer {}", layer.digest))?;
        fsx::sync_dir(target.parent().unwrap_or(Path::new("/"))).context(|| "cannot sync".into())?;
        Ok(target)
    })
    .await
}

/// Unpacks one layer (plain, gzip or zstd, told by its first bytes) into the empty directory `tree`. `check` is asked between entries and
/// may end the work.
///
/// # Errors
/// `unsafe_image`, `image_too_big`, `image_corrupt`, `image_truncated`, `disk_full`, `io`, and what `check` says.
pub fn layer_into(
    layer: impl Read,
    tree: &Path,
    policy: &Policy,
    check: &mut dyn FnMut() -> Result<()>,
) -> Result<Unpacked> {
    let mut plain = Hashing::new(decompress(layer)?);
    let mut builder = tree::Builder::new(tree, policy)?;
    let mut archive = tar::Archive::new(&mut plain);
    let mut pending = entry::Pending::default();
    // Raw entries: extension headers are read by ourselves, with limits.
    for raw in archive.entries().map_err(|e| broken(&e))?.raw(true) {
        check()?;
        let mut raw = raw.map_err(|e| broken(&e))?;
        if let Some(entry) = pending.take(&mut raw)? {
            builder.add(&entry, &mut raw, check)?;
        }
    }
    pending.finish()?;
    // What follows the end mark belongs to the digest too.
    drain(&mut plain, policy, check)?;
    builder.finish()?;
    let (entries, bytes, skipped) = builder.counts();
    let (_, diff_id, _) = plain.finish();
    Ok(Unpacked { diff_id, bytes, entries, skipped })
}

fn drain(plain: &mut impl Read, policy: &Policy, check: &mut dyn FnMut() -> Result<()>) -> Result<()> {
    let mut buffer = vec![0; 64 * 1024];
    let mut total = 0;
    loop {
        check()?;
        match plain.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(n) => total += n as u64,
            Err(e) => return Err(broken(&e)),
        }
        if total > policy.bytes {
            return Err(crate::blobs::too_big("the end of a layer", total, policy.bytes));
        }
    }
}

/// By content: media types are wrong often enough.
pub(crate) fn decompress<'a>(input: impl Read + 'a) -> Result<Box<dyn Read + 'a>> {
    let mut input = BufReader::with_capacity(128 * 1024, input);
    let head = io::BufRead::fill_buf(&mut input).context(|| "cannot read a layer".into())?;
    if head.starts_with(b"\x1f\x8b") {
        return Ok(Box::new(flate2::bufread::MultiGzDecoder::new(input)));
    }
    // Also a skippable frame, with which some tools begin.
    if head.starts_with(b"\x28\xb5\x2f\xfd")
        || (head.len() > 4 && head[0] & 0xf0 == 0x50 && head[1..4] == *b"\x2a\x4d\x18")
    {
        let mut decoder = zstd::stream::read::Decoder::with_buffer(input).context(|| "cannot read a layer".into())?;
        decoder.window_log_max(ZSTD_WINDOW_LOG).context(|| "cannot read a layer".into())?;
        return Ok(Box::new(decoder));
    }
    Ok(Box::new(input))
}

/// An error of reading a tar or its compression.
pub(crate) fn broken(error: &io::Error) -> ImageError {
    if let Some(own) = error.get_ref().and_then(|e| e.downcast_ref::<ImageError>()) {
        return own.clone();
    }
    let truncated = error.kind() == io::ErrorKind::UnexpectedEof || error.to_string().contains("incomplete frame");
    let code = if truncated { Code::ImageTruncated } else { Code::ImageCorrupt };
    ImageError::new(code, format!("an archive of the image is broken: {error}"))
}

#[cfg(test)]
mod tests;
