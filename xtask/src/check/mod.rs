//! The rules of the house.

mod arrows;
mod bans;
pub mod drift;
mod length;

use anyhow::{Result, bail};

use crate::tools;

type Step = fn() -> Result<()>;

/// Everything; says all that is wrong before it fails.
pub fn all() -> Result<()> {
    some(&[])
}

/// The steps whose names contain one of `words`, or all.
pub fn some(words: &[String]) -> Result<()> {
    let mut failed = Vec::new();
    let steps: [(&str, Step); 6] = [
        ("arrows between crates", arrows::check),
        ("file lengths", length::check),
        ("banned calls", bans::check),
        ("formatting", || tools::cargo(&["fmt", "--all", "--check"])),
        ("lints", || tools::cargo(&["clippy", "--workspace", "--all-targets", "--quiet", "--", "-D", "warnings"])),
        ("generated files", drift::check),
    ];
    for (name, step) in
        steps.into_iter().filter(|(n, _)| words.is_empty() || words.iter().any(|w| n.contains(w.as_str())))
    {
        match step() {
            Ok(()) => println!("ok      {name}"),
            Err(error) => {
                println!("FAILED  {name}: {error:#}");
                failed.push(name);
            }
        }
    }
    if failed.is_empty() { Ok(()) } else { bail!("{}", failed.join(", ")) }
}
