//! Passwords: argon2id, few at a time because each takes 19 MiB.

use std::sync::Arc;

use argon2::password_hash::{PasswordHash, PasswordHasher, PasswordVerifier, SaltString};
use argon2::{Algorithm, Argon2, Params, Version};
use oblak_platform::random::SharedRandom;
use tokio::sync::Semaphore;

/// Memory in KiB, passes and lanes: the OWASP password storage recommendation for argon2id (19 MiB, t=2, p=1).
const COST: (u32, u32, u32) = (19 * 1024, 2, 1);
/// Computations at once; with waiting callers memory stays below 40 MiB.
const AT_ONCE: usize = 2;
/// Callers that may wait; the next is turned away.
const WAITING: usize = 64;
/// Longest password that is looked at.
pub const MAX_PASSWORD_BYTES: usize = 1024;

/// Why a password could not be hashed or checked.
#[derive(Debug, thiserror::Error)]
pub enum PasswordError {
    /// Too many at once.
    #[error("too many logins at once; try again in a moment")]
    Busy,
    /// The algorithm or its task failed.
    #[error("the password could not be processed: {0}")]
    Failed(String),
}

/// Hashes and checks passwords on blocking threads.
pub struct Passwords {
    random: SharedRandom,
    running: Arc<Semaphore>,
    queued: Arc<Semaphore>,
}

impl Passwords {
    /// With salts from `random`.
    #[must_use]
    pub fn new(random: SharedRandom) -> Self {
        Self { random, running: Arc::new(Semaphore::new(AT_ONCE)), queued: Arc::new(Semaphore::new(WAITING)) }
    }

    /// The hash to store, in PHC string format.
    ///
    /// # Errors
    /// See [`PasswordError`].
    pub async fn hash(&self, password: String) -> Result<String, PasswordError> {
        let mut salt = [0u8; 16];
        self.random.fill(&mut salt);
        self.run(move || {
            let salt = SaltString::encode_b64(&salt).map_err(|e| PasswordError::Failed(e.to_string()))?;
            let hash = argon2()?.hash_password(password.as_bytes(), &salt);
            hash.map(|h| h.to_string()).map_err(|e| PasswordError::Failed(e.to_string()))
        })
        .await
    }

    /// Whether `password` belongs to `hash`. Without a hash it works just as long and says no, so that unknown users cannot be told from
    /// wrong passwords by the clock.
    ///
    /// # Errors
    /// See [`PasswordError`].
    pub async fn verify(&self, password: String, hash: Option<String>) -> Result<bool, PasswordError> {
        if password.len() > MAX_PASSWORD_BYTES {
            return Ok(false);
        }
        self.run(move || {
            let argon2 = argon2()?;
            let Some(hash) = hash else {
                let mut out = [0u8; 32];
                let _ = argon2.hash_password_into(password.as_bytes(), b"no such user here", &mut out);
                return Ok(false);
            };
            let parsed = PasswordHash::new(&hash).map_err(|e| PasswordError::Failed(e.to_string()))?;
            Ok(argon2.verify_password(password.as_bytes(), &parsed).is_ok())
        })
        .await
    }

    async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> Result<T, PasswordError> + Send + 'static,
    ) -> Result<T, PasswordError> {
        let _queued = self.queued.try_acquire().map_err(|_| PasswordError::Busy)?;
        let running = Arc::clone(&self.running).acquire_owned().await.map_err(|_| PasswordError::Busy)?;
        // The permit moves into the thread: a caller that goes away does not free a slot that is still in use.
        oblak_platform::task::blocking(move || {
            let _running = running;
            work()
        })
        .await
        .map_err(|e| PasswordError::Failed(e.to_string()))?
    }
}

fn argon2() -> Result<Argon2<'static>, PasswordError> {
    let (memory, passes, lanes) = COST;
    let params = Params::new(memory, passes, lanes, None).map_err(|e| PasswordError::Failed(e.to_string()))?;
    Ok(Argon2::new(Algorithm::Argon2id, Version::V0x13, params))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn right_wrong_and_unknown() {
        let passwords = Passwords::new(oblak_platform::random::system());
        let hash = passwords.hash("correct horse".into()).await.unwrap();
        assert!(hash.starts_with("$argon2id$v=19$m=19456,t=2,p=1$"), "{hash}");
        assert_ne!(hash, passwords.hash("correct horse".into()).await.unwrap());
        assert!(passwords.verify("correct horse".into(), Some(hash.clone())).await.unwrap());
        assert!(!passwords.verify("wrong".into(), Some(hash)).await.unwrap());
        assert!(!passwords.verify("correct horse".into(), None).await.unwrap());
    }
}
