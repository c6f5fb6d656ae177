//! Putting a container's file systems together in the shim's private mount namespace.
//!
//! All of it hangs below one small tmpfs, the stage. A container's root (an unprivileged user of the host) can reach what is
//! bound there whatever the modes of the directories above the originals are, and the stage is gone with the namespace.

use std::fs::File;
use std::io;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::mount::MsFlags;
use oblak_compute::GuestSpec;
use oblak_platform::driver::{DriverError, DriverResult};

use super::{copy, sys, upper};
use crate::bundle::{ID_COUNT, Parts, hosts};
use crate::task::{self, Layering, Root, Task, Warning};

/// Directories of the Filesystem Hierarchy Standard that may serve as the place of the stage.
const PLACES: [&str; 5] = ["/mnt", "/media", "/srv", "/opt", "/tmp"];

/// Condition of a container whose image layers could not be mapped.
const COPIED: &str = "LayersCopied";

/// How long the kernel may take to let go of the writable layer of an earlier run.
const RELEASE: Duration = Duration::from_secs(10);

/// The stage and what stands on it.
#[derive(Debug)]
pub struct Stage {
    /// The tmpfs.
    pub dir: PathBuf,
    /// Facts that the person should see.
    pub warnings: Vec<Warning>,
}

/// The root file system of a container.
#[derive(Debug)]
pub struct Rooted {
    merged: PathBuf,
    /// Its ids are those of the container; none in that of the host.
    userns: Option<File>,
}

/// Host id of root inside.
fn base(spec: &GuestSpec) -> u32 {
    if spec.container.userns_host { 0 } else { spec.container.id_base }
}

fn io_error(context: &str) -> impl Fn(io::Error) -> DriverError {
    move |e| DriverError::io(context, &e)
}

impl Stage {
    /// Mounts an empty stage over a directory that hides none of `needed`.
    pub fn new(needed: &[&Path]) -> DriverResult<Self> {
        let needed: Vec<PathBuf> =
            needed.iter().map(|p| std::fs::canonicalize(p).unwrap_or_else(|_| p.to_path_buf())).collect();
        let usable = |place: &&&str| Path::new(**place).is_dir() && !needed.iter().any(|n| n.starts_with(**place));
        let dir = PLACES.iter().find(usable).map(PathBuf::from).ok_or_else(|| {
            DriverError::permanent(
                "no_stage",
                format!("none of {PLACES:?} is free to put a container together in; keep one of them"),
            )
        })?;
        sys::mount_fs("tmpfs", &dir, MsFlags::MS_NOSUID | MsFlags::MS_NODEV, "mode=0711,size=16m")
            .map_err(io_error("stage"))?;
        Ok(Self { dir, warnings: Vec::new() })
    }

