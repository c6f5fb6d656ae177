//! Recipes: built from distribution packages, or taken from a directory of results (`OBLAK_IMAGE_CACHE`, whose `debs/` also spares downloads).
#![allow(clippy::unwrap_used, missing_docs, reason = "tests")]

mod support;

use std::path::{Path, PathBuf};

use oblak_image::{Code, ImageRecord, Options, Payload, Source};
use support::{Fixture, fixture, fixture_with, have, root, run};

fn tools() -> bool {
    let tools = ["unshare", "dpkg-deb", "apt-get", "cpio", "depmod", "mke2fs", "qemu-img"];
    root() && tools.iter().all(|t| have(t))
}

/// A store that finds packages of earlier runs.
fn cached() -> Fixture {
    let f = fixture();
    if let Some(cache) = std::env::var_os("OBLAK_IMAGE_CACHE").map(PathBuf::from).filter(|c| c.join("debs").is_dir()) {
        let debs = f.store.dir().join("cache/debs");
        std::fs::create_dir_all(&debs).unwrap();
        for entry in std::fs::read_dir(cache.join("debs")).unwrap().flatten() {
            std::fs::copy(entry.path(), debs.join(entry.file_name())).unwrap();
        }
    }
    f
}

/// None where packages cannot be had: no mirror is a fact of the machine, not a fault of the recipe.
async fn build(f: &Fixture, name: &str) -> Option<ImageRecord> {
    match f.import(name, Source::Recipe { name: name.into() }).await {
        Ok(record) => Some(record),
        Err(e) if e.detail.contains("cannot download") || e.detail.contains("neither at the mirror") => {
            eprintln!("skipped: {e}");
            f.assert_empty();
            None
        }
        Err(e) => panic!("{e}"),
    }
}

#[tokio::test]
async fn tiny_has_a_kernel_and_a_disk() {
    if !tools() {
        return;
    }
    let f = cached();
    let Some(record) = build(&f, "tiny").await else { return };
    let Payload::Kernel { kernel, initrd, cmdline, disk, .. } = &record.payload else { panic!("{record:?}") };
    assert!(cmdline.contains("console=ttyS0"), "{cmdline}");
    assert_eq!(std::fs::read(kernel).unwrap().get(0x202..0x206), Some(b"HdrS".as_slice()), "not a bzImage");
    assert!(initrd.as_ref().unwrap().exists());
    let raw = f.path("disk.raw");
    run("qemu-img", &["convert", "-O", "raw", disk.as_ref().unwrap().to_str().unwrap(), raw.to_str().unwrap()]);
    run("e2fsck", &["-fn", raw.to_str().unwrap()]);
    assert_eq!(record.properties["default_user"], "root");
    assert_eq!(f.names("tmp"), ["downloads"]);
}

#[tokio::test]
async fn busybox_runs() {
    if !tools() {
        return;
    }
    let f = cached();
    let Some(record) = build(&f, "busybox").await else { return };
    let Payload::Oci { config, layers, .. } = &record.payload else { panic!("{record:?}") };
    assert_eq!(config.cmd, ["sh"]);
    let tree = f.store.unpack_layers("busybox").await.unwrap().pop().unwrap();
    assert_eq!(tree, layers[0].path);
    run(
        "chroot",
        &[tree.to_str().unwrap(), "/bin/sh", "-c", "ls / && id -u && [ -k /tmp ] && [ $(stat -c %a /root) = 700 ]"],
    );
}

fn recipe(dir: &Path, name: &str, script: &str) {
    std::fs::create_dir_all(dir.join(name)).unwrap();
    std::fs::write(dir.join(name).join("build.sh"), script).unwrap();
}

