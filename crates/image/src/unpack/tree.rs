//! Makes the files of a layer below one directory and nowhere else.

use std::ffi::{CString, OsStr};
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, AtFlags, OFlag, OpenHow, ResolveFlag, openat, openat2};
use nix::sys::stat::{Mode, SFlag, UtimensatFlags, fstatat, makedev, mkdirat, mknodat, utimensat};
use nix::sys::time::TimeSpec;
use nix::unistd::{Gid, LinkatFlags, Uid, UnlinkatFlags, fchownat, linkat, symlinkat, unlinkat};
use tar::EntryType;

use super::Policy;
use super::entry::Entry;
use crate::error::{Code, Context, ImageError, Result};

/// `PATH_MAX` / 2: more cannot be named anyway.
const MAX_DEPTH: usize = 512;
const WHITEOUT: &[u8] = b".wh.";
const OPAQUE: &[u8] = b".wh..wh..opq";
/// Of file systems that keep hard links and the like for themselves; never for the tree.
const AUFS: &[u8] = b".wh..wh.";

pub(super) struct Builder<'a> {
    root: OwnedFd,
    policy: &'a Policy,
    entries: u64,
    bytes: u64,
    skipped: u64,
    /// Times of directories are set last: making a file inside changes them.
    directories: Vec<(Vec<Name>, Mtime)>,
}

/// One part of a path.
type Name = Vec<u8>;
/// Seconds and nanoseconds.
type Mtime = (i64, i64);

fn unsafe_image(name: &[u8], why: &str) -> ImageError {
    ImageError::new(Code::UnsafeImage, format!("a layer holds \"{}\", which {why}", show(name)))
}

fn show(name: &[u8]) -> String {
    String::from_utf8_lossy(name).escape_debug().take(200).collect()
}

/// The parts of a name. A leading `/` means the root of the image, as everywhere in container tools; `..` is never needed.
fn parts(name: &[u8]) -> Result<Vec<Name>> {
    let parts: Vec<Name> =
        name.split(|b| *b == b'/').filter(|p| !p.is_empty() && *p != b".").map(<[u8]>::to_vec).collect();
    if parts.iter().any(|p| p == b"..") {
        return Err(unsafe_image(name, "leads out of its directory"));
    }
    if parts.len() > MAX_DEPTH || parts.iter().any(|p| p.len() > 255) {
        return Err(unsafe_image(name, "is too long or too deep"));
    }
    Ok(parts)
}

fn os(bytes: &[u8]) -> &OsStr {
    OsStr::from_bytes(bytes)
}

impl<'a> Builder<'a> {
    pub fn new(tree: &Path, policy: &'a Policy) -> Result<Self> {
        let flags = OFlag::O_DIRECTORY | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW;
        let root = openat(AT_FDCWD, tree, flags, Mode::empty()).context(|| "cannot open the tree".into())?;
        // The root directory is often not in the archive: then it is what a root directory is.
        nix::sys::stat::fchmod(&root, Mode::from_bits_truncate(0o755)).context(|| "cannot open the tree".into())?;
        Ok(Self { root, policy, entries: 0, bytes: 0, skipped: 0, directories: Vec::new() })
    }

    pub fn counts(&self) -> (u64, u64, u64) {
        (self.entries, self.bytes, self.skipped)
    }

    pub fn add(&mut self, entry: &Entry, content: &mut impl Read, check: &mut dyn FnMut() -> Result<()>) -> Result<()> {
        self.entries += 1;
        if self.entries > self.policy.entries {
            return Err(ImageError::new(
                Code::ImageTooBig,
                format!("a layer has more than {} entries", self.policy.entries),
            ));
        }
        let mut path = parts(&entry.name)?;
        let Some(name) = path.pop() else {
            return self.root_entry(entry);
        };
        let describe = || format!("cannot unpack \"{}\"", show(&entry.name));
        let parent = self.parent(&path, &entry.name)?;
        if name.starts_with(WHITEOUT) {
            return self.whiteout(&parent, &name, &entry.name);
        }
        match entry.kind {
            EntryType::Directory => {
                self.directory(&parent, &name).context(describe)?;
                path.push(name.clone());
                self.directories.push((path, entry.mtime));
            }
            EntryType::Regular | EntryType::Continuous => {
                self.clear(&parent, &name).context(describe)?;
                return self.file(entry, &parent, &name, content, check);
            }
            EntryType::Symlink => {
                self.clear(&parent, &name).context(describe)?;
                symlinkat(os(&entry.link), &parent, os(&name)).context(describe)?;
            }
            EntryType::Link => return self.hard_link(entry, &parent, &name),
            EntryType::Fifo => {
                self.clear(&parent, &name).context(describe)?;
                mknodat(&parent, os(&name), SFlag::S_IFIFO, Mode::from_bits_truncate(0o600), 0).context(describe)?;
            }
            EntryType::Char | EntryType::Block => {
                // 0:0 is the whiteout of overlayfs: a layer says that in its own words or not at all.
                if !self.policy.device_nodes || (entry.kind == EntryType::Char && entry.device == (0, 0)) {
                    self.skipped += 1;
                    return Ok(());
                }
                self.clear(&parent, &name).context(describe)?;
                let kind = if entry.kind == EntryType::Char { SFlag::S_IFCHR } else { SFlag::S_IFBLK };
                let device = makedev(entry.device.0.into(), entry.device.1.into());
                mknodat(&parent, os(&name), kind, Mode::from_bits_truncate(0o600), device).context(describe)?;
            }
            _ => {
                self.skipped += 1;
                return Ok(());
            }
        }
        self.attributes(entry, &parent, &name)
    }

