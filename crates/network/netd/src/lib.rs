//! `netd`, one small process per node that gives the guests of every network their address (DHCP), names (DNS) and
//! instance data (metadata at 169.254.169.254). It outlives the agent.
//!
//! The network driver writes `<dir>/<network id>/netd.json` ([`config::NetConfig`]); netd makes what it serves equal to those
//! files and writes what it serves into `<dir>/netd.status.json` ([`config::Status`]). Nothing else is remembered, so it may
//! be killed at any moment. All sockets that guests can reach are made inside the namespace of their network and bound to its
//! bridge; sockets that ask DNS servers outside live in the namespace netd itself runs in.
//!
//! Invariant: changes nothing on the node but its status file; answers nobody outside of the networks it was given.
//!
//! Start reading at [`supervisor`], then [`view`] (what is known of a network) and the pure answers: [`dhcp`], [`dns`], [`metadata`].

use std::path::Path;
use std::process::ExitCode;

pub mod config;
pub mod dhcp;
pub mod dns;
mod limit;
pub mod metadata;
mod netns;
pub mod privileges;
pub mod seed;
mod service;
pub mod supervisor;
pub mod view;

/// Most memory arenas of the C library: one, because netd is single-threaded and shall stay small.
const ARENAS: libc::c_int = 1;

/// Serves the networks below `dir` until killed. Only one netd serves a directory: a second one returns at once with success.
#[must_use]
pub fn main(dir: &Path) -> ExitCode {
    // SAFETY: mallopt takes two integers; it is called before any other thread exists.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, ARENAS) };
    // Not fatal: where a container's rules forbid it, guests still need their addresses.
    if let Err(error) = privileges::drop_all_but_needed() {
        tracing::warn!(%error, "keeping all capabilities");
    }
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            tracing::error!(%error, "cannot start the runtime");
            return ExitCode::FAILURE;
        }
    };
    match runtime.block_on(supervisor::run(dir)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!(%error, dir = %dir.display(), "netd ends");
            ExitCode::FAILURE
        }
    }
}
