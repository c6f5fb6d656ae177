//! Which crate may depend on which. Any other arrow fails.

use std::process::Command;

use anyhow::{Result, bail};
use serde_json::Value;

use crate::tools;

/// Crate (without the `oblak-` in front) and what it may use of our own. Everything may use `model`.
const ARROWS: &[(&str, &[&str])] = &[
    ("model", &[]),
    ("platform", &[]),
    ("scheduler", &[]),
    ("store", &["platform"]),
    ("store-etcd", &["platform", "store"]),
    ("identity", &["platform", "store"]),
    ("backup", &["platform", "store"]),
    ("control", &["platform", "scheduler", "store"]),
    ("api", &["backup", "control", "identity", "platform", "scheduler", "store"]),
    ("client", &["platform"]),
    ("cli", &["client", "platform"]),
    ("compute", &["platform"]),
    ("compute-container", &["compute", "platform"]),
    ("compute-vm", &["compute", "platform"]),
    ("network", &["platform"]),
    ("network-linux", &["network", "platform"]),
    ("netd", &["network", "platform"]),
    ("volume", &["platform"]),
    ("volume-file", &["platform", "volume"]),
    ("volume-rbd", &["platform", "volume"]),
    ("image", &["platform"]),
    ("agent", &["client", "compute", "network", "platform", "volume"]),
    ("e2e", &["client", "platform"]),
    ("sim", &["agent", "api", "client", "compute", "control", "network", "platform", "scheduler", "store", "volume"]),
];

/// Programs that wire everything together.
const WIRING: &[&str] = &["oblak", "oblak-bench", "oblak-fuzz"];

/// Crates of the outside that these must not use, because they are pure.
const PURE: &[&str] = &["model", "scheduler"];
const IMPURE: &[&str] = &["tokio", "async-trait", "hyper", "axum", "redb", "nix", "libc", "getrandom", "tempfile"];

/// Reads `cargo metadata`.
pub fn check() -> Result<()> {
    let text = tools::output(Command::new("cargo").args(["metadata", "--format-version", "1", "--no-deps"]))?;
    let metadata: Value = serde_json::from_str(&text)?;
    let mut wrong = Vec::new();
    for package in metadata["packages"].as_array().into_iter().flatten() {
        let name = package["name"].as_str().unwrap_or_default();
        if name == "xtask" || WIRING.contains(&name) {
            continue;
        }
        let short = name.trim_start_matches("oblak-");
        let Some((_, allowed)) = ARROWS.iter().find(|(n, _)| *n == short) else {
            wrong.push(format!("{name} is not in the table of arrows (xtask/src/check/arrows.rs)"));
            continue;
        };
        // Tests may reach further (a conformance suite runs against a real store); the product may not.
        let normal = package["dependencies"].as_array().into_iter().flatten().filter(|d| d["kind"].is_null());
        for dependency in normal.filter_map(|d| d["name"].as_str()) {
            if PURE.contains(&short) && IMPURE.contains(&dependency) {
                wrong.push(format!("{name} is pure and must not use {dependency}"));
            }
            let Some(ours) = dependency.strip_prefix("oblak-") else { continue };
            if ours != "model" && !allowed.contains(&ours) {
                wrong.push(format!("{name} must not use {dependency}"));
            }
        }
    }
    if wrong.is_empty() { Ok(()) } else { bail!("{}", wrong.join("; ")) }
}
