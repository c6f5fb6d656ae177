//! What the store knows about an image: the form on disk (digests) and the form for callers (paths).

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::digest::Digest;

/// Formats of disks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DiskFormat {
    /// qemu's format.
    Qcow2,
    /// Plain bytes.
    Raw,
    /// One-file VMware disks; converted to qcow2 at import, so never the format of a stored image.
    Vmdk,
}

impl DiskFormat {
    /// qemu's name of it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Qcow2 => "qcow2",
            Self::Raw => "raw",
            Self::Vmdk => "vmdk",
        }
    }
}

/// How an OCI image wants to be run (OCI image specification, "config").
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct OciConfig {
    /// Program, before `cmd`.
    pub entrypoint: Vec<String>,
    /// Program or its arguments.
    pub cmd: Vec<String>,
    /// `NAME=value`.
    pub env: Vec<String>,
    /// Working directory; empty is `/`.
    pub workdir: String,
    /// `user[:group]`, names or numbers; empty is root.
    pub user: String,
    /// `80/tcp` and so on.
    pub exposed_ports: Vec<String>,
    /// Directories that want to be volumes.
    pub volumes: Vec<String>,
    /// Signal that stops it, `SIGTERM` when empty.
    pub stop_signal: String,
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// Architecture in Go's words (`amd64`).
    pub architecture: String,
}

/// One layer, unpacked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerRef {
    /// Digest of the layer as transferred.
    pub digest: Digest,
    /// Digest of its uncompressed tar.
    pub diff_id: Digest,
    /// Its unpacked tree.
    pub path: PathBuf,
}

/// What an image holds, as paths of this node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Payload {
    /// A disk with its own boot loader.
    Disk {
        /// qcow2 or raw.
        format: DiskFormat,
        /// Read-only file; use it as a backing file or copy it.
        blob: PathBuf,
    },
    /// A kernel to be started directly.
    Kernel {
        /// bzImage.
        kernel: PathBuf,
        /// Initial RAM disk.
        initrd: Option<PathBuf>,
        /// Command line.
        cmdline: String,
        /// Root disk, read-only; use it as a backing file or copy it.
        disk: Option<PathBuf>,
        /// Its format.
        disk_format: DiskFormat,
    },
    /// An OCI image.
    Oci {
        /// Its manifest.
        manifest: PathBuf,
        /// How it wants to be run.
        config: OciConfig,
        /// Lowest first.
        layers: Vec<LayerRef>,
    },
}

/// An image on this node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageRecord {
    /// The caller's id.
    pub id: String,
    /// For messages.
    pub name: String,
    /// Of the disk blob, of the OCI manifest, or of the list of a kernel image's parts.
    pub digest: Digest,
    /// Bytes of all its blobs.
    pub size_bytes: u64,
    /// Size of the disk that a guest sees; for OCI images the bytes of all layers.
    pub virtual_size_bytes: u64,
    /// What it holds.
    pub payload: Payload,
    /// Facts for people: `format`, `architecture`, `cmd`, `source`, ...
    pub properties: BTreeMap<String, String>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct StoredLayer {
    pub digest: Digest,
    pub diff_id: Digest,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub(crate) enum StoredPayload {
    Disk { format: DiskFormat, blob: Digest },
    Kernel { kernel: Digest, initrd: Option<Digest>, cmdline: String, disk: Option<Digest>, disk_format: DiskFormat },
    Oci { manifest: Digest, config_blob: Digest, config: Box<OciConfig>, layers: Vec<StoredLayer> },
}

impl StoredPayload {
    /// Every blob it needs.
    pub fn blobs(&self) -> Vec<Digest> {
        match self {
            Self::Disk { blob, .. } => vec![blob.clone()],
            Self::Kernel { kernel, initrd, disk, .. } => {
                std::iter::once(kernel).chain(initrd).chain(disk).cloned().collect()
            }
            Self::Oci { manifest, config_blob, layers, .. } => {
                [manifest, config_blob].into_iter().chain(layers.iter().map(|l| &l.digest)).cloned().collect()
            }
        }
    }

    /// Every unpacked tree it needs.
    pub fn trees(&self) -> Vec<Digest> {
        match self {
            Self::Oci { layers, .. } => layers.iter().map(|l| l.diff_id.clone()).collect(),
            _ => Vec::new(),
        }
    }
}

/// The form on disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct StoredRecord {
    /// Version of this form.
    pub schema: u32,
    pub id: String,
    pub name: String,
    pub digest: Digest,
    pub size_bytes: u64,
    pub virtual_size_bytes: u64,
    pub payload: StoredPayload,
    #[serde(default)]
    pub properties: BTreeMap<String, String>,
    /// Who still runs from it; content goes only when nobody does.
    #[serde(default)]
    pub holders: BTreeSet<String>,
    /// Removed by its owner, kept for its holders.
    #[serde(default)]
    pub removed: bool,
}

pub(crate) fn blob_path(dir: &Path, digest: &Digest) -> PathBuf {
    dir.join("blobs/sha256").join(digest.hex())
}

pub(crate) fn tree_path(dir: &Path, diff_id: &Digest) -> PathBuf {
    dir.join("unpacked").join(diff_id.hex())
}

impl StoredRecord {
    pub fn public(&self, dir: &Path) -> ImageRecord {
        let blob = |d: &Digest| blob_path(dir, d);
        let payload = match &self.payload {
            StoredPayload::Disk { format, blob: b } => Payload::Disk { format: *format, blob: blob(b) },
            StoredPayload::Kernel { kernel, initrd, cmdline, disk, disk_format } => Payload::Kernel {
                kernel: blob(kernel),
                initrd: initrd.as_ref().map(blob),
                cmdline: cmdline.clone(),
                disk: disk.as_ref().map(blob),
                disk_format: *disk_format,
            },
            StoredPayload::Oci { manifest, config, layers, .. } => Payload::Oci {
                manifest: blob(manifest),
                config: (**config).clone(),
                layers: layers
                    .iter()
                    .map(|l| LayerRef {
                        digest: l.digest.clone(),
                        diff_id: l.diff_id.clone(),
                        path: tree_path(dir, &l.diff_id),
                    })
                    .collect(),
            },
        };
        ImageRecord {
            id: self.id.clone(),
            name: self.name.clone(),
            digest: self.digest.clone(),
            size_bytes: self.size_bytes,
            virtual_size_bytes: self.virtual_size_bytes,
            payload,
            properties: self.properties.clone(),
        }
    }
}
