//! Volumes of a pool: made, grown, looked at, removed. Everything here blocks and runs under the volume's lock.
//!
//! ```text
//! nothing ──► record (not ready) ──► content under a temporary name ──► renamed ──► record (ready)
//! ```
//! A crash between two arrows leaves a record that is not ready; the next `ensure` starts again and `remove` removes.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use oblak_model::{Size, SnapshotId, VolumeId};
use oblak_platform::driver::{Availability, DriverError, DriverResult};
use oblak_platform::fsx;
use oblak_volume::{Capabilities, Claim, Format, Source, VolumeHandle, VolumeSpec};

use crate::qemu_img::{COPY, QUICK, Runner, name_of};
use crate::record::Record;
use crate::{copy, epoch, qcow2, qemu_img};

/// Others may pass through our directories to a file they own, and see nothing else.
const DIR_MODE: u32 = 0o711;
/// Sizes of disks are whole sectors.
const SECTOR_BYTES: u64 = 512;
/// Bytes of a disk image that qemu locks while it has it open (QEMU block/file-posix.c: 100 to 299).
const LOCKED_FROM: i64 = 100;
const LOCKED_BYTES: i64 = 200;

/// A directory of volumes.
pub struct Pool {
    dir: PathBuf,
    /// Other nodes have it too, but not the images of this one.
    shared: bool,
}

/// Where a copy comes from.
enum Origin {
    /// The content of a volume, or a copy that a snapshot is.
    File(PathBuf),
    /// An internal snapshot of a qcow2 volume.
    Internal(String),
}

impl Pool {
    pub fn new(dir: &Path) -> Self {
        Self { dir: dir.into(), shared: false }
    }

    pub fn shared(dir: &Path) -> Self {
        Self { dir: dir.into(), shared: true }
    }

    pub fn claim(&self, id: VolumeId, claim: &Claim) -> DriverResult<()> {
        if !self.shared {
            return Ok(());
        }
        let home = self.home(id);
        // The pool itself is never made here: a directory that is not mounted must not be taken for an empty pool.
        match std::fs::create_dir(&home) {
            Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(at(&home, &e)),
            _ => {}
        }
        std::fs::set_permissions(&home, std::fs::Permissions::from_mode(DIR_MODE)).map_err(|e| at(&home, &e))?;
        epoch::claim(&home, id, claim)
    }

    pub fn dir(&self) -> &Path {
        &self.dir
    }

    pub(crate) fn home(&self, id: VolumeId) -> PathBuf {
        self.dir.join(id.to_string())
    }

    pub fn probe(&self) -> Capabilities {
        let mut found = Capabilities::default();
        let there = if self.shared {
            std::fs::read_dir(&self.dir).map(drop)
        } else {
            fsx::create_dir_private(&self.dir, DIR_MODE)
        };
        match there.and_then(|()| copy::can_share(&self.dir)) {
            Ok(shares) => {
                found.available = true;
                let why = "this file system cannot share blocks (btrfs and XFS can); copies take time and space";
                found.probed.push(if shares {
                    Availability::yes("reflink", "")
                } else {
                    Availability::no("reflink", why)
                });
            }
            Err(error) => found.probed.push(Availability::no("pool", format!("{}: {error}", self.dir.display()))),
        }
        found.probed.push(match qemu_img::version() {
            Ok(version) => Availability::yes("qemu-img", version),
            Err(reason) => Availability::no("qemu-img", reason),
        });
        found
            .probed
            .push(Availability::no("directory-size", "sizes of directory volumes are not enforced by this driver"));
        if let Ok(space) = nix::sys::statvfs::statvfs(&self.dir) {
            found.capacity = Size(space.blocks() * space.fragment_size());
            found.free = Size(space.blocks_available() * space.fragment_size());
        }
        found
    }

