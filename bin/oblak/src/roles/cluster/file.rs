//! Who this member is: `etcd/member.json`. Where it exists, the state is in etcd.

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use oblak_identity::members::MemberFiles;
use oblak_platform::fsx;
use oblak_platform::layout::Layout;
use oblak_store_etcd::members::votes_wanted;
use oblak_store_etcd::supervise::{Certificates, Founding, Settings, client_url, peer_url};
use oblak_store_etcd::{EtcdOptions, Tls};
use serde::{Deserialize, Serialize};

use crate::args::EtcdArgs;
use crate::roles::node_name;

const FILE: &str = "member.json";
/// etcd recommends no more than 8 GiB; a cloud of 100,000 instances needs less than one.
pub const QUOTA_BYTES: u64 = 4 << 30;

/// A member of the cluster, on this machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemberFile {
    /// Name of the server.
    pub name: String,
    /// Address at which the other servers reach it.
    pub address: IpAddr,
    /// Port of etcd for clients.
    pub client_port: u16,
    /// Port of etcd for other members.
    pub peer_port: u16,
    /// How it came into being.
    pub founding: Founding,
    /// Whether it has.
    pub founded: bool,
    /// Below which text the keys lie.
    pub prefix: String,
    /// Largest size of the database in bytes.
    pub quota_bytes: u64,
    /// Where the members answer clients, as last seen.
    pub endpoints: Vec<String>,
    /// Incarnation of the store when it is made here.
    #[serde(default = "first")]
    pub first_incarnation: u32,
    /// The command that is filling the store; until it has, no server starts on it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub filling: Option<String>,
    /// The other servers have removed it.
    #[serde(default)]
    pub removed: bool,
}

fn first() -> u32 {
    1
}

/// Directory of everything of etcd.
pub fn dir(layout: &Layout) -> PathBuf {
    layout.root().join("etcd")
}

impl MemberFile {
    /// Reads it; `None` when the state of this machine is not in an etcd of its own.
    pub fn load(layout: &Layout) -> Result<Option<Self>> {
        fsx::read_json(&dir(layout).join(FILE)).context("cannot read who this member of etcd is")
    }

    /// Keeps it.
    pub fn save(&self, layout: &Layout) -> Result<()> {
        let dir = dir(layout);
        fsx::create_dir_private(&dir, 0o700).with_context(|| format!("cannot make {}", dir.display()))?;
        fsx::write_json(&dir.join(FILE), self).context("cannot write who this member of etcd is")
    }

    /// The first member of a new cluster.
    pub fn first(args: &EtcdArgs, layout: &Layout) -> Result<Self> {
        let address = match args.advertise {
            Some(address) => address,
            None => own_address()?,
        };
        // The same in every attempt to make this cloud, another for every cloud.
        let token = format!("oblak-{}", uuid_of(layout)?);
        Ok(Self {
            name: node_name(args.member_name.as_deref())?,
            address,
            client_port: args.client_port,
            peer_port: args.peer_port,
            founding: Founding::New { token },
            founded: false,
            prefix: args.prefix.clone(),
            quota_bytes: args.quota.map_or(QUOTA_BYTES, oblak_model::Size::as_u64),
            endpoints: vec![client_url(address, args.client_port)],
            first_incarnation: 1,
            filling: None,
            removed: false,
        })
    }

    /// The store is filled: servers may start on it.
    pub fn filled(layout: &Layout) -> Result<()> {
        match Self::load(layout)? {
            Some(file) if file.filling.is_some() => Self { filling: None, ..file }.save(layout),
            _ => Ok(()),
        }
    }

    /// Where peers reach it.
    pub fn peer_url(&self) -> String {
        peer_url(self.address, self.peer_port)
    }

    /// Where clients reach it.
    pub fn client_url(&self) -> String {
        client_url(self.address, self.client_port)
    }

    /// For the supervisor.
    pub fn settings(&self, layout: &Layout) -> Settings {
        let MemberFiles { ca, certificate, key } = MemberFiles::of(&layout.pki());
        Settings {
            dir: dir(layout),
            name: self.name.clone(),
            address: self.address,
            client_port: self.client_port,
            peer_port: self.peer_port,
            founding: self.founding.clone(),
            founded: self.founded,
            certificates: Certificates { ca, certificate, key },
            quota_bytes: self.quota_bytes,
        }
    }

