//! The first contact with a server that is not trusted yet.

use std::sync::Arc;

use http::{HeaderMap, Method};
use oblak_model::Timestamp;
use rustls::DigitallySignedStruct;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};

use crate::Result;
use crate::config::{Auth, ClientConfig};
use crate::edge::Link;
use crate::transport::{Client, ClientError, full};

/// What a server says about itself. Nobody has checked any of it: compare the authority with a pin before the next call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Introduction {
    /// Certificate of the authority that it claims to have.
    pub ca_pem: String,
    /// Its clock, to the second.
    pub now: Option<Timestamp>,
}

/// Asks a server for its authority, whoever it is. Sends no credentials and nothing else.
///
/// # Errors
/// As every call: the server cannot be reached, or does not know the path.
pub async fn introduce(server: &str) -> Result<Introduction> {
    let config = ClientConfig::new(server, "", Auth::None);
    let client = Client::with_link(&config, Link::over(anyone()?))?;
    let response = client.send(Method::GET, "/v1/ca.pem", HeaderMap::new(), full(bytes::Bytes::new())).await?;
    let now = response.headers().get(http::header::DATE).and_then(|v| http_date(v.to_str().ok()?));
    let ca_pem = String::from_utf8(client.read(response).await?.to_vec())
        .map_err(|_| ClientError::Answer("the certificate of the authority is no text".into()))?;
    Ok(Introduction { ca_pem, now })
}

fn anyone() -> Result<rustls::ClientConfig> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let verifier = Arc::new(Anyone(Arc::clone(&provider)));
    let builder = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|e| ClientError::Config(format!("TLS: {e}")))?;
    Ok(builder.dangerous().with_custom_certificate_verifier(verifier).with_no_client_auth())
}

/// Takes every certificate; only the signature of the handshake is checked.
#[derive(Debug)]
struct Anyone(Arc<CryptoProvider>);

impl ServerCertVerifier for Anyone {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> std::result::Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> std::result::Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, cert, dss, &self.0.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> std::result::Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, dss, &self.0.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<rustls::SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

/// The date of an HTTP header in its fixed form, `Sun, 06 Nov 1994 08:49:37 GMT` (RFC 9110, section 5.6.7).
fn http_date(text: &str) -> Option<Timestamp> {
    const MONTHS: [&str; 12] = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];
    let mut words = text.split_once(", ")?.1.split(' ');
    let (day, month, year, time) = (words.next()?, words.next()?, words.next()?, words.next()?);
    let month = MONTHS.iter().position(|m| *m == month)? + 1;
    format!("{year}-{month:02}-{day}T{time}Z").parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_of_headers() {
        let date = http_date("Sun, 06 Nov 1994 08:49:37 GMT").unwrap();
        assert!(date.to_string().starts_with("1994-11-06T08:49:37"), "{date}");
        assert_eq!(http_date("yesterday"), None);
        assert_eq!(http_date("Sun, 06 Nux 1994 08:49:37 GMT"), None);
    }
}
