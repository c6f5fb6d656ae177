//! Images.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::id::NodeId;
use crate::object::{Kind, Object, Scope};
use crate::size::Size;
use crate::validate::Problems;

/// Kind of images.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ImageKind;
/// What an instance boots or runs.
pub type Image = Object<ImageKind>;

/// Where the content of an image comes from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
pub enum ImageSource {
    /// A disk image at an http or https URL.
    Url {
        /// The URL.
        url: String,
    },
    /// An OCI image in a registry.
    Registry {
        /// `host[:port]/repository[:tag|@digest]`.
        reference: String,
        /// Speak http instead of https.
        #[serde(default)]
        insecure: bool,
        /// User name for the registry.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        username: Option<String>,
        /// Password for the registry; never shown again.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        password: Option<String>,
    },
    /// Built on a node from a recipe that comes with Oblak.
    Recipe {
        /// `tiny`, `busybox` or `debian-12`.
        recipe: String,
    },
    /// Sent through the API with `PUT .../images/<name>/content`.
    Upload {},
}

/// How a disk image is booted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ImageFirmware {
    /// SeaBIOS.
    #[default]
    Bios,
    /// OVMF.
    Uefi,
}

/// Who may use an image.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Visibility {
    /// Its project.
    #[default]
    Private,
    /// Every project.
    Public,
}

/// What is asked for of an image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ImageSpec {
    /// Where the content comes from.
    pub source: ImageSource,
    /// `sha256:<hex>` that the content must have.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub checksum: Option<String>,
    /// Firmware for disk images with a boot loader of their own.
    #[serde(default)]
    pub firmware: ImageFirmware,
    /// Fetched or built when the first instance needs it, not before.
    #[serde(default)]
    pub on_demand: bool,
    /// Who may use it.
    #[serde(default)]
    pub visibility: Visibility,
    /// Smallest memory that it runs with.
    #[serde(default)]
    pub min_memory: Size,
    /// What it holds, when known before it is there: decides the default isolation.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub content: Option<ImageContent>,
    /// Grows by one to have an image that failed fetched or built once more.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub retry_generation: u64,
}

#[allow(clippy::trivially_copy_pass_by_ref, reason = "what serde calls")]
fn is_zero(n: &u64) -> bool {
    *n == 0
}

/// What an image holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ImageContent {
    /// A disk with a boot loader.
    Disk,
    /// Kernel, initial RAM disk and root disk.
    Kernel,
    /// An OCI image.
    Oci,
}

/// Where an image is in its life.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ImagePhase {
    /// Waits: for its first use, for an upload or for a node.
    #[default]
    Pending,
    /// Being fetched or built.
    Importing,
    /// Can be used.
    Ready,
    /// Could not be fetched or built; `message` says why. A changed spec is tried again.
    Failed,
}

/// What is, of an image.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ImageStatus {
    /// Where it is in its life.
    #[serde(default)]
    pub phase: ImagePhase,
    /// Stable reason.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub reason: String,
    /// For people: step of the import or what went wrong.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub message: String,
    /// Percent of the import.
    #[serde(default)]
    pub progress: u8,
    /// An instance needs it (set when `on_demand` no longer holds it back).
    #[serde(default)]
    pub wanted: bool,
    /// The node that imports it and has its content.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<NodeId>,
    /// Nodes that have its content, copies included.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub nodes: Vec<NodeId>,
    /// Digest of the content.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub digest: Option<String>,
    /// Bytes stored.
    #[serde(default)]
    pub size: Size,
    /// Size of the disk that a guest sees.
    #[serde(default)]
    pub virtual_size: Size,
    /// What it holds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub content: Option<ImageContent>,
    /// Generation of the spec that has been imported.
    #[serde(default)]
    pub observed_generation: u64,
    /// Facts of the content: `format`, `architecture`, `cmd`, ...
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub properties: BTreeMap<String, String>,
}

impl Kind for ImageKind {
    const KIND: &'static str = "image";
    const PLURAL: &'static str = "images";
    const SCOPE: Scope = Scope::Project;
    const ALIASES: &'static [&'static str] = &["img"];
    type Spec = ImageSpec;
    type Status = ImageStatus;

    fn validate(spec: &ImageSpec, problems: &mut Problems) {
        match &spec.source {
            ImageSource::Url { url } => {
                let ok = (url.starts_with("https://") || url.starts_with("http://"))
                    && url.len() <= 4096
                    && !url.contains(char::is_whitespace);
                problems.require(ok, "/spec/source/url", "must be an http or https URL of at most 4096 bytes");
            }
            ImageSource::Registry { reference, .. } => {
                let ok = !reference.is_empty()
                    && reference.len() <= 512
                    && !reference.contains(char::is_whitespace)
                    && !reference.contains("://");
                problems.require(
                    ok,
                    "/spec/source/reference",
                    "must look like registry.example/repository:tag, without a scheme",
                );
            }
            ImageSource::Recipe { recipe } => problems.add_some("/spec/source/recipe", crate::name::problem(recipe)),
            ImageSource::Upload {} => {}
        }
        if let Some(sum) = &spec.checksum {
            let ok = sum
                .strip_prefix("sha256:")
                .is_some_and(|h| h.len() == 64 && h.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b)));
            problems.require(ok, "/spec/checksum", "must be sha256: and 64 lower-case hexadecimal digits");
        }
    }

    fn name_problem(name: &str) -> Option<String> {
        crate::name::dotted_problem(name)
    }
}
