//! HTTP with our certificate authority: one request, one answer, problems as [`ApiError`].

use std::sync::{Arc, Mutex};
use std::time::Duration;

use base64::Engine;
use bytes::Bytes;
use http::header::{ACCEPT, AUTHORIZATION, CONTENT_TYPE, IF_MATCH};
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full};
use oblak_model::{ApiError, Code, Revision};
use oblak_platform::clock::SharedClock;
use oblak_platform::random::SharedRandom;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::Result;
use crate::config::{Auth, ClientConfig};
use crate::edge::{Broken, Edge, Keys, Link, Transport};
use crate::servers::{Servers, checked};

/// Largest JSON answer that is read.
const MAX_ANSWER_BYTES: usize = 64 << 20;

/// Header by which the server knows a request that it has carried out before.
pub(crate) const IDEMPOTENCY_KEY: &str = "idempotency-key";
/// Header in which the server says how far it is.
pub(crate) const REVISION: &str = "x-oblak-revision";
/// Header in which a reader says how far the server has to be.
pub(crate) const MIN_REVISION: &str = "x-oblak-min-revision";

/// What can go wrong with a call.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The server refused; the problem document says why.
    #[error("{0}")]
    Api(Box<ApiError>),
    /// The server cannot be reached.
    #[error("cannot reach {server}: {reason}")]
    Unreachable {
        /// The server.
        server: String,
        /// What the system said.
        reason: String,
    },
    /// The server did not answer in time.
    #[error("{server} did not answer within {seconds} s")]
    Timeout {
        /// The server.
        server: String,
        /// The deadline.
        seconds: u64,
    },
    /// The settings of the client are wrong.
    #[error("{0}")]
    Config(String),
    /// The answer is not what the API promises.
    #[error("unexpected answer from the server: {0}")]
    Answer(String),
}

impl ClientError {
    /// The code of a problem the server reported.
    #[must_use]
    pub fn code(&self) -> Option<Code> {
        match self {
            Self::Api(e) => Some(e.code),
            _ => None,
        }
    }
    /// Whether the request may have been carried out, or could be in a moment: the server went away, or its store did.
    #[must_use]
    pub fn is_unsure(&self) -> bool {
        matches!(self, Self::Unreachable { .. } | Self::Timeout { .. }) || self.code() == Some(Code::Unavailable)
    }
    /// Whether the same call may succeed later.
    #[must_use]
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Unreachable { .. } | Self::Timeout { .. } => true,
            Self::Api(e) => matches!(e.status, 429 | 503),
            _ => false,
        }
    }
}

impl From<ApiError> for ClientError {
    fn from(error: ApiError) -> Self {
        Self::Api(Box::new(error))
    }
}

/// Body of a request or an answer.
pub type Body = UnsyncBoxBody<Bytes, std::io::Error>;

pub(crate) fn full(bytes: impl Into<Bytes>) -> Body {
    Full::new(bytes.into()).map_err(|never| match never {}).boxed_unsync()
}

/// Connection pools to the API servers of one cloud, with one identity. A call goes to the server that answered last, and to the next one
/// when it does not. Cheap to clone.
#[derive(Clone)]
pub struct Client {
    pub(crate) inner: Arc<Inner>,
    pub(crate) timeout: Duration,
}

pub(crate) struct Inner {
    pub servers: Servers,
    pub edge: Arc<Edge>,
    pub keys: Arc<Keys>,
    ca_pem: String,
    authorization: Option<HeaderValue>,
    /// Newest revision this client has seen of its own writes: reads wait for it.
    seen: Mutex<Option<Revision>>,
}

impl std::fmt::Debug for Client {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Client").field("server", &self.inner.servers.current()).finish_non_exhaustive()
    }
}

