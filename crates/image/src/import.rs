//! The steps of an import: fetch to `tmp/`, recognise, examine, store blobs, unpack, write the record.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use oblak_platform::driver::BoxRead;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::archive::{self, Kind};
use crate::blobs::{self, Pins};
use crate::digest::Digest;
use crate::disk::{self, Detected};
use crate::download::{self, Wanted};
use crate::error::{Code, Context, ImageError, Result};
use crate::http;
use crate::oci::{self, Resolved};
use crate::progress::{Phase, Progress, Reporter};
use crate::recipe::{self, Content};
use crate::record::{DiskFormat, ImageRecord, StoredLayer, StoredPayload, StoredRecord};
use crate::reference::Reference;
use crate::registry::Registry;
use crate::store::{ImageStore, Source, blocking};
use crate::unpack;

/// Version of the records.
const SCHEMA: u32 = 1;

/// Where bytes come from.
pub(crate) enum Input {
    Source(Source),
    Stream { content: BoxRead, length: Option<u64> },
}

/// One import.
struct Job<'a> {
    store: &'a ImageStore,
    id: &'a str,
    work: tempfile::TempDir,
    expected: Option<Digest>,
    reporter: Arc<Reporter>,
    pins: Pins,
}

/// What will be the record.
struct Found {
    payload: StoredPayload,
    digest: Digest,
    virtual_bytes: u64,
    properties: BTreeMap<String, String>,
}

pub(crate) async fn run(
    store: &ImageStore,
    id: &str,
    name: &str,
    input: Input,
    expected: Option<Digest>,
    progress: watch::Sender<Progress>,
    cancel: CancellationToken,
) -> Result<ImageRecord> {
    // Blocking work of a dropped import ends too.
    let cancel = cancel.child_token();
    let _stop = cancel.clone().drop_guard();
    let reporter = Arc::new(Reporter::new(progress, cancel.clone()));
    reporter.check()?;
    let _one = store.inner.locks.hold(format!("image:{id}"), &cancel).await?;
    let origin = origin(&input);
    if let Input::Source(_) = input
        && let Some(record) = present(store, id, &origin, expected.as_ref())?
    {
        reporter.phase(Phase::Done, None, "");
        return Ok(record);
    }
    let work = store.work_dir()?;
    let job = Job { store, id, work, expected, reporter, pins: store.inner.blobs.pins() };
    let result = job.finish(name, input, origin).await;
    if result.is_err() {
        // Blobs of an image that failed late belong to nobody.
        if let Err(error) = store.collect() {
            tracing::warn!(%error, "content of a failed import stays until the next collection");
        }
    }
    result
}

/// The image of an earlier import of the same.
fn present(store: &ImageStore, id: &str, origin: &str, expected: Option<&Digest>) -> Result<Option<ImageRecord>> {
    let Some(record) = store.get(id)? else { return Ok(None) };
    let same = match expected {
        Some(digest) => {
            record.digest == *digest || record.properties.get("source_digest").is_some_and(|d| d == digest.as_str())
        }
        None => record.properties.get("source").is_some_and(|s| s == origin),
    };
    Ok(same.then_some(record))
}

/// For people, and to tell whether a source has changed. Holds no secrets.
fn origin(input: &Input) -> String {
    match input {
        Input::Stream { .. } => "upload".into(),
        Input::Source(source) => match source {
            Source::File { path } | Source::OciTar { path } => format!("file:{}", path.display()),
            Source::Url { url, .. } => url.split(['?', '#']).next().unwrap_or_default().to_owned(),
            Source::Registry { reference, .. } => format!("registry:{reference}"),
            Source::OciLayout { path, tag } => {
                format!("layout:{}:{}", path.display(), tag.as_deref().unwrap_or_default())
            }
            Source::Recipe { name } => format!("recipe:{name}"),
        },
    }
}

