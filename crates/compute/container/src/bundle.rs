//! `config.json` for the runtime, in the form of the OCI runtime specification 1.0.

use std::path::{Path, PathBuf};

use oblak_compute::GuestSpec;
use serde_json::{Value, json};

use crate::security;
use crate::user::User;

/// Ids that a container may use, as many as /etc/passwd formats can name.
pub const ID_COUNT: u32 = 65_536;
/// Processes inside when nothing else was asked for.
const PIDS_DEFAULT: u32 = 4096;

/// Where the shim has put the parts of the container in its private mount namespace.
#[derive(Debug, Default)]
pub struct Parts {
    /// Root file system.
    pub root: PathBuf,
    /// A sysfs that shows the container's network namespace; none: mount one inside.
    pub sys: Option<PathBuf>,
    /// Files of ours: (source, destination).
    pub files: Vec<(PathBuf, &'static str)>,
    /// Volumes: (source, destination, read-only).
    pub volumes: Vec<(PathBuf, String, bool)>,
    /// User namespace to join; none: a new one, unless the host's was asked for.
    pub userns: Option<PathBuf>,
}

/// What else the configuration depends on.
#[derive(Debug)]
pub struct Environment<'a> {
    /// Path of the container's cgroup, with a leading slash.
    pub cgroup: String,
    /// Version of cgroups that limits.
    pub cgroup_version: u8,
    /// Whether swap can be limited.
    pub limits_swap: bool,
    /// Network namespace to join.
    pub netns: Option<&'a Path>,
    /// Capabilities.
    pub capabilities: Vec<String>,
}

/// The configuration.
pub fn config(spec: &GuestSpec, user: &User, parts: &Parts, env: &Environment<'_>) -> Value {
    let options = &spec.container;
    let mut namespaces: Vec<Value> =
        ["pid", "ipc", "uts", "mount", "cgroup"].iter().map(|t| json!({"type": t})).collect();
    namespaces.push(match env.netns {
        Some(path) => json!({"type": "network", "path": path}),
        None => json!({"type": "network"}),
    });
    let mut linux = json!({
        "cgroupsPath": env.cgroup,
        "resources": resources(spec, env),
        "maskedPaths": security::MASKED,
        "readonlyPaths": security::READ_ONLY,
        "seccomp": crate::seccomp::profile(&env.capabilities),
        "rootfsPropagation": "private",
    });
    if !options.userns_host {
        namespaces.push(match &parts.userns {
            Some(path) => json!({"type": "user", "path": path}),
            None => json!({"type": "user"}),
        });
        // Of one that is joined, runc wants to be told what it maps; the shim has made sure that it is this.
        let map = json!([{"containerID": 0, "hostID": options.id_base, "size": ID_COUNT}]);
        linux["uidMappings"] = map.clone();
        linux["gidMappings"] = map;
    }
    linux["namespaces"] = Value::Array(namespaces);
    let env_lines: Vec<String> = environment(spec, user).iter().map(|(k, v)| format!("{k}={v}")).collect();
    json!({
        "ociVersion": "1.0.2",
        "root": {"path": parts.root, "readonly": options.read_only_root},
        "hostname": spec.hostname,
        "mounts": mounts(parts, env),
        "process": process(&options.argv, &env_lines, &cwd(spec), user, options.tty.then_some((80, 24)), &env.capabilities),
        "linux": linux,
    })
}

/// The working directory of the main process.
pub fn cwd(spec: &GuestSpec) -> String {
    if spec.container.cwd.is_empty() { "/".into() } else { spec.container.cwd.clone() }
}

/// Environment of the main process: what every program expects, then what was asked for.
pub fn environment(spec: &GuestSpec, user: &User) -> std::collections::BTreeMap<String, String> {
    let mut env = std::collections::BTreeMap::new();
    env.insert("PATH".to_string(), "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin".to_string());
    env.insert("HOME".to_string(), user.home.clone());
    env.insert("HOSTNAME".to_string(), spec.hostname.clone());
    if spec.container.tty {
        env.insert("TERM".to_string(), "xterm".to_string());
    }
    env.extend(spec.container.env.iter().map(|(k, v)| (k.clone(), v.clone())));
    env
}

