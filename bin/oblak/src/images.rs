//! The image store as the agent wants it.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use async_trait::async_trait;
use oblak_agent::{ImageFailure, ImageProgress, ImageService, LocalImage, LocalPayload, OciDefaults};
use oblak_image::{BasicAuth, Digest, DiskFormat, ImageError, ImageRecord, ImageStore, Payload, Progress, Source};
use oblak_model::{ImageId, ImageSource, InstanceId, Size};
use oblak_platform::driver::{BoxRead, DriverError, DriverResult};
use oblak_volume::Format;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// Adapter over [`ImageStore`].
pub struct Images {
    store: ImageStore,
}

impl Images {
    /// Opens the store; recipes come from `recipes`, or from the binary when there is no such directory.
    pub fn open(dir: &Path, recipes: Option<&Path>) -> Result<Self> {
        let store =
            ImageStore::open(dir, recipes).with_context(|| format!("cannot open the image store {}", dir.display()))?;
        Ok(Self { store })
    }
}

fn driver_error(error: ImageError) -> DriverError {
    if error.code.is_transient() {
        DriverError::retry(error.code.as_str(), error.detail)
    } else {
        DriverError::permanent(error.code.as_str(), error.detail)
    }
}

fn failure(error: ImageError) -> ImageFailure {
    ImageFailure { code: error.code.as_str().into(), transient: error.code.is_transient(), detail: error.detail }
}

fn digest(checksum: Option<&str>) -> Result<Option<Digest>, ImageFailure> {
    let parse = |text: &str| {
        text.parse().map_err(|_| ImageFailure {
            code: "invalid".into(),
            detail: format!("{text:?} is not a digest"),
            transient: false,
        })
    };
    checksum.map(parse).transpose()
}

fn format(of: DiskFormat) -> Format {
    if of == DiskFormat::Raw { Format::Raw } else { Format::Qcow2 }
}

/// Signal names of the OCI image specification.
fn signal(name: &str) -> i32 {
    let name = name.strip_prefix("SIG").map_or_else(|| format!("SIG{name}"), |_| name.to_string());
    name.parse::<nix::sys::signal::Signal>().map_or(0, |s| s as i32)
}

fn local(record: ImageRecord) -> LocalImage {
    let payload = match record.payload {
        Payload::Disk { format: of, blob } => LocalPayload::Disk { path: blob, format: format(of) },
        Payload::Kernel { kernel, initrd, cmdline, disk, disk_format } => {
            LocalPayload::Kernel { kernel, initrd, cmdline, disk: disk.map(|d| (d, format(disk_format))) }
        }
        Payload::Oci { config, .. } => LocalPayload::Oci {
            config: OciDefaults {
                stop_signal: if config.stop_signal.is_empty() { 0 } else { signal(&config.stop_signal) },
                entrypoint: config.entrypoint,
                cmd: config.cmd,
                env: config.env,
                workdir: config.workdir,
                user: config.user,
            },
        },
    };
    LocalImage {
        digest: record.digest.to_string(),
        size: Size(record.size_bytes),
        virtual_size: Size(record.virtual_size_bytes),
        properties: record.properties,
        payload,
    }
}

fn source(of: &ImageSource) -> Result<Source, ImageFailure> {
    Ok(match of.clone() {
        ImageSource::Url { url } => Source::Url { url, headers: Vec::new() },
        ImageSource::Registry { reference, insecure, username, password } => {
            let auth = username.map(|username| BasicAuth { username, password: password.unwrap_or_default() });
            Source::Registry { reference, auth, insecure_http: insecure }
        }
        ImageSource::Recipe { recipe } => Source::Recipe { name: recipe },
        ImageSource::Upload {} => {
            return Err(ImageFailure {
                code: "waiting_for_upload".into(),
                detail: "the content has not been uploaded yet".into(),
                transient: false,
            });
        }
    })
}

/// Passes progress on until the import ends.
fn relay(to: watch::Sender<ImageProgress>) -> watch::Sender<Progress> {
    let (sender, mut seen) = watch::channel(Progress::default());
    tokio::spawn(async move {
        while seen.changed().await.is_ok() {
            let now = seen.borrow_and_update().clone();
            if to.send(ImageProgress { percent: now.percent, message: now.message }).is_err() {
                return;
            }
        }
    });
    sender
}

#[async_trait]
impl ImageService for Images {
    async fn get(&self, id: ImageId) -> DriverResult<Option<LocalImage>> {
        Ok(self.store.get(&id.to_string()).map_err(driver_error)?.map(local))
    }

    async fn import(
        &self,
        id: ImageId,
        name: &str,
        from: &ImageSource,
        checksum: Option<&str>,
        progress: watch::Sender<ImageProgress>,
        cancel: CancellationToken,
    ) -> Result<LocalImage, ImageFailure> {
        let expected = digest(checksum)?;
        self.store
            .import(&id.to_string(), name, source(from)?, expected, relay(progress), cancel)
            .await
            .map(local)
            .map_err(failure)
    }

    async fn put(
        &self,
        id: ImageId,
        name: &str,
        content: BoxRead,
        length: Option<u64>,
        checksum: Option<&str>,
    ) -> Result<LocalImage, ImageFailure> {
        let expected = digest(checksum)?;
        let progress = watch::Sender::new(Progress::default());
        self.store
            .put_stream(&id.to_string(), name, content, length, expected, progress, CancellationToken::new())
            .await
            .map(local)
            .map_err(failure)
    }

    async fn export(&self, id: ImageId) -> DriverResult<BoxRead> {
        Ok(self.store.export(&id.to_string()).map_err(driver_error)?.reader(0))
    }

    async fn layers(&self, id: ImageId) -> DriverResult<Vec<PathBuf>> {
        self.store.unpack_layers(&id.to_string()).await.map_err(driver_error)
    }

    async fn hold(&self, id: ImageId, by: InstanceId) -> DriverResult<()> {
        self.store.hold(&id.to_string(), &by.to_string()).map(drop).map_err(driver_error)
    }

    async fn release(&self, by: InstanceId) -> DriverResult<()> {
        self.store.release(&by.to_string()).map_err(driver_error)
    }

    async fn remove(&self, id: ImageId) -> DriverResult<()> {
        self.store.remove(&id.to_string()).map_err(driver_error)
    }

    async fn fetched(&self) -> DriverResult<Vec<ImageId>> {
        let all = self.store.list().map_err(driver_error)?;
        let fetched = all.into_iter().filter(|r| r.properties.get("source").is_some_and(|s| s != "upload"));
        Ok(fetched.filter_map(|record| record.id.parse().ok()).collect())
    }
}
