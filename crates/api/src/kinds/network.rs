//! Networks, subnets, ports and security groups.

use std::collections::BTreeSet;

use oblak_identity::Principal;
use oblak_model::{
    ApiError, Code, DEFAULT_SECURITY_GROUP, Network, NetworkId, NetworkKind, Port, PortKind, SecurityGroup,
    SecurityGroupId, SecurityGroupKind, Subnet, SubnetId, SubnetKind,
};

use oblak_store::{Guard, objects};

use super::{Access, Resource, in_use, not_creatable};
use crate::draft::Draft;

/// Subnets that go together with their network in one commit: each is a guard and two writes.
const SUBNETS_WITH_NETWORK: usize = 30;
/// Instances that a refusal names.
const NAMED_USERS: usize = 5;

impl Resource for NetworkKind {
    const ACCESS: Access = Access::InProject;
    const NAMED_BY_OTHERS: bool = true;

    fn create(
        draft: &mut Draft,
        _: &Principal,
        network: &mut Network,
        _: Option<&str>,
    ) -> Result<Option<String>, ApiError> {
        take_vni(draft, network)?;
        Ok(None)
    }

    fn may_delete(draft: &Draft, network: &Network) -> Result<(), ApiError> {
        let id = NetworkId(network.metadata.id);
        unused(draft, network.scope_key(), &network.describe(), |port| port.status.network == id)?;
        let subnets = own_subnets(draft, network)?.len();
        if subnets > SUBNETS_WITH_NETWORK {
            let text = format!("{subnets} subnets; delete all but {SUBNETS_WITH_NETWORK} of them first");
            return Err(in_use(&network.describe(), &text));
        }
        Ok(())
    }

    /// Nothing else can use its subnets, so they go with it. New ones cannot appear: creating one needs a network that stays.
    fn remove(draft: &mut Draft, network: &Network) -> Result<(), ApiError> {
        for subnet in own_subnets(draft, network)? {
            draft.remove(&subnet);
        }
        if let Some(vni) = network.status.vni {
            draft.delete(objects::vni_key(vni));
        }
        draft.remove(network);
        Ok(())
    }
}

fn own_subnets(draft: &Draft, network: &Network) -> Result<Vec<Subnet>, ApiError> {
    let id = NetworkId(network.metadata.id);
    let mut subnets = draft.list::<SubnetKind>(Some(network.scope_key()))?;
    subnets.retain(|subnet| subnet.status.network == id);
    Ok(subnets)
}

/// Refuses while instances have ports of which this is true, and names the instances.
fn unused(draft: &Draft, scope: &str, what: &str, uses: impl Fn(&Port) -> bool) -> Result<(), ApiError> {
    let ports = draft.list::<PortKind>(Some(scope))?;
    let names: BTreeSet<&str> = ports.iter().filter(|port| uses(port)).map(|p| p.status.hostname.as_str()).collect();
    if names.is_empty() {
        return Ok(());
    }
    let mut text: Vec<String> = names.iter().take(NAMED_USERS).map(|name| format!("instance/{name}")).collect();
    if names.len() > NAMED_USERS {
        text.push(format!("{} more", names.len() - NAMED_USERS));
    }
    Err(in_use(what, &text.join(", ")))
}

/// Gives the network its number between nodes.
pub(super) fn take_vni(draft: &mut Draft, network: &mut Network) -> Result<(), ApiError> {
    for vni in objects::vni_candidates(network.metadata.id) {
        let key = objects::vni_key(vni);
        if draft.raw(&key).is_none() && draft.claim(&key) {
            draft.batch.guard(Guard::Absent(key.clone()));
            draft.put(key, &network.metadata.id);
            network.status.vni = Some(vni);
            return Ok(());
        }
    }
    Err(ApiError::new(Code::Conflict, "no number between nodes is free for the network; try again"))
}

impl Resource for SubnetKind {
    const ACCESS: Access = Access::InProject;
    const NAMED_BY_OTHERS: bool = true;

