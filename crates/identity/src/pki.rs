//! Our own certificate authority: the server's certificate, and one for each node, by which its agent is known.
//!
//! Files below the directory given: `ca.pem`, `ca.key`, `server.pem`, `server.key`; keys have mode 0600. A certificate is written after its
//! key, so after a crash in between there is no certificate and both are made again.

use std::collections::BTreeSet;
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use oblak_model::{NodeId, Timestamp};
use oblak_platform::fsx;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DistinguishedName, DnType, DnValue,
    ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, SanType,
};
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate, parse_x509_pem};

const CA_LIFE_DAYS: u64 = 3650;
/// Browsers and some TLS libraries refuse server certificates that live longer (CA/Browser Forum baseline requirements, 6.3.2).
const SERVER_LIFE_DAYS: u64 = 397;
/// Life of a node's certificate unless the server says otherwise. Renewed after two thirds, so a machine may be switched off for a month.
pub const NODE_LIFE: Duration = Duration::from_secs(90 * 86_400);
/// Shortest life that leaves time to renew.
pub const NODE_LIFE_LEAST: Duration = Duration::from_secs(6);
/// A node's certificate begins so much earlier, for clocks that are behind; short lives begin a tenth of theirs earlier.
const NODE_BACKDATE: Duration = Duration::from_secs(3600);
/// A server certificate with less left is replaced.
pub const RENEW_BEFORE_DAYS: u64 = 30;
/// Clocks of agents and clients may be this much behind.
const BACKDATE_DAYS: u64 = 1;
const NODE_PREFIX: &str = "node:";
const DAY: Duration = Duration::from_secs(86_400);

