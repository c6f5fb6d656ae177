//! Starting the emulator with as little as it needs: an unprivileged user, no capabilities, namespaces of its own, a root
//! file system that holds only programs and libraries, a cgroup, and exactly the descriptors it was given.
//!
//! The child is made, then waits until its parent wrote down durably who it is. Only then it confines itself and executes
//! the emulator. Whatever is killed in between, no emulator runs that nobody knows of.

use std::ffi::CString;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use oblak_platform::process::Identity;

/// Score that makes the kernel take a guest before a service of the node when memory runs out (proc(5)).
const OOM_SCORE_ADJ: &str = "500";
/// Descriptors that the emulator may have: each disk, chain link and interface needs one, plus epoll and eventfds.
const MAX_FILES: u64 = 4096;

/// What is executed and how it is confined.
#[derive(Debug)]
pub struct Job {
    /// The program.
    pub program: PathBuf,
    /// Its arguments, without the name of the program.
    pub arguments: Vec<String>,
    /// User and group.
    pub uid: u32,
    /// Groups beside that, for devices.
    pub groups: Vec<u32>,
    /// Descriptors that it inherits under their numbers.
    pub fds: Vec<RawFd>,
    /// Files that it sees: (on the host, in its root).
    pub files: Vec<(PathBuf, PathBuf)>,
    /// Names below /dev that it may open, besides those that everybody may.
    pub devices: Vec<&'static str>,
    /// Empty directory on which its root is mounted, in its own mount namespace.
    pub mount_point: PathBuf,
    /// Own mount, pid, net, ipc and uts namespaces.
    pub namespaces: bool,
}

/// A child that waits to become the emulator.
#[derive(Debug)]
pub struct Waiting {
    /// Who it is, and will be.
    pub identity: Identity,
    go: File,
    errors: File,
    output: OwnedFd,
}

/// Makes the child.
///
/// # Errors
/// Any error of the operating system, `PermissionDenied` when namespaces are not allowed here.
pub fn prepare(job: &Job) -> io::Result<Waiting> {
    let (go_read, go_write) = pipe()?;
    let (error_read, error_write) = pipe()?;
    let (output_read, output_write) = pipe()?;
    let exec = Exec::new(job)?;
    let mut flags = libc::SIGCHLD;
    if job.namespaces {
        flags |= libc::CLONE_NEWNS | libc::CLONE_NEWPID | libc::CLONE_NEWNET | libc::CLONE_NEWIPC | libc::CLONE_NEWUTS;
    }
    // SAFETY: a fork with namespaces. This process has one thread, so the child may run ordinary code before it executes.
    let pid = unsafe { libc::syscall(libc::SYS_clone, flags, 0, 0, 0, 0) };
    if pid < 0 {
        return Err(io::Error::last_os_error());
    }
    if pid == 0 {
        drop((go_write, error_read, output_read));
        let problem = become_emulator(job, &exec, go_read, &output_write);
        let _ = File::from(error_write).write_all(problem.as_bytes());
        // SAFETY: ends the child without running what belongs to the parent.
        unsafe { libc::_exit(127) };
    }
    let pid = i32::try_from(pid).map_err(|_| io::Error::other("pid out of range"))?;
    let identity = Identity::of(pid).ok_or_else(|| io::Error::other("the child ended at once"))?;
    Ok(Waiting { identity, go: File::from(go_write), errors: File::from(error_read), output: output_read })
}

impl Waiting {
    /// Lets it go and waits until the emulator is executed. Returns its standard output and error.
    ///
    /// # Errors
    /// The step that failed, for people. The child has ended then and must be reaped with [`reap`].
    pub fn execute(mut self) -> Result<OwnedFd, String> {
        self.go.write_all(b"!").map_err(|e| e.to_string())?;
        let mut problem = String::new();
        // Ends when the child executes (the pipe is closed on exec) or dies.
        self.errors.read_to_string(&mut problem).map_err(|e| e.to_string())?;
        if problem.is_empty() { Ok(self.output) } else { Err(problem) }
    }
}

