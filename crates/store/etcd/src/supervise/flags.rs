//! What etcd is told. Pure. Flags are those of etcd 3.4 (`etcd --help`).

use std::net::IpAddr;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// How the member comes into being.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Founding {
    /// The first of a new cluster. The token keeps clusters with the same addresses apart.
    New {
        /// Unique text.
        token: String,
    },
    /// One more of a cluster that exists: names and peer URLs of all, this one included.
    Joining {
        /// Name and peer URL.
        members: Vec<(String, String)>,
    },
}

/// Files in PEM. One certificate serves as server, peer and client.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Certificates {
    /// The authority of etcd.
    pub ca: PathBuf,
    /// Certificate of this member.
    pub certificate: PathBuf,
    /// Its key.
    pub key: PathBuf,
}

/// A member on this machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Directory of everything of this etcd.
    pub dir: PathBuf,
    /// Name of the member.
    pub name: String,
    /// Address at which the other servers reach this one.
    pub address: IpAddr,
    /// Port for clients.
    pub client_port: u16,
    /// Port for other members.
    pub peer_port: u16,
    /// How it comes into being.
    pub founding: Founding,
    /// Whether it has come into being: then it must have data.
    pub founded: bool,
    /// TLS.
    pub certificates: Certificates,
    /// Largest size of the database in bytes; above it etcd takes no writes (alarm NOSPACE).
    pub quota_bytes: u64,
}

/// Where clients reach a member.
#[must_use]
pub fn client_url(address: IpAddr, port: u16) -> String {
    url(address, port)
}

/// Where members reach a member.
#[must_use]
pub fn peer_url(address: IpAddr, port: u16) -> String {
    url(address, port)
}

fn url(address: IpAddr, port: u16) -> String {
    match address {
        IpAddr::V4(ip) => format!("https://{ip}:{port}"),
        IpAddr::V6(ip) => format!("https://[{ip}]:{port}"),
    }
}

impl Settings {
    /// etcd's own data.
    #[must_use]
    pub fn data(&self) -> PathBuf {
        self.dir.join("data")
    }

    /// What etcd says.
    #[must_use]
    pub fn log(&self) -> PathBuf {
        self.dir.join("etcd.log")
    }

    /// The command line.
    #[must_use]
    pub fn flags(&self) -> Vec<String> {
        let (client, peer) = (client_url(self.address, self.client_port), peer_url(self.address, self.peer_port));
        let (state, members, token) = match &self.founding {
            Founding::New { token } => ("new", format!("{}={peer}", self.name), token.as_str()),
            Founding::Joining { members } => {
                let all: Vec<_> = members.iter().map(|(name, url)| format!("{name}={url}")).collect();
                ("existing", all.join(","), "")
            }
        };
        let Certificates { ca, certificate, key } = &self.certificates;
        let (ca, certificate, key) = (ca.display(), certificate.display(), key.display());
        let mut flags = vec![
            format!("--name={}", self.name),
            format!("--data-dir={}", self.data().display()),
            format!("--listen-client-urls={client}"),
            format!("--advertise-client-urls={client}"),
            format!("--listen-peer-urls={peer}"),
            format!("--initial-advertise-peer-urls={peer}"),
            format!("--initial-cluster={members}"),
            format!("--initial-cluster-state={state}"),
            format!("--trusted-ca-file={ca}"),
            format!("--cert-file={certificate}"),
            format!("--key-file={key}"),
            "--client-cert-auth".into(),
            format!("--peer-trusted-ca-file={ca}"),
            format!("--peer-cert-file={certificate}"),
            format!("--peer-key-file={key}"),
            "--peer-client-cert-auth".into(),
            // The gateway would be a client of its own server, with the rights of its certificate, for everybody who connects.
            "--enable-grpc-gateway=false".into(),
            // A member that comes back from a cut network does not disturb the leader.
            "--pre-vote".into(),
            format!("--quota-backend-bytes={}", self.quota_bytes),
            // The default of 100,000 keeps a hundred times our largest transaction in memory.
            "--snapshot-count=10000".into(),
            "--logger=zap".into(),
            "--log-outputs=stderr".into(),
        ];
        if !token.is_empty() {
            flags.push(format!("--initial-cluster-token={token}"));
        }
        flags
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(founding: Founding) -> Settings {
        Settings {
            dir: "/d/etcd".into(),
            name: "n1".into(),
            address: "192.0.2.1".parse().unwrap(),
            client_port: 2379,
            peer_port: 2380,
            founding,
            founded: false,
            certificates: Certificates { ca: "/d/ca".into(), certificate: "/d/c".into(), key: "/d/k".into() },
            quota_bytes: 1 << 31,
        }
    }

    #[test]
    fn a_new_cluster_has_one_member_and_a_joining_one_names_all() {
        let new = settings(Founding::New { token: "t".into() }).flags();
        for flag in ["--initial-cluster=n1=https://192.0.2.1:2380", "--initial-cluster-state=new", "--client-cert-auth"]
        {
            assert!(new.iter().any(|f| f == flag), "{flag} in {new:?}");
        }
        let members =
            vec![("n0".into(), "https://192.0.2.9:2380".into()), ("n1".into(), "https://192.0.2.1:2380".into())];
        let joining = settings(Founding::Joining { members }).flags();
        let all = "--initial-cluster=n0=https://192.0.2.9:2380,n1=https://192.0.2.1:2380";
        assert!(joining.iter().any(|f| f == all) && joining.iter().any(|f| f == "--initial-cluster-state=existing"));
        assert!(!joining.iter().any(|f| f.contains("token")));
    }

    #[test]
    fn addresses_of_both_kinds_make_urls() {
        assert_eq!(client_url("::1".parse().unwrap(), 1), "https://[::1]:1");
        assert_eq!(peer_url("10.0.0.1".parse().unwrap(), 2), "https://10.0.0.1:2");
    }
}
