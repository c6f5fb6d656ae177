//! Disk images: what is accepted, what is refused and why, and what is left of either.
#![allow(clippy::unwrap_used, missing_docs, reason = "tests")]

mod support;

use oblak_image::{Code, DiskFormat, ImageStore, Limits, Options, Payload, Progress};
use support::{Fixture, fixture, fixture_with, have, names, qcow2, run};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

fn text(path: &std::path::Path) -> &str {
    path.to_str().unwrap()
}

async fn refused(f: &Fixture, name: &str) -> Code {
    let error = f.import("x", f.file(name)).await.unwrap_err();
    assert!(!error.detail.contains(text(f.store.dir())), "shows where the store is: {error}");
    f.assert_empty();
    error.code
}

#[tokio::test]
async fn content_decides_not_the_name() {
    if !have("qemu-img") {
        return;
    }
    let f = fixture();
    qcow2(&f.path("disk.raw"));
    let record = f.import("a", f.file("disk.raw")).await.unwrap();
    let Payload::Disk { format, blob } = &record.payload else { panic!("{record:?}") };
    assert_eq!((*format, record.virtual_size_bytes), (DiskFormat::Qcow2, 64 << 20));
    assert_eq!(std::fs::read(blob).unwrap(), std::fs::read(f.path("disk.raw")).unwrap());
    assert_eq!(f.store.get("a").unwrap().as_ref(), Some(&record));

    // A raw disk with a qcow2 name: partition table, sizes in order.
    let mut raw = vec![0u8; 1 << 20];
    raw[446 + 4] = 0x83;
    raw[446 + 8..446 + 12].copy_from_slice(&1u32.to_le_bytes());
    raw[446 + 12..446 + 16].copy_from_slice(&2047u32.to_le_bytes());
    raw[510..512].copy_from_slice(b"\x55\xaa");
    std::fs::write(f.path("disk.qcow2"), &raw).unwrap();
    let record = f.import("b", f.file("disk.qcow2")).await.unwrap();
    assert!(matches!(record.payload, Payload::Disk { format: DiskFormat::Raw, .. }));
    assert_eq!(record.virtual_size_bytes, 1 << 20);
    assert_eq!(f.store.list().unwrap().len(), 2);
}

#[tokio::test]
async fn a_single_file_vmdk_becomes_qcow2() {
    if !have("qemu-img") {
        return;
    }
    let f = fixture();
    qcow2(&f.path("q"));
    for kind in ["monolithicSparse", "streamOptimized"] {
        let target = f.path(kind);
        run(
            "qemu-img",
            &[
                "convert",
                "-f",
                "qcow2",
                "-O",
                "vmdk",
                "-o",
                &format!("subformat={kind}"),
                text(&f.path("q")),
                text(&target),
            ],
        );
        let record = f.import(kind, f.file(kind)).await.unwrap();
        let Payload::Disk { format: DiskFormat::Qcow2, blob } = &record.payload else { panic!("{record:?}") };
        run("qemu-img", &["compare", "-f", "qcow2", "-F", "qcow2", text(blob), text(&f.path("q"))]);
        assert_eq!(record.properties["source_format"], "vmdk");
    }
}

#[tokio::test]
async fn images_that_point_elsewhere_are_refused() {
    if !have("qemu-img") {
        return;
    }
    let f = fixture();
    qcow2(&f.path("base"));
    run(
        "qemu-img",
        &["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", text(&f.path("base")), text(&f.path("overlay"))],
    );
    assert_eq!(refused(&f, "overlay").await, Code::UnsafeImage);
    let data = format!("data_file={}", text(&f.path("data")));
    run("qemu-img", &["create", "-q", "-f", "qcow2", "-o", &data, text(&f.path("external")), "1M"]);
    assert_eq!(refused(&f, "external").await, Code::UnsafeImage);
    run(
        "qemu-img",
        &["create", "-q", "-f", "vmdk", "-o", "subformat=monolithicFlat", text(&f.path("flat.vmdk")), "1M"],
    );
    assert_eq!(refused(&f, "flat.vmdk").await, Code::UnsupportedFormat);

    // A sparse vmdk whose descriptor was edited to name the secrets of the host.
    run("qemu-img", &["create", "-q", "-f", "vmdk", text(&f.path("sparse.vmdk")), "1M"]);
    let mut bytes = std::fs::read(f.path("sparse.vmdk")).unwrap();
    let at = bytes.windows(3).position(|w| w == b"RW ").unwrap();
    let evil = b"RW 1 FLAT \"/etc/shadow\" 0\nRW 1 FLAT \"/etc/passwd\" 0\n";
    bytes[at..at + evil.len()].copy_from_slice(evil);
    std::fs::write(f.path("evil.vmdk"), &bytes).unwrap();
    assert_eq!(refused(&f, "evil.vmdk").await, Code::UnsafeImage);
    // Capacity 0 makes qemu believe the descriptor.
    bytes[12..20].fill(0);
    std::fs::write(f.path("empty.vmdk"), &bytes).unwrap();
    assert_eq!(refused(&f, "empty.vmdk").await, Code::UnsafeImage);
}

