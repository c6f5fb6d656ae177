//! The levels of the test run, each with a budget of time that is printed at the end.

use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

use crate::{check, tools, up};

struct Level {
    name: &'static str,
    budget: Duration,
    run: fn() -> Result<()>,
}

const fn minutes(n: u64) -> Duration {
    Duration::from_secs(n * 60)
}

/// Together at most 40 minutes on two cores, on a clone that has built nothing yet.
const LEVELS: &[Level] = &[
    Level { name: "build", budget: minutes(8), run: build },
    Level { name: "check", budget: minutes(5), run: check::all },
    Level { name: "unit", budget: minutes(7), run: unit },
    Level { name: "e2e", budget: minutes(19), run: e2e },
    Level { name: "docs", budget: minutes(1), run: check::drift::docs },
];

/// Runs all levels, or those that are named.
pub fn test(names: &[String]) -> Result<()> {
    if let Some(unknown) = names.iter().find(|n| LEVELS.iter().all(|l| l.name != n.as_str())) {
        bail!("no level {unknown:?}; there are: {}", LEVELS.iter().map(|l| l.name).collect::<Vec<_>>().join(" "));
    }
    let mut results = Vec::new();
    for level in LEVELS.iter().filter(|l| names.is_empty() || names.iter().any(|n| n == l.name)) {
        println!("\n== {} ==", level.name);
        let start = Instant::now();
        let outcome = (level.run)();
        if let Err(error) = &outcome {
            println!("{}: {error:#}", level.name);
        }
        results.push((level, start.elapsed(), outcome.is_ok()));
        // Without a build nothing after it can say anything.
        if level.name == "build" && outcome.is_err() {
            break;
        }
    }
    report(&results)
}

fn report(results: &[(&Level, Duration, bool)]) -> Result<()> {
    println!("\n{:<8} {:>9} {:>9}", "level", "took", "budget");
    for (level, took, good) in results {
        let late = if *took > level.budget { "  over budget" } else { "" };
        println!(
            "{:<8} {:>8}s {:>8}s  {}{late}",
            level.name,
            took.as_secs(),
            level.budget.as_secs(),
            if *good { "ok" } else { "FAILED" }
        );
    }
    let total: Duration = results.iter().map(|r| r.1).sum();
    let failed = results.iter().filter(|r| !r.2).count();
    println!("{:<8} {:>8}s\n", "all", total.as_secs());
    println!("levels: {} passed, {failed} failed", results.len() - failed);
    if failed > 0 { bail!("{failed} of {} levels failed", results.len()) } else { Ok(()) }
}

fn build() -> Result<()> {
    tools::cargo(&["build", "--workspace", "--all-targets"])
}

/// nextest when it is there, otherwise what comes with cargo.
fn tests(args: &[&str]) -> Result<()> {
    let nextest = Command::new("cargo").args(["nextest", "--version"]).output().is_ok_and(|o| o.status.success());
    if nextest {
        tools::cargo(&[&["nextest", "run", "--no-fail-fast"], args].concat())
    } else {
        tools::cargo(&[&["test", "--no-fail-fast"], args].concat())
    }
}

fn unit() -> Result<()> {
    let images = images()?;
    // SAFETY of order: set before any thread of this program is started.
    set("OBLAK_TEST_TINY", &images.join("tiny"));
    set("OBLAK_TEST_BUSYBOX", &images.join("busybox"));
    tests(&["--workspace", "--exclude", "oblak-e2e"])
}

fn e2e() -> Result<()> {
    let binary = up::build()?;
    let images = images()?;
    set("OBLAK_TEST_BINARY", &binary);
    set("OBLAK_TEST_IMAGES", &images);
    set("OBLAK_RECIPES", &tools::root().join("images"));
    tests(&["--package", "oblak-e2e"])
}

fn set(name: &str, value: &std::path::Path) {
    // SAFETY: this program has one thread.
    unsafe { std::env::set_var(name, value) };
}

/// Builds the images that tests need unless they are there, and says where they are.
pub fn images() -> Result<PathBuf> {
    let dir = std::env::var_os("OBLAK_IMAGE_CACHE").map_or_else(|| tools::target_dir().join("images"), PathBuf::from);
    for name in ["tiny", "busybox"] {
        let out = dir.join(name);
        if out.join("manifest.json").exists() {
            continue;
        }
        println!("building image {name}");
        let script = tools::root().join("images").join(name).join("build.sh");
        tools::run(
            Command::new(script)
                .arg("--out")
                .arg(&out)
                .arg("--cache")
                .arg(dir.join("cache"))
                .stdout(std::process::Stdio::null()),
        )?;
    }
    Ok(dir)
}
