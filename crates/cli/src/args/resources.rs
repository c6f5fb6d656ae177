//! Flags of the commands about what instances use: images, volumes, networks, keys, flavors.

use std::net::IpAddr;
use std::path::PathBuf;

use oblak_model::{Cpus, Size, Span};

use super::instance::{ListArgs, WaitArgs};
use super::values::{self, DirectionWord, FirmwareWord, FormatWord, ProtocolWord};

/// Names of objects to delete.
#[derive(Clone, Debug, clap::Args)]
pub struct NamesArgs {
    /// Names.
    #[arg(required = true, value_name = "NAME")]
    pub names: Vec<String>,
}

/// Names of objects to delete, with waiting.
#[derive(Clone, Debug, clap::Args)]
pub struct DeleteNamesArgs {
    /// Names.
    #[arg(required = true, value_name = "NAME")]
    pub names: Vec<String>,
    /// Whether to wait.
    #[command(flatten)]
    pub wait: WaitArgs,
}

/// What to list.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct LabelArgs {
    /// Only those with these labels.
    #[arg(long, short = 'l', value_name = "SELECTOR")]
    pub label: Option<oblak_model::selector::Selector>,
}

impl From<LabelArgs> for ListArgs {
    fn from(args: LabelArgs) -> Self {
        Self { label: args.label, ..Self::default() }
    }
}

/// Labels of a new object.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct NewLabels {
    /// Label.
    #[arg(long = "label", short = 'l', value_name = "NAME=VALUE", value_parser = values::pair)]
    pub labels: Vec<(String, String)>,
}

/// `image ...`
#[derive(Clone, Debug, clap::Subcommand)]
pub enum ImageCommand {
    /// List images.
    #[command(visible_alias = "ls")]
    List(LabelArgs),
    /// Print images.
    Get(NamesArgs),
    /// Make an image.
    Create(Box<ImageCreateArgs>),
    /// Delete images.
    Delete(DeleteNamesArgs),
    /// Wait until images can be used, and fetch or build those that wait for their first use.
    Wait(ImageWaitArgs),
    /// Fetch or build images once more that failed.
    Retry(ImageWaitArgs),
}

/// Flags of `image create`.
#[derive(Clone, Debug, clap::Args)]
#[command(group = clap::ArgGroup::new("from").required(true).args(["from_url", "from_registry", "from_file"]))]
pub struct ImageCreateArgs {
    /// Name.
    pub name: String,
    /// Fetch a disk image from this http or https URL.
    #[arg(long, value_name = "URL")]
    pub from_url: Option<String>,
    /// Pull an OCI image from a registry.
    #[arg(long, value_name = "REF")]
    pub from_registry: Option<String>,
    /// Upload a file: a disk image, or an OCI layout as tar. What it is, is seen by its content.
    #[arg(long, value_name = "FILE")]
    pub from_file: Option<PathBuf>,
    /// User name for the registry.
    #[arg(long, value_name = "NAME", requires = "from_registry")]
    pub username: Option<String>,
    /// Read the password for the registry from standard input.
    #[arg(long, requires = "username")]
    pub password_stdin: bool,
    /// Speak http with the registry.
    #[arg(long, requires = "from_registry")]
    pub insecure: bool,
    /// Checksum that the content must have.
    #[arg(long, value_name = "sha256:HEX")]
    pub checksum: Option<String>,
    /// Every project may use it.
    #[arg(long)]
    pub public: bool,
    /// Firmware for disks with a boot loader of their own.
    #[arg(long, value_enum, default_value = "bios")]
    pub firmware: FirmwareWord,
    /// Fetch it when the first instance needs it, not before.
    #[arg(long, conflicts_with = "from_file")]
    pub on_demand: bool,
    /// Smallest memory that it runs with.
    #[arg(long, value_name = "SIZE")]
    pub min_memory: Option<Size>,
    /// Labels.
    #[command(flatten)]
    pub labels: NewLabels,
    /// Come back when it can be used.
    #[arg(long)]
    pub wait: bool,
    /// Longest time to wait, and longest time an upload may take.
    #[arg(long, value_name = "TIME", default_value = "1h")]
    pub timeout: Span,
}

/// Flags of `image wait` and `image retry`.
#[derive(Clone, Debug, clap::Args)]
pub struct ImageWaitArgs {
    /// Images.
    #[arg(required = true, value_name = "NAME")]
    pub names: Vec<String>,
    /// Longest time to wait.
    #[arg(long, value_name = "TIME", default_value = "1h")]
    pub timeout: Span,
}

