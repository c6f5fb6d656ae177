//! Who is asking and what they may do: passwords, tokens, certificates, and the one function that decides.
//!
//! Invariant: every request that is let in went through [`authorize`]; nothing here ever keeps, prints or logs a secret in clear, and nothing
//! here reads or writes the store: callers bring the records.
//!
//! Start reading at [`policy`], then [`principal::Principal`].

pub mod join;
pub mod members;
pub mod password;
pub mod pki;
pub mod policy;
pub mod principal;
pub mod tokens;

pub use password::{PasswordError, Passwords};
pub use policy::{Action, Target, authorize};
pub use principal::{Principal, UserPrincipal};
