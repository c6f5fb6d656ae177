//! The project's own tasks: `cargo xtask <task>`, usually through `./dev`.
//!
//! Start reading at [`main`]; `check` holds the rules of the house, `levels` the levels of the test run.

mod check;
mod levels;
mod nested;
mod tools;
mod up;

use std::process::ExitCode;

use anyhow::{Result, bail};

const HELP: &str = "\
tasks:
  up [args]        build, start the cloud on this machine (args go to `oblak up`)
  down [args]      stop it (args go to `oblak down`)
  test [level..]   everything CI runs, or some levels: check unit e2e docs
  check [step..]   formatting, lints, arrows between crates, file lengths, banned calls, drift of generated files
  images           build the guest images that tests need
  nested           the container tests in a nested machine that has version 2 of cgroups only
  bench [name..]   measure against floors and peers; prints tables
  fuzz TARGET.. [--seconds N] [--seed S]
                   feed parsers with changed inputs; `all` are all targets
  sim [args]       simulate clouds under virtual time while things go wrong; --seeds N --nodes M --hours H [--seed S]; stops
                   at the first seed that fails and says how to replay it
  generate         write openapi/ and docs/reference/ anew";

fn main() -> ExitCode {
    match task() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn task() -> Result<()> {
    std::env::set_current_dir(tools::root())?;
    let args: Vec<String> = std::env::args().skip(1).collect();
    let rest = args.get(1..).unwrap_or_default();
    match args.first().map(String::as_str) {
        Some("up") => up::up(rest),
        Some("down") => up::down(rest),
        Some("test") => levels::test(rest),
        Some("check") => check::some(rest),
        Some("images") => levels::images().map(|dir| println!("{}", dir.display())),
        Some("nested") => nested::run(),
        Some("bench") => bench(rest),
        Some("fuzz") => fuzz(rest),
        Some("sim") => sim(rest),
        Some("generate") => check::drift::generate(),
        Some("help" | "-h" | "--help") | None => {
            println!("{HELP}");
            Ok(())
        }
        Some(other) => bail!("no task {other:?}\n{HELP}"),
    }
}

/// The simulator is a program of its own, so that this one stays light.
fn sim(args: &[String]) -> Result<()> {
    tools::cargo(&["build", "--profile", "sim", "--package", "oblak-sim", "--bin", "oblak-sim"])?;
    let program = tools::target_dir().join("sim").join("oblak-sim");
    tools::run(std::process::Command::new(program).args(args))
}

/// Like the simulator. Built with optimization: the more inputs, the better; arithmetic is checked all the same.
fn fuzz(args: &[String]) -> Result<()> {
    tools::cargo(&["build", "--profile", "fuzz", "--package", "oblak-fuzz"])?;
    let program = tools::target_dir().join("fuzz").join("oblak-fuzz");
    tools::run(std::process::Command::new(program).args(args))
}

/// The program is built as it is shipped, then measured with real guests.
fn bench(names: &[String]) -> Result<()> {
    let images = levels::images()?;
    tools::cargo(&["build", "--release", "--package", "oblak", "--package", "oblak-bench"])?;
    let release = tools::target_dir().join("release");
    let mut command = std::process::Command::new(release.join("oblak-bench"));
    command.args(names).env("OBLAK_TEST_BINARY", release.join("oblak")).env("OBLAK_TEST_IMAGES", images);
    tools::run(&mut command)
}
