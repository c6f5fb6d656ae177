//! Control groups, version 1 (one tree per controller), version 2 (one tree), and hybrid systems, on which version 1 does
//! the limiting. Formats: `Documentation/admin-guide/cgroup-v1/` and `cgroup-v2.rst` of the kernel.
//!
//! Nothing here mounts or unmounts a controller.

use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use oblak_platform::process::pidfd_open;

use crate::UsageSample;

/// Our part of every tree.
pub const ROOT: &str = "oblak";

/// Path of the group of a guest below `parent`. Data directories on one machine never share one, although an instance may be in two of
/// them while it moves: the name ends with the FNV-1a hash of the directory that holds the instances.
#[must_use]
pub fn name_of(parent: &str, guest: &str, instances: &Path) -> String {
    let bytes = instances.as_os_str().as_encoded_bytes();
    let hash = bytes.iter().fold(0x811c_9dc5_u32, |hash, byte| (hash ^ u32::from(*byte)).wrapping_mul(0x0100_0193));
    format!("{parent}/{guest}-{hash:08x}")
}

/// One mounted tree.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Tree {
    mount: PathBuf,
    /// Controller names of version 1, `name=...` included; empty for version 2.
    controllers: Vec<String>,
}

/// The trees of this machine that limit and count.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cgroups {
    trees: Vec<Tree>,
    unified: bool,
}

/// Limits of a group. Zero means no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// CPU time in thousandths of a CPU.
    pub cpu_milli: u32,
    /// Bytes of memory; no swap on top.
    pub memory_bytes: u64,
    /// Processes and threads.
    pub pids: u32,
}

impl Cgroups {
    /// Looks at what is mounted.
    ///
    /// # Errors
    /// Any I/O error; `NotFound` when no usable tree is mounted.
    pub fn detect() -> io::Result<Self> {
        Self::parse(&std::fs::read_to_string("/proc/self/mountinfo")?, |mount| {
            std::fs::read_to_string(mount.join("cgroup.controllers"))
                .is_ok_and(|t| t.split_whitespace().any(|c| c == "memory"))
        })
        .ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, "no cgroup tree with the memory controller is mounted"))
    }

    fn parse(mountinfo: &str, limits_memory: impl Fn(&Path) -> bool) -> Option<Self> {
        let mut v1 = Vec::new();
        let mut v2 = None;
        for line in mountinfo.lines() {
            // "id parent dev root mountpoint options ... - type source superoptions" (proc_pid_mountinfo(5)).
            let Some((left, right)) = line.split_once(" - ") else { continue };
            let left: Vec<&str> = left.split(' ').collect();
            let right: Vec<&str> = right.split(' ').collect();
            let (Some(root), Some(mount), Some(kind)) = (left.get(3), left.get(4), right.first()) else { continue };
            if *root != "/" {
                continue;
            }
            let mount = PathBuf::from(mount);
            match *kind {
                "cgroup2" => v2 = v2.or(Some(mount)),
                "cgroup" => {
                    let known = |o: &&str| o.starts_with("name=") || CONTROLLERS.contains(o);
                    let controllers = right.get(2).map(|o| o.split(',').filter(known).map(String::from).collect());
                    v1.push(Tree { mount, controllers: controllers.unwrap_or_default() });
                }
                _ => {}
            }
        }
        if let Some(mount) = v2.filter(|m| limits_memory(m)) {
            return Some(Self { trees: vec![Tree { mount, controllers: Vec::new() }], unified: true });
        }
        v1.iter().any(|t| t.controllers.iter().any(|c| c == "memory")).then_some(Self { trees: v1, unified: false })
    }

    /// 1 or 2: the version that limits.
    #[must_use]
    pub fn version(&self) -> u8 {
        if self.unified { 2 } else { 1 }
    }

    /// The group `path` (such as `oblak/0190a1b2-...`), which need not exist.
    #[must_use]
    pub fn group(&self, path: &str) -> Group {
        Group { cgroups: self.clone(), path: path.trim_matches('/').to_string() }
    }
}

const CONTROLLERS: [&str; 14] = [
    "blkio",
    "cpu",
    "cpuacct",
    "cpuset",
    "devices",
    "freezer",
    "hugetlb",
    "memory",
    "misc",
    "net_cls",
    "net_prio",
    "perf_event",
    "pids",
    "rdma",
];

/// One group in all trees.
#[derive(Clone, Debug)]
pub struct Group {
    cgroups: Cgroups,
    path: String,
}

