//! Networks that reach over several nodes: what a plan says about it, and the optional ability [`Overlay`].

use std::net::IpAddr;

use async_trait::async_trait;
use oblak_platform::driver::{DriverError, DriverResult};
use serde::{Deserialize, Serialize};

use crate::{NetworkPlan, PortKind, PortPlan};

/// Bytes that a tunnel adds to a packet over IPv4: Ethernet 14, VXLAN 8, UDP 8, IPv4 20 (RFC 7348).
pub const OVERHEAD_V4: u16 = 50;
/// The same over IPv6, whose header has 40 bytes.
pub const OVERHEAD_V6: u16 = 70;
/// VXLAN network identifiers have 24 bits (RFC 7348, section 5).
pub const VNI_MAX: u32 = (1 << 24) - 1;

/// How a network reaches ports on other nodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OverlayPlan {
    /// Number of the network on the wire, the same on all nodes: 1 to [`VNI_MAX`].
    pub vni: u32,
    /// Address of this node that tunnels begin at. All tunnels of a network are of its family.
    pub local: IpAddr,
}

/// Where tunnels of this node begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Underlay {
    /// Address of this node.
    pub address: IpAddr,
    /// MTU of the interface that has the address, in bytes.
    pub mtu: u16,
}

/// Optional ability of a network driver: networks over several nodes.
#[async_trait]
pub trait Overlay: Send + Sync {
    /// Looks whether tunnels can begin at `address` of this node.
    ///
    /// # Errors
    /// Unsupported when the kernel has no tunnels; permanent when no interface of the node that is up has the address.
    async fn underlay(&self, address: IpAddr) -> DriverResult<Underlay>;
}

/// The largest packet of a guest that fits whole into a tunnel over an underlay with this MTU.
#[must_use]
pub fn guest_mtu(local: IpAddr, underlay_mtu: u16) -> u16 {
    underlay_mtu.saturating_sub(if local.is_ipv4() { OVERHEAD_V4 } else { OVERHEAD_V6 })
}

/// Ports that are reached through a tunnel, with its far end.
pub fn tunnels(plan: &NetworkPlan) -> impl Iterator<Item = (&PortPlan, IpAddr)> {
    plan.ports.iter().filter(|p| p.kind == PortKind::Remote).filter_map(|p| Some((p, p.tunnel?)))
}

/// Refuses a plan whose tunnels cannot be. Every driver calls it.
///
/// # Errors
/// `plan_invalid`, naming what is wrong.
pub fn check(plan: &NetworkPlan) -> DriverResult<()> {
    let bad = |detail: String| Err(DriverError::permanent("plan_invalid", format!("network {}: {detail}", plan.name)));
    if let Some(overlay) = plan.overlay.filter(|o| o.vni == 0 || o.vni > VNI_MAX) {
        return bad(format!("vni {} is not in 1 to {VNI_MAX}", overlay.vni));
    }
    for (port, far) in tunnels(plan) {
        let Some(overlay) = plan.overlay else {
            return bad(format!("port {} is behind a tunnel, but the network has no overlay", port.id));
        };
        if far == overlay.local {
            return bad(format!("port {}: its tunnel ends at {far}, which is this node", port.id));
        }
        if far.is_ipv4() != overlay.local.is_ipv4() {
            return bad(format!(
                "port {}: its tunnel would join {} and {far}, of two families",
                port.id, overlay.local
            ));
        }
        if far.is_unspecified() || far.is_multicast() {
            return bad(format!("port {}: {far} is not the address of a node", port.id));
        }
    }
    Ok(())
}
