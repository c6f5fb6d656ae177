//! A lean HTTPS client: one connection, kept alive, nothing decoded. Costs little, so that what is measured is the server.

use std::net::SocketAddr;
use std::sync::Arc;

use anyhow::{Context as _, Result, bail};
use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper::client::conn::{http1, http2};
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::{TokioExecutor, TokioIo};
use rustls::RootCertStore;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

/// Which HTTP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Http {
    /// 1.1: one request at a time on a connection.
    One,
    /// 2: many.
    Two,
}

enum Sender {
    One(http1::SendRequest<Full<Bytes>>),
    Two(http2::SendRequest<Full<Bytes>>),
}

/// One connection.
pub struct Connection {
    sender: Sender,
    authority: String,
    authorization: String,
}

impl Connection {
    /// Connects and shakes hands.
    pub async fn open(address: SocketAddr, ca_pem: &str, token: &str, http: Http) -> Result<Self> {
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_slice(ca_pem.as_bytes())?)?;
        let mut config =
            rustls::ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
                .with_safe_default_protocol_versions()?
                .with_root_certificates(roots)
                .with_no_client_auth();
        config.alpn_protocols = vec![if http == Http::Two { b"h2".to_vec() } else { b"http/1.1".to_vec() }];
        let socket = TcpStream::connect(address).await.context("cannot connect")?;
        socket.set_nodelay(true)?;
        let name = ServerName::from(address.ip());
        let tls = TokioIo::new(TlsConnector::from(Arc::new(config)).connect(name, socket).await.context("TLS")?);
        // The driver of the connection ends with it; an error shows in the next request.
        let sender = match http {
            Http::One => {
                let (sender, driver) = http1::handshake(tls).await?;
                tokio::spawn(driver);
                Sender::One(sender)
            }
            Http::Two => {
                let (sender, driver) = http2::handshake(TokioExecutor::new(), tls).await?;
                tokio::spawn(driver);
                Sender::Two(sender)
            }
        };
        Ok(Self { sender, authority: address.to_string(), authorization: format!("Bearer {token}") })
    }

    /// Another handle to an HTTP/2 connection.
    pub fn share(&self) -> Option<Self> {
        let Sender::Two(sender) = &self.sender else { return None };
        Some(Self {
            sender: Sender::Two(sender.clone()),
            authority: self.authority.clone(),
            authorization: self.authorization.clone(),
        })
    }

    async fn send(&mut self, method: &str, path: &str, body: Bytes) -> Result<Response<Incoming>> {
        let request = Request::builder()
            .method(method)
            .header("authorization", &self.authorization)
            .header("content-type", "application/json");
        let request = match &self.sender {
            Sender::One(_) => request.uri(path).header("host", &self.authority),
            Sender::Two(_) => request.uri(format!("https://{}{path}", self.authority)),
        };
        let request = request.body(Full::new(body))?;
        Ok(match &mut self.sender {
            Sender::One(sender) => {
                sender.ready().await?;
                sender.send_request(request).await?
            }
            Sender::Two(sender) => {
                sender.ready().await?;
                sender.send_request(request).await?
            }
        })
    }

    async fn call(&mut self, method: &str, path: &str, body: Bytes, wanted: StatusCode) -> Result<Bytes> {
        let response = self.send(method, path, body).await?;
        let status = response.status();
        let bytes = response.into_body().collect().await?.to_bytes();
        if status != wanted {
            bail!("{method} {path}: {status}: {}", String::from_utf8_lossy(&bytes[..bytes.len().min(500)]));
        }
        Ok(bytes)
    }

    /// `GET`; the body.
    pub async fn get(&mut self, path: &str) -> Result<Bytes> {
        self.call("GET", path, Bytes::new(), StatusCode::OK).await
    }

    /// `POST` that creates; the body.
    pub async fn create(&mut self, path: &str, body: Bytes) -> Result<Bytes> {
        self.call("POST", path, body, StatusCode::CREATED).await
    }
}