    pub fn ensure(&self, spec: &VolumeSpec, in_use: bool) -> DriverResult<VolumeHandle> {
        if spec.size == Size(0) && spec.format != Format::Directory {
            return Err(DriverError::permanent("invalid_size", format!("volume {}: the size must not be 0", spec.id)));
        }
        if spec.dir.as_ref().is_some_and(|dir| !dir.is_absolute()) {
            return Err(DriverError::permanent(
                "invalid_dir",
                format!("volume {}: the directory must be absolute", spec.id),
            ));
        }
        let home = self.home(spec.id);
        let record = match Record::read(&home)? {
            Some(record) if record.ready => self.update(record, spec, in_use)?,
            leftover => {
                if let Some(record) = leftover {
                    delete(&record.path).map_err(|e| at(&record.path, &e))?;
                }
                self.create(spec)?
            }
        };
        self.handle(&record)
    }

    pub fn observe(&self, id: VolumeId) -> DriverResult<Option<VolumeHandle>> {
        match Record::read(&self.home(id))?.filter(|r| r.ready) {
            Some(record) => self.handle(&record).map(Some),
            None => Ok(None),
        }
    }

    pub fn list(&self) -> DriverResult<Vec<VolumeId>> {
        let entries = match std::fs::read_dir(&self.dir) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(vec![]),
            entries => entries.map_err(|e| at(&self.dir, &e))?,
        };
        let mut ids: Vec<VolumeId> = entries.flatten().filter_map(|e| e.file_name().to_str()?.parse().ok()).collect();
        ids.sort_unstable();
        Ok(ids)
    }

    pub fn remove(&self, id: VolumeId) -> DriverResult<()> {
        let home = self.home(id);
        if let Some(record) = Record::read(&home)? {
            // Half of a removed volume is no volume.
            Record { ready: false, ..record.clone() }.write(&home)?;
            for path in [temporary(&record.path), record.path] {
                delete(&path).map_err(|e| at(&path, &e))?;
            }
        }
        fsx::remove_dir_if_exists(&home).map_err(|e| at(&home, &e))
    }

    /// The record of a volume that exists.
    pub(crate) fn record(&self, id: VolumeId) -> DriverResult<Record> {
        let record = Record::read(&self.home(id))?.filter(|r| r.ready);
        record.ok_or_else(|| DriverError::gone(format!("volume {id} does not exist")))
    }

    fn handle(&self, record: &Record) -> DriverResult<VolumeHandle> {
        exists(record)?;
        Ok(VolumeHandle {
            id: record.id,
            path: record.path.clone(),
            format: record.format,
            size: record.size,
            used: Size(copy::used(&record.path) + copy::used(&self.snapshot_dir(record.id))),
            snapshots: self.snapshot_ids(record)?,
            size_enforced: record.format != Format::Directory,
        })
    }

    fn create(&self, spec: &VolumeSpec) -> DriverResult<Record> {
        let home = self.home(spec.id);
        let dir = spec.dir.clone().unwrap_or_else(|| home.clone());
        let extension = match spec.format {
            Format::Qcow2 => "qcow2",
            Format::Raw => "raw",
            Format::Directory => "tree",
        };
        let path = dir.join(format!("{}.{extension}", spec.id));
        if path.symlink_metadata().is_ok() {
            let detail =
                format!("volume {}: {} exists but was not made by this volume; move it away", spec.id, path.display());
            return Err(DriverError::permanent("occupied", detail));
        }
        let backing = match (&spec.source, spec.format) {
            (Source::Image { path, format }, Format::Qcow2) if !self.shared => Some((path.clone(), *format)),
            _ => None,
        };
        let mut record = Record {
            id: spec.id,
            format: spec.format,
            size: spec.size,
            path,
            backing,
            owner: spec.owner,
            ready: false,
        };
        for dir in [&home, &dir] {
            fsx::create_dir_private(dir, DIR_MODE).map_err(|e| at(dir, &e))?;
        }
        let temp = temporary(&record.path);
        let made = record.write(&home).and_then(|()| {
            delete(&temp).map_err(|e| at(&temp, &e))?;
            self.fill(&record, &spec.source, &temp)?;
            finish(&record, &temp).map_err(|e| at(&record.path, &e))
        });
        if let Err(error) = made {
            let _ = delete(&temp);
            let _ = Record::delete(&home);
            let _ = std::fs::remove_dir(&home);
            return Err(error);
        }
        record.ready = true;
        record.write(&home)?;
        Ok(record)
    }

    fn update(&self, mut record: Record, spec: &VolumeSpec, in_use: bool) -> DriverResult<Record> {
        let id = spec.id;
        exists(&record)?;
        if spec.format != record.format {
            let detail = format!(
                "volume {id}: the format is {:?} and cannot be changed; clone the volume instead",
                record.format
            );
            return Err(DriverError::permanent("format_fixed", detail));
        }
        if spec.size < record.size {
            let detail = format!("volume {id}: it has {} and cannot shrink to {}", record.size, spec.size);
            return Err(DriverError::permanent("shrink", detail));
        }
        // The size on record may be ahead of the file's when a guest had it open, so the file itself is looked at.
        if !in_use && spec.format != Format::Directory && actual_size(&record)? < whole(spec.size) {
            not_in_use(&record)?;
            self.resize(&record, &record.path, spec.size)?;
        }
        if (record.size, record.owner) != (spec.size, spec.owner) {
            // Only a new wish is followed: the guest's driver may have given the file to its own user since.
            if record.owner != spec.owner {
                own(&record.path, spec.owner).map_err(|e| at(&record.path, &e))?;
            }
            (record.size, record.owner) = (spec.size, spec.owner);
            record.write(&self.home(id))?;
        }
        Ok(record)
    }

    /// Makes the content at `temp`.
    fn fill(&self, record: &Record, source: &Source, temp: &Path) -> DriverResult<()> {
        match source {
            Source::Empty => self.fill_empty(record, temp),
            Source::Image { path, format } => self.fill_from_image(record, path, *format, temp),
            Source::Volume { id } => {
                let from = self.record(*id)?;
                exists(&from)?;
                not_in_use(&from)?;
                let origin = Origin::File(from.path.clone());
                self.fill_from_copy(record, &from, &origin, temp)
            }
            Source::Snapshot { volume, id } => {
                let from = self.record(*volume)?;
                let origin = self.snapshot_origin(&from, *id)?;
                self.fill_from_copy(record, &from, &origin, temp)
            }
        }
    }

    fn snapshot_origin(&self, from: &Record, id: SnapshotId) -> DriverResult<Origin> {
        if !self.snapshot_ids(from)?.contains(&id) {
            return Err(DriverError::gone(format!("volume {}: snapshot {id} does not exist", from.id)));
        }
        Ok(match from.format {
            Format::Qcow2 => Origin::Internal(id.to_string()),
            Format::Raw | Format::Directory => Origin::File(self.snapshot_path(from, id)),
        })
    }

    fn fill_empty(&self, record: &Record, temp: &Path) -> DriverResult<()> {
        match record.format {
            Format::Directory => std::fs::create_dir(temp).map_err(|e| at(temp, &e)),
            Format::Raw => {
                self.check_space(record, whole(record.size), temp)?;
                let made = File::create_new(temp).and_then(|file| file.set_len(whole(record.size)));
                made.map_err(|e| at(temp, &e))
            }
            Format::Qcow2 => {
                prepare(temp, record.owner).map_err(|e| at(temp, &e))?;
                let what = format!("volume {}: making it", record.id);
                let size = whole(record.size).to_string();
                runner(record, temp, &[], &what).run(&["create", "-q", "-f", "qcow2", "--", &name(temp), &size], QUICK)
            }
        }
    }

    fn fill_from_image(&self, record: &Record, image: &Path, format: Format, temp: &Path) -> DriverResult<()> {
        let what = format!("volume {}: image {}", record.id, image.display());
        if record.format == Format::Directory || format == Format::Directory {
            return Err(DriverError::unsupported(format!("{what}: a directory volume cannot be made of a disk image")));
        }
        let needed = image_size(image, format, &what)?;
        if whole(record.size) < needed {
            let detail = format!("{what}: the image needs {}, the volume has only {}", Size(needed), record.size);
            return Err(DriverError::permanent("too_small", detail));
        }
        if record.format == Format::Raw {
            self.check_space(record, whole(record.size), temp)?;
            if format == Format::Raw {
                copy::file(image, temp).map_err(|e| at(temp, &e))?;
            } else {
                prepare(temp, record.owner).map_err(|e| at(temp, &e))?;
                let image_text = text(image)?;
                let args = ["convert", "-q", "-f", name_of(format), "-O", "raw", "--", image_text, &name(temp)];
                runner(record, temp, &[image], &what).run(&args, COPY)?;
            }
            return self.resize(record, temp, record.size);
        }
        prepare(temp, record.owner).map_err(|e| at(temp, &e))?;
        if record.backing.is_none() {
            let args = ["convert", "-q", "-f", name_of(format), "-O", "qcow2", "--", text(image)?, &name(temp)];
            runner(record, temp, &[image], &what).run(&args, COPY)?;
            return self.resize(record, temp, record.size);
        }
        let size = whole(record.size).to_string();
        let args = ["create", "-q", "-f", "qcow2", "-b", text(image)?, "-F", name_of(format), "--", &name(temp), &size];
        runner(record, temp, &[image], &what).run(&args, QUICK)
    }

    /// A full copy: nothing of the original is needed afterwards.
    fn fill_from_copy(&self, record: &Record, from: &Record, origin: &Origin, temp: &Path) -> DriverResult<()> {
        let what = format!("volume {}: copy of volume {}", record.id, from.id);
        if (record.format == Format::Directory) != (from.format == Format::Directory) {
            return Err(DriverError::unsupported(format!(
                "{what}: directories and disks cannot be made of each other"
            )));
        }
        if record.format == Format::Directory {
            let Origin::File(path) = origin else { return Err(DriverError::unsupported(what)) };
            return copy::tree(path, temp).map_err(|e| at(temp, &e));
        }
        let needed = match origin {
            Origin::File(path) if from.format == Format::Raw => path.metadata().map_err(|e| at(path, &e))?.len(),
            Origin::File(_) => actual_size(from)?,
            Origin::Internal(name) => self.internal_size(from, name)?,
        };
        if whole(record.size) < needed {
            let detail = format!("{what}: the original needs {}, the copy has only {}", Size(needed), record.size);
            return Err(DriverError::permanent("too_small", detail));
        }
        match (origin, from.format, record.format) {
            (Origin::File(path), Format::Raw, Format::Raw) => {
                copy::file(path, temp).map_err(|e| at(temp, &e))?;
            }
            _ => convert(record, from, origin, temp, &what)?,
        }
        self.resize(record, temp, record.size)
    }

    /// Grows the disk in `file` to `size`; never shrinks it.
    pub(crate) fn resize(&self, record: &Record, file: &Path, size: Size) -> DriverResult<()> {
        let wanted = whole(size);
        let is = size_of(file, record.format)?;
        if is >= wanted {
            return Ok(());
        }
        match record.format {
            Format::Directory => Ok(()),
            Format::Raw => {
                self.check_space(record, wanted - is, file)?;
                let grown =
                    File::options().write(true).open(file).and_then(|f| f.set_len(wanted).and_then(|()| f.sync_all()));
                grown.map_err(|e| at(file, &e))
            }
            Format::Qcow2 => {
                if file == record.path {
                    verify(record)?;
                }
                let what = format!("volume {}: growing it", record.id);
                let reads: Vec<&Path> = record.backing.iter().map(|(p, _)| p.as_path()).collect();
                let args = ["resize", "-q", "-f", "qcow2", "--", &name(file), &wanted.to_string()];
                runner(record, file, &reads, &what).run(&args, QUICK)
            }
        }
    }

    /// Refuses at once what could only fail later, with the guest running.
    fn check_space(&self, record: &Record, needed: u64, near: &Path) -> DriverResult<()> {
        let Ok(space) = nix::sys::statvfs::statvfs(near.parent().unwrap_or(&self.dir)) else { return Ok(()) };
        let free = space.blocks_available() * space.fragment_size();
        if needed <= free {
            return Ok(());
        }
        let detail = format!(
            "volume {}: {} are needed, {} are free on the disk of {}; free some or use a smaller size",
            record.id,
            Size(needed),
            Size(free),
            near.parent().unwrap_or(&self.dir).display()
        );
        Err(DriverError::retry("disk_full", detail))
    }
}

