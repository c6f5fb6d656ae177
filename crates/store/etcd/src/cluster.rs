//! Connections to the servers of etcd: one is used until it fails, then the next. Every call has a deadline.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock, PoisonError, RwLock};
use std::time::{Duration, Instant};

use etcd_client::{Certificate, Client, ConnectOptions, Identity, ResponseHeader, TlsOptions};
use oblak_store::{Result, StoreError};
use tokio::sync::Mutex;

use crate::EtcdOptions;
use crate::failure::{Failure, Kind};

/// Longest wait for one answer. About as long as an election with etcd's defaults: whoever asked the leader that is gone asks another
/// server when there is a new one.
pub const ATTEMPT: Duration = Duration::from_millis(2000);
const CONNECT: Duration = Duration::from_millis(1500);
const FIRST_PAUSE: Duration = Duration::from_millis(20);
const LAST_PAUSE: Duration = Duration::from_millis(320);
/// Least interval that etcd's servers allow by default is 5 s (`--grpc-keepalive-min-time`); more often and they hang up.
const PING: Duration = Duration::from_secs(10);

struct Server {
    url: String,
    /// Dropped after a timeout, so that the next call does not wait on a connection whose other end is gone.
    client: Mutex<Option<Client>>,
}

/// The servers at the moment, and how to connect to them.
struct Links {
    servers: Vec<Arc<Server>>,
    connect: ConnectOptions,
}

/// The servers.
pub struct Cluster {
    links: RwLock<Arc<Links>>,
    current: AtomicUsize,
    patience: Duration,
    /// Identity of the etcd cluster that was opened; answers of another are refused.
    id: OnceLock<u64>,
    /// Newest revision in any answer.
    seen: AtomicU64,
}

/// One server to talk to.
pub struct Chosen {
    server: Arc<Server>,
    pub url: String,
    pub client: Client,
}

impl Cluster {
    /// Does not connect yet.
    pub fn new(options: &EtcdOptions) -> Result<Self> {
        check(options)?;
        let servers = options.endpoints.iter().map(|url| Server::new(url)).collect();
        Ok(Self {
            links: RwLock::new(Arc::new(Links { servers, connect: connect_options(options) })),
            current: AtomicUsize::new(0),
            patience: options.patience,
            id: OnceLock::new(),
            seen: AtomicU64::new(0),
        })
    }

    /// Uses other servers, other certificates, or both, from the next call on. Calls and watches under way are left alone. With the same
    /// certificates the connections to servers that stay are kept; with others new ones are made, which show the new certificate.
    pub fn retarget(&self, options: &EtcdOptions, same_certificates: bool) -> Result<()> {
        check(options)?;
        let mut links = self.links.write().unwrap_or_else(PoisonError::into_inner);
        let kept = |url: &String| links.servers.iter().find(|known| same_certificates && known.url == *url).cloned();
        let servers = options.endpoints.iter().map(|url| kept(url).unwrap_or_else(|| Server::new(url))).collect();
        *links = Arc::new(Links { servers, connect: connect_options(options) });
        self.current.store(0, Ordering::Release);
        Ok(())
    }

