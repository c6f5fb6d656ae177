//! System calls around mounts and namespaces that the nix crate does not have.

use std::ffi::CString;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};

fn c_path(path: &Path) -> io::Result<CString> {
    Ok(CString::new(path.as_os_str().as_bytes())?)
}

fn check(result: libc::c_long) -> io::Result<i32> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    i32::try_from(result).map_err(|_| io::Error::other("result out of range"))
}

/// Adds the path to an error. A full disk stays what it is, because it is treated in a way of its own.
pub fn at(path: &Path) -> impl Fn(io::Error) -> io::Error {
    move |e| match e.raw_os_error() {
        Some(libc::ENOSPC | libc::EDQUOT) => e,
        _ => io::Error::new(e.kind(), format!("{}: {e}", path.display())),
    }
}

/// A mount namespace of our own: what is mounted here later is seen by nobody else and ends with us, while what the host
/// unmounts disappears here too and is not kept busy.
pub fn private_mounts() -> io::Result<()> {
    unshare(CloneFlags::CLONE_NEWNS)?;
    let none: Option<&str> = None;
    mount(none, "/", none, MsFlags::MS_SLAVE | MsFlags::MS_REC, none)?;
    // On a hybrid system crun takes the mere presence of version 2 for a pure one and refuses.
    let unified = Path::new("/sys/fs/cgroup/unified");
    if unified.exists() {
        match umount2(unified, MntFlags::MNT_DETACH) {
            Err(nix::errno::Errno::EINVAL) | Ok(()) => {}
            Err(e) => return Err(e.into()),
        }
    }
    Ok(())
}

/// The mount namespace that the process leaves with [`private_mounts`].
#[derive(Debug)]
pub struct Outside(File);

impl Outside {
    pub fn new() -> io::Result<Self> {
        Ok(Self(OpenOptions::new().read(true).custom_flags(libc::O_PATH | libc::O_DIRECTORY).open("/")?))
    }

    /// Opens a file as a process there sees it, also below what was mounted there meanwhile.
    pub fn open(&self, path: &Path) -> io::Result<File> {
        let how = OpenHow::new().flags(OFlag::O_RDONLY | OFlag::O_CLOEXEC).resolve(ResolveFlag::RESOLVE_IN_ROOT);
        Ok(File::from(openat2(&self.0, path, how).map_err(io::Error::from).map_err(at(path))?))
    }
}

/// Bind mount.
pub fn bind(source: &Path, target: &Path) -> io::Result<()> {
    let none: Option<&str> = None;
    mount(Some(source), target, none, MsFlags::MS_BIND, none).map_err(io::Error::from).map_err(at(source))
}

/// Mounts `kind` on `target`.
pub fn mount_fs(kind: &str, target: &Path, flags: MsFlags, data: &str) -> io::Result<()> {
    mount(Some(kind), target, Some(kind), flags, Some(data)).map_err(io::Error::from).map_err(at(target))
}

/// Lets a program die with the shim: what it works on belongs to nobody then.
pub fn dies_with_us(command: &mut std::process::Command) -> &mut std::process::Command {
    let shim = nix::unistd::getpid().as_raw();
    // SAFETY: between fork and exec only system calls on plain values are made.
    unsafe {
        std::os::unix::process::CommandExt::pre_exec(command, move || {
            if libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) != 0 {
                return Err(io::Error::last_os_error());
            }
            if libc::getppid() == shim { Ok(()) } else { Err(io::Error::from_raw_os_error(libc::ESRCH)) }
        })
    }
}

/// A user namespace in which inside id 0.. is host id `base`.., held open by a descriptor and by nothing else.
pub fn user_namespace(base: u32, count: u32) -> io::Result<File> {
    let made = with_child(None, |child| {
        let map = format!("0 {base} {count}");
        for file in MAPS {
            std::fs::write(format!("/proc/{child}/{file}"), &map)?;
        }
        File::open(format!("/proc/{child}/ns/user"))
    });
    made?.ok_or_else(|| io::Error::other("the kernel does not allow a new user namespace"))
}

