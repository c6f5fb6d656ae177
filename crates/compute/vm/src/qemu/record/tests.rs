use super::*;
use oblak_compute::{Boot, ContainerOptions, DiskFormat};
use oblak_model::{Isolation, Size, Timestamp};
use oblak_platform::process::Identity;

pub fn id() -> InstanceId {
    "0190a1b2-c3d4-7e5f-8a9b-0c1d2e3f4a5b".parse().unwrap()
}

pub fn volume() -> VolumeId {
    "0190a1b2-c3d4-7e5f-8a9b-00000000beef".parse().unwrap()
}

pub fn record() -> Record {
    Record {
        schema: SCHEMA,
        spec: GuestSpec {
            id: id(),
            name: "web".into(),
            project: "default".into(),
            isolation: Isolation::Vm,
            dir: "/i".into(),
            run: 3,
            epoch: 1,
            vcpus_milli: 1000,
            memory: Size::mib(256),
            boot: Boot::Kernel {
                kernel: "/images/vmlinuz".into(),
                initrd: Some("/images/initrd".into()),
                cmdline: "console=ttyS0 a=\"b,c\"".into(),
                root: Some("/d/root.qcow2".into()),
                format: DiskFormat::Qcow2,
            },
            disks: Vec::new(),
            nics: Vec::new(),
            hostname: "web".into(),
            seed: None,
            fence: None,
            container: ContainerOptions::default(),
        },
        uid: 500_001,
        qemu: "/usr/bin/qemu-system-x86_64".into(),
        accel: Accel::Tcg,
        machine: "pc-q35-7.2".into(),
        max_vcpus: 4,
        firmware: None,
        cgroup: "oblak/vm-x".into(),
        ports: 8,
        slots: BTreeMap::new(),
        load: None,
        incoming: false,
        resized: false,
    }
}

fn shim(run: u64, who: Identity) -> ShimRecord {
    ShimRecord {
        kind: "qemu".into(),
        run,
        epoch: 1,
        shim: who,
        guest: None,
        started_at: Timestamp::from_micros(5),
        runtime: "tcg".into(),
        stopping: false,
    }
}

fn dead() -> Identity {
    Identity { start_ticks: 1, ..Identity::current() }
}

#[test]
fn recovers_from_every_stage_of_a_start_and_an_end() {
    let temp = tempfile::tempdir().unwrap();
    let dir = GuestDir(temp.path().to_path_buf());
    assert_eq!(OnDisk::read(&dir).unwrap(), OnDisk::Nothing);
    // The driver died after it wrote what the run is to be.
    dir.write(&record()).unwrap();
    assert!(matches!(OnDisk::read(&dir).unwrap(), OnDisk::NotStarted(r, None) if *r == record()));
    // The shim works.
    shim(3, Identity::current()).write(dir.path()).unwrap();
    assert!(matches!(OnDisk::read(&dir).unwrap(), OnDisk::Alive(..)));
    // The shim was killed.
    shim(3, dead()).write(dir.path()).unwrap();
    let OnDisk::Lost(_, lost) = OnDisk::read(&dir).unwrap() else {
        panic!("a dead shim without an exit record is lost")
    };
    let exit = lost_exit(&lost, Timestamp::from_micros(9));
    let seen = ended(&exit);
    assert_eq!((seen.state, seen.reason.as_str(), seen.exit_code), (GuestState::Failed, "ShimLost", Some(137)));
    exit.write(dir.path()).unwrap();
    assert!(matches!(OnDisk::read(&dir).unwrap(), OnDisk::Ended(..)));
    // The next run is wanted but not begun: the end of the last one is still known.
    let mut next = record();
    next.spec.run = 4;
    dir.write(&next).unwrap();
    assert!(matches!(OnDisk::read(&dir).unwrap(), OnDisk::NotStarted(_, Some(old)) if old.run == 3));
}

#[test]
fn after_a_reboot_the_machine_is_stopped_and_not_failed() {
    let temp = tempfile::tempdir().unwrap();
    let dir = GuestDir(temp.path().to_path_buf());
    dir.write(&record()).unwrap();
    shim(3, Identity { boot_id: "an earlier boot".into(), ..Identity::current() }).write(dir.path()).unwrap();
    let OnDisk::Lost(_, lost) = OnDisk::read(&dir).unwrap() else { panic!("nothing of an earlier boot runs") };
    let seen = ended(&lost_exit(&lost, Timestamp::from_micros(9)));
    assert_eq!((seen.state, seen.reason.as_str(), seen.run), (GuestState::Stopped, "HostRebooted", 3));
}

#[test]
fn a_stop_that_was_under_way_is_no_failure() {
    let asked = ShimRecord { stopping: true, ..shim(3, dead()) };
    assert_eq!(ended(&lost_exit(&asked, Timestamp::EPOCH)).state, GuestState::Stopped);
}

#[test]
fn damaged_and_newer_records_are_refused_by_name() {
    let temp = tempfile::tempdir().unwrap();
    let dir = GuestDir(temp.path().to_path_buf());
    for (text, code) in [("", "record_damaged"), ("{\"schema\": 1", "record_damaged"), ("[]", "record_damaged")] {
        std::fs::write(dir.record(), text).unwrap();
        let error = OnDisk::read(&dir).unwrap_err();
        assert_eq!(error.code, code, "{text}");
        assert!(error.detail.contains("vm.json"), "{}", error.detail);
    }
    dir.write(&Record { schema: SCHEMA + 1, ..record() }).unwrap();
    assert_eq!(OnDisk::read(&dir).unwrap_err().code, "record_newer");
}

#[test]
fn lists_only_what_is_ours_and_gives_each_a_uid_of_its_own() {
    let temp = tempfile::tempdir().unwrap();
    let instances = temp.path();
    assert!(list(&instances.join("none")).unwrap().is_empty());
    std::fs::create_dir(instances.join("not-an-id")).unwrap();
    let add = |n: u128, uid: u32| {
        let id = InstanceId(uuid::Uuid::from_u128(n));
        let dir = GuestDir(instances.join(id.to_string()));
        std::fs::create_dir(dir.path()).unwrap();
        dir.write(&Record { uid, ..record() }).unwrap();
        id
    };
    let (one, two) = (add(1 << 64, 700), add(2 << 64, 701));
    std::fs::create_dir(instances.join(InstanceId(uuid::Uuid::from_u128(9)).to_string())).unwrap();
    assert_eq!(list(instances).unwrap(), [one, two]);
    assert_eq!(pick_uid(instances, two, (700, 3)).unwrap(), 701, "keeps the one it had");
    let new = InstanceId(uuid::Uuid::from_u128(3 << 64));
    assert_eq!(pick_uid(instances, new, (700, 3)).unwrap(), 702);
    assert_eq!(pick_uid(instances, new, (700, 2)).unwrap_err().code, "uids_exhausted");
}
