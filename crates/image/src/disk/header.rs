//! What the first bytes say. Formats: qemu `docs/interop/qcow2.txt`, VMware "Virtual Disk Format 5.0", UEFI 2.10 section 5 (GPT).

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use crate::error::{Code, Context, ImageError, Result};
use crate::record::DiskFormat;

/// Enough for the volume descriptor of ISO 9660 at 32 KiB and the superblock of btrfs at 64 KiB.
pub const HEAD_BYTES: usize = 68 * 1024;
const SECTOR: u64 = 512;

/// What content is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Detected {
    /// A disk.
    Disk(DiskFormat),
    /// A tar, perhaps of an OCI layout.
    Tar,
    /// gzip; may hold a tar.
    Gzip,
    /// zstd; may hold a tar.
    Zstd,
    /// Known and not usable, with the reason.
    Refused(&'static str),
    /// Not known.
    Unknown,
}

/// Recognises content from its first [`HEAD_BYTES`] and last 512 bytes.
#[must_use]
pub fn detect(head: &[u8], tail: &[u8]) -> Detected {
    let at = |offset: usize, magic: &[u8]| head.get(offset..offset + magic.len()) == Some(magic);
    if at(0, b"QFI\xfb") {
        return match head.get(4..8) {
            Some([0, 0, 0, 2 | 3]) => Detected::Disk(DiskFormat::Qcow2),
            _ => Detected::Refused("a qcow disk of version 1; convert it to qcow2 first"),
        };
    }
    if at(0, b"KDMV") {
        return Detected::Disk(DiskFormat::Vmdk);
    }
    if at(257, b"ustar") {
        return Detected::Tar;
    }
    let refused: [(usize, &[u8], &'static str); 9] = [
        (
            0,
            b"# Disk DescriptorFile",
            "a vmdk descriptor, whose data is in other files; export one file (monolithicSparse or streamOptimized)",
        ),
        (0, b"COWD", "a vmdk of an old ESX; convert it to qcow2 first"),
        (0, b"vhdxfile", "a vhdx disk; convert it to qcow2 first"),
        (0, b"conectix", "a vhd disk; convert it to qcow2 first"),
        (64, b"\x7f\x10\xda\xbe", "a vdi disk; convert it to qcow2 first"),
        (0, b"QED\0", "a qed disk; convert it to qcow2 first"),
        (0, b"\xfd7zXZ\0", "compressed with xz; decompress it first"),
        (0, b"BZh", "compressed with bzip2; decompress it first"),
        (0, b"PK\x03\x04", "a zip archive; unpack it first"),
    ];
    if let Some((_, _, why)) = refused.iter().find(|(offset, magic, _)| at(*offset, magic)) {
        return Detected::Refused(why);
    }
    if at(0, b"\x1f\x8b") {
        return Detected::Gzip;
    }
    if at(0, b"\x28\xb5\x2f\xfd") {
        return Detected::Zstd;
    }
    if tail.starts_with(b"conectix") {
        return Detected::Refused("a vhd disk; convert it to qcow2 first");
    }
    // Partition table or boot sector, GPT, ext2-4, XFS, btrfs, ISO 9660.
    let raw: [(usize, &[u8]); 6] = [
        (510, b"\x55\xaa"),
        (512, b"EFI PART"),
        (1080, b"\x53\xef"),
        (0, b"XFSB"),
        (65600, b"_BHRfS_M"),
        (32769, b"CD001"),
    ];
    if raw.iter().any(|(offset, magic)| at(*offset, magic)) {
        return Detected::Disk(DiskFormat::Raw);
    }
    Detected::Unknown
}

fn corrupt(what: impl Into<String>) -> ImageError {
    ImageError::new(Code::ImageCorrupt, what)
}
fn truncated(what: impl Into<String>) -> ImageError {
    ImageError::new(Code::ImageTruncated, what)
}
fn unsafe_image(what: impl Into<String>) -> ImageError {
    ImageError::new(Code::UnsafeImage, what)
}

fn read(path: &Path, offset: u64, count: usize) -> Result<(Vec<u8>, u64)> {
    let describe = || format!("cannot read {}", path.display());
    let file = File::open(path).context(describe)?;
    let length = file.metadata().context(describe)?.len();
    let there = length.saturating_sub(offset).min(count as u64);
    let mut bytes = vec![0; usize::try_from(there).unwrap_or(0)];
    file.read_exact_at(&mut bytes, offset).context(describe)?;
    Ok((bytes, length))
}

fn be32(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..at + 4).and_then(|b| b.try_into().ok()).map_or(0, |b| u64::from(u32::from_be_bytes(b)))
}
fn be64(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..at + 8).and_then(|b| b.try_into().ok()).map_or(0, u64::from_be_bytes)
}
fn le32(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..at + 4).and_then(|b| b.try_into().ok()).map_or(0, |b| u64::from(u32::from_le_bytes(b)))
}
fn le64(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..at + 8).and_then(|b| b.try_into().ok()).map_or(0, u64::from_le_bytes)
}