fn tls_config(ca_pem: &str, auth: &Auth) -> Result<rustls::ClientConfig> {
    let bad = |what: &str, e: &dyn std::fmt::Display| ClientError::Config(format!("{what}: {e}"));
    let mut roots = rustls::RootCertStore::empty();
    for cert in CertificateDer::pem_slice_iter(ca_pem.as_bytes()) {
        let cert = cert.map_err(|e| bad("the CA certificate is not PEM", &e))?;
        roots.add(cert).map_err(|e| bad("the CA certificate cannot be used", &e))?;
    }
    if roots.is_empty() {
        return Err(ClientError::Config("the CA certificate is empty; give the file ca.pem of the cloud".into()));
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|e| bad("TLS", &e))?
        .with_root_certificates(roots);
    let Auth::Certificate { cert_pem, key_pem } = auth else { return Ok(builder.with_no_client_auth()) };
    let chain = CertificateDer::pem_slice_iter(cert_pem.as_bytes())
        .collect::<std::result::Result<Vec<_>, _>>()
        .map_err(|e| bad("the client certificate is not PEM", &e))?;
    let key = PrivateKeyDer::from_pem_slice(key_pem.as_bytes()).map_err(|e| bad("the client key is not PEM", &e))?;
    builder.with_client_auth_cert(chain, key).map_err(|e| bad("the client certificate cannot be used", &e))
}

fn authorization(auth: &Auth) -> Result<Option<HeaderValue>> {
    let text = match auth {
        Auth::None | Auth::Certificate { .. } => return Ok(None),
        Auth::Bearer(token) => format!("Bearer {token}"),
        Auth::Basic(user, password) => {
            format!("Basic {}", base64::engine::general_purpose::STANDARD.encode(format!("{user}:{password}")))
        }
    };
    let mut value = HeaderValue::from_str(&text)
        .map_err(|_| ClientError::Config("the token has characters that a header cannot carry".into()))?;
    value.set_sensitive(true);
    Ok(Some(value))
}

impl Client {
    /// A client. Connects on first use.
    ///
    /// # Errors
    /// [`ClientError::Config`] when the address, certificate authority or credentials cannot be used.
    pub fn new(config: &ClientConfig) -> Result<Self> {
        Self::with_link(config, Link::over(tls_config(&config.ca_pem, &config.auth)?))
    }

    pub(crate) fn with_link(config: &ClientConfig, link: Link) -> Result<Self> {
        let inner = Inner {
            edge: Arc::new(Edge::network(link)),
            keys: Arc::default(),
            ca_pem: config.ca_pem.clone(),
            servers: Servers::new(checked(&config.server)?, config.others.iter().cloned()),
            authorization: authorization(&config.auth)?,
            seen: Mutex::new(None),
        };
        Ok(Self { inner: Arc::new(inner), timeout: config.timeout })
    }

    /// A client of a server in this process, for simulations: calls go through `transport`, ids and times come from the given sources.
    /// Streams ([`Client::exec`], ..., [`Client::node_tunnel`]) need a network and fail. A certificate in `auth` is not looked at: whom
    /// the transport speaks for is its own matter.
    ///
    /// # Errors
    /// [`ClientError::Config`] when the credentials cannot be used.
    pub fn in_process(
        config: &ClientConfig,
        transport: Arc<dyn Transport>,
        clock: SharedClock,
        random: SharedRandom,
    ) -> Result<Self> {
        let inner = Inner {
            edge: Arc::new(Edge::Process(transport)),
            keys: Arc::new(Keys::new(clock, random)),
            ca_pem: config.ca_pem.clone(),
            servers: Servers::new(config.server.trim_end_matches('/').to_string(), config.others.iter().cloned()),
            authorization: authorization(&config.auth)?,
            seen: Mutex::new(None),
        };
        Ok(Self { inner: Arc::new(inner), timeout: config.timeout })
    }

    /// Uses another client certificate from now on. Streams and calls that are open go on with the old one; every new connection, and
    /// so every later call, has the new one. In a simulation there is nothing to change.
    ///
    /// # Errors
    /// [`ClientError::Config`] when it cannot be used; then nothing changes.
    pub fn set_certificate(&self, cert_pem: &str, key_pem: &str) -> Result<()> {
        let Edge::Network(network) = &*self.inner.edge else { return Ok(()) };
        let auth = Auth::Certificate { cert_pem: cert_pem.into(), key_pem: key_pem.into() };
        network.change(Link::over(tls_config(&self.inner.ca_pem, &auth)?));
        Ok(())
    }

