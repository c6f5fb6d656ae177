//! The program of the simulator. One process simulates one seed, so that nothing of a former simulation has a say; with several seeds it starts itself again.

use std::fs::File;
use std::io::{BufWriter, Read as _, Seek as _};
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use oblak_api::ApiConfig;
use oblak_sim::whatif::{self, scale::Scale};
use oblak_sim::{Mutation, Settings};

oblak_sim::seeded_entropy!();

const HELP: &str = "\
oblak-sim [--seeds N] [--seed S] [--nodes M] [--hours H] [--pause SECONDS] [--calm] [--trace FILE] [--mutation NAME] [--jobs J] [--keep-going]
oblak-sim --scale NODES,INSTANCES,DEAD

  --seeds N      simulate N seeds, the first is S (1 unless given)
  --seed S       simulate this seed only; prints the last lines of its trace when it fails
  --nodes M      machines (3)
  --hours H      virtual hours of work and chaos (1)
  --pause T      longest pause of a client between two calls, in seconds (30)
  --calm         nothing goes wrong
  --trace FILE   the whole trace, of one seed
  --mutation M   with a defect that must be found
  --jobs J       simulations at once (number of CPUs)
  --keep-going   do not stop at the first seed that fails
  --scale N,I,D  a cloud of N nodes and I instances of which D nodes die: how long until all run elsewhere";

/// A simulation that takes longer than this in real time hangs.
const HANGS_AFTER: Duration = Duration::from_secs(600);

/// After so many seeds it is said how far it is.
const PROGRESS: u64 = 500;

/// Characters of a line of the trace that are shown; commits can be long.
const WIDTH: usize = 300;

struct Options {
    settings: Settings,
    seeds: Option<u64>,
    trace: Option<String>,
    jobs: usize,
    keep_going: bool,
    scale: Option<Scale>,
}

fn options() -> Result<Options, String> {
    let jobs = std::thread::available_parallelism().map_or(1, usize::from);
    let mut options =
        Options { settings: Settings::default(), seeds: None, trace: None, jobs, keep_going: false, scale: None };
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        let mut value = || args.next().ok_or_else(|| format!("{arg} needs a value"));
        let bad = |text: &str| format!("{text:?} is no value for {arg}");
        match arg.as_str() {
            "--seeds" => options.seeds = Some(number(&value()?).ok_or_else(|| bad("it"))?),
            "--seed" => options.settings.seed = number(&value()?).ok_or_else(|| bad("it"))?,
            "--nodes" => options.settings.nodes = number(&value()?).filter(|n| *n > 0).ok_or_else(|| bad("it"))?,
            "--hours" => options.settings.hours = number(&value()?).ok_or_else(|| bad("it"))?,
            "--pause" => options.settings.pause_s = number(&value()?).ok_or_else(|| bad("it"))?,
            "--jobs" => options.jobs = number(&value()?).filter(|n| *n > 0).ok_or_else(|| bad("it"))?,
            "--keep-going" => options.keep_going = true,
            "--scale" => options.scale = Some(scale(&value()?).ok_or_else(|| bad("it"))?),
            "--calm" => options.settings.chaos = false,
            "--trace" => options.trace = Some(value()?),
            "--mutation" => {
                let name = value()?;
                let found = Mutation::ALL.into_iter().find(|m| m.as_str() == name);
                options.settings.mutation = Some(found.ok_or_else(|| bad(&name))?);
            }
            _ => return Err(format!("unknown argument {arg}\n{HELP}")),
        }
    }
    Ok(options)
}

fn scale(text: &str) -> Option<Scale> {
    let numbers: Vec<usize> = text.split(',').map(number).collect::<Option<_>>()?;
    let [nodes, instances, dead] = numbers[..] else { return None };
    (nodes > dead).then_some(Scale { nodes, instances, dead })
}

fn number<T: std::str::FromStr>(text: &str) -> Option<T> {
    text.parse().ok()
}

fn main() -> ExitCode {
    let options = match options() {
        Ok(options) => options,
        Err(text) => {
            eprintln!("{text}");
            return ExitCode::from(2);
        }
    };
    if let Some(scale) = options.scale {
        return at_scale(scale);
    }
    match options.seeds {
        None => one(options),
        Some(seeds) => many(&options, seeds),
    }
}

fn one(options: Options) -> ExitCode {
    oblak_sim::entropy::seed(options.settings.seed);
    if let Ok(filter) = std::env::var("OBLAK_LOG") {
        let filter = tracing_subscriber::EnvFilter::new(filter);
        tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).without_time().init();
    }
    let mut out: Option<Box<dyn std::io::Write + Send>> = None;
    if let Some(path) = &options.trace {
        match File::create(path) {
            Ok(file) => out = Some(Box::new(BufWriter::new(file))),
            Err(error) => {
                eprintln!("cannot write {path}: {error}");
                return ExitCode::from(2);
            }
        }
    }
    let seed = options.settings.seed;
    match oblak_sim::run(options.settings, out) {
        Err(error) => {
            eprintln!("{error}");
            ExitCode::from(2)
        }
        Ok(report) => {
            println!(
                "seed {seed}: {} lines, digest {:016x}, settled after {:.1} s",
                report.lines, report.digest, report.settled_after
            );
            let Some(violation) = report.violation else { return ExitCode::SUCCESS };
            for line in report.last {
                println!("{}", line.chars().take(WIDTH).collect::<String>());
            }
            println!("seed {seed} FAILED: {violation}");
            ExitCode::FAILURE
        }
    }
}

