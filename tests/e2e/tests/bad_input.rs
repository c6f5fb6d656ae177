//! Mistakes of users: each is refused with what to do about it, and leaves nothing half-made.

#![allow(clippy::unwrap_used, reason = "a test that panics has failed")]

use std::time::Duration;

use oblak_e2e::{Cloud, Draft};
use oblak_model::{ImageKind, InstanceKind, KeyKind, PortKind, VolumeKind};

const SOON: Duration = Duration::from_secs(30);

/// A command that must fail and say all of these words.
#[track_caller]
fn refused(cloud: &Cloud, line: &str, words: &[&str]) {
    let error = cloud.oblak(&line.split_whitespace().collect::<Vec<_>>()).fails();
    for word in words {
        assert!(error.contains(word), "`oblak {line}` does not say {word:?}:\n{error}");
    }
}

#[test]
fn mistakes_are_explained() {
    let Some(mut cloud) = Cloud::start() else { return };
    Draft::container("job", &["sleep", "100000"]).run(&mut cloud);
    cloud.oblak(&["volume", "create", "data", "--size", "16MiB", "--format", "directory"]).ok();

    refused(&cloud, "launch busybox --nmae web", &["--nmae", "--name"]);
    refused(&cloud, "lanuch busybox", &["lanuch", "launch"]);
    refused(&cloud, "launch busybox --name job", &["job", "exists already"]);
    refused(&cloud, "launch busybxo --name web", &["busybxo", "image"]);
    refused(&cloud, "launch busybox --name Web_1", &["name", "lower-case"]);
    refused(&cloud, "launch busybox --name web --flavor gigantic", &["gigantic"]);
    refused(&cloud, "launch busybox --name web --network nowhere", &["nowhere"]);
    refused(&cloud, "launch busybox --name web --network default:192.168.7.7", &["192.168.7.7"]);
    refused(&cloud, "launch busybox --name web --security-group none", &["none"]);
    refused(&cloud, "launch busybox --name web --volume lost:/data", &["lost"]);
    refused(&cloud, "launch busybox --name web --publish 99999:80", &["99999"]);
    refused(&cloud, "launch busybox --name web --publish http", &["http"]);
    refused(&cloud, "launch tiny --name web --isolation container", &["tiny", "container"]);
    refused(&cloud, "launch tiny --name web --key /no/such/key.pub", &["/no/such/key.pub"]);
    let garbage = cloud.dir.join("garbage.pub");
    std::fs::write(&garbage, "-----BEGIN OPENSSH PRIVATE KEY-----\nnot for others\n").unwrap();
    refused(&cloud, &format!("launch tiny --name web --key {}", garbage.display()), &["private key"]);
    refused(&cloud, "volume create data --size 1GiB", &["data", "exists already"]);
    refused(&cloud, "volume create other --size lots", &["lots"]);
    refused(&cloud, "volume create other --size 0", &["size"]);
    refused(&cloud, "volume grow data --size 1MiB", &["shrink"]);
    refused(&cloud, "volume attach data nobody", &["nobody"]);
    refused(&cloud, "delete nobody", &["nobody"]);
    refused(&cloud, "exec nobody -- true", &["nobody"]);
    refused(&cloud, "ssh nobody", &["nobody"]);
    refused(&cloud, "resize job --flavor gigantic", &["gigantic"]);
    refused(&cloud, "restore job never-taken", &["never-taken"]);
    refused(&cloud, "get nonsense/x", &["nonsense"]);
    refused(&cloud, "get job", &["instance/job"]);
    refused(&cloud, "exec job -- no-such-program", &["no-such-program", "check the command"]);
    refused(&cloud, "volume attach data job", &["--mount"]);
    refused(&cloud, "delete network/default", &["job"]);
    refused(&cloud, "list --label =", &["label"]);
    refused(&cloud, "apply -f /no/such/stack.yaml", &["/no/such/stack.yaml"]);
    let broken = cloud.dir.join("broken.yaml");
    std::fs::write(&broken, "kind: instance\nmetadata: {name: x}\nspec: {image: busybox, flavour: s}\n").unwrap();
    refused(&cloud, &format!("apply -f {}", broken.display()), &["flavour"]);
    for (text, words) in [
        ("kind: widget\nmetadata: {name: x}\n", ["widget", "instance"]),
        ("kind: flavor\nmetadata: {name: x}\n", ["flavor", "whole cloud"]),
        ("kind: instance\nmetadata: {name: x}\n", ["instance/x", "missing field `image`"]),
        ("kind: instance\nmetadata: {name: x\n", ["broken.yaml", "not YAML"]),
        ("kind: instance\nmetadata: {name: x}\nspec: {image: nope}\n", ["instance/x", "correct spec.image"]),
    ] {
        std::fs::write(&broken, text).unwrap();
        refused(&cloud, &format!("apply -f {}", broken.display()), &words);
    }
    let volume = |i| format!("---\nkind: volume\nmetadata: {{name: v{i}}}\nspec: {{size: 1MiB}}\n");
    std::fs::write(&broken, (0..60).map(volume).collect::<String>()).unwrap();
    refused(&cloud, &format!("apply -f {}", broken.display()), &["60 resources", "in parts of about"]);
    restart_after_a_refusal(&cloud);
    refused(&cloud, "--project nowhere list", &["nowhere"]);
    refused(&cloud, "--server https://127.0.0.1:1 list", &["127.0.0.1:1"]);
    let mut stranger = cloud.command(&["list"]);
    stranger.env("OBLAK_TOKEN", "oblak_aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa");
    let error = oblak_e2e::Running::start(stranger).wait(SOON).fails();
    assert!(error.to_lowercase().contains("log in") || error.contains("login"), "{error}");

    // What is off cannot be talked to, and says so.
    cloud.oblak(&["stop", "job"]).ok();
    refused(&cloud, "exec job -- true", &["job"]);

    // Nothing half-made: one instance with one port, one volume, and no key.
    let names = |items: Vec<String>| items;
    assert_eq!(names(cloud.all::<InstanceKind>("default").into_iter().map(|o| o.metadata.name).collect()), ["job"]);
    assert_eq!(cloud.all::<PortKind>("default").len(), 1);
    assert_eq!(names(cloud.all::<VolumeKind>("default").into_iter().map(|o| o.metadata.name).collect()), ["data"]);
    assert!(cloud.all::<KeyKind>("default").is_empty());
    // The names are free: what was refused did not take them.
    cloud.oblak(&["launch", "busybox", "--name", "web", "--flavor", "xs", "--wait", "--", "sleep", "1000"]).ok();
    cloud.finish();
}

