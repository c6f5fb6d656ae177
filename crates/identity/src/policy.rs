//! The choke point: one pure function says what each principal may do with each target.
//!
//! | target | reads | writes |
//! |---|---|---|
//! | objects in a project | reader | member |
//! | a project itself | reader | its admin; creating and deleting: cloud admin |
//! | flavors | every user | cloud admin |
//! | users, tokens | the user itself | the user itself (what it may change is limited further by admission) |
//! | nodes | cloud admin | cloud admin |
//! | the list of servers | every user, every node | nobody |
//! | a node's protocol | that node's certificate | that node's certificate |
//!
//! Somebody without any role in a project is told `not_found`, as if it did not exist.

use oblak_model::{ApiError, Code, Grant, NodeId, Role};

use crate::principal::{Principal, UserPrincipal};

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Get, list, watch, plan, read logs.
    Read,
    /// Create.
    Create,
    /// Replace or patch.
    Update,
    /// Delete.
    Delete,
    /// Open a console or screen, run a program, reach a port.
    Use,
    /// Choose what only a project's admin may: host user ids, grants.
    Administer,
}

/// With what.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target<'a> {
    /// Objects that a project owns.
    InProject {
        /// Its name, for the message.
        project: &'a str,
        /// Its grants; none when it does not exist.
        grants: Option<&'a [Grant]>,
    },
    /// The project itself.
    Project {
        /// Its name, for the message.
        project: &'a str,
        /// Its grants; none when it does not exist.
        grants: Option<&'a [Grant]>,
    },
    /// Objects of a kind of the cloud that every user sees.
    Catalog,
    /// Objects of a kind of the cloud that only operators see.
    Operations,
    /// What belongs to one user: the user object, its tokens.
    OwnedBy(&'a str),
    /// The paths of one node's agent.
    NodeProtocol(NodeId),
    /// Where the servers of the cloud are.
    Servers,
}

/// The role that a user has by these grants.
#[must_use]
pub fn role_of(user: &UserPrincipal, grants: &[Grant]) -> Option<Role> {
    grants.iter().find(|grant| grant.user == user.name).map(|grant| grant.role)
}

/// Decides.
///
/// # Errors
/// `unauthenticated`, `forbidden`, or `not_found` where even the existence is nobody's business.
pub fn authorize(principal: &Principal, action: Action, target: &Target<'_>) -> Result<(), ApiError> {
    if let Target::NodeProtocol(node) = target {
        return match principal {
            Principal::Node(id) if id == node => Ok(()),
            Principal::Anonymous => Err(crate::principal::unauthenticated()),
            _ => Err(forbidden("these paths are for the agent of that node")),
        };
    }
    if *target == Target::Servers && action == Action::Read && matches!(principal, Principal::Node(_)) {
        return Ok(());
    }
    let user = principal.user()?;
    match *target {
        Target::Servers | Target::Catalog if action == Action::Read => Ok(()),
        Target::Servers => Err(forbidden("servers register themselves")),
        Target::InProject { project, grants } => in_project(user, action, project, grants, needed_inside(action)),
        Target::Project { project, grants } => in_project(user, action, project, grants, needed_on_project(action)),
        Target::OwnedBy(owner) if owner == user.name => Ok(()),
        Target::OwnedBy(owner) if action == Action::Read && !user.cloud_admin => {
            Err(ApiError::not_found("object of user", owner))
        }
        _ if user.cloud_admin => Ok(()),
        _ => Err(forbidden("this needs a cloud admin")),
    }
}

/// The least role; none: cloud admins only.
fn needed_inside(action: Action) -> Option<Role> {
    Some(match action {
        Action::Read => Role::Reader,
        Action::Create | Action::Update | Action::Delete | Action::Use => Role::Member,
        Action::Administer => Role::Admin,
    })
}

fn needed_on_project(action: Action) -> Option<Role> {
    match action {
        Action::Read => Some(Role::Reader),
        Action::Update | Action::Administer => Some(Role::Admin),
        Action::Create | Action::Delete | Action::Use => None,
    }
}

fn in_project(
    user: &UserPrincipal,
    action: Action,
    project: &str,
    grants: Option<&[Grant]>,
    needed: Option<Role>,
) -> Result<(), ApiError> {
    if user.cloud_admin && (grants.is_some() || action == Action::Create) {
        return Ok(());
    }
    let Some(role) = grants.and_then(|grants| role_of(user, grants)) else {
        // A user without any role may still be told that creating projects is not for them: that reveals nothing.
        return Err(match needed {
            None if action == Action::Create => forbidden("creating projects needs a cloud admin"),
            _ => ApiError::not_found("project", project),
        });
    };
    match needed {
        Some(needed) if role >= needed => Ok(()),
        Some(needed) => Err(forbidden(&format!(
            "this needs the role {} in project {project:?}; yours is {}",
            word(needed),
            word(role)
        ))),
        None => Err(forbidden("this needs a cloud admin")),
    }
}

