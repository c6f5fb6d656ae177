use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};

use proptest::prelude::*;
use tar::{EntryType, Header};

use super::*;

fn root() -> bool {
    let root = nix::unistd::geteuid().is_root();
    if !root {
        eprintln!("skipped: owners, devices and overlay attributes need root");
    }
    root
}

fn policy() -> Policy {
    Policy { bytes: 1 << 20, entries: 1000, device_nodes: false }
}

/// An archive by hand: names that the tar crate would refuse to write.
#[derive(Default)]
struct Hostile(Vec<u8>);

impl Hostile {
    fn add(mut self, kind: EntryType, name: &[u8], link: &[u8], content: &[u8]) -> Self {
        self.raw(kind, name, link, content, 0o755, (0, 0));
        self
    }

    fn raw(&mut self, kind: EntryType, name: &[u8], link: &[u8], content: &[u8], mode: u32, owner: (u64, u64)) {
        let mut header = Header::new_gnu();
        let fields = header.as_mut_bytes();
        fields[..name.len().min(100)].copy_from_slice(&name[..name.len().min(100)]);
        fields[157..157 + link.len().min(100)].copy_from_slice(&link[..link.len().min(100)]);
        header.set_entry_type(kind);
        header.set_mode(mode);
        header.set_uid(owner.0);
        header.set_gid(owner.1);
        header.set_size(content.len() as u64);
        header.set_mtime(1_700_000_000);
        if matches!(kind, EntryType::Char | EntryType::Block) {
            header.set_device_major(0).unwrap();
            header.set_device_minor(0).unwrap();
        }
        header.set_cksum();
        self.0.extend_from_slice(header.as_bytes());
        self.0.extend_from_slice(content);
        self.0.resize(self.0.len().next_multiple_of(512), 0);
    }

    fn file(self, name: &str, content: &str) -> Self {
        self.add(EntryType::Regular, name.as_bytes(), b"", content.as_bytes())
    }

    fn pax(self, records: &[(&str, &[u8])]) -> Self {
        let mut body = Vec::new();
        for (key, value) in records {
            let rest = 3 + key.len() + value.len();
            let length = (rest + 2..).find(|n| n.to_string().len() + rest == *n).unwrap();
            body.extend_from_slice(format!("{length} {key}=").as_bytes());
            body.extend_from_slice(value);
            body.push(b'\n');
        }
        self.add(EntryType::XHeader, b"pax", b"", &body)
    }

    fn end(mut self) -> Vec<u8> {
        self.0.resize(self.0.len() + 1024, 0);
        self.0
    }
}

/// Unpacks into `<dir>/tree`; beside it lies a file that must stay as it is.
fn unpack(bytes: &[u8]) -> (tempfile::TempDir, Result<Unpacked>) {
    unpack_with(bytes, &policy())
}

fn unpack_with(bytes: &[u8], policy: &Policy) -> (tempfile::TempDir, Result<Unpacked>) {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("tree")).unwrap();
    fs::write(dir.path().join("outside"), "untouched").unwrap();
    let result = layer_into(bytes, &dir.path().join("tree"), policy, &mut || Ok(()));
    assert_eq!(fs::read_to_string(dir.path().join("outside")).unwrap(), "untouched");
    assert_eq!(fs::metadata(dir.path().join("outside")).unwrap().nlink(), 1);
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2, "something was made outside of the tree");
    (dir, result)
}

fn xattr(path: &Path, name: &str) -> Option<Vec<u8>> {
    let path = std::ffi::CString::new(path.as_os_str().as_encoded_bytes()).unwrap();
    let name = std::ffi::CString::new(name).unwrap();
    let mut value = vec![0u8; 256];
    // SAFETY: both strings end with a zero and the buffer has the length that is told.
    let n = unsafe { libc::lgetxattr(path.as_ptr(), name.as_ptr(), value.as_mut_ptr().cast(), value.len()) };
    value.truncate(usize::try_from(n).ok()?);
    Some(value)
}

#[test]
fn names_that_lead_out_are_refused_or_stay_inside() {
    for name in ["../outside", "a/../../outside", "a/b/../../../outside", ".."] {
        let (_dir, result) = unpack(&Hostile::default().file(name, "evil").end());
        assert_eq!(result.unwrap_err().code, Code::UnsafeImage, "{name}");
    }
    if !root() {
        return;
    }
    let (dir, result) = unpack(&Hostile::default().file("/etc/passwd", "mine").end());
    result.unwrap();
    assert_eq!(fs::read_to_string(dir.path().join("tree/etc/passwd")).unwrap(), "mine");
}

