//! Compute: how a guest is started, watched and stopped, whatever isolates it.
//!
//! The trait [`ComputeDriver`] with its optional abilities, the plain types it speaks, the per-guest shim protocol, a
//! scriptable fake and the conformance suite that every driver passes.
//!
//! Invariant: no driver here knows of projects' policy, the store, the API or another driver; it is given plain handles
//! (paths, devices, numbers). A guest outlives the process that called the driver.
//!
//! Start reading at [`ComputeDriver`] and [`spec::GuestSpec`].

use std::time::Duration;

use async_trait::async_trait;
use oblak_model::{InstanceId, Size, SnapshotId, VolumeId};
use oblak_platform::driver::{Availability, BoxDuplex, BoxRead, DriverResult};
use serde::{Deserialize, Serialize};

pub mod conformance;
pub mod fake;
pub mod migrate;
pub mod shim;
pub mod spec;

pub use migrate::Migrate;
pub use spec::*;

/// What a compute driver can do on this node.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Capabilities {
    /// Isolations that can be used now.
    pub isolations: Vec<oblak_model::Isolation>,
    /// Isolations of this driver that cannot, each with the reason.
    pub unavailable: Vec<(oblak_model::Isolation, String)>,
    /// Accelerator that will be used for machines: `kvm` or `tcg`; empty for containers.
    pub accelerator: String,
    /// What was looked for: kvm, crun, runc, cgroup, userns, ... each with version or reason.
    pub probed: Vec<Availability>,
    /// Lines that a person should see, such as "KVM is present but emulated; using TCG, expect slow guests".
    pub notices: Vec<String>,
}

/// State of a guest as the world shows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GuestState {
    /// The driver knows nothing of it.
    Absent,
    /// Being created or booted by its shim.
    Starting,
    /// Runs.
    Running,
    /// Frozen, memory kept.
    Paused,
    /// Was asked to stop and still runs.
    Stopping,
    /// Ended; disks are kept.
    Stopped,
    /// Ended in a way that was not asked for, or could not start.
    Failed,
}

/// What a driver reports about a guest.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Observation {
    /// State.
    pub state: GuestState,
    /// Which run this is: the `run` of the spec it was started with.
    pub run: u64,
    /// Exit code when ended; 128 + n when ended by signal n.
    pub exit_code: Option<i32>,
    /// For people: why it failed, what it is waiting for.
    pub message: String,
    /// Stable CamelCase reason, for example `OutOfMemory`, `DiskFull`, `ShimLost`.
    pub reason: String,
    /// Host pid of the guest's main process while it runs.
    pub pid: Option<i32>,
    /// When the run started.
    pub started_at: Option<oblak_model::Timestamp>,
    /// When it ended.
    pub ended_at: Option<oblak_model::Timestamp>,
    /// `kvm`, `tcg` or the OCI runtime's name.
    pub runtime: String,
    /// Volumes plugged in now.
    pub volumes: Vec<VolumeId>,
    /// Facts worth a condition: (type, reason, message), for example ("IoError", "DiskFull", "...").
    pub warnings: Vec<(String, String, String)>,
    /// Its shim freezes it when the lease of the node ends; see [`Fencing`].
    #[serde(default)]
    pub fenced: bool,
    /// It is frozen because that lease has ended.
    #[serde(default)]
    pub lease_ended: bool,
}

impl Observation {
    /// Nothing is known of the guest.
    #[must_use]
    pub fn absent() -> Self {
        Self {
            state: GuestState::Absent,
            run: 0,
            exit_code: None,
            message: String::new(),
            reason: String::new(),
            pid: None,
            started_at: None,
            ended_at: None,
            runtime: String::new(),
            volumes: Vec::new(),
            warnings: Vec::new(),
            fenced: false,
            lease_ended: false,
        }
    }
}

/// Counters of one guest since its start; rates are made by whoever keeps two samples.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct UsageSample {
    /// CPU time used, in nanoseconds.
    pub cpu_ns: u64,
    /// Memory in use, in bytes.
    pub memory_bytes: u64,
    /// Bytes read from disks.
    pub disk_read_bytes: u64,
    /// Bytes written to disks.
    pub disk_write_bytes: u64,
}

