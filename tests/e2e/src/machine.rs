//! What a cloud leaves on the machine: processes, mounts, namespaces, links, firewall tables, cgroups. Found by names that are made
//! from the data directory or from the ids of its objects, never by what was there before, so tests can run side by side.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use oblak_model::{InstanceId, NetworkId};
use oblak_platform::process::{Identity, boot_id};
use sha2::{Digest, Sha256};

/// The identity in terms of this boot: a cloud that was told of another boot records that one.
#[must_use]
pub fn revive(mut recorded: Identity) -> Identity {
    recorded.boot_id = boot_id();
    recorded
}

/// One data directory, seen from outside.
#[derive(Clone, Debug)]
pub struct Machine {
    data: PathBuf,
    tag: String,
    /// Instances that it has had.
    pub instances: BTreeSet<InstanceId>,
    /// Networks that it has had.
    pub networks: BTreeSet<NetworkId>,
}

impl Machine {
    /// For a data directory (absolute, links resolved).
    #[must_use]
    pub fn new(data: &Path) -> Self {
        Self { data: data.to_path_buf(), tag: tag(data), instances: BTreeSet::new(), networks: BTreeSet::new() }
    }

    /// Remembers what exists now, for the search after it is gone.
    pub fn remember(&mut self) {
        self.instances.extend(names(&self.data.join("instances")).iter().filter_map(|n| n.parse::<InstanceId>().ok()));
        self.networks.extend(names(&self.data.join("network")).iter().filter_map(|n| n.parse::<NetworkId>().ok()));
    }

    /// Directory of its namespaces.
    #[must_use]
    pub fn namespaces(&self) -> PathBuf {
        Path::new("/run/oblak").join(&self.tag)
    }

    /// Its table in the host's firewall.
    #[must_use]
    pub fn table(&self) -> String {
        format!("oblak_{}", self.tag)
    }

    /// Its processes: shims, guests, netd and etcd, with their command lines. The server is left out.
    #[must_use]
    pub fn processes(&self) -> Vec<(Identity, String)> {
        let data = self.data.to_string_lossy().into_owned();
        let groups = self.groups();
        let pids = names(Path::new("/proc")).into_iter().filter_map(|n| n.parse::<i32>().ok());
        pids.filter_map(|pid| {
            let identity = Identity::of(pid)?;
            let read = |file: &str| std::fs::read(format!("/proc/{pid}/{file}")).unwrap_or_default();
            let command = String::from_utf8_lossy(&read("cmdline")).replace('\0', " ");
            let helper = command.contains(" shim ") || command.contains(" netd ") || command.contains(" --data-dir=");
            let cgroup = String::from_utf8_lossy(&read("cgroup")).into_owned();
            let ours = (helper && command.contains(&data)) || groups.iter().any(|group| cgroup.contains(group));
            ours.then_some((identity, command))
        })
        .collect()
    }

    /// Everything that is left, one line each. `netd` says whether that process counts.
    #[must_use]
    pub fn leftovers(&self, netd: bool) -> Vec<String> {
        let mut left = Vec::new();
        for (process, command) in self.processes() {
            if netd || !command.contains(" netd ") {
                left.push(format!("process {}: {command}", process.pid));
            }
        }
        left.extend(self.mounts().iter().map(|m| format!("mount {}", m.display())));
        left.extend(names(&self.namespaces().join("netns")).iter().map(|n| format!("namespace {n}")));
        left.extend(self.links().iter().map(|l| format!("link {l}")));
        if self.has_table() {
            left.push(format!("nftables table {}", self.table()));
        }
        left.extend(self.cgroups().iter().map(|c| format!("cgroup {}", c.display())));
        left.extend(names(&self.data.join("instances")).iter().map(|n| format!("directory instances/{n}")));
        left
    }

    /// Mounts below the data directory and its namespaces, the innermost last.
    #[must_use]
    pub fn mounts(&self) -> Vec<PathBuf> {
        let text = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        let points = text.lines().filter_map(|l| l.split(' ').nth(4)).map(PathBuf::from);
        let roots = [self.data.clone(), self.namespaces()];
        points.filter(|p| roots.iter().any(|r| p.starts_with(r) && p != r)).collect()
    }