    /// Makes a directory on the stage.
    pub fn make_dir(&self, name: &str) -> DriverResult<PathBuf> {
        let path = self.dir.join(name);
        std::fs::DirBuilder::new().mode(0o755).recursive(true).create(&path).map_err(io_error("stage"))?;
        // The umask of a shim is strict.
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).map_err(io_error("stage"))?;
        Ok(path)
    }

    /// Mounts the root file system of `task`: what can be there before the network is. The ids are those of the user namespace `joined`,
    /// or of one that is made for this. `dir` is the container's directory.
    pub fn root(&mut self, task: &Task, joined: Option<&Path>, dir: &Path) -> DriverResult<Rooted> {
        let root = task::root(&task.spec)?;
        let base = base(&task.spec);
        let userns = match base {
            0 => None,
            base => Some(joined.map_or_else(|| sys::user_namespace(base, ID_COUNT), File::open).map_err(|e| {
                DriverError::unsupported(format!(
                    "user namespaces cannot be used here ({e}); allow them, or ask for userns_host, which gives root inside the rights of root outside"
                ))
            })?),
        };
        let layers = self.layers(&root, userns.as_ref(), base, task.layering, dir)?;
        let writable = upper::prepare(&root, &task.templates, base, &self.make_dir("w")?)?;
        let merged = self.overlay(&layers, &writable, &root, userns.as_ref(), base, dir)?;
        Ok(Rooted { merged, userns })
    }

    /// Mounts everything else that `task` names.
    pub fn rest(&mut self, task: &Task, rooted: Rooted, joined: Option<PathBuf>, dir: &Path) -> DriverResult<Parts> {
        let spec = &task.spec;
        let mut parts = Parts { root: rooted.merged, userns: joined, ..Parts::default() };
        if let Some(netns) = task::netns(spec)? {
            let target = self.make_dir("sys")?;
            let flags = MsFlags::MS_RDONLY | MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
            sys::in_netns(netns, || sys::mount_fs("sysfs", &target, flags, ""))
                .map_err(io_error("network namespace of the instance"))?;
            parts.sys = Some(target);
        }
        self.files(spec, base(spec), dir, &mut parts)?;
        self.volumes(spec, rooted.userns.as_ref(), base(spec), &mut parts)?;
        Ok(parts)
    }

    /// The user namespace that is given, if it has the ids of this container. With others it could not read its own files.
    pub fn joined(&mut self, spec: &GuestSpec) -> DriverResult<Option<PathBuf>> {
        let base = base(spec);
        let Some(path) = task::userns(spec)? else { return Ok(None) };
        let context = io_error("user namespace of the instance's network");
        if sys::maps(path, base, ID_COUNT).map_err(context)? {
            return Ok(Some(path.to_path_buf()));
        }
        self.warnings.push((
            "NoRawSockets".into(),
            "OtherUserIds".into(),
            format!(
                "the network was made for other user ids than {base} and up, so raw sockets (as of ping), and with runc exec, are refused; a new instance has them"
            ),
        ));
        Ok(None)
    }

    /// Makes every layer readable for the container's ids; returns directories for overlayfs, lowest first.
    fn layers(
        &mut self,
        root: &Root<'_>,
        userns: Option<&File>,
        base: u32,
        layering: Layering,
        dir: &Path,
    ) -> DriverResult<Vec<PathBuf>> {
        let Some(userns) = userns else {
            return root
                .layers
                .iter()
                .enumerate()
                .map(|(i, layer)| {
                    let target = self.make_dir(&format!("l{i}"))?;
                    sys::bind(layer, &target).map_err(io_error("image layer"))?;
                    Ok(target)
                })
                .collect();
        };
        let mut out = Vec::new();
        for (i, layer) in root.layers.iter().enumerate() {
            let target = self.make_dir(&format!("l{i}"))?;
            let mapped = match layering {
                Layering::Auto => sys::bind_idmapped(layer, &target, userns, true),
                Layering::Copy => Err(io::Error::from_raw_os_error(libc::EINVAL)),
            };
            match mapped {
                Ok(()) => {}
                Err(e) if is_unsupported(&e) => self.copied(layer, i, base, dir, &target)?,
                Err(e) => return Err(DriverError::io(&format!("image layer {}", layer.display()), &e)),
            }
            out.push(target);
        }
        Ok(out)
    }

    fn copied(&mut self, layer: &Path, i: usize, base: u32, dir: &Path, target: &Path) -> DriverResult<()> {
        let copy = copy::shifted(layer, &dir.join("layers").join(i.to_string()), base)
            .map_err(io_error("chowned copy of an image layer"))?;
        sys::bind(&copy, target).map_err(io_error("image layer"))?;
        self.warnings.push((
            COPIED.into(),
            "NoIdmappedMounts".into(),
            format!("{}: idmapped mounts are not available; the layer was copied", layer.display()),
        ));
        Ok(())
    }

    fn overlay(
        &mut self,
        layers: &[PathBuf],
        writable: &upper::Writable,
        root: &Root<'_>,
        userns: Option<&File>,
        base: u32,
        dir: &Path,
    ) -> DriverResult<PathBuf> {
        let merged = self.make_dir("rootfs")?;
        match self.mount_overlay(layers, writable, &merged) {
            // A kernel before 5.19 makes idmapped mounts but no overlay of them.
            Err(e) if is_unsupported(&e) && userns.is_some() => {
                self.warnings.retain(|(kind, ..)| kind != COPIED);
                for (i, layer) in root.layers.iter().enumerate() {
                    self.copied(layer, i, base, dir, &layers[i])?;
                }
                self.mount_overlay(layers, writable, &merged)
            }
            other => other,
        }
        .map_err(io_error("overlayfs of the image layers"))?;
        Ok(merged)
    }

    /// Names are relative to the stage: the options of mount(2) must fit into one page, however long real paths are.
    fn mount_overlay(&self, layers: &[PathBuf], writable: &upper::Writable, merged: &Path) -> io::Result<()> {
        let short = |p: &Path| p.strip_prefix(&self.dir).unwrap_or(p).to_string_lossy().into_owned();
        let lower: Vec<String> = layers.iter().rev().map(|l| short(l)).collect();
        let data = format!(
            "lowerdir={},upperdir={},workdir={}",
            lower.join(":"),
            short(&writable.upper),
            short(&writable.work)
        );
        if data.len() >= 4096 {
            return Err(io::Error::other(format!("{} layers are too many", layers.len())));
        }
        std::env::set_current_dir(&self.dir)?;
        let end = Instant::now() + RELEASE;
        let result = loop {
            // Device nodes of an image must never work.
            match sys::mount_fs("overlay", merged, MsFlags::MS_NODEV, &data) {
                // The mount of an earlier run ends with the last process of its namespace, a moment after that run.
                Err(e) if e.kind() == io::ErrorKind::ResourceBusy && Instant::now() < end => {
                    std::thread::sleep(Duration::from_millis(2));
                }
                other => break other,
            }
        };
        std::env::set_current_dir("/")?;
        result
    }

    fn files(&self, spec: &GuestSpec, base: u32, dir: &Path, parts: &mut Parts) -> DriverResult<()> {
        let etc = dir.join("etc");
        oblak_platform::fsx::create_dir_private(&etc, 0o700).map_err(io_error("files of the container"))?;
        let texts = [
            ("/etc/resolv.conf", spec.container.resolv_conf.clone()),
            ("/etc/hosts", hosts(spec)),
            ("/etc/hostname", format!("{}\n", spec.hostname)),
        ];
        let stage = self.make_dir("files")?;
        for (destination, text) in texts {
            let name = destination.trim_start_matches("/etc/");
            let (source, target) = (etc.join(name), stage.join(name));
            let write = || -> io::Result<()> {
                std::fs::write(&source, &text)?;
                std::fs::set_permissions(&source, std::fs::Permissions::from_mode(0o644))?;
                chown(&source, Some(base), Some(base))?;
                File::create(&target)?;
                sys::bind(&source, &target)
            };
            write().map_err(io_error(destination))?;
            parts.files.push((target, destination));
        }
        Ok(())
    }

    fn volumes(&mut self, spec: &GuestSpec, userns: Option<&File>, base: u32, parts: &mut Parts) -> DriverResult<()> {
        for (i, disk) in spec.disks.iter().enumerate() {
            let Some(destination) = disk.mount.clone() else { continue };
            if !disk.path.is_dir() {
                return Err(DriverError::unsupported(format!(
                    "disks: volume {} is not a directory; the host never mounts file systems that a guest could have written",
                    disk.volume
                )));
            }
            let target = self.make_dir(&format!("v{i}"))?;
            let context = format!("volume {}", disk.volume);
            match userns {
                None => sys::bind(&disk.path, &target).map_err(io_error(&context))?,
                Some(userns) => match sys::bind_idmapped(&disk.path, &target, userns, disk.read_only) {
                    Err(e) if is_unsupported(&e) => bind_owned(&disk.path, &target, base)?,
                    other => other.map_err(io_error(&context))?,
                },
            }
            parts.volumes.push((target, destination, disk.read_only));
        }
        Ok(())
    }
}

/// Without idmapped mounts a volume belongs to the container that first used it.
fn bind_owned(source: &Path, target: &Path, base: u32) -> DriverResult<()> {
    let context = format!("volume directory {}", source.display());
    let owner = std::os::unix::fs::MetadataExt::uid(&std::fs::metadata(source).map_err(io_error(&context))?);
    let empty = std::fs::read_dir(source).map_err(io_error(&context))?.next().is_none();
    if owner != base && !empty {
        return Err(DriverError::unsupported(format!(
            "{context}: its file system has no idmapped mounts and its files belong to host id {owner}, not to this container's {base}"
        )));
    }
    chown(source, Some(base), Some(base)).map_err(io_error(&context))?;
    sys::bind(source, target).map_err(io_error(&context))
}

fn is_unsupported(e: &io::Error) -> bool {
    matches!(e.raw_os_error(), Some(libc::EINVAL | libc::EOPNOTSUPP | libc::ENOSYS))
        || e.kind() == io::ErrorKind::InvalidInput
}
