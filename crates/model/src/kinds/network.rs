//! Networks, subnets, ports and security groups.

use std::net::IpAddr;

use ipnet::IpNet;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::id::{InstanceId, NetworkId, NodeId, SecurityGroupId, SubnetId};
use crate::object::{Kind, Object, Scope};
use crate::time::Span;
use crate::validate::Problems;

/// Name of the network and security group that every project has.
pub const DEFAULT_NETWORK: &str = "default";
/// Name of the security group that every project has.
pub const DEFAULT_SECURITY_GROUP: &str = "default";

/// Kind of networks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NetworkKind;
/// A private layer-2 network.
pub type Network = Object<NetworkKind>;

/// What is asked for of a network.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct NetworkSpec {
    /// The most that guests may send at once, in bytes. Where nodes carry the network between them it is less, as their underlay allows.
    #[serde(default = "default_mtu")]
    pub mtu: u16,
    /// Whether guests reach the outside.
    #[serde(default = "yes")]
    pub nat: bool,
    /// DNS servers for names outside; the node's own when empty.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub dns_forwarders: Vec<IpAddr>,
}

fn default_mtu() -> u16 {
    1500
}
fn yes() -> bool {
    true
}

impl Default for NetworkSpec {
    fn default() -> Self {
        Self { mtu: default_mtu(), nat: true, dns_forwarders: Vec::new() }
    }
}

/// What is, of a network.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct NetworkStatus {
    /// Number of the network between nodes (VXLAN network identifier), given when it is made; no two networks of a cloud share one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vni: Option<u32>,
}

impl Kind for NetworkKind {
    const KIND: &'static str = "network";
    const PLURAL: &'static str = "networks";
    const SCOPE: Scope = Scope::Project;
    const ALIASES: &'static [&'static str] = &["net"];
    type Spec = NetworkSpec;
    type Status = NetworkStatus;
    fn validate(spec: &NetworkSpec, problems: &mut Problems) {
        problems.require((1280..=9000).contains(&spec.mtu), "/spec/mtu", "must be 1280 to 9000");
        problems.require(spec.dns_forwarders.len() <= 3, "/spec/dns_forwarders", "has more than 3 entries");
    }
}

/// Kind of subnets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SubnetKind;
/// An address range of a network.
pub type Subnet = Object<SubnetKind>;

/// What is asked for of a subnet.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SubnetSpec {
    /// Network name.
    pub network: String,
    /// Address range, for example `10.80.0.0/24`.
    #[schemars(with = "String")]
    pub cidr: IpNet,
    /// Gateway; the first address when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gateway: Option<IpAddr>,
    /// First and last address that is given out by itself; all when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pool: Option<(IpAddr, IpAddr)>,
    /// DHCP lease.
    #[serde(default = "default_lease")]
    pub lease: Span,
}

fn default_lease() -> Span {
    Span::secs(3600)
}

impl SubnetSpec {
    /// A subnet with defaults.
    #[must_use]
    pub fn new(network: &str, cidr: IpNet) -> Self {
        Self { network: network.into(), cidr, gateway: None, pool: None, lease: default_lease() }
    }
    /// The gateway with the default filled in.
    #[must_use]
    pub fn gateway_address(&self) -> IpAddr {
        self.gateway.unwrap_or_else(|| nth_address(&self.cidr, 1))
    }
    /// Whether an address may be given to a port: in range, not the network's own, the gateway or broadcast.
    #[must_use]
    pub fn is_assignable(&self, address: IpAddr) -> bool {
        let cidr = self.cidr.trunc();
        cidr.contains(&address)
            && address != cidr.network()
            && !(matches!(cidr, IpNet::V4(_)) && address == cidr.broadcast())
            && address != self.gateway_address()
    }
    /// First and last address that is given out by itself.
    #[must_use]
    pub fn pool_range(&self) -> (IpAddr, IpAddr) {
        self.pool.unwrap_or_else(|| {
            let last = match self.cidr.trunc() {
                IpNet::V4(_) => match self.cidr.broadcast() {
                    IpAddr::V4(b) => IpAddr::V4(u32::from(b).saturating_sub(1).into()),
                    v6 @ IpAddr::V6(_) => v6,
                },
                IpNet::V6(_) => self.cidr.broadcast(),
            };
            (nth_address(&self.cidr, 2), last)
        })
    }
}

