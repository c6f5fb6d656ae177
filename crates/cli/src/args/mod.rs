//! The words and flags of the client's commands. What they do is in [`crate::cmd`].

mod admin;
mod cluster;
mod instance;
mod join;
mod migrate;
mod resources;
mod values;

pub use admin::*;
pub use cluster::*;
pub use instance::*;
pub use join::*;
pub use migrate::*;
pub use resources::*;
pub use values::*;

/// What every command accepts.
#[derive(Clone, Debug, Default, clap::Args)]
#[command(next_help_heading = "Global options")]
pub struct Global {
    /// Context to use: cloud, identity and project. The current one when absent.
    #[arg(long, global = true, value_name = "NAME")]
    pub context: Option<String>,
    /// Project to work in. That of the context when absent.
    #[arg(long, short = 'p', global = true, value_name = "NAME", env = "OBLAK_PROJECT", hide_env_values = true)]
    pub project: Option<String>,
    /// How to print what was asked for.
    #[arg(long, short = 'o', global = true, value_enum, value_name = "FORMAT")]
    pub output: Option<Format>,
    /// Address of the server, for example https://127.0.0.1:7443.
    #[arg(long, global = true, value_name = "URL", env = "OBLAK_SERVER", hide_env_values = true)]
    pub server: Option<String>,
    /// No colours. They are only used on a terminal anyway, and never when NO_COLOR is set.
    #[arg(long, global = true)]
    pub no_color: bool,
    /// No progress and no notices; only data and errors.
    #[arg(long, short = 'q', global = true)]
    pub quiet: bool,
}

/// How data is printed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    /// Aligned columns.
    #[default]
    Table,
    /// Aligned columns, more of them.
    Wide,
    /// The API's objects as JSON.
    Json,
    /// The API's objects as YAML.
    Yaml,
}

/// The commands of the client.
#[derive(Clone, Debug, clap::Subcommand)]
pub enum Command {
    /// Start a new instance: a container or a virtual machine.
    Launch(Box<LaunchArgs>),
    /// List instances.
    #[command(visible_alias = "ls")]
    List(ListArgs),
    /// Print one object, or all of a kind.
    Get(GetArgs),
    /// Print everything about one object for people, with its events.
    Describe(ObjectArgs),
    /// Delete instances, or objects of any kind as KIND/NAME.
    Delete(DeleteArgs),
    /// Stop instances. Disks and addresses are kept.
    Stop(PowerArgs),
    /// Start stopped instances.
    Start(PowerArgs),
    /// Stop and start instances.
    Restart(PowerArgs),
    /// Freeze instances. Memory is kept.
    Pause(PowerArgs),
    /// Go on with paused instances.
    Resume(PowerArgs),
    /// Give an instance another flavor.
    Resize(ResizeArgs),
    /// Move an instance to another node.
    Migrate(MigrateArgs),
    /// Take a snapshot of an instance.
    Snapshot(SnapshotArgs),
    /// Go back to a snapshot.
    Restore(RestoreArgs),
    /// List snapshots.
    Snapshots(SnapshotsArgs),
    /// Run a command inside an instance.
    Exec(ExecArgs),
    /// Use the serial console of an instance. ^] leaves.
    Console(NameArgs),
    /// Print what an instance wrote to its console.
    Logs(LogsArgs),
    /// Log in to an instance with the system's ssh.
    Ssh(SshArgs),
    /// Reach a TCP port of an instance from here.
    Forward(ForwardArgs),
    /// Reach the screen of a virtual machine from here.
    Vnc(VncArgs),
    /// Print what an instance uses.
    Usage(NameArgs),
    /// Say why an instance is where it is, or nowhere; of images, volumes and snapshots what they are doing.
    Explain(ObjectArgs),
    /// Make what files describe: all of it, or nothing.
    Apply(ApplyArgs),
    /// Images: what instances boot or run.
    #[command(subcommand, visible_alias = "images")]
    Image(ImageCommand),
    /// Volumes: storage that outlives instances.
    #[command(subcommand, visible_alias = "volumes")]
    Volume(VolumeCommand),
    /// Private networks.
    #[command(subcommand)]
    Network(NetworkCommand),
    /// Address ranges of networks.
    #[command(subcommand)]
    Subnet(SubnetCommand),
    /// Rules about what may reach instances.
    #[command(subcommand)]
    SecurityGroup(SecurityGroupCommand),
    /// Public ssh keys that instances accept.
    #[command(subcommand)]
    Key(KeyCommand),
    /// Sizes that instances come in.
    #[command(subcommand)]
    Flavor(FlavorCommand),
    /// Projects: tenants of the cloud.
    #[command(subcommand)]
    Project(ProjectCommand),
    /// Users of the cloud.
    #[command(subcommand)]
    User(UserCommand),
    /// Tokens: secrets that stand for users.
    #[command(subcommand)]
    Token(TokenCommand),
    /// Machines that run instances.
    #[command(subcommand)]
    Node(NodeCommand),
    /// Join tokens: with each of them one machine joins the cloud, once.
    #[command(subcommand)]
    JoinToken(JoinTokenCommand),
    /// Print what happened.
    Events(EventsArgs),
    /// Log in to a cloud and remember it as a context.
    Login(LoginArgs),
    /// Contexts: which cloud, as whom, in which project.
    #[command(subcommand)]
    Context(ContextCommand),
    /// Print who you are to the cloud.
    Whoami,
    /// Print the versions of this program and of the server.
    Version,
    /// Print a completion script for a shell.
    Completion(CompletionArgs),
}