/// Whether in the user namespace at `path` inside id 0.. is host id `base`.. and nothing else is mapped.
pub fn maps(path: &Path, base: u32, count: u32) -> io::Result<bool> {
    let namespace = File::open(path).map_err(at(path))?;
    // What a map looks like depends on who reads it, and only one of a process can be read: so a child goes there.
    let same = with_child(Some(&namespace), |child| {
        let wanted = ["0".to_string(), base.to_string(), count.to_string()];
        let same = |file: &str| -> io::Result<bool> {
            let text = std::fs::read_to_string(format!("/proc/{child}/{file}"))?;
            Ok(text.split_whitespace().eq(wanted.iter().map(String::as_str)))
        };
        Ok(same(MAPS[0])? && same(MAPS[1])?)
    });
    same?.ok_or_else(|| at(path)(io::Error::other("the user namespace cannot be joined")))
}

/// The maps of a process's user namespace, below its directory in /proc.
const MAPS: [&str; 2] = ["uid_map", "gid_map"];

/// Does `work` with the pid of a child in the user namespace `join`, or in a new one. `None` when the kernel did not let it in.
fn with_child<T>(join: Option<&File>, work: impl FnOnce(nix::unistd::Pid) -> io::Result<T>) -> io::Result<Option<T>> {
    let join = join.map(AsRawFd::as_raw_fd);
    let (told_read, told) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC)?;
    let shim = nix::unistd::getpid().as_raw();
    // SAFETY: a shim has one thread here, before its runtime starts; the child calls only plain system calls.
    match unsafe { nix::unistd::fork() }? {
        nix::unistd::ForkResult::Child => {
            // SAFETY: system calls on plain values; the child never returns into Rust code that could run destructors.
            unsafe {
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                // Killed before the request was in force, the shim would leave a child that holds its lock for ever.
                if libc::getppid() != shim {
                    libc::_exit(1);
                }
                let failed = 0
                    != match join {
                        Some(namespace) => libc::setns(namespace, libc::CLONE_NEWUSER),
                        None => libc::unshare(libc::CLONE_NEWUSER),
                    };
                let word = [u8::from(failed)];
                libc::write(told.as_raw_fd(), word.as_ptr().cast(), 1);
                loop {
                    libc::pause();
                }
            }
        }
        nix::unistd::ForkResult::Parent { child } => {
            drop(told);
            let result = (|| {
                let mut word = [1u8];
                nix::unistd::read(&told_read, &mut word)?;
                if word[0] != 0 { Ok(None) } else { work(child).map(Some) }
            })();
            let _ = nix::sys::signal::kill(child, nix::sys::signal::Signal::SIGKILL);
            let _ = nix::sys::wait::waitpid(child, None);
            result
        }
    }
}

