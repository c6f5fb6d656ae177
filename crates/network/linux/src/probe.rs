//! What this machine can do.

use std::process::Command;

use oblak_network::Capabilities;
use oblak_platform::driver::Availability;

use crate::names::OVERLAY;
use crate::node::Node;
use crate::overlay;
use crate::sys::link::Links;
use crate::sys::netns::NetNs;
use crate::sys::sysctl;
use crate::sys::tunnel::Tunnel;

impl Node {
    /// Looks for everything that `ensure` uses.
    pub(crate) fn probe(&self) -> Capabilities {
        let mut probed = vec![root(), nft(), br_netfilter(), tun(), self.netlink()];
        let available = probed.iter().all(|a| a.available);
        // Without it networks work, but stay on one node.
        probed.push(vxlan());
        Capabilities { available, probed }
    }

    fn netlink(&self) -> Availability {
        match Links::of(&self.host).and_then(|mut l| l.list()) {
            Ok(_) => Availability::yes("netlink", "rtnetlink"),
            Err(e) => Availability::no("netlink", format!("cannot list interfaces: {e}")),
        }
    }
}

/// Whether the kernel has VXLAN: one is made in a namespace that ends with the attempt.
pub(crate) fn vxlan() -> Availability {
    let tunnel = Tunnel { name: OVERLAY, vni: 1, local: [127, 0, 0, 1].into(), port: overlay::PORT, mtu: 1400 };
    let tried = NetNs::scratch(|| {
        let here = NetNs::current()?;
        Links::of(&here)?.add_tunnel(&tunnel, &here)
    });
    match tried {
        Ok(()) => Availability::yes("vxlan", "in the kernel"),
        Err(e) => Availability::no("vxlan", format!("no tunnels to other nodes: {e}; load the module vxlan")),
    }
}

fn root() -> Availability {
    if nix::unistd::geteuid().is_root() {
        Availability::yes("root", "running as root")
    } else {
        Availability::no("root", "networks need root; run the agent as root")
    }
}

fn nft() -> Availability {
    match Command::new("nft").arg("--version").output() {
        Ok(out) if out.status.success() => Availability::yes("nftables", String::from_utf8_lossy(&out.stdout).trim()),
        Ok(out) => Availability::no("nftables", String::from_utf8_lossy(&out.stderr).trim()),
        Err(_) => Availability::no("nftables", "nft is not installed; install the package nftables"),
    }
}

fn br_netfilter() -> Availability {
    // A module that is not loaded yet is loaded by the first `ensure`.
    let loadable = || Command::new("modprobe").args(["-n", "-q", "br_netfilter"]).status().is_ok_and(|s| s.success());
    if sysctl::get("bridge/bridge-nf-call-iptables").is_some() {
        Availability::yes("br_netfilter", "in the kernel")
    } else if loadable() {
        Availability::yes("br_netfilter", "module")
    } else {
        Availability::no("br_netfilter", "the kernel lacks br_netfilter, which security groups between guests need")
    }
}

fn tun() -> Availability {
    if std::path::Path::new("/dev/net/tun").exists() {
        Availability::yes("tap", "/dev/net/tun")
    } else {
        Availability::no("tap", "/dev/net/tun is missing; load the module tun")
    }
}
