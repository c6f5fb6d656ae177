//! What is special about each kind when objects come in through the API: references that must exist, things taken together with the
//! object, and who still uses it when it should go.
//!
//! To add a kind: its type in the model, `impl Resource` here, and its name in `for_each_kind!`.

mod flavor;
mod ha;
mod image;
mod instance;
mod join_token;
mod migration;
mod network;
mod node;
mod ports;
mod project;
mod storage;
mod user;

use std::future::Future;

use oblak_identity::{Action, Principal, Target};
use oblak_model::wire::NODE_FINALIZER;
use oblak_model::{ApiError, Code, Kind, NodeId, Object};

use crate::auth::Caller;
use crate::draft::Draft;
use crate::state::App;

pub(crate) use instance::instance_volumes;
pub(crate) use join_token::by_digest;
pub(crate) use project::default_objects;

/// Who may see and change objects of a kind; see the table of [`oblak_identity::policy`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Access {
    InProject,
    Project,
    Catalog,
    Operations,
    Owned,
}

/// A kind as the API serves it.
pub(crate) trait Resource: Kind {
    const ACCESS: Access;
    /// Others name it, so deletion happens in two steps: first nobody can start to use it, then it is looked whether somebody does.
    const NAMED_BY_OTHERS: bool = false;
    /// Answers are made by [`Resource::decorate`] instead of straight from the store.
    const DECORATED: bool = false;

    /// For [`Access::Owned`]: the user.
    fn owner(_: &Object<Self>) -> &str {
        ""
    }

    /// Whether every user may read it and use it by name, whatever project owns it.
    fn offered(_: &Object<Self>) -> bool {
        false
    }

    /// Takes a secret out of the spec before anything is stored.
    fn take_secret(_: &mut Object<Self>) -> Option<String> {
        None
    }

    /// What is stored for a secret.
    fn seal(_: &App, secret: String) -> impl Future<Output = Result<String, ApiError>> + Send {
        async { Ok(secret) }
    }

    /// Completes a new object and adds what belongs to it to the commit. Answers a secret to show once.
    fn create(
        draft: &mut Draft,
        by: &Principal,
        object: &mut Object<Self>,
        sealed: Option<&str>,
    ) -> Result<Option<String>, ApiError>;

    /// Puts the secret into the answer to a creation.
    fn reveal(_: &mut Object<Self>, _secret: String) {}

    /// Completes a changed object. `new` is the old one with labels and spec replaced.
    fn update(
        _draft: &mut Draft,
        _by: &Principal,
        _old: &Object<Self>,
        _new: &mut Object<Self>,
        _sealed: Option<&str>,
    ) -> Result<(), ApiError> {
        Ok(())
    }

    /// Refuses with `in_use` while something needs the object.
    fn may_delete(_: &Draft, _: &Object<Self>) -> Result<(), ApiError> {
        Ok(())
    }

    /// Deletion was asked for: sets the phase and finalizers.
    fn begin_delete(_: &mut Draft, _: &mut Object<Self>) -> Result<(), ApiError> {
        Ok(())
    }

    /// Removes the object and what belongs to it.
    fn remove(draft: &mut Draft, object: &Object<Self>) -> Result<(), ApiError> {
        draft.remove(object);
        Ok(())
    }

    /// Fills in what is not stored with the object.
    fn decorate(_: &App, _: &mut Object<Self>) {}
}

/// The choke point for an object, or for a kind where there is no object yet.
pub(crate) fn allow<K: Resource>(
    app: &App,
    caller: &Caller,
    action: Action,
    project: Option<&str>,
    object: Option<&Object<K>>,
) -> Result<(), ApiError> {
    match K::ACCESS {
        Access::InProject => caller.in_project(app, action, project.unwrap_or_default()),
        Access::Project => {
            let name = object.map_or("", |o| o.metadata.name.as_str());
            let found = app.granting(name)?;
            let grants = found.as_deref().map(|project| project.spec.grants.as_slice());
            caller.check(action, &Target::Project { project: name, grants })
        }
        Access::Catalog => caller.check(action, &Target::Catalog),
        Access::Operations => caller.check(action, &Target::Operations),
        Access::Owned => caller.check(action, &Target::OwnedBy(object.map_or("", K::owner))),
    }
}

/// The object is used by another one.
pub(crate) fn in_use(what: &str, by: &str) -> ApiError {
    ApiError::new(Code::InUse, format!("{what} is used by {by}"))
}

/// Objects of this kind come into being with others.
pub(crate) fn not_creatable(kind: &str, how: &str) -> ApiError {
    ApiError::new(Code::Unsupported, format!("objects of kind {kind} cannot be created by hand; {how}"))
}

/// Whether there is a node that can clean up. One that was removed from the cloud never will.
pub(crate) fn can_clean(draft: &Draft, node: Option<NodeId>) -> bool {
    node.is_some_and(|node| draft.raw(&crate::node::removed_key(node)).is_none())
}

/// A node has something of the object and must clean up first.
pub(crate) fn needs_node<K: Kind>(object: &mut Object<K>) {
    object.metadata.finalizers.insert(NODE_FINALIZER.into());
}
