//! Virtual machines whose processes are killed.

#![allow(clippy::unwrap_used, reason = "a test that panics has failed")]

use std::time::Duration;

use oblak_e2e::{Cloud, Draft};
use oblak_model::{Instance, Phase};

const SOON: Duration = Duration::from_secs(60);
const BOOT: Duration = Duration::from_secs(120);

/// Waits until the guest has said that it is up as often as `times`.
fn booted(cloud: &Cloud, name: &str, times: usize) {
    oblak_e2e::until(&format!("{name} has booted {times} times"), BOOT, || {
        let log = cloud.oblak(&["logs", name]);
        (log.out.matches("oblak: ready").count() >= times).then_some(())
    });
}

fn emulators(cloud: &Cloud, vm: &Instance) -> usize {
    let id = vm.metadata.id.to_string();
    cloud.machine.processes().iter().filter(|(_, c)| c.contains("qemu-system") && c.contains(&id)).count()
}

#[test]
fn a_machine_survives_every_kill() {
    let Some(mut cloud) = Cloud::start() else { return };
    // The server is killed in the middle of the launch.
    Draft::machine("vm").create(&cloud).unwrap();
    oblak_e2e::eventually(Duration::from_secs(20), || cloud.instance("vm").status.placement.is_some().then_some(()));
    cloud.kill_server();
    cloud.up();
    let vm = cloud.in_phase("vm", Phase::Running, SOON);
    cloud.machine.remember();
    assert_eq!(emulators(&cloud, &vm), 1);
    booted(&cloud, "vm", 1);

    // Once more when it runs: the same emulator goes on.
    let before = cloud.shim(&vm);
    cloud.kill_server();
    assert!(before.guest().is_alive());
    cloud.up();
    let run = cloud.in_phase("vm", Phase::Running, SOON).status.observed.run;
    assert_eq!(cloud.shim(&vm), before);

    // The emulator: a failure, so it is started again.
    assert!(before.guest().kill());
    let again =
        cloud.when("vm", "next run", SOON, |i| i.status.observed.run == run + 1 && i.status.phase == Phase::Running);
    assert_eq!(again.status.observed.restart_count, 1);
    assert_eq!(emulators(&cloud, &vm), 1);

    // The shim: its machine is not left without one.
    let orphan = cloud.shim(&vm);
    assert!(orphan.shim.kill());
    cloud.when("vm", "run after the shim's death", SOON, |i| {
        i.status.observed.run == run + 2 && i.status.phase == Phase::Running
    });
    assert!(!orphan.guest().is_alive());
    assert_eq!(emulators(&cloud, &vm), 1);

    // The power.
    cloud.power_cut();
    cloud.up();
    cloud.when("vm", "run after the power cut", SOON, |i| {
        i.status.observed.run == run + 3 && i.status.phase == Phase::Running
    });
    assert_eq!(emulators(&cloud, &vm), 1);
    let log = cloud.oblak(&["logs", "vm"]).out.matches("oblak: ready").count();
    booted(&cloud, "vm", log + 1);

    // Deleting it while it boots leaves nothing.
    cloud.oblak(&["restart", "vm"]).ok();
    cloud.oblak(&["delete", "vm", "--wait"]).ok();
    cloud.finish();
}