/// What every compute driver can do. All calls may be repeated, and may be cancelled by dropping them: nothing leaks, a
/// later call goes on from what the world looks like.
#[async_trait]
pub trait ComputeDriver: Send + Sync + 'static {
    /// Short name: `qemu`, `oci`, `fake`.
    fn name(&self) -> &'static str;

    /// Looks at the machine. Never fails: what is missing is in the answer.
    async fn probe(&self) -> Capabilities;

    /// Makes the guest run as the spec says. Starts it when it does not run and `spec.run` is newer than the last run;
    /// adopts it when it runs. A guest whose run `spec.run` has ended is *not* started again: that is the caller's decision,
    /// expressed by a larger `run`. So a repeated call never runs a guest twice.
    ///
    /// Returns when the guest's main process exists (not when the guest's system has booted) or has already ended.
    async fn ensure(&self, spec: &GuestSpec) -> DriverResult<Observation>;

    /// A start of this guest is near: does what can be done for it ahead, with what is known so far (`spec` without `nics`). Only
    /// makes the start faster: `ensure` does not rely on it, no guest process exists afterwards, [`Self::observe`] does not show it,
    /// and `remove` takes away what it left. It never waits for anything that may take long.
    async fn prepare(&self, spec: &GuestSpec) -> DriverResult<()> {
        let _ = spec;
        Ok(())
    }

    /// The state now. `Absent` when there is no record of it.
    async fn observe(&self, id: InstanceId) -> DriverResult<Observation>;

    /// Every guest that has a record or a process here, also after a crash of the caller or a reboot.
    async fn list(&self) -> DriverResult<Vec<InstanceId>>;

    /// Asks the guest to end (ACPI power button, stop signal), waits `grace`, then ends it by force. Disks and record stay.
    /// A zero grace means by force at once. Fine when it does not run.
    async fn stop(&self, id: InstanceId, grace: Duration) -> DriverResult<()>;

    /// Ends the guest by force and removes everything the driver made for it: processes, mounts, cgroups, sockets, record.
    /// The root disk that the caller passed in is not removed. Fine when there is nothing.
    async fn remove(&self, id: InstanceId) -> DriverResult<()>;

    /// Counters of a running guest.
    async fn usage(&self, id: InstanceId) -> DriverResult<UsageSample>;

    /// The console output so far (VM: serial, container: stdout and stderr), oldest first. `tail` limits to the last lines;
    /// `follow` goes on until the guest is removed or the reader is dropped (also across restarts of the guest).
    async fn logs(&self, id: InstanceId, tail: Option<u64>, follow: bool) -> DriverResult<BoxRead>;

    /// Freezing.
    fn pause(&self) -> Option<&dyn Pause> {
        None
    }
    /// Freezing with the end of the node's lease.
    fn fencing(&self) -> Option<&dyn Fencing> {
        None
    }
    /// Interactive console.
    fn console(&self) -> Option<&dyn Console> {
        None
    }
    /// Running a command inside.
    fn exec(&self) -> Option<&dyn Exec> {
        None
    }
    /// Screen over RFB (RFC 6143).
    fn vnc(&self) -> Option<&dyn Vnc> {
        None
    }
    /// Plugging disks while the guest runs.
    fn hotplug(&self) -> Option<&dyn Hotplug> {
        None
    }
    /// Point-in-time copies of disk and memory.
    fn snapshot(&self) -> Option<&dyn SnapshotGuest> {
        None
    }
    /// Changing vCPUs and memory of a running guest.
    fn resize(&self) -> Option<&dyn Resize> {
        None
    }
    /// Moving a running guest to another node.
    fn migrate(&self) -> Option<&dyn Migrate> {
        None
    }
}

