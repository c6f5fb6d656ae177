//! Durable files: a reader sees the old content or the new one, never half, also after a power cut.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use serde::{Serialize, de::DeserializeOwned};

/// Writes `bytes` to `path` with `mode`: temporary file, fsync, rename, fsync of the directory.
///
/// # Errors
/// Any I/O error; the old file is untouched then.
pub fn write_atomic(path: &Path, bytes: &[u8], mode: u32) -> io::Result<()> {
    write_renamed(path, bytes, mode, true)
}

fn write_renamed(path: &Path, bytes: &[u8], mode: u32, durable: bool) -> io::Result<()> {
    let dir = path.parent().ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "path has no parent"))?;
    let name = path.file_name().ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "path has no file name"))?;
    let temp = dir.join(format!(".{}.{}.tmp", name.to_string_lossy(), uuid::Uuid::new_v4().simple()));
    let result = (|| {
        let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(&temp)?;
        file.write_all(bytes)?;
        if !durable {
            return std::fs::rename(&temp, path);
        }
        file.sync_all()?;
        std::fs::rename(&temp, path)?;
        sync_dir(dir)
    })();
    if result.is_err() {
        let _ = std::fs::remove_file(&temp);
    }
    result
}

/// Removes what a [`write_atomic`] that was killed has left of the files `names` in `dir`.
///
/// # Errors
/// Any I/O error; a directory that does not exist has nothing left.
pub fn remove_temporaries(dir: &Path, names: &[&str]) -> io::Result<()> {
    let entries = match std::fs::read_dir(dir) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        entries => entries?,
    };
    for entry in entries {
        let file = entry?.file_name().to_string_lossy().into_owned();
        let of = file.strip_prefix('.').and_then(|f| f.strip_suffix(".tmp")).and_then(|f| f.rsplit_once('.'));
        if of.is_some_and(|(name, _)| names.contains(&name)) {
            remove_file_if_exists(&dir.join(file))?;
        }
    }
    Ok(())
}

/// Makes renames and removals in `dir` durable.
///
/// # Errors
/// Any I/O error.
pub fn sync_dir(dir: &Path) -> io::Result<()> {
    File::open(dir)?.sync_all()
}

/// [`write_atomic`] of pretty JSON with mode 0600.
///
/// # Errors
/// Any I/O error.
pub fn write_json<T: Serialize>(path: &Path, value: &T) -> io::Result<()> {
    write_atomic(path, &serde_json::to_vec_pretty(value)?, 0o600)
}

/// As [`write_json`], but only what survives the death of the writer, not a power cut: for what a power cut makes worthless.
///
/// # Errors
/// Any I/O error.
pub fn write_json_until_boot<T: Serialize>(path: &Path, value: &T) -> io::Result<()> {
    write_renamed(path, &serde_json::to_vec_pretty(value)?, 0o600, false)
}

/// Reads JSON; `None` when the file does not exist.
///
/// # Errors
/// Any other I/O error, `InvalidData` with the path when the content is not what is expected.
pub fn read_json<T: DeserializeOwned>(path: &Path) -> io::Result<Option<T>> {
    match std::fs::read(path) {
        Ok(bytes) => serde_json::from_slice(&bytes)
            .map(Some)
            .map_err(|e| io::Error::new(io::ErrorKind::InvalidData, format!("{}: {e}", path.display()))),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(e),
    }
}

/// Creates a directory and its parents with `mode` (for those that are new).
///
/// # Errors
/// Any I/O error.
pub fn create_dir_private(path: &Path, mode: u32) -> io::Result<()> {
    use std::os::unix::fs::DirBuilderExt;
    std::fs::DirBuilder::new().recursive(true).mode(mode).create(path)
}

/// Removes a file; it is fine when it is not there.
///
/// # Errors
/// Any other I/O error.
pub fn remove_file_if_exists(path: &Path) -> io::Result<()> {
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    }
}

/// Removes a directory tree; it is fine when it is not there.
///
/// # Errors
/// Any other I/O error.
pub fn remove_dir_if_exists(path: &Path) -> io::Result<()> {
    match std::fs::remove_dir_all(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_killed_writer_left_goes_by_the_name_of_its_file() {
        let dir = tempfile::tempdir().unwrap();
        for name in [".a.json.0f.tmp", ".b.json.0f.tmp", ".a.json.tmp", "a.json", "a.json.0f.tmp"] {
            std::fs::write(dir.path().join(name), "").unwrap();
        }
        remove_temporaries(dir.path(), &["a.json", "c.json"]).unwrap();
        let mut left: Vec<_> = std::fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        left.sort();
        assert_eq!(left, [".a.json.tmp", ".b.json.0f.tmp", "a.json", "a.json.0f.tmp"]);
        remove_temporaries(&dir.path().join("none"), &["a.json"]).unwrap();
    }

    #[test]
    fn replaces_whole_files() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.json");
        assert_eq!(read_json::<u32>(&path).unwrap(), None);
        write_json(&path, &1u32).unwrap();
        write_json(&path, &2u32).unwrap();
        assert_eq!(read_json::<u32>(&path).unwrap(), Some(2));
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
        std::fs::write(&path, "x").unwrap();
        assert!(read_json::<u32>(&path).unwrap_err().to_string().contains("a.json"));
    }
}
