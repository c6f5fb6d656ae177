//! Logging of our processes: to stderr, filtered by `OBLAK_LOG` (directives of tracing-subscriber), `info` by default.

use tracing_subscriber::EnvFilter;

/// Starts logging. Calling it twice is harmless.
pub fn init(json: bool) {
    let filter = EnvFilter::try_from_env("OBLAK_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    // Colours are for people; a log file wants plain text.
    let ansi = std::io::IsTerminal::is_terminal(&std::io::stderr());
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_target(true)
        .with_ansi(ansi);
    let _ = if json { builder.json().try_init() } else { builder.compact().try_init() };
}
