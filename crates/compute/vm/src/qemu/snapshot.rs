//! Point-in-time copies inside the root disk (qcow2 internal snapshots), with memory when the machine runs and it is wanted.
//!
//! A copy of memory can only be loaded into the same machine, so what the machine was is written down beside it. Volumes are
//! not part of a copy: memory that remembers an older content of a volume would damage its file system, therefore memory is
//! refused while a writable volume is plugged in.

use std::path::PathBuf;
use std::time::Duration;

use async_trait::async_trait;
use oblak_compute::{Boot, DiskFormat, GuestSpec, Observation, SnapshotGuest};
use oblak_model::{InstanceId, Size, SnapshotId, VolumeId};
use oblak_platform::driver::{DriverError, DriverResult};
use oblak_platform::fsx;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::QemuDriver;
use super::jobs;
use super::record::{GuestDir, OnDisk, Record, ended, vcpus};
use super::session::{Session, refused, unknown};
use super::{probe, start};

const SAVE_DEADLINE: Duration = Duration::from_secs(600);
const TOOL_DEADLINE: Duration = Duration::from_secs(300);

/// What was written down about a snapshot.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Note {
    snapshot: SnapshotId,
    /// Bytes of memory in it; zero when it has the disk only.
    memory_bytes: u64,
    has_memory: bool,
    /// The machine it was taken of.
    machine: Record,
    /// Port of each volume (write-protected ones only).
    volumes: Vec<(VolumeId, u8)>,
}

fn note_path(dir: &GuestDir, snapshot: SnapshotId) -> PathBuf {
    dir.snapshots().join(format!("{snapshot}.json"))
}

fn read_note(dir: &GuestDir, snapshot: SnapshotId) -> DriverResult<Option<Note>> {
    let path = note_path(dir, snapshot);
    fsx::read_json(&path)
        .map_err(|e| DriverError::permanent("record_damaged", format!("the note of snapshot {snapshot}: {e}")))
}

fn write_note(dir: &GuestDir, note: &Note) -> DriverResult<()> {
    let write = || {
        fsx::create_dir_private(&dir.snapshots(), 0o700)?;
        fsx::write_json(&note_path(dir, note.snapshot), note)
    };
    write().map_err(|e| DriverError::io(&format!("cannot write the note of snapshot {}", note.snapshot), &e))
}

/// The root disk, if it can hold snapshots.
fn root_of(spec: &GuestSpec) -> DriverResult<PathBuf> {
    let (root, format) = match &spec.boot {
        Boot::Disk { root, format, .. } | Boot::Kernel { root: Some(root), format, .. } => (root, *format),
        _ => {
            return Err(DriverError::unsupported(format!(
                "machine {} has no root disk to take a snapshot of",
                spec.id
            )));
        }
    };
    if format != DiskFormat::Qcow2 {
        return Err(DriverError::unsupported(format!(
            "the root disk of machine {} is raw; only qcow2 can hold snapshots",
            spec.id
        )));
    }
    Ok(root.clone())
}

impl QemuDriver {
    async fn image_tool(&self, args: &[&str]) -> DriverResult<String> {
        let program = probe::image_tool(&self.config)?;
        let mut command = tokio::process::Command::new(program);
        command.args(args).stdin(std::process::Stdio::null()).kill_on_drop(true);
        let result = tokio::time::timeout(TOOL_DEADLINE, command.output())
            .await
            .map_err(|_| DriverError::retry("tool_timeout", format!("qemu-img {} does not end", args.join(" "))))?
            .map_err(|e| DriverError::io("qemu-img", &e))?;
        if !result.status.success() {
            let said = String::from_utf8_lossy(&result.stderr).trim().to_string();
            let code = if said.contains("No space left") { "disk_full" } else { "qemu_img" };
            return Err(DriverError::retry(
                code,
                format!("qemu-img {}: {said}", args.first().copied().unwrap_or_default()),
            ));
        }
        Ok(String::from_utf8_lossy(&result.stdout).into_owned())
    }

    /// Snapshots in an image with the bytes of memory in each.
    async fn in_image(&self, root: &std::path::Path) -> DriverResult<Vec<(String, u64)>> {
        let text = self.image_tool(&["info", "-U", "--output=json", &root.display().to_string()]).await?;
        let info: Value =
            serde_json::from_str(&text).map_err(|e| DriverError::retry("qemu_img", format!("qemu-img info: {e}")))?;
        let entries = info["snapshots"].as_array().cloned().unwrap_or_default();
        Ok(entries
            .iter()
            .filter_map(|s| Some((s["name"].as_str()?.to_string(), s["vm-state-size"].as_u64()?)))
            .collect())
    }