#[test]
fn symbolic_links_are_never_followed_out() {
    if !root() {
        return;
    }
    for target in ["..", "/", "../..", "/proc/self/cwd/..", "../../../../../../../tmp"] {
        let archive = Hostile::default()
            .add(EntryType::Symlink, b"link", target.as_bytes(), b"")
            .file("link/outside", "evil")
            .end();
        let (dir, result) = unpack(&archive);
        // Inside, `..` of the root is the root: the file lands there or the path is no directory.
        if result.is_ok() {
            assert!(
                dir.path().join("tree/outside").exists() || target.contains("tmp") || target.contains("proc"),
                "{target}"
            );
        }
    }
    // A file where a link was replaces the link.
    let archive = Hostile::default().add(EntryType::Symlink, b"f", b"../outside", b"").file("f", "mine").end();
    let (dir, result) = unpack(&archive);
    result.unwrap();
    assert!(!dir.path().join("tree/f").is_symlink());
}

#[test]
fn hard_links_reach_only_what_the_layer_has() {
    if !root() {
        return;
    }
    for target in ["../outside", "/../outside", "missing", "/etc/passwd"] {
        let (_dir, result) = unpack(&Hostile::default().add(EntryType::Link, b"x", target.as_bytes(), b"").end());
        assert!(matches!(result.unwrap_err().code, Code::UnsafeImage | Code::ImageCorrupt), "{target}");
    }
    // Through a link that points out of the tree: resolved inside of it, so there is nothing.
    let archive = Hostile::default()
        .add(EntryType::Symlink, b"up", b"..", b"")
        .add(EntryType::Link, b"x", b"up/outside", b"")
        .end();
    assert_eq!(unpack(&archive).1.unwrap_err().code, Code::ImageCorrupt);
    let archive = Hostile::default().file("a", "A").add(EntryType::Link, b"b/c", b"a", b"").end();
    let (dir, result) = unpack(&archive);
    result.unwrap();
    let (a, c) = (dir.path().join("tree/a"), dir.path().join("tree/b/c"));
    assert_eq!(fs::metadata(a).unwrap().ino(), fs::metadata(c).unwrap().ino());
}

#[test]
fn whiteouts_speak_overlay() {
    if !root() {
        return;
    }
    let archive = Hostile::default()
        .file("gone/.wh.file", "")
        .file("clean/.wh..wh..opq", "")
        .file("kept", "new")
        .file(".wh.kept", "")
        .file(".wh.again", "")
        .add(EntryType::Directory, b"again", b"", b"")
        .file(".wh..wh.plnk", "")
        .end();
    let (dir, result) = unpack(&archive);
    result.unwrap();
    let tree = dir.path().join("tree");
    let whiteout = fs::symlink_metadata(tree.join("gone/file")).unwrap();
    assert!(whiteout.file_type().is_char_device());
    assert_eq!(whiteout.rdev(), 0);
    assert_eq!(xattr(&tree.join("clean"), "trusted.overlay.opaque").as_deref(), Some(b"y".as_slice()));
    assert!(!tree.join("clean/.wh..wh..opq").exists());
    assert_eq!(fs::read_to_string(tree.join("kept")).unwrap(), "new");
    assert!(tree.join("again").is_dir());
    assert_eq!(xattr(&tree.join("again"), "trusted.overlay.opaque").as_deref(), Some(b"y".as_slice()));
    assert!(!tree.join(".wh..wh.plnk").exists());
    for bad in [".wh.", ".wh...", ".wh.."] {
        let (_dir, result) = unpack(&Hostile::default().file(bad, "").end());
        assert_eq!(result.unwrap_err().code, Code::UnsafeImage, "{bad}");
    }
}

