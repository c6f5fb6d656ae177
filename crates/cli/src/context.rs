//! Contexts: which cloud, as whom, in which project. Kept in `~/.config/oblak/config.json`, readable by their owner only.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use oblak_platform::fsx;
use serde::{Deserialize, Serialize};

/// One cloud and identity.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Context {
    /// `https://host:port`.
    pub server: String,
    /// All servers of the cloud, as they were told last.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub servers: Vec<String>,
    /// When they were asked for last, in seconds since 1970.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub learnt_at: i64,
    /// PEM of its certificate authority.
    pub ca_pem: String,
    /// Bearer token.
    #[serde(default)]
    pub token: String,
    /// Project that commands work in.
    #[serde(default)]
    pub project: String,
}

#[allow(clippy::trivially_copy_pass_by_ref, reason = "serde passes references")]
fn is_zero(n: &i64) -> bool {
    *n == 0
}

/// All contexts of a user.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Contexts {
    /// Name of the one in use.
    #[serde(default)]
    pub current: String,
    /// By name.
    #[serde(default)]
    pub contexts: BTreeMap<String, Context>,
}

/// A user of this machine who gets a context.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Person {
    /// Home directory.
    pub home: PathBuf,
    /// Owner of what is written; `None` leaves it to the process.
    pub owner: Option<(u32, u32)>,
}

impl Person {
    /// Who runs this command: the user behind sudo when there is one.
    #[must_use]
    pub fn behind_this() -> Self {
        let behind = std::env::var("SUDO_USER").ok().filter(|_| nix::unistd::geteuid().is_root());
        if let Some(user) = behind.and_then(|name| nix::unistd::User::from_name(&name).ok().flatten()) {
            return Self { home: user.dir, owner: Some((user.uid.as_raw(), user.gid.as_raw())) };
        }
        Self { home: std::env::var_os("HOME").map_or_else(|| PathBuf::from("/root"), PathBuf::from), owner: None }
    }

    /// The file with the contexts.
    #[must_use]
    pub fn file(&self) -> PathBuf {
        self.home.join(".config/oblak/config.json")
    }
}

/// The file that commands read: `OBLAK_CONFIG`, else that of the user.
#[must_use]
pub fn default_file() -> PathBuf {
    std::env::var_os("OBLAK_CONFIG").map_or_else(|| Person::behind_this().file(), PathBuf::from)
}

/// Reads contexts; none when there is no file.
///
/// # Errors
/// Any I/O error; `InvalidData` naming the file when it is damaged.
pub fn load(file: &Path) -> io::Result<Contexts> {
    Ok(fsx::read_json(file)?.unwrap_or_default())
}

/// Writes contexts with mode 0600.
///
/// # Errors
/// Any I/O error.
pub fn save(file: &Path, contexts: &Contexts, owner: Option<(u32, u32)>) -> io::Result<()> {
    let dir = file.parent().ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "the file has no directory"))?;
    let fresh: Vec<&Path> = dir.ancestors().take_while(|d| !d.exists()).collect();
    fsx::create_dir_private(dir, 0o700)?;
    fsx::write_json(file, contexts)?;
    if let Some((uid, gid)) = owner {
        for path in fresh.into_iter().chain([file]) {
            std::os::unix::fs::chown(path, Some(uid), Some(gid))?;
        }
    }
    Ok(())
}

/// Adds or replaces a context and makes it the current one.
///
/// # Errors
/// Any I/O error.
pub fn put(file: &Path, name: &str, context: Context, owner: Option<(u32, u32)>) -> io::Result<()> {
    let mut contexts = load(file)?;
    contexts.contexts.insert(name.into(), context);
    contexts.current = name.into();
    save(file, &contexts, owner)
}

/// Notes which servers a cloud has, in every context of it.
///
/// # Errors
/// Any I/O error.
pub fn note_servers(file: &Path, known: &[String], ca_pem: &str, servers: &[String], now: i64) -> io::Result<()> {
    let mut contexts = load(file)?;
    let before = contexts.clone();
    let same = |c: &&mut Context| c.ca_pem == ca_pem && known.contains(&c.server);
    for context in contexts.contexts.values_mut().filter(same) {
        context.servers = if servers.len() > 1 { servers.to_vec() } else { Vec::new() };
        context.learnt_at = now;
    }
    if contexts == before {
        return Ok(());
    }
    // The owner of the file stays its owner, also when root runs a command.
    let owner = std::fs::metadata(file)
        .ok()
        .map(|m| (std::os::unix::fs::MetadataExt::uid(&m), std::os::unix::fs::MetadataExt::gid(&m)));
    save(file, &contexts, owner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn contexts_are_private_and_kept() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("a/b/config.json");
        put(&file, "one", Context { server: "https://x".into(), ..Context::default() }, None).unwrap();
        put(&file, "two", Context::default(), None).unwrap();
        let all = load(&file).unwrap();
        assert_eq!(all.current, "two");
        assert_eq!(all.contexts["one"].server, "https://x");
        assert_eq!(std::fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(std::fs::metadata(file.parent().unwrap()).unwrap().permissions().mode() & 0o777, 0o700);
    }
}
