//! What a container cannot do, asserted from inside and from outside.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::process::Command;

use common::{POLITE, World, leaks};
use oblak_compute::conformance::wait_for;
use oblak_compute::{Boot, ComputeDriver, DiskFormat, DiskSpec, GuestState, NicAttach, NicSpec};
use oblak_compute_container::Layering;
use oblak_model::{PortId, Size, VolumeId};
use uuid::Uuid;

const ENDED: [GuestState; 2] = [GuestState::Stopped, GuestState::Failed];

#[tokio::test(flavor = "multi_thread")]
async fn root_inside_is_nobody_outside() {
    let Some(world) = World::new("root_inside_is_nobody_outside").await else { return };
    let mut spec = world.container(POLITE);
    let volume = world.path().join("volume");
    std::fs::create_dir(&volume).unwrap();
    std::fs::write(volume.join("old"), "kept").unwrap();
    let disk = |mount: &str, read_only| DiskSpec {
        volume: VolumeId(Uuid::new_v4()),
        path: volume.clone(),
        format: DiskFormat::Raw,
        read_only,
        mount: Some(mount.into()),
    };
    spec.disks = vec![disk("/data", false), disk("/data-ro", true)];
    let seen = world.start(&spec).await;
    let pid = seen.pid.unwrap();

    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let uid = spec.container.id_base.to_string();
    assert!(status.lines().any(|l| l.starts_with("Uid:") && l.split_whitespace().nth(1) == Some(&uid)), "{status}");
    assert_eq!(world.sh(&spec, "id -u; hostname; cat /etc/resolv.conf").await, "0\ntest\nnameserver 192.0.2.1\n");

    // The image belongs to root inside and is not touched by writes.
    let text = world.sh(&spec, "stat -c %u:%g /bin/busybox /etc /; echo evil > /etc/passwd; cat /etc/passwd").await;
    assert_eq!(text, "0:0\n0:0\n0:0\nevil\n");
    assert!(std::fs::read_to_string(world.path().join("layer/etc/passwd")).unwrap().starts_with("root:"));

    // A volume keeps plain ids on disk, whoever used it.
    let text =
        world.sh(&spec, "cat /data/old; echo new > /data/new; stat -c %u /data/old /data/new; touch /data-ro/x").await;
    assert!(text.starts_with("kept0\n0\n") && text.contains("Read-only file system"), "{text}");
    assert_eq!(std::fs::metadata(volume.join("new")).unwrap().uid(), 0);

    // Nothing of the host: no path, no process, no device, no kernel setting.
    std::fs::write(world.path().join("secret"), "secret").unwrap();
    let secret = world.path().join("secret");
    assert!(world.sh(&spec, &format!("cat {}", secret.display())).await.contains("No such file"));
    assert!(world.sh(&spec, "ls /proc | grep -c '^[0-9]'").await.trim().parse::<u32>().unwrap() < 8);
    assert!(
        world.sh(&spec, "ls /dev").await.lines().all(|l| !l.starts_with("vd") && !l.starts_with("loop") && l != "kvm")
    );
    for file in ["/proc/sysrq-trigger", "/proc/sys/kernel/panic", "/sys/kernel/uevent_helper"] {
        let text = world.sh(&spec, &format!("echo 1 > {file}")).await;
        assert!(
            text.contains("Read-only") || text.contains("denied") || text.contains("nonexistent"),
            "{file}: {text}"
        );
    }
    assert_eq!(
        world.sh(&spec, "cat /proc/keys /proc/timer_list 2>&1 | grep -v 'No such file'; ls /sys/firmware").await,
        ""
    );
    // Mounts of the container are visible to nobody outside.
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(!mounts.contains(&spec.id.to_string()));
}

