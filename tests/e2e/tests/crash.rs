//! Processes are killed at any moment: what was acknowledged is there, and what should run runs, exactly once.

#![allow(clippy::unwrap_used, reason = "a test that panics has failed")]

use std::time::Duration;

use oblak_e2e::{Cloud, Draft, holds_for, until};
use oblak_model::{Phase, RestartPolicy};
use oblak_platform::process::Identity;

const SOON: Duration = Duration::from_secs(30);
/// Counts its runs in a file on its root disk, which outlives runs.
const COUNTING: [&str; 3] = ["sh", "-c", "echo run >>/runs; exec sleep 100000"];

fn runs(cloud: &Cloud, name: &str) -> usize {
    cloud.exec(name, &["cat", "/runs"]).ok().lines().count()
}

fn netd(cloud: &Cloud) -> Option<Identity> {
    let file = cloud.data.join("network/netd.pid.json");
    oblak_platform::fsx::read_json(&file).ok().flatten().map(oblak_e2e::revive).filter(Identity::is_alive)
}

#[test]
fn guests_outlive_everything_of_ours() {
    let Some(mut cloud) = Cloud::start() else { return };
    let a = Draft::container("a", &COUNTING).run(&mut cloud);
    Draft::server("b", "page-of-b").run(&mut cloud);
    let before = cloud.shim(&a);

    // The server and agent, by force.
    cloud.kill_server();
    assert!(before.guest().is_alive() && before.shim.is_alive());
    cloud.up();
    let adopted = cloud.in_phase("a", Phase::Running, SOON);
    assert_eq!(adopted.status.observed.run, 1);
    assert_eq!(cloud.shim(&adopted), before, "the same processes");
    assert_eq!(runs(&cloud, "a"), 1);
    assert_eq!(cloud.exec("a", &["wget", "-qO-", "http://b/"]).ok().trim(), "page-of-b");

    // By the front door.
    cloud.down(&[]);
    assert!(before.guest().is_alive() && before.shim.is_alive() && netd(&cloud).is_some());
    cloud.up();
    cloud.in_phase("a", Phase::Running, SOON);
    assert_eq!(cloud.shim(&adopted), before);

    // netd: names and addresses are served again.
    let first = netd(&cloud).expect("netd runs");
    assert!(first.kill());
    let second = until("a new netd", Duration::from_secs(60), || netd(&cloud).filter(|n| *n != first));
    until("names are served again", SOON, || (cloud.exec("a", &["nslookup", "b"]).code == 0).then_some(()));
    assert!(second.is_alive());
    assert_eq!(cloud.shim(&adopted), before);

    // Everything of ours at once, while a guest is asked to be made.
    Draft::container("c", &COUNTING).create(&cloud).unwrap();
    netd(&cloud).unwrap().kill();
    cloud.kill_server();
    cloud.up();
    cloud.in_phase("c", Phase::Running, SOON);
    assert_eq!((runs(&cloud, "c"), runs(&cloud, "a")), (1, 1));

    // `down --stop-guests` ends them; the next `up` starts what should run.
    cloud.down(&["--stop-guests"]);
    assert!(!before.guest().is_alive() && !before.shim.is_alive());
    cloud.up();
    cloud.when("a", "second run", SOON, |i| i.status.observed.run == 2 && i.status.phase == Phase::Running);
    assert_eq!(runs(&cloud, "a"), 2);
    cloud.finish();
}

