//! Kills, missing parts and full disks, on real qemu. Only the last test needs a system inside.

mod support;

use std::time::Duration;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use oblak_compute::shim::ShimRecord;
use oblak_compute::{Boot, ComputeDriver, DiskFormat, Firmware, GuestState, NicAttach, NicSpec};
use oblak_model::{PortId, Size};
use oblak_platform::driver::Remedy;
use support::{World, tiny};
use uuid::Uuid;

const SOON: Duration = Duration::from_secs(20);
const BOOT: Duration = Duration::from_secs(120);
const OVER: [GuestState; 2] = [GuestState::Stopped, GuestState::Failed];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killed_emulators_and_shims_are_seen_and_run_again_once() {
    let Some(tiny) = tiny() else { return };
    let world = World::new(tiny);
    let mut spec = world.spec();
    let seen = world.driver().ensure(&spec).await.unwrap();
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(seen.pid.unwrap()), nix::sys::signal::Signal::SIGKILL).unwrap();
    let seen = world.wait(spec.id, &OVER, SOON).await;
    assert_eq!(
        (seen.state, seen.reason.as_str(), seen.exit_code),
        (GuestState::Failed, "Killed", Some(137)),
        "{seen:?}"
    );
    assert_eq!(
        world.driver().ensure(&spec).await.unwrap().state,
        GuestState::Failed,
        "the same run is not started again"
    );

    spec.run = 2;
    let seen = world.driver().ensure(&spec).await.unwrap();
    assert_eq!((seen.state, seen.run), (GuestState::Running, 2));
    let record = ShimRecord::read(&world.dir(spec.id)).unwrap().unwrap();
    assert!(record.shim.kill());
    let seen = world.wait(spec.id, &OVER, SOON).await;
    assert_eq!((seen.state, seen.reason.as_str()), (GuestState::Failed, "ShimLost"), "{seen:?}");
    assert!(record.guest.unwrap().wait_gone(SOON).await, "no emulator runs without its shim");

    // A new driver, a new run: one emulator.
    world.restart();
    spec.run = 3;
    assert_eq!(world.driver().ensure(&spec).await.unwrap().run, 3);
    world.driver().remove(spec.id).await.unwrap();
    assert_eq!(world.leaks(spec.id), Vec::<String>::new());
}

