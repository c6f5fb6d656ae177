//! Where things lie below the data directory. One place, so that recovery tools and tests agree with the code.

use std::path::{Path, PathBuf};

/// Default data directory of a service that runs as root.
pub const DEFAULT_DATA: &str = "/var/lib/oblak";

/// The tree below the data directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    root: PathBuf,
}

impl Layout {
    /// For the data directory `root`.
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }
    /// The data directory.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }
    /// The embedded store (server).
    #[must_use]
    pub fn store(&self) -> PathBuf {
        self.root.join("store")
    }
    /// Certificates and keys (server: `ca.pem`, `ca.key`, `server.pem`, `server.key`).
    #[must_use]
    pub fn pki(&self) -> PathBuf {
        self.root.join("pki")
    }
    /// Which server of its cloud this is: `server.json` (server).
    #[must_use]
    pub fn server(&self) -> PathBuf {
        self.root.join("server.json")
    }
    /// Identity of the node with its certificate and key: `node.json` (agent).
    #[must_use]
    pub fn node(&self) -> PathBuf {
        self.root.join("node")
    }
    /// Content-addressed image store.
    #[must_use]
    pub fn images(&self) -> PathBuf {
        self.root.join("images")
    }
    /// Volumes and root disks of the `file` driver.
    #[must_use]
    pub fn volumes(&self) -> PathBuf {
        self.root.join("volumes")
    }
    /// One directory per instance on this node.
    #[must_use]
    pub fn instances(&self) -> PathBuf {
        self.root.join("instances")
    }
    /// State of the network driver and of netd.
    #[must_use]
    pub fn network(&self) -> PathBuf {
        self.root.join("network")
    }
    /// Process id files and sockets of our own processes.
    #[must_use]
    pub fn run(&self) -> PathBuf {
        self.root.join("run")
    }
    /// Log files of detached processes.
    #[must_use]
    pub fn logs(&self) -> PathBuf {
        self.root.join("logs")
    }
}