#[test]
fn bad_images_are_refused() {
    let Some(mut cloud) = Cloud::start() else { return };
    let tiny = cloud.env.images.join("tiny");
    let disk = std::fs::read_dir(&tiny)
        .unwrap()
        .flatten()
        .map(|e| e.path())
        .find(|p| p.extension().is_some_and(|e| e == "qcow2"));
    let disk = disk.expect("the tiny image has a qcow2 disk");
    let bytes = std::fs::read(&disk).unwrap();
    let write = |name: &str, bytes: &[u8]| {
        let path = cloud.dir.join(name);
        std::fs::write(&path, bytes).unwrap();
        path.display().to_string()
    };
    let truncated = write("truncated.qcow2", &bytes[..bytes.len() / 2]);
    let mut wrong = bytes.clone();
    wrong[24..32].copy_from_slice(&u64::MAX.to_be_bytes());
    let corrupt = write("corrupt.qcow2", &wrong);
    let empty = write("empty.img", &[]);
    let mut escape = bytes.clone();
    // A backing file named in the header: offset and length of its name (QEMU, docs/interop/qcow2.txt).
    escape[8..16].copy_from_slice(&0x200u64.to_be_bytes());
    escape[16..20].copy_from_slice(&11u32.to_be_bytes());
    escape[0x200..0x20b].copy_from_slice(b"/etc/shadow");
    let escape = write("escape.qcow2", &escape);
    for (name, file) in [("truncated", &truncated), ("corrupt", &corrupt), ("empty", &empty), ("escape", &escape)] {
        let error = cloud.oblak(&["image", "create", name, "--from-file", file, "--wait"]).fails();
        assert!(error.contains(name), "{error}");
        assert!(!error.contains("internal"), "{error}");
    }
    let error = cloud.oblak(&["image", "create", "lost", "--from-file", "/no/such/file.qcow2"]).fails();
    assert!(error.contains("/no/such/file.qcow2"), "{error}");
    let sum = format!("sha256:{}", "0".repeat(64));
    let good = disk.display().to_string();
    let error = cloud.oblak(&["image", "create", "sum", "--from-file", &good, "--checksum", &sum, "--wait"]).fails();
    assert!(error.contains("sha256:") || error.contains("checksum"), "{error}");

    // No bytes of them are kept.
    let left = || files(&cloud.data.join("images/tmp"));
    let clean = oblak_e2e::eventually(SOON, || left().is_empty().then_some(()));
    assert!(clean.is_some(), "left of the uploads: {:?}", left());
    // None can be used, and a launch says why.
    for image in cloud.all::<ImageKind>("default") {
        let usable = image.status.phase == oblak_model::ImagePhase::Ready;
        assert!(!usable || ["tiny", "busybox", "debian-12"].contains(&image.metadata.name.as_str()), "{image:?}");
    }

    // A good one is taken whole.
    cloud.oblak(&["image", "create", "good", "--from-file", &good, "--wait"]).ok();
    let image = cloud.oblak(&["get", "image/good", "-o", "json"]).ok();
    let image: oblak_model::Image = serde_json::from_str(&image).unwrap();
    assert_eq!(image.status.content, Some(oblak_model::ImageContent::Disk));
    cloud.oblak(&["image", "delete", "good"]).ok();
    cloud.machine.remember();
    cloud.finish();
}

