//! `oblak-fuzz TARGET...|all [--seconds N] [--seed S]`: tries changed inputs until the time is over or something is found.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use oblak_fuzz::run::{Until, run};
use oblak_fuzz::targets::{TARGETS, Target};

fn main() -> ExitCode {
    match start() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn start() -> Result<()> {
    let (mut chosen, mut seconds, mut seed) = (Vec::<&Target>::new(), 60, 1);
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        let mut number = || words.next().and_then(|n| n.parse().ok()).with_context(|| format!("{word} needs a number"));
        match word.as_str() {
            "--seconds" => seconds = number()?,
            "--seed" => seed = number()?,
            "all" => chosen.extend(TARGETS),
            name => match TARGETS.iter().find(|t| t.name == name) {
                Some(target) => chosen.push(target),
                None => bail!("no target {name:?}; there are: {}", names()),
            },
        }
    }
    if chosen.is_empty() {
        bail!("name a target, or `all`; there are: {}", names());
    }
    for target in chosen {
        let done = run(target, seed, Until::Time(Duration::from_secs(seconds)))?;
        println!("{:<12} {:>10} inputs, {:>5} outcomes, nothing bad", target.name, done.inputs, done.outcomes);
    }
    Ok(())
}

fn names() -> String {
    TARGETS.iter().map(|t| t.name).collect::<Vec<_>>().join(" ")
}
