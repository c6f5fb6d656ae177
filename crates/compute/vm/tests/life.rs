//! The life of a machine on real qemu: start, console, adoption, stop, and the bad days.

mod support;

use std::time::{Duration, Instant};

use oblak_compute::shim::ShimRecord;
use oblak_compute::{ComputeDriver, GuestState};
use oblak_platform::clock::{Clock, SystemClock};
use support::{World, tiny};

/// Memory that the process has for itself, of proc(5) smaps_rollup. Code is not counted: in the product the agent runs the
/// same file.
fn private_kib(pid: i32) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap_or_default();
    let fields = text.lines().filter(|l| l.starts_with("Private_Dirty"));
    fields.filter_map(|l| l.split_whitespace().nth(1)?.parse::<u64>().ok()).sum()
}

const BOOT: Duration = Duration::from_secs(120);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn starts_shows_its_console_is_adopted_and_stops() {
    let Some(tiny) = tiny() else { return };
    let world = World::new(tiny);
    let spec = world.spec();
    let begun = Instant::now();
    let seen = world.driver().ensure(&spec).await.unwrap();
    println!("the first start took {:?}", begun.elapsed());
    assert_eq!((seen.state, seen.run), (GuestState::Running, 1), "{seen:?}");
    world.wait_console(spec.id, "root@tiny", BOOT).await;
    println!("a shell after {:?}", begun.elapsed());
    let shim = ShimRecord::read(&world.dir(spec.id)).unwrap().unwrap().shim;
    let private = private_kib(shim.pid);
    println!("the shim uses {private} KiB of private memory");
    assert!(private <= 4 << 10, "{private} KiB");
    world.restart();
    let adopted = world.driver().ensure(&spec).await.unwrap();
    assert_eq!((adopted.pid, adopted.started_at), (seen.pid, seen.started_at));
    let second = world.spec();
    let wall = SystemClock.now();
    let again = world.driver().ensure(&second).await.unwrap();
    println!("time before qemu is executed: {:?}", again.started_at.unwrap().since(wall));
    world.driver().remove(second.id).await.unwrap();
    let stopping = Instant::now();
    world.driver().stop(spec.id, Duration::from_secs(60)).await.unwrap();
    println!("stop took {:?}", stopping.elapsed());
    let ended = world.driver().observe(spec.id).await.unwrap();
    assert_eq!(
        (ended.state, ended.exit_code, ended.reason.as_str()),
        (GuestState::Stopped, Some(0), "Stopped"),
        "{ended:?}"
    );
    world.driver().remove(spec.id).await.unwrap();
    assert_eq!(world.leaks(spec.id), Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_machine_outlives_the_kill_of_its_driver() {
    let Some(tiny) = tiny() else { return };
    let world = World::new(tiny);
    let spec = world.spec();
    let start = serde_json::json!({
        "instances": world.instances(), "state": world.temp.path().join("state"), "cgroup": world.cgroup,
        "shim": support::shim_program(), "spec": spec,
    });
    let file = world.temp.path().join("start.json");
    std::fs::write(&file, start.to_string()).unwrap();
    let status =
        tokio::process::Command::new(support::shim_program()).arg("--start-and-die").arg(&file).status().await.unwrap();
    assert_eq!(std::os::unix::process::ExitStatusExt::signal(&status), Some(9), "{status}");
    let driver = world.driver();
    assert_eq!(driver.list().await.unwrap(), [spec.id]);
    let seen = driver.observe(spec.id).await.unwrap();
    assert_eq!(seen.state, GuestState::Running, "{seen:?}");
    let adopted = driver.ensure(&spec).await.unwrap();
    assert_eq!((adopted.pid, adopted.run), (seen.pid, 1));
    // Nothing ties the shim to whoever started it: own session, adopted by another parent.
    let shim = ShimRecord::read(&world.dir(spec.id)).unwrap().unwrap().shim;
    let pid = nix::unistd::Pid::from_raw(shim.pid);
    assert_ne!(nix::unistd::getsid(Some(pid)).unwrap(), nix::unistd::getsid(None).unwrap());
    driver.remove(spec.id).await.unwrap();
    assert_eq!(world.leaks(spec.id), Vec::<String>::new());
}
