//! The container tests on a machine with version 2 of cgroups only, whatever the one is that they are started on.

use std::process::Command;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::{levels, tools};

/// Tests of these names go along; the conformance suite does so anyway.
const PROGRAMS: [&str; 4] = ["oblak_compute", "security", "lifecycle", "reboot"];
const PACKAGES: [&str; 4] = ["--package", "oblak-compute", "--package", "oblak-compute-container"];

/// Builds the tests and boots the machine, which is what one of them does.
pub fn run() -> Result<()> {
    let images = levels::images()?;
    let programs = programs()?;
    let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".into());
    let mut command = Command::new(cargo);
    command
        .args(["test", "--package", "oblak-compute-container", "--test", "cgroup2", "--"])
        .args(["--nocapture", "in_a_nested_machine"])
        .env("OBLAK_TEST_TINY", images.join("tiny"))
        .env("OBLAK_TEST_NESTED", programs.join(":"));
    tools::run(&mut command)
}

/// Where cargo has put the test programs.
fn programs() -> Result<Vec<String>> {
    tools::cargo(&[&["build", "--all-targets"], PACKAGES.as_slice()].concat())?;
    let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".into());
    let told = tools::output(
        Command::new(cargo).args(["test", "--no-run", "--quiet", "--message-format=json"]).args(PACKAGES),
    )?;
    let mut found = Vec::new();
    for line in told.lines().filter(|l| l.starts_with('{')) {
        let message: Value = serde_json::from_str(line).context("what cargo says about its build")?;
        let name = message["target"]["name"].as_str().unwrap_or_default();
        let (test, program) = (message["profile"]["test"].as_bool(), message["executable"].as_str());
        if let (Some(true), Some(program)) = (test, program)
            && PROGRAMS.contains(&name)
        {
            found.push(program.to_string());
        }
    }
    if found.len() != PROGRAMS.len() {
        bail!("of the tests {PROGRAMS:?} cargo has built only {found:?}");
    }
    Ok(found)
}