#[tokio::test]
async fn guests_of_another_driver_are_left_alone() {
    let temp = tempfile::tempdir().unwrap();
    let config = oblak_compute_vm::QemuConfig::new(temp.path(), temp.path().join("state"), vec!["/no/shim".into()]);
    let driver = oblak_compute_vm::QemuDriver::new(config);
    let id = oblak_model::InstanceId(Uuid::now_v7());
    let dir = temp.path().join(id.to_string());
    std::fs::create_dir(&dir).unwrap();
    let mut other = std::process::Command::new("sleep").arg("60").spawn().unwrap();
    let who = oblak_platform::process::Identity::of(i32::try_from(other.id()).unwrap()).unwrap();
    let shim = ShimRecord {
        kind: "container".into(),
        run: 1,
        epoch: 1,
        shim: who.clone(),
        guest: Some(who.clone()),
        started_at: oblak_model::Timestamp::EPOCH,
        runtime: "crun".into(),
        stopping: false,
    };
    shim.write(&dir).unwrap();
    std::fs::write(dir.join(oblak_compute::shim::file::LOCK), serde_json::to_vec(&who).unwrap()).unwrap();
    assert!(driver.list().await.unwrap().is_empty());
    assert_eq!(driver.observe(id).await.unwrap().state, GuestState::Absent);
    driver.stop(id, Duration::ZERO).await.unwrap();
    driver.remove(id).await.unwrap();
    assert!(who.is_alive() && ShimRecord::read(&dir).unwrap().is_some());
    other.kill().unwrap();
    other.wait().unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_missing_is_named_and_nothing_is_left() {
    let Some(tiny) = tiny() else { return };
    let world = World::new(tiny);
    let spec = world.spec();
    let Boot::Kernel { root: Some(root), .. } = spec.boot.clone() else { panic!("a kernel with a root disk") };
    let refused = async |change: &dyn Fn(&mut oblak_compute::GuestSpec)| {
        let mut bad = spec.clone();
        change(&mut bad);
        let error = world.driver().ensure(&bad).await.unwrap_err();
        assert_eq!(world.driver().observe(bad.id).await.unwrap().state, GuestState::Absent, "{error:?}");
        (error.code, error.remedy)
    };
    let disk = |path: std::path::PathBuf, format, firmware| Boot::Disk { root: path, format, firmware };
    assert_eq!(refused(&|s| s.memory = Size::mib(1)).await.0, "bad_spec");
    assert_eq!(refused(&|s| s.dir = "/tmp".into()).await.0, "bad_spec");
    assert_eq!(refused(&|s| s.boot = disk("/no/disk".into(), DiskFormat::Raw, Firmware::Bios)).await.0, "disk_missing");
    let not_qcow2 = world.tiny.join("vmlinuz");
    assert_eq!(
        refused(&|s| s.boot = disk(not_qcow2.clone(), DiskFormat::Qcow2, Firmware::Bios)).await.0,
        "image_format"
    );
    let tap = |netns: &str| NicSpec {
        port: PortId(Uuid::now_v7()),
        mac: "02:00:00:00:00:01".into(),
        mtu: 1500,
        attach: NicAttach::Tap { netns: netns.into(), device: "no-such-tap".into(), vnet_hdr: true },
    };
    for netns in ["/proc/self/ns/net", "/run/netns/oblak-no-such"] {
        assert_eq!(refused(&|s| s.nics = vec![tap(netns)]).await, ("port_missing".into(), Remedy::Retry), "{netns}");
    }
    // Refused starts do not use up their run.
    assert_eq!(world.driver().ensure(&spec).await.unwrap().state, GuestState::Running);
    world.driver().stop(spec.id, Duration::ZERO).await.unwrap();

    // What only the emulator can find out ends the run, with its words.
    let whole = std::fs::read(&root).unwrap();
    let mut damaged = whole.clone();
    // Bytes 20 to 23 hold the size of clusters as a power of two.
    damaged[23] = 99;
    std::fs::write(&root, &damaged).unwrap();
    let mut broken = spec.clone();
    broken.run = 2;
    let seen = world.driver().ensure(&broken).await.unwrap();
    assert_eq!((seen.state, seen.reason.as_str()), (GuestState::Failed, "StartFailed"), "{seen:?}");
    assert!(seen.message.contains("could not be started") && seen.message.contains("luster size"), "{}", seen.message);
    std::fs::write(&root, &whole[..1000]).unwrap();
    broken.run = 3;
    let error = world.driver().ensure(&broken).await.unwrap_err();
    assert!(error.code == "image_format" && error.detail.contains("truncated"), "{error:?}");
    world.driver().remove(spec.id).await.unwrap();
    assert_eq!(world.leaks(spec.id), Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn firmware_boots_and_keeps_its_variables() {
    let Some(tiny) = tiny() else { return };
    let world = World::new(tiny);
    let mut spec = world.spec();
    let Boot::Kernel { root: Some(root), format, .. } = spec.boot.clone() else { panic!("a kernel with a root disk") };
    spec.boot = Boot::Disk { root, format, firmware: Firmware::Uefi };
    if !std::path::Path::new("/usr/share/OVMF/OVMF_CODE_4M.fd").exists() {
        let error = world.driver().ensure(&spec).await.unwrap_err();
        assert!(error.code == "firmware_missing" && error.detail.contains("apt install ovmf"), "{error:?}");
        return println!("skipped: OVMF is not installed");
    }
    assert_eq!(world.driver().ensure(&spec).await.unwrap().state, GuestState::Running);
    // The disk has no boot loader; the firmware says so on the serial port once it has looked everywhere.
    world.wait_console(spec.id, "BdsDxe:", BOOT).await;
    world.driver().stop(spec.id, Duration::ZERO).await.unwrap();
    let vars = std::fs::read(world.dir(spec.id).join("vars.fd")).unwrap();
    assert_ne!(vars, std::fs::read("/usr/share/OVMF/OVMF_VARS_4M.fd").unwrap(), "the firmware wrote its variables");
    world.driver().remove(spec.id).await.unwrap();
    assert_eq!(world.leaks(spec.id), Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_disk_boots_through_its_own_first_sector() {
    let Some(tiny) = tiny() else { return };
    let world = World::new(tiny);
    let mut spec = world.spec();
    let root = world.temp.path().join("own.raw");
    // 16-bit code for address 0x7c00: xor ax,ax; mov ds,ax; mov si,0x7c14; next: lodsb; test al,al; jz done; mov dx,0x3f8;
    // out dx,al; jmp next; done: hlt; jmp done. The text follows it.
    let mut sector = vec![
        0x31, 0xc0, 0x8e, 0xd8, 0xbe, 0x16, 0x7c, 0xac, 0x84, 0xc0, 0x74, 0x06, 0xba, 0xf8, 0x03, 0xee, 0xeb, 0xf5,
    ];
    sector.extend([0xf4, 0xeb, 0xfd, 0x90]);
    sector.extend(b"hello from sector zero\r\n\0");
    sector.resize(510, 0);
    sector.extend([0x55, 0xaa]);
    sector.resize(1 << 20, 0);
    std::fs::write(&root, sector).unwrap();
    spec.boot = Boot::Disk { root, format: DiskFormat::Raw, firmware: Firmware::Bios };
    world.driver().ensure(&spec).await.unwrap();
    world.wait_console(spec.id, "hello from sector zero", BOOT).await;
    let refused =
        world.driver().snapshot().unwrap().snapshot(spec.id, oblak_model::SnapshotId(Uuid::now_v7()), true).await;
    assert_eq!(refused.unwrap_err().remedy, Remedy::Unsupported, "a raw disk holds no snapshots");
    world.driver().remove(spec.id).await.unwrap();
    assert_eq!(world.leaks(spec.id), Vec::<String>::new());
}

/// A small file system that goes away with the test.
struct Small(std::path::PathBuf);

impl Small {
    fn new(path: std::path::PathBuf, mib: u32) -> Option<Self> {
        std::fs::create_dir_all(&path).ok()?;
        let flags = MsFlags::empty();
        match mount(Some("oblak-test"), &path, Some("tmpfs"), flags, Some(format!("size={mib}m").as_str())) {
            Ok(()) => Some(Self(path)),
            Err(e) => {
                println!("skipped: cannot mount a tmpfs: {e}");
                None
            }
        }
    }
    fn grow(&self, mib: u32) {
        mount(Some("oblak-test"), &self.0, Some("tmpfs"), MsFlags::MS_REMOUNT, Some(format!("size={mib}m").as_str()))
            .expect("a larger tmpfs");
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = umount2(&self.0, MntFlags::MNT_DETACH);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_disk_freezes_the_machine_until_there_is_space() {
    let Some(tiny) = tiny() else { return };
    let world = World::new(tiny);
    let mut spec = world.spec();
    let Some(small) = Small::new(world.temp.path().join("small"), 24) else { return };
    let root = small.0.join("root.qcow2");
    let base = world.tiny.join("tiny.qcow2");
    support::qemu_img(&[
        "create",
        "-q",
        "-f",
        "qcow2",
        "-b",
        support::text(&base),
        "-F",
        "qcow2",
        support::text(&root),
    ]);
    if let Boot::Kernel { root: there, .. } = &mut spec.boot {
        *there = Some(root);
    }
    world.driver().ensure(&spec).await.unwrap();
    world.wait_console(spec.id, "root@tiny", BOOT).await;
    world
        .sh(
            spec.id,
            "(dd if=/dev/urandom of=/root/big bs=1M count=40; sync; echo filled >/dev/ttyS0) >/dev/null 2>&1 &",
        )
        .await;
    let seen = world.wait(spec.id, &[GuestState::Paused], BOOT).await;
    assert_eq!(seen.reason, "DiskFull", "{seen:?}");
    let warning = seen.warnings.iter().find(|w| w.0 == "IoError").expect("a warning");
    assert!(warning.1 == "DiskFull" && warning.2.contains("root disk"), "{warning:?}");
    small.grow(200);
    world.wait_console(spec.id, "filled", BOOT).await;
    let seen = world.wait(spec.id, &[GuestState::Running], SOON).await;
    assert!(seen.warnings.iter().all(|w| w.1 != "DiskFull"), "{seen:?}");
    world.driver().remove(spec.id).await.unwrap();
}
