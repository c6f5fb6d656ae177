//! What netd knows of one network, indexed for questions, and of all networks together.

use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, Ipv4Addr};
use std::rc::Rc;

use ipnet::IpNet;
use oblak_model::NetworkId;
use oblak_network::{NetworkPlan, PortKind, PortPlan, SubnetPlan};

/// The zone below which every name of ours lies. It is never asked outside.
pub const ROOT_ZONE: &str = "oblak.internal";

/// An Ethernet address.
pub type Mac = [u8; 6];

/// One network.
#[derive(Debug)]
pub struct View {
    /// The plan it was made of.
    pub plan: NetworkPlan,
    /// `<network>.<project>.oblak.internal`, lower case.
    pub domain: String,
    by_mac: HashMap<Mac, usize>,
    by_address: HashMap<IpAddr, usize>,
    by_name: HashMap<String, Vec<usize>>,
}

/// All networks of this netd. The runtime has one thread, so readers take the current one and never wait.
#[derive(Debug, Default)]
pub struct World {
    networks: BTreeMap<NetworkId, Rc<View>>,
}

impl View {
    /// Indexes a plan. Ports with a MAC address that is not one are known by address and name only.
    ///
    /// # Errors
    /// What is wrong with the plan: no guest could be told apart or named.
    pub fn new(plan: NetworkPlan) -> Result<Self, String> {
        for name in [&plan.name, &plan.project] {
            if let Some(problem) = oblak_model::name::problem(name) {
                return Err(format!("the name {name:?} cannot be part of a domain: it {problem}"));
            }
        }
        let mut view = Self {
            domain: format!("{}.{}.{ROOT_ZONE}", plan.name, plan.project).to_ascii_lowercase(),
            by_mac: HashMap::with_capacity(plan.ports.len()),
            by_address: HashMap::with_capacity(plan.ports.len()),
            by_name: HashMap::with_capacity(plan.ports.len()),
            plan,
        };
        for (i, port) in view.plan.ports.iter().enumerate() {
            if let Some(mac) = parse_mac(&port.mac) {
                view.by_mac.insert(mac, i);
            }
            for address in &port.addresses {
                view.by_address.insert(*address, i);
            }
            if !port.hostname.is_empty() {
                view.by_name.entry(port.hostname.to_ascii_lowercase()).or_default().push(i);
            }
        }
        Ok(view)
    }

    /// The port on this node with that MAC address. Ports of other nodes are served there.
    #[must_use]
    pub fn local_by_mac(&self, mac: &Mac) -> Option<&PortPlan> {
        let port = &self.plan.ports[*self.by_mac.get(mac)?];
        (port.kind != PortKind::Remote).then_some(port)
    }

    /// The port with that address.
    #[must_use]
    pub fn by_address(&self, address: IpAddr) -> Option<&PortPlan> {
        Some(&self.plan.ports[*self.by_address.get(&address)?])
    }

    /// All ports with that host name (lower case).
    pub fn by_name(&self, hostname: &str) -> impl Iterator<Item = &PortPlan> {
        self.by_name.get(hostname).into_iter().flatten().map(|i| &self.plan.ports[*i])
    }

    /// The subnet an address is in.
    #[must_use]
    pub fn subnet_of(&self, address: IpAddr) -> Option<&SubnetPlan> {
        self.plan.subnets.iter().find(|s| s.cidr.contains(&address))
    }

    /// The full name of a port.
    #[must_use]
    pub fn fqdn(&self, port: &PortPlan) -> String {
        format!("{}.{}", port.hostname, self.domain)
    }

    /// The address DHCP gives to a port and its subnet: the first IPv4 one.
    #[must_use]
    pub fn lease<'a>(&'a self, port: &PortPlan) -> Option<(Ipv4Addr, &'a SubnetPlan)> {
        port.addresses.iter().find_map(|address| match address {
            IpAddr::V4(v4) => self.subnet_of(*address).map(|subnet| (*v4, subnet)),
            IpAddr::V6(_) => None,
        })
    }

    /// Gateways, where DNS is answered.
    pub fn gateways(&self) -> impl Iterator<Item = IpAddr> {
        self.plan.subnets.iter().map(|s| s.gateway)
    }

    /// Whether somebody with this source address may ask at all.
    #[must_use]
    pub fn may_ask(&self, peer: IpAddr) -> bool {
        self.subnet_of(peer).is_some()
    }
}