/// The size of a disk in whole sectors.
fn whole(size: Size) -> u64 {
    size.0.checked_next_multiple_of(SECTOR_BYTES).unwrap_or(size.0)
}

pub(crate) fn at(path: &Path, error: &io::Error) -> DriverError {
    DriverError::io(&path.display().to_string(), error)
}

/// Where content is made before it gets its name.
pub(crate) fn temporary(path: &Path) -> PathBuf {
    path.with_file_name(format!(".{}.new", name(path)))
}

/// Ids and fixed endings: always UTF-8.
fn name(path: &Path) -> String {
    path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default()
}

fn text(path: &Path) -> DriverResult<&str> {
    let fine = path.to_str().filter(|_| path.is_absolute());
    fine.ok_or_else(|| DriverError::permanent("invalid_path", format!("{} must be absolute and UTF-8", path.display())))
}

pub(crate) fn runner<'a>(record: &Record, file: &'a Path, reads: &'a [&'a Path], what: &'a str) -> Runner<'a> {
    Runner { dir: file.parent().unwrap_or(Path::new("/")), owner: owner_of(file, record), reads, what }
}

/// Who owns a file now: whoever runs the guest may have given it to another user than the one on record.
pub(crate) fn owner_of(file: &Path, record: &Record) -> (u32, u32) {
    file.metadata().map_or(record.owner, |meta| (meta.uid(), meta.gid()))
}

