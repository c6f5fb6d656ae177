//! What the driver is told about this node when it is made.

use std::path::PathBuf;

/// First host uid of the range from which each machine gets one of its own.
pub const UID_BASE: u32 = 500_000;
/// How many uids the range has.
pub const UID_COUNT: u32 = 65_536;

/// Settings of [`super::QemuDriver`].
#[derive(Clone, Debug)]
pub struct QemuConfig {
    /// Directory that holds one directory per instance; [`oblak_compute::GuestSpec::dir`] of every guest lies in it.
    pub instances: PathBuf,
    /// Directory for the driver's own state (the cached answer of the KVM probe); made when absent.
    pub state: PathBuf,
    /// Program and leading arguments that run [`super::shim_main`]; `--dir <instance dir>` is added. In the product this is
    /// the binary itself with `shim vm`.
    pub shim_command: Vec<String>,
    /// Emulator; looked for in PATH when it has no slash.
    pub qemu: PathBuf,
    /// qemu-img; looked for in PATH when it has no slash.
    pub qemu_img: PathBuf,
    /// UEFI firmware code, and the template of its variables.
    pub ovmf: (PathBuf, PathBuf),
    /// Name of the cgroup below which every guest gets its own, in each hierarchy.
    pub cgroup_parent: String,
    /// First uid of the range of unprivileged users, and how many there are. Each machine runs as a uid of its own.
    pub uids: (u32, u32),
    /// Accelerator forced by a person (`OBLAK_ACCEL`): `kvm`, `tcg` or empty to find out.
    pub accel: String,
}

impl QemuConfig {
    /// Usual settings for guests below `instances` and state in `state`, with `OBLAK_ACCEL` taken from the environment.
    pub fn new(instances: impl Into<PathBuf>, state: impl Into<PathBuf>, shim_command: Vec<String>) -> Self {
        Self {
            instances: instances.into(),
            state: state.into(),
            shim_command,
            qemu: "qemu-system-x86_64".into(),
            qemu_img: "qemu-img".into(),
            ovmf: ("/usr/share/OVMF/OVMF_CODE_4M.fd".into(), "/usr/share/OVMF/OVMF_VARS_4M.fd".into()),
            cgroup_parent: oblak_compute::shim::cgroup::ROOT.into(),
            uids: (UID_BASE, UID_COUNT),
            accel: std::env::var("OBLAK_ACCEL").unwrap_or_default(),
        }
    }
}

/// Finds a program: as it is when it has a slash, otherwise in PATH and the system directories.
#[must_use]
pub fn find_program(name: &std::path::Path) -> Option<PathBuf> {
    if name.components().count() > 1 {
        return name.is_file().then(|| name.to_path_buf());
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    let system = ["/usr/local/bin", "/usr/bin", "/bin", "/usr/sbin", "/sbin"].map(PathBuf::from);
    std::env::split_paths(&path).chain(system).map(|dir| dir.join(name)).find(|file| file.is_file())
}
