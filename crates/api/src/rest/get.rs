//! Reading one object.

use std::sync::Arc;

use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::response::IntoResponse;
use oblak_identity::Action;
use oblak_model::{ApiError, Code, EventKind, Kind, Object, Scope};
use oblak_store::{Prefix, objects};

use super::{Params, show, shown};
use crate::auth::Caller;
use crate::docs;
use crate::error::{Answer, store_error};
use crate::kinds::{Access, Resource, allow};
use crate::request::{IfNoneMatch, Query};
use crate::state::App;

pub(super) async fn get<K: Resource>(
    State(app): State<App>,
    caller: Caller,
    Path(params): Params,
    query: Query,
    IfNoneMatch(seen): IfNoneMatch,
) -> Answer {
    query.only(&[])?;
    let project = params.project();
    let name = params.item::<K>();
    let item = lookup::<K>(&app, &caller, project, name, Action::Read)?;
    if seen == Some(item.revision) && !K::DECORATED {
        return Ok(StatusCode::NOT_MODIFIED.into_response());
    }
    let revision = app.docs.revision();
    if K::DECORATED {
        let mut object: Object<K> = docs::object(&item)?;
        K::decorate(&app, &mut object);
        return Ok(show(StatusCode::OK, &object, revision));
    }
    Ok(shown(StatusCode::OK, docs::json(&item), item.revision, revision))
}

/// Finds an object and checks that the caller may do this with it. What the caller may not see does not exist.
pub(super) fn lookup<K: Resource>(
    app: &App,
    caller: &Caller,
    project: Option<&str>,
    name: &str,
    action: Action,
) -> Result<Arc<docs::Item>, ApiError> {
    // In a project, and for kinds without owners, rights do not depend on the object: they come first, so that nobody learns what exists.
    let by_object = matches!(K::ACCESS, Access::Owned | Access::Project);
    if !by_object {
        allow::<K>(app, caller, action, project, None)?;
    }
    let user = caller.principal.user()?;
    let missing = || ApiError::not_found(K::KIND, name);
    let scope = docs::scope_of::<K>(project);
    let Some(item) = docs::find::<K>(&app.docs, scope, name) else {
        let Some(item) = offered::<K>(app, name)? else { return Err(missing()) };
        if action == Action::Read {
            return Ok(item);
        }
        let object: Object<K> = docs::object(&item).map_err(|e| store_error(&e))?;
        return Err(ApiError::new(
            Code::Forbidden,
            format!("{} belongs to project {:?} and can only be changed there", object.describe(), object.scope_key()),
        ));
    };
    if by_object {
        let object: Object<K> = docs::object(&item).map_err(|e| store_error(&e))?;
        if let Err(error) = allow::<K>(app, caller, Action::Read, project, Some(&object)) {
            tracing::trace!(user = user.name, %error, "hidden");
            return Err(missing());
        }
        allow::<K>(app, caller, action, project, Some(&object))?;
    }
    Ok(item)
}

/// What another project offers to everybody under this name or id; the oldest, as instances do that name it.
fn offered<K: Resource>(app: &App, name: &str) -> Result<Option<Arc<docs::Item>>, ApiError> {
    if K::SCOPE != Scope::Project || K::KIND == EventKind::KIND {
        return Ok(None);
    }
    let by_id = name.parse::<uuid::Uuid>().is_ok();
    let prefix = if by_id {
        objects::object_prefix::<K>(None)
    } else {
        Prefix::new(&format!("/name/{}", K::KIND)).map_err(|e| store_error(&e))?
    };
    let found: Vec<Arc<docs::Item>> = app.docs.view(|view| {
        let same = view.range(&prefix, None).filter(|item| item.key.last() == name);
        if by_id {
            return same.cloned().collect();
        }
        same.filter_map(|item| {
            view.get(&objects::object_key::<K>(item.key.segments().nth(2)?, docs::named_id(item)?)).cloned()
        })
        .collect()
    });
    let mut best: Option<(Object<K>, Arc<docs::Item>)> = None;
    for item in found {
        let object: Object<K> = docs::object(&item).map_err(|e| store_error(&e))?;
        let age = |o: &Object<K>| (o.metadata.created_at, o.metadata.id);
        if K::offered(&object) && best.as_ref().is_none_or(|(other, _)| age(&object) < age(other)) {
            best = Some((object, item));
        }
    }
    Ok(best.map(|(_, item)| item))
}