#[tokio::test]
async fn broken_images_are_refused_with_the_reason() {
    if !have("qemu-img") {
        return;
    }
    let f = fixture();
    qcow2(&f.path("good"));
    let good = std::fs::read(f.path("good")).unwrap();
    std::fs::write(f.path("half"), &good[..good.len() / 2]).unwrap();
    assert_eq!(refused(&f, "half").await, Code::ImageTruncated);
    std::fs::write(f.path("header"), &good[..60]).unwrap();
    assert_eq!(refused(&f, "header").await, Code::ImageTruncated);
    let mut refcounts = good.clone();
    // The first refcount block lies in cluster 2 of a fresh image.
    refcounts[2 * 65536..2 * 65536 + 64].fill(0);
    std::fs::write(f.path("refcounts"), &refcounts).unwrap();
    assert_eq!(refused(&f, "refcounts").await, Code::ImageCorrupt);
    std::fs::write(f.path("page.qcow2"), "<html>not found</html>".repeat(100)).unwrap();
    assert_eq!(refused(&f, "page.qcow2").await, Code::UnsupportedFormat);
    std::fs::write(f.path("x.xz"), b"\xfd7zXZ\0 and more").unwrap();
    assert_eq!(refused(&f, "x.xz").await, Code::UnsupportedFormat);
    std::fs::write(f.path("empty"), b"").unwrap();
    assert_eq!(refused(&f, "empty").await, Code::UnsupportedFormat);
    assert_eq!(refused(&f, "absent").await, Code::NotFound);

    let mut gpt = vec![0u8; 1 << 20];
    gpt[510..512].copy_from_slice(b"\x55\xaa");
    gpt[512..520].copy_from_slice(b"EFI PART");
    gpt[512 + 32..512 + 40].copy_from_slice(&4095u64.to_le_bytes());
    std::fs::write(f.path("gpt"), &gpt).unwrap();
    assert_eq!(refused(&f, "gpt").await, Code::ImageTruncated);
}

#[tokio::test]
async fn limits_and_checksums() {
    if !have("qemu-img") {
        return;
    }
    let f =
        fixture_with(Options { limits: Limits { virtual_bytes: 32 << 20, ..Limits::default() }, ..Options::default() });
    qcow2(&f.path("big"));
    assert_eq!(refused(&f, "big").await, Code::ImageTooBig);
    let f = fixture_with(Options { limits: Limits { blob_bytes: 4096, ..Limits::default() }, ..Options::default() });
    qcow2(&f.path("big"));
    assert_eq!(refused(&f, "big").await, Code::ImageTooBig);
    assert_eq!(f.upload("u", std::fs::read(f.path("big")).unwrap(), None).await.unwrap_err().code, Code::ImageTooBig);
    f.assert_empty();

    let f = fixture();
    qcow2(&f.path("d"));
    let right = support::digest(&std::fs::read(f.path("d")).unwrap());
    let wrong = support::digest(b"other");
    let error = f.import_expecting("x", f.file("d"), Some(&wrong)).await.unwrap_err();
    assert_eq!(error.code, Code::ChecksumMismatch);
    assert!(error.detail.contains(&right) && error.detail.contains(&wrong), "{error}");
    f.assert_empty();
    assert_eq!(f.import_expecting("x", f.file("d"), Some(&right)).await.unwrap().digest.as_str(), right);
}

#[tokio::test]
async fn uploads_are_counted_and_replace() {
    if !have("qemu-img") {
        return;
    }
    let f = fixture();
    qcow2(&f.path("d"));
    let bytes = std::fs::read(f.path("d")).unwrap();
    let length = bytes.len() as u64;
    let cut = f.upload("u", bytes[..1000].to_vec(), Some(length)).await.unwrap_err();
    assert_eq!(cut.code, Code::ImageTruncated);
    f.assert_empty();
    let first = f.upload("u", bytes.clone(), Some(length)).await.unwrap();
    run("qemu-img", &["create", "-q", "-f", "qcow2", text(&f.path("e")), "8M"]);
    let second = f.upload("u", std::fs::read(f.path("e")).unwrap(), None).await.unwrap();
    assert_ne!(first.digest, second.digest);
    assert_eq!(f.store.list().unwrap(), [second]);
}