#[tokio::test(flavor = "multi_thread")]
async fn capabilities_and_users() {
    let Some(world) = World::new("capabilities_and_users").await else { return };
    let spec = world.container(POLITE);
    world.start(&spec).await;
    let status = world.sh(&spec, "cat /proc/self/status").await;
    let value = |name: &str| status.lines().find_map(|l| l.strip_prefix(name)).map(|v| v.trim().to_string()).unwrap();
    // chown dac_override fowner fsetid kill setgid setuid setpcap net_bind net_raw sys_chroot mknod audit_write setfcap
    assert_eq!((value("CapBnd:").as_str(), value("CapEff:").as_str()), ("00000000a80425fb", "00000000a80425fb"));
    assert_eq!(
        (value("NoNewPrivs:").as_str(), value("Seccomp:").as_str(), value("CapAmb:").as_str()),
        ("1", "2", "0000000000000000")
    );

    let mut spec = world.container(POLITE);
    spec.container.user = "web".into();
    spec.container.cap_drop = vec!["ALL".into()];
    spec.container.cap_add = vec!["NET_RAW".into()];
    spec.container.read_only_root = true;
    let pid = world.start(&spec).await.pid.unwrap();
    let uid = std::fs::metadata(format!("/proc/{pid}")).unwrap().uid();
    assert_eq!(uid, spec.container.id_base + 33);
    let text = world.sh(&spec, "id; grep -E 'Cap(Eff|Bnd)' /proc/self/status; touch /tmp/x").await;
    assert!(text.contains("uid=33(web) gid=33(web) groups=") && text.contains("4(logs)"), "{text}");
    assert!(text.contains("CapEff:\t0000000000000000") && text.contains("CapBnd:\t0000000000002000"), "{text}");
    assert!(text.contains("Read-only file system"), "{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn dangerous_calls_are_refused() {
    let Some(world) = World::new("dangerous_calls_are_refused").await else { return };
    let program = common::example("try-syscalls");
    let layer = world.path().join("program");
    std::fs::create_dir_all(layer.join("bin")).unwrap();
    std::fs::copy(&program, layer.join("bin/try-syscalls")).unwrap();
    let libraries = Command::new("ldd").arg(&program).output().unwrap();
    for word in String::from_utf8_lossy(&libraries.stdout).split_whitespace().filter(|w| w.starts_with('/')) {
        let inside = layer.join(word.trim_start_matches('/'));
        std::fs::create_dir_all(inside.parent().unwrap()).unwrap();
        std::fs::copy(word, inside).unwrap();
    }
    let mut spec = world.container(POLITE);
    if let Boot::Oci { layers, .. } = &mut spec.boot {
        layers.push(layer);
    }
    world.start(&spec).await;
    // 1 is EPERM, 38 ENOSYS, which sends programs back to older calls.
    let text = world.sh(&spec, "try-syscalls").await;
    let want = "keyctl 1\nadd_key 1\nbpf 1\nio_uring_setup 1\nperf_event_open 1\nclone3 38\nvsock 38\nnosuchcall 38\n";
    assert_eq!(text, want);
    for line in ["mount -t tmpfs x /tmp", "umount /proc", "unshare -U true", "reboot -f"] {
        let out = world.run(&spec, &["sh", "-c", line]).await;
        let text = String::from_utf8_lossy(&out.stderr);
        assert!(out.code != Some(0) && (text.contains("not permitted") || text.contains("denied")), "{line}: {out:?}");
    }
    assert_eq!(wait_for(&world, spec.id, &[GuestState::Running, GuestState::Failed]).await.state, GuestState::Running);
}

#[tokio::test(flavor = "multi_thread")]
async fn limits_hold() {
    let Some(world) = World::new("limits_hold").await else { return };
    let mut hungry = world.container("exec dd if=/dev/zero of=/dev/null bs=200M count=1");
    hungry.memory = Size::mib(32);
    world.start(&hungry).await;
    let seen = wait_for(&world, hungry.id, &ENDED).await;
    assert_eq!(
        (seen.state, seen.exit_code, seen.reason.as_str()),
        (GuestState::Failed, Some(137), "OutOfMemory"),
        "{seen:?}"
    );

    let mut many = world.container("i=0; while [ $i -lt 60 ]; do sleep 1000 & i=$((i+1)); done; wait");
    many.container.pids_max = 16;
    world.start(&many).await;
    let end = tokio::time::Instant::now() + common::PATIENCE;
    while !world.log(&many).await.contains("fork") {
        assert!(tokio::time::Instant::now() < end, "{}", world.log(&many).await);
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    let cgroup = oblak_compute::shim::cgroup::Cgroups::detect().unwrap().group(&common::group(&many.dir));
    assert!(cgroup.pids().len() <= 16);

    let busy = world.container("while :; do :; done");
    world.start(&busy).await;
    let driver = world.oci();
    driver.resize().unwrap().resize(busy.id, 200, Size::mib(128)).await.unwrap();
    let (began, before) = (std::time::Instant::now(), driver.usage(busy.id).await.unwrap());
    tokio::time::sleep(std::time::Duration::from_secs(1)).await;
    let used = driver.usage(busy.id).await.unwrap().cpu_ns - before.cpu_ns;
    // A fifth of a CPU was granted; a period of 100 ms of slack.
    assert!(u128::from(used) <= began.elapsed().as_nanos() / 5 + 120_000_000, "{used} ns");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_writable_layer_is_limited_and_kept() {
    let Some(world) = World::new("the_writable_layer_is_limited_and_kept").await else { return };
    if Command::new("mkfs.ext4").arg("-V").output().is_err() {
        return println!("skipped: the_writable_layer_is_limited_and_kept: needs mkfs.ext4 (package e2fsprogs)");
    }
    let mut spec = world.container(POLITE);
    let Boot::Oci { upper_size, .. } = &mut spec.boot else { unreachable!("made so") };
    *upper_size = Size::mib(20);
    world.start(&spec).await;
    let text =
        world.sh(&spec, "echo kept > /root/file; dd if=/dev/zero of=/root/big bs=1M count=64; rm /root/big").await;
    assert!(text.contains("No space left"), "{text}");
    world.oci().stop(spec.id, std::time::Duration::ZERO).await.unwrap();
    wait_for(&world, spec.id, &ENDED).await;

    // Larger, and with another range of ids: the files come along.
    spec.run = 2;
    spec.container.id_base += 65_536 * 100;
    let Boot::Oci { upper_size, .. } = &mut spec.boot else { unreachable!("made so") };
    *upper_size = Size::mib(40);
    world.start(&spec).await;
    let text = world.sh(&spec, "cat /root/file; stat -c %u /root/file; dd if=/dev/zero of=/root/big bs=1M count=24 2>&1 | grep -c 'No space'").await;
    assert_eq!(text, "kept\n0\n0\n");
    world.oci().remove(spec.id).await.unwrap();
    let end = tokio::time::Instant::now() + common::PATIENCE;
    // The kernel frees a loop device shortly after its last user.
    while !leaks(&spec).is_empty() {
        assert!(tokio::time::Instant::now() < end, "{:?}", leaks(&spec));
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn without_idmapped_mounts_layers_are_copied() {
    let Some(mut world) = World::new("without_idmapped_mounts_layers_are_copied").await else { return };
    world.config.layering = Layering::Copy;
    oblak_compute::conformance::Harness::restart(&world).await;
    let spec = world.container(POLITE);
    let seen = world.start(&spec).await;
    assert_eq!(seen.warnings.first().map(|w| w.0.as_str()), Some("LayersCopied"), "{seen:?}");
    assert_eq!(world.sh(&spec, "stat -c %u:%g /bin/busybox; echo x > /etc/passwd && echo ok").await, "0:0\nok\n");
    world.oci().remove(spec.id).await.unwrap();
    assert!(leaks(&spec).is_empty(), "{:?}", leaks(&spec));
}

#[tokio::test(flavor = "multi_thread")]
async fn host_ids_only_when_asked_for() {
    let Some(world) = World::new("host_ids_only_when_asked_for").await else { return };
    let mut spec = world.container(POLITE);
    spec.container.id_base = 0;
    let error = world.oci().ensure(&spec).await.unwrap_err();
    assert!(error.detail.contains("container.id_base"), "{error:?}");
    spec.container.userns_host = true;
    let pid = world.start(&spec).await.pid.unwrap();
    assert_eq!(std::fs::metadata(format!("/proc/{pid}")).unwrap().uid(), 0);
    assert_eq!(
        world.sh(&spec, "stat -c %u /bin/busybox; mount -t tmpfs x /tmp 2>/dev/null || echo refused").await,
        "0\nrefused\n"
    );
}

struct Netns(String);

impl Netns {
    fn new() -> Option<Self> {
        let name = format!("obct-{}", &Uuid::new_v4().simple().to_string()[..8]);
        let ok = |args: &[&str]| Command::new("ip").args(args).status().is_ok_and(|s| s.success());
        let made = Self(name.clone());
        (ok(&["netns", "add", &name])
            && ok(&["-n", &name, "link", "add", "obct0", "type", "veth", "peer", "name", "obct1"])
            && ok(&["-n", &name, "addr", "add", "192.0.2.7/24", "dev", "obct0"])
            && ok(&["-n", &name, "link", "set", "obct0", "up"])
            && ok(&["-n", &name, "link", "set", "lo", "up"]))
        .then_some(made)
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["netns", "del", &self.0]).status();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn joins_the_network_it_is_given_and_no_other() {
    let Some(world) = World::new("joins_the_network_it_is_given_and_no_other").await else { return };
    let alone = world.container(POLITE);
    world.start(&alone).await;
    assert_eq!(world.sh(&alone, "ls /sys/class/net; ip addr show lo | grep -c 'inet 127.0.0.1'").await, "lo\n1\n");
    let Some(netns) = Netns::new() else {
        return println!("skipped: joins_the_network_it_is_given: cannot make a network namespace");
    };
    let mut spec = world.container(POLITE);
    spec.nics = vec![NicSpec {
        port: PortId(Uuid::new_v4()),
        mac: "02:00:00:00:00:01".into(),
        mtu: 1500,
        attach: NicAttach::Netns { netns: PathBuf::from(format!("/run/netns/{}", netns.0)), userns: None },
    }];
    spec.container.hosts = vec![("192.0.2.7".into(), "test".into())];
    world.start(&spec).await;
    assert_eq!(
        world
            .sh(&spec, "ls /sys/class/net | grep obct0; ip addr show obct0 | grep -c 192.0.2.7; grep test /etc/hosts")
            .await,
        "obct0\n1\n192.0.2.7 test\n"
    );
    let text = world.sh(&spec, "ip link set obct0 down").await;
    assert!(text.contains("not permitted"), "{text}");
}

/// A network namespace and the user namespace that owns it, held by a process in both.
struct Owned(std::process::Child);

impl Owned {
    fn new(base: u32) -> Option<Self> {
        let mut command = Command::new("unshare");
        command.args(["--user", "--net", "sh", "-c", "echo in; exec sleep 1000"]).stdout(std::process::Stdio::piped());
        let mut made = Self(command.spawn().ok()?);
        let mut word = [0; 3];
        std::io::Read::read_exact(made.0.stdout.as_mut()?, &mut word).ok()?;
        for file in ["uid_map", "gid_map"] {
            std::fs::write(made.path(file), format!("0 {base} 65536")).ok()?;
        }
        let net = format!("--net={}", made.path("ns/net").display());
        let up = Command::new("nsenter").args([&net, "ip", "link", "set", "lo", "up"]).status().ok()?;
        up.success().then_some(made)
    }

    fn path(&self, name: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/{name}", self.0.id()))
    }
}

impl Drop for Owned {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// busybox's ping knows raw sockets only, so it works where CAP_NET_RAW of the container reaches its network.
async fn raw_sockets(runtime: &str) {
    let Some(world) = World::with_runtime("raw_sockets", &[runtime]).await else { return };
    let mut spec = world.container(POLITE);
    let Some(owned) = Owned::new(spec.container.id_base) else {
        return println!("skipped: raw_sockets: cannot make a network namespace of a user namespace");
    };
    spec.nics = vec![NicSpec {
        port: PortId(Uuid::new_v4()),
        mac: "02:00:00:00:00:01".into(),
        mtu: 1500,
        attach: NicAttach::Netns { netns: owned.path("ns/net"), userns: Some(owned.path("ns/user")) },
    }];
    let seen = world.start(&spec).await;
    assert!(seen.warnings.is_empty(), "{seen:?}");
    let pid = seen.pid.unwrap();
    for kind in ["ns/net", "ns/user"] {
        let of = |path: PathBuf| std::fs::read_link(path).unwrap();
        assert_eq!(of(format!("/proc/{pid}/{kind}").into()), of(owned.path(kind)));
    }
    let out = world.run(&spec, &["ping", "-c1", "127.0.0.1"]).await;
    assert_eq!(out.code, Some(0), "{out:?}");
    assert_eq!(
        world.sh(&spec, "id -u; stat -c %u:%g /bin/busybox; echo x > /etc/passwd && echo ok").await,
        "0\n0:0\nok\n"
    );
    assert_eq!(std::fs::metadata(format!("/proc/{pid}")).unwrap().uid(), spec.container.id_base);
    let text = world.sh(&spec, "ip link set lo down; mount -t tmpfs x /tmp").await;
    assert!(text.contains("not permitted") && text.contains("denied"), "{text}");

    // Dropped, the capability is missed.
    let (net, user) = (owned.path("ns/net"), owned.path("ns/user"));
    let again = |base: u32, drop: &[&str]| {
        let mut other = world.container(POLITE);
        other.container.id_base = base;
        other.container.cap_drop = drop.iter().map(ToString::to_string).collect();
        other.nics.clone_from(&spec.nics);
        other.nics[0].attach = NicAttach::Netns { netns: net.clone(), userns: Some(user.clone()) };
        other
    };
    let weak = again(spec.container.id_base, &["NET_RAW"]);
    world.start(&weak).await;
    assert!(world.sh(&weak, "ping -c1 127.0.0.1").await.contains("permission denied"));

    // A namespace with other ids is not joined: the container could not read its own files.
    let other = again(spec.container.id_base + (100 << 16), &[]);
    let seen = world.start(&other).await;
    assert_eq!(seen.warnings.first().map(|w| w.0.as_str()), Some("NoRawSockets"), "{seen:?}");
    assert_eq!(std::fs::metadata(format!("/proc/{}", seen.pid.unwrap())).unwrap().uid(), other.container.id_base);
    if runtime == "crun" {
        // runc's exec joins the user namespace first and is not let into a network of another one then.
        assert_eq!(world.sh(&other, "id -u; stat -c %u /bin/busybox").await, "0\n0\n");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn raw_sockets_work_with_crun() {
    raw_sockets("crun").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn raw_sockets_work_with_runc() {
    raw_sockets("runc").await;
}
