//! Blobs: files named by their digest, written once, read only.

use std::collections::HashMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use oblak_platform::fsx;

use crate::digest::{Digest, Hashing};
use crate::error::{Code, Context, ImageError, Result};
use crate::progress::Reporter;
use crate::record;

/// Copies go in pieces of this many bytes; a cancelled copy ends after one.
pub(crate) const CHUNK: usize = 256 * 1024;

type PinMap = Arc<Mutex<HashMap<Digest, usize>>>;

/// The blobs of a store and the trees unpacked from them.
#[derive(Clone)]
pub(crate) struct Blobs {
    dir: PathBuf,
    pins: PinMap,
}

/// Content that the collector must not take although no record names it yet.
pub(crate) struct Pins {
    held: Vec<Digest>,
    map: PinMap,
}

impl Pins {
    /// Keeps `digest` until dropped. Pin first, look afterwards.
    pub fn add(&mut self, digest: &Digest) {
        *self.map.lock().unwrap_or_else(PoisonError::into_inner).entry(digest.clone()).or_default() += 1;
        self.held.push(digest.clone());
    }
}

impl Drop for Pins {
    fn drop(&mut self) {
        let mut map = self.map.lock().unwrap_or_else(PoisonError::into_inner);
        for digest in &self.held {
            if let Some(count) = map.get_mut(digest) {
                *count -= 1;
                if *count == 0 {
                    map.remove(digest);
                }
            }
        }
    }
}

impl Blobs {
    pub fn new(dir: PathBuf) -> Self {
        Self { dir, pins: PinMap::default() }
    }

    pub fn pins(&self) -> Pins {
        Pins { held: Vec::new(), map: self.pins.clone() }
    }

    pub fn path(&self, digest: &Digest) -> PathBuf {
        record::blob_path(&self.dir, digest)
    }

    pub fn tree(&self, diff_id: &Digest) -> PathBuf {
        record::tree_path(&self.dir, diff_id)
    }

    pub fn has(&self, digest: &Digest) -> bool {
        self.path(digest).is_file()
    }

    /// Makes the file `temp`, whose digest the caller has just computed, a blob.
    pub fn commit(&self, temp: &Path, digest: &Digest) -> Result<PathBuf> {
        let path = self.path(digest);
        if path.is_file() {
            let _ = fs::remove_file(temp);
            return Ok(path);
        }
        let store = || -> io::Result<()> {
            // Readable by unprivileged qemu processes, writable by nobody: blobs are backing files of guests.
            fs::set_permissions(temp, fs::Permissions::from_mode(0o444))?;
            nix::unistd::chown(temp, Some(nix::unistd::Uid::effective()), Some(nix::unistd::Gid::effective()))?;
            File::open(temp)?.sync_all()?;
            fs::rename(temp, &path)?;
            fsx::sync_dir(&self.dir.join("blobs/sha256"))
        };
        store().context(|| format!("cannot store blob {digest}"))?;
        Ok(path)
    }

    pub fn put_bytes(&self, temp_dir: &Path, bytes: &[u8]) -> Result<Digest> {
        let digest = Digest::of(bytes);
        let temp = temp_dir.join(digest.hex());
        fs::write(&temp, bytes).context(|| format!("cannot write blob {digest}"))?;
        self.commit(&temp, &digest)?;
        Ok(digest)
    }

    /// Copies `source` to a blob that must have the digest `expected`.
    pub fn ingest(&self, source: &Path, expected: &Digest, temp_dir: &Path, reporter: &Reporter) -> Result<PathBuf> {
        if self.has(expected) {
            reporter.add(fs::metadata(source).map_or(0, |m| m.len()));
            return Ok(self.path(expected));
        }
        let temp = temp_dir.join(expected.hex());
        let (found, _) = copy(source, &temp, u64::MAX, reporter)?;
        if found != *expected {
            let _ = fs::remove_file(&temp);
            return Err(ImageError::new(
                Code::ImageCorrupt,
                format!("{} should have the digest {expected} but has {found}", source.display()),
            ));
        }
        self.commit(&temp, expected)
    }

