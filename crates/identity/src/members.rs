//! Servers of one cloud among themselves: the authority of etcd, the certificate of each member, and what a new server is handed over.
//!
//! etcd has an authority of its own, so that the certificate of a node, which many machines have, opens nothing there. A member has one
//! certificate for clients, for peers, and to be a client itself; its common name is etcd's user `root`.

use std::path::{Path, PathBuf};
use std::time::Duration;

use oblak_model::Timestamp;
use oblak_platform::fsx;
use rcgen::{ExtendedKeyUsagePurpose, KeyPair, PKCS_ECDSA_P256_SHA256};
use serde::{Deserialize, Serialize};
use x509_parser::prelude::parse_x509_pem;

use crate::pki::{Ca, PkiError, belongs, ensure_authority, plain, read, san, timed_params, write};

/// The user of etcd that may do everything.
const ETCD_USER: &str = "root";
/// Life of a member's certificate unless told otherwise; renewed after two thirds.
pub const MEMBER_LIFE: Duration = Duration::from_secs(90 * 86_400);
/// Names of the files below the directory of keys.
const ETCD_CA: &str = "etcd-ca";

/// Files of a member's TLS.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemberFiles {
    /// Certificate of etcd's authority.
    pub ca: PathBuf,
    /// Certificate of the member.
    pub certificate: PathBuf,
    /// Its key.
    pub key: PathBuf,
}

impl MemberFiles {
    /// Where they lie.
    #[must_use]
    pub fn of(dir: &Path) -> Self {
        Self { ca: dir.join("etcd-ca.pem"), certificate: dir.join("etcd.pem"), key: dir.join("etcd.key") }
    }
}

/// Loads the authority of etcd, or makes it the first time.
///
/// # Errors
/// See [`PkiError`].
pub fn ensure_etcd_ca(dir: &Path, now: Timestamp) -> Result<Ca, PkiError> {
    ensure_authority(dir, ETCD_CA, "Oblak etcd CA", now)
}

/// Makes sure that the member has a certificate for these names with at least a third of its life left. Says whether a new one was made.
/// The key stays: etcd reads both files at each handshake and must never find two that do not belong together.
///
/// # Errors
/// See [`PkiError`].
pub fn ensure_member_cert(
    dir: &Path,
    ca: &Ca,
    names: &[String],
    now: Timestamp,
    life: Duration,
) -> Result<bool, PkiError> {
    let files = MemberFiles::of(dir);
    let pair = match read(&files.key)? {
        Some(pem) => {
            KeyPair::from_pem(&pem).map_err(|e| PkiError::Damaged { path: files.key.clone(), detail: e.to_string() })?
        }
        None => {
            let pair = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
            write(&files.key, &pair.serialize_pem(), 0o600)?;
            pair
        }
    };
    if let Some(pem) = read(&files.certificate)?
        && is_fresh(&pem, &pair, ca, names, now)
    {
        return Ok(false);
    }
    let mut params = timed_params(ETCD_USER, now, life);
    params.subject_alt_names = names.iter().map(|name| san(name)).collect::<Result<_, _>>()?;
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    write(&files.certificate, &params.signed_by(&pair, &ca.issuer)?.pem(), 0o644)?;
    Ok(true)
}

fn is_fresh(pem: &str, pair: &KeyPair, ca: &Ca, names: &[String], now: Timestamp) -> bool {
    let (Ok((_, own)), Ok((_, authority))) =
        (parse_x509_pem(pem.as_bytes()), parse_x509_pem(ca.certificate_pem().as_bytes()))
    else {
        return false;
    };
    let (Ok(certificate), Ok(authority)) = (own.parse_x509(), authority.parse_x509()) else { return false };
    let validity = certificate.validity();
    let (from, until) = (validity.not_before.timestamp(), validity.not_after.timestamp());
    let present: Vec<String> = certificate
        .subject_alternative_name()
        .ok()
        .flatten()
        .map(|ext| ext.value.general_names.iter().filter_map(plain).collect())
        .unwrap_or_default();
    belongs(pem, pair)
        && certificate.issuer() == authority.subject()
        && from <= now.as_micros() / 1_000_000
        && until.saturating_sub(now.as_micros() / 1_000_000) * 3 > until.saturating_sub(from)
        && names.iter().all(|name| present.contains(name))
}

/// Everything that a server must have to be one: both authorities with their keys. Whoever has it can be anybody in this cloud.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Keys {
    /// Certificate of the authority.
    pub ca_pem: String,
    /// Its key.
    pub ca_key_pem: String,
    /// Certificate of etcd's authority; none where the state is in a file or in an etcd of others.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub etcd_ca_pem: Option<String>,
    /// Its key.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub etcd_ca_key_pem: Option<String>,
}

impl std::fmt::Debug for Keys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Keys(..)")
    }
}

impl Keys {
    /// Reads them.
    ///
    /// # Errors
    /// [`PkiError::Damaged`] when the authority is missing.
    pub fn load(dir: &Path) -> Result<Self, PkiError> {
        let need = |name: &str| {
            let path = dir.join(name);
            read(&path)?.ok_or_else(|| PkiError::Damaged { path, detail: "it is missing".into() })
        };
        Ok(Self {
            ca_pem: need("ca.pem")?,
            ca_key_pem: need("ca.key")?,
            etcd_ca_pem: read(&dir.join("etcd-ca.pem"))?,
            etcd_ca_key_pem: read(&dir.join("etcd-ca.key"))?,
        })
    }

