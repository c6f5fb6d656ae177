//! Projects, and what every project has from the start.

use oblak_identity::{Action, Principal, Target, authorize};
use oblak_model::{
    ApiError, Code, DEFAULT_NETWORK, DEFAULT_ORGANIZATION, DEFAULT_PROJECT, DEFAULT_SECURITY_GROUP, Direction,
    EventKind, ImageKind, InstanceKind, KeyKind, Network, NetworkId, NetworkKind, NetworkSpec, PortKind, Project,
    ProjectKind, SecurityGroup, SecurityGroupKind, SecurityGroupSpec, SecurityRule, SnapshotKind, Subnet, SubnetKind,
    SubnetSpec, UserKind, VolumeKind,
};
use oblak_store::objects;
use uuid::Uuid;

use super::{Access, Resource, in_use};
use crate::draft::Draft;

/// Address range of the default subnet of every project; networks of different projects never meet.
const DEFAULT_CIDR: &str = "10.80.0.0/24";
/// Grants that one change may add: each is a guard on its user.
const NEW_GRANTS: usize = 40;
/// Events removed in the commit that removes a project; the rest follows through garbage collection.
const EVENTS_WITH_PROJECT: usize = 60;

impl Resource for ProjectKind {
    const ACCESS: Access = Access::Project;
    const NAMED_BY_OTHERS: bool = true;

    fn create(
        draft: &mut Draft,
        _: &Principal,
        project: &mut Project,
        _: Option<&str>,
    ) -> Result<Option<String>, ApiError> {
        organization(project)?;
        check_grants(draft, None, project)?;
        seed_project(draft, &project.metadata.name.clone())?;
        Ok(None)
    }

    fn update(
        draft: &mut Draft,
        by: &Principal,
        old: &Project,
        new: &mut Project,
        _: Option<&str>,
    ) -> Result<(), ApiError> {
        organization(new)?;
        if old.spec.grants != new.spec.grants {
            let grants = Some(old.spec.grants.as_slice());
            authorize(by, Action::Administer, &Target::Project { project: &old.metadata.name, grants })?;
        }
        check_grants(draft, Some(old), new)
    }

    fn may_delete(draft: &Draft, project: &Project) -> Result<(), ApiError> {
        let name = project.metadata.name.as_str();
        if name == DEFAULT_PROJECT {
            return Err(ApiError::new(Code::WrongState, "the project \"default\" stays"));
        }
        let user = |what: String| Err(in_use(&project.describe(), &what));
        macro_rules! empty {
            ($($kind:ty),*) => {$(
                if let Some(object) = draft.list::<$kind>(Some(name))?.into_iter().find(|o| !is_default(&o.metadata.name, <$kind as oblak_model::Kind>::KIND)) {
                    return user(object.describe());
                }
            )*};
        }
        empty!(
            InstanceKind,
            VolumeKind,
            SnapshotKind,
            ImageKind,
            KeyKind,
            PortKind,
            NetworkKind,
            SubnetKind,
            SecurityGroupKind
        );
        Ok(())
    }

    fn remove(draft: &mut Draft, project: &Project) -> Result<(), ApiError> {
        let name = project.metadata.name.as_str();
        for subnet in draft.list::<SubnetKind>(Some(name))? {
            draft.remove(&subnet);
        }
        for network in draft.list::<NetworkKind>(Some(name))? {
            NetworkKind::remove(draft, &network)?;
        }
        for group in draft.list::<SecurityGroupKind>(Some(name))? {
            draft.remove(&group);
        }
        for event in draft.list::<EventKind>(Some(name))?.iter().take(EVENTS_WITH_PROJECT) {
            draft.delete(objects::key_of(event));
        }
        draft.remove(project);
        Ok(())
    }
}

fn is_default(name: &str, kind: &str) -> bool {
    match kind {
        "network" | "subnet" => name == DEFAULT_NETWORK,
        "security-group" => name == DEFAULT_SECURITY_GROUP,
        _ => false,
    }
}

fn organization(project: &Project) -> Result<(), ApiError> {
    if project.spec.organization == DEFAULT_ORGANIZATION {
        return Ok(());
    }
    Err(ApiError::invalid("/spec/organization", "is not known; only \"default\" exists in this version"))
}

/// New grants must name users that exist, or whoever later takes the name would have them.
fn check_grants(draft: &mut Draft, old: Option<&Project>, new: &Project) -> Result<(), ApiError> {
    let had = |user: &str| old.is_some_and(|old| old.spec.grants.iter().any(|grant| grant.user == user));
    let mut added = 0;
    for (i, grant) in new.spec.grants.iter().enumerate() {
        if had(&grant.user) {
            continue;
        }
        added += 1;
        if added > NEW_GRANTS {
            return Err(ApiError::invalid(
                "/spec/grants",
                format!("adds more than {NEW_GRANTS} users at once; add the others later"),
            ));
        }
        if draft.app.find::<UserKind>("_", &grant.user)?.is_some_and(|user| user.metadata.name != grant.user) {
            return Err(ApiError::invalid(&format!("/spec/grants/{i}/user"), "must be a name, not an id"));
        }
        draft.need::<UserKind>("_", &grant.user, &format!("/spec/grants/{i}/user"))?;
    }
    Ok(())
}

/// Network, subnet and security group that every project has. The network must be given this id.
pub(crate) fn default_objects(network_id: Uuid) -> (Network, Subnet, SecurityGroup) {
    let network = Network::new(DEFAULT_NETWORK, NetworkSpec::default());
    let cidr = DEFAULT_CIDR.parse().expect("a constant address range");
    let mut subnet = Subnet::new(DEFAULT_NETWORK, SubnetSpec::new(DEFAULT_NETWORK, cidr));
    subnet.status.network = NetworkId(network_id);
    // Members of the group reach each other with every protocol, ICMP included; replies to what they send out always pass.
    let among = SecurityRule {
        direction: Direction::Ingress,
        group: Some(DEFAULT_SECURITY_GROUP.into()),
        ..SecurityRule::default()
    };
    let group = SecurityGroup::new(
        DEFAULT_SECURITY_GROUP,
        SecurityGroupSpec { description: "Instances of this project reach each other.".into(), rules: vec![among] },
    );
    (network, subnet, group)
}

/// Adds them to the commit.
fn seed_project(draft: &mut Draft, project: &str) -> Result<(), ApiError> {
    let id = draft.app.uuid();
    let (mut network, mut subnet, mut group) = default_objects(id);
    draft.stamp(&mut network, Some(project));
    network.metadata.id = id;
    super::network::take_vni(draft, &mut network)?;
    draft.stamp(&mut subnet, Some(project));
    draft.stamp(&mut group, Some(project));
    draft.create(&network)?;
    draft.create(&subnet)?;
    draft.create(&group)
}
