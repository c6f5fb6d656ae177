//! Medians and their spread.

use std::time::{Duration, Instant};

/// Some measurements of one thing.
#[derive(Clone, Debug, Default)]
pub struct Samples(Vec<f64>);

impl Samples {
    /// Adds one.
    pub fn push(&mut self, value: f64) {
        self.0.push(value);
    }
    /// Adds a time, in milliseconds.
    pub fn push_ms(&mut self, time: Duration) {
        self.0.push(time.as_secs_f64() * 1e3);
    }
    /// How many.
    pub fn len(&self) -> usize {
        self.0.len()
    }
    /// The value below which this share of the measurements lies.
    pub fn quantile(&self, share: f64) -> f64 {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        let at = (sorted.len().saturating_sub(1) as f64 * share).round() as usize;
        sorted.get(at).copied().unwrap_or(f64::NAN)
    }
    /// The middle.
    pub fn median(&self) -> f64 {
        self.quantile(0.5)
    }
    /// `other / self`, pair by pair: what happens to the machine at one moment happens to both.
    pub fn ratio_of(&self, other: &Self) -> Self {
        Self(self.0.iter().zip(&other.0).map(|(floor, ours)| ours / floor).collect())
    }
}

/// What `work` returns, and how long it took.
pub fn timed<T>(work: impl FnOnce() -> T) -> (T, Duration) {
    let started = Instant::now();
    let out = work();
    (out, started.elapsed())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_and_ratios() {
        let mut a = Samples::default();
        [5.0, 1.0, 3.0, 2.0, 4.0].into_iter().for_each(|x| a.push(x));
        assert_eq!((a.median(), a.quantile(0.0), a.quantile(1.0)), (3.0, 1.0, 5.0));
        let mut b = Samples::default();
        [10.0, 2.0, 9.0, 2.0, 4.0].into_iter().for_each(|x| b.push(x));
        assert_eq!(a.ratio_of(&b).median(), 2.0);
        assert!(Samples::default().median().is_nan());
    }
}