    /// Links in the host's namespace.
    #[must_use]
    pub fn links(&self) -> Vec<String> {
        let known = names(Path::new("/sys/class/net"));
        let ours = self.networks.iter().map(|n| format!("ou{}", n.short()));
        ours.filter(|name| known.contains(name)).collect()
    }

    fn has_table(&self) -> bool {
        let Ok(out) = Command::new("nft").args(["list", "tables"]).output() else { return false };
        String::from_utf8_lossy(&out.stdout).lines().any(|l| l.ends_with(&format!(" {}", self.table())))
    }

    /// What the groups of its guests have in their names; those of other data directories on this machine have it not.
    fn groups(&self) -> Vec<String> {
        // FNV-1a of the directory of the instances, as `compute::shim::cgroup` has it.
        let instances = self.data.join("instances");
        let bytes = instances.as_os_str().as_encoded_bytes();
        let hash = bytes.iter().fold(0x811c_9dc5_u32, |hash, byte| (hash ^ u32::from(*byte)).wrapping_mul(0x0100_0193));
        self.instances.iter().map(|id| format!("{id}-{hash:08x}")).collect()
    }

    fn cgroups(&self) -> Vec<PathBuf> {
        let root = Path::new("/sys/fs/cgroup");
        let trees = names(root).into_iter().map(|n| root.join(n)).chain([root.to_path_buf()]);
        let mut groups = self.groups();
        groups.push(format!("etcd-{}", tag(&self.data.join("etcd"))));
        trees
            .map(|t| t.join("oblak"))
            .flat_map(|dir| names(&dir).into_iter().map(move |n| dir.join(n)))
            .filter(|p| groups.iter().any(|group| p.to_string_lossy().contains(group)))
            .collect()
    }

    /// Plays the end of the machine: all processes are killed, and what the kernel forgets at a boot is taken away.
    pub fn power_off(&mut self) {
        self.remember();
        crate::wait::eventually(Duration::from_secs(10), || {
            let alive = self.processes();
            for (process, _) in &alive {
                process.kill();
            }
            // What is frozen dies when it is thawed.
            self.cgroups().iter().for_each(|group| thaw(group));
            alive.is_empty().then_some(())
        });
        for mount in self.mounts().iter().rev() {
            let _ = nix::mount::umount2(mount, nix::mount::MntFlags::MNT_DETACH);
        }
        let _ = std::fs::remove_dir_all(self.namespaces());
        for link in self.links() {
            let _ = Command::new("ip").args(["link", "del", &link]).output();
        }
        if self.has_table() {
            let _ = Command::new("nft").args(["delete", "table", "inet", &self.table()]).output();
        }
        for group in self.cgroups() {
            remove_cgroup(&group);
        }
    }
}

/// What names are made of that belong to a directory.
fn tag(dir: &Path) -> String {
    let digest = Sha256::digest(dir.as_os_str().as_encoded_bytes());
    digest.iter().take(4).map(|b| format!("{b:02x}")).collect()
}

fn thaw(group: &Path) {
    for (file, thawed) in [("freezer.state", "THAWED"), ("cgroup.freeze", "0")] {
        if group.join(file).exists() {
            let _ = std::fs::write(group.join(file), thawed);
        }
    }
    names(group).iter().map(|name| group.join(name)).filter(|dir| dir.is_dir()).for_each(|dir| thaw(&dir));
}

/// Children first; only directories can be removed there.
fn remove_cgroup(dir: &Path) {
    for name in names(dir) {
        if dir.join(&name).is_dir() {
            remove_cgroup(&dir.join(name));
        }
    }
    let _ = std::fs::remove_dir(dir);
}

/// Names in a directory; none when there is no such directory.
pub(crate) fn names(dir: &Path) -> Vec<String> {
    let Ok(entries) = std::fs::read_dir(dir) else { return Vec::new() };
    let mut names: Vec<String> = entries.flatten().filter_map(|e| e.file_name().into_string().ok()).collect();
    names.sort();
    names
}