/// An empty file that an unprivileged qemu-img can fill.
fn prepare(temp: &Path, owner: (u32, u32)) -> io::Result<()> {
    use std::os::unix::fs::OpenOptionsExt;
    File::options().write(true).create_new(true).mode(0o600).open(temp)?;
    own(temp, owner)
}

fn own(path: &Path, (uid, gid): (u32, u32)) -> io::Result<()> {
    std::os::unix::fs::lchown(path, Some(uid), Some(gid))
}

/// Gives finished content its owner, mode and name, durably.
fn finish(record: &Record, temp: &Path) -> io::Result<()> {
    let mode = if record.format == Format::Directory { 0o755 } else { 0o600 };
    own(temp, record.owner)?;
    std::fs::set_permissions(temp, std::fs::Permissions::from_mode(mode))?;
    File::open(temp)?.sync_all()?;
    std::fs::rename(temp, &record.path)?;
    record.path.parent().map_or(Ok(()), fsx::sync_dir)
}

/// Removes content, whatever it is.
pub(crate) fn delete(path: &Path) -> io::Result<()> {
    match path.symlink_metadata() {
        Ok(meta) if meta.is_dir() => fsx::remove_dir_if_exists(path),
        Ok(_) => fsx::remove_file_if_exists(path),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(e) => Err(e),
    }
}

