//! What is remembered of a creation, so that the same request sent twice creates once.

use std::time::Duration;

use oblak_model::Timestamp;
use oblak_store::{Key, Prefix};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use uuid::Uuid;

/// How long a record is kept.
pub const IDEMPOTENCY_LIFE: Duration = Duration::from_secs(24 * 3600);

/// What a request with an idempotency key did. Written in the commit that did it, at [`idempotency_key`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct IdempotencyRecord {
    /// When; the record is dropped [`IDEMPOTENCY_LIFE`] later.
    pub at: Timestamp,
    /// SHA-256 of method, path and body: the same key with another request is refused.
    pub fingerprint: String,
    /// Key of the object that was created.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub object: Option<String>,
    /// Its id.
    #[serde(default)]
    pub id: Uuid,
    /// The answer, where it is not the object (apply).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub body: Option<String>,
}

/// Key of the record of `key`, as used by `principal`. Callers do not share keys.
///
/// # Panics
/// Never: hexadecimal digits are a valid segment.
#[must_use]
pub fn idempotency_key(principal: &str, key: &str) -> Key {
    let digest = Sha256::new().chain_update(principal).chain_update([0]).chain_update(key).finalize();
    let name: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
    Key::from_segments(["idempotency", "_", &name]).expect("hexadecimal digits are a valid segment")
}

/// All records.
///
/// # Panics
/// Never: the text is a valid prefix.
#[must_use]
pub fn idempotency_prefix() -> Prefix {
    Prefix::new("/idempotency").expect("a constant")
}
