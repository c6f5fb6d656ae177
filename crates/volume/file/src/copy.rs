//! Copies of files and directories that share blocks where the file system can.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::{Command, Stdio};

pub use oblak_platform::copy::file;

/// Most files of a directory volume that are counted.
const MAX_COUNTED: usize = 1_000_000;

/// Whether files in `dir` can share blocks.
///
/// # Errors
/// Any I/O error but "not supported".
pub fn can_share(dir: &Path) -> io::Result<bool> {
    let (from, to) = (dir.join(".probe-a"), dir.join(".probe-b"));
    let result = (|| {
        std::fs::write(&from, [1; 4096])?;
        let target = OpenOptions::new().write(true).create(true).truncate(true).open(&to)?;
        oblak_platform::copy::clone(&File::open(&from)?, &target)
    })();
    for path in [from, to] {
        let _ = oblak_platform::fsx::remove_file_if_exists(&path);
    }
    result
}

/// Copies a directory with owners, modes, links, extended attributes; links are not followed and other file systems not entered.
///
/// # Errors
/// What cp says, with `StorageFull` for a full disk.
pub fn tree(from: &Path, to: &Path) -> io::Result<()> {
    let mut command = Command::new("cp");
    command.args(["--archive", "--reflink=auto", "--sparse=auto", "--one-file-system", "--no-target-directory", "--"]);
    command.arg(from).arg(to).env("LC_ALL", "C").stdin(Stdio::null());
    let output = command.output()?;
    if output.status.success() {
        return Ok(());
    }
    let text = String::from_utf8_lossy(&output.stderr);
    let line = text.lines().next().unwrap_or("cp failed").to_string();
    if text.contains("No space left on device") || text.contains("Disk quota exceeded") {
        return Err(io::Error::from_raw_os_error(libc::ENOSPC));
    }
    Err(io::Error::other(line))
}

/// Bytes that a file or everything below a directory takes on the disk.
pub fn used(path: &Path) -> u64 {
    let Ok(meta) = std::fs::symlink_metadata(path) else { return 0 };
    let mut bytes = meta.blocks() * 512;
    let mut todo = if meta.is_dir() { vec![path.to_path_buf()] } else { vec![] };
    let mut counted = 0;
    while let Some(dir) = todo.pop() {
        let Ok(entries) = std::fs::read_dir(&dir) else { continue };
        for entry in entries.flatten() {
            counted += 1;
            if counted > MAX_COUNTED {
                return bytes;
            }
            let Ok(meta) = entry.metadata() else { continue };
            bytes += meta.blocks() * 512;
            if meta.is_dir() {
                todo.push(entry.path());
            }
        }
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn trees_keep_links_and_modes() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let (from, to) = (dir.path().join("from"), dir.path().join("to"));
        std::fs::create_dir(&from).unwrap();
        std::fs::write(from.join("a"), "x").unwrap();
        std::fs::set_permissions(from.join("a"), std::fs::Permissions::from_mode(0o4711)).unwrap();
        std::os::unix::fs::symlink("/etc/shadow", from.join("link")).unwrap();
        tree(&from, &to).unwrap();
        assert_eq!(std::fs::metadata(to.join("a")).unwrap().permissions().mode() & 0o7777, 0o4711);
        assert_eq!(std::fs::read_link(to.join("link")).unwrap(), Path::new("/etc/shadow"));
        assert!(used(&to) >= 4096);
        assert!(tree(&dir.path().join("none"), &dir.path().join("x")).is_err());
    }
}
