//! The store: what it offers and how it lies on disk.
//!
//! ```text
//! DIR/blobs/sha256/<hex>   content, 0444
//! DIR/records/<id>.json    one per image, written last
//! DIR/unpacked/<hex>/      one tree per diff id
//! DIR/tmp/                 whatever is not complete; downloads/ is resumed, the rest is removed at open
//! DIR/cache/               packages that recipes downloaded
//! ```

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use oblak_platform::fsx;
use tokio::io::AsyncRead;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::blobs::Blobs;
use crate::digest::Digest;
use crate::error::{Code, Context, ImageError, Result};
use crate::export::Export;
use crate::http::Http;
use crate::locks::Locks;
use crate::progress::{Progress, Reporter};
use crate::record::{ImageRecord, StoredPayload, StoredRecord};
use crate::registry::BasicAuth;
use crate::{import, recipe, unpack};

/// Partial downloads that nobody went on with are removed after this time.
const DOWNLOAD_TTL: Duration = Duration::from_secs(24 * 3600);

/// Where an image comes from.
#[derive(Clone)]
pub enum Source {
    /// A file of this node: disk, OCI tar or export of another store.
    File {
        /// Where it is.
        path: PathBuf,
    },
    /// The same by http or https.
    Url {
        /// `http://` or `https://`.
        url: String,
        /// Sent with every request to that host.
        headers: Vec<(String, String)>,
    },
    /// An OCI image of a registry.
    Registry {
        /// `host[:port]/repository[:tag|@digest]`.
        reference: String,
        /// User and password.
        auth: Option<BasicAuth>,
        /// http instead of https.
        insecure_http: bool,
    },
    /// A directory in the OCI image layout.
    OciLayout {
        /// Where it is.
        path: PathBuf,
        /// Which image, when it has several.
        tag: Option<String>,
    },
    /// A tar of such a directory, plain, gzip or zstd.
    OciTar {
        /// Where it is.
        path: PathBuf,
    },
    /// Built from distribution packages by a recipe of this product.
    Recipe {
        /// `tiny`, `busybox`, `debian-12`.
        name: String,
    },
}

/// Bounds of what is accepted.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Of one file or blob.
    pub blob_bytes: u64,
    /// Of the disk that a guest sees.
    pub virtual_bytes: u64,
    /// Of one unpacked layer.
    pub layer_bytes: u64,
    /// Entries of one layer.
    pub layer_entries: u64,
    /// Layers of one image.
    pub layers: usize,
}

impl Default for Limits {
    fn default() -> Self {
        const GIB: u64 = 1 << 30;
        Self {
            blob_bytes: 512 * GIB,
            virtual_bytes: 16 * 1024 * GIB,
            layer_bytes: 64 * GIB,
            layer_entries: 2_000_000,
            layers: 127,
        }
    }
}

/// Settings of a store.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Directory with recipes (`<name>/build.sh`) instead of those in the binary.
    pub recipes: Option<PathBuf>,
    /// Directory with results of recipes (`<name>/manifest.json`); taken instead of building.
    pub prebuilt: Option<PathBuf>,
    /// PEM file with further certificate authorities.
    pub extra_ca: Option<PathBuf>,
    /// Bounds.
    pub limits: Limits,
    /// Whether device nodes in layers are made; otherwise they are left out.
    pub device_nodes: bool,
}

impl Options {
    /// Defaults, with `OBLAK_IMAGE_CACHE` as the directory of results of recipes when it is set.
    #[must_use]
    pub fn from_env() -> Self {
        Self { prebuilt: std::env::var_os("OBLAK_IMAGE_CACHE").map(PathBuf::from), ..Self::default() }
    }
}

/// The images of a node. Cheap to clone.
#[derive(Clone)]
pub struct ImageStore {
    pub(crate) inner: Arc<Inner>,
}

pub(crate) struct Inner {
    pub dir: PathBuf,
    pub options: Options,
    pub blobs: Blobs,
    pub locks: Locks,
    pub http: Http,
    /// Records are read, changed and written under this lock.
    records: Mutex<()>,
    /// Keeps a second store out of the directory: it would remove what this one is writing.
    _lock: nix::fcntl::Flock<fs::File>,
}

impl ImageStore {
    /// Opens the store in `dir`, with the recipes of `recipes_dir` or else those in the binary.
    ///
    /// # Errors
    /// See [`ImageStore::open_with`].
    pub fn open(dir: &Path, recipes_dir: Option<&Path>) -> Result<Self> {
        Self::open_with(dir, Options { recipes: recipes_dir.map(Path::to_owned), ..Options::from_env() })
    }

