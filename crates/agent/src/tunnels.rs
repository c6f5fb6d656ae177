//! How this node reaches other nodes: pure, from what it was told of itself and of them.

use std::net::IpAddr;

use oblak_model::wire::Peer;
use oblak_model::{NodeId, NodeUnderlay};
use oblak_network::overlay;

use crate::world::World;

/// Every IPv6 link must carry this much (RFC 8200, section 5); networks cannot ask for less either.
const MTU_MIN: u16 = 1280;

/// The ways to other nodes.
#[derive(Clone, Copy, Debug)]
pub struct Tunnels<'a> {
    world: &'a World,
    node: NodeId,
    own: Option<NodeUnderlay>,
}

impl<'a> Tunnels<'a> {
    /// Those of `node`, which is this one.
    #[must_use]
    pub fn of(world: &'a World, node: NodeId) -> Self {
        Self { world, node, own: world.node.as_ref().and_then(|n| n.status.facts.underlay) }
    }

    /// Where they begin; `None` when networks stay on this node.
    #[must_use]
    pub fn own(&self) -> Option<NodeUnderlay> {
        self.own
    }

    /// The far end of the tunnel to another node.
    #[must_use]
    pub fn to(&self, node: NodeId) -> Option<IpAddr> {
        let peer = self.world.peers.get(&node).filter(|_| node != self.node)?;
        self.end(peer).map(|end| end.address)
    }

    /// A peer's end, when a tunnel of ours can go there.
    fn end(&self, peer: &Peer) -> Option<NodeUnderlay> {
        let (own, far) = (self.own?.address, peer.underlay?);
        (far.address.is_ipv4() == own.is_ipv4() && far.address != own).then_some(far)
    }

    /// What guests may send at once: what is wanted, as far as it fits into a tunnel to every peer, so that all guests of a network
    /// can send each other their largest packets.
    #[must_use]
    pub fn mtu(&self, wanted: u16) -> u16 {
        let Some(own) = self.own else { return wanted };
        let ends = self.world.peers.values().filter_map(|p| self.end(p));
        let smallest = ends.map(|end| end.mtu).fold(own.mtu, u16::min);
        wanted.min(overlay::guest_mtu(own.address, smallest)).max(MTU_MIN)
    }

