//! Values of flags that are more than one word.

use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;

use oblak_model::{
    Direction, ImageFirmware, Isolation, NetworkAttachment, Publish, RestartPolicy, Role, RuleProtocol, Transport,
    VolumeAttachment, VolumeFormat,
};

/// Gives a type of the model the words of the command line.
macro_rules! words {
    ($(#[$doc:meta])* $name:ident => $model:ty { $($(#[$vdoc:meta])* $variant:ident => $to:ident),* $(,)? }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
        pub enum $name { $($(#[$vdoc])* $variant),* }
        impl From<$name> for $model {
            fn from(word: $name) -> Self { match word { $($name::$variant => Self::$to),* } }
        }
    };
}

words! {
    /// How an instance is separated from the others.
    IsolationWord => Isolation {
        /// Namespaces and cgroups of the host's kernel.
        Container => Container,
        /// A small virtual machine.
        Microvm => Microvm,
        /// A full virtual machine.
        Vm => Vm,
        /// A whole machine.
        Metal => Metal,
    }
}
words! {
    /// What to do when a guest ends by itself.
    RestartWord => RestartPolicy {
        /// Start it again, with growing pauses.
        Always => Always,
        /// Start it again unless it ended well.
        OnFailure => OnFailure,
        /// Leave it stopped.
        Never => Never,
    }
}
words! {
    /// How a disk image is booted.
    FirmwareWord => ImageFirmware {
        /// SeaBIOS.
        Bios => Bios,
        /// OVMF.
        Uefi => Uefi,
    }
}
words! {
    /// How the bytes of a volume are kept.
    FormatWord => VolumeFormat {
        /// A block device in a qcow2 file.
        Qcow2 => Qcow2,
        /// A block device in a plain file.
        Raw => Raw,
        /// A directory, for containers.
        Directory => Directory,
    }
}
words! {
    /// Role in a project.
    RoleWord => Role {
        /// Sees everything, secrets excepted.
        Reader => Reader,
        /// Creates, changes, uses and deletes resources.
        Member => Member,
        /// Also grants roles.
        Admin => Admin,
    }
}
words! {
    /// Which way a rule allows.
    DirectionWord => Direction {
        /// Into the instance.
        Ingress => Ingress,
        /// Out of the instance.
        Egress => Egress,
    }
}
words! {
    /// Protocol of a rule.
    ProtocolWord => RuleProtocol {
        /// TCP.
        Tcp => Tcp,
        /// UDP.
        Udp => Udp,
        /// ICMP and ICMPv6.
        Icmp => Icmp,
    }
}

/// Whose user ids a container runs with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum UsernsWord {
    /// Ids of its own: root inside is nobody outside.
    Private,
    /// The host's ids.
    Host,
}

/// For flags of other tools: sizes come as flavors here.
pub fn no_size(_: &str) -> Result<std::convert::Infallible, String> {
    Err("sizes come as flavors: write for example `--flavor m`; `oblak flavor list` shows them, `oblak flavor create` makes one".into())
}

/// Reads `NAME=VALUE`.
///
/// # Errors
/// What would be valid.
pub fn pair(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, value)) if !name.is_empty() => Ok((name.into(), value.into())),
        _ => Err("write it as NAME=VALUE".into()),
    }
}

/// Reads the name of a group.
///
/// # Errors
/// What is wrong with it.
pub fn group(text: &str) -> Result<String, String> {
    oblak_model::name::problem(text).map_or_else(|| Ok(text.to_string()), Err)
}

/// Reads `[ADDRESS:]HOST_PORT:PORT[/tcp|/udp]`.
///
/// # Errors
/// What would be valid.
pub fn publish(text: &str) -> Result<Publish, String> {
    let help = "write it as HOST_PORT:PORT, for example 8080:80, 53:53/udp or 127.0.0.1:8080:80";
    let (ports, protocol) = match text.rsplit_once('/') {
        None => (text, Transport::Tcp),
        Some((ports, "tcp")) => (ports, Transport::Tcp),
        Some((ports, "udp")) => (ports, Transport::Udp),
        Some((_, other)) => return Err(format!("{other:?} is not a protocol that can be published; use tcp or udp")),
    };
    let (head, port) = ports.rsplit_once(':').ok_or(help)?;
    let (host_address, host_port) = match head.rsplit_once(':') {
        None => (None, head),
        Some((address, host_port)) => (Some(plain_address(address).ok_or(help)?), host_port),
    };
    let number = |text: &str| match text.parse::<u16>() {
        Ok(0) | Err(_) => Err(format!("{text:?} is not a port (1 to 65535); {help}")),
        Ok(n) => Ok(n),
    };
    Ok(Publish { host_port: number(host_port)?, port: number(port)?, protocol, host_address })
}