/// Freezing a guest in place.
#[async_trait]
pub trait Pause: Send + Sync {
    /// Freezes; fine when already frozen.
    async fn pause(&self, id: InstanceId) -> DriverResult<()>;
    /// Lets it run on; fine when it runs.
    async fn resume(&self, id: InstanceId) -> DriverResult<()>;
}

/// Guests that stand still when the lease of their node ends, whoever is alive then; see [`shim::fence`].
#[async_trait]
pub trait Fencing: Send + Sync {
    /// Gives a running guest a fence, another one, or takes it away. Returns when that is in force: a guest that stood still goes on when
    /// the lease covers it.
    async fn fence(&self, id: InstanceId, fence: Option<shim::Fence>) -> DriverResult<()>;
}

/// Interactive console (VM: serial port; container: its terminal if it has one).
#[async_trait]
pub trait Console: Send + Sync {
    /// A stream of [`oblak_platform::frame::Frame`]s: Stdin in, Stdout out, `Resize` where there is a terminal. Several may be
    /// attached at once; all see the output.
    async fn console(&self, id: InstanceId) -> DriverResult<BoxDuplex>;
}

/// A command to run inside a guest.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct ExecRequest {
    /// Program and arguments; not empty.
    pub argv: Vec<String>,
    /// Added environment, `NAME=value`.
    #[serde(default)]
    pub env: Vec<String>,
    /// Working directory inside; empty for the guest's default.
    #[serde(default)]
    pub cwd: String,
    /// User inside, `name` or `uid[:gid]`; empty for the guest's default.
    #[serde(default)]
    pub user: String,
    /// With a terminal of this size (columns, rows).
    #[serde(default)]
    pub tty: Option<(u16, u16)>,
}

/// Running a command inside a guest.
#[async_trait]
pub trait Exec: Send + Sync {
    /// A stream of frames: Stdin in; Stdout, Stderr and finally `Control::Exit` or `Control::Error` out.
    async fn exec(&self, id: InstanceId, request: &ExecRequest) -> DriverResult<BoxDuplex>;
}

/// The screen.
#[async_trait]
pub trait Vnc: Send + Sync {
    /// Raw RFB bytes (not framed).
    async fn vnc(&self, id: InstanceId) -> DriverResult<BoxDuplex>;
}

/// Disks while running.
#[async_trait]
pub trait Hotplug: Send + Sync {
    /// Plugs a disk in; fine when it is in already.
    async fn attach(&self, id: InstanceId, disk: &DiskSpec) -> DriverResult<()>;
    /// Pulls a disk; waits until the guest let go of it (deadline inside); fine when it is not in.
    async fn detach(&self, id: InstanceId, volume: VolumeId) -> DriverResult<()>;
    /// Tells the guest that a disk grew to `size`.
    async fn grow(&self, id: InstanceId, volume: VolumeId, size: Size) -> DriverResult<()>;
}

/// Point-in-time copies of a whole guest.
#[async_trait]
pub trait SnapshotGuest: Send + Sync {
    /// Takes one: root disk, and memory when the guest runs and `memory` is asked for. Fine when `snapshot` exists already.
    /// Returns the bytes it needs on disk.
    async fn snapshot(&self, id: InstanceId, snapshot: SnapshotId, memory: bool) -> DriverResult<Size>;
    /// Puts the guest back; it runs afterwards when the snapshot has memory, otherwise it is stopped.
    /// `spec` is what the guest is to be started with.
    async fn restore(&self, spec: &GuestSpec, snapshot: SnapshotId) -> DriverResult<Observation>;
    /// Forgets it; fine when it is not there.
    async fn remove_snapshot(&self, id: InstanceId, snapshot: SnapshotId) -> DriverResult<()>;
    /// What exists.
    async fn list_snapshots(&self, id: InstanceId) -> DriverResult<Vec<SnapshotId>>;
}

/// Size of a running guest.
#[async_trait]
pub trait Resize: Send + Sync {
    /// Changes limits in place. `Unsupported` with the reason when this guest must be restarted for it.
    async fn resize(&self, id: InstanceId, vcpus_milli: u32, memory: Size) -> DriverResult<()>;
}