/// Exit code of a child that has ended: 128 + n when a signal did it. `None` while it runs.
#[must_use]
pub fn reap(pid: i32) -> Option<i32> {
    use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
    match waitpid(nix::unistd::Pid::from_raw(pid), Some(WaitPidFlag::WNOHANG)) {
        Ok(WaitStatus::Exited(_, code)) => Some(code),
        Ok(WaitStatus::Signaled(_, signal, _)) => Some(128 + signal as i32),
        Ok(_) => None,
        // Nobody to wait for: somebody reaped it already, nothing more is known.
        Err(_) => Some(255),
    }
}

fn pipe() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC)?)
}

/// Program and arguments in the form that execve(2) takes.
struct Exec {
    program: CString,
    pointers: Vec<*const libc::c_char>,
    environment: Vec<*const libc::c_char>,
    _owned: Vec<CString>,
}

impl Exec {
    fn new(job: &Job) -> io::Result<Self> {
        let text = |bytes: &[u8]| {
            CString::new(bytes).map_err(|_| io::Error::new(io::ErrorKind::InvalidInput, "an argument holds a zero"))
        };
        let program = text(job.program.as_os_str().as_bytes())?;
        let mut owned = vec![program.clone()];
        for argument in &job.arguments {
            owned.push(text(argument.as_bytes())?);
        }
        let mut pointers: Vec<_> = owned.iter().map(|a| a.as_ptr()).collect();
        pointers.push(std::ptr::null());
        let path = text(b"PATH=/usr/bin:/bin")?;
        let environment = vec![path.as_ptr(), std::ptr::null()];
        owned.push(path);
        Ok(Self { program, pointers, environment, _owned: owned })
    }
}

/// Only returns when something went wrong, with what.
fn become_emulator(job: &Job, exec: &Exec, go: OwnedFd, output: &OwnedFd) -> String {
    let mut go = File::from(go);
    if !matches!(go.read(&mut [0u8]), Ok(1)) {
        return "the shim died".into();
    }
    if let Err((step, error)) = confine(job, output, &mut go) {
        return format!("{step}: {error}");
    }
    // SAFETY: both arrays end with null and point to strings that `exec` keeps.
    unsafe { libc::execve(exec.program.as_ptr(), exec.pointers.as_ptr(), exec.environment.as_ptr()) };
    format!("cannot execute {}: {}", job.program.display(), io::Error::last_os_error())
}

type Step<T> = Result<T, (String, io::Error)>;

trait At<T> {
    fn at(self, step: impl Into<String>) -> Step<T>;
}

impl<T, E: Into<io::Error>> At<T> for Result<T, E> {
    fn at(self, step: impl Into<String>) -> Step<T> {
        self.map_err(|e| (step.into(), e.into()))
    }
}

fn confine(job: &Job, output: &OwnedFd, go: &mut File) -> Step<()> {
    std::fs::write("/proc/self/oom_score_adj", OOM_SCORE_ADJ).at("oom_score_adj")?;
    if job.namespaces {
        enter_root(job)?;
        nix::unistd::sethostname("guest").at("sethostname")?;
    }
    inherit(job, output)?;
    limit()?;
    drop_privileges(job)?;
    // Changing the user forgets the death signal, so this comes after it (prctl(2)).
    nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL).at("pdeathsig")?;
    // The signal comes only for a death after it was asked for; an earlier one shows in the pipe, whose other end the shim
    // alone holds until this process has executed.
    nix::fcntl::fcntl(&*go, nix::fcntl::FcntlArg::F_SETFL(nix::fcntl::OFlag::O_NONBLOCK)).at("pipe")?;
    match go.read(&mut [0u8]) {
        Ok(0) => Err(("start".into(), io::Error::other("the shim died"))),
        _ => Ok(()),
    }
}

const NONE: Option<&str> = None;
/// Directories of programs and libraries, all of which the emulator sees.
const MIRRORED: [&str; 5] = ["/usr", "/lib", "/lib64", "/bin", "/sbin"];

fn is_mirrored(path: &Path) -> bool {
    MIRRORED.iter().any(|dir| path.starts_with(dir))
}