    /// The address of the server that answered last, or is tried first.
    #[must_use]
    pub fn server(&self) -> String {
        self.inner.servers.current()
    }

    /// The servers that are known, beginning with [`Client::server`].
    #[must_use]
    pub fn servers(&self) -> Vec<String> {
        self.inner.servers.in_turn()
    }

    /// These are the servers now. The one that is talked to stays until it fails.
    pub fn learn(&self, servers: impl IntoIterator<Item = String>) {
        self.inner.servers.learn(servers);
    }

    /// A client with the same identity and connections that talks to this server only.
    ///
    /// # Errors
    /// [`ClientError::Config`] when it is no address.
    pub fn only(&self, server: &str) -> Result<Self> {
        let inner = Inner {
            servers: Servers::pinned(checked(server)?),
            edge: Arc::clone(&self.inner.edge),
            keys: Arc::clone(&self.inner.keys),
            ca_pem: self.inner.ca_pem.clone(),
            authorization: self.inner.authorization.clone(),
            seen: Mutex::new(self.seen()),
        };
        Ok(Self { inner: Arc::new(inner), timeout: self.timeout })
    }

    /// The same client with another deadline: what one learns, the other knows.
    #[must_use]
    pub fn within(&self, timeout: Duration) -> Self {
        Self { inner: Arc::clone(&self.inner), timeout }
    }

    /// Reads from now on wait until the server is at least here. Set by own writes; set it to carry on from another process.
    pub fn require_revision(&self, revision: Revision) {
        let mut seen = self.inner.seen.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        // A store that was restored has a new incarnation: what was seen before says nothing about it.
        *seen = Some(match *seen {
            Some(old) if old.incarnation == revision.incarnation => old.max(revision),
            _ => revision,
        });
    }

