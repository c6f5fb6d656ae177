//! What all tasks of the agent share.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, RwLock};

use oblak_client::Client;
use oblak_model::wire::{NewEvent, ReportItem};
use oblak_model::{About, ImageId, InstanceId, NetworkId, PortId, Severity, VolumeId};
use oblak_network::PortHandle;
use oblak_platform::clock::SharedClock;
use oblak_platform::driver::DriverError;
use oblak_volume::VolumeHandle;
use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;

use crate::config::AgentConfig;
use crate::lease::Keeper;
use crate::migrate::Moves;
use crate::reporter::Reporter;
use crate::servers::Servers;
use crate::services::{Drivers, PeerNet};
use crate::world::{Touched, World};

/// State of the local networks as the driver last made them.
#[derive(Clone, Debug, Default)]
pub struct NetworkState {
    /// Handles of local ports with their network and its MTU.
    pub ports: BTreeMap<PortId, (NetworkId, u16, PortHandle)>,
    /// Why a network could not be made.
    pub errors: BTreeMap<NetworkId, DriverError>,
    /// Host ports that could not be taken, by port.
    pub refused: BTreeMap<PortId, Vec<String>>,
    /// Plans as last carried out, for seeds.
    pub plans: BTreeMap<NetworkId, Arc<oblak_network::NetworkPlan>>,
}

/// State of a local image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ImageState {
    /// Being fetched or built: percent and step.
    Importing(u8, String),
    /// Here.
    Ready,
    /// Not to be had; stable code and text for people.
    Failed(String, String),
}

/// Shared by every task.
pub struct Context {
    /// Settings.
    pub config: AgentConfig,
    /// The API.
    pub client: Client,
    /// Drivers.
    pub drivers: Drivers,
    /// Time.
    pub clock: SharedClock,
    /// What we were told.
    pub world: RwLock<World>,
    /// Whether everything that exists has been told once.
    pub synced: watch::Sender<bool>,
    /// Reports.
    pub reporter: Reporter,
    /// Networks as made.
    pub networks: watch::Sender<Arc<NetworkState>>,
    /// Volumes as made, or why not.
    pub volumes: watch::Sender<Arc<BTreeMap<VolumeId, Result<VolumeHandle, DriverError>>>>,
    /// Volumes that a guest has plugged in now.
    pub plugged: Mutex<BTreeMap<VolumeId, InstanceId>>,
    /// Images.
    pub images: watch::Sender<Arc<BTreeMap<ImageId, ImageState>>>,
    /// Servers of the cloud.
    pub servers: watch::Sender<Servers>,
    /// Epoch of the lease.
    pub epoch: AtomicU64,
    /// The lease itself.
    pub lease: Keeper,
    /// The node was removed from the cloud: nothing new is started.
    pub removed: AtomicBool,
    /// Wakes the network manager.
    pub wake_networks: Notify,
    /// Wakes the volume manager.
    pub wake_volumes: Notify,
    /// Wakes the image manager.
    pub wake_images: Notify,
    /// Owners to wake.
    pub owners: Mutex<BTreeMap<InstanceId, Arc<Notify>>>,
    /// Ranges of host ids given to containers.
    pub id_bases: Mutex<BTreeSet<u32>>,
    /// First host id of each container whose record, with this number in it, is on disk.
    pub container_ids: Mutex<BTreeMap<InstanceId, u32>>,
    /// The way to other agents; `None` where there is none.
    pub peers: Option<Arc<dyn PeerNet>>,
    /// Where other agents reach this one.
    pub listening: watch::Sender<Option<std::net::SocketAddr>>,
    /// Instances that are being sent elsewhere.
    pub moves: Moves,
    /// Ends everything.
    pub cancel: CancellationToken,
}

/// A lock that a panicking task may have held: the data is replaced whole, so it is never half-written.
pub fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

impl Context {
    /// A look at the world; do not hold it across an await.
    pub fn world(&self) -> std::sync::RwLockReadGuard<'_, World> {
        self.world.read().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// The lease's epoch.
    pub fn epoch(&self) -> u64 {
        self.epoch.load(Ordering::Relaxed)
    }

    /// Whether the server says that this node was removed.
    pub fn is_removed(&self) -> bool {
        self.removed.load(Ordering::Relaxed)
    }

    /// Notes when the server refuses because the node was removed, and says so once.
    pub fn note_removal(&self, error: &oblak_client::ClientError) {
        if error.code() == Some(oblak_model::Code::NodeRemoved) && !self.removed.swap(true, Ordering::Relaxed) {
            tracing::error!(node = %self.config.name, "this node was removed from the cloud: its guests go on as they are, and no others are started; see `oblak join`");
        }
    }

    /// Directory of an instance.
    pub fn instance_dir(&self, id: InstanceId) -> PathBuf {
        self.config.layout.instances().join(id.to_string())
    }

    /// Zone of this node.
    pub fn zone(&self) -> String {
        self.world().node.as_ref().map_or_else(|| self.config.zone.clone(), |n| n.spec.zone.clone())
    }

    /// Wakes whoever something touched.
    pub fn wake(&self, touched: &Touched) {
        if touched.networks {
            self.wake_networks.notify_one();
        }
        if touched.volumes {
            self.wake_volumes.notify_one();
        }
        if touched.images {
            self.wake_images.notify_one();
        }
        let owners = lock(&self.owners);
        for id in &touched.instances {
            if let Some(owner) = owners.get(id) {
                owner.notify_one();
            }
        }
    }

    /// Wakes every owner: something all of them may wait for has changed.
    pub fn wake_owners(&self) {
        for owner in lock(&self.owners).values() {
            owner.notify_one();
        }
    }

    /// Tells people what happened to an object.
    pub fn event(
        &self,
        project: Option<&str>,
        about: About,
        severity: Severity,
        reason: &str,
        message: impl Into<String>,
    ) {
        self.reporter.event(NewEvent {
            project: project.map(Into::into),
            about,
            severity,
            reason: reason.into(),
            message: message.into(),
        });
    }

    /// Queues a status.
    pub fn report(&self, item: ReportItem) {
        self.reporter.report(item);
    }
}