/// Refuses what would make qemu open another file, before any qemu sees it.
pub(crate) fn check_qcow2(path: &Path) -> Result<()> {
    let (h, length) = read(path, 0, 112)?;
    if h.len() < 72 {
        return Err(truncated("the qcow2 image ends inside its header"));
    }
    if be64(&h, 8) != 0 || be32(&h, 16) != 0 {
        return Err(unsafe_image("the qcow2 image needs a backing file; merge them first (qemu-img convert)"));
    }
    if be32(&h, 32) != 0 {
        return Err(ImageError::new(Code::UnsupportedFormat, "the qcow2 image is encrypted; decrypt it first"));
    }
    let cluster_bits = be32(&h, 20);
    if !(9..=21).contains(&cluster_bits) {
        return Err(corrupt("the qcow2 image has an impossible cluster size"));
    }
    if be32(&h, 4) == 3 {
        // Incompatible features, bits 0 dirty, 1 corrupt, 2 external data file, 3 compression type, 4 extended L2 entries.
        let features = be64(&h, 72);
        if features & 0b100 != 0 {
            return Err(unsafe_image(
                "the qcow2 image keeps its data in another file; merge them first (qemu-img convert)",
            ));
        }
        if features & 0b10 != 0 {
            return Err(corrupt("the qcow2 image is marked as corrupt"));
        }
        if features & !0b1_1011 != 0 {
            return Err(ImageError::new(Code::UnsupportedFormat, "the qcow2 image uses features that are not known"));
        }
    }
    let (l1_entries, l1_offset, refcounts) = (be32(&h, 36), be64(&h, 40), be64(&h, 48));
    let l1_end = l1_offset.saturating_add(l1_entries * 8);
    if l1_end > length || refcounts >= length {
        return Err(truncated(format!("the qcow2 image has {length} bytes, its tables lie behind that")));
    }
    Ok(())
}

/// Accepts only a sparse extent that is its own and only file.
pub(crate) fn check_vmdk(path: &Path) -> Result<()> {
    let (h, length) = read(path, 0, 512)?;
    if h.len() < 512 {
        return Err(truncated("the vmdk image ends inside its header"));
    }
    let (capacity, descriptor_at, descriptor_sectors) = (le64(&h, 12), le64(&h, 28), le64(&h, 36));
    // With capacity 0 qemu takes the descriptor's word for where the data is.
    if le32(&h, 4) == 0 || le32(&h, 4) > 3 || capacity == 0 {
        return Err(unsafe_image("the vmdk image has no data of its own"));
    }
    // 20 sectors are usual; 2048 (1 MiB) is more than any tool writes.
    if descriptor_at == 0 || descriptor_sectors == 0 || descriptor_sectors > 2048 {
        return Err(ImageError::new(Code::UnsupportedFormat, "the vmdk image holds no descriptor of itself"));
    }
    let start = descriptor_at.saturating_mul(SECTOR);
    if start.saturating_add(SECTOR) > length {
        return Err(truncated("the vmdk image ends before its descriptor"));
    }
    let (bytes, _) = read(path, start, usize::try_from(descriptor_sectors * SECTOR).unwrap_or(0))?;
    let text = String::from_utf8_lossy(&bytes);
    let mut extents = 0;
    for line in text.trim_end_matches('\0').lines().map(|l| l.trim().to_ascii_lowercase()) {
        let value = line.split_once('=').map(|(k, v)| (k.trim().to_owned(), v.trim().trim_matches('"').to_owned()));
        match value {
            Some((key, value)) if key == "parentcid" && value != "ffffffff" => {
                return Err(unsafe_image("the vmdk image needs a parent; merge them first (qemu-img convert)"));
            }
            Some((key, _)) if key == "parentfilenamehint" => {
                return Err(unsafe_image("the vmdk image names a parent file; merge them first (qemu-img convert)"));
            }
            Some((key, value))
                if key == "createtype" && !["monolithicsparse", "streamoptimized"].contains(&value.as_str()) =>
            {
                return Err(unsafe_image(format!(
                    "the vmdk image is of type {value}, whose data may lie in other files"
                )));
            }
            _ if ["rw ", "rdonly ", "noaccess "].iter().any(|p| line.starts_with(p)) => extents += 1,
            _ => {}
        }
    }
    if extents > 1 {
        return Err(unsafe_image("the vmdk image is spread over several files; export it as one"));
    }
    Ok(())
}

