//! Containers through any OCI runtime (crun, runc, youki), each behind a shim of our own.
//!
//! The driver ([`OciDriver`]) writes what is asked into `<instance>/container/task.json` and executes our own binary again
//! as a shim ([`shim_main`]). The shim makes a private mount namespace in which everything of the container is mounted
//! (layers, writable layer, volumes), so that the kernel cleans up when the last process is gone, whoever killed it. It
//! then calls the runtime, keeps the log and the exit code, and serves exec and console on its socket.
//!
//! Invariant: a run starts at most once. The shim writes durably that it takes a run on before the runtime is called, and
//! nobody calls the runtime for a run that was taken on. Nothing of a container lies outside of its directory, its cgroup
//! and the shim's mount namespace.
//!
//! Start reading at [`OciDriver`], then `shim/mod.rs`.

mod bundle;
mod driver;
mod probe;
mod seccomp;
mod security;
mod shim;
mod task;
mod user;

pub use driver::{Config, OciDriver};
pub use shim::shim_main;
pub use task::Layering;
