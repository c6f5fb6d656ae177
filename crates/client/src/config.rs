//! Whom to talk to and as whom.

use std::time::Duration;

/// Credentials.
#[derive(Clone, Default)]
pub enum Auth {
    /// None: only public paths answer.
    #[default]
    None,
    /// A token.
    Bearer(String),
    /// User name and password.
    Basic(String, String),
    /// A client certificate: PEM of the certificate and of its key.
    Certificate {
        /// Certificate chain.
        cert_pem: String,
        /// Private key.
        key_pem: String,
    },
}

impl std::fmt::Debug for Auth {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::None => "None",
            Self::Bearer(_) => "Bearer(..)",
            Self::Basic(..) => "Basic(..)",
            Self::Certificate { .. } => "Certificate(..)",
        })
    }
}

/// Settings of a [`crate::Client`].
#[derive(Clone, Debug)]
pub struct ClientConfig {
    /// `https://host:port`; tried first.
    pub server: String,
    /// Other servers of the same cloud, for when that one does not answer.
    pub others: Vec<String>,
    /// PEM of the certificate authority; the only one that is trusted.
    pub ca_pem: String,
    /// Credentials.
    pub auth: Auth,
    /// Deadline of one call (streams: of the time until the first byte of the answer).
    pub timeout: Duration,
}

impl ClientConfig {
    /// With the default deadline of 30 s.
    #[must_use]
    pub fn new(server: impl Into<String>, ca_pem: impl Into<String>, auth: Auth) -> Self {
        Self {
            server: server.into(),
            others: Vec::new(),
            ca_pem: ca_pem.into(),
            auth,
            timeout: Duration::from_secs(30),
        }
    }
}
