//! Encryption of a stream with a passphrase.
//!
//! ```text
//!   "oblak-backup\n" · parameters as one line of JSON · frames: length (u32, little-endian) · ciphertext with tag
//! ```
//! The key comes from the passphrase by Argon2id (RFC 9106) with the salt of the file. Each frame is sealed with ChaCha20-Poly1305 (RFC 8439); its
//! nonce is the number of the frame and whether it is the last one (the STREAM construction of Hoang, Reyhanitabar, Rogaway and Vizár), so
//! frames cannot be cut off, repeated or exchanged. Every frame is bound to the parameters. A salt is random, so no key is used for two files.

use std::io::Read;

use argon2::{Algorithm, Argon2, Params, Version};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use oblak_platform::random::Random;
use ring::aead::{Aad, CHACHA20_POLY1305, LessSafeKey, Nonce, UnboundKey};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use zeroize::Zeroizing;

use crate::{BackupError, Result};

const MAGIC: &[u8] = b"oblak-backup\n";
const FORMAT: u32 = 1;
/// Second recommendation of RFC 9106 section 4.
const MEMORY_KIB: u32 = 64 << 10;
const PASSES: u32 = 3;
/// A file may ask for more, but not for all of the machine.
const MOST_MEMORY_KIB: u32 = 1 << 20;
const MOST_PASSES: u32 = 32;
const SALT: usize = 16;
const KEY: usize = 32;
/// Plaintext of a frame.
const FRAME: usize = 64 << 10;
const MOST_HEADER: usize = 4096;
/// Fewer characters are guessed.
pub const LEAST_PASSPHRASE: usize = 12;

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Parameters {
    format: u32,
    kdf: String,
    memory_kib: u32,
    passes: u32,
    salt: String,
}

/// Whether a passphrase is long enough to be one.
///
/// # Errors
/// [`BackupError::Weak`].
pub fn check_passphrase(passphrase: &str) -> Result<()> {
    if passphrase.chars().count() < LEAST_PASSPHRASE {
        return Err(BackupError::Weak("is too short: it needs at least 12 characters"));
    }
    Ok(())
}

struct Cipher {
    key: LessSafeKey,
    bound: [u8; 32],
    frames: u64,
}

impl Cipher {
    fn new(passphrase: &str, header: &[u8], parameters: &Parameters) -> Result<Self> {
        let damaged = |what: &str| BackupError::Damaged(what.into());
        let salt = STANDARD.decode(&parameters.salt).map_err(|_| damaged("its salt cannot be read"))?;
        if salt.len() != SALT || parameters.memory_kib > MOST_MEMORY_KIB || parameters.passes > MOST_PASSES {
            return Err(damaged("its parameters are out of range"));
        }
        let params = Params::new(parameters.memory_kib, parameters.passes, 1, Some(KEY))
            .map_err(|_| damaged("its parameters are out of range"))?;
        let mut key = Zeroizing::new([0u8; KEY]);
        Argon2::new(Algorithm::Argon2id, Version::V0x13, params)
            .hash_password_into(passphrase.as_bytes(), &salt, &mut *key)
            .map_err(|e| BackupError::Crypto(e.to_string()))?;
        let key = UnboundKey::new(&CHACHA20_POLY1305, &*key).map_err(|_| BackupError::Crypto("no key".into()))?;
        Ok(Self { key: LessSafeKey::new(key), bound: Sha256::digest(header).into(), frames: 0 })
    }

    fn nonce(&mut self, last: bool) -> Nonce {
        let mut nonce = [0u8; 12];
        nonce[3..11].copy_from_slice(&self.frames.to_be_bytes());
        nonce[11] = u8::from(last);
        self.frames += 1;
        Nonce::assume_unique_for_key(nonce)
    }
}

/// Encrypts what is pushed.
pub struct Sealer {
    secret: Cipher,
    plain: Zeroizing<Vec<u8>>,
    sealed: Vec<u8>,
}

