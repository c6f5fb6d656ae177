//! Bad days of a container: killed shims, killed processes, wrong commands, and people on its terminal.

mod common;

use std::time::Duration;

use common::{PATIENCE, POLITE, World, leaks};
use futures_util::{SinkExt, StreamExt};
use nix::sys::signal::Signal;
use oblak_compute::conformance::wait_for;
use oblak_compute::shim::cgroup::Cgroups;
use oblak_compute::{ComputeDriver, DiskFormat, DiskSpec, ExecRequest, GuestSpec, GuestState};
use oblak_model::VolumeId;
use oblak_platform::driver::BoxDuplex;
use oblak_platform::frame::{Channel, Control, Frame, FrameCodec};
use oblak_platform::process::Identity;
use tokio_util::codec::Framed;
use uuid::Uuid;

const ENDED: [GuestState; 2] = [GuestState::Stopped, GuestState::Failed];

fn kill(pid: i32, signal: Signal) {
    if let Some(process) = Identity::of(pid) {
        process.signal(signal);
    }
}

async fn gone(spec: &GuestSpec) {
    let end = tokio::time::Instant::now() + PATIENCE;
    while !leaks(spec).is_empty() {
        assert!(tokio::time::Instant::now() < end, "left behind: {:?}", leaks(spec));
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_shim_ends_its_container_once_and_for_all() {
    let Some(world) = World::new("a_killed_shim").await else { return };
    let mut spec = world.container("trap '' TERM; while :; do sleep 1; done");
    let main = Identity::of(world.start(&spec).await.pid.unwrap()).unwrap();
    kill(world.shim_pid(&spec), Signal::SIGKILL);
    let seen = wait_for(&world, spec.id, &ENDED).await;
    assert_eq!((seen.state, seen.exit_code, seen.reason.as_str()), (GuestState::Failed, None, "ShimLost"), "{seen:?}");
    assert!(!main.is_alive());
    for _ in 0..2 {
        let again = world.start(&spec).await;
        assert_eq!((again.state, again.run), (GuestState::Failed, 1), "a lost run is not started again");
    }
    spec.run = 2;
    assert_eq!(world.start(&spec).await.state, GuestState::Running);
    world.oci().remove(spec.id).await.unwrap();
    gone(&spec).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_at_any_moment_a_run_starts_at_most_once_and_nothing_is_left() {
    let Some(world) = World::new("killed_at_any_moment").await else { return };
    let volume = world.path().join("volume");
    std::fs::create_dir(&volume).unwrap();
    for step in 0..24u64 {
        let mut spec = world.container(&format!("echo x >> /data/{step}; {POLITE}"));
        spec.disks = vec![DiskSpec {
            volume: VolumeId(Uuid::new_v4()),
            path: volume.clone(),
            format: DiskFormat::Raw,
            read_only: false,
            mount: Some("/data".into()),
        }];
        let driver = world.oci();
        let task = tokio::spawn({
            let spec = spec.clone();
            async move { driver.ensure(&spec).await }
        });
        let end = tokio::time::Instant::now() + Duration::from_millis(step * 4);
        let lock = spec.dir.join("container/shim.lock");
        // The shim is known by its lock as soon as it works.
        let shim = loop {
            let holder = std::fs::read(&lock).ok().and_then(|b| serde_json::from_slice::<Identity>(&b).ok());
            if holder.is_some() {
                break holder;
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        };
        tokio::time::sleep_until(end).await;
        if step % 3 == 2 {
            // Not the shim but what it has started: the runtime, a half-made container, or the container.
            let group = Cgroups::detect().unwrap().group(&common::group(&spec.dir));
            group.kill_once();
        } else {
            shim.unwrap().kill();
        }
        let _ = task.await.unwrap();
        // The same run again, as an agent would: it either never ran and runs now, or it is over.
        world.start(&spec).await;
        let seen = wait_for(&world, spec.id, &[GuestState::Running, GuestState::Failed]).await;
        if seen.state == GuestState::Running {
            let end = tokio::time::Instant::now() + PATIENCE;
            let over = async || world.oci().observe(spec.id).await.unwrap().state == GuestState::Failed;
            while !volume.join(step.to_string()).exists() && !over().await {
                assert!(tokio::time::Instant::now() < end);
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        }
        world.oci().remove(spec.id).await.unwrap();
        gone(&spec).await;
        let runs = std::fs::read_to_string(volume.join(step.to_string())).unwrap_or_default().lines().count();
        assert!(runs <= 1, "run 1 was started {runs} times (killed after {} ms)", step * 4);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stopped_shim_does_not_keep_its_container_alive() {
    let Some(world) = World::new("a_stopped_shim").await else { return };
    let spec = world.container(POLITE);
    let main = Identity::of(world.start(&spec).await.pid.unwrap()).unwrap();
    kill(world.shim_pid(&spec), Signal::SIGSTOP);
    world.oci().stop(spec.id, Duration::ZERO).await.unwrap();
    let seen = wait_for(&world, spec.id, &ENDED).await;
    assert_eq!((seen.state, seen.reason.as_str()), (GuestState::Stopped, "Killed"), "{seen:?}");
    assert!(!main.is_alive());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_main_process_is_a_failure_with_its_signal() {
    let Some(world) = World::new("a_killed_main_process").await else { return };
    let spec = world.container(POLITE);
    kill(world.start(&spec).await.pid.unwrap(), Signal::SIGKILL);
    let seen = wait_for(&world, spec.id, &ENDED).await;
    assert_eq!(
        (seen.state, seen.exit_code, seen.reason.as_str()),
        (GuestState::Failed, Some(137), "Signaled"),
        "{seen:?}"
    );
    assert!(seen.message.contains("signal 9"), "{seen:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_command_says_so_and_leaves_nothing() {
    let Some(world) = World::new("a_wrong_command").await else { return };
    let mut spec = world.container("");
    spec.container.argv = vec!["/no/such/program".into()];
    let seen = world.start(&spec).await;
    assert_eq!(
        (seen.state, seen.reason.as_str(), seen.exit_code),
        (GuestState::Failed, "StartFailed", None),
        "{seen:?}"
    );
    assert!(seen.message.contains("/no/such/program"), "{seen:?}");
    world.oci().remove(spec.id).await.unwrap();
    gone(&spec).await;

    let mut spec = world.container(POLITE);
    spec.container.user = "ghost".into();
    let error = world.oci().ensure(&spec).await.unwrap_err();
    assert!(error.detail.contains("container.user") && error.detail.contains("ghost"), "{error:?}");
    world.oci().remove(spec.id).await.unwrap();
    gone(&spec).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_shim_is_on_its_own_and_small() {
    let Some(world) = World::new("the_shim_is_on_its_own").await else { return };
    let spec = world.container(POLITE);
    world.start(&spec).await;
    assert_eq!(world.run(&spec, &["true"]).await.code, Some(0));
    let shim = world.shim_pid(&spec);
    let stat = std::fs::read_to_string(format!("/proc/{shim}/stat")).unwrap();
    let fields: Vec<&str> = stat[stat.rfind(')').unwrap() + 2..].split(' ').collect();
    let (parent, session): (u32, i32) = (fields[1].parse().unwrap(), fields[3].parse().unwrap());
    assert_ne!(parent, std::process::id());
    assert_ne!(session, nix::unistd::getsid(None).unwrap().as_raw());
    let mine = std::fs::read_to_string("/proc/self/cgroup").unwrap();
    let its = std::fs::read_to_string(format!("/proc/{shim}/cgroup")).unwrap();
    for line in mine.lines().filter(|l| !l.ends_with(":/")) {
        assert!(!its.lines().any(|l| l == line), "the shim is still in {line}");
    }
    let threads = std::fs::read_dir(format!("/proc/{shim}/task")).unwrap().count();
    assert_eq!(threads, 1);
    let rollup = std::fs::read_to_string(format!("/proc/{shim}/smaps_rollup")).unwrap();
    let kib = |name: &str| {
        let line = rollup.lines().find(|l| l.starts_with(name)).unwrap();
        line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap()
    };
    println!("private memory of the shim: {} KiB dirty, {} KiB clean", kib("Private_Dirty"), kib("Private_Clean"));
    assert!(kib("Private_Dirty") <= 4096, "{rollup}");
    let socket = std::fs::metadata(spec.dir.join("container/shim.sock")).unwrap();
    assert_eq!(std::os::unix::fs::PermissionsExt::mode(&socket.permissions()) & 0o777, 0o600);
}

/// Reads output until `wanted` was seen.
async fn expect(stream: &mut Framed<BoxDuplex, FrameCodec>, wanted: &str) -> String {
    let mut text = String::new();
    let read = async {
        while !text.contains(wanted) {
            let Some(Ok(frame)) = stream.next().await else { panic!("ended before {wanted:?}: {text:?}") };
            if frame.channel == Channel::Stdout {
                text.push_str(&String::from_utf8_lossy(&frame.payload));
            }
        }
    };
    assert!(tokio::time::timeout(PATIENCE, read).await.is_ok(), "waiting for {wanted:?}: {text:?}");
    text
}

#[tokio::test(flavor = "multi_thread")]
async fn exec_with_a_terminal_knows_its_size_and_signals() {
    let Some(world) = World::new("exec_with_a_terminal").await else { return };
    let spec = world.container(POLITE);
    world.start(&spec).await;
    let driver = world.oci();
    let request = ExecRequest {
        argv: vec!["sh".into()],
        tty: Some((100, 30)),
        cwd: "/tmp".into(),
        env: vec!["A=b".into()],
        ..ExecRequest::default()
    };
    let mut stream = Framed::new(driver.exec().unwrap().exec(spec.id, &request).await.unwrap(), FrameCodec);
    stream.send(Frame::new(Channel::Stdin, "stty size; pwd; echo $A$TERM\n")).await.unwrap();
    let text = expect(&mut stream, "bxterm\r\n").await;
    assert!(text.contains("30 100\r\n") && text.contains("/tmp\r\n"), "{text}");
    stream.send(Frame::control(&Control::Resize { cols: 132, rows: 50 })).await.unwrap();
    stream.send(Frame::new(Channel::Stdin, "stty size\n")).await.unwrap();
    expect(&mut stream, "50 132\r\n").await;
    stream.send(Frame::new(Channel::Stdin, "exit 9\n")).await.unwrap();
    let last = tokio::time::timeout(PATIENCE, async {
        let mut last = None;
        while let Some(Ok(frame)) = stream.next().await {
            last = frame.as_control().or(last);
        }
        last
    });
    assert_eq!(last.await.unwrap(), Some(Control::Exit { code: 9 }));

    let request = ExecRequest { argv: vec!["sleep".into(), "1000".into()], ..ExecRequest::default() };
    let mut stream = Framed::new(driver.exec().unwrap().exec(spec.id, &request).await.unwrap(), FrameCodec);
    assert_eq!(stream.next().await.unwrap().unwrap().as_control(), Some(Control::Ready));
    stream.send(Frame::control(&Control::Signal { signal: 15 })).await.unwrap();
    assert_eq!(stream.next().await.unwrap().unwrap().as_control(), Some(Control::Exit { code: 143 }));

    // Hanging up ends the process, so that nothing piles up in the container.
    let stream = driver.exec().unwrap().exec(spec.id, &request).await.unwrap();
    drop(stream);
    let end = tokio::time::Instant::now() + PATIENCE;
    while world.sh(&spec, "ps").await.contains("sleep 1000") {
        assert!(tokio::time::Instant::now() < end);
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_container_with_a_terminal_is_shared_by_its_consoles() {
    let Some(world) = World::new("a_container_with_a_terminal").await else { return };
    let mut spec = world.container("");
    spec.container.argv = vec!["sh".into()];
    spec.container.tty = true;
    world.start(&spec).await;
    let driver = world.oci();
    let console = async || Framed::new(driver.console().unwrap().console(spec.id).await.unwrap(), FrameCodec);
    let (mut one, mut two) = (console().await, console().await);
    one.send(Frame::new(Channel::Stdin, "echo $((40+2))-here\n")).await.unwrap();
    expect(&mut one, "42-here").await;
    expect(&mut two, "42-here").await;
    two.send(Frame::control(&Control::Resize { cols: 90, rows: 20 })).await.unwrap();
    two.send(Frame::new(Channel::Stdin, "stty size\n")).await.unwrap();
    expect(&mut one, "20 90").await;
    drop(two);
    assert!(world.log(&spec).await.contains("42-here"));
    one.send(Frame::new(Channel::Stdin, "exit 5\n")).await.unwrap();
    let seen = wait_for(&world, spec.id, &ENDED).await;
    assert_eq!(seen.exit_code, Some(5));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_log_is_bounded_and_keeps_the_end() {
    let Some(mut world) = World::new("the_log_is_bounded").await else { return };
    world.config.log_part_bytes = 64 * 1024;
    world.config.log_parts = 3;
    oblak_compute::conformance::Harness::restart(&world).await;
    let spec = world.container("seq 1 200000; echo the-end");
    world.start(&spec).await;
    assert_eq!(wait_for(&world, spec.id, &ENDED).await.exit_code, Some(0));
    let text = world.log(&spec).await;
    assert!(text.ends_with("199999\n200000\nthe-end\n"));
    assert!(text.len() <= 3 * 64 * 1024, "{}", text.len());
}

#[tokio::test(flavor = "multi_thread")]
async fn many_start_and_go_at_the_same_time() {
    let Some(world) = World::new("many_start_and_go").await else { return };
    let specs: Vec<GuestSpec> = (0..16).map(|_| world.container(POLITE)).collect();
    let driver = world.oci();
    let starts = specs.iter().map(|spec| driver.ensure(spec));
    for result in futures_util::future::join_all(starts).await {
        assert_eq!(result.unwrap().state, GuestState::Running);
    }
    assert_eq!(driver.list().await.unwrap().len(), specs.len());
    for result in futures_util::future::join_all(specs.iter().map(|spec| driver.remove(spec.id))).await {
        result.unwrap();
    }
    for spec in &specs {
        gone(spec).await;
    }
}
