//! A small blocking netlink socket (netlink(7)): requests with an acknowledgement, and dumps.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use nix::sys::socket::{AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType};
use nix::sys::socket::{bind, recv, send, setsockopt, socket, sockopt};
use nix::sys::time::{TimeVal, TimeValLike};

/// The kernel answers at once; this only keeps a bug from blocking a thread for ever.
const TIMEOUT: Duration = Duration::from_secs(10);
/// A dump that changed while it was read is asked for again this many times.
const DUMP_ATTEMPTS: usize = 8;
/// Larger than any part the kernel sends (it uses at most 32 KiB, netlink_dump in the kernel).
const BUFFER: usize = 64 * 1024;
const HEADER: usize = 16;
const NLA_TYPE_MASK: u16 = 0x3fff;
const NLA_F_NESTED: u16 = 0x8000;
/// `NLMSGERR_ATTR_MSG`: a text of the kernel beside an error number.
const ERR_ATTR_TEXT: u16 = 1;

/// A request under construction.
pub(crate) struct Message {
    bytes: Vec<u8>,
}

impl Message {
    /// `kind` and `flags` as in `nlmsghdr`; `NLM_F_REQUEST` is added.
    pub(crate) fn new(kind: u16, flags: i32) -> Self {
        let mut bytes = vec![0; HEADER];
        let flags = u16::try_from(flags | libc::NLM_F_REQUEST).unwrap_or(0);
        bytes[4..6].copy_from_slice(&kind.to_ne_bytes());
        bytes[6..8].copy_from_slice(&flags.to_ne_bytes());
        Self { bytes }
    }

    /// The fixed part behind the header.
    pub(crate) fn fixed(mut self, fixed: &[u8]) -> Self {
        self.bytes.extend_from_slice(fixed);
        self.pad();
        self
    }

    pub(crate) fn attr(mut self, kind: u16, value: &[u8]) -> Self {
        self.push(kind, value);
        self
    }

    pub(crate) fn attr_u32(self, kind: u16, value: u32) -> Self {
        self.attr(kind, &value.to_ne_bytes())
    }

    pub(crate) fn attr_str(self, kind: u16, value: &str) -> Self {
        let mut bytes = value.as_bytes().to_vec();
        bytes.push(0);
        self.attr(kind, &bytes)
    }

    /// A nested attribute; `fill` adds what is inside.
    pub(crate) fn nest(mut self, kind: u16, fill: impl FnOnce(Self) -> Self) -> Self {
        let start = self.bytes.len();
        self.bytes.extend_from_slice(&[0; 4]);
        let mut this = fill(self);
        let length = u16::try_from(this.bytes.len() - start).unwrap_or(u16::MAX);
        this.bytes[start..start + 2].copy_from_slice(&length.to_ne_bytes());
        this.bytes[start + 2..start + 4].copy_from_slice(&(kind | NLA_F_NESTED).to_ne_bytes());
        this
    }

    fn push(&mut self, kind: u16, value: &[u8]) {
        let length = u16::try_from(4 + value.len()).unwrap_or(u16::MAX);
        self.bytes.extend_from_slice(&length.to_ne_bytes());
        self.bytes.extend_from_slice(&kind.to_ne_bytes());
        self.bytes.extend_from_slice(value);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

/// Attributes in `bytes`: (kind, value). Ends quietly at the first malformed one.
pub(crate) fn attrs(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let length = usize::from(u16::from_ne_bytes([*bytes.first()?, *bytes.get(1)?]));
        let kind = u16::from_ne_bytes([*bytes.get(2)?, *bytes.get(3)?]) & NLA_TYPE_MASK;
        let value = bytes.get(4..length)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    })
}

/// A 32-bit value at `offset`, 0 when it is not there.
pub(crate) fn u32_at(bytes: &[u8], offset: usize) -> u32 {
    bytes.get(offset..offset + 4).map_or(0, |b| u32::from_ne_bytes([b[0], b[1], b[2], b[3]]))
}

/// Text without its final zero.
pub(crate) fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).trim_end_matches('\0').to_string()
}

/// A socket in the network namespace of the thread that opened it; it stays there wherever it is used.
pub(crate) struct Netlink {
    fd: OwnedFd,
    sequence: u32,
    buffer: Vec<u8>,
}

impl Netlink {
    /// Opens a socket of `protocol` in the namespace of the calling thread.
    pub(crate) fn open(protocol: SockProtocol) -> io::Result<Self> {
        Self::in_groups(protocol, 0)
    }

    /// Opens a socket that is told of what concerns `group`, one of the first 32. It is polled, and emptied by [`Self::drain`].
    pub(crate) fn listen(protocol: SockProtocol, group: u32) -> io::Result<Self> {
        Self::in_groups(protocol, 1 << (group - 1))
    }