    /// For the store: the own member first, as far as it may answer.
    pub fn options(&self, layout: &Layout) -> Result<EtcdOptions> {
        let files = MemberFiles::of(&layout.pki());
        let read = |path: &PathBuf| std::fs::read(path).with_context(|| format!("cannot read {}", path.display()));
        let mut endpoints = self.endpoints.clone();
        let own = self.client_url();
        if let Some(at) = endpoints.iter().position(|url| *url == own) {
            // Learners come last, and answer nobody; odd numbers of members all vote.
            if at < votes_wanted(endpoints.len()) {
                endpoints.swap(0, at);
            }
        } else {
            endpoints.push(own);
        }
        let mut options = EtcdOptions::new(endpoints);
        options.prefix.clone_from(&self.prefix);
        options.first_incarnation = self.first_incarnation;
        options.tls = Some(Tls {
            ca: read(&files.ca)?,
            identity: Some((read(&files.certificate)?, read(&files.key)?)),
            server_name: None,
        });
        Ok(options)
    }
}

/// A random text that stays the same until the member exists.
fn uuid_of(layout: &Layout) -> Result<String> {
    let path = dir(layout).join("token");
    fsx::create_dir_private(&dir(layout), 0o700).context("cannot make the directory of etcd")?;
    if let Ok(known) = std::fs::read_to_string(&path) {
        return Ok(known);
    }
    let made =
        oblak_platform::random::uuid7(oblak_platform::random::system().as_ref(), oblak_platform::clock::system().now())
            .simple()
            .to_string();
    fsx::write_atomic(&path, made.as_bytes(), 0o600).with_context(|| format!("cannot write {}", path.display()))?;
    Ok(made)
}

/// The address from which this machine would send to `to`. Nothing is sent.
pub fn address_towards(to: SocketAddr) -> Option<IpAddr> {
    let any: SocketAddr = if to.is_ipv4() { ([0; 4], 0).into() } else { ([0u16; 8], 0).into() };
    let socket = UdpSocket::bind(any).ok()?;
    socket.connect(to).ok()?;
    socket.local_addr().ok().map(|address| address.ip()).filter(|ip| !ip.is_unspecified())
}

/// The address at which others reach this machine: that of the default route, or the only one there is.
fn own_address() -> Result<IpAddr> {
    // An address for documentation (RFC 5737): every route to it is the default route.
    if let Some(ip) = address_towards(([192, 0, 2, 1], 9).into()).filter(|ip| !ip.is_loopback()) {
        return Ok(ip);
    }
    let mut found: Vec<IpAddr> = oblak_identity::pki::local_names()
        .iter()
        .filter_map(|name| name.parse().ok())
        .filter(|ip: &IpAddr| !ip.is_loopback())
        .collect();
    found.sort();
    match found.as_slice() {
        [one] => Ok(*one),
        [] => bail!("this machine has no address that other servers could reach; give --advertise ADDRESS"),
        many => {
            let many: Vec<_> = many.iter().map(ToString::to_string).collect();
            bail!(
                "this machine has several addresses ({}); say with --advertise which one other servers reach",
                many.join(", ")
            )
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn member(endpoints: &[&str]) -> MemberFile {
        MemberFile {
            name: "n2".into(),
            address: "192.0.2.2".parse().unwrap(),
            client_port: 2379,
            peer_port: 2380,
            founding: Founding::New { token: "t".into() },
            founded: true,
            prefix: "oblak/".into(),
            quota_bytes: QUOTA_BYTES,
            endpoints: endpoints.iter().map(ToString::to_string).collect(),
            first_incarnation: 1,
            filling: None,
            removed: false,
        }
    }

    #[test]
    fn a_voter_asks_itself_first_and_a_learner_last() {
        let dir = tempfile::tempdir().unwrap();
        let layout = Layout::new(dir.path());
        std::fs::create_dir_all(layout.pki()).unwrap();
        for name in ["etcd-ca.pem", "etcd.pem", "etcd.key"] {
            std::fs::write(layout.pki().join(name), name).unwrap();
        }
        let [a, b, c] = ["https://192.0.2.1:2379", "https://192.0.2.2:2379", "https://192.0.2.3:2379"];
        let order = |endpoints: &[&str]| member(endpoints).options(&layout).unwrap().endpoints;
        assert_eq!(order(&[a, b]), [a, b], "of two the second learns");
        assert_eq!(order(&[b, a]), [b, a]);
        assert_eq!(order(&[a, b, c]), [b, a, c]);
        assert_eq!(order(&[a, c, b]), [b, c, a]);
        assert_eq!(order(&[a]), [a, b], "not seen among them yet");
        let file = member(&[a, b]);
        file.save(&layout).unwrap();
        assert_eq!(MemberFile::load(&layout).unwrap(), Some(file));
    }
}