impl Sealer {
    /// Derives the key, which takes some tenths of a second and 64 MiB.
    ///
    /// # Errors
    /// [`BackupError::Weak`], or there is not enough memory.
    pub fn new(passphrase: &str, random: &dyn Random) -> Result<Self> {
        check_passphrase(passphrase)?;
        let mut salt = [0u8; SALT];
        random.fill(&mut salt);
        let parameters = Parameters {
            format: FORMAT,
            kdf: "argon2id".into(),
            memory_kib: MEMORY_KIB,
            passes: PASSES,
            salt: STANDARD.encode(salt),
        };
        let mut header = serde_json::to_vec(&parameters).map_err(|e| BackupError::Crypto(e.to_string()))?;
        header.push(b'\n');
        let secret = Cipher::new(passphrase, &header, &parameters)?;
        let sealed = [MAGIC, &header].concat();
        Ok(Self { secret, plain: Zeroizing::new(Vec::with_capacity(2 * FRAME)), sealed })
    }

    /// Takes more.
    ///
    /// # Errors
    /// Never, unless cryptography fails.
    pub fn push(&mut self, bytes: &[u8]) -> Result<()> {
        for part in bytes.chunks(FRAME) {
            self.plain.extend_from_slice(part);
            // The last frame is sealed by `finish`, so one is held back.
            while self.plain.len() > FRAME {
                let rest = self.plain.split_off(FRAME);
                let frame = std::mem::replace(&mut *self.plain, rest);
                self.seal(frame, false)?;
            }
        }
        Ok(())
    }

    fn seal(&mut self, mut frame: Vec<u8>, last: bool) -> Result<()> {
        let nonce = self.secret.nonce(last);
        self.secret
            .key
            .seal_in_place_append_tag(nonce, Aad::from(self.secret.bound), &mut frame)
            .map_err(|_| BackupError::Crypto("a frame was not sealed".into()))?;
        let length = u32::try_from(frame.len()).map_err(|_| BackupError::Crypto("a frame is too long".into()))?;
        self.sealed.extend_from_slice(&length.to_le_bytes());
        self.sealed.extend_from_slice(&frame);
        Ok(())
    }

    /// What is ready to be written.
    pub fn take(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.sealed)
    }

    /// Seals the last frame, and gives what is still to be written.
    ///
    /// # Errors
    /// As [`Sealer::push`].
    pub fn finish(mut self) -> Result<Vec<u8>> {
        let frame = std::mem::take(&mut *self.plain);
        self.seal(frame, true)?;
        Ok(self.sealed)
    }
}

/// Decrypts.
pub struct Opener<R> {
    secret: Cipher,
    from: R,
    done: bool,
}

impl<R: Read> Opener<R> {
    /// Reads the beginning and derives the key.
    ///
    /// # Errors
    /// [`BackupError::Damaged`] when it is no backup. Whether the passphrase is right is seen by the first frame.
    pub fn new(passphrase: &str, mut from: R) -> Result<Self> {
        let mut magic = [0u8; MAGIC.len()];
        if from.read_exact(&mut magic).is_err() || magic != *MAGIC {
            return Err(BackupError::Damaged("it does not begin as one".into()));
        }
        let mut header = Vec::new();
        let mut byte = [0u8];
        while header.last() != Some(&b'\n') {
            if header.len() > MOST_HEADER || from.read_exact(&mut byte).is_err() {
                return Err(BackupError::Damaged("its parameters cannot be read".into()));
            }
            header.push(byte[0]);
        }
        let parameters: Parameters = serde_json::from_slice(&header)
            .map_err(|_| BackupError::Damaged("its parameters cannot be read".into()))?;
        if parameters.format != FORMAT || parameters.kdf != "argon2id" {
            return Err(BackupError::Format { found: parameters.format, known: FORMAT });
        }
        Ok(Self { secret: Cipher::new(passphrase, &header, &parameters)?, from, done: false })
    }