/// What goes wrong with keys and certificates.
#[derive(Debug, thiserror::Error)]
pub enum PkiError {
    /// A file.
    #[error("cannot use {}: {source}", path.display())]
    Io {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file does not hold what it should.
    #[error("{} is damaged ({detail}); restore it from a backup, or remove the directory to start with a new authority (all nodes must then be enrolled again)", path.display())]
    Damaged {
        /// Which.
        path: PathBuf,
        /// What was found.
        detail: String,
    },
    /// The request of a node cannot be signed.
    #[error("the certificate request cannot be used: {0}")]
    Request(String),
    /// The generator failed.
    #[error("cannot make a certificate: {0}")]
    Generate(#[from] rcgen::Error),
}

/// A certificate with its private key, both in PEM.
#[derive(Clone)]
pub struct Certified {
    /// The certificate.
    pub certificate_pem: String,
    /// Its key (PKCS #8).
    pub key_pem: String,
}

/// The authority.
pub struct Ca {
    certificate_pem: String,
    pub(crate) issuer: Issuer<'static, KeyPair>,
}

impl Ca {
    /// Its certificate: what clients and agents trust.
    #[must_use]
    pub fn certificate_pem(&self) -> &str {
        &self.certificate_pem
    }
}

/// Loads the authority, or makes it the first time.
///
/// # Errors
/// See [`PkiError`]. An existing authority is never replaced.
pub fn ensure_ca(dir: &Path, now: Timestamp) -> Result<Ca, PkiError> {
    ensure_authority(dir, "ca", "Oblak CA", now)
}

/// The authority in `<stem>.pem` and `<stem>.key`.
pub(crate) fn ensure_authority(dir: &Path, stem: &str, title: &str, now: Timestamp) -> Result<Ca, PkiError> {
    fsx::create_dir_private(dir, 0o700).map_err(|source| PkiError::Io { path: dir.into(), source })?;
    let (certificate, key) = (dir.join(format!("{stem}.pem")), dir.join(format!("{stem}.key")));
    if let Some(certificate_pem) = read(&certificate)? {
        let key_pem = read(&key)?.ok_or_else(|| damaged(&key, "it is missing, but the certificate is there"))?;
        let pair = KeyPair::from_pem(&key_pem).map_err(|e| damaged(&key, &e.to_string()))?;
        if !belongs(&certificate_pem, &pair) {
            return Err(damaged(&key, &format!("it does not belong to {stem}.pem")));
        }
        let issuer =
            Issuer::from_ca_cert_pem(&certificate_pem, pair).map_err(|e| damaged(&certificate, &e.to_string()))?;
        return Ok(Ca { certificate_pem, issuer });
    }
    let pair = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
    let mut params = params(&format!("{title} {}", fingerprint(&pair)), now, CA_LIFE_DAYS);
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign, KeyUsagePurpose::DigitalSignature];
    let certificate_pem = params.self_signed(&pair)?.pem();
    write(&key, &pair.serialize_pem(), 0o600)?;
    write(&certificate, &certificate_pem, 0o644)?;
    Ok(Ca { certificate_pem, issuer: Issuer::new(params, pair) })
}

/// Loads the server's certificate, or makes a new one when there is none, it ends soon, lacks a name, or is of another authority.
/// `names` are host names and addresses that clients use.
///
/// # Errors
/// See [`PkiError`].
pub fn ensure_server_cert(dir: &Path, ca: &Ca, names: &[String], now: Timestamp) -> Result<Certified, PkiError> {
    let (certificate, key) = (dir.join("server.pem"), dir.join("server.key"));
    if let (Some(certificate_pem), Some(key_pem)) = (read(&certificate)?, read(&key)?)
        && is_good(&certificate_pem, &key_pem, ca, names, now)
    {
        return Ok(Certified { certificate_pem, key_pem });
    }
    let pair = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
    let mut params = params("oblak", now, SERVER_LIFE_DAYS);
    params.subject_alt_names = names.iter().map(|name| san(name)).collect::<Result<_, _>>()?;
    params.use_authority_key_identifier_extension = true;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    let certified =
        Certified { certificate_pem: params.signed_by(&pair, &ca.issuer)?.pem(), key_pem: pair.serialize_pem() };
    // Without its certificate a new key is not used, so the old pair is never mixed with the new one.
    fsx::remove_file_if_exists(&certificate).map_err(|source| PkiError::Io { path: certificate.clone(), source })?;
    write(&key, &certified.key_pem, 0o600)?;
    write(&certificate, &certified.certificate_pem, 0o644)?;
    Ok(certified)
}

/// A key and certificate for a node's agent.
///
/// # Errors
/// See [`PkiError`].
pub fn issue_node_cert(ca: &Ca, node: NodeId, now: Timestamp) -> Result<Certified, PkiError> {
    let pair = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
    let certificate = node_params(node, now, NODE_LIFE).signed_by(&pair, &ca.issuer)?;
    Ok(Certified { certificate_pem: certificate.pem(), key_pem: pair.serialize_pem() })
}

/// A fresh key of a node with a request (PKCS #10) for a certificate, both in PEM.
///
/// # Errors
/// See [`PkiError`].
pub fn node_request() -> Result<(String, String), PkiError> {
    let pair = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
    let request = CertificateParams::default().serialize_request(&pair)?.pem()?;
    Ok((pair.serialize_pem(), request))
}

/// A request with the key that a node has already.
///
/// # Errors
/// [`PkiError::Request`] when the key cannot be read.
pub fn node_request_with(key_pem: &str) -> Result<String, PkiError> {
    let pair = KeyPair::from_pem(key_pem).map_err(|e| PkiError::Request(format!("the key cannot be read: {e}")))?;
    Ok(CertificateParams::default().serialize_request(&pair)?.pem()?)
}

/// Signs the request of a node (PKCS #10) for `life`. Only its public key is taken: names and rights are ours.
///
/// # Errors
/// [`PkiError::Request`] when it cannot be read or is not signed by its own key.
pub fn sign_csr(ca: &Ca, csr_pem: &str, node: NodeId, now: Timestamp, life: Duration) -> Result<String, PkiError> {
    let request = CertificateSigningRequestParams::from_pem(csr_pem).map_err(|e| PkiError::Request(e.to_string()))?;
    Ok(node_params(node, now, life).signed_by(&request.public_key, &ca.issuer)?.pem())
}

/// SHA-256 of the public key in a request: by it a machine that asks again is recognised.
///
/// # Errors
/// [`PkiError::Request`] when it cannot be read or is not signed by its own key.
pub fn key_of_csr(csr_pem: &str) -> Result<String, PkiError> {
    use rcgen::PublicKeyData;
    use sha2::Digest;
    let request = CertificateSigningRequestParams::from_pem(csr_pem).map_err(|e| PkiError::Request(e.to_string()))?;
    Ok(data_encoding::HEXLOWER.encode(&sha2::Sha256::digest(request.public_key.der_bytes())))
}

/// When a certificate ends (DER).
#[must_use]
pub fn end_of_certificate(der: &[u8]) -> Option<Timestamp> {
    let (_, certificate) = X509Certificate::from_der(der).ok()?;
    Some(Timestamp::from_micros(certificate.validity().not_after.timestamp().saturating_mul(1_000_000)))
}

/// The node that a certificate names. The chain must have been verified before.
#[must_use]
pub fn node_of_certificate(der: &[u8]) -> Option<NodeId> {
    let (_, certificate) = X509Certificate::from_der(der).ok()?;
    let name = certificate.subject().iter_common_name().next()?.as_str().ok()?;
    name.strip_prefix(NODE_PREFIX)?.parse().ok()
}

/// Names that clients of this machine may use: `localhost`, the host name, every address of every interface.
#[must_use]
pub fn local_names() -> Vec<String> {
    let mut names: BTreeSet<String> = ["localhost", "127.0.0.1", "::1"].map(String::from).into();
    if let Ok(host) = nix::unistd::gethostname() {
        names.insert(host.to_string_lossy().to_ascii_lowercase());
    }
    for interface in nix::ifaddrs::getifaddrs().into_iter().flatten() {
        let Some(address) = interface.address else { continue };
        if let Some(v4) = address.as_sockaddr_in() {
            names.insert(v4.ip().to_string());
        } else if let Some(v6) = address.as_sockaddr_in6()
            && !v6.ip().is_unicast_link_local()
        {
            names.insert(v6.ip().to_string());
        }
    }
    names.into_iter().filter(|name| san(name).is_ok()).collect()
}

fn node_params(node: NodeId, now: Timestamp, life: Duration) -> CertificateParams {
    let mut params = timed_params(&format!("{NODE_PREFIX}{node}"), now, life);
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
    params
}

/// Parameters of a certificate whose life is exact to the second.
pub(crate) fn timed_params(common_name: &str, now: Timestamp, life: Duration) -> CertificateParams {
    let mut params = params(common_name, now, 1);
    let second = |at: Timestamp| {
        let since_epoch = u64::try_from(at.as_micros() / 1_000_000).unwrap_or(0);
        rcgen::date_time_ymd(1970, 1, 1) + Duration::from_secs(since_epoch)
    };
    let micros = |span: Duration| i64::try_from(span.as_micros()).unwrap_or(i64::MAX);
    let back = micros(NODE_BACKDATE.min(life / 10));
    params.not_before = second(Timestamp::from_micros(now.as_micros().saturating_sub(back)));
    params.not_after = second(Timestamp::from_micros(now.as_micros().saturating_add(micros(life))));
    params.use_authority_key_identifier_extension = true;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params
}

fn params(common_name: &str, now: Timestamp, days: u64) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, DnValue::Utf8String(common_name.into()));
    // RFC 3339 text begins with `YYYY-MM-DD`.
    let day = |at: Timestamp| {
        let text = at.to_string();
        let part = |range: std::ops::Range<usize>| text.get(range).and_then(|t| t.parse::<u16>().ok()).unwrap_or(1);
        let (month, day) = (u8::try_from(part(5..7)).unwrap_or(1), u8::try_from(part(8..10)).unwrap_or(1));
        rcgen::date_time_ymd(i32::from(part(0..4)), month, day)
    };
    params.not_before = day(shift(now, -1, BACKDATE_DAYS));
    params.not_after = day(shift(now, 1, days));
    params
}

