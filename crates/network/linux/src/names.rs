//! Names of everything this driver makes, so that it can be found again and never meets that of another data directory.

use std::path::{Path, PathBuf};

use oblak_model::{InstanceId, NetworkId, PortId};
use oblak_network::PortKind;
use sha2::{Digest, Sha256};

use crate::sys::link::Mac;

/// The bridge in a network's namespace.
pub(crate) const BRIDGE: &str = "br0";
/// The network's end of its uplink.
pub(crate) const UPLINK: &str = "up0";
/// The network's tunnel to other nodes.
pub(crate) const OVERLAY: &str = "vx0";
/// Table of a network, in its namespace, in the families `bridge` and `inet`.
pub(crate) const TABLE: &str = "oblak";

const NETWORK_PREFIX: &str = "oblak-n-";
const INSTANCE_PREFIX: &str = "oblak-i-";
const USER_PREFIX: &str = "oblak-u-";

/// Names below one data directory.
#[derive(Clone, Debug)]
pub(crate) struct Names {
    tag: String,
    netns: PathBuf,
}

impl Names {
    /// For a data directory (absolute, links resolved), with namespaces mounted below `run`.
    pub(crate) fn new(data: &Path, run: &Path) -> Self {
        let digest = Sha256::digest(data.as_os_str().as_encoded_bytes());
        let tag: String = digest.iter().take(4).map(|b| format!("{b:02x}")).collect();
        let netns = run.join(&tag).join("netns");
        Self { tag, netns }
    }

    /// Tells this data directory from all others on the machine.
    pub(crate) fn tag(&self) -> &str {
        &self.tag
    }
    /// Where namespaces are mounted.
    pub(crate) fn netns_dir(&self) -> &Path {
        &self.netns
    }
    pub(crate) fn network_ns(&self, id: NetworkId) -> PathBuf {
        self.netns.join(format!("{NETWORK_PREFIX}{}", id.short()))
    }
    /// `short` is that of an instance's id.
    pub(crate) fn instance_ns(&self, short: &str) -> PathBuf {
        self.netns.join(format!("{INSTANCE_PREFIX}{short}"))
    }
    /// The user namespace that owns [`Self::instance_ns`], beside it.
    pub(crate) fn user_ns(&self, short: &str) -> PathBuf {
        self.netns.join(format!("{USER_PREFIX}{short}"))
    }
    /// Our table in the host's namespace.
    pub(crate) fn host_table(&self) -> String {
        format!("oblak_{}", self.tag)
    }
}

/// Whether a file below [`Names::netns_dir`] is the namespace of a network.
pub(crate) fn is_network_ns(file: &str) -> bool {
    file.starts_with(NETWORK_PREFIX)
}

/// The short id of the instance to which a file below [`Names::netns_dir`] belongs.
pub(crate) fn instance_of(file: &str) -> Option<&str> {
    file.strip_prefix(INSTANCE_PREFIX).or_else(|| file.strip_prefix(USER_PREFIX))
}

/// The host's end of a network's uplink.
pub(crate) fn uplink(id: NetworkId) -> String {
    format!("ou{}", id.short())
}

/// The device of a local port in the network's namespace.
pub(crate) fn device(id: PortId, kind: PortKind) -> String {
    format!("{}{}", if kind == PortKind::Tap { 't' } else { 'v' }, id.short())
}

/// The kind of port that has a device of this name.
pub(crate) fn device_kind(name: &str) -> Option<PortKind> {
    let kind = match name.as_bytes().first()? {
        b't' => PortKind::Tap,
        b'v' => PortKind::Netns,
        _ => return None,
    };
    (name.len() == 11 && name[1..].bytes().all(|b| b.is_ascii_hexdigit())).then_some(kind)
}

/// The interface inside an instance.
pub(crate) fn guest_device(index: u32) -> String {
    format!("eth{index}")
}

/// A fixed, locally administered address for the bridge, so that it does not change with its ports.
pub(crate) fn bridge_mac(id: NetworkId) -> Mac {
    let b = id.0.as_bytes();
    [0x02, b[11], b[12], b[13], b[14], b[15]]
}

/// What a finished port carries as its alias: who it is and which settings were applied.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct PortAlias {
    pub(crate) port: PortId,
    pub(crate) instance: InstanceId,
    pub(crate) mac: Mac,
    pub(crate) settings: String,
}

impl PortAlias {
    pub(crate) fn format(&self) -> String {
        format!("oblak {} {} {} {}", self.port, self.instance, mac_text(self.mac), self.settings)
    }

    pub(crate) fn parse(text: &str) -> Option<Self> {
        let mut words = text.strip_prefix("oblak ")?.split(' ');
        Some(Self {
            port: words.next()?.parse().ok()?,
            instance: words.next()?.parse().ok()?,
            mac: parse_mac(words.next()?)?,
            settings: words.next()?.to_string(),
        })
    }
}

/// The alias of a bridge.
pub(crate) fn bridge_alias(id: NetworkId) -> String {
    format!("oblak {id}")
}

/// The network of a bridge's alias.
pub(crate) fn parse_bridge_alias(text: &str) -> Option<NetworkId> {
    text.strip_prefix("oblak ")?.parse().ok()
}

/// `aa:bb:cc:dd:ee:ff` to bytes.
pub(crate) fn parse_mac(text: &str) -> Option<Mac> {
    let mut mac = [0; 6];
    let mut parts = text.split(':');
    for byte in &mut mac {
        let part = parts.next().filter(|p| p.len() == 2 && p.bytes().all(|b| b.is_ascii_hexdigit()))?;
        *byte = u8::from_str_radix(part, 16).ok()?;
    }
    parts.next().is_none().then_some(mac)
}

/// Bytes to `aa:bb:cc:dd:ee:ff`.
pub(crate) fn mac_text(mac: Mac) -> String {
    mac.map(|b| format!("{b:02x}")).join(":")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn macs() {
        assert_eq!(parse_mac("02:aB:00:00:00:ff").map(mac_text).as_deref(), Some("02:ab:00:00:00:ff"));
        for bad in
            ["", "02:ab:00:00:00", "02:ab:00:00:00:ff:00", "02:ab:00:00:00:+f", "2:ab:00:00:00:ff", "02-ab-00-00-00-ff"]
        {
            assert_eq!(parse_mac(bad), None, "{bad}");
        }
    }

    #[test]
    fn aliases_round_trip() {
        let alias = PortAlias {
            port: uuid::Uuid::new_v4().into(),
            instance: uuid::Uuid::new_v4().into(),
            mac: [2, 0, 0, 0, 0, 1],
            settings: "0011".into(),
        };
        assert_eq!(PortAlias::parse(&alias.format()), Some(alias));
        assert_eq!(PortAlias::parse("oblak x y z w"), None);
    }

    #[test]
    fn device_names_fit_and_tell_their_kind() {
        let id: PortId = uuid::Uuid::new_v4().into();
        for kind in [PortKind::Tap, PortKind::Netns] {
            assert!(device(id, kind).len() < 16);
            assert_eq!(device_kind(&device(id, kind)), Some(kind));
        }
        assert_eq!(device_kind("br0"), None);
        assert_eq!(device_kind("tunl0"), None);
        assert_eq!(device_kind("veth"), None);
    }
}
