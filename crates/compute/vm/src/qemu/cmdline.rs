//! The emulator's command line: a pure function of the record and of the descriptors that the shim opened.
//!
//! # What a guest sees
//! SMBIOS says product `OpenStack Nova`, serial number = id of the instance, manufacturer `Oblak`. cloud-init's ds-identify
//! (22.4 in Debian 12) enables the OpenStack source by that product name, and NoCloud by the seed's volume label `CIDATA`.
//! Debian lists NoCloud first, so a seed wins over the metadata service when both are there.
//!
//! # Where devices sit
//! Addresses on bus pcie.0 are fixed, so that a machine keeps its device names over restarts and a snapshot of memory finds
//! the same machine: 1 screen, 2 root disk, 3 seed, 4 serial ports, 5 balloon, 6 random numbers, 8-15 network interfaces,
//! 16-18 ports for volumes (eight functions each). 31 belongs to the chipset.

use std::os::fd::RawFd;
use std::path::PathBuf;

use oblak_compute::{Boot, DiskFormat, GuestSpec};
use oblak_model::VolumeId;
use serde_json::{Value, json};

use super::disk::Link;
use super::record::{Accel, Record};

/// Most network interfaces of a machine.
pub const MAX_NICS: usize = 8;
/// Most ports for volumes.
pub const MAX_PORTS: u8 = 24;
/// Ports that are free at the start.
pub const SPARE_PORTS: u8 = 8;
/// Most vCPUs of a q35 machine with plain APIC ids (QEMU 7.2: 288, above 255 an IOMMU is needed).
pub const MAX_VCPUS: u32 = 255;

const FIRST_NIC: usize = 8;
const FIRST_PORT: u8 = 16;

/// An image with an open descriptor for each of its files.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct OpenDisk {
    /// The writable image first, then its backing files.
    pub links: Vec<(Link, RawFd)>,
    /// Whether the guest may not write.
    pub read_only: bool,
}

/// Descriptors and paths as the emulator has them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Inputs {
    /// Connected monitor of the shim.
    pub monitor: RawFd,
    /// Listening monitor for the driver.
    pub qmp: RawFd,
    /// Listening socket of the guest agent's port.
    pub agent: RawFd,
    /// Connected end of the serial port.
    pub serial: RawFd,
    /// Kernel and initrd as paths that the emulator can open.
    pub kernel: Option<(PathBuf, Option<PathBuf>)>,
    /// Root disk.
    pub root: Option<OpenDisk>,
    /// Seed image.
    pub seed: Option<RawFd>,
    /// Volumes.
    pub disks: Vec<(VolumeId, OpenDisk)>,
    /// UEFI variables.
    pub vars: Option<RawFd>,
    /// Network interfaces: tap, and vhost-net where it is used.
    pub nics: Vec<(RawFd, Option<RawFd>)>,
}

/// Name of a volume's device in the emulator.
#[must_use]
pub fn device_id(volume: VolumeId) -> String {
    format!("vol-{volume}")
}

/// The volume of a device name, if it is one.
#[must_use]
pub fn volume_of_device(id: &str) -> Option<VolumeId> {
    id.strip_prefix("vol-")?.parse().ok()
}

/// Block node of a volume. Node names have at most 31 characters; the first two digits of the id are left out, which are the
/// slowest part of a time.
#[must_use]
pub fn node_name(volume: VolumeId) -> String {
    format!("v{}", &volume.0.simple().to_string()[2..])
}

/// Name of a port for volumes.
#[must_use]
pub fn port_id(port: u8) -> String {
    format!("port{port}")
}

/// How many ports a machine with this many volumes gets.
#[must_use]
pub fn ports_for(volumes: usize) -> u8 {
    u8::try_from(volumes).unwrap_or(MAX_PORTS).saturating_add(SPARE_PORTS).min(MAX_PORTS)
}

/// Most vCPUs that a running machine can grow to.
#[must_use]
pub fn max_vcpus(vcpus: u32) -> u32 {
    (vcpus * 2).clamp(4, MAX_VCPUS).max(vcpus)
}

/// Size of the buffer for translated code in MiB. qemu's default of 1 GiB would cost more than the guest.
fn translation_mib(record: &Record) -> u64 {
    (record.spec.memory.as_mib_ceil() / 4).clamp(64, 512)
}