/// Builds the root in the child's own mount namespace and makes it `/`.
fn enter_root(job: &Job) -> Step<()> {
    let root = job.mount_point.as_path();
    // The shim keeps others out of what it makes; here others are the emulator, and all is read-only in the end.
    nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o022));
    mount(NONE, "/", NONE, MsFlags::MS_REC | MsFlags::MS_PRIVATE, NONE).at("private mounts")?;
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    mount(Some("oblak"), root, Some("tmpfs"), flags, Some("size=256k,mode=755"))
        .at(format!("tmpfs on {}", root.display()))?;
    for dir in MIRRORED {
        mirror(Path::new(dir), root)?;
    }
    let mut seen: Vec<(PathBuf, PathBuf)> = Vec::new();
    seen.push(("/etc/ld.so.cache".into(), "/etc/ld.so.cache".into()));
    // A program elsewhere needs its own way in.
    for path in std::iter::once(&job.program).filter(|p| !is_mirrored(p)) {
        seen.push((path.clone(), path.clone()));
    }
    seen.extend(job.files.iter().filter(|(host, inside)| host != inside || !is_mirrored(host)).cloned());
    for (host, inside) in &seen {
        if host.exists() {
            show_file(host, root, inside)?;
        }
    }
    make_devices(job, root)?;
    std::fs::create_dir_all(root.join("proc")).at("/proc")?;
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(Some("proc"), &root.join("proc"), Some("proc"), flags, NONE).at("proc")?;
    mount(
        NONE,
        root,
        NONE,
        MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY | MsFlags::MS_NOSUID | MsFlags::MS_NODEV,
        NONE,
    )
    .at("read-only root")?;
    std::env::set_current_dir(root).at("chdir")?;
    nix::unistd::pivot_root(".", ".").at("pivot_root")?;
    umount2(".", MntFlags::MNT_DETACH).at("leave the old root")?;
    std::env::set_current_dir("/").at("chdir /")
}

/// Shows a system directory read-only, or its link as a link.
fn mirror(path: &Path, root: &Path) -> Step<()> {
    let Ok(meta) = std::fs::symlink_metadata(path) else { return Ok(()) };
    let target = under(root, path);
    if meta.is_symlink() {
        let to = std::fs::read_link(path).at(path.display().to_string())?;
        return std::os::unix::fs::symlink(to, &target).at(target.display().to_string());
    }
    std::fs::create_dir_all(&target).at(target.display().to_string())?;
    bind(path, &target)
}

fn show_file(host: &Path, root: &Path, inside: &Path) -> Step<()> {
    let target = under(root, inside);
    if let Some(parent) = target.parent() {
        std::fs::create_dir_all(parent).at(parent.display().to_string())?;
    }
    File::create(&target).at(target.display().to_string())?;
    mount(Some(host), &target, NONE, MsFlags::MS_BIND, NONE).at(format!("bind {}", host.display()))?;
    read_only(&target)
}

/// A /dev with the few devices that are needed. They are nodes of our own, so it does not matter who may open the host's.
fn make_devices(job: &Job, root: &Path) -> Step<()> {
    let dev = root.join("dev");
    std::fs::create_dir_all(&dev).at("/dev")?;
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC;
    mount(Some("oblak"), &dev, Some("tmpfs"), flags, Some("size=64k,mode=755")).at("tmpfs on /dev")?;
    for (name, private) in [("null", false), ("zero", false), ("random", false), ("urandom", false)]
        .into_iter()
        .chain(job.devices.iter().map(|name| (*name, true)))
    {
        let host = Path::new("/dev").join(name);
        let Ok(meta) = std::fs::metadata(&host) else { continue };
        make_device(&host, &dev.join(name), meta.rdev(), private.then_some(job.uid))?;
    }
    let flags = flags | MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY;
    mount(NONE, &dev, NONE, flags, NONE).at("read-only /dev")
}

