//! What the agent is given: drivers, the image store, the writer of seeds.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use oblak_compute::{ComputeDriver, Firmware};
use oblak_model::{ImageContent, ImageId, ImageSource, InstanceId, Isolation, NodeId, Size};
use oblak_network::{InstanceMetadata, NetworkDriver, NetworkPlan, PortPlan};
use oblak_platform::driver::{BoxDuplex, BoxRead, DriverError, DriverResult};
use oblak_volume::{Format, VolumeDriver};
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

/// The drivers of this node.
#[derive(Clone)]
pub struct Drivers {
    /// By isolation; several isolations may share one driver.
    pub compute: BTreeMap<Isolation, Arc<dyn ComputeDriver>>,
    /// Networks.
    pub network: Arc<dyn NetworkDriver>,
    /// Volumes and root disks.
    pub volume: Arc<dyn VolumeDriver>,
    /// Pools that several nodes have, by name.
    pub pools: BTreeMap<String, SharedPool>,
    /// Images.
    pub images: Arc<dyn ImageService>,
    /// NoCloud seeds for machines.
    pub seeds: Arc<dyn SeedWriter>,
}

/// The way to the agents of other nodes. Both ends have proven by their node certificates which node they are.
#[async_trait]
pub trait PeerNet: Send + Sync + 'static {
    /// Listens at an address of this node, on a port of the system's choice.
    ///
    /// # Errors
    /// Any I/O error.
    async fn listen(&self, address: IpAddr) -> std::io::Result<PeerListener>;
    /// Connects to a node; an error when the far end is another one.
    ///
    /// # Errors
    /// Any I/O error, `PermissionDenied` for another node.
    async fn dial(&self, node: NodeId, address: SocketAddr) -> std::io::Result<BoxDuplex>;
}

/// Connections of other nodes.
pub struct PeerListener {
    /// Where it listens.
    pub address: SocketAddr,
    /// Each with the node that it is from. Ends when the listener does; dropping it ends the listener.
    pub arrivals: mpsc::Receiver<(NodeId, BoxDuplex)>,
}

/// A pool that several nodes have.
#[derive(Clone)]
pub struct SharedPool {
    /// Where it is.
    pub path: PathBuf,
    /// Keeps the volumes in it.
    pub driver: Arc<dyn VolumeDriver>,
}

impl Drivers {
    /// Who keeps the volumes of a pool; the node's own pool has no name.
    ///
    /// # Errors
    /// `no_pool`: the node was not given it.
    pub fn pool(&self, name: &str) -> DriverResult<&Arc<dyn VolumeDriver>> {
        if name.is_empty() {
            return Ok(&self.volume);
        }
        self.pools.get(name).map(|pool| &pool.driver).ok_or_else(|| {
            DriverError::retry("no_pool", format!("this node has no pool {name}; start its agent with --shared-pool"))
        })
    }
}

/// Progress of an import.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ImageProgress {
    /// Percent.
    pub percent: u8,
    /// Step, for people.
    pub message: String,
}

/// Why an import failed.
#[derive(Clone, Debug)]
pub struct ImageFailure {
    /// Stable code.
    pub code: String,
    /// For people.
    pub detail: String,
    /// Whether another try may succeed.
    pub transient: bool,
}

/// An image in the store of this node.
#[derive(Clone, Debug)]
pub struct LocalImage {
    /// Digest of the content.
    pub digest: String,
    /// Bytes stored.
    pub size: Size,
    /// Size of the disk that a guest sees.
    pub virtual_size: Size,
    /// Facts for people: `format`, `architecture`, `default_user`, ...
    pub properties: BTreeMap<String, String>,
    /// The content.
    pub payload: LocalPayload,
}

/// What an image holds, as paths.
#[derive(Clone, Debug)]
pub enum LocalPayload {
    /// A disk with a boot loader.
    Disk {
        /// The file.
        path: PathBuf,
        /// Its format.
        format: Format,
    },
    /// Kernel, initial RAM disk, root disk.
    Kernel {
        /// Kernel.
        kernel: PathBuf,
        /// Initial RAM disk.
        initrd: Option<PathBuf>,
        /// Command line.
        cmdline: String,
        /// Root disk to copy from, with its format.
        disk: Option<(PathBuf, Format)>,
    },
    /// An OCI image.
    Oci {
        /// Defaults of the image.
        config: OciDefaults,
    },
}

impl LocalImage {
    /// What it holds.
    #[must_use]
    pub fn content(&self) -> ImageContent {
        match self.payload {
            LocalPayload::Disk { .. } => ImageContent::Disk,
            LocalPayload::Kernel { .. } => ImageContent::Kernel,
            LocalPayload::Oci { .. } => ImageContent::Oci,
        }
    }
}

/// What an OCI image says about running it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct OciDefaults {
    /// Entrypoint.
    pub entrypoint: Vec<String>,
    /// Command.
    pub cmd: Vec<String>,
    /// `NAME=value`.
    pub env: Vec<String>,
    /// Working directory.
    pub workdir: String,
    /// User.
    pub user: String,
    /// Stop signal number; 0 when the image says nothing.
    pub stop_signal: i32,
}

/// The image store of this node.
#[async_trait]
pub trait ImageService: Send + Sync + 'static {
    /// The image if it is here and whole.
    async fn get(&self, id: ImageId) -> DriverResult<Option<LocalImage>>;
    /// Fetches or builds it. Repeated calls go on where the last one stopped.
    async fn import(
        &self,
        id: ImageId,
        name: &str,
        source: &ImageSource,
        checksum: Option<&str>,
        progress: watch::Sender<ImageProgress>,
        cancel: CancellationToken,
    ) -> Result<LocalImage, ImageFailure>;
    /// Takes an upload.
    async fn put(
        &self,
        id: ImageId,
        name: &str,
        content: BoxRead,
        length: Option<u64>,
        checksum: Option<&str>,
    ) -> Result<LocalImage, ImageFailure>;
    /// Content for another node, as the store's export format.
    async fn export(&self, id: ImageId) -> DriverResult<BoxRead>;
    /// Directories of an OCI image, lowest first.
    async fn layers(&self, id: ImageId) -> DriverResult<Vec<PathBuf>>;
    /// Keeps the content on disk as long as this instance is here, even when the image is removed. May be repeated.
    async fn hold(&self, id: ImageId, by: InstanceId) -> DriverResult<()>;
    /// Ends what [`Self::hold`] began; fine when there is nothing.
    async fn release(&self, by: InstanceId) -> DriverResult<()>;
    /// Removes it; fine when it is not here.
    async fn remove(&self, id: ImageId) -> DriverResult<()>;
    /// Images here that were fetched or built on this node, so that they can be got again. Uploads and copies are not among them.
    async fn fetched(&self) -> DriverResult<Vec<ImageId>>;
}

/// Writes NoCloud seeds.
pub trait SeedWriter: Send + Sync + 'static {
    /// Writes the seed image of a machine to `path`, whole or not at all.
    ///
    /// # Errors
    /// Any I/O error.
    fn write(&self, path: &Path, metadata: &InstanceMetadata, ports: &[(NetworkPlan, PortPlan)])
    -> std::io::Result<()>;
}

/// Firmware of the model as the driver's.
#[must_use]
pub fn firmware(of: oblak_model::ImageFirmware) -> Firmware {
    match of {
        oblak_model::ImageFirmware::Bios => Firmware::Bios,
        oblak_model::ImageFirmware::Uefi => Firmware::Uefi,
    }
}