    async fn take(&self, dir: &GuestDir, id: InstanceId, snapshot: SnapshotId, memory: bool) -> DriverResult<Note> {
        let tag = snapshot.to_string();
        let (record, alive) = match OnDisk::read(dir)? {
            OnDisk::Nothing => return Err(unknown(id)),
            OnDisk::Alive(record, _) => (*record, true),
            OnDisk::Lost(record, shim) => {
                self.settle(dir, &shim).await?;
                (*record, false)
            }
            OnDisk::NotStarted(record, _) | OnDisk::Ended(record, _) => (*record, false),
        };
        let root = root_of(&record.spec)?;
        let has_memory = memory && alive;
        let mut volumes = Vec::new();
        if alive {
            let session = self.session(id).await?;
            if has_memory {
                volumes = self.volumes_for_memory(&session).await?;
            }
            // One that was taken by a call whose note was never written is of no known moment.
            delete_running(&session, &tag).await?;
            take_running(&session, &tag, has_memory).await?;
        } else {
            let path = root.display().to_string();
            if self.in_image(&root).await?.iter().any(|(name, _)| *name == tag) {
                self.image_tool(&["snapshot", "-q", "-d", &tag, &path]).await?;
            }
            self.image_tool(&["snapshot", "-q", "-c", &tag, &path]).await?;
        }
        let memory_bytes =
            self.in_image(&root).await?.iter().find(|(name, _)| *name == tag).map_or(0, |(_, bytes)| *bytes);
        let note = Note {
            snapshot,
            memory_bytes,
            has_memory,
            machine: Record { load: None, resized: false, ..record },
            volumes,
        };
        write_note(dir, &note)?;
        Ok(note)
    }

    async fn volumes_for_memory(&self, session: &Session) -> DriverResult<Vec<(VolumeId, u8)>> {
        let mut kept = Vec::new();
        let blocks = session.qmp.execute("query-named-block-nodes", json!({"flat": true})).await;
        let blocks = blocks.map_err(|e| refused(session.record.spec.id, "look at the disks of", &e))?;
        for (volume, port) in session.volumes().await? {
            let name = super::cmdline::node_name(volume);
            let node = blocks.as_array().into_iter().flatten().find(|n| n["node-name"] == name.as_str());
            if node.is_none_or(|n| n["ro"] != true) {
                return Err(DriverError::unsupported(format!(
                    "volume {volume} is not part of a snapshot and would be damaged by going back in memory; \
                     detach it first, or take the snapshot without memory"
                )));
            }
            kept.extend(port.map(|port| (volume, port)));
        }
        Ok(kept)
    }

    /// The record of a start from `note`, if the spec is still the same machine.
    async fn record_for(&self, spec: &GuestSpec, note: &Note) -> DriverResult<Record> {
        let old = &note.machine;
        let mismatch = |what: &str| {
            let detail = format!(
                "snapshot {} has memory of a machine with {what}; set it back to that, or restore a snapshot without memory",
                note.snapshot
            );
            DriverError::permanent("snapshot_mismatch", detail)
        };
        if vcpus(spec.vcpus_milli) != old.vcpus() {
            return Err(mismatch(&format!("{} vCPUs", old.vcpus())));
        }
        if spec.memory != old.spec.memory {
            return Err(mismatch(&format!("{} of memory", old.spec.memory)));
        }
        if spec.nics.len() != old.spec.nics.len() {
            return Err(mismatch(&format!("{} network interfaces", old.spec.nics.len())));
        }
        if spec.seed.is_some() != old.spec.seed.is_some() {
            return Err(mismatch("another set of disks"));
        }
        let mut wanted: Vec<VolumeId> = spec.disks.iter().map(|d| d.volume).collect();
        let mut had: Vec<VolumeId> = note.volumes.iter().map(|(volume, _)| *volume).collect();
        wanted.sort();
        had.sort();
        if wanted != had {
            return Err(mismatch(&format!("{} volumes attached", had.len())));
        }
        let accel = self.accel().await?.accel;
        if accel != old.accel {
            return Err(mismatch(&format!("the accelerator {}", old.accel.name())));
        }
        let emulator = self.emulator().await?.program.clone();
        Ok(Record {
            spec: spec.clone(),
            qemu: emulator,
            slots: note.volumes.iter().copied().collect(),
            load: Some(note.snapshot),
            ..old.clone()
        })
    }
}

