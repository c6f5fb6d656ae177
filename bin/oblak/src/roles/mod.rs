//! What the binary can be.

pub mod agent;
pub mod banner;
pub mod candidate;
pub mod cluster;
pub mod credentials;
pub mod detach;
pub mod down;
pub mod join;
pub mod power;
pub mod running;
pub mod server;
pub mod state;
pub mod up;

use std::path::Path;

use anyhow::{Context, Result, bail};
use oblak_platform::fsx;
use oblak_platform::layout::Layout;
use tokio_util::sync::CancellationToken;

/// Prints a line for a person. A background process prints into its log, and a full disk there must not end it.
pub fn tell(text: &str) {
    use std::io::Write;
    let mut out = std::io::stdout().lock();
    if let Err(error) = writeln!(out, "{text}").and_then(|()| out.flush()) {
        tracing::warn!(%error, "could not print what a person should read");
    }
}

/// The runtime of the big roles: two workers are enough for one machine, and each more costs memory.
pub fn runtime() -> Result<tokio::runtime::Runtime> {
    let workers = std::thread::available_parallelism().map_or(2, usize::from).min(4);
    let builder = &mut tokio::runtime::Builder::new_multi_thread();
    builder.worker_threads(workers).max_blocking_threads(32).enable_all().build().context("cannot start the runtime")
}

/// Refuses politely when what only root can do would fail later.
pub fn require_root(what: &str) -> Result<()> {
    if !nix::unistd::geteuid().is_root() {
        bail!("{what} needs root: it makes network namespaces, cgroups and guests; run it with sudo");
    }
    Ok(())
}

/// Makes the data directory.
pub fn layout(data: &Path) -> Result<Layout> {
    fsx::create_dir_private(data, 0o711)
        .with_context(|| format!("cannot make the data directory {}", data.display()))?;
    let data =
        std::fs::canonicalize(data).with_context(|| format!("cannot open the data directory {}", data.display()))?;
    let layout = Layout::new(data);
    for dir in [layout.run(), layout.logs(), layout.node(), layout.store()] {
        fsx::create_dir_private(&dir, 0o700).with_context(|| format!("cannot make {}", dir.display()))?;
    }
    Ok(layout)
}

/// Cancelled by SIGTERM or SIGINT.
pub fn shutdown_on_signal() -> Result<CancellationToken> {
    use tokio::signal::unix::{SignalKind, signal};
    let token = CancellationToken::new();
    let (mut term, mut int) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let cancel = token.clone();
    tokio::spawn(async move {
        tokio::select! { _ = term.recv() => {}, _ = int.recv() => {} }
        tracing::info!("stopping; guests go on");
        cancel.cancel();
    });
    Ok(token)
}

/// The name of this machine as a node name.
pub fn node_name(given: Option<&str>) -> Result<String> {
    if let Some(name) = given {
        if let Some(problem) = oblak_model::name::problem(name) {
            bail!("--node-name {name:?} {problem}");
        }
        return Ok(name.to_string());
    }
    let host = nix::unistd::gethostname().map(|h| h.to_string_lossy().to_ascii_lowercase()).unwrap_or_default();
    let name: String = host
        .split('.')
        .next()
        .unwrap_or_default()
        .chars()
        .map(|c| if c.is_ascii_alphanumeric() { c } else { '-' })
        .collect();
    let name = name.trim_matches('-').to_string();
    Ok(if oblak_model::name::problem(&name).is_none() { name } else { "node-1".into() })
}
