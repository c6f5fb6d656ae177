//! Ethernet frames by hand, and packet sockets to send and see them.

use std::ffi::CString;
use std::fs::File;
use std::io::{Read, Write};
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, FromRawFd};
use std::path::Path;
use std::time::{Duration, Instant};

use super::within;

pub type Mac = [u8; 6];
pub const BROADCAST: Mac = [0xff; 6];

pub fn mac(text: &str) -> Mac {
    let mut mac = [0; 6];
    for (to, part) in mac.iter_mut().zip(text.split(':')) {
        *to = u8::from_str_radix(part, 16).unwrap();
    }
    mac
}

pub fn ethernet(to: Mac, from: Mac, kind: u16, payload: &[u8]) -> Vec<u8> {
    [&to[..], &from, &kind.to_be_bytes(), payload].concat()
}

/// An UDP datagram in IPv4 with `text` as payload.
pub fn udp(from: Ipv4Addr, to: Ipv4Addr, ports: (u16, u16), text: &str) -> Vec<u8> {
    datagram(from, to, ports, text.as_bytes())
}

/// An UDP datagram in IPv4.
pub fn datagram(from: Ipv4Addr, to: Ipv4Addr, ports: (u16, u16), payload: &[u8]) -> Vec<u8> {
    let length = u16::try_from(28 + payload.len()).unwrap();
    let mut ip = vec![0x45, 0];
    ip.extend(length.to_be_bytes());
    ip.extend([0, 0, 0, 0, 64, 17, 0, 0]);
    ip.extend(from.octets());
    ip.extend(to.octets());
    let sum: u32 = ip.chunks(2).map(|c| u32::from(u16::from_be_bytes([c[0], c[1]]))).sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    ip[10..12].copy_from_slice(&(!(folded as u16)).to_be_bytes());
    ip.extend(ports.0.to_be_bytes());
    ip.extend(ports.1.to_be_bytes());
    ip.extend((length - 20).to_be_bytes());
    ip.extend([0, 0]);
    ip.extend(payload);
    ip
}

/// An ARP answer that says "`address` is at `mac`", with `text` behind it.
pub fn arp(sender: Mac, address: Ipv4Addr, target: Ipv4Addr, text: &str) -> Vec<u8> {
    let mut arp = vec![0, 1, 8, 0, 6, 4, 0, 2];
    arp.extend(sender);
    arp.extend(address.octets());
    arp.extend([0; 6]);
    arp.extend(target.octets());
    arp.extend(text.as_bytes());
    arp
}

/// A packet socket on one interface of a namespace.
pub struct Wire(File);

impl Wire {
    pub fn open(netns: &Path, device: &str) -> Self {
        within(netns, || {
            let all = (libc::ETH_P_ALL as u16).to_be();
            // SAFETY: plain system calls on a descriptor that is owned at once; the address is fully initialised.
            unsafe {
                let fd = libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, i32::from(all));
                assert!(fd >= 0, "packet socket: {}", std::io::Error::last_os_error());
                let file = File::from_raw_fd(fd);
                let name = CString::new(device).unwrap();
                let mut address: libc::sockaddr_ll = std::mem::zeroed();
                address.sll_family = libc::AF_PACKET as u16;
                address.sll_protocol = all;
                address.sll_ifindex = libc::if_nametoindex(name.as_ptr()) as i32;
                let size = size_of_val(&address) as u32;
                assert_eq!(libc::bind(file.as_raw_fd(), (&raw const address).cast(), size), 0);
                let short = libc::timeval { tv_sec: 0, tv_usec: 50_000 };
                let size = size_of_val(&short) as u32;
                libc::setsockopt(fd, libc::SOL_SOCKET, libc::SO_RCVTIMEO, (&raw const short).cast(), size);
                Self(file)
            }
        })
    }

    pub fn send(&mut self, frame: &[u8]) {
        assert_eq!(self.0.write(frame).unwrap(), frame.len());
    }

    /// Frames that come in until one contains `last` (which is included), or until `wait` is over.
    pub fn until(&mut self, last: &str, wait: Duration) -> Vec<Vec<u8>> {
        self.until_one(|frame| contains(frame, last), wait)
    }

    /// Frames that come in until `last` holds for one (which is included), or until `wait` is over.
    pub fn until_one(&mut self, last: impl Fn(&[u8]) -> bool, wait: Duration) -> Vec<Vec<u8>> {
        let (end, mut seen, mut buffer) = (Instant::now() + wait, Vec::new(), [0; 2048]);
        while Instant::now() < end {
            let Ok(size) = self.0.read(&mut buffer) else { continue };
            seen.push(buffer[..size].to_vec());
            if last(&buffer[..size]) {
                break;
            }
        }
        seen
    }
}

pub fn contains(frame: &[u8], text: &str) -> bool {
    frame.windows(text.len()).any(|w| w == text.as_bytes())
}
