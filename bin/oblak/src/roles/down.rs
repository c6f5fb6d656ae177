//! `oblak down`.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Result, bail};
use nix::sys::signal::Signal;
use oblak_platform::layout::Layout;

use super::{require_root, running, runtime};
use crate::args::DownArgs;
use crate::drivers;

/// Time for open requests and streams to end.
const PATIENCE: Duration = Duration::from_secs(20);

/// Stops the process that serves the data directory, and the guests when asked.
pub fn run(args: &DownArgs) -> Result<ExitCode> {
    require_root("oblak down")?;
    let Ok(data) = std::fs::canonicalize(&args.data) else {
        println!("there is no data directory {}; nothing to stop", args.data.display());
        return Ok(ExitCode::SUCCESS);
    };
    let layout = Layout::new(data);
    runtime()?.block_on(async {
        match running::read(&layout) {
            Some(found) => {
                found.process.signal(Signal::SIGTERM);
                if !found.process.wait_gone(PATIENCE).await {
                    found.process.kill();
                    if !found.process.wait_gone(Duration::from_secs(5)).await {
                        bail!("process {} does not end", found.process.pid);
                    }
                }
                println!("stopped {} (process {})", found.role, found.process.pid);
            }
            None => println!("oblak does not run on {}", layout.root().display()),
        }
        if args.stop_guests {
            let drivers = drivers::real(&layout, None, &[])?;
            let stopped = oblak_agent::stop_guests(&drivers, &layout).await;
            println!("stopped {stopped} guests");
        }
        let etcd = super::cluster::file::dir(&layout);
        if args.stop_etcd {
            if oblak_store_etcd::supervise::stop(&etcd).await? {
                println!("stopped etcd");
            }
        } else if let Some(pid) = oblak_store_etcd::supervise::running(&etcd) {
            println!("etcd goes on (process {pid}); `oblak down --stop-etcd` stops it");
        }
        Ok(ExitCode::SUCCESS)
    })
}
