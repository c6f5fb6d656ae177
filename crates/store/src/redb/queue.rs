//! The queue in front of the writer.
//!
//! The writer says how many jobs it hopes for and sleeps; only the caller that brings the last of them wakes it. Being woken by each of 64
//! callers, or asking again and again, would take the time from those callers that the larger batch is to save.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Jobs on their way to one taker.
pub struct Queue<T> {
    state: Mutex<State<T>>,
    arrived: Condvar,
}

struct State<T> {
    jobs: VecDeque<T>,
    /// How many jobs the sleeping taker waits for; 0 while it is awake.
    wanted: usize,
    /// No job will follow, or nobody takes them.
    closed: bool,
}

/// Why [`Queue::wait`] returned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Waited {
    /// As many jobs as were wanted are there.
    Enough,
    /// Fewer are, and time is up.
    Late,
    /// Fewer are, and none will follow.
    Closed,
}

impl<T> Default for Queue<T> {
    fn default() -> Self {
        let state = State { jobs: VecDeque::new(), wanted: 0, closed: false };
        Self { state: Mutex::new(state), arrived: Condvar::new() }
    }
}

impl<T> Queue<T> {
    fn lock(&self) -> MutexGuard<'_, State<T>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a job; gives it back when the queue is closed.
    pub fn push(&self, job: T) -> Result<(), T> {
        let mut state = self.lock();
        if state.closed {
            return Err(job);
        }
        state.jobs.push_back(job);
        let wake = state.wanted > 0 && state.jobs.len() >= state.wanted;
        if wake {
            state.wanted = 0;
        }
        drop(state);
        if wake {
            self.arrived.notify_one();
        }
        Ok(())
    }

    /// Sleeps until `wanted` jobs are there, at most until `deadline`. For one taker.
    pub fn wait(&self, wanted: usize, deadline: Option<Instant>) -> Waited {
        let mut state = self.lock();
        let why = loop {
            if state.jobs.len() >= wanted {
                break Waited::Enough;
            }
            if state.closed {
                break Waited::Closed;
            }
            state.wanted = wanted;
            state = match deadline.map(|deadline| deadline.saturating_duration_since(Instant::now())) {
                None => self.arrived.wait(state).unwrap_or_else(PoisonError::into_inner),
                Some(Duration::ZERO) => break Waited::Late,
                Some(left) => self.arrived.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0,
            };
        };
        state.wanted = 0;
        why
    }

    /// Hands jobs to `take` in order until it says that it has enough.
    pub fn drain(&self, mut take: impl FnMut(T) -> bool) {
        let mut state = self.lock();
        while let Some(job) = state.jobs.pop_front() {
            if !take(job) {
                break;
            }
        }
    }

    /// Jobs that wait.
    pub fn len(&self) -> usize {
        self.lock().jobs.len()
    }

    /// Takes no more jobs. Those inside can still be drained.
    pub fn close(&self) {
        self.lock().closed = true;
        self.arrived.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    #[test]
    fn the_taker_sleeps_until_enough_jobs_are_there() {
        let queue = Arc::new(Queue::default());
        let far = Some(Instant::now() + Duration::from_secs(60));
        let feeder = std::thread::spawn({
            let queue = Arc::clone(&queue);
            move || (0..3).for_each(|n| queue.push(n).unwrap())
        });
        assert_eq!(queue.wait(3, far), Waited::Enough);
        feeder.join().unwrap();
        let mut taken = Vec::new();
        queue.drain(|n| {
            taken.push(n);
            taken.len() < 2
        });
        assert_eq!((taken, queue.len()), (vec![0, 1], 1));
    }

    #[test]
    fn time_and_closing_end_the_wait() {
        let queue = Arc::new(Queue::default());
        queue.push(1).unwrap();
        assert_eq!(queue.wait(2, Some(Instant::now() + Duration::from_millis(1))), Waited::Late);
        let closer = std::thread::spawn({
            let queue = Arc::clone(&queue);
            move || queue.close()
        });
        assert_eq!(queue.wait(2, None), Waited::Closed);
        closer.join().unwrap();
        assert_eq!(queue.wait(1, None), Waited::Enough, "what is inside is still taken");
        assert_eq!(queue.push(2), Err(2));
    }
}
