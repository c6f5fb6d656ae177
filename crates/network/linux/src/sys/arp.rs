//! Announcements of new guests (RFC 5227, section 3), so that neighbours forget who had the address before.

use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use super::link::Mac;

/// Hardware Ethernet, protocol IPv4, their lengths, request.
const REQUEST: [u8; 8] = [0, 1, 8, 0, 6, 4, 0, 1];

/// Broadcasts on an interface of the calling thread's namespace that each address is at its MAC.
pub(crate) fn announce(index: u32, stations: &[(Mac, Ipv4Addr)]) -> io::Result<()> {
    let protocol = u16::try_from(libc::ETH_P_ARP).unwrap_or(0x0806).to_be();
    // SAFETY: a plain system call; the descriptor is new and owned at once.
    let socket = unsafe {
        let fd = libc::socket(libc::AF_PACKET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0);
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        OwnedFd::from_raw_fd(fd)
    };
    // SAFETY: all zero is a valid sockaddr_ll.
    let mut to: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    to.sll_family = u16::try_from(libc::AF_PACKET).unwrap_or(17);
    to.sll_protocol = protocol;
    to.sll_ifindex = index.cast_signed();
    to.sll_halen = 6;
    to.sll_addr[..6].fill(0xff);
    let length = libc::socklen_t::try_from(size_of_val(&to)).unwrap_or(20);
    for (mac, address) in stations {
        let mut packet = REQUEST.to_vec();
        packet.extend(mac);
        packet.extend(address.octets());
        packet.extend([0; 6]);
        packet.extend(address.octets());
        // SAFETY: both pointers come with their lengths and live across the call.
        let sent = unsafe {
            let (bytes, to) = (packet.as_ptr().cast(), (&raw const to).cast());
            libc::sendto(socket.as_raw_fd(), bytes, packet.len(), 0, to, length)
        };
        if sent < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}
