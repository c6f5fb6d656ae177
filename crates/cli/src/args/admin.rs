//! Flags of the commands about the cloud itself: projects, users, tokens, nodes, events, contexts.

use std::path::PathBuf;

use oblak_model::Span;

use super::join::{NodeNameArgs, NodeRemoveArgs};
use super::migrate::DrainArgs;
use super::resources::{LabelArgs, NamesArgs, NewLabels};
use super::values::RoleWord;

/// `project ...`
#[derive(Clone, Debug, clap::Subcommand)]
pub enum ProjectCommand {
    /// Make a project with a network, a subnet and a security group, each named default.
    Create(ProjectCreateArgs),
    /// List projects.
    #[command(visible_alias = "ls")]
    List(LabelArgs),
    /// Delete empty projects.
    Delete(NamesArgs),
    /// Give a user a role in a project.
    Grant(GrantArgs),
    /// Take a user's role in a project away.
    Revoke {
        /// Project.
        project_name: String,
        /// User.
        user: String,
    },
}

/// Flags of `project create`.
#[derive(Clone, Debug, clap::Args)]
pub struct ProjectCreateArgs {
    /// Name.
    pub name: String,
    /// Free text.
    #[arg(long, value_name = "TEXT", default_value = "", hide_default_value = true)]
    pub description: String,
    /// Labels.
    #[command(flatten)]
    pub labels: NewLabels,
}

/// Flags of `project grant`.
#[derive(Clone, Debug, clap::Args)]
pub struct GrantArgs {
    /// Project.
    pub project_name: String,
    /// User.
    pub user: String,
    /// What the user may do there.
    #[arg(long, value_enum, default_value = "member")]
    pub role: RoleWord,
}

/// `user ...`
#[derive(Clone, Debug, clap::Subcommand)]
pub enum UserCommand {
    /// Make a user.
    Create(UserCreateArgs),
    /// List users.
    #[command(visible_alias = "ls")]
    List(LabelArgs),
    /// Delete users and their tokens.
    Delete(NamesArgs),
    /// Set a user's password.
    Password {
        /// User.
        name: String,
        /// Read the password from standard input.
        #[arg(long)]
        password_stdin: bool,
    },
}

/// Flags of `user create`.
#[derive(Clone, Debug, clap::Args)]
pub struct UserCreateArgs {
    /// Name.
    pub name: String,
    /// Read the password from standard input. Without it one is asked for on a terminal.
    #[arg(long)]
    pub password_stdin: bool,
    /// No password: only tokens.
    #[arg(long, conflicts_with = "password_stdin")]
    pub no_password: bool,
    /// Full name.
    #[arg(long, value_name = "TEXT", default_value = "", hide_default_value = true)]
    pub full_name: String,
    /// Mail address.
    #[arg(long, value_name = "ADDR", default_value = "", hide_default_value = true)]
    pub email: String,
    /// May do everything in the whole cloud.
    #[arg(long)]
    pub cloud_admin: bool,
    /// Labels.
    #[command(flatten)]
    pub labels: NewLabels,
}

/// `token ...`
#[derive(Clone, Debug, clap::Subcommand)]
pub enum TokenCommand {
    /// Make a token and print its secret, which is never shown again.
    Create(TokenCreateArgs),
    /// List tokens.
    #[command(visible_alias = "ls")]
    List(LabelArgs),
    /// Delete tokens.
    Delete(NamesArgs),
}

/// Flags of `token create`.
#[derive(Clone, Debug, clap::Args)]
pub struct TokenCreateArgs {
    /// Name; made up when absent.
    pub name: Option<String>,
    /// User it stands for; you when absent.
    #[arg(long, value_name = "NAME", default_value = "", hide_default_value = true)]
    pub user: String,
    /// What it is for.
    #[arg(long, value_name = "TEXT", default_value = "", hide_default_value = true)]
    pub description: String,
    /// Time until it stops working; never when absent.
    #[arg(long, value_name = "TIME")]
    pub expires_in: Option<Span>,
    /// Labels.
    #[command(flatten)]
    pub labels: NewLabels,
}

/// `node ...`
#[derive(Clone, Debug, clap::Subcommand)]
pub enum NodeCommand {
    /// List nodes.
    #[command(visible_alias = "ls")]
    List(LabelArgs),
    /// Print nodes.
    Get(NamesArgs),
    /// Print everything about one node for people, with what is on it and its events.
    Show(NodeNameArgs),
    /// Let no new instances come to nodes.
    Cordon(NamesArgs),
    /// Let new instances come to nodes again.
    Uncordon(NamesArgs),
    /// Let no new instances come to a node, and move those on it away.
    Drain(DrainArgs),
    /// Remove a node from the cloud for good. Refused while something lives on it.
    Remove(NodeRemoveArgs),
    /// Say that a node which is down is lost, so that its instances with ha are started elsewhere.
    Evacuate(NodeEvacuateArgs),
    /// Forget nodes that have no instances.
    Delete(NamesArgs),
}

/// Flags of `node evacuate`.
#[derive(Clone, Debug, clap::Args)]
pub struct NodeEvacuateArgs {
    /// Node.
    pub name: String,
    /// You have made sure that it is off, or can reach neither disks nor networks.
    #[arg(long, required = true)]
    pub confirm: bool,
}

/// Flags of `events`.
#[derive(Clone, Debug, clap::Args)]
pub struct EventsArgs {
    /// Only those about this object: KIND/NAME, or a name.
    #[arg(value_name = "ABOUT")]
    pub about: Option<String>,
    /// Go on with what comes.
    #[arg(long, short = 'f')]
    pub follow: bool,
    /// Those of all projects and of the cloud. Needs a cloud administrator.
    #[arg(long, short = 'A')]
    pub all_projects: bool,
}

/// Flags of `login`. The server is the global --server.
#[derive(Clone, Debug, clap::Args)]
pub struct LoginArgs {
    /// File with the certificate of the server's authority (`pki/ca.pem` of its data directory).
    #[arg(long, value_name = "FILE", env = "OBLAK_CA", hide_env_values = true)]
    pub ca: Option<PathBuf>,
    /// User name.
    #[arg(long, value_name = "NAME", default_value = "admin")]
    pub user: String,
    /// Read the password from standard input. Without it, it is asked for on a terminal.
    #[arg(long)]
    pub password_stdin: bool,
}

/// `context ...`
#[derive(Clone, Debug, clap::Subcommand)]
pub enum ContextCommand {
    /// List contexts.
    #[command(visible_alias = "ls")]
    List,
    /// Use another context from now on.
    Use {
        /// Context.
        name: String,
    },
    /// Forget a context.
    Delete {
        /// Context.
        name: String,
    },
}

/// Flags of `completion`.
#[derive(Clone, Debug, clap::Args)]
pub struct CompletionArgs {
    /// Shell.
    #[arg(value_enum)]
    pub shell: ShellWord,
}

/// Shells that completion scripts exist for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum ShellWord {
    /// bash
    Bash,
    /// zsh
    Zsh,
    /// fish
    Fish,
}
