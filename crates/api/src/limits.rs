//! Limits of callers: requests per second, streams at once.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use oblak_model::{ApiError, Code};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Callers remembered before those with full buckets are forgotten.
const REMEMBERED: usize = 10_000;

struct Bucket {
    tokens: f64,
    at: Duration,
}

/// A token bucket for each caller.
pub(crate) struct Buckets {
    rate: f64,
    burst: f64,
    buckets: Mutex<HashMap<String, Bucket>>,
}

impl Buckets {
    /// `rate` tokens per second, at most `burst`.
    pub fn new(rate: f64, burst: f64) -> Self {
        Self { rate, burst: burst.max(1.0), buckets: Mutex::default() }
    }

    /// Takes a token.
    ///
    /// # Errors
    /// `rate_limited` with the time to wait.
    pub fn take(&self, caller: &str, now: Duration) -> Result<(), ApiError> {
        self.change(caller, now, 1.0)
    }

    /// Whether a token is there, without taking it.
    ///
    /// # Errors
    /// As [`Buckets::take`].
    pub fn check(&self, caller: &str, now: Duration) -> Result<(), ApiError> {
        self.change(caller, now, 0.0)
    }

    fn change(&self, caller: &str, now: Duration, cost: f64) -> Result<(), ApiError> {
        let mut buckets = self.buckets.lock().unwrap_or_else(PoisonError::into_inner);
        if buckets.len() >= REMEMBERED && !buckets.contains_key(caller) {
            let (rate, burst) = (self.rate, self.burst);
            buckets.retain(|_, b| b.tokens + now.saturating_sub(b.at).as_secs_f64() * rate < burst);
            if buckets.len() >= REMEMBERED {
                // So many callers at the limit at once is an attack; new ones wait.
                return Err(limited(1.0));
            }
        }
        let bucket = match buckets.get_mut(caller) {
            Some(bucket) => bucket,
            None => buckets.entry(caller.to_string()).or_insert(Bucket { tokens: self.burst, at: now }),
        };
        let gained = now.saturating_sub(bucket.at).as_secs_f64() * self.rate;
        bucket.tokens = (bucket.tokens + gained).min(self.burst);
        bucket.at = now;
        if bucket.tokens < 1.0 {
            return Err(limited((1.0 - bucket.tokens) / self.rate.max(0.001)));
        }
        bucket.tokens -= cost;
        Ok(())
    }
}

fn limited(wait: f64) -> ApiError {
    ApiError::new(Code::RateLimited, format!("too many requests; try again in {:.1} seconds", wait.max(0.1)))
}

/// Streams at once, in all and of each caller.
pub(crate) struct StreamLimits {
    all: Arc<Semaphore>,
    each: usize,
    callers: Arc<Mutex<HashMap<String, usize>>>,
}

/// Counts as one stream while it lives.
pub(crate) struct StreamPermit {
    _all: OwnedSemaphorePermit,
    caller: String,
    callers: Arc<Mutex<HashMap<String, usize>>>,
}

impl StreamLimits {
    pub fn new(all: usize, each: usize) -> Self {
        Self { all: Arc::new(Semaphore::new(all)), each, callers: Arc::default() }
    }

    pub fn enter(&self, caller: &str) -> Result<StreamPermit, ApiError> {
        let all = Arc::clone(&self.all)
            .try_acquire_owned()
            .map_err(|_| ApiError::new(Code::RateLimited, "the server has as many open streams as it allows"))?;
        let mut callers = self.callers.lock().unwrap_or_else(PoisonError::into_inner);
        let count = callers.entry(caller.to_string()).or_default();
        if *count >= self.each {
            return Err(ApiError::new(
                Code::RateLimited,
                format!("you have {} open streams, which is the limit; close one first", self.each),
            ));
        }
        *count += 1;
        Ok(StreamPermit { _all: all, caller: caller.to_string(), callers: Arc::clone(&self.callers) })
    }

    /// Streams open now.
    pub fn open(&self) -> usize {
        self.callers.lock().unwrap_or_else(PoisonError::into_inner).values().sum()
    }
}

impl Drop for StreamPermit {
    fn drop(&mut self) {
        let mut callers = self.callers.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = callers.get_mut(&self.caller) {
            *count -= 1;
            if *count == 0 {
                callers.remove(&self.caller);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bucket_empties_and_fills_again() {
        let buckets = Buckets::new(2.0, 3.0);
        let at = Duration::from_millis;
        for _ in 0..3 {
            buckets.take("a", at(0)).unwrap();
        }
        assert_eq!(buckets.take("a", at(0)).unwrap_err().code, Code::RateLimited);
        assert!(buckets.check("a", at(100)).is_err());
        buckets.take("b", at(0)).unwrap();
        buckets.take("a", at(600)).unwrap();
        assert!(buckets.take("a", at(600)).is_err());
    }

    #[test]
    fn streams_are_counted_while_they_live() {
        let limits = StreamLimits::new(3, 2);
        let (a, _b) = (limits.enter("x").unwrap(), limits.enter("x").unwrap());
        assert!(limits.enter("x").is_err());
        let _c = limits.enter("y").unwrap();
        assert!(limits.enter("z").is_err());
        drop(a);
        assert!(limits.enter("x").is_ok());
        assert_eq!(limits.open(), 2);
    }
}
