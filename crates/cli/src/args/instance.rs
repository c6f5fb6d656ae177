//! Flags of the commands about instances.

use std::net::SocketAddr;
use std::path::PathBuf;

use oblak_model::selector::Selector;
use oblak_model::{NetworkAttachment, Publish, Size, Span, VolumeAttachment};

use super::values::{self, IsolationWord, RestartWord, UsernsWord};

/// Flags of `launch`.
#[derive(Clone, Debug, clap::Args)]
pub struct LaunchArgs {
    /// Image to start from; `oblak image list` shows them.
    pub image: String,
    /// Name, also the host name. Made from the image's name when absent.
    #[arg(long, value_name = "NAME")]
    pub name: Option<String>,
    /// How it is separated from others. When absent: container for OCI images, vm for the others.
    #[arg(long, value_enum)]
    pub isolation: Option<IsolationWord>,
    /// Size; `oblak flavor list` shows them.
    #[arg(long, value_name = "NAME", default_value = "s")]
    pub flavor: String,
    /// What others call it; the answer names flavors.
    #[arg(long, hide = true, value_parser = values::no_size)]
    pub memory: Option<std::convert::Infallible>,
    /// What others call it; the answer names flavors.
    #[arg(long, aliases = ["cpu", "vcpus"], hide = true, value_parser = values::no_size)]
    pub cpus: Option<std::convert::Infallible>,
    /// Public ssh key that may log in: a file (registered by itself) or the name of a key.
    #[arg(long = "key", value_name = "FILE|NAME")]
    pub keys: Vec<String>,
    /// Network to join, with an address if a certain one is wanted. Network `default` when absent.
    #[arg(long = "network", value_name = "NAME[:ADDR]", value_parser = values::network)]
    pub networks: Vec<NetworkAttachment>,
    /// No network at all.
    #[arg(long, conflicts_with_all = ["networks", "publish", "security_groups"])]
    pub no_network: bool,
    /// Security group of its interfaces; `default` when absent.
    #[arg(long = "security-group", value_name = "NAME")]
    pub security_groups: Vec<String>,
    /// Lead a port of the host into it.
    #[arg(long, value_name = "[ADDR:]HOST:PORT[/udp]", value_parser = values::publish)]
    pub publish: Vec<Publish>,
    /// Plug in a volume; a container sees it at MOUNT.
    #[arg(long = "volume", value_name = "NAME[:MOUNT][:ro]", value_parser = values::volume)]
    pub volumes: Vec<VolumeAttachment>,
    /// Environment of a container.
    #[arg(long, short = 'e', value_name = "NAME=VALUE", value_parser = values::pair)]
    pub env: Vec<(String, String)>,
    /// Label.
    #[arg(long = "label", short = 'l', value_name = "NAME=VALUE", value_parser = values::pair)]
    pub labels: Vec<(String, String)>,
    /// File for cloud-init; - reads standard input.
    #[arg(long, value_name = "FILE")]
    pub user_data: Option<PathBuf>,
    /// What to do when it ends by itself. When absent: on-failure.
    #[arg(long, value_enum, value_name = "POLICY")]
    pub restart: Option<RestartWord>,
    /// Root disk when it should be larger than the flavor's.
    #[arg(long, value_name = "SIZE")]
    pub disk: Option<Size>,
    /// Zone it may run in.
    #[arg(long = "zone", value_name = "NAME")]
    pub zones: Vec<String>,
    /// Labels of the nodes it may run on, for example disk=ssd,!old.
    #[arg(long, value_name = "SELECTOR")]
    pub node_selector: Option<Selector>,
    /// Start it on another node when its own is lost. Its disks must be in a shared pool, or --ephemeral.
    #[arg(long)]
    pub ha: bool,
    /// Its root disk need not outlive the node.
    #[arg(long, conflicts_with = "pool")]
    pub ephemeral: bool,
    /// Pool for the root disk of a machine.
    #[arg(long, value_name = "NAME", default_value = "", hide_default_value = true)]
    pub pool: String,
    /// Not on a node with another instance of the project that was launched with the same GROUP.
    #[arg(long, value_name = "GROUP", value_parser = values::group)]
    pub anti_affinity: Option<String>,
    /// Write-protect the root file system of a container.
    #[arg(long)]
    pub read_only: bool,
    /// Give the main process of a container a terminal.
    #[arg(long)]
    pub tty: bool,
    /// Whose user ids a container runs with. The host's need the project's admin.
    #[arg(long, value_enum)]
    pub userns: Option<UsernsWord>,
    /// Come back when it runs, and show what happens until then.
    #[arg(long)]
    pub wait: bool,
    /// Longest time to wait.
    #[arg(long, value_name = "TIME", default_value = "30m")]
    pub timeout: Span,
    /// Command of a container, in place of the image's.
    #[arg(last = true, value_name = "CMD")]
    pub command: Vec<String>,
}

