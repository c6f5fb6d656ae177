//! Which drivers a node has: the real ones.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result};
use oblak_agent::{Drivers, SeedWriter, SharedPool};
use oblak_compute::ComputeDriver;
use oblak_compute_container::{Config as OciConfig, OciDriver};
use oblak_compute_vm::{QemuConfig, QemuDriver};
use oblak_model::Isolation;
use oblak_network::{InstanceMetadata, NetworkPlan, PortPlan};
use oblak_network_linux::{Config as NetworkConfig, LinuxNetwork};
use oblak_platform::layout::Layout;
use oblak_volume_file::FileDriver;

use crate::args::PoolArg;
use crate::images::Images;

/// Our own program with these first arguments.
fn ourselves(words: &[&str]) -> Result<Vec<String>> {
    // After an upgrade the running file is another one; the link in /proc still leads to what was started, "(deleted)" appended.
    let path = std::env::current_exe().context("cannot find our own program")?;
    let path = path.to_string_lossy().trim_end_matches(" (deleted)").to_string();
    Ok(std::iter::once(path).chain(words.iter().map(ToString::to_string)).collect())
}

/// The drivers of this machine, with their state below the data directory.
pub fn real(layout: &Layout, recipes: Option<&Path>, pools: &[PoolArg]) -> Result<Drivers> {
    let state = layout.node();
    let qemu: Arc<dyn ComputeDriver> =
        Arc::new(QemuDriver::new(QemuConfig::new(layout.instances(), &state, ourselves(&["shim", "vm"])?)));
    let oci: Arc<dyn ComputeDriver> =
        Arc::new(OciDriver::new(OciConfig::new(layout.instances(), &state, ourselves(&["shim", "container"])?)));
    let network = LinuxNetwork::new(&NetworkConfig::new(layout.root(), ourselves(&["netd"])?))?;
    Ok(Drivers {
        compute: BTreeMap::from([(Isolation::Container, oci), (Isolation::Vm, qemu)]),
        network: Arc::new(network),
        volume: Arc::new(FileDriver::new(layout.volumes())),
        pools: pools.iter().map(shared).collect(),
        images: Arc::new(Images::open(&layout.images(), recipes)?),
        seeds: Arc::new(Seeds),
    })
}

fn shared(pool: &PoolArg) -> (String, SharedPool) {
    (pool.name.clone(), SharedPool { path: pool.dir.clone(), driver: Arc::new(FileDriver::shared(&pool.dir)) })
}

struct Seeds;

impl SeedWriter for Seeds {
    fn write(
        &self,
        path: &Path,
        metadata: &InstanceMetadata,
        ports: &[(NetworkPlan, PortPlan)],
    ) -> std::io::Result<()> {
        let nics: Vec<_> = ports.iter().map(|(plan, port)| oblak_netd::seed::Nic { plan, port }).collect();
        oblak_netd::seed::write_seed(path, metadata, &nics)
    }
}
