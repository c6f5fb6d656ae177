//! `./dev up` and `./dev down`: build, then the product's own commands.

use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result};

use crate::tools;

/// Builds the binary and says where it is.
pub fn build() -> Result<PathBuf> {
    tools::cargo(&["build", "--package", "oblak"])?;
    Ok(tools::target_dir().join("debug/oblak"))
}

/// Builds and starts; does not come back when it stays in the foreground.
pub fn up(args: &[String]) -> Result<()> {
    let binary = build()?;
    link(&binary);
    let error = Command::new(&binary).arg("up").args(args).exec();
    Err(error).context("cannot start oblak")
}

/// Puts `oblak` where shells find it, unless something else has that name.
fn link(binary: &std::path::Path) {
    let link = std::path::Path::new("/usr/local/bin/oblak");
    if std::fs::read_link(link).is_ok_and(|to| to == binary) {
        return;
    }
    let ours = std::fs::read_link(link).is_ok_and(|to| to.ends_with("debug/oblak"));
    if ours {
        let _ = std::fs::remove_file(link);
    }
    match std::os::unix::fs::symlink(binary, link) {
        Ok(()) => eprintln!("linked {} to {}", link.display(), binary.display()),
        Err(_) => eprintln!("run the command line as {}", binary.display()),
    }
}

/// Stops what `up` started.
pub fn down(args: &[String]) -> Result<()> {
    let binary = tools::target_dir().join("debug/oblak");
    let binary = if binary.exists() { binary } else { build()? };
    tools::run(Command::new(binary).arg("down").args(args))
}