impl World {
    /// A network.
    #[must_use]
    pub fn get(&self, id: NetworkId) -> Option<Rc<View>> {
        self.networks.get(&id).cloned()
    }
    /// Adds or replaces a network.
    pub fn set(&mut self, view: Rc<View>) {
        self.networks.insert(view.plan.id, view);
    }
    /// Forgets a network.
    pub fn remove(&mut self, id: NetworkId) {
        self.networks.remove(&id);
    }
    /// All ports of an instance that this node knows, in the order of its interfaces, with their network.
    #[must_use]
    pub fn ports_of(&self, instance: oblak_model::InstanceId) -> Vec<(Rc<View>, usize)> {
        let mut ports: Vec<_> = self
            .networks
            .values()
            .flat_map(|view| {
                let mine = view.plan.ports.iter().enumerate().filter(move |(_, p)| p.instance == instance);
                mine.map(move |(i, _)| (Rc::clone(view), i))
            })
            .collect();
        ports.sort_by_key(|(view, i)| (view.plan.ports[*i].index, view.plan.ports[*i].id));
        ports
    }
}

/// `aa:bb:cc:dd:ee:ff` as bytes.
#[must_use]
pub fn parse_mac(text: &str) -> Option<Mac> {
    let mut mac = Mac::default();
    let mut parts = text.split(':');
    for byte in &mut mac {
        let part = parts.next().filter(|p| p.len() == 2)?;
        *byte = u8::from_str_radix(part, 16).ok()?;
    }
    parts.next().is_none().then_some(mac)
}

/// The subnet as IPv4, with its gateway.
#[must_use]
pub fn as_v4(subnet: &SubnetPlan) -> Option<(ipnet::Ipv4Net, Ipv4Addr)> {
    match (subnet.cidr, subnet.gateway) {
        (IpNet::V4(cidr), IpAddr::V4(gateway)) => Some((cidr, gateway)),
        _ => None,
    }
}

#[cfg(test)]
pub(crate) mod testing {
    use super::*;
    use oblak_model::{InstanceId, PortId};
    use oblak_network::InstanceMetadata;
    use uuid::Uuid;

    /// A port with everything, number `n`.
    pub fn port(n: u8, hostname: &str, kind: PortKind) -> PortPlan {
        let instance = InstanceId(Uuid::from_u128(0x1000 + u128::from(n)));
        PortPlan {
            id: PortId(Uuid::from_u128(0x2000 + u128::from(n))),
            instance,
            index: 0,
            kind,
            mac: format!("02:00:00:00:00:{n:02x}"),
            addresses: vec![format!("10.1.2.{n}").parse().unwrap()],
            hostname: hostname.into(),
            ingress: vec![],
            egress: None,
            publish: vec![],
            userns: None,
            tunnel: None,
            standby: false,
            midstream: false,
            metadata: Some(InstanceMetadata {
                instance,
                name: hostname.into(),
                project: "p1".into(),
                public_keys: [("me".to_string(), "ssh-ed25519 AAAA me@host".to_string())].into(),
                user_data: Some("#cloud-config\n{}\n".into()),
                availability_zone: "z1".into(),
                instance_type: "s".into(),
                meta: [("role".to_string(), "db".to_string())].into(),
            }),
        }
    }

    /// A network `blue` of project `p1` with 10.1.2.0/24: ports 10 (web), 11 (job), 12 (far, on another node).
    pub fn plan() -> NetworkPlan {
        NetworkPlan {
            id: NetworkId(Uuid::from_u128(1)),
            name: "blue".into(),
            project: "p1".into(),
            mtu: 1450,
            nat: true,
            subnets: vec![SubnetPlan {
                cidr: "10.1.2.0/24".parse().unwrap(),
                gateway: "10.1.2.1".parse().unwrap(),
                lease_s: 3600,
            }],
            ports: vec![
                port(10, "web", PortKind::Tap),
                port(11, "job", PortKind::Netns),
                port(12, "far", PortKind::Remote),
            ],
            forwarders: vec![],
            overlay: None,
        }
    }

    /// [`plan`] as a view.
    pub fn view() -> View {
        View::new(plan()).unwrap()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn macs() {
        assert_eq!(parse_mac("02:0a:ff:00:00:01"), Some([2, 10, 255, 0, 0, 1]));
        for bad in
            ["", "02:0a:ff:00:00", "02:0a:ff:00:00:01:02", "2:0a:ff:00:00:01", "02:0a:ff:00:00:zz", "02-0a-ff-00-00-01"]
        {
            assert_eq!(parse_mac(bad), None, "{bad}");
        }
    }

    #[test]
    fn finds_ports() {
        let view = testing::view();
        assert_eq!(view.domain, "blue.p1.oblak.internal");
        assert!(view.local_by_mac(&[2, 0, 0, 0, 0, 10]).is_some());
        assert!(view.local_by_mac(&[2, 0, 0, 0, 0, 12]).is_none(), "its own node answers");
        assert!(view.may_ask("10.1.2.77".parse().unwrap()));
        assert!(!view.may_ask("10.1.3.77".parse().unwrap()));
        let mut bad = testing::plan();
        bad.name = "no.dots".into();
        assert!(View::new(bad).is_err());
    }
}
