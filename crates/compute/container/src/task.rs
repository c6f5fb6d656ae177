//! What the driver hands to the shim, and names that both use.

use std::path::{Path, PathBuf};

use oblak_compute::shim::cgroup::{self, Cgroups, Group};
use oblak_compute::{Boot, GuestSpec, NicAttach};
use oblak_model::{InstanceId, Isolation, Size};
use oblak_platform::driver::{DriverError, DriverResult};
use serde::{Deserialize, Serialize};

/// File with the [`Task`] in the container's directory.
pub const TASK: &str = "task.json";
/// File with [`Warning`]s of the last start.
pub const WARNINGS: &str = "warnings.json";

/// A fact worth a condition: type, reason, message.
pub type Warning = (String, String, String);

/// How layers become readable for the ids of a container.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Layering {
    /// Idmapped mounts where kernel and file system allow, otherwise chowned copies.
    #[default]
    Auto,
    /// Chowned copies always.
    Copy,
}

/// `task.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Task {
    /// What to run.
    pub spec: GuestSpec,
    /// Only find out whether the runtime works: run the host's `true` in a container like this and end.
    #[serde(default)]
    pub probe: bool,
    /// The OCI runtime's executable.
    pub runtime: PathBuf,
    /// Its name, for people.
    pub runtime_name: String,
    /// See [`Layering`].
    #[serde(default)]
    pub layering: Layering,
    /// Where empty file systems are kept as templates of writable layers.
    #[serde(default)]
    pub templates: PathBuf,
    /// Bytes per part of the log.
    pub log_part_bytes: u64,
    /// Parts of the log.
    pub log_parts: usize,
}

impl Task {
    /// What of it is known before the network is there.
    #[must_use]
    pub fn draft(mut self) -> Self {
        self.spec.nics.clear();
        self.spec.container.resolv_conf.clear();
        self
    }
}

/// The boot source of a container.
#[derive(Clone, Copy, Debug)]
pub struct Root<'a> {
    /// Lowest first.
    pub layers: &'a [PathBuf],
    /// Where the writable layer lives.
    pub upper: &'a Path,
    /// Its limit, zero for none.
    pub upper_size: Size,
}

/// The boot source, if it is one for containers.
pub fn root(spec: &GuestSpec) -> DriverResult<Root<'_>> {
    match &spec.boot {
        Boot::Oci { layers, upper, upper_size } => Ok(Root { layers, upper, upper_size: *upper_size }),
        _ => Err(DriverError::permanent(
            "not_an_oci_image",
            "boot: a container needs an OCI image, not a disk or a kernel",
        )),
    }
}

/// The network namespace that all interfaces share and the user namespace that owns it, if that is known.
type Joined<'a> = (&'a Path, Option<&'a Path>);

/// The network namespace that all interfaces share; none without interfaces.
pub fn netns(spec: &GuestSpec) -> DriverResult<Option<&Path>> {
    Ok(joined(spec)?.map(|(netns, _)| netns))
}

/// The user namespace to run in; none: one of its own, or the host's when that was asked for.
pub fn userns(spec: &GuestSpec) -> DriverResult<Option<&Path>> {
    Ok(joined(spec)?.and_then(|(_, userns)| userns).filter(|_| !spec.container.userns_host))
}

fn joined(spec: &GuestSpec) -> DriverResult<Option<Joined<'_>>> {
    let mut found: Option<Joined<'_>> = None;
    for nic in &spec.nics {
        let NicAttach::Netns { netns, userns } = &nic.attach else {
            return Err(DriverError::permanent(
                "bad_nic",
                format!("nics: port {} is a tap; a container needs a network namespace", nic.port),
            ));
        };
        if found.is_some_and(|(other, _)| other != netns) {
            return Err(DriverError::permanent(
                "bad_nic",
                "nics: all interfaces of a container share one network namespace",
            ));
        }
        let userns = userns.as_deref().or(found.and_then(|(_, userns)| userns));
        found = Some((netns, userns));
    }
    Ok(found)
}

/// Refuses what can never run, naming the field.
pub fn check(spec: &GuestSpec) -> DriverResult<()> {
    let bad = |code: &str, text: String| Err(DriverError::permanent(code, text));
    if spec.isolation != Isolation::Container {
        return Err(DriverError::unsupported(format!(
            "isolation: this driver runs containers, not {:?}",
            spec.isolation
        )));
    }
    let root = root(spec)?;
    if root.layers.is_empty() {
        return bad("no_layers", "boot.layers: the image has no layers".into());
    }
    let options = &spec.container;
    if options.argv.first().is_none_or(String::is_empty) {
        return bad("no_command", "container.argv: neither the image nor the instance names a program to run".into());
    }
    if !options.cwd.is_empty() && !options.cwd.starts_with('/') {
        return bad("bad_cwd", format!("container.cwd: {:?} is not an absolute path", options.cwd));
    }
    if !options.userns_host && options.id_base == 0 {
        return bad(
            "no_id_base",
            "container.id_base: no range of host ids was assigned; only userns_host may run without".into(),
        );
    }
    if !(0..=64).contains(&options.stop_signal) {
        return bad("bad_signal", format!("container.stop_signal: {} is not a signal number", options.stop_signal));
    }
    if let Some(name) = options.env.keys().find(|n| n.is_empty() || n.contains(['=', '\0'])) {
        return bad("bad_env", format!("container.env: {name:?} is not the name of a variable"));
    }
    for disk in &spec.disks {
        let Some(mount) = &disk.mount else {
            return bad(
                "no_mount",
                format!("disks: volume {} has no place to be mounted at in the container", disk.volume),
            );
        };
        let climbs = Path::new(mount).components().any(|c| c == std::path::Component::ParentDir);
        if !mount.starts_with('/') || mount == "/" || climbs {
            return bad(
                "bad_mount",
                format!("disks: {mount:?} is not a usable mount point; write an absolute path below /"),
            );
        }
    }
    netns(spec)?;
    crate::security::capabilities(options).map(drop)
}

/// Everything of the guest: its runtime processes and its container.
pub fn group(cgroups: &Cgroups, id: InstanceId, instances: &Path) -> Group {
    // As an earlier version called it; a container that it started may still run.
    let old = cgroups.group(&format!("{}/{id}", cgroup::ROOT));
    if old.exists() { old } else { cgroups.group(&cgroup::name_of(cgroup::ROOT, &id.to_string(), instances)) }
}

/// The directory that holds the instances, from that of one.
pub fn instances_of(instance: &Path) -> &Path {
    instance.parent().unwrap_or(instance)
}

/// Name of the group, below [`group`], that holds the container itself.
pub const CONTAINER_GROUP: &str = "c";
/// Name of the group, below [`group`], in which the runtime is executed.
pub const RUNTIME_GROUP: &str = "rt";

/// Directory of the driver within the instance's directory.
pub fn container_dir(instance_dir: &Path) -> PathBuf {
    instance_dir.join("container")
}
