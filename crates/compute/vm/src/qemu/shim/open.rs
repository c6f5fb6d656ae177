//! Opening, with the rights of root, everything that the emulator may use but could not open itself.

use std::fs::File;
use std::os::fd::{OwnedFd, RawFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use oblak_compute::Boot;
use oblak_platform::driver::{DriverError, DriverResult};

use crate::qemu::cmdline::{Inputs, OpenDisk};
use crate::qemu::disk;
use crate::qemu::record::{Accel, GuestDir, Record};
use crate::qemu::sandbox::Held;
use crate::qemu::{sock, tap};

/// What the shim keeps of what it opened.
pub struct Opened {
    /// For the command line.
    pub inputs: Inputs,
    /// Descriptors for the emulator.
    pub held: Held,
    /// Files that the emulator sees: (on the host, in its root).
    pub files: Vec<(PathBuf, PathBuf)>,
    /// Our end of the monitor.
    pub monitor: UnixStream,
    /// Our end of the serial port.
    pub serial: UnixStream,
}

/// Opens all of it. With `own_root` the emulator will have a root file system of its own.
///
/// # Errors
/// `disk_missing`, `image_format`, `port_missing`, `firmware_missing`, ... naming the object.
pub fn open(dir: &GuestDir, record: &Record, own_root: bool) -> DriverResult<Opened> {
    let mut held = Held::default();
    let mut files = Vec::new();
    let (monitor, theirs) = pair()?;
    let monitor_fd = keep(&mut held, theirs)?;
    let (serial, theirs) = pair()?;
    let serial_fd = keep(&mut held, theirs)?;
    let qmp = sock::listen(&dir.qmp_socket()).map_err(|e| DriverError::io("monitor socket", &e))?;
    let agent = sock::listen(&dir.agent_socket()).map_err(|e| DriverError::io("guest agent socket", &e))?;
    let mut inputs = Inputs {
        monitor: monitor_fd,
        serial: serial_fd,
        qmp: keep(&mut held, qmp)?,
        agent: keep(&mut held, agent)?,
        ..Inputs::default()
    };
    open_boot(dir, record, own_root, &mut inputs, &mut held, &mut files)?;
    if let Some(seed) = &record.spec.seed {
        inputs.seed = Some(keep(&mut held, open_file(seed, true)?)?);
    }
    for volume in &record.spec.disks {
        let disk = open_disk(&mut held, &volume.path, volume.format, volume.read_only)?;
        inputs.disks.push((volume.volume, disk));
    }
    for nic in &record.spec.nics {
        let device = keep(&mut held, tap::open(&nic.attach)?)?;
        let vhost = if record.accel == Accel::Kvm { tap::open_vhost() } else { None };
        let vhost = vhost.map(|file| keep(&mut held, file)).transpose()?;
        inputs.nics.push((device, vhost));
    }
    Ok(Opened { inputs, held, files, monitor, serial })
}

fn open_boot(
    dir: &GuestDir,
    record: &Record,
    own_root: bool,
    inputs: &mut Inputs,
    held: &mut Held,
    files: &mut Vec<(PathBuf, PathBuf)>,
) -> DriverResult<()> {
    let mut show = |path: &Path, name: &str| -> DriverResult<PathBuf> {
        let readable = readable_copy(path, &dir.path().join(format!("boot-{name}")), record.uid)?;
        if !own_root {
            return Ok(readable);
        }
        let inside = PathBuf::from("/guest").join(name);
        files.push((readable, inside.clone()));
        Ok(inside)
    };
    match &record.spec.boot {
        Boot::Disk { root, format, .. } => inputs.root = Some(open_disk(held, root, *format, false)?),
        Boot::Kernel { kernel, initrd, root, format, .. } => {
            let initrd = initrd.as_deref().map(|path| show(path, "initrd")).transpose()?;
            inputs.kernel = Some((show(kernel, "kernel")?, initrd));
            if let Some(root) = root {
                inputs.root = Some(open_disk(held, root, *format, false)?);
            }
        }
        Boot::Oci { .. } => {
            return Err(DriverError::unsupported("a machine cannot boot a container image; use isolation container"));
        }
    }
    if let Some(code) = &record.firmware {
        if !code.starts_with("/usr") {
            files.push((code.clone(), code.clone()));
        }
        inputs.vars = Some(keep(held, open_file(&dir.vars(), false)?)?);
    }
    Ok(())
}

/// The emulator opens kernel and initrd by path, as its own user. A file that others may not read is copied for it.
fn readable_copy(path: &Path, copy: &Path, uid: u32) -> DriverResult<PathBuf> {
    let context = |e: &std::io::Error| match e.kind() {
        std::io::ErrorKind::NotFound => {
            DriverError::permanent("kernel_missing", format!("{} does not exist", path.display()))
        }
        _ => DriverError::io(&format!("cannot read {}", path.display()), e),
    };
    let meta = std::fs::metadata(path).map_err(|e| context(&e))?;
    if meta.mode() & 0o004 != 0 {
        return Ok(path.to_path_buf());
    }
    std::fs::copy(path, copy).map_err(|e| context(&e))?;
    std::fs::set_permissions(copy, std::fs::Permissions::from_mode(0o400)).map_err(|e| context(&e))?;
    std::os::unix::fs::chown(copy, Some(uid), None).map_err(|e| context(&e))?;
    Ok(copy.to_path_buf())
}

fn open_disk(
    held: &mut Held,
    path: &Path,
    format: oblak_compute::DiskFormat,
    read_only: bool,
) -> DriverResult<OpenDisk> {
    let mut links = Vec::new();
    for (depth, link) in disk::chain(path, format)?.into_iter().enumerate() {
        let file = open_file(&link.path, depth > 0 || read_only)?;
        links.push((link, keep(held, file)?));
    }
    Ok(OpenDisk { links, read_only })
}

/// Opens a disk's file.
///
/// # Errors
/// `disk_missing`, `disk_read_only`, I/O errors.
pub fn open_file(path: &Path, read_only: bool) -> DriverResult<File> {
    File::options().read(true).write(!read_only).custom_flags(libc::O_CLOEXEC).open(path).map_err(|e| {
        match e.raw_os_error() {
            Some(libc::ENOENT) => {
                DriverError::permanent("disk_missing", format!("disk {} does not exist", path.display()))
            }
            Some(libc::EROFS | libc::EACCES | libc::EPERM) => DriverError::permanent(
                "disk_read_only",
                format!("disk {} cannot be opened for writing: {e}", path.display()),
            ),
            _ => DriverError::io(&format!("cannot open disk {}", path.display()), &e),
        }
    })
}

fn pair() -> DriverResult<(UnixStream, UnixStream)> {
    UnixStream::pair().map_err(|e| DriverError::io("socket pair", &e))
}

fn keep(held: &mut Held, fd: impl Into<OwnedFd>) -> DriverResult<RawFd> {
    held.keep(fd).map_err(|e| DriverError::io("descriptor", &e))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_private_kernel_is_copied_and_a_public_one_is_used_where_it_is() {
        let temp = tempfile::tempdir().unwrap();
        let (kernel, copy) = (temp.path().join("vmlinuz"), temp.path().join("boot-kernel"));
        let me = nix::unistd::geteuid().as_raw();
        std::fs::write(&kernel, "first").unwrap();
        std::fs::set_permissions(&kernel, std::fs::Permissions::from_mode(0o600)).unwrap();
        assert_eq!(readable_copy(&kernel, &copy, me).unwrap(), copy);
        std::fs::write(&kernel, "second, after an upgrade").unwrap();
        assert_eq!(readable_copy(&kernel, &copy, me).unwrap(), copy);
        assert_eq!(std::fs::read_to_string(&copy).unwrap(), "second, after an upgrade");
        assert_eq!(std::fs::metadata(&copy).unwrap().mode() & 0o777, 0o400);
        std::fs::set_permissions(&kernel, std::fs::Permissions::from_mode(0o644)).unwrap();
        assert_eq!(readable_copy(&kernel, &copy, me).unwrap(), kernel);
        assert_eq!(readable_copy(&temp.path().join("none"), &copy, me).unwrap_err().code, "kernel_missing");
    }
}
