//! The edge: how a request reaches the server. TLS over TCP, or a call in this process for simulations.

use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use futures_util::future::BoxFuture;
use http::{Request, Response};
use http_body_util::BodyExt;
use hyper_rustls::HttpsConnector;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::{TokioExecutor, TokioTimer};
use oblak_platform::clock::{self, SharedClock};
use oblak_platform::random::{self, SharedRandom, uuid7};
use uuid::Uuid;

use crate::transport::{Body, root_cause};

/// Carries requests to a server in this process.
pub trait Transport: Send + Sync + 'static {
    /// Carries one request there and the answer back. An error means that nobody knows whether the request arrived, as with a broken connection.
    fn call(&self, request: Request<Body>) -> BoxFuture<'static, std::io::Result<Response<Body>>>;
}

/// A host that does not even refuse is left after this long, per address of it.
pub(crate) const CONNECT: Duration = Duration::from_secs(4);

type Http = hyper_util::client::legacy::Client<HttpsConnector<HttpConnector>, Body>;

/// Where requests go.
pub(crate) enum Edge {
    /// Over the network.
    Network(Box<Network>),
    /// To a server in this process.
    Process(Arc<dyn Transport>),
}

/// Servers elsewhere.
pub(crate) struct Network {
    link: RwLock<Link>,
}

/// Why there is no answer.
pub(crate) struct Broken {
    pub reason: String,
    /// Nothing was sent: the connection could not be made.
    pub unsent: bool,
}

/// What new connections are made with.
pub(crate) struct Link {
    tls: Arc<rustls::ClientConfig>,
    http: Http,
}

impl Link {
    pub fn over(tls: rustls::ClientConfig) -> Self {
        let mut tcp = HttpConnector::new();
        tcp.enforce_http(false);
        // Without it a request that takes two segments waits 40 ms for the server's delayed acknowledgement.
        tcp.set_nodelay(true);
        tcp.set_connect_timeout(Some(CONNECT));
        let connector = hyper_rustls::HttpsConnectorBuilder::new()
            .with_tls_config(tls.clone())
            .https_only()
            .enable_all_versions()
            .wrap_connector(tcp);
        let http = hyper_util::client::legacy::Client::builder(TokioExecutor::new())
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(Duration::from_secs(60))
            .build(connector);
        Self { tls: Arc::new(tls), http }
    }
}

impl Network {
    /// New connections are made with this from now on.
    pub fn change(&self, link: Link) {
        *self.link.write().unwrap_or_else(PoisonError::into_inner) = link;
    }

    /// Settings for a connection that is not one of the pool.
    pub fn tls(&self) -> Arc<rustls::ClientConfig> {
        Arc::clone(&self.link.read().unwrap_or_else(PoisonError::into_inner).tls)
    }

    fn http(&self) -> Http {
        self.link.read().unwrap_or_else(PoisonError::into_inner).http.clone()
    }
}

impl Edge {
    pub fn network(link: Link) -> Self {
        Self::Network(Box::new(Network { link: RwLock::new(link) }))
    }

    /// The answer's head with its body unread, or why there is none.
    pub async fn call(&self, request: Request<Body>) -> Result<Response<Body>, Broken> {
        match self {
            Self::Network(network) => {
                let broken =
                    |e: hyper_util::client::legacy::Error| Broken { unsent: e.is_connect(), reason: root_cause(&e) };
                let response = network.http().request(request).await.map_err(broken)?;
                let text = |e: hyper::Error| std::io::Error::other(root_cause(&e));
                Ok(response.map(|body| body.map_err(text).boxed_unsync()))
            }
            Self::Process(transport) => {
                let unsent = |e: &std::io::Error| e.kind() == std::io::ErrorKind::ConnectionRefused;
                transport.call(request).await.map_err(|e| Broken { unsent: unsent(&e), reason: e.to_string() })
            }
        }
    }
}

/// Makes idempotency keys.
pub(crate) struct Keys {
    clock: SharedClock,
    random: SharedRandom,
}

impl Default for Keys {
    fn default() -> Self {
        Self::new(clock::system(), random::system())
    }
}

impl Keys {
    pub fn new(clock: SharedClock, random: SharedRandom) -> Self {
        Self { clock, random }
    }

    pub fn next(&self) -> Uuid {
        uuid7(self.random.as_ref(), self.clock.now())
    }
}
