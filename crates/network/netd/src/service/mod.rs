//! The tasks that serve one network: sockets on one side, the pure modules on the other.

use std::cell::RefCell;
use std::collections::HashMap;
use std::io;
use std::net::IpAddr;
use std::rc::Rc;
use std::time::Duration;

use oblak_model::NetworkId;
use oblak_platform::clock::SharedClock;
use tokio::task::JoinSet;

use crate::dns::forward::{Forwarder, Outside};
use crate::metadata::token::Secret;
use crate::netns::{Place, Sockets};
use crate::view::{View, World};

mod dhcp;
mod dns;
mod metadata;

/// Pause after an accept failed for want of descriptors or memory.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What all networks share. The runtime has one thread, hence no locks.
pub struct Shared {
    /// Every network.
    pub world: RefCell<World>,
    /// DNS servers outside.
    pub outside: Outside,
    /// Key of metadata tokens.
    pub secret: Secret,
    /// Wall clock, for metadata tokens.
    pub clock: SharedClock,
}

/// What the tasks of one network share.
struct Context {
    id: NetworkId,
    shared: Rc<Shared>,
    forwarder: Forwarder,
}

impl Context {
    /// The network as it is now; `None` once it is gone.
    fn view(&self) -> Option<Rc<View>> {
        self.shared.world.borrow().get(self.id)
    }
}

/// A served network; dropping it ends its tasks and closes its sockets.
pub struct Service {
    place: Place,
    /// Refers to the same socket as the metadata listener; asked for the bridge's index.
    probe: std::net::TcpListener,
    _tasks: JoinSet<()>,
}

impl Service {
    /// Starts serving. Must run inside a `LocalSet`.
    ///
    /// # Errors
    /// When the runtime cannot take over a socket.
    pub fn start(shared: Rc<Shared>, id: NetworkId, sockets: Sockets) -> io::Result<Self> {
        let context = Rc::new(Context { id, shared, forwarder: Forwarder::default() });
        let mut tasks = JoinSet::new();
        if let Some(socket) = sockets.dhcp {
            tasks.spawn_local(dhcp::serve(Rc::clone(&context), tokio::net::UdpSocket::from_std(socket)?));
        }
        for (udp, tcp) in sockets.dns {
            tasks.spawn_local(dns::serve_udp(Rc::clone(&context), tokio::net::UdpSocket::from_std(udp)?));
            tasks.spawn_local(dns::serve_tcp(Rc::clone(&context), tokio::net::TcpListener::from_std(tcp)?));
        }
        let probe = sockets.metadata.try_clone()?;
        tasks.spawn_local(metadata::serve(context, tokio::net::TcpListener::from_std(sockets.metadata)?));
        Ok(Self { place: sockets.place, probe, _tasks: tasks })
    }

    /// Whether its sockets are still in the namespace at `netns`, on the bridge of that name.
    pub fn is_in_place(&self, netns: &std::path::Path, bridge: &str) -> bool {
        crate::netns::place_now(netns, bridge, &self.probe) == Some(self.place)
    }
}

/// Open connections, per peer and together.
struct Connections {
    per_peer: HashMap<IpAddr, usize>,
    max_per_peer: usize,
    max: usize,
    count: usize,
}

/// One connection; makes room when dropped.
struct Slot {
    of: Rc<RefCell<Connections>>,
    peer: IpAddr,
}

impl Connections {
    fn new(max_per_peer: usize, max: usize) -> Rc<RefCell<Self>> {
        Rc::new(RefCell::new(Self { per_peer: HashMap::new(), max_per_peer, max, count: 0 }))
    }

    fn take(of: &Rc<RefCell<Self>>, peer: IpAddr) -> Option<Slot> {
        let mut all = of.borrow_mut();
        let mine = all.per_peer.get(&peer).copied().unwrap_or(0);
        if mine >= all.max_per_peer || all.count >= all.max {
            return None;
        }
        all.per_peer.insert(peer, mine + 1);
        all.count += 1;
        Some(Slot { of: Rc::clone(of), peer })
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let mut all = self.of.borrow_mut();
        all.count -= 1;
        if let Some(mine) = all.per_peer.get_mut(&self.peer) {
            *mine -= 1;
            if *mine == 0 {
                all.per_peer.remove(&self.peer);
            }
        }
    }
}

/// Accepts connections of guests for ever, at most so many, and runs `handle` on each.
async fn accept<F, Fut>(
    context: Rc<Context>,
    listener: tokio::net::TcpListener,
    (per_peer, max): (usize, usize),
    handle: F,
) where
    F: Fn(Rc<Context>, tokio::net::TcpStream, IpAddr) -> Fut,
    Fut: Future<Output = ()> + 'static,
{
    let connections = Connections::new(per_peer, max);
    let mut tasks = JoinSet::new();
    loop {
        while tasks.try_join_next().is_some() {}
        let (stream, peer) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(network = %context.id, %error, "cannot accept a connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let peer = peer.ip().to_canonical();
        let Some(slot) = Connections::take(&connections, peer) else { continue };
        let handled = handle(Rc::clone(&context), stream, peer);
        tasks.spawn_local(async move {
            handled.await;
            drop(slot);
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connections_are_counted_per_peer() {
        let connections = Connections::new(2, 3);
        let (a, b) = ("10.0.0.1".parse().unwrap(), "10.0.0.2".parse().unwrap());
        let first = Connections::take(&connections, a).unwrap();
        let _second = Connections::take(&connections, a).unwrap();
        assert!(Connections::take(&connections, a).is_none());
        let _third = Connections::take(&connections, b).unwrap();
        assert!(Connections::take(&connections, b).is_none(), "all are taken");
        drop(first);
        assert!(Connections::take(&connections, b).is_some());
    }
}
