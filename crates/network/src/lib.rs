//! Networks on one node: the trait [`NetworkDriver`], the plain whole-state types it speaks, a fake and the conformance suite.
//!
//! A driver is always given the *whole* wanted state of a network on this node and makes the world equal to it.
//!
//! Invariant: knows nothing of the store, the API or of guests beyond a port's handle.
//!
//! Start reading at [`NetworkDriver`] and [`NetworkPlan`].

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use async_trait::async_trait;
use ipnet::IpNet;
use oblak_model::{InstanceId, NetworkId, PortId};
use oblak_platform::driver::{Availability, BoxDuplex, DriverResult};
use serde::{Deserialize, Serialize};

pub mod conformance;
pub mod fake;
pub mod overlay;

pub use overlay::{Overlay, OverlayPlan, Underlay};

/// What the network driver can do on this node.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Capabilities {
    /// Whether networks can be made at all.
    pub available: bool,
    /// nft, ip, bridge, tap, ... each with version or reason.
    pub probed: Vec<Availability>,
}

/// The whole wanted state of one network on this node.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct NetworkPlan {
    /// The network.
    pub id: NetworkId,
    /// Its name, the search domain of its guests is `<name>.<project>.oblak.internal`.
    pub name: String,
    /// Its project.
    pub project: String,
    /// MTU in bytes.
    pub mtu: u16,
    /// Whether guests reach the outside through NAT.
    pub nat: bool,
    /// Subnets.
    pub subnets: Vec<SubnetPlan>,
    /// Every port of the network, here and elsewhere (names and addresses of the others are needed by DNS and security groups).
    pub ports: Vec<PortPlan>,
    /// DNS servers asked for names outside; empty means those of the host's resolv.conf.
    pub forwarders: Vec<IpAddr>,
    /// How ports on other nodes are reached; `None` where they are not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub overlay: Option<OverlayPlan>,
}

/// One subnet.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SubnetPlan {
    /// Address range.
    pub cidr: IpNet,
    /// The address of the gateway on this bridge, which also answers DHCP and DNS.
    pub gateway: IpAddr,
    /// DHCP lease time in seconds.
    pub lease_s: u32,
}

/// What is on the guest's side of a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PortKind {
    /// A tap for a machine.
    Tap,
    /// An interface inside a network namespace made for the instance, addresses and routes set.
    Netns,
    /// On another node, or not to be plugged here now.
    Remote,
}

/// One port.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PortPlan {
    /// The port.
    pub id: PortId,
    /// Its instance. All Netns ports of one instance share one network namespace, also across networks.
    pub instance: InstanceId,
    /// Position among the instance's interfaces: 0 becomes `eth0` and carries the default route.
    pub index: u32,
    /// What the guest's side is.
    pub kind: PortKind,
    /// MAC address, `aa:bb:cc:dd:ee:ff`.
    pub mac: String,
    /// Fixed addresses; sources other than these (and this MAC) are dropped.
    pub addresses: Vec<IpAddr>,
    /// Host name; DNS answers it, and `<hostname>.<domain>`, and PTR.
    pub hostname: String,
    /// What may come in; replies always may. Out is allowed unless `egress` says otherwise.
    pub ingress: Vec<Rule>,
    /// What may go out; `None` allows all.
    pub egress: Option<Vec<Rule>>,
    /// Host ports that lead here.
    pub publish: Vec<PublishPlan>,
    /// What the metadata service tells this port's guest.
    pub metadata: Option<InstanceMetadata>,
    /// First of the 65,536 host ids of the user namespace that owns the instance's network namespace, so that capabilities
    /// inside reach the network; `None` for the initial one. Only asked when the namespace is made, and only of [`PortKind::Netns`].
    #[serde(default)]
    pub userns: Option<u32>,
    /// For [`PortKind::Remote`]: the underlay address of the node that has it; `None` when it is not to be reached.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tunnel: Option<IpAddr>,
    /// For [`PortKind::Remote`]: its machine may come to this node. Its tap is made and has a handle, but is not plugged in.
    #[serde(default)]
    pub standby: bool,
    /// It came from another node while it ran: TCP of connections that this node has not seen begin passes in both directions, except
    /// for segments that would open one.
    #[serde(default)]
    pub midstream: bool,
}