/// `volume ...`
#[derive(Clone, Debug, clap::Subcommand)]
pub enum VolumeCommand {
    /// Make a volume.
    Create(VolumeCreateArgs),
    /// List volumes.
    #[command(visible_alias = "ls")]
    List(LabelArgs),
    /// Plug a volume into an instance.
    Attach(AttachArgs),
    /// Unplug a volume.
    Detach(DetachArgs),
    /// Make a volume larger.
    Grow(GrowArgs),
    /// Delete volumes and what is on them.
    Delete(DeleteNamesArgs),
}

/// Flags of `volume create`.
#[derive(Clone, Debug, clap::Args)]
pub struct VolumeCreateArgs {
    /// Name.
    pub name: String,
    /// Size, for example 1GiB.
    #[arg(long, value_name = "SIZE")]
    pub size: Size,
    /// How the bytes are kept. A directory is for containers only.
    #[arg(long, value_enum, default_value = "qcow2")]
    pub format: FormatWord,
    /// Pool; the node's default when absent.
    #[arg(long, value_name = "NAME", default_value = "", hide_default_value = true)]
    pub pool: String,
    /// Start as a copy of this volume.
    #[arg(long, value_name = "VOLUME", conflicts_with = "from_snapshot")]
    pub from_volume: Option<String>,
    /// Start as a copy of this snapshot of a volume.
    #[arg(long, value_name = "SNAPSHOT")]
    pub from_snapshot: Option<String>,
    /// Labels.
    #[command(flatten)]
    pub labels: NewLabels,
}

/// Flags of `volume attach`.
#[derive(Clone, Debug, clap::Args)]
pub struct AttachArgs {
    /// Volume.
    pub volume: String,
    /// Instance.
    pub instance: String,
    /// Where a container sees it.
    #[arg(long, value_name = "PATH")]
    pub mount: Option<String>,
    /// Write-protected.
    #[arg(long)]
    pub read_only: bool,
    /// Whether to wait.
    #[command(flatten)]
    pub wait: WaitArgs,
}

/// Flags of `volume detach`.
#[derive(Clone, Debug, clap::Args)]
pub struct DetachArgs {
    /// Volume.
    pub volume: String,
    /// Instance; the one that has it when absent.
    pub instance: Option<String>,
    /// Whether to wait.
    #[command(flatten)]
    pub wait: WaitArgs,
}

/// Flags of `volume grow`.
#[derive(Clone, Debug, clap::Args)]
pub struct GrowArgs {
    /// Volume.
    pub name: String,
    /// New size, or +SIZE for that much more.
    #[arg(long, value_name = "[+]SIZE")]
    pub size: String,
    /// Whether to wait.
    #[command(flatten)]
    pub wait: WaitArgs,
}

/// `network ...`
#[derive(Clone, Debug, clap::Subcommand)]
pub enum NetworkCommand {
    /// Make a network, with a subnet if --cidr is given.
    Create(NetworkCreateArgs),
    /// List networks.
    #[command(visible_alias = "ls")]
    List(LabelArgs),
    /// Delete networks and their subnets.
    Delete(NamesArgs),
}

/// Flags of `network create`.
#[derive(Clone, Debug, clap::Args)]
pub struct NetworkCreateArgs {
    /// Name.
    pub name: String,
    /// Also make a subnet of the same name with this address range, for example 10.90.0.0/24.
    #[arg(long, value_name = "RANGE")]
    pub cidr: Option<String>,
    /// MTU in bytes.
    #[arg(long, value_name = "BYTES", default_value_t = 1500)]
    pub mtu: u16,
    /// Guests do not reach the outside.
    #[arg(long)]
    pub no_nat: bool,
    /// DNS server for names outside; the node's own when absent.
    #[arg(long = "dns", value_name = "ADDR")]
    pub dns: Vec<IpAddr>,
    /// Labels.
    #[command(flatten)]
    pub labels: NewLabels,
}

/// `subnet ...`
#[derive(Clone, Debug, clap::Subcommand)]
pub enum SubnetCommand {
    /// Make a subnet.
    Create(SubnetCreateArgs),
    /// List subnets.
    #[command(visible_alias = "ls")]
    List(LabelArgs),
    /// Delete subnets.
    Delete(NamesArgs),
}

