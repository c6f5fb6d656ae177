//! Disk images as the emulator is to see them: the chain of backing files is resolved here, from headers that a guest cannot
//! write, so the emulator opens no path of its own and never guesses a format.

use std::io::{Read, Seek, SeekFrom};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use oblak_compute::DiskFormat;
use oblak_platform::driver::{DriverError, DriverResult};

/// Deepest chain of backing files.
pub const MAX_CHAIN: usize = 16;
/// `QFI\xfb`, QEMU docs/interop/qcow2.
const MAGIC: u32 = 0x5146_49fb;
/// Header extension with the name of the backing file's format, same document.
const EXT_BACKING_FORMAT: u32 = 0xe279_2aca;
const INCOMPATIBLE_EXTERNAL_DATA: u64 = 1 << 2;

/// One file or device of a chain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link {
    /// Where it is.
    pub path: PathBuf,
    /// Its format.
    pub format: DiskFormat,
    /// Whether it is a block device and not a file.
    pub block_device: bool,
}

/// The image and its backing files, the writable one first.
///
/// # Errors
/// `disk_missing`, `image_format` (content and format differ, an encrypted image, a chain that is too deep or names something
/// that is not a file).
pub fn chain(path: &Path, format: DiskFormat) -> DriverResult<Vec<Link>> {
    let mut links = Vec::new();
    let mut next = Some((path.to_path_buf(), format));
    while let Some((path, format)) = next.take() {
        if links.len() == MAX_CHAIN {
            return Err(bad(
                &path,
                &format!("it has more than {MAX_CHAIN} backing files; flatten it with `qemu-img convert`"),
            ));
        }
        let meta = std::fs::metadata(&path).map_err(|e| match e.kind() {
            std::io::ErrorKind::NotFound => {
                DriverError::permanent("disk_missing", format!("disk {} does not exist", path.display()))
            }
            _ => DriverError::io(&format!("cannot open disk {}", path.display()), &e),
        })?;
        let block_device = meta.file_type().is_block_device();
        if !block_device && !meta.is_file() {
            return Err(bad(&path, "it is neither a file nor a block device"));
        }
        if format == DiskFormat::Qcow2 {
            next = backing(&path)?;
        }
        links.push(Link { path, format, block_device });
    }
    Ok(links)
}

fn bad(path: &Path, why: &str) -> DriverError {
    DriverError::permanent("image_format", format!("disk {} cannot be used: {why}", path.display()))
}

/// Backing file and its format as the header of a qcow2 image names them.
fn backing(path: &Path) -> DriverResult<Option<(PathBuf, DiskFormat)>> {
    let short = |e: std::io::Error| match e.kind() {
        std::io::ErrorKind::UnexpectedEof => bad(path, "it is truncated"),
        _ => DriverError::io(&format!("cannot read disk {}", path.display()), &e),
    };
    let mut file = std::fs::File::open(path).map_err(short)?;
    let mut head = [0u8; 112];
    file.read_exact(&mut head[..72]).map_err(short)?;
    if be32(&head, 0) != MAGIC {
        return Err(bad(path, "it is said to be qcow2 but is not"));
    }
    let version = be32(&head, 4);
    if !(2..=3).contains(&version) {
        return Err(bad(path, &format!("qcow2 version {version} is not known")));
    }
    if be32(&head, 32) != 0 {
        return Err(bad(path, "it is encrypted; decrypt it with `qemu-img convert`"));
    }
    // The tables that every image has: first level of the data, first level of the reference counts.
    let meta = file.metadata().map_err(short)?;
    if meta.is_file() && be64(&head, 40).max(be64(&head, 48)) >= meta.len() {
        return Err(bad(path, "it is truncated"));
    }
    let mut header_length = 72;
    if version == 3 {
        file.read_exact(&mut head[72..104]).map_err(short)?;
        if be64(&head, 72) & INCOMPATIBLE_EXTERNAL_DATA != 0 {
            return Err(bad(path, "its data lies in another file; flatten it with `qemu-img convert`"));
        }
        header_length = u64::from(be32(&head, 100));
    }
    let (offset, length) = (be64(&head, 8), be32(&head, 16) as usize);
    if offset == 0 {
        return Ok(None);
    }
    // 1023 is the greatest length that the format allows.
    if length == 0 || length > 1023 {
        return Err(bad(path, "the name of its backing file is damaged"));
    }
    let mut name = vec![0u8; length];
    file.seek(SeekFrom::Start(offset)).map_err(short)?;
    file.read_exact(&mut name).map_err(short)?;
    let name = String::from_utf8(name).map_err(|_| bad(path, "the name of its backing file is not text"))?;
    let plain = name.strip_prefix("file:").unwrap_or(&name);
    if plain.starts_with("json:") || plain.split('/').next().is_some_and(|first| first.contains(':')) {
        return Err(bad(path, "its backing file is not a plain file"));
    }
    let format = backing_format(&mut file, path, header_length, offset)?;
    let dir = path.parent().unwrap_or(Path::new("/"));
    Ok(Some((dir.join(plain), format)))
}

