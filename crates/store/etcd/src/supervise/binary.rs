//! Finding etcd by trying it.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::SuperviseError;

/// Names another etcd than that of the distribution.
const OVERRIDE: &str = "OBLAK_ETCD_BINARY";
/// Services often have a PATH without these.
const ALSO: &[&str] = &["/usr/bin", "/usr/local/bin", "/usr/sbin", "/opt/etcd"];
/// The first with learners (etcd 3.4 release notes).
const LEAST: (u32, u32) = (3, 4);

/// An etcd that answers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Binary {
    /// The program.
    pub path: PathBuf,
    /// What it says of itself.
    pub version: String,
}

/// Finds etcd: `OBLAK_ETCD_BINARY`, then the PATH, then the usual places.
///
/// # Errors
/// [`SuperviseError::NotFound`] and [`SuperviseError::Unusable`].
pub fn probe() -> Result<Binary, SuperviseError> {
    if let Some(path) = std::env::var_os(OVERRIDE).filter(|path| !path.is_empty()) {
        return ask(Path::new(&path));
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = places(&path).into_iter().map(|dir| dir.join("etcd")).find(|file| file.is_file());
    match found {
        Some(file) => ask(&file),
        None => Err(SuperviseError::NotFound { looked: format!("PATH, {}", ALSO.join(", ")) }),
    }
}

fn places(path: &OsString) -> Vec<PathBuf> {
    std::env::split_paths(path).filter(|dir| dir.is_absolute()).chain(ALSO.iter().map(PathBuf::from)).collect()
}

fn ask(path: &Path) -> Result<Binary, SuperviseError> {
    let unusable = |reason: String| SuperviseError::Unusable { path: path.into(), reason };
    let output = Command::new(path).arg("--version").output().map_err(|e| unusable(e.to_string()))?;
    let text = String::from_utf8_lossy(&output.stdout);
    let version = version(&text).ok_or_else(|| unusable("`--version` does not name a version of etcd".into()))?;
    if number(&version) < LEAST {
        return Err(unusable(format!("it is etcd {version}; learners came with {}.{}", LEAST.0, LEAST.1)));
    }
    Ok(Binary { path: path.into(), version })
}

/// From `etcd Version: 3.4.23`.
fn version(text: &str) -> Option<String> {
    let line = text.lines().find_map(|line| line.strip_prefix("etcd Version:"))?;
    Some(line.trim().to_owned()).filter(|version| number(version) > (0, 0))
}

fn number(version: &str) -> (u32, u32) {
    let mut parts = version.split('.').map(|part| part.parse().unwrap_or(0));
    (parts.next().unwrap_or(0), parts.next().unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read() {
        assert_eq!(version("etcd Version: 3.4.23\nGit SHA: x\n").unwrap(), "3.4.23");
        assert_eq!(version("hello"), None);
        assert!(number("3.3.27") < LEAST && number("3.4.0") >= LEAST && number("3.10.1") >= LEAST);
    }

    #[test]
    fn what_is_no_etcd_is_said() {
        let error = ask(Path::new("/bin/true")).unwrap_err().to_string();
        assert!(error.contains("/bin/true") && error.contains("version"), "{error}");
        assert!(ask(Path::new("/nonexistent/etcd")).is_err());
    }
}
