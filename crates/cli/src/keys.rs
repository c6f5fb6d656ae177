//! Public ssh keys: their fingerprints, the names they get, and which private key of this user fits.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use data_encoding::{BASE64_NOPAD, HEXLOWER};
use sha2::{Digest, Sha256};

use crate::context;
use crate::error::{CliError, Result};

/// Largest key file that is read.
const LIMIT: u64 = 16 * 1024;

/// SHA-256 of the key itself, as ssh-keygen(1) counts it.
fn digest(line: &str) -> Option<[u8; 32]> {
    let blob = line.split_ascii_whitespace().nth(1)?.trim_end_matches('=');
    // Some encoders leave bits beside the last byte: they do not matter for what the key is.
    let mut spec = data_encoding::Specification::new();
    spec.symbols.push_str("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/");
    spec.check_trailing_bits = false;
    let bytes = spec.encoding().ok()?.decode(blob.as_bytes()).ok()?;
    Some(Sha256::digest(bytes).into())
}

/// `SHA256:...`, as ssh-keygen(1) prints it.
pub fn fingerprint(line: &str) -> Option<String> {
    digest(line).map(|d| format!("SHA256:{}", BASE64_NOPAD.encode(&d)))
}

/// Name of the key object for a file: what the file is called and the first digits of the fingerprint. The same key in a file
/// of the same name always gives the same name.
pub fn object_name(file: &Path, line: &str) -> Option<String> {
    let stem = file.file_name()?.to_string_lossy().to_lowercase();
    let stem = stem.strip_suffix(".pub").unwrap_or(&stem);
    let plain: String =
        stem.chars().map(|c| if c.is_ascii_lowercase() || c.is_ascii_digit() { c } else { '-' }).collect();
    let plain = plain.split('-').filter(|p| !p.is_empty()).collect::<Vec<_>>().join("-");
    let short: String = plain.chars().take(40).collect();
    let short = short.trim_end_matches('-');
    let digits = HEXLOWER.encode(&digest(line)?[..4]);
    Some(if short.is_empty() { format!("key-{digits}") } else { format!("{short}-{digits}") })
}

/// Reads a public key from a file and checks it.
///
/// # Errors
/// What is wrong with it and what would be right.
pub fn read(file: &Path) -> Result<String> {
    use std::io::Read;
    let mut text = String::new();
    let opened = std::fs::File::open(file).and_then(|f| f.take(LIMIT + 1).read_to_string(&mut text));
    opened.map_err(|e| CliError::file(file, "read the key", &e))?;
    let lines: Vec<&str> = text.lines().map(str::trim).filter(|l| !l.is_empty() && !l.starts_with('#')).collect();
    let line = lines.join("\n");
    if let Some(problem) = oblak_model::public_key_problem(&line) {
        let beside = PathBuf::from(format!("{}.pub", file.display()));
        let hint = if text.contains("PRIVATE KEY") && beside.exists() {
            format!("use {}", beside.display())
        } else {
            "make a pair with `ssh-keygen -t ed25519` and give the file that ends in .pub".into()
        };
        return Err(CliError::usage(format!("{} {problem}", file.display()), hint));
    }
    Ok(line)
}

/// Where it is written down which private key fits which public one.
fn ledger() -> PathBuf {
    context::default_file().with_file_name("keys.json")
}

/// Remembers the private key beside a public key file, for `ssh`. Nothing is remembered when there is none.
pub fn remember(file: &Path, line: &str) {
    let Some(private) = private_beside(file) else { return };
    let Some(print) = fingerprint(line) else { return };
    let path = ledger();
    let mut known: BTreeMap<String, PathBuf> = oblak_platform::fsx::read_json(&path).ok().flatten().unwrap_or_default();
    if known.get(&print) == Some(&private) {
        return;
    }
    known.insert(print, private);
    // Only a convenience: `ssh -i` works without it.
    let made = path.parent().map(|dir| oblak_platform::fsx::create_dir_private(dir, 0o700));
    if matches!(made, Some(Ok(()))) && oblak_platform::fsx::write_json(&path, &known).is_ok() {
        hand_over(&path);
    }
}

