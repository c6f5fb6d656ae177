//! Who this node is: one file, `node/node.json`, so that key and certificate are never of two minds after a crash.

use std::io;
use std::sync::Arc;

use anyhow::{Context, Result};
use oblak_agent::{KeyStore, Renewal};
use oblak_identity::pki;
use oblak_model::wire::NodeCertificate;
use oblak_model::{NodeId, Timestamp};
use oblak_platform::layout::Layout;
use oblak_platform::{clock, fsx};
use serde::{Deserialize, Serialize};

const FILE: &str = "node.json";
/// The key of a machine that is just joining.
const JOINING: &str = "joining.key";

/// Identity, key and certificate of a node.
#[derive(Clone, Serialize, Deserialize)]
pub struct Credentials {
    /// Its id.
    pub id: NodeId,
    /// Its name in the cloud.
    #[serde(default)]
    pub name: String,
    /// The server that it belongs to.
    #[serde(default)]
    pub server: String,
    /// Certificate.
    #[serde(default)]
    pub certificate_pem: String,
    /// Key.
    #[serde(default)]
    pub key_pem: String,
    /// The authority of the server.
    #[serde(default)]
    pub ca_pem: String,
    /// When to renew the certificate; at once when it is not known.
    #[serde(default)]
    pub renew_at: Timestamp,
    /// When the certificate ends.
    #[serde(default)]
    pub expires_at: Timestamp,
}

impl Credentials {
    /// From what a server has signed.
    pub fn of(server: &str, name: &str, key_pem: String, issued: NodeCertificate) -> Self {
        Self {
            id: issued.id,
            name: if issued.name.is_empty() { name.into() } else { issued.name },
            server: server.into(),
            certificate_pem: issued.certificate_pem,
            key_pem,
            ca_pem: issued.ca_pem,
            renew_at: issued.renew_at,
            expires_at: issued.expires_at,
        }
    }

    /// Reads them; `None` when this machine is not a node yet.
    pub fn load(layout: &Layout) -> Result<Option<Self>> {
        let dir = layout.node();
        let Some(mut found) = fsx::read_json::<Self>(&dir.join(FILE))? else { return Ok(None) };
        if found.key_pem.is_empty() {
            // Written by a version that kept them in files of their own.
            let read = |name: &str| std::fs::read_to_string(dir.join(name));
            let (Ok(certificate), Ok(key), Ok(ca)) = (read("node.pem"), read("node.key"), read("ca.pem")) else {
                return Ok(None);
            };
            (found.certificate_pem, found.key_pem, found.ca_pem) = (certificate, key, ca);
        }
        Ok(Some(found))
    }

    /// Keeps them.
    pub fn save(&self, layout: &Layout) -> Result<()> {
        self.write(layout).context("cannot write the identity of the node")
    }

    fn write(&self, layout: &Layout) -> io::Result<()> {
        let dir = layout.node();
        fsx::write_json(&dir.join(FILE), self)?;
        for old in [JOINING, "node.pem", "node.key", "ca.pem"] {
            fsx::remove_file_if_exists(&dir.join(old))?;
        }
        Ok(())
    }

    /// Whether the certificate has ended.
    pub fn has_ended(&self, now: Timestamp) -> bool {
        self.expires_at > Timestamp::default() && self.expires_at <= now
    }

    /// For the agent: when and how to renew.
    pub fn renewal(&self, layout: &Layout) -> Renewal {
        Renewal { at: self.renew_at, end: self.expires_at, keys: Arc::new(Keys { layout: layout.clone() }) }
    }
}

/// The key to ask for a certificate with, and the request. A machine that was interrupted while joining asks with the same key again, so
/// that the server knows it.
pub fn joining_key(layout: &Layout) -> Result<(String, String)> {
    let path = layout.node().join(JOINING);
    if let Ok(key) = std::fs::read_to_string(&path)
        && let Ok(request) = pki::node_request_with(&key)
    {
        return Ok((key, request));
    }
    let (key, request) = pki::node_request()?;
    fsx::write_atomic(&path, key.as_bytes(), 0o600).with_context(|| format!("cannot write {}", path.display()))?;
    Ok((key, request))
}