    /// Writes them, the keys readable by their owner only. The same again changes nothing; others that are there are never replaced.
    ///
    /// # Errors
    /// [`PkiError::Damaged`] when there are others, or these do not belong together.
    pub fn install(&self, dir: &Path, now: Timestamp) -> Result<(), PkiError> {
        fsx::create_dir_private(dir, 0o700).map_err(|source| PkiError::Io { path: dir.into(), source })?;
        let etcd = self.etcd_ca_pem.as_ref().zip(self.etcd_ca_key_pem.as_ref());
        for (stem, certificate, key) in
            [Some(("ca", &self.ca_pem, &self.ca_key_pem)), etcd.map(|(c, k)| (ETCD_CA, c, k))].into_iter().flatten()
        {
            let (certificate_file, key_file) = (dir.join(format!("{stem}.pem")), dir.join(format!("{stem}.key")));
            match read(&certificate_file)? {
                Some(there) if there == *certificate => {}
                Some(_) => {
                    let detail = "it is the authority of another cloud; use another data directory".into();
                    return Err(PkiError::Damaged { path: certificate_file, detail });
                }
                None => {
                    // The certificate comes last: without it the pair is not there.
                    write(&key_file, key, 0o600)?;
                    write(&certificate_file, certificate, 0o644)?;
                }
            }
            // Reads both and compares them.
            ensure_authority(dir, stem, "", now)?;
        }
        Ok(())
    }
}

/// A certificate on this machine, for people who look after it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seen {
    /// Name of its file.
    pub file: String,
    /// When it begins and ends.
    pub from: Timestamp,
    /// When it ends.
    pub until: Timestamp,
}

/// The certificates in a directory of keys, those that can be read.
#[must_use]
pub fn certificates(dir: &Path) -> Vec<Seen> {
    let at = |seconds: i64| Timestamp::from_micros(seconds.saturating_mul(1_000_000));
    let look = |file: &str| {
        let pem = read(&dir.join(file)).ok().flatten()?;
        let (_, pem) = parse_x509_pem(pem.as_bytes()).ok()?;
        let certificate = pem.parse_x509().ok()?;
        let validity = certificate.validity();
        Some(Seen {
            file: file.into(),
            from: at(validity.not_before.timestamp()),
            until: at(validity.not_after.timestamp()),
        })
    };
    ["ca.pem", "server.pem", "etcd-ca.pem", "etcd.pem"].into_iter().filter_map(look).collect()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn now() -> Timestamp {
        Timestamp::from_micros(1_772_323_200_000_000)
    }

    fn later(seconds: i64) -> Timestamp {
        Timestamp::from_micros(now().as_micros() + seconds * 1_000_000)
    }

    #[test]
    fn a_member_certificate_is_renewed_after_two_thirds_and_keeps_its_key() {
        let dir = tempfile::tempdir().unwrap();
        let ca = ensure_etcd_ca(dir.path(), now()).unwrap();
        let names = vec!["127.0.0.1".to_string(), "n1".to_string()];
        let ensure =
            |at, names: &[String]| ensure_member_cert(dir.path(), &ca, names, at, Duration::from_secs(90)).unwrap();
        assert!(ensure(now(), &names));
        let key = std::fs::read(dir.path().join("etcd.key")).unwrap();
        assert!(!ensure(later(50), &names));
        assert!(ensure(later(70), &names));
        assert!(ensure(later(71), &["127.0.0.2".to_string()]), "another name needs another certificate");
        assert_eq!(std::fs::read(dir.path().join("etcd.key")).unwrap(), key);
        let mode = std::fs::metadata(dir.path().join("etcd.key")).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        let seen = certificates(dir.path());
        assert_eq!(seen.iter().map(|s| s.file.as_str()).collect::<Vec<_>>(), ["etcd-ca.pem", "etcd.pem"]);
    }

    #[test]
    fn keys_are_handed_over_once_and_never_replaced() {
        let (first, second, other) =
            (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        for dir in [&first, &other] {
            crate::pki::ensure_ca(dir.path(), now()).unwrap();
            ensure_etcd_ca(dir.path(), now()).unwrap();
        }
        let keys = Keys::load(first.path()).unwrap();
        assert!(!format!("{keys:?}").contains("PRIVATE"));
        let target = second.path().join("pki");
        keys.install(&target, now()).unwrap();
        keys.install(&target, now()).unwrap();
        assert_eq!(Keys::load(&target).unwrap(), keys);
        for name in ["ca.key", "etcd-ca.key"] {
            assert_eq!(std::fs::metadata(target.join(name)).unwrap().permissions().mode() & 0o777, 0o600);
        }
        let error = Keys::load(other.path()).unwrap().install(&target, now()).unwrap_err().to_string();
        assert!(error.contains("another cloud"), "{error}");
        assert_eq!(Keys::load(&target).unwrap(), keys);
        // A crash between key and certificate is healed by doing it again.
        std::fs::remove_file(target.join("etcd-ca.pem")).unwrap();
        keys.install(&target, now()).unwrap();
        let mixed = Keys { ca_key_pem: Keys::load(other.path()).unwrap().ca_key_pem, ..keys };
        assert!(mixed.install(&second.path().join("mixed"), now()).is_err());
    }
}