/// Memory that the emulator may need beyond the guest's, in bytes: its code and heap, qcow2 caches of each disk (32 MiB at
/// most each), video memory, translated code.
#[must_use]
pub fn overhead_bytes(record: &Record) -> u64 {
    let disks = record.spec.disks.len() as u64 + u64::from(SPARE_PORTS);
    let translated = if record.accel == Accel::Tcg { translation_mib(record) } else { 0 };
    (192 + 16 * disks + translated + record.spec.memory.as_mib_ceil() / 64) << 20
}

/// All arguments after the program.
#[must_use]
pub fn arguments(record: &Record, inputs: &Inputs) -> Vec<String> {
    let mut line = Line::default();
    base(&mut line, record, inputs);
    identity(&mut line, &record.spec);
    channels(&mut line, inputs);
    boot(&mut line, record, inputs);
    disks(&mut line, record, inputs);
    nics(&mut line, &record.spec, inputs);
    line.0
}

#[derive(Default)]
struct Line(Vec<String>);

impl Line {
    fn flag(&mut self, name: &str) {
        self.0.push(name.into());
    }
    fn option(&mut self, name: &str, value: impl Into<String>) {
        self.0.push(name.into());
        self.0.push(value.into());
    }
    fn json(&mut self, name: &str, value: &Value) {
        self.option(name, value.to_string());
    }
    fn device(&mut self, value: &Value) {
        self.json("-device", value);
    }
}

/// In `key=value,` lists a comma is written twice.
fn escape(text: &str) -> String {
    text.replace(',', ",,")
}

fn base(line: &mut Line, record: &Record, inputs: &Inputs) {
    let spec = &record.spec;
    line.option("-name", format!("guest={},debug-threads=on", escape(&spec.name)));
    line.flag("-no-user-config");
    line.flag("-nodefaults");
    line.option("-display", "none");
    // S: wait for the shim, which either loads a snapshot or lets it run.
    line.flag("-S");
    if record.incoming {
        line.option("-incoming", "defer");
    }
    let mut machine =
        format!("{},usb=off,smm=off,vmport=off,dump-guest-core=off,mem-merge=off,memory-backend=ram", record.machine);
    match record.accel {
        Accel::Kvm => {
            machine += ",kernel-irqchip=on,hpet=off";
            line.option("-accel", "kvm");
            line.option("-cpu", "host,migratable=on");
        }
        Accel::Tcg => {
            line.option("-accel", format!("tcg,thread=multi,tb-size={}", translation_mib(record)));
            line.option("-cpu", "max");
        }
    }
    if inputs.vars.is_some() {
        machine += ",pflash0=firmware,pflash1=vars";
    }
    line.option("-machine", machine);
    let vcpus = record.vcpus();
    line.option(
        "-smp",
        format!("cpus={vcpus},sockets=1,cores={max},threads=1,maxcpus={max}", max = record.max_vcpus.max(vcpus)),
    );
    let memory = spec.memory.as_mib_ceil();
    line.option("-m", format!("size={memory}M"));
    line.json("-object", &json!({"qom-type": "memory-backend-ram", "id": "ram", "size": memory << 20}));
    line.option("-rtc", "base=utc,clock=host,driftfix=slew");
    line.option("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny");
    // A panic is reported and left to the guest, which usually reboots by itself.
    line.option("-action", "reboot=reset,shutdown=poweroff,panic=none");
    line.option("-global", "ICH9-LPC.disable_s3=1");
    line.option("-global", "ICH9-LPC.disable_s4=1");
}

fn identity(line: &mut Line, spec: &GuestSpec) {
    let id = spec.id;
    line.option("-uuid", id.to_string());
    line.option(
        "-smbios",
        format!("type=1,manufacturer=Oblak,product=OpenStack Nova,serial={id},uuid={id},family=Virtual Machine"),
    );
    line.option("-smbios", format!("type=3,manufacturer=Oblak,serial={id}"));
}

