//! How far an import is, and how it is given up.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::error::{ImageError, Result};

/// Step of an import.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Nothing has begun, or another import of the same content is being waited for.
    #[default]
    Waiting,
    /// Asking what there is.
    Resolving,
    /// Bytes are coming in.
    Downloading,
    /// A recipe runs.
    Building,
    /// The content is examined.
    Checking,
    /// Changed into a format that guests use.
    Converting,
    /// Layers are unpacked.
    Unpacking,
    /// The image can be used.
    Done,
}

/// How far an import is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    /// Step.
    pub phase: Phase,
    /// Bytes of this step.
    pub done_bytes: u64,
    /// Bytes that this step will have, when known.
    pub total_bytes: Option<u64>,
    /// Of the whole import, 0 to 100; never goes back.
    pub percent: u8,
    /// What is being done, for people.
    pub message: String,
}

/// Watchers are woken at most this often by bytes.
const INTERVAL: Duration = Duration::from_millis(200);

/// Shared by all tasks of one import.
pub(crate) struct Reporter {
    sender: watch::Sender<Progress>,
    cancel: CancellationToken,
    done: AtomicU64,
    last: Mutex<Instant>,
    /// What was being done when trouble took the place of the message.
    step: Mutex<Option<String>>,
}

impl Reporter {
    pub fn new(sender: watch::Sender<Progress>, cancel: CancellationToken) -> Self {
        Self { sender, cancel, done: AtomicU64::new(0), last: Mutex::new(Instant::now()), step: Mutex::default() }
    }

    /// An import that nobody watches.
    pub fn silent(cancel: CancellationToken) -> Self {
        Self::new(watch::Sender::new(Progress::default()), cancel)
    }

    pub fn cancel(&self) -> &CancellationToken {
        &self.cancel
    }

    /// Err once the caller gave up.
    pub fn check(&self) -> Result<()> {
        if self.cancel.is_cancelled() { Err(ImageError::cancelled()) } else { Ok(()) }
    }

    pub fn phase(&self, phase: Phase, total: Option<u64>, message: impl Into<String>) {
        self.done.store(0, Ordering::Relaxed);
        *self.step.lock().unwrap_or_else(PoisonError::into_inner) = None;
        self.sender.send_modify(|p| {
            let percent = percent(phase, 0, total).max(p.percent);
            *p = Progress { phase, done_bytes: 0, total_bytes: total, percent, message: message.into() };
        });
    }

    /// Bytes of this step that need no transfer count too.
    pub fn add(&self, bytes: u64) {
        let done = self.done.fetch_add(bytes, Ordering::Relaxed) + bytes;
        {
            let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
            if last.elapsed() < INTERVAL {
                return;
            }
            *last = Instant::now();
        }
        self.sender.send_modify(|p| {
            p.done_bytes = done;
            p.percent = percent(p.phase, done, p.total_bytes).max(p.percent);
        });
    }

    /// Something went wrong and is tried again: the message says so until [`Reporter::going_on`] or the next step.
    pub fn trouble(&self, error: &ImageError) {
        let mut step = self.step.lock().unwrap_or_else(PoisonError::into_inner);
        self.sender.send_modify(|p| {
            let step = step.get_or_insert_with(|| p.message.clone());
            let colon = if step.is_empty() { "" } else { ": " };
            p.message = format!("{step}{colon}{}; trying again", error.detail);
        });
    }

    /// The trouble is over.
    pub fn going_on(&self) {
        if let Some(step) = self.step.lock().unwrap_or_else(PoisonError::into_inner).take() {
            self.sender.send_modify(|p| p.message = step);
        }
    }

    /// What a recipe says about itself.
    pub fn recipe(&self, percent_of_recipe: u8, text: &str) {
        self.sender.send_modify(|p| {
            p.message = text.to_owned();
            p.percent = (u32::from(percent_of_recipe.min(100)) * 85 / 100).min(85) as u8;
        });
    }
}

/// Steps have fixed shares of the whole: fetching 0-85, checking 85-90, converting or unpacking 90-99.
fn percent(phase: Phase, done: u64, total: Option<u64>) -> u8 {
    let share = |from: u64, to: u64| match total {
        Some(total) if total > 0 => from + (to - from) * done.min(total) / total,
        _ => from,
    };
    let value = match phase {
        Phase::Waiting | Phase::Resolving => 0,
        Phase::Downloading | Phase::Building => share(1, 85),
        Phase::Checking => share(85, 90),
        Phase::Converting | Phase::Unpacking => share(90, 99),
        Phase::Done => 100,
    };
    u8::try_from(value).unwrap_or(100)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn trouble_is_said_until_it_is_over() {
        let (sender, receiver) = watch::channel(Progress::default());
        let reporter = Reporter::new(sender, CancellationToken::new());
        reporter.phase(Phase::Downloading, None, "downloading a.img");
        for host in ["a", "b"] {
            reporter.trouble(&ImageError::new(crate::error::Code::Network, format!("{host} does not answer")));
        }
        assert_eq!(receiver.borrow().message, "downloading a.img: b does not answer; trying again");
        reporter.going_on();
        assert_eq!(receiver.borrow().message, "downloading a.img");
    }

    #[test]
    fn percent_never_goes_back_and_ends_at_100() {
        let (sender, receiver) = watch::channel(Progress::default());
        let reporter = Reporter::new(sender, CancellationToken::new());
        reporter.phase(Phase::Downloading, Some(1000), "a");
        *reporter.last.lock().unwrap() = Instant::now() - INTERVAL;
        reporter.add(500);
        assert_eq!(receiver.borrow().percent, 43);
        reporter.phase(Phase::Resolving, None, "b");
        assert_eq!(receiver.borrow().percent, 43);
        reporter.phase(Phase::Done, None, "");
        assert_eq!(receiver.borrow().percent, 100);
    }
}
