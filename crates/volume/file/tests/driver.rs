//! The file driver on a real file system with the real qemu-img.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use oblak_model::{Size, SnapshotId, VolumeId};
use oblak_platform::driver::Remedy;
use oblak_volume::conformance::{Harness, suite};
use oblak_volume::{Format, SnapshotVolume, Source, VolumeDriver, VolumeHandle, VolumeSpec};
use oblak_volume_file::FileDriver;
use tempfile::TempDir;
use uuid::Uuid;

fn have(program: &str) -> bool {
    let found = Command::new(program).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok();
    if !found {
        println!("skipped: {program} is not installed");
    }
    found
}

/// A directory that unprivileged users may pass.
fn pool() -> (TempDir, FileDriver) {
    let dir = tempfile::Builder::new().prefix("oblak-volume-").tempdir().unwrap();
    std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o711)).unwrap();
    let driver = FileDriver::new(dir.path().join("volumes"));
    (dir, driver)
}

fn spec(format: Format) -> VolumeSpec {
    let id = VolumeId(Uuid::now_v7());
    VolumeSpec { id, size: Size::mib(8), format, source: Source::Empty, dir: None, owner: (0, 0) }
}

fn run(program: &str, args: &[&str]) -> String {
    let output = Command::new(program).args(args).output().unwrap();
    assert!(output.status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn put(handle: &VolumeHandle, text: &str) {
    let path = handle.path.to_str().unwrap();
    match handle.format {
        Format::Directory => std::fs::write(handle.path.join("file"), text).unwrap(),
        Format::Raw => {
            let mut bytes = text.as_bytes().to_vec();
            bytes.resize(512, 0);
            std::fs::File::options().write(true).open(path).unwrap().write_all_at(&bytes, 0).unwrap();
        }
        Format::Qcow2 => {
            let source = handle.path.with_extension("text");
            let mut bytes = text.as_bytes().to_vec();
            bytes.resize(512, 0);
            std::fs::write(&source, bytes).unwrap();
            let write = format!("write -q -s {} 0 512", source.display());
            run("qemu-io", &["-f", "qcow2", "-c", &write, path]);
            std::fs::remove_file(source).unwrap();
        }
    }
}

fn get(handle: &VolumeHandle) -> String {
    let bytes = match handle.format {
        Format::Directory => std::fs::read(handle.path.join("file")).unwrap_or_default(),
        Format::Raw => {
            let mut bytes = vec![0; 512];
            std::fs::File::open(&handle.path).unwrap().read_exact_at(&mut bytes, 0).unwrap();
            bytes
        }
        Format::Qcow2 => {
            let out = handle.path.with_extension("out");
            let of = format!("of={}", out.display());
            let from = format!("if={}", handle.path.display());
            run("qemu-img", &["dd", "-f", "qcow2", "-O", "raw", "bs=512", "count=1", &from, &of]);
            let bytes = std::fs::read(&out).unwrap();
            std::fs::remove_file(out).unwrap();
            bytes
        }
    };
    String::from_utf8(bytes).unwrap().trim_end_matches('\0').to_string()
}

struct Files {
    dir: TempDir,
    driver: Mutex<FileDriver>,
}

#[async_trait]
impl Harness for Files {
    fn driver(&self) -> Arc<dyn VolumeDriver> {
        Arc::new(self.driver.lock().unwrap().clone())
    }
    async fn restart(&self) {
        *self.driver.lock().unwrap() = FileDriver::new(self.dir.path().join("volumes"));
    }
    async fn write(&self, handle: &VolumeHandle, text: &str) {
        put(handle, text);
    }
    async fn read(&self, handle: &VolumeHandle) -> String {
        get(handle)
    }
    async fn leaks(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.dir.path().join("volumes")).unwrap();
        entries.map(|e| e.unwrap().file_name().to_string_lossy().into_owned()).collect()
    }
    async fn too_big(&self) -> Option<Size> {
        Some(Size::gib(1 << 20))
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn conforms() {
    if !have("qemu-img") {
        return;
    }
    let (dir, driver) = pool();
    suite(&Files { dir, driver: Mutex::new(driver) }).await;
}

fn image(dir: &Path, format: &str) -> PathBuf {
    let (raw, path) = (dir.join("image.raw"), dir.join(format!("image.{format}")));
    let mut bytes = vec![0; 4 << 20];
    bytes[..5].copy_from_slice(b"image");
    std::fs::write(&raw, bytes).unwrap();
    if format != "raw" {
        run("qemu-img", &["convert", "-f", "raw", "-O", format, raw.to_str().unwrap(), path.to_str().unwrap()]);
    }
    path
}

#[tokio::test]
async fn overlays_of_images_are_quick_and_clones_of_them_stand_alone() {
    if !have("qemu-img") {
        return;
    }
    let (dir, driver) = pool();
    for (format, text) in [(Format::Qcow2, "qcow2"), (Format::Raw, "raw")] {
        let path = image(dir.path(), text);
        for target in [Format::Qcow2, Format::Raw] {
            let mut root = spec(target);
            root.source = Source::Image { path: path.clone(), format };
            root.dir = Some(dir.path().join("instance"));
            root.owner = (65534, 65534);
            let start = Instant::now();
            let handle = driver.ensure(&root, false).await.unwrap();
            println!("{text} image to {target:?}: {:?}", start.elapsed());
            assert_eq!(handle.path.parent(), root.dir.as_deref());
            let meta = handle.path.metadata().unwrap();
            assert_eq!((meta.uid(), meta.gid(), meta.mode() & 0o777), (65534, 65534, 0o600));
            assert_eq!(get(&handle), "image");
            put(&handle, "changed");
            let mut clone = spec(target);
            clone.source = Source::Volume { id: root.id };
            clone.owner = (1234, 1234);
            let cloned = driver.ensure(&clone, false).await.unwrap();
            driver.remove(root.id).await.unwrap();
            assert!(!handle.path.exists());
            assert_eq!(get(&cloned), "changed");
            assert_eq!(cloned.path.metadata().unwrap().uid(), 1234);
            if target == Format::Qcow2 {
                let info = run("qemu-img", &["info", "-f", "qcow2", cloned.path.to_str().unwrap()]);
                assert!(!info.contains("backing"), "{info}");
            }
            driver.remove(clone.id).await.unwrap();
        }
        assert!(std::fs::read(&path).unwrap().windows(5).any(|w| w == b"image"), "the image is never written");
    }
    let mut small = spec(Format::Qcow2);
    small.size = Size::mib(2);
    small.source = Source::Image { path: image(dir.path(), "qcow2"), format: Format::Qcow2 };
    let error = driver.ensure(&small, false).await.unwrap_err();
    assert_eq!(error.code, "too_small");
    assert!(error.detail.contains("4 MiB"), "{error}");
    small.source = Source::Image { path: dir.path().join("none"), format: Format::Qcow2 };
    assert_eq!(driver.ensure(&small, false).await.unwrap_err().code, "image_missing");
    std::fs::write(dir.path().join("none"), "text").unwrap();
    assert_eq!(driver.ensure(&small, false).await.unwrap_err().code, "image_damaged");
    assert_eq!(driver.list().await.unwrap(), []);
}

#[tokio::test]
async fn a_disk_that_points_elsewhere_is_not_followed() {
    if !have("qemu-img") {
        return;
    }
    let (dir, driver) = pool();
    let secret = dir.path().join("secret");
    std::fs::write(&secret, vec![b's'; 1 << 20]).unwrap();
    let volume = spec(Format::Qcow2);
    let handle = driver.ensure(&volume, false).await.unwrap();
    // What a guest's process that was taken over could do to its own file.
    let args =
        ["rebase", "-u", "-f", "qcow2", "-F", "raw", "-b", secret.to_str().unwrap(), handle.path.to_str().unwrap()];
    run("qemu-img", &args);
    let mut clone = spec(Format::Raw);
    clone.source = Source::Volume { id: volume.id };
    assert_eq!(driver.ensure(&clone, false).await.unwrap_err().code, "image_unsafe");
    let mut grown = volume.clone();
    grown.size = Size::mib(16);
    assert_eq!(driver.ensure(&grown, false).await.unwrap_err().code, "image_unsafe");
    let snapshot = SnapshotId(Uuid::now_v7());
    assert_eq!(driver.snapshot(volume.id, snapshot).await.unwrap_err().code, "image_unsafe");
    let mut from_image = spec(Format::Qcow2);
    from_image.source = Source::Image { path: handle.path.clone(), format: Format::Qcow2 };
    assert_eq!(driver.ensure(&from_image, false).await.unwrap_err().code, "image_unsafe");
    driver.remove(volume.id).await.unwrap();
}

#[tokio::test]
async fn the_owner_that_the_guests_driver_chose_stays() {
    if !have("qemu-img") {
        return;
    }
    let (_dir, driver) = pool();
    for format in [Format::Qcow2, Format::Raw] {
        let mut volume = spec(format);
        let handle = driver.ensure(&volume, false).await.unwrap();
        std::os::unix::fs::chown(&handle.path, Some(4321), Some(4321)).unwrap();
        let snapshot = SnapshotId(Uuid::now_v7());
        driver.snapshot(volume.id, snapshot).await.unwrap();
        volume.size = Size::mib(16);
        driver.ensure(&volume, false).await.unwrap();
        driver.restore(volume.id, snapshot).await.unwrap();
        assert_eq!(handle.path.metadata().unwrap().uid(), 4321);
        let clone = VolumeSpec { source: Source::Volume { id: volume.id }, size: Size::mib(16), ..spec(format) };
        let cloned = driver.ensure(&clone, false).await.unwrap();
        assert_eq!(cloned.path.metadata().unwrap().uid(), 0);
    }
}

struct Killed(Child);
impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[tokio::test]
async fn what_a_guest_has_open_is_left_alone() {
    if !have("qemu-storage-daemon") || !have("qemu-img") {
        return;
    }
    let (dir, driver) = pool();
    for format in [Format::Qcow2, Format::Raw] {
        let mut volume = spec(format);
        let handle = driver.ensure(&volume, false).await.unwrap();
        let socket = dir.path().join(format!("{}.sock", volume.id));
        let node = format!(
            "driver={},node-name=d,file.driver=file,file.filename={}",
            if format == Format::Raw { "raw" } else { "qcow2" },
            handle.path.display()
        );
        let export =
            format!("type=vhost-user-blk,id=e,node-name=d,writable=on,addr.type=unix,addr.path={}", socket.display());
        let guest =
            Command::new("qemu-storage-daemon").args(["--blockdev", &node, "--export", &export]).spawn().unwrap();
        let guest = Killed(guest);
        let end = Instant::now() + Duration::from_secs(20);
        while !socket.exists() {
            assert!(Instant::now() < end, "qemu-storage-daemon does not start");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        let snapshot = SnapshotId(Uuid::now_v7());
        for error in [
            driver.snapshot(volume.id, snapshot).await.unwrap_err(),
            {
                let mut clone = spec(format);
                clone.source = Source::Volume { id: volume.id };
                driver.ensure(&clone, false).await.unwrap_err()
            },
            {
                let grown = VolumeSpec { size: Size::mib(16), ..volume.clone() };
                driver.ensure(&grown, false).await.unwrap_err()
            },
        ] {
            assert_eq!((error.remedy, error.code.as_str()), (Remedy::Retry, "volume_in_use"), "{error}");
        }
        volume.size = Size::mib(16);
        assert_eq!(driver.ensure(&volume, true).await.unwrap().size, volume.size);
        drop(guest);
        driver.ensure(&volume, false).await.unwrap();
        let info = run("qemu-img", &["info", "--output=json", handle.path.to_str().unwrap()]);
        let info: serde_json::Value = serde_json::from_str(&info).unwrap();
        assert_eq!(info["virtual-size"], 16 << 20);
        driver.snapshot(volume.id, snapshot).await.unwrap();
        driver.remove(volume.id).await.unwrap();
    }
}

#[tokio::test]
async fn crashes_between_any_two_steps_are_repaired() {
    let (_dir, driver) = pool();
    let volume = spec(Format::Raw);
    let home = driver.dir().join(volume.id.to_string());
    let made = driver.ensure(&volume, false).await.unwrap();
    put(&made, "old");
    let record = std::fs::read_to_string(home.join("volume.json")).unwrap();
    let unready = record.replace("\"ready\": true", "\"ready\": false");
    assert_ne!(record, unready);
    // Killed after the content got its name, but before the record said so: nobody was told, so it starts anew.
    std::fs::write(home.join("volume.json"), &unready).unwrap();
    assert_eq!(driver.observe(volume.id).await.unwrap(), None);
    assert_eq!(driver.list().await.unwrap(), [volume.id], "what is half-made can be found and removed");
    let temp = home.join(format!(".{}.raw.new", volume.id));
    std::fs::write(&temp, "half").unwrap();
    assert_eq!(get(&driver.ensure(&volume, false).await.unwrap()), "");
    assert!(!temp.exists());
    // Content that vanished is never replaced by zeros.
    std::fs::remove_file(&made.path).unwrap();
    assert_eq!(driver.ensure(&volume, false).await.unwrap_err().code, "content_lost");
    driver.remove(volume.id).await.unwrap();
    // A file that is not ours is not taken over.
    let other = VolumeSpec { dir: Some(home.clone()), ..spec(Format::Raw) };
    std::fs::create_dir_all(&home).unwrap();
    std::fs::write(home.join(format!("{}.raw", other.id)), "mine").unwrap();
    assert_eq!(driver.ensure(&other, false).await.unwrap_err().code, "occupied");
    assert_eq!(std::fs::read(home.join(format!("{}.raw", other.id))).unwrap(), b"mine");
}

/// A small ext4 of its own, unmounted when dropped.
struct SmallDisk {
    dir: TempDir,
}

impl SmallDisk {
    fn new() -> Option<Self> {
        let dir = tempfile::Builder::new().prefix("oblak-small-").tempdir().unwrap();
        let (file, mount) = (dir.path().join("disk"), dir.path().join("mnt"));
        std::fs::File::create(&file).unwrap().set_len(32 << 20).unwrap();
        std::fs::create_dir(&mount).unwrap();
        let quiet = |program: &str, args: &[&str]| {
            let status = Command::new(program).args(args).stdout(Stdio::null()).stderr(Stdio::null()).status();
            status.is_ok_and(|s| s.success())
        };
        let (file, mount) = (file.to_str().unwrap().to_string(), mount.to_str().unwrap().to_string());
        if !quiet("mke2fs", &["-q", "-t", "ext4", "-m", "0", &file]) || !quiet("mount", &["-o", "loop", &file, &mount])
        {
            println!("skipped: no loop mounts here");
            return None;
        }
        Some(Self { dir })
    }
    fn mount(&self) -> PathBuf {
        self.dir.path().join("mnt")
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(self.mount()).status();
    }
}

#[tokio::test]
async fn a_full_disk_is_told_and_leaves_nothing_half_made() {
    let Some(disk) = SmallDisk::new() else { return };
    let (dir, elsewhere) = pool();
    let driver = FileDriver::new(disk.mount().join("volumes"));
    let full = |error: oblak_platform::driver::DriverError| {
        assert_eq!((error.remedy, error.code.as_str()), (Remedy::Retry, "disk_full"), "{error}");
    };
    let big = VolumeSpec { size: Size::mib(64), ..spec(Format::Raw) };
    full(driver.ensure(&big, false).await.unwrap_err());
    // A directory that does not fit, found out only while it is copied.
    let tree = VolumeSpec { dir: Some(disk.mount().join("t")), ..spec(Format::Directory) };
    let handle = driver.ensure(&tree, false).await.unwrap();
    std::fs::write(handle.path.join("file"), vec![1; 18 << 20]).unwrap();
    let copy = VolumeSpec { source: Source::Volume { id: tree.id }, ..spec(Format::Directory) };
    full(driver.ensure(&copy, false).await.unwrap_err());
    full(driver.snapshot(tree.id, SnapshotId(Uuid::now_v7())).await.unwrap_err());
    assert_eq!(driver.list().await.unwrap(), [tree.id]);
    assert_eq!(driver.observe(tree.id).await.unwrap().unwrap().snapshots, []);
    if have("qemu-img") {
        // A converted image that does not fit.
        let raw = dir.path().join("big.raw");
        std::fs::write(&raw, vec![3; 20 << 20]).unwrap();
        let source = Source::Image { path: raw, format: Format::Raw };
        let base = VolumeSpec { size: Size::mib(20), source, ..spec(Format::Qcow2) };
        elsewhere.ensure(&base, false).await.unwrap();
        let small = FileDriver::new(disk.mount().join("volumes"));
        let local = VolumeSpec { dir: None, ..base.clone() };
        small.ensure(&local, false).await.unwrap();
        let clone = VolumeSpec { source: Source::Volume { id: local.id }, size: Size::mib(20), ..spec(Format::Qcow2) };
        full(small.ensure(&clone, false).await.unwrap_err());
        assert_eq!(small.observe(clone.id).await.unwrap(), None);
        small.remove(local.id).await.unwrap();
    }
    driver.remove(tree.id).await.unwrap();
    let left: Vec<_> = std::fs::read_dir(disk.mount().join("volumes")).unwrap().collect();
    assert!(left.is_empty(), "{left:?}");
}
