//! Point-in-time copies: inside the file for qcow2, read-only copies beside it for raw and directories.
//! Why so: `docs/decisions/0020-volume-snapshots.md`.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use oblak_model::{Size, SnapshotId, VolumeId};
use oblak_platform::driver::{DriverError, DriverResult};
use oblak_platform::fsx;
use oblak_volume::Format;

use crate::pool::{Pool, at, delete, not_in_use, owner_of, runner, temporary, verify};
use crate::qemu_img::{COPY, QUICK};
use crate::record::Record;
use crate::{copy, qcow2};

impl Pool {
    pub(crate) fn snapshot_dir(&self, id: VolumeId) -> PathBuf {
        self.home(id).join("snapshots")
    }

    pub(crate) fn snapshot_path(&self, record: &Record, id: SnapshotId) -> PathBuf {
        let extension = if record.format == Format::Directory { "tree" } else { "raw" };
        self.snapshot_dir(record.id).join(format!("{id}.{extension}"))
    }

    /// What the file or the directory holds is the truth; there is no list that could differ from it.
    pub(crate) fn snapshot_ids(&self, record: &Record) -> DriverResult<Vec<SnapshotId>> {
        let mut ids: Vec<SnapshotId> = if record.format == Format::Qcow2 {
            let found = qcow2::snapshots(&record.path).map_err(|e| at(&record.path, &e))?;
            found.iter().filter_map(|s| s.name.parse().ok()).collect()
        } else {
            let entries = std::fs::read_dir(self.snapshot_dir(record.id)).into_iter().flatten().flatten();
            entries.filter_map(|e| e.path().file_stem()?.to_str()?.parse().ok()).collect()
        };
        ids.sort_unstable();
        Ok(ids)
    }

    /// The size a disk had when an internal snapshot was taken.
    pub(crate) fn internal_size(&self, record: &Record, name: &str) -> DriverResult<u64> {
        let found = qcow2::snapshots(&record.path).map_err(|e| at(&record.path, &e))?;
        Ok(found.into_iter().find(|s| s.name == name).and_then(|s| s.size).unwrap_or(record.size.0))
    }

    /// Takes one; returns the size a volume made of it needs at least (for a directory: what it takes on the disk).
    pub fn snapshot(&self, volume: VolumeId, id: SnapshotId) -> DriverResult<Size> {
        let record = self.record(volume)?;
        if !self.snapshot_ids(&record)?.contains(&id) {
            not_in_use(&record)?;
            match record.format {
                Format::Qcow2 => internal(&record, "-c", id, QUICK)?,
                Format::Raw | Format::Directory => self.keep_copy(&record, id)?,
            }
        }
        let path = self.snapshot_path(&record, id);
        match record.format {
            Format::Qcow2 => self.internal_size(&record, &id.to_string()).map(Size),
            Format::Raw => Ok(Size(path.metadata().map_err(|e| at(&path, &e))?.len())),
            Format::Directory => Ok(Size(copy::used(&path))),
        }
    }

    pub fn restore(&self, volume: VolumeId, id: SnapshotId) -> DriverResult<()> {
        let record = self.record(volume)?;
        if !self.snapshot_ids(&record)?.contains(&id) {
            return Err(DriverError::gone(format!("volume {volume}: snapshot {id} does not exist")));
        }
        not_in_use(&record)?;
        if record.format == Format::Qcow2 {
            internal(&record, "-a", id, COPY)?;
        } else {
            self.bring_back(&record, &self.snapshot_path(&record, id))?;
        }
        // The volume may have grown since; growing again adds zeros at the end.
        self.resize(&record, &record.path, record.size)
    }

    pub fn remove_snapshot(&self, volume: VolumeId, id: SnapshotId) -> DriverResult<()> {
        let Some(record) = Record::read(&self.home(volume))?.filter(|r| r.ready) else { return Ok(()) };
        if !self.snapshot_ids(&record)?.contains(&id) {
            return Ok(());
        }
        if record.format == Format::Qcow2 {
            not_in_use(&record)?;
            return internal(&record, "-d", id, COPY);
        }
        // First out of sight, then away: a crash in between leaves a temporary name that the next snapshot removes.
        let path = self.snapshot_path(&record, id);
        let temp = temporary(&path);
        let gone = delete(&temp).and_then(|()| std::fs::rename(&path, &temp)).and_then(|()| delete(&temp));
        gone.map_err(|e| at(&path, &e))
    }

    fn keep_copy(&self, record: &Record, id: SnapshotId) -> DriverResult<()> {
        let dir = self.snapshot_dir(record.id);
        fsx::create_dir_private(&dir, 0o700).map_err(|e| at(&dir, &e))?;
        for leftover in std::fs::read_dir(&dir).into_iter().flatten().flatten() {
            if leftover.file_name().as_encoded_bytes().starts_with(b".") {
                delete(&leftover.path()).map_err(|e| at(&dir, &e))?;
            }
        }
        let path = self.snapshot_path(record, id);
        let temp = temporary(&path);
        let kept = copy_content(record, &record.path, &temp).and_then(|()| {
            if record.format == Format::Raw {
                std::fs::set_permissions(&temp, std::fs::Permissions::from_mode(0o400))?;
            }
            std::fs::rename(&temp, &path)?;
            fsx::sync_dir(&dir)
        });
        kept.map_err(|e| {
            let _ = delete(&temp);
            at(&path, &e)
        })
    }

    /// Puts a copy of the snapshot in the place of the content, at once.
    fn bring_back(&self, record: &Record, from: &Path) -> DriverResult<()> {
        let temp = temporary(&record.path);
        let done = delete(&temp).and_then(|()| copy_content(record, from, &temp)).and_then(|()| {
            if record.format == Format::Raw {
                std::fs::set_permissions(&temp, std::fs::Permissions::from_mode(0o600))?;
                let (uid, gid) = owner_of(&record.path, record);
                std::os::unix::fs::chown(&temp, Some(uid), Some(gid))?;
                std::fs::rename(&temp, &record.path)?;
            } else {
                // A directory cannot be renamed over one that is not empty (renameat2(2), RENAME_EXCHANGE).
                let flags = nix::fcntl::RenameFlags::RENAME_EXCHANGE;
                nix::fcntl::renameat2(nix::fcntl::AT_FDCWD, &temp, nix::fcntl::AT_FDCWD, &record.path, flags)?;
            }
            delete(&temp)?;
            record.path.parent().map_or(Ok(()), fsx::sync_dir)
        });
        done.map_err(|e| {
            let _ = delete(&temp);
            at(&record.path, &e)
        })
    }
}

fn copy_content(record: &Record, from: &Path, to: &Path) -> std::io::Result<()> {
    if record.format == Format::Directory { copy::tree(from, to) } else { copy::file(from, to).map(|_| ()) }
}

fn internal(record: &Record, action: &str, id: SnapshotId, deadline: std::time::Duration) -> DriverResult<()> {
    verify(record)?;
    let what = format!("volume {}: snapshot {id}", record.id);
    let file = record.path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    let reads: Vec<&Path> = record.backing.iter().map(|(p, _)| p.as_path()).collect();
    // `snapshot` has no -f; image options name the format instead, so that it is never guessed.
    let options = format!("driver=qcow2,file.driver=file,file.filename={file}");
    let runner = runner(record, &record.path, &reads, &what);
    runner.run(&["snapshot", "-q", action, &id.to_string(), "--image-opts", &options], deadline)
}
