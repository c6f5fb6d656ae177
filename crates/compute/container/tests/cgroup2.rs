//! Containers where version 2 of cgroups is all there is. The machine that runs the tests need not be like that: one in a machine is.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;
mod nested;

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use common::{PATIENCE, POLITE, World, leaks};
use nix::sys::signal::Signal;
use oblak_compute::conformance::{self, wait_for};
use oblak_compute::shim::cgroup::Cgroups;
use oblak_compute::{ComputeDriver, GuestSpec, GuestState};
use oblak_model::Size;
use oblak_platform::process::Identity;

/// Set in the nested machine.
const INSIDE: &str = "OBLAK_TEST_INSIDE";
/// More test programs to run in there, separated by colons; `cargo xtask nested` sets it.
const MORE: &str = "OBLAK_TEST_NESTED";
const ENDED: [GuestState; 2] = [GuestState::Stopped, GuestState::Failed];

#[test]
fn in_a_nested_machine() {
    if std::env::var_os(INSIDE).is_some() {
        return;
    }
    if let Some(reason) = nested::missing() {
        return println!("skipped: in_a_nested_machine: {reason}");
    }
    let runtimes: Vec<&str> = ["crun", "runc"].into_iter().filter(|name| nested::find(name).is_some()).collect();
    if runtimes.is_empty() {
        return println!("skipped: in_a_nested_machine: needs crun or runc");
    }
    let mut tests = vec![(std::env::current_exe().unwrap(), "--skip in_a_nested_machine")];
    let more = std::env::var(MORE).unwrap_or_default();
    tests.extend(more.split(':').filter(|p| !p.is_empty()).map(|p| (PathBuf::from(p), "")));
    let seen = nested::run(&tests, &["container-shim", "try-syscalls"].map(common::example));
    println!("{seen}");
    assert!(seen.lines().any(|l| l.starts_with("nested: over")), "the machine did not come to its end");
    let good = seen.lines().filter(|l| l.starts_with("nested: ") && l.trim_end().ends_with(" ended with 0")).count();
    assert_eq!(good, tests.len(), "not all tests passed");
    // Nothing may have been left out but what needs a runtime that is not there.
    let absent = |line: &&str| runtimes.len() < 2 && line.contains("is not installed");
    let left_out: Vec<&str> = seen.lines().filter(|l| l.starts_with("skipped: ") && !absent(l)).collect();
    assert!(left_out.is_empty(), "{left_out:?}");
}

/// A place for containers on a machine with version 2 only.
async fn world(name: &str) -> Option<World> {
    let version = Cgroups::detect().map_or(0, |found| found.version());
    if version != 2 {
        println!("skipped: {name}: this machine limits with version {version} of cgroups");
        return None;
    }
    World::new(name).await
}

/// The group of the container itself.
fn directory(spec: &GuestSpec) -> PathBuf {
    Path::new("/sys/fs/cgroup").join(common::group(&spec.dir)).join("c")
}

fn read(dir: &Path, file: &str) -> String {
    std::fs::read_to_string(dir.join(file)).unwrap_or_else(|e| panic!("{}/{file}: {e}", dir.display()))
}

