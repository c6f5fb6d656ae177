//! Links, addresses, routes and forwarding entries over rtnetlink(7).

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::AsRawFd;

use nix::sys::socket::SockProtocol;

use super::netlink::{Message, Netlink, attrs, text, u32_at};
use super::netns::NetNs;

// Numbers of the kernel's headers that libc does not carry (linux/if_link.h, linux/veth.h, linux/neighbour.h).
const VETH_INFO_PEER: u16 = 1;
const IFLA_BR_FORWARD_DELAY: u16 = 1;
const IFLA_BR_STP_STATE: u16 = 5;
const IFLA_BR_MCAST_SNOOPING: u16 = 23;
const IFLA_BRPORT_LEARNING: u16 = 8;
const IFLA_BRPORT_UNICAST_FLOOD: u16 = 9;
const NTF_MASTER: u8 = 0x04;
const NUD_STALE: u16 = 0x04;
const NUD_NOARP: u16 = 0x40;
const IFA_F_NODAD: u32 = 0x02;
const UP: u32 = libc::IFF_UP.cast_unsigned();
pub(super) const CREATE: i32 = libc::NLM_F_CREATE | libc::NLM_F_EXCL;
pub(super) const UPSERT: i32 = libc::NLM_F_CREATE | libc::NLM_F_REPLACE;
const STATS64_LEN: usize = 32;

/// A MAC address.
pub(crate) type Mac = [u8; 6];

/// One interface as the kernel tells it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Link {
    pub(crate) index: u32,
    pub(crate) name: String,
    pub(crate) up: bool,
    /// Index of the bridge it is in, 0 for none.
    pub(crate) master: u32,
    pub(crate) mac: Option<Mac>,
    pub(crate) mtu: u32,
    pub(crate) alias: String,
    pub(crate) rx_packets: u64,
    pub(crate) tx_packets: u64,
    pub(crate) rx_bytes: u64,
    pub(crate) tx_bytes: u64,
}

/// One address of an interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Address {
    pub(crate) index: u32,
    pub(crate) ip: IpAddr,
    pub(crate) prefix: u8,
}

/// The far end of a new veth.
pub(crate) struct Peer<'a> {
    pub(crate) name: &'a str,
    pub(crate) netns: &'a NetNs,
    pub(crate) mac: Option<Mac>,
}

/// What to change on an interface; `None` leaves it.
#[derive(Default)]
pub(crate) struct Change<'a> {
    pub(crate) alias: Option<&'a str>,
    pub(crate) mtu: Option<u32>,
    pub(crate) mac: Option<Mac>,
    pub(crate) master: Option<u32>,
    pub(crate) up: bool,
}

/// The links of one network namespace.
pub(crate) struct Links(pub(super) Netlink);

impl Links {
    /// Those of `netns`.
    pub(crate) fn of(netns: &NetNs) -> io::Result<Self> {
        netns.within(|| Netlink::open(SockProtocol::NetlinkRoute))?.map(Self)
    }

    pub(crate) fn list(&mut self) -> io::Result<Vec<Link>> {
        let parts = self.0.dump(|| Message::new(libc::RTM_GETLINK, 0).fixed(&ifinfo(0, 0, 0)))?;
        Ok(parts.iter().filter_map(|p| parse_link(p)).collect())
    }