    fn seen(&self) -> Option<Revision> {
        *self.inner.seen.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    pub(crate) fn headers(&self) -> HeaderMap {
        let mut headers = HeaderMap::new();
        if let Some(value) = &self.inner.authorization {
            headers.insert(AUTHORIZATION, value.clone());
        }
        if let Some(value) = self.seen().and_then(|r| HeaderValue::from_str(&r.to_string()).ok()) {
            headers.insert(MIN_REVISION, value);
        }
        headers
    }

    /// Sends one request whose body cannot be sent twice. Returns the answer's head with its body unread; problems become errors.
    pub(crate) async fn send(
        &self,
        method: Method,
        path: &str,
        extra: HeaderMap,
        body: Body,
    ) -> Result<Response<Body>> {
        let server = self.inner.servers.current();
        let sent = self.attempt(&server, method, path, extra, body, self.timeout).await;
        sent.map_err(|failure| {
            if failure.elsewhere.is_some() {
                self.inner.servers.failed(&server);
            }
            failure.error
        })
    }

    /// As [`Client::send`], and asks the other servers when one does not answer, or with `whole` not to the end: each once. What may have been
    /// carried out already is only sent again when that changes nothing.
    async fn send_anywhere(
        &self,
        method: &Method,
        path: &str,
        extra: &HeaderMap,
        body: &Bytes,
        whole: bool,
    ) -> Result<Response<Body>> {
        let repeatable = *method == Method::GET
            || extra.contains_key(IDEMPOTENCY_KEY)
            || (*method == Method::PATCH && !extra.contains_key(IF_MATCH))
            || (*method == Method::POST && is_agents(path));
        let servers = self.inner.servers.in_turn();
        let several = servers.len() > 1;
        let mut left = servers.len();
        for server in servers {
            left -= 1;
            // A server that is frozen must leave time for another.
            let timeout = if left > 0 && repeatable { self.timeout / 3 } else { self.timeout };
            let mut sent =
                self.attempt(&server, method.clone(), path, extra.clone(), full(body.clone()), timeout).await;
            if whole && let Ok(response) = sent {
                sent = self.whole(&server, response).await;
            }
            let failure = match sent {
                Ok(response) => {
                    if several {
                        self.inner.servers.answered(&server);
                    }
                    return Ok(response);
                }
                Err(failure) => failure,
            };
            let again = match failure.elsewhere {
                Some(Elsewhere::Unsent) => true,
                Some(Elsewhere::Unsure) => repeatable,
                None => false,
            };
            if failure.elsewhere.is_some() {
                self.inner.servers.failed(&server);
            }
            if !again || left == 0 {
                return Err(failure.error);
            }
            tracing::debug!(error = %failure.error, "asking another server");
        }
        Err(ClientError::Config("no server is known".into()))
    }

    /// Reads an answer to its end. A server that dies over it has not answered.
    async fn whole(&self, server: &str, response: Response<Body>) -> Result<Response<Body>, Failure> {
        let (head, body) = response.into_parts();
        match self.read(Response::new(body)).await {
            Ok(bytes) => Ok(Response::from_parts(head, full(bytes))),
            Err(ClientError::Answer(reason)) => {
                let error = ClientError::Unreachable { server: server.into(), reason };
                Err(Failure { error, elsewhere: Some(Elsewhere::Unsure) })
            }
            Err(error) => Err(Failure { error, elsewhere: Some(Elsewhere::Unsure) }),
        }
    }

    async fn attempt(
        &self,
        server: &str,
        method: Method,
        path: &str,
        extra: HeaderMap,
        body: Body,
        timeout: Duration,
    ) -> Result<Response<Body>, Failure> {
        let write = method != Method::GET;
        let mut request = Request::builder()
            .method(method)
            .uri(format!("{server}{path}"))
            .body(body)
            .map_err(|e| Failure::here(ClientError::Config(format!("{path:?} is not a path: {e}"))))?;
        *request.headers_mut() = self.headers();
        request.headers_mut().extend(extra);
        let answer = tokio::time::timeout(timeout, self.inner.edge.call(request)).await;
        let response = match answer {
            Err(_) => {
                let error = ClientError::Timeout { server: server.into(), seconds: timeout.as_secs() };
                return Err(Failure { error, elsewhere: Some(Elsewhere::Unsure) });
            }
            Ok(Err(Broken { reason, unsent })) => {
                let error = ClientError::Unreachable { server: server.into(), reason };
                let elsewhere = Some(if unsent { Elsewhere::Unsent } else { Elsewhere::Unsure });
                return Err(Failure { error, elsewhere });
            }
            Ok(Ok(response)) => response,
        };
        if write && let Some(revision) = response.headers().get(REVISION).and_then(|v| v.to_str().ok()?.parse().ok()) {
            self.require_revision(revision);
        }
        if response.status().is_success() || response.status() == StatusCode::SWITCHING_PROTOCOLS {
            return Ok(response);
        }
        let error = self.problem(response).await;
        let elsewhere = of_this_server(&error).then_some(Elsewhere::Unsure);
        Err(Failure { error, elsewhere })
    }

    async fn problem(&self, response: Response<Body>) -> ClientError {
        let status = response.status();
        match self.read(response).await {
            Ok(bytes) => serde_json::from_slice::<ApiError>(&bytes).map_or_else(
                |_| {
                    ClientError::Answer(format!(
                        "{status}: {}",
                        String::from_utf8_lossy(&bytes[..bytes.len().min(300)])
                    ))
                },
                ClientError::from,
            ),
            Err(e) => e,
        }
    }

    pub(crate) async fn read(&self, response: Response<Body>) -> Result<Bytes> {
        let body = http_body_util::Limited::new(response.into_body(), MAX_ANSWER_BYTES);
        match tokio::time::timeout(self.timeout, body.collect()).await {
            Ok(Ok(collected)) => Ok(collected.to_bytes()),
            Ok(Err(e)) => Err(ClientError::Answer(format!("the answer ended early: {e}"))),
            Err(_) => Err(ClientError::Timeout { server: self.server(), seconds: self.timeout.as_secs() }),
        }
    }

    /// One call with JSON both ways.
    pub(crate) async fn call<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        extra: HeaderMap,
        body: Option<&impl Serialize>,
    ) -> Result<T> {
        let bytes = self.call_bytes(method, path, extra, body).await?;
        let bytes = if bytes.is_empty() { Bytes::from_static(b"null") } else { bytes };
        serde_json::from_slice(&bytes).map_err(|e| ClientError::Answer(format!("{path}: {e}")))
    }