async fn conforms(runtime: &str) {
    if std::env::var_os(INSIDE).is_none() {
        return println!("skipped: {runtime}: conformance.rs does this on the machine itself");
    }
    if let Some(world) = World::with_runtime(runtime, &[runtime]).await {
        conformance::suite(&world).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn crun_conforms() {
    conforms("crun").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn runc_conforms() {
    conforms("runc").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn limits_are_those_that_were_asked_for() {
    let Some(world) = world("limits_are_those_that_were_asked_for").await else { return };
    let mut spec = world.container(POLITE);
    (spec.vcpus_milli, spec.container.pids_max) = (500, 32);
    world.start(&spec).await;
    let group = directory(&spec);
    let limits = |group: &Path| ["cpu.max", "memory.max", "pids.max"].map(|file| read(group, file).trim().to_string());
    assert_eq!(limits(&group), ["50000 100000", "67108864", "32"]);
    world.oci().resize().unwrap().resize(spec.id, 250, Size::mib(96)).await.unwrap();
    assert_eq!(limits(&group), ["25000 100000", "100663296", "32"]);
    // Handed down all the way; groups that hand down hold no process, and everybody may pass.
    for above in group.ancestors().skip(1).take(3) {
        let handed = read(above, "cgroup.subtree_control");
        for controller in ["cpu", "memory", "pids"] {
            assert!(handed.split_whitespace().any(|c| c == controller), "{}: {handed}", above.display());
        }
        let mode = std::fs::metadata(above).unwrap().permissions().mode() & 0o555;
        assert_eq!(mode, 0o555, "{}", above.display());
    }
    for above in group.ancestors().skip(1).take(2) {
        assert_eq!(read(above, "cgroup.procs"), "", "{}", above.display());
    }
    let used = world.oci().usage(spec.id).await.unwrap();
    assert!(used.cpu_ns > 0 && used.memory_bytes > 0 && used.memory_bytes < 96 << 20, "{used:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn inside_only_its_own_group_is_seen_and_not_changed() {
    let Some(world) = world("inside_only_its_own_group").await else { return };
    let spec = world.container(POLITE);
    world.start(&spec).await;
    assert_eq!(world.sh(&spec, "cat /proc/self/cgroup /sys/fs/cgroup/memory.max").await, "0::/\n67108864\n");
    let text = world.sh(&spec, "ls /sys/fs/cgroup; grep -c . /sys/fs/cgroup/cgroup.procs").await;
    assert!(!text.contains("oblak") && !text.contains("system.slice") && text.contains("cgroup.procs"), "{text}");
    for line in ["echo max > /sys/fs/cgroup/memory.max", "mkdir /sys/fs/cgroup/x", "mount -o remount,rw /sys/fs/cgroup"]
    {
        let out = world.run(&spec, &["sh", "-c", line]).await;
        assert_ne!(out.code, Some(0), "{line}: {out:?}");
    }
    assert_eq!(read(&directory(&spec), "memory.max").trim(), "67108864");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_paused_container_stands_still_and_dies_with_its_shim() {
    let Some(world) = world("a_paused_container").await else { return };
    let spec = world.container("while :; do :; done");
    let main = Identity::of(world.start(&spec).await.pid.unwrap()).unwrap();
    world.oci().pause().unwrap().pause(spec.id).await.unwrap();
    wait_for(&world, spec.id, &[GuestState::Paused]).await;
    let group = directory(&spec);
    let end = tokio::time::Instant::now() + PATIENCE;
    while !read(&group, "cgroup.events").contains("frozen 1") {
        assert!(tokio::time::Instant::now() < end, "{}", read(&group, "cgroup.events"));
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
    let before = world.oci().usage(spec.id).await.unwrap().cpu_ns;
    tokio::time::sleep(std::time::Duration::from_millis(300)).await;
    assert_eq!(world.oci().usage(spec.id).await.unwrap().cpu_ns, before);

    Identity::of(world.shim_pid(&spec)).unwrap().signal(Signal::SIGKILL);
    let seen = wait_for(&world, spec.id, &ENDED).await;
    assert_eq!((seen.state, seen.reason.as_str()), (GuestState::Failed, "ShimLost"), "{seen:?}");
    assert!(!main.is_alive() && !group.exists());
    world.oci().remove(spec.id).await.unwrap();
    assert!(leaks(&spec).is_empty(), "{:?}", leaks(&spec));
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_for_lack_of_memory_it_says_so() {
    let Some(world) = world("killed_for_lack_of_memory").await else { return };
    let mut spec = world.container("exec dd if=/dev/zero of=/dev/null bs=200M count=1");
    spec.memory = Size::mib(32);
    world.start(&spec).await;
    let seen = wait_for(&world, spec.id, &ENDED).await;
    assert_eq!((seen.exit_code, seen.reason.as_str()), (Some(137), "OutOfMemory"), "{seen:?}");
}

/// Also on machines with version 1, where the kernel itself refuses.
#[tokio::test(flavor = "multi_thread")]
async fn less_memory_than_is_in_use_is_refused_and_harms_nobody() {
    let Some(world) = World::new("less_memory_than_is_in_use").await else { return };
    // A file system in memory cannot be reclaimed where there is no swap, or none is allowed.
    let spec = world.container(&format!("dd if=/dev/zero of=/dev/shm/file bs=1M count=40; echo full; {POLITE}"));
    world.start(&spec).await;
    let end = tokio::time::Instant::now() + PATIENCE;
    while !world.log(&spec).await.contains("full") {
        assert!(tokio::time::Instant::now() < end, "{}", world.log(&spec).await);
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    let driver = world.oci();
    let error = driver.resize().unwrap().resize(spec.id, 500, Size::mib(16)).await.unwrap_err();
    assert_eq!(error.code, "resize_refused", "{error:?}");
    assert_eq!(driver.observe(spec.id).await.unwrap().state, GuestState::Running);
    assert_eq!(world.sh(&spec, "wc -c < /dev/shm/file").await.trim(), "41943040");
    driver.resize().unwrap().resize(spec.id, 500, Size::mib(56)).await.unwrap();
    assert_eq!(driver.observe(spec.id).await.unwrap().state, GuestState::Running);
}
