//! OCI documents (image specification 1.1) and Docker's schema 2, which says the same with other media types; and the OCI layout.

use std::collections::BTreeMap;
use std::path::Path;

use serde::Deserialize;

use crate::digest::Digest;
use crate::error::{Code, Context, ImageError, Result};
use crate::record::OciConfig;

/// Manifests and configs of real images have a few kilobytes; the specification of registries asks for 4 MiB.
pub(crate) const DOCUMENT_BYTES: usize = 4 << 20;
/// Indexes in indexes.
const MAX_DEPTH: usize = 4;

pub(crate) const ACCEPT: &str = "application/vnd.oci.image.manifest.v1+json, application/vnd.oci.image.index.v1+json, \
    application/vnd.docker.distribution.manifest.v2+json, application/vnd.docker.distribution.manifest.list.v2+json";
const TAG: &str = "org.opencontainers.image.ref.name";

#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Descriptor {
    #[serde(default)]
    pub media_type: String,
    pub digest: Digest,
    pub size: u64,
    #[serde(default)]
    pub platform: Option<Platform>,
    #[serde(default)]
    pub annotations: BTreeMap<String, String>,
    #[serde(default)]
    pub artifact_type: Option<String>,
}

#[derive(Clone, Debug, Default, Deserialize)]
pub(crate) struct Platform {
    #[serde(default)]
    pub architecture: String,
    #[serde(default)]
    pub os: String,
    #[serde(default)]
    pub variant: String,
}

#[derive(Clone, Debug, Deserialize)]
pub(crate) struct Manifest {
    pub config: Descriptor,
    pub layers: Vec<Descriptor>,
}

#[derive(Clone, Debug, Deserialize)]
pub(crate) struct Index {
    pub manifests: Vec<Descriptor>,
}

/// Either form of what a tag names.
pub(crate) enum Document {
    Manifest(Manifest),
    Index(Index),
}

#[derive(Deserialize)]
struct Shape {
    manifests: Option<serde_json::Value>,
    config: Option<serde_json::Value>,
    #[serde(rename = "schemaVersion", default)]
    schema_version: u32,
}

#[derive(Deserialize)]
struct ConfigFile {
    #[serde(default)]
    architecture: String,
    #[serde(default)]
    os: String,
    #[serde(default)]
    config: Option<ConfigPart>,
    rootfs: RootFs,
}

#[derive(Deserialize)]
struct RootFs {
    diff_ids: Vec<Digest>,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
struct ConfigPart {
    user: Option<String>,
    exposed_ports: Option<BTreeMap<String, serde_json::Value>>,
    env: Option<Vec<String>>,
    entrypoint: Option<Vec<String>>,
    cmd: Option<Vec<String>>,
    volumes: Option<BTreeMap<String, serde_json::Value>>,
    working_dir: Option<String>,
    labels: Option<BTreeMap<String, String>>,
    stop_signal: Option<String>,
}

fn parse<T: serde::de::DeserializeOwned>(bytes: &[u8], what: &str) -> Result<T> {
    serde_json::from_slice(bytes)
        .map_err(|e| ImageError::new(Code::ImageCorrupt, format!("the {what} of the image cannot be read: {e}")))
}

impl Document {
    /// By shape, since media types are often absent.
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        let shape: Shape = parse(bytes, "manifest")?;
        if shape.manifests.is_some() {
            return Ok(Self::Index(parse(bytes, "index")?));
        }
        if shape.config.is_some() && shape.schema_version == 2 {
            return Ok(Self::Manifest(parse(bytes, "manifest")?));
        }
        Err(ImageError::new(Code::UnsupportedFormat, "the registry has this image in an old format only (schema 1)"))
    }
}

/// This machine in the words of OCI (Go's `GOARCH`).
pub(crate) fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        "riscv64" => "riscv64",
        "s390x" => "s390x",
        other => other,
    }
}

impl Index {
    /// The entry for this machine.
    pub fn select(&self) -> Result<&Descriptor> {
        let here = architecture();
        let images: Vec<&Descriptor> = self.manifests.iter().filter(|d| d.artifact_type.is_none()).collect();
        let fits = |d: &&&Descriptor| {
            d.platform
                .as_ref()
                .is_some_and(|p| p.os == "linux" && p.architecture == here && matches!(p.variant.as_str(), "" | "v8"))
        };
        if let Some(found) = images.iter().find(fits) {
            return Ok(found);
        }
        // A layout of one image often does not say for which machine it is; its config will.
        if let [only] = images[..]
            && only.platform.is_none()
        {
            return Ok(only);
        }
        let mut others: Vec<String> =
            images.iter().filter_map(|d| d.platform.as_ref()).map(|p| format!("{}/{}", p.os, p.architecture)).collect();
        others.dedup();
        Err(ImageError::new(
            Code::UnsupportedFormat,
            format!(
                "the image is not made for linux/{here}; there is {}",
                if others.is_empty() { "nothing".into() } else { others.join(", ") }
            ),
        ))
    }
}

impl Manifest {
    /// Refuses what could not be unpacked anyway, before a byte of it is fetched.
    pub fn check(&self, limits: &crate::store::Limits) -> Result<()> {
        if self.layers.len() > limits.layers {
            return Err(ImageError::new(
                Code::ImageTooBig,
                format!("the image has {} layers; the limit is {}", self.layers.len(), limits.layers),
            ));
        }
        for layer in &self.layers {
            let kind = layer.media_type.as_str();
            let usable =
                kind.is_empty() || (kind.contains(".tar") && !kind.contains("encrypted") && !kind.contains("foreign"));
            if !usable {
                return Err(ImageError::new(
                    Code::UnsupportedFormat,
                    format!("the image has a layer of the kind {kind}"),
                ));
            }
            if layer.size > limits.blob_bytes {
                return Err(crate::blobs::too_big("a layer of the image", layer.size, limits.blob_bytes));
            }
        }
        Ok(())
    }
}

