//! Flags of the commands about nodes that come and go.

use oblak_model::{JoinRole, Span};

use super::resources::{LabelArgs, NamesArgs};

/// `join-token ...`
#[derive(Clone, Debug, clap::Subcommand)]
pub enum JoinTokenCommand {
    /// Make a join token and print it. It is never shown again.
    Create(JoinTokenCreateArgs),
    /// List join tokens.
    #[command(visible_alias = "ls")]
    List(LabelArgs),
    /// Delete join tokens. Machines that joined with them stay.
    Delete(NamesArgs),
}

/// Flags of `join-token create`.
#[derive(Clone, Debug, clap::Args)]
pub struct JoinTokenCreateArgs {
    /// Name; made up when absent.
    pub name: Option<String>,
    /// What the machine becomes.
    #[arg(long, value_enum, default_value = "node")]
    pub role: JoinRoleWord,
    /// How long the token works.
    #[arg(long, value_name = "TIME", default_value = "1h")]
    pub ttl: Span,
    /// What it is for.
    #[arg(long, value_name = "TEXT", default_value = "", hide_default_value = true)]
    pub description: String,
}

/// What a machine becomes, as a word.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum JoinRoleWord {
    /// It runs instances.
    Node,
    /// It serves the API and holds the state.
    Server,
}

impl From<JoinRoleWord> for JoinRole {
    fn from(word: JoinRoleWord) -> Self {
        match word {
            JoinRoleWord::Node => Self::Node,
            JoinRoleWord::Server => Self::Server,
        }
    }
}

/// One node by name.
#[derive(Clone, Debug, clap::Args)]
pub struct NodeNameArgs {
    /// Node.
    pub name: String,
}

/// Flags of `node remove`.
#[derive(Clone, Debug, clap::Args)]
pub struct NodeRemoveArgs {
    /// Node.
    pub name: String,
    /// Also when something lives there. It is lost then; what, is said.
    #[arg(long)]
    pub force: bool,
}
