//! qemu-system-x86_64 as the hypervisor.
//!
//! | module | about |
//! |---|---|
//! | `driver` | the calls of [`oblak_compute::ComputeDriver`] and where each is carried out |
//! | `shim` | the process beside each emulator |
//! | `record` | what lies on disk, and what follows from it after a crash |
//! | `cmdline` | the machine as the guest sees it |
//! | `sandbox` | how the emulator is confined |
//! | `qmp`, `jobs` | the monitor |
//! | `hotplug`, `snapshot`, `resize`, `exec`, `screen`, `migrate` | the optional abilities |
//! | `probe` | KVM that works, or TCG |

mod agent;
mod cmdline;
mod config;
mod disk;
mod driver;
mod exec;
mod hotplug;
mod jobs;
mod migrate;
mod probe;
pub mod qmp;
mod record;
mod resize;
mod sandbox;
mod screen;
mod session;
mod shim;
mod snapshot;
mod sock;
mod start;
mod tap;

pub use config::{QemuConfig, UID_BASE, UID_COUNT};
pub use driver::QemuDriver;
pub use shim::shim_main;