/// One allowed flow.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rule {
    /// `None` for any.
    pub protocol: Option<Protocol>,
    /// First and last port, for TCP and UDP.
    pub ports: Option<(u16, u16)>,
    /// Peers; empty for any. A security group as peer is resolved to addresses by the caller.
    pub peers: Vec<IpNet>,
}

/// Transport protocols of rules.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// ICMP and ICMPv6.
    Icmp,
}

/// One published port.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PublishPlan {
    /// Address of the host to listen on; unspecified means all, loopback included.
    pub host: SocketAddr,
    /// Port of the guest.
    pub guest_port: u16,
    /// TCP or UDP.
    pub protocol: Protocol,
}

/// Data for the metadata service at 169.254.169.254.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct InstanceMetadata {
    /// The instance.
    pub instance: InstanceId,
    /// Its name.
    pub name: String,
    /// Its project.
    pub project: String,
    /// OpenSSH public keys: name to line.
    pub public_keys: BTreeMap<String, String>,
    /// User data as given, if any.
    pub user_data: Option<String>,
    /// Zone of the node.
    pub availability_zone: String,
    /// Flavor name.
    pub instance_type: String,
    /// Labels, shown as OpenStack `meta`.
    pub meta: BTreeMap<String, String>,
}

/// What was made for a local port.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum PortHandle {
    /// A persistent tap.
    Tap {
        /// Network namespace of the network.
        netns: PathBuf,
        /// Interface name.
        device: String,
        /// Made with IFF_VNET_HDR.
        vnet_hdr: bool,
    },
    /// A namespace for the instance.
    Netns {
        /// Its path.
        netns: PathBuf,
        /// Text for the guest's /etc/resolv.conf.
        resolv_conf: String,
        /// The user namespace that owns it, to be joined together with it; `None` when that is the initial one.
        #[serde(default)]
        userns: Option<PathBuf>,
    },
}

/// What exists of a network on this node.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct NetworkHandle {
    /// Handles of the local ports.
    pub ports: BTreeMap<PortId, PortHandle>,
    /// Host ports that could not be taken: (port, host address, reason).
    pub refused: Vec<(PortId, SocketAddr, String)>,
    /// Namespace of the network, when there is one.
    pub netns: Option<PathBuf>,
}

/// Counters of a port, from the guest's view.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortCounters {
    /// Bytes into the guest.
    pub rx_bytes: u64,
    /// Bytes out of the guest.
    pub tx_bytes: u64,
    /// Packets into the guest.
    pub rx_packets: u64,
    /// Packets out of the guest.
    pub tx_packets: u64,
}

/// Makes networks on this node. Every call may be repeated and cancelled; nothing is remembered only in memory.
#[async_trait]
pub trait NetworkDriver: Send + Sync + 'static {
    /// Short name: `linux`, `fake`.
    fn name(&self) -> &'static str;

    /// Looks at the machine.
    async fn probe(&self) -> Capabilities;

    /// Makes the node equal to the plan: makes what is missing, changes what differs, removes local ports that are not in it.
    /// Flows of ports that did not change are not disturbed.
    async fn ensure(&self, plan: &NetworkPlan) -> DriverResult<NetworkHandle>;

    /// What exists now; `None` when the network is not on this node.
    async fn observe(&self, id: NetworkId) -> DriverResult<Option<NetworkHandle>>;

    /// Networks that have anything on this node.
    async fn list(&self) -> DriverResult<Vec<NetworkId>>;

    /// Removes everything of the network from this node. Fine when there is nothing.
    async fn remove(&self, id: NetworkId) -> DriverResult<()>;

    /// Counters of the local ports of a network.
    async fn counters(&self, id: NetworkId) -> DriverResult<BTreeMap<PortId, PortCounters>>;

    /// A TCP connection from inside the network to one of its guests on this node (this is how port-forward reaches a tenant network).
    async fn dial(&self, id: NetworkId, to: SocketAddr) -> DriverResult<BoxDuplex>;

    /// Makes sure that the node's netd runs (DHCP, DNS, metadata). It outlives the caller.
    async fn ensure_services(&self) -> DriverResult<()>;

    /// Ends the node's netd. Fine when it does not run.
    async fn stop_services(&self) -> DriverResult<()>;

    /// The ability to carry networks between nodes. Without it plans with an overlay are refused as unsupported.
    fn overlay(&self) -> Option<&dyn Overlay> {
        None
    }
}