fn plain_address(text: &str) -> Option<IpAddr> {
    text.strip_prefix('[').and_then(|t| t.strip_suffix(']')).unwrap_or(text).parse().ok()
}

/// Reads `NETWORK[:ADDRESS]`.
///
/// # Errors
/// What would be valid.
pub fn network(text: &str) -> Result<NetworkAttachment, String> {
    let (name, address) = match text.split_once(':') {
        None => (text, None),
        Some((name, address)) => {
            let bad = || format!("{address:?} is not an address; write NETWORK or NETWORK:10.80.0.7");
            (name, Some(plain_address(address).ok_or_else(bad)?))
        }
    };
    Ok(NetworkAttachment { network: name.into(), address, security_groups: Vec::new() })
}

/// Reads `VOLUME[:MOUNT][:ro]`.
///
/// # Errors
/// What would be valid.
pub fn volume(text: &str) -> Result<VolumeAttachment, String> {
    let (text, read_only) = text.strip_suffix(":ro").map_or((text, false), |rest| (rest, true));
    let (name, mount) = text.split_once(':').map_or((text, None), |(n, m)| (n, Some(m)));
    if name.is_empty() || mount.is_some_and(|m| !m.starts_with('/')) {
        return Err("write it as VOLUME, VOLUME:/mount or VOLUME:/mount:ro".into());
    }
    Ok(VolumeAttachment { volume: name.into(), read_only, mount: mount.map(Into::into) })
}

/// Where to listen: an address with a port, or a port of 127.0.0.1.
///
/// # Errors
/// What would be valid.
pub fn listen(text: &str) -> Result<SocketAddr, String> {
    if let Ok(port) = text.parse::<u16>() {
        return Ok(([127, 0, 0, 1], port).into());
    }
    SocketAddr::from_str(text).map_err(|_| "write it as 127.0.0.1:8080, [::1]:8080 or 8080".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn publishing() {
        let plain = publish("8080:80").unwrap();
        assert_eq!((plain.host_port, plain.port, plain.protocol, plain.host_address), (8080, 80, Transport::Tcp, None));
        assert_eq!(publish("53:5353/udp").unwrap().protocol, Transport::Udp);
        assert_eq!(publish("127.0.0.1:8080:80").unwrap().host_address, Some("127.0.0.1".parse().unwrap()));
        let six = publish("[::1]:8080:80/tcp").unwrap();
        assert_eq!((six.host_address, six.host_port), (Some("::1".parse().unwrap()), 8080));
        for bad in ["80", "0:80", "80:0", "x:80", "80:70000", "1:2/icmp", "nowhere:1:2", ""] {
            assert!(publish(bad).is_err(), "{bad}");
        }
        assert_eq!(
            publish("80").unwrap_err(),
            "write it as HOST_PORT:PORT, for example 8080:80, 53:53/udp or 127.0.0.1:8080:80"
        );
    }

    #[test]
    fn networks_and_volumes() {
        assert_eq!(network("blue").unwrap().address, None);
        assert_eq!(network("blue:10.0.0.7").unwrap().address, Some("10.0.0.7".parse().unwrap()));
        assert_eq!(network("blue:fd00::7").unwrap().address, Some("fd00::7".parse().unwrap()));
        assert!(network("blue:x").is_err());
        let v = volume("data:/srv/data:ro").unwrap();
        assert_eq!((v.volume.as_str(), v.mount.as_deref(), v.read_only), ("data", Some("/srv/data"), true));
        assert_eq!(volume("data").unwrap().mount, None);
        assert!(volume("data").is_ok() && volume("data:srv").is_err() && volume(":/srv").is_err());
    }

    #[test]
    fn pairs_and_listening() {
        assert_eq!(pair("A=b=c").unwrap(), ("A".into(), "b=c".into()));
        assert!(pair("A").is_err() && pair("=b").is_err());
        assert_eq!(listen("8080").unwrap().to_string(), "127.0.0.1:8080");
        assert_eq!(listen("[::1]:1").unwrap().to_string(), "[::1]:1");
        assert!(listen("host").is_err());
    }
}
