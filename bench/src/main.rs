//! Measures Oblak against floors and peers: `cargo xtask bench [name..]`.
//!
//! Floor and ours are interleaved in the same run, so that a busy machine slows both; every figure is a median.
//!
//! Invariant: whatever a measurement starts or makes is gone when it ends, also when it fails; traffic stays on loopback.
//!
//! Start reading at [`BENCHES`]; each module is one measurement.

mod container;
mod creates;
mod etcd;
mod fake;
mod fakecloud;
mod machine;
mod memory;
mod overlay;
mod placements;
mod product;
mod raw;
mod reads;
mod report;
mod scheduler;
mod service;
mod sim;
mod stats;
mod store;
mod vm;
mod wire;

use std::io::Write;
use std::panic::AssertUnwindSafe;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context as _, Result, bail};
use clap::Parser;

use crate::machine::Machine;
use crate::report::Table;

/// Measures Oblak against floors and peers.
#[derive(Debug, Parser)]
#[command(name = "bench")]
struct Args {
    /// What to measure; everything when absent.
    names: Vec<String>,
    /// Also append every row as a line of JSON to this file.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Directory on the disk that counts for durability.
    #[arg(long, value_name = "DIR", default_value = "/var/tmp")]
    dir: PathBuf,
    /// The program to measure; the one built next to this when absent.
    #[arg(long, value_name = "FILE")]
    oblak: Option<PathBuf>,
    /// Be a cloud over fake drivers below this directory, for the measurement of memory.
    #[arg(long, value_name = "DIR", hide = true)]
    fake_cloud: Option<PathBuf>,
    /// List the measurements.
    #[arg(long)]
    list: bool,
}

/// What a measurement may use.
pub struct Context {
    /// Directory on the disk that counts.
    pub dir: PathBuf,
}

impl Context {
    /// A directory that goes away with its handle.
    pub fn temp(&self) -> Result<tempfile::TempDir> {
        let builder = &mut tempfile::Builder::new();
        let builder = builder.prefix("oblak-bench-");
        builder.tempdir_in(&self.dir).with_context(|| format!("cannot make a directory in {}", self.dir.display()))
    }
}

type Bench = fn(&Context, &mut Table) -> Result<()>;

/// Name, what it measures, how.
const BENCHES: &[(&str, &str, Bench)] = &[
    ("store", "durable creates of 64 clients beside raw redb", store::run),
    ("etcd", "creates in 16 projects on a real etcd beside bare transactions of etcd", etcd::run),
    ("scheduler", "decisions and packing in a large world", scheduler::run),
    ("placements", "placements committed by the control plane", placements::run),
    ("sim", "the death of a tenth of a large cloud's nodes, under virtual time", sim::run),
    ("fake", "an instance from request to running on fake drivers", fake::run),
    ("reads", "reads from the cache over HTTPS beside a bare handler", reads::run),
    ("container", "launch of a real container beside bare crun", container::run),
    ("overlay", "traffic of tenants between nodes beside bare VXLAN", overlay::run),
    ("vm", "what is added before qemu is executed", vm::run),
    (
        "memory",
        "memory of the idle cloud, its small processes and a thousand instances; size of the program",
        memory::run,
    ),
];

fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(2),
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Whether everything could be measured; missed goals are figures, not failures.
fn run(args: &Args) -> Result<bool> {
    if args.list {
        BENCHES.iter().for_each(|(name, what, _)| println!("{name:<12} {what}"));
        return Ok(true);
    }
    if let Some(unknown) = args.names.iter().find(|n| BENCHES.iter().all(|(name, ..)| name != n)) {
        bail!("no measurement {unknown:?}; --list shows them");
    }
    if std::env::var_os("OBLAK_LOG").is_some() {
        oblak_platform::telemetry::init(false);
    }
    if let Some(dir) = &args.fake_cloud {
        return memory::helper(dir).map(|()| true);
    }
    product::set_environment(args.oblak.as_deref())?;
    let machine = Machine::look();
    println!("{machine}\n");
    let context = Context { dir: args.dir.clone() };
    let mut whole = true;
    for (name, what, bench) in
        BENCHES.iter().filter(|(n, ..)| args.names.is_empty() || args.names.iter().any(|a| a == n))
    {
        let load = machine::load();
        println!("== {name}: {what} (load before: {load})");
        let started = Instant::now();
        let mut table = Table::default();
        // The harness of real clouds panics when something is wrong; the other measurements go on.
        let attempt = AssertUnwindSafe(|| bench(&context, &mut table));
        if let Err(error) = std::panic::catch_unwind(attempt).unwrap_or_else(|_| bail!("it panicked")) {
            whole = false;
            println!("could not be measured: {error:#}");
        }
        println!("{table}({:.0} s)\n", started.elapsed().as_secs_f64());
        if let Some(file) = &args.json {
            let lines = table.json(name, &load, &machine);
            let mut file = std::fs::OpenOptions::new()
                .create(true)
                .append(true)
                .open(file)
                .context("cannot open the JSON file")?;
            file.write_all(lines.as_bytes()).context("cannot write the JSON file")?;
        }
    }
    Ok(whole)
}
