use super::*;
use crate::qemu::record::tests::{record, volume};
use oblak_compute::{DiskSpec, Firmware, NicAttach, NicSpec};
use oblak_model::{PortId, Size};

fn link(path: &str, format: DiskFormat, fd: RawFd) -> (Link, RawFd) {
    (Link { path: path.into(), format, block_device: path.starts_with("/dev/") }, fd)
}

fn shown(record: &Record, inputs: &Inputs) -> String {
    let mut text = String::new();
    for argument in arguments(record, inputs) {
        // One option with its value per line.
        text += if argument.starts_with('-') && !text.is_empty() {
            "\n"
        } else if text.is_empty() {
            ""
        } else {
            " "
        };
        text += &argument;
    }
    text
}

fn inputs() -> Inputs {
    Inputs {
        monitor: 10,
        qmp: 11,
        agent: 12,
        serial: 13,
        root: Some(OpenDisk {
            links: vec![link("/d/root.qcow2", DiskFormat::Qcow2, 20), link("/images/base", DiskFormat::Qcow2, 21)],
            read_only: false,
        }),
        ..Inputs::default()
    }
}

#[test]
fn a_kernel_under_translation() {
    let mut inputs = inputs();
    inputs.kernel = Some(("/guest/kernel".into(), Some("/guest/initrd".into())));
    insta::assert_snapshot!("kernel_tcg", shown(&record(), &inputs));
}

#[test]
fn a_disk_with_uefi_and_everything_under_kvm() {
    let mut record = record();
    record.accel = Accel::Kvm;
    record.spec.name = "a,b".into();
    record.spec.vcpus_milli = 2500;
    record.max_vcpus = max_vcpus(3);
    record.spec.boot = Boot::Disk { root: "/d/root.qcow2".into(), format: DiskFormat::Qcow2, firmware: Firmware::Uefi };
    record.firmware = Some("/usr/share/OVMF/OVMF_CODE_4M.fd".into());
    record.spec.nics = vec![NicSpec {
        port: PortId::default(),
        mac: "02:00:00:00:00:01".into(),
        mtu: 1450,
        attach: NicAttach::Tap { netns: "/run/netns/n".into(), device: "tap0".into(), vnet_hdr: true },
    }];
    record.spec.disks = vec![DiskSpec {
        volume: volume(),
        path: "/dev/loop7".into(),
        format: DiskFormat::Raw,
        read_only: true,
        mount: None,
    }];
    record.slots.insert(volume(), 4);
    let mut inputs = inputs();
    inputs.vars = Some(14);
    inputs.seed = Some(15);
    inputs.nics = vec![(30, Some(31))];
    inputs.disks = vec![(volume(), OpenDisk { links: vec![link("/dev/loop7", DiskFormat::Raw, 25)], read_only: true })];
    insta::assert_snapshot!("uefi_kvm", shown(&record, &inputs));
}

#[test]
fn what_a_user_chose_cannot_become_an_option() {
    let mut record = record();
    record.spec.name = "x,debug-threads=off".into();
    if let Boot::Kernel { cmdline, .. } = &mut record.spec.boot {
        *cmdline = "-monitor stdio".into();
    }
    let mut inputs = inputs();
    inputs.kernel = Some(("/guest/kernel".into(), None));
    let all = arguments(&record, &inputs);
    let after = |flag: &str| all.iter().position(|a| a == flag).map(|at| all[at + 1].as_str());
    assert_eq!(after("-name"), Some("guest=x,,debug-threads=off,debug-threads=on"));
    assert_eq!(after("-append"), Some("-monitor stdio"));
    assert_eq!(all.iter().filter(|a| *a == "-monitor stdio").count(), 1);
}

#[test]
fn names_of_nodes_and_devices_fit_and_lead_back() {
    let names = block_node_names(&node_name(volume()), crate::qemu::disk::MAX_CHAIN);
    let unique: std::collections::BTreeSet<_> = names.iter().collect();
    assert_eq!(unique.len(), names.len());
    assert!(names.iter().all(|n| n.len() <= 31 && n.starts_with(|c: char| c.is_ascii_lowercase())), "{names:?}");
    assert_eq!(volume_of_device(&device_id(volume())), Some(volume()));
    assert_eq!(volume_of_device("root-disk"), None);
}

#[test]
fn ports_and_vcpus_have_room_to_grow_and_ends() {
    assert_eq!(ports_for(0), SPARE_PORTS);
    assert_eq!(ports_for(1000), MAX_PORTS);
    assert_eq!((max_vcpus(1), max_vcpus(3), max_vcpus(200)), (4, 6, 255));
    let mut big = record();
    big.spec.memory = Size::gib(512);
    assert!(overhead_bytes(&big) > overhead_bytes(&record()));
}