impl Job<'_> {
    /// All of it; the end of the job ends its hold on content that no record names.
    async fn finish(mut self, name: &str, input: Input, origin: String) -> Result<ImageRecord> {
        let mut found = self.fetch(input).await?;
        if let StoredPayload::Oci { layers, .. } = &found.payload {
            self.reporter.phase(Phase::Unpacking, None, format!("unpacking {} layers", layers.len()));
            unpack::layers(self.store, layers, &self.reporter).await?;
        }
        found.properties.insert("source".into(), origin);
        self.reporter.check()?;
        let record = self.record(name, found)?;
        self.reporter.phase(Phase::Done, None, "");
        Ok(record)
    }

    async fn fetch(&mut self, input: Input) -> Result<Found> {
        let limit = self.store.inner.options.limits.blob_bytes;
        let target = self.work.path().join("content");
        match input {
            Input::Stream { content, length } => {
                self.spool(content, length, &target, limit).await?;
                self.content(target).await
            }
            Input::Source(Source::File { path } | Source::OciTar { path }) => {
                let total = std::fs::metadata(&path).ok().map(|m| m.len());
                self.reporter.phase(Phase::Downloading, total, format!("copying {}", path.display()));
                let (reporter, to) = (self.reporter.clone(), target.clone());
                blocking(move || blobs::copy(&path, &to, limit, &reporter)).await?;
                self.content(target).await
            }
            Input::Source(Source::Url { url, headers }) => {
                self.download(&url, &headers, &target, limit).await?;
                self.content(target).await
            }
            Input::Source(Source::Registry { reference, auth, insecure_http }) => {
                let inner = &self.store.inner;
                let registry = Registry::new(inner, Reference::parse(&reference)?, auth, insecure_http);
                let resolved = registry.resolve(&self.reporter).await?;
                self.expect(&Digest::of(&resolved.manifest_bytes))?;
                resolved.manifest.layers.iter().for_each(|l| self.pins.add(&l.digest));
                registry.layers(&resolved.manifest, self.id, self.work.path(), &self.reporter).await?;
                self.oci(resolved).await
            }
            Input::Source(Source::OciLayout { path, tag }) => self.layout(&path, tag.as_deref()).await,
            Input::Source(Source::Recipe { name }) => self.recipe(&name).await,
        }
    }

    async fn spool(&self, mut content: BoxRead, length: Option<u64>, target: &Path, limit: u64) -> Result<()> {
        if length.is_some_and(|l| l > limit) {
            return Err(blobs::too_big("the upload", length.unwrap_or(0), limit));
        }
        self.reporter.phase(Phase::Downloading, length, "receiving the upload");
        let describe = || "cannot store the upload".to_owned();
        let mut file = tokio::fs::File::from_std(blobs::create(target)?);
        let mut buffer = vec![0; blobs::CHUNK];
        let mut got = 0;
        loop {
            let n = tokio::select! {
                n = content.read(&mut buffer) => n.map_err(|e| ImageError::new(Code::Network, format!("the upload broke: {e}")))?,
                () = self.reporter.cancel().cancelled() => return Err(ImageError::cancelled()),
            };
            if n == 0 {
                break;
            }
            got += n as u64;
            if got > limit {
                return Err(blobs::too_big("the upload", got, limit));
            }
            file.write_all(&buffer[..n]).await.context(describe)?;
            self.reporter.add(n as u64);
        }
        file.flush().await.context(describe)?;
        match length {
            Some(length) if length != got => Err(ImageError::new(
                Code::ImageTruncated,
                format!("the upload has {got} bytes instead of {length}; send it again"),
            )),
            _ => Ok(()),
        }
    }

    async fn download(&self, url: &str, headers: &[(String, String)], target: &Path, limit: u64) -> Result<()> {
        let uri = http::parse_url(url)?;
        // Another checksum is another content, even at the same address.
        let key = download::key_of(&format!("{url}\n{}", self.expected.as_ref().map_or("", Digest::as_str)));
        let inner = &self.store.inner;
        let _one = inner.locks.hold(format!("download:{key}"), self.reporter.cancel()).await?;
        let wanted = Wanted { uri, headers: http::header_map(headers)?, key, image: self.id, limit, immutable: false };
        self.reporter.phase(Phase::Downloading, None, format!("downloading {}", download::shown(&wanted.uri)));
        let part = download::fetch(&inner.http, &inner.dir, &wanted, &self.reporter).await?;
        std::fs::rename(&part, target).context(|| "cannot store the download".into())?;
        download::discard(&part);
        Ok(())
    }

    /// A whole file in the work directory, of which nothing is known.
    async fn content(&mut self, path: PathBuf) -> Result<Found> {
        let detected = disk::detect_file(&path)?;
        if !matches!(detected, Detected::Tar | Detected::Gzip | Detected::Zstd) && self.expected.is_some() {
            // Before the format: who gave a checksum wants to hear first that these are other bytes.
            self.expect(&self.hash(&path).await?)?;
        }
        match detected {
            Detected::Disk(format) => self.disk("content", format).await,
            Detected::Tar | Detected::Gzip | Detected::Zstd => self.archive(path).await,
            Detected::Refused(why) => Err(ImageError::new(Code::UnsupportedFormat, format!("the content is {why}"))),
            Detected::Unknown => Err(ImageError::new(
                Code::UnsupportedFormat,
                "the content is neither qcow2, nor vmdk, nor a raw disk with a partition table or file system, nor an OCI archive",
            )),
        }
    }

    async fn archive(&mut self, path: PathBuf) -> Result<Found> {
        self.reporter.phase(Phase::Checking, None, "reading the archive");
        let dir = self.work.path().join("layout");
        let (file, to, limits) = (path.clone(), dir.clone(), self.store.inner.options.limits.clone());
        let reporter = self.reporter.clone();
        let kind = blocking(move || archive::extract(&file, &to, &limits, &reporter)).await;
        if !matches!(kind, Ok(Kind::Export)) && self.expected.is_some() {
            self.expect(&self.hash(&path).await?)?;
        }
        let kind = kind?;
        std::fs::remove_file(&path).context(|| "cannot remove a temporary file".into())?;
        match kind {
            Kind::OciLayout => {
                self.expected = None;
                self.layout(&dir, None).await
            }
            Kind::Export => self.exported(&dir).await,
        }
    }

    /// An export of another node: its word is taken for names only, digests are computed and disks examined anew.
    async fn exported(&mut self, dir: &Path) -> Result<Found> {
        let path = dir.join(archive::RECORD);
        let bytes = std::fs::read(&path).context(|| "cannot read the export".into())?;
        let sent: StoredRecord = serde_json::from_slice(&bytes).map_err(|e| {
            ImageError::new(Code::ImageCorrupt, format!("the record of the exported image cannot be read: {e}"))
        })?;
        if sent.schema != SCHEMA {
            return Err(ImageError::new(
                Code::UnsupportedFormat,
                "the image was exported by another version of this product",
            ));
        }
        let blob = |d: &Digest| dir.join("blobs/sha256").join(d.hex());
        let mut found = match &sent.payload {
            StoredPayload::Disk { format, blob: digest } => {
                std::fs::rename(blob(digest), self.work.path().join("content"))
                    .map_err(|_| ImageError::new(Code::ImageTruncated, "the export lacks its disk"))?;
                self.disk("content", *format).await?
            }
            StoredPayload::Kernel { kernel, initrd, cmdline, disk, disk_format } => {
                let file = |d: &Digest| (blob(d), d.clone());
                let parts = Parts {
                    kernel: file(kernel),
                    initrd: initrd.as_ref().map(file),
                    disk: disk.as_ref().map(file),
                    disk_format: *disk_format,
                    cmdline: cmdline.clone(),
                };
                self.kernel(parts).await?
            }
            StoredPayload::Oci { manifest, config_blob, .. } => {
                let read = |d: &Digest| {
                    std::fs::read(blob(d))
                        .map_err(|_| ImageError::new(Code::ImageTruncated, format!("the export lacks blob {d}")))
                };
                let manifest_bytes = read(manifest)?;
                let oci::Document::Manifest(parsed) = oci::Document::parse(&manifest_bytes)? else {
                    return Err(ImageError::new(Code::ImageCorrupt, "the export holds an index instead of a manifest"));
                };
                parsed.check(&self.store.inner.options.limits)?;
                let config_bytes = read(config_blob)?;
                oci::verify(&config_bytes, &parsed.config)?;
                self.ingest_layers(dir, &parsed).await?;
                self.oci(Resolved { manifest_bytes, manifest: parsed, config_bytes }).await?
            }
        };
        if found.digest != sent.digest {
            return Err(ImageError::new(
                Code::ImageCorrupt,
                format!("the exported image should be {} but is {}", sent.digest, found.digest),
            ));
        }
        self.expect(&found.digest)?;
        let kept = ["description", "default_user", "guest_agent", "min_memory_bytes", "source_digest"];
        found.properties.extend(sent.properties.into_iter().filter(|(k, _)| kept.contains(&k.as_str())));
        Ok(found)
    }

    async fn disk(&mut self, name: &str, format: DiskFormat) -> Result<Found> {
        self.reporter.phase(Phase::Checking, None, "examining the disk");
        let limits = self.store.inner.options.limits.clone();
        let facts = disk::inspect(self.work.path(), name, format, &limits).await?;
        self.reporter.check()?;
        let mut properties = BTreeMap::new();
        let path = self.work.path().join(name);
        let (stored, format) = if format == DiskFormat::Vmdk {
            let source = self.hash(&path).await?;
            properties.insert("source_digest".into(), source.to_string());
            properties.insert("source_format".into(), format.as_str().into());
            self.reporter.phase(Phase::Converting, None, "converting to qcow2");
            disk::to_qcow2(self.work.path(), name, format, "converted", &limits, self.reporter.cancel()).await?;
            (self.work.path().join("converted"), DiskFormat::Qcow2)
        } else {
            (path, format)
        };
        let digest = self.hash(&stored).await?;
        self.pins.add(&digest);
        let (blobs, committed) = (self.store.inner.blobs.clone(), digest.clone());
        blocking(move || blobs.commit(&stored, &committed)).await?;
        properties.insert("format".into(), format.as_str().into());
        let payload = StoredPayload::Disk { format, blob: digest.clone() };
        Ok(Found { payload, digest, virtual_bytes: facts.virtual_bytes, properties })
    }

    async fn layout(&mut self, dir: &Path, tag: Option<&str>) -> Result<Found> {
        self.reporter.phase(Phase::Resolving, None, "reading the image layout");
        let (from, tag) = (dir.to_owned(), tag.map(str::to_owned));
        let resolved = blocking(move || oci::read_layout(&from, tag.as_deref())).await?;
        self.expect(&Digest::of(&resolved.manifest_bytes))?;
        resolved.manifest.check(&self.store.inner.options.limits)?;
        self.ingest_layers(dir, &resolved.manifest).await?;
        self.oci(resolved).await
    }

    async fn ingest_layers(&mut self, dir: &Path, manifest: &oci::Manifest) -> Result<()> {
        let total = manifest.layers.iter().map(|l| l.size).sum();
        self.reporter.phase(Phase::Downloading, Some(total), format!("copying {} layers", manifest.layers.len()));
        for layer in &manifest.layers {
            self.pins.add(&layer.digest);
            let source = dir.join("blobs/sha256").join(layer.digest.hex());
            if !source.is_file() {
                return Err(ImageError::new(Code::ImageTruncated, format!("the layout lacks layer {}", layer.digest)));
            }
            self.ingest(source, &layer.digest).await?;
        }
        Ok(())
    }

    async fn ingest(&self, source: PathBuf, digest: &Digest) -> Result<()> {
        let (blobs, digest, reporter) = (self.store.inner.blobs.clone(), digest.clone(), self.reporter.clone());
        let temp = self.work.path().to_owned();
        blocking(move || blobs.ingest(&source, &digest, &temp, &reporter).map(drop)).await
    }

    /// The layers are in the store; the documents and the payload follow.
    async fn oci(&mut self, resolved: Resolved) -> Result<Found> {
        let (config, diff_ids) = oci::config(&resolved.config_bytes, &resolved.manifest)?;
        diff_ids.iter().for_each(|d| self.pins.add(d));
        let put = |bytes: &[u8]| self.store.inner.blobs.put_bytes(self.work.path(), bytes);
        for bytes in [&resolved.manifest_bytes, &resolved.config_bytes] {
            // Before the blob is there, or the collector could come between.
            self.pins.add(&Digest::of(bytes));
        }
        let (manifest, config_blob) = (put(&resolved.manifest_bytes)?, put(&resolved.config_bytes)?);
        let layers: Vec<StoredLayer> = resolved
            .manifest
            .layers
            .iter()
            .zip(diff_ids)
            .map(|(layer, diff_id)| StoredLayer { digest: layer.digest.clone(), diff_id })
            .collect();
        let mut properties = BTreeMap::new();
        properties.insert("format".into(), "oci".into());
        properties.insert("architecture".into(), config.architecture.clone());
        let command: Vec<&str> = config.entrypoint.iter().chain(&config.cmd).map(String::as_str).collect();
        properties.insert("cmd".into(), command.join(" "));
        let virtual_bytes = resolved.manifest.layers.iter().map(|l| l.size).sum();
        let payload = StoredPayload::Oci { manifest: manifest.clone(), config_blob, config: Box::new(config), layers };
        Ok(Found { payload, digest: manifest, virtual_bytes, properties })
    }

    async fn recipe(&mut self, name: &str) -> Result<Found> {
        let options = &self.store.inner.options;
        recipe::check_name(name, options.recipes.as_deref())?;
        // Two builds of the same would only take turns at the same packages.
        let _one = self.store.inner.locks.hold(format!("recipe:{name}"), self.reporter.cancel()).await?;
        let prebuilt = options.prebuilt.as_ref().map(|d| d.join(name)).filter(|d| d.join("manifest.json").is_file());
        let out = match prebuilt {
            Some(dir) => dir,
            None => {
                let cache = self.store.inner.dir.join("cache");
                recipe::build(name, options.recipes.as_deref(), self.work.path(), &cache, &self.reporter).await?
            }
        };
        let manifest = recipe::read_manifest(&out)?;
        let mut found = match &manifest.content {
            Content::Oci { tag } => self.layout(&out, tag.as_deref()).await?,
            Content::Disk { disk, disk_format } => {
                self.bring(&out, disk, &manifest, "content").await?;
                self.disk("content", *disk_format).await?
            }
            Content::Kernel { kernel, initrd, cmdline, disk, disk_format } => {
                let mut files = Vec::new();
                for file in [Some(kernel), initrd.as_ref(), disk.as_ref()] {
                    files.push(match file {
                        Some(file) => Some(self.bring(&out, file, &manifest, file).await?),
                        None => None,
                    });
                }
                let mut files = files.into_iter();
                let mut next = || files.next().flatten();
                let missing = || ImageError::new(Code::RecipeFailed, "the recipe made no kernel");
                let parts = Parts {
                    kernel: next().ok_or_else(missing)?,
                    initrd: next(),
                    disk: next(),
                    disk_format: *disk_format,
                    cmdline: cmdline.clone(),
                };
                self.kernel(parts).await?
            }
        };
        self.expect(&found.digest)?;
        let facts = [
            ("description", manifest.description.clone()),
            ("architecture", manifest.architecture.clone()),
            ("default_user", manifest.default_user.clone()),
            ("guest_agent", if manifest.guest_agent { "true".into() } else { String::new() }),
            (
                "min_memory_bytes",
                if manifest.min_memory_bytes > 0 { manifest.min_memory_bytes.to_string() } else { String::new() },
            ),
        ];
        found.properties.extend(facts.into_iter().filter(|(_, v)| !v.is_empty()).map(|(k, v)| (k.to_owned(), v)));
        Ok(found)
    }

    /// Copies a file of a recipe's result into the work directory and compares it with its manifest.
    async fn bring(&self, from: &Path, file: &str, manifest: &recipe::Manifest, to: &str) -> Result<(PathBuf, Digest)> {
        let (source, target) = (from.join(file), self.work.path().join(to));
        let (reporter, limit) = (self.reporter.clone(), self.store.inner.options.limits.blob_bytes);
        let copied = target.clone();
        let (digest, _) = blocking(move || blobs::copy(&source, &copied, limit, &reporter)).await?;
        match manifest.digests.get(file) {
            Some(expected) if *expected != digest => Err(ImageError::new(
                Code::ImageCorrupt,
                format!("{file} should be {expected} but is {digest}; build the recipe again"),
            )),
            _ => Ok((target, digest)),
        }
    }

    async fn kernel(&mut self, parts: Parts) -> Result<Found> {
        let mut virtual_bytes = 0;
        if let Some((path, _)) = &parts.disk {
            // The examiner looks into the work directory only.
            let inside = self.work.path().join("root-disk");
            std::fs::rename(path, &inside)
                .map_err(|_| ImageError::new(Code::ImageTruncated, "the image lacks its disk"))?;
            let limits = self.store.inner.options.limits.clone();
            self.reporter.phase(Phase::Checking, None, "examining the disk");
            virtual_bytes =
                disk::inspect(self.work.path(), "root-disk", parts.disk_format, &limits).await?.virtual_bytes;
        }
        let disk = parts.disk.map(|(_, digest)| (self.work.path().join("root-disk"), digest));
        let mut list = parts.cmdline.clone();
        for (path, digest) in std::iter::once(&parts.kernel).chain(&parts.initrd).chain(&disk) {
            self.pins.add(digest);
            self.ingest(path.clone(), digest).await?;
            list.push('\n');
            list.push_str(digest.as_str());
        }
        let payload = StoredPayload::Kernel {
            kernel: parts.kernel.1,
            initrd: parts.initrd.map(|(_, d)| d),
            cmdline: parts.cmdline,
            disk: disk.map(|(_, d)| d),
            disk_format: parts.disk_format,
        };
        let properties = BTreeMap::from([("format".to_owned(), "kernel".to_owned())]);
        Ok(Found { payload, digest: Digest::of(list.as_bytes()), virtual_bytes, properties })
    }

    async fn hash(&self, path: &Path) -> Result<Digest> {
        let length = std::fs::metadata(path).map_or(0, |m| m.len());
        self.reporter.phase(Phase::Checking, Some(length), "computing the digest");
        let (path, reporter) = (path.to_owned(), self.reporter.clone());
        blocking(move || blobs::hash(&path, &reporter)).await.map(|(digest, _)| digest)
    }

    fn expect(&self, found: &Digest) -> Result<()> {
        match &self.expected {
            Some(expected) if expected != found => Err(ImageError::new(
                Code::ChecksumMismatch,
                format!(
                    "the content has the checksum {found}, not {expected}; the file has changed or was damaged on its way"
                ),
            )),
            _ => Ok(()),
        }
    }

    fn record(&self, name: &str, found: Found) -> Result<ImageRecord> {
        let blobs = found.payload.blobs();
        let mut size_bytes = 0;
        for digest in &blobs {
            let path = self.store.inner.blobs.path(digest);
            size_bytes += std::fs::metadata(&path).context(|| format!("cannot read blob {digest}"))?.len();
        }
        let record = StoredRecord {
            schema: SCHEMA,
            id: self.id.to_owned(),
            name: name.to_owned(),
            digest: found.digest,
            size_bytes,
            virtual_size_bytes: found.virtual_bytes,
            payload: found.payload,
            properties: found.properties,
            holders: std::collections::BTreeSet::new(),
            removed: false,
        };
        self.store.write(record)
    }
}

/// The files of a kernel image with their digests.
struct Parts {
    kernel: (PathBuf, Digest),
    initrd: Option<(PathBuf, Digest)>,
    disk: Option<(PathBuf, Digest)>,
    disk_format: DiskFormat,
    cmdline: String,
}