/// The `n`th address of a range, saturating at the end of the address space.
#[must_use]
pub fn nth_address(cidr: &IpNet, n: u32) -> IpAddr {
    match cidr.trunc().network() {
        IpAddr::V4(a) => IpAddr::V4(u32::from(a).saturating_add(n).into()),
        IpAddr::V6(a) => IpAddr::V6(u128::from(a).saturating_add(u128::from(n)).into()),
    }
}

/// What is, of a subnet.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct SubnetStatus {
    /// The network.
    #[serde(default)]
    pub network: NetworkId,
}

impl Kind for SubnetKind {
    const KIND: &'static str = "subnet";
    const PLURAL: &'static str = "subnets";
    const SCOPE: Scope = Scope::Project;
    type Spec = SubnetSpec;
    type Status = SubnetStatus;
    fn validate(spec: &SubnetSpec, problems: &mut Problems) {
        problems.add_some("/spec/network", crate::name::problem(&spec.network));
        problems.require(
            spec.cidr.trunc() == spec.cidr,
            "/spec/cidr",
            format!("has host bits set; write {}", spec.cidr.trunc()),
        );
        let (smallest, largest) = if matches!(spec.cidr, IpNet::V4(_)) { (8, 29) } else { (48, 120) };
        let bits = spec.cidr.prefix_len();
        problems.require(
            (smallest..=largest).contains(&bits),
            "/spec/cidr",
            format!("must have a prefix of {smallest} to {largest} bits"),
        );
        let reserved: [IpNet; 5] = ["169.254.0.0/16", "127.0.0.0/8", "224.0.0.0/4", "100.64.0.0/10", "0.0.0.0/8"]
            .map(|t| t.parse().expect("constant"));
        if let Some(bad) = reserved.iter().find(|r| r.contains(&spec.cidr) || spec.cidr.contains(*r)) {
            problems.add("/spec/cidr", format!("overlaps {bad}, which is reserved"));
        }
        if let Some(gateway) = spec.gateway {
            problems.require(spec.cidr.contains(&gateway), "/spec/gateway", "must lie in the subnet");
        }
        if let Some((first, last)) = spec.pool {
            let ok = spec.cidr.contains(&first) && spec.cidr.contains(&last) && first <= last;
            problems.require(ok, "/spec/pool", "must be two addresses of the subnet, the smaller first");
        }
    }
    fn validate_update(old: &SubnetSpec, new: &SubnetSpec, problems: &mut Problems) {
        problems.require(old.network == new.network, "/spec/network", "cannot change");
        problems.require(old.cidr == new.cidr, "/spec/cidr", "cannot change; make a new subnet");
        problems.require(old.gateway == new.gateway, "/spec/gateway", "cannot change");
    }
}

/// Kind of ports.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PortKind;
/// An interface of an instance in a network: MAC, addresses, security groups.
pub type Port = Object<PortKind>;

/// What is asked for of a port. Ports are made with their instance.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct PortSpec {
    /// Network name.
    pub network: String,
    /// The instance.
    pub instance: InstanceId,
    /// Position among the instance's interfaces.
    #[serde(default)]
    pub index: u32,
    /// Security group names.
    #[serde(default)]
    pub security_groups: Vec<String>,
}

/// What is, of a port.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct PortStatus {
    /// The network.
    #[serde(default)]
    pub network: NetworkId,
    /// The subnets of the addresses.
    #[serde(default)]
    pub subnets: Vec<SubnetId>,
    /// Addresses.
    #[serde(default)]
    pub addresses: Vec<IpAddr>,
    /// MAC address.
    #[serde(default)]
    pub mac: String,
    /// Host name of the instance.
    #[serde(default)]
    pub hostname: String,
    /// The groups.
    #[serde(default)]
    pub security_groups: Vec<SecurityGroupId>,
    /// Where the instance is placed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<NodeId>,
}