    fn links(&self) -> Arc<Links> {
        Arc::clone(&self.links.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// URLs of the servers.
    pub fn urls(&self) -> Vec<String> {
        self.links().servers.iter().map(|server| server.url.clone()).collect()
    }

    /// Newest revision in any answer so far.
    pub fn seen(&self) -> u64 {
        self.seen.load(Ordering::Acquire)
    }

    /// The identity of the etcd cluster, once an answer came.
    pub fn id(&self) -> Option<u64> {
        self.id.get().copied()
    }

    /// A client of the server in use.
    pub async fn choose(&self) -> Result<Chosen, Failure> {
        self.client_of(self.current.load(Ordering::Acquire)).await
    }

    /// A client of one particular server; numbers beyond the last begin again.
    pub async fn client_of(&self, index: usize) -> Result<Chosen, Failure> {
        let links = self.links();
        let server = Arc::clone(&links.servers[index % links.servers.len()]);
        let mut slot = server.client.lock().await;
        if let Some(client) = &*slot {
            let (url, client) = (server.url.clone(), client.clone());
            drop(slot);
            return Ok(Chosen { server, url, client });
        }
        // Only with a password is anything sent here; otherwise the connection is made by the first call.
        let connecting = Client::connect([server.url.as_str()], Some(links.connect.clone()));
        let failure = match tokio::time::timeout(CONNECT, connecting).await {
            Ok(Ok(client)) => {
                *slot = Some(client.clone());
                drop(slot);
                return Ok(Chosen { url: server.url.clone(), server, client });
            }
            Ok(Err(error)) => {
                let mut failure = Failure::from_client(&server.url, &error);
                if failure.kind == Kind::Lost {
                    // Logging in changes nothing.
                    failure.kind = Kind::NotSent;
                }
                failure
            }
            Err(_) => Failure::new(Kind::NotSent, Failure::timeout(&server.url, CONNECT).detail),
        };
        drop(slot);
        self.next_after(&server);
        Err(failure)
    }

    /// Moves on from a server, unless somebody has moved on already.
    fn next_after(&self, server: &Arc<Server>) {
        let servers = &self.links().servers;
        let current = self.current.load(Ordering::Acquire);
        if Arc::ptr_eq(&servers[current % servers.len()], server) {
            let next = (current + 1) % servers.len();
            // Fails when somebody else has just moved on, which is as good.
            let _ = self.current.compare_exchange(current, next, Ordering::AcqRel, Ordering::Acquire);
        }
    }

    /// Stops using a server that failed, and its connection.
    pub async fn failed(&self, chosen: &Chosen) {
        self.next_after(&chosen.server);
        *chosen.server.client.lock().await = None;
    }

    /// One attempt on the server in use, at most [`ATTEMPT`] long. Moves on to the next server when this one does not work.
    pub async fn attempt<T, F>(&self, work: impl FnOnce(Client) -> F) -> Result<T, Failure>
    where
        F: Future<Output = Result<T, etcd_client::Error>>,
    {
        let chosen = self.choose().await?;
        let failure = match tokio::time::timeout(ATTEMPT, work(chosen.client.clone())).await {
            Ok(Ok(answer)) => return Ok(answer),
            Ok(Err(error)) => Failure::from_client(&chosen.url, &error),
            Err(_) => Failure::timeout(&chosen.url, ATTEMPT),
        };
        if failure.is_transient() {
            tracing::debug!(failure = failure.detail, "a call to etcd failed");
            self.failed(&chosen).await;
        }
        Err(failure)
    }

    /// The pauses between the attempts of one call.
    pub fn pauses(&self) -> Pauses {
        Pauses { until: Instant::now() + self.patience, next: FIRST_PAUSE }
    }

    /// Attempts until one succeeds, is refused, or patience is used up. Only for what may be carried out twice.
    pub async fn call<T, F>(&self, work: impl Fn(Client) -> F) -> Result<T, Failure>
    where
        F: Future<Output = Result<T, etcd_client::Error>>,
    {
        let mut pauses = self.pauses();
        loop {
            match self.attempt(&work).await {
                Err(failure) if failure.is_transient() => {
                    if !pauses.pause().await {
                        return Err(failure);
                    }
                }
                other => return other,
            }
        }
    }

    /// Checks who answered and notes how far the cluster is.
    pub fn note(&self, header: Option<&ResponseHeader>) -> Result<u64, Failure> {
        let Some(header) = header else { return Err(Failure::new(Kind::Lost, "etcd sent an answer without a header")) };
        if *self.id.get_or_init(|| header.cluster_id()) != header.cluster_id() {
            return Err(Failure::new(
                Kind::Refused,
                format!(
                    "the servers belong to etcd cluster {:x} now and not to the one that was opened; if etcd was restored, restart this server",
                    header.cluster_id()
                ),
            ));
        }
        let revision = u64::try_from(header.revision()).unwrap_or(0);
        self.seen.fetch_max(revision, Ordering::AcqRel);
        Ok(revision)
    }
}

impl Server {
    fn new(url: &str) -> Arc<Self> {
        Arc::new(Self { url: url.to_owned(), client: Mutex::new(None) })
    }
}

/// Looks for contradictions.
fn check(options: &EtcdOptions) -> Result<()> {
    let refused = |detail: String| Err(StoreError::Refused { detail });
    if options.endpoints.is_empty() {
        return refused("no etcd endpoint was given; name at least one URL".into());
    }
    if !options.prefix.ends_with('/') || options.prefix.len() < 2 {
        return refused(format!("the prefix {:?} must be some text with a slash at its end", options.prefix));
    }
    for url in &options.endpoints {
        match (url.starts_with("https://"), url.starts_with("http://"), options.tls.is_some()) {
            (true, _, false) => {
                return refused(format!(
                    "{url} needs the certificate of the authority that etcd's certificate is from"
                ));
            }
            (_, true, true) => {
                return refused(format!("{url} does not use TLS, but certificates were given; use https://"));
            }
            (false, false, _) => return refused(format!("{url:?} is not an http:// or https:// URL")),
            _ => {}
        }
    }
    Ok(())
}

/// Growing pauses up to a deadline.
pub struct Pauses {
    until: Instant,
    next: Duration,
}

impl Pauses {
    /// Waits; false when the time is over.
    pub async fn pause(&mut self) -> bool {
        if Instant::now() + self.next >= self.until {
            return false;
        }
        tokio::time::sleep(self.next).await;
        self.next = (self.next * 2).min(LAST_PAUSE);
        true
    }
}

fn connect_options(options: &EtcdOptions) -> ConnectOptions {
    let mut connect = ConnectOptions::new()
        .with_connect_timeout(CONNECT)
        .with_keep_alive(PING, CONNECT * 2)
        .with_keep_alive_while_idle(true)
        // A server without a leader says so at once instead of answering late or, for watches, never.
        .with_require_leader(true);
    if let Some((user, password)) = &options.user {
        connect = connect.with_user(user, password).with_auto_token_refresh(true);
    }
    if let Some(tls) = &options.tls {
        let mut config = TlsOptions::new().ca_certificate(Certificate::from_pem(&tls.ca));
        if let Some((certificate, key)) = &tls.identity {
            config = config.identity(Identity::from_pem(certificate, key));
        }
        if let Some(name) = &tls.server_name {
            config = config.domain_name(name);
        }
        connect = connect.with_tls(config);
    }
    connect
}