/// A volume whose content is gone must not be replaced by an empty one as if nothing had happened.
fn exists(record: &Record) -> DriverResult<()> {
    match record.path.symlink_metadata() {
        Ok(_) => Ok(()),
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            let detail = format!(
                "volume {}: its content {} is gone; restore it or remove the volume",
                record.id,
                record.path.display()
            );
            Err(DriverError::permanent("content_lost", detail))
        }
        Err(e) => Err(at(&record.path, &e)),
    }
}

fn damaged(path: &Path, error: &io::Error) -> DriverError {
    match error.kind() {
        io::ErrorKind::InvalidData => DriverError::permanent("image_damaged", format!("{}: {error}", path.display())),
        io::ErrorKind::NotFound => {
            DriverError::permanent("image_missing", format!("{} does not exist", path.display()))
        }
        _ => at(path, error),
    }
}

fn size_of(path: &Path, format: Format) -> DriverResult<u64> {
    match format {
        Format::Qcow2 => Ok(qcow2::header(path).map_err(|e| damaged(path, &e))?.size),
        Format::Raw | Format::Directory => Ok(path.metadata().map_err(|e| damaged(path, &e))?.len()),
    }
}

fn actual_size(record: &Record) -> DriverResult<u64> {
    size_of(&record.path, record.format)
}

