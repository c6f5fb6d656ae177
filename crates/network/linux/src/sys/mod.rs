//! What the kernel is asked for: netlink, namespaces, taps, sysctls, nft. Blocking; knows nothing of networks and ports.

pub(crate) mod arp;
pub(crate) mod link;
pub(crate) mod netlink;
pub(crate) mod netns;
pub(crate) mod nft;
pub(crate) mod sysctl;
pub(crate) mod tap;
pub(crate) mod tunnel;
pub(crate) mod userns;
