//! The end of an instance: everything that was taken for it is given back in the commit that removes it.

use oblak_model::{Instance, InstanceId, Port, Revision, Volume, VolumePhase};
use oblak_store::objects::{self, Allocation};

use super::assign::{host_port_key, sub, write_allocation};
use super::batch::Ops;

/// An instance with what belongs to it, all as read from one view of the store.
#[derive(Clone, Copy, Debug)]
pub struct InstanceParts<'a> {
    /// The instance.
    pub instance: &'a Instance,
    /// Its ports.
    pub ports: &'a [Port],
    /// Volumes that say they are attached to it; others are left alone.
    pub volumes: &'a [Volume],
    /// What is reserved on its node, with the revision it was read at.
    pub allocation: Option<(Allocation, Revision)>,
}

/// Removes an instance for good: object, name, ports with their names and addresses, reservation, host ports; detaches its volumes.
///
/// Ports and keys that only this instance owns carry no guard of their own: the guard on the instance is enough, because nobody else
/// writes them. Stays below the limit of a commit for every instance that the API accepts.
#[must_use]
pub fn finalize_instance(parts: &InstanceParts<'_>) -> Ops {
    let instance = parts.instance;
    let mut ops = Ops::new();
    ops.remove(instance);
    for port in parts.ports {
        ops.delete(objects::key_of(port));
        ops.delete(objects::name_key::<oblak_model::PortKind>(port.scope_key(), &port.metadata.name));
        for (subnet, address) in port.status.subnets.iter().zip(&port.status.addresses) {
            ops.delete(objects::address_key(*subnet, *address));
        }
    }
    if let Some(placement) = &instance.status.placement {
        if let Some((reserved, revision)) = parts.allocation {
            let after = Allocation {
                resources: sub(reserved.resources, placement.resources),
                instances: reserved.instances.saturating_sub(1),
            };
            write_allocation(&mut ops, placement.node, Some(revision), after);
        }
        for publish in &instance.spec.publish {
            ops.delete(host_port_key(placement.node, publish));
        }
    }
    let id = InstanceId(instance.metadata.id);
    for volume in parts.volumes.iter().filter(|volume| volume.status.attached_to == Some(id)) {
        let mut volume = volume.clone();
        release_volume(&mut volume);
        ops.update(&volume);
    }
    ops
}

/// A volume is no longer attached to anything.
pub fn release_volume(volume: &mut Volume) {
    volume.status.attached_to = None;
    if volume.status.phase == VolumePhase::InUse {
        volume.status.phase = VolumePhase::Available;
        volume.status.reason.clear();
        volume.status.message.clear();
    }
}
