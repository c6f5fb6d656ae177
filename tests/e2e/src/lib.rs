//! Support for the end-to-end tests: a whole cloud per test, made of the real binary, real guests and real networks.
//!
//! Invariant: a test leaves nothing behind, also when it panics or is killed: whatever it made lies below a data directory of its
//! own or carries a name made from it, and is removed by [`Cloud`]'s drop or by the next test that starts.
//!
//! Tests need root, Linux and what `OBLAK_TEST_BINARY` (the program), `OBLAK_TEST_IMAGES` (built images) and `OBLAK_RECIPES`
//! (the recipes) name; without them they print `skipped: reason`. `cargo xtask test e2e` sets everything up.
//!
//! Start reading at [`Cloud`], then `machine` (what is left on the machine), then any test.

mod cli;
mod cloud;
mod env;
mod guests;
mod http;
mod machine;
mod pty;
pub mod two;
mod wait;

pub use cli::{Ran, Running};
pub use cloud::{Cloud, Settings};
pub use env::Env;
pub use guests::{Draft, ShimFile};
pub use http::{get, listener};
pub use machine::{Machine, revive};
pub use pty::Terminal;
pub use wait::{eventually, holds_for, until};
