//! Chowned copies of layers, where idmapped mounts do not work.

use std::ffi::CString;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt, lchown};
use std::path::{Path, PathBuf};

/// Written next to a copy when it is complete.
const DONE: &str = "done";

/// A copy of `layer` below `place` in which every owner is shifted by `base`. Made once; a half-made one is made again.
///
/// # Errors
/// Any I/O error; `NotFound` without cp(1).
pub fn shifted(layer: &Path, place: &Path, base: u32) -> io::Result<PathBuf> {
    let tree = place.join("tree");
    let mark = format!("{base} {}", layer.display());
    if std::fs::read_to_string(place.join(DONE)).is_ok_and(|t| t == mark) {
        return Ok(tree);
    }
    oblak_platform::fsx::remove_dir_if_exists(place)?;
    oblak_platform::fsx::create_dir_private(place, 0o711)?;
    // cp knows reflinks, sparse files, hard links and extended attributes (whiteouts and opaque marks of overlayfs are some).
    let status =
        std::process::Command::new("cp").args(["-a", "--reflink=auto", "--"]).arg(layer).arg(&tree).status()?;
    if !status.success() {
        return Err(io::Error::other(format!("cp of {} failed with {status}", layer.display())));
    }
    shift(&tree, |id| (id < crate::bundle::ID_COUNT).then(|| id + base))?;
    oblak_platform::fsx::write_atomic(&place.join(DONE), mark.as_bytes(), 0o600)?;
    Ok(tree)
}

/// Changes every owner in `root` by `map`; ids without an image are left alone. Links are not followed.
pub fn shift(root: &Path, map: impl Fn(u32) -> Option<u32>) -> io::Result<()> {
    let mut open = vec![root.to_path_buf()];
    while let Some(path) = open.pop() {
        let meta = std::fs::symlink_metadata(&path)?;
        if let (Some(uid), Some(gid)) = (map(meta.uid()), map(meta.gid()))
            && (uid, gid) != (meta.uid(), meta.gid())
        {
            lchown(&path, Some(uid), Some(gid))?;
            // chown(2) takes the set-id bits away.
            if !meta.is_symlink() && meta.mode() & 0o6000 != 0 {
                std::fs::set_permissions(&path, std::fs::Permissions::from_mode(meta.mode() & 0o7777))?;
            }
        }
        if meta.is_dir() {
            for entry in std::fs::read_dir(&path)? {
                open.push(entry?.path());
            }
        }
    }
    Ok(())
}

/// Copies the mode of one directory to another.
pub fn same_mode(from: &Path, to: &Path) -> io::Result<()> {
    let mode = std::fs::metadata(from)?.mode() & 0o7777;
    let path = CString::new(to.as_os_str().as_bytes())?;
    // SAFETY: a valid C string and a number.
    if unsafe { libc::chmod(path.as_ptr(), mode) } == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn owners_move_and_set_id_bits_stay() {
        if !nix::unistd::geteuid().is_root() {
            return println!("skipped: needs root");
        }
        let temp = tempfile::tempdir().unwrap();
        let layer = temp.path().join("layer");
        std::fs::create_dir_all(layer.join("bin")).unwrap();
        std::fs::write(layer.join("bin/su"), "x").unwrap();
        lchown(layer.join("bin/su"), Some(0), Some(5)).unwrap();
        std::fs::set_permissions(layer.join("bin/su"), std::fs::Permissions::from_mode(0o4755)).unwrap();
        std::os::unix::fs::symlink("/etc/shadow", layer.join("link")).unwrap();
        let place = temp.path().join("copy");
        let tree = shifted(&layer, &place, 100_000).unwrap();
        let su = std::fs::metadata(tree.join("bin/su")).unwrap();
        assert_eq!((su.uid(), su.gid(), su.mode() & 0o7777), (100_000, 100_005, 0o4755));
        assert_eq!(std::fs::symlink_metadata(tree.join("link")).unwrap().uid(), 100_000);
        // Once made it is reused; another range makes it again.
        std::fs::write(tree.join("mark"), "").unwrap();
        assert!(shifted(&layer, &place, 100_000).unwrap().join("mark").exists());
        assert!(!shifted(&layer, &place, 200_000).unwrap().join("mark").exists());
    }
}
