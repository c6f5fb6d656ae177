//! What can be done with a running machine, on real qemu. Two machines are booted for all of it.

mod support;

use std::time::Duration;

use futures_util::{SinkExt, StreamExt};
use oblak_compute::{ComputeDriver, DiskFormat, DiskSpec, GuestState, NicAttach, NicSpec};
use oblak_model::{PortId, Size, SnapshotId, VolumeId};
use oblak_platform::driver::Remedy;
use oblak_platform::frame::{Channel, Control, Frame, FrameCodec};
use support::{World, qemu_img, text, tiny};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio_util::codec::Framed;
use uuid::Uuid;

const BOOT: Duration = Duration::from_secs(120);

fn volume(world: &World, format: DiskFormat, read_only: bool) -> DiskSpec {
    let volume = VolumeId(Uuid::now_v7());
    let path = world.temp.path().join(format!("{volume}.img"));
    let name = if format == DiskFormat::Qcow2 { "qcow2" } else { "raw" };
    qemu_img(&["create", "-q", "-f", name, text(&path), "16M"]);
    DiskSpec { volume, path, format, read_only, mount: None }
}

/// A network namespace with a tap, which goes away with the test.
struct Net(String);

impl Net {
    fn new() -> Option<Self> {
        let name = format!("oblak-vm-{}", &Uuid::new_v4().simple().to_string()[..10]);
        let net = Self(name.clone());
        let up = ip(&["netns", "add", &name])
            && ip(&["-n", &name, "tuntap", "add", "dev", "tap0", "mode", "tap", "vnet_hdr"])
            && ip(&["-n", &name, "address", "add", "192.0.2.1/24", "dev", "tap0"])
            && ip(&["-n", &name, "link", "set", "tap0", "up"]);
        if !up {
            println!("skipped: no network in this test: ip(8) cannot make a tap in a namespace");
        }
        up.then_some(net)
    }
    fn nic(&self) -> NicSpec {
        let netns = format!("/run/netns/{}", self.0).into();
        let attach = NicAttach::Tap { netns, device: "tap0".into(), vnet_hdr: true };
        NicSpec { port: PortId(Uuid::now_v7()), mac: "02:00:00:00:00:77".into(), mtu: 1400, attach }
    }
}

impl Drop for Net {
    fn drop(&mut self) {
        ip(&["netns", "delete", &self.0]);
    }
}

