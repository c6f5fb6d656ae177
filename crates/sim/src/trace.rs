//! What happened, in order, and what was wrong with it.

use std::collections::VecDeque;
use std::fmt::Write as _;
use std::io::Write as _;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::time::Instant;

/// Lines kept for the report of a failure.
const LAST: usize = 60;

/// Shared by everything in a simulation.
#[derive(Clone)]
pub struct Trace {
    begun: Instant,
    inner: Arc<Mutex<Inner>>,
}

struct Inner {
    last: VecDeque<String>,
    lines: u64,
    digest: u64,
    violation: Option<String>,
    out: Option<Box<dyn std::io::Write + Send>>,
}

impl Trace {
    /// An empty trace that begins now; every line is also written to `out`.
    #[must_use]
    pub fn new(begun: Instant, out: Option<Box<dyn std::io::Write + Send>>) -> Self {
        let inner = Inner { last: VecDeque::new(), lines: 0, digest: 0xcbf2_9ce4_8422_2325, violation: None, out };
        Self { begun, inner: Arc::new(Mutex::new(inner)) }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes a line down: who, and what happened.
    pub fn note(&self, who: &str, what: impl std::fmt::Display) {
        let mut line = String::new();
        let _ = write!(line, "{:>12.6} {who:<8} {what}", self.begun.elapsed().as_secs_f64());
        let mut inner = self.lock();
        for byte in line.bytes().chain([b'\n']) {
            inner.digest = (inner.digest ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3);
        }
        inner.lines += 1;
        if let Some(out) = &mut inner.out {
            let _ = writeln!(out, "{line}");
        }
        if inner.last.len() == LAST {
            inner.last.pop_front();
        }
        inner.last.push_back(line);
    }

    /// An invariant does not hold. The first one counts: what comes after may follow from it.
    pub fn violation(&self, what: impl std::fmt::Display) {
        let text = what.to_string();
        self.note("CHECK", format_args!("VIOLATION {text}"));
        self.lock().violation.get_or_insert(text);
    }

    /// The first violation.
    #[must_use]
    pub fn violated(&self) -> Option<String> {
        self.lock().violation.clone()
    }

    /// Number of lines, and a digest over all of them (FNV-1a, 64 bits).
    #[must_use]
    pub fn digest(&self) -> (u64, u64) {
        let inner = self.lock();
        (inner.lines, inner.digest)
    }

    /// The last lines.
    #[must_use]
    pub fn last(&self) -> Vec<String> {
        self.lock().last.iter().cloned().collect()
    }

    /// Writes out what is buffered.
    pub fn flush(&self) {
        if let Some(out) = &mut self.lock().out {
            let _ = out.flush();
        }
    }
}