#[tokio::test]
async fn content_stays_as_long_as_somebody_uses_it() {
    if !have("qemu-img") {
        return;
    }
    let f = fixture();
    qcow2(&f.path("d"));
    f.import("a", f.file("d")).await.unwrap();
    let record = f.import("b", f.file("d")).await.unwrap();
    let Payload::Disk { blob, .. } = &record.payload else { panic!("{record:?}") };
    assert_eq!(f.names("blobs/sha256").len(), 1, "equal content is stored once");
    f.store.remove("a").unwrap();
    f.store.remove("a").unwrap();
    assert!(blob.exists());
    f.store.hold("b", "vm-1").unwrap();
    f.store.remove("b").unwrap();
    assert!(f.store.get("b").unwrap().is_none() && f.store.list().unwrap().is_empty());
    assert!(blob.exists(), "an instance still runs from it");
    assert_eq!(f.store.hold("b", "vm-2").unwrap_err().code, Code::NotFound);
    f.store.release("vm-1").unwrap();
    f.assert_empty();
}

#[tokio::test]
async fn damage_on_disk_is_found() {
    if !have("qemu-img") {
        return;
    }
    let f = fixture();
    qcow2(&f.path("d"));
    let record = f.import("a", f.file("d")).await.unwrap();
    f.store.verify("a").await.unwrap();
    let Payload::Disk { blob, .. } = &record.payload else { panic!("{record:?}") };
    let mut bytes = std::fs::read(blob).unwrap();
    bytes[70_000] ^= 1;
    std::fs::remove_file(blob).unwrap();
    std::fs::write(blob, bytes).unwrap();
    assert_eq!(f.store.verify("a").await.unwrap_err().code, Code::ImageCorrupt);
    std::fs::remove_file(blob).unwrap();
    assert!(f.store.get("a").unwrap().is_none(), "an image without its blob is not there");
    f.import("a", f.file("d")).await.unwrap();
    f.store.verify("a").await.unwrap();
}

#[tokio::test]
async fn an_export_is_the_same_image_elsewhere() {
    use tokio::io::AsyncReadExt as _;
    if !have("qemu-img") {
        return;
    }
    let (here, there) = (fixture(), fixture());
    qcow2(&here.path("d"));
    let record = here.import("a", here.file("d")).await.unwrap();
    let export = here.store.export("a").unwrap();
    let mut whole = Vec::new();
    export.reader(0).read_to_end(&mut whole).await.unwrap();
    assert_eq!(whole.len() as u64, export.len());
    for offset in [1, 511, 512, 1024, 70_001, whole.len() - 1, whole.len(), whole.len() + 5] {
        let mut rest = Vec::new();
        export.reader(offset as u64).read_to_end(&mut rest).await.unwrap();
        assert!(rest == whole[offset.min(whole.len())..], "from {offset}");
    }
    let copy = there.upload("a", whole.clone(), Some(export.len())).await.unwrap();
    assert_eq!((copy.digest, copy.virtual_size_bytes), (record.digest, record.virtual_size_bytes));
    there.store.remove("a").unwrap();
    let at = whole.len() - 20_000;
    whole[at] ^= 0xff;
    assert_eq!(there.upload("a", whole, None).await.unwrap_err().code, Code::ImageCorrupt);
    there.assert_empty();
}

#[tokio::test]
async fn a_second_store_in_the_same_directory_is_refused() {
    let f = fixture();
    let dir = f.store.dir().to_owned();
    assert_eq!(ImageStore::open_with(&dir, Options::default()).err().unwrap().code, Code::Invalid);
    std::fs::create_dir(dir.join("tmp/work-left-by-a-crash")).unwrap();
    drop(f.store);
    let again = ImageStore::open_with(&dir, Options::default()).unwrap();
    assert_eq!(names(&again.dir().join("tmp")), ["downloads"]);
}

#[tokio::test]
async fn a_cancelled_import_leaves_nothing() {
    let f = fixture();
    let cancel = CancellationToken::new();
    let (writer, reader) = tokio::io::duplex(1024);
    let store = f.store.clone();
    let stop = cancel.clone();
    let task = tokio::spawn(async move {
        store.put_stream("c", "c", reader, None, None, watch::Sender::new(Progress::default()), stop).await
    });
    cancel.cancel();
    assert_eq!(task.await.unwrap().unwrap_err().code, Code::Cancelled);
    drop(writer);
    f.assert_empty();
}
