//! A machine in a machine: the kernel of the tiny image under emulation, with programs of this machine on its disk, and version 2 of
//! cgroups only. Everything comes from the distribution's packages.

use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// Names the directory with `vmlinuz`, `initrd.img` and `tiny.qcow2` (see `images/tiny`).
const TINY: &str = "OBLAK_TEST_TINY";
/// What must be installed, and the package that has it.
const NEEDED: [(&str, &str); 6] = [
    ("busybox", "busybox-static"),
    ("qemu-system-x86_64", "qemu-system-x86"),
    ("qemu-img", "qemu-utils"),
    ("mke2fs", "e2fsprogs"),
    ("ip", "iproute2"),
    ("unshare", "util-linux"),
];
/// Programs that go along where they are installed. `ldd` is a script for bash.
const TAKEN: [&str; 9] = ["crun", "runc", "mkfs.ext4", "e2fsck", "resize2fs", "ip", "unshare", "ldd", "bash"];
/// How long each of the test programs may take; without hardware virtualization, on a busy machine.
const DEADLINE: Duration = Duration::from_secs(420);
/// Size of its disk, a sparse file.
const DISK_BYTES: u64 = 1 << 30;
/// Label that the initrd of the tiny image looks for.
const LABEL: &str = "oblak-nested";

/// Why there can be no such machine here.
pub fn missing() -> Option<String> {
    if !nix::unistd::geteuid().is_root() {
        return Some("needs root, to give files of the machine's disk to root".into());
    }
    if let Some((program, package)) = NEEDED.iter().find(|(program, _)| find(program).is_none()) {
        return Some(format!("needs {program} (package {package})"));
    }
    let Some(tiny) = std::env::var_os(TINY).map(PathBuf::from) else {
        return Some(format!("{TINY} does not name a directory with the tiny image, which has the kernel"));
    };
    let file = ["vmlinuz", "initrd.img", "tiny.qcow2"].into_iter().find(|f| !tiny.join(f).is_file())?;
    Some(format!("{} has no {file}", tiny.display()))
}

/// Where a program is, if it is installed.
pub fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let more = ["/usr/sbin", "/sbin", "/usr/bin", "/bin"].map(PathBuf::from);
    std::env::split_paths(&path).chain(more).map(|dir| dir.join(program)).find(|p| p.is_file())
}

/// Runs test programs, each with its arguments, and returns everything that the machine printed.
pub fn run(tests: &[(PathBuf, &str)], examples: &[PathBuf]) -> String {
    let temp = tempfile::Builder::new().prefix("oblak-nested-").tempdir().unwrap();
    let root = temp.path().join("root");
    lay_out(&root);
    let mut list = String::new();
    for (program, words) in tests {
        let name = program.file_name().unwrap().to_string_lossy();
        put(&root, program, &root.join("tests/deps").join(&*name));
        list.push_str(&format!("{name} {words}\n"));
    }
    for program in examples {
        put(&root, program, &root.join("tests/examples").join(program.file_name().unwrap()));
    }
    std::fs::write(root.join("tests/list"), list).unwrap();
    let disk = temp.path().join("disk.img");
    std::fs::File::create(&disk).unwrap().set_len(DISK_BYTES).unwrap();
    let mut mkfs = Command::new(find("mke2fs").unwrap());
    let made = mkfs.args(["-q", "-F", "-t", "ext4", "-L", LABEL, "-d"]).arg(&root).arg(&disk).status().unwrap();
    assert!(made.success(), "mke2fs: {made}");
    boot(temp.path(), &disk, DEADLINE * u32::try_from(tests.len()).unwrap())
}

fn lay_out(root: &Path) {
    for dir in ["bin", "sbin", "dev", "proc", "sys", "run", "root", "mnt", "etc", "lib/modules", "tests/deps", "tmp"] {
        std::fs::create_dir_all(root.join(dir)).unwrap();
    }
    std::fs::set_permissions(root.join("tmp"), std::fs::Permissions::from_mode(0o1777)).unwrap();
    let busybox = find("busybox").unwrap();
    put(root, &busybox, &root.join("bin/busybox"));
    let applets = Command::new(busybox).arg("--list").output().unwrap().stdout;
    for name in String::from_utf8_lossy(&applets).lines().filter(|n| *n != "busybox") {
        symlink("busybox", root.join("bin").join(name)).unwrap();
    }
    // In a directory that is searched before busybox's.
    for program in TAKEN.iter().filter_map(|name| find(name)) {
        put(root, &program, &root.join("usr/sbin").join(program.file_name().unwrap()));
    }
    std::fs::create_dir_all(root.join("usr/bin")).unwrap();
    symlink("../../usr/sbin/bash", root.join("usr/bin/bash")).unwrap();
    symlink("../usr/sbin/bash", root.join("bin/bash")).unwrap();
    std::fs::write(root.join("sbin/init"), include_str!("init")).unwrap();
    std::fs::set_permissions(root.join("sbin/init"), std::fs::Permissions::from_mode(0o755)).unwrap();
}

/// Copies a program to `to`, and the libraries that it is linked with to where it looks for them.
fn put(root: &Path, program: &Path, to: &Path) {
    std::fs::create_dir_all(to.parent().unwrap()).unwrap();
    std::fs::copy(program, to).unwrap_or_else(|e| panic!("{}: {e}", program.display()));
    let libraries = Command::new("ldd").arg(program).output().unwrap().stdout;
    for library in String::from_utf8_lossy(&libraries).split_whitespace().filter(|w| w.starts_with('/')) {
        let inside = root.join(library.trim_start_matches('/'));
        if !inside.exists() {
            std::fs::create_dir_all(inside.parent().unwrap()).unwrap();
            std::fs::copy(library, inside).unwrap();
        }
    }
}

fn boot(dir: &Path, disk: &Path, patience: Duration) -> String {
    let tiny = PathBuf::from(std::env::var_os(TINY).unwrap());
    let console = dir.join("console");
    let output = std::fs::File::create(&console).unwrap();
    let drive = |path: &Path, more: &str| format!("file={},if=virtio,cache=unsafe,{more}", path.display());
    // Emulated always: where /dev/kvm opens but does not work, trying it costs more than it saves elsewhere.
    let mut machine = Command::new(find("qemu-system-x86_64").unwrap())
        .args(["-machine", "q35", "-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2", "-m", "2048"])
        .args(["-nodefaults", "-display", "none", "-no-reboot", "-serial", "stdio", "-device", "virtio-rng-pci"])
        .arg("-kernel")
        .arg(tiny.join("vmlinuz"))
        .arg("-initrd")
        .arg(tiny.join("initrd.img"))
        .args(["-append", &format!("root=LABEL={LABEL} console=ttyS0 quiet panic=-1")])
        .args(["-drive", &drive(disk, "format=raw")])
        .args(["-drive", &drive(&tiny.join("tiny.qcow2"), "format=qcow2,readonly=on")])
        .stdin(Stdio::null())
        .stdout(output.try_clone().unwrap())
        .stderr(output)
        .spawn()
        .unwrap();
    let end = Instant::now() + patience;
    while machine.try_wait().unwrap().is_none() && Instant::now() < end {
        std::thread::sleep(Duration::from_millis(100));
    }
    let _ = machine.kill();
    machine.wait().unwrap();
    String::from_utf8_lossy(&std::fs::read(&console).unwrap()).into_owned()
}
