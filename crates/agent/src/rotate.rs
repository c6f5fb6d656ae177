//! Renews the node's certificate well before its end.
//!
//! Nothing that is open is touched: the tunnel, the watch and running calls go on with the certificate they began with, new connections
//! have the new one. A certificate that has ended changes nothing for guests either; only the control plane is out of reach then.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use oblak_model::Timestamp;
use oblak_model::wire::NodeCertificate;

use crate::backoff::Backoff;
use crate::context::Context;

/// Looks at the clock at least this often, because it may be set.
const LOOK: Duration = Duration::from_secs(60);

/// Where the node's key and certificate are kept.
pub trait KeyStore: Send + Sync + 'static {
    /// A fresh key and a request for a certificate, both in PEM. Nothing is kept yet.
    ///
    /// # Errors
    /// The key cannot be made.
    fn request(&self) -> io::Result<(String, String)>;
    /// Keeps a key with its certificate in place of the ones before, both or none.
    ///
    /// # Errors
    /// Any I/O error.
    fn keep(&self, key_pem: &str, certificate: &NodeCertificate) -> io::Result<()>;
}

/// What an agent needs to renew its certificate.
#[derive(Clone)]
pub struct Renewal {
    /// When to begin.
    pub at: Timestamp,
    /// When the present certificate ends.
    pub end: Timestamp,
    /// Where it is kept.
    pub keys: Arc<dyn KeyStore>,
}

/// Runs until the agent ends.
pub async fn run(ctx: Arc<Context>, mut renewal: Renewal) {
    let mut backoff = Backoff::new(Duration::from_secs(1), Duration::from_secs(60));
    while !ctx.cancel.is_cancelled() {
        let wait = renewal.at.since(ctx.clock.now());
        let pause = if wait > Duration::ZERO {
            wait.min(LOOK)
        } else {
            match renew(&ctx, renewal.keys.clone()).await {
                Ok(next) => {
                    tracing::info!(until = %next.expires_at, "the certificate of this node was renewed");
                    (renewal.at, renewal.end) = (next.renew_at, next.expires_at);
                    backoff.reset();
                    continue;
                }
                Err(error) => {
                    if ctx.clock.now() >= renewal.end {
                        tracing::error!(%error, ended = %renewal.end, "the certificate of this node has ended; guests go on; run `oblak join` here with a new token");
                    } else {
                        tracing::warn!(%error, ends = %renewal.end, "the certificate of this node cannot be renewed; trying again");
                    }
                    backoff.next()
                }
            }
        };
        tokio::select! { () = tokio::time::sleep(pause) => {}, () = ctx.cancel.cancelled() => {} }
    }
}

async fn renew(ctx: &Context, keys: Arc<dyn KeyStore>) -> Result<NodeCertificate, String> {
    let (key_pem, csr_pem) = keys.request().map_err(|e| e.to_string())?;
    let answer = ctx.client.node_certificate(ctx.config.node, &csr_pem).await;
    let next = answer.inspect_err(|error| ctx.note_removal(error)).map_err(|e| e.to_string())?;
    // Kept first: what is used must be there after a crash.
    keys.keep(&key_pem, &next).map_err(|e| format!("it cannot be written: {e}"))?;
    ctx.client.set_certificate(&next.certificate_pem, &key_pem).map_err(|e| e.to_string())?;
    Ok(next)
}