    /// Peers that this node cannot reach, with the reason.
    pub fn cut_off(&self) -> impl Iterator<Item = (NodeId, String)> + '_ {
        let cut_off = self.world.peers.values().filter(|p| self.end(p).is_none());
        cut_off.map(|p| (p.id, format!("node {}: {}", p.name, self.reason(p))))
    }

    fn reason(&self, peer: &Peer) -> String {
        match (self.own, peer.underlay) {
            (None, _) => "this node has no underlay address; start its agent with --underlay ADDR".into(),
            (_, None) => "it has no underlay address; start its agent with --underlay ADDR".into(),
            (Some(own), Some(far)) if own.address == far.address => {
                format!("it says that it is at {}, which is this node", far.address)
            }
            (Some(own), Some(far)) => {
                format!("it is at {}, this node at {}; both must be IPv4 or both IPv6", far.address, own.address)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::sync::Arc;

    use oblak_model::wire::{NodeEvent, PEER};
    use oblak_model::{Network, NetworkId, Node, NodeSpec, Port, PortSpec, Subnet, SubnetSpec};
    use oblak_network::{NetworkPlan, OverlayPlan, PortKind};

    use super::*;
    use crate::assemble::{Here, network_plan};

    fn id(n: u128) -> uuid::Uuid {
        uuid::Uuid::from_u128(n)
    }

    fn underlay(address: &str, mtu: u16) -> Option<NodeUnderlay> {
        Some(NodeUnderlay { address: address.parse().unwrap(), mtu })
    }

    /// Node 1 with a port of its own and ports on the nodes 2 and 3.
    fn world(own: Option<NodeUnderlay>) -> World {
        let mut world = World::default();
        let mut node = Node::new("n1", NodeSpec::default());
        node.metadata.id = id(1);
        node.status.facts.underlay = own;
        world.node = Some(Arc::new(node));
        let mut network = Network::new("blue", oblak_model::NetworkSpec::default());
        network.metadata.id = id(10);
        network.status.vni = Some(5000);
        world.networks.insert(NetworkId(id(10)), Arc::new(network));
        let mut subnet = Subnet::new("blue", SubnetSpec::new("blue", "10.0.0.0/24".parse().unwrap()));
        subnet.metadata.id = id(11);
        subnet.status.network = NetworkId(id(10));
        world.subnets.insert(id(11).into(), Arc::new(subnet));
        for n in 1..=3 {
            let mut port = Port::new(&format!("p{n}"), PortSpec::default());
            port.metadata.id = id(20 + n);
            port.status.network = NetworkId(id(10));
            port.status.node = Some(NodeId(id(n)));
            world.ports.insert(id(20 + n).into(), Arc::new(port));
        }
        world
    }

    fn tell(world: &mut World, n: u128, underlay: Option<NodeUnderlay>) -> bool {
        let peer = Peer { id: NodeId(id(n)), name: format!("n{n}"), underlay };
        world.apply(NodeEvent::Put { kind: PEER.into(), object: serde_json::to_value(peer).unwrap() }).networks
    }

    fn plan(world: &World) -> NetworkPlan {
        let here = Here { node: NodeId(id(1)), zone: "z", container_ids: &BTreeMap::new() };
        network_plan(world, &here, NetworkId(id(10))).unwrap()
    }

    fn ends(world: &World) -> Vec<Option<String>> {
        let plan = plan(world);
        assert!(plan.ports.iter().all(|p| p.kind == PortKind::Remote));
        oblak_network::overlay::check(&plan).unwrap();
        plan.ports.iter().map(|p| p.tunnel.map(|t| t.to_string())).collect()
    }

    #[test]
    fn ports_are_behind_the_node_that_has_them() {
        let mut world = world(underlay("192.0.2.1", 9000));
        assert_eq!(plan(&world).overlay, Some(OverlayPlan { vni: 5000, local: [192, 0, 2, 1].into() }));
        assert_eq!((ends(&world), plan(&world).mtu), (vec![None; 3], 1500), "no more than the network says");
        assert!(tell(&mut world, 2, underlay("192.0.2.2", 1400)));
        assert!(!tell(&mut world, 2, underlay("192.0.2.2", 1400)), "nothing new");
        tell(&mut world, 3, underlay("192.0.2.3", 9000));
        assert_eq!(ends(&world), [None, Some("192.0.2.2".into()), Some("192.0.2.3".into())]);
        assert_eq!(plan(&world).mtu, 1350, "what fits through the narrowest tunnel");
        let gone = world.apply(NodeEvent::Delete { kind: PEER.into(), id: id(2) });
        assert!(gone.networks);
        assert_eq!((ends(&world)[1].clone(), plan(&world).mtu), (None, 1500));
        let network = Arc::make_mut(world.networks.get_mut(&NetworkId(id(10))).unwrap());
        network.status.vni = None;
        assert_eq!(
            (plan(&world).overlay, ends(&world)),
            (None, vec![None; 3]),
            "without a number there are no tunnels"
        );
    }

    #[test]
    fn what_cannot_be_reached_is_named() {
        let mut six = world(underlay("2001:db8::1", 1500));
        tell(&mut six, 2, underlay("192.0.2.2", 1500));
        tell(&mut six, 3, None);
        assert_eq!((ends(&six), plan(&six).mtu), (vec![None; 3], 1430));
        let reasons: Vec<_> = Tunnels::of(&six, NodeId(id(1))).cut_off().map(|(_, reason)| reason).collect();
        assert!(reasons[0].starts_with("node n2: it is at 192.0.2.2, this node at 2001:db8::1"), "{reasons:?}");
        assert!(reasons[1].contains("n3: it has no underlay"), "{reasons:?}");
        tell(&mut six, 2, underlay("2001:db8::1", 1500));
        assert_eq!(ends(&six), vec![None; 3], "not to itself");
        let mut single = world(None);
        tell(&mut single, 2, underlay("192.0.2.2", 1500));
        assert_eq!((plan(&single).overlay, ends(&single), plan(&single).mtu), (None, vec![None; 3], 1500));
    }
}
