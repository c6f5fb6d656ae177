//! DHCP for IPv4 (RFC 2131, options of RFC 2132): fixed addresses from the plan, so there is no lease database.
//!
//! This module is pure: bytes of a request in, bytes of an answer and where to send it out.

use std::net::{IpAddr, Ipv4Addr, SocketAddrV4};

use dhcproto::v4::{CLIENT_PORT, DhcpOption, Flags, Message, MessageType, Opcode, OptionCode};
use dhcproto::{Encodable, Encoder};
use hickory_proto::rr::Name;
use ipnet::Ipv4Net;

use crate::view::{Mac, View, as_v4};

/// Address of the metadata service.
pub const METADATA: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);
/// Longest request that is looked at: the largest UDP payload of an Ethernet frame.
pub const MAX_REQUEST_BYTES: usize = 1472;
/// Shortest answer: BOOTP clients drop shorter ones (RFC 1542 section 2.1).
const MIN_ANSWER_BYTES: usize = 300;
/// What every client can take: 576 bytes of datagram (RFC 2131 section 2) less the headers of IP and UDP.
const SAFE_ANSWER_BYTES: usize = 576 - 28;
/// Fixed part up to and with the magic cookie (RFC 2131 figure 1).
const HEADER_BYTES: usize = 240;
const MAGIC: [u8; 4] = [99, 130, 83, 99];
/// Shortest lease: below it clients would do nothing but renew.
const MIN_LEASE_S: u32 = 60;

/// An answer and its way.
#[derive(Debug, PartialEq, Eq)]
pub struct Reply {
    /// UDP payload.
    pub bytes: Vec<u8>,
    /// Broadcast, or the address of a client that has one.
    pub to: SocketAddrV4,
    /// Source address: the gateway of the client's subnet.
    pub from: Ipv4Addr,
}

/// The few things a decision needs. Options we do not know are never parsed, so odd clients are served too.
#[derive(Debug, Default)]
struct Request {
    xid: u32,
    secs: u16,
    broadcast: bool,
    ciaddr: Option<Ipv4Addr>,
    mac: Mac,
    kind: Option<u8>,
    requested: Option<Ipv4Addr>,
    server: Option<Ipv4Addr>,
    max_bytes: Option<u16>,
    client_id: Option<Vec<u8>>,
}

/// The MAC address a request is about; `None` when it is no request of an Ethernet client without relay.
#[must_use]
pub fn client_mac(bytes: &[u8]) -> Option<Mac> {
    let header: &[u8; HEADER_BYTES] = bytes.get(..HEADER_BYTES)?.try_into().ok()?;
    // op = BOOTREQUEST, htype = Ethernet, hlen = 6; giaddr (24..28) is set by relays only, and there is none in our networks.
    let fits = header[..3] == [1, 1, 6] && header[24..28] == [0; 4] && header[236..240] == MAGIC;
    fits.then(|| header[28..34].try_into().ok()).flatten()
}

/// The answer to a request; `None` when it must not be answered.
#[must_use]
pub fn answer(view: &View, bytes: &[u8]) -> Option<Reply> {
    let request = parse(bytes)?;
    let port = view.local_by_mac(&request.mac)?;
    let (address, subnet) = view.lease(port)?;
    let (_, gateway) = as_v4(subnet)?;
    let kind = match request.kind.map(MessageType::from)? {
        MessageType::Discover => MessageType::Offer,
        MessageType::Request => judge(&request, address, gateway)?,
        MessageType::Inform if request.ciaddr == Some(address) => MessageType::Ack,
        MessageType::Decline => {
            tracing::warn!(port = %port.id, %address, "the guest says that its address is already in use");
            return None;
        }
        _ => return None,
    };
    let is_inform = request.kind == Some(8);
    let mut message = reply_header(&request, kind, gateway);
    if kind != MessageType::Nak {
        if !is_inform {
            message.set_yiaddr(address);
        }
        message.set_ciaddr(request.ciaddr.unwrap_or(Ipv4Addr::UNSPECIFIED));
        offer_options(&mut message, view, port, (address, subnet), is_inform);
    }
    let to = match request.ciaddr {
        Some(ciaddr) if kind != MessageType::Nak => ciaddr,
        _ => Ipv4Addr::BROADCAST,
    };
    let limit = request.max_bytes.map_or(SAFE_ANSWER_BYTES, |max| usize::from(max).max(576) - 28);
    Some(Reply { bytes: encode(message, limit)?, to: SocketAddrV4::new(to, CLIENT_PORT), from: gateway })
}

/// RFC 2131 section 4.3.2: which of its four states the client is in follows from the options it sends.
fn judge(request: &Request, address: Ipv4Addr, gateway: Ipv4Addr) -> Option<MessageType> {
    let wanted = match (request.server, request.requested, request.ciaddr) {
        // Selecting: it took the offer of some server.
        (Some(server), Some(wanted), _) if server == gateway => wanted,
        // Init-reboot; renewing and rebinding.
        (None, Some(wanted), _) | (None, None, Some(wanted)) => wanted,
        // It took another server's offer, or says nothing at all.
        (Some(_), _, _) | (None, None, None) => return None,
    };
    Some(if wanted == address { MessageType::Ack } else { MessageType::Nak })
}