/// Mounts `source` on `target` with ids shifted by the user namespace (mount_setattr(2), `MOUNT_ATTR_IDMAP`).
/// `EINVAL` when the file system cannot.
pub fn bind_idmapped(source: &Path, target: &Path, userns: &File, read_only: bool) -> io::Result<()> {
    let (source_c, target_c, empty) = (c_path(source)?, c_path(target)?, CString::default());
    let flags = libc::OPEN_TREE_CLONE | libc::OPEN_TREE_CLOEXEC;
    // SAFETY: valid C string; the result is a new descriptor.
    let tree = check(unsafe { libc::syscall(libc::SYS_open_tree, libc::AT_FDCWD, source_c.as_ptr(), flags) })
        .map_err(at(source))?;
    // SAFETY: just returned by the kernel.
    let tree = unsafe { OwnedFd::from_raw_fd(tree) };
    // SAFETY: mount_attr is plain numbers; zero is valid.
    let mut attr: libc::mount_attr = unsafe { std::mem::zeroed() };
    attr.attr_set = libc::MOUNT_ATTR_IDMAP | if read_only { libc::MOUNT_ATTR_RDONLY } else { 0 };
    attr.userns_fd = u64::try_from(userns.as_raw_fd()).map_err(io::Error::other)?;
    // SAFETY: valid descriptor, empty C string and structure with its size.
    check(unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_raw_fd(),
            empty.as_ptr(),
            libc::AT_EMPTY_PATH,
            &raw const attr,
            size_of::<libc::mount_attr>(),
        )
    })?;
    // SAFETY: valid descriptors and C strings.
    check(unsafe {
        libc::syscall(
            libc::SYS_move_mount,
            tree.as_raw_fd(),
            empty.as_ptr(),
            libc::AT_FDCWD,
            target_c.as_ptr(),
            libc::MOVE_MOUNT_F_EMPTY_PATH,
        )
    })
    .map_err(at(target))?;
    Ok(())
}

/// Does `f` inside the network namespace at `path`.
pub fn in_netns<T>(path: &Path, f: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
    let here = File::open("/proc/self/ns/net")?;
    let there = File::open(path).map_err(at(path))?;
    setns(&there, CloneFlags::CLONE_NEWNET).map_err(io::Error::from).map_err(at(path))?;
    let result = f();
    setns(&here, CloneFlags::CLONE_NEWNET)?;
    result
}

/// `struct loop_info64` of linux/loop.h.
#[repr(C)]
struct LoopInfo {
    device: u64,
    inode: u64,
    rdevice: u64,
    offset: u64,
    sizelimit: u64,
    number: u32,
    encrypt_type: u32,
    encrypt_key_size: u32,
    flags: u32,
    file_name: [u8; 64],
    crypt_name: [u8; 64],
    encrypt_key: [u8; 32],
    init: [u64; 2],
}

/// `struct loop_config` of linux/loop.h.
#[repr(C)]
struct LoopConfig {
    fd: u32,
    block_size: u32,
    info: LoopInfo,
    reserved: [u64; 8],
}

const LOOP_CTL_GET_FREE: libc::Ioctl = 0x4C82;
const LOOP_CONFIGURE: libc::Ioctl = 0x4C0A;
const LO_FLAGS_AUTOCLEAR: u32 = 4;

/// A loop device for `image` that the kernel frees as soon as nobody uses it. Keep the file open until it is mounted.
pub fn loop_device(image: &File) -> io::Result<(File, std::path::PathBuf)> {
    let control = std::fs::OpenOptions::new().read(true).write(true).open("/dev/loop-control")?;
    // Somebody else may take the free number first; that is no error for a while.
    for _ in 0..64 {
        // SAFETY: the call takes no argument and returns a number.
        let number = unsafe { libc::ioctl(control.as_raw_fd(), LOOP_CTL_GET_FREE) };
        if number < 0 {
            return Err(io::Error::last_os_error());
        }
        let path = std::path::PathBuf::from(format!("/dev/loop{number}"));
        let device = std::fs::OpenOptions::new().read(true).write(true).open(&path)?;
        // SAFETY: plain numbers and bytes; zero is valid for all.
        let mut config: LoopConfig = unsafe { std::mem::zeroed() };
        config.fd = u32::try_from(image.as_raw_fd()).map_err(io::Error::other)?;
        config.info.flags = LO_FLAGS_AUTOCLEAR;
        // SAFETY: valid descriptor and structure of the kernel's layout.
        if unsafe { libc::ioctl(device.as_raw_fd(), LOOP_CONFIGURE, &raw const config) } == 0 {
            return Ok((device, path));
        }
        let error = io::Error::last_os_error();
        if error.raw_os_error() != Some(libc::EBUSY) {
            return Err(error);
        }
    }
    Err(io::Error::other("no loop device stays free"))
}
