//! Typed ids: a volume id cannot be passed where an instance id is wanted.

use std::fmt;
use std::str::FromStr;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

macro_rules! ids {
    ($($(#[$doc:meta])* $name:ident;)*) => {$(
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
        #[serde(transparent)]
        pub struct $name(pub Uuid);

        impl $name {
            /// See [`short`]: short enough for names of kernel devices.
            #[must_use]
            pub fn short(&self) -> String {
                short(&self.0)
            }
        }
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result { self.0.fmt(f) }
        }
        impl FromStr for $name {
            type Err = uuid::Error;
            fn from_str(text: &str) -> Result<Self, Self::Err> { Ok(Self(text.parse()?)) }
        }
        impl From<Uuid> for $name {
            fn from(id: Uuid) -> Self { Self(id) }
        }
        impl From<$name> for Uuid {
            fn from(id: $name) -> Self { id.0 }
        }
    )*};
}

ids! {
    /// Id of a project.
    ProjectId;
    /// Id of a user.
    UserId;
    /// Id of an API token.
    TokenId;
    /// Id of an ssh key.
    KeyId;
    /// Id of a flavor.
    FlavorId;
    /// Id of an image.
    ImageId;
    /// Id of an instance.
    InstanceId;
    /// Id of a network.
    NetworkId;
    /// Id of a subnet.
    SubnetId;
    /// Id of a port.
    PortId;
    /// Id of a security group.
    SecurityGroupId;
    /// Id of a volume.
    VolumeId;
    /// Id of a snapshot.
    SnapshotId;
    /// Id of a node.
    NodeId;
    /// Id of a join token.
    JoinTokenId;
    /// Id of an event.
    EventId;
    /// Id of a server of the control plane.
    ServerId;
}

/// The last ten hexadecimal digits of a UUID. The head of a version 7 UUID is time, so only the tail tells ids of one
/// moment apart; ten digits (40 bits) leave room for a prefix within the 15 characters of a Linux interface name.
#[must_use]
pub fn short(id: &Uuid) -> String {
    let text = id.simple().to_string();
    text[22..].to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_fits_an_interface_name() {
        let id = InstanceId::from_str("0190a1b2-c3d4-7e5f-8a9b-0c1d2e3f4a5b").unwrap();
        assert_eq!(id.short(), "1d2e3f4a5b");
        assert_eq!(id.short().len(), 10);
    }
}
