//! Questions: what exists, how much went through it, and connections into a network. None of them takes the lock.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::OwnedFd;

use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
use oblak_model::{NetworkId, PortId};
use oblak_network::{NetworkHandle, PortCounters, PortKind};
use oblak_platform::driver::{DriverError, DriverResult};

use crate::names::{self, BRIDGE, PortAlias};
use crate::node::{At, Node};
use crate::ports;
use crate::sys::link::Links;
use crate::sys::netns::NetNs;

impl Node {
    /// What exists of the network; `None` without a namespace.
    pub(crate) fn observe(&self, id: NetworkId) -> DriverResult<Option<NetworkHandle>> {
        let what = || format!("looking at network {id}");
        let Some(netns) = NetNs::open(&self.names.network_ns(id)).at(what)? else { return Ok(None) };
        let mut links = Links::of(&netns).at(what)?;
        // Short names could meet; the bridge knows whose it is.
        let owner = links.find(BRIDGE).at(what)?.map(|l| l.alias);
        if owner.as_deref().and_then(names::parse_bridge_alias).is_some_and(|other| other != id) {
            return Ok(None);
        }
        let part = self.state.host(id)?.unwrap_or_default();
        let plan = self.state.plan(id)?;
        Ok(Some(ports::handle(self, plan.as_ref(), &links.list().at(what)?, &netns, part)))
    }

    /// Networks with a directory or a namespace.
    pub(crate) fn list(&self) -> DriverResult<Vec<NetworkId>> {
        let mut ids: BTreeSet<NetworkId> = self.state.networks()?.into_iter().collect();
        let entries = std::fs::read_dir(self.names.netns_dir()).into_iter().flatten().flatten();
        for entry in entries.filter(|e| e.file_name().to_str().is_some_and(names::is_network_ns)) {
            let what = || format!("looking at {}", entry.path().display());
            let Some(netns) = NetNs::open(&entry.path()).at(what)? else { continue };
            let bridge = Links::of(&netns).at(what)?.find(BRIDGE).at(what)?;
            ids.extend(bridge.and_then(|b| names::parse_bridge_alias(&b.alias)));
        }
        Ok(ids.into_iter().collect())
    }

    /// Counters of the local ports. What the host's end sends is what the guest receives.
    pub(crate) fn counters(&self, id: NetworkId) -> DriverResult<BTreeMap<PortId, PortCounters>> {
        let what = || format!("reading counters of network {id}");
        let Some(netns) = NetNs::open(&self.names.network_ns(id)).at(what)? else {
            return Err(DriverError::gone(format!("network {id} is not on this node")));
        };
        let links = Links::of(&netns).at(what)?.list().at(what)?;
        let count = |l: &crate::sys::link::Link| PortCounters {
            rx_bytes: l.tx_bytes,
            tx_bytes: l.rx_bytes,
            rx_packets: l.tx_packets,
            tx_packets: l.rx_packets,
        };
        let ports = links.iter().filter(|l| names::device_kind(&l.name).is_some());
        Ok(ports.filter_map(|l| Some((PortAlias::parse(&l.alias)?.port, count(l)))).collect())
    }

    /// An unconnected TCP socket inside the network, if `to` is one of its guests.
    pub(crate) fn socket_towards(&self, id: NetworkId, to: SocketAddr) -> DriverResult<TcpStream> {
        let what = || format!("network {id}: dialing {to}");
        let plan = self.state.plan(id)?;
        let netns = NetNs::open(&self.names.network_ns(id)).at(what)?;
        let (Some(plan), Some(netns)) = (plan, netns) else {
            return Err(DriverError::gone(format!("network {id} is not on this node")));
        };
        let Some(port) = plan.ports.iter().find(|p| p.addresses.contains(&to.ip())) else {
            let detail = format!("{} is not an address of an instance in network {}", to.ip(), plan.name);
            return Err(DriverError::permanent("not_in_network", detail));
        };
        // The gateway has the same address on every node, so the answer would not come back here.
        if port.kind == PortKind::Remote {
            let detail = format!("{} in network {} is not on this node; dial it where it is", to.ip(), plan.name);
            return Err(DriverError::permanent("not_here", detail));
        }
        let family = if to.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let made = netns.within(|| socket(family, SockType::Stream, flags, None));
        let fd: OwnedFd = made.at(what)?.map_err(std::io::Error::from).at(what)?;
        Ok(fd.into())
    }
}
