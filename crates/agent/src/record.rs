//! What the agent must not forget about an instance, on disk beside it: `instances/<id>/agent.json`.

use std::io;
use std::path::Path;

use oblak_model::{Instance, InstanceId, Isolation, Resources};
use oblak_platform::fsx;
use serde::{Deserialize, Serialize};

/// File name below the instance's directory.
pub const FILE: &str = "agent.json";

/// The agent's memory of an instance.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// The instance.
    pub id: InstanceId,
    /// Its name, for a person who reads this without the control plane.
    pub name: String,
    /// Its project.
    pub project: String,
    /// Which driver has it.
    pub isolation: Isolation,
    /// The directory was made with this record: before the first run nothing in it is anything but made for that run.
    #[serde(default)]
    pub fresh: bool,
    /// Number of the newest run that was ordered. Written before the driver is told, so a crash in between starts nothing twice.
    #[serde(default)]
    pub run: u64,
    /// The run was ended because that was asked for.
    #[serde(default)]
    pub stop_ordered: bool,
    /// `spec.restart_generation` carried out.
    #[serde(default)]
    pub restart_generation: u64,
    /// `spec.restore.generation` carried out.
    #[serde(default)]
    pub restore_generation: u64,
    /// Times it was started again after it ended by itself, since the last healthy run.
    #[serde(default)]
    pub failures: u32,
    /// Times it was started again after it ended by itself.
    #[serde(default)]
    pub restart_count: u64,
    /// What the current run was started with.
    #[serde(default)]
    pub resources: Resources,
    /// First of the 65,536 host ids that a container may use; 0 when none were given yet.
    #[serde(default)]
    pub id_base: u32,
    /// `status.placement.generation` that this is about; 0 when written by an agent that did not know of it.
    #[serde(default)]
    pub placement: u64,
    /// The boot in which the run was started.
    #[serde(default)]
    pub boot_id: String,
    /// When the run was started, microseconds since 1970.
    #[serde(default)]
    pub started_micros: i64,
}

impl Record {
    /// Before the first run.
    #[must_use]
    pub fn new(instance: &Instance) -> Self {
        Self {
            id: InstanceId(instance.metadata.id),
            name: instance.metadata.name.clone(),
            project: instance.metadata.project.clone().unwrap_or_default(),
            isolation: instance.status.resolved.isolation,
            fresh: false,
            run: 0,
            stop_ordered: false,
            // What was asked for before the first start is carried out by the first start.
            restart_generation: instance.spec.restart_generation,
            restore_generation: instance.spec.restore.as_ref().map_or(0, |r| r.generation),
            failures: 0,
            restart_count: 0,
            resources: Resources::default(),
            id_base: 0,
            placement: instance.status.placement.as_ref().map_or(0, |p| p.generation),
            boot_id: String::new(),
            started_micros: 0,
        }
    }

    /// Reads the record below `dir`.
    ///
    /// # Errors
    /// Any I/O error; `InvalidData` when it is damaged.
    pub fn load(dir: &Path) -> io::Result<Option<Self>> {
        fsx::read_json(&dir.join(FILE))
    }

    /// Writes the record below `dir`, durably.
    ///
    /// # Errors
    /// Any I/O error.
    pub fn save(&self, dir: &Path) -> io::Result<()> {
        fsx::write_json(&dir.join(FILE), self)
    }

    /// Writes the first record, before anything is ordered: it keeps host ids for what this boot makes (namespaces), and goes with it.
    ///
    /// # Errors
    /// Any I/O error.
    pub fn save_until_boot(&self, dir: &Path) -> io::Result<()> {
        fsx::write_json_until_boot(&dir.join(FILE), self)
    }
}
