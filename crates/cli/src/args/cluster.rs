//! Flags of the commands about the servers of a cloud.

use std::path::PathBuf;

/// `cluster ...`, as far as the API does it.
#[derive(Clone, Debug, clap::Subcommand)]
pub enum ClusterCommand {
    /// Print how the servers are: members and their votes, leader, size, alarms, certificates, and what should be done.
    Status,
    /// Save all state and the keys of the cloud to one encrypted file.
    Backup(BackupArgs),
    /// Remove a server from the cluster for good. Its agent and guests are another matter: `oblak node remove`.
    RemoveServer(RemoveServerArgs),
    /// Give unused space of etcd back to the file systems, one server after the other, and take writes again.
    Defragment,
}

/// Flags of `cluster backup`.
#[derive(Clone, Debug, clap::Args)]
pub struct BackupArgs {
    /// File to write. It must not exist.
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
    /// File with the passphrase in its first line, at least 12 characters; asked for when absent.
    #[arg(long, value_name = "FILE", conflicts_with = "recovery_key")]
    pub passphrase_file: Option<PathBuf>,
    /// Make a recovery key instead of asking for a passphrase, and print it once.
    #[arg(long)]
    pub recovery_key: bool,
}

/// One server by name.
#[derive(Clone, Debug, clap::Args)]
pub struct RemoveServerArgs {
    /// Server, as `oblak cluster status` names it.
    pub name: String,
}
