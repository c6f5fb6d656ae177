//! What lies on disk next to each instance, enough to find and judge the guest without anybody's memory.
//!
//! The driver writes `vm.json` ([`Record`]: what the run is to be) before it starts the shim; the shim writes which
//! processes the run is and how it ended ([`oblak_compute::shim`]). Each file names its run, so one that is left from an older
//! run is never taken for the present one.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use oblak_compute::shim::{ExitRecord, ShimRecord, Standing, standing};
use oblak_compute::{GuestSpec, GuestState, Observation};
use oblak_model::{InstanceId, SnapshotId, VolumeId};
use oblak_platform::driver::{DriverError, DriverResult};
use oblak_platform::fsx;
use serde::{Deserialize, Serialize};

/// Version of `vm.json`. Higher ones are refused rather than misread.
pub const SCHEMA: u32 = 1;

/// How instructions of the guest are executed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Accel {
    /// By the processor, through /dev/kvm.
    Kvm,
    /// By translation.
    Tcg,
}

impl Accel {
    /// Its name for qemu and for people.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Tcg => "tcg",
        }
    }
}

/// What a run is to be.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// [`SCHEMA`].
    pub schema: u32,
    /// As given to `ensure`; vCPUs and memory follow a resize in place.
    pub spec: GuestSpec,
    /// Unprivileged user and group of the emulator.
    pub uid: u32,
    /// Emulator.
    pub qemu: PathBuf,
    /// Accelerator.
    pub accel: Accel,
    /// Versioned machine type, `pc-q35-7.2`: an alias could mean another machine after an upgrade.
    pub machine: String,
    /// Most vCPUs that can be plugged in while it runs.
    pub max_vcpus: u32,
    /// UEFI code when the machine boots through UEFI; the variables are `vars.fd` in the instance's directory.
    #[serde(default)]
    pub firmware: Option<PathBuf>,
    /// Its cgroup, in every tree.
    pub cgroup: String,
    /// Number of ports for disks that come and go.
    pub ports: u8,
    /// Port of each volume at the start.
    #[serde(default)]
    pub slots: BTreeMap<VolumeId, u8>,
    /// Snapshot whose memory is loaded instead of booting.
    #[serde(default)]
    pub load: Option<SnapshotId>,
    /// It waits for the memory of a machine on another node and is not let run before it is told to.
    #[serde(default)]
    pub incoming: bool,
    /// vCPUs or memory were changed while it ran, so the command line is not the whole truth about the machine.
    #[serde(default)]
    pub resized: bool,
}

impl Record {
    /// vCPUs at the start.
    #[must_use]
    pub fn vcpus(&self) -> u32 {
        vcpus(self.spec.vcpus_milli)
    }
}

/// Whole vCPUs for a share in thousandths, at least one.
#[must_use]
pub fn vcpus(milli: u32) -> u32 {
    milli.div_ceil(1000).max(1)
}

/// Paths below the directory of one instance.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GuestDir(pub PathBuf);

impl GuestDir {
    /// The directory itself.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.0
    }
    /// [`Record`].
    #[must_use]
    pub fn record(&self) -> PathBuf {
        self.0.join("vm.json")
    }
    /// Serial output, a directory of parts.
    #[must_use]
    pub fn console_log(&self) -> PathBuf {
        self.0.join(oblak_compute::shim::file::LOG)
    }
    /// The emulator's own words, a directory of parts.
    #[must_use]
    pub fn qemu_log(&self) -> PathBuf {
        self.0.join("qemu-log")
    }
    /// Monitor of the driver.
    #[must_use]
    pub fn qmp_socket(&self) -> PathBuf {
        self.0.join("qmp.sock")
    }
    /// Guest agent.
    #[must_use]
    pub fn agent_socket(&self) -> PathBuf {
        self.0.join("agent.sock")
    }
    /// Disks that are filled from another node.
    #[must_use]
    pub fn nbd_socket(&self) -> PathBuf {
        self.0.join("nbd.sock")
    }
    /// UEFI variables of this instance.
    #[must_use]
    pub fn vars(&self) -> PathBuf {
        self.0.join("vars.fd")
    }
    /// What was written down about each snapshot.
    #[must_use]
    pub fn snapshots(&self) -> PathBuf {
        self.0.join("vm-snapshots")
    }

    /// Reads the record; `None` when there is none.
    ///
    /// # Errors
    /// `record_damaged` when it cannot be understood, `record_newer`.
    pub fn read(&self) -> DriverResult<Option<Record>> {
        let record: Option<Record> = fsx::read_json(&self.record()).map_err(|e| damaged(&self.record(), &e))?;
        match record {
            Some(r) if r.schema > SCHEMA => Err(DriverError::permanent(
                "record_newer",
                format!(
                    "{} was written by a newer oblak (schema {}); upgrade this one",
                    self.record().display(),
                    r.schema
                ),
            )),
            other => Ok(other),
        }
    }

    /// Writes the record durably.
    ///
    /// # Errors
    /// Any I/O error.
    pub fn write(&self, record: &Record) -> DriverResult<()> {
        fsx::write_json(&self.record(), record)
            .map_err(|e| DriverError::io(&format!("cannot write {}", self.record().display()), &e))
    }

    /// What the shim left and whether it lives.
    ///
    /// # Errors
    /// `record_damaged` when a file cannot be understood.
    pub fn standing(&self) -> DriverResult<Standing> {
        standing(&self.0).map_err(|e| damaged(&self.0, &e))
    }
}

