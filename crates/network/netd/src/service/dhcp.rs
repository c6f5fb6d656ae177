//! Packets of DHCP.

use std::io::{self, IoSlice};
use std::os::fd::AsRawFd;
use std::rc::Rc;
use std::time::Instant;

use nix::sys::socket::{ControlMessage, MsgFlags, SockaddrIn, sendmsg};
use tokio::io::Interest;
use tokio::net::UdpSocket;

use super::Context;
use crate::dhcp::{MAX_REQUEST_BYTES, Reply, answer, client_mac};
use crate::limit::Buckets;

/// Requests of one guest at once, and per second in the long run. A boot takes two to four.
const BURST: f64 = 10.0;
const PER_SECOND: f64 = 2.0;
/// Guests whose rate is remembered.
const MAX_GUESTS: usize = 4096;

pub(super) async fn serve(context: Rc<Context>, socket: UdpSocket) {
    let mut buffer = vec![0; MAX_REQUEST_BYTES + 1];
    let mut limit = Buckets::new(BURST, PER_SECOND, MAX_GUESTS);
    loop {
        let len = match socket.recv(&mut buffer).await {
            Ok(len) => len,
            Err(error) => {
                tracing::debug!(network = %context.id, %error, "cannot receive");
                tokio::time::sleep(super::ACCEPT_PAUSE).await;
                continue;
            }
        };
        let request = &buffer[..len];
        let (Some(view), Some(mac)) = (context.view(), client_mac(request)) else { continue };
        // Only guests we know get a bucket, so strangers cannot use them up.
        if view.local_by_mac(&mac).is_none() || !limit.take(&mac, Instant::now()) {
            continue;
        }
        if let Some(reply) = answer(&view, request)
            && let Err(error) = send(&socket, &reply).await
        {
            tracing::debug!(network = %context.id, to = %reply.to, %error, "cannot send an answer");
        }
    }
}

/// Sends with the gateway as source address: the kernel would take any address of the bridge for a broadcast (ip(7), IP_PKTINFO).
async fn send(socket: &UdpSocket, reply: &Reply) -> io::Result<()> {
    let info = libc::in_pktinfo {
        ipi_ifindex: 0,
        ipi_spec_dst: libc::in_addr { s_addr: u32::from_ne_bytes(reply.from.octets()) },
        ipi_addr: libc::in_addr { s_addr: 0 },
    };
    let to = SockaddrIn::from(reply.to);
    socket
        .async_io(Interest::WRITABLE, || {
            let control = [ControlMessage::Ipv4PacketInfo(&info)];
            sendmsg(socket.as_raw_fd(), &[IoSlice::new(&reply.bytes)], &control, MsgFlags::MSG_DONTWAIT, Some(&to))?;
            Ok(())
        })
        .await
}
