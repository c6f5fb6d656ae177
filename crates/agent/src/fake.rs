//! What stands in for the image store and the writer of seeds beside the fake drivers: in simulations and measurements.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use oblak_model::{ImageId, ImageSource, InstanceId, Size};
use oblak_network::{InstanceMetadata, NetworkPlan, PortPlan};
use oblak_platform::driver::{BoxRead, DriverError, DriverResult};
use oblak_volume::Format;
use tokio::io::AsyncReadExt;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::services::{ImageFailure, ImageProgress, ImageService, LocalImage, LocalPayload, OciDefaults, SeedWriter};

/// Images without content: an import gives what the source says. Clones are the same disk.
#[derive(Clone, Default)]
pub struct FakeImages {
    here: Arc<Mutex<BTreeMap<ImageId, LocalImage>>>,
}

impl FakeImages {
    /// Those on the disk.
    #[must_use]
    pub fn here(&self) -> Vec<ImageId> {
        self.lock().keys().copied().collect()
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<ImageId, LocalImage>> {
        self.here.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn keep(&self, id: ImageId, payload: LocalPayload) -> LocalImage {
        let local = LocalImage {
            digest: format!("sha256:{}", "0".repeat(64)),
            size: Size::mib(1),
            virtual_size: Size::mib(1),
            properties: BTreeMap::new(),
            payload,
        };
        self.lock().insert(id, local.clone());
        local
    }
}

fn disk() -> PathBuf {
    PathBuf::from("/fake/image")
}

/// The recipes that come with Oblak by what they make; everything else is a disk.
fn made_from(source: &ImageSource) -> LocalPayload {
    match source {
        ImageSource::Recipe { recipe } if recipe == "busybox" => {
            LocalPayload::Oci { config: OciDefaults { cmd: vec!["sh".into()], ..OciDefaults::default() } }
        }
        ImageSource::Recipe { recipe } if recipe == "tiny" => LocalPayload::Kernel {
            kernel: disk(),
            initrd: None,
            cmdline: String::new(),
            disk: Some((disk(), Format::Qcow2)),
        },
        _ => LocalPayload::Disk { path: disk(), format: Format::Qcow2 },
    }
}

#[async_trait]
impl ImageService for FakeImages {
    async fn get(&self, id: ImageId) -> DriverResult<Option<LocalImage>> {
        Ok(self.lock().get(&id).cloned())
    }
    async fn import(
        &self,
        id: ImageId,
        _: &str,
        source: &ImageSource,
        _: Option<&str>,
        _: watch::Sender<ImageProgress>,
        _: CancellationToken,
    ) -> Result<LocalImage, ImageFailure> {
        Ok(self.keep(id, made_from(source)))
    }
    async fn put(
        &self,
        id: ImageId,
        _: &str,
        mut content: BoxRead,
        _: Option<u64>,
        _: Option<&str>,
    ) -> Result<LocalImage, ImageFailure> {
        let broken = |e: std::io::Error| ImageFailure { code: "io".into(), detail: e.to_string(), transient: true };
        let mut buffer = vec![0; 64 << 10];
        while content.read(&mut buffer).await.map_err(broken)? > 0 {}
        Ok(self.keep(id, LocalPayload::Disk { path: disk(), format: Format::Qcow2 }))
    }
    async fn export(&self, _: ImageId) -> DriverResult<BoxRead> {
        Err(DriverError::unsupported("these images have no content"))
    }
    async fn layers(&self, _: ImageId) -> DriverResult<Vec<PathBuf>> {
        Ok(vec![PathBuf::from("/fake/layer")])
    }
    async fn hold(&self, _: ImageId, _: InstanceId) -> DriverResult<()> {
        Ok(())
    }
    async fn release(&self, _: InstanceId) -> DriverResult<()> {
        Ok(())
    }
    async fn remove(&self, id: ImageId) -> DriverResult<()> {
        self.lock().remove(&id);
        Ok(())
    }
    async fn fetched(&self) -> DriverResult<Vec<ImageId>> {
        Ok(self.here())
    }
}

/// Seeds that nobody reads.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoSeeds;

impl SeedWriter for NoSeeds {
    fn write(&self, _: &Path, _: &InstanceMetadata, _: &[(NetworkPlan, PortPlan)]) -> std::io::Result<()> {
        Ok(())
    }
}
