//! Images of a node: fetched or built, checked, stored by digest, and handed out as paths.
//!
//! [`ImageStore::import`] takes content from a file, a URL (resumable), a registry, an OCI layout or tar, or a recipe of this product;
//! [`ImageStore::put_stream`] takes an upload. Content is recognised by what it is, never by its name ([`disk`]), examined by a limited
//! process, and lies under `blobs/sha256/`. Layers of OCI images are unpacked once per diff id ([`unpack`]) into trees that serve as
//! overlayfs lower directories.
//!
//! Invariant: nothing outside of an image's own bytes is ever read or written on its behalf: no backing file, no descriptor that points
//! elsewhere, no path that leaves its tree. What is in `records/` is complete; everything incomplete is in `tmp/` and is resumed or
//! removed by the next [`ImageStore::open`].
//!
//! Start reading at [`ImageStore`] (`store.rs`), then `import.rs`.

mod archive;
mod blobs;
mod digest;
pub mod disk;
mod download;
mod error;
mod export;
#[doc(hidden)]
pub mod fuzzing;
mod http;
mod import;
mod locks;
mod oci;
mod progress;
mod recipe;
mod record;
mod reference;
mod registry;
mod store;
pub mod unpack;

pub use digest::Digest;
pub use error::{Code, ImageError, Result};
pub use export::Export;
pub use progress::{Phase, Progress};
pub use record::{DiskFormat, ImageRecord, LayerRef, OciConfig, Payload};
pub use registry::BasicAuth;
pub use store::{ImageStore, Limits, Options, Source};
