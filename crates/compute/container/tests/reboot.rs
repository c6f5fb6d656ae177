//! A reboot of the machine, played by another boot id. A program of its own, because it changes the environment.

mod common;

use common::{POLITE, World};
use oblak_compute::{ComputeDriver, GuestState};
use oblak_platform::process::{BOOT_ID_ENV, Identity};

#[test]
fn after_a_reboot_the_run_is_over_and_the_next_one_starts() {
    // SAFETY: nothing else runs in this process yet.
    unsafe { std::env::set_var(BOOT_ID_ENV, "first-boot") };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let Some(world) = World::new("reboot").await else { return };
        let mut spec = world.container(POLITE);
        let seen = world.start(&spec).await;
        assert_eq!(seen.state, GuestState::Running);
        // A power cut: nothing lives on, and nobody wrote anything down.
        for pid in [world.shim_pid(&spec), seen.pid.unwrap()] {
            let process = Identity::of(pid).unwrap();
            process.kill();
            assert!(process.wait_gone(common::PATIENCE).await);
        }
        // SAFETY: the runtime has one thread, and it is here.
        unsafe { std::env::set_var(BOOT_ID_ENV, "second-boot") };
        assert_eq!(world.oci().list().await.unwrap(), vec![spec.id]);
        let seen = world.oci().observe(spec.id).await.unwrap();
        assert_eq!((seen.state, seen.reason.as_str()), (GuestState::Failed, "NodeRebooted"), "{seen:?}");
        assert_eq!(world.start(&spec).await.state, GuestState::Failed, "the old run stays over");
        spec.run = 2;
        assert_eq!(world.start(&spec).await.state, GuestState::Running);
    });
}