impl Group {
    /// The path below the trees, with a leading slash, as OCI runtimes want it.
    #[must_use]
    pub fn path(&self) -> String {
        format!("/{}", self.path)
    }

    fn dirs(&self) -> impl Iterator<Item = PathBuf> {
        self.cgroups.trees.iter().map(|t| t.mount.join(&self.path))
    }

    /// The directory for a version 1 controller, or the only one.
    fn dir(&self, controller: &str) -> Option<PathBuf> {
        let tree =
            self.cgroups.trees.iter().find(|t| self.cgroups.unified || t.controllers.iter().any(|c| c == controller));
        tree.map(|t| t.mount.join(&self.path))
    }

    fn read(&self, controller: &str, file: &str) -> Option<String> {
        std::fs::read_to_string(self.dir(controller)?.join(file)).ok()
    }

    fn write(&self, controller: &str, file: &str, value: &str) -> io::Result<()> {
        let missing =
            || io::Error::new(io::ErrorKind::NotFound, format!("the cgroup controller {controller} is not mounted"));
        let path = self.dir(controller).ok_or_else(missing)?.join(file);
        std::fs::write(&path, value).map_err(|e| io::Error::new(e.kind(), format!("{}: {e}", path.display())))
    }

    /// Makes the group in every tree. Fine when it exists.
    ///
    /// # Errors
    /// Any I/O error.
    pub fn create(&self) -> io::Result<()> {
        if self.cgroups.unified {
            self.enable_controllers()?;
        }
        for tree in &self.cgroups.trees {
            let dir = tree.mount.join(&self.path);
            if tree.controllers.iter().any(|c| c == "cpuset") {
                create_cpuset(&tree.mount, &dir)?;
            } else {
                make(&tree.mount, &dir)?;
            }
        }
        Ok(())
    }

    /// In version 2 a group has the controllers that all its ancestors hand down.
    fn enable_controllers(&self) -> io::Result<()> {
        let mount = &self.cgroups.trees[0].mount;
        let mut dir = mount.clone();
        let mut steps: Vec<&str> = self.path.split('/').collect();
        steps.pop();
        for step in std::iter::once("").chain(steps) {
            if !step.is_empty() {
                dir.push(step);
            }
            make(mount, &dir)?;
            for controller in ["cpu", "memory", "pids", "io", "cpuset"] {
                // One at a time: a controller that this kernel lacks must not take the others with it.
                let _ = std::fs::write(dir.join("cgroup.subtree_control"), format!("+{controller}"));
            }
        }
        Ok(())
    }

    /// Moves a process in, in every tree.
    ///
    /// # Errors
    /// Any I/O error.
    pub fn add(&self, pid: i32) -> io::Result<()> {
        self.dirs().try_for_each(|dir| std::fs::write(dir.join("cgroup.procs"), pid.to_string()))
    }

    /// Sets limits; may be called again while the group is in use. Memory comes first, so that a refusal changes nothing.
    ///
    /// # Errors
    /// Any I/O error; `ResourceBusy` when more memory is in use than allowed and cannot be reclaimed.
    pub fn limit(&self, limits: &Limits) -> io::Result<()> {
        const PERIOD_US: u64 = 100_000;
        let quota = u64::from(limits.cpu_milli) * PERIOD_US / 1000;
        let or_max = |n: u64| if n == 0 { "max".to_string() } else { n.to_string() };
        if self.cgroups.unified {
            self.limit_memory_v2(limits.memory_bytes)?;
            self.write("cpu", "cpu.max", &format!("{} {PERIOD_US}", or_max(quota)))?;
            return self.write("pids", "pids.max", &or_max(limits.pids.into()));
        }
        self.limit_memory_v1(limits.memory_bytes)?;
        self.write("cpu", "cpu.cfs_period_us", &PERIOD_US.to_string())?;
        self.write("cpu", "cpu.cfs_quota_us", &if quota == 0 { "-1".to_string() } else { quota.to_string() })?;
        self.write("pids", "pids.max", &or_max(limits.pids.into()))
    }

