//! Capabilities and the parts of /proc and /sys that a container must not see or write.

use oblak_compute::ContainerOptions;
use oblak_platform::driver::{DriverError, DriverResult};

/// What a container's root may do inside by default: manage the ids, files and processes of its own system.
const DEFAULT: [&str; 14] = [
    "AUDIT_WRITE",
    "CHOWN",
    "DAC_OVERRIDE",
    "FOWNER",
    "FSETID",
    "KILL",
    "MKNOD",
    "NET_BIND_SERVICE",
    "NET_RAW",
    "SETFCAP",
    "SETGID",
    "SETPCAP",
    "SETUID",
    "SYS_CHROOT",
];

/// All capabilities of capabilities(7).
const ALL: [&str; 41] = [
    "AUDIT_CONTROL",
    "AUDIT_READ",
    "AUDIT_WRITE",
    "BLOCK_SUSPEND",
    "BPF",
    "CHECKPOINT_RESTORE",
    "CHOWN",
    "DAC_OVERRIDE",
    "DAC_READ_SEARCH",
    "FOWNER",
    "FSETID",
    "IPC_LOCK",
    "IPC_OWNER",
    "KILL",
    "LEASE",
    "LINUX_IMMUTABLE",
    "MAC_ADMIN",
    "MAC_OVERRIDE",
    "MKNOD",
    "NET_ADMIN",
    "NET_BIND_SERVICE",
    "NET_BROADCAST",
    "NET_RAW",
    "PERFMON",
    "SETFCAP",
    "SETGID",
    "SETPCAP",
    "SETUID",
    "SYSLOG",
    "SYS_ADMIN",
    "SYS_BOOT",
    "SYS_CHROOT",
    "SYS_MODULE",
    "SYS_NICE",
    "SYS_PACCT",
    "SYS_PTRACE",
    "SYS_RAWIO",
    "SYS_RESOURCE",
    "SYS_TIME",
    "SYS_TTY_CONFIG",
    "WAKE_ALARM",
];

/// The capabilities of a container, with their `CAP_` prefix, sorted.
///
/// # Errors
/// Permanent, naming a capability that does not exist.
pub fn capabilities(options: &ContainerOptions) -> DriverResult<Vec<String>> {
    let expand = |field: &str, names: &[String]| -> DriverResult<Vec<&'static str>> {
        let mut out = Vec::new();
        for name in names {
            let plain = name.to_ascii_uppercase();
            let plain = plain.strip_prefix("CAP_").unwrap_or(&plain);
            if plain == "ALL" {
                out.extend(ALL);
                continue;
            }
            let known = ALL.iter().find(|c| **c == plain);
            out.push(known.ok_or_else(|| {
                DriverError::permanent(
                    "unknown_capability",
                    format!("container.{field}: {name:?} is not a capability; see capabilities(7)"),
                )
            })?);
        }
        Ok(out)
    };
    let add = expand("cap_add", &options.cap_add)?;
    let drop = expand("cap_drop", &options.cap_drop)?;
    let mut set: Vec<&str> = DEFAULT.into_iter().filter(|c| !drop.contains(c)).chain(add).collect();
    set.sort_unstable();
    set.dedup();
    Ok(set.into_iter().map(|c| format!("CAP_{c}")).collect())
}

/// Hidden: they tell of the host or reach its hardware.
pub const MASKED: [&str; 12] = [
    "/proc/acpi",
    "/proc/asound",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/sys/devices/virtual/powercap",
    "/sys/firmware",
];

/// Visible, but nobody inside may write there.
pub const READ_ONLY: [&str; 5] = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];

#[cfg(test)]
mod tests {
    use super::*;

    fn caps(add: &[&str], drop: &[&str]) -> DriverResult<Vec<String>> {
        let words = |w: &[&str]| w.iter().map(ToString::to_string).collect();
        capabilities(&ContainerOptions { cap_add: words(add), cap_drop: words(drop), ..ContainerOptions::default() })
    }

    #[test]
    fn adds_and_drops() {
        assert_eq!(caps(&[], &[]).unwrap().len(), DEFAULT.len());
        assert!(!caps(&[], &[]).unwrap().contains(&"CAP_SYS_ADMIN".to_string()));
        assert_eq!(caps(&["cap_net_admin"], &["all"]).unwrap(), ["CAP_NET_ADMIN"]);
        assert_eq!(caps(&["ALL"], &[]).unwrap().len(), ALL.len());
        assert!(caps(&["FLY"], &[]).unwrap_err().detail.contains("container.cap_add: \"FLY\""));
    }
}