/// Flags of `list`.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct ListArgs {
    /// Only those with these labels, for example tier=web,!old.
    #[arg(long, short = 'l', value_name = "SELECTOR")]
    pub label: Option<Selector>,
    /// Those of all projects. Needs a cloud administrator.
    #[arg(long, short = 'A', conflicts_with = "watch")]
    pub all_projects: bool,
    /// Go on showing changes until interrupted.
    #[arg(long, short = 'w')]
    pub watch: bool,
}

/// Flags of `get`.
#[derive(Clone, Debug, clap::Args)]
pub struct GetArgs {
    /// Kind, or KIND/NAME.
    #[arg(value_name = "KIND[/NAME]")]
    pub what: String,
    /// Names; all objects of the kind when absent.
    #[arg(value_name = "NAME")]
    pub names: Vec<String>,
    /// Only those with these labels.
    #[arg(long, short = 'l', value_name = "SELECTOR")]
    pub label: Option<Selector>,
}

/// One object.
#[derive(Clone, Debug, clap::Args)]
pub struct ObjectArgs {
    /// KIND/NAME, or the name of an instance.
    #[arg(value_name = "KIND/NAME")]
    pub what: String,
    /// Name, when the first word is a kind.
    #[arg(value_name = "NAME")]
    pub name: Option<String>,
}

/// One instance.
#[derive(Clone, Debug, clap::Args)]
pub struct NameArgs {
    /// Instance.
    pub name: String,
}

/// Whether to wait until something is carried out.
#[derive(Clone, Copy, Debug, clap::Args)]
pub struct WaitArgs {
    /// Come back when it is done (the default).
    #[arg(long, overrides_with = "no_wait")]
    pub wait: bool,
    /// Come back when it is accepted.
    #[arg(long, overrides_with = "wait")]
    pub no_wait: bool,
    /// Longest time to wait.
    #[arg(long, value_name = "TIME", default_value = "5m")]
    pub timeout: Span,
}

/// Flags of `delete`.
#[derive(Clone, Debug, clap::Args)]
pub struct DeleteArgs {
    /// Instances, or objects of any kind as KIND/NAME.
    #[arg(required = true, value_name = "NAME|KIND/NAME")]
    pub names: Vec<String>,
    /// Whether to wait.
    #[command(flatten)]
    pub wait: WaitArgs,
}

/// Flags of `stop`, `start`, `restart`, `pause`, `resume`.
#[derive(Clone, Debug, clap::Args)]
pub struct PowerArgs {
    /// Instances.
    #[arg(required = true, value_name = "NAME")]
    pub names: Vec<String>,
    /// Whether to wait.
    #[command(flatten)]
    pub wait: WaitArgs,
}

/// Flags of `resize`.
#[derive(Clone, Debug, clap::Args)]
pub struct ResizeArgs {
    /// Instance.
    pub name: String,
    /// Its new size.
    #[arg(long, value_name = "NAME")]
    pub flavor: String,
    /// Whether to wait.
    #[command(flatten)]
    pub wait: WaitArgs,
}

/// Flags of `snapshot`.
#[derive(Clone, Debug, clap::Args)]
pub struct SnapshotArgs {
    /// Instance.
    pub instance: String,
    /// Name of the snapshot.
    pub name: String,
    /// With memory (the default for running machines).
    #[arg(long, overrides_with = "no_memory")]
    pub memory: bool,
    /// Without memory.
    #[arg(long, overrides_with = "memory")]
    pub no_memory: bool,
    /// Whether to wait.
    #[command(flatten)]
    pub wait: WaitArgs,
}