    /// Opens the store in `dir`, making it when it is new, and removes what a crash left behind.
    ///
    /// # Errors
    /// `io`, `disk_full`, or `invalid` when the file with certificate authorities cannot be used.
    pub fn open_with(dir: &Path, options: Options) -> Result<Self> {
        fs::create_dir_all(dir).context(|| format!("cannot create {}", dir.display()))?;
        let dir = dir.canonicalize().context(|| format!("cannot open {}", dir.display()))?;
        // Passable but not readable where unprivileged qemu processes must reach a file whose digest they were told.
        for (path, mode) in [
            ("", 0o711),
            ("blobs", 0o711),
            ("blobs/sha256", 0o711),
            ("records", 0o700),
            ("unpacked", 0o700),
            ("tmp", 0o711),
            ("tmp/downloads", 0o700),
            ("cache", 0o700),
        ] {
            make_dir(&dir.join(path), mode)?;
        }
        let lock =
            fs::File::create(dir.join("lock")).context(|| format!("cannot create {}", dir.join("lock").display()))?;
        let lock = nix::fcntl::Flock::lock(lock, nix::fcntl::FlockArg::LockExclusiveNonblock)
            .map_err(|_| ImageError::new(Code::Invalid, format!("{} is in use by another process", dir.display())))?;
        let http = Http::new(options.extra_ca.clone());
        let blobs = Blobs::new(dir.clone());
        let inner = Inner { dir, options, blobs, locks: Locks::default(), http, records: Mutex::new(()), _lock: lock };
        let store = Self { inner: Arc::new(inner) };
        store.clean()?;
        Ok(store)
    }

