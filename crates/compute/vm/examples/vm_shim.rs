//! For tests: the shim alone, `vm_shim --dir <instance dir>` (in the product a role of the one binary), and a driver that is
//! killed right after it started a machine, `vm_shim --start-and-die <config.json>`.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use oblak_compute::{ComputeDriver, GuestSpec};
use oblak_compute_vm::{QemuConfig, QemuDriver};

fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1);
    match (arguments.next().as_deref(), arguments.next().map(PathBuf::from)) {
        (Some("--dir"), Some(dir)) => oblak_compute_vm::shim_main(&dir),
        (Some("--start-and-die"), Some(file)) => start_and_die(&file),
        _ => {
            eprintln!("usage: vm_shim --dir <instance dir> | --start-and-die <config.json>");
            ExitCode::FAILURE
        }
    }
}

#[derive(serde::Deserialize)]
struct Start {
    instances: PathBuf,
    state: PathBuf,
    cgroup: String,
    shim: String,
    spec: GuestSpec,
}

fn start_and_die(file: &Path) -> ExitCode {
    let work = || -> Result<(), Box<dyn std::error::Error>> {
        let start: Start = serde_json::from_slice(&std::fs::read(file)?)?;
        let config = QemuConfig {
            cgroup_parent: start.cgroup,
            ..QemuConfig::new(start.instances, start.state, vec![start.shim])
        };
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
        runtime.block_on(QemuDriver::new(config).ensure(&start.spec))?;
        nix::sys::signal::raise(nix::sys::signal::Signal::SIGKILL)?;
        Ok(())
    };
    if let Err(error) = work() {
        eprintln!("{error}");
    }
    ExitCode::FAILURE
}
