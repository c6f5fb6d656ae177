//! A typed client of the native API, used by the command line, the agent and tests.
//!
//! Invariant: trusts only the certificate authority it was given; every call has a deadline; nothing is printed.
//!
//! Start reading at [`Client`].

mod config;
mod edge;
mod introduce;
mod node;
mod objects;
mod servers;
#[doc(hidden)]
pub mod sse;
mod streams;
mod transport;
mod watch;

pub use config::{Auth, ClientConfig};
pub use edge::Transport;
pub use introduce::{Introduction, introduce};
pub use node::{NodeWatch, Tunnel};
pub use objects::{ListOptions, collection_path, object_path};
pub use streams::{ByteStream, ExecOptions, FrameSink, FrameSource, FrameStream, RawBytes};
pub use transport::{Body, Client, ClientError, TextStream};
pub use watch::{Watch, WatchEvent};

/// Result of client calls.
pub type Result<T, E = ClientError> = std::result::Result<T, E>;
