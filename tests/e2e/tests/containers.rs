//! What containers promise: ends, restarts, ports, names, logs, users.

#![allow(clippy::unwrap_used, reason = "a test that panics has failed")]

use std::time::Duration;

use oblak_e2e::{Cloud, Draft, Running, get, holds_for, listener, until};
use oblak_model::{Phase, RestartPolicy};

const SOON: Duration = Duration::from_secs(30);

fn local(port: u16) -> std::net::SocketAddr {
    ([127, 0, 0, 1], port).into()
}

#[test]
fn ends_and_starts_follow_the_policy() {
    let Some(mut cloud) = Cloud::start() else { return };
    let exit = |name: &str, code: i32, policy| {
        Draft::container(name, &["sh", "-c", &format!("echo run >>/runs; exit {code}")]).policy(policy)
    };
    exit("never", 3, RestartPolicy::Never).create(&cloud).unwrap();
    exit("good", 0, RestartPolicy::OnFailure).create(&cloud).unwrap();
    exit("bad", 7, RestartPolicy::OnFailure).create(&cloud).unwrap();
    exit("again", 0, RestartPolicy::Always).create(&cloud).unwrap();
    Draft::container("steady", &["sleep", "1000"]).run(&mut cloud);

    let never = cloud.in_phase("never", Phase::Failed, SOON);
    assert_eq!((never.status.observed.exit_code, never.status.observed.run), (Some(3), 1), "{:?}", never.status);
    let good = cloud.in_phase("good", Phase::Stopped, SOON);
    assert_eq!((good.status.observed.exit_code, good.status.observed.run), (Some(0), 1), "{:?}", good.status);
    let bad = cloud.when("bad", "second restart", SOON, |i| i.status.observed.restart_count >= 2);
    assert_eq!(bad.status.observed.run, bad.status.observed.restart_count + 1);
    cloud.when("again", "restart", SOON, |i| i.status.observed.restart_count >= 1);
    let still = cloud.instance("never");
    assert_eq!(still.status.observed.run, 1, "what may not be started again is not");

    // Stop, start, restart, pause and resume of what runs.
    let first = cloud.shim(&cloud.instance("steady")).guest();
    cloud.oblak(&["pause", "steady", "--wait"]).ok();
    cloud.in_phase("steady", Phase::Paused, SOON);
    assert!(first.is_alive());
    cloud.oblak(&["resume", "steady", "--wait"]).ok();
    cloud.in_phase("steady", Phase::Running, SOON);
    assert_eq!(cloud.shim(&cloud.instance("steady")).guest(), first, "resumed, not started");
    cloud.oblak(&["stop", "steady", "--wait"]).ok();
    let stopped = cloud.in_phase("steady", Phase::Stopped, SOON);
    assert!(!first.is_alive());
    assert_eq!(stopped.status.observed.run, 1);
    cloud.oblak(&["start", "steady", "--wait"]).ok();
    let started = cloud.in_phase("steady", Phase::Running, SOON);
    assert_eq!(started.status.observed.run, 2);
    assert_eq!(started.status.observed.restart_count, 0, "asked for, so not counted");
    cloud.oblak(&["restart", "steady", "--wait"]).ok();
    cloud.when("steady", "third run", SOON, |i| i.status.observed.run == 3 && i.status.phase == Phase::Running);
    cloud.oblak(&["delete", "steady", "--wait"]).ok();
    cloud.gone("steady");
    cloud.finish();
}