    /// Times of directories, deepest first.
    pub fn finish(&mut self) -> Result<()> {
        for (path, mtime) in std::mem::take(&mut self.directories).into_iter().rev() {
            // A later entry may have replaced it.
            if let Ok(dir) = self.open(&path.join(&b'/')) {
                let _ = set_times_of(&dir, mtime);
            }
        }
        Ok(())
    }

    fn root_entry(&mut self, entry: &Entry) -> Result<()> {
        if entry.kind != EntryType::Directory {
            return Err(unsafe_image(&entry.name, "would replace the root directory"));
        }
        let describe = || "cannot set up the root directory".to_owned();
        nix::unistd::fchown(&self.root, Some(Uid::from_raw(entry.uid)), Some(Gid::from_raw(entry.gid)))
            .context(describe)?;
        nix::sys::stat::fchmod(&self.root, Mode::from_bits_truncate(entry.mode)).context(describe)?;
        self.directories.push((Vec::new(), entry.mtime));
        Ok(())
    }

    /// Opens a directory of the tree. Symbolic links are followed as a process whose root is the tree would follow them.
    fn open(&self, path: &[u8]) -> nix::Result<OwnedFd> {
        let path = if path.is_empty() { b"." } else { path };
        let how = OpenHow::new()
            .flags(OFlag::O_DIRECTORY | OFlag::O_RDONLY | OFlag::O_CLOEXEC)
            .resolve(ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS);
        openat2(&self.root, os(path), how)
    }

    /// The directory `path`, made where it is missing.
    fn parent(&self, path: &[Name], whole: &[u8]) -> Result<OwnedFd> {
        let describe = || format!("cannot unpack \"{}\"", show(whole));
        match self.open(&path.join(&b'/')) {
            Ok(dir) => return Ok(dir),
            Err(Errno::ENOENT | Errno::ENOTDIR) => {}
            Err(Errno::ENOSYS) => {
                return Err(ImageError::new(
                    Code::Unsupported,
                    "this kernel has no openat2; layers need Linux 5.6 or newer",
                ));
            }
            Err(Errno::ELOOP) => return Err(unsafe_image(whole, "goes through a circle of symbolic links")),
            Err(e) => return Err(e).context(describe),
        }
        for depth in 1..=path.len() {
            if self.open(&path[..depth].join(&b'/')).is_ok() {
                continue;
            }
            let above = self.open(&path[..depth - 1].join(&b'/')).context(describe)?;
            match mkdirat(&above, os(&path[depth - 1]), Mode::from_bits_truncate(0o755)) {
                Ok(()) => {}
                // A file, or a link to nowhere, where a directory is needed.
                Err(Errno::EEXIST) => return Err(unsafe_image(whole, "lies below something that is no directory")),
                Err(e) => return Err(e).context(describe),
            }
        }
        self.open(&path.join(&b'/')).context(describe)
    }

    /// Removes what an earlier entry made at this place.
    fn clear(&self, parent: &OwnedFd, name: &[u8]) -> nix::Result<()> {
        match unlinkat(parent, os(name), UnlinkatFlags::NoRemoveDir) {
            Err(Errno::ENOENT) => Ok(()),
            Err(Errno::EISDIR | Errno::EPERM) => self.clear_directory(parent, name, 0),
            other => other,
        }
    }