fn damaged(path: &Path, error: &std::io::Error) -> DriverError {
    if error.kind() == std::io::ErrorKind::InvalidData {
        return DriverError::permanent(
            "record_damaged",
            format!("{error}; delete the instance or restore the file from a backup"),
        );
    }
    DriverError::io(&format!("cannot read {}", path.display()), error)
}

/// What the files alone say of a guest.
#[derive(Clone, Debug, PartialEq)]
pub enum OnDisk {
    /// No record.
    Nothing,
    /// A record whose run was never begun, or whose start failed before the emulator was executed; with the end of the run
    /// before it.
    NotStarted(Box<Record>, Option<Box<ExitRecord>>),
    /// The shim of the run lives.
    Alive(Box<Record>, Box<ShimRecord>),
    /// The run is over and somebody wrote down how.
    Ended(Box<Record>, Box<ExitRecord>),
    /// The run is over, but its shim could not write it down. Its emulator may be dying still.
    Lost(Box<Record>, Box<ShimRecord>),
}

impl OnDisk {
    /// Reads the files and looks whether the processes they name exist.
    ///
    /// # Errors
    /// `record_damaged`.
    pub fn read(dir: &GuestDir) -> DriverResult<Self> {
        let Some(record) = dir.read()?.map(Box::new) else { return Ok(Self::Nothing) };
        let run = record.spec.run;
        Ok(match dir.standing()? {
            Standing::Alive(shim) => Self::Alive(record, Box::new(shim)),
            Standing::Lost(shim) | Standing::Rebooted(shim) => Self::Lost(record, Box::new(shim)),
            Standing::Ended(exit) if exit.run >= run => Self::Ended(record, Box::new(exit)),
            Standing::Ended(exit) => Self::NotStarted(record, Some(Box::new(exit))),
            Standing::Never => Self::NotStarted(record, None),
        })
    }
}

/// How a run ended whose shim could not write it down.
#[must_use]
pub fn lost_exit(shim: &ShimRecord, now: oblak_model::Timestamp) -> ExitRecord {
    let rebooted = shim.shim.boot_id != oblak_platform::process::boot_id();
    let (reason, message) = if rebooted {
        ("HostRebooted", "the node was restarted while the machine ran")
    } else {
        ("ShimLost", "the process that watched over the machine was killed, and the machine with it")
    };
    ExitRecord {
        run: shim.run,
        code: Some(137),
        reason: reason.into(),
        message: message.into(),
        asked: rebooted || shim.stopping,
        started_at: Some(shim.started_at),
        at: now,
        runtime: shim.runtime.clone(),
    }
}

/// An observation of a run that is over.
#[must_use]
pub fn ended(exit: &ExitRecord) -> Observation {
    Observation {
        state: if exit.is_failure() { GuestState::Failed } else { GuestState::Stopped },
        run: exit.run,
        exit_code: exit.code,
        message: exit.message.clone(),
        reason: exit.reason.clone(),
        started_at: exit.started_at,
        ended_at: Some(exit.at),
        runtime: exit.runtime.clone(),
        ..Observation::absent()
    }
}

/// Instances with a record below `instances`, in order of their ids. Directories that are not named by an id are not ours.
///
/// # Errors
/// Any I/O error except that the directory does not exist.
pub fn list(instances: &Path) -> DriverResult<Vec<InstanceId>> {
    let entries = match std::fs::read_dir(instances) {
        Ok(entries) => entries,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(DriverError::io(&format!("cannot list {}", instances.display()), &e)),
    };
    let mut ids: Vec<InstanceId> = entries
        .filter_map(Result::ok)
        .filter(|entry| GuestDir(entry.path()).record().exists())
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .collect();
    ids.sort();
    Ok(ids)
}

/// Picks the uid for an instance: the one it had, else one that no other instance here has.
///
/// # Errors
/// `uids_exhausted` when all are taken.
pub fn pick_uid(instances: &Path, id: InstanceId, range: (u32, u32)) -> DriverResult<u32> {
    let mut taken = std::collections::BTreeSet::new();
    for other in list(instances)? {
        // A damaged record of another instance must not keep this one from starting.
        if let Ok(Some(record)) = GuestDir(instances.join(other.to_string())).read() {
            if other == id {
                return Ok(record.uid);
            }
            taken.insert(record.uid);
        }
    }
    let (base, count) = range;
    // The tail of the id spreads instances over the range, so a uid is rarely reused soon after its owner is gone.
    let tail = uuid_tail(id);
    (0..count).map(|step| base + (tail.wrapping_add(step)) % count.max(1)).find(|uid| !taken.contains(uid)).ok_or_else(
        || {
            DriverError::permanent(
                "uids_exhausted",
                format!("all {count} user ids from {base} on are taken by machines"),
            )
        },
    )
}

fn uuid_tail(id: InstanceId) -> u32 {
    let bytes = id.0.as_bytes();
    u32::from_be_bytes([bytes[12], bytes[13], bytes[14], bytes[15]])
}

#[cfg(test)]
pub(crate) mod tests;
