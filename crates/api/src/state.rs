//! What the handlers share.

use std::collections::{HashMap, HashSet, VecDeque};
use std::net::IpAddr;
use std::ops::Deref;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use oblak_control::lifecycle::Recent;
use oblak_identity::Passwords;
use oblak_identity::pki::Ca;
use oblak_model::{ApiError, Kind, Object, Project, ProjectKind, Revision, SubnetId, Timestamp};
use oblak_platform::clock::SharedClock;
use oblak_platform::random::{SharedRandom, uuid7};
use oblak_store::{Key, SharedStore};
use tokio::sync::{Notify, Semaphore};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::auth::BasicCache;
use crate::config::ApiConfig;
use crate::docs::{self, Docs};
use crate::error::store_error;
use crate::limits::{Buckets, StreamLimits};
use crate::metrics::Metrics;
use crate::middleware::RequestIds;
use crate::session::{Projects, Sessions};
use crate::stream::Tunnels;
use crate::usage::UsageRings;

/// How long a reader waits for a revision that it names.
pub(crate) const CATCH_UP: Duration = Duration::from_secs(5);

/// Shared state; cheap to clone.
#[derive(Clone)]
pub(crate) struct App(Arc<Inner>);

impl Deref for App {
    type Target = Inner;
    fn deref(&self) -> &Inner {
        &self.0
    }
}

/// The state itself.
pub(crate) struct Inner {
    pub config: ApiConfig,
    pub store: SharedStore,
    pub docs: Docs,
    pub clock: SharedClock,
    pub random: SharedRandom,
    pub passwords: Passwords,
    pub basic: BasicCache,
    pub sessions: Sessions,
    pub projects: Projects,
    pub ca: Option<Ca>,
    /// The servers among which the state is spread; none where it is in a file, or in an etcd of others.
    pub cluster: OnceLock<Arc<dyn crate::members::Cluster>>,
    pub metrics: Metrics,
    pub request_ids: RequestIds,
    pub requests: Buckets,
    pub failed_logins: Buckets,
    pub streams: StreamLimits,
    pub watches: Arc<Semaphore>,
    pub tunnels: Tunnels,
    pub usage: UsageRings,
    pub claims: Mutex<Claims>,
    pub gone: Tombstones,
    pub pages: crate::rest::PageCache,
    /// Cancelled when the server stops: streams and watches end.
    pub stopping: CancellationToken,
    recent: Mutex<Recent>,
}

impl App {
    pub fn new(
        config: ApiConfig,
        store: SharedStore,
        docs: Docs,
        clock: SharedClock,
        random: SharedRandom,
        ca: Option<Ca>,
    ) -> Self {
        let limits = config.limits.clone();
        Self(Arc::new(Inner {
            passwords: Passwords::new(Arc::clone(&random)),
            basic: BasicCache::default(),
            sessions: Sessions::default(),
            projects: Projects::default(),
            metrics: Metrics::default(),
            request_ids: RequestIds::new(&random),
            requests: Buckets::new(f64::from(limits.requests_per_second), f64::from(limits.requests_burst)),
            failed_logins: Buckets::new(
                f64::from(limits.failed_logins_per_minute) / 60.0,
                f64::from(limits.failed_logins_per_minute),
            ),
            streams: StreamLimits::new(limits.streams, limits.streams_per_principal),
            watches: Arc::new(Semaphore::new(limits.watches)),
            tunnels: Tunnels::default(),
            usage: UsageRings::default(),
            claims: Mutex::default(),
            gone: Tombstones::default(),
            pages: crate::rest::PageCache::default(),
            stopping: CancellationToken::new(),
            recent: Mutex::new(Recent::new()),
            cluster: OnceLock::new(),
            config,
            store,
            docs,
            clock,
            random,
            ca,
        }))
    }

    /// A fresh id.
    pub fn uuid(&self) -> Uuid {
        uuid7(&*self.random, self.clock.now())
    }