fn shift(now: Timestamp, sign: i64, days: u64) -> Timestamp {
    let micros = i64::try_from((DAY * u32::try_from(days).unwrap_or(u32::MAX)).as_micros()).unwrap_or(i64::MAX);
    Timestamp::from_micros(now.as_micros().saturating_add(sign * micros))
}

pub(crate) fn san(name: &str) -> Result<SanType, PkiError> {
    match name.parse::<IpAddr>() {
        Ok(address) => Ok(SanType::IpAddress(address)),
        Err(_) => Ok(SanType::DnsName(name.try_into()?)),
    }
}

fn is_good(certificate_pem: &str, key_pem: &str, ca: &Ca, names: &[String], now: Timestamp) -> bool {
    let Ok(pair) = KeyPair::from_pem(key_pem) else { return false };
    let (Ok((_, pem)), Ok((_, authority))) =
        (parse_x509_pem(certificate_pem.as_bytes()), parse_x509_pem(ca.certificate_pem.as_bytes()))
    else {
        return false;
    };
    let (Ok(certificate), Ok(authority)) = (pem.parse_x509(), authority.parse_x509()) else { return false };
    let until = shift(now, 1, RENEW_BEFORE_DAYS).as_micros() / 1_000_000;
    let present: BTreeSet<String> = certificate
        .subject_alternative_name()
        .ok()
        .flatten()
        .map(|ext| ext.value.general_names.iter().filter_map(plain).collect())
        .unwrap_or_default();
    belongs(certificate_pem, &pair)
        && certificate.issuer() == authority.subject()
        && certificate.validity().not_after.timestamp() > until
        && certificate.validity().not_before.timestamp() <= now.as_micros() / 1_000_000
        && names.iter().all(|name| present.contains(name))
}

