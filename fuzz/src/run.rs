//! Running one target.

use std::collections::HashSet;
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::mutate::{Dice, mutate};
use crate::targets::Target;

/// Inputs that are kept to be changed further.
const POOL: usize = 512;
/// An input that takes longer than this is as bad as one that panics. Debug builds on a busy machine included.
const SLOW: Duration = Duration::from_secs(2);

/// When to stop.
#[derive(Clone, Copy, Debug)]
pub enum Until {
    /// After this many inputs.
    Count(u64),
    /// After this time.
    Time(Duration),
}

/// What a run did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Done {
    /// Inputs tried.
    pub inputs: u64,
    /// Different outcomes seen.
    pub outcomes: usize,
}

/// Where the committed inputs of a target lie.
#[must_use]
pub fn seeds(target: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("seeds").join(target)
}

/// Tries the committed inputs of a target, then changes of them.
///
/// # Errors
/// The first input that makes the target panic or takes too long; it is written beside the seeds. No seeds at all.
pub fn run(target: &Target, seed: u64, until: Until) -> Result<Done> {
    let dir = seeds(target.name);
    let mut files: Vec<PathBuf> = fs::read_dir(&dir)
        .with_context(|| format!("no seeds in {}", dir.display()))?
        .map(|entry| entry.map(|e| e.path()))
        .collect::<std::io::Result<_>>()?;
    // The order of a directory is not the same everywhere.
    files.sort();
    let mut pool = Vec::new();
    let mut seen = HashSet::new();
    let mut done = Done { inputs: 0, outcomes: 0 };
    for file in &files {
        let input = fs::read(file)?;
        seen.insert(try_one(target, &input)?);
        done.inputs += 1;
        pool.push(input);
    }
    if pool.is_empty() {
        bail!("no seeds in {}", dir.display());
    }
    let mut dice = Dice::new(seed);
    let begin = Instant::now();
    loop {
        match until {
            Until::Count(count) if done.inputs >= count => break,
            Until::Time(time) if begin.elapsed() >= time => break,
            _ => {}
        }
        let mut input = pool[dice.below(pool.len())].clone();
        let other = &pool[dice.below(pool.len())];
        mutate(&mut dice, &mut input, other, target.limit);
        done.inputs += 1;
        if seen.insert(try_one(target, &input)?) {
            if pool.len() < POOL {
                pool.push(input);
            } else {
                // The committed ones stay.
                let at = files.len() + dice.below(POOL.saturating_sub(files.len()));
                pool[at.min(POOL - 1)] = input;
            }
        }
    }
    done.outcomes = seen.len();
    Ok(done)
}

fn try_one(target: &Target, input: &[u8]) -> Result<Vec<u8>> {
    let begin = Instant::now();
    let outcome = catch_unwind(AssertUnwindSafe(|| (target.call)(input)));
    let took = begin.elapsed();
    match outcome {
        Ok(outcome) if took <= SLOW => Ok(outcome),
        Ok(_) => bail!("{} takes {took:?} for {}", target.name, keep(target, input)?),
        Err(panic) => {
            let text = panic.downcast_ref::<String>().cloned();
            let text = text.or_else(|| panic.downcast_ref::<&str>().map(ToString::to_string)).unwrap_or_default();
            bail!("{} panics ({text}) on {}", target.name, keep(target, input)?)
        }
    }
}

/// Writes a bad input beside the seeds, where it is tried first from now on.
fn keep(target: &Target, input: &[u8]) -> Result<String> {
    // FNV-1a: only a name.
    let name = input.iter().fold(0xcbf2_9ce4_8422_2325_u64, |h, b| (h ^ u64::from(*b)).wrapping_mul(0x0100_0000_01b3));
    let path = seeds(target.name).join(format!("bad-{name:016x}"));
    fs::write(&path, input).with_context(|| format!("cannot write {}", path.display()))?;
    Ok(path.display().to_string())
}
