//! Changing inputs.

/// xorshift64* (Vigna, 2016): small, fast, and the same everywhere.
#[derive(Clone, Debug)]
pub struct Dice(u64);

impl Dice {
    /// From a seed; zero is as good as any other.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// Any number.
    pub fn number(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// A number below `end`, 0 when there is none.
    pub fn below(&mut self, end: usize) -> usize {
        if end == 0 { 0 } else { (self.number() >> 16) as usize % end }
    }
}

/// Numbers at which arithmetic and limits break.
const NUMBERS: [u64; 12] = [
    0,
    1,
    0x7f,
    0x80,
    0xff,
    0x7fff,
    0xffff,
    0x7fff_ffff,
    0xffff_ffff,
    0x7fff_ffff_ffff_ffff,
    0x8000_0000_0000_0000,
    u64::MAX,
];

/// Pieces of text that mean something to many parsers.
const WORDS: [&str; 24] = [
    "\0",
    "\n",
    "\r\n",
    "\"",
    "\\",
    "\\u0000",
    "{",
    "}",
    "[",
    "]",
    "null",
    "true",
    "-1",
    "0",
    "1e999",
    "18446744073709551616",
    ":",
    ",",
    "=",
    "/",
    "..",
    "%00",
    "\u{202e}",
    "é",
];

/// Changes `input` in one to eight places. `other` is one more known input, to take pieces from.
pub fn mutate(dice: &mut Dice, input: &mut Vec<u8>, other: &[u8], limit: usize) {
    for _ in 0..=dice.below(8) {
        step(dice, input, other);
    }
    input.truncate(limit);
}

fn step(dice: &mut Dice, input: &mut Vec<u8>, other: &[u8]) {
    let length = input.len();
    let at = dice.below(length + 1);
    let span = dice.below(length - at + 1).min(1 << dice.below(10));
    match dice.below(12) {
        0 if at < length => input[at] ^= 1 << dice.below(8),
        1 if at < length => input[at] = dice.number() as u8,
        2 if at < length => input[at] = input[at].wrapping_add(if dice.below(2) == 0 { 1 } else { 0xff }),
        3 => drop(input.drain(at..at + span)),
        4 => {
            let piece = input[at..at + span].to_vec();
            insert(input, dice.below(length + 1), &piece);
        }
        5 => {
            let from = dice.below(other.len() + 1);
            let end = (from + 1 + dice.below(64)).min(other.len());
            insert(input, at, &other[from.min(end)..end]);
        }
        6 => {
            // The beginning of one and the end of the other.
            let from = dice.below(other.len() + 1);
            input.truncate(at);
            input.extend_from_slice(&other[from..]);
        }
        7 => {
            let number = NUMBERS[dice.below(NUMBERS.len())];
            let width = 1 << dice.below(4);
            let bytes = if dice.below(2) == 0 {
                number.to_le_bytes()
            } else {
                number.rotate_right(8 * width as u32).to_be_bytes()
            };
            overwrite(input, at, &bytes[..width]);
        }
        8 => {
            let text = NUMBERS[dice.below(NUMBERS.len())].to_string();
            overwrite(input, at, text.as_bytes());
        }
        9 => insert(input, at, WORDS[dice.below(WORDS.len())].as_bytes()),
        10 => input.truncate(at),
        _ => {
            let byte = if at < length { input[at] } else { dice.number() as u8 };
            insert(input, at, &vec![byte; 1 << dice.below(9)]);
        }
    }
}

fn insert(input: &mut Vec<u8>, at: usize, piece: &[u8]) {
    let tail = input.split_off(at.min(input.len()));
    input.extend_from_slice(piece);
    input.extend_from_slice(&tail);
}

fn overwrite(input: &mut Vec<u8>, at: usize, piece: &[u8]) {
    let end = (at + piece.len()).min(input.len());
    input.splice(at.min(end)..end, piece.iter().copied());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_seed_gives_the_same_inputs_and_the_limit_holds() {
        let make = |seed| {
            let mut dice = Dice::new(seed);
            let mut input = b"GET /latest/meta-data HTTP/1.1\r\n".to_vec();
            for _ in 0..2000 {
                mutate(&mut dice, &mut input, b"other", 600);
                assert!(input.len() <= 600);
            }
            input
        };
        assert_eq!(make(7), make(7));
        assert_ne!(make(7), make(8));
        let mut empty = Vec::new();
        mutate(&mut Dice::new(1), &mut empty, b"", 10);
    }
}
