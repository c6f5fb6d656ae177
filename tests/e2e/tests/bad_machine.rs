//! Machines that lack something: rights, programs, space, a port. Each says what to do and goes on with what it can.

#![allow(clippy::unwrap_used, reason = "a test that panics has failed")]

use std::ffi::OsStr;
use std::io::{Seek, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use oblak_e2e::{Cloud, Draft, Running, Settings, listener, until};
use oblak_model::{Isolation, Node, Phase};

const SOON: Duration = Duration::from_secs(60);

#[test]
fn without_root_or_port_nothing_is_begun() {
    let Some(cloud) = Cloud::prepare(Settings::default()) else { return };
    // A copy that anybody may run, wherever the original is.
    let binary = cloud.dir.join("oblak");
    std::fs::copy(&cloud.env.binary, &binary).unwrap();
    std::fs::set_permissions(&binary, std::fs::Permissions::from_mode(0o755)).unwrap();
    let home = cloud.dir.join("nobody");
    std::fs::create_dir(&home).unwrap();
    std::os::unix::fs::chown(&home, Some(65534), Some(65534)).unwrap();
    let mut up = Command::new(&binary);
    up.args(["up", "--data"]).arg(home.join("data")).uid(65534).gid(65534).env("HOME", &home).current_dir(&home);
    let error = Running::start(up).wait(SOON).fails();
    assert!(error.contains("root") && error.contains("sudo"), "{error}");
    assert_eq!(std::fs::read_dir(&home).unwrap().count(), 0, "nothing is made");

    let (_held, port) = listener();
    let mut up = cloud.up_command();
    up.args(["--listen", &format!("127.0.0.1:{port}")]);
    let words: Vec<_> = up.get_args().map(ToOwned::to_owned).collect();
    // The flag is given once: the first one goes.
    let first = words.iter().position(|w| w == "--listen").unwrap();
    let mut up = cloud.command(&[]);
    up.args(words.iter().enumerate().filter(|(i, _)| *i != first && *i != first + 1).map(|(_, w)| w));
    let error = Running::start(up).wait(SOON).fails();
    assert!(error.contains(&port.to_string()) && error.contains("use"), "{error}");
    cloud.nothing_left(true);
}

#[test]
fn up_is_idempotent_and_detaches() {
    let Some(mut cloud) = Cloud::prepare(Settings::default()) else { return };
    let detach = |cloud: &Cloud| {
        // A path that is relative to where the command is given.
        let relative = |word: &OsStr| if word == cloud.data { "data".into() } else { word.to_owned() };
        let mut up = cloud.command(&[]);
        up.args(cloud.up_command().get_args().map(relative)).arg("--detach");
        Running::start(up).wait(SOON).ok()
    };
    let first = detach(&cloud);
    assert!(
        first.contains("https://127.0.0.1:") && first.contains("admin / ") && first.contains("oblak launch"),
        "{first}"
    );
    let second = detach(&cloud);
    assert!(second.contains("already") && !second.contains("admin / "), "{second}");
    until("it serves", SOON, || (cloud.oblak(&["node", "list"]).code == 0).then_some(()));
    let config = std::fs::metadata(cloud.dir.join("config.json")).unwrap();
    assert_eq!(config.permissions().mode() & 0o777, 0o600);
    cloud.down(&["--stop-guests"]);
    let mut again = cloud.command(&["down", "--data"]);
    again.arg(&cloud.data);
    let text = Running::start(again).wait(SOON).ok();
    assert!(text.contains("does not run"), "{text}");
    cloud.nothing_left(true);
}

#[test]
fn without_a_program_the_rest_works_and_says_what_is_missing() {
    let Some(mut cloud) = Cloud::prepare(Settings::default()) else { return };
    let node = |cloud: &Cloud| -> Node { cloud.wait(cloud.client().get("", "n1")).unwrap() };

    // No emulator: containers run, machines do not and say why.
    cloud.settings.hidden = ["qemu-system-*"].map(String::from).to_vec();
    cloud.up();
    let facts = node(&cloud).status.facts;
    assert!(facts.isolations.contains(&Isolation::Container), "{facts:#?}");
    let (_, reason) =
        facts.unavailable.iter().find(|(i, _)| *i == Isolation::Vm).expect("no machines without an emulator");
    assert!(reason.contains("qemu"), "{reason}");
    Draft::container("job", &["sleep", "100000"]).run(&mut cloud);
    Draft::machine("vm").create(&cloud).unwrap();
    cloud.explained("vm", &["nodes fit", "0 of 1 nodes fit", "qemu"]);
    cloud.clear();
    cloud.down(&["--stop-guests"]);

    // No container runtime: the other way round.
    cloud.settings.hidden = ["crun", "runc", "youki"].map(String::from).to_vec();
    cloud.up();
    let facts = node(&cloud).status.facts;
    assert!(facts.isolations.contains(&Isolation::Vm), "{facts:#?}");
    let (_, reason) = facts.unavailable.iter().find(|(i, _)| *i == Isolation::Container).expect("no containers");
    assert!(reason.contains("crun"), "{reason}");
    Draft::container("job", &["sleep", "100000"]).create(&cloud).unwrap();
    cloud.explained("job", &["nodes fit", "crun"]);
    // Installed: what waits starts by itself after the next start.
    cloud.kill_server();
    cloud.settings.hidden.clear();
    cloud.up();
    cloud.in_phase("job", Phase::Running, SOON);
    cloud.clear();
    cloud.down(&["--stop-guests"]);

    // No packet filter: a guest without network runs; one with a network says what is missing.
    cloud.settings.hidden = ["nft"].map(String::from).to_vec();
    cloud.up();
    let probes = node(&cloud).status.facts.probes;
    assert!(probes.iter().any(|p| p.name == "nftables" && !p.available), "{probes:#?}");
    Draft::container("alone", &["sleep", "100000"]).with(|s| s.networks = Some(Vec::new())).run(&mut cloud);
    Draft::container("job", &["sleep", "100000"]).create(&cloud).unwrap();
    cloud.explained("job", &["nftables", "install"]);
    cloud.clear();
    cloud.nothing_left(false);
    cloud.down(&["--stop-guests"]);
    cloud.nothing_left(true);
}

/// A small file system of the test's own.
struct SmallDisk(PathBuf);

impl SmallDisk {
    fn new(dir: &Path, mebibytes: u64) -> Option<Self> {
        let (file, point) = (dir.join("disk.img"), dir.join("data"));
        let run =
            |program: &str, args: &[&str]| Command::new(program).args(args).output().is_ok_and(|o| o.status.success());
        std::fs::File::create(&file).and_then(|f| f.set_len(mebibytes << 20)).unwrap();
        std::fs::create_dir(&point).unwrap();
        let (file, at) = (file.display().to_string(), point.display().to_string());
        if run("mkfs.ext4", &["-q", "-F", "-m", "0", &file]) && run("mount", &["-o", "loop", &file, &at]) {
            return Some(Self(point));
        }
        println!("skipped: no loop device");
        None
    }

    /// Takes all space.
    fn fill(&self) -> PathBuf {
        let stat = nix::sys::statvfs::statvfs(&self.0).unwrap();
        let filler = self.0.join("filler");
        let mut file = std::fs::File::create(&filler).unwrap();
        // Most of it without writing, the rest as whoever writes meets it.
        let most = stat.blocks_available() * stat.fragment_size() / 100 * 98;
        nix::fcntl::fallocate(&file, nix::fcntl::FallocateFlags::empty(), 0, i64::try_from(most).unwrap()).unwrap();
        file.seek(std::io::SeekFrom::End(0)).unwrap();
        let piece = vec![1u8; 64 * 1024];
        while file.write_all(&piece).is_ok() {}
        let _ = file.sync_all();
        filler
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = nix::mount::umount2(&self.0, nix::mount::MntFlags::MNT_DETACH);
    }
}

#[test]
fn a_full_disk_is_reported_and_survived() {
    let Some(mut cloud) = Cloud::prepare(Settings::default()) else { return };
    let Some(disk) = SmallDisk::new(&cloud.dir, 4096) else { return };
    cloud.up();
    Draft::container("kept", &["sleep", "100000"]).run(&mut cloud);
    cloud.oblak(&["image", "wait", "tiny"]).ok();
    let filler = disk.fill();
    // The store may have some room left in its file: what it accepts it keeps, and it refuses the rest in so many words.
    let full = |text: &str| text.to_lowercase().contains("space") || text.contains("full");
    let mut accepted = Vec::new();
    let refused = until("a refusal", SOON, || {
        let name = format!("late-{}", accepted.len());
        match Draft::container(&name, &["sleep", "100000"]).create(&cloud) {
            Ok(_) => accepted.push(name),
            Err(error) => return Some(error.to_string()),
        }
        None
    });
    assert!(full(&refused), "{refused}");
    println!("accepted {}, then: {refused}", accepted.len());
    assert_eq!(cloud.instance("kept").status.phase, Phase::Running);
    cloud.exec("kept", &["true"]).ok();
    // With room again everything goes on without anybody's help.
    std::fs::remove_file(filler).unwrap();
    until("a launch succeeds", SOON, || Draft::container("after", &["sleep", "100000"]).create(&cloud).ok());
    for name in accepted.iter().map(String::as_str).chain(["after"]) {
        cloud.in_phase(name, Phase::Running, SOON);
    }
    cloud.machine.remember();
    cloud.clear();
    cloud.nothing_left(false);
    // Full at the start: it says so, or serves what it can.
    cloud.down(&["--stop-guests"]);
    let filler = disk.fill();
    let mut up = cloud.up_command();
    up.arg("--detach");
    let ran = Running::start(up).wait(SOON);
    if ran.code == 0 {
        cloud.oblak(&["list"]).ok();
        cloud.down(&[]);
    } else {
        assert!(full(&ran.err), "{ran:?}");
    }
    std::fs::remove_file(filler).unwrap();
    cloud.up();
    cloud.finish();
    drop(disk);
}
