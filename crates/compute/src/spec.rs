//! What a driver is told about a guest: plain values and handles, already resolved.

use std::collections::BTreeMap;
use std::path::PathBuf;

use crate::shim::Fence;
use oblak_model::{InstanceId, Isolation, PortId, Size, VolumeId};
use serde::{Deserialize, Serialize};

/// Everything needed to run one guest on this node.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct GuestSpec {
    /// The instance.
    pub id: InstanceId,
    /// Its name, for logs and process titles.
    pub name: String,
    /// Its project, for logs.
    pub project: String,
    /// How it is isolated.
    pub isolation: Isolation,
    /// Directory of the instance: exists, owned by root, mode 0711. The driver keeps its record, sockets and logs inside.
    pub dir: PathBuf,
    /// Number of this run. Grows with every start that the agent decides on; see [`crate::ComputeDriver::ensure`].
    pub run: u64,
    /// Epoch of the node's lease at the time of the start.
    pub epoch: u64,
    /// CPU share in thousandths of a vCPU. Machines get this rounded up to whole vCPUs.
    pub vcpus_milli: u32,
    /// Memory.
    pub memory: Size,
    /// What it boots or runs.
    pub boot: Boot,
    /// Further disks (volumes), in order.
    #[serde(default)]
    pub disks: Vec<DiskSpec>,
    /// Network interfaces, in order.
    #[serde(default)]
    pub nics: Vec<NicSpec>,
    /// Host name inside.
    pub hostname: String,
    /// NoCloud seed image (FAT, label CIDATA) for machines, attached read-only as a disk.
    #[serde(default)]
    pub seed: Option<PathBuf>,
    /// Only for containers.
    #[serde(default)]
    pub container: ContainerOptions,
    /// The lease that the guest depends on; none when it runs on whatever happens to the node.
    #[serde(default)]
    pub fence: Option<Fence>,
}

/// What a guest boots or runs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum Boot {
    /// A disk with a boot loader of its own.
    Disk {
        /// Root disk, writable, private to this instance.
        root: PathBuf,
        /// Its format.
        format: DiskFormat,
        /// BIOS (SeaBIOS) or UEFI (OVMF).
        firmware: Firmware,
    },
    /// A kernel started directly, with an optional root disk.
    Kernel {
        /// Kernel image.
        kernel: PathBuf,
        /// Initial RAM disk.
        initrd: Option<PathBuf>,
        /// Kernel command line.
        cmdline: String,
        /// Root disk, writable, private to this instance.
        root: Option<PathBuf>,
        /// Its format.
        format: DiskFormat,
    },
    /// An OCI root file system.
    Oci {
        /// Unpacked layers, lowest first, ready as overlayfs lower directories; owned by host ids 0.. as in the image.
        layers: Vec<PathBuf>,
        /// Where the writable layer may live (a directory of the instance; survives restarts).
        upper: PathBuf,
        /// Limit of the writable layer; none where zero.
        upper_size: Size,
    },
}

/// Formats of disk images that guests may use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DiskFormat {
    /// qcow2, qemu's format with overlays.
    Qcow2,
    /// Plain bytes.
    Raw,
}

/// Firmware of a machine that boots from its disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Firmware {
    /// SeaBIOS.
    #[default]
    Bios,
    /// OVMF; variables are kept per instance.
    Uefi,
}

/// One further disk.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DiskSpec {
    /// The volume. Its [`VolumeId::short`] is the disk's serial number, so a guest finds it as `/dev/disk/by-id/virtio-<short>`.
    pub volume: VolumeId,
    /// File or block device.
    pub path: PathBuf,
    /// Its format.
    pub format: DiskFormat,
    /// Write-protected.
    pub read_only: bool,
    /// Where a container sees it (a directory volume mounted there); ignored by machines.
    #[serde(default)]
    pub mount: Option<String>,
}

/// One network interface.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct NicSpec {
    /// The port.
    pub port: PortId,
    /// MAC address, `aa:bb:cc:dd:ee:ff`.
    pub mac: String,
    /// MTU in bytes.
    pub mtu: u16,
    /// What the network driver made for it.
    pub attach: NicAttach,
}

/// The host side of an interface.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum NicAttach {
    /// A persistent tap device inside a network namespace. The shim opens it there and hands the descriptor to the machine.
    Tap {
        /// Network namespace (a path that setns(2) can open).
        netns: PathBuf,
        /// Interface name of the tap.
        device: String,
        /// Whether the tap was made with IFF_VNET_HDR (open it with the same flag).
        vnet_hdr: bool,
    },
    /// A network namespace in which the interface is configured already; all interfaces of a container share one.
    Netns {
        /// Network namespace path.
        netns: PathBuf,
        /// The user namespace that owns it (a path that setns(2) can open), for the guest to run in; its ids 0.. are host ids
        /// [`ContainerOptions::id_base`]... `None`: the guest gets one of its own, whose capabilities do not reach the network.
        #[serde(default)]
        userns: Option<PathBuf>,
    },
}

/// What only containers know.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ContainerOptions {
    /// Program and arguments, entrypoint and command of the image already merged.
    pub argv: Vec<String>,
    /// Environment.
    pub env: BTreeMap<String, String>,
    /// Working directory inside.
    pub cwd: String,
    /// `name` or `uid[:gid]`; empty for root inside.
    pub user: String,
    /// Give it a terminal.
    pub tty: bool,
    /// Write-protect the root file system.
    pub read_only_root: bool,
    /// Run with the host's user ids (`--userns=host`). Off by default: root inside is nobody outside.
    pub userns_host: bool,
    /// First host id of the 65,536 ids this container may use.
    pub id_base: u32,
    /// Capabilities beyond the default set, without `CAP_`.
    pub cap_add: Vec<String>,
    /// Capabilities taken from the default set.
    pub cap_drop: Vec<String>,
    /// Most processes inside.
    pub pids_max: u32,
    /// Text of /etc/resolv.conf.
    pub resolv_conf: String,
    /// Lines for /etc/hosts beyond localhost: (address, name).
    pub hosts: Vec<(String, String)>,
    /// Signal number that asks it to end; 15 when zero.
    pub stop_signal: i32,
}
