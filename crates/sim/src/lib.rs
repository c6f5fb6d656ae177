//! The simulator: a whole cloud in one thread, with the real api handlers, reconcilers and agents over fake drivers, under virtual time, while things go wrong.
//!
//! Everything follows from a seed: the same seed gives the same trace, byte for byte. That holds for one simulation per process whose
//! randomness of the operating system comes from the seed too ([`entropy`]), as in the program `oblak-sim`.
//!
//! Invariant: touches nothing outside of its temporary directory: no socket, no thread, no guest, and no clock but the virtual one.
//!
//! Start reading at [`run()`], then [`cloud::Cloud`]; [`check`] holds what must be true after every commit, [`chaos`] what goes wrong.
//! [`whatif`] is the part that the product uses: the same control plane over a copy of a live state.

pub mod chance;
pub mod chaos;
pub mod check;
pub mod cloud;
pub mod drivers;
pub mod entropy;
pub mod link;
pub mod mutation;
pub mod net;
pub mod node;
pub mod run;
pub mod server;
pub mod store;
pub mod trace;
pub mod whatif;
pub mod workload;

pub use mutation::Mutation;
pub use run::{Report, run};

/// What to simulate.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Everything follows from it.
    pub seed: u64,
    /// Machines.
    pub nodes: usize,
    /// Virtual hours of work and chaos.
    pub hours: f64,
    /// Longest pause of a client between two calls, in seconds.
    pub pause_s: f64,
    /// Whether things go wrong.
    pub chaos: bool,
    /// A defect to find.
    pub mutation: Option<Mutation>,
}

impl Default for Settings {
    fn default() -> Self {
        Self { seed: 1, nodes: 3, hours: 1.0, pause_s: 30.0, chaos: true, mutation: None }
    }
}

/// Why a simulation could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file.
    #[error("the simulation's directory: {0}")]
    Io(#[from] std::io::Error),
    /// A client.
    #[error(transparent)]
    Client(#[from] oblak_client::ClientError),
    /// The first objects.
    #[error("the cloud cannot be set up: {0}")]
    Setup(String),
}
