//! A large cloud loses a tenth of its nodes: how long the control plane takes by virtual time, and what it costs to play that here.

use anyhow::Result;
use oblak_api::ApiConfig;
use oblak_sim::whatif::scale::{self, Scale};

use crate::Context;
use crate::report::{Row, Table};

const SCALES: [Scale; 2] =
    [Scale { nodes: 100, instances: 10_000, dead: 10 }, Scale { nodes: 1000, instances: 100_000, dead: 100 }];

/// Runs the measurement.
pub fn run(_: &Context, table: &mut Table) -> Result<()> {
    let lease = ApiConfig::new(([127, 0, 0, 1], 0).into(), ".").node_lease;
    for scale in SCALES {
        let figures = scale::run(scale, lease)?;
        let what = format!("{} nodes, {} instances, {} nodes die", scale.nodes, scale.instances, scale.dead);
        table.row(Row::value(format!("{what}: until all run elsewhere"), "virtual s", figures.virtual_seconds));
        table.row(Row::value("  instances moved", "instances", figures.moved as f64));
        table.row(Row::value("  played in", "s", figures.real_seconds));
        table.row(Row::value("  most memory of this process so far", "MiB", figures.peak_mib as f64));
    }
    table.note("the reconcilers of the product over the memory store; the nodes are stand-ins that start a container in 0.5 s; evacuation begins when the lease (15 s) of a dead node has ended");
    Ok(())
}
