//! A whole distribution: its own boot loader, systemd and cloud-init. Slow without hardware that runs guests.

#![allow(clippy::unwrap_used, reason = "a test that panics has failed")]

use std::process::Command;
use std::time::Duration;

use oblak_e2e::{Cloud, until};
use oblak_model::Phase;

/// A build of the image, or a boot, on two slow cores that others use too.
const LONG: Duration = Duration::from_secs(900);

#[test]
fn debian_12_boots_through_its_own_loader() {
    if std::env::var("OBLAK_TEST_SLOW").is_ok_and(|v| v == "0") {
        println!("skipped: OBLAK_TEST_SLOW=0");
        return;
    }
    let Some(mut cloud) = Cloud::start() else { return };
    let key = cloud.dir.join("id");
    let made = Command::new("ssh-keygen").args(["-q", "-t", "ed25519", "-N", "", "-f"]).arg(&key).output().unwrap();
    assert!(made.status.success(), "{made:?}");
    let public = key.with_extension("pub").display().to_string();
    let launch = ["launch", "debian-12", "--name", "deb", "--flavor", "m", "--key", &public, "--wait"];
    oblak_e2e::Running::start(cloud.command(&launch)).wait(LONG).ok();
    cloud.machine.remember();
    assert_eq!(cloud.instance("deb").status.phase, Phase::Running);

    // The same content through UEFI, while the first one boots.
    let image = cloud.env.images.join("debian-12/debian-12.qcow2");
    let image = if image.exists() { Some(image) } else { stored_disk(&cloud) };
    let image = image.expect("the built disk is somewhere").display().to_string();
    cloud.oblak(&["image", "create", "deb-uefi", "--from-file", &image, "--firmware", "uefi", "--wait"]).ok();
    cloud.oblak(&["launch", "deb-uefi", "--name", "uefi", "--flavor", "m", "--wait"]).ok();
    cloud.machine.remember();
    // The kernel itself is told to be quiet; the check of the root file system is the first word after it.
    until("the kernel has found its root after UEFI", LONG, || {
        cloud.oblak(&["logs", "uefi"]).out.contains("oblak-root: clean").then_some(())
    });
    let log = cloud.oblak(&["logs", "uefi"]).out;
    let (firmware, loader) = (log.find("BdsDxe: starting"), log.find("GRUB"));
    assert!(firmware.is_some() && firmware < loader, "UEFI firmware, then the image's own loader:\n{log}");
    cloud.oblak(&["delete", "uefi"]).ok();

    until("cloud-init is done", LONG, || {
        let log = cloud.oblak(&["logs", "deb"]).out;
        (log.contains("Cloud-init v.") && log.contains("finished at")).then_some(())
    });
    let hostname = cloud.oblak(&["ssh", "deb", "--", "hostname"]).ok();
    assert_eq!(hostname.trim(), "deb");
    let firmware = cloud.oblak(&["ssh", "deb", "--", "test -d /sys/firmware/efi && echo uefi || echo bios"]).ok();
    assert_eq!(firmware.trim(), "bios");
    let failed = cloud.oblak(&["ssh", "deb", "--", "systemctl --failed --no-legend --plain"]).ok();
    assert_eq!(failed.trim(), "", "units that failed");
    cloud.oblak(&["delete", "deb"]).ok();
    cloud.finish();
}

/// The disk that the product built, in its content store: the largest file there.
fn stored_disk(cloud: &Cloud) -> Option<std::path::PathBuf> {
    let mut dirs = vec![cloud.data.join("images")];
    let mut largest = None;
    while let Some(dir) = dirs.pop() {
        for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
            let Ok(meta) = entry.metadata() else { continue };
            if meta.is_dir() {
                dirs.push(entry.path());
            } else if largest.as_ref().is_none_or(|(size, _)| meta.len() > *size) {
                largest = Some((meta.len(), entry.path()));
            }
        }
    }
    largest.map(|(_, path)| path)
}
