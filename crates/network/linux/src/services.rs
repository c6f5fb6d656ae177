//! The node's netd: one detached process that outlives us, known by its recorded identity.

use std::fs::OpenOptions;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use oblak_platform::driver::{DriverError, DriverResult};
use oblak_platform::fsx;
use oblak_platform::process::Identity;

use crate::node::At;

/// The identity of the running netd.
pub(crate) const PID_FILE: &str = "netd.pid.json";
const LOG_FILE: &str = "netd.log";
/// A log of a former run that is larger is started anew; it holds only messages of netd itself.
const MAX_LOG_BYTES: u64 = 4 << 20;

/// Starts netd unless the recorded one lives. A second one beside it ends by itself, because netd locks its directory.
pub(crate) fn ensure(dir: &Path, command: &[String]) -> DriverResult<()> {
    let what = || "starting netd".to_string();
    let Some((program, arguments)) = command.split_first() else {
        return Err(DriverError::unsupported(
            "no command for netd is configured, so guests get no DHCP, DNS and metadata",
        ));
    };
    fsx::create_dir_private(dir, 0o700).at(what)?;
    let record = dir.join(PID_FILE);
    if fsx::read_json::<Identity>(&record).ok().flatten().is_some_and(|netd| netd.is_alive()) {
        return Ok(());
    }
    let path = dir.join(LOG_FILE);
    let fresh = std::fs::metadata(&path).is_ok_and(|m| m.len() > MAX_LOG_BYTES);
    let mut options = OpenOptions::new();
    let log = options.create(true).write(true).append(!fresh).truncate(fresh).mode(0o600).open(&path).at(what)?;
    let errors = log.try_clone().at(what)?;
    let mut start = Command::new(program);
    start.args(arguments).arg("--dir").arg(dir).current_dir("/").stdin(Stdio::null()).stdout(log).stderr(errors);
    // SAFETY: setsid is async-signal-safe. It takes netd out of our session and process group, so that no signal meant for us
    // reaches it.
    unsafe {
        start.pre_exec(|| if libc::setsid() < 0 { Err(std::io::Error::last_os_error()) } else { Ok(()) });
    }
    let mut child = start.spawn().at(|| format!("starting netd ({program})"))?;
    let pid = i32::try_from(child.id()).unwrap_or(i32::MAX);
    let Some(identity) = Identity::of(pid) else {
        return Err(DriverError::retry("netd_ended", format!("netd ended at once; see {}", path.display())));
    };
    fsx::write_json(&record, &identity).at(what)?;
    // Collects the exit status, should it end before us.
    std::thread::Builder::new().name("netd-wait".into()).spawn(move || child.wait()).at(what)?;
    tracing::info!(pid, "started netd");
    Ok(())
}

/// Ends the recorded netd. It keeps no state that an orderly end would save, so it is killed.
pub(crate) fn stop(dir: &Path) -> DriverResult<()> {
    let what = || "stopping netd".to_string();
    let record = dir.join(PID_FILE);
    let Some(netd) = fsx::read_json::<Identity>(&record).at(what)? else { return Ok(()) };
    netd.kill();
    fsx::remove_file_if_exists(&record).at(what)
}
