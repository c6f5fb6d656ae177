//! Virtual machines: the driver of the isolation `vm`, on qemu.
//!
//! A machine is one emulator process and one shim process (the same binary executed again), both of which outlive the caller.
//! The driver talks to the shim for the machine's life and console, to the emulator's monitor for everything else.
//!
//! Invariant: the emulator never runs with the rights of root, never opens a path that a guest could influence, and never
//! runs without a shim that watches it. Whoever kills the driver at any moment loses nothing that was acknowledged.
//!
//! Start reading at [`qemu::QemuDriver`], then [`qemu::shim_main`].

pub mod qemu;

pub use qemu::{QemuConfig, QemuDriver, shim_main};
