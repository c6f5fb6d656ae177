//! The HTTP client: one connection per request, rustls, redirects followed with care.

use std::path::PathBuf;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use bytes::Bytes;
use http::header::{self, HeaderMap, HeaderName, HeaderValue};
use http::{Method, Request, StatusCode, Uri};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use crate::error::{Code, Context, ImageError, Result};

/// Name resolution, TCP and TLS together.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(20);
/// Until the head of the answer; registries may think for a while.
const HEAD_TIMEOUT: Duration = Duration::from_secs(60);
/// Between two pieces of a body.
const IDLE_TIMEOUT: Duration = Duration::from_secs(60);
const MAX_REDIRECTS: usize = 10;
/// Where distributions keep the certificate authorities of the machine.
const SYSTEM_CAS: [&str; 3] =
    ["/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/ca-bundle.pem"];

/// A client. Certificate authorities are read at the first https request.
pub(crate) struct Http {
    extra_ca: Option<PathBuf>,
    tls: OnceLock<Arc<rustls::ClientConfig>>,
}

/// Head of an answer and its body to come.
pub(crate) struct Response {
    pub status: StatusCode,
    pub headers: HeaderMap,
    pub body: Body,
    /// After redirects.
    pub uri: Uri,
}

pub(crate) struct Body {
    incoming: Incoming,
    cancel: CancellationToken,
    host: String,
}

impl Body {
    /// The next piece; `None` at the end. A connection that breaks before the announced length is an error.
    pub async fn chunk(&mut self) -> Result<Option<Bytes>> {
        loop {
            let frame = tokio::select! {
                frame = timeout(IDLE_TIMEOUT, self.incoming.frame()) => frame,
                () = self.cancel.cancelled() => return Err(ImageError::cancelled()),
            };
            match frame {
                Err(_) => return Err(network(&self.host, "sent nothing for 60 s")),
                Ok(None) => return Ok(None),
                Ok(Some(Err(e))) => {
                    // What hyper says itself is only that the body could not be read.
                    let cause = std::error::Error::source(&e).map_or_else(|| e.to_string(), ToString::to_string);
                    return Err(network(&self.host, &format!("broke the connection: {cause}")));
                }
                Ok(Some(Ok(frame))) => {
                    if let Ok(data) = frame.into_data() {
                        return Ok(Some(data));
                    }
                }
            }
        }
    }

    /// All of it, when it has at most `limit` bytes.
    pub async fn all(mut self, limit: usize) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        while let Some(chunk) = self.chunk().await? {
            if bytes.len() + chunk.len() > limit {
                return Err(ImageError::new(
                    Code::ImageTooBig,
                    format!("{} sent more than {limit} bytes where a small document was expected", self.host),
                ));
            }
            bytes.extend_from_slice(&chunk);
        }
        Ok(bytes)
    }
}

fn network(host: &str, what: &str) -> ImageError {
    ImageError::new(Code::Network, format!("{host} {what}"))
}

/// Parses a URL and refuses what would not be an http(s) request to a host.
pub(crate) fn parse_url(url: &str) -> Result<Uri> {
    let invalid = |why: &str| ImageError::new(Code::Invalid, format!("the URL {why}"));
    let uri: Uri = url.parse().map_err(|e| invalid(&format!("cannot be parsed: {e}")))?;
    if !matches!(uri.scheme_str(), Some("http" | "https")) {
        return Err(invalid("must begin with http:// or https://"));
    }
    if uri.host().is_none_or(str::is_empty) {
        return Err(invalid("names no host"));
    }
    if uri.authority().is_some_and(|a| a.as_str().contains('@')) {
        return Err(invalid("must not hold a user name; give it as a header"));
    }
    Ok(uri)
}

impl Http {
    pub fn new(extra_ca: Option<PathBuf>) -> Self {
        Self { extra_ca, tls: OnceLock::new() }
    }

