//! The writable layer: a directory, or a file system of limited size in a sparse file.

use std::fs::OpenOptions;
use std::io;
use std::os::unix::fs::{MetadataExt, chown};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::mount::MsFlags;
use oblak_platform::driver::{DriverError, DriverResult};
use oblak_platform::fsx;

use super::{copy, sys, template};
use crate::bundle::ID_COUNT;
use crate::task::Root;

/// The image file of a limited writable layer, in the directory of the layer.
pub const IMAGE: &str = "upper.img";
/// An ext4 smaller than this has no room for its own journal.
const IMAGE_MIN_BYTES: u64 = 16 << 20;
/// How long the kernel may take to let go of the image of an earlier run.
const RELEASE: Duration = Duration::from_secs(20);
/// Directories that overlayfs gets.
const UPPER: &str = "upper";
const WORK: &str = "work";

/// What overlayfs gets.
#[derive(Debug)]
pub struct Writable {
    pub upper: PathBuf,
    pub work: PathBuf,
}

/// Makes the writable layer of `root` available on `target` and gives it to host id `base`.
///
/// Limits are kept by a file system in a sparse file: project quotas would be cheaper, but are missing on most systems.
pub fn prepare(root: &Root<'_>, templates: &Path, base: u32, target: &Path) -> DriverResult<Writable> {
    let fail = |e: io::Error| DriverError::io(&format!("writable layer {}", root.upper.display()), &e);
    fsx::create_dir_private(root.upper, 0o711).map_err(fail)?;
    if root.upper_size.as_u64() > 0 {
        limited(root, templates, target)?;
    } else {
        sys::bind(root.upper, target).map_err(fail)?;
    }
    let (upper, work) = (target.join(UPPER), target.join(WORK));
    let own = || -> io::Result<()> {
        let fresh = !upper.exists();
        for dir in [&upper, &work] {
            fsx::create_dir_private(dir, 0o755)?;
        }
        if fresh {
            // The root directory of a container is the one of its writable layer.
            if let Some(top) = root.layers.last() {
                copy::same_mode(top, &upper)?;
            }
            chown(&upper, Some(base), Some(base))?;
        }
        // A container that got another range of ids takes its files along.
        let owner = std::fs::metadata(&upper)?.uid();
        if owner != base {
            copy::shift(&upper, |id| {
                let inside = id.checked_sub(owner).filter(|n| *n < ID_COUNT)?;
                Some(base + inside)
            })?;
        }
        Ok(())
    };
    own().map_err(fail)?;
    Ok(Writable { upper, work })
}

/// Removes what [`prepare`] made.
///
/// # Errors
/// Any I/O error.
pub fn remove(upper: &Path) -> io::Result<()> {
    fsx::remove_dir_if_exists(&upper.join(UPPER))?;
    fsx::remove_dir_if_exists(&upper.join(WORK))?;
    fsx::remove_file_if_exists(&upper.join(IMAGE))
}

fn limited(root: &Root<'_>, templates: &Path, target: &Path) -> DriverResult<()> {
    let path = root.upper.join(IMAGE);
    let fail = |e: io::Error| DriverError::io(&format!("{}", path.display()), &e);
    let size = root.upper_size.as_u64().max(IMAGE_MIN_BYTES);
    wait_released(&path)?;
    match std::fs::metadata(&path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => create(&path, size, templates)?,
        Err(e) => return Err(fail(e)),
        Ok(meta) if meta.len() < size => grow(&path, size)?,
        Ok(_) => {}
    }
    let image = OpenOptions::new().read(true).write(true).open(&path).map_err(fail)?;
    let (device, device_path) = sys::loop_device(&image).map_err(fail)?;
    let none: Option<&str> = None;
    nix::mount::mount(Some(&device_path), target, Some("ext4"), MsFlags::MS_NODEV | MsFlags::MS_NOATIME, none)
        .map_err(|e| fail(e.into()))?;
    drop(device);
    Ok(())
}

/// The mount of an earlier run ends with the last process of its namespace, a moment after everybody could see that run as
/// over. Until its loop device is free the image is still being written.
fn wait_released(image: &Path) -> DriverResult<()> {
    let image = std::fs::canonicalize(image).unwrap_or_else(|_| image.to_path_buf());
    let in_use = || {
        let devices = std::fs::read_dir("/sys/block").into_iter().flatten().filter_map(Result::ok);
        devices
            .filter_map(|d| std::fs::read_to_string(d.path().join("loop/backing_file")).ok())
            .any(|file| Path::new(file.trim_end_matches('\n')) == image)
    };
    let end = Instant::now() + RELEASE;
    while in_use() {
        if Instant::now() > end {
            let text = format!("{} is still in use by a loop device (see losetup -j)", image.display());
            return Err(DriverError::retry("upper_busy", text));
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    Ok(())
}

/// A file system under another name first, so that a crash never leaves half of one under the right name.
fn create(path: &Path, size: u64, templates: &Path) -> DriverResult<()> {
    let temp = path.with_extension("new");
    let fail = |e: io::Error| DriverError::io(&format!("{}", path.display()), &e);
    fsx::remove_file_if_exists(&temp).map_err(fail)?;
    template::put(templates, size, &temp)?;
    std::fs::rename(&temp, path).map_err(fail)
}

fn grow(path: &Path, size: u64) -> DriverResult<()> {
    // resize2fs wants a checked file system; the journal is replayed on the way.
    tool("e2fsck", &["-f", "-p"], path)?;
    let file =
        OpenOptions::new().write(true).open(path).map_err(|e| DriverError::io(&format!("{}", path.display()), &e))?;
    file.set_len(size).map_err(|e| DriverError::io(&format!("{}", path.display()), &e))?;
    tool("resize2fs", &[], path)
}

/// Runs a program of e2fsprogs on `path`.
pub(super) fn tool(program: &str, args: &[&str], path: &Path) -> DriverResult<()> {
    let mut command = Command::new(program);
    command.args(args).arg(path).stdin(Stdio::null());
    let output = sys::dies_with_us(&mut command).output().map_err(|e| {
        DriverError::unsupported(format!("boot.upper_size: a limit needs {program} (package e2fsprogs): {e}"))
    })?;
    // e2fsck says 1 when it repaired something.
    if output.status.success() || (program == "e2fsck" && output.status.code() == Some(1)) {
        return Ok(());
    }
    let text = String::from_utf8_lossy(&output.stderr);
    Err(DriverError::retry("upper_failed", format!("{program} {}: {}", path.display(), text.trim())))
}