/// Flags of `subnet create`.
#[derive(Clone, Debug, clap::Args)]
pub struct SubnetCreateArgs {
    /// Name.
    pub name: String,
    /// Network it belongs to.
    #[arg(long, value_name = "NAME")]
    pub network: String,
    /// Address range, for example 10.90.0.0/24.
    #[arg(long, value_name = "RANGE")]
    pub cidr: String,
    /// Gateway; the first address when absent.
    #[arg(long, value_name = "ADDR")]
    pub gateway: Option<IpAddr>,
    /// First and last address that is given out by itself; all when absent.
    #[arg(long, value_name = "FIRST-LAST")]
    pub pool: Option<String>,
    /// DHCP lease.
    #[arg(long, value_name = "TIME")]
    pub lease: Option<Span>,
    /// Labels.
    #[command(flatten)]
    pub labels: NewLabels,
}

/// `security-group ...`
#[derive(Clone, Debug, clap::Subcommand)]
pub enum SecurityGroupCommand {
    /// Make a security group that lets everything out and nothing in.
    Create(SecurityGroupCreateArgs),
    /// List security groups.
    #[command(visible_alias = "ls")]
    List(LabelArgs),
    /// Delete security groups.
    Delete(NamesArgs),
    /// Rules of a security group.
    #[command(subcommand)]
    Rule(RuleCommand),
}

/// Flags of `security-group create`.
#[derive(Clone, Debug, clap::Args)]
pub struct SecurityGroupCreateArgs {
    /// Name.
    pub name: String,
    /// Labels.
    #[command(flatten)]
    pub labels: NewLabels,
}

/// `security-group rule ...`
#[derive(Clone, Debug, clap::Subcommand)]
pub enum RuleCommand {
    /// Allow something.
    Add(RuleAddArgs),
    /// List what is allowed, numbered.
    #[command(visible_alias = "ls")]
    List {
        /// Security group.
        group: String,
    },
    /// Take a rule away.
    Remove {
        /// Security group.
        group: String,
        /// Its number in the list.
        number: usize,
    },
}

/// Flags of `security-group rule add`.
#[derive(Clone, Debug, clap::Args)]
pub struct RuleAddArgs {
    /// Security group.
    pub group: String,
    /// Which way.
    #[arg(long, value_enum, default_value = "ingress")]
    pub direction: DirectionWord,
    /// Protocol; any when absent.
    #[arg(long, value_enum)]
    pub protocol: Option<ProtocolWord>,
    /// Port or range of ports, for example 80 or 8000-8100; all when absent.
    #[arg(long, value_name = "PORT[-PORT]", requires = "protocol")]
    pub port: Option<String>,
    /// Only from (or to) this address range.
    #[arg(long, value_name = "RANGE", conflicts_with = "group_ref")]
    pub cidr: Option<String>,
    /// Only from (or to) instances with this security group.
    #[arg(long = "from-group", value_name = "NAME")]
    pub group_ref: Option<String>,
}

/// `key ...`
#[derive(Clone, Debug, clap::Subcommand)]
pub enum KeyCommand {
    /// Register a public ssh key.
    Create(KeyCreateArgs),
    /// List keys.
    #[command(visible_alias = "ls")]
    List(LabelArgs),
    /// Delete keys. Instances that have them keep them.
    Delete(NamesArgs),
}

/// Flags of `key create`.
#[derive(Clone, Debug, clap::Args)]
pub struct KeyCreateArgs {
    /// File with the public key; - reads standard input.
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
    /// Name; made from the file's name and the key's fingerprint when absent.
    #[arg(long, value_name = "NAME")]
    pub name: Option<String>,
    /// Labels.
    #[command(flatten)]
    pub labels: NewLabels,
}

/// `flavor ...`
#[derive(Clone, Debug, clap::Subcommand)]
pub enum FlavorCommand {
    /// Make a flavor.
    Create(FlavorCreateArgs),
    /// List flavors.
    #[command(visible_alias = "ls")]
    List(LabelArgs),
    /// Delete flavors.
    Delete(NamesArgs),
}

/// Flags of `flavor create`.
#[derive(Clone, Debug, clap::Args)]
pub struct FlavorCreateArgs {
    /// Name.
    pub name: String,
    /// vCPUs, for example 2 or 0.5.
    #[arg(long, value_name = "N")]
    pub vcpus: Cpus,
    /// Memory, for example 2GiB.
    #[arg(long, value_name = "SIZE")]
    pub memory: Size,
    /// Root disk, for example 10GiB.
    #[arg(long, value_name = "SIZE")]
    pub disk: Size,
    /// Price of an hour in millionths of the cloud's currency.
    #[arg(long, value_name = "MILLIONTHS", default_value_t = 0)]
    pub price_per_hour: u64,
    /// Labels.
    #[command(flatten)]
    pub labels: NewLabels,
}
