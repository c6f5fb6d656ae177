//! A small deterministic hasher. The standard one is seeded at random, which a pure crate does not want, and slower on
//! the short keys used here. Keys are ids we made ourselves or are verified after the lookup, so collisions cost time
//! and never correctness.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

pub(crate) type FastMap<K, V> = HashMap<K, V, BuildHasherDefault<Mix>>;

/// Multiply and fold (the 64 x 64 -> 128 bit product, both halves combined), one step per word.
#[derive(Default, Clone, Copy)]
pub(crate) struct Mix(u64);

/// An odd constant with well spread bits: the fractional part of the golden ratio times 2^64.
const SPREAD: u64 = 0x9e37_79b9_7f4a_7c15;

impl Mix {
    fn word(&mut self, word: u64) {
        let product = u128::from(self.0 ^ word ^ SPREAD) * u128::from(SPREAD);
        self.0 = (product as u64) ^ ((product >> 64) as u64);
    }
}

impl Hasher for Mix {
    fn finish(&self) -> u64 {
        let product = u128::from(self.0 ^ SPREAD) * 0xd6e8_feb8_6659_fd93_u128;
        (product as u64) ^ ((product >> 64) as u64)
    }

    fn write(&mut self, bytes: &[u8]) {
        let mut chunks = bytes.chunks_exact(8);
        for chunk in &mut chunks {
            let mut word = [0; 8];
            word.copy_from_slice(chunk);
            self.word(u64::from_le_bytes(word));
        }
        let rest = chunks.remainder();
        let mut word = [0; 8];
        word[..rest.len()].copy_from_slice(rest);
        self.word(u64::from_le_bytes(word) ^ ((bytes.len() as u64) << 56));
    }

    fn write_u8(&mut self, n: u8) {
        self.word(u64::from(n));
    }

    fn write_u32(&mut self, n: u32) {
        self.word(u64::from(n));
    }

    fn write_u64(&mut self, n: u64) {
        self.word(n);
    }

    fn write_u128(&mut self, n: u128) {
        self.word(n as u64);
        self.word((n >> 64) as u64);
    }

    fn write_usize(&mut self, n: usize) {
        self.word(n as u64);
    }
}

/// A hash of strings and a salt, for posting lists whose hits are verified.
pub(crate) fn hash_parts(salt: u128, parts: &[&str]) -> u64 {
    let mut mix = Mix::default();
    mix.write_u128(salt);
    for part in parts {
        mix.write(part.as_bytes());
    }
    mix.finish()
}
