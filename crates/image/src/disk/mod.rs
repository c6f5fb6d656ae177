//! Disk images: recognised by content, examined twice (by our own reading of the header, then by a limited `qemu-img`), refused when
//! they are broken or point outside of themselves.

pub(crate) mod header;
mod tool;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

pub use header::{Detected, detect};

use crate::error::{Code, Context, ImageError, Result};
use crate::record::DiskFormat;
use crate::store::Limits;

/// What an examined disk is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DiskFacts {
    /// Its format.
    pub format: DiskFormat,
    /// Size that a guest sees.
    pub virtual_bytes: u64,
}

/// Reads the beginning (and for some formats the end) of a file and says what it is.
///
/// # Errors
/// `io`.
pub fn detect_file(path: &Path) -> Result<Detected> {
    let describe = || format!("cannot read {}", path.display());
    let file = File::open(path).context(describe)?;
    let length = file.metadata().context(describe)?.len();
    let mut head = vec![0; header::HEAD_BYTES.min(usize::try_from(length).unwrap_or(usize::MAX))];
    file.read_exact_at(&mut head, 0).context(describe)?;
    let mut tail = [0; 512];
    let tail = if length >= 512 {
        file.read_exact_at(&mut tail, length - 512).context(describe)?;
        &tail[..]
    } else {
        &[]
    };
    Ok(detect(&head, tail))
}

/// Examines the disk `name` in `dir`, a directory that unprivileged processes may pass.
pub(crate) async fn inspect(dir: &Path, name: &str, format: DiskFormat, limits: &Limits) -> Result<DiskFacts> {
    let path = dir.join(name);
    let virtual_bytes = match format {
        DiskFormat::Raw => header::check_raw(&path)?,
        DiskFormat::Qcow2 => {
            header::check_qcow2(&path)?;
            tool::info(dir, name, format).await?
        }
        DiskFormat::Vmdk => {
            header::check_vmdk(&path)?;
            tool::info(dir, name, format).await?
        }
    };
    if virtual_bytes > limits.virtual_bytes {
        return Err(crate::blobs::too_big("the disk inside the image", virtual_bytes, limits.virtual_bytes));
    }
    if virtual_bytes == 0 {
        return Err(ImageError::new(Code::ImageCorrupt, "the disk inside the image has no size"));
    }
    if format == DiskFormat::Qcow2 {
        tool::check(dir, name).await?;
    }
    Ok(DiskFacts { format, virtual_bytes })
}

/// Converts an examined disk to qcow2.
pub(crate) async fn to_qcow2(
    dir: &Path,
    name: &str,
    format: DiskFormat,
    output: &str,
    limits: &Limits,
    cancel: &tokio_util::sync::CancellationToken,
) -> Result<()> {
    tool::convert(dir, name, format, output, limits.blob_bytes, cancel).await
}
