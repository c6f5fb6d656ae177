//! What the cloud adds before qemu is executed, image cached.

use anyhow::{Result, bail};
use oblak_model::{Instance, InstanceSpec, Isolation};

use crate::Context;
use crate::product;
use crate::report::{Goal, Row, Table};
use crate::stats::Samples;

const ROUNDS: usize = 20;

/// Runs the measurement.
pub fn run(_: &Context, table: &mut Table) -> Result<()> {
    let mut cloud = product::cloud()?;
    product::image_ready(&cloud, "tiny")?;
    let ticks = nix::unistd::sysconf(nix::unistd::SysconfVar::CLK_TCK)?.unwrap_or(100) as f64;
    let (mut accepted, mut executed, mut running) = (Samples::default(), Samples::default(), Samples::default());
    for round in 0..=ROUNDS {
        let spec = InstanceSpec {
            isolation: Some(Isolation::Vm),
            image: "tiny".into(),
            flavor: "xs".into(),
            ..InstanceSpec::default()
        };
        let done = product::launch(&mut cloud, &Instance::new(&format!("v{round}"), spec))?;
        let guest = cloud.shim(&done.instance).guest();
        let program = std::fs::read_link(format!("/proc/{}/exe", guest.pid))?;
        if !program.to_string_lossy().contains("qemu") {
            bail!("the guest is {}", program.display());
        }
        // A tick is a range of time; take its middle.
        let at = (guest.start_ticks as f64 + 0.5) / ticks;
        product::delete(&mut cloud, &done.instance)?;
        // The first one warms caches.
        if round > 0 {
            executed.push((at - done.began_boot.as_secs_f64()) * 1e3);
            accepted.push_ms(done.accepted);
            running.push_ms(done.running);
        }
    }
    table.row(Row::median("create request to the process of qemu", "ms", &executed).goal(Goal::AtMost(150.0)));
    table.row(Row::median("  of that until the request is answered", "ms", &accepted));
    table.row(Row::median("create request to running (qemu answers)", "ms", &running));
    table.note(format!("start of qemu: field 22 of /proc/<pid>/stat, in ticks of {:.0} ms", 1e3 / ticks));
    table.note("with network, address, seed, root disk and sandbox; image `tiny` in the store");
    cloud.clear();
    Ok(())
}
