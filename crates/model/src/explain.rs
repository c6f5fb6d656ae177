//! Why an instance does not fit anywhere, in a form for people and for programs.

use std::fmt;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The answer to "why is it not running".
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Explanation {
    /// Nodes looked at.
    pub nodes: u64,
    /// Nodes that fit.
    pub fitting: u64,
    /// What ruled nodes out. A node counts for the first constraint that it fails.
    pub constraints: Vec<ConstraintReport>,
}

/// One constraint that ruled nodes out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ConstraintReport {
    /// Stable name: `state`, `isolation`, `labels`, `zone`, `cpu`, `memory`, `disk`, `affinity`, `anti_affinity`, `volume`, `feature`.
    pub constraint: String,
    /// How many nodes it ruled out.
    pub nodes: u64,
    /// For people, with the nearest miss: `memory 1 TiB asked, 21.4 GiB free on n1`.
    pub detail: String,
}

impl fmt::Display for Explanation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of {} nodes fit", self.fitting, self.nodes)?;
        if self.nodes == 0 {
            return f.write_str(": there is no node; start an agent with `oblak agent`");
        }
        for (i, c) in self.constraints.iter().enumerate() {
            let sep = if i == 0 { ": " } else { "; " };
            let s = if c.nodes == 1 { "" } else { "s" };
            write!(f, "{sep}{} ({} node{s})", c.detail, c.nodes)?;
        }
        Ok(())
    }
}
