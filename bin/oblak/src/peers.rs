//! The way between agents: TLS in which both ends show the certificate of their node.
//!
//! Node certificates are made for clients. Here both ends check the other's as that of a client of our authority, so the certificate of a
//! server, or of anybody else, opens nothing; then they look which node it names.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use oblak_agent::{PeerListener, PeerNet};
use oblak_identity::pki::node_of_certificate;
use oblak_model::NodeId;
use oblak_platform::driver::BoxDuplex;
use oblak_platform::layout::Layout;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::WebPkiClientVerifier;
use rustls::server::danger::ClientCertVerifier;
use rustls::{ClientConfig, DigitallySignedStruct, RootCertStore, ServerConfig, SignatureScheme};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, mpsc};
use tokio_rustls::{TlsAcceptor, TlsConnector};

use crate::roles::credentials::Credentials;

/// How long a handshake may take.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// Handshakes at once, and connections that wait to be served.
const AT_ONCE: usize = 32;
/// Pause after a failed accept, usually for lack of descriptors.
const AGAIN: Duration = Duration::from_millis(200);

/// Connections by the certificate in a data directory, read anew for each, because it is renewed.
pub struct Peers {
    layout: Layout,
}

impl Peers {
    /// With the certificate of this node.
    pub fn new(layout: &Layout) -> Self {
        Self { layout: layout.clone() }
    }

    fn identity(&self) -> io::Result<Identity> {
        let found = Credentials::load(&self.layout).map_err(io::Error::other)?;
        let found = found.ok_or_else(|| io::Error::other("this machine is not a node"))?;
        let bad = |e: rustls::pki_types::pem::Error| io::Error::other(format!("the certificate of this node: {e}"));
        let mut roots = RootCertStore::empty();
        for certificate in CertificateDer::pem_slice_iter(found.ca_pem.as_bytes()) {
            roots.add(certificate.map_err(bad)?).map_err(io::Error::other)?;
        }
        let chain = CertificateDer::pem_slice_iter(found.certificate_pem.as_bytes()).collect::<Result<_, _>>();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider.clone());
        Ok(Identity {
            chain: chain.map_err(bad)?,
            key: PrivateKeyDer::from_pem_slice(found.key_pem.as_bytes()).map_err(bad)?,
            verifier: verifier.build().map_err(io::Error::other)?,
            provider,
        })
    }
}

struct Identity {
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
    verifier: Arc<dyn ClientCertVerifier>,
    provider: Arc<rustls::crypto::CryptoProvider>,
}

impl Identity {
    fn accepts(self) -> io::Result<ServerConfig> {
        ServerConfig::builder_with_provider(self.provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(io::Error::other)?
            .with_client_cert_verifier(self.verifier)
            .with_single_cert(self.chain, self.key)
            .map_err(io::Error::other)
    }

    fn dials(self, node: NodeId) -> io::Result<ClientConfig> {
        ClientConfig::builder_with_provider(self.provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(io::Error::other)?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(OneNode { node, verifier: self.verifier }))
            .with_client_auth_cert(self.chain, self.key)
            .map_err(io::Error::other)
    }
}

/// Takes the certificate of one node only.
#[derive(Debug)]
struct OneNode {
    node: NodeId,
    verifier: Arc<dyn ClientCertVerifier>,
}

impl ServerCertVerifier for OneNode {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _name: &ServerName<'_>,
        _ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        self.verifier.verify_client_cert(end_entity, intermediates, now)?;
        if node_of_certificate(end_entity) == Some(self.node) {
            return Ok(ServerCertVerified::assertion());
        }
        Err(rustls::Error::General(format!("the far end is not node {}", self.node)))
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.verifier.verify_tls12_signature(message, certificate, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.verifier.verify_tls13_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.verifier.supported_verify_schemes()
    }
}

#[async_trait]
impl PeerNet for Peers {
    async fn listen(&self, address: IpAddr) -> io::Result<PeerListener> {
        let listener = TcpListener::bind(SocketAddr::new(address, 0)).await?;
        let address = listener.local_addr()?;
        let (tell, arrivals) = mpsc::channel(AT_ONCE);
        let peers = Self::new(&self.layout);
        tokio::spawn(async move {
            let slots = Arc::new(Semaphore::new(AT_ONCE));
            loop {
                let accepted =
                    tokio::select! { accepted = listener.accept() => accepted, () = tell.closed() => return };
                let Ok((stream, _)) = accepted else {
                    tokio::time::sleep(AGAIN).await;
                    continue;
                };
                let Ok(slot) = slots.clone().try_acquire_owned() else { continue };
                let (tell, config) = (tell.clone(), peers.identity().and_then(Identity::accepts));
                tokio::spawn(async move {
                    match tokio::time::timeout(HANDSHAKE, accept(stream, config)).await {
                        Ok(Ok(arrival)) => drop(tell.send(arrival).await),
                        Ok(Err(error)) => tracing::debug!(%error, "a connection to this node was refused"),
                        Err(_) => {}
                    }
                    drop(slot);
                });
            }
        });
        Ok(PeerListener { address, arrivals })
    }

