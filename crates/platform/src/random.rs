//! Randomness for ids and secrets.

use std::sync::Arc;

use oblak_model::Timestamp;
use uuid::Uuid;

/// A source of randomness; a simulation passes a seeded one.
pub trait Random: Send + Sync + 'static {
    /// Fills `buffer` with unpredictable bytes.
    fn fill(&self, buffer: &mut [u8]);
}

/// Shared handle to a source of randomness.
pub type SharedRandom = Arc<dyn Random>;

/// The randomness of the operating system (getrandom(2)).
#[derive(Debug, Default, Clone, Copy)]
pub struct SystemRandom;

impl Random for SystemRandom {
    fn fill(&self, buffer: &mut [u8]) {
        getrandom::fill(buffer).expect("getrandom(2) does not fail once the pool is initialised at boot");
    }
}

/// The operating system's randomness behind the trait.
#[must_use]
pub fn system() -> SharedRandom {
    Arc::new(SystemRandom)
}

/// A UUID version 7 (RFC 9562 section 5.7): milliseconds of `now`, then random bits.
#[must_use]
pub fn uuid7(random: &dyn Random, now: Timestamp) -> Uuid {
    let mut bytes = [0u8; 10];
    random.fill(&mut bytes);
    let millis = u64::try_from(now.as_micros() / 1000).unwrap_or(0);
    uuid::Builder::from_unix_timestamp_millis(millis, &bytes).into_uuid()
}