    /// Removes every blob and tree that `used` does not name and that no import holds. `used` is asked under the lock that pins take.
    pub fn collect(&self, used: impl FnOnce() -> Result<(Vec<Digest>, Vec<Digest>)>) -> Result<u64> {
        let pins = self.pins.lock().unwrap_or_else(PoisonError::into_inner);
        let (blobs, trees) = used()?;
        let mut freed = 0;
        let mut sweep = |dir: PathBuf, keep: &[Digest]| -> Result<()> {
            for entry in fs::read_dir(&dir).context(|| format!("cannot read {}", dir.display()))? {
                let entry = entry.context(|| format!("cannot read {}", dir.display()))?;
                let name = entry.file_name();
                let Ok(digest) = format!("sha256:{}", name.to_string_lossy()).parse::<Digest>() else { continue };
                if keep.contains(&digest) || pins.contains_key(&digest) {
                    continue;
                }
                let meta = entry.metadata().context(|| format!("cannot read {}", entry.path().display()))?;
                if meta.is_dir() {
                    fsx::remove_dir_if_exists(&entry.path())
                } else {
                    freed += meta.len();
                    fsx::remove_file_if_exists(&entry.path())
                }
                .context(|| format!("cannot remove {}", entry.path().display()))?;
            }
            Ok(())
        };
        sweep(self.dir.join("blobs/sha256"), &blobs)?;
        sweep(self.dir.join("unpacked"), &trees)?;
        Ok(freed)
    }
}

/// Copies a regular file, hashing it; err when it is longer than `limit`.
pub(crate) fn copy(source: &Path, to: &Path, limit: u64, reporter: &Reporter) -> Result<(Digest, u64)> {
    let shown = source.display();
    let input = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC).open(source).map_err(
        |e| match e.kind() {
            io::ErrorKind::NotFound => ImageError::new(Code::NotFound, format!("there is no file {shown}")),
            _ => ImageError::io(&format!("cannot open {shown}"), &e),
        },
    )?;
    let meta = input.metadata().context(|| format!("cannot read {shown}"))?;
    if !meta.is_file() {
        return Err(ImageError::new(Code::Invalid, format!("{shown} is not a regular file")));
    }
    if meta.len() > limit {
        return Err(too_big(&shown.to_string(), meta.len(), limit));
    }
    let mut output = create(to)?;
    let (digest, count) =
        pump(input, &mut output, limit, reporter).map_err(|e| ImageError::io(&format!("cannot copy {shown}"), &e))?;
    output.sync_all().context(|| format!("cannot write {}", to.display()))?;
    Ok((digest, count))
}

/// Hashes a file.
pub(crate) fn hash(path: &Path, reporter: &Reporter) -> Result<(Digest, u64)> {
    let input = File::open(path).context(|| format!("cannot open {}", path.display()))?;
    pump(input, io::sink(), u64::MAX, reporter)
        .map_err(|e| ImageError::io(&format!("cannot read {}", path.display()), &e))
}

fn pump(mut input: impl Read, mut output: impl Write, limit: u64, reporter: &Reporter) -> io::Result<(Digest, u64)> {
    let mut hashing = Hashing::new(&mut output);
    let mut buffer = vec![0; CHUNK];
    loop {
        reporter.check()?;
        let n = match input.read(&mut buffer) {
            Ok(0) => break,
            Ok(n) => n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            Err(e) => return Err(e),
        };
        hashing.write_all(&buffer[..n])?;
        if hashing.count > limit {
            return Err(too_big("the content", hashing.count, limit).into());
        }
        reporter.add(n as u64);
    }
    let (_, digest, count) = hashing.finish();
    Ok((digest, count))
}

pub(crate) fn create(path: &Path) -> Result<File> {
    OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(path)
        .context(|| format!("cannot create {}", path.display()))
}

pub(crate) fn too_big(what: &str, size: u64, limit: u64) -> ImageError {
    ImageError::new(Code::ImageTooBig, format!("{what} has {size} bytes or more; the limit is {limit}"))
}