fn backing_format(file: &mut std::fs::File, path: &Path, start: u64, end: u64) -> DriverResult<DiskFormat> {
    let missing =
        || bad(path, "it does not say which format its backing file has; set it with `qemu-img rebase -u -F`");
    let mut at = start;
    // Extensions lie between the header and the name, within the first cluster.
    while at + 8 <= end {
        let mut head = [0u8; 8];
        file.seek(SeekFrom::Start(at)).and_then(|_| file.read_exact(&mut head)).map_err(|_| missing())?;
        let (kind, length) = (be32(&head, 0), be32(&head, 4));
        match kind {
            0 => break,
            EXT_BACKING_FORMAT if length <= 16 => {
                let mut name = vec![0u8; length as usize];
                file.read_exact(&mut name).map_err(|_| missing())?;
                return match name.as_slice() {
                    b"qcow2" => Ok(DiskFormat::Qcow2),
                    b"raw" | b"file" | b"host_device" => Ok(DiskFormat::Raw),
                    other => {
                        Err(bad(path, &format!("its backing file has the format {:?}", String::from_utf8_lossy(other))))
                    }
                };
            }
            _ => at += 8 + u64::from(length).next_multiple_of(8),
        }
    }
    Err(missing())
}

fn be32(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn be64(bytes: &[u8], at: usize) -> u64 {
    u64::from(be32(bytes, at)) << 32 | u64::from(be32(bytes, at + 4))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn qemu_img(args: &[&str]) -> bool {
        std::process::Command::new("qemu-img")
            .args(args)
            .stdout(std::process::Stdio::null())
            .status()
            .is_ok_and(|s| s.success())
    }

    #[test]
    fn follows_what_qemu_img_wrote() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        let text = |name: &str| at(name).to_str().unwrap().to_string();
        std::fs::write(at("base.raw"), vec![0u8; 1 << 20]).unwrap();
        if !qemu_img(&["create", "-q", "-f", "qcow2", "-b", "base.raw", "-F", "raw", &text("middle.qcow2")]) {
            println!("skipped: qemu-img is not installed");
            return;
        }
        assert!(qemu_img(&[
            "create",
            "-q",
            "-f",
            "qcow2",
            "-b",
            &text("middle.qcow2"),
            "-F",
            "qcow2",
            &text("top.qcow2")
        ]));
        let links = chain(&at("top.qcow2"), DiskFormat::Qcow2).unwrap();
        let names: Vec<_> = links.iter().map(|l| (l.path.clone(), l.format)).collect();
        assert_eq!(
            names,
            [
                (at("top.qcow2"), DiskFormat::Qcow2),
                (at("middle.qcow2"), DiskFormat::Qcow2),
                (at("base.raw"), DiskFormat::Raw)
            ]
        );
        // As raw the same bytes are a disk of their own: nothing in them is believed.
        assert_eq!(chain(&at("top.qcow2"), DiskFormat::Raw).unwrap().len(), 1);
        assert_eq!(chain(&at("base.raw"), DiskFormat::Qcow2).unwrap_err().code, "image_format");
        let whole = std::fs::read(at("middle.qcow2")).unwrap();
        std::fs::write(at("middle.qcow2"), &whole[..4096]).unwrap();
        assert!(chain(&at("top.qcow2"), DiskFormat::Qcow2).unwrap_err().detail.contains("truncated"));
        std::fs::write(at("middle.qcow2"), &whole).unwrap();
        std::fs::remove_file(at("base.raw")).unwrap();
        let error = chain(&at("top.qcow2"), DiskFormat::Qcow2).unwrap_err();
        assert_eq!(error.code, "disk_missing");
        assert!(error.detail.contains("base.raw"));
    }

    #[test]
    fn refuses_what_points_elsewhere() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["json:{\"driver\":\"nbd\"}", "nbd:127.0.0.1:10809", "ssh://host/file"] {
            let path = dir.path().join("x.qcow2");
            let mut bytes = vec![0u8; 4096];
            bytes[..4].copy_from_slice(&MAGIC.to_be_bytes());
            bytes[7] = 3;
            bytes[8..16].copy_from_slice(&512u64.to_be_bytes());
            bytes[47] = 1;
            bytes[55] = 1;
            bytes[16..20].copy_from_slice(&u32::try_from(name.len()).unwrap().to_be_bytes());
            bytes[100..104].copy_from_slice(&104u32.to_be_bytes());
            bytes[512..512 + name.len()].copy_from_slice(name.as_bytes());
            std::fs::write(&path, &bytes).unwrap();
            assert_eq!(chain(&path, DiskFormat::Qcow2).unwrap_err().code, "image_format", "{name}");
        }
    }

    #[test]
    fn a_chain_that_bites_its_tail_ends() {
        let dir = tempfile::tempdir().unwrap();
        let (a, b) = (dir.path().join("a"), dir.path().join("b"));
        let (a_text, b_text) = (a.to_str().unwrap(), b.to_str().unwrap());
        if !qemu_img(&["create", "-q", "-f", "qcow2", a_text, "1M"]) {
            println!("skipped: qemu-img is not installed");
            return;
        }
        assert!(qemu_img(&["create", "-q", "-f", "qcow2", "-b", a_text, "-F", "qcow2", b_text]));
        std::fs::copy(&b, &a).unwrap();
        assert_eq!(chain(&a, DiskFormat::Qcow2).unwrap_err().code, "image_format");
    }

    proptest::proptest! {
        #[test]
        fn any_header_is_read_or_refused(tail in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..300), v in 2u8..4) {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("x");
            let mut bytes = MAGIC.to_be_bytes().to_vec();
            bytes.extend([0, 0, 0, v]);
            bytes.extend(tail);
            std::fs::write(&path, bytes).unwrap();
            let _ = chain(&path, DiskFormat::Qcow2);
        }
    }
}