    pub fn now(&self) -> Timestamp {
        self.clock.now()
    }

    /// Waits until reads show `revision`.
    pub async fn caught_up(&self, revision: Revision) -> Result<(), ApiError> {
        self.docs.wait_for(revision, CATCH_UP).await.map(|_| ()).map_err(|e| store_error(&e))
    }

    /// The object of a kind by name or id.
    pub fn find<K: Kind>(&self, scope: &str, name_or_id: &str) -> Result<Option<Object<K>>, ApiError> {
        docs::find::<K>(&self.docs, scope, name_or_id)
            .map(|item| docs::object::<K>(&item))
            .transpose()
            .map_err(|e| store_error(&e))
    }

    /// As [`App::find`], decoded once for all who ask.
    pub fn shared<K: Kind>(&self, scope: &str, name_or_id: &str) -> Result<Option<Arc<Object<K>>>, ApiError> {
        docs::find::<K>(&self.docs, scope, name_or_id)
            .map(|item| docs::shared::<K>(&item))
            .transpose()
            .map_err(|e| store_error(&e))
    }

    /// All objects of a kind.
    pub fn all<K: Kind>(&self, scope: Option<&str>) -> Result<Vec<Object<K>>, ApiError> {
        let items = docs::all::<K>(&self.docs, scope);
        items.iter().map(|item| docs::object::<K>(item)).collect::<Result<_, _>>().map_err(|e| store_error(&e))
    }

    /// The project with its grants; none when it does not exist. Projects are found by name only: names are in every path and key.
    pub fn granting(&self, project: &str) -> Result<Option<Arc<Project>>, ApiError> {
        if project.parse::<Uuid>().is_ok() {
            return Ok(None);
        }
        self.projects
            .find(self, project)
            .map(|item| docs::shared::<ProjectKind>(&item))
            .transpose()
            .map_err(|e| store_error(&e))
    }

    pub fn recent(&self) -> MutexGuard<'_, Recent> {
        self.recent.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn lock_claims(&self) -> MutexGuard<'_, Claims> {
        self.claims.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Addresses that commits on their way want to take, so that two requests at once do not try the same one. Only saves retries: what
/// decides is the guard in the store.
#[derive(Default)]
pub(crate) struct Claims {
    pub keys: HashSet<Key>,
    /// Where the search for a free address goes on.
    pub last: HashMap<SubnetId, IpAddr>,
}

/// Names of objects that were deleted lately, for the delete events of watches.
#[derive(Default)]
pub(crate) struct Tombstones {
    names: Mutex<Names>,
    added: Notify,
}

#[derive(Default)]
struct Names {
    by_key: HashMap<Key, Box<str>>,
    order: VecDeque<Key>,
}

const TOMBSTONES: usize = 8192;
const TOMBSTONE_WAIT: Duration = Duration::from_secs(1);

impl Tombstones {
    pub fn add(&self, key: Key, name: Box<str>) {
        let mut names = self.names.lock().unwrap_or_else(PoisonError::into_inner);
        if names.by_key.insert(key.clone(), name).is_none() {
            names.order.push_back(key);
        }
        if names.order.len() > TOMBSTONES
            && let Some(oldest) = names.order.pop_front()
        {
            names.by_key.remove(&oldest);
        }
        drop(names);
        self.added.notify_waiters();
    }

    /// The name that the object at `key` had. Waits a moment when the deletion has not reached this table yet; empty when it is not known.
    pub async fn name(&self, key: &Key) -> Box<str> {
        let deadline = tokio::time::Instant::now() + TOMBSTONE_WAIT;
        loop {
            let added = self.added.notified();
            if let Some(name) = self.names.lock().unwrap_or_else(PoisonError::into_inner).by_key.get(key) {
                return name.clone();
            }
            if tokio::time::timeout_at(deadline, added).await.is_err() {
                return Box::default();
            }
        }
    }
}
