//! What can be set, with defaults.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

/// How the server is set up.
#[derive(Clone, Debug)]
pub struct ApiConfig {
    /// Where it listens; port 0 takes a free one.
    pub listen: SocketAddr,
    /// Names and addresses that clients use, beside those of this machine.
    pub server_names: Vec<String>,
    /// Directory with the authority and the server's certificate.
    pub pki: PathBuf,
    /// Limits.
    pub limits: Limits,
    /// Life of a node's lease after each heartbeat.
    pub node_lease: Duration,
    /// Life of a node's certificate; it is renewed after two thirds of it.
    pub node_certificate_life: Duration,
}

impl ApiConfig {
    /// Defaults for a directory and an address.
    pub fn new(listen: SocketAddr, pki: impl Into<PathBuf>) -> Self {
        Self {
            listen,
            server_names: Vec::new(),
            pki: pki.into(),
            limits: Limits::default(),
            node_lease: Duration::from_secs(5),
            node_certificate_life: oblak_identity::pki::NODE_LIFE,
        }
    }
}

/// Limits. Each has its unit in the name.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Largest request body in bytes, uploads of images excepted.
    pub body_bytes: usize,
    /// Most items on a page.
    pub page_items: usize,
    /// Items on a page when the caller does not say.
    pub page_items_default: usize,
    /// Requests per second of one principal, sustained.
    pub requests_per_second: u32,
    /// Requests of one principal in a burst.
    pub requests_burst: u32,
    /// Failed logins per minute for one user name, and for one address.
    pub failed_logins_per_minute: u32,
    /// Console, exec, log and port streams of one principal.
    pub streams_per_principal: usize,
    /// Streams of everybody together.
    pub streams: usize,
    /// Watches of everybody together.
    pub watches: usize,
    /// Connections at once.
    pub connections: usize,
    /// A stream without a byte or a ping answered for so long is closed.
    pub stream_idle: Duration,
    /// How long the server waits for requests and streams when it stops.
    pub shutdown: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            body_bytes: 1 << 20,
            page_items: 1000,
            page_items_default: 500,
            requests_per_second: 20_000,
            requests_burst: 40_000,
            failed_logins_per_minute: 20,
            streams_per_principal: 64,
            streams: 1024,
            watches: 4096,
            connections: 8192,
            stream_idle: Duration::from_secs(60),
            shutdown: Duration::from_secs(5),
        }
    }
}
