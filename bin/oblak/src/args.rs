//! The command line of the roles. That of the client is in `oblak-cli`.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use clap::{Parser, Subcommand, ValueEnum};
use oblak_model::{Size, Span};
use oblak_platform::layout::DEFAULT_DATA;

/// The cloud in one binary.
#[derive(Debug, Parser)]
#[command(name = "oblak", version, about, long_about = None, disable_help_subcommand = true, propagate_version = false)]
pub struct Args {
    #[command(flatten)]
    pub global: oblak_cli::Global,
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Start the whole cloud on this machine: API, control plane and agent in one process.
    Up(UpArgs),
    /// Stop what `up` started. Guests go on unless --stop-guests is given.
    Down(DownArgs),
    /// Start only the API and the control plane.
    Server(ServerArgs),
    /// Make this machine a node, or one more server, of a cloud elsewhere, and start it.
    Join(Box<JoinArgs>),
    /// Start only the agent of a machine that has joined.
    Agent(AgentArgs),
    /// Play through what would happen to the cloud as it is now. Nothing is changed.
    #[command(subcommand)]
    Whatif(WhatifCommand),
    /// The servers of a cloud and its state: status, balance, backup, restore, moving it into etcd.
    #[command(subcommand)]
    Cluster(ClusterCommand),
    /// Print files that are made from the code.
    #[command(hide = true)]
    Generate {
        #[arg(value_enum)]
        what: GenerateWhat,
    },
    #[command(flatten)]
    Client(oblak_cli::Command),
}

/// `cluster ...`: what is asked of the API, and what is done on a server that does not run.
#[derive(Debug, Clone, Subcommand)]
pub enum ClusterCommand {
    #[command(flatten)]
    Client(oblak_cli::ClusterCommand),
    /// Say which moves of instances would even the nodes out.
    Balance(BalanceArgs),
    /// Begin a new life of a cloud from a backup, in an empty data directory.
    Restore(RestoreArgs),
    /// Move the state of this cloud from its file into etcd. The cloud must be stopped; guests go on.
    MigrateStore(MigrateArgs),
}

#[derive(Debug, Clone, clap::Args)]
pub struct RestoreArgs {
    /// The backup.
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
    /// File with the passphrase or recovery key, in its first line; asked for when absent.
    #[arg(long, value_name = "FILE")]
    pub passphrase_file: Option<PathBuf>,
    /// Only read the backup to its end and say what is in it.
    #[arg(long)]
    pub check: bool,
    /// Where the cloud begins. It may hold guests, but no state.
    #[arg(long, value_name = "DIR", default_value = DEFAULT_DATA)]
    pub data: PathBuf,
    #[command(flatten)]
    pub etcd: EtcdArgs,
}

#[derive(Debug, Clone, clap::Args)]
pub struct MigrateArgs {
    /// The data directory of the cloud.
    #[arg(long, value_name = "DIR", default_value = DEFAULT_DATA)]
    pub data: PathBuf,
    #[command(flatten)]
    pub etcd: EtcdArgs,
}

/// `whatif ...`
#[derive(Debug, Clone, Subcommand)]
pub enum WhatifCommand {
    /// Nodes lose their power, all at once: which instances would go where, and which would fit nowhere and why.
    NodeDown(NodeDownArgs),
    /// Nodes join: which of the instances that wait would run.
    NodeAdd(NodeAddArgs),
}

#[derive(Debug, Clone, clap::Args)]
pub struct NodeDownArgs {
    /// Nodes.
    #[arg(value_name = "NODE", required = true)]
    pub nodes: Vec<String>,
}

#[derive(Debug, Clone, clap::Args)]
pub struct NodeAddArgs {
    /// The new nodes are as this one, but empty.
    #[arg(long, value_name = "NODE")]
    pub like: String,
    /// How many.
    #[arg(long, value_name = "N", default_value = "1", value_parser = clap::value_parser!(u16).range(1..=1000))]
    pub count: u16,
}

