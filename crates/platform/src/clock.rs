//! Time as our own code sees it, so that a simulation can replace it.

use std::sync::Arc;
use std::time::Duration;

use oblak_model::Timestamp;

/// A source of time. Wall time is for people; boot time is for deadlines.
pub trait Clock: Send + Sync + 'static {
    /// Wall time. May jump.
    fn now(&self) -> Timestamp;
    /// Time since boot, suspend included (`CLOCK_BOOTTIME`, clock_gettime(2)). Never jumps back.
    fn boottime(&self) -> Duration;
}

/// Shared handle to a clock.
pub type SharedClock = Arc<dyn Clock>;

/// The clock of this machine.
#[derive(Debug, Default, Clone, Copy)]
pub struct SystemClock;

impl Clock for SystemClock {
    fn now(&self) -> Timestamp {
        let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        Timestamp::from_micros(i64::try_from(since.as_micros()).unwrap_or(i64::MAX))
    }

    fn boottime(&self) -> Duration {
        let time =
            nix::time::clock_gettime(nix::time::ClockId::CLOCK_BOOTTIME).map_or((0, 0), |t| (t.tv_sec(), t.tv_nsec()));
        Duration::new(u64::try_from(time.0).unwrap_or(0), u32::try_from(time.1).unwrap_or(0))
    }
}

/// The system clock behind the trait.
#[must_use]
pub fn system() -> SharedClock {
    Arc::new(SystemClock)
}