fn channels(line: &mut Line, inputs: &Inputs) {
    line.option("-chardev", format!("socket,id=monitor0,fd={}", inputs.monitor));
    line.option("-mon", "chardev=monitor0,mode=control");
    line.option("-chardev", format!("socket,id=monitor1,fd={},server=on,wait=off", inputs.qmp));
    line.option("-mon", "chardev=monitor1,mode=control");
    line.option("-chardev", format!("socket,id=serial0,fd={}", inputs.serial));
    line.device(&json!({"driver": "isa-serial", "chardev": "serial0", "index": 0}));
    line.device(&json!({"driver": "pvpanic"}));
    // The screen has no listening socket: a viewer's connection is handed over through the monitor.
    line.option("-vnc", "none");
    line.device(&json!({"driver": "VGA", "id": "screen", "bus": "pcie.0", "addr": "0x1", "vgamem_mb": 8}));
    line.device(&virtio("virtio-serial-pci", "serial-ports", 4));
    line.option("-chardev", format!("socket,id=agent0,fd={},server=on,wait=off", inputs.agent));
    line.device(&json!({"driver": "virtserialport", "bus": "serial-ports.0", "nr": 1, "chardev": "agent0", "name": "org.qemu.guest_agent.0"}));
}

fn virtio(driver: &str, id: &str, slot: usize) -> Value {
    json!({"driver": driver, "id": id, "bus": "pcie.0", "addr": format!("{slot:#x}"), "disable-legacy": "on"})
}

fn boot(line: &mut Line, record: &Record, inputs: &Inputs) {
    let mut balloon = virtio("virtio-balloon-pci", "balloon", 5);
    balloon["deflate-on-oom"] = json!(true);
    // Under translation telling about free pages costs more than the pages.
    balloon["free-page-reporting"] = json!(record.accel == Accel::Kvm);
    line.device(&balloon);
    line.json("-object", &json!({"qom-type": "rng-builtin", "id": "random0"}));
    let mut random = virtio("virtio-rng-pci", "random", 6);
    random["rng"] = json!("random0");
    line.device(&random);
    line.option("-boot", "menu=off,strict=on");
    if let (Some(code), Some(vars)) = (&record.firmware, inputs.vars) {
        let code = json!({"driver": "raw", "node-name": "firmware", "read-only": true,
            "file": {"driver": "file", "filename": code, "auto-read-only": true}});
        line.json("-blockdev", &code);
        add_fd(line, vars, "vars");
        line.json("-blockdev", &json!({"driver": "raw", "node-name": "vars", "file": file_node(vars, false, "file")}));
    }
    if let (Boot::Kernel { cmdline, .. }, Some((kernel, initrd))) = (&record.spec.boot, &inputs.kernel) {
        line.option("-kernel", kernel.display().to_string());
        if let Some(initrd) = initrd {
            line.option("-initrd", initrd.display().to_string());
        }
        line.option("-append", cmdline.clone());
    }
}

/// Sets are numbered by the descriptor at the start and by the emulator later; the word beside them says whose they are.
fn add_fd(line: &mut Line, fd: RawFd, owner: &str) {
    line.option("-add-fd", format!("fd={fd},set={fd},opaque={owner}"));
}

fn file_node(set: i32, read_only: bool, driver: &str) -> Value {
    json!({"driver": driver, "filename": format!("/dev/fdset/{set}"), "read-only": read_only, "discard": "unmap"})
}

/// Definitions of the block nodes of one image, in the order in which they must be added: deepest backing file first. `sets`
/// are the numbers of the descriptor sets, in the order of `links`. The last node is called `name`.
#[must_use]
pub fn block_nodes(name: &str, links: &[(Link, i32)], read_only: bool) -> Vec<Value> {
    let mut nodes = Vec::new();
    for (depth, (link, set)) in links.iter().enumerate().rev() {
        let writable = depth == 0 && !read_only;
        let driver = if link.block_device { "host_device" } else { "file" };
        let format = match link.format {
            DiskFormat::Qcow2 => "qcow2",
            DiskFormat::Raw => "raw",
        };
        let mut node = json!({
            "driver": format,
            "node-name": depth_name(name, depth),
            "read-only": !writable,
            "file": file_node(*set, !writable, driver),
        });
        if writable {
            node["discard"] = json!("unmap");
        }
        if link.format == DiskFormat::Qcow2 {
            // Never what the header says: what is open here, or nothing.
            node["backing"] = if depth + 1 < links.len() { json!(depth_name(name, depth + 1)) } else { Value::Null };
        }
        nodes.push(node);
    }
    nodes
}

/// The nodes of a machine that may be started elsewhere do not lock their files: a lock that a lost node holds on a shared file system would
/// keep the machine from starting, and who may write is decided by the lease of the node and the volume's epoch.
#[must_use]
pub fn lock_as_needed(mut node: Value, fenced: bool) -> Value {
    if fenced && let Some(file) = node.get_mut("file") {
        merge(file, &json!({"locking": "off"}));
    }
    node
}