    /// One interface by name.
    pub(crate) fn find(&mut self, name: &str) -> io::Result<Option<Link>> {
        let ask = Message::new(libc::RTM_GETLINK, 0).fixed(&ifinfo(0, 0, 0)).attr_str(libc::IFLA_IFNAME, name);
        match self.0.get(ask) {
            Ok(part) => Ok(part.and_then(|p| parse_link(&p))),
            Err(e) if e.raw_os_error() == Some(libc::ENODEV) => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// A bridge that forwards at once: no spanning tree, no delay, no snooping.
    pub(crate) fn add_bridge(&mut self, name: &str, mac: Mac) -> io::Result<()> {
        let message = Message::new(libc::RTM_NEWLINK, CREATE)
            .fixed(&ifinfo(0, 0, 0))
            .attr_str(libc::IFLA_IFNAME, name)
            .attr(libc::IFLA_ADDRESS, &mac)
            .nest(libc::IFLA_LINKINFO, |m| {
                m.attr_str(libc::IFLA_INFO_KIND, "bridge").nest(libc::IFLA_INFO_DATA, |m| {
                    m.attr_u32(IFLA_BR_FORWARD_DELAY, 0)
                        .attr_u32(IFLA_BR_STP_STATE, 0)
                        .attr(IFLA_BR_MCAST_SNOOPING, &[0])
                })
            });
        self.0.request(message)
    }

    /// A pair of interfaces, one here and one in the peer's namespace, made in one step.
    pub(crate) fn add_veth(&mut self, name: &str, mtu: u32, peer: &Peer<'_>) -> io::Result<()> {
        let fd = peer.netns.fd().as_raw_fd().cast_unsigned();
        let message = Message::new(libc::RTM_NEWLINK, CREATE)
            .fixed(&ifinfo(0, 0, 0))
            .attr_str(libc::IFLA_IFNAME, name)
            .attr_u32(libc::IFLA_MTU, mtu)
            .nest(libc::IFLA_LINKINFO, |m| {
                m.attr_str(libc::IFLA_INFO_KIND, "veth").nest(libc::IFLA_INFO_DATA, |m| {
                    m.nest(VETH_INFO_PEER, |m| {
                        let m = m
                            .fixed(&ifinfo(0, 0, 0))
                            .attr_str(libc::IFLA_IFNAME, peer.name)
                            .attr_u32(libc::IFLA_MTU, mtu)
                            .attr_u32(libc::IFLA_NET_NS_FD, fd);
                        match peer.mac {
                            Some(mac) => m.attr(libc::IFLA_ADDRESS, &mac),
                            None => m,
                        }
                    })
                })
            });
        self.0.request(message)
    }

    pub(crate) fn change(&mut self, index: u32, change: &Change<'_>) -> io::Result<()> {
        let flags = if change.up { UP } else { 0 };
        let mut message = Message::new(libc::RTM_NEWLINK, 0).fixed(&ifinfo(index, flags, flags));
        if let Some(alias) = change.alias {
            message = message.attr(libc::IFLA_IFALIAS, alias.as_bytes());
        }
        if let Some(mtu) = change.mtu {
            message = message.attr_u32(libc::IFLA_MTU, mtu);
        }
        if let Some(mac) = change.mac {
            message = message.attr(libc::IFLA_ADDRESS, &mac);
        }
        if let Some(master) = change.master {
            message = message.attr_u32(libc::IFLA_MASTER, master);
        }
        self.0.request(message)
    }

    /// A bridge port that learns nothing and gets no frames for stations nobody knows.
    pub(crate) fn pin_bridge_port(&mut self, index: u32) -> io::Result<()> {
        let mut fixed = ifinfo(index, 0, 0);
        fixed[0] = u8::try_from(libc::AF_BRIDGE).unwrap_or(7);
        let message = Message::new(libc::RTM_SETLINK, 0)
            .fixed(&fixed)
            .nest(libc::IFLA_PROTINFO, |m| m.attr(IFLA_BRPORT_LEARNING, &[0]).attr(IFLA_BRPORT_UNICAST_FLOOD, &[0]));
        self.0.request(message)
    }

    /// Tells the bridge where the station `mac` is.
    pub(crate) fn set_station(&mut self, port: u32, mac: Mac) -> io::Result<()> {
        self.0.request(Message::new(libc::RTM_NEWNEIGH, UPSERT).fixed(&station(port)).attr(libc::NDA_LLADDR, &mac))
    }

    /// Forgets the station; fine when it was not known.
    pub(crate) fn unset_station(&mut self, port: u32, mac: Mac) -> io::Result<()> {
        match self.0.request(Message::new(libc::RTM_DELNEIGH, 0).fixed(&station(port)).attr(libc::NDA_LLADDR, &mac)) {
            Err(e) if e.raw_os_error() != Some(libc::ENOENT) => Err(e),
            _ => Ok(()),
        }
    }

    /// Tells the kernel which MAC an address has on an interface, in place of what it believed; it is verified as usual later.
    pub(crate) fn set_neighbour(&mut self, index: u32, ip: IpAddr, mac: Mac) -> io::Result<()> {
        let mut fixed = station(index);
        fixed[0] = family(ip);
        fixed[8..10].copy_from_slice(&NUD_STALE.to_ne_bytes());
        fixed[10] = 0;
        let message = Message::new(libc::RTM_NEWNEIGH, UPSERT).fixed(&fixed);
        self.0.request(message.attr(libc::NDA_DST, &octets(ip)).attr(libc::NDA_LLADDR, &mac))
    }

    /// Deletes an interface; fine when it is not there.
    pub(crate) fn delete(&mut self, name: &str) -> io::Result<()> {
        let message = Message::new(libc::RTM_DELLINK, 0).fixed(&ifinfo(0, 0, 0)).attr_str(libc::IFLA_IFNAME, name);
        match self.0.request(message) {
            Err(e) if e.raw_os_error() != Some(libc::ENODEV) => Err(e),
            _ => Ok(()),
        }
    }

    pub(crate) fn addresses(&mut self) -> io::Result<Vec<Address>> {
        let parts = self.0.dump(|| Message::new(libc::RTM_GETADDR, 0).fixed(&[0; 8]))?;
        Ok(parts.iter().filter_map(|p| parse_address(p)).collect())
    }

    /// Makes the addresses of an interface equal to `wanted`; link-local IPv6 ones of the kernel are left alone.
    pub(crate) fn set_addresses(&mut self, index: u32, wanted: &[(IpAddr, u8)]) -> io::Result<()> {
        let present: Vec<_> = self.addresses()?.into_iter().filter(|a| a.index == index).collect();
        for (ip, prefix) in wanted {
            if !present.iter().any(|a| a.ip == *ip && a.prefix == *prefix) {
                self.0.request(address(libc::RTM_NEWADDR, UPSERT, index, *ip, *prefix))?;
            }
        }
        for old in present {
            let kernels_own = matches!(old.ip, IpAddr::V6(ip) if ip.is_unicast_link_local());
            if !kernels_own && !wanted.contains(&(old.ip, old.prefix)) {
                match self.0.request(address(libc::RTM_DELADDR, 0, index, old.ip, old.prefix)) {
                    Err(e) if e.raw_os_error() != Some(libc::EADDRNOTAVAIL) => return Err(e),
                    _ => {}
                }
            }
        }
        Ok(())
    }

    /// The default route of the gateway's family.
    pub(crate) fn set_default_route(&mut self, index: u32, gateway: IpAddr) -> io::Result<()> {
        let mut fixed = [0u8; 12];
        fixed[0] = family(gateway);
        fixed[4] = libc::RT_TABLE_MAIN;
        fixed[5] = libc::RTPROT_STATIC;
        fixed[6] = libc::RT_SCOPE_UNIVERSE;
        fixed[7] = libc::RTN_UNICAST;
        let message = Message::new(libc::RTM_NEWROUTE, UPSERT)
            .fixed(&fixed)
            .attr(libc::RTA_GATEWAY, &octets(gateway))
            .attr_u32(libc::RTA_OIF, index);
        self.0.request(message)
    }

    /// Destinations of the routes in the main table, the default ones left out: (network address, prefix length).
    pub(crate) fn routes(&mut self) -> io::Result<Vec<(IpAddr, u8)>> {
        let parts = self.0.dump(|| Message::new(libc::RTM_GETROUTE, 0).fixed(&[0; 12]))?;
        Ok(parts
            .iter()
            .filter(|p| p.len() >= 12 && p[4] == libc::RT_TABLE_MAIN)
            .filter_map(|p| Some((ip(attrs(&p[12..]).find(|(k, _)| *k == libc::RTA_DST)?.1)?, p[1])))
            .collect())
    }
}

pub(super) fn ifinfo(index: u32, flags: u32, mask: u32) -> [u8; 16] {
    let mut fixed = [0u8; 16];
    fixed[4..8].copy_from_slice(&index.to_ne_bytes());
    fixed[8..12].copy_from_slice(&flags.to_ne_bytes());
    fixed[12..16].copy_from_slice(&mask.to_ne_bytes());
    fixed
}

pub(super) fn station(port: u32) -> [u8; 12] {
    let mut fixed = [0u8; 12];
    fixed[0] = u8::try_from(libc::AF_BRIDGE).unwrap_or(7);
    fixed[4..8].copy_from_slice(&port.to_ne_bytes());
    fixed[8..10].copy_from_slice(&NUD_NOARP.to_ne_bytes());
    fixed[10] = NTF_MASTER;
    fixed
}

fn address(kind: u16, flags: i32, index: u32, ip: IpAddr, prefix: u8) -> Message {
    let mut fixed = [0u8; 8];
    fixed[0] = family(ip);
    fixed[1] = prefix;
    fixed[4..8].copy_from_slice(&index.to_ne_bytes());
    let message =
        Message::new(kind, flags).fixed(&fixed).attr(libc::IFA_LOCAL, &octets(ip)).attr(libc::IFA_ADDRESS, &octets(ip));
    // Addresses are unique by allocation; waiting for duplicate address detection would only delay the guest.
    if ip.is_ipv6() { message.attr_u32(libc::IFA_FLAGS, IFA_F_NODAD) } else { message }
}

pub(super) fn family(ip: IpAddr) -> u8 {
    u8::try_from(if ip.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 }).unwrap_or(0)
}

pub(super) fn octets(ip: IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    }
}