    /// The next piece; `None` after the last one, when nothing follows it.
    ///
    /// # Errors
    /// [`BackupError::Passphrase`] at the first frame, [`BackupError::Damaged`] later.
    pub fn next_piece(&mut self) -> Result<Option<Zeroizing<Vec<u8>>>> {
        let damaged = |what: &str| BackupError::Damaged(what.into());
        if self.done {
            return match self.from.read(&mut [0u8]) {
                Ok(0) => Ok(None),
                _ => Err(damaged("something follows its end")),
            };
        }
        let mut length = [0u8; 4];
        self.from.read_exact(&mut length).map_err(|_| damaged("it ends too early"))?;
        let length = u32::from_le_bytes(length) as usize;
        let tag = CHACHA20_POLY1305.tag_len();
        if length < tag || length > FRAME + tag {
            return Err(damaged("a frame has an impossible length"));
        }
        let mut frame = vec![0u8; length];
        self.from.read_exact(&mut frame).map_err(|_| damaged("it ends too early"))?;
        let first = self.secret.frames == 0;
        for last in [false, true] {
            let nonce = self.secret.nonce(last);
            self.secret.frames -= 1;
            let mut copy = frame.clone();
            if let Ok(plain) = self.secret.key.open_in_place(nonce, Aad::from(self.secret.bound), &mut copy) {
                let length = plain.len();
                copy.truncate(length);
                self.secret.frames += 1;
                self.done = last;
                return Ok(Some(Zeroizing::new(copy)));
            }
        }
        Err(if first { BackupError::Passphrase } else { damaged("a frame was changed") })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use oblak_platform::random::SystemRandom;

    const WORDS: &str = "correct horse battery";

    fn sealed(plain: &[u8]) -> Vec<u8> {
        let mut sealer = Sealer::new(WORDS, &SystemRandom).unwrap();
        let mut out = Vec::new();
        for part in plain.chunks(50_000) {
            sealer.push(part).unwrap();
            out.extend(sealer.take());
        }
        out.extend(sealer.finish().unwrap());
        out
    }

    fn opened(passphrase: &str, file: &[u8]) -> Result<Vec<u8>> {
        let mut opener = Opener::new(passphrase, file)?;
        let mut out = Vec::new();
        while let Some(piece) = opener.next_piece()? {
            out.extend_from_slice(&piece);
        }
        Ok(out)
    }

    #[test]
    fn what_was_sealed_is_opened_with_the_same_words_only() {
        for size in [0, 1, FRAME, FRAME + 1, 3 * FRAME + 17] {
            let plain: Vec<u8> = (0..size).map(|n| u8::try_from(n % 251).unwrap()).collect();
            let file = sealed(&plain);
            assert_eq!(opened(WORDS, &file).unwrap(), plain, "{size}");
        }
        let file = sealed(b"a secret that must not be seen");
        assert!(!file.windows(8).any(|window| window == b"a secret"));
        assert!(matches!(opened("wrong horse battery", &file), Err(BackupError::Passphrase)));
        assert!(matches!(Sealer::new("short", &SystemRandom), Err(BackupError::Weak(_))));
        assert_ne!(sealed(b"x"), sealed(b"x"), "each file has a salt of its own");
    }

    #[test]
    fn cut_changed_repeated_and_exchanged_frames_are_refused() {
        let file = sealed(&vec![7u8; 3 * FRAME + 5]);
        let begin = MAGIC.len() + file[MAGIC.len()..].iter().position(|b| *b == b'\n').unwrap() + 1;
        let frame = 4 + FRAME + 16;
        let (one, two) = (begin..begin + frame, begin + frame..begin + 2 * frame);
        for at in [0, MAGIC.len() + 12, begin + 1, begin + 100, file.len() - 1] {
            let mut changed = file.clone();
            changed[at] ^= 1;
            assert!(opened(WORDS, &changed).is_err(), "byte {at}");
        }
        for length in [0, 5, begin, begin + 2, begin + frame, begin + 2 * frame, file.len() - 1] {
            assert!(opened(WORDS, &file[..length]).is_err(), "cut at {length}");
        }
        let exchanged = [&file[..begin], &file[two.clone()], &file[one.clone()], &file[two.end..]].concat();
        let repeated = [&file[..one.end], &file[one.clone()], &file[one.end..]].concat();
        let longer = [&file[..], b"x"].concat();
        for wrong in [exchanged, repeated, longer] {
            assert!(opened(WORDS, &wrong).is_err());
        }
    }

    #[test]
    fn a_file_cannot_ask_for_all_memory() {
        let text = String::from_utf8_lossy(&sealed(b"x")).replace("65536", "9999999");
        assert!(matches!(opened(WORDS, text.as_bytes()), Err(BackupError::Damaged(_))));
    }
}
