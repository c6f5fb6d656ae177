//! Files that are made from code and committed: the API document and the reference of the command line.

use std::path::Path;
use std::process::Command;

use anyhow::{Result, bail};

use crate::{tools, up};

const OPENAPI: &str = "openapi/oblak.json";
const CLI: &str = "docs/reference/cli.md";

fn wanted() -> Result<[(&'static str, String); 2]> {
    let binary = up::build()?;
    let openapi = tools::output(Command::new(&binary).args(["generate", "openapi"]))?;
    let cli = tools::output(Command::new(&binary).args(["generate", "cli-reference"]))?;
    Ok([(OPENAPI, openapi), (CLI, cli)])
}

/// Fails when a committed file is not what the code makes.
pub fn check() -> Result<()> {
    for (path, text) in wanted()? {
        let committed = std::fs::read_to_string(path).unwrap_or_default();
        if committed != text {
            bail!("{path} is not what the code makes; run `cargo xtask generate` and commit it");
        }
    }
    Ok(())
}

/// Writes them anew.
pub fn generate() -> Result<()> {
    for (path, text) in wanted()? {
        if let Some(dir) = Path::new(path).parent() {
            std::fs::create_dir_all(dir)?;
        }
        std::fs::write(path, text)?;
        println!("wrote {path}");
    }
    Ok(())
}

/// Every relative link in the documentation leads to a file, and every test that the specification names exists.
pub fn docs() -> Result<()> {
    specification()?;
    let mut broken = Vec::new();
    for file in tools::files(".", ".md")? {
        let text = std::fs::read_to_string(&file)?;
        let dir = file.parent().unwrap_or(Path::new("."));
        for target in links(&text) {
            let path = target.split('#').next().unwrap_or_default();
            if !path.is_empty() && !path.contains("://") && !path.starts_with("mailto:") && !dir.join(path).exists() {
                broken.push(format!("{}: {target}", file.display()));
            }
        }
    }
    if broken.is_empty() { Ok(()) } else { bail!("links that lead nowhere: {}", broken.join(", ")) }
}

/// The specification names tests as `path.rs::function`.
fn specification() -> Result<()> {
    let text = std::fs::read_to_string("SPECIFICATION.md")?;
    let mut missing = Vec::new();
    for name in text.split('`').filter(|word| word.contains(".rs::")) {
        let Some((file, function)) = name.split_once("::") else { continue };
        let function = function.rsplit("::").next().unwrap_or(function);
        let exists = std::fs::read_to_string(file).is_ok_and(|code| code.contains(&format!("fn {function}")));
        if !exists {
            missing.push(name);
        }
    }
    if missing.is_empty() {
        Ok(())
    } else {
        bail!("SPECIFICATION.md names tests that do not exist: {}", missing.join(", "))
    }
}

/// Targets of `[text](target)` outside of code blocks.
fn links(text: &str) -> Vec<&str> {
    let mut out = Vec::new();
    let mut code = false;
    for line in text.lines() {
        if line.trim_start().starts_with("```") {
            code = !code;
        }
        if code {
            continue;
        }
        let mut rest = line;
        while let Some(at) = rest.find("](") {
            rest = &rest[at + 2..];
            if let Some(end) = rest.find(')') {
                out.push(&rest[..end]);
            }
        }
    }
    out
}