/// A running container cannot take a volume; the restart that is advised works, and is not mistaken for refused.
fn restart_after_a_refusal(cloud: &Cloud) {
    refused(cloud, "volume attach data job --mount /data", &["oblak restart job"]);
    cloud.oblak(&["restart", "job", "--wait"]).ok();
    cloud.oblak(&["exec", "job", "--", "touch", "/data/file"]).ok();
    cloud.oblak(&["volume", "detach", "data", "job", "--no-wait"]).ok();
}

/// Whoever waits for an image from a place that does not answer sees why, and that it is tried again.
#[test]
fn an_unreachable_source_is_said_while_it_is_tried_again() {
    let Some(cloud) = Cloud::start() else { return };
    cloud.oblak(&["image", "create", "far", "--from-registry", "127.0.0.1:1/a/b:c", "--insecure"]).ok();
    let said = oblak_e2e::eventually(SOON, || {
        let text = cloud.oblak(&["explain", "image/far"]).ok();
        (text.contains("127.0.0.1:1 cannot be reached") && text.contains("attempt ") && text.contains(" of 5"))
            .then_some(text)
    });
    let said = said.expect("the last error and the next attempt");
    assert!(said.starts_with("image/far is importing: "), "{said}");
    let ran = cloud.oblak(&["image", "wait", "far"]).fails();
    assert!(ran.contains("cannot be reached") && ran.contains("tried 5 times"), "{ran}");
    cloud.oblak(&["image", "delete", "far"]).ok();
    cloud.finish();
}

fn files(dir: &std::path::Path) -> Vec<std::path::PathBuf> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten().map(|e| e.path());
    entries.flat_map(|p| if p.is_dir() { files(&p) } else { vec![p] }).collect()
}