    /// GET with redirects. Headers that hold credentials go to the first host only, and never from https to http.
    pub async fn get(&self, uri: &Uri, headers: &HeaderMap, cancel: &CancellationToken) -> Result<Response> {
        let mut uri = uri.clone();
        let mut headers = headers.clone();
        for _ in 0..=MAX_REDIRECTS {
            let response = self.send(Method::GET, &uri, &headers, Bytes::new(), cancel).await?;
            if !matches!(response.status.as_u16(), 301 | 302 | 303 | 307 | 308) {
                return Ok(response);
            }
            let host = uri.host().unwrap_or_default().to_owned();
            let target = response
                .headers
                .get(header::LOCATION)
                .and_then(|l| l.to_str().ok())
                .ok_or_else(|| network(&host, "redirects without saying where"))?;
            let next = resolve(&uri, target)?;
            if uri.scheme_str() == Some("https") && next.scheme_str() != Some("https") {
                return Err(network(&host, "redirects from https to http, which is refused"));
            }
            if uri.authority() != next.authority() {
                let keep = [header::ACCEPT, header::RANGE, header::IF_RANGE];
                headers =
                    headers.into_iter().filter_map(|(n, v)| n.filter(|n| keep.contains(n)).map(|n| (n, v))).collect();
            }
            uri = next;
        }
        Err(network(uri.host().unwrap_or_default(), "redirects too often"))
    }

    /// One request, one answer.
    pub async fn send(
        &self,
        method: Method,
        uri: &Uri,
        headers: &HeaderMap,
        body: Bytes,
        cancel: &CancellationToken,
    ) -> Result<Response> {
        let host = uri.host().unwrap_or_default().to_owned();
        let request = build(method, uri, headers, body)?;
        let exchange = async {
            let connected = timeout(CONNECT_TIMEOUT, self.connect(uri, &host)).await;
            let mut sender = connected.map_err(|_| network(&host, "cannot be reached within 20 s"))??;
            let answer = timeout(HEAD_TIMEOUT, sender.send_request(request)).await;
            answer
                .map_err(|_| network(&host, "did not answer within 60 s"))?
                .map_err(|e| network(&host, &format!("did not answer: {e}")))
        };
        let answer = tokio::select! {
            answer = exchange => answer?,
            () = cancel.cancelled() => return Err(ImageError::cancelled()),
        };
        let (head, incoming) = answer.into_parts();
        let body = Body { incoming, cancel: cancel.clone(), host };
        Ok(Response { status: head.status, headers: head.headers, body, uri: uri.clone() })
    }

    async fn connect(&self, uri: &Uri, host: &str) -> Result<hyper::client::conn::http1::SendRequest<Full<Bytes>>> {
        let secure = uri.scheme_str() == Some("https");
        let port = uri.port_u16().unwrap_or(if secure { 443 } else { 80 });
        let bare = host.trim_start_matches('[').trim_end_matches(']');
        let tcp = TcpStream::connect((bare, port))
            .await
            .map_err(|e| network(&format!("{host}:{port}"), &format!("cannot be reached: {e}")))?;
        let _ = tcp.set_nodelay(true);
        if !secure {
            return handshake(TokioIo::new(tcp), host).await;
        }
        let name = ServerName::try_from(bare.to_owned())
            .map_err(|_| ImageError::new(Code::Invalid, format!("{host} is not a host name")))?;
        let connector = tokio_rustls::TlsConnector::from(self.tls()?);
        let tls = connector.connect(name, tcp).await.map_err(|e| {
            network(
                host,
                &format!("cannot be trusted: {e}; its certificate authority may have to be added to the configuration"),
            )
        })?;
        handshake(TokioIo::new(tls), host).await
    }

