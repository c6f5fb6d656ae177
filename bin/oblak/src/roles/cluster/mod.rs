//! `oblak up --cluster`, `oblak join` as a server, `oblak cluster restore|migrate-store`: the servers that hold the state in an etcd of their
//! own.
//!
//! ```text
//!   file (who this member is) ──► member (certificate, etcd, store) ──► keep (votes, certificates, space)
//!                                    └──► gate (what the API may ask and do)
//! ```
//! Reading order: [`file`], [`member`], [`keep`].

pub mod enter;
pub mod file;
mod gate;
mod keep;
pub mod member;
pub mod migrate;
pub mod restore;

pub use file::MemberFile;
