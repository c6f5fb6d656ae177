//! Listening: TLS with optional client certificates, HTTP/1.1 and HTTP/2, and an orderly end.

use std::net::SocketAddr;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use axum::Router;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use oblak_identity::pki::{self, Ca};
use oblak_platform::clock::SharedClock;
use oblak_platform::random::SharedRandom;
use oblak_platform::task;
use oblak_store::cache::Notice;
use oblak_store::{Cache, SharedStore};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::{ClientHello, ResolvesServerCert, WebPkiClientVerifier};
use rustls::sign::CertifiedKey;
use rustls::{RootCertStore, ServerConfig};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::{CancellationToken, DropGuard};
use tower::Service;

use crate::auth::{PeerAddress, PeerNode, PeerUntil};
use crate::config::ApiConfig;
use crate::docs;
use crate::error::ServerError;
use crate::routes;
use crate::state::App;

const HANDSHAKE: Duration = Duration::from_secs(10);
/// A client has so long to send the head of a request.
const HEAD: Duration = Duration::from_secs(30);
/// How often it is looked whether the server's certificate must be renewed.
const RENEWAL: Duration = Duration::from_secs(12 * 3600);
/// HTTP/2 requests on one connection at once; above it clients wait.
const H2_STREAMS: u32 = 256;

/// The API server.
pub struct Server {
    app: App,
    listener: Option<(TcpListener, SocketAddr)>,
    tls: Option<Arc<Certificate>>,
    /// Background tasks, watches and streams end with the server.
    stop: DropGuard,
}

impl Server {
    /// Prepares authority, certificate and cache, and takes the address. Serves nothing yet.
    ///
    /// # Errors
    /// The address is taken, the certificates cannot be used, or the store does not answer.
    pub async fn bind(
        config: ApiConfig,
        store: SharedStore,
        clock: SharedClock,
        random: SharedRandom,
    ) -> Result<Self, ServerError> {
        let ca = pki::ensure_ca(&config.pki, clock.now())?;
        let certificate = Certificate::load(&config, &ca, &clock)?;
        let address = config.listen;
        let failed = |reason| ServerError::Listen { address, reason };
        let listener = TcpListener::bind(address).await.map_err(failed)?;
        let local = listener.local_addr().map_err(failed)?;
        let app = start(config, store, clock, random, Some(ca)).await?;
        let stop = app.stopping.clone().drop_guard();
        Ok(Self { app, listener: Some((listener, local)), tls: Some(Arc::new(certificate)), stop })
    }

    /// Without address and TLS: only [`Server::router`] works. For the simulator and tests.
    ///
    /// # Errors
    /// The store does not answer, or the authority cannot be made.
    pub async fn in_process(
        config: ApiConfig,
        store: SharedStore,
        clock: SharedClock,
        random: SharedRandom,
    ) -> Result<Self, ServerError> {
        let ca = pki::ensure_ca(&config.pki, clock.now())?;
        let app = start(config, store, clock, random, Some(ca)).await?;
        let stop = app.stopping.clone().drop_guard();
        Ok(Self { app, listener: None, tls: None, stop })
    }

    /// Lets the API look after the servers of this cloud. Only the first call counts.
    pub fn with_cluster(&self, cluster: Arc<dyn crate::members::Cluster>) {
        let _ = self.app.cluster.set(cluster);
    }

    /// Where it listens; none when in process.
    #[must_use]
    pub fn local_addr(&self) -> Option<SocketAddr> {
        self.listener.as_ref().map(|(_, address)| *address)
    }

    /// The routes, without TLS; of use while the server lives. A request counts as a node's when it has the extension [`crate::PeerNode`].
    pub fn router(&self) -> Router {
        routes::router(self.app.clone())
    }

    /// Ends watches, streams and tunnels of [`Server::router`], as a shutdown does.
    pub fn stop_streams(&self) {
        self.app.stopping.cancel();
    }

    /// Serves until `shutdown`: then takes no new connections, ends streams, and lets requests finish within the limit of the configuration.
    ///
    /// # Errors
    /// TLS cannot be set up. Errors of single connections are logged.
    pub async fn serve(self, shutdown: CancellationToken) -> Result<(), ServerError> {
        let Self { app, listener, tls, stop } = self;
        let (Some((listener, _)), Some(certificate)) = (listener, tls) else { return Ok(()) };
        let acceptor = acceptor(&app, &certificate)?;
        let renewal = tokio::spawn(renew(app.clone(), certificate));
        let connections = Arc::new(Semaphore::new(app.config.limits.connections));
        let graceful = GracefulShutdown::new();
        let router = routes::router(app.clone());
        loop {
            let accepted = tokio::select! {
                biased;
                () = shutdown.cancelled() => break,
                accepted = listener.accept() => accepted,
            };
            let (socket, peer) = match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    // Out of file descriptors, most likely: others must close first.
                    tracing::warn!(%error, "cannot accept a connection");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            };
            let Ok(permit) = Arc::clone(&connections).try_acquire_owned() else {
                tracing::warn!(%peer, "too many connections; one was turned away");
                continue;
            };
            let watcher = graceful.watcher();
            let (acceptor, router) = (acceptor.clone(), router.clone());
            tokio::spawn(async move {
                connection(socket, peer, acceptor, router, watcher).await;
                drop(permit);
            });
        }
        drop(listener);
        drop(stop);
        renewal.abort();
        if tokio::time::timeout(app.config.limits.shutdown, graceful.shutdown()).await.is_err() {
            tracing::warn!("requests that were still running were cut off");
        }
        Ok(())
    }
}

