//! Interfaces of an instance: a port each, with MAC address and addresses that are taken in the same commit.

use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use oblak_model::{
    ApiError, Code, DEFAULT_SECURITY_GROUP, Instance, InstanceAddress, InstanceId, Network, NetworkAttachment,
    NetworkId, NetworkKind, Port, PortId, PortSpec, Subnet, SubnetId, SubnetKind,
};
use oblak_store::objects;
use oblak_store::{Guard, Key};

use super::network::{groups, take_vni};
use crate::draft::Draft;

/// Addresses looked at in one subnet before it counts as full, beyond those known to be taken.
const TRIES: u32 = 70_000;

/// Makes the ports of a new instance and fills in its addresses.
pub(super) fn create_ports(draft: &mut Draft, instance: &mut Instance) -> Result<(), ApiError> {
    for (index, interface) in instance.spec.interfaces().iter().enumerate() {
        let field = format!("/spec/networks/{index}");
        let port = create_port(draft, instance, index, interface, &field)?;
        instance.status.resolved.ports.push(PortId(port.metadata.id));
        for address in &port.status.addresses {
            instance.status.addresses.push(InstanceAddress {
                network: port.spec.network.clone(),
                address: *address,
                mac: port.status.mac.clone(),
            });
        }
    }
    Ok(())
}

fn create_port(
    draft: &mut Draft,
    instance: &Instance,
    index: usize,
    interface: &NetworkAttachment,
    field: &str,
) -> Result<Port, ApiError> {
    let scope = instance.scope_key().to_string();
    let mut network = draft.need::<NetworkKind>(&scope, &interface.network, &format!("{field}/network"))?;
    if network.status.vni.is_none() {
        // Made by an older server: it needs its number before it can be on two nodes.
        let mut numbered = Network::clone(&network);
        take_vni(draft, &mut numbered)?;
        draft.update(&numbered);
        network = Arc::new(numbered);
    }
    let id = NetworkId(network.metadata.id);
    let mut names = interface.security_groups.clone();
    if names.is_empty() {
        names.push(DEFAULT_SECURITY_GROUP.into());
    }
    let security_groups = groups(draft, &scope, &names, &format!("{field}/security_groups"))?;
    let spec = PortSpec {
        network: network.metadata.name.clone(),
        instance: InstanceId(instance.metadata.id),
        index: u32::try_from(index).unwrap_or(u32::MAX),
        security_groups: names,
    };
    let mut port = Port::new(&format!("{}-{index}", instance.metadata.name), spec);
    draft.stamp(&mut port, Some(&scope));
    port.status.network = id;
    port.status.mac = mac(draft);
    port.status.hostname.clone_from(&instance.metadata.name);
    port.status.security_groups = security_groups;
    let mut subnets = draft.list_shared::<SubnetKind>(Some(&scope))?;
    subnets.retain(|subnet| subnet.status.network == id && !subnet.metadata.is_deleting());
    take_addresses(draft, &mut port, &network.metadata.name, &subnets, interface.address, field)?;
    draft.create(&port)?;
    Ok(port)
}

/// One address of each family that the network has; exactly the wanted one in its family.
fn take_addresses(
    draft: &mut Draft,
    port: &mut Port,
    network: &str,
    subnets: &[Arc<Subnet>],
    wanted: Option<IpAddr>,
    field: &str,
) -> Result<(), ApiError> {
    if subnets.is_empty() {
        return Err(ApiError::invalid(
            &format!("{field}/network"),
            format!("network {network:?} has no subnet; create one first"),
        ));
    }
    if let Some(address) = wanted {
        let Some(subnet) = subnets.iter().find(|s| s.spec.is_assignable(address)) else {
            return Err(ApiError::invalid(
                &format!("{field}/address"),
                format!("no subnet of network {network:?} can give it"),
            ));
        };
        if !take(draft, port, subnet, address) {
            return Err(ApiError::new(Code::Conflict, format!("address {address} is taken; choose another or none"))
                .at(&format!("{field}/address")));
        }
    }
    for v4 in [true, false] {
        let of_family: Vec<_> = subnets.iter().filter(|s| matches!(s.spec.cidr, IpNet::V4(_)) == v4).collect();
        if of_family.is_empty() || port.status.addresses.iter().any(|a| a.is_ipv4() == v4) {
            continue;
        }
        if !of_family.iter().any(|subnet| take_next(draft, port, subnet)) {
            let names: Vec<_> = of_family.iter().map(|s| format!("{} ({})", s.metadata.name, s.spec.cidr)).collect();
            return Err(ApiError::new(
                Code::AddressesExhausted,
                format!("no address is left in {}; add a subnet to network {network:?}", names.join(", ")),
            )
            .at(field));
        }
    }
    Ok(())
}

fn take_next(draft: &mut Draft, port: &mut Port, subnet: &Subnet) -> bool {
    let id = SubnetId(subnet.metadata.id);
    let (first, last) = subnet.spec.pool_range();
    let after = draft.app.lock_claims().last.get(&id).copied();
    // Going on after the last one gives addresses that became free the longest time to be forgotten by others.
    let start = after.and_then(next).filter(|a| *a >= first && *a <= last).unwrap_or(first);
    let mut address = start;
    for _ in 0..TRIES {
        if subnet.spec.is_assignable(address) && take(draft, port, subnet, address) {
            draft.app.lock_claims().last.insert(id, address);
            return true;
        }
        address = next(address).filter(|a| *a <= last).unwrap_or(first);
        if address == start {
            return false;
        }
    }
    false
}

fn take(draft: &mut Draft, port: &mut Port, subnet: &Subnet, address: IpAddr) -> bool {
    let id = SubnetId(subnet.metadata.id);
    let key: Key = objects::address_key(id, address);
    if draft.raw(&key).is_some() || !draft.claim(&key) {
        return false;
    }
    draft.depend(subnet);
    draft.batch.guard(Guard::Absent(key.clone()));
    draft.put(key, &port.metadata.id);
    port.status.subnets.push(id);
    port.status.addresses.push(address);
    true
}

fn next(address: IpAddr) -> Option<IpAddr> {
    match address {
        IpAddr::V4(a) => u32::from(a).checked_add(1).map(|n| IpAddr::V4(n.into())),
        IpAddr::V6(a) => u128::from(a).checked_add(1).map(|n| IpAddr::V6(n.into())),
    }
}

/// Locally administered unicast: `02` in front (IEEE 802-2014, 8.2), five random bytes behind.
fn mac(draft: &Draft) -> String {
    let mut bytes = [0u8; 5];
    draft.app.random.fill(&mut bytes);
    let tail: String = bytes.iter().map(|b| format!(":{b:02x}")).collect();
    format!("02{tail}")
}
