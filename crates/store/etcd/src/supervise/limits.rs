//! What etcd may take, and that it is among the last to go when memory runs out. All of it is best effort: a machine without a
//! controller runs etcd all the same.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use super::Settings;

/// The database is mapped into memory; beside it etcd keeps keys, watches and what it sends.
const BESIDE_DATABASE_BYTES: u64 = 2 << 30;
const TASKS: u64 = 1024;
/// The kernel takes it after everything without a mark, but before what must never be taken (proc(5), `oom_score_adj`).
const OOM_SCORE: &str = "-900";

/// Puts the process where it belongs.
pub fn apply(pid: i32, settings: &Settings) {
    if let Err(error) = std::fs::write(format!("/proc/{pid}/oom_score_adj"), OOM_SCORE) {
        tracing::debug!(%error, "etcd keeps the usual place when memory runs out");
    }
    let bytes = settings.quota_bytes.saturating_add(BESIDE_DATABASE_BYTES).to_string();
    let tasks = TASKS.to_string();
    let name = group(&settings.dir);
    let root = Path::new("/sys/fs/cgroup");
    let trees: Vec<(PathBuf, [(&str, &str); 1])> = if root.join("cgroup.controllers").exists() {
        vec![(root.into(), [("memory.max", bytes.as_str())]), (root.into(), [("pids.max", tasks.as_str())])]
    } else {
        vec![
            (root.join("memory"), [("memory.limit_in_bytes", bytes.as_str())]),
            (root.join("pids"), [("pids.max", tasks.as_str())]),
        ]
    };
    for (tree, values) in trees {
        if let Err(error) = confine(&tree.join("oblak").join(&name), &values, pid) {
            tracing::debug!(tree = %tree.display(), %error, "etcd has no limits of its own here");
        }
    }
}

/// Name of its cgroup: one for each data directory.
fn group(dir: &Path) -> String {
    let digest = Sha256::digest(dir.as_os_str().as_encoded_bytes());
    format!("etcd-{}", digest.iter().take(4).map(|byte| format!("{byte:02x}")).collect::<String>())
}

fn confine(dir: &Path, values: &[(&str, &str)], pid: i32) -> std::io::Result<()> {
    if !dir.parent().and_then(Path::parent).is_some_and(Path::exists) {
        return Err(std::io::Error::from(std::io::ErrorKind::NotFound));
    }
    std::fs::create_dir_all(dir)?;
    if let Some(parent) = dir.parent() {
        open_way(parent);
    }
    for (file, value) in values {
        // Limits after which it would be smaller than it is are refused by the kernel; it runs on without.
        if let Err(error) = std::fs::write(dir.join(file), value) {
            tracing::debug!(file, %error, "a limit of etcd was not set");
        }
    }
    std::fs::write(dir.join("cgroup.procs"), pid.to_string())
}

/// Our part of a tree is shared with guests: the root of a container passes through it although the service's umask keeps others out. In
/// version 2 a group has the limits that all those above it hand down.
fn open_way(ours: &Path) {
    let mode = std::fs::Permissions::from_mode(0o755);
    if let Err(error) = std::fs::set_permissions(ours, mode) {
        tracing::debug!(dir = %ours.display(), %error, "containers may be unable to mount cgroups");
    }
    for dir in ours.parent().into_iter().chain([ours]) {
        let file = dir.join("cgroup.subtree_control");
        // One at a time: a controller that this kernel lacks must not take the other with it. Version 1 has no such file.
        for controller in ["+memory", "+pids"].into_iter().filter(|_| file.exists()) {
            let _ = std::fs::write(&file, controller);
        }
    }
}

/// Takes the cgroup away after etcd has ended. Says whether none is left: a process that nobody has waited for yet still holds it.
pub fn clear(settings_dir: &Path) -> bool {
    let name = group(settings_dir);
    let root = Path::new("/sys/fs/cgroup");
    let trees = [root.to_path_buf(), root.join("memory"), root.join("pids")];
    trees.into_iter().fold(true, |gone, tree| {
        let dir = tree.join("oblak").join(&name);
        (!dir.exists() || std::fs::remove_dir(&dir).is_ok()) && gone
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guests_may_pass_and_limits_are_handed_down() {
        let tree = tempfile::tempdir().unwrap();
        let ours = tree.path().join("oblak");
        std::fs::create_dir(&ours).unwrap();
        std::fs::set_permissions(&ours, std::fs::Permissions::from_mode(0o700)).unwrap();
        for dir in [tree.path(), &ours] {
            std::fs::write(dir.join("cgroup.subtree_control"), "").unwrap();
        }
        confine(&ours.join("etcd-0"), &[("memory.max", "1")], 7).unwrap();
        assert_eq!(std::fs::metadata(&ours).unwrap().permissions().mode() & 0o777, 0o755);
        for dir in [tree.path(), &ours] {
            assert_eq!(std::fs::read_to_string(dir.join("cgroup.subtree_control")).unwrap(), "+pids");
        }
        assert_eq!(std::fs::read_to_string(ours.join("etcd-0/memory.max")).unwrap(), "1");
        assert_eq!(std::fs::read_to_string(ours.join("etcd-0/cgroup.procs")).unwrap(), "7");
    }
}
