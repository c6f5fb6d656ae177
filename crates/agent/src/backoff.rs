//! Pauses between attempts: doubling, with an upper limit.

use std::time::Duration;

/// Growing pauses.
#[derive(Clone, Debug)]
pub struct Backoff {
    first: Duration,
    limit: Duration,
    failures: u32,
}

impl Backoff {
    /// Starts at `first`, never longer than `limit`.
    pub fn new(first: Duration, limit: Duration) -> Self {
        Self { first, limit, failures: 0 }
    }
    /// The pause after another failure.
    pub fn next(&mut self) -> Duration {
        let pause = pause(self.first, self.limit, self.failures);
        self.failures = self.failures.saturating_add(1);
        pause
    }
    /// It worked.
    pub fn reset(&mut self) {
        self.failures = 0;
    }
}

/// `first` times two to the power of `failures`, at most `limit`.
pub fn pause(first: Duration, limit: Duration, failures: u32) -> Duration {
    first.saturating_mul(1u32.checked_shl(failures.min(20)).unwrap_or(u32::MAX)).min(limit)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn doubles_up_to_the_limit() {
        let mut b = Backoff::new(Duration::from_secs(1), Duration::from_secs(5));
        let pauses: Vec<u64> = (0..4).map(|_| b.next().as_secs()).collect();
        assert_eq!(pauses, [1, 2, 4, 5]);
        b.reset();
        assert_eq!(b.next().as_secs(), 1);
    }
}