    fn clear_directory(&self, parent: &OwnedFd, name: &[u8], depth: usize) -> nix::Result<()> {
        if depth > MAX_DEPTH {
            return Err(Errno::ELOOP);
        }
        let flags = OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let mut dir = nix::dir::Dir::openat(parent, os(name), flags, Mode::empty())?;
        let names: Vec<CString> = dir.iter().flatten().map(|e| e.file_name().to_owned()).collect();
        let handle = openat(parent, os(name), flags, Mode::empty())?;
        for child in names.iter().map(CString::as_bytes).filter(|n| *n != b"." && *n != b"..") {
            match unlinkat(&handle, os(child), UnlinkatFlags::NoRemoveDir) {
                Err(Errno::EISDIR | Errno::EPERM) => self.clear_directory(&handle, child, depth + 1)?,
                other => other?,
            }
        }
        unlinkat(parent, os(name), UnlinkatFlags::RemoveDir)
    }

    fn directory(&self, parent: &OwnedFd, name: &[u8]) -> nix::Result<()> {
        match mkdirat(parent, os(name), Mode::from_bits_truncate(0o700)) {
            Err(Errno::EEXIST) => {}
            other => return other,
        }
        let there = fstatat(parent, os(name), AtFlags::AT_SYMLINK_NOFOLLOW)?;
        let kind = SFlag::from_bits_truncate(there.st_mode & SFlag::S_IFMT.bits());
        if kind == SFlag::S_IFDIR {
            return Ok(());
        }
        // After a whiteout of the same name the directory hides what lower layers have in it.
        let was_whiteout = kind == SFlag::S_IFCHR && there.st_rdev == 0;
        self.clear(parent, name)?;
        mkdirat(parent, os(name), Mode::from_bits_truncate(0o700))?;
        if was_whiteout {
            let dir =
                openat(parent, os(name), OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC, Mode::empty())?;
            set_xattr(&dir, b"trusted.overlay.opaque", b"y")?;
        }
        Ok(())
    }

    fn file(
        &mut self,
        entry: &Entry,
        parent: &OwnedFd,
        name: &[u8],
        content: &mut impl Read,
        check: &mut dyn FnMut() -> Result<()>,
    ) -> Result<()> {
        let describe = || format!("cannot unpack \"{}\"", show(&entry.name));
        let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let file = openat(parent, os(name), flags, Mode::from_bits_truncate(0o600)).context(describe)?;
        let mut file = File::from(file);
        let mut buffer = vec![0; 128 * 1024];
        let mut written = 0;
        loop {
            let n = content.read(&mut buffer).map_err(|e| super::broken(&e))?;
            if n == 0 {
                break;
            }
            self.bytes += n as u64;
            written += n as u64;
            if self.bytes > self.policy.bytes {
                return Err(crate::blobs::too_big("an unpacked layer", self.bytes, self.policy.bytes));
            }
            file.write_all(&buffer[..n]).context(describe)?;
            check()?;
        }
        if written != entry.size {
            return Err(super::broken(&std::io::ErrorKind::UnexpectedEof.into()));
        }
        // Owner first: changing it drops set-user-id and capabilities.
        nix::unistd::fchown(&file, Some(Uid::from_raw(entry.uid)), Some(Gid::from_raw(entry.gid))).context(describe)?;
        nix::sys::stat::fchmod(&file, Mode::from_bits_truncate(entry.mode)).context(describe)?;
        set_xattrs(&file, entry).context(describe)?;
        set_times_of(&file, entry.mtime).context(describe)
    }

    fn hard_link(&self, entry: &Entry, parent: &OwnedFd, name: &[u8]) -> Result<()> {
        let mut target = parts(&entry.link)?;
        let missing = || {
            ImageError::new(
                Code::ImageCorrupt,
                format!("a layer links \"{}\" to \"{}\", which is not in it", show(&entry.name), show(&entry.link)),
            )
        };
        let target_name = target.pop().ok_or_else(missing)?;
        let target_parent = self.open(&target.join(&b'/')).map_err(|_| missing())?;
        let there = fstatat(&target_parent, os(&target_name), AtFlags::AT_SYMLINK_NOFOLLOW).map_err(|_| missing())?;
        let here = fstatat(parent, os(name), AtFlags::AT_SYMLINK_NOFOLLOW);
        if here.is_ok_and(|h| h.st_ino == there.st_ino) {
            return Ok(());
        }
        let describe = || format!("cannot unpack \"{}\"", show(&entry.name));
        self.clear(parent, name).context(describe)?;
        // No flag to follow links: the last part of the target is taken as it is.
        match linkat(&target_parent, os(&target_name), parent, os(name), LinkatFlags::empty()) {
            Err(Errno::ENOENT) => Err(missing()),
            other => other.context(describe),
        }
    }

