//! Sockets inside the namespace of a network, bound to its bridge.
//!
//! Entering a namespace changes the thread that does it, so a thread of its own enters, makes the sockets, hands them over and
//! ends. The sockets stay in the namespace and work from any thread.

use std::fs::File;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use socket2::{Domain, Protocol, Socket, Type};

/// Pending connections of a listener.
const BACKLOG: i32 = 64;
/// Stack of the thread that enters a namespace, bytes: it makes a few system calls.
const STACK_BYTES: usize = 256 << 10;

/// What has to be the same for sockets to be of use: the namespace (device and inode of its file) and the bridge's index.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    netns: (u64, u64),
    bridge: u32,
}

/// The sockets of one network.
#[derive(Debug)]
pub struct Sockets {
    /// Where they are.
    pub place: Place,
    /// `0.0.0.0:67`.
    pub dhcp: Option<std::net::UdpSocket>,
    /// Port 53 of each gateway.
    pub dns: Vec<(std::net::UdpSocket, std::net::TcpListener)>,
    /// `169.254.169.254:80`.
    pub metadata: std::net::TcpListener,
}

/// Makes the sockets.
///
/// # Errors
/// With what could not be done: the namespace or the bridge does not exist (yet), an address is taken.
pub fn open(netns: &Path, bridge: &str, gateways: &[IpAddr]) -> io::Result<Sockets> {
    let file = File::open(netns).map_err(|e| context(&format!("namespace {}", netns.display()), &e))?;
    let meta = file.metadata()?;
    let thread = std::thread::Builder::new().name("netns".into()).stack_size(STACK_BYTES);
    std::thread::scope(|scope| {
        let entered = thread.spawn_scoped(scope, || {
            nix::sched::setns(&file, nix::sched::CloneFlags::CLONE_NEWNET)
                .map_err(|e| context(&format!("enter namespace {}", netns.display()), &e.into()))?;
            make(bridge, gateways, (meta.dev(), meta.ino()))
        })?;
        entered.join().unwrap_or_else(|_| Err(io::Error::other("the thread that makes sockets panicked")))
    })
}

/// Where sockets would be made now; differs from that of older ones when namespace or bridge were made anew.
#[must_use]
pub fn place_now(netns: &Path, bridge: &str, of: &impl AsRawFd) -> Option<Place> {
    let meta = std::fs::metadata(netns).ok()?;
    Some(Place { netns: (meta.dev(), meta.ino()), bridge: index_of(of.as_raw_fd(), bridge).ok()? })
}

fn make(bridge: &str, gateways: &[IpAddr], netns: (u64, u64)) -> io::Result<Sockets> {
    let dhcp = if gateways.iter().any(IpAddr::is_ipv4) {
        let socket = Socket::new(Domain::IPV4, Type::DGRAM.nonblocking(), Some(Protocol::UDP))?;
        socket.set_broadcast(true)?;
        bind(&socket, bridge, SocketAddr::from((Ipv4Addr::UNSPECIFIED, 67)))?;
        Some(socket.into())
    } else {
        None
    };
    let dns = gateways.iter().map(|gateway| {
        let address = SocketAddr::new(*gateway, 53);
        let udp = Socket::new(Domain::for_address(address), Type::DGRAM.nonblocking(), Some(Protocol::UDP))?;
        bind(&udp, bridge, address)?;
        Ok::<_, io::Error>((udp.into(), listen(bridge, address)?))
    });
    let dns = dns.collect::<io::Result<Vec<_>>>()?;
    let metadata = listen(bridge, SocketAddr::from((crate::dhcp::METADATA, 80)))?;
    let place = Place { netns, bridge: index_of(metadata.as_raw_fd(), bridge)? };
    Ok(Sockets { place, dhcp, dns, metadata })
}

fn listen(bridge: &str, address: SocketAddr) -> io::Result<std::net::TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM.nonblocking(), Some(Protocol::TCP))?;
    bind(&socket, bridge, address)?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

/// The address need not exist yet (IP_FREEBIND): the driver may still be adding it to the bridge.
fn bind(socket: &Socket, bridge: &str, address: SocketAddr) -> io::Result<()> {
    if address.is_ipv4() {
        socket.set_freebind_v4(true)?;
    } else {
        socket.set_freebind_v6(true)?;
        socket.set_only_v6(true)?;
    }
    socket.set_reuse_address(true)?;
    socket.bind_device(Some(bridge.as_bytes())).map_err(|e| context(&format!("bind to bridge {bridge}"), &e))?;
    socket.bind(&address.into()).map_err(|e| context(&format!("listen on {address} in the network"), &e))
}

/// The index of an interface in the namespace of a socket (netdevice(7), SIOCGIFINDEX).
fn index_of(socket: RawFd, interface: &str) -> io::Result<u32> {
    // SAFETY: ifreq is plain data for which all zeros is valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    if interface.len() >= request.ifr_name.len() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "the interface name is too long"));
    }
    for (to, from) in request.ifr_name.iter_mut().zip(interface.bytes()) {
        *to = from.cast_signed();
    }
    // SAFETY: the kernel reads the NUL-terminated name and writes the index into the ifreq, which outlives the call.
    if unsafe { libc::ioctl(socket, libc::SIOCGIFINDEX, &raw mut request) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: SIOCGIFINDEX filled this member of the union.
    let index = unsafe { request.ifr_ifru.ifru_ifindex };
    u32::try_from(index).map_err(io::Error::other)
}

fn context(what: &str, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{what}: {error}"))
}
