//! Finding out whether a runtime works: the host's `true` in a container like any other, once.

use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::mount::MsFlags;
use oblak_compute::shim::Ready;
use oblak_compute::shim::cgroup::{Cgroups, Group};
use oblak_platform::driver::{DriverError, DriverResult};

use super::runtime::{Runtime, short};
use super::stage::Stage;
use super::sys;
use crate::bundle::{self, Parts};
use crate::task::{self, Task};
use crate::user::User;

/// How long `true` may take.
const DEADLINE: Duration = Duration::from_secs(15);

/// Runs it and tells the caller.
pub fn run(task: &Task, ready: &mut Ready) -> DriverResult<()> {
    let cgroups = Cgroups::detect().map_err(|e| DriverError::unsupported(format!("cgroups: {e}")))?;
    let group = task::group(&cgroups, task.spec.id, task::instances_of(&task.spec.dir));
    sys::private_mounts().map_err(|e| DriverError::io("private mount namespace", &e))?;
    let result = try_run(task, &cgroups, &group);
    let end = Instant::now() + Duration::from_secs(5);
    while !group.pids().is_empty() && Instant::now() < end {
        group.kill_once();
        std::thread::sleep(Duration::from_millis(2));
    }
    let _ = group.remove();
    result?;
    ready.ok(&serde_json::json!({}));
    Ok(())
}

/// Lets the runtime run where and how those of real containers do. The container's own root, who is nobody out here, has to pass through all
/// groups above its own when it mounts version 2: through those that the runtime makes, which depends on the umask, and through those that
/// were there before, which somebody with a strict umask may have made. The group of the runtime opens them.
fn as_every_container(command: &mut Command, group: &Group) -> std::io::Result<()> {
    let tracking = group.child(task::RUNTIME_GROUP).tracking_file()?;
    let tracking = std::fs::OpenOptions::new().write(true).open(tracking)?;
    // SAFETY: both calls are async-signal-safe and touch no memory but a constant.
    unsafe {
        command.pre_exec(move || {
            if libc::write(tracking.as_raw_fd(), b"0".as_ptr().cast(), 1) != 1 {
                return Err(std::io::Error::last_os_error());
            }
            libc::umask(0o022);
            Ok(())
        });
    }
    Ok(())
}

fn try_run(task: &Task, cgroups: &Cgroups, group: &Group) -> DriverResult<()> {
    let spec = &task.spec;
    let stage = Stage::new(&[&task.runtime])?;
    let rootfs = stage.make_dir("rootfs")?;
    let io = |e: std::io::Error| DriverError::io("probe of the OCI runtime", &e);
    sys::bind(Path::new("/"), &rootfs).map_err(io)?;
    let none: Option<&str> = None;
    nix::mount::mount(none, &rootfs, none, MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY, none)
        .map_err(|e| io(e.into()))?;
    let capabilities = crate::security::capabilities(&spec.container)?;
    let env = super::environment(spec, cgroups, group, capabilities)?;
    let parts = Parts { root: rootfs, ..Parts::default() };
    super::write_config(&stage, &bundle::config(spec, &User { home: "/".into(), ..User::default() }, &parts, &env))?;
    let runtime = Runtime { program: task.runtime.clone(), stage: stage.dir.clone(), id: spec.id.to_string() };
    let log = stage.dir.join("probe.log");
    let mut command = runtime.command(&log);
    command.arg("run").arg("--bundle").arg(&stage.dir).arg(&runtime.id);
    as_every_container(&mut command, group).map_err(io)?;
    let mut child = sys::dies_with_us(&mut command)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .map_err(|e| DriverError::permanent("runtime_missing", format!("{}: {e}", task.runtime.display())))?;
    let end = Instant::now() + DEADLINE;
    loop {
        match child.try_wait().map_err(io)? {
            Some(status) if status.success() => return Ok(()),
            Some(_) => {
                let text = std::fs::read_to_string(&log).unwrap_or_default();
                return Err(DriverError::unsupported(short(&text)));
            }
            None if Instant::now() > end => {
                let _ = child.kill();
                let _ = child.wait();
                return Err(DriverError::unsupported(format!("a trivial container did not end within {DEADLINE:?}")));
            }
            None => std::thread::sleep(Duration::from_millis(2)),
        }
    }
}