    fn tls(&self) -> Result<Arc<rustls::ClientConfig>> {
        if let Some(tls) = self.tls.get() {
            return Ok(tls.clone());
        }
        let mut roots = rustls::RootCertStore::empty();
        let system = SYSTEM_CAS.iter().map(PathBuf::from).find(|p| p.exists());
        if system.is_none() && self.extra_ca.is_none() {
            return Err(ImageError::new(
                Code::Unsupported,
                "this machine has no certificate authorities; install ca-certificates",
            ));
        }
        for path in system.iter().chain(&self.extra_ca) {
            let bytes = std::fs::read(path).context(|| format!("cannot read {}", path.display()))?;
            // The bundle of a distribution may hold one that is too odd to be parsed; the rest counts.
            roots.add_parsable_certificates(CertificateDer::pem_slice_iter(&bytes).filter_map(std::result::Result::ok));
        }
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = rustls::ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|e| ImageError::new(Code::Unsupported, format!("TLS cannot be used: {e}")))?
            .with_root_certificates(roots)
            .with_no_client_auth();
        Ok(self.tls.get_or_init(|| Arc::new(config)).clone())
    }
}

async fn handshake<T>(io: TokioIo<T>, host: &str) -> Result<hyper::client::conn::http1::SendRequest<Full<Bytes>>>
where
    T: tokio::io::AsyncRead + tokio::io::AsyncWrite + Send + Unpin + 'static,
{
    let (sender, connection) = hyper::client::conn::http1::handshake(io)
        .await
        .map_err(|e| network(host, &format!("does not speak HTTP: {e}")))?;
    // Ends by itself when the body has been read or dropped.
    tokio::spawn(async move {
        if let Err(error) = connection.await {
            tracing::debug!(%error, "connection ended");
        }
    });
    Ok(sender)
}

fn build(method: Method, uri: &Uri, headers: &HeaderMap, body: Bytes) -> Result<Request<Full<Bytes>>> {
    let path = uri.path_and_query().map_or("/", http::uri::PathAndQuery::as_str);
    let authority = uri.authority().map_or("", http::uri::Authority::as_str);
    let mut request = Request::builder().method(method).uri(path).header(header::HOST, authority);
    if let Some(map) = request.headers_mut() {
        map.insert(header::USER_AGENT, HeaderValue::from_static(concat!("oblak/", env!("CARGO_PKG_VERSION"))));
        map.extend(headers.iter().map(|(n, v)| (n.clone(), v.clone())));
    }
    request
        .body(Full::new(body))
        .map_err(|e| ImageError::new(Code::Invalid, format!("the request cannot be made: {e}")))
}

/// Caller-given headers, checked.
pub(crate) fn header_map(pairs: &[(String, String)]) -> Result<HeaderMap> {
    pairs
        .iter()
        .map(|(name, value)| {
            let bad = || ImageError::new(Code::Invalid, format!("header {name} is not valid"));
            let name_ok: HeaderName = name.parse().map_err(|_| bad())?;
            let mut value_ok: HeaderValue = value.parse().map_err(|_| bad())?;
            value_ok.set_sensitive(true);
            Ok((name_ok, value_ok))
        })
        .collect()
}

/// A `Location`, absolute or relative (RFC 9110 10.2.2; dot segments are left to the server).
pub(crate) fn resolve(base: &Uri, target: &str) -> Result<Uri> {
    if target.starts_with("http://") || target.starts_with("https://") {
        return parse_url(target);
    }
    let scheme = base.scheme_str().unwrap_or("https");
    let authority = base.authority().map_or("", http::uri::Authority::as_str);
    if target.starts_with("//") {
        return parse_url(&format!("{scheme}:{target}"));
    }
    if target.starts_with('/') {
        return parse_url(&format!("{scheme}://{authority}{target}"));
    }
    let directory = base.path().rsplit_once('/').map_or("", |(d, _)| d);
    parse_url(&format!("{scheme}://{authority}{directory}/{target}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_and_locations() {
        for bad in ["ftp://a/b", "/etc/passwd", "file:///etc/passwd", "http://", "http://u:p@h/x", "https:///x"] {
            assert_eq!(parse_url(bad).unwrap_err().code, Code::Invalid, "{bad}");
        }
        let base = parse_url("https://h:1/a/b?x").unwrap();
        let at = |t: &str| resolve(&base, t).unwrap().to_string();
        assert_eq!(at("/c"), "https://h:1/c");
        assert_eq!(at("c"), "https://h:1/a/c");
        assert_eq!(at("//o/c"), "https://o/c");
        assert_eq!(at("http://o/c"), "http://o/c");
    }
}