#[test]
fn a_killed_guest_is_started_again() {
    let Some(mut cloud) = Cloud::start() else { return };
    let a = Draft::container("a", &COUNTING).run(&mut cloud);
    let never = Draft::container("never", &COUNTING).policy(RestartPolicy::Never).run(&mut cloud);

    // The guest's process.
    assert!(cloud.shim(&a).guest().kill());
    let second =
        cloud.when("a", "second run", SOON, |i| i.status.observed.run == 2 && i.status.phase == Phase::Running);
    assert_eq!(second.status.observed.restart_count, 1);
    assert_eq!(runs(&cloud, "a"), 2);

    // Its shim: without it nobody knows how the guest ends, so the guest is ended and started with a new one.
    let orphan = cloud.shim(&second);
    assert!(orphan.shim.kill());
    let third = cloud.when("a", "third run", SOON, |i| i.status.observed.run == 3 && i.status.phase == Phase::Running);
    assert!(!orphan.guest().is_alive(), "never two of them");
    assert_eq!(runs(&cloud, "a"), 3);
    assert_ne!(cloud.shim(&third).shim, orphan.shim);

    // Both, while nobody looks.
    let now = cloud.shim(&third);
    cloud.kill_server();
    assert!(now.shim.kill());
    now.guest().kill();
    cloud.up();
    cloud.when("a", "fourth run", SOON, |i| i.status.observed.run == 4 && i.status.phase == Phase::Running);
    assert_eq!(runs(&cloud, "a"), 4);

    assert!(cloud.shim(&never).guest().kill());
    let ended = cloud.in_phase("never", Phase::Failed, SOON);
    assert_eq!(ended.status.observed.exit_code, Some(137));
    assert!(holds_for(Duration::from_secs(2), || cloud.instance("never").status.observed.run == 1));
    cloud.finish();
}

#[test]
fn after_a_power_cut_what_should_run_runs_once() {
    let Some(mut cloud) = Cloud::start() else { return };
    Draft::container("a", &COUNTING).run(&mut cloud);
    Draft::server("b", "page-of-b").run(&mut cloud);
    Draft::container("off", &COUNTING).run(&mut cloud);
    cloud.oblak(&["stop", "off", "--wait"]).ok();
    Draft::container("done", &["true"]).create(&cloud).unwrap();
    cloud.in_phase("done", Phase::Stopped, SOON);
    let addresses = cloud.instance("a").status.addresses;

    cloud.power_cut();
    assert_eq!(cloud.machine.processes(), []);
    cloud.up();
    let a = cloud.when("a", "second run", SOON, |i| i.status.observed.run == 2 && i.status.phase == Phase::Running);
    assert_eq!(a.status.addresses, addresses);
    cloud.when("b", "second run", SOON, |i| i.status.observed.run == 2 && i.status.phase == Phase::Running);
    assert_eq!(runs(&cloud, "a"), 2, "what was on its disk is there");
    assert_eq!(cloud.exec("a", &["wget", "-qO-", "http://b/"]).ok().trim(), "page-of-b");
    let (off, done) = (cloud.instance("off"), cloud.instance("done"));
    assert_eq!((off.status.phase, off.status.observed.run), (Phase::Stopped, 1));
    assert_eq!((done.status.phase, done.status.observed.run), (Phase::Stopped, 1), "what had ended stays ended");
    assert!(holds_for(Duration::from_secs(2), || cloud.instance("a").status.observed.run == 2));
    cloud.finish();
}

#[test]
fn killed_while_launching_and_deleting() {
    let Some(mut cloud) = Cloud::start() else { return };
    // The image is here, so that launches are quick and the kills hit every part of them.
    Draft::container("warm", &COUNTING).run(&mut cloud);
    for (round, pause_ms) in [0u64, 15, 40, 80, 150].into_iter().enumerate() {
        let names: Vec<String> = (0..3).map(|n| format!("r{round}-{n}")).collect();
        for name in &names {
            Draft::container(name, &COUNTING).create(&cloud).unwrap();
        }
        std::thread::sleep(Duration::from_millis(pause_ms));
        cloud.kill_server();
        cloud.up();
        for name in &names {
            cloud.in_phase(name, Phase::Running, SOON);
            assert_eq!(runs(&cloud, name), 1, "{name} was started once");
        }
        let alive = cloud.machine.processes();
        for name in &names {
            let id = cloud.instance(name).metadata.id.to_string();
            let shims = alive.iter().filter(|(_, c)| c.contains(" shim ") && c.contains(&id)).count();
            assert_eq!(shims, 1, "{name}: {alive:#?}");
        }
        for name in &names {
            cloud.wait(cloud.client().delete::<oblak_model::InstanceKind>("default", name)).unwrap();
        }
        std::thread::sleep(Duration::from_millis(pause_ms));
        cloud.kill_server();
        cloud.up();
        names.iter().for_each(|name| cloud.gone(name));
    }
    assert_eq!(runs(&cloud, "warm"), 1);
    cloud.finish();
}