    /// Where it is.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.inner.dir
    }

    /// Fetches or builds an image and stores it under the caller's `id`. Where `id` exists with the digest `expected`, or without one
    /// being given, nothing is done. Dropping the future or cancelling leaves at most a download that the next call resumes.
    ///
    /// # Errors
    /// Any [`Code`].
    pub async fn import(
        &self,
        id: &str,
        name: &str,
        source: Source,
        expected: Option<Digest>,
        progress: watch::Sender<Progress>,
        cancel: CancellationToken,
    ) -> Result<ImageRecord> {
        import::run(self, id, name, import::Input::Source(source), expected, progress, cancel).await
    }

    /// Stores an upload: a disk, an OCI tar or an export, told apart by content. `length` is checked when given. An image that was
    /// there under `id` is replaced.
    ///
    /// # Errors
    /// Any [`Code`]; `image_truncated` when the stream ends before `length`.
    #[allow(clippy::too_many_arguments, reason = "each is one independent fact of the upload")]
    pub async fn put_stream(
        &self,
        id: &str,
        name: &str,
        content: impl AsyncRead + Send + Unpin + 'static,
        length: Option<u64>,
        expected: Option<Digest>,
        progress: watch::Sender<Progress>,
        cancel: CancellationToken,
    ) -> Result<ImageRecord> {
        let input = import::Input::Stream { content: Box::new(content), length };
        import::run(self, id, name, input, expected, progress, cancel).await
    }

    /// The image, if it is here with all its blobs.
    ///
    /// # Errors
    /// `io` when the record cannot be read, `invalid` for an id that no image can have.
    pub fn get(&self, id: &str) -> Result<Option<ImageRecord>> {
        let Some(record) = self.read(id)?.filter(|r| !r.removed) else { return Ok(None) };
        if let Some(missing) = record.payload.blobs().iter().find(|d| !self.inner.blobs.has(d)) {
            tracing::warn!(image = id, blob = %missing, "image has lost a blob; it must be imported again");
            return Ok(None);
        }
        Ok(Some(record.public(&self.inner.dir)))
    }

    /// All images, by id.
    ///
    /// # Errors
    /// `io` when a record cannot be read.
    pub fn list(&self) -> Result<Vec<ImageRecord>> {
        Ok(self.records()?.into_iter().filter(|r| !r.removed).map(|r| r.public(&self.inner.dir)).collect())
    }

    /// Removes an image; content that no other image and no holder uses goes too. Harmless when it is not here.
    ///
    /// # Errors
    /// `io`.
    pub fn remove(&self, id: &str) -> Result<()> {
        self.change(id, |record| record.removed = true)?;
        crate::download::forget(&self.inner.dir, id);
        self.collect()
    }

    /// Says that `holder` (an instance, a volume) runs from the image: its content stays until [`ImageStore::release`], even when the
    /// image is removed. Kept on disk; repeating it is harmless.
    ///
    /// # Errors
    /// `not_found`, `io`.
    pub fn hold(&self, id: &str, holder: &str) -> Result<ImageRecord> {
        let held = self.change(id, |record| {
            if !record.removed {
                record.holders.insert(holder.to_owned());
            }
        })?;
        held.filter(|r| r.holders.contains(holder)).map(|r| r.public(&self.inner.dir)).ok_or_else(|| not_found(id))
    }

    /// Ends all that `holder` holds. Harmless when it holds nothing.
    ///
    /// # Errors
    /// `io`.
    pub fn release(&self, holder: &str) -> Result<()> {
        for record in self.records()?.into_iter().filter(|r| r.holders.contains(holder)) {
            self.change(&record.id, |r| {
                r.holders.remove(holder);
            })?;
        }
        self.collect()
    }

    /// The trees of an OCI image, lowest first, unpacking those that are missing.
    ///
    /// # Errors
    /// `not_found`, `unsupported_format` for an image without layers, and what unpacking can say.
    pub async fn unpack_layers(&self, id: &str) -> Result<Vec<PathBuf>> {
        let record = self.read(id)?.ok_or_else(|| not_found(id))?;
        let StoredPayload::Oci { layers, .. } = &record.payload else {
            return Err(ImageError::new(
                Code::UnsupportedFormat,
                format!("image {} is a disk; only OCI images have layers", record.name),
            ));
        };
        let cancel = CancellationToken::new();
        let _stop = cancel.clone().drop_guard();
        unpack::layers(self, layers, &Arc::new(Reporter::silent(cancel))).await
    }

    /// The image as one stream for another store, readable from any offset.
    ///
    /// # Errors
    /// `not_found`, `io`.
    pub fn export(&self, id: &str) -> Result<Export> {
        let record = self.read(id)?.filter(|r| !r.removed).ok_or_else(|| not_found(id))?;
        Export::of(&self.inner, &record)
    }

    /// Reads every blob of the image again and compares digests.
    ///
    /// # Errors
    /// `not_found`, `image_corrupt` naming the blob, `io`.
    pub async fn verify(&self, id: &str) -> Result<()> {
        let record = self.read(id)?.filter(|r| !r.removed).ok_or_else(|| not_found(id))?;
        let cancel = CancellationToken::new();
        let _stop = cancel.clone().drop_guard();
        let store = self.clone();
        blocking(move || {
            let reporter = Reporter::silent(cancel);
            for digest in record.payload.blobs() {
                let (found, _) = crate::blobs::hash(&store.inner.blobs.path(&digest), &reporter)?;
                if found != digest {
                    let what =
                        format!("image {}: blob {digest} was changed on disk; import the image again", record.name);
                    return Err(ImageError::new(Code::ImageCorrupt, what));
                }
            }
            Ok(())
        })
        .await
    }

    /// Names of the recipes that [`Source::Recipe`] can build.
    #[must_use]
    pub fn recipes(&self) -> Vec<String> {
        recipe::names(self.inner.options.recipes.as_deref())
    }

    /// Writes a finished record; whoever held the one before still does.
    pub(crate) fn write(&self, mut record: StoredRecord) -> Result<ImageRecord> {
        let path = self.record_path(&record.id)?;
        let _lock = self.inner.records.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(before) = fsx::read_json::<StoredRecord>(&path).context(|| "cannot read the record".into())? {
            if !before.holders.is_empty() && before.digest != record.digest {
                // Guests run from the old content: its record lives on under another name until they let go.
                let kept =
                    StoredRecord { id: format!("{}.{}", before.id, before.digest.hex()), removed: true, ..before };
                let kept_path = self.record_path(&kept.id)?;
                fsx::write_json(&kept_path, &kept).context(|| format!("cannot write {}", kept_path.display()))?;
            } else {
                record.holders = before.holders;
            }
        }
        fsx::write_json(&path, &record).context(|| format!("cannot write {}", path.display()))?;
        Ok(record.public(&self.inner.dir))
    }

    fn change(&self, id: &str, edit: impl FnOnce(&mut StoredRecord)) -> Result<Option<StoredRecord>> {
        let path = self.record_path(id)?;
        let _lock = self.inner.records.lock().unwrap_or_else(PoisonError::into_inner);
        let read = fsx::read_json::<StoredRecord>(&path).context(|| format!("cannot read the record of image {id}"))?;
        let Some(mut record) = read else { return Ok(None) };
        let before = record.clone();
        edit(&mut record);
        if record.removed && record.holders.is_empty() {
            fsx::remove_file_if_exists(&path).context(|| format!("cannot remove {}", path.display()))?;
            return Ok(None);
        }
        if record != before {
            fsx::write_json(&path, &record).context(|| format!("cannot write {}", path.display()))?;
        }
        Ok(Some(record))
    }

    pub(crate) fn read(&self, id: &str) -> Result<Option<StoredRecord>> {
        let path = self.record_path(id)?;
        fsx::read_json(&path).context(|| format!("cannot read the record of image {id}"))
    }

    fn records(&self) -> Result<Vec<StoredRecord>> {
        let dir = self.inner.dir.join("records");
        let mut found: Vec<StoredRecord> = Vec::new();
        for entry in fs::read_dir(&dir).context(|| format!("cannot read {}", dir.display()))? {
            let path = entry.context(|| format!("cannot read {}", dir.display()))?.path();
            if path.extension().is_some_and(|e| e == "json") {
                found.extend(
                    fsx::read_json::<StoredRecord>(&path).context(|| format!("cannot read {}", path.display()))?,
                );
            }
        }
        found.sort_by(|a, b| a.id.cmp(&b.id));
        Ok(found)
    }

    fn record_path(&self, id: &str) -> Result<PathBuf> {
        let good = !id.is_empty()
            && id.len() <= 128
            && !id.starts_with('.')
            && id.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b));
        if !good {
            return Err(ImageError::new(Code::Invalid, "an image id has letters, digits, '-', '_' and '.' only"));
        }
        Ok(self.inner.dir.join("records").join(format!("{id}.json")))
    }

    pub(crate) fn collect(&self) -> Result<()> {
        let freed = self.inner.blobs.collect(|| {
            let records = self.records()?;
            let blobs = records.iter().flat_map(|r| r.payload.blobs()).collect();
            let trees = records.iter().flat_map(|r| r.payload.trees()).collect();
            Ok((blobs, trees))
        })?;
        if freed > 0 {
            tracing::info!(bytes = freed, "removed unused image content");
        }
        Ok(())
    }

    /// A private directory below `tmp/` that goes with its value. Passable: the examiner of disks runs unprivileged.
    pub(crate) fn work_dir(&self) -> Result<tempfile::TempDir> {
        use std::os::unix::fs::PermissionsExt;
        tempfile::Builder::new()
            .prefix("work-")
            .permissions(fs::Permissions::from_mode(0o711))
            .tempdir_in(self.inner.dir.join("tmp"))
            .context(|| "cannot make a temporary directory".into())
    }

    fn clean(&self) -> Result<()> {
        let tmp = self.inner.dir.join("tmp");
        let describe = || format!("cannot clean {}", tmp.display());
        for entry in fs::read_dir(&tmp).context(describe)? {
            let path = entry.context(describe)?.path();
            if !path.ends_with("downloads") {
                let result = if path.is_dir() && !path.is_symlink() {
                    fs::remove_dir_all(&path)
                } else {
                    fs::remove_file(&path)
                };
                result.context(describe)?;
            }
        }
        let downloads = tmp.join("downloads");
        for entry in fs::read_dir(&downloads).context(describe)?.flatten() {
            let old = entry
                .metadata()
                .and_then(|m| m.modified())
                .is_ok_and(|t| SystemTime::now().duration_since(t).is_ok_and(|age| age > DOWNLOAD_TTL));
            if old {
                fsx::remove_file_if_exists(&entry.path()).context(describe)?;
            }
        }
        // Half-written records of a crash; write_atomic names them so.
        for entry in fs::read_dir(self.inner.dir.join("records")).context(describe)?.flatten() {
            if entry.file_name().to_string_lossy().ends_with(".tmp") {
                fsx::remove_file_if_exists(&entry.path()).context(describe)?;
            }
        }
        self.collect()
    }
}

fn make_dir(path: &Path, mode: u32) -> Result<()> {
    use std::os::unix::fs::PermissionsExt;
    fs::create_dir_all(path)
        .and_then(|()| fs::set_permissions(path, fs::Permissions::from_mode(mode)))
        .context(|| format!("cannot create {}", path.display()))
}

pub(crate) fn not_found(id: &str) -> ImageError {
    ImageError::new(Code::NotFound, format!("image {id} is not on this node"))
}

/// Runs blocking work; a panic there is a panic here.
pub(crate) async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
        Err(_) => Err(ImageError::cancelled()),
    }
}
