//! Which process serves a data directory: a lock that dies with it, and a file that says where it listens.

use std::fs::{File, OpenOptions};
use std::net::SocketAddr;
use std::os::unix::fs::OpenOptionsExt;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::fcntl::{Flock, FlockArg};
use oblak_platform::fsx;
use oblak_platform::layout::Layout;
use oblak_platform::process::Identity;
use serde::{Deserialize, Serialize};

/// What is known of the process that serves a data directory.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Running {
    /// The process.
    pub process: Identity,
    /// Address that clients on this machine use; absent for a lone agent.
    pub url: Option<String>,
    /// Role.
    pub role: String,
    /// Guests can be started too, not only asked for.
    #[serde(default)]
    pub complete: bool,
}

/// Held as long as the process serves the directory.
pub struct Hold {
    _lock: Flock<File>,
}

fn file(layout: &Layout) -> std::path::PathBuf {
    layout.run().join("oblak.json")
}

/// Longest wait for a lock that nobody alive says to hold. A process that died while it was starting a child leaves its lock to the child
/// until that one has become its program; a process that is just starting has not yet written who it is.
const SETTLES: Duration = Duration::from_secs(5);

/// Takes the directory; `Err(Running)` when another process has it.
pub fn take(layout: &Layout) -> Result<Result<Hold, Option<Running>>> {
    let deadline = Instant::now() + SETTLES;
    loop {
        match try_take(layout)? {
            Err(None) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(20)),
            taken => return Ok(taken),
        }
    }
}

fn try_take(layout: &Layout) -> Result<Result<Hold, Option<Running>>> {
    let path = layout.run().join("lock");
    let open = OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(&path);
    let open = open.with_context(|| format!("cannot open {}", path.display()))?;
    match Flock::lock(open, FlockArg::LockExclusiveNonblock) {
        Ok(lock) => Ok(Ok(Hold { _lock: lock })),
        Err((_, nix::errno::Errno::EWOULDBLOCK)) => Ok(Err(read(layout))),
        Err((_, error)) => Err(error).with_context(|| format!("cannot lock {}", path.display())),
    }
}

/// Says who serves the directory, and whether all parts of the role do.
pub fn publish(layout: &Layout, role: &str, url: Option<String>, complete: bool) -> Result<()> {
    let running = Running { process: Identity::current(), url, role: role.into(), complete };
    fsx::write_json(&file(layout), &running).context("cannot write the run file")
}

/// Who serves the directory, if somebody does.
pub fn read(layout: &Layout) -> Option<Running> {
    let running: Running = fsx::read_json(&file(layout)).ok().flatten()?;
    running.process.is_alive().then_some(running)
}

/// The URL for clients on this machine.
pub fn local_url(bound: SocketAddr) -> String {
    let port = bound.port();
    match bound.ip() {
        ip if ip.is_unspecified() => format!("https://127.0.0.1:{port}"),
        std::net::IpAddr::V6(ip) => format!("https://[{ip}]:{port}"),
        std::net::IpAddr::V4(ip) => format!("https://{ip}:{port}"),
    }
}