    /// Where version 1 refuses a limit below what is in use, version 2 takes it and kills. So what is in use is reclaimed down to the new
    /// limit first, by `memory.high`, which never kills; it stays until the limit holds, and slows down whoever grows meanwhile.
    fn limit_memory_v2(&self, bytes: u64) -> io::Result<()> {
        let in_use = || self.read("memory", "memory.current").and_then(|t| t.trim().parse::<u64>().ok()).unwrap_or(0);
        if bytes == 0 {
            self.write("memory", "memory.max", "max")?;
            let _ = self.write("memory", "memory.swap.max", "max");
            return Ok(());
        }
        let shrinks = in_use() > bytes;
        if shrinks {
            self.write("memory", "memory.high", &bytes.to_string())?;
        }
        let left = in_use();
        let result = if left > bytes {
            let text = format!("{left} bytes of memory are in use and cannot be reclaimed");
            Err(io::Error::new(io::ErrorKind::ResourceBusy, text))
        } else {
            self.write("memory", "memory.max", &bytes.to_string())
        };
        if shrinks {
            self.write("memory", "memory.high", "max")?;
        }
        result?;
        // Absent where the kernel has no swap accounting: then there is nothing to forbid.
        let _ = self.write("memory", "memory.swap.max", "0");
        Ok(())
    }

    fn limit_memory_v1(&self, bytes: u64) -> io::Result<()> {
        let value = if bytes == 0 { "-1".to_string() } else { bytes.to_string() };
        let with_swap = self.read("memory", "memory.memsw.limit_in_bytes").is_some();
        // Memory + swap must never be below memory, so a shrink sets memory first and a growth sets it last.
        if !with_swap {
            return self.write("memory", "memory.limit_in_bytes", &value);
        }
        if self.write("memory", "memory.limit_in_bytes", &value).is_ok() {
            return self.write("memory", "memory.memsw.limit_in_bytes", &value);
        }
        self.write("memory", "memory.memsw.limit_in_bytes", &value)?;
        self.write("memory", "memory.limit_in_bytes", &value)
    }

    /// A group below this one.
    #[must_use]
    pub fn child(&self, name: &str) -> Self {
        Self { cgroups: self.cgroups.clone(), path: format!("{}/{name}", self.path) }
    }

