//! Kernel parameters of the network namespace that the calling thread is in (`/proc/sys/net` shows those).

use std::io;
use std::path::Path;

/// Sets `name` (with slashes, below `/proc/sys/net`) unless it already has the value.
pub(crate) fn set(name: &str, value: &str) -> io::Result<()> {
    let path = Path::new("/proc/sys/net").join(name);
    let context = |e: io::Error| io::Error::new(e.kind(), format!("{}: {e}", path.display()));
    // Values of several numbers are shown with tabs between them.
    let same = |text: &str| text.split_whitespace().eq(value.split_whitespace());
    if same(&std::fs::read_to_string(&path).map_err(context)?) {
        return Ok(());
    }
    std::fs::write(&path, value).map_err(context)
}

/// As [`set`], but it is fine when the kernel does not know the parameter.
pub(crate) fn set_if_known(name: &str, value: &str) -> io::Result<()> {
    match set(name, value) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// Reads `name`; `None` when the kernel does not know it.
pub(crate) fn get(name: &str) -> Option<String> {
    std::fs::read_to_string(Path::new("/proc/sys/net").join(name)).ok().map(|t| t.trim().to_string())
}