#[tokio::test]
async fn recipes_that_fail_or_are_given_up_leave_nothing() {
    use std::time::{Duration, Instant};
    use tokio::sync::watch;
    if !root() || !have("unshare") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    recipe(dir.path(), "bad", "echo 'progress 5 begun'; echo 'error missing packages: nothing-at-all' >&2; exit 1");
    recipe(dir.path(), "silent", "mkdir -p \"$2\"; exit 0");
    recipe(
        dir.path(),
        "slow",
        "echo 'progress 20 sleeping'; mount -t tmpfs none \"$TMPDIR\"; (while :; do sleep 1; done) & sleep 600",
    );
    let f = fixture_with(Options { recipes: Some(dir.path().into()), ..Options::default() });
    let error = f.import("x", Source::Recipe { name: "bad".into() }).await.unwrap_err();
    assert!(error.code == Code::Unsupported && error.detail.contains("nothing-at-all"), "{error}");
    assert_eq!(f.import("x", Source::Recipe { name: "silent".into() }).await.unwrap_err().code, Code::RecipeFailed);
    let error = f.import("x", Source::Recipe { name: "../bad".into() }).await.unwrap_err();
    assert!(error.code == Code::NotFound && error.detail.contains("bad, silent, slow"), "{error}");

    let cancel = tokio_util::sync::CancellationToken::new();
    let progress = watch::Sender::new(oblak_image::Progress::default());
    let mut seen = progress.subscribe();
    let (store, stop) = (f.store.clone(), cancel.clone());
    let task = tokio::spawn(async move {
        store.import("x", "x", Source::Recipe { name: "slow".into() }, None, progress, stop).await
    });
    let deadline = Duration::from_secs(20);
    tokio::time::timeout(deadline, seen.wait_for(|p| p.message == "sleeping")).await.unwrap().unwrap();
    let begun = Instant::now();
    cancel.cancel();
    assert_eq!(task.await.unwrap().unwrap_err().code, Code::Cancelled);
    assert!(begun.elapsed() < Duration::from_secs(10));
    f.assert_empty();
}

#[tokio::test]
async fn results_of_recipes_are_checked() {
    if !root() || !have("qemu-img") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join("tiny")).unwrap();
    let write = |disk_digest: &str, kernel: &str| {
        let manifest = format!(
            r#"{{"schema":1,"kind":"kernel","kernel":"{kernel}","initrd":null,"cmdline":"c","disk":"d","disk_format":"qcow2","digests":{{"d":"{disk_digest}"}}}}"#
        );
        std::fs::write(dir.path().join("tiny/manifest.json"), manifest).unwrap();
    };
    std::fs::write(dir.path().join("tiny/k"), "kernel").unwrap();
    support::qcow2(&dir.path().join("tiny/d"));
    let f = fixture_with(Options { prebuilt: Some(dir.path().into()), ..Options::default() });
    let tiny = || Source::Recipe { name: "tiny".into() };
    write(&support::digest(b"other"), "k");
    assert_eq!(f.import("x", tiny()).await.unwrap_err().code, Code::ImageCorrupt);
    write(&support::digest(b"other"), "../../../etc/shadow");
    assert_eq!(f.import("x", tiny()).await.unwrap_err().code, Code::RecipeFailed);
    f.assert_empty();
    write(&support::digest(&std::fs::read(dir.path().join("tiny/d")).unwrap()), "k");
    let record = f.import("x", tiny()).await.unwrap();
    assert_eq!(record.virtual_size_bytes, 64 << 20);

    let mut export = Vec::new();
    tokio::io::AsyncReadExt::read_to_end(&mut f.store.export("x").unwrap().reader(0), &mut export).await.unwrap();
    let there = fixture();
    let copy = there.upload("x", export, None).await.unwrap();
    assert_eq!(copy.digest, record.digest);
    let Payload::Kernel { kernel, cmdline, .. } = &copy.payload else { panic!("{copy:?}") };
    assert_eq!((std::fs::read_to_string(kernel).unwrap().as_str(), cmdline.as_str()), ("kernel", "c"));
}

/// Minutes long; run with `--ignored` after changing the recipe.
#[tokio::test]
#[ignore = "builds a whole distribution"]
async fn debian_12_has_boot_loaders() {
    if !tools() || !have("mmdebstrap") {
        return;
    }
    let f = cached();
    let Some(record) = build(&f, "debian-12").await else { return };
    let Payload::Disk { blob, .. } = &record.payload else { panic!("{record:?}") };
    let raw = f.path("disk.raw");
    run("qemu-img", &["convert", "-O", "raw", blob.to_str().unwrap(), raw.to_str().unwrap()]);
    let bytes = std::fs::read(&raw).unwrap();
    assert_eq!(&bytes[512..520], b"EFI PART");
    assert_eq!(&bytes[510..512], b"\x55\xaa");
    // GRUB's first sector says where its image begins, the image says where its rest is.
    assert_eq!(&bytes[0x5c..0x64], &2048u64.to_le_bytes());
    assert_eq!(&bytes[2048 * 512 + 0x1f4..2048 * 512 + 0x1fc], &2049u64.to_le_bytes());
    assert_eq!(record.properties["default_user"], "debian");
    assert_eq!(f.names("tmp"), ["downloads"]);
}
