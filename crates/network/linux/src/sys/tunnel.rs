//! VXLAN devices (RFC 7348) and what they and their bridge are told by hand instead of learning it.

use std::io;
use std::net::IpAddr;
use std::os::fd::AsRawFd;

use super::link::{CREATE, Links, Mac, UPSERT, family, ifinfo, ip, octets, station};
use super::netlink::{Message, attrs, u32_at};
use super::netns::NetNs;

// Numbers of the kernel's headers that libc does not carry (linux/if_link.h, linux/neighbour.h).
const IFLA_VXLAN_ID: u16 = 1;
const IFLA_VXLAN_LOCAL: u16 = 4;
const IFLA_VXLAN_LEARNING: u16 = 7;
const IFLA_VXLAN_PORT: u16 = 15;
const IFLA_VXLAN_LOCAL6: u16 = 17;
const IFLA_BRPORT_LEARNING: u16 = 8;
const IFLA_BRPORT_UNICAST_FLOOD: u16 = 9;
const IFLA_BRPORT_MCAST_FLOOD: u16 = 27;
const IFLA_BRPORT_BCAST_FLOOD: u16 = 30;
const IFLA_BRPORT_NEIGH_SUPPRESS: u16 = 32;
const NTF_SELF: u8 = 0x02;
const NUD_NOARP: u16 = 0x40;
const NUD_PERMANENT: u16 = 0x80;
/// Length of `ndmsg`.
const FIXED: usize = 12;

/// A new VXLAN device.
pub(crate) struct Tunnel<'a> {
    pub(crate) name: &'a str,
    pub(crate) vni: u32,
    /// Source of the packets on the underlay.
    pub(crate) local: IpAddr,
    /// UDP port, ours and theirs.
    pub(crate) port: u16,
    pub(crate) mtu: u32,
}

/// A MAC that is known behind a tunnel device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Behind {
    pub(crate) mac: Mac,
    /// What the tunnel knows: the far end; `None` for what the bridge knows.
    pub(crate) far: Option<IpAddr>,
}

impl Links {
    /// A VXLAN device in `netns` whose socket stays in the namespace of these links, because the kernel opens it where the request came
    /// from. It learns nothing.
    pub(crate) fn add_tunnel(&mut self, tunnel: &Tunnel<'_>, netns: &NetNs) -> io::Result<()> {
        let fd = netns.fd().as_raw_fd().cast_unsigned();
        let local = if tunnel.local.is_ipv4() { IFLA_VXLAN_LOCAL } else { IFLA_VXLAN_LOCAL6 };
        let message = Message::new(libc::RTM_NEWLINK, CREATE)
            .fixed(&ifinfo(0, 0, 0))
            .attr_str(libc::IFLA_IFNAME, tunnel.name)
            .attr_u32(libc::IFLA_MTU, tunnel.mtu)
            .attr_u32(libc::IFLA_NET_NS_FD, fd)
            .nest(libc::IFLA_LINKINFO, |m| {
                m.attr_str(libc::IFLA_INFO_KIND, "vxlan").nest(libc::IFLA_INFO_DATA, |m| {
                    m.attr_u32(IFLA_VXLAN_ID, tunnel.vni)
                        .attr(local, &octets(tunnel.local))
                        .attr(IFLA_VXLAN_LEARNING, &[0])
                        .attr(IFLA_VXLAN_PORT, &tunnel.port.to_be_bytes())
                })
            });
        self.0.request(message)
    }

    /// A bridge port that learns nothing, over which nothing is flooded, and for whose stations the bridge answers ARP and neighbour
    /// solicitations itself.
    pub(crate) fn pin_tunnel(&mut self, index: u32) -> io::Result<()> {
        let mut fixed = ifinfo(index, 0, 0);
        fixed[0] = u8::try_from(libc::AF_BRIDGE).unwrap_or(7);
        let message = Message::new(libc::RTM_SETLINK, 0).fixed(&fixed).nest(libc::IFLA_PROTINFO, |m| {
            m.attr(IFLA_BRPORT_LEARNING, &[0])
                .attr(IFLA_BRPORT_UNICAST_FLOOD, &[0])
                .attr(IFLA_BRPORT_MCAST_FLOOD, &[0])
                .attr(IFLA_BRPORT_BCAST_FLOOD, &[0])
                .attr(IFLA_BRPORT_NEIGH_SUPPRESS, &[1])
        });
        self.0.request(message)
    }