pub(crate) fn plain(name: &GeneralName<'_>) -> Option<String> {
    match name {
        GeneralName::DNSName(name) => Some((*name).to_string()),
        GeneralName::IPAddress(bytes) => {
            let v4 = <[u8; 4]>::try_from(*bytes).map(IpAddr::from);
            v4.or_else(|_| <[u8; 16]>::try_from(*bytes).map(IpAddr::from)).ok().map(|ip| ip.to_string())
        }
        _ => None,
    }
}

pub(crate) fn belongs(certificate_pem: &str, pair: &KeyPair) -> bool {
    let Ok((_, pem)) = parse_x509_pem(certificate_pem.as_bytes()) else { return false };
    pem.parse_x509().is_ok_and(|c| c.public_key().subject_public_key.data.as_ref() == pair.public_key_raw())
}

/// Tells one authority from another made later under the same name.
fn fingerprint(pair: &KeyPair) -> String {
    use sha2::Digest;
    data_encoding::HEXLOWER.encode(&sha2::Sha256::digest(pair.public_key_raw())[..4])
}

pub(crate) fn read(path: &Path) -> Result<Option<String>, PkiError> {
    match std::fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(PkiError::Io { path: path.into(), source }),
    }
}

pub(crate) fn write(path: &Path, text: &str, mode: u32) -> Result<(), PkiError> {
    fsx::write_atomic(path, text.as_bytes(), mode).map_err(|source| PkiError::Io { path: path.into(), source })
}

