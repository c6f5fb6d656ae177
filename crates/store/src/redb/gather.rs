//! How long the writer waits for company before it starts a batch.
//!
//! Callers that were just answered tend to ask again at once, and those that came while the disk was busy wait already: together they are
//! what the next batch may hope for. Half a batch now and the other half after it cost two fsyncs, a short wait costs a part of one. When
//! it brings too few the writer waits less the next time. A caller that is alone never waits.

use std::time::{Duration, Instant};

use super::queue::{Queue, Waited};

/// The wait after many disappointments: still enough to notice that callers have begun to ask together. Below it the system's timers
/// are not exact.
const SHORTEST: Duration = Duration::from_micros(50);
/// The wait is never longer than this, however slow the disk is.
const LONGEST: Duration = Duration::from_millis(2);
/// Weight of the newest batch in the average time of a batch: one part of this many.
const SMOOTHING: u32 = 8;

/// What the last batches taught.
pub struct Gather {
    hope: usize,
    patience: Duration,
    batch: Duration,
}

impl Default for Gather {
    fn default() -> Self {
        Self { hope: 0, patience: SHORTEST, batch: Duration::ZERO }
    }
}

impl Gather {
    /// Waits, with one job in the queue, for as many as can be hoped for.
    pub fn wait<T>(&mut self, queue: &Queue<T>) {
        if self.hope < 2 {
            return;
        }
        let before = queue.len();
        let waited = queue.wait(self.hope, Some(Instant::now() + self.patience));
        let times = |time: Duration, jobs: usize| time.saturating_mul(u32::try_from(jobs).unwrap_or(u32::MAX));
        // It paid when callers came at least as fast as they are served without waiting.
        let gained = queue.len().saturating_sub(before);
        let paid = waited == Waited::Enough || times(self.batch, gained) >= times(self.patience, before);
        let patience = if paid { self.patience * 2 } else { self.patience / 2 };
        // Waiting longer than half of what one more batch takes cannot pay.
        self.patience = patience.min((self.batch / 2).min(LONGEST)).max(SHORTEST);
    }

    /// A batch took so long, unless it wrote nothing; `answered` callers are about to hear of it and `waiting` ones came meanwhile.
    pub fn learn(&mut self, took: Option<Duration>, answered: usize, waiting: usize, most: usize) {
        if let Some(took) = took {
            let old = self.batch;
            self.batch = if old.is_zero() { took } else { old - old / SMOOTHING + took / SMOOTHING };
        }
        self.hope = (answered + waiting).min(most);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_is_alone_never_waits() {
        let (queue, mut gather) = (Queue::default(), Gather::default());
        queue.push(1).unwrap();
        gather.learn(Some(Duration::from_secs(3600)), 1, 0, 512);
        gather.patience = Duration::from_secs(3600);
        gather.wait(&queue);
    }

    #[test]
    fn patience_follows_what_it_brings() {
        let (queue, mut gather) = (Queue::default(), Gather::default());
        queue.push(1).unwrap();
        queue.push(2).unwrap();
        for _ in 0..20 {
            gather.learn(Some(Duration::from_micros(800)), 1, 1, 512);
            gather.wait(&queue);
        }
        assert!(
            gather.patience.abs_diff(Duration::from_micros(400)) < Duration::from_micros(1),
            "half a batch, when it pays"
        );
        for _ in 0..20 {
            gather.learn(Some(Duration::from_micros(800)), 2, 1, 512);
            gather.wait(&queue);
        }
        assert_eq!(gather.patience, SHORTEST, "when nobody comes");
        gather.learn(Some(Duration::from_secs(60)), 1000, 1000, 512);
        assert_eq!(gather.hope, 512);
    }
}
