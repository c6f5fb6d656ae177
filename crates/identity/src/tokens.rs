//! API tokens: made from 32 random bytes, kept only as a digest.

use std::fmt;

use data_encoding::{BASE32_NOPAD, HEXLOWER};
use oblak_model::{ApiError, Timestamp, Token, TokenId, User, UserId};
use oblak_platform::random::Random;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::principal::{Principal, UserPrincipal, unauthenticated};

/// What every token starts with, so that scanners recognise a leaked one.
pub const PREFIX: &str = "oblak_";
const RANDOM_BYTES: usize = 32;

/// A fresh secret. Shown once, never stored.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// The text for the `Authorization` header.
    #[must_use]
    pub fn reveal(&self) -> &str {
        &self.0
    }
    /// What is stored instead of it.
    #[must_use]
    pub fn digest(&self) -> String {
        digest(&self.0)
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(..)")
    }
}

/// What lies in the store below `/secret/token/<digest>`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenRecord {
    /// The token object.
    pub token: TokenId,
    /// Whom it stands for; by id, so that a later user of the same name inherits nothing.
    pub user: UserId,
}

/// Makes a token: 256 bits of randomness in base32 (RFC 4648 section 6, lower case, no padding).
#[must_use]
pub fn mint(random: &dyn Random) -> Secret {
    let mut bytes = [0u8; RANDOM_BYTES];
    random.fill(&mut bytes);
    Secret(format!("{PREFIX}{}", BASE32_NOPAD.encode(&bytes).to_ascii_lowercase()))
}

/// SHA-256 in hexadecimal. A plain digest is enough for a secret with 256 bits of entropy, and looking it up by digest leaks nothing
/// about the secret through timing.
#[must_use]
pub fn digest(secret: &str) -> String {
    HEXLOWER.encode(&Sha256::digest(secret.as_bytes()))
}

/// Whether the text can be a token at all; anything else is not looked up.
#[must_use]
pub fn is_well_formed(secret: &str) -> bool {
    secret.len() <= 128
        && secret.strip_prefix(PREFIX).is_some_and(|rest| rest.bytes().all(|b| b.is_ascii_alphanumeric()))
}

/// The principal behind a token that was found by its digest.
///
/// # Errors
/// `unauthenticated` when the token or its user is gone, disabled, expired or not the one that the record names.
pub fn admit(
    record: TokenRecord,
    token: Option<&Token>,
    user: Option<&User>,
    now: Timestamp,
) -> Result<Principal, ApiError> {
    let (Some(token), Some(user)) = (token, user) else { return Err(unauthenticated()) };
    let same = token.metadata.id == record.token.0 && user.metadata.id == record.user.0;
    let alive = !user.spec.disabled && !user.metadata.is_deleting() && !token.metadata.is_deleting();
    let expired = token.spec.expires_at.is_some_and(|end| end <= now);
    if !same || !alive || expired {
        return Err(unauthenticated());
    }
    Ok(Principal::User(UserPrincipal {
        id: record.user,
        name: user.metadata.name.clone(),
        cloud_admin: user.spec.cloud_admin,
        token: Some(record.token),
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use oblak_model::{TokenSpec, UserSpec};
    use oblak_platform::random::SystemRandom;

    fn pair() -> (TokenRecord, Token, User) {
        let mut user = User::new("ann", UserSpec::default());
        user.metadata.id = "0190a1b2-c3d4-7e5f-8a9b-0c1d2e3f4a5b".parse().unwrap();
        let mut token = Token::new("t", TokenSpec { user: "ann".into(), ..TokenSpec::default() });
        token.metadata.id = "0190a1b2-c3d4-7e5f-8a9b-0c1d2e3f4a5c".parse().unwrap();
        (TokenRecord { token: TokenId(token.metadata.id), user: UserId(user.metadata.id) }, token, user)
    }

    #[test]
    fn minted_tokens_differ_and_hide_in_debug() {
        let (a, b) = (mint(&SystemRandom), mint(&SystemRandom));
        assert_ne!(a, b);
        assert!(is_well_formed(a.reveal()) && a.reveal().len() == PREFIX.len() + 52);
        assert!(!format!("{a:?}").contains(&a.reveal()[6..]));
        assert_ne!(a.digest(), a.reveal());
        assert!(!is_well_formed("oblak_../x") && !is_well_formed("x"));
    }

    #[test]
    fn only_live_tokens_of_live_users_are_admitted() {
        let now = Timestamp::from_micros(1_000_000);
        let (record, token, user) = pair();
        assert!(admit(record, Some(&token), Some(&user), now).is_ok());
        let disabled = User { spec: UserSpec { disabled: true, ..UserSpec::default() }, ..user.clone() };
        assert!(admit(record, Some(&token), Some(&disabled), now).is_err());
        let mut expired = token.clone();
        expired.spec.expires_at = Some(now);
        assert!(admit(record, Some(&expired), Some(&user), now).is_err());
        let mut namesake = user.clone();
        namesake.metadata.id = "0190a1b2-c3d4-7e5f-8a9b-0c1d2e3f4aff".parse().unwrap();
        assert!(admit(record, Some(&token), Some(&namesake), now).is_err());
        assert!(admit(record, None, Some(&user), now).is_err());
    }
}
