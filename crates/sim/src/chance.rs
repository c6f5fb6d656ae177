//! Chance and time of a simulation: everything follows from the seed.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use oblak_model::Timestamp;
use oblak_platform::clock::Clock;
use oblak_platform::random::Random;
use tokio::time::Instant;

/// 2026-01-01T00:00:00Z, when every simulation begins, in microseconds since the epoch.
const BEGIN_MICROS: i64 = 1_767_225_600_000_000;

/// A stream of numbers from a seed (SplitMix64; Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014).
#[derive(Clone, Debug)]
pub struct Dice {
    state: u64,
}

impl Dice {
    /// The stream of a seed and a purpose: streams of different purposes have nothing to do with each other, so one more throw here changes nothing there.
    #[must_use]
    pub fn new(seed: u64, purpose: &str) -> Self {
        // FNV-1a over the purpose, so that the seed's neighbours get far apart too.
        let hash =
            purpose.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3));
        let mut dice = Self { state: seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ hash };
        dice.roll();
        dice
    }

    /// The next 64 bits.
    pub fn roll(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `limit`; 0 when it is 0.
    pub fn below(&mut self, limit: usize) -> usize {
        if limit == 0 {
            return 0;
        }
        usize::try_from(self.roll() % limit as u64).unwrap_or(0)
    }

    /// Whether something happens that happens `permille` times in a thousand.
    pub fn permille(&mut self, permille: u32) -> bool {
        self.roll() % 1000 < u64::from(permille)
    }

    /// A time between the two, to the microsecond.
    pub fn between(&mut self, least: Duration, most: Duration) -> Duration {
        let span = most.saturating_sub(least).as_micros().max(1);
        least + Duration::from_micros(self.roll() % u64::try_from(span).unwrap_or(u64::MAX))
    }

    /// One of them; none of nothing.
    pub fn choose<'a, T>(&mut self, all: &'a [T]) -> Option<&'a T> {
        if all.is_empty() { None } else { all.get(self.below(all.len())) }
    }
}

/// Randomness for our own code.
#[derive(Debug)]
pub struct SeededRandom(Mutex<Dice>);

impl SeededRandom {
    /// The source of one role.
    #[must_use]
    pub fn new(seed: u64, purpose: &str) -> Self {
        Self(Mutex::new(Dice::new(seed, purpose)))
    }
}

impl Random for SeededRandom {
    fn fill(&self, buffer: &mut [u8]) {
        let mut dice = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for chunk in buffer.chunks_mut(8) {
            let bytes = dice.roll().to_le_bytes();
            chunk.copy_from_slice(&bytes[..chunk.len()]);
        }
    }
}

/// Virtual time, as one machine sees it.
#[derive(Clone, Copy, Debug)]
pub struct VirtualClock {
    begun: Instant,
    /// The wall clock's time then.
    begin_micros: i64,
    /// How far its wall clock is ahead of the true time, in microseconds.
    skew_micros: i64,
}

impl VirtualClock {
    /// A clock that is right. `begun` is the begin of the simulation.
    #[must_use]
    pub fn new(begun: Instant) -> Self {
        Self::from(begun, Timestamp::from_micros(BEGIN_MICROS))
    }

    /// A clock that shows `time` at `begun`.
    #[must_use]
    pub fn from(begun: Instant, time: Timestamp) -> Self {
        Self { begun, begin_micros: time.as_micros(), skew_micros: 0 }
    }

    /// The same time seen by a machine whose wall clock is wrong by so much.
    #[must_use]
    pub fn skewed(self, micros: i64) -> Self {
        Self { skew_micros: micros, ..self }
    }
}

impl Clock for VirtualClock {
    fn now(&self) -> Timestamp {
        let passed = i64::try_from(self.begun.elapsed().as_micros()).unwrap_or(i64::MAX);
        Timestamp::from_micros(self.begin_micros.saturating_add(passed).saturating_add(self.skew_micros))
    }

    fn boottime(&self) -> Duration {
        self.begun.elapsed()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn streams_are_their_own() {
        let (mut a, mut b, mut again) = (Dice::new(7, "a"), Dice::new(7, "b"), Dice::new(7, "a"));
        let first: Vec<_> = (0..100).map(|_| a.roll()).collect();
        assert_eq!(first, (0..100).map(|_| again.roll()).collect::<Vec<_>>());
        assert!(first.iter().all(|n| *n != b.roll()));
        let happened = (0..10_000).filter(|_| a.permille(100)).count();
        assert!((800..1200).contains(&happened), "{happened}");
    }
}