const fn word(role: Role) -> &'static str {
    match role {
        Role::Reader => "reader",
        Role::Member => "member",
        Role::Admin => "admin",
    }
}

fn forbidden(detail: &str) -> ApiError {
    ApiError::new(Code::Forbidden, detail)
}

#[cfg(test)]
mod tests {
    use super::*;
    use oblak_model::UserId;
    use proptest::prelude::*;

    fn user(name: &str, cloud_admin: bool) -> Principal {
        Principal::User(UserPrincipal { id: UserId::default(), name: name.into(), cloud_admin, token: None })
    }

    fn code(principal: &Principal, action: Action, target: &Target<'_>) -> Option<Code> {
        authorize(principal, action, target).err().map(|e| e.code)
    }

    #[test]
    fn the_table_of_the_module() {
        let grants = [("r", Role::Reader), ("m", Role::Member), ("a", Role::Admin)]
            .map(|(user, role)| Grant { user: user.into(), role });
        let inside = Target::InProject { project: "p", grants: Some(&grants) };
        let itself = Target::Project { project: "p", grants: Some(&grants) };
        use Action::{Administer, Create, Delete, Read, Update, Use};
        for (name, action, target, expected) in [
            ("r", Read, &inside, None),
            ("r", Create, &inside, Some(Code::Forbidden)),
            ("r", Use, &inside, Some(Code::Forbidden)),
            ("m", Use, &inside, None),
            ("m", Delete, &inside, None),
            ("m", Administer, &inside, Some(Code::Forbidden)),
            ("a", Administer, &inside, None),
            ("x", Read, &inside, Some(Code::NotFound)),
            ("x", Delete, &inside, Some(Code::NotFound)),
            ("m", Update, &itself, Some(Code::Forbidden)),
            ("a", Update, &itself, None),
            ("a", Delete, &itself, Some(Code::Forbidden)),
            ("x", Create, &itself, Some(Code::Forbidden)),
            ("r", Read, &Target::Catalog, None),
            ("r", Create, &Target::Catalog, Some(Code::Forbidden)),
            ("r", Read, &Target::Operations, Some(Code::Forbidden)),
            ("r", Update, &Target::OwnedBy("r"), None),
            ("r", Read, &Target::OwnedBy("m"), Some(Code::NotFound)),
            ("r", Delete, &Target::OwnedBy("m"), Some(Code::Forbidden)),
        ] {
            assert_eq!(code(&user(name, false), action, target), expected, "{name} {action:?} {target:?}");
        }
        assert_eq!(code(&user("root", true), Delete, &itself), None);
        let missing = Target::InProject { project: "none", grants: None };
        assert_eq!(code(&user("root", true), Read, &missing), Some(Code::NotFound));
    }

    #[test]
    fn a_node_has_its_own_paths_and_nothing_else() {
        let (mine, other) = (NodeId(uuid(1)), NodeId(uuid(2)));
        let node = Principal::Node(mine);
        assert_eq!(code(&node, Action::Update, &Target::NodeProtocol(mine)), None);
        assert_eq!(code(&node, Action::Update, &Target::NodeProtocol(other)), Some(Code::Forbidden));
        assert_eq!(code(&node, Action::Read, &Target::Catalog), Some(Code::Forbidden));
        assert_eq!(code(&node, Action::Read, &Target::Servers), None);
        assert_eq!(code(&node, Action::Update, &Target::Servers), Some(Code::Forbidden));
        assert_eq!(code(&user("r", false), Action::Read, &Target::Servers), None);
        assert_eq!(code(&user("root", true), Action::Delete, &Target::Servers), Some(Code::Forbidden));
        assert_eq!(code(&Principal::Anonymous, Action::Read, &Target::Servers), Some(Code::Unauthenticated));
        assert_eq!(code(&user("root", true), Action::Update, &Target::NodeProtocol(mine)), Some(Code::Forbidden));
        assert_eq!(
            code(&Principal::Anonymous, Action::Update, &Target::NodeProtocol(mine)),
            Some(Code::Unauthenticated)
        );
    }

    fn uuid(n: u128) -> uuid::Uuid {
        uuid::Uuid::from_u128(n)
    }

    proptest! {
        /// Whatever the grants are, somebody they do not name learns nothing and changes nothing.
        #[test]
        fn strangers_find_nothing(names in proptest::collection::vec("[a-z]{1,6}", 0..8), action in 0usize..6) {
            let grants: Vec<_> = names.into_iter().map(|user| Grant { user, role: Role::Admin }).collect();
            let action = [Action::Read, Action::Create, Action::Update, Action::Delete, Action::Use, Action::Administer][action];
            let target = Target::InProject { project: "p", grants: Some(&grants) };
            prop_assert_eq!(code(&user("a-stranger", false), action, &target), Some(Code::NotFound));
            prop_assert_eq!(code(&Principal::Anonymous, action, &target), Some(Code::Unauthenticated));
        }
    }
}
