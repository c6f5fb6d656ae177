//! From a spec to a record: checking what is asked for and deciding what the machine will be.

use std::collections::BTreeMap;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use oblak_compute::{Boot, Firmware, GuestSpec, NicAttach};
use oblak_model::{Isolation, Size};
use oblak_platform::driver::{DriverError, DriverResult};

use super::cmdline::{MAX_NICS, MAX_PORTS, MAX_VCPUS, max_vcpus, ports_for};
use super::config::QemuConfig;
use super::disk;
use super::probe::Emulator;
use super::record::{self, Accel, GuestDir, Record, SCHEMA};

/// Least memory of a machine: below it no firmware finishes.
const MIN_MEMORY: Size = Size::mib(32);

/// Refuses what cannot work, naming what to change.
///
/// # Errors
/// `bad_spec`, `unsupported`, `not_root`, `firmware_missing`, `disk_missing`, `image_format`, `kernel_missing`.
pub fn check(config: &QemuConfig, spec: &GuestSpec) -> DriverResult<()> {
    if spec.isolation != Isolation::Vm {
        return Err(DriverError::unsupported(format!(
            "the qemu driver runs isolation vm, not {}",
            spec.isolation.as_str()
        )));
    }
    if !nix::unistd::geteuid().is_root() {
        return Err(DriverError::permanent(
            "not_root",
            "machines need an agent that runs as root: taps, cgroups and user ids",
        ));
    }
    if spec.dir != config.instances.join(spec.id.to_string()) {
        let want = config.instances.join(spec.id.to_string());
        return Err(bad(format!(
            "the directory of machine {} must be {}, not {}",
            spec.id,
            want.display(),
            spec.dir.display()
        )));
    }
    if spec.memory < MIN_MEMORY {
        return Err(bad(format!(
            "{} of memory is too little for a machine; give it at least {MIN_MEMORY}",
            spec.memory
        )));
    }
    if record::vcpus(spec.vcpus_milli) > MAX_VCPUS {
        return Err(bad(format!("a machine has at most {MAX_VCPUS} vCPUs")));
    }
    if spec.nics.len() > MAX_NICS {
        return Err(bad(format!("a machine has at most {MAX_NICS} network interfaces, not {}", spec.nics.len())));
    }
    if spec.disks.len() > usize::from(MAX_PORTS) {
        return Err(bad(format!("a machine has at most {MAX_PORTS} volumes, not {}", spec.disks.len())));
    }
    if let Some(nic) = spec.nics.iter().find(|n| !matches!(n.attach, NicAttach::Tap { .. })) {
        return Err(bad(format!("port {} was made for a container; a machine needs a tap", nic.port)));
    }
    check_boot(config, spec)
}

fn bad(detail: String) -> DriverError {
    DriverError::permanent("bad_spec", detail)
}

fn check_boot(config: &QemuConfig, spec: &GuestSpec) -> DriverResult<()> {
    match &spec.boot {
        Boot::Disk { root, format, firmware } => {
            disk::chain(root, *format)?;
            if *firmware == Firmware::Uefi {
                for file in [&config.ovmf.0, &config.ovmf.1] {
                    exists(file, "firmware_missing", "UEFI firmware", "; run `apt install ovmf` or use BIOS firmware")?;
                }
            }
        }
        Boot::Kernel { kernel, initrd, root, format, .. } => {
            exists(kernel, "kernel_missing", "kernel", "")?;
            if let Some(initrd) = initrd {
                exists(initrd, "kernel_missing", "initrd", "")?;
            }
            if let Some(root) = root {
                disk::chain(root, *format)?;
            }
        }
        Boot::Oci { .. } => {
            return Err(DriverError::unsupported("a machine cannot boot a container image; use isolation container"));
        }
    }
    if let Some(seed) = &spec.seed {
        exists(seed, "disk_missing", "seed image", "")?;
    }
    for volume in &spec.disks {
        disk::chain(&volume.path, volume.format)?;
    }
    Ok(())
}

fn exists(path: &Path, code: &str, what: &str, help: &str) -> DriverResult<()> {
    if path.is_file() {
        return Ok(());
    }
    Err(DriverError::permanent(code, format!("{what} {} does not exist{help}", path.display())))
}

/// The cgroup of a machine, known without its record so that `remove` works with a damaged one.
#[must_use]
pub fn cgroup_of(config: &QemuConfig, id: oblak_model::InstanceId) -> String {
    oblak_compute::shim::cgroup::name_of(&config.cgroup_parent, &format!("vm-{id}"), &config.instances)
}

/// The record of a fresh boot.
#[must_use]
pub fn plan(config: &QemuConfig, spec: &GuestSpec, emulator: &Emulator, accel: Accel, uid: u32) -> Record {
    let slots: BTreeMap<_, _> = spec.disks.iter().map(|d| d.volume).zip(0u8..).collect();
    let firmware: Option<PathBuf> =
        matches!(spec.boot, Boot::Disk { firmware: Firmware::Uefi, .. }).then(|| config.ovmf.0.clone());
    Record {
        schema: SCHEMA,
        spec: spec.clone(),
        uid,
        qemu: emulator.program.clone(),
        accel,
        machine: emulator.machine.clone(),
        max_vcpus: max_vcpus(record::vcpus(spec.vcpus_milli)),
        firmware,
        cgroup: cgroup_of(config, spec.id),
        ports: ports_for(spec.disks.len()),
        slots,
        load: None,
        incoming: false,
        resized: false,
    }
}

/// Makes the machine's own copy of the UEFI variables if it has none.
///
/// # Errors
/// Any I/O error.
pub fn prepare_vars(config: &QemuConfig, dir: &GuestDir) -> DriverResult<()> {
    let vars = dir.vars();
    if vars.exists() {
        return Ok(());
    }
    let temp = dir.path().join(".vars.fd.tmp");
    let work = || -> std::io::Result<()> {
        let mut from = std::fs::File::open(&config.ovmf.1)?;
        let mut to = std::fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&temp)?;
        std::io::copy(&mut from, &mut to)?;
        to.sync_all()?;
        std::fs::rename(&temp, &vars)
    };
    work().map_err(|e| DriverError::io("cannot copy the UEFI variables", &e))
}