async fn take_running(session: &Session, tag: &str, memory: bool) -> DriverResult<()> {
    let id = session.record.spec.id;
    if memory {
        let arguments = json!({"tag": tag, "vmstate": "root", "devices": ["root"]});
        return jobs::run(&session.qmp, "snapshot-save", arguments, SAVE_DEADLINE)
            .await
            .map_err(|e| refused(id, "take a snapshot of", &e));
    }
    let arguments = json!({"device": "root", "name": tag});
    let result = session.qmp.execute_with("blockdev-snapshot-internal-sync", arguments, None, TOOL_DEADLINE).await;
    result.map_err(|e| refused(id, "take a snapshot of", &e)).map(drop)
}

async fn delete_running(session: &Session, tag: &str) -> DriverResult<()> {
    let arguments = json!({"device": "root", "name": tag});
    match session.qmp.execute_with("blockdev-snapshot-delete-internal-sync", arguments, None, TOOL_DEADLINE).await {
        Ok(_) => Ok(()),
        Err(e) if e.says("does not exist") => Ok(()),
        Err(e) => Err(refused(session.record.spec.id, "delete a snapshot of", &e)),
    }
}

#[async_trait]
impl SnapshotGuest for QemuDriver {
    async fn snapshot(&self, id: InstanceId, snapshot: SnapshotId, memory: bool) -> DriverResult<Size> {
        let locks = self.locks.of(id);
        let _life = locks.life.lock().await;
        let dir = self.dir(id);
        let note = match read_note(&dir, snapshot)? {
            Some(note) => note,
            None => self.take(&dir, id, snapshot, memory).await?,
        };
        Ok(Size(note.memory_bytes))
    }

    async fn restore(&self, spec: &GuestSpec, snapshot: SnapshotId) -> DriverResult<Observation> {
        start::check(&self.config, spec)?;
        let locks = self.locks.of(spec.id);
        let _life = locks.life.lock().await;
        let dir = self.dir(spec.id);
        let gone = || DriverError::gone(format!("machine {} has no snapshot {snapshot}", spec.id));
        let note = read_note(&dir, snapshot)?.ok_or_else(gone)?;
        let root = root_of(spec)?;
        let record = if note.has_memory { Some(self.record_for(spec, &note).await?) } else { None };
        match OnDisk::read(&dir)? {
            OnDisk::Alive(_, shim) => self.end_by_force(&dir, &shim).await?,
            OnDisk::Lost(_, shim) => drop(self.settle(&dir, &shim).await?),
            _ => {}
        }
        let Some(record) = record else {
            self.image_tool(&["snapshot", "-q", "-a", &snapshot.to_string(), &root.display().to_string()]).await?;
            return match OnDisk::read(&dir)? {
                OnDisk::Ended(_, exit) => Ok(ended(&exit)),
                _ => self.observe_dir(&dir).await,
            };
        };
        // The run of the spec may be one that has ended; going back is an explicit wish to run it again.
        for name in [oblak_compute::shim::file::EXIT, oblak_compute::shim::file::RECORD] {
            fsx::remove_file_if_exists(&dir.path().join(name)).map_err(|e| DriverError::io("cannot clean up", &e))?;
        }
        self.launch_record(&dir, &record).await?;
        self.observe_dir(&dir).await
    }

    async fn remove_snapshot(&self, id: InstanceId, snapshot: SnapshotId) -> DriverResult<()> {
        let locks = self.locks.of(id);
        let _life = locks.life.lock().await;
        let dir = self.dir(id);
        let Some(note) = read_note(&dir, snapshot)? else { return Ok(()) };
        let tag = snapshot.to_string();
        match OnDisk::read(&dir)? {
            OnDisk::Alive(..) => delete_running(&self.session(id).await?, &tag).await?,
            other => {
                if let OnDisk::Lost(_, shim) = other {
                    self.settle(&dir, &shim).await?;
                }
                let root = root_of(&note.machine.spec)?;
                // A root disk that is gone took its snapshots with it.
                if root.exists() && self.in_image(&root).await?.iter().any(|(name, _)| *name == tag) {
                    self.image_tool(&["snapshot", "-q", "-d", &tag, &root.display().to_string()]).await?;
                }
            }
        }
        fsx::remove_file_if_exists(&note_path(&dir, snapshot))
            .map_err(|e| DriverError::io("cannot forget the snapshot", &e))
    }

    async fn list_snapshots(&self, id: InstanceId) -> DriverResult<Vec<SnapshotId>> {
        let entries = match std::fs::read_dir(self.dir(id).snapshots()) {
            Ok(entries) => entries,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(e) => return Err(DriverError::io("cannot list snapshots", &e)),
        };
        let mut all: Vec<SnapshotId> = entries
            .filter_map(Result::ok)
            .filter_map(|entry| entry.file_name().to_str()?.strip_suffix(".json")?.parse().ok())
            .collect();
        all.sort();
        Ok(all)
    }
}