/// The size of an image that stands alone.
fn image_size(image: &Path, format: Format, what: &str) -> DriverResult<u64> {
    if format == Format::Qcow2 {
        let header = qcow2::header(image).map_err(|e| damaged(image, &e))?;
        if header.backing.is_some() || header.external_data {
            let detail = format!("{what}: the image refers to another file; convert it to one that stands alone");
            return Err(DriverError::permanent("image_unsafe", detail));
        }
        return Ok(header.size);
    }
    size_of(image, format).map(|size| size.next_multiple_of(SECTOR_BYTES))
}

/// Refuses a qcow2 file that somebody made point to another file than the one we gave it.
pub(crate) fn verify(record: &Record) -> DriverResult<()> {
    if record.format != Format::Qcow2 {
        return Ok(());
    }
    let header = qcow2::header(&record.path).map_err(|e| damaged(&record.path, &e))?;
    if header.backing.as_deref() == record.backing.as_ref().map(|(path, _)| path.as_path()) && !header.external_data {
        return Ok(());
    }
    let detail =
        format!("volume {}: its disk refers to a file that is not its own and is not touched any more", record.id);
    Err(DriverError::permanent("image_unsafe", detail))
}

/// Refuses when a qemu has the file open: it locks bytes of it.
pub(crate) fn not_in_use(record: &Record) -> DriverResult<()> {
    if record.format == Format::Directory {
        return Ok(());
    }
    let file = File::options().read(true).write(true).open(&record.path).map_err(|e| damaged(&record.path, &e))?;
    // SAFETY: flock is plain data for which zeros are valid.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = libc::F_WRLCK as libc::c_short;
    lock.l_whence = libc::SEEK_SET as libc::c_short;
    lock.l_start = LOCKED_FROM;
    lock.l_len = LOCKED_BYTES;
    // SAFETY: F_OFD_GETLK reads and writes the struct, which outlives the call (fcntl_locking(2)).
    let asked = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_GETLK, &raw mut lock) };
    if asked < 0 {
        return Err(at(&record.path, &io::Error::last_os_error()));
    }
    if i32::from(lock.l_type) == libc::F_UNLCK {
        return Ok(());
    }
    Err(DriverError::retry("volume_in_use", format!("volume {} is in use; stop its instance first", record.id)))
}

/// qemu-img convert as the owner of the original; the copy gets its own owner when it is finished.
fn convert(record: &Record, from: &Record, origin: &Origin, temp: &Path, what: &str) -> DriverResult<()> {
    prepare(temp, owner_of(&from.path, from)).map_err(|e| at(temp, &e))?;
    let (path, snapshot) = match origin {
        Origin::File(path) => (path.as_path(), None),
        Origin::Internal(name) => (from.path.as_path(), Some(format!("snapshot.name={name}"))),
    };
    if path == from.path {
        verify(from)?;
    }
    let (source, target) = (text(path)?, name(temp));
    let mut args = vec!["convert", "-q", "-f", name_of(from.format), "-O", name_of(record.format)];
    args.extend(snapshot.iter().flat_map(|s| ["-l", s.as_str()]));
    args.extend(["--", source, &target]);
    let mut reads = vec![path];
    reads.extend(from.backing.iter().map(|(p, _)| p.as_path()));
    runner(from, temp, &reads, what).run(&args, COPY)
}
