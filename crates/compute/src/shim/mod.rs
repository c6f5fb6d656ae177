//! The per-guest shim: what all shims share.
//!
//! A shim is one small process per guest, the same binary executed again. It outlives the agent, owns the guest's main
//! process, keeps its console log and its exit code, and answers on a socket. Everything a new agent must know about a
//! guest lies in its directory:
//!
//! | file | what |
//! |---|---|
//! | `shim.lock` | locked by the living shim; holds its identity |
//! | `shim.json` | [`ShimRecord`]: which run, which processes; written before the guest starts, so a run starts once |
//! | `exit.json` | [`ExitRecord`]: how the run ended |
//! | `shim.sock` | one JSON line asks, one JSON line answers, then frames (see [`server`]) |
//! | `fence.json` | [`FenceState`]: whether the guest depends on the node's lease, and stands still (see [`fence`]) |
//! | `log/` | console output in parts named by the offset of their first byte (see [`log`]) |
//!
//! A shim uses at most 4 MiB of private memory: one thread, small buffers, no thread pool. Do not call `tokio::fs` or
//! `spawn_blocking` in one.

pub mod ahead;
pub mod cgroup;
pub mod client;
pub mod fanout;
pub mod fence;
pub mod log;
pub mod record;
pub mod server;
pub mod spawn;

pub use ahead::Ahead;
pub use client::{call, call_as, open_stream};
pub use fanout::{Attachment, Fanout, Input, serve_console};
pub use fence::{Fence, FenceCall, FenceState, Fencer, Freezer, Lease};
pub use log::{LogReader, LogWriter};
pub use record::{ExitRecord, ShimLock, ShimRecord, Standing, end_shim, standing};
pub use server::{Answer, Call, Service, ShimListener, ShimStream};
pub use spawn::{Ready, detach, runtime, spawn_shim};

/// File names in a shim's directory.
pub mod file {
    /// Lock of the living shim.
    pub const LOCK: &str = "shim.lock";
    /// [`super::ShimRecord`].
    pub const RECORD: &str = "shim.json";
    /// [`super::ExitRecord`].
    pub const EXIT: &str = "exit.json";
    /// Socket of the shim.
    pub const SOCKET: &str = "shim.sock";
    /// Directory of the console log.
    pub const LOG: &str = "log";
    /// [`super::FenceState`].
    pub const FENCE: &str = "fence.json";
    /// What the shim itself wrote to its standard error.
    pub const ERRORS: &str = "shim.err";
}
