//! Identifiers: 128 bits, printed as UUIDs because that is what the resource model stores.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// The text is not a UUID.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not an id: expected 32 hexadecimal digits, with or without hyphens")]
pub struct ParseIdError(String);

fn write_uuid(value: u128, f: &mut fmt::Formatter<'_>) -> fmt::Result {
    let b = |shift: u32, mask: u128| (value >> shift) & mask;
    write!(
        f,
        "{:08x}-{:04x}-{:04x}-{:04x}-{:012x}",
        b(96, 0xffff_ffff),
        b(80, 0xffff),
        b(64, 0xffff),
        b(48, 0xffff),
        b(0, 0xffff_ffff_ffff)
    )
}

fn read_uuid(text: &str) -> Result<u128, ParseIdError> {
    let digits: String = text.chars().filter(|c| *c != '-').collect();
    if digits.len() != 32 || !digits.bytes().all(|b| b.is_ascii_hexdigit()) {
        return Err(ParseIdError(text.chars().take(64).collect()));
    }
    u128::from_str_radix(&digits, 16).map_err(|_| ParseIdError(text.to_owned()))
}

macro_rules! id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub u128);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write_uuid(self.0, f)
            }
        }

        impl FromStr for $name {
            type Err = ParseIdError;
            fn from_str(text: &str) -> Result<Self, ParseIdError> {
                read_uuid(text).map(Self)
            }
        }

        impl From<u128> for $name {
            fn from(value: u128) -> Self {
                Self(value)
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
                s.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
                let text = String::deserialize(d)?;
                text.parse().map_err(serde::de::Error::custom)
            }
        }
    };
}

id!(
    /// A node. Ties between equal scores go to the smallest.
    NodeId
);
id!(
    /// An instance.
    InstanceId
);
id!(
    /// A project; affinity selectors see the instances of their own project only.
    ProjectId
);
id!(
    /// A volume that exists on particular nodes.
    VolumeId
);
id!(
    /// An image that a node may have in its cache.
    ImageId
);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prints_and_reads_uuids() {
        let id = NodeId(0x0192_3e4f_5a6b_7c8d_9e0f_1a2b_3c4d_5e6f);
        assert_eq!(id.to_string(), "01923e4f-5a6b-7c8d-9e0f-1a2b3c4d5e6f");
        assert_eq!(id.to_string().parse::<NodeId>().unwrap(), id);
        assert_eq!("01923e4f5a6b7c8d9e0f1a2b3c4d5e6f".parse::<NodeId>().unwrap(), id);
        assert!("n1".parse::<NodeId>().is_err());
        assert!("+1923e4f5a6b7c8d9e0f1a2b3c4d5e6f".parse::<NodeId>().is_err());
    }
}
