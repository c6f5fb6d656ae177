//! Rate limits per key, with a bounded number of keys.

use std::collections::HashMap;
use std::hash::Hash;
use std::time::{Duration, Instant};

/// Token buckets by key.
#[derive(Debug)]
pub struct Buckets<K> {
    burst: f64,
    per_second: f64,
    max_keys: usize,
    buckets: HashMap<K, (f64, Instant)>,
}

impl<K: Hash + Eq + Clone> Buckets<K> {
    /// At most `burst` at once and `per_second` in the long run for every key; at most `max_keys` keys are remembered.
    pub fn new(burst: f64, per_second: f64, max_keys: usize) -> Self {
        Self { burst, per_second, max_keys, buckets: HashMap::new() }
    }

    /// Takes one token of `key`; false when there is none.
    pub fn take(&mut self, key: &K, now: Instant) -> bool {
        if !self.buckets.contains_key(key) && self.buckets.len() >= self.max_keys {
            self.forget_full(now);
            if self.buckets.len() >= self.max_keys {
                return false;
            }
        }
        let (burst, rate) = (self.burst, self.per_second);
        let (tokens, at) = self.buckets.entry(key.clone()).or_insert((burst, now));
        *tokens = (*tokens + now.saturating_duration_since(*at).as_secs_f64() * rate).min(burst);
        *at = now;
        if *tokens < 1.0 {
            return false;
        }
        *tokens -= 1.0;
        true
    }

    /// A bucket that has filled up again carries no information.
    fn forget_full(&mut self, now: Instant) {
        let refill = Duration::from_secs_f64(self.burst / self.per_second);
        self.buckets.retain(|_, (_, at)| now.saturating_duration_since(*at) < refill);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_and_refills() {
        let start = Instant::now();
        let mut limit = Buckets::new(2.0, 1.0, 2);
        assert!(limit.take(&1, start));
        assert!(limit.take(&1, start));
        assert!(!limit.take(&1, start));
        assert!(limit.take(&1, start + Duration::from_secs(1)));
        assert!(limit.take(&2, start));
        assert!(!limit.take(&3, start), "no room for a third key");
        assert!(limit.take(&3, start + Duration::from_secs(10)), "old keys make room");
    }
}