fn damaged(path: &Path, detail: &str) -> PkiError {
    PkiError::Damaged { path: path.into(), detail: detail.into() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn now() -> Timestamp {
        "2026-03-01T00:00:00Z".parse().unwrap()
    }

    #[test]
    fn the_authority_and_the_server_certificate_are_kept() {
        let dir = tempfile::tempdir().unwrap();
        let ca = ensure_ca(dir.path(), now()).unwrap();
        let names = local_names();
        assert!(names.contains(&"localhost".to_string()) && names.contains(&"127.0.0.1".to_string()));
        let first = ensure_server_cert(dir.path(), &ca, &names, now()).unwrap();
        let again = ensure_ca(dir.path(), now()).unwrap();
        assert_eq!(again.certificate_pem(), ca.certificate_pem());
        let second = ensure_server_cert(dir.path(), &again, &names, now()).unwrap();
        assert_eq!(first.certificate_pem, second.certificate_pem);
        for key in ["ca.key", "server.key"] {
            let mode = std::fs::metadata(dir.path().join(key)).unwrap().permissions().mode();
            assert_eq!(mode & 0o777, 0o600, "{key}");
        }
    }

    #[test]
    fn the_server_certificate_is_renewed_when_it_must_be() {
        let dir = tempfile::tempdir().unwrap();
        let ca = ensure_ca(dir.path(), now()).unwrap();
        let names = vec!["localhost".to_string()];
        let first = ensure_server_cert(dir.path(), &ca, &names, now()).unwrap();
        let more = vec!["localhost".to_string(), "cloud.example".to_string()];
        let second = ensure_server_cert(dir.path(), &ca, &more, now()).unwrap();
        assert_ne!(first.certificate_pem, second.certificate_pem);
        let late = shift(now(), 1, SERVER_LIFE_DAYS - RENEW_BEFORE_DAYS + 1);
        let third = ensure_server_cert(dir.path(), &ca, &more, late).unwrap();
        assert_ne!(second.certificate_pem, third.certificate_pem);
        // A crash between key and certificate.
        std::fs::write(dir.path().join("server.key"), &first.key_pem).unwrap();
        let fourth = ensure_server_cert(dir.path(), &ca, &more, late).unwrap();
        assert!(belongs(&fourth.certificate_pem, &KeyPair::from_pem(&fourth.key_pem).unwrap()));
    }

    #[test]
    fn nodes_get_the_name_that_we_choose() {
        let dir = tempfile::tempdir().unwrap();
        let ca = ensure_ca(dir.path(), now()).unwrap();
        let node: NodeId = "0190a1b2-c3d4-7e5f-8a9b-0c1d2e3f4a5b".parse().unwrap();
        let pair = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).unwrap();
        // The request asks to be another node.
        let wish = params("node:0190a1b2-c3d4-7e5f-8a9b-ffffffffffff", now(), 1);
        let csr = wish.serialize_request(&pair).unwrap().pem().unwrap();
        let pem = sign_csr(&ca, &csr, node, now(), Duration::from_secs(60)).unwrap();
        let (_, parsed) = parse_x509_pem(pem.as_bytes()).unwrap();
        assert_eq!(node_of_certificate(&parsed.contents), Some(node));
        assert!(!parsed.parse_x509().unwrap().is_ca());
        let end = end_of_certificate(&parsed.contents).unwrap();
        assert_eq!(end.since(now()), Duration::from_secs(60));
        assert!(matches!(sign_csr(&ca, "junk", node, now(), NODE_LIFE), Err(PkiError::Request(_))));
        let (key, request) = node_request().unwrap();
        assert_eq!(key_of_csr(&request).unwrap(), key_of_csr(&node_request_with(&key).unwrap()).unwrap());
        assert_ne!(key_of_csr(&request).unwrap(), key_of_csr(&csr).unwrap());
        let own = issue_node_cert(&ca, node, now()).unwrap();
        assert!(belongs(&own.certificate_pem, &KeyPair::from_pem(&own.key_pem).unwrap()));
    }

    #[test]
    fn a_lost_key_is_said_and_not_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let ca = ensure_ca(dir.path(), now()).unwrap();
        std::fs::remove_file(dir.path().join("ca.key")).unwrap();
        assert!(matches!(ensure_ca(dir.path(), now()), Err(PkiError::Damaged { .. })));
        assert_eq!(std::fs::read_to_string(dir.path().join("ca.pem")).unwrap(), ca.certificate_pem());
    }
}