/// Gives a file below the configuration to the user behind sudo.
pub fn hand_over(path: &Path) {
    if std::env::var_os("OBLAK_CONFIG").is_none()
        && let Some((uid, gid)) = context::Person::behind_this().owner
    {
        let _ = std::os::unix::fs::chown(path, Some(uid), Some(gid));
    }
}

fn private_beside(file: &Path) -> Option<PathBuf> {
    let text = file.to_str()?;
    let private = PathBuf::from(text.strip_suffix(".pub")?);
    std::fs::canonicalize(private).ok().filter(|p| p.is_file())
}

/// A private key that fits one of these public keys: remembered, or in `~/.ssh`.
pub fn private_for<'a>(lines: impl IntoIterator<Item = &'a str>) -> Option<PathBuf> {
    let wanted: Vec<String> = lines.into_iter().filter_map(fingerprint).collect();
    let known: BTreeMap<String, PathBuf> = oblak_platform::fsx::read_json(&ledger()).ok().flatten().unwrap_or_default();
    if let Some(path) = wanted.iter().find_map(|w| known.get(w).filter(|p| p.is_file())) {
        return Some(path.clone());
    }
    let home = context::Person::behind_this().home.join(".ssh");
    let mut files: Vec<PathBuf> =
        std::fs::read_dir(home).ok()?.filter_map(|e| Some(e.ok()?.path())).take(200).collect();
    files.sort();
    files.into_iter().filter(|f| f.extension().is_some_and(|e| e == "pub")).find_map(|file| {
        let print = fingerprint(&read(&file).ok()?)?;
        wanted.contains(&print).then(|| private_beside(&file)).flatten()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: &str = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIHUhbSCI3kBs+KJ8LKHGaPZ4vCaLLzWzVOOj+8rTJpHR me@here";

    #[test]
    fn names_follow_file_and_fingerprint() {
        let name = object_name(Path::new("/home/me/.ssh/id_ed25519.pub"), KEY).unwrap();
        let digits = HEXLOWER.encode(&digest(KEY).unwrap()[..4]);
        assert_eq!(name, format!("id-ed25519-{digits}"));
        assert_eq!(oblak_model::name::problem(&name), None);
        assert_eq!(object_name(Path::new("id.pub"), KEY).unwrap(), format!("id-{digits}"));
        assert_eq!(object_name(Path::new("...pub"), KEY).unwrap(), format!("key-{digits}"));
        let long = object_name(Path::new(&format!("{}.pub", "Ü-x".repeat(50))), KEY).unwrap();
        assert_eq!(oblak_model::name::problem(&long), None, "{long}");
        // The comment is not part of the key.
        assert_eq!(object_name(Path::new("id.pub"), &KEY.replace("me@here", "")).unwrap(), format!("id-{digits}"));
    }

    #[test]
    fn fingerprints_are_those_of_ssh_keygen() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("id.pub");
        std::fs::write(&file, format!("{KEY}\n")).unwrap();
        let Ok(out) = std::process::Command::new("ssh-keygen").arg("-lf").arg(&file).output() else {
            println!("skipped: no ssh-keygen");
            return;
        };
        let text = String::from_utf8_lossy(&out.stdout).into_owned();
        assert!(text.contains(&fingerprint(KEY).unwrap()), "{text}");
    }

    #[test]
    fn private_keys_are_refused_with_advice() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("id");
        std::fs::write(&file, "-----BEGIN OPENSSH PRIVATE KEY-----\nabc\n").unwrap();
        std::fs::write(dir.path().join("id.pub"), KEY).unwrap();
        let error = read(&file).unwrap_err();
        assert!(error.message.contains("private key"), "{}", error.message);
        assert_eq!(error.hint, format!("use {}", dir.path().join("id.pub").display()));
        assert_eq!(read(&dir.path().join("id.pub")).unwrap(), KEY);
        assert_eq!(private_beside(&dir.path().join("id.pub")).unwrap(), std::fs::canonicalize(&file).unwrap());
    }
}
