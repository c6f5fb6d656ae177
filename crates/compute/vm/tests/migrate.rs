//! A machine moves from one driver to another, each with directories of its own, as on two nodes.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::time::{Duration, Instant};

use oblak_compute::migrate::{Lane, Limits, Migrate, Sending, Stage};
use oblak_compute::{Boot, ComputeDriver, GuestSpec, GuestState};
use oblak_model::InstanceId;
use support::{World, tiny};

const BOOT: Duration = Duration::from_secs(120);
const MOVE: Duration = Duration::from_secs(120);
const LIMITS: Limits = Limits { downtime_ms: 300, bandwidth: 0 };

/// The same machine as the other node is told of it.
fn there(world: &World, spec: &GuestSpec) -> GuestSpec {
    let mut copy = world.spec();
    std::fs::remove_dir_all(&copy.dir).unwrap();
    let made = GuestSpec { id: spec.id, dir: world.dir(spec.id), ..spec.clone() };
    std::fs::create_dir_all(&made.dir).unwrap();
    let root = made.dir.join("root.qcow2");
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
    copy = made;
    if let Boot::Kernel { root: path, .. } = &mut copy.boot {
        *path = Some(root);
    }
    copy
}

async fn wait(from: &dyn Migrate, id: InstanceId, memory: bool, stage: Stage) -> Sending {
    let end = Instant::now() + MOVE;
    loop {
        let seen = from.sending(id, memory).await.unwrap();
        if seen.stage == stage {
            return seen;
        }
        assert!(seen.stage != Stage::Failed && Instant::now() < end, "waiting for {stage:?}: {seen:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Everything up to the moment at which the guest stands still and both sides have all of it.
async fn send(a: &World, b: &World, target: &GuestSpec) -> Duration {
    let (from, to) = (a.driver(), b.driver());
    oblak_compute::conformance::send(from.migrate().unwrap(), to.migrate().unwrap(), target, MOVE).await
}

/// What is left below the directory of a guest. Its processes are those of the other node as well.
fn left(world: &World, id: InstanceId) -> Vec<String> {
    let mut found = world.leaks(id);
    found.retain(|what| !what.starts_with("process"));
    found
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn moves_with_its_disk_and_memory_and_can_stay() {
    let Some(tiny) = tiny() else { return };
    let (a, b) = (World::new(tiny.clone()), World::new(tiny));
    let spec = a.spec();
    let id = spec.id;
    a.driver().ensure(&spec).await.unwrap();
    a.wait_console(id, "root@tiny", BOOT).await;
    a.sh(id, "echo on the disk >/root/file; sync; echo in memory >/tmp/file; (while sleep 0.1; do date +%s.%N >/tmp/tick; done) >/dev/null 2>&1 </dev/null &").await;
    let uptime = |text: &str| text.split('.').next().unwrap().trim().parse::<u64>().unwrap();

    // First it stays: everything was sent, nobody decides for the other side, the machine goes on where it was.
    let target = there(&b, &spec);
    send(&a, &b, &target).await;
    for _ in 0..2 {
        let seen = a.driver().observe(id).await.unwrap();
        assert_eq!((seen.state, seen.reason.as_str()), (GuestState::Paused, "Moving"), "{seen:?}");
        let waiting = b.driver().observe(id).await.unwrap();
        assert_eq!((waiting.state, waiting.reason.as_str()), (GuestState::Starting, "Arriving"), "{waiting:?}");
        // Whatever is killed, neither runs by itself.
        a.restart();
        b.restart();
    }
    b.driver().remove(id).await.unwrap();
    assert_eq!(left(&b, id), Vec::<String>::new());
    for _ in 0..2 {
        a.driver().migrate().unwrap().stop_sending(id).await.unwrap();
    }
    assert_eq!(a.driver().observe(id).await.unwrap().state, GuestState::Running);
    assert_eq!(a.sh(id, "cat /root/file /tmp/file").await.0, "on the disk\nin memory\n");

    // A stream that breaks: the machine runs on by itself.
    let target = there(&b, &spec);
    let (from, to) = (a.driver(), b.driver());
    let (from, to) = (from.migrate().unwrap(), to.migrate().unwrap());
    let offer = from.offer(id).await.unwrap();
    to.expect(&target, &offer).await.unwrap();
    from.send_disk(id, "root", to.accept(id, &Lane::Disk("root".into())).await.unwrap()).await.unwrap();
    wait(from, id, false, Stage::DisksReady).await;
    let slow = Limits { bandwidth: 1 << 20, ..LIMITS };
    from.send_memory(id, slow, to.accept(id, &Lane::Memory).await.unwrap()).await.unwrap();
    wait(from, id, true, Stage::Memory).await;
    b.driver().remove(id).await.unwrap();
    wait(from, id, true, Stage::Failed).await;
    from.stop_sending(id).await.unwrap();
    assert_eq!(a.driver().observe(id).await.unwrap().state, GuestState::Running);
    // Cancelled while memory is on its way.
    let target = there(&b, &spec);
    to.expect(&target, &offer).await.unwrap();
    from.send_disk(id, "root", to.accept(id, &Lane::Disk("root".into())).await.unwrap()).await.unwrap();
    wait(from, id, false, Stage::DisksReady).await;
    from.send_memory(id, slow, to.accept(id, &Lane::Memory).await.unwrap()).await.unwrap();
    from.stop_sending(id).await.unwrap();
    b.driver().remove(id).await.unwrap();
    let before = uptime(&a.sh(id, "echo after the first try >>/root/file; sync; cat /proc/uptime").await.0);

    // Then it moves.
    let target = there(&b, &spec);
    let begun = Instant::now();
    let still = send(&a, &b, &target).await;
    for _ in 0..2 {
        assert_eq!(b.driver().migrate().unwrap().take_over(id).await.unwrap().state, GuestState::Running);
    }
    println!("moved in {:?}, stood still for {still:?}", begun.elapsed());
    a.driver().remove(id).await.unwrap();
    assert_eq!(left(&a, id), Vec::<String>::new());
    b.restart();
    let seen = b.driver().observe(id).await.unwrap();
    assert_eq!((seen.state, seen.run), (GuestState::Running, spec.run), "{seen:?}");
    let (text, _) = b.sh(id, "cat /root/file /tmp/file").await;
    assert_eq!(text, "on the disk\nafter the first try\nin memory\n");
    assert!(uptime(&b.sh(id, "cat /proc/uptime").await.0) >= before, "it is the same run of the guest");
    let again = b.driver().ensure(&target).await.unwrap();
    assert_eq!((again.state, again.pid), (GuestState::Running, seen.pid), "adopted like any other");
    // Written through to the disk on this side.
    b.sh(id, "echo here >>/root/file; sync").await;
    b.driver().stop(id, Duration::from_secs(60)).await.unwrap();
    b.driver().ensure(&GuestSpec { run: 2, ..target }).await.unwrap();
    b.wait_console(id, "root@tiny", BOOT).await;
    assert_eq!(b.sh(id, "cat /root/file").await.0, "on the disk\nafter the first try\nhere\n");
    b.driver().remove(id).await.unwrap();
    assert_eq!(b.leaks(id), Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn refuses_what_would_not_be_the_same_machine() {
    let Some(tiny) = tiny() else { return };
    let (a, b) = (World::new(tiny.clone()), World::new(tiny));
    let spec = a.spec();
    a.driver().ensure(&spec).await.unwrap();
    let (from, to) = (a.driver(), b.driver());
    let offer = from.migrate().unwrap().offer(spec.id).await.unwrap();
    let target = there(&b, &spec);
    for (field, value, code) in [("emulator", "1.0", "cpu_differs"), ("cpu", "other", "cpu_differs")] {
        let mut other = offer.clone();
        other.machine[field] = value.into();
        let error = to.migrate().unwrap().expect(&target, &other).await.unwrap_err();
        assert_eq!(error.code, code, "{error:?}");
    }
    let smaller = GuestSpec { vcpus_milli: 2000, ..target.clone() };
    assert_eq!(to.migrate().unwrap().expect(&smaller, &offer).await.unwrap_err().code, "machine_differs");
    assert_eq!(to.observe(spec.id).await.unwrap().state, GuestState::Absent, "nothing half-made stays");
    assert_eq!(to.migrate().unwrap().take_over(spec.id).await.unwrap_err().code, "gone");
    to.remove(spec.id).await.unwrap();
    from.remove(spec.id).await.unwrap();
}