impl Kind for PortKind {
    const KIND: &'static str = "port";
    const PLURAL: &'static str = "ports";
    const SCOPE: Scope = Scope::Project;
    const CREATABLE: bool = false;
    type Spec = PortSpec;
    type Status = PortStatus;
    fn validate(spec: &PortSpec, problems: &mut Problems) {
        problems.add_some("/spec/network", crate::name::problem(&spec.network));
        problems.require(spec.security_groups.len() <= 16, "/spec/security_groups", "has more than 16 entries");
    }
    fn validate_update(old: &PortSpec, new: &PortSpec, problems: &mut Problems) {
        let same = (&old.network, old.instance, old.index) == (&new.network, new.instance, new.index);
        problems.require(same, "/spec", "only security_groups can change");
    }
}

/// Kind of security groups.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SecurityGroupKind;
/// Rules about what may reach, and leave, the ports that carry it. Stateful: replies always pass.
pub type SecurityGroup = Object<SecurityGroupKind>;

/// Which way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Direction {
    /// Into the port.
    #[default]
    Ingress,
    /// Out of the port.
    Egress,
}

/// Protocol of a rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum RuleProtocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// ICMP and ICMPv6.
    Icmp,
}

/// One allowed flow.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SecurityRule {
    /// Which way.
    #[serde(default)]
    pub direction: Direction,
    /// Protocol; any when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub protocol: Option<RuleProtocol>,
    /// First port (tcp, udp); all when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub port_min: Option<u16>,
    /// Last port; `port_min` when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub port_max: Option<u16>,
    /// Peers by address range; any when `group` is absent too.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<String>")]
    pub cidr: Option<IpNet>,
    /// Peers by security group of the same project.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group: Option<String>,
}

/// What is asked for of a security group.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SecurityGroupSpec {
    /// Free text.
    #[serde(default)]
    pub description: String,
    /// What is allowed. Without any egress rule everything may go out.
    #[serde(default)]
    pub rules: Vec<SecurityRule>,
}

/// What is, of a security group.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct SecurityGroupStatus {}

impl Kind for SecurityGroupKind {
    const KIND: &'static str = "security-group";
    const PLURAL: &'static str = "security-groups";
    const SCOPE: Scope = Scope::Project;
    const ALIASES: &'static [&'static str] = &["sg"];
    type Spec = SecurityGroupSpec;
    type Status = SecurityGroupStatus;
    fn validate(spec: &SecurityGroupSpec, problems: &mut Problems) {
        problems.require(spec.rules.len() <= 200, "/spec/rules", "has more than 200 rules");
        for (i, rule) in spec.rules.iter().enumerate() {
            let at = |field: &str| format!("/spec/rules/{i}/{field}");
            let ported = matches!(rule.protocol, Some(RuleProtocol::Tcp | RuleProtocol::Udp));
            problems.require(
                ported || (rule.port_min.is_none() && rule.port_max.is_none()),
                at("port_min"),
                "needs protocol tcp or udp",
            );
            problems.require(rule.port_max.is_none() || rule.port_min.is_some(), at("port_max"), "needs port_min");
            if let (Some(min), Some(max)) = (rule.port_min, rule.port_max) {
                problems.require(min <= max, at("port_max"), "must not be smaller than port_min");
            }
            problems.require(
                rule.cidr.is_none() || rule.group.is_none(),
                at("cidr"),
                "cannot be given together with group",
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges() {
        let s = SubnetSpec::new("default", "10.80.0.0/24".parse().unwrap());
        assert_eq!(s.gateway_address().to_string(), "10.80.0.1");
        assert_eq!(s.pool_range(), ("10.80.0.2".parse().unwrap(), "10.80.0.254".parse().unwrap()));
        assert!(s.is_assignable("10.80.0.2".parse().unwrap()));
        for bad in ["10.80.0.0", "10.80.0.1", "10.80.0.255", "10.81.0.2"] {
            assert!(!s.is_assignable(bad.parse().unwrap()), "{bad}");
        }
    }

    #[test]
    fn reserved_ranges_are_refused() {
        for bad in ["169.254.0.0/24", "127.0.0.0/16", "10.0.0.1/24", "10.0.0.0/30", "100.64.0.0/16"] {
            let mut problems = Problems::new();
            SubnetKind::validate(&SubnetSpec::new("default", bad.parse().unwrap()), &mut problems);
            assert!(!problems.is_empty(), "{bad}");
        }
    }
}