#[test]
fn owners_modes_times_and_capabilities_are_kept() {
    if !root() {
        return;
    }
    let mut archive = Hostile::default();
    archive.raw(EntryType::Directory, b"d/", b"", b"", 0o1777, (10, 20));
    archive.raw(EntryType::Regular, b"d/su", b"", b"x", 0o4755, (0, 7));
    // VFS_CAP_REVISION_2, cap_net_raw permitted and effective (linux/capability.h).
    let capability = [1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let archive = archive
        .pax(&[
            ("SCHILY.xattr.security.capability", &capability),
            ("SCHILY.xattr.user.note", b"hi"),
            ("SCHILY.xattr.trusted.overlay.redirect", b"/etc"),
            ("SCHILY.xattr.user.overlay.opaque", b"y"),
            ("mtime", b"1700000001.5"),
            ("path", b"d/ping"),
        ])
        .file("short", "p")
        .add(EntryType::Char, b"null", b"", b"")
        .add(EntryType::Fifo, b"pipe", b"", b"")
        .end();
    let (dir, result) = unpack(&archive);
    let result = result.unwrap();
    assert_eq!((result.entries, result.skipped), (5, 1));
    let tree = dir.path().join("tree");
    let d = fs::metadata(tree.join("d")).unwrap();
    assert_eq!((d.permissions().mode() & 0o7777, d.uid(), d.gid(), d.mtime()), (0o1777, 10, 20, 1_700_000_000));
    let su = fs::metadata(tree.join("d/su")).unwrap();
    assert_eq!((su.permissions().mode() & 0o7777, su.gid()), (0o4755, 7));
    let ping = tree.join("d/ping");
    assert_eq!(fs::metadata(&ping).unwrap().mtime_nsec(), 500_000_000);
    assert_eq!(xattr(&ping, "security.capability").as_deref(), Some(capability.as_slice()));
    assert_eq!(xattr(&ping, "user.note").as_deref(), Some(b"hi".as_slice()));
    assert_eq!(xattr(&ping, "trusted.overlay.redirect"), None);
    assert_eq!(xattr(&ping, "user.overlay.opaque"), None);
    assert!(!tree.join("null").exists());
    assert!(fs::symlink_metadata(tree.join("pipe")).unwrap().file_type().is_fifo());
}

#[test]
fn bounds_hold() {
    let many = (0..20).fold(Hostile::default(), |h, i| h.file(&format!("f{i}"), "0123456789")).end();
    let small = |bytes, entries| Policy { bytes, entries, device_nodes: false };
    for policy in [small(100, 1000), small(1 << 20, 10)] {
        let (_dir, result) = unpack_with(&many, &policy);
        assert_eq!(result.unwrap_err().code, Code::ImageTooBig);
    }
    // Zeros after the end mark: a small file that decompresses without end.
    let mut bomb = Hostile::default().file("a", "a").end();
    bomb.resize(4 << 20, 0);
    let packed = zstd::encode_all(bomb.as_slice(), 3).unwrap();
    let (_dir, result) = unpack(&packed);
    assert_eq!(result.unwrap_err().code, Code::ImageTooBig);
    // An extension header of many megabytes would be held in memory.
    let mut long = Hostile::default();
    long.raw(EntryType::XHeader, b"pax", b"", &vec![b'a'; 2 << 20], 0o644, (0, 0));
    assert_eq!(unpack(&long.end()).1.unwrap_err().code, Code::ImageCorrupt);
}

#[test]
fn every_compression_gives_the_same_tree_and_digest() {
    use std::io::Write as _;
    let plain = Hostile::default().file("a/b", "content").end();
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(&plain).unwrap();
    let packed = [plain.clone(), gzip.finish().unwrap(), zstd::encode_all(plain.as_slice(), 1).unwrap()];
    for bytes in &packed {
        if nix::unistd::geteuid().is_root() {
            let (dir, result) = unpack(bytes);
            assert_eq!(result.unwrap().diff_id, Digest::of(&plain));
            assert_eq!(fs::read_to_string(dir.path().join("tree/a/b")).unwrap(), "content");
        }
        let (_dir, cut) = unpack(&bytes[..bytes.len() * 2 / 5]);
        assert!(matches!(cut.unwrap_err().code, Code::ImageTruncated | Code::ImageCorrupt));
    }
}

fn component() -> impl Strategy<Value = &'static str> {
    prop_oneof![
        Just("a"),
        Just("b"),
        Just(".."),
        Just("."),
        Just(""),
        Just("/"),
        Just(".wh.a"),
        Just(".wh..wh..opq"),
        Just("outside"),
        Just("tree"),
        Just("proc"),
        Just("self"),
    ]
}

fn path() -> impl Strategy<Value = String> {
    proptest::collection::vec(component(), 1..5).prop_map(|parts| parts.join("/"))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(150))]

    /// Whatever a layer holds, nothing outside of its tree changes (checked by `unpack`).
    #[test]
    fn no_layer_reaches_out(entries in proptest::collection::vec((0..6usize, path(), path()), 1..12)) {
        let kinds = [EntryType::Regular, EntryType::Directory, EntryType::Symlink, EntryType::Link, EntryType::Fifo, EntryType::Char];
        let archive = entries.iter().fold(Hostile::default(), |h, (kind, name, link)| {
            let content: &[u8] = if *kind == 0 { b"evil" } else { b"" };
            h.add(kinds[*kind], name.as_bytes(), link.as_bytes(), content)
        });
        let _ = unpack(&archive.end());
    }

    #[test]
    fn any_bytes_end_with_an_answer(bytes in proptest::collection::vec(any::<u8>(), 0..3000), valid in any::<bool>()) {
        let mut archive = if valid { Hostile::default().file("a", "a").0 } else { Vec::new() };
        archive.extend_from_slice(&bytes);
        let _ = unpack(&archive);
    }

    #[test]
    fn pax_records_are_read_without_a_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        let _ = entry::records(&bytes);
    }
}
