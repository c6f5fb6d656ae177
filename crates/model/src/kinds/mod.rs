//! The resource kinds, one module per family.

mod compute;
mod event;
mod identity;
mod image;
mod join_token;
mod migration;
mod network;
mod node;
mod storage;

pub use compute::*;
pub use event::*;
pub use identity::*;
pub use image::*;
pub use join_token::*;
pub use migration::*;
pub use network::*;
pub use node::*;
pub use storage::*;