    /// Makes the group in one tree only and returns the file that a process writes `0` to in order to join it there: enough
    /// to find and kill what is started in it.
    ///
    /// # Errors
    /// Any I/O error.
    pub fn tracking_file(&self) -> io::Result<PathBuf> {
        if self.cgroups.unified {
            self.enable_controllers()?;
        }
        let has = |t: &Tree, name: &str| self.cgroups.unified || t.controllers.iter().any(|c| c == name);
        let tree = ["freezer", "memory"].iter().find_map(|name| self.cgroups.trees.iter().find(|t| has(t, name)));
        let tree =
            tree.ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, "no cgroup tree to track processes in"))?;
        let dir = tree.mount.join(&self.path);
        make(&tree.mount, &dir)?;
        Ok(dir.join("cgroup.procs"))
    }

    /// Processes in the group and below.
    #[must_use]
    pub fn pids(&self) -> Vec<i32> {
        let mut all = Vec::new();
        // Every tree is asked: a process may have been moved in some of them only, when its starter was killed half way.
        for dir in self.dirs() {
            collect_pids(&dir, 0, &mut all);
        }
        all.sort_unstable();
        all.dedup();
        all
    }

    /// Whether the group exists in any tree.
    #[must_use]
    pub fn exists(&self) -> bool {
        self.dirs().any(|d| d.exists())
    }

    /// Sends SIGKILL to everything inside, once. Frozen processes die when thawed, so they are.
    pub fn kill_once(&self) {
        if self.cgroups.unified && self.write("", "cgroup.kill", "1").is_ok() {
            let _ = self.freeze(false);
            return;
        }
        for pid in self.pids() {
            // Pinned first, then looked up again: the pid cannot have been reused outside the group in between.
            let Ok(fd) = pidfd_open(pid) else { continue };
            if self.pids().contains(&pid) {
                use std::os::fd::AsRawFd;
                // SAFETY: plain integers and a null pointer, which pidfd_send_signal(2) allows.
                unsafe {
                    libc::syscall(
                        libc::SYS_pidfd_send_signal,
                        fd.as_raw_fd(),
                        libc::SIGKILL,
                        std::ptr::null::<libc::siginfo_t>(),
                        0,
                    )
                };
            }
        }
        let _ = self.freeze(false);
    }

    /// Kills everything inside and waits until nothing is left. Returns whether that worked within `deadline`.
    pub async fn kill(&self, deadline: Duration) -> bool {
        let end = tokio::time::Instant::now() + deadline;
        loop {
            if self.pids().is_empty() {
                return true;
            }
            self.kill_once();
            if tokio::time::Instant::now() >= end {
                return false;
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }

    /// Freezes or thaws everything inside.
    ///
    /// # Errors
    /// Any I/O error.
    pub fn freeze(&self, on: bool) -> io::Result<()> {
        if self.cgroups.unified {
            return self.write("", "cgroup.freeze", if on { "1" } else { "0" });
        }
        self.write("freezer", "freezer.state", if on { "FROZEN" } else { "THAWED" })
    }

    /// Whether it is frozen or on the way to it.
    #[must_use]
    pub fn is_frozen(&self) -> bool {
        if self.cgroups.unified {
            return self.read("", "cgroup.freeze").is_some_and(|t| t.trim() == "1");
        }
        self.read("freezer", "freezer.state").is_some_and(|t| t.trim() != "THAWED")
    }

    /// Whether every process of it stands still.
    #[must_use]
    pub fn is_still(&self) -> bool {
        if self.cgroups.unified {
            return self.read("", "cgroup.events").is_some_and(|t| field(&t, "frozen") == 1);
        }
        self.read("freezer", "freezer.state").is_some_and(|t| t.trim() == "FROZEN")
    }

    /// How often the kernel killed a process of the group for lack of memory.
    #[must_use]
    pub fn oom_kills(&self) -> u64 {
        let file = if self.cgroups.unified { "memory.events" } else { "memory.oom_control" };
        self.read("memory", file).map_or(0, |t| field(&t, "oom_kill"))
    }

    /// Counters since the group was made; `None` when it does not exist.
    #[must_use]
    pub fn usage(&self) -> Option<UsageSample> {
        let stat = self.read("memory", "memory.stat")?;
        if self.cgroups.unified {
            let io = self.read("io", "io.stat").unwrap_or_default();
            let used: u64 = self.read("memory", "memory.current")?.trim().parse().ok()?;
            return Some(UsageSample {
                cpu_ns: field(&self.read("cpu", "cpu.stat")?, "usage_usec") * 1000,
                memory_bytes: used.saturating_sub(field(&stat, "inactive_file")),
                disk_read_bytes: sum_io_v2(&io, "rbytes="),
                disk_write_bytes: sum_io_v2(&io, "wbytes="),
            });
        }
        let used: u64 = self.read("memory", "memory.usage_in_bytes")?.trim().parse().ok()?;
        let io = self.read("blkio", "blkio.throttle.io_service_bytes_recursive").unwrap_or_default();
        Some(UsageSample {
            cpu_ns: self.read("cpuacct", "cpuacct.usage").and_then(|t| t.trim().parse().ok()).unwrap_or(0),
            // Pages that only cache files are given back on demand and are nobody's need.
            memory_bytes: used.saturating_sub(field(&stat, "total_inactive_file")),
            disk_read_bytes: sum_io_v1(&io, "Read"),
            disk_write_bytes: sum_io_v1(&io, "Write"),
        })
    }

    /// Removes the group and what is below it. Everything inside must have ended. Fine when there is nothing.
    ///
    /// # Errors
    /// The first I/O error; the other trees are still cleaned.
    pub fn remove(&self) -> io::Result<()> {
        let mut result = Ok(());
        for dir in self.dirs() {
            if let Err(e) = remove_tree(&dir, 0) {
                result = Err(e);
            }
        }
        result
    }
}

/// Groups below a guest's group are made by the guest; deeper than this nobody needs.
const DEPTH: usize = 16;

fn collect_pids(dir: &Path, depth: usize, all: &mut Vec<i32>) {
    let Ok(text) = std::fs::read_to_string(dir.join("cgroup.procs")) else { return };
    all.extend(text.lines().filter_map(|l| l.parse::<i32>().ok()).filter(|p| *p > 0));
    for child in children(dir, depth) {
        collect_pids(&child, depth + 1, all);
    }
}

fn children(dir: &Path, depth: usize) -> Vec<PathBuf> {
    // A group directory has two links plus one per child group, so most need no listing.
    let no_child = std::fs::metadata(dir).is_ok_and(|m| std::os::unix::fs::MetadataExt::nlink(&m) == 2);
    if depth >= DEPTH || no_child {
        return Vec::new();
    }
    let Ok(entries) = std::fs::read_dir(dir) else { return Vec::new() };
    entries.filter_map(Result::ok).filter(|e| e.file_type().is_ok_and(|t| t.is_dir())).map(|e| e.path()).collect()
}

fn remove_tree(dir: &Path, depth: usize) -> io::Result<()> {
    for child in children(dir, depth) {
        remove_tree(&child, depth + 1)?;
    }
    match std::fs::remove_dir(dir) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => {
            Err(io::Error::new(e.kind(), format!("{}: {e}", dir.display())))
        }
        _ => Ok(()),
    }
}