    fn create(
        draft: &mut Draft,
        _: &Principal,
        subnet: &mut Subnet,
        _: Option<&str>,
    ) -> Result<Option<String>, ApiError> {
        let scope = subnet.scope_key().to_string();
        let network = draft.need::<NetworkKind>(&scope, &subnet.spec.network, "/spec/network")?;
        let id = NetworkId(network.metadata.id);
        subnet.spec.network.clone_from(&network.metadata.name);
        for other in draft.list::<SubnetKind>(Some(&scope))?.iter().filter(|other| other.status.network == id) {
            let (a, b) = (subnet.spec.cidr, other.spec.cidr);
            if a.contains(&b) || b.contains(&a) {
                return Err(ApiError::invalid(
                    "/spec/cidr",
                    format!("overlaps {b} of {} in the same network", other.describe()),
                ));
            }
        }
        // Two subnets at once would each not see the other: the network is written, so that one of them has to look again.
        draft.update(&network);
        subnet.status.network = id;
        Ok(None)
    }

    fn may_delete(draft: &Draft, subnet: &Subnet) -> Result<(), ApiError> {
        let id = SubnetId(subnet.metadata.id);
        unused(draft, subnet.scope_key(), &subnet.describe(), |port| port.status.subnets.contains(&id))
    }
}

impl Resource for PortKind {
    const ACCESS: Access = Access::InProject;

    fn create(_: &mut Draft, _: &Principal, _: &mut Port, _: Option<&str>) -> Result<Option<String>, ApiError> {
        Err(not_creatable("port", "they come with the interfaces of an instance"))
    }

    fn update(draft: &mut Draft, _: &Principal, _: &Port, new: &mut Port, _: Option<&str>) -> Result<(), ApiError> {
        if new.spec.security_groups.is_empty() {
            new.spec.security_groups = vec![DEFAULT_SECURITY_GROUP.into()];
        }
        new.status.security_groups =
            groups(draft, new.scope_key(), &new.spec.security_groups, "/spec/security_groups")?;
        Ok(())
    }

    fn may_delete(_: &Draft, port: &Port) -> Result<(), ApiError> {
        Err(in_use(&port.describe(), &format!("instance/{}; it goes with the instance", port.status.hostname)))
    }
}

/// The security groups behind names.
pub(super) fn groups(
    draft: &mut Draft,
    scope: &str,
    names: &[String],
    field: &str,
) -> Result<Vec<SecurityGroupId>, ApiError> {
    let mut ids = Vec::with_capacity(names.len());
    for (i, name) in names.iter().enumerate() {
        let group = draft.need::<SecurityGroupKind>(scope, name, &format!("{field}/{i}"))?;
        ids.push(SecurityGroupId(group.metadata.id));
    }
    Ok(ids)
}

impl Resource for SecurityGroupKind {
    const ACCESS: Access = Access::InProject;
    const NAMED_BY_OTHERS: bool = true;

    fn create(
        draft: &mut Draft,
        _: &Principal,
        group: &mut SecurityGroup,
        _: Option<&str>,
    ) -> Result<Option<String>, ApiError> {
        check_peers(draft, group)?;
        Ok(None)
    }

    fn update(
        draft: &mut Draft,
        _: &Principal,
        _: &SecurityGroup,
        new: &mut SecurityGroup,
        _: Option<&str>,
    ) -> Result<(), ApiError> {
        check_peers(draft, new)
    }

    fn may_delete(draft: &Draft, group: &SecurityGroup) -> Result<(), ApiError> {
        let (name, id) = (&group.metadata.name, SecurityGroupId(group.metadata.id));
        if name == DEFAULT_SECURITY_GROUP {
            return Err(ApiError::new(Code::WrongState, "the security group \"default\" goes with its project"));
        }
        let scope = group.scope_key();
        unused(draft, scope, &group.describe(), |port| port.status.security_groups.contains(&id))?;
        let others = draft.list::<SecurityGroupKind>(Some(group.scope_key()))?;
        let names_it = |other: &&SecurityGroup| {
            other.metadata.id != group.metadata.id && other.spec.rules.iter().any(|r| r.group.as_deref() == Some(name))
        };
        match others.iter().find(names_it) {
            Some(other) => Err(in_use(&group.describe(), &format!("a rule of {}", other.describe()))),
            None => Ok(()),
        }
    }
}

/// Groups that rules name must exist; a group may name itself.
fn check_peers(draft: &mut Draft, group: &SecurityGroup) -> Result<(), ApiError> {
    for (i, rule) in group.spec.rules.iter().enumerate() {
        if let Some(name) = rule.group.as_ref().filter(|name| **name != group.metadata.name) {
            draft.need::<SecurityGroupKind>(group.scope_key(), name, &format!("/spec/rules/{i}/group"))?;
        }
    }
    Ok(())
}
