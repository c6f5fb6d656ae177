//! The command line: a client of the API that people and scripts use.
//!
//! Invariant: talks to the cloud only through `oblak-client`; data goes to standard output, everything else to standard error;
//! whatever ends a command, the terminal is left as it was found.
//!
//! Start reading at [`main`], then [`args::Command`]; each family of commands has a module of its own below `cmd`.

pub mod args;
mod cmd;
pub mod context;
mod error;
mod field;
#[doc(hidden)]
pub mod fuzzing;
mod keys;
mod kinds;
mod near;
mod out;
mod reference;
mod session;
mod show;
mod table;
mod term;
#[cfg(test)]
mod tests;
mod wait;

pub use args::{ClusterCommand, Command, Global};
pub use cmd::passphrase;
pub use reference::reference;

use std::process::ExitCode;

pub use crate::error::CliError;
pub use crate::out::Out;
pub use crate::session::Session;
pub use crate::table::Table;

/// Runs one command. `root` is the whole command line, for completion scripts.
#[must_use]
#[allow(clippy::needless_pass_by_value)] // called once, by `main`, which has no more use for them
pub fn main(command: Command, global: Global, root: clap::Command) -> ExitCode {
    let out = Out::new(&global);
    let done = async {
        let result = cmd::run(command, &global, out, &root).await;
        result.map_err(|error| error.in_words(&field::flags_of(&root, std::env::args().skip(1))))
    };
    end(out, block_on(done))
}

/// Runs one command about the servers of a cloud.
#[must_use]
#[allow(clippy::needless_pass_by_value)] // called once, by `main`, which has no more use for them
pub fn cluster(command: ClusterCommand, global: Global) -> ExitCode {
    let out = Out::new(&global);
    end(out, block_on(async { cmd::cluster(command, &global, out).await.map(|()| 0) }))
}

/// For commands that the binary adds to those here: `ask` talks to the cloud, then `answer` prints what comes of it, outside of any runtime.
#[must_use]
pub fn with_session<T>(
    global: &Global,
    ask: impl AsyncFnOnce(&Session) -> Result<T, CliError>,
    answer: impl FnOnce(&Out, T) -> Result<u8, CliError>,
) -> ExitCode {
    let out = Out::new(global);
    let asked = block_on(async {
        let session = Session::open(global, out)?;
        ask(&session).await
    });
    end(out, asked.and_then(|known| answer(&out, known)))
}

fn block_on<T>(work: impl Future<Output = Result<T, CliError>>) -> Result<T, CliError> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|e| CliError::new(format!("cannot start: {e}"), "check the limits of this process (`ulimit -a`)"))?;
    let result = runtime.block_on(work);
    // A thread that still waits for standard input must not hold the process.
    runtime.shutdown_background();
    result
}

fn end(out: Out, result: Result<u8, CliError>) -> ExitCode {
    match result {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            out.error(&error);
            ExitCode::from(error.code)
        }
    }
}
