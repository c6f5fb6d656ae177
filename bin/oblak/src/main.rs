//! The one binary: wires the roles together and nothing else.
//!
//! `oblak up` is everything in one process; `oblak server` and `oblak agent` are its halves; `oblak shim` and `oblak netd` are the small
//! processes that outlive them; everything else is the command line, a client of the API.
//!
//! Start reading at [`main`], then [`roles::up`].

mod args;
mod drivers;
mod images;
mod peers;
mod roles;
mod whatif;

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{CommandFactory, Parser};

use crate::args::{Args, ClusterCommand, Command, GenerateWhat};

fn main() -> ExitCode {
    // The small processes come first: they must stay small, so nothing of the rest is even set up for them.
    let words: Vec<OsString> = std::env::args_os().skip(1).collect();
    if let Some(code) = helper(&words) {
        return code;
    }
    let args = Args::parse();
    match run(args) {
        Ok(code) => code,
        Err(error) => {
            use std::io::Write;
            // Where nobody can read it, the code still tells.
            let _ = writeln!(std::io::stderr(), "error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// `oblak shim vm|container --dir DIR` and `oblak netd --dir DIR`.
fn helper(words: &[OsString]) -> Option<ExitCode> {
    let word = |i: usize| words.get(i).and_then(|w| w.to_str());
    let dir = |i: usize| (word(i) == Some("--dir")).then(|| words.get(i + 1).map(PathBuf::from)).flatten();
    match (word(0), word(1)) {
        (Some("shim"), Some("vm")) => Some(oblak_compute_vm::shim_main(&dir(2)?)),
        (Some("shim"), Some("container")) => Some(oblak_compute_container::shim_main(&dir(2)?)),
        (Some("netd"), _) => {
            oblak_platform::telemetry::init(false);
            Some(oblak_netd::main(&dir(1)?))
        }
        _ => None,
    }
}

fn run(args: Args) -> anyhow::Result<ExitCode> {
    match args.command {
        Command::Up(up) => roles::up::run(&up),
        Command::Down(down) => roles::down::run(&down),
        Command::Server(server) => roles::server::run(&server),
        Command::Join(join) => roles::join::run(&join),
        Command::Cluster(ClusterCommand::Restore(restore)) => roles::cluster::restore::run(&restore),
        Command::Cluster(ClusterCommand::MigrateStore(migrate)) => roles::cluster::migrate::run(&migrate),
        Command::Cluster(ClusterCommand::Client(command)) => Ok(oblak_cli::cluster(command, args.global)),
        Command::Agent(agent) => roles::agent::run(&agent),
        Command::Whatif(command) => Ok(whatif::whatif(&command, &args.global)),
        Command::Cluster(ClusterCommand::Balance(balance)) => Ok(whatif::balance(&balance, &args.global)),
        Command::Generate { what } => {
            generate(what);
            Ok(ExitCode::SUCCESS)
        }
        Command::Client(command) => Ok(oblak_cli::main(command, args.global, Args::command())),
    }
}

fn generate(what: GenerateWhat) {
    match what {
        GenerateWhat::Openapi => {
            let document = oblak_api::openapi::document();
            println!("{}", serde_json::to_string_pretty(&document).expect("a JSON value serializes"));
        }
        GenerateWhat::CliReference => print!("{}", oblak_cli::reference(&Args::command())),
    }
}
