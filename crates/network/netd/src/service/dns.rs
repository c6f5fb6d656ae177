//! Packets and connections of DNS.

use std::io;
use std::net::IpAddr;
use std::rc::Rc;
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::Context;
use crate::dns::{HEADER_BYTES, Outcome, Transport, answer};
use crate::limit::Buckets;

/// Questions of one guest at once, and per second in the long run.
const BURST: f64 = 400.0;
const PER_SECOND: f64 = 200.0;
/// Guests whose rate is remembered.
const MAX_GUESTS: usize = 4096;
/// Questions that wait for servers outside, per socket. More are dropped; their clients ask again.
const MAX_WAITING: usize = 128;
/// Longest question over UDP: one name and some EDNS options.
const MAX_QUESTION_BYTES: usize = 1024;
/// Connections of one guest, and of a network.
const CONNECTIONS: (usize, usize) = (8, 64);
/// Questions over one connection.
const MAX_QUESTIONS: usize = 64;
/// How long a connection may be idle or stuck.
const IDLE: Duration = Duration::from_secs(10);

pub(super) async fn serve_udp(context: Rc<Context>, socket: UdpSocket) {
    let socket = Rc::new(socket);
    let mut buffer = vec![0; MAX_QUESTION_BYTES];
    let mut limit = Buckets::new(BURST, PER_SECOND, MAX_GUESTS);
    let mut waiting = JoinSet::new();
    loop {
        while waiting.try_join_next().is_some() {}
        let (len, peer) = match socket.recv_from(&mut buffer).await {
            Ok(received) => received,
            Err(error) => {
                tracing::debug!(network = %context.id, %error, "cannot receive");
                tokio::time::sleep(super::ACCEPT_PAUSE).await;
                continue;
            }
        };
        let Some(view) = context.view() else { continue };
        if !view.may_ask(peer.ip()) || !limit.take(&peer.ip(), Instant::now()) {
            continue;
        }
        match answer(&view, &buffer[..len], Transport::Udp) {
            Outcome::Answer(bytes) => {
                // An answer that does not fit into the socket's buffer is lost like any datagram.
                let _ = socket.try_send_to(&bytes, peer);
            }
            Outcome::Forward(question) if waiting.len() < MAX_WAITING => {
                let (context, socket) = (Rc::clone(&context), Rc::clone(&socket));
                waiting.spawn_local(async move {
                    let forwarders = &view.plan.forwarders;
                    let answer =
                        context.forwarder.ask(&context.shared.outside, forwarders, &question, Transport::Udp).await;
                    if let Some(bytes) = answer {
                        let _ = socket.send_to(&bytes, peer).await;
                    }
                });
            }
            Outcome::Forward(_) | Outcome::Drop => {}
        }
    }
}

pub(super) async fn serve_tcp(context: Rc<Context>, listener: TcpListener) {
    super::accept(context, listener, CONNECTIONS, |context, stream, peer| async move {
        if let Err(error) = connection(&context, stream, peer).await {
            tracing::debug!(network = %context.id, %peer, %error, "a DNS connection ended");
        }
    })
    .await;
}

async fn connection(context: &Context, mut stream: TcpStream, peer: IpAddr) -> io::Result<()> {
    for _ in 0..MAX_QUESTIONS {
        let read = async {
            let len = usize::from(stream.read_u16().await?);
            if !(HEADER_BYTES..=MAX_QUESTION_BYTES).contains(&len) {
                return Err(io::Error::new(io::ErrorKind::InvalidData, "no question has that length"));
            }
            let mut bytes = vec![0; len];
            stream.read_exact(&mut bytes).await?;
            Ok(bytes)
        };
        let request = match timeout(IDLE, read).await? {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
            other => other?,
        };
        let Some(view) = context.view().filter(|v| v.may_ask(peer)) else { return Ok(()) };
        let reply = match answer(&view, &request, Transport::Tcp) {
            Outcome::Answer(bytes) => Some(bytes),
            Outcome::Forward(question) => {
                context.forwarder.ask(&context.shared.outside, &view.plan.forwarders, &question, Transport::Tcp).await
            }
            Outcome::Drop => None,
        };
        let Some(reply) = reply else { return Ok(()) };
        let mut framed = Vec::with_capacity(reply.len() + 2);
        framed.extend(u16::try_from(reply.len()).map_err(io::Error::other)?.to_be_bytes());
        framed.extend(reply);
        timeout(IDLE, stream.write_all(&framed)).await??;
    }
    Ok(())
}