    async fn call_bytes(
        &self,
        method: Method,
        path: &str,
        mut extra: HeaderMap,
        body: Option<&impl Serialize>,
    ) -> Result<Bytes> {
        extra.insert(ACCEPT, HeaderValue::from_static("application/json"));
        let body = match body {
            None => Bytes::new(),
            Some(value) => {
                extra.entry(CONTENT_TYPE).or_insert(HeaderValue::from_static("application/json"));
                serde_json::to_vec(value)
                    .map_err(|e| ClientError::Config(format!("the request cannot be written: {e}")))?
                    .into()
            }
        };
        let response = self.send_anywhere(&method, path, &extra, &body, true).await?;
        self.read(response).await
    }

    /// `GET` of any path, as JSON.
    ///
    /// # Errors
    /// As every call.
    pub async fn get_json<T: DeserializeOwned>(&self, path: &str) -> Result<T> {
        self.call(Method::GET, path, HeaderMap::new(), None::<&()>).await
    }

    /// `POST` to any path, JSON both ways.
    ///
    /// # Errors
    /// As every call.
    pub async fn post_json<T: DeserializeOwned>(&self, path: &str, body: &impl Serialize) -> Result<T> {
        self.call(Method::POST, path, HeaderMap::new(), Some(body)).await
    }

    /// `GET` of any path, the body as it comes.
    ///
    /// # Errors
    /// As every call.
    pub async fn get_stream(&self, path: &str) -> Result<TextStream> {
        let response = self.send_anywhere(&Method::GET, path, &HeaderMap::new(), &Bytes::new(), false).await?;
        Ok(TextStream { body: response.into_body() })
    }
}

impl Client {
    /// `POST` of JSON to any path, the body of the answer as it comes.
    ///
    /// # Errors
    /// As every call.
    pub async fn post_stream(&self, path: &str, body: &impl Serialize) -> Result<TextStream> {
        let mut extra = HeaderMap::new();
        extra.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        let body =
            serde_json::to_vec(body).map_err(|e| ClientError::Config(format!("the request cannot be written: {e}")))?;
        let response = self.send(Method::POST, path, extra, full(body)).await?;
        Ok(TextStream { body: response.into_body() })
    }
}

/// What became of a request that failed.
struct Failure {
    error: ClientError,
    /// Whether another server may do better.
    elsewhere: Option<Elsewhere>,
}

enum Elsewhere {
    /// It was not sent.
    Unsent,
    /// It may have been carried out.
    Unsure,
}

impl Failure {
    fn here(error: ClientError) -> Self {
        Self { error, elsewhere: None }
    }
}

/// Whether the server itself is what is wrong: it is stopping, behind, cut off from its store, or without a tunnel to a node.
pub(crate) fn of_this_server(error: &ClientError) -> bool {
    matches!(error.code(), Some(Code::Unavailable | Code::NodeUnreachable))
}

/// The calls of an agent may all be repeated: what they say is how things are, not what to do.
fn is_agents(path: &str) -> bool {
    let mut words = path.trim_start_matches("/v1/nodes/").split('/');
    path.starts_with("/v1/nodes/")
        && words.next().is_some()
        && matches!(words.next(), Some("register" | "heartbeat" | "report" | "certificate"))
}

/// A body that comes piece by piece.
#[derive(Debug)]
pub struct TextStream {
    body: Body,
}

impl TextStream {
    /// The next piece; `None` at the end.
    ///
    /// # Errors
    /// [`ClientError::Answer`] when the connection broke.
    pub async fn next(&mut self) -> Result<Option<Bytes>> {
        loop {
            match self.body.frame().await {
                None => return Ok(None),
                Some(Err(e)) => return Err(ClientError::Answer(format!("the stream broke: {}", root_cause(&e)))),
                Some(Ok(frame)) => {
                    if let Ok(data) = frame.into_data() {
                        return Ok(Some(data));
                    }
                }
            }
        }
    }
}

/// The innermost message: the outer ones only repeat that something failed.
pub(crate) fn root_cause(error: &dyn std::error::Error) -> String {
    let mut current = error;
    while let Some(source) = current.source() {
        current = source;
    }
    current.to_string()
}