/// Reads a config: what to run and the diff ids, one per layer.
pub(crate) fn config(bytes: &[u8], manifest: &Manifest) -> Result<(OciConfig, Vec<Digest>)> {
    let file: ConfigFile = parse(bytes, "config")?;
    if file.rootfs.diff_ids.len() != manifest.layers.len() {
        return Err(ImageError::new(
            Code::ImageCorrupt,
            "the config and the manifest of the image differ in the number of layers",
        ));
    }
    if !(file.os.is_empty() || file.os == "linux")
        || !(file.architecture.is_empty() || file.architecture == architecture())
    {
        return Err(ImageError::new(
            Code::UnsupportedFormat,
            format!("the image is made for {}/{}, this node is linux/{}", file.os, file.architecture, architecture()),
        ));
    }
    let part = file.config.unwrap_or_default();
    let config = OciConfig {
        entrypoint: part.entrypoint.unwrap_or_default(),
        cmd: part.cmd.unwrap_or_default(),
        env: part.env.unwrap_or_default(),
        workdir: part.working_dir.unwrap_or_default(),
        user: part.user.unwrap_or_default(),
        exposed_ports: part.exposed_ports.unwrap_or_default().into_keys().collect(),
        volumes: part.volumes.unwrap_or_default().into_keys().collect(),
        stop_signal: part.stop_signal.unwrap_or_default(),
        labels: part.labels.unwrap_or_default(),
        architecture: if file.architecture.is_empty() { architecture().into() } else { file.architecture },
    };
    Ok((config, file.rootfs.diff_ids))
}

/// What a layout says about one image.
pub(crate) struct Resolved {
    pub manifest_bytes: Vec<u8>,
    pub manifest: Manifest,
    pub config_bytes: Vec<u8>,
}

/// Finds an image in an OCI layout directory.
pub(crate) fn read_layout(dir: &Path, tag: Option<&str>) -> Result<Resolved> {
    let index_path = dir.join("index.json");
    if !dir.join("oci-layout").is_file() || !index_path.is_file() {
        return Err(ImageError::new(
            Code::UnsupportedFormat,
            "this is not an OCI image layout: oci-layout or index.json is missing",
        ));
    }
    let bytes = read_document(&index_path)?;
    let mut index: Index = parse(&bytes, "index")?;
    if let Some(tag) = tag {
        index.manifests.retain(|d| d.annotations.get(TAG).is_some_and(|t| t == tag));
        if index.manifests.is_empty() {
            return Err(ImageError::new(Code::NotFound, format!("the layout has no image tagged {tag}")));
        }
    }
    for _ in 0..MAX_DEPTH {
        let bytes = read_blob(dir, index.select()?)?;
        match Document::parse(&bytes)? {
            Document::Index(inner) => index = inner,
            Document::Manifest(manifest) => {
                let config_bytes = read_blob(dir, &manifest.config)?;
                return Ok(Resolved { manifest_bytes: bytes, manifest, config_bytes });
            }
        }
    }
    Err(ImageError::new(Code::ImageCorrupt, "the layout nests indexes too deeply"))
}

fn read_document(path: &Path) -> Result<Vec<u8>> {
    let describe = || format!("cannot read {}", path.display());
    let length = std::fs::metadata(path).context(describe)?.len();
    if length > DOCUMENT_BYTES as u64 {
        return Err(crate::blobs::too_big("a document of the image", length, DOCUMENT_BYTES as u64));
    }
    std::fs::read(path).context(describe)
}

fn read_blob(dir: &Path, descriptor: &Descriptor) -> Result<Vec<u8>> {
    let path = dir.join("blobs/sha256").join(descriptor.digest.hex());
    if !path.is_file() {
        return Err(ImageError::new(Code::ImageTruncated, format!("the layout lacks blob {}", descriptor.digest)));
    }
    let bytes = read_document(&path)?;
    verify(&bytes, descriptor)?;
    Ok(bytes)
}

/// Bytes must be what their descriptor says.
pub(crate) fn verify(bytes: &[u8], descriptor: &Descriptor) -> Result<()> {
    let found = Digest::of(bytes);
    if found == descriptor.digest && bytes.len() as u64 == descriptor.size {
        return Ok(());
    }
    Err(ImageError::new(
        Code::ImageCorrupt,
        format!(
            "a document should be {} of {} bytes but is {found} of {}",
            descriptor.digest,
            descriptor.size,
            bytes.len()
        ),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(os: &str, architecture: &str) -> String {
        format!(
            r#"{{"mediaType":"m","digest":"{}","size":1,"platform":{{"os":"{os}","architecture":"{architecture}"}}}}"#,
            Digest::of(architecture.as_bytes())
        )
    }

    #[test]
    fn index_chooses_this_machine_or_says_what_there_is() {
        let here = architecture();
        let parse_index = |entries: &[String]| -> Index {
            serde_json::from_str(&format!(r#"{{"manifests":[{}]}}"#, entries.join(","))).unwrap()
        };
        let index = parse_index(&[entry("linux", "mips"), entry("windows", here), entry("linux", here)]);
        assert_eq!(index.select().unwrap().digest, Digest::of(here.as_bytes()));
        assert_eq!(index.select().unwrap().platform.as_ref().unwrap().os, "linux");
        let error = parse_index(&[entry("linux", "mips")]).select().unwrap_err();
        assert_eq!(error.code, Code::UnsupportedFormat);
        assert!(error.detail.contains("linux/mips"), "{error}");
    }
}
