//! The servers of this cloud: how the store below them is, who joins and leaves, backups.
//!
//! What really happens to the store's members is behind [`Cluster`]: this crate knows no etcd.

mod backup;
mod join;
mod status;

use async_trait::async_trait;
use oblak_model::ApiError;
use oblak_model::members::{MemberAddress, StoreMember};

pub(crate) use self::backup::backup;
pub(crate) use self::join::{join, join_token, remove};
pub(crate) use self::status::{defragment, status};

/// What is seen of the members.
#[derive(Clone, Debug, Default)]
pub struct ClusterLook {
    /// All members.
    pub members: Vec<StoreMember>,
    /// Alarms, such as `nospace on n1`.
    pub alarms: Vec<String>,
    /// Above this size no writes are taken, in bytes.
    pub quota_bytes: u64,
}

/// A place in the cluster for one more server.
#[derive(Clone, Debug)]
pub struct Room {
    /// All members, the new one included.
    pub members: Vec<MemberAddress>,
    /// URLs of the members that answer clients.
    pub endpoints: Vec<String>,
    /// Below which text our keys lie.
    pub prefix: String,
    /// Largest size of the database in bytes.
    pub quota_bytes: u64,
}

/// The members of the store, which the servers of this cloud run themselves.
#[async_trait]
pub trait Cluster: Send + Sync {
    /// Looks at all members.
    async fn look(&self) -> Result<ClusterLook, ApiError>;

    /// Makes room for a server. The same again changes nothing.
    ///
    /// # Errors
    /// `name_taken`, `unavailable` when it must be tried again in a moment, and what the store says.
    async fn admit(&self, name: &str, peer_url: &str) -> Result<Room, ApiError>;

    /// Removes a server for good, by its name, or by its address when it has not come yet. Answers how many votes are left.
    ///
    /// # Errors
    /// `not_found`; `wrong_state` when the others could not go on without it.
    async fn remove(&self, name: &str, peer_url: Option<&str>) -> Result<usize, ApiError>;

    /// Gives unused space back to the file systems, one member after the other, and clears the alarm about space when that was enough.
    async fn defragment(&self) -> Result<(), ApiError>;
}