/// Makes the group `dir` of the tree at `mount`, and those above it. Everybody may pass through them, whatever our umask is: version 2 is
/// mounted inside of a container by the container's own root, who is nobody out here, and the kernel walks to the root of its cgroup
/// namespace with the rights of whoever mounts.
fn make(mount: &Path, dir: &Path) -> io::Result<()> {
    let mut at = mount.to_path_buf();
    for step in dir.strip_prefix(mount).unwrap_or(Path::new("")).components() {
        at.push(step);
        match std::fs::create_dir(&at) {
            Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(e),
            _ => {}
        }
        if std::fs::metadata(&at)?.permissions().mode() & 0o777 != 0o755 {
            std::fs::set_permissions(&at, std::fs::Permissions::from_mode(0o755))?;
        }
    }
    Ok(())
}

/// A version 1 cpuset takes processes only after it has CPUs and memory nodes; new ones start empty.
fn create_cpuset(mount: &Path, dir: &Path) -> io::Result<()> {
    let below = dir.strip_prefix(mount).unwrap_or(Path::new("")).to_path_buf();
    let mut at = mount.to_path_buf();
    for step in below.components() {
        let parent = at.clone();
        at.push(step);
        if let Err(e) = std::fs::create_dir(&at)
            && e.kind() != io::ErrorKind::AlreadyExists
        {
            return Err(e);
        }
        for file in ["cpuset.cpus", "cpuset.mems"] {
            if std::fs::read_to_string(at.join(file))?.trim().is_empty() {
                std::fs::write(at.join(file), std::fs::read_to_string(parent.join(file))?)?;
            }
        }
    }
    Ok(())
}

/// The number after `name ` at the start of a line.
fn field(text: &str, name: &str) -> u64 {
    text.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix(' ')?.trim().parse().ok()).unwrap_or(0)
}

fn sum_io_v1(text: &str, kind: &str) -> u64 {
    text.lines()
        .filter_map(|l| {
            let mut words = l.split_whitespace();
            (words.nth(1)? == kind).then(|| words.next()?.parse::<u64>().ok())?
        })
        .sum()
}

fn sum_io_v2(text: &str, key: &str) -> u64 {
    text.split_whitespace().filter_map(|w| w.strip_prefix(key)?.parse::<u64>().ok()).sum()
}