    fn whiteout(&self, parent: &OwnedFd, name: &[u8], whole: &[u8]) -> Result<()> {
        let describe = || format!("cannot unpack \"{}\"", show(whole));
        if name == OPAQUE {
            return set_xattr(parent, b"trusted.overlay.opaque", b"y").context(describe);
        }
        if name.starts_with(AUFS) {
            return Ok(());
        }
        let hidden = &name[WHITEOUT.len()..];
        if hidden.is_empty() || hidden == b"." || hidden == b".." {
            return Err(unsafe_image(whole, "hides a name that cannot be hidden"));
        }
        match mknodat(parent, os(hidden), SFlag::S_IFCHR, Mode::empty(), 0) {
            // The layer itself has something of that name: that stays and hides what is below, whatever comes first in the archive.
            Err(Errno::EEXIST) => {
                let flags = OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
                match openat(parent, os(hidden), flags, Mode::empty()) {
                    Ok(dir) => set_xattr(&dir, b"trusted.overlay.opaque", b"y").context(describe),
                    Err(_) => Ok(()),
                }
            }
            other => other.context(describe),
        }
    }

    /// Owner, mode, attributes and time of what is no regular file.
    fn attributes(&self, entry: &Entry, parent: &OwnedFd, name: &[u8]) -> Result<()> {
        let describe = || format!("cannot unpack \"{}\"", show(&entry.name));
        let (uid, gid) = (Some(Uid::from_raw(entry.uid)), Some(Gid::from_raw(entry.gid)));
        fchownat(parent, os(name), uid, gid, AtFlags::AT_SYMLINK_NOFOLLOW).context(describe)?;
        if entry.kind == EntryType::Directory {
            let dir =
                openat(parent, os(name), OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC, Mode::empty())
                    .context(describe)?;
            nix::sys::stat::fchmod(&dir, Mode::from_bits_truncate(entry.mode)).context(describe)?;
            set_xattrs(&dir, entry).context(describe)?;
            return Ok(());
        }
        if entry.kind != EntryType::Symlink {
            // Just made here by mknod, so it is no link; a directory handle and a plain name lead nowhere else.
            let mode = Mode::from_bits_truncate(entry.mode);
            nix::sys::stat::fchmodat(parent, os(name), mode, nix::sys::stat::FchmodatFlags::FollowSymlink)
                .context(describe)?;
        }
        let (at, mt) = times(entry.mtime);
        utimensat(parent, os(name), &at, &mt, UtimensatFlags::NoFollowSymlink).context(describe)
    }
}

fn times(mtime: Mtime) -> (TimeSpec, TimeSpec) {
    let time = TimeSpec::new(mtime.0, mtime.1);
    (time, time)
}

fn set_times_of(file: &impl AsFd, mtime: Mtime) -> nix::Result<()> {
    let (at, mt) = times(mtime);
    nix::sys::stat::futimens(file, &at, &mt)
}

/// File capabilities, access lists and what programs keep for themselves. Not: `trusted.*` and `user.overlay.*`, by which a layer could
/// give orders to overlayfs; labels of security modules, which belong to the host.
fn wanted(name: &[u8]) -> bool {
    name == b"security.capability"
        || name == b"system.posix_acl_access"
        || name == b"system.posix_acl_default"
        || (name.starts_with(b"user.")
            && !name.starts_with(b"user.overlay.")
            && !name.starts_with(b"user.fuseoverlayfs."))
}

fn set_xattrs(file: &impl AsRawFd, entry: &Entry) -> nix::Result<()> {
    for (name, value) in entry.xattrs.iter().filter(|(name, _)| wanted(name)) {
        match set_xattr(file, name, value) {
            // The file system below cannot hold it; the file itself is whole.
            Err(Errno::EOPNOTSUPP) => {}
            other => other?,
        }
    }
    Ok(())
}

fn set_xattr(file: &impl AsRawFd, name: &[u8], value: &[u8]) -> nix::Result<()> {
    let name = CString::new(name).map_err(|_| Errno::EINVAL)?;
    // SAFETY: the descriptor is open for the whole call, the name ends with a zero, the length is that of the value.
    let result = unsafe { libc::fsetxattr(file.as_raw_fd(), name.as_ptr(), value.as_ptr().cast(), value.len(), 0) };
    Errno::result(result).map(drop)
}
