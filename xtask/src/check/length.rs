//! Files are about one thing: most below 400 lines, none above 1,000.

use anyhow::{Result, bail};

use crate::tools;

const LIMIT: usize = 1000;

/// Counts lines.
pub fn check() -> Result<()> {
    let mut long = Vec::new();
    for suffix in [".rs", ".sh", ".ts", ".tsx"] {
        for file in tools::files(".", suffix)? {
            let lines = std::fs::read_to_string(&file)?.lines().count();
            if lines > LIMIT {
                long.push(format!("{} has {lines} lines", file.display()));
            }
        }
    }
    if long.is_empty() { Ok(()) } else { bail!("more than {LIMIT} lines: {}", long.join(", ")) }
}
