//! Empty file systems of the sizes in use, made once on a node: to copy one takes a tenth of the time of making one, because it is a
//! few hundred KiB in a file that is all holes.

use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use oblak_platform::driver::{DriverError, DriverResult};
use oblak_platform::{copy, fsx};

use super::upper;

/// Names how they are made: another way needs another name, so that none of the old way is used.
const FORM: &str = "ext4.1";
/// As many are kept, the newest ones. Each takes less than 1 MiB.
const MAX_KEPT: usize = 32;

/// Puts an empty ext4 of `size` bytes into the new file `to`, durably. The template is kept in `dir`, which is made.
pub fn put(dir: &Path, size: u64, to: &Path) -> DriverResult<()> {
    let template = dir.join(format!("{FORM}-{size}.img"));
    let fail = |e: io::Error| DriverError::io(&format!("{} from {}", to.display(), template.display()), &e);
    match copy::file(&template, to) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => {}
        other => return other.map(drop).map_err(fail),
    }
    make(dir, &template, size)?;
    copy::file(&template, to).map(drop).map_err(fail)
}

/// Several may do this at once: each makes its own, and they are all alike.
fn make(dir: &Path, template: &Path, size: u64) -> DriverResult<()> {
    let fail = |e: io::Error| DriverError::io(&format!("{}", template.display()), &e);
    fsx::create_dir_private(dir, 0o700).map_err(fail)?;
    prune(dir).map_err(fail)?;
    let temp = template.with_extension(format!("{}.new", std::process::id()));
    fsx::remove_file_if_exists(&temp).map_err(fail)?;
    let file = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&temp).map_err(fail)?;
    file.set_len(size).map_err(fail)?;
    // Nothing is left to be initialized later by the kernel: what the file has no blocks for reads as zero.
    let options = ["-q", "-F", "-m", "0", "-E", "discard,lazy_journal_init=1", "-O", "^resize_inode"];
    let made = upper::tool("mkfs.ext4", &options, &temp).and_then(|()| {
        // mkfs has synced it.
        std::fs::rename(&temp, template).map_err(fail)
    });
    if made.is_err() {
        let _ = fsx::remove_file_if_exists(&temp);
    }
    made
}

/// Makes room for one more. What a killed shim left goes in the same way.
fn prune(dir: &Path) -> io::Result<()> {
    let mut all: Vec<(SystemTime, PathBuf)> = Vec::new();
    for entry in std::fs::read_dir(dir)?.flatten() {
        let Ok(meta) = entry.metadata() else { continue };
        all.push((meta.modified()?, entry.path()));
    }
    all.sort();
    for (_, path) in all.iter().rev().skip(MAX_KEPT - 1) {
        fsx::remove_file_if_exists(path)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;

    #[test]
    fn copies_are_whole_file_systems_in_few_blocks() {
        if std::process::Command::new("mkfs.ext4").arg("-V").output().is_err() {
            println!("skipped: no mkfs.ext4");
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let templates = dir.path().join("templates");
        for name in ["a", "b"] {
            let to = dir.path().join(name);
            put(&templates, 2 << 30, &to).unwrap();
            let meta = std::fs::metadata(&to).unwrap();
            assert_eq!(meta.len(), 2 << 30);
            assert!(meta.blocks() * 512 < 2 << 20, "{} blocks", meta.blocks());
            upper::tool("e2fsck", &["-f", "-n"], &to).unwrap();
        }
        let kept = || std::fs::read_dir(&templates).unwrap().count();
        assert_eq!(kept(), 1, "the second one is a copy of the same template");
        for n in 0..2 * MAX_KEPT {
            std::fs::write(templates.join(format!("left-{n}.new")), "").unwrap();
        }
        put(&templates, 1 << 30, &dir.path().join("c")).unwrap();
        assert_eq!(kept(), MAX_KEPT);
        assert!(put(&templates, 1 << 30, &dir.path().join("c")).is_err(), "no file is overwritten");
    }
}