/// Whether all that the partition table promises is there. Returns the size.
pub(crate) fn check_raw(path: &Path) -> Result<u64> {
    let (h, length) = read(path, 0, 1024)?;
    let end = if h.get(512..520) == Some(b"EFI PART") {
        // The alternate header is the last sector of the disk.
        be_last(le64(&h, 512 + 32))
    } else if h.get(510..512) == Some(b"\x55\xaa") && h[446..510].iter().any(|b| *b != 0) && mbr_plausible(&h) {
        (0..4)
            .map(|i| 446 + i * 16)
            .filter(|at| h[at + 4] != 0)
            .map(|at| (le32(&h, at + 8) + le32(&h, at + 12)) * SECTOR)
            .max()
            .unwrap_or(0)
    } else {
        file_system_end(path)?
    };
    if end > length {
        return Err(truncated(format!("the disk should have at least {end} bytes but the image has {length}")));
    }
    Ok(length.div_ceil(SECTOR) * SECTOR)
}

fn be_last(lba: u64) -> u64 {
    lba.saturating_add(1).saturating_mul(SECTOR)
}

/// A boot sector without a table has code where the table would be; then boot flags are neither 0 nor 0x80.
fn mbr_plausible(h: &[u8]) -> bool {
    (0..4).all(|i| matches!(h[446 + i * 16], 0 | 0x80))
}

fn file_system_end(path: &Path) -> Result<u64> {
    let (h, _) = read(path, 1024, 1024)?;
    if h.get(56..58) != Some(b"\x53\xef") {
        return Ok(0);
    }
    // ext4 superblock: blocks at 4, log2(block size) - 10 at 24.
    let block = 1024u64.checked_shl(u32::try_from(le32(&h, 24)).unwrap_or(64)).unwrap_or(0);
    Ok(le32(&h, 4).saturating_mul(block))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn content_decides() {
        let mut page = vec![0; HEAD_BYTES];
        page[..15].copy_from_slice(b"<!DOCTYPE html>");
        assert_eq!(detect(&page, &[]), Detected::Unknown);
        page[510..512].copy_from_slice(b"\x55\xaa");
        assert_eq!(detect(&page, &[]), Detected::Disk(DiskFormat::Raw));
        assert!(matches!(detect(&page, b"conectix"), Detected::Refused(_)));
        assert_eq!(detect(b"QFI\xfb\0\0\0\x03", &[]), Detected::Disk(DiskFormat::Qcow2));
        assert!(matches!(detect(b"QFI\xfb\0\0\0\x01", &[]), Detected::Refused(_)));
        assert!(matches!(detect(b"# Disk DescriptorFile\nversion=1", &[]), Detected::Refused(_)));
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_without_a_panic(bytes in proptest::collection::vec(any::<u8>(), 0..2048), magic in 0..4usize) {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("x");
            let mut content = bytes;
            let magics: [&[u8]; 4] = [b"", b"QFI\xfb\0\0\0\x03", b"KDMV\x01\0\0\0", b""];
            content.splice(0..magics[magic].len().min(content.len()), magics[magic].iter().copied());
            if magic == 3 && content.len() > 1024 {
                content[512..520].copy_from_slice(b"EFI PART");
            }
            std::fs::write(&path, &content).unwrap();
            let _ = (detect(&content, &[]), check_qcow2(&path), check_vmdk(&path), check_raw(&path));
        }
    }
}
