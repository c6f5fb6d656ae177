//! The agent: makes one node be what the control plane asks for, and tells it what is.
//!
//! It watches the objects that concern its node, runs one owner task per instance ([`owner`]), one manager each for networks, volumes and
//! images, serves streams through one tunnel per API server, and reports status. What it needs to recover lies on disk beside each
//! instance; stopping or killing the agent changes nothing for a running guest.
//!
//! Invariant: never touches the store; knows drivers only by their traits; decides by pure functions ([`decide`], [`assemble`]).
//!
//! Start reading at [`Agent`], then [`decide::decide`] (with the state diagram of an instance).

pub mod assemble;
mod backoff;
mod config;
mod context;
mod copies;
pub mod decide;
pub mod facts;
pub mod fake;
mod halt;
mod images;
mod lease;
mod link;
mod migrate;
mod networks;
mod owner;
mod perform;
mod record;
mod reporter;
mod rotate;
mod run;
mod servers;
mod services;
mod snapshots;
mod tunnel;
mod tunnels;
mod usage;
mod volumes;
mod world;

pub use config::{AgentConfig, UnderlayChoice};
pub use halt::stop_guests;
pub use record::Record;
pub use rotate::{KeyStore, Renewal};
pub use run::Agent;
pub use servers::known_servers;
pub use services::{
    Drivers, ImageFailure, ImageProgress, ImageService, LocalImage, LocalPayload, OciDefaults, PeerListener, PeerNet,
    SeedWriter, SharedPool,
};
