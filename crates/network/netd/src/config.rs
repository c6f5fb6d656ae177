//! The files between the network driver and netd.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use oblak_model::NetworkId;
use oblak_network::NetworkPlan;
use oblak_platform::fsx;
use oblak_platform::process::Identity;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

/// Name of the file that describes one network, in a directory named after the network's id.
pub const NET_FILE: &str = "netd.json";
/// Name of the file that tells what is served.
pub const STATUS_FILE: &str = "netd.status.json";
/// Name of the file that a running netd keeps locked.
pub const LOCK_FILE: &str = "netd.lock";
/// Longest accepted [`NET_FILE`]: 64 MiB hold more than 20,000 ports.
pub const MAX_NET_FILE_BYTES: u64 = 64 << 20;

/// What netd has to know to serve one network.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct NetConfig {
    /// The network's namespace.
    pub netns: PathBuf,
    /// The bridge in that namespace.
    pub bridge: String,
    /// Ports, names, addresses, metadata.
    pub plan: NetworkPlan,
}

/// What netd serves now.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// The process that wrote this.
    pub process: Option<Identity>,
    /// Networks it knows.
    pub networks: BTreeMap<NetworkId, NetStatus>,
}

/// What netd serves of one network.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetStatus {
    /// [`generation`] of the file that is applied; answers follow it. Empty before the first success.
    pub generation: String,
    /// Why the newest file is not served, for people; none when all is well.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// Names the content of a [`NET_FILE`]: the first 16 hexadecimal digits of its SHA-256.
#[must_use]
pub fn generation(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().take(8).map(|b| format!("{b:02x}")).collect()
}

/// Writes the description of a network for netd below `dir` and returns its generation. The network's directory is made if needed.
///
/// # Errors
/// Any I/O error.
pub fn write_config(dir: &Path, config: &NetConfig) -> io::Result<String> {
    let home = dir.join(config.plan.id.to_string());
    fsx::create_dir_private(&home, 0o700)?;
    let bytes = serde_json::to_vec(config)?;
    let path = home.join(NET_FILE);
    if std::fs::read(&path).ok().as_deref() != Some(&bytes) {
        fsx::write_atomic(&path, &bytes, 0o600)?;
    }
    Ok(generation(&bytes))
}

/// What the netd of `dir` says it serves; the default when there never was one.
///
/// # Errors
/// Any I/O error.
pub fn read_status(dir: &Path) -> io::Result<Status> {
    Ok(fsx::read_json(&dir.join(STATUS_FILE))?.unwrap_or_default())
}

/// Waits until a living netd serves `generation` of the network.
///
/// # Errors
/// `TimedOut` with netd's own reason if it gave one; any I/O error.
pub async fn wait_served(dir: &Path, id: NetworkId, generation: &str, deadline: Duration) -> io::Result<()> {
    let end = tokio::time::Instant::now() + deadline;
    loop {
        let status = read_status(dir)?;
        let alive = status.process.as_ref().is_some_and(Identity::is_alive);
        let net = status.networks.get(&id);
        if alive && net.is_some_and(|n| n.generation == generation) {
            return Ok(());
        }
        if tokio::time::Instant::now() >= end {
            let reason = match net.and_then(|n| n.error.as_deref()) {
                _ if !alive => "netd does not run",
                Some(error) => error,
                None => "netd has not taken up the new state yet",
            };
            return Err(io::Error::new(io::ErrorKind::TimedOut, format!("network {id}: {reason}")));
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}
