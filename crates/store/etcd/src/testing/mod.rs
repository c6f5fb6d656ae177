//! Real servers of etcd for tests: one on loopback, or a cluster whose members each have a network of their own.
//!
//! Invariant: whatever a test starts ends with it, also when the test is killed: servers die with the thread that started them, and
//! networks with the processes that hold them.
#![allow(clippy::unwrap_used, reason = "these are tests, compiled as a library so that other crates can run them")]
#![allow(clippy::print_stderr, reason = "a skipped test says why")]

mod network;
mod server;

use std::process::{Command, Stdio};

pub use self::network::Members;
pub use self::server::{Server, Settings};

/// Whether the programs that the tests need are there; prints `skipped: reason` when not.
pub fn available(programs: &[&str]) -> bool {
    let missing: Vec<_> = programs.iter().filter(|program| !exists(program)).collect();
    if !missing.is_empty() {
        eprintln!("skipped: {missing:?} not installed");
    }
    missing.is_empty()
}

fn exists(program: &str) -> bool {
    let paths = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&paths).any(|dir| dir.join(program).is_file())
}

/// Runs a command that must succeed.
fn run(line: &str) {
    let mut words = line.split(' ');
    let output = Command::new(words.next().unwrap()).args(words).stdin(Stdio::null()).output().unwrap();
    assert!(output.status.success(), "{line}: {}", String::from_utf8_lossy(&output.stderr));
}
