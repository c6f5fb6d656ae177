//! Waiting for conditions.

use std::time::{Duration, Instant};

const PAUSE: Duration = Duration::from_millis(50);

/// Waits until `look` finds something.
///
/// # Panics
/// After `deadline`, naming `what`.
pub fn until<T>(what: &str, deadline: Duration, look: impl FnMut() -> Option<T>) -> T {
    eventually(deadline, look).unwrap_or_else(|| panic!("{what}: not within {} s", deadline.as_secs()))
}

/// Waits until `look` finds something; `None` after `deadline`.
pub fn eventually<T>(deadline: Duration, mut look: impl FnMut() -> Option<T>) -> Option<T> {
    let end = Instant::now() + deadline;
    loop {
        if let Some(found) = look() {
            return Some(found);
        }
        if Instant::now() >= end {
            return None;
        }
        std::thread::sleep(PAUSE);
    }
}

/// Whether something stays true for a while. For what must *not* happen, where there is nothing to wait for.
pub fn holds_for(span: Duration, mut look: impl FnMut() -> bool) -> bool {
    let end = Instant::now() + span;
    while Instant::now() < end {
        if !look() {
            return false;
        }
        std::thread::sleep(PAUSE);
    }
    true
}