#[test]
fn ports_names_logs_and_users() {
    let Some(mut cloud) = Cloud::start() else { return };
    let (taken, taken_port) = listener();
    let (free, free_port) = listener();
    drop(free);
    let job = Draft::server("job", "hello-from-job").publish(free_port, 80).run(&mut cloud);
    Draft::container("web", &["sh", "-c", "i=0; while sleep 0.2; do i=$((i+1)); echo line-$i; done"]).run(&mut cloud);

    // Published port.
    until("the published port answers", SOON, || {
        get(local(free_port), "/").ok().filter(|b| b.trim() == "hello-from-job")
    });

    // DNS by name in both directions, and the page over the network.
    cloud.exec("job", &["ping", "-c1", "-W5", "web"]).ok();
    cloud.exec("web", &["ping", "-c1", "-W5", "job"]).ok();
    assert_eq!(cloud.exec("web", &["wget", "-qO-", "http://job/"]).ok().trim(), "hello-from-job");
    assert_eq!(cloud.exec("web", &["hostname"]).ok().trim(), "web");

    // exec passes exit code and both outputs.
    let ran = cloud.exec("web", &["sh", "-c", "echo out; echo err >&2; exit 42"]);
    assert_eq!((ran.code, ran.out.trim(), ran.err.trim()), (42, "out", "err"));
    let missing = cloud.exec("web", &["/no/such/program"]);
    assert!(missing.code != 0 && missing.err.contains("/no/such/program"), "{missing:?}");

    // Root inside is nobody outside.
    let map = cloud.exec("job", &["cat", "/proc/self/uid_map"]).ok();
    let words: Vec<u64> = map.split_whitespace().map(|w| w.parse().unwrap()).collect();
    assert_eq!((words[0], words[2]), (0, 65536), "{map}");
    assert!(words[1] >= 1 << 20, "{map}");
    let guest = cloud.shim(&job).guest();
    let status = std::fs::read_to_string(format!("/proc/{}/status", guest.pid)).unwrap();
    let uid = status.lines().find_map(|l| l.strip_prefix("Uid:")).unwrap();
    assert_eq!(uid.split_whitespace().next(), Some(words[1].to_string().as_str()), "{uid}");
    // Two containers never share ids.
    let other = cloud.exec("web", &["cat", "/proc/self/uid_map"]).ok();
    assert_ne!(map, other);

    // Logs: the past, the last lines, and what comes.
    let all = until("some lines are written", SOON, || {
        Some(cloud.oblak(&["logs", "web"]).ok()).filter(|all| all.lines().count() > 2)
    });
    assert!(all.starts_with("line-1\n"), "{all}");
    let last = cloud.oblak(&["logs", "web", "--tail", "2"]).ok();
    assert_eq!(last.lines().count(), 2, "{last}");
    let seen: u32 = last.lines().last().and_then(|l| l.strip_prefix("line-")).unwrap().parse().unwrap();
    let follow = Running::start(cloud.command(&["logs", "web", "--follow", "--tail", "1"]));
    follow.expect(&format!("line-{}\n", seen + 10), SOON);
    follow.interrupt();

    // A port that another process has: the container runs, and says what is wrong.
    Draft::server("late", "late").publish(taken_port, 80).run(&mut cloud);
    let late =
        cloud.when("late", "condition", SOON, |i| i.status.conditions.iter().any(|c| c.kind == "PortNotPublished"));
    let text = &late.status.conditions.iter().find(|c| c.kind == "PortNotPublished").unwrap().message;
    assert!(text.contains(&taken_port.to_string()) && text.contains("in use"), "{text}");
    // Nobody else's port is touched.
    assert!(get(local(taken_port), "/").is_err());
    drop(taken);
    until("the port is published once it is free", Duration::from_secs(60), || get(local(taken_port), "/").ok());

    // A port that another instance of this cloud has.
    Draft::server("second", "second").publish(free_port, 80).create(&cloud).unwrap();
    cloud.explained("second", &["0 of 1 nodes fit", &free_port.to_string()]);
    assert_eq!(get(local(free_port), "/").unwrap().trim(), "hello-from-job");
    cloud.oblak(&["delete", "job", "--wait"]).ok();
    cloud.in_phase("second", Phase::Running, SOON);
    until("the port leads to its new owner", SOON, || get(local(free_port), "/").ok().filter(|b| b.trim() == "second"));
    assert!(holds_for(Duration::from_secs(1), || cloud.instance("second").status.phase == Phase::Running));
    cloud.finish();
}
