//! Settings of an agent.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;
use std::time::Duration;

use oblak_model::meta::Labels;
use oblak_model::{NodeFacts, NodeId};
use oblak_platform::layout::Layout;

/// Where tunnels to other nodes begin.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum UnderlayChoice {
    /// Nowhere: networks stay on this node.
    #[default]
    Off,
    /// At the address from which the server is reached, unless that is the loopback.
    Route,
    /// Here.
    Address(IpAddr),
}

impl FromStr for UnderlayChoice {
    type Err = String;

    /// `off`, `auto` or an address.
    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "off" => Ok(Self::Off),
            "auto" => Ok(Self::Route),
            other => {
                other.parse().map(Self::Address).map_err(|_| format!("`{other}` is not an address, `auto` or `off`"))
            }
        }
    }
}

impl fmt::Display for UnderlayChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Off => f.write_str("off"),
            Self::Route => f.write_str("auto"),
            Self::Address(address) => address.fmt(f),
        }
    }
}

/// Settings of an agent.
#[derive(Clone, Debug)]
pub struct AgentConfig {
    /// Id of the node; kept in `node/node.json`.
    pub node: NodeId,
    /// Name that the node wants.
    pub name: String,
    /// Zone of a new node.
    pub zone: String,
    /// Labels of a new node.
    pub labels: Labels,
    /// Where things lie.
    pub layout: Layout,
    /// How often a running guest is looked at.
    pub observe_every: Duration,
    /// How often usage is sampled and the lease renewed.
    pub heartbeat_every: Duration,
    /// Boot of the machine, by which a reboot is noticed.
    pub boot_id: String,
    /// Facts to report instead of what the kernel says; a simulation's machines are not this one.
    pub machine: Option<NodeFacts>,
    /// Memory kept for the host, not given to guests.
    pub reserved_memory: oblak_model::Size,
    /// Where tunnels to other nodes begin.
    pub underlay: UnderlayChoice,
}

impl AgentConfig {
    /// With the usual intervals.
    #[must_use]
    pub fn new(node: NodeId, name: &str, layout: Layout) -> Self {
        Self {
            node,
            name: name.into(),
            zone: "zone-1".into(),
            labels: Labels::new(),
            layout,
            observe_every: Duration::from_secs(1),
            heartbeat_every: Duration::from_secs(1),
            boot_id: oblak_platform::process::boot_id(),
            machine: None,
            reserved_memory: oblak_model::Size::mib(512),
            underlay: UnderlayChoice::default(),
        }
    }
}