async fn start(
    config: ApiConfig,
    store: SharedStore,
    clock: SharedClock,
    random: SharedRandom,
    ca: Option<Ca>,
) -> Result<App, ServerError> {
    let docs = Cache::start(Arc::clone(&store), docs::source()).await?;
    let app = App::new(config, store, docs, clock, random, ca);
    task::spawn(remember_names(app.clone()));
    task::spawn(crate::rest::finish_deletions(app.clone()));
    Ok(app)
}

/// Keeps the names of deleted objects for a while, for the delete events of watches.
async fn remember_names(app: App) {
    let mut changes = app.docs.subscribe();
    let stopping = app.stopping.clone();
    loop {
        let notice = tokio::select! {
            biased;
            () = stopping.cancelled() => return,
            notice = changes.next() => notice,
        };
        match notice {
            None => return,
            Some(Notice::Resync) => {}
            Some(Notice::Change(change)) => {
                if change.new.is_none()
                    && let Some(doc) = change.old.as_ref().and_then(|item| item.value.object())
                {
                    app.gone.add(change.key, doc.name.clone());
                }
            }
        }
    }
}

async fn connection(
    socket: TcpStream,
    peer: SocketAddr,
    acceptor: TlsAcceptor,
    router: Router,
    watcher: hyper_util::server::graceful::Watcher,
) {
    let _ = socket.set_nodelay(true);
    let tls = match tokio::time::timeout(HANDSHAKE, acceptor.accept(socket)).await {
        Ok(Ok(tls)) => tls,
        Ok(Err(error)) => {
            tracing::debug!(%peer, %error, "TLS handshake failed");
            return;
        }
        Err(_) => return,
    };
    // The verifier has checked the chain; the name in it is one that our authority gave.
    let certificate = tls.get_ref().1.peer_certificates().and_then(<[_]>::first);
    let node = certificate.and_then(|c| Some((pki::node_of_certificate(c)?, pki::end_of_certificate(c)?)));
    let service = tower::service_fn(move |mut request: hyper::Request<hyper::body::Incoming>| {
        request.extensions_mut().insert(PeerAddress(peer.ip()));
        if let Some((node, until)) = node {
            request.extensions_mut().insert(PeerNode(node));
            request.extensions_mut().insert(PeerUntil(until));
        }
        let mut router = router.clone();
        async move { router.call(request).await }
    });
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder.http1().timer(TokioTimer::new()).header_read_timeout(HEAD);
    builder
        .http2()
        .timer(TokioTimer::new())
        .max_concurrent_streams(H2_STREAMS)
        .keep_alive_interval(Duration::from_secs(20))
        .keep_alive_timeout(Duration::from_secs(20));
    let serving = builder.serve_connection_with_upgrades(TokioIo::new(tls), TowerToHyperService::new(service));
    if let Err(error) = watcher.watch(serving.into_owned()).await {
        tracing::debug!(%peer, %error, "a connection broke");
    }
}

fn acceptor(app: &App, certificate: &Arc<Certificate>) -> Result<TlsAcceptor, ServerError> {
    let bad = |e: &dyn std::fmt::Display| ServerError::Tls(e.to_string());
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut roots = RootCertStore::empty();
    if let Some(ca) = &app.ca {
        let authority = CertificateDer::from_pem_slice(ca.certificate_pem().as_bytes()).map_err(|e| bad(&e))?;
        roots.add(authority).map_err(|e| bad(&e))?;
    }
    let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider))
        .allow_unauthenticated()
        .build()
        .map_err(|e| bad(&e))?;
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|e| bad(&e))?
        .with_client_cert_verifier(verifier)
        .with_cert_resolver(Arc::clone(certificate) as Arc<dyn ResolvesServerCert>);
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(TlsAcceptor::from(Arc::new(config)))
}

/// The server's certificate, replaced while the server runs.
#[derive(Debug)]
struct Certificate(RwLock<Arc<CertifiedKey>>);

impl Certificate {
    fn load(config: &ApiConfig, ca: &Ca, clock: &SharedClock) -> Result<Self, ServerError> {
        Ok(Self(RwLock::new(Self::make(config, ca, clock)?)))
    }

    fn make(config: &ApiConfig, ca: &Ca, clock: &SharedClock) -> Result<Arc<CertifiedKey>, ServerError> {
        let mut names = pki::local_names();
        names.extend(config.server_names.iter().cloned());
        names.sort();
        names.dedup();
        let certified = pki::ensure_server_cert(&config.pki, ca, &names, clock.now())?;
        let bad = |e: &dyn std::fmt::Display| ServerError::Tls(e.to_string());
        let chain = CertificateDer::from_pem_slice(certified.certificate_pem.as_bytes()).map_err(|e| bad(&e))?;
        let key = PrivateKeyDer::from_pem_slice(certified.key_pem.as_bytes()).map_err(|e| bad(&e))?;
        let key = rustls::crypto::ring::sign::any_supported_type(&key).map_err(|e| bad(&e))?;
        Ok(Arc::new(CertifiedKey::new(vec![chain], key)))
    }
}

impl ResolvesServerCert for Certificate {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(Arc::clone(&self.0.read().unwrap_or_else(PoisonError::into_inner)))
    }
}

async fn renew(app: App, certificate: Arc<Certificate>) {
    loop {
        tokio::time::sleep(RENEWAL).await;
        let Some(ca) = &app.ca else { return };
        match Certificate::make(&app.config, ca, &app.clock) {
            Ok(fresh) => *certificate.0.write().unwrap_or_else(PoisonError::into_inner) = fresh,
            Err(error) => tracing::error!(%error, "the server's certificate cannot be renewed"),
        }
    }
}