    fn in_groups(protocol: SockProtocol, groups: u32) -> io::Result<Self> {
        let fd = socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, protocol)?;
        setsockopt(
            &fd,
            sockopt::ReceiveTimeout,
            &TimeVal::milliseconds(TIMEOUT.as_millis().try_into().unwrap_or(10_000)),
        )?;
        for option in [libc::NETLINK_EXT_ACK, libc::NETLINK_CAP_ACK] {
            let on: libc::c_int = 1;
            let size = libc::socklen_t::try_from(size_of_val(&on)).unwrap_or(4);
            // SAFETY: a live socket and a pointer to an int with its size; failure only means shorter error texts.
            unsafe { libc::setsockopt(fd.as_raw_fd(), libc::SOL_NETLINK, option, (&raw const on).cast(), size) };
        }
        bind(fd.as_raw_fd(), &NetlinkAddr::new(0, groups))?;
        Ok(Self { fd, sequence: 0, buffer: vec![0; BUFFER] })
    }

    /// Throws away what has been told so far. Returns whether anything was, also when it was more than the socket keeps.
    pub(crate) fn drain(&mut self) -> io::Result<bool> {
        let mut any = false;
        loop {
            match recv(self.fd.as_raw_fd(), &mut self.buffer, MsgFlags::MSG_DONTWAIT) {
                Ok(_) | Err(nix::Error::ENOBUFS) => any = true,
                Err(nix::Error::EAGAIN) => return Ok(any),
                Err(nix::Error::EINTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
    }

    /// Sends a request and waits for its acknowledgement.
    pub(crate) fn request(&mut self, message: Message) -> io::Result<()> {
        self.transact(message, libc::NLM_F_ACK).map(drop)
    }

    /// All parts of the answer to a dump, without their headers.
    pub(crate) fn dump(&mut self, make: impl Fn() -> Message) -> io::Result<Vec<Vec<u8>>> {
        for _ in 0..DUMP_ATTEMPTS {
            let (parts, interrupted) = self.transact(make(), libc::NLM_F_DUMP)?;
            if !interrupted {
                return Ok(parts);
            }
        }
        Err(io::Error::other("the kernel's list changed all the time while it was read"))
    }

    /// The one answer to a question.
    pub(crate) fn get(&mut self, message: Message) -> io::Result<Option<Vec<u8>>> {
        Ok(self.transact(message, libc::NLM_F_ACK)?.0.into_iter().next())
    }

    fn transact(&mut self, mut message: Message, flags: i32) -> io::Result<(Vec<Vec<u8>>, bool)> {
        self.sequence = self.sequence.wrapping_add(1);
        let length = u32::try_from(message.bytes.len()).unwrap_or(u32::MAX);
        message.bytes[0..4].copy_from_slice(&length.to_ne_bytes());
        let flags = u16::from_ne_bytes([message.bytes[6], message.bytes[7]]) | u16::try_from(flags).unwrap_or(0);
        message.bytes[6..8].copy_from_slice(&flags.to_ne_bytes());
        message.bytes[8..12].copy_from_slice(&self.sequence.to_ne_bytes());
        send(self.fd.as_raw_fd(), &message.bytes, MsgFlags::empty())?;
        let (mut parts, mut interrupted) = (Vec::new(), false);
        loop {
            let size = recv(self.fd.as_raw_fd(), &mut self.buffer, MsgFlags::empty())?;
            let mut rest = &self.buffer[..size];
            while rest.len() >= HEADER {
                let length = u32_at(rest, 0) as usize;
                let Some(body) = rest.get(HEADER..length) else {
                    return Err(io::Error::new(io::ErrorKind::InvalidData, "short netlink message"));
                };
                let (kind, flags) = (u16::from_ne_bytes([rest[4], rest[5]]), u16::from_ne_bytes([rest[6], rest[7]]));
                let ours = u32_at(rest, 8) == self.sequence;
                rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
                if !ours {
                    continue; // left over from a request that timed out
                }
                interrupted |= i32::from(flags) & libc::NLM_F_DUMP_INTR != 0;
                match i32::from(kind) {
                    libc::NLMSG_ERROR => return result(body, flags).map(|()| (parts, interrupted)),
                    libc::NLMSG_DONE => return Ok((parts, interrupted)),
                    _ => parts.push(body.to_vec()),
                }
            }
        }
    }
}

impl AsFd for Netlink {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

fn result(body: &[u8], flags: u16) -> io::Result<()> {
    let code = u32_at(body, 0).cast_signed();
    if code == 0 {
        return Ok(());
    }
    let error = io::Error::from_raw_os_error(-code);
    // struct nlmsgerr: the error, then the header of the request (only that, because of NETLINK_CAP_ACK), then attributes.
    let has_text = i32::from(flags) & libc::NLM_F_ACK_TLVS != 0;
    let reason = attrs(body.get(4 + HEADER..).unwrap_or_default()).find(|(kind, _)| has_text && *kind == ERR_ATTR_TEXT);
    if let Some((_, reason)) = reason {
        tracing::debug!(code = -code, reason = text(reason), "netlink request refused");
    }
    Err(error)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_round_trip_and_survive_garbage() {
        let message = Message::new(1, 0).attr_u32(3, 7).nest(5, |m| m.attr_str(1, "abc"));
        let all: Vec<_> = attrs(&message.bytes[HEADER..]).collect();
        assert_eq!(all[0], (3, &7u32.to_ne_bytes()[..]));
        assert_eq!(attrs(all[1].1).next().map(|(k, v)| (k, text(v))), Some((1, "abc".to_string())));
        assert_eq!(attrs(&[9, 0, 1, 0, 0]).count(), 0);
        assert_eq!(attrs(&[2, 0, 1, 0]).count(), 0);
        assert_eq!(attrs(&[1, 2, 3]).count(), 0);
    }
}
