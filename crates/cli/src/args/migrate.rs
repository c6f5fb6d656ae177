//! Flags of the commands that move instances.

use oblak_model::Span;

/// Flags of `migrate`.
#[derive(Clone, Debug, clap::Args)]
pub struct MigrateArgs {
    /// Instance.
    pub name: String,
    /// Node to move it to; the scheduler chooses when absent.
    #[arg(long, value_name = "NODE", conflicts_with = "cancel")]
    pub to: Option<String>,
    /// While it runs (virtual machines). Otherwise it is stopped, moved and started.
    #[arg(long, conflicts_with = "cancel")]
    pub live: bool,
    /// Stop a move that is under way; the instance stays where it is.
    #[arg(long)]
    pub cancel: bool,
    /// Come back when it is accepted.
    #[arg(long)]
    pub no_wait: bool,
    /// Longest time to wait.
    #[arg(long, value_name = "TIME", default_value = "1h")]
    pub timeout: Span,
}

/// Flags of `node drain`.
#[derive(Clone, Debug, clap::Args)]
pub struct DrainArgs {
    /// Node.
    pub name: String,
    /// Only say what would be moved, how, and what could not.
    #[arg(long)]
    pub plan: bool,
    /// Moves at the same time.
    #[arg(long, value_name = "N", default_value = "2", value_parser = clap::value_parser!(u8).range(1..=32))]
    pub parallel: u8,
    /// Longest time to wait for one instance.
    #[arg(long, value_name = "TIME", default_value = "1h")]
    pub timeout: Span,
}
