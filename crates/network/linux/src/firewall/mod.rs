//! Texts of our nftables tables, from plain data. Pure; why they look like this is in docs/decisions/0010-bridge-firewall.md.

mod guard;
mod host;
mod network;
mod rules;

pub(crate) use host::{Tunnel, Uplink, host_table};
pub(crate) use network::network_table;

pub(crate) use guard::guard_table;

use std::fmt::Display;

/// `{ a, b }`, or nothing nft would accept for an empty list: callers leave the rule out then.
fn set(items: impl IntoIterator<Item = impl Display>) -> String {
    let items: Vec<String> = items.into_iter().map(|i| i.to_string()).collect();
    format!("{{ {} }}", items.join(", "))
}

/// A named set or map; without elements it is made empty.
fn named(what: &str, name: &str, kind: &str, items: impl IntoIterator<Item = impl Display>) -> String {
    let items: Vec<String> = items.into_iter().map(|i| i.to_string()).collect();
    let elements = if items.is_empty() { String::new() } else { format!("elements = {{ {} }}\n", items.join(", ")) };
    format!("{what} {name} {{\ntype {kind}\n{elements}}}\n")
}

/// A chain; `lines` end with a newline each.
fn chain(name: &str, hook: &str, lines: &str) -> String {
    let hook = if hook.is_empty() { String::new() } else { format!("type {hook};\n") };
    format!("chain {name} {{\n{hook}{lines}}}\n")
}

#[cfg(test)]
mod tests;