fn ip(arguments: &[&str]) -> bool {
    std::process::Command::new("ip")
        .args(arguments)
        .stderr(std::process::Stdio::null())
        .status()
        .is_ok_and(|s| s.success())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn disks_screen_console_pause_and_size() {
    let Some(tiny) = tiny() else { return };
    let world = World::new(tiny);
    let mut spec = world.spec();
    let at_start = volume(&world, DiskFormat::Raw, false);
    spec.disks.push(at_start.clone());
    let net = Net::new();
    spec.nics.extend(net.as_ref().map(Net::nic));
    world.driver().ensure(&spec).await.unwrap();
    world.wait_console(spec.id, "root@tiny", BOOT).await;
    let driver = world.driver();

    // Network: through the tap, with the address and the size of packets that were asked for.
    if let Some(net) = &net {
        let script = "ip address add 192.0.2.2/24 dev eth0; ip link set eth0 up; ping -q -c 1 -W 20 192.0.2.1 >/dev/null && \
            cat /sys/class/net/eth0/address /sys/class/net/eth0/mtu";
        assert_eq!(world.sh(spec.id, script).await.0, "02:00:00:00:00:77\n1400\n");
        let mut other = world.spec();
        other.nics.push(net.nic());
        assert_eq!(driver.ensure(&other).await.unwrap_err().code, "port_busy");
        driver.remove(other.id).await.unwrap();
    }

    // Console: two people see what one of them types.
    let mut people = Vec::new();
    for _ in 0..2 {
        let stream = driver.console().unwrap().console(spec.id).await.unwrap();
        let mut stream = Framed::new(stream, FrameCodec);
        assert_eq!(stream.next().await.unwrap().unwrap().as_control(), Some(Control::Ready));
        people.push(stream);
    }
    people[0].send(Frame::new(Channel::Stdin, "echo six times seven is $((6*7))\r")).await.unwrap();
    for person in &mut people {
        let mut seen = String::new();
        while !seen.contains("seven is 42") {
            let frame = tokio::time::timeout(Duration::from_secs(30), person.next()).await.expect("an echo in time");
            seen.push_str(&String::from_utf8_lossy(&frame.unwrap().unwrap().payload));
        }
    }
    drop(people);

    // Screen: the far end speaks RFB (RFC 6143, 7.1.1) to as many as come.
    for _ in 0..2 {
        let mut screen = driver.vnc().unwrap().vnc(spec.id).await.unwrap();
        let mut hello = [0u8; 12];
        screen.read_exact(&mut hello).await.unwrap();
        assert_eq!(&hello, b"RFB 003.008\n");
        screen.write_all(&hello).await.unwrap();
        assert_eq!(screen.read_u8().await.unwrap(), 1, "one way to get in");
    }

    // Volumes.
    let hotplug = driver.hotplug().unwrap();
    let plugged = volume(&world, DiskFormat::Qcow2, false);
    for _ in 0..2 {
        hotplug.attach(spec.id, &plugged).await.unwrap();
    }
    let mut both = vec![at_start.volume, plugged.volume];
    both.sort();
    assert_eq!(driver.observe(spec.id).await.unwrap().volumes, both);
    // A guest notices a new disk or processor in its own time.
    let until = |condition: &str| format!("n=0; until {condition} || [ $n -ge 150 ]; do sleep 0.2; n=$((n+1)); done");
    let find = |v: VolumeId| {
        let search = until(&format!("f=$(grep -l ^{} /sys/block/vd*/serial 2>/dev/null)", v.short()));
        format!("{search}; d=/dev/$(basename $(dirname $f))")
    };
    let script = format!("{}; echo precious >$d; sync; blockdev --getsize64 $d", find(plugged.volume));
    assert_eq!(world.sh(spec.id, &script).await.0.trim(), (16 << 20).to_string());
    hotplug.grow(spec.id, plugged.volume, Size::mib(32)).await.unwrap();
    let script = format!("{}; blockdev --getsize64 $d", find(plugged.volume));
    assert_eq!(world.sh(spec.id, &script).await.0.trim(), (32 << 20).to_string());
    assert_eq!(hotplug.grow(spec.id, plugged.volume, Size::mib(8)).await.unwrap_err().code, "would_shrink");
    for gone in [plugged.volume, plugged.volume, at_start.volume] {
        hotplug.detach(spec.id, gone).await.unwrap();
    }
    assert!(driver.observe(spec.id).await.unwrap().volumes.is_empty());
    let missing = DiskSpec { path: "/no/such/volume".into(), ..plugged.clone() };
    assert_eq!(hotplug.attach(spec.id, &missing).await.unwrap_err().code, "disk_missing");
    hotplug.attach(spec.id, &plugged).await.unwrap();
    let script = format!("{}; head -c 8 $d", find(plugged.volume));
    assert_eq!(world.sh(spec.id, &script).await.0, "precious");

    // Freezing.
    driver.pause().unwrap().pause(spec.id).await.unwrap();
    assert_eq!(driver.observe(spec.id).await.unwrap().state, GuestState::Paused);
    driver.pause().unwrap().resume(spec.id).await.unwrap();
    assert_eq!(driver.observe(spec.id).await.unwrap().state, GuestState::Running);

    // Size: vCPUs grow, memory shrinks and comes back, the rest asks for a restart.
    let resize = driver.resize().unwrap();
    resize.resize(spec.id, 2000, spec.memory).await.unwrap();
    let script = format!("{}; grep -c ^processor /proc/cpuinfo", until("grep -q '^processor.*1$' /proc/cpuinfo"));
    assert_eq!(world.sh(spec.id, &script).await.0.trim(), "2");
    // A balloon that bursts before processes die leaves the total as it is; what it holds is missing from the rest.
    let total = "awk '/MemAvailable/ {print int($2/1024)}' /proc/meminfo";
    let before: u64 = world.sh(spec.id, total).await.0.trim().parse().unwrap();
    resize.resize(spec.id, 2000, Size::mib(160)).await.unwrap();
    let after: u64 = world.sh(spec.id, total).await.0.trim().parse().unwrap();
    assert!(after + 24 <= before, "{before} MiB, then {after} MiB");
    resize.resize(spec.id, 2000, spec.memory).await.unwrap();
    for (milli, memory) in [(1000, spec.memory), (8000, spec.memory), (2000, Size::mib(512))] {
        let error = resize.resize(spec.id, milli, memory).await.unwrap_err();
        assert_eq!(error.remedy, Remedy::Unsupported, "{error:?}");
        assert!(error.detail.contains("restart"), "{}", error.detail);
    }
    let usage = driver.usage(spec.id).await.unwrap();
    assert!(
        usage.cpu_ns > 500_000_000 && usage.memory_bytes > 50 << 20 && usage.disk_read_bytes > 1 << 20,
        "{usage:?}"
    );
    driver.remove(spec.id).await.unwrap();
    assert_eq!(world.leaks(spec.id), Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn snapshots_of_disk_and_memory() {
    let Some(tiny) = tiny() else { return };
    let world = World::new(tiny);
    let mut spec = world.spec();
    world.driver().ensure(&spec).await.unwrap();
    world.wait_console(spec.id, "root@tiny", BOOT).await;
    let driver = world.driver();
    let snapshots = driver.snapshot().unwrap();
    let (with_memory, disk_only, offline) =
        (SnapshotId(Uuid::now_v7()), SnapshotId(Uuid::now_v7()), SnapshotId(Uuid::now_v7()));
    world.sh(spec.id, "echo old >/root/file; echo kept >/tmp/in-memory; sync").await;
    let size = snapshots.snapshot(spec.id, with_memory, true).await.unwrap();
    println!("a snapshot of {} of memory needs {size}", spec.memory);
    assert!(size > Size::mib(10) && size < Size::mib(400), "{size}");
    assert_eq!(snapshots.snapshot(spec.id, with_memory, true).await.unwrap(), size, "twice is once");
    assert_eq!(driver.observe(spec.id).await.unwrap().state, GuestState::Running, "it runs on afterwards");
    snapshots.snapshot(spec.id, disk_only, false).await.unwrap();

    // Memory of another machine is refused before anything is touched.
    world.sh(spec.id, "echo new >/root/file; echo lost >/tmp/in-memory; sync").await;
    spec.run = 2;
    let mut other = spec.clone();
    other.memory = Size::mib(256);
    assert_eq!(snapshots.restore(&other, with_memory).await.unwrap_err().code, "snapshot_mismatch");
    assert_eq!(driver.observe(spec.id).await.unwrap().state, GuestState::Running);
    let attached = volume(&world, DiskFormat::Raw, false);
    driver.hotplug().unwrap().attach(spec.id, &attached).await.unwrap();
    let refused = snapshots.snapshot(spec.id, SnapshotId(Uuid::now_v7()), true).await.unwrap_err();
    assert_eq!(refused.remedy, Remedy::Unsupported, "{refused:?}");

    // Back, with memory: the same shell goes on, nothing boots.
    let seen = snapshots.restore(&spec, with_memory).await.unwrap();
    assert_eq!((seen.state, seen.run), (GuestState::Running, 2));
    assert_eq!(world.sh(spec.id, "cat /root/file /tmp/in-memory").await.0, "old\nkept\n");
    let again = driver.ensure(&spec).await.unwrap();
    assert_eq!(again.pid, seen.pid, "ensure adopts what was restored");

    // Stopped: the tool does it.
    driver.stop(spec.id, Duration::ZERO).await.unwrap();
    snapshots.snapshot(spec.id, offline, true).await.unwrap();
    let mut all = vec![with_memory, disk_only, offline];
    all.sort();
    world.restart();
    let driver = world.driver();
    let snapshots = driver.snapshot().unwrap();
    assert_eq!(snapshots.list_snapshots(spec.id).await.unwrap(), all);
    let seen = snapshots.restore(&spec, disk_only).await.unwrap();
    assert_eq!(seen.state, GuestState::Stopped);
    for snapshot in [with_memory, disk_only, offline, offline] {
        snapshots.remove_snapshot(spec.id, snapshot).await.unwrap();
    }
    assert!(snapshots.list_snapshots(spec.id).await.unwrap().is_empty());
    assert_eq!(snapshots.restore(&spec, offline).await.unwrap_err().remedy, Remedy::Gone);
    let root = world.dir(spec.id).join("root.qcow2");
    let listed = std::process::Command::new("qemu-img").args(["snapshot", "-l", text(&root)]).output().unwrap();
    assert!(!String::from_utf8_lossy(&listed.stdout).contains('-'), "nothing is left in the image");
    driver.remove(spec.id).await.unwrap();
    assert!(root.exists(), "the root disk is the caller's");
    assert_eq!(world.leaks(spec.id), Vec::<String>::new());
}
