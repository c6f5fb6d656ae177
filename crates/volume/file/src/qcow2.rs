//! Reads the header and the snapshot table of a qcow2 file, so that a file a guest's process could write to is judged before
//! qemu-img opens it.
//!
//! Format: QEMU `docs/interop/qcow2.txt`.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// Bytes of the header of version 2, the part that every version has.
const HEADER_BYTES: usize = 72;
/// Offset of the incompatible features of version 3, and its bit for an external data file.
const INCOMPATIBLE_AT: u64 = 72;
const EXTERNAL_DATA: u64 = 1 << 2;
/// Longest backing file name of the format.
const MAX_BACKING_BYTES: u32 = 1023;
/// Most snapshots that are looked at; qemu-img allows 65536.
const MAX_SNAPSHOTS: u32 = 1024;
/// Longest extra data, id or name of a snapshot that is looked at.
const MAX_FIELD_BYTES: usize = 1024;
/// Fixed part of an entry of the snapshot table.
const ENTRY_BYTES: usize = 40;

/// What the header says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// Bytes the guest sees.
    pub size: u64,
    /// The backing file's name, as it is written there.
    pub backing: Option<PathBuf>,
    /// Whether the data is in another file. We never make such files.
    pub external_data: bool,
    snapshots: u32,
    snapshots_at: u64,
}

/// One internal snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// Its name.
    pub name: String,
    /// Bytes of the disk when it was taken.
    pub size: Option<u64>,
}

fn invalid(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("not a valid qcow2 file: {what}"))
}

fn be32(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).and_then(|b| b.try_into().ok()).map_or(0, u32::from_be_bytes)
}

fn be64(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..at + 8).and_then(|b| b.try_into().ok()).map_or(0, u64::from_be_bytes)
}

fn be16(bytes: &[u8], at: usize) -> usize {
    bytes.get(at..at + 2).and_then(|b| b.try_into().ok()).map_or(0, |b| usize::from(u16::from_be_bytes(b)))
}

/// The header of the file.
///
/// # Errors
/// `InvalidData` when it is no qcow2 file of version 2 or 3; any I/O error.
pub fn header(path: &Path) -> io::Result<Header> {
    use std::os::unix::ffi::OsStrExt;
    let file = File::open(path)?;
    let mut bytes = [0; HEADER_BYTES];
    file.read_exact_at(&mut bytes, 0).map_err(|_| invalid("it is too short"))?;
    if &bytes[..4] != b"QFI\xfb" {
        return Err(invalid("the magic is wrong"));
    }
    let version = be32(&bytes, 4);
    if !(2..=3).contains(&version) {
        return Err(invalid(&format!("version {version} is unknown")));
    }
    let (backing_at, backing_len) = (be64(&bytes, 8), be32(&bytes, 16));
    if backing_len > MAX_BACKING_BYTES {
        return Err(invalid("the name of its backing file is too long"));
    }
    let backing = if backing_at == 0 || backing_len == 0 {
        None
    } else {
        let mut name = vec![0; backing_len as usize];
        file.read_exact_at(&mut name, backing_at).map_err(|_| invalid("the name of its backing file is cut off"))?;
        Some(PathBuf::from(std::ffi::OsStr::from_bytes(&name)))
    };
    let mut features = [0; 8];
    if version == 3 {
        file.read_exact_at(&mut features, INCOMPATIBLE_AT).map_err(|_| invalid("it is too short"))?;
    }
    let external_data = u64::from_be_bytes(features) & EXTERNAL_DATA != 0;
    Ok(Header {
        size: be64(&bytes, 24),
        backing,
        external_data,
        snapshots: be32(&bytes, 60),
        snapshots_at: be64(&bytes, 64),
    })
}

/// The internal snapshots of the file.
///
/// # Errors
/// As [`header`]; `InvalidData` when the table is damaged.
pub fn snapshots(path: &Path) -> io::Result<Vec<Snapshot>> {
    let header = header(path)?;
    if header.snapshots > MAX_SNAPSHOTS {
        return Err(invalid("it has too many snapshots"));
    }
    let file = File::open(path)?;
    let mut found = Vec::new();
    let mut at = header.snapshots_at;
    for _ in 0..header.snapshots {
        let mut entry = [0; ENTRY_BYTES];
        file.read_exact_at(&mut entry, at).map_err(|_| invalid("its snapshot table is cut off"))?;
        let (id_len, name_len, extra_len) = (be16(&entry, 12), be16(&entry, 14), be32(&entry, 36) as usize);
        if id_len.max(name_len).max(extra_len) > MAX_FIELD_BYTES {
            return Err(invalid("a snapshot has an overlong field"));
        }
        let mut rest = vec![0; extra_len + id_len + name_len];
        let rest_at =
            at.checked_add(ENTRY_BYTES as u64).ok_or_else(|| invalid("its snapshot table is out of range"))?;
        file.read_exact_at(&mut rest, rest_at).map_err(|_| invalid("its snapshot table is cut off"))?;
        // Extra data: 8 bytes of VM state size, 8 bytes of disk size.
        let size = (extra_len >= 16).then(|| be64(&rest, 8));
        found.push(Snapshot { name: String::from_utf8_lossy(&rest[extra_len + id_len..]).into_owned(), size });
        at = (rest_at + rest.len() as u64).next_multiple_of(8);
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::process::Command;

    #[test]
    fn reads_what_qemu_img_writes() {
        let dir = tempfile::tempdir().unwrap();
        let (base, top) = (dir.path().join("base.raw"), dir.path().join("top.qcow2"));
        std::fs::write(&base, vec![1; 1 << 20]).unwrap();
        let qemu_img = |args: &[&str]| {
            let out = Command::new("qemu-img").args(args).output();
            out.is_ok_and(|o| o.status.success())
        };
        let (base_text, top_text) = (base.to_str().unwrap(), top.to_str().unwrap());
        if !qemu_img(&["create", "-q", "-f", "qcow2", "-b", base_text, "-F", "raw", top_text, "3M"]) {
            eprintln!("skipped: qemu-img is not installed");
            return;
        }
        let header = header(&top).unwrap();
        assert_eq!(
            (header.size, header.backing.as_deref(), header.external_data),
            (3 << 20, Some(base.as_path()), false)
        );
        assert!(snapshots(&top).unwrap().is_empty());
        assert!(qemu_img(&["snapshot", "-c", "one", top_text]));
        assert!(qemu_img(&["resize", "-q", "-f", "qcow2", top_text, "5M"]));
        assert!(qemu_img(&["snapshot", "-c", "a-longer-name", top_text]));
        let expected = [("one", 3 << 20), ("a-longer-name", 5 << 20)];
        let expected: Vec<_> = expected.iter().map(|(n, s)| Snapshot { name: (*n).into(), size: Some(*s) }).collect();
        assert_eq!(snapshots(&top).unwrap(), expected);
        assert_eq!(super::header(&base).unwrap_err().kind(), io::ErrorKind::InvalidData);
    }

    proptest! {
        #[test]
        fn damaged_files_never_panic(tail in proptest::collection::vec(any::<u8>(), 0..400), version in 2u8..4, n in 0u8..3) {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("x");
            let mut bytes = b"QFI\xfb\0\0\0".to_vec();
            bytes.push(version);
            bytes.extend(tail);
            if bytes.len() > 72 {
                bytes[60..72].copy_from_slice(&[0, 0, 0, n, 0, 0, 0, 0, 0, 0, 0, 80]);
            }
            std::fs::write(&path, &bytes).unwrap();
            let _ = header(&path);
            let _ = snapshots(&path);
        }
    }
}