pub(super) fn ip(bytes: &[u8]) -> Option<IpAddr> {
    if let Ok(four) = <[u8; 4]>::try_from(bytes) {
        return Some(Ipv4Addr::from(four).into());
    }
    <[u8; 16]>::try_from(bytes).ok().map(|b| Ipv6Addr::from(b).into())
}

fn parse_link(body: &[u8]) -> Option<Link> {
    let mut link = Link { index: u32_at(body, 4), up: u32_at(body, 8) & UP != 0, ..Link::default() };
    for (kind, value) in attrs(body.get(16..)?) {
        match kind {
            libc::IFLA_IFNAME => link.name = text(value),
            libc::IFLA_IFALIAS => link.alias = text(value),
            libc::IFLA_MASTER => link.master = u32_at(value, 0),
            libc::IFLA_MTU => link.mtu = u32_at(value, 0),
            libc::IFLA_ADDRESS => link.mac = value.try_into().ok(),
            // struct rtnl_link_stats64 begins with rx_packets, tx_packets, rx_bytes, tx_bytes.
            libc::IFLA_STATS64 if value.len() >= STATS64_LEN => {
                let at = |i: usize| value[i * 8..i * 8 + 8].try_into().map_or(0, u64::from_ne_bytes);
                (link.rx_packets, link.tx_packets, link.rx_bytes, link.tx_bytes) = (at(0), at(1), at(2), at(3));
            }
            _ => {}
        }
    }
    Some(link)
}

fn parse_address(body: &[u8]) -> Option<Address> {
    let all = || attrs(body.get(8..).unwrap_or_default());
    // IFA_LOCAL is the address itself; IPv6 tells only IFA_ADDRESS.
    let value = all().find(|(k, _)| *k == libc::IFA_LOCAL).or_else(|| all().find(|(k, _)| *k == libc::IFA_ADDRESS))?.1;
    Some(Address { index: u32_at(body, 4), ip: ip(value)?, prefix: *body.get(1)? })
}

impl<'a> Peer<'a> {
    /// An interface `name` in `netns`.
    pub(crate) fn new(name: &'a str, netns: &'a NetNs, mac: Option<Mac>) -> Self {
        Self { name, netns, mac }
    }
}