fn make_device(host: &Path, target: &Path, number: u64, owner: Option<u32>) -> Step<()> {
    use nix::sys::stat::{Mode, SFlag, mknod};
    let mode = if owner.is_some() { 0o600 } else { 0o666 };
    if mknod(target, SFlag::S_IFCHR, Mode::from_bits_truncate(mode), number).is_err() {
        // Not allowed to make nodes (a container): then the host's own, with the host's permissions.
        File::create(target).at(target.display().to_string())?;
        return mount(Some(host), target, NONE, MsFlags::MS_BIND, NONE).at(format!("bind {}", host.display()));
    }
    std::fs::set_permissions(target, std::fs::Permissions::from_mode(mode)).at(target.display().to_string())?;
    std::os::unix::fs::chown(target, owner, owner).at(target.display().to_string())
}

fn bind(from: &Path, to: &Path) -> Step<()> {
    mount(Some(from), to, NONE, MsFlags::MS_BIND, NONE).at(format!("bind {}", from.display()))?;
    read_only(to)
}

fn read_only(path: &Path) -> Step<()> {
    let flags = MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY | MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    mount(NONE, path, NONE, flags, NONE).at(format!("read-only {}", path.display()))
}

fn under(root: &Path, path: &Path) -> PathBuf {
    root.join(path.strip_prefix("/").unwrap_or(path))
}

/// Standard descriptors and the chosen ones stay open; everything else is closed on exec.
fn inherit(job: &Job, output: &OwnedFd) -> Step<()> {
    nix::unistd::dup2_stdout(output).at("stdout")?;
    nix::unistd::dup2_stderr(output).at("stderr")?;
    // SAFETY: marks a range of descriptor numbers; nothing is closed before exec.
    if unsafe { libc::close_range(3, libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC as libc::c_int) } != 0 {
        return Err(("close_range".into(), io::Error::last_os_error()));
    }
    for fd in &job.fds {
        // SAFETY: clears the close-on-exec flag of a descriptor that the parent opened for this purpose.
        if unsafe { libc::fcntl(*fd, libc::F_SETFD, 0) } < 0 {
            return Err((format!("descriptor {fd}"), io::Error::last_os_error()));
        }
    }
    Ok(())
}

fn limit() -> Step<()> {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    setrlimit(Resource::RLIMIT_CORE, 0, 0).at("core limit")?;
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).at("file limit")?;
    let files = MAX_FILES.min(hard);
    setrlimit(Resource::RLIMIT_NOFILE, files, files).at("file limit")
}

fn drop_privileges(job: &Job) -> Step<()> {
    use nix::unistd::{Gid, Uid, setgroups, setresgid, setresuid};
    // capabilities(7): numbers up to 63 exist in the interface; the first that the kernel does not know ends the list.
    for capability in 0..64 {
        // SAFETY: plain integers.
        if unsafe { libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0) } != 0 {
            break;
        }
    }
    let groups: Vec<Gid> = job.groups.iter().map(|g| Gid::from_raw(*g)).collect();
    setgroups(&groups).at("setgroups")?;
    let (uid, gid) = (Uid::from_raw(job.uid), Gid::from_raw(job.uid));
    setresgid(gid, gid, gid).at("setresgid")?;
    setresuid(uid, uid, uid).at("setresuid")?;
    nix::sys::prctl::set_no_new_privs().at("no_new_privs")
}

/// A descriptor's number, and the descriptor kept open for the child.
#[derive(Debug, Default)]
pub struct Held(Vec<OwnedFd>);

impl Held {
    /// Keeps a descriptor and tells its number.
    pub fn keep(&mut self, fd: impl Into<OwnedFd>) -> io::Result<RawFd> {
        let fd = fd.into();
        let number = fd.as_raw_fd();
        if number > 2 {
            self.0.push(fd);
            return Ok(number);
        }
        // The first three become standard descriptors in the child.
        // SAFETY: a duplicate that nobody else owns.
        let copy = unsafe { libc::fcntl(number, libc::F_DUPFD_CLOEXEC, 3) };
        if copy < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: as above.
        self.0.push(unsafe { OwnedFd::from_raw_fd(copy) });
        Ok(copy)
    }

    /// The numbers of all that are kept.
    #[must_use]
    pub fn numbers(&self) -> Vec<RawFd> {
        self.0.iter().map(AsRawFd::as_raw_fd).collect()
    }
}

#[cfg(test)]
mod tests;
