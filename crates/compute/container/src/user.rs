//! Users of a container by name: its own /etc/passwd and /etc/group decide, read without ever leaving its root.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;

use oblak_platform::driver::{DriverError, DriverResult};

/// Most bytes read of either file.
const FILE_BYTES: u64 = 1 << 20;

/// A user inside.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct User {
    pub uid: u32,
    pub gid: u32,
    pub groups: Vec<u32>,
    pub home: String,
}

/// Resolves `name`, `uid`, and either with `:group`; empty is root.
///
/// # Errors
/// Permanent when the container has no such user or group.
pub fn resolve(rootfs: &Path, text: &str) -> DriverResult<User> {
    let read = |path| open_inside(rootfs, path).and_then(read_text).unwrap_or_default();
    resolve_in(&read("etc/passwd"), &read("etc/group"), text)
}

fn resolve_in(passwd: &str, group: &str, text: &str) -> DriverResult<User> {
    let (who, wanted_group) = text.split_once(':').map_or((text, None), |(u, g)| (u, Some(g)));
    let who = if who.is_empty() { "0" } else { who };
    let id: Option<u32> = who.parse().ok();
    // name:password:uid:gid:comment:home:shell (passwd(5))
    let entry = passwd
        .lines()
        .map(|l| l.split(':').collect::<Vec<_>>())
        .find(|f| f.len() >= 6 && id.map_or(f[0] == who, |id| f[2].parse() == Ok(id)));
    let number = |text: &str| text.parse::<u32>().ok();
    let uid = id.or_else(|| entry.as_ref().and_then(|f| number(f[2]))).ok_or_else(|| {
        DriverError::permanent("unknown_user", format!("container.user: the image has no user {who:?} in /etc/passwd"))
    })?;
    let mut user = User { uid, gid: 0, groups: Vec::new(), home: "/".into() };
    if let Some(f) = &entry {
        user.gid = number(f[3]).unwrap_or(0);
        user.home = f[5].to_string();
    } else if uid == 0 {
        user.home = "/root".into();
    }
    // name:password:gid:members (group(5))
    let groups: Vec<Vec<&str>> =
        group.lines().map(|l| l.split(':').collect()).filter(|f: &Vec<&str>| f.len() >= 4).collect();
    if let Some(wanted) = wanted_group {
        let by_name = || groups.iter().find(|f| f[0] == wanted).and_then(|f| number(f[2]));
        user.gid = number(wanted).or_else(by_name).ok_or_else(|| {
            DriverError::permanent(
                "unknown_group",
                format!("container.user: the image has no group {wanted:?} in /etc/group"),
            )
        })?;
    } else if let Some(f) = &entry {
        user.groups =
            groups.iter().filter(|g| g[3].split(',').any(|m| m == f[0])).filter_map(|g| number(g[2])).collect();
    }
    if user.uid > 65_535 || user.gid > 65_535 {
        return Err(DriverError::permanent(
            "bad_user",
            format!("container.user: {text:?} is beyond the 65,536 ids of a container"),
        ));
    }
    Ok(user)
}

/// Opens `path` with every link and `..` resolved inside `root` (openat2(2), `RESOLVE_IN_ROOT`).
fn open_inside(root: &Path, path: &str) -> io::Result<File> {
    let dir = File::open(root)?;
    let path = std::ffi::CString::new(path)?;
    // SAFETY: open_how is plain numbers; zero is valid for all of them.
    let mut how: libc::open_how = unsafe { std::mem::zeroed() };
    how.flags = (libc::O_RDONLY | libc::O_CLOEXEC | libc::O_NONBLOCK) as u64;
    how.resolve = libc::RESOLVE_IN_ROOT;
    // SAFETY: valid directory descriptor, C string and structure with its size.
    let fd = unsafe {
        libc::syscall(libc::SYS_openat2, dir.as_raw_fd(), path.as_ptr(), &raw const how, size_of::<libc::open_how>())
    };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    let fd = i32::try_from(fd).map_err(|_| io::Error::other("descriptor out of range"))?;
    // SAFETY: just returned by the kernel.
    Ok(File::from(unsafe { OwnedFd::from_raw_fd(fd) }))
}

fn read_text(file: File) -> io::Result<String> {
    if !file.metadata()?.is_file() {
        return Err(io::Error::other("not a regular file"));
    }
    let mut bytes = Vec::new();
    file.take(FILE_BYTES).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\nweb:x:33:34::/var/www:/bin/sh\nbroken\n";
    const GROUP: &str = "root:x:0:\nweb:x:34:\nlogs:x:4:other,web\n";

    #[test]
    fn names_and_numbers() {
        let user = |text| resolve_in(PASSWD, GROUP, text).unwrap();
        assert_eq!(user(""), User { uid: 0, gid: 0, groups: vec![], home: "/root".into() });
        assert_eq!(user("web"), User { uid: 33, gid: 34, groups: vec![4], home: "/var/www".into() });
        assert_eq!(user("33"), user("web"));
        assert_eq!(user("web:logs").gid, 4);
        assert_eq!(user("1000:1001"), User { uid: 1000, gid: 1001, groups: vec![], home: "/".into() });
        assert_eq!(resolve_in("", "", "").unwrap().uid, 0);
        for bad in ["nobody", "web:none", "70000", "-1"] {
            assert!(resolve_in(PASSWD, GROUP, bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn links_stay_inside() {
        let temp = tempfile::tempdir().unwrap();
        std::fs::create_dir(temp.path().join("etc")).unwrap();
        std::fs::write(temp.path().join("mine"), "me:x:7:7::/:\n").unwrap();
        std::os::unix::fs::symlink("/mine", temp.path().join("etc/passwd")).unwrap();
        assert_eq!(resolve(temp.path(), "me").unwrap().uid, 7);
        std::fs::remove_file(temp.path().join("etc/passwd")).unwrap();
        std::os::unix::fs::symlink("../../../../../../etc/passwd", temp.path().join("etc/passwd")).unwrap();
        assert!(resolve(temp.path(), "root").is_err(), "the host's file must not be read");
    }
}