#[derive(Debug, Clone, clap::Args)]
pub struct BalanceArgs {
    /// Only say it.
    #[arg(long)]
    pub plan: bool,
    /// Most moves.
    #[arg(long, value_name = "N", default_value = "20", value_parser = clap::value_parser!(u16).range(1..=1000))]
    pub moves: u16,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum GenerateWhat {
    /// The OpenAPI document of the API.
    Openapi,
    /// The reference of the command line, in Markdown.
    CliReference,
}

#[derive(Debug, Clone, clap::Args)]
pub struct UpArgs {
    /// Where everything is kept.
    #[arg(long, value_name = "DIR", default_value = DEFAULT_DATA)]
    pub data: PathBuf,
    /// Address of the API and console.
    #[arg(long, value_name = "ADDR", default_value = "0.0.0.0:7443")]
    pub listen: SocketAddr,
    /// Come back when everything runs, and leave it running.
    #[arg(long)]
    pub detach: bool,
    /// Name of this node; the host name when absent.
    #[arg(long, value_name = "NAME")]
    pub node_name: Option<String>,
    /// Zone of this node.
    #[arg(long, value_name = "ZONE", default_value = "zone-1")]
    pub zone: String,
    /// Names and addresses that clients will use for this server, beside its own.
    #[arg(long = "server-name", value_name = "NAME")]
    pub server_names: Vec<String>,
    /// Address of this machine where tunnels to other nodes begin; `auto` takes the one from which the server is reached, `off` none.
    #[arg(long, value_name = "ADDR", default_value = "auto")]
    pub underlay: oblak_agent::UnderlayChoice,
    /// Pool for volumes in a directory that other nodes mount under the same path; may be repeated.
    #[arg(long = "shared-pool", value_name = "NAME=DIR")]
    pub pools: Vec<PoolArg>,
    /// Directory of the image recipes, instead of those in the binary.
    #[arg(long, value_name = "DIR", env = "OBLAK_RECIPES")]
    pub recipes: Option<PathBuf>,
    #[command(flatten)]
    pub etcd: EtcdArgs,
    #[command(flatten)]
    pub ha: HaArgs,
    /// Life of the certificates of nodes, for example 90d. They are renewed after two thirds of it.
    #[arg(long, value_name = "TIME", hide = true, env = "OBLAK_NODE_CERTIFICATE_LIFE", hide_env_values = true)]
    pub node_certificate_life: Option<Span>,
    /// Do not write a context for the command line.
    #[arg(long)]
    pub no_context: bool,
    /// Log as JSON.
    #[arg(long)]
    pub log_json: bool,
}

/// What happens when nodes are lost.
#[derive(Debug, Clone, clap::Args)]
pub struct HaArgs {
    /// Program that powers a node off, asked with the node's name before its instances are started elsewhere; for example over its BMC.
    #[arg(long, value_name = "FILE", env = "OBLAK_POWER_OFF", hide_env_values = true)]
    pub power_off: Option<PathBuf>,
    /// When more than this part of the nodes is lost at once, in percent, nothing is started elsewhere before a person confirms.
    #[arg(long, value_name = "PERCENT", default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..=100))]
    pub evacuation_brake: u32,
}

#[derive(Debug, Clone, clap::Args)]
pub struct DownArgs {
    /// The data directory that `up` was given.
    #[arg(long, value_name = "DIR", default_value = DEFAULT_DATA)]
    pub data: PathBuf,
    /// Stop the guests too. They start again with the next `up`.
    #[arg(long)]
    pub stop_guests: bool,
    /// Stop this server's member of etcd too. Otherwise it goes on, and the other servers with it.
    #[arg(long)]
    pub stop_etcd: bool,
}

#[derive(Debug, Clone, clap::Args)]
pub struct ServerArgs {
    /// Where everything is kept.
    #[arg(long, value_name = "DIR", default_value = DEFAULT_DATA)]
    pub data: PathBuf,
    /// Address of the API and console.
    #[arg(long, value_name = "ADDR", default_value = "0.0.0.0:7443")]
    pub listen: SocketAddr,
    /// Name of this server; the host name when absent.
    #[arg(long, value_name = "NAME")]
    pub name: Option<String>,
    /// Names and addresses that clients will use for this server, beside its own.
    #[arg(long = "server-name", value_name = "NAME")]
    pub server_names: Vec<String>,
    #[command(flatten)]
    pub etcd: EtcdArgs,
    #[command(flatten)]
    pub ha: HaArgs,
    /// Life of the certificates of nodes, for example 90d. They are renewed after two thirds of it.
    #[arg(long, value_name = "TIME", hide = true, env = "OBLAK_NODE_CERTIFICATE_LIFE", hide_env_values = true)]
    pub node_certificate_life: Option<Span>,
    /// Do not write a context for the command line.
    #[arg(long)]
    pub no_context: bool,
    /// Log as JSON.
    #[arg(long)]
    pub log_json: bool,
}

/// Where the control plane keeps its state, when that is not a file below the data directory.
#[derive(Debug, Clone, clap::Args)]
#[command(next_help_heading = "State in etcd")]
pub struct EtcdArgs {
    /// Keep the state in an etcd that is started and looked after here, so that other servers can join. Only needed the first time.
    #[arg(long, conflicts_with = "endpoints")]
    pub cluster: bool,
    /// Name of this server among the servers; that of the node, or the host name, when absent.
    #[arg(long, value_name = "NAME", requires = "cluster")]
    pub member_name: Option<String>,
    /// Address at which other servers reach this one; that of the default route when absent.
    #[arg(long, value_name = "ADDR", requires = "cluster")]
    pub advertise: Option<IpAddr>,
    /// Port of etcd for clients.
    #[arg(long = "etcd-client-port", value_name = "PORT", default_value = "2379")]
    pub client_port: u16,
    /// Port of etcd for other servers.
    #[arg(long = "etcd-peer-port", value_name = "PORT", default_value = "2380")]
    pub peer_port: u16,
    /// Largest size of etcd's database, 4GiB at first. Of a member that runs it is changed when its etcd is started next.
    #[arg(long = "etcd-quota", value_name = "SIZE", conflicts_with = "endpoints")]
    pub quota: Option<Size>,
    /// Life of the certificates of etcd, for example 90d. They are renewed after two thirds of it.
    #[arg(long, value_name = "TIME", hide = true, env = "OBLAK_ETCD_CERTIFICATE_LIFE", hide_env_values = true)]
    pub member_certificate_life: Option<Span>,
    /// Keep the state in this etcd cluster instead of in a file: URLs of its servers, separated by commas.
    #[arg(long = "etcd", value_name = "URL,...", value_delimiter = ',', env = "OBLAK_ETCD")]
    pub endpoints: Vec<String>,
    /// File with the certificate of the authority of etcd's servers. Required for https.
    #[arg(long = "etcd-ca", value_name = "FILE", requires = "endpoints")]
    pub ca: Option<PathBuf>,
    /// File with the certificate that we show to etcd.
    #[arg(long = "etcd-cert", value_name = "FILE", requires_all = ["ca", "key"])]
    pub cert: Option<PathBuf>,
    /// File with its key.
    #[arg(long = "etcd-key", value_name = "FILE", requires = "cert")]
    pub key: Option<PathBuf>,
    /// User of etcd; needs a role with read and write on the prefix.
    #[arg(long = "etcd-user", value_name = "NAME", requires_all = ["endpoints", "password_file"])]
    pub user: Option<String>,
    /// File with the password of that user, in its first line.
    #[arg(long = "etcd-password-file", value_name = "FILE", requires = "user")]
    pub password_file: Option<PathBuf>,
    /// Everything of this cloud lies below this text in etcd, so that several clouds can share one.
    #[arg(long = "etcd-prefix", value_name = "TEXT/", default_value = "oblak/")]
    pub prefix: String,
}

impl Default for EtcdArgs {
    fn default() -> Self {
        Self {
            cluster: false,
            member_name: None,
            advertise: None,
            client_port: 2379,
            peer_port: 2380,
            quota: None,
            member_certificate_life: None,
            endpoints: Vec::new(),
            ca: None,
            cert: None,
            key: None,
            user: None,
            password_file: None,
            prefix: "oblak/".into(),
        }
    }
}

#[derive(Debug, Clone, clap::Args)]
pub struct JoinArgs {
    /// The server, for example https://10.0.0.1:7443.
    #[arg(value_name = "URL")]
    pub server: String,
    /// Join token, as `oblak join-token create` printed it. Not needed when this machine has joined before.
    #[arg(long, value_name = "TOKEN", env = "OBLAK_JOIN_TOKEN", hide_env_values = true)]
    pub token: Option<String>,
    /// Where everything is kept.
    #[arg(long, value_name = "DIR", default_value = DEFAULT_DATA)]
    pub data: PathBuf,
    /// Name of this node; the host name when absent.
    #[arg(long, value_name = "NAME")]
    pub node_name: Option<String>,
    /// Zone of this node: nodes that fail together. zone-1 when absent.
    #[arg(long, value_name = "ZONE")]
    pub zone: Option<String>,
    /// Label of this node; may be repeated.
    #[arg(long = "label", short = 'l', value_name = "KEY=VALUE", value_parser = label)]
    pub labels: Vec<(String, String)>,
    /// Address of this machine where tunnels to other nodes begin; `auto` takes the one from which the server is reached, `off` none.
    #[arg(long, value_name = "ADDR", default_value = "auto")]
    pub underlay: oblak_agent::UnderlayChoice,
    #[command(flatten)]
    pub server_args: JoinServerArgs,
    /// Pool for volumes in a directory that other nodes mount under the same path; may be repeated.
    #[arg(long = "shared-pool", value_name = "NAME=DIR")]
    pub pools: Vec<PoolArg>,
    /// Come back when the agent runs, and leave it running.
    #[arg(long)]
    pub detach: bool,
    /// Directory of the image recipes, instead of those in the binary.
    #[arg(long, value_name = "DIR", env = "OBLAK_RECIPES")]
    pub recipes: Option<PathBuf>,
    /// Log as JSON.
    #[arg(long)]
    pub log_json: bool,
}

/// What only a machine needs that becomes a server.
#[derive(Debug, Clone, clap::Args)]
#[command(next_help_heading = "With a token of role server")]
pub struct JoinServerArgs {
    #[command(flatten)]
    pub ha: HaArgs,
    /// Address of the API and console of this server.
    #[arg(long, value_name = "ADDR", default_value = "0.0.0.0:7443")]
    pub listen: SocketAddr,
    /// Names and addresses that clients will use for this server, beside its own.
    #[arg(long = "server-name", value_name = "NAME")]
    pub server_names: Vec<String>,
    /// Address at which other servers reach this one; the one from which the server is reached when absent.
    #[arg(long, value_name = "ADDR")]
    pub advertise: Option<IpAddr>,
    /// Port of etcd for clients.
    #[arg(long = "etcd-client-port", value_name = "PORT", default_value = "2379")]
    pub client_port: u16,
    /// Port of etcd for other servers.
    #[arg(long = "etcd-peer-port", value_name = "PORT", default_value = "2380")]
    pub peer_port: u16,
    /// Life of the certificates of etcd, for example 90d. They are renewed after two thirds of it.
    #[arg(long, value_name = "TIME", hide = true, env = "OBLAK_ETCD_CERTIFICATE_LIFE", hide_env_values = true)]
    pub member_certificate_life: Option<Span>,
    /// Do not write a context for the command line.
    #[arg(long)]
    pub no_context: bool,
}

fn label(text: &str) -> Result<(String, String), String> {
    let (key, value) = text.split_once('=').ok_or("write KEY=VALUE")?;
    Ok((key.into(), value.into()))
}

#[derive(Debug, Clone, clap::Args)]
pub struct AgentArgs {
    /// The server, for example https://10.0.0.1:7443; the one that it joined when absent.
    #[arg(long, value_name = "URL")]
    pub server: Option<String>,
    /// File with the certificate of the server's authority (`pki/ca.pem` of its data directory). Only needed the first time.
    #[arg(long, value_name = "FILE")]
    pub ca: Option<PathBuf>,
    /// Token of a cloud administrator, to enroll this node. Only needed the first time.
    #[arg(long, value_name = "TOKEN", env = "OBLAK_TOKEN", hide_env_values = true)]
    pub token: Option<String>,
    /// Where everything is kept.
    #[arg(long, value_name = "DIR", default_value = DEFAULT_DATA)]
    pub data: PathBuf,
    /// Name of this node; the host name when absent.
    #[arg(long, value_name = "NAME")]
    pub node_name: Option<String>,
    /// Zone of this node.
    #[arg(long, value_name = "ZONE", default_value = "zone-1")]
    pub zone: String,
    /// Address of this machine where tunnels to other nodes begin; `auto` takes the one from which the server is reached, `off` none.
    #[arg(long, value_name = "ADDR", default_value = "auto")]
    pub underlay: oblak_agent::UnderlayChoice,
    /// Pool for volumes in a directory that other nodes mount under the same path; may be repeated.
    #[arg(long = "shared-pool", value_name = "NAME=DIR")]
    pub pools: Vec<PoolArg>,
    /// Directory of the image recipes, instead of those in the binary.
    #[arg(long, value_name = "DIR", env = "OBLAK_RECIPES")]
    pub recipes: Option<PathBuf>,
    /// Log as JSON.
    #[arg(long)]
    pub log_json: bool,
}

/// A pool in a directory that several nodes mount.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PoolArg {
    /// Its name.
    pub name: String,
    /// The directory; the same path on every node.
    pub dir: PathBuf,
}

impl std::str::FromStr for PoolArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, dir) = text.split_once('=').ok_or("write it as NAME=DIR")?;
        if let Some(problem) = oblak_model::name::problem(name) {
            return Err(format!("the name {name:?} {problem}"));
        }
        if !dir.starts_with('/') {
            return Err(format!("{dir:?} must be an absolute path, the same on every node"));
        }
        Ok(Self { name: name.into(), dir: dir.into() })
    }
}

impl std::fmt::Display for PoolArg {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}={}", self.name, self.dir.display())
    }
}
