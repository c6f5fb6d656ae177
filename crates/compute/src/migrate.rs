//! Moving a running guest to another node: the optional ability [`Migrate`], spoken by the two drivers' callers over streams of their own.
//!
//! ```text
//!  source                                   destination
//!  offer ─────────────────────────────────► expect        the guest waits, its disks are empty
//!  send_disk(name) ═══════════════════════► accept(disk)  for each disk of the offer
//!  send_memory ═══════════════════════════► accept(memory)
//!  sending = Paused: the guest stands still
//!  finish_sending
//!  sending = Sent ────────────────────────► arrived = true     both hold the whole guest, none runs it
//!                 ... whoever decides, decides once ...
//!  stop_sending (it runs on)   or   remove  take_over (it runs)   or   remove
//! ```
//!
//! Invariant: between `Sent` and the decision neither driver lets the guest run by itself, whatever is killed.

use async_trait::async_trait;
use oblak_model::InstanceId;
use oblak_platform::driver::{BoxDuplex, DriverResult};
use serde::{Deserialize, Serialize};

use crate::{GuestSpec, Observation};

/// What a source offers; the destination must be able to make the same.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Offer {
    /// Name of the driver.
    pub driver: String,
    /// Number of the run that moves; it stays the same.
    pub run: u64,
    /// The machine in the driver's own words.
    pub machine: serde_json::Value,
    /// Disks whose content is sent, by name.
    pub disks: Vec<OfferedDisk>,
}

/// A disk of an offer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OfferedDisk {
    /// Name within the offer.
    pub name: String,
    /// Size in bytes as the guest sees it.
    pub bytes: u64,
}

/// Which stream.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Lane {
    /// A disk of the offer.
    Disk(String),
    /// Memory and devices.
    Memory,
}

/// Limits of a transfer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// How long the guest may stand still for the last of its memory, in milliseconds. Sending goes on until that is enough.
    pub downtime_ms: u64,
    /// Bytes per second; unlimited where zero.
    pub bandwidth: u64,
}

/// How far the source is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Stage {
    /// Nothing is being sent.
    Idle,
    /// Disks are being copied.
    Disks,
    /// Every disk is the same as its copy and is kept so; memory has not begun.
    DisksReady,
    /// Memory is being copied while the guest runs.
    Memory,
    /// The guest stands still for the switch; `finish_sending` goes on.
    Paused,
    /// Everything is sent; the guest stands still until `stop_sending` or `remove`.
    Sent,
    /// It broke off; the guest runs on.
    Failed,
}

/// How far the source is, with figures.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sending {
    /// Stage.
    pub stage: Stage,
    /// Bytes of disks and memory in all, as far as known.
    pub total: u64,
    /// Bytes left; grows when the guest writes faster than is sent.
    pub remaining: u64,
    /// How long the guest will stand still or has stood still, in milliseconds.
    pub downtime_ms: Option<u64>,
    /// Why it broke off.
    pub message: String,
}

impl Sending {
    /// At a stage, without figures.
    #[must_use]
    pub fn at(stage: Stage) -> Self {
        Self { stage, total: 0, remaining: 0, downtime_ms: None, message: String::new() }
    }
}

/// Moving a running guest. All calls may be repeated.
#[async_trait]
pub trait Migrate: Send + Sync {
    /// Source: what would be sent. Refuses, with the reason, what cannot move while it runs.
    async fn offer(&self, id: InstanceId) -> DriverResult<Offer>;
    /// Source: begins to copy a disk into `stream` and keeps the copy the same until the end. The other end is
    /// [`Self::accept`] of the same lane.
    async fn send_disk(&self, id: InstanceId, disk: &str, stream: BoxDuplex) -> DriverResult<()>;
    /// Source: begins to copy memory. Returns at once; [`Self::sending`] tells how far it is.
    async fn send_memory(&self, id: InstanceId, limits: Limits, stream: BoxDuplex) -> DriverResult<()>;
    /// Source: how far it is; `memory` says whether [`Self::send_memory`] was called for this transfer.
    async fn sending(&self, id: InstanceId, memory: bool) -> DriverResult<Sending>;
    /// Source, when [`Stage::Paused`]: completes the disks and sends the rest. Returns at [`Stage::Sent`].
    async fn finish_sending(&self, id: InstanceId) -> DriverResult<()>;
    /// Source: stops sending; the guest runs on, also when everything was sent. The caller knows that the destination will not
    /// let it run. Fine when nothing is sent.
    async fn stop_sending(&self, id: InstanceId) -> DriverResult<()>;

    /// Destination: makes a guest that waits. Refuses an offer that cannot be made here exactly so.
    async fn expect(&self, spec: &GuestSpec, offer: &Offer) -> DriverResult<()>;
    /// Destination: the stream into the waiting guest.
    async fn accept(&self, id: InstanceId, lane: &Lane) -> DriverResult<BoxDuplex>;
    /// Destination: whether the whole guest is here; its disks take nothing more from outside then.
    async fn arrived(&self, id: InstanceId) -> DriverResult<bool>;
    /// Destination: lets it run from here on, like any other guest. Fine when it runs already.
    async fn take_over(&self, id: InstanceId) -> DriverResult<Observation>;
}