    async fn dial(&self, node: NodeId, address: SocketAddr) -> io::Result<BoxDuplex> {
        let config = self.identity()?.dials(node)?;
        let stream = TcpStream::connect(address).await?;
        stream.set_nodelay(true)?;
        let name = ServerName::IpAddress(address.ip().into());
        let connected = TlsConnector::from(Arc::new(config)).connect(name, stream);
        let late = || io::Error::from(io::ErrorKind::TimedOut);
        Ok(Box::new(tokio::time::timeout(HANDSHAKE, connected).await.map_err(|_| late())??))
    }
}

async fn accept(stream: TcpStream, config: io::Result<ServerConfig>) -> io::Result<(NodeId, BoxDuplex)> {
    stream.set_nodelay(true)?;
    let stream = TlsAcceptor::from(Arc::new(config?)).accept(stream).await?;
    let shown = stream.get_ref().1.peer_certificates().and_then(|chain| chain.first());
    let node = shown.and_then(|certificate| node_of_certificate(certificate));
    let node = node.ok_or_else(|| io::Error::new(io::ErrorKind::PermissionDenied, "it is not a node"))?;
    Ok((node, Box::new(stream)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use oblak_identity::pki::{self, Ca};
    use oblak_model::Timestamp;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    fn now() -> Timestamp {
        oblak_platform::clock::system().now()
    }

    fn member(ca: &Ca, dir: &std::path::Path, n: u128) -> (NodeId, Peers) {
        let (id, layout) = (NodeId(uuid::Uuid::from_u128(n)), Layout::new(dir.join(n.to_string())));
        std::fs::create_dir_all(layout.node()).unwrap();
        let made = pki::issue_node_cert(ca, id, now()).unwrap();
        save(&layout, id, ca, made);
        (id, Peers { layout })
    }

    fn save(layout: &Layout, id: NodeId, ca: &Ca, made: pki::Certified) {
        let credentials = Credentials {
            id,
            name: String::new(),
            server: String::new(),
            certificate_pem: made.certificate_pem,
            key_pem: made.key_pem,
            ca_pem: ca.certificate_pem().into(),
            renew_at: Timestamp::default(),
            expires_at: Timestamp::default(),
        };
        credentials.save(layout).unwrap();
    }

    #[tokio::test]
    async fn nodes_know_each_other_and_nobody_else_gets_in() {
        let temp = tempfile::tempdir().unwrap();
        let ca = pki::ensure_ca(&temp.path().join("ca"), now()).unwrap();
        let ((a, from), (b, to)) = (member(&ca, temp.path(), 1), member(&ca, temp.path(), 2));
        let mut listener = to.listen("127.0.0.1".parse().unwrap()).await.unwrap();
        let mut ours = from.dial(b, listener.address).await.unwrap();
        let (who, mut theirs) = listener.arrivals.recv().await.unwrap();
        assert_eq!(who, a);
        ours.write_all(b"hello").await.unwrap();
        ours.shutdown().await.unwrap();
        let mut heard = String::new();
        theirs.read_to_string(&mut heard).await.unwrap();
        assert_eq!(heard, "hello");

        // The node at that address is another one than was meant.
        let error = from.dial(a, listener.address).await.err().unwrap();
        assert!(error.to_string().contains("is not node"), "{error}");
        // The certificate of a server of the same authority, and a node of another one.
        let server = pki::ensure_server_cert(&temp.path().join("ca"), &ca, &["localhost".into()], now()).unwrap();
        let (_, stranger) = member(&ca, temp.path(), 3);
        save(&stranger.layout, a, &ca, server);
        let other = pki::ensure_ca(&temp.path().join("other"), now()).unwrap();
        let (_, foreigner) = member(&other, temp.path(), 4);
        for peers in [stranger, foreigner] {
            // TLS 1.3 tells a client of the refusal only when it reads.
            if let Ok(mut stream) = peers.dial(b, listener.address).await {
                assert!(stream.read_u8().await.is_err());
            }
            assert!(listener.arrivals.try_recv().is_err(), "nobody arrived");
        }
        drop(listener);
    }
}
