//! Fuzzing of every parser that meets bytes from outside, on stable Rust.
//!
//! There is no instrumentation: a [`Target`](targets::Target) tells what came of an input (a few bytes, its *outcome*), and inputs with an outcome
//! that was not seen before are kept and changed further. That finds its way through checks in layers nearly as well as coverage does where
//! errors have names, and needs no special compiler.
//!
//! Invariant: a run is made from its seed alone, so that whatever it finds can be found again; every input that was found bad lies in
//! `fuzz/seeds/<target>/` afterwards and is tried first for ever.
//!
//! Start reading at [`run::run`], then [`targets`].

pub mod mutate;
pub mod run;
pub mod targets;