    /// What is known behind the tunnel device `index`, by itself and by its bridge.
    pub(crate) fn behind(&mut self, index: u32) -> io::Result<Vec<Behind>> {
        let mut fixed = [0u8; FIXED];
        fixed[0] = u8::try_from(libc::AF_BRIDGE).unwrap_or(7);
        let parts = self.0.dump(|| Message::new(libc::RTM_GETNEIGH, 0).fixed(&fixed))?;
        Ok(parts.iter().filter(|p| p.len() >= FIXED && u32_at(p, 4) == index).filter_map(|p| parse_behind(p)).collect())
    }

    /// Tells the tunnel device at which far end a station is, in place of what it knew.
    pub(crate) fn set_far(&mut self, index: u32, mac: Mac, far: IpAddr) -> io::Result<()> {
        let message = Message::new(libc::RTM_NEWNEIGH, UPSERT).fixed(&behind(index));
        self.0.request(message.attr(libc::NDA_LLADDR, &mac).attr(libc::NDA_DST, &octets(far)))
    }

    /// Forgets where a station is; fine when it was not known.
    pub(crate) fn unset_far(&mut self, index: u32, mac: Mac) -> io::Result<()> {
        let message = Message::new(libc::RTM_DELNEIGH, 0).fixed(&behind(index)).attr(libc::NDA_LLADDR, &mac);
        match self.0.request(message) {
            Err(e) if e.raw_os_error() != Some(libc::ENOENT) => Err(e),
            _ => Ok(()),
        }
    }

    /// Addresses whose MAC the interface was told for ever.
    pub(crate) fn fixed_neighbours(&mut self, index: u32) -> io::Result<Vec<(IpAddr, Mac)>> {
        let parts = self.0.dump(|| Message::new(libc::RTM_GETNEIGH, 0).fixed(&[0; FIXED]))?;
        let ours = |p: &&Vec<u8>| {
            p.len() >= FIXED
                && [libc::AF_INET, libc::AF_INET6].contains(&i32::from(p[0]))
                && u32_at(p, 4) == index
                && u16::from_ne_bytes([p[8], p[9]]) & NUD_PERMANENT != 0
        };
        Ok(parts.iter().filter(ours).filter_map(|p| parse_neighbour(p)).collect())
    }

    /// Tells an interface for ever which MAC an address has. Such entries do not count against the kernel's limits.
    pub(crate) fn fix_neighbour(&mut self, index: u32, ip: IpAddr, mac: Mac) -> io::Result<()> {
        let message = Message::new(libc::RTM_NEWNEIGH, UPSERT).fixed(&neighbour(index, ip));
        self.0.request(message.attr(libc::NDA_DST, &octets(ip)).attr(libc::NDA_LLADDR, &mac))
    }

    /// Takes it back; fine when it was not known.
    pub(crate) fn forget_neighbour(&mut self, index: u32, ip: IpAddr) -> io::Result<()> {
        let message = Message::new(libc::RTM_DELNEIGH, 0).fixed(&neighbour(index, ip)).attr(libc::NDA_DST, &octets(ip));
        match self.0.request(message) {
            Err(e) if e.raw_os_error() != Some(libc::ENOENT) => Err(e),
            _ => Ok(()),
        }
    }
}

fn behind(index: u32) -> [u8; FIXED] {
    let mut fixed = station(index);
    fixed[8..10].copy_from_slice(&(NUD_NOARP | NUD_PERMANENT).to_ne_bytes());
    fixed[10] = NTF_SELF;
    fixed
}

fn neighbour(index: u32, ip: IpAddr) -> [u8; FIXED] {
    let mut fixed = station(index);
    fixed[0] = family(ip);
    fixed[8..10].copy_from_slice(&NUD_PERMANENT.to_ne_bytes());
    fixed[10] = 0;
    fixed
}

fn parse_behind(body: &[u8]) -> Option<Behind> {
    let (by_tunnel, mut mac, mut far) = (body[10] & NTF_SELF != 0, None, None);
    // The bridge also knows the device's own address, which is nobody's station.
    if !by_tunnel && u16::from_ne_bytes([body[8], body[9]]) & NUD_PERMANENT != 0 {
        return None;
    }
    for (kind, value) in attrs(body.get(FIXED..)?) {
        match kind {
            libc::NDA_LLADDR => mac = value.try_into().ok(),
            libc::NDA_DST => far = ip(value),
            _ => {}
        }
    }
    Some(Behind { mac: mac?, far: far.filter(|_| by_tunnel) })
}

fn parse_neighbour(body: &[u8]) -> Option<(IpAddr, Mac)> {
    let find =
        |wanted: u16| attrs(body.get(FIXED..).unwrap_or_default()).find(|(kind, _)| *kind == wanted).map(|a| a.1);
    Some((ip(find(libc::NDA_DST)?)?, find(libc::NDA_LLADDR)?.try_into().ok()?))
}