/// Names of the nodes that [`block_nodes`] makes, in the order in which they must be removed.
#[must_use]
pub fn block_node_names(name: &str, links: usize) -> Vec<String> {
    (0..links).map(|depth| depth_name(name, depth)).collect()
}

fn depth_name(name: &str, depth: usize) -> String {
    if depth == 0 {
        return name.to_string();
    }
    // One letter in front keeps the name within 31 characters: a for the first backing file, b for the next, ...
    let letter = char::from(b'a' + u8::try_from(depth - 1).unwrap_or(25).min(25));
    format!("{letter}{}", name.get(1..).unwrap_or(name))
}

/// The device of a volume, for the command line and for plugging in.
#[must_use]
pub fn volume_device(volume: VolumeId, port: u8, vcpus: u32) -> Value {
    json!({
        "driver": "virtio-blk-pci",
        "id": device_id(volume),
        "bus": port_id(port),
        "drive": node_name(volume),
        "serial": volume.short(),
        "num-queues": vcpus.min(4),
        // A full disk freezes the machine until there is space again; other errors go to the guest, which knows best.
        "werror": "enospc",
        "rerror": "report",
    })
}

fn disks(line: &mut Line, record: &Record, inputs: &Inputs) {
    for port in 0..record.ports {
        let slot = FIRST_PORT + port / 8;
        line.device(&json!({
            "driver": "pcie-root-port", "id": port_id(port), "bus": "pcie.0", "addr": format!("{slot:#x}.{:x}", port % 8),
            "chassis": port + 1, "multifunction": port % 8 == 0,
        }));
    }
    let queues = record.vcpus().min(4);
    let fenced = record.spec.fence.is_some();
    if let Some(root) = &inputs.root {
        add_disk(line, "root", root, fenced);
        let mut device = virtio("virtio-blk-pci", "root-disk", 2);
        let more = json!({"drive": "root", "serial": "root", "bootindex": 1, "num-queues": queues, "werror": "enospc", "rerror": "report"});
        merge(&mut device, &more);
        line.device(&device);
    }
    if let Some(seed) = inputs.seed {
        add_fd(line, seed, "seed");
        line.json(
            "-blockdev",
            &json!({"driver": "raw", "node-name": "seed", "read-only": true, "file": file_node(seed, true, "file")}),
        );
        let mut device = virtio("virtio-blk-pci", "seed-disk", 3);
        merge(&mut device, &json!({"drive": "seed", "serial": "cidata", "num-queues": 1}));
        line.device(&device);
    }
    for (volume, disk) in &inputs.disks {
        add_disk(line, &node_name(*volume), disk, fenced);
        let port = record.slots.get(volume).copied().unwrap_or_default();
        line.device(&volume_device(*volume, port, record.vcpus()));
    }
}

fn add_disk(line: &mut Line, name: &str, disk: &OpenDisk, fenced: bool) {
    for (_, fd) in &disk.links {
        add_fd(line, *fd, name);
    }
    for node in block_nodes(name, &disk.links, disk.read_only) {
        line.json("-blockdev", &lock_as_needed(node, fenced));
    }
}

fn merge(into: &mut Value, more: &Value) {
    if let (Some(into), Some(more)) = (into.as_object_mut(), more.as_object()) {
        into.extend(more.iter().map(|(k, v)| (k.clone(), v.clone())));
    }
}

fn nics(line: &mut Line, spec: &GuestSpec, inputs: &Inputs) {
    for (n, (nic, (tap, vhost))) in spec.nics.iter().zip(&inputs.nics).enumerate() {
        let vhost = vhost.map(|fd| format!(",vhost=on,vhostfd={fd}")).unwrap_or_default();
        line.option("-netdev", format!("tap,id=net{n},fd={tap}{vhost}"));
        let mut device = virtio("virtio-net-pci", &format!("nic{n}"), FIRST_NIC + n);
        // No boot code from the network: it costs time and nobody uses it.
        merge(&mut device, &json!({"netdev": format!("net{n}"), "mac": nic.mac, "host_mtu": nic.mtu, "romfile": ""}));
        line.device(&device);
    }
}

#[cfg(test)]
mod tests;