fn parse(bytes: &[u8]) -> Option<Request> {
    if bytes.len() > MAX_REQUEST_BYTES {
        return None;
    }
    let mac = client_mac(bytes)?;
    let ciaddr = v4(&bytes[12..16])?;
    let mut request = Request {
        xid: u32::from_be_bytes(bytes[4..8].try_into().ok()?),
        secs: u16::from_be_bytes(bytes[8..10].try_into().ok()?),
        broadcast: bytes[10] & 0x80 != 0,
        ciaddr: (!ciaddr.is_unspecified()).then_some(ciaddr),
        mac,
        ..Request::default()
    };
    let mut rest = &bytes[HEADER_BYTES..];
    while let Some((&code, tail)) = rest.split_first() {
        match OptionCode::from(code) {
            OptionCode::Pad => rest = tail,
            OptionCode::End => break,
            code => {
                let (&len, tail) = tail.split_first()?;
                let value = tail.get(..usize::from(len))?;
                rest = &tail[usize::from(len)..];
                match code {
                    OptionCode::MessageType => request.kind = value.first().copied(),
                    OptionCode::RequestedIpAddress => request.requested = Some(v4(value)?),
                    OptionCode::ServerIdentifier => request.server = Some(v4(value)?),
                    OptionCode::MaxMessageSize => request.max_bytes = Some(u16::from_be_bytes(value.try_into().ok()?)),
                    OptionCode::ClientIdentifier => request.client_id = Some(value.to_vec()),
                    _ => {}
                }
            }
        }
    }
    Some(request)
}

fn v4(bytes: &[u8]) -> Option<Ipv4Addr> {
    Some(Ipv4Addr::from(<[u8; 4]>::try_from(bytes).ok()?))
}

fn reply_header(request: &Request, kind: MessageType, gateway: Ipv4Addr) -> Message {
    let mut message = Message::new_with_id(
        request.xid,
        Ipv4Addr::UNSPECIFIED,
        Ipv4Addr::UNSPECIFIED,
        Ipv4Addr::UNSPECIFIED,
        Ipv4Addr::UNSPECIFIED,
        &request.mac,
    );
    message.set_opcode(Opcode::BootReply).set_secs(request.secs);
    if request.broadcast || kind == MessageType::Nak {
        message.set_flags(Flags::default().set_broadcast());
    }
    let options = message.opts_mut();
    options.insert(DhcpOption::MessageType(kind));
    options.insert(DhcpOption::ServerIdentifier(gateway));
    if let Some(id) = &request.client_id {
        // RFC 6842: a client may tell apart its interfaces by it.
        options.insert(DhcpOption::ClientIdentifier(id.clone()));
    }
    message
}

fn offer_options(
    message: &mut Message,
    view: &View,
    port: &oblak_network::PortPlan,
    (_, subnet): (Ipv4Addr, &oblak_network::SubnetPlan),
    is_inform: bool,
) {
    let Some((cidr, gateway)) = as_v4(subnet) else { return };
    let options = message.opts_mut();
    options.insert(DhcpOption::SubnetMask(cidr.netmask()));
    options.insert(DhcpOption::BroadcastAddr(cidr.broadcast()));
    options.insert(DhcpOption::DomainNameServer(dns_servers(view, gateway)));
    options.insert(DhcpOption::DomainName(view.domain.clone()));
    if let Ok(name) = Name::from_ascii(&view.domain) {
        options.insert(DhcpOption::DomainSearch(vec![name]));
    }
    options.insert(DhcpOption::InterfaceMtu(view.plan.mtu));
    if !port.hostname.is_empty() {
        options.insert(DhcpOption::Hostname(port.hostname.clone()));
    }
    // Only the first interface leads outside and to the metadata service. RFC 3442: a client that takes option 121 ignores
    // the router option, so the default route is in both.
    if port.index == 0 {
        let host = Ipv4Net::new_assert(METADATA, 32);
        let default = Ipv4Net::new_assert(Ipv4Addr::UNSPECIFIED, 0);
        options.insert(DhcpOption::Router(vec![gateway]));
        options.insert(DhcpOption::ClasslessStaticRoute(vec![(host, gateway), (default, gateway)]));
    }
    if !is_inform {
        let lease = subnet.lease_s.max(MIN_LEASE_S);
        options.insert(DhcpOption::AddressLeaseTime(lease));
        options.insert(DhcpOption::Renewal(lease / 2));
        options.insert(DhcpOption::Rebinding(lease - lease / 8));
    }
}

/// The gateway of the client's own subnet first.
fn dns_servers(view: &View, own: Ipv4Addr) -> Vec<Ipv4Addr> {
    let others = view.gateways().filter_map(|g| match g {
        IpAddr::V4(v4) if v4 != own => Some(v4),
        _ => None,
    });
    std::iter::once(own).chain(others).take(3).collect()
}

/// Leaves out what a client can do without until the answer fits.
fn encode(mut message: Message, limit: usize) -> Option<Vec<u8>> {
    for spare in [OptionCode::DomainSearch, OptionCode::BroadcastAddr, OptionCode::Hostname, OptionCode::Pad] {
        let mut bytes = Vec::with_capacity(MIN_ANSWER_BYTES);
        message.encode(&mut Encoder::new(&mut bytes)).ok()?;
        if bytes.len() <= limit {
            bytes.resize(bytes.len().max(MIN_ANSWER_BYTES), 0);
            return Some(bytes);
        }
        message.opts_mut().remove(spare);
    }
    None
}

#[cfg(test)]
mod tests;
