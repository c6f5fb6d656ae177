//! A visit at a running machine's monitor, and the locks that keep calls about one machine apart.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use oblak_compute::shim::ShimRecord;
use oblak_model::InstanceId;
use oblak_platform::driver::{DriverError, DriverResult};
use tokio::sync::OwnedMutexGuard;

use super::qmp::{Qmp, QmpError};
use super::record::{GuestDir, OnDisk, Record};

/// How long to wait for the monitor, which serves one client at a time.
const CONNECT_DEADLINE: Duration = Duration::from_secs(15);

/// Locks of one machine within this process. Between processes the files and the shim's lock decide.
#[derive(Debug, Default)]
pub struct Locks {
    /// Start, removal, snapshots: one at a time.
    pub life: Arc<tokio::sync::Mutex<()>>,
    /// One visit at the monitor at a time.
    pub monitor: Arc<tokio::sync::Mutex<()>>,
    /// One question to the guest agent at a time.
    pub agent: Arc<tokio::sync::Mutex<()>>,
}

/// The locks of all machines that were asked for since the driver was made.
#[derive(Debug, Default)]
pub struct LockBook(Mutex<HashMap<InstanceId, Arc<Locks>>>);

impl LockBook {
    /// The locks of one machine.
    pub fn of(&self, id: InstanceId) -> Arc<Locks> {
        Arc::clone(self.0.lock().unwrap_or_else(PoisonError::into_inner).entry(id).or_default())
    }
    /// Forgets the locks of machines that nobody works with and that are not in `keep`.
    pub fn prune(&self, keep: impl Fn(InstanceId) -> bool) {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .retain(|id, locks| Arc::strong_count(locks) > 1 || keep(*id));
    }
}

/// An open visit.
pub struct Session {
    /// The monitor.
    pub qmp: Qmp,
    /// What the machine is.
    pub record: Record,
    _visit: OwnedMutexGuard<()>,
}

impl Session {
    /// Opens the monitor of a running machine.
    ///
    /// # Errors
    /// `gone` when there is no such machine, `not_running`, `monitor` when it does not answer.
    pub async fn open(dir: &GuestDir, id: InstanceId, locks: &Locks) -> DriverResult<Self> {
        let (record, _) = running(dir, id)?;
        let visit = Arc::clone(&locks.monitor).lock_owned().await;
        let qmp = Qmp::connect(&dir.qmp_socket(), CONNECT_DEADLINE).await.map_err(|e| refused(id, "reach", &e))?;
        Ok(Self { qmp, record: *record, _visit: visit })
    }
}

/// The record of a machine that runs.
///
/// # Errors
/// `gone`, `not_running`.
pub fn running(dir: &GuestDir, id: InstanceId) -> DriverResult<(Box<Record>, Box<ShimRecord>)> {
    match OnDisk::read(dir)? {
        OnDisk::Alive(record, shim) => Ok((record, shim)),
        OnDisk::Nothing => Err(unknown(id)),
        _ => Err(DriverError::permanent("not_running", format!("the machine {id} does not run; start it first"))),
    }
}

/// There is no such machine.
#[must_use]
pub fn unknown(id: InstanceId) -> DriverError {
    DriverError::gone(format!("there is no machine {id} on this node"))
}

/// What a failed command means for the caller; `doing` completes "cannot ... machine <id>".
#[must_use]
pub fn refused(id: InstanceId, doing: &str, error: &QmpError) -> DriverError {
    let detail = format!("cannot {doing} machine {id}: {error}");
    match error {
        QmpError::Refused { desc, .. } if desc.contains("No space left") => DriverError::retry("disk_full", detail),
        QmpError::Refused { .. } => DriverError::permanent("refused", detail),
        _ => DriverError::retry("monitor", detail),
    }
}
