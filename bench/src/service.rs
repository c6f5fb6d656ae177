//! The API served in this process over a store, and a bare axum handler behind the same TLS.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context as _, Result};
use axum::Router;
use axum::http::StatusCode;
use axum::http::header::CONTENT_TYPE;
use axum::routing::get;
use bytes::Bytes;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use hyper_util::service::TowerToHyperService;
use oblak_api::{ApiConfig, Server, admin_token, bootstrap};
use oblak_client::{Auth, Client, ClientConfig};
use oblak_platform::{clock, random};
use oblak_store::SharedStore;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig};
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;

/// A served API; ends when dropped.
pub struct Service {
    /// Where.
    pub address: SocketAddr,
    /// Certificate of its authority.
    pub ca_pem: String,
    /// Token of the administrator.
    pub token: String,
    stop: CancellationToken,
}

impl Service {
    /// Serves a store on a free port of loopback. `pki` is the directory of certificates. Limits of rate are lifted: they are not measured.
    pub async fn start(store: &SharedStore, pki: &Path) -> Result<Self> {
        let (clock, random) = (clock::system(), random::system());
        bootstrap(store.clone(), clock.clone(), random.clone()).await?;
        let token = admin_token(store.as_ref(), clock.as_ref(), random.as_ref(), "bench").await?;
        let mut config = ApiConfig::new(([127, 0, 0, 1], 0).into(), pki);
        config.limits.requests_per_second = 10_000_000;
        config.limits.requests_burst = 10_000_000;
        let server = Server::bind(config, store.clone(), clock, random).await?;
        let address = server.local_addr().context("the server has no address")?;
        let stop = CancellationToken::new();
        tokio::spawn(server.serve(stop.clone()));
        let ca_pem = std::fs::read_to_string(pki.join("ca.pem")).context("the authority has no certificate")?;
        Ok(Self { address, ca_pem, token: token.context("there is no administrator")?, stop })
    }

    /// Cancelled when the service ends.
    pub fn stopping(&self) -> CancellationToken {
        self.stop.child_token()
    }

    /// The product's own client.
    pub fn client(&self) -> Result<Client> {
        let url = format!("https://{}", self.address);
        Ok(Client::new(&ClientConfig::new(url, self.ca_pem.clone(), Auth::Bearer(self.token.clone())))?)
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

/// A handler that answers the same bytes whatever is asked and gives back what is posted, with the certificate and the TLS settings of the API; ends when dropped.
pub struct Bare {
    /// Where.
    pub address: SocketAddr,
    stop: CancellationToken,
}

impl Bare {
    /// Serves on a free port of loopback. Every path below `bodies` has its answer.
    pub async fn start(pki: &Path, bodies: Vec<(&'static str, Bytes)>) -> Result<Self> {
        let acceptor = acceptor(pki)?;
        let mut router = Router::new();
        for (path, body) in bodies {
            let echo = async move |body: Bytes| (StatusCode::CREATED, [(CONTENT_TYPE, "application/json")], body);
            let answer = async move || ([(CONTENT_TYPE, "application/json")], body.clone());
            router = router.route(path, get(answer).post(echo));
        }
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        let stop = CancellationToken::new();
        let stopped = stop.clone();
        tokio::spawn(async move {
            loop {
                let accepted = tokio::select! { a = listener.accept() => a, () = stopped.cancelled() => return };
                let Ok((socket, _)) = accepted else { return };
                let (acceptor, router, stopped) = (acceptor.clone(), router.clone(), stopped.clone());
                tokio::spawn(async move {
                    let _ = socket.set_nodelay(true);
                    let Ok(tls) = acceptor.accept(socket).await else { return };
                    let builder = auto::Builder::new(TokioExecutor::new());
                    let serving = builder.serve_connection(TokioIo::new(tls), TowerToHyperService::new(router));
                    // A connection that breaks is the client's to report.
                    tokio::select! { _ = serving => {}, () = stopped.cancelled() => {} }
                });
            }
        });
        Ok(Self { address, stop })
    }
}

impl Drop for Bare {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

/// The settings of the API's own acceptor.
fn acceptor(pki: &Path) -> Result<TlsAcceptor> {
    let read = |name: &str| std::fs::read(pki.join(name)).with_context(|| format!("cannot read {name}"));
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(&read("ca.pem")?)?)?;
    let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider));
    let chain = vec![CertificateDer::from_pem_slice(&read("server.pem")?)?];
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_client_cert_verifier(verifier.allow_unauthenticated().build()?)
        .with_single_cert(chain, PrivateKeyDer::from_pem_slice(&read("server.key")?)?)?;
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(TlsAcceptor::from(Arc::new(config)))
}
