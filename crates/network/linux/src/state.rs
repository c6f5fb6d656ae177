//! Files below `<data>/network/<network id>/`. They are wishes and decisions; what exists is asked from the kernel.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};

use oblak_model::{NetworkId, PortId};
use oblak_network::{NetworkPlan, Protocol};
use oblak_platform::driver::{DriverError, DriverResult};
use oblak_platform::fsx;
use serde::{Deserialize, Serialize, de::DeserializeOwned};

/// Read by netd: [`NetdFile`]. The wanted state, written before anything is done.
const NETD: &str = "netd.json";
/// What [`NETD`] is renamed to when the removal of the network begins.
const REMOVED: &str = "removed.json";
/// [`HostPart`].
const HOST: &str = "host.json";

/// What netd needs to serve a network.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct NetdFile {
    pub(crate) netns: PathBuf,
    pub(crate) bridge: String,
    pub(crate) plan: NetworkPlan,
}

/// What the network takes from the host. Decided once and kept, so that flows and addresses stay as they are.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct HostPart {
    /// Number of the pair of uplink addresses.
    pub(crate) uplink: Option<u32>,
    /// Guests may reach the outside.
    pub(crate) nat: bool,
    /// The uplink carries IPv6.
    pub(crate) ipv6: bool,
    /// The network reaches ports on other nodes.
    #[serde(default)]
    pub(crate) overlay: Option<OverlayPart>,
    /// Published ports that were granted.
    pub(crate) grants: Vec<Grant>,
    /// Published ports that could not be taken, with reasons.
    pub(crate) refused: Vec<(PortId, SocketAddr, String)>,
}

/// What a network takes from the underlay.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct OverlayPart {
    /// Its number on the wire.
    pub(crate) vni: u32,
    /// Nodes that have ports of it, in order.
    pub(crate) peers: Vec<IpAddr>,
}

/// A published port: host → `uplink_port` of the network's uplink address → guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Grant {
    pub(crate) port: PortId,
    pub(crate) host: SocketAddr,
    pub(crate) protocol: Protocol,
    pub(crate) uplink_port: u16,
    pub(crate) guest: SocketAddr,
}

/// The files of all networks.
#[derive(Clone, Debug)]
pub(crate) struct State {
    dir: PathBuf,
}

impl State {
    pub(crate) fn new(dir: PathBuf) -> Self {
        Self { dir }
    }

    /// `<data>/network`.
    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }

    fn home(&self, id: NetworkId) -> PathBuf {
        self.dir.join(id.to_string())
    }

    /// Makes the directory of a network, the first trace of it.
    pub(crate) fn create(&self, id: NetworkId) -> DriverResult<()> {
        fsx::create_dir_private(&self.home(id), 0o700)
            .map_err(|e| DriverError::io(&format!("making the directory of network {id}"), &e))
    }

    /// The last wanted state, also of a network that is being removed.
    pub(crate) fn plan(&self, id: NetworkId) -> DriverResult<Option<NetworkPlan>> {
        for name in [NETD, REMOVED] {
            if let Some(file) = read::<NetdFile>(&self.home(id).join(name))? {
                return Ok(Some(file.plan));
            }
        }
        Ok(None)
    }

    /// Writes the wanted state for netd and for our next life. Nothing of it exists any more after a power cut, so it need not survive one.
    pub(crate) fn write_netd(&self, file: &NetdFile) -> DriverResult<()> {
        let home = self.home(file.plan.id);
        write_if_changed(&home.join(NETD), file, fsx::write_json_until_boot)?;
        fsx::remove_file_if_exists(&home.join(REMOVED)).map_err(|e| DriverError::io("forgetting an old removal", &e))
    }

    /// Tells netd to let go, and keeps what the removal needs to know.
    pub(crate) fn begin_removal(&self, id: NetworkId) -> DriverResult<()> {
        let home = self.home(id);
        match std::fs::rename(home.join(NETD), home.join(REMOVED)) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                Err(DriverError::io(&format!("beginning the removal of network {id}"), &e))
            }
            _ => Ok(()),
        }
    }

    /// The last trace.
    pub(crate) fn finish_removal(&self, id: NetworkId) -> DriverResult<()> {
        fsx::remove_dir_if_exists(&self.home(id))
            .map_err(|e| DriverError::io(&format!("removing the directory of network {id}"), &e))
    }

    pub(crate) fn write_host(&self, id: NetworkId, part: &HostPart) -> DriverResult<()> {
        write_if_changed(&self.home(id).join(HOST), part, fsx::write_json)
    }

    pub(crate) fn remove_host(&self, id: NetworkId) -> DriverResult<()> {
        fsx::remove_file_if_exists(&self.home(id).join(HOST)).map_err(|e| DriverError::io("removing the host part", &e))
    }

    pub(crate) fn host(&self, id: NetworkId) -> DriverResult<Option<HostPart>> {
        read(&self.home(id).join(HOST))
    }

    /// What all networks take from the host.
    pub(crate) fn hosts(&self) -> DriverResult<BTreeMap<NetworkId, HostPart>> {
        let mut parts = BTreeMap::new();
        for id in self.networks()? {
            if let Some(part) = self.host(id)? {
                parts.insert(id, part);
            }
        }
        Ok(parts)
    }

    /// Networks that have a directory.
    pub(crate) fn networks(&self) -> DriverResult<Vec<NetworkId>> {
        let entries = match std::fs::read_dir(&self.dir) {
            Ok(entries) => entries,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(e) => return Err(DriverError::io("listing networks", &e)),
        };
        let mut ids: Vec<NetworkId> = entries.filter_map(|e| e.ok()?.file_name().to_str()?.parse().ok()).collect();
        ids.sort_unstable();
        Ok(ids)
    }
}

fn read<T: DeserializeOwned>(path: &Path) -> DriverResult<Option<T>> {
    match fsx::read_json(path) {
        // Written atomically, so only a foreign hand can break it; the next ensure writes it anew.
        Err(e) if e.kind() == std::io::ErrorKind::InvalidData => {
            tracing::warn!(path = %path.display(), error = %e, "ignoring a state file that cannot be read");
            Ok(None)
        }
        other => other.map_err(|e| DriverError::io(&format!("reading {}", path.display()), &e)),
    }
}

fn write_if_changed<T: Serialize>(
    path: &Path,
    value: &T,
    write: impl FnOnce(&Path, &T) -> std::io::Result<()>,
) -> DriverResult<()> {
    let context = |e: std::io::Error| DriverError::io(&format!("writing {}", path.display()), &e);
    let bytes = serde_json::to_vec_pretty(value).map_err(|e| context(e.into()))?;
    if std::fs::read(path).is_ok_and(|old| old == bytes) {
        return Ok(());
    }
    write(path, value).map_err(context)
}
