//! The seams between Oblak and the machine: clock, randomness, process identity, durable files, stream frames, logging.
//!
//! Invariant: knows nothing of resources beyond plain types of `oblak-model`; talks to no network.
//!
//! Start reading at [`clock::Clock`] and [`process::Identity`].

pub mod clock;
pub mod copy;
pub mod driver;
pub mod frame;
pub mod fsx;
pub mod layout;
pub mod process;
pub mod random;
pub mod task;
pub mod telemetry;
