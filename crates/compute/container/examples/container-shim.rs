//! The shim as a program of its own, for tests and measurements; the product calls the same function from its one binary.

use std::path::Path;
use std::process::ExitCode;

fn main() -> ExitCode {
    match std::env::args().collect::<Vec<_>>().as_slice() {
        [_, flag, dir] if flag == "--dir" => oblak_compute_container::shim_main(Path::new(dir)),
        _ => ExitCode::from(2),
    }
}