struct Keys {
    layout: Layout,
}

impl KeyStore for Keys {
    fn request(&self) -> io::Result<(String, String)> {
        pki::node_request().map_err(io::Error::other)
    }

    fn keep(&self, key_pem: &str, certificate: &NodeCertificate) -> io::Result<()> {
        let old = Credentials::load(&self.layout).map_err(io::Error::other)?;
        let server = old.as_ref().map_or("", |c| c.server.as_str());
        let name = old.as_ref().map_or("", |c| c.name.as_str());
        Credentials::of(server, name, key_pem.into(), certificate.clone()).write(&self.layout)
    }
}

/// Two thirds of the usual life from now: for a certificate that was made here.
pub fn made_now() -> (Timestamp, Timestamp) {
    let now = clock::system().now();
    let after = |span: std::time::Duration| {
        let micros = i64::try_from(span.as_micros()).unwrap_or(i64::MAX);
        Timestamp::from_micros(now.as_micros().saturating_add(micros))
    };
    (after(pki::NODE_LIFE * 2 / 3), after(pki::NODE_LIFE))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn issued(n: u8) -> NodeCertificate {
        NodeCertificate {
            id: NodeId(uuid::Uuid::from_u128(7)),
            name: "n2".into(),
            certificate_pem: format!("certificate {n}"),
            ca_pem: "ca".into(),
            renew_at: Timestamp::from_micros(2_000_000),
            expires_at: Timestamp::from_micros(3_000_000),
        }
    }

    fn layout() -> (tempfile::TempDir, Layout) {
        let dir = tempfile::tempdir().unwrap();
        let layout = Layout::new(dir.path().to_path_buf());
        std::fs::create_dir_all(layout.node()).unwrap();
        (dir, layout)
    }

    #[test]
    fn renewing_keeps_who_the_node_is() {
        let (_dir, layout) = layout();
        assert!(Credentials::load(&layout).unwrap().is_none());
        let (key, _) = joining_key(&layout).unwrap();
        assert_eq!(joining_key(&layout).unwrap().0, key, "an interrupted join asks with the same key");
        let first = Credentials::of("https://s:1", "n2", key, issued(1));
        first.save(&layout).unwrap();
        assert_ne!(joining_key(&layout).unwrap().0, first.key_pem, "the key is used up");
        first.renewal(&layout).keys.keep("key 2", &issued(2)).unwrap();
        let found = Credentials::load(&layout).unwrap().unwrap();
        assert_eq!(
            (found.server.as_str(), found.name.as_str(), found.key_pem.as_str()),
            ("https://s:1", "n2", "key 2")
        );
        assert_eq!(found.certificate_pem, "certificate 2");
        assert!(
            !found.has_ended(Timestamp::from_micros(2_999_999)) && found.has_ended(Timestamp::from_micros(3_000_000))
        );
    }

    #[test]
    fn the_files_of_an_older_version_are_read() {
        let (_dir, layout) = layout();
        let id = serde_json::json!({"id": issued(1).id});
        std::fs::write(layout.node().join("node.json"), id.to_string()).unwrap();
        assert!(Credentials::load(&layout).unwrap().is_none());
        for name in ["node.pem", "node.key", "ca.pem"] {
            std::fs::write(layout.node().join(name), name).unwrap();
        }
        let found = Credentials::load(&layout).unwrap().unwrap();
        assert_eq!(found.key_pem, "node.key");
        assert!(!found.has_ended(Timestamp::from_micros(i64::MAX)), "it is not known when it ends");
        found.save(&layout).unwrap();
        assert!(!layout.node().join("node.key").exists());
    }
}