/// Flags of `restore`.
#[derive(Clone, Debug, clap::Args)]
pub struct RestoreArgs {
    /// Instance.
    pub instance: String,
    /// Snapshot to go back to.
    pub snapshot: String,
    /// Whether to wait.
    #[command(flatten)]
    pub wait: WaitArgs,
}

/// Flags of `snapshots`.
#[derive(Clone, Debug, clap::Args)]
pub struct SnapshotsArgs {
    /// Only those of this instance.
    pub instance: Option<String>,
}

/// Flags of `exec`.
#[derive(Clone, Debug, clap::Args)]
pub struct ExecArgs {
    /// Pass standard input on.
    #[arg(short = 'i', long)]
    pub interactive: bool,
    /// Give the command a terminal. Containers only: in machines use `oblak ssh` or `oblak console`.
    #[arg(short = 't', long)]
    pub tty: bool,
    /// User inside; in machines only root.
    #[arg(long, short = 'u', value_name = "USER", default_value = "", hide_default_value = true)]
    pub user: String,
    /// Working directory inside.
    #[arg(long, value_name = "DIR", default_value = "", hide_default_value = true)]
    pub cwd: String,
    /// Added environment.
    #[arg(long, short = 'e', value_name = "NAME=VALUE", value_parser = values::pair)]
    pub env: Vec<(String, String)>,
    /// Instance.
    pub name: String,
    /// Command with its arguments.
    #[arg(last = true, required = true, value_name = "CMD")]
    pub command: Vec<String>,
}

/// Flags of `logs`.
#[derive(Clone, Debug, clap::Args)]
pub struct LogsArgs {
    /// Instance.
    pub name: String,
    /// Go on with what comes.
    #[arg(long, short = 'f')]
    pub follow: bool,
    /// Only the last lines.
    #[arg(long, value_name = "N")]
    pub tail: Option<u64>,
}

/// Flags of `ssh`.
#[derive(Clone, Debug, clap::Args)]
pub struct SshArgs {
    /// Instance.
    pub name: String,
    /// User inside. When absent: what the image says, else root.
    #[arg(short = 'l', long = "login", value_name = "USER")]
    pub user: Option<String>,
    /// Private key. When absent: the one that fits the key given at launch, else what ssh finds.
    #[arg(short = 'i', long = "identity", value_name = "FILE")]
    pub identity: Option<PathBuf>,
    /// Give the command a terminal.
    #[arg(short = 't', long)]
    pub tty: bool,
    /// Longest time to wait until the instance answers.
    #[arg(long, value_name = "TIME", default_value = "3m")]
    pub timeout: Span,
    /// Command with its arguments; a shell when absent.
    #[arg(last = true, value_name = "CMD")]
    pub command: Vec<String>,
}

/// Flags of `forward`.
#[derive(Clone, Debug, clap::Args)]
pub struct ForwardArgs {
    /// Instance.
    pub name: String,
    /// TCP port of the instance.
    #[arg(value_parser = clap::value_parser!(u16).range(1..))]
    pub port: u16,
    /// One connection over standard input and output.
    #[arg(long, conflicts_with = "listen")]
    pub stdio: bool,
    /// Where to listen. The same port of 127.0.0.1 when absent.
    #[arg(long, value_name = "ADDR", value_parser = values::listen)]
    pub listen: Option<SocketAddr>,
}

/// Flags of `vnc`.
#[derive(Clone, Debug, clap::Args)]
pub struct VncArgs {
    /// Instance.
    pub name: String,
    /// Where to listen.
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:5901", value_parser = values::listen)]
    pub listen: SocketAddr,
}

/// Flags of `apply`.
#[derive(Clone, Debug, clap::Args)]
pub struct ApplyArgs {
    /// File with resources, YAML (several documents) or JSON; - reads standard input.
    #[arg(short = 'f', long = "file", value_name = "FILE", required = true)]
    pub files: Vec<PathBuf>,
    /// Change nothing; show changes, placement and reasons.
    #[arg(long)]
    pub plan: bool,
    /// Come back when everything is as described.
    #[arg(long, conflicts_with = "plan")]
    pub wait: bool,
    /// Longest time to wait.
    #[arg(long, value_name = "TIME", default_value = "30m")]
    pub timeout: Span,
}