/// A process object, for the main process and for exec.
pub fn process(
    argv: &[String],
    env: &[String],
    cwd: &str,
    user: &User,
    tty: Option<(u16, u16)>,
    capabilities: &[String],
) -> Value {
    let mut process = json!({
        "terminal": tty.is_some(),
        "user": {"uid": user.uid, "gid": user.gid, "additionalGids": user.groups},
        "args": argv,
        "env": env,
        "cwd": cwd,
        "noNewPrivileges": true,
        // Nothing ambient and nothing inheritable: a user other than root has none of them.
        "capabilities": {"bounding": capabilities, "effective": capabilities, "permitted": capabilities},
    });
    if let Some((width, height)) = tty {
        process["consoleSize"] = json!({"width": width, "height": height});
    }
    process
}

fn mounts(parts: &Parts, env: &Environment<'_>) -> Value {
    let mount = |destination: &str, kind: &str, options: &[&str]| json!({"destination": destination, "type": kind, "source": kind, "options": options});
    let bind = |destination: &str, source: &Path, options: &[&str]| json!({"destination": destination, "type": "bind", "source": source, "options": options});
    let mut all = vec![
        mount("/proc", "proc", &["nosuid", "noexec", "nodev"]),
        mount("/dev", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=65536k"]),
        mount("/dev/pts", "devpts", &["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]),
        mount("/dev/shm", "tmpfs", &["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]),
        mount("/dev/mqueue", "mqueue", &["nosuid", "noexec", "nodev"]),
        match &parts.sys {
            Some(source) => bind("/sys", source, &["bind", "ro", "nosuid", "noexec", "nodev"]),
            None => mount("/sys", "sysfs", &["nosuid", "noexec", "nodev", "ro"]),
        },
        if env.cgroup_version == 2 {
            mount("/sys/fs/cgroup", "cgroup", &["nosuid", "noexec", "nodev", "relatime", "ro"])
        } else {
            // The trees of version 1 are global: nothing of them is shown.
            mount("/sys/fs/cgroup", "tmpfs", &["nosuid", "noexec", "nodev", "ro", "mode=755", "size=4k"])
        },
    ];
    for (source, destination) in &parts.files {
        all.push(bind(destination, source, &["bind", "rw", "nosuid", "nodev"]));
    }
    for (source, destination, read_only) in &parts.volumes {
        all.push(bind(destination, source, &["bind", if *read_only { "ro" } else { "rw" }, "nosuid", "nodev"]));
    }
    Value::Array(all)
}

/// Most processes and threads inside.
pub fn pids(spec: &GuestSpec) -> u32 {
    if spec.container.pids_max == 0 { PIDS_DEFAULT } else { spec.container.pids_max }
}

fn resources(spec: &GuestSpec, env: &Environment<'_>) -> Value {
    const PERIOD_US: u64 = 100_000;
    let mut resources = json!({
        // Nothing but the devices that every runtime adds: null, zero, full, random, urandom, tty, ptmx, pts.
        "devices": [{"allow": false, "access": "rwm"}],
        "pids": {"limit": pids(spec)},
    });
    if spec.vcpus_milli > 0 {
        let milli = u64::from(spec.vcpus_milli);
        resources["cpu"] =
            json!({"quota": milli * PERIOD_US / 1000, "period": PERIOD_US, "shares": (milli * 1024 / 1000).max(2)});
    }
    if spec.memory.as_u64() > 0 {
        resources["memory"] = json!({"limit": spec.memory.as_u64()});
        if env.limits_swap {
            // Memory and swap together: none is left for swap.
            resources["memory"]["swap"] = spec.memory.as_u64().into();
        }
    }
    resources
}

/// Text of /etc/hosts.
pub fn hosts(spec: &GuestSpec) -> String {
    let mut text = String::from("127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\n");
    if !spec.container.hosts.iter().any(|(_, name)| *name == spec.hostname) {
        text.push_str(&format!("127.0.1.1 {}\n", spec.hostname));
    }
    for (address, name) in &spec.container.hosts {
        text.push_str(&format!("{address} {name}\n"));
    }
    text
}
