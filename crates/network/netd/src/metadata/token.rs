//! Session tokens as EC2's IMDSv2 has them. They are optional: the peer's address already says who asks.
//!
//! A token is `<expiry in seconds since 1970>.<keyed digest of it and the instance>`, so nothing has to be remembered.

use std::fmt;
use std::io;
use std::path::Path;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use http::{HeaderMap, Method, StatusCode};
use oblak_model::Timestamp;
use oblak_platform::fsx;
use oblak_platform::random::{Random, SystemRandom};
use sha2::{Digest, Sha256};

use super::{Asker, Reply};

/// Header a client sends its token in.
const TOKEN: &str = "x-aws-ec2-metadata-token";
/// Header that says how long a token shall live.
pub const TTL: &str = "x-aws-ec2-metadata-token-ttl-seconds";
/// Longest life of a token, as EC2: six hours.
const MAX_TTL_S: u32 = 21_600;

/// The key of the digests. Kept on disk so that tokens outlive a restart.
pub struct Secret([u8; 32]);

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(..)")
    }
}

impl Secret {
    /// A new one.
    #[must_use]
    pub fn random() -> Self {
        let mut key = [0; 32];
        SystemRandom.fill(&mut key);
        Self(key)
    }

    /// The one in the file, which is made when it is missing or damaged.
    ///
    /// # Errors
    /// Any I/O error.
    pub fn load(path: &Path) -> io::Result<Self> {
        if let Some(key) = std::fs::read(path).ok().and_then(|bytes| bytes.try_into().ok()) {
            return Ok(Self(key));
        }
        let new = Self::random();
        fsx::write_atomic(path, &new.0, 0o600)?;
        Ok(new)
    }

    /// Two rounds, so that a digest cannot be continued to that of a longer text.
    fn digest(&self, text: &str) -> String {
        let inner = Sha256::new().chain_update(self.0).chain_update(text).finalize();
        URL_SAFE_NO_PAD.encode(Sha256::new().chain_update(self.0).chain_update(inner).finalize())
    }

    fn token(&self, asker: &Asker<'_>, expires: i64) -> String {
        format!("{expires}.{}", self.digest(&format!("{expires} {}", asker.metadata.instance)))
    }
}

fn seconds(time: Timestamp) -> i64 {
    time.as_micros() / 1_000_000
}

pub(super) fn issue(asker: &Asker<'_>, secret: &Secret, now: Timestamp, method: &Method, headers: &HeaderMap) -> Reply {
    if *method != Method::PUT {
        return Reply::error(StatusCode::METHOD_NOT_ALLOWED);
    }
    let ttl = headers.get(TTL).and_then(|v| v.to_str().ok()).and_then(|v| v.trim().parse().ok());
    let Some(ttl) = ttl.filter(|ttl| (1..=MAX_TTL_S).contains(ttl)) else {
        return Reply::error(StatusCode::BAD_REQUEST);
    };
    Reply { token_ttl_s: Some(ttl), ..Reply::text(secret.token(asker, seconds(now) + i64::from(ttl))) }
}

/// Whether the request carries no token or a good one.
pub(super) fn fine(asker: &Asker<'_>, secret: &Secret, now: Timestamp, headers: &HeaderMap) -> bool {
    let Some(sent) = headers.get(TOKEN) else { return true };
    let Ok(sent) = sent.to_str() else { return false };
    let Some(expires) = sent.split_once('.').and_then(|(expires, _)| expires.parse().ok()) else { return false };
    let expected = secret.token(asker, expires);
    // Compared in constant time: every byte is looked at.
    let same = expected.len() == sent.len() && expected.bytes().zip(sent.bytes()).fold(0, |d, (a, b)| d | (a ^ b)) == 0;
    same && seconds(now) < expires
}