/// Moves the calling process from its caller's groups to our own for shims, in every tree, including the ones that only
/// track processes (`name=systemd`, and version 2 on a hybrid system): those are what a service manager kills by.
///
/// # Errors
/// The first I/O error.
pub fn leave_callers_group() -> io::Result<()> {
    let mountinfo = std::fs::read_to_string("/proc/self/mountinfo")?;
    let v1 = Cgroups::parse(&mountinfo, |_| false);
    let v2 = mountinfo.lines().find_map(|l| {
        let (left, right) = l.split_once(" - ")?;
        (right.starts_with("cgroup2 ") && left.split(' ').nth(3)? == "/")
            .then(|| PathBuf::from(left.split(' ').nth(4).unwrap_or("")))
    });
    for line in std::fs::read_to_string("/proc/self/cgroup")?.lines() {
        // "number:controllers:path" (cgroups(7)); controllers are empty for version 2.
        let mut parts = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (parts.next(), parts.next()) else { continue };
        // Nobody kills the root group, and moving costs milliseconds of kernel time.
        if path == "/" || path == format!("/{ROOT}/shims") {
            continue;
        }
        if controllers.is_empty() {
            if let Some(mount) = &v2 {
                let dir = mount.join(ROOT).join("shims");
                make(mount, &dir)?;
                std::fs::write(dir.join("cgroup.procs"), "0")?;
            }
            continue;
        }
        let first = controllers.split(',').next().unwrap_or("");
        let tree = v1.iter().flat_map(|c| &c.trees).find(|t| t.controllers.iter().any(|c| c == first));
        if let Some(tree) = tree {
            let dir = tree.mount.join(ROOT).join("shims");
            if first == "cpuset" {
                create_cpuset(&tree.mount, &dir)?;
            } else {
                make(&tree.mount, &dir)?;
            }
            std::fs::write(dir.join("cgroup.procs"), "0")?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const V1: &str = "30 25 0:26 / /sys/fs/cgroup/cpu rw,relatime shared:9 - cgroup cgroup rw,cpu,cpuacct\n\
        31 25 0:27 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n\
        32 25 0:28 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,xattr,name=systemd\n\
        33 25 0:29 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n";

    #[test]
    fn tells_hybrid_from_unified() {
        let hybrid = Cgroups::parse(V1, |_| false).unwrap();
        assert_eq!(hybrid.version(), 1);
        let group = hybrid.group("oblak/x");
        assert_eq!(group.dir("cpuacct").unwrap(), Path::new("/sys/fs/cgroup/cpu/oblak/x"));
        assert_eq!(group.dir("pids"), None);
        let unified = Cgroups::parse("26 22 0:23 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw", |_| true).unwrap();
        assert_eq!(unified.version(), 2);
        assert_eq!(unified.group("/oblak/x").dir("pids").unwrap(), Path::new("/sys/fs/cgroup/oblak/x"));
        assert_eq!(Cgroups::parse("", |_| true), None);
    }

    #[test]
    fn reads_counters() {
        assert_eq!(field("low 0\noom 1\noom_kill 7\n", "oom_kill"), 7);
        assert_eq!(sum_io_v1("8:0 Read 10\n8:0 Write 5\n9:0 Read 1\nTotal 16\n", "Read"), 11);
        assert_eq!(sum_io_v2("8:0 rbytes=10 wbytes=5 rios=1\n9:0 rbytes=1 wbytes=0\n", "rbytes="), 11);
    }

    #[test]
    fn groups_can_be_passed_through_under_any_umask() {
        let temp = tempfile::tempdir().unwrap();
        let mode = |name: &str| std::fs::metadata(temp.path().join(name)).unwrap().permissions().mode() & 0o777;
        std::fs::create_dir(temp.path().join("oblak")).unwrap();
        std::fs::set_permissions(temp.path().join("oblak"), std::fs::Permissions::from_mode(0o700)).unwrap();
        std::fs::set_permissions(temp.path(), std::fs::Permissions::from_mode(0o750)).unwrap();
        make(temp.path(), &temp.path().join("oblak/x/y")).unwrap();
        assert_eq!((mode("oblak"), mode("oblak/x"), mode("oblak/x/y")), (0o755, 0o755, 0o755));
        assert_eq!(mode(""), 0o750, "the tree itself is not ours");
        make(temp.path(), &temp.path().join("oblak/x/y")).unwrap();
    }

    #[tokio::test]
    async fn limits_counts_freezes_and_kills() {
        let Ok(cgroups) = Cgroups::detect() else {
            return println!("skipped: no cgroup tree with the memory controller");
        };
        let group = cgroups.group(&format!("{ROOT}/test-{}", uuid::Uuid::new_v4().simple()));
        if let Err(e) = group.create() {
            return println!("skipped: cannot make cgroups: {e}");
        }
        let mut child = std::process::Command::new("sh").args(["-c", "while :; do :; done"]).spawn().unwrap();
        group.add(i32::try_from(child.id()).unwrap()).unwrap();
        group.limit(&Limits { cpu_milli: 500, memory_bytes: 64 << 20, pids: 16 }).unwrap();
        group.limit(&Limits { cpu_milli: 500, memory_bytes: 32 << 20, pids: 16 }).unwrap();
        group.limit(&Limits { cpu_milli: 500, memory_bytes: 128 << 20, pids: 16 }).unwrap();
        assert_eq!(group.pids(), vec![i32::try_from(child.id()).unwrap()]);
        let wait = tokio::time::Instant::now() + Duration::from_secs(20);
        while group.usage().unwrap().cpu_ns < 5_000_000 {
            assert!(tokio::time::Instant::now() < wait);
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        group.freeze(true).unwrap();
        assert!(group.is_frozen());
        // A zombie leaves its group at once on exit, so reaping is not needed for the group to be empty.
        assert!(group.kill(Duration::from_secs(10)).await);
        child.wait().unwrap();
        group.remove().unwrap();
        assert!(!group.exists());
    }
}
