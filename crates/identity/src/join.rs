//! Join tokens: with one of them one machine joins the cloud, once.
//!
//! The text is `oblakjoin1_<pin>_<secret>`: the SHA-256 of the authority's certificate (DER) and 32 random bytes, both in base32 (RFC 4648
//! section 6, lower case, no padding). The pin lets the new machine recognise the cloud before it says the secret to anybody, as the
//! hashes in the tokens of k3s and kubeadm do. Of the secret the cloud keeps only the digest.

use std::fmt;
use std::str::FromStr;

use data_encoding::BASE32_NOPAD;
use oblak_platform::random::Random;
use sha2::{Digest, Sha256};
use x509_parser::prelude::parse_x509_pem;

use crate::pki::PkiError;
use crate::tokens;

/// What every join token starts with. The digit is the version of the format.
pub const PREFIX: &str = "oblakjoin1_";
const BYTES: usize = 32;
/// Characters of 32 bytes in base32 without padding.
const TEXT: usize = 52;

/// SHA-256 of a certificate.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Pin([u8; BYTES]);

impl Pin {
    /// Of the first certificate of a PEM text.
    ///
    /// # Errors
    /// [`PkiError::Request`] when there is none.
    pub fn of_pem(pem: &str) -> Result<Self, PkiError> {
        let bad = |e: String| PkiError::Request(format!("that is no certificate: {e}"));
        let (_, pem) = parse_x509_pem(pem.as_bytes()).map_err(|e| bad(e.to_string()))?;
        pem.parse_x509().map_err(|e| bad(e.to_string()))?;
        Ok(Self(Sha256::digest(&pem.contents).into()))
    }
}

impl fmt::Display for Pin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&encode(&self.0))
    }
}

impl fmt::Debug for Pin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Pin({self})")
    }
}

/// A join token as people carry it from machine to machine.
#[derive(Clone, PartialEq, Eq)]
pub struct JoinToken {
    /// The authority that the cloud must have.
    pub pin: Pin,
    secret: String,
}

impl JoinToken {
    /// A fresh one for a cloud.
    #[must_use]
    pub fn mint(pin: Pin, random: &dyn Random) -> Self {
        let mut bytes = [0u8; BYTES];
        random.fill(&mut bytes);
        Self { pin, secret: encode(&bytes) }
    }

    /// The part that only the cloud may hear.
    #[must_use]
    pub fn secret(&self) -> &str {
        &self.secret
    }

    /// What is stored instead of the secret.
    #[must_use]
    pub fn digest(&self) -> String {
        tokens::digest(&self.secret)
    }

    /// The whole text, to be shown once.
    #[must_use]
    pub fn reveal(&self) -> String {
        format!("{PREFIX}{}_{}", self.pin, self.secret)
    }
}

impl fmt::Debug for JoinToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "JoinToken({}, ..)", self.pin)
    }
}

/// The text is no join token.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("that is no join token: it must begin with {PREFIX} and have {} characters; copy it whole, as `oblak join-token create` printed it", PREFIX.len() + 2 * TEXT + 1)]
pub struct NotAJoinToken;

impl FromStr for JoinToken {
    type Err = NotAJoinToken;
    fn from_str(text: &str) -> Result<Self, NotAJoinToken> {
        let (pin, secret) =
            text.trim().strip_prefix(PREFIX).and_then(|rest| rest.split_once('_')).ok_or(NotAJoinToken)?;
        let pin: [u8; BYTES] = decode(pin)?;
        decode(secret)?;
        Ok(Self { pin: Pin(pin), secret: secret.to_string() })
    }
}

fn encode(bytes: &[u8]) -> String {
    BASE32_NOPAD.encode(bytes).to_ascii_lowercase()
}

fn decode(text: &str) -> Result<[u8; BYTES], NotAJoinToken> {
    if text.len() != TEXT || text.bytes().any(|b| b.is_ascii_uppercase()) {
        return Err(NotAJoinToken);
    }
    let bytes = BASE32_NOPAD.decode(text.to_ascii_uppercase().as_bytes()).map_err(|_| NotAJoinToken)?;
    bytes.try_into().map_err(|_| NotAJoinToken)
}

#[cfg(test)]
mod tests {
    use super::*;
    use oblak_model::Timestamp;
    use oblak_platform::random::SystemRandom;

    #[test]
    fn a_token_reads_back_and_hides_its_secret() {
        let dir = tempfile::tempdir().unwrap();
        let ca = crate::pki::ensure_ca(dir.path(), Timestamp::from_micros(1_772_323_200_000_000)).unwrap();
        let pin = Pin::of_pem(ca.certificate_pem()).unwrap();
        let token = JoinToken::mint(pin, &SystemRandom);
        let text = token.reveal();
        assert_eq!(format!(" {text}\n").parse::<JoinToken>().unwrap(), token);
        assert_eq!(text.parse::<JoinToken>().unwrap().pin, pin);
        assert!(!format!("{token:?}").contains(token.secret()));
        assert_ne!(token.digest(), token.secret());
        assert_ne!(JoinToken::mint(pin, &SystemRandom), token);
        // Nobody mistakes it for a token of the API.
        assert!(!tokens::is_well_formed(&text));
        for bad in ["", "oblak_x", &text[..text.len() - 1], &text.to_uppercase(), &text.replace('_', "-")] {
            assert!(bad.parse::<JoinToken>().is_err(), "{bad}");
        }
    }

    #[test]
    fn pins_tell_authorities_apart() {
        let pins = [(); 2].map(|()| {
            let dir = tempfile::tempdir().unwrap();
            let ca = crate::pki::ensure_ca(dir.path(), Timestamp::from_micros(1_772_323_200_000_000)).unwrap();
            Pin::of_pem(ca.certificate_pem()).unwrap()
        });
        assert_ne!(pins[0], pins[1]);
        assert!(Pin::of_pem("junk").is_err());
    }
}