/// How a large cloud takes the death of some of its nodes.
fn at_scale(scale: Scale) -> ExitCode {
    let lease = ApiConfig::new(([127, 0, 0, 1], 0).into(), ".").node_lease;
    match whatif::scale::run(scale, lease) {
        Err(error) => {
            eprintln!("{error}");
            ExitCode::from(2)
        }
        Ok(f) => {
            println!(
                "{} nodes, {} instances, {} nodes die: {} instances moved and {} without room after {:.1} virtual seconds, {} commits; {:.1} s of real time, {} MiB",
                scale.nodes,
                scale.instances,
                scale.dead,
                f.moved,
                f.unfit,
                f.virtual_seconds,
                f.commits,
                f.real_seconds,
                f.peak_mib
            );
            ExitCode::SUCCESS
        }
    }
}

struct Running {
    seed: u64,
    child: Child,
    /// What it says. A file, because nobody reads while it runs.
    said: File,
    since: Instant,
}

/// Runs every seed as a process of its own, several at once.
fn many(options: &Options, seeds: u64) -> ExitCode {
    let first = options.settings.seed;
    let begun = Instant::now();
    let mut waiting = first..first.saturating_add(seeds);
    let mut running: Vec<Running> = Vec::new();
    let mut failed = Vec::new();
    let mut done = 0u64;
    loop {
        while running.len() < options.jobs
            && let Some(seed) = waiting.next()
        {
            match start(options, seed) {
                Ok((child, said)) => running.push(Running { seed, child, said, since: Instant::now() }),
                Err(error) => {
                    eprintln!("cannot start a simulation: {error}");
                    return ExitCode::from(2);
                }
            }
        }
        if running.is_empty() {
            break;
        }
        if !failed.is_empty() && !options.keep_going {
            waiting = 0..0;
        }
        running.retain_mut(|one| match ended(one) {
            None => true,
            Some(text) => {
                done += 1;
                if let Some(text) = text {
                    println!("{text}\nreplay: cargo xtask sim --seed {}{}", one.seed, flags(options).join(" "));
                    failed.push(one.seed);
                } else if done.is_multiple_of(PROGRESS) {
                    let rate = done as f64 / begun.elapsed().as_secs_f64().max(0.001);
                    println!("{done} seeds, {rate:.2} seeds/s, {} failed", failed.len());
                }
                false
            }
        });
        std::thread::park_timeout(Duration::from_millis(5));
    }
    let seconds = begun.elapsed().as_secs_f64();
    let rate = done as f64 / seconds.max(0.001);
    println!("{done} seeds in {seconds:.1} s, {rate:.2} seeds/s, {} failed {failed:?}", failed.len());
    if failed.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn flags(options: &Options) -> Vec<String> {
    let s = &options.settings;
    let mut out = vec![String::new()];
    out.extend([format!("--nodes {}", s.nodes), format!("--hours {}", s.hours), format!("--pause {}", s.pause_s)]);
    out.extend((!s.chaos).then(|| "--calm".to_string()));
    out.extend(s.mutation.map(|m| format!("--mutation {}", m.as_str())));
    out
}

fn start(options: &Options, seed: u64) -> std::io::Result<(Child, File)> {
    let said = tempfile::tempfile()?;
    let mut command = Command::new(std::env::current_exe()?);
    command.arg("--seed").arg(seed.to_string());
    for flag in flags(options) {
        command.args(flag.split(' ').filter(|word| !word.is_empty()));
    }
    let child = command.stdin(Stdio::null()).stdout(said.try_clone()?).stderr(Stdio::inherit()).spawn()?;
    Ok((child, said))
}

/// Whether it ended, and what it said when it failed.
fn ended(one: &mut Running) -> Option<Option<String>> {
    let status = match one.child.try_wait() {
        Ok(None) if one.since.elapsed() < HANGS_AFTER => return None,
        Ok(None) => {
            let _ = one.child.kill();
            let _ = one.child.wait();
            return Some(Some(format!("seed {} FAILED: no end after {} s", one.seed, HANGS_AFTER.as_secs())));
        }
        Ok(Some(status)) => status,
        Err(error) => return Some(Some(format!("seed {} FAILED: {error}", one.seed))),
    };
    if status.success() {
        return Some(None);
    }
    let mut text = String::new();
    let read = one.said.rewind().and_then(|()| one.said.read_to_string(&mut text));
    if let Err(error) = read {
        text = format!("what it said cannot be read: {error}\n");
    }
    if !text.contains("FAILED") {
        text = format!("{text}seed {} FAILED: {status}", one.seed);
    }
    Some(Some(text))
}
