//! How to reach etcd, and what to keep there.

use std::fmt;
use std::time::Duration;

use oblak_platform::clock::{self, SharedClock};
use oblak_platform::random::{self, SharedRandom};
use oblak_store::HistoryLimits;

/// Outlives an election, and a server that comes back.
const PATIENCE: Duration = Duration::from_secs(10);

/// Certificates, all PEM.
#[derive(Clone, Default)]
pub struct Tls {
    /// Authority that signed the certificates of the servers. The authorities of the system are not asked.
    pub ca: Vec<u8>,
    /// Certificate and key that this process shows, where the servers ask for one.
    pub identity: Option<(Vec<u8>, Vec<u8>)>,
    /// Name that the certificates of the servers carry, when it is not the host of their URL.
    pub server_name: Option<String>,
}

/// How to open a store. `Debug` shows no secret.
#[derive(Clone)]
pub struct EtcdOptions {
    /// URLs of the servers, `http://` or `https://` (all of one kind). The first that works is used until it fails.
    pub endpoints: Vec<String>,
    /// Required for `https://`.
    pub tls: Option<Tls>,
    /// User and password, where etcd has authentication enabled. The user needs a role with read and write on the prefix.
    pub user: Option<(String, String)>,
    /// Everything of this cloud lies below this text; it must end with a slash.
    pub prefix: String,
    /// How long a call is tried, on one server after the other, before it gives up.
    pub patience: Duration,
    /// How much past is kept. None leaves compaction to etcd: compaction concerns all of etcd, so that is right where others use it too.
    pub history: Option<HistoryLimits>,
    /// Time for ages.
    pub clock: SharedClock,
    /// Incarnation of a cloud that is made by opening it: 1 when it is new, more when it goes on with the data of another store.
    pub first_incarnation: u32,
    /// Where names of leases come from.
    pub random: SharedRandom,
}

impl EtcdOptions {
    /// Servers without TLS and password, prefix `oblak/`, the usual history and patience.
    pub fn new(endpoints: impl IntoIterator<Item = impl Into<String>>) -> Self {
        Self {
            endpoints: endpoints.into_iter().map(Into::into).collect(),
            tls: None,
            user: None,
            prefix: "oblak/".into(),
            patience: PATIENCE,
            history: Some(HistoryLimits::default()),
            clock: clock::system(),
            first_incarnation: 1,
            random: random::system(),
        }
    }
}

impl fmt::Debug for EtcdOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EtcdOptions")
            .field("endpoints", &self.endpoints)
            .field("tls", &self.tls.is_some())
            .field("user", &self.user.as_ref().map(|(user, _)| user))
            .field("prefix", &self.prefix)
            .field("history", &self.history)
            .finish_non_exhaustive()
    }
}
